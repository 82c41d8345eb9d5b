"""How far an edit that rounds factors moves what the adapter does, and what of its factors it rounds to zero."""

from __future__ import annotations

from dataclasses import replace
from math import isfinite, sqrt
from typing import TYPE_CHECKING, NamedTuple

from upparam.adapter import Adapter, Target
from upparam.algorithms.base import Delta
from upparam.algorithms.dora import Decomposed
from upparam.arrays import floats, unsigned
from upparam.findings import Finding, warning
from upparam.operations.threads import in_threads
from upparam.progress import Progress
from upparam.tensors import Tensor
from upparam.wording import at_most, counted

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_VANISHED = 0.01
"""The share of a factor's elements other than zero that may be rounded to zero without a word: a few lie near zero in any factor."""


class _Move(NamedTuple):
    """Of one module: the distance of dW (None: not known), that of the magnitude (None: it has none), the factors that vanish."""

    effect: float | None
    magnitude: float | None
    vanished: list[str]


def moved(before: Adapter, after: Adapter, threads: int | None, progress: Progress) -> tuple[str, list[Finding]]:
    """What the receipt says of it, and a warning for each module of which factors vanish.

    Said are the largest ||dW - dW'|| / ||dW|| of a module, through the factors; of modules with a magnitude that of their directions, and
    beside it the largest ||m - m'|| / ||m||; and for how many modules it cannot be told.
    """

    def move(target: Target) -> _Move:
        from upparam.operations.compare.module import Asked, compare_deltas

        one, other = _at_hand(before.deltas[target]), _at_hand(after.deltas[target])
        effect = compare_deltas(str(target), one, other, Asked(angles=False)).distance
        magnitude = _apart(one.magnitude, other.magnitude) if isinstance(one, Decomposed) and isinstance(other, Decomposed) else None
        theirs = other.factors()
        vanished = [
            f"{role}: {share:.3g} of its elements"
            for role, tensor in one.factors().items()
            if role in theirs and (share := _vanished(tensor, theirs[role])) > _VANISHED
        ]
        return _Move(effect, magnitude, vanished)

    targets = list(after.deltas)
    sizes = [sum(factor.nbytes for factor in delta.factors().values()) for delta in after.deltas.values()]
    found = list(in_threads(move, targets, sizes, threads, progress))
    known = [one.effect for one in found if one.effect is not None]
    magnitudes = [one.magnitude for one in found if one.magnitude is not None]
    unknown = len(found) - len(known)
    said = [at_most(max(known), 2)] if known else []
    if magnitudes:
        worst = at_most(max(magnitudes), 2) if all(map(isfinite, magnitudes)) else "by what is not known"
        said.append(f"of {counted(len(magnitudes), 'module')} the directions, their magnitudes {worst}")
    said += [f"not known for {unknown} of {len(found)} modules"] if unknown else []
    findings = [
        warning("vanished", str(target), "elements other than zero are rounded to zero; a wider dtype keeps them", *one.vanished)
        for target, one in zip(targets, found, strict=True)
        if one.vanished
    ]
    return "; ".join(said), findings


def _apart(one: Tensor, other: Tensor) -> float:
    """||one - other|| / ||one||; 0 where both are zero, NaN where a value is no number."""
    first, second = one.doubles(), other.doubles()
    gap, size = float(((first - second) ** 2).sum()), float((first**2).sum())
    return sqrt(gap / size) if size else float(gap > 0)


def _at_hand(delta: Delta) -> Delta:
    """The same with its factors in memory: what is computed is computed anew at each read."""
    return replace(delta, **{role: Tensor.of(tensor.read()) for role, tensor in delta.factors().items()})  # type: ignore[type-var]


def _vanished(one: Tensor, other: Tensor) -> float:
    """The share of the elements other than zero that are zero in the other."""
    import numpy as np

    if one.shape != other.shape or not other.dtype.is_float:
        return 0.0
    there = _other_than_zero(one)
    count = int(np.count_nonzero(there))
    return int(np.count_nonzero(there & ~_other_than_zero(other))) / count if count else 0.0


def _other_than_zero(tensor: Tensor) -> NDArray[np.bool_]:
    values = tensor.read()
    codes = unsigned(values)
    found: NDArray[np.bool_] = (floats(values) if codes is None else codes) != 0
    return found
