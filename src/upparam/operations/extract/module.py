"""What becomes of one weight: nothing, a LoRA with its facts, or an extra that holds it whole."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import prod, sqrt
from typing import TYPE_CHECKING, Any

from upparam.adapter import Extra, ExtraKind
from upparam.algorithms.base import Scaling, tiles
from upparam.algorithms.lora import LoRA
from upparam.algorithms.lowrank import RankRule
from upparam.dtypes import DTYPES, DType
from upparam.operations.extract.difference import Difference, Workspace, difference, same_weights, square
from upparam.operations.extract.pairing import Pair
from upparam.operations.recast import stored
from upparam.operations.spool import Keep
from upparam.tensors import Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from upparam.algorithms.krylov import Leading


@dataclass(frozen=True)
class Extracted:
    """One module's difference and what was made of it.

    `norm` = ||tuned - base||; `error` = ||tuned - base - dW|| / norm with dW as stored, measured element by element; `optimum`
    about the smallest error any dW of this rank can have; `floor` the largest singular value that rounding of the stored weights can explain;
    `smallest` the smallest singular value kept, `next` the largest found of those left out.
    """

    target: str
    shape: tuple[int, ...]
    rank: int
    norm: float
    error: float
    optimum: float
    floor: float
    smallest: float
    next: float

    def facts(self) -> dict[str, Any]:
        """JSON-ready facts."""
        return asdict(self) | {"shape": list(self.shape)}


Made = Extra | tuple[LoRA, Extracted] | str
"""What became of a pair: an extra, a delta and its facts, or why there is none: 'same', 'below' the noise, 'full' rank."""


class _NotLowRank(Exception):
    """More values lie above the noise than factors are worth."""


@dataclass(frozen=True)
class Maker:
    """How to make deltas of differences: see `upparam.operations.extract.extracted` for the options. One for all threads."""

    rule: RankRule | None
    auto: bool
    dtype: DType | None
    seed: int
    keep: Keep
    _space: Workspace = field(default_factory=Workspace, init=False)

    def group(self, jobs: Sequence[Pair]) -> list[Made]:
        """What becomes of the parts of one stored weight (mostly one).

        Each part is made by itself. Where `auto` finds the same rank in every part and in the whole, one LoRA was trained on the fused
        weight: the parts then share its down factor, as they would if they were read from that LoRA.
        """
        made = [self.make(job) for job in jobs]
        if self.auto and len(made) > 1 and all(isinstance(one, tuple) for one in made) and not jobs[0].transposed:
            return self._shared(jobs, [one for one in made if isinstance(one, tuple)])
        return made

    def make(self, job: Pair) -> Made:
        """What becomes of one pair."""
        from upparam.algorithms.krylov import optimum

        if job.target.parameter != "weight" or len(job.shape) < 2 or (job.transposed and len(job.shape) > 2):
            if same_weights(job.tuned, job.base):
                return "same"
            kind = ExtraKind.BIAS if job.target.parameter == "bias" else ExtraKind.SAVED_MODULE
            return Extra(kind, job.target.name, job.tuned)
        gap = self._difference(job.tuned, job.base, str(job.target))
        if gap is None:
            return "same"
        found = self._leading(gap, job)
        if found is None:
            return "full"
        if not len(found.sigma):
            return "below"
        up, down = self._stored(job, found)
        facts = Extracted(
            str(job.target), job.shape, len(found.sigma), gap.norm, _error(gap.matrix, gap, up, down) / gap.norm,
            optimum(gap.total, found) / gap.norm, gap.floor, float(found.sigma[-1]),
            sqrt(float(found.following[0])) if found.following.size else 0.0,
        )  # fmt: skip
        if job.transposed:
            up, down = down.T, up.T
        return self._lora(job, self.keep(_kernelled(up, job)), self.keep(down.reshape(-1, *job.shape[1:]))), facts

    def _shared(self, jobs: Sequence[Pair], made: list[tuple[LoRA, Extracted]]) -> list[Made]:
        ranks = {facts.rank for _, facts in made}
        tuned, base = Tensor.stack([job.tuned for job in jobs]), Tensor.stack([job.base for job in jobs])
        gap = self._difference(tuned, base, jobs[0].tensor) if len(ranks) == 1 else None
        found = None if gap is None else self._leading(gap, jobs[0])
        if gap is None or found is None or {len(found.sigma)} != ranks:
            return list(made)
        up, down = self._stored(jobs[0], found)
        shared = self.keep(down.reshape(-1, *jobs[0].shape[1:]))
        results: list[Made] = []
        at = 0
        for job, (_, facts) in zip(jobs, made, strict=True):
            rows = slice(at, at + job.shape[0])
            error = _error(gap.matrix[rows], gap, up[rows], down) / facts.norm
            results.append((self._lora(job, self.keep(_kernelled(up[rows], job)), shared), replace(facts, error=error)))
            at += job.shape[0]
        return results

    def _difference(self, tuned: Tensor, base: Tensor, name: str) -> Difference | None:
        return difference(tuned, base, name, self._space)

    def _leading(self, gap: Difference, job: Pair) -> Leading | None:
        """The singular triplets to keep; None when there are too many."""
        from upparam.algorithms.krylov import Dense, leading

        conv = prod(job.shape[2:]) > 1
        cap = self.rule.cap(conv) if self.rule is not None else None
        seeds = (self.seed, zlib.crc32(str(job.target).encode()))
        try:
            # Products cost little more for wide blocks than for narrow ones, and a wide start saves a step.
            return leading(
                Dense(gap.matrix, gap.exact), gap.total, _want(gap, self.rule, self.auto, conv), start=32 if cap is None else cap + 16, seed=seeds
            )  # fmt: skip
        except _NotLowRank:
            return None

    def _stored(self, job: Pair, found: Leading) -> tuple[NDArray[Any], NDArray[Any]]:
        up, down = found.factors()
        own = job.tuned.dtype if job.tuned.dtype.name in ("float32", "float16", "bfloat16") else DTYPES["float32"]
        dtype = self.dtype or own
        remedy = "give --dtype fp32"
        return stored(up, dtype, remedy=remedy), stored(down, dtype, remedy=remedy)

    def _lora(self, job: Pair, up: Tensor, down: Tensor) -> LoRA:
        return LoRA(up, down, Scaling(alpha=float(down.shape[0])), embedding=job.kind == "Embedding")


def _kernelled(up: NDArray[Any], job: Pair) -> NDArray[Any]:
    """The up factor with an axis of size 1 for each of the kernel's."""
    return up.reshape(job.shape[0], -1, *(1 for _ in job.shape[2:]))


def _want(gap: Difference, rule: RankRule | None, auto: bool, conv: bool) -> Callable[[NDArray[np.float64]], int]:
    """How many of the singular values found so far to keep; all of them asks for more."""
    rows, columns = gap.matrix.shape
    # Factors of this rank hold three quarters as many numbers as the matrix itself; of a small one any rank is worth having.
    worth = rows * columns * 3 // (4 * (rows + columns)) if min(rows, columns) > 128 else rows

    def want(sigma: NDArray[np.float64]) -> int:
        count = len(sigma) if rule is None else rule.choose(sigma, conv, gap.total)
        if auto:
            count = min(count, int((sigma > gap.floor).sum()))
            if count > worth:
                raise _NotLowRank
        return count

    return want


def _error(part: NDArray[np.float32], gap: Difference, up: NDArray[Any], down: NDArray[Any]) -> float:
    """||part - up @ down|| with the factors as stored, tile by tile; `part` are rows of the difference."""
    import numpy as np

    kind = np.float64 if gap.exact else np.float32
    left, right = up.astype(kind), down.astype(kind)
    total = 0.0
    for start, stop in tiles(part.shape, 1 << 18):
        rest = left[start:stop] @ right
        np.subtract(part[start:stop], rest, out=rest)
        total += square(rest)
    return sqrt(total)
