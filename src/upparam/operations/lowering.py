"""Any delta as a plain LoRA: exactly where it has that form, else by the leading singular vectors of its dW, with the error measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod, sqrt
from typing import TYPE_CHECKING, Any

from upparam.adapter import Target
from upparam.algorithms import called
from upparam.algorithms.base import Delta, RowReader, Scaling, Update, tiles
from upparam.algorithms.experts import ExpertLoRA
from upparam.algorithms.lora import LoRA
from upparam.algorithms.lowrank import RankRule, difference
from upparam.algorithms.slicing import RowSlice
from upparam.arrays import doubles
from upparam.dtypes import DType
from upparam.errors import RefusedError
from upparam.operations.recast import stored
from upparam.operations.spool import Keep

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Matrix = NDArray[np.float64]
    Rows = Callable[[int, int], Matrix]

AUTO = RankRule(error=0.01)
"""What `--lowrank auto` means: as many singular values of each module as a relative error of 1 % takes."""
_WIDE = 256
"""Inner rank of another algorithm's low-rank form above which products with its rows are cheaper."""


@dataclass(frozen=True)
class Weight:
    """The base's weight of one target: its shape (out, in, *kernel), and a reader of its rows in float64."""

    shape: tuple[int, ...]
    rows: RowReader


@dataclass(frozen=True)
class Lowered:
    """What became of one delta: `error` = ||dW - dW'|| / ||dW|| with dW' as stored, rounding included; `norm` = ||dW||."""

    target: Target
    algorithm: str
    rank: int
    error: float
    norm: float

    def facts(self) -> dict[str, Any]:
        """JSON-ready facts."""
        return {"target": str(self.target), "change": "lowrank", "algorithm": self.algorithm, "rank": self.rank, "error": self.error}


def lowerable(target: Target, delta: Delta) -> bool:
    """True for a delta of a matrix or a kernel that is no plain LoRA yet, and that says by itself what it does to its rows."""
    plain = type(delta) is LoRA and delta.mid is None
    part = isinstance(delta, RowSlice) and not delta.additive
    return not plain and not part and target.parameter == "weight" and len(delta.shape) > 1 and not isinstance(delta, ExpertLoRA)


def lower(target: Target, delta: Delta, rule: RankRule, weight: Weight | None, keep: Keep) -> tuple[LoRA, Lowered]:
    """The delta as a plain LoRA of scale 1 whose rank `rule` chooses, in the dtype of its first factor.

    A LoCon with a Tucker core keeps its scaling, and its rank where the rule allows it: then only the contraction is rounded. `weight` is
    needed where dW depends on it. Raises RefusedError without it, and where the result does not fit in the dtype.
    """
    if type(delta) is LoRA and (rule is AUTO or (rule.cap(len(delta.shape) > 2) or 0) >= delta.rank):
        return _contracted(target, delta, keep)
    update = delta.load()
    pair = update.low_rank() if delta.additive else None
    if pair is not None and pair[0].shape[1] <= _WIDE:
        up, down, measure, norm = _truncated(update, pair, rule, len(delta.shape) > 2)
        shape = delta.shape
    else:
        shape, rows = _change(target, delta, update, weight)
        up, down, measure, norm = _projected(shape, rows, rule)
    dtype = next(iter(delta.factors().values())).dtype
    stored_up, stored_down = _stored(up, dtype), _stored(down, dtype)
    error = measure(doubles(stored_up), doubles(stored_down)) / norm if norm else 0.0
    rank, kernel = up.shape[1], shape[2:]
    lora = LoRA(
        keep(stored_up.reshape(shape[0], rank, *(1 for _ in kernel))), keep(stored_down.reshape(rank, shape[1], *kernel)),
        Scaling(alpha=float(rank)),
    )  # fmt: skip
    return lora, Lowered(target, delta.algorithm, rank, error, norm)


def _contracted(target: Target, delta: LoRA, keep: Keep) -> tuple[LoRA, Lowered]:
    """The Tucker core multiplied into down: dW stays, rounded once."""
    up, down = delta.matrices()
    stored = _stored(down, delta.down.dtype)
    kernel = delta.shape[2:]
    norm = difference(up, down, up[:, :0], down[:0])
    error = difference(up, down - doubles(stored), up[:, :0], down[:0]) / norm if norm else 0.0
    ups = delta.up.reshape((*delta.up.shape[:2], *(1 for _ in kernel)))
    lora = LoRA(ups, keep(stored.reshape(delta.rank, delta.shape[1], *kernel)), delta.scaling, embedding=delta.embedding)
    return lora, Lowered(target, "lora with a Tucker core", delta.rank, error, norm * abs(delta.known_scale()))


Measured = tuple["Matrix", "Matrix", Callable[["Matrix", "Matrix"], float], float]
"""up, down, what measures ||dW - up @ down|| for factors as stored, and ||dW||."""


def _truncated(update: Update, pair: tuple[NDArray[Any], NDArray[Any]], rule: RankRule, conv: bool) -> Measured:
    """Factors cut by the spectrum of the low-rank form."""
    from upparam.algorithms.lowrank import truncate

    up, down = pair[0] * update.scale, pair[1]
    found, rank = truncate(up, down, rule, conv=conv)
    factors = found.factors(rank) if found.norm else (up[:, :rank] * 0.0, down[:rank].copy())
    return *factors, found.gap, found.norm


def _projected(shape: tuple[int, ...], rows: Rows, rule: RankRule) -> Measured:
    """Factors from the leading singular vectors of a dW that only gives its rows."""
    from upparam.algorithms import krylov

    conv = prod(shape[2:]) > 1
    matrix = krylov.Rows((shape[0], prod(shape[1:])), rows)
    total = matrix.total()
    cap = rule.cap(conv)
    found = krylov.leading(matrix, total, lambda sigma: rule.choose(sigma, conv, total), start=24 if cap is None else cap + 8)

    def measure(up: Matrix, down: Matrix) -> float:
        lost = 0.0
        for start, stop in tiles(matrix.shape):
            rest = rows(start, stop) - up[start:stop] @ down
            lost += float((rest * rest).sum())
        return sqrt(lost)

    return *found.factors(), measure, sqrt(total)


def _change(target: Target, delta: Delta, update: Update, weight: Weight | None) -> tuple[tuple[int, ...], Rows]:
    """The shape of dW and its rows, the scale in them."""
    if delta.additive:
        return delta.shape, update.rows
    if weight is None:
        raise RefusedError(
            f"how {called(delta.algorithm)} delta changes a weight depends on the weight", tensor=str(target),
            remedy="give the base's weights: --base with the path of the model",
        )  # fmt: skip
    base = weight.rows

    def rows(start: int, stop: int) -> Matrix:
        before = base(start, stop)
        return update.merged(base, start, stop).reshape(before.shape) - before

    return weight.shape, rows


def _stored(values: Matrix, dtype: DType) -> NDArray[Any]:
    return stored(values, dtype, remedy="give the adapter a wider dtype first: 'upparam edit --dtype'")
