"""From float64 (or float32) to a stored dtype with one rounding to nearest, ties to even, and the way back.

Casting float64 to bfloat16 through float32 would round twice; the elements where that matters are those whose float32 value
lies exactly between two neighbours of the narrow type, and only they are rounded to odd first (Boldo & Melquiond, "Emulation of FMA
and correctly rounded sums: proved algorithms using rounding to odd", 2008: rounding to odd with two spare bits makes the second
rounding exact). The usual fp8 types are rounded in the bits of float64, which takes a tenth of the time of a cast.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upparam.dtypes import DType
from upparam.operations.dtypes import FLOATS

MERGEABLE = frozenset(FLOATS)
"""Names of dtypes a merge can read and round into."""
NO_INFINITY = frozenset(("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2fnuz"))
"""Types whose overflow IEEE rounding would turn into NaN; they saturate instead, as everything that writes them does."""


def narrow(values: NDArray[Any], dtype: DType) -> NDArray[Any]:
    """`values` (float64 or float32) rounded once into `dtype`, same shape. Values too large become infinite; in fp8 types without infinity, the largest finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype.name in ("float64", "float32", "float16"):
            return values.astype(dtype.numpy)
        if dtype.name in _EIGHT:
            return _eight(values.astype(np.float64, copy=False), dtype)
        if dtype.name in NO_INFINITY:
            values = np.clip(values, -largest(dtype), largest(dtype))
        if values.dtype == np.float32:  # the cast below is the only rounding
            single = values
        elif dtype.name == "bfloat16":
            single = values.astype(np.float32)
            doubtful = (single.view(np.uint32) & 0xFFFF) == 0x8000
            if doubtful.any():
                single[doubtful] = round_to_odd(values[doubtful])
        else:
            single = round_to_odd(values)
        return single.astype(dtype.numpy)


_EIGHT = {"float8_e4m3fn": (3, 7, 0x7E), "float8_e5m2": (2, 15, 0x7C)}
"""fp8 types by the bits of their fraction, the bias of their exponent, and the code of what is too large."""


def _eight(values: NDArray[np.float64], dtype: DType) -> NDArray[Any]:
    """float64 to an fp8 type: the fraction is rounded where it lies, that of subnormal results by adding what has their spacing as its last place."""
    fraction, bias, last = _EIGHT[dtype.name]
    dropped = 52 - fraction
    bits = values.view(np.uint64)
    signs = (bits >> np.uint64(56)).astype(np.uint8)
    signs &= np.uint8(0x80)
    bits = bits & np.uint64((1 << 63) - 1)
    sizes = bits.view(np.float64)
    small = sizes < 2.0 ** (1 - bias)
    least = (sizes + 2.0 ** (53 - bias - fraction)).view(np.uint64).astype(np.uint8)
    codes = bits >> np.uint64(dropped)
    codes &= np.uint64(1)
    codes += bits
    codes += np.uint64(((1 << (dropped - 1)) - 1 - ((1023 - bias) << 52)) % (1 << 64))
    codes >>= np.uint64(dropped)
    result = np.where(small, least, np.minimum(codes, np.uint64(last)).astype(np.uint8))
    result |= signs
    found: NDArray[Any] = result.view(dtype.numpy)
    if (none := np.isnan(values)).any():
        found[none] = values[none].astype(np.float32).astype(dtype.numpy)
    return found


def largest(dtype: DType) -> float:
    """The largest finite value of a float dtype."""
    import ml_dtypes

    return float(ml_dtypes.finfo(dtype.numpy).max)


def round_to_odd(values: NDArray[np.float64]) -> NDArray[np.float32]:
    """float64 to float32, inexact results having their last bit set (so that a further rounding sees on which side they lie)."""
    with np.errstate(over="ignore", invalid="ignore"):
        nearest = values.astype(np.float32)
        back = nearest.astype(np.float64)
    bits = nearest.view(np.uint32).copy()
    inexact = (back != values) & np.isfinite(nearest)
    bits[inexact & (np.abs(back) > np.abs(values))] -= 1  # toward zero
    bits[inexact] |= 1
    result: NDArray[np.float32] = bits.view(np.float32)
    return result


def widen(stored: NDArray[Any]) -> NDArray[np.float64]:
    """Stored values as float64, exactly."""
    with np.errstate(invalid="ignore"):  # signalling NaN
        if stored.dtype.itemsize == 1:
            found: NDArray[np.float64] = _values(stored.dtype).take(stored.view(np.uint8))
            return found
        return stored.astype(np.float64)


@cache
def _values(dtype: np.dtype[Any]) -> NDArray[np.float64]:
    """What each code of an 8-bit type stands for."""
    return np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32).astype(np.float64)


def ordered(stored: NDArray[Any]) -> NDArray[np.int64]:
    """The codes of floating-point values as integers in the order of the values, so that a difference of 1 is one unit in the last place."""
    size = stored.dtype.itemsize
    codes = stored.view(np.dtype(f"u{size}")).astype(np.uint64)
    sign = np.uint64(1 << (8 * size - 1))
    magnitude = (codes & (sign - np.uint64(1))).astype(np.int64)
    result: NDArray[np.int64] = np.where((codes & sign) != 0, -magnitude, magnitude)
    return result
