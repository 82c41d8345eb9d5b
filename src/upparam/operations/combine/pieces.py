"""What is to be added where: each adapter's delta and weight for every target, parts of fused weights kept together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import TYPE_CHECKING

from upparam.adapter import Adapter, Extra, Target
from upparam.algorithms import called
from upparam.algorithms.base import Delta, ScaleRule, Scaling
from upparam.algorithms.lora import LoRA
from upparam.dtypes import DTYPES
from upparam.errors import MismatchError, RefusedError
from upparam.operations.recast import multiplied
from upparam.operations.resize import OF_THE_DIFFERENCE, Job, jobs_of
from upparam.tensors import same_bits

if TYPE_CHECKING:
    from upparam.operations.merge.planned import BlockWeight

Weighted = tuple[Adapter, float]
"""An adapter and the multiplier on top of its own scale."""


@dataclass(frozen=True)
class Piece:
    """One adapter's delta for a target; `number` is the adapter's place in the list, `weight` the multiplier on top of its own scale."""

    delta: Delta
    weight: float
    file: str
    number: int

    def strength(self) -> float:
        """weight * scale. Raises RefusedError when the scale is unknown."""
        try:
            return self.delta.known_scale() * self.weight
        except RefusedError as problem:
            raise RefusedError(problem.message, file=self.file, remedy=problem.remedy) from None


@dataclass(frozen=True)
class Place:
    """What the adapters do to one weight, or to parts of one that share their factors in each of them."""

    job: Job
    """The targets and the rows of each; its delta is that of the first piece."""
    pieces: tuple[Piece, ...]

    @property
    def name(self) -> str:
        """For messages."""
        return str(self.job.targets[0])

    @property
    def size(self) -> int:
        """Bytes of the factors."""
        return sum(factor.nbytes for piece in self.pieces for factor in piece.delta.factors().values())


def places(items: Sequence[Weighted], block_weight: BlockWeight | None = None) -> list[Place]:
    """Every place that the adapters change, in the order in which they first do; pieces whose block weight is 0 are left out.

    Raises RefusedError where one adapter changes a whole weight and another only rows of it, MismatchError where shapes differ.
    """
    jobs = [jobs_of(adapter) for adapter, _ in items]
    keys = [{target: job.targets for job in own for target in job.targets} for own in jobs]
    fused = {target for own in jobs for job in own if len(job.targets) > 1 for target in job.targets}
    found: dict[tuple[Target, ...], list[Piece]] = {}
    shapes: dict[tuple[Target, ...], Job] = {}
    for number, ((adapter, multiplier), own) in enumerate(zip(items, jobs, strict=True)):
        for job in own:
            together = not fused.intersection(job.targets) or all(
                key.get(target, job.targets) == job.targets for key in keys for target in job.targets
            )
            parts = [job] if together else [_alone(target, adapter.deltas[target]) for target in job.targets]
            for part in parts:
                weight = multiplier * (1.0 if block_weight is None else block_weight(part.targets[0]))
                if weight or multiplier == 0.0:
                    shapes.setdefault(part.targets, part)
                    found.setdefault(part.targets, []).append(Piece(part.delta, weight, file_of(adapter), number))
    _refuse_overlaps(found)
    result = [Place(shapes[targets], tuple(pieces)) for targets, pieces in found.items()]
    for place in result:
        _check_shapes(place)
    return result


def file_of(adapter: Adapter) -> str:
    """What to call an adapter in messages."""
    return adapter.files[0] if adapter.files else adapter.dialect


def _alone(target: Target, delta: Delta) -> Job:
    return Job((target,), delta, (delta.shape[0],))


def _refuse_overlaps(found: Mapping[tuple[Target, ...], list[Piece]]) -> None:
    whole = {(target.module, target.parameter) for targets in found for target in targets if target.rows is None}
    for targets, pieces in found.items():
        for target in targets:
            if target.rows is not None and (target.module, target.parameter) in whole:
                raise RefusedError(
                    "one adapter changes rows of this weight and another all of it", tensor=str(target), file=pieces[0].file,
                    remedy="convert both to one dialect first",
                )  # fmt: skip


def _check_shapes(place: Place) -> None:
    first = place.pieces[0]
    for piece in place.pieces[1:]:
        if _apart(piece.delta.shape, first.delta.shape):
            raise MismatchError(
                "the adapters change weights of different shapes", tensor=place.name, expected=f"{first.delta.shape} in {first.file}",
                found=f"{piece.delta.shape} in {piece.file}",
            )  # fmt: skip


def _apart(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether these are shapes of different weights; 0 is a size that the delta does not know (the other side of an IA3)."""
    if all(one) and all(other):
        return one != other
    return any(size and its and size != its for size, its in zip(one, other, strict=False))


def scaled(piece: Piece) -> Delta:
    """The piece's delta with its weight: in the scale where there is one, its factors then keep their bits, else in a factor, in float32.

    Raises RefusedError for a delta that no number can weaken.
    """
    delta, weight = piece.delta, piece.weight
    if weight == 1.0:
        return delta
    if not delta.additive:
        raise RefusedError(
            f"{called(delta.algorithm)} delta cannot be weakened by a multiplier", file=piece.file, remedy=OF_THE_DIFFERENCE
        )  # fmt: skip
    if not isfinite(piece.strength() * (delta.rank or 1)):
        raise RefusedError("a multiplier makes the scale too large", found=f"{delta.known_scale():g} times {weight:g}", file=piece.file)
    scaling = delta.scaling
    if scaling.rule in (ScaleRule.ALPHA_OVER_RANK, ScaleRule.ALPHA_OVER_SQRT_RANK) and scaling.alpha is not None and delta.rank:
        return _with_scaling(delta, replace(scaling, alpha=scaling.alpha * weight))
    if type(delta) is LoRA:
        return replace(delta, scaling=Scaling(alpha=piece.strength() * delta.rank))
    wide = DTYPES["float32"]
    return delta.on_factor(lambda factor: multiplied(factor, weight, factor.dtype if factor.dtype.itemsize > wide.itemsize else wide))


def _with_scaling(delta: Delta, scaling: Scaling) -> Delta:
    whole: Delta | None = getattr(delta, "whole", None)
    if whole is not None:
        return replace(delta, whole=_with_scaling(whole, scaling))  # type: ignore[type-var]
    return replace(delta, scaling=scaling)  # type: ignore[type-var]


def extras(items: Sequence[Weighted]) -> list[Extra]:
    """Every adapter's extras. Raises MismatchError where two bring different tensors under one name."""
    found: dict[tuple[str, str], tuple[Extra, str]] = {}
    for adapter, _ in items:
        for extra in adapter.extras:
            there = found.get((extra.kind.value, extra.name))
            if there is None:
                found[extra.kind.value, extra.name] = (extra, file_of(adapter))
            elif not same_bits(there[0].tensor, extra.tensor):
                raise MismatchError(
                    f"two adapters bring different {extra.kind.value}s of one name", tensor=extra.name, expected=f"that of {there[1]}",
                    found=f"another in {file_of(adapter)}",
                    remedy=f"take one out first ('upparam edit --remove {extra.name}'), or give all up with --drop {extra.kind.value}",
                )  # fmt: skip
    return [extra for extra, _ in found.values()]
