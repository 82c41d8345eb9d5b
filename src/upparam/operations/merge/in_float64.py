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


def settled(
    before: NDArray[Any], dtype: DType, factors: LowRank, start: int, flat: NDArray[np.intp], columns: int, room: NDArray[Any] | None = None
) -> NDArray[Any]:
    """The doubtful elements `flat` of a tile, whose stored values are `before`, decided in float64. `room`: memory that may be spent."""
    row, column = np.divmod(flat, columns)
    row += start
    ups, downs = factors.ups, factors.downs
    rank = max(1, ups.shape[1])
    room = np.empty(0) if room is None else room.view(np.float64)
    if room.size < 2 * rank:
        room = np.empty(max(2 * rank, min(_BLOCK, 2 * rank * len(flat))))
    step = room.size // (2 * rank)
    true = np.empty(len(flat))
    for at in range(0, len(flat), step):
        part = slice(at, at + step)
        count, width = len(true[part]), ups.shape[1]
        one, other = room[: 2 * count * width].reshape(2, count, width)
        ups.take(row[part], axis=0, out=one, mode="clip")  # indices are in range: this mode works without a copy of its own
        downs.take(column[part], axis=0, out=other, mode="clip")
        np.einsum("ij,ij->i", one, other, out=true[part])
    old = widen(before)
    true += old
    doubtful = _close(true, _slack(factors), dtype)
    if doubtful.size:
        true[doubtful] = old[doubtful] + factors.elements(flat[doubtful], start, columns)
    return _rounded(before, true, dtype)


def _slack(factors: LowRank) -> float:
    """How far float64 sums may be off: R products in whatever order, each rounded at most R + 1 times, with a unit of 2^-53."""
    norms = float(factors.row_norm.max(initial=0.0)) * factors.widest
    return (factors.rank + 2) * 2.0**-52 * norms + 1e-300 * (factors.rank + 1)


_SPARE = {
    "bfloat16": (45, 2.0**-126), "float16": (42, 2.0**-14), "float32": (29, 2.0**-126), "float8_e4m3fn": (49, 2.0**-6), "float8_e5m2": (50, 2.0**-14),
}  # fmt: skip
"""The bits of a float64 that rounding takes away, and the smallest normal number of the type."""


def _close(true: NDArray[np.float64], slack: float, dtype: DType) -> NDArray[np.intp]:
    """Flat places with a tie within 2^-31 of the value, or where `slack` and the rounding of the last sum are not smaller than that."""
    if dtype.name not in _SPARE:
        return np.arange(true.size)
    spare, smallest = _SPARE[dtype.name]
    size = np.abs(true)
    least = size <= 2 * slack  # so that of a zero the sign is open
    size += (size < smallest) * smallest  # what is subnormal has the spacing, and now the bits, of the smallest normal numbers
    rest = size.view(np.int64) & np.int64((1 << spare) - 1)
    rest -= np.int64((1 << (spare - 1)) - (1 << 22))
    close = rest.view(np.uint64) <= np.uint64(1 << 23)
    close |= size < slack * 2.0**32
    close |= least
    return np.flatnonzero(close)


def _open(true: NDArray[np.float64], slack: float, dtype: DType) -> NDArray[np.intp]:
    """Flat places where `slack` and the rounding of the last sum leave open how `true` is rounded: in its codes, since of a zero also the sign is open."""
    places = _close(true, slack, dtype)
    values = true.reshape(-1)[places]
    bound = np.abs(values) * 2.0**-51 + slack
    code = np.dtype(f"u{dtype.itemsize}")
    doubtful: NDArray[np.intp] = places[narrow(values - bound, dtype).view(code) != narrow(values + bound, dtype).view(code)]
    return doubtful


def add_in_float64(stored: NDArray[Any], dtype: DType, factors: LowRank, start: int) -> tuple[int, int]:
    """The same through float64 sums. What their own error leaves open is summed again in the fixed order, so that every route agrees."""
    changed = infinite = 0
    slack = _slack(factors)
    step = max(1, _BLOCK // max(1, stored.shape[1]))
    for at in range(0, len(stored), step):
        with np.errstate(invalid="ignore", over="ignore"):  # Inf and NaN of the base
            part = stored[at : at + step]
            first = start + at
            true = factors.up64[first : first + len(part)] @ factors.down64
            true += widen(part)
            doubtful = _open(true, slack, dtype)
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
