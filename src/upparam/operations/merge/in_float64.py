"""Elements of a merge decided in float64: whole tiles, or the few whose rounding float32 sums leave open."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from upparam.dtypes import DType
from upparam.operations.merge.factors import LowRank
from upparam.operations.merge.rounding import NO_INFINITY, largest, narrow, widen

_BLOCK = 1 << 16
"""Elements worked on in one go."""


def settled(before: NDArray[Any], dtype: DType, factors: LowRank, start: int, flat: NDArray[np.intp], columns: int) -> NDArray[Any]:
    """The doubtful elements `flat` of a tile, whose stored values are `before`, decided in float64."""
    result = np.empty_like(before)
    step = max(64, _BLOCK // factors.ups.shape[1])
    for at in range(0, len(flat), step):
        part = slice(at, at + step)
        true = widen(before[part]) + factors.elements(flat[part], start, columns)
        result[part] = _rounded(before[part], true, dtype)
    return result


def add_in_float64(stored: NDArray[Any], dtype: DType, factors: LowRank, start: int) -> tuple[int, int]:
    """The same through float64 sums. What their own error leaves open is summed again in the fixed order, so that every route agrees."""
    changed = infinite = 0
    code = np.dtype(f"u{dtype.itemsize}")
    step = max(1, _BLOCK // max(1, stored.shape[1]))
    for at in range(0, len(stored), step):
        with np.errstate(invalid="ignore", over="ignore"):  # Inf and NaN of the base
            part = stored[at : at + step]
            first = start + at
            true = factors.up64[first : first + len(part)] @ factors.down64
            true += widen(part)
            # R products in whatever order, each rounded at most R + 1 times, with a unit of 2^-53; and the rounding of the last sum
            bound = factors.row_norm[first : first + len(part), None] * ((factors.rank + 2) * 2.0**-52 * factors.widest)
            bound = bound + np.abs(true) * 2.0**-51 + 1e-300 * (factors.rank + 1)
            low, high = narrow(true - bound, dtype), narrow(true + bound, dtype)
            doubtful = np.flatnonzero(low.view(code) != high.view(code))  # their codes: of a zero also the sign is open
            if doubtful.size:
                sums = factors.elements(doubtful, first, stored.shape[1])
                true.reshape(-1)[doubtful] = widen(part.reshape(-1)[doubtful]) + sums
        more, over = store(part, true, dtype)
        changed, infinite = changed + more, infinite + over
    return changed, infinite


def store(stored: NDArray[Any], true: NDArray[np.float64], dtype: DType) -> tuple[int, int]:
    """Round float64 values into `stored` (same shape). Returns (elements whose bits changed, elements too large for the dtype)."""
    rounded = _rounded(stored, true, dtype)
    infinite = too_large(rounded, stored, true, dtype)
    code = np.dtype(f"u{dtype.itemsize}")
    changed = int(np.count_nonzero(stored.view(code) != rounded.view(code)))
    stored[...] = rounded
    return changed, infinite


def _rounded(before: NDArray[Any], true: NDArray[np.float64], dtype: DType) -> NDArray[Any]:
    """`true` rounded once; a NaN of the base stays bit for bit as it was."""
    result = narrow(true, dtype)
    nan = np.isnan(true)
    if nan.any():
        result[nan] = before[nan]
    return result


def too_large(now: NDArray[Any], before: NDArray[Any], true: NDArray[np.float64], dtype: DType) -> int:
    """How many elements of `true` are too large for `dtype`: finite in `before` and not in `now`, or saturated where it has no infinity."""
    if not true.size or np.abs(true).max() < largest(dtype):
        return 0
    if dtype.name in NO_INFINITY:
        return int(np.count_nonzero(np.abs(true) > largest(dtype)))
    return overflows(now, before)


def overflows(now: NDArray[Any], before: NDArray[Any]) -> int:
    """How many elements that were finite are not any more."""
    with np.errstate(invalid="ignore"):
        return int(np.count_nonzero(~np.isfinite(now) & np.isfinite(before)))
