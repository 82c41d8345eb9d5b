"""LoKr: dW = w1 (x) w2, a Kronecker product whose factors are full or products of two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from upparam.algorithms.base import Delta, ScaleRule, Scaling, Update, refuse_empty
from upparam.algorithms.loha import tucker
from upparam.errors import MalformedError
from upparam.tensors import Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_WIDEST = 256
"""Inner rank up to which the form up @ down costs less than rows of the product."""

Half = tuple["NDArray[np.float64]", "NDArray[np.float64]"]
"""One factor of the Kronecker product as a @ b."""


class KroneckerUpdate(Update):
    """w1 (a, b) and w2 (c, d * prod(kernel)) in memory as float64, and each as a product of two."""

    def __init__(self, first: Half | NDArray[np.float64], second: Half | NDArray[np.float64], shape: tuple[int, ...], scale: float) -> None:
        self.w1, self.w2 = _whole(first), _whole(second)
        self._halves = (first, second)
        self.shape, self.scale = shape, scale

    def rows(self, start: int, stop: int) -> NDArray[np.float64]:
        """Rows [start, stop) of scale * dW: row a * c + i is the products of row a of w1 and row i of w2."""
        import numpy as np

        high, low = np.divmod(np.arange(start, stop), len(self.w2))
        rows = (self.w1[high] * self.scale)[:, :, None] * self.w2[low][:, None, :]
        return rows.reshape(stop - start, -1)

    def low_rank(self) -> tuple[NDArray[Any], NDArray[Any]] | None:
        """(A (x) C, B (x) D) with w1 = A @ B and w2 = C @ D: the inner rank is the product of theirs. None where that is wide."""
        import numpy as np

        (a, b), (c, d) = (_product(half) for half in self._halves)
        if a.shape[1] * c.shape[1] > min(_WIDEST, len(self.w1) * len(self.w2), self.w1.shape[1] * self.w2.shape[1]):
            return None
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is told by who uses it, by name
            return np.kron(a, c), np.kron(b, d)


@dataclass(frozen=True)
class LoKr(Delta):
    """w1 (a, b) or w1_a (a, r) @ w1_b (r, b); w2 (c, d, *kernel), w2_a (c, r) @ w2_b (r, d) with a kernel flattened behind d, or with
    the core t2 (r, r, *kernel) w2_a (r, c) and w2_b (r, d). dW is (a c, b d, *kernel).

    Sources: KohakuBlueleaf/LyCORIS lycoris/modules/lokr.py; huggingface/peft src/peft/tuners/lokr/layer.py. Under alpha / rank without a
    divisor two full factors have no rank and the scale is 1 (LyCORIS, comfyanonymous/ComfyUI comfy/weight_adapter/lokr.py); PEFT divides
    by its configured r. The scale is applied once, as LyCORIS' forward does; its `get_diff_weight` (version 4.1.3) applies it twice.
    """

    algorithm: ClassVar[str] = "lokr"
    linear: ClassVar[tuple[str, ...]] = ("w1", "w1_a")
    w1: Tensor | None = None
    w1_a: Tensor | None = None
    w1_b: Tensor | None = None
    w2: Tensor | None = None
    w2_a: Tensor | None = None
    w2_b: Tensor | None = None
    t2: Tensor | None = None
    scaling: Scaling = field(default_factory=Scaling)

    def __post_init__(self) -> None:
        first = _fits(self.w1, self.w1_a, self.w1_b, None) and (self.w1 is None or len(self.w1.shape) == 2)
        ranks = {tensor.shape[:1] for tensor in (self.w1_b, self.w2_b) if tensor is not None}
        if not first or not _fits(self.w2, self.w2_a, self.w2_b, self.t2) or len(ranks) > 1:
            raise MalformedError(
                "the factors do not fit together", expected="w1, or w1_a (a, r) and w1_b (r, b); w2, or w2_a and w2_b of the same r",
                found=", ".join(f"{role} {factor.shape}" for role, factor in self.factors().items()),
            )  # fmt: skip
        refuse_empty(self)

    @property
    def shape(self) -> tuple[int, ...]:
        """(a c, b d, *kernel); the kernel is flattened into the second axis where w2_b holds it."""
        (a, b), (c, d, *kernel) = _sides(self.w1, self.w1_a, self.w1_b, None), _sides(self.w2, self.w2_a, self.w2_b, self.t2)
        return (a * c, b * d, *kernel)

    @property
    def rank(self) -> int | None:
        """That of the factors that are products; None when both are full."""
        product = self.w1_b if self.w1_b is not None else self.w2_b
        return None if product is None else product.shape[0]

    @property
    def scale(self) -> float | None:
        """The effective multiplier (see the class)."""
        if self.rank is None and self.scaling.rule is ScaleRule.ALPHA_OVER_RANK and self.scaling.divisor is None:
            return 1.0
        return super().scale

    def factors(self) -> Mapping[str, Tensor]:
        """Those there are of `w1`, `w1_a`, `w1_b`, `w2`, `w2_a`, `w2_b`, `t2`."""
        found = {
            "w1": self.w1, "w1_a": self.w1_a, "w1_b": self.w1_b, "w2": self.w2, "w2_a": self.w2_a, "w2_b": self.w2_b, "t2": self.t2,
        }  # fmt: skip
        return {role: factor for role, factor in found.items() if factor is not None}

    def load(self) -> KroneckerUpdate:
        """Factors in memory as float64, the core contracted."""
        first, second = _half(self.w1, self.w1_a, self.w1_b, None), _half(self.w2, self.w2_a, self.w2_b, self.t2)
        return KroneckerUpdate(first, second, self.shape, self.known_scale())

    def frobenius(self) -> float:
        """||scale * dW||_F = |scale| ||w1|| ||w2||."""
        import numpy as np

        update = self.load()
        return abs(update.scale) * float(np.linalg.norm(update.w1)) * float(np.linalg.norm(update.w2))

    def inner(self, other: Delta) -> float:
        """<scale * dW, scale' * dW'>_F; <w1, w1'> <w2, w2'> where both are Kronecker products of the same sizes."""
        if isinstance(other, LoKr) and other.shape == self.shape:
            ours, theirs = self.load(), other.load()
            if ours.w1.shape == theirs.w1.shape and ours.w2.shape == theirs.w2.shape:
                return ours.scale * theirs.scale * float((ours.w1 * theirs.w1).sum()) * float((ours.w2 * theirs.w2).sum())
        return super().inner(other)

    def cut_rows(self, start: int, stop: int) -> LoKr | None:
        """The delta of rows [start, stop) alone; None where they do not begin and end with whole rows of w1."""
        step = _sides(self.w2, self.w2_a, self.w2_b, self.t2)[0]
        if start % step or stop % step:
            return None
        low, high = start // step, stop // step
        if self.w1 is not None:
            return replace(self, w1=self.w1.rows(low, high))
        assert self.w1_a is not None
        return replace(self, w1_a=self.w1_a.rows(low, high))

    def take_rows(self, rows: Sequence[int]) -> LoKr | None:
        """The delta of the weight whose row i is this one's row `rows[i]`; None where these are no whole copies of w2."""
        from upparam.algorithms.slicing import take_rows, whole_blocks

        copies = whole_blocks(rows, _sides(self.w2, self.w2_a, self.w2_b, self.t2)[0])
        if copies is None:
            return None
        if self.w1 is not None:
            return replace(self, w1=take_rows(self.w1, copies))
        assert self.w1_a is not None
        return replace(self, w1_a=take_rows(self.w1_a, copies))

    def join_rows(self, others: Sequence[LoKr]) -> LoKr | None:
        """The delta of the weight that stacks these; None where they differ in more than the rows of w1."""
        from upparam.algorithms.slicing import same_tensor, stack

        role = "w1" if self.w1 is not None else "w1_a"
        mine = self.factors()
        for other in others:
            theirs = other.factors()
            if other.scaling != self.scaling or theirs.keys() != mine.keys() or theirs[role].dtype != mine[role].dtype:
                return None
            if not all(same_tensor(factor, theirs[name]) for name, factor in mine.items() if name != role):
                return None
        stacked = stack([part.factors()[role] for part in (self, *others)])
        return replace(self, w1=stacked) if self.w1 is not None else replace(self, w1_a=stacked)


def _fits(full: Tensor | None, a: Tensor | None, b: Tensor | None, core: Tensor | None) -> bool:
    if full is not None:
        return a is None and b is None and core is None and len(full.shape) >= 2
    if a is None or b is None or len(a.shape) != 2 or len(b.shape) != 2:
        return False
    if core is None:
        return a.shape[1] == b.shape[0]
    return len(core.shape) > 2 and core.shape[:2] == (a.shape[0], b.shape[0])


def _sides(full: Tensor | None, a: Tensor | None, b: Tensor | None, core: Tensor | None) -> tuple[int, ...]:
    if full is not None:
        return full.shape
    assert a is not None and b is not None
    return (a.shape[0], b.shape[1]) if core is None else (a.shape[1], b.shape[1], *core.shape[2:])


def _half(full: Tensor | None, a: Tensor | None, b: Tensor | None, core: Tensor | None) -> Half | NDArray[np.float64]:
    if full is not None:
        return full.doubles().reshape(full.shape[0], -1)
    assert a is not None and b is not None
    return (a.doubles(), b.doubles()) if core is None else (a.doubles().T, tucker(core.doubles(), b.doubles()))


def _whole(half: Half | NDArray[np.float64]) -> NDArray[np.float64]:
    return half[0] @ half[1] if isinstance(half, tuple) else half


def _product(half: Half | NDArray[np.float64]) -> Half:
    """A full matrix as itself times the identity of its smaller side."""
    import numpy as np

    if isinstance(half, tuple):
        return half
    rows, columns = half.shape
    return (half, np.eye(columns)) if columns <= rows else (np.eye(rows), half)
