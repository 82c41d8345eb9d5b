"""What every algorithm offers: the mathematics of one delta, through its factors. No names, no files, no bases."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from math import isfinite, prod, sqrt
from typing import TYPE_CHECKING, Any, ClassVar

from upparam.algorithms import called
from upparam.errors import MalformedError, Problem, RefusedError
from upparam.tensors import Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

RowReader = Callable[[int, int], "NDArray[Any]"]
"""(start, stop) -> those rows of the base weight, as float64 (stop - start, prod(rest))."""


FactorChange = Callable[[Tensor], Tensor]
"""A factor to what takes its place, of the same shape."""


class ScaleRule(str, Enum):
    """How an adapter's effective multiplier follows from what is stored."""

    ALPHA_OVER_RANK = "alpha/rank"
    ALPHA_OVER_SQRT_RANK = "alpha/sqrt(rank)"
    EXPLICIT = "explicit"
    """The multiplier itself is stored (MLX `scale`)."""
    BAKED = "baked-in"
    """The factors already carry it: 1."""
    UNKNOWN = "unknown"
    """Nothing in the files says; it must be asked for."""


@dataclass(frozen=True)
class Scaling:
    """What is stored about the multiplier. The effective value is derived by `value`, never stored beside it.

    `alpha` is as stored, None if absent. Absent under ALPHA_OVER_RANK means alpha = rank, multiplier 1 (kohya's and diffusers' rule);
    `multiplier` is only for EXPLICIT; `divisor` replaces the rank where a dialect divides by another number than the factors'
    rank (PEFT divides by the configured r).
    """

    rule: ScaleRule = ScaleRule.ALPHA_OVER_RANK
    alpha: float | None = None
    multiplier: float | None = None
    divisor: float | None = None

    def value(self, rank: int | None) -> float | None:
        """The effective multiplier for factors of this rank; None when it is unknown."""
        if self.rule is ScaleRule.UNKNOWN:
            return None
        if self.rule is ScaleRule.EXPLICIT:
            return self.multiplier
        if self.rule is ScaleRule.BAKED or self.alpha is None:
            return 1.0
        divisor = self.divisor if self.divisor is not None else rank
        if not divisor:
            return None
        return self.alpha / (sqrt(divisor) if self.rule is ScaleRule.ALPHA_OVER_SQRT_RANK else divisor)


BAKED = Scaling(ScaleRule.BAKED)
UNKNOWN = Scaling(ScaleRule.UNKNOWN)


class Update(ABC):
    """A delta with its factors in memory, ready to change a weight tile by tile. Made by `Delta.load`, lives for one module."""

    shape: tuple[int, ...]
    scale: float

    @abstractmethod
    def rows(self, start: int, stop: int) -> NDArray[np.float64]:
        """Rows [start, stop) of scale * dW in float64, shape (stop - start, prod(shape[1:])). Raises RefusedError when not additive."""

    def low_rank(self) -> tuple[NDArray[Any], NDArray[Any]] | None:
        """(up (out, r), down (r, prod(rest))) as float64 with up @ down = dW, without the scale; None when dW has no such form."""
        return None

    def floats(self) -> tuple[NDArray[Any], NDArray[Any]] | None:
        """The same in float32 where that holds every value and is at hand, else in float64."""
        return self.low_rank()

    def merged(self, weight: RowReader, start: int, stop: int) -> NDArray[np.float64]:
        """Rows [start, stop) of the changed weight W' in float64. Additive algorithms give W + scale * dW."""
        result: NDArray[np.float64] = weight(start, stop) + self.rows(start, stop)
        return result


class DependentUpdate(Update):
    """An update whose change depends on the weight: there is only `merged`."""

    def rows(self, start: int, stop: int) -> NDArray[np.float64]:
        """Raises RefusedError."""
        raise RefusedError("how this algorithm changes a weight depends on the weight", remedy="merge it into its base")

    @abstractmethod
    def merged(self, weight: RowReader, start: int, stop: int) -> NDArray[np.float64]:
        """Rows [start, stop) of W'."""


class Delta(ABC):
    """One algorithm's factors for one target.

    `shape` is that of the changed weight as (out, in) or (out, in, *kernel). Norms and inner products go through the factors where
    the algorithm has low-rank form; they include the scale and raise RefusedError when the scale is unknown.
    """

    algorithm: ClassVar[str]
    additive: ClassVar[bool] = True
    """True when W' = W + scale * dW with a dW that does not depend on W."""
    linear: ClassVar[tuple[str, ...]] = ()
    """Fields that hold a factor to which dW is proportional; the first that is not None takes over a multiplier."""
    scaling: Scaling

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight it changes. A size that the factors do not tell is 0; a kernel may be flattened into the second axis (see `fits_weight`)."""

    @property
    @abstractmethod
    def rank(self) -> int | None:
        """The factor rank; None where the word has no meaning."""

    @abstractmethod
    def factors(self) -> Mapping[str, Tensor]:
        """The stored factors by role (`up`, `down`, `mid`, `magnitude`, ...), in a fixed order."""

    @abstractmethod
    def load(self) -> Update:
        """Read the factors and return the delta ready for work."""

    @property
    def alpha(self) -> float | None:
        """Alpha as stored."""
        return self.scaling.alpha

    @property
    def scale(self) -> float | None:
        """The effective multiplier; None when unknown."""
        return self.scaling.value(self.rank)

    def known_scale(self) -> float:
        """The effective multiplier. Raises RefusedError when it is unknown or not finite."""
        scale = self.scale
        if scale is None:
            raise RefusedError(
                "the effective scale is not stored in the files and is never guessed",
                remedy="give it with --alpha or --scale",
                problems=[Problem("scale", "not known", cure="--scale")],
            )
        if not isfinite(scale):
            raise MalformedError("the effective scale is not a finite number", found=scale)
        return scale

    def on_factor(self, change: FactorChange) -> Delta:
        """The delta with one factor changed to which dW is proportional: multiplied, so is dW. The scaling stays.

        Raises RefusedError for an algorithm that has no such factor.
        """
        for role in self.linear:
            factor = getattr(self, role)
            if factor is not None:
                return replace(self, **{role: change(factor)})  # type: ignore[type-var]
        raise RefusedError(f"no factor of {called(self.algorithm)} delta can take over a multiplier")

    def for_weight(self, shape: tuple[int, ...]) -> Delta:
        """The delta with what only the shape of its weight, (out, in, *kernel), tells filled in. Raises MalformedError where it cannot be."""
        return self

    def beside(self) -> Mapping[str, Delta]:
        """What comes with this delta for other parameters of the module (`bias`), wherever the base has them."""
        return {}

    def idle(self, zeros: Collection[str]) -> bool:
        """True when nothing changes because the factors of these roles, and no others, are all zero."""
        return bool(zeros)

    def frobenius(self) -> float:
        """||scale * dW||_F. The default forms rows tile by tile; low-rank algorithms override it."""
        total = 0.0
        update = self.load()
        for start, stop in tiles(self.shape):
            rows = update.rows(start, stop)
            total += float((rows * rows).sum())
        return sqrt(total)

    def inner(self, other: Delta) -> float:
        """<scale * dW, scale' * dW'>_F of two deltas of one shape. The default forms rows tile by tile."""
        if self.shape != other.shape:
            raise MalformedError("deltas of different shapes have no inner product", expected=self.shape, found=other.shape)
        mine, theirs = self.load(), other.load()
        ours, others = mine.low_rank(), theirs.low_rank()
        if ours is not None and others is not None:
            up, down = ours
            up2, down2 = others
            return mine.scale * theirs.scale * float(((up.T @ up2) * (down @ down2.T)).sum())
        return sum(float((mine.rows(start, stop) * theirs.rows(start, stop)).sum()) for start, stop in tiles(self.shape))


def refuse_empty(delta: Delta) -> None:
    """Raise MalformedError where an axis of the changed weight is empty: a size of 0 means one that the factors do not tell."""
    if not all(delta.shape):
        raise MalformedError("a factor is empty", found=", ".join(f"{role} {factor.shape}" for role, factor in delta.factors().items()))


def fits_weight(shape: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """True when a delta of this shape changes a weight of that one.

    Kernel axes of size 1 may be missing on either side, a kernel may be flattened into the columns, and a size of 0 stands for one that
    the factors do not tell (the rows of a weight whose inputs are scaled).
    """
    if len(shape) == len(weight):
        return all(one == other or not one for one, other in zip(shape, weight, strict=True))
    want, have = list(shape), list(weight)
    while len(have) > max(len(want), 2) and have[-1] == 1:
        have.pop()
    while len(want) > max(len(have), 2) and want[-1] in (0, 1):
        want.pop()
    if len(want) == 2 and len(have) > 2:
        have = [have[0], prod(have[1:])]
    return len(want) == len(have) and all(one in (0, other) for one, other in zip(want, have, strict=True))


def tiles(shape: tuple[int, ...], elements: int = 1 << 20) -> list[tuple[int, int]]:
    """Row ranges of a weight of this shape, each of at most about `elements` elements."""
    out = shape[0] if shape else 0
    step = max(1, elements // max(1, prod(shape[1:])))
    return [(start, min(start + step, out)) for start in range(0, out, step)]
