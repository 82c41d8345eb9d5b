"""GLoRA as LyCORIS has it: W' = W + scale * (W @ A + B) with A = a1 @ a2 and B = b1 @ b2 of low rank."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, ClassVar

from upparam.algorithms.base import Delta, DependentUpdate, RowReader, Scaling
from upparam.algorithms.lora import LoRA, LowRankUpdate
from upparam.errors import MalformedError
from upparam.tensors import Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class GeneralUpdate(DependentUpdate):
    """a1 (in, r), a2 (r, in) and B in memory as float64."""

    def __init__(self, a1: NDArray[np.float64], a2: NDArray[np.float64], b: LowRankUpdate) -> None:
        self.a1, self.a2, self.b = a1, a2, b
        self.shape, self.scale = b.shape, b.scale

    def merged(self, weight: RowReader, start: int, stop: int) -> NDArray[np.float64]:
        """Rows [start, stop) of W'; A mixes the input channels, each place of a kernel by itself."""
        rows = weight(start, stop)
        change = self.b.rows(start, stop)
        places = rows.reshape(stop - start, len(self.a1), -1).swapaxes(1, 2)
        mixed: NDArray[np.float64] = (places @ self.a1) @ self.a2
        change += self.scale * mixed.swapaxes(1, 2).reshape(change.shape)
        change += rows
        return change


@dataclass(frozen=True)
class GLoRA(Delta):
    """a1 (in, r), a2 (r, in), b1 (out, r), b2 (r, in, *kernel), and with a Tucker core bm (r, r, *kernel) b2 (r, in, 1, ..).

    Of a convolution all have kernel axes. Sources: arXiv 2306.07967; KohakuBlueleaf/LyCORIS lycoris/modules/glora.py.
    """

    algorithm: ClassVar[str] = "glora"
    additive: ClassVar[bool] = False
    a1: Tensor
    a2: Tensor
    b1: Tensor
    b2: Tensor
    bm: Tensor | None = None
    scaling: Scaling = field(default_factory=Scaling)

    def __post_init__(self) -> None:
        a1, a2 = self.a1.shape, self.a2.shape
        fits = len(a1) >= 2 and len(a2) >= 2 and a1[:2] == (a2[1], a2[0]) and prod(a1[2:]) == prod(a2[2:]) == 1
        if not fits or self.additional.shape[1] != a1[0] or self.additional.rank != a2[0]:
            raise MalformedError(
                "the factors do not fit together", expected="a1 (in, r), a2 (r, in), b1 (out, r), b2 (r, in, ...)",
                found=", ".join(f"{role} {factor.shape}" for role, factor in self.factors().items()),
            )  # fmt: skip

    @property
    def additional(self) -> LoRA:
        """B with the scale: what is added whatever the base."""
        return LoRA(self.b1, self.b2, self.scaling, self.bm)

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in, *kernel)."""
        return self.additional.shape

    @property
    def rank(self) -> int:
        """That of A and of B."""
        return self.b2.shape[0]

    def factors(self) -> Mapping[str, Tensor]:
        """`a1`, `a2`, `b1`, `b2` and, if there is one, `bm`."""
        return {"a1": self.a1, "a2": self.a2, "b1": self.b1, "b2": self.b2} | ({"bm": self.bm} if self.bm is not None else {})

    def idle(self, zeros: Collection[str]) -> bool:
        """True when both A and B are zero."""
        return bool({"a1", "a2"} & set(zeros)) and bool({"b1", "b2", "bm"} & set(zeros))

    def load(self) -> GeneralUpdate:
        """Factors in memory as float64."""
        a1, a2 = self.a1.doubles(), self.a2.doubles()
        return GeneralUpdate(a1.reshape(a1.shape[:2]), a2.reshape(a2.shape[:2]), self.additional.load())

    def cut_rows(self, start: int, stop: int) -> GLoRA:
        """The delta of rows [start, stop) alone."""
        return replace(self, b1=self.b1.rows(start, stop))

    def join_rows(self, others: Sequence[GLoRA]) -> GLoRA | None:
        """The delta of the weight that stacks these; None where they differ in more than b1."""
        from upparam.algorithms.slicing import same_tensor, stack

        mine = self.factors()
        for other in others:
            theirs = other.factors()
            if other.scaling != self.scaling or theirs.keys() != mine.keys() or other.b1.dtype != self.b1.dtype:
                return None
            if not all(same_tensor(factor, theirs[role]) for role, factor in mine.items() if role != "b1"):
                return None
        return replace(self, b1=stack([part.b1 for part in (self, *others)]))

    def take_rows(self, rows: Sequence[int]) -> GLoRA:
        """The delta of the weight whose row i is this one's row `rows[i]`."""
        from upparam.algorithms.slicing import take_rows

        return replace(self, b1=take_rows(self.b1, rows))
