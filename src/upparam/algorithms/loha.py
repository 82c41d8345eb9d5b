"""LoHa: dW = (w1_a @ w1_b) * (w2_a @ w2_b), elementwise; with Tucker cores t1, t2 for kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import sqrt
from typing import TYPE_CHECKING, Any, ClassVar

from upparam.algorithms.base import Delta, Scaling, Update, refuse_empty
from upparam.algorithms.lora import LowRankUpdate
from upparam.errors import MalformedError
from upparam.tensors import Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_WIDEST = 256
"""Product of the two ranks up to which the form up @ down of that rank costs less than two products and their elementwise one."""


class HadamardUpdate(Update):
    """Two pairs of up (out, r) and down (r, prod(rest)) in memory as float64."""

    def __init__(self, first: LowRankUpdate, second: LowRankUpdate, scale: float) -> None:
        self.first, self.second, self.scale = first, second, scale
        self.shape = first.shape

    def rows(self, start: int, stop: int) -> NDArray[np.float64]:
        """Rows [start, stop) of scale * dW."""
        rows = self.first.rows(start, stop)
        rows *= self.second.rows(start, stop)
        rows *= self.scale
        return rows

    def low_rank(self) -> tuple[NDArray[Any], NDArray[Any]] | None:
        """The products of all pairs of columns, and of rows: (out, r1 r2), (r1 r2, prod(rest)). None where that is wide."""
        up, down = self.first.low_rank()
        other_up, other_down = self.second.low_rank()
        if up.shape[1] * other_up.shape[1] > min(_WIDEST, len(up), down.shape[1]):
            return None
        left = (up[:, :, None] * other_up[:, None, :]).reshape(len(up), -1)
        return left, (down[:, None, :] * other_down[None, :, :]).reshape(left.shape[1], -1)


@dataclass(frozen=True)
class LoHa(Delta):
    """w1_a, w2_a (out, r) and w1_b, w2_b (r, in), where a kernel is flattened behind `in`; or with cores t1, t2 (r, r, *kernel)
    w1_a, w2_a (r, out) and w1_b, w2_b (r, in), dW_1[o, i, x] = sum_pq t1[p, q, x] w1_a[p, o] w1_b[q, i].

    Sources: KohakuBlueleaf/LyCORIS lycoris/functional/loha.py; huggingface/peft src/peft/tuners/loha/layer.py. The scale is applied
    once, as LyCORIS' forward does; its `get_diff_weight` (version 4.1.3) applies it twice.
    """

    algorithm: ClassVar[str] = "loha"
    linear: ClassVar[tuple[str, ...]] = ("w1_a",)
    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    t1: Tensor | None = None
    t2: Tensor | None = None
    scaling: Scaling = field(default_factory=Scaling)

    def __post_init__(self) -> None:
        first, second = (self.w1_a, self.w1_b, self.t1), (self.w2_a, self.w2_b, self.t2)
        if (self.t1 is None) != (self.t2 is None) or not (_fit(*first) and _fit(*second)) or _shape(*first) != _shape(*second):
            raise MalformedError(
                "the factors do not fit together", expected="(out, r) and (r, in) twice, or with cores (r, out), (r, in) and (r, r, ...)",
                found=", ".join(f"{role} {factor.shape}" for role, factor in self.factors().items()),
            )  # fmt: skip
        refuse_empty(self)

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in * prod(kernel)), or (out, in, *kernel) with cores."""
        return _shape(self.w1_a, self.w1_b, self.t1)

    @property
    def rank(self) -> int:
        """That of each of the two products; the rank of dW is up to its square."""
        return self.w1_b.shape[0]

    def factors(self) -> Mapping[str, Tensor]:
        """`w1_a`, `w1_b`, `w2_a`, `w2_b` and, if there are any, `t1` and `t2`."""
        found = {"w1_a": self.w1_a, "w1_b": self.w1_b, "w2_a": self.w2_a, "w2_b": self.w2_b, "t1": self.t1, "t2": self.t2}
        return {role: factor for role, factor in found.items() if factor is not None}

    def load(self) -> HadamardUpdate:
        """Factors in memory as float64, cores contracted."""
        first, second = _pair(self.w1_a, self.w1_b, self.t1, self.shape), _pair(self.w2_a, self.w2_b, self.t2, self.shape)
        return HadamardUpdate(first, second, self.known_scale())

    def frobenius(self) -> float:
        """||scale * dW||_F, through the Gram matrices of the low-rank form where there is one."""
        update = self.load()
        form = update.low_rank()
        if form is None:
            return super().frobenius()
        up, down = form
        return abs(update.scale) * sqrt(max(float(((up.T @ up) * (down @ down.T)).sum()), 0.0))

    def cut_rows(self, start: int, stop: int) -> LoHa:
        """The delta of rows [start, stop) alone."""
        cut = [a.rows(start, stop) if self.t1 is None else a.columns(start, stop) for a in (self.w1_a, self.w2_a)]
        return replace(self, w1_a=cut[0], w2_a=cut[1])

    def join_rows(self, others: Sequence[LoHa]) -> LoHa | None:
        """The delta of the weight that stacks these; None where they differ in more than w1_a and w2_a."""
        from upparam.algorithms.slicing import same_tensor, stack

        shared = ("w1_b", "w2_b", "t1", "t2")
        for other in others:
            theirs = other.factors()
            if other.scaling != self.scaling or other.w1_a.dtype != self.w1_a.dtype or other.w2_a.dtype != self.w2_a.dtype:
                return None
            if any((role in self.factors()) != (role in theirs) for role in shared):
                return None
            if not all(same_tensor(factor, theirs[role]) for role, factor in self.factors().items() if role in shared):
                return None
        parts = [self, *others]
        if self.t1 is None:
            return replace(self, w1_a=stack([part.w1_a for part in parts]), w2_a=stack([part.w2_a for part in parts]))
        return replace(self, w1_a=stack([part.w1_a.T for part in parts]).T, w2_a=stack([part.w2_a.T for part in parts]).T)

    def take_rows(self, rows: Sequence[int]) -> LoHa:
        """The delta of the weight whose row i is this one's row `rows[i]`."""
        from upparam.algorithms.slicing import take_rows

        if self.t1 is None:
            return replace(self, w1_a=take_rows(self.w1_a, rows), w2_a=take_rows(self.w2_a, rows))
        return replace(self, w1_a=take_rows(self.w1_a.T, rows).T, w2_a=take_rows(self.w2_a.T, rows).T)


def _fit(a: Tensor, b: Tensor, core: Tensor | None) -> bool:
    if len(a.shape) != 2 or len(b.shape) != 2:
        return False
    if core is None:
        return a.shape[1] == b.shape[0]
    return len(core.shape) > 2 and core.shape[:2] == (a.shape[0], b.shape[0])


def _shape(a: Tensor, b: Tensor, core: Tensor | None) -> tuple[int, ...]:
    return (a.shape[0], b.shape[1]) if core is None else (a.shape[1], b.shape[1], *core.shape[2:])


def _pair(a: Tensor, b: Tensor, core: Tensor | None, shape: tuple[int, ...]) -> LowRankUpdate:
    up, down = a.doubles(), b.doubles()
    return LowRankUpdate(up, down, shape, 1.0) if core is None else LowRankUpdate(up.T, tucker(core.doubles(), down), shape, 1.0)


def tucker(core: NDArray[np.float64], down: NDArray[np.float64]) -> NDArray[np.float64]:
    """core (p, q, *kernel) with its second mode contracted with down (q, in): (p, in * prod(kernel)), float64."""
    import numpy as np

    p, q = core.shape[:2]
    found: NDArray[np.float64] = np.einsum("pqx,qi->pix", core.reshape(p, q, -1), down, optimize=True)
    return found.reshape(p, -1)
