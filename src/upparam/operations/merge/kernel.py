"""The innermost work of a merge: one tile of a stored weight becomes round(W + up @ down), exactly.

A tile is computed in float32, with a bound on how far each sum can be from the true one. Where rounding the two ends of that
interval gives two different results the element is computed again in float64; everywhere else the float32 result is proved right.
The bound: with |err(x*y)| and |err(x+y)| <= u = 2^-24 times the result (u the unit roundoff of float32), a sum of R products of
factors each rounded once is within (R + 4) u sum|up||down| of the true one (Higham, "Accuracy and Stability of Numerical
Algorithms", section 3.1), and sum|up||down| <= ||up_row|| ||down_column||.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from upparam.operations.merge.rounding import narrow, widen
from upparam.tensors import DType

TILE_ELEMENTS = 1 << 18
"""Elements of a tile: 1 MiB as float32, so that a tile and its companions stay in the second-level cache."""
_UNIT = 2.0**-24
_TINY = 1e-37
"""Absolute slack for products that underflow float32, and what makes every zero sum doubtful (its sign is decided in float64)."""
FAST = frozenset(("bfloat16", "float16"))
"""Dtypes narrow enough for the float32 route; wider ones are computed in float64 throughout."""


class LowRank:
    """up (rows, R) with every scale in it, down (R, columns), for a range of rows of one stored weight; all that a tile needs.

    Raises nothing: whether the factors are finite is the caller's to check.
    """

    def __init__(self, up: NDArray[np.float64], down: NDArray[np.float64]) -> None:
        self.up64 = up
        self.down64 = down
        self.up = up.astype(np.float32)
        self.down = down.astype(np.float32)
        rank = up.shape[1]
        # norms rounded upward by the factor, which also covers their own rounding
        factor = (rank + 4) * _UNIT * (1 + 2.0**-16)
        self.row_bound: NDArray[np.float32] = (np.sqrt(np.einsum("ir,ir->i", up, up)) * factor + _TINY).astype(np.float32)
        self.column_norm: NDArray[np.float32] = (np.sqrt(np.einsum("rj,rj->j", down, down)) * (1 + 2.0**-16)).astype(np.float32)
        self.widest = float(self.column_norm.max(initial=0.0))
        self._down_columns: NDArray[np.float64] | None = None

    def elements(self, rows: NDArray[np.intp], columns: NDArray[np.intp]) -> NDArray[np.float64]:
        """(up @ down)[rows, columns] in float64, summed in the order of the ranks."""
        if self._down_columns is None:
            self._down_columns = np.ascontiguousarray(self.down64.T)
        ups, downs = self.up64[rows], self._down_columns[columns]
        ups *= downs
        # cumulative order fixed: a tie decided here is decided alike whatever found it
        total: NDArray[np.float64] = np.add.accumulate(ups, axis=1)[:, -1] if ups.shape[1] else np.zeros(len(rows))
        return total


class Scratch:
    """One thread's buffers, made once and used for every tile."""

    def __init__(self, elements: int) -> None:
        self.weight = np.empty(elements, np.float32)
        self.delta = np.empty(elements, np.float32)
        self.low = np.empty(elements, np.uint16)
        self.high = np.empty(elements, np.uint16)


def add_low_rank(
    stored: NDArray[Any], dtype: DType, factors: LowRank, start: int, scratch: Scratch, *, exact: bool = True
) -> tuple[int, int]:
    """Change `stored` (rows, columns) in place: round(W + up @ down), the rows being [start, start + rows) of `factors`.

    Returns (elements whose bits changed, elements that became infinite). `exact=False` leaves out the float64 check of near-ties.
    """
    if dtype.name not in FAST:
        return _add_in_float64(stored, dtype, factors, start)
    rows, columns = stored.shape
    shape = (rows, columns)
    weight = scratch.weight[: stored.size].reshape(shape)
    delta = scratch.delta[: stored.size].reshape(shape)
    low = scratch.low[: stored.size].reshape(shape)
    high = scratch.high[: stored.size].reshape(shape)
    weight[...] = stored
    np.matmul(factors.up[start : start + rows], factors.down, out=delta)
    with np.errstate(over="ignore", invalid="ignore"):
        np.add(weight, delta, out=weight)
        largest = np.maximum(weight.max(axis=1), -weight.min(axis=1))
        if not exact:
            low.view(dtype.numpy)[...] = weight
        else:
            # |sum - true sum| plus the roundings of the sum and of the two ends
            bound = (
                factors.row_bound[start : start + rows] * np.float32(factors.widest) + largest * np.float32(2.0**-22) + np.float32(_TINY)
            )[:, None]
            if not np.isfinite(bound).all():
                return _add_in_float64(stored, dtype, factors, start)
            np.subtract(weight, bound, out=delta)
            low.view(dtype.numpy)[...] = delta
            np.add(weight, bound, out=delta)
            high.view(dtype.numpy)[...] = delta
            np.not_equal(low, high, out=high)
            doubtful = np.flatnonzero(high)
            if doubtful.size:
                _settle(stored, dtype, factors, start, doubtful, low)
    infinite = _count_overflow(low.view(dtype.numpy), stored) if float(largest.max()) >= _largest(dtype) else 0
    codes = stored.view(np.uint16)
    changed = int(np.count_nonzero(codes != low))
    codes[...] = low
    return changed, infinite


def _settle(
    stored: NDArray[Any], dtype: DType, factors: LowRank, start: int, doubtful: NDArray[np.intp], result: NDArray[np.uint16]
) -> None:
    columns = stored.shape[1]
    for at in range(0, len(doubtful), 4096):
        flat = doubtful[at : at + 4096]
        row, column = np.divmod(flat, columns)
        true = widen(stored.reshape(-1)[flat]) + factors.elements(row + start, column)
        result.reshape(-1)[flat] = narrow(true, dtype).view(np.uint16)


def _add_in_float64(stored: NDArray[Any], dtype: DType, factors: LowRank, start: int) -> tuple[int, int]:
    """The same through float64 sums. What their own error leaves open is summed again in the fixed order, so that every route agrees."""
    changed = infinite = 0
    rank = factors.up64.shape[1]
    step = max(1, (TILE_ELEMENTS // 4) // max(1, stored.shape[1]))
    for at in range(0, len(stored), step):
        part = stored[at : at + step]
        first = start + at
        true = factors.up64[first : first + len(part)] @ factors.down64
        true += widen(part)
        bound = factors.row_bound[first : first + len(part), None].astype(np.float64) * (2.0**-28 * factors.widest)
        bound = bound + np.abs(true) * 2.0**-51 + 1e-300 * (rank + 1)
        doubtful = np.flatnonzero(narrow(true - bound, dtype) != narrow(true + bound, dtype))
        if doubtful.size:
            row, column = np.divmod(doubtful, stored.shape[1])
            true.reshape(-1)[doubtful] = widen(part.reshape(-1)[doubtful]) + factors.elements(row + first, column)
        more, over = store(part, true, dtype)
        changed, infinite = changed + more, infinite + over
    return changed, infinite


def store(stored: NDArray[Any], true: NDArray[np.float64], dtype: DType) -> tuple[int, int]:
    """Round float64 values into `stored` (same shape). Returns (elements whose bits changed, elements that became infinite)."""
    rounded = narrow(true, dtype)
    infinite = _count_overflow(rounded, stored) if true.size and not np.abs(true).max() < _largest(dtype) else 0
    code = np.dtype(f"u{dtype.itemsize}")
    changed = int(np.count_nonzero(stored.view(code) != rounded.view(code)))
    stored[...] = rounded
    return changed, infinite


def _largest(dtype: DType) -> float:
    import ml_dtypes

    return float(ml_dtypes.finfo(dtype.numpy).max)


def _count_overflow(now: NDArray[Any], before: NDArray[Any]) -> int:
    with np.errstate(invalid="ignore"):
        return int(np.count_nonzero(~np.isfinite(now) & np.isfinite(before)))
