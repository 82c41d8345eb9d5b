"""Two models side by side: which weights changed, by how much, and of what rank above the rounding noise the change is. Streams."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from math import prod, sqrt
from typing import TYPE_CHECKING, Any, NamedTuple

from upparam.algorithms.base import tiles
from upparam.checkpoint import Checkpoint
from upparam.errors import EXIT_FINDINGS, EXIT_OK, MalformedError
from upparam.findings import Finding
from upparam.operations.compare.module import Alike
from upparam.operations.compare.verdict import ACCEPTED, Verdict
from upparam.operations.extract.difference import PLAIN, Difference, Workspace, difference, same_weights, square
from upparam.operations.extract.pairing import pair
from upparam.operations.threads import in_threads
from upparam.progress import Progress, silent
from upparam.tensors import Tensor
from upparam.wording import counted

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MOST = 256
"""Rank above which a change is only said to be of more: no common adapter has it, and finding it would take a full decomposition."""


class Job(NamedTuple):
    """One weight of both models; `fits` when the two can be subtracted."""

    name: str
    tuned: Tensor
    base: Tensor
    fits: bool


@dataclass(frozen=True)
class WeightComparison:
    """One weight. `alike` is BITS, ROUNDED, EQUAL (differs within the rounding noise), DIFFERENT or INCOMPARABLE.

    `changed` counts elements that still differ when both are rounded to the narrower dtype; `norm` = ||tuned - base||_F, `relative` that
    over ||base||_F. `rank` is the number of singular values of the difference above `floor`, what rounding the stored weights can explain;
    None for vectors and where it is more than MOST (`full`).
    """

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, str]
    alike: Alike
    changed: int | None = None
    norm: float | None = None
    base_norm: float | None = None
    rank: int | None = None
    full: bool = False
    floor: float | None = None
    largest: float | None = None
    """The largest singular value of the difference."""
    reason: str = ""

    @property
    def relative(self) -> float | None:
        """||tuned - base|| / ||base||, None where the base's weight is zero."""
        return self.norm / self.base_norm if self.norm is not None and self.base_norm else None

    def facts(self) -> dict[str, Any]:
        """JSON-ready facts."""
        return {
            "name": self.name, "shape": list(self.shape), "dtypes": list(self.dtypes), "alike": self.alike.value, "changed": self.changed,
            "elements": prod(self.shape), "norm": self.norm, "relative": self.relative, "rank": self.rank,
            "rank_above": MOST if self.full else None, "floor": self.floor, "largest": self.largest, "reason": self.reason,
        }  # fmt: skip


@dataclass
class ModelComparison:
    """Two models compared, a tuned one first and its base second."""

    first: str
    second: str
    base: str
    verdict: Verdict
    summary: str
    weights: list[WeightComparison]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    relative: float | None = None
    """||tuned - base|| / ||base|| over the weights that differ by more than a rounding to the narrower dtype."""
    findings: list[Finding] = field(default_factory=list)
    accepted: Collection[Verdict] = ACCEPTED

    @property
    def exit_code(self) -> int:
        """0 when the verdict is one of `accepted`, else 1."""
        return EXIT_OK if self.verdict in self.accepted else EXIT_FINDINGS

    def counts(self) -> dict[str, int]:
        """How many weights stand in which relation."""
        return dict(Counter(weight.alike.value for weight in self.weights))

    def facts(self) -> dict[str, Any]:
        """JSON-ready facts."""
        return {
            "kind": "models", "first": self.first, "second": self.second, "base": self.base, "verdict": self.verdict.value,
            "summary": self.summary, "counts": self.counts(), "relative": self.relative, "weights": [weight.facts() for weight in self.weights],
            "only_in_first": list(self.only_first), "only_in_second": list(self.only_second),
            "findings": [finding.facts() for finding in self.findings],
        }  # fmt: skip


def compare_models(tuned: Checkpoint, base: Checkpoint, *, threads: int | None = None, progress: Progress = silent) -> ModelComparison:
    """Every weight of `tuned` beside that of `base`, whatever their namings. Memory is bounded by the largest weights at work.

    Raises MismatchError when they have no weight in common.
    """
    pairing = pair(tuned, base, lambda name: True, strict=False)
    jobs = [Job(str(found.target), found.tuned, found.base, True) for found in pairing.pairs]
    jobs += [Job(name, mine, theirs, mine.shape == theirs.shape) for name, (mine, theirs) in pairing.unnamed.items()]
    jobs += [Job(name, mine, theirs, False) for name, (mine, theirs) in pairing.unfit.items()]
    space = Workspace()
    weights = list(in_threads(lambda job: compare_weight(job, space), jobs, [job.tuned.nbytes for job in jobs], threads, progress))
    result = ModelComparison(
        str(tuned.path), str(base.path), pairing.base.name, Verdict.CHANGED, "", weights, pairing.only_tuned, pairing.only_base,
        findings=[*tuned.findings, *base.findings],
    )  # fmt: skip
    known = [weight for weight in weights if weight.base_norm is not None]
    size = sqrt(sum((weight.base_norm or 0.0) ** 2 for weight in known))
    if size:
        result.relative = sqrt(sum((weight.norm or 0.0) ** 2 for weight in known)) / size
    result.verdict, result.summary = _verdict(result)
    return result


def compare_weight(job: Job, space: Workspace) -> WeightComparison:
    """One weight, its difference in `space`."""
    mine, theirs = job.tuned, job.base
    dtypes = (mine.dtype.name, theirs.dtype.name)
    if mine.shape == theirs.shape and mine.dtype == theirs.dtype and _same_bits(mine, theirs):
        return WeightComparison(job.name, mine.shape, dtypes, Alike.BITS, 0)
    if not job.fits or not {*dtypes} <= PLAIN:
        reason = f"shapes {mine.shape} and {theirs.shape}" if mine.shape != theirs.shape else "stored as something else than plain floats"
        return WeightComparison(job.name, mine.shape, dtypes, Alike.INCOMPARABLE, reason=reason)
    if same_weights(mine, theirs) or same_weights(theirs, mine):
        return WeightComparison(job.name, mine.shape, dtypes, Alike.ROUNDED, 0)
    try:
        gap = difference(mine, theirs, job.name, space)
    except MalformedError as problem:
        return WeightComparison(job.name, mine.shape, dtypes, Alike.INCOMPARABLE, reason=problem.message)
    assert gap is not None  # else the weights were the same
    rank, largest = _rank(gap) if len(mine.shape) > 1 else (int(gap.norm > gap.floor), gap.norm)
    vector = len(mine.shape) < 2
    return WeightComparison(
        job.name, mine.shape, dtypes, Alike.EQUAL if rank == 0 else Alike.DIFFERENT, _changed(mine, theirs), gap.norm, _norm(theirs),
        None if vector else rank, rank is None, gap.floor, largest,
    )  # fmt: skip


class _More(Exception):
    """More singular values than MOST lie above the noise."""


def _rank(gap: Difference) -> tuple[int | None, float | None]:
    """(singular values above the floor, None for more than MOST; the largest, None then)."""
    from upparam.algorithms.krylov import Dense, leading

    def want(sigma: NDArray[np.float64]) -> int:
        count = int((sigma > gap.floor).sum())
        if count > MOST:
            raise _More
        return count

    try:
        found = leading(Dense(gap.matrix, gap.exact), gap.total, want, start=32)
    except _More:
        return None, None
    if len(found.sigma):
        return len(found.sigma), float(found.sigma[0])
    return 0, sqrt(float(found.following[0])) if found.following.size else 0.0


def _same_bits(one: Tensor, other: Tensor) -> bool:
    one, other = _matrix(one), _matrix(other)
    return all(one.rows(start, stop).raw() == other.rows(start, stop).raw() for start, stop in tiles(one.shape))


def _norm(tensor: Tensor) -> float:
    flat = _matrix(tensor)
    return sqrt(sum(square(flat.rows(start, stop).read()) for start, stop in tiles(flat.shape)))


def _changed(one: Tensor, other: Tensor) -> int:
    """Elements that differ when both are rounded to the narrower dtype."""
    import numpy as np

    one, other = _matrix(one), _matrix(other)
    narrow = min((one.dtype, other.dtype), key=lambda dtype: dtype.itemsize).numpy
    count = 0
    with np.errstate(over="ignore", invalid="ignore"):
        for start, stop in tiles(one.shape):
            mine, theirs = one.rows(start, stop).read(), other.rows(start, stop).read()
            count += int((mine.astype(narrow) != theirs.astype(narrow)).sum())
    return count


def _matrix(tensor: Tensor) -> Tensor:
    rows = tensor.shape[0] if tensor.shape else 1
    return tensor.reshape((rows, tensor.numel // max(rows, 1)))


def _verdict(result: ModelComparison) -> tuple[Verdict, str]:
    weights = result.weights
    kinds = {weight.alike for weight in weights}
    alone = _alone(result)
    if kinds <= {Alike.BITS, Alike.ROUNDED} and not alone:
        if Alike.ROUNDED not in kinds:
            return Verdict.BITS, f"the same bits in all {len(weights)} weights"
        return Verdict.EQUAL, f"the same weights, rounded to the narrower dtype, in all {len(weights)}"
    changed = [weight for weight in weights if weight.alike is Alike.DIFFERENT]
    noisy = sum(weight.alike is Alike.EQUAL for weight in weights)
    rest = [f"{noisy} differ within rounding noise"] if noisy else []
    unknown = sum(weight.alike is Alike.INCOMPARABLE for weight in weights)
    rest += [f"{unknown} cannot be subtracted"] if unknown else []
    tail = "".join(f"; {part}" for part in (*rest, *alone))
    if not changed and not unknown and not alone:
        return Verdict.NOISE, f"{noisy} of {len(weights)} weights differ, none by more than rounding to its dtype explains"
    if not changed:
        same = sum(weight.alike in (Alike.BITS, Alike.ROUNDED) for weight in weights)
        return (Verdict.UNDECIDED if unknown else Verdict.CHANGED), f"{same} of {len(weights)} weights are the same{tail}"
    size = f", relative change {result.relative:.2g} of those" if result.relative is not None else ""
    matrices = [weight for weight in changed if weight.full or weight.rank is not None]
    ranks = [weight.rank for weight in matrices if weight.rank is not None and weight.rank <= _low(weight.shape)]
    if matrices and len(ranks) == len(matrices):
        span = f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
        beside = len(changed) - len(matrices)
        vectors = f", and {counted(beside, 'vector')}" if beside else ""
        return Verdict.LOW_RANK, (
            f"{len(matrices)} of {len(weights)} weights changed by a low rank{vectors}, as a merged adapter leaves it: rank {span} "
            f"above the rounding noise{size}{tail}"
        )  # fmt: skip
    return Verdict.CHANGED, f"{len(changed)} of {len(weights)} weights changed{size}{tail}"


def _low(shape: Sequence[int]) -> int:
    """The largest rank that is low for this shape: factors of it hold half as many numbers as the weight."""
    rows, columns = shape[0], prod(shape[1:])
    return max(1, rows * columns // (2 * (rows + columns)))


def _alone(result: ModelComparison) -> list[str]:
    return [
        f"{counted(len(names), 'tensor')} only in the {word}"
        for names, word in ((result.only_first, "first"), (result.only_second, "second"))
        if names
    ]
