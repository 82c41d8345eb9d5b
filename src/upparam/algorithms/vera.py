"""VeRA: dW = diag(b) @ up @ diag(d) @ down with random up and down that all modules share and vectors b, d that are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import TYPE_CHECKING, ClassVar

from upparam.algorithms.base import BAKED, Delta, Scaling
from upparam.algorithms.lora import LowRankUpdate
from upparam.errors import MalformedError
from upparam.tensors import Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class VeRA(Delta):
    """up (out, r) and down (r, in), the parts of the shared projections that this module uses; b (out,), d (r,).

    Source: huggingface/peft src/peft/tuners/vera/layer.py: of the shared vera_B the first `out` rows, of vera_A the first `in` columns.
    A file without the projections (save_projection false) says only from which seed another library made them; then there is no VeRA.
    """

    algorithm: ClassVar[str] = "vera"
    linear: ClassVar[tuple[str, ...]] = ("b",)
    up: Tensor
    down: Tensor
    b: Tensor
    d: Tensor
    scaling: Scaling = BAKED

    def __post_init__(self) -> None:
        up, down = self.up.shape, self.down.shape
        if len(up) != 2 or len(down) != 2 or up[1] != down[0] or self.b.shape != up[:1] or self.d.shape != down[:1]:
            raise MalformedError(
                "the factors do not fit together", expected="up (out, r), down (r, in), b (out,), d (r,)",
                found=f"up {up}, down {down}, b {self.b.shape}, d {self.d.shape}",
            )  # fmt: skip

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)."""
        return (self.up.shape[0], self.down.shape[1])

    @property
    def rank(self) -> int:
        """The inner dimension of the projections."""
        return self.down.shape[0]

    def factors(self) -> Mapping[str, Tensor]:
        """`up`, `down`, `b`, `d`."""
        return {"up": self.up, "down": self.down, "b": self.b, "d": self.d}

    def matrices(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(diag(b) @ up, diag(d) @ down) in float64."""
        return self.b.doubles()[:, None] * self.up.doubles(), self.d.doubles()[:, None] * self.down.doubles()

    def load(self) -> LowRankUpdate:
        """Factors in memory as float64."""
        return LowRankUpdate(*self.matrices(), self.shape, self.known_scale())

    def frobenius(self) -> float:
        """||dW||_F from the Gram matrices."""
        up, down = self.matrices()
        return abs(self.known_scale()) * sqrt(max(float(((up.T @ up) * (down @ down.T)).sum()), 0.0))

    def cut_rows(self, start: int, stop: int) -> VeRA:
        """The delta of rows [start, stop) alone."""
        return replace(self, up=self.up.rows(start, stop), b=self.b.rows(start, stop))

    def join_rows(self, others: Sequence[VeRA]) -> VeRA | None:
        """The delta of the weight that stacks these; None where they differ in d or down."""
        from upparam.algorithms.slicing import same_tensor, stack

        if not all(same_tensor(self.down, other.down) and same_tensor(self.d, other.d) for other in others):
            return None
        parts = [self, *others]
        if len({(part.up.dtype, part.b.dtype) for part in parts}) > 1:
            return None
        return replace(self, up=stack([part.up for part in parts]), b=stack([part.b for part in parts]))
