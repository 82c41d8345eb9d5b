"""The route through numpy for 16-bit weights: float32 sums in blocks that stay in the cache, what they leave open decided in float64."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from upparam.dtypes import DType
from upparam.operations.merge.factors import NUMPY_CHUNK, TINY, UP, LowRank, aligned
from upparam.operations.merge.in_float64 import add_in_float64, settled

BLOCK = 1 << 18
"""Elements of a block: with its companions it stays in the second-level cache."""


class Buffers:
    """One thread's memory for blocks."""

    def __init__(self, widest: int) -> None:
        """`widest`: elements of the longest row."""
        elements = max(BLOCK, widest)
        self.weight = aligned(elements, np.float32)
        self.delta = aligned(elements, np.float32)
        self.part = aligned(elements, np.float32)
        self.code = aligned(elements, np.uint16)
        self.sign = aligned(elements, np.uint16)
        self.near = aligned(elements, np.bool_)
        self.small = aligned(elements, np.bool_)


def add_in_float32(stored: NDArray[Any], dtype: DType, factors: LowRank, start: int, scratch: Buffers, exact: bool) -> tuple[int, int]:
    """Through numpy: in blocks of rows that stay in the cache, what is near a tie being decided once for the whole tile."""
    changed = infinite = 0
    kept: list[Near] = []
    columns = stored.shape[1]
    step = max(1, BLOCK // max(1, columns))
    bound = float(factors.row_bound[start : start + len(stored)].max(initial=0.0)) * factors.widest + TINY
    for at in range(0, len(stored), step):
        block = stored[at : at + step]
        with np.errstate(over="ignore", invalid="ignore"):
            found = _block(block, dtype, factors, start + at, scratch, bound)
        if found is None:
            more, over = add_in_float64(block, dtype, factors, start + at)
            infinite += over
        else:
            more, near = found
            kept.append(near._replace(places=near.places + at * columns))
        changed += more
    if kept:
        near = Near(*(np.concatenate(parts) for parts in zip(*kept, strict=True)))
        changed += _decide(stored, dtype, factors, start, near, exact)
    return changed, infinite


_ORDINARY = {"bfloat16": 1e36, "float16": 4e9}
"""Squared norms below which no element of a block is near what its dtype cannot hold."""
_CERTAIN = {"bfloat16": 2.0**-9, "float16": 2.0**-12}
"""The bound times the rank, in units of the weights' root mean square, above which float64 throughout costs less."""


class Near(NamedTuple):
    """Elements near a tie: flat places, their float32 sums and their codes before."""

    places: NDArray[np.intp]
    sums: NDArray[np.float32]
    before: NDArray[np.uint16]


def _block(stored: NDArray[Any], dtype: DType, factors: LowRank, start: int, scratch: Buffers, bound: float) -> tuple[int, Near] | None:
    """Round one block in place: elements changed, and those whose rounding is still to be decided.

    None, and nothing changed, where float64 is the way: something is large, infinite or NaN, or too much would be uncertain.
    """
    shape, size = stored.shape, stored.size
    sums, delta, code, marked = (room[:size].reshape(shape) for room in (scratch.weight, scratch.delta, scratch.code, scratch.near))
    codes = stored.view(np.uint16)
    _widened(codes, dtype, sums)
    up, down = factors.up[start : start + len(stored)], factors.down
    np.matmul(up[:, :NUMPY_CHUNK], down[:NUMPY_CHUNK], out=delta)
    for first in range(NUMPY_CHUNK, len(down), NUMPY_CHUNK):
        part = scratch.part[:size].reshape(shape)
        np.matmul(up[:, first : first + NUMPY_CHUNK], down[first : first + NUMPY_CHUNK], out=part)
        delta += part
    sums += delta
    square = float(np.vdot(sums, sums))
    if not square < _ORDINARY[dtype.name] or not np.isfinite(bound):
        return None
    if bound * len(down) > _CERTAIN[dtype.name] * math.sqrt(square / size):
        return None  # so many would be uncertain that float64 throughout costs less
    _round_and_mark(sums, dtype, bound, scratch)
    places = np.flatnonzero(marked)
    values = sums.reshape(-1)[places]
    near = Near(places, values, codes.reshape(-1)[places])
    np.not_equal(codes, code, out=marked)
    codes[...] = code
    return int(np.count_nonzero(marked)), near


def _widened(codes: NDArray[np.uint16], dtype: DType, values: NDArray[np.float32]) -> None:
    """16-bit codes as float32. Infinite and NaN float16 come out as 65536 and more."""
    if dtype.name == "bfloat16":
        values[...] = codes.view(dtype.numpy)
        return
    bits = values.view(np.int32)
    np.left_shift(codes.view(np.int16), 13, out=bits, dtype=np.int32)  # the sign runs along the top three bits
    bits &= np.int32(-0x70002000)
    values *= np.float32(2.0**112)


DROPPED = {"bfloat16": (16, 0), "float16": (13, 112 << 23)}
"""The bits of a float32 that rounding takes away, and what the exponent's bias is less by."""


def _round_and_mark(sums: NDArray[np.float32], dtype: DType, bound: float, scratch: Buffers) -> None:
    """Fill `scratch.code` with the sums rounded and `scratch.near` with where that is not certain; spends the other float buffers.

    As the compiled kernel does it: each true sum is within `bound` of the one here, and an element is certain where both ends of that
    interval, moved outward by 4 units in the last place of float32 for the rounding of the sum and of the ends, round alike. No tie lies
    between such ends, so ties may be rounded as is cheapest. An end beyond zero carries a sign bit and never agrees.
    """
    shape, size = sums.shape, sums.size
    dropped, less = DROPPED[dtype.name]
    high, low = (room[:size].reshape(shape) for room in (scratch.delta, scratch.part))
    code, sign, near = (room[:size].reshape(shape) for room in (scratch.code, scratch.sign, scratch.near))
    half = 1 << (dropped - 1)
    np.abs(sums, out=high)
    np.subtract(high, np.float32(bound), out=low)
    high += np.float32(bound)
    bits = high.view(np.uint32)
    if less:  # below the normal numbers of the type more bits are taken away
        np.less(bits, np.float32(2.0**-14).view(np.uint32), out=scratch.small[:size].reshape(shape))
    for end, outward in ((bits, 4), (low.view(np.uint32), -4)):
        end += np.uint32((half + outward - less) % 2**32)
        end >>= np.uint32(dropped)
    np.not_equal(bits, low.view(np.uint32), out=near)
    if less:
        near |= scratch.small[:size].reshape(shape)
    code[...] = bits
    np.right_shift(sums.view(np.uint32), np.uint32(16), out=sign, casting="unsafe")
    sign &= np.uint16(0x8000)
    code |= sign


def _decide(stored: NDArray[Any], dtype: DType, factors: LowRank, start: int, near: Near, exact: bool) -> int:
    """Round what is near a tie, the uncertain in float64 (not `exact`: all as float32 has it). Returns how many more now differ."""
    flat = stored.view(np.uint16).reshape(-1)
    changed = -int(np.count_nonzero(flat[near.places] != near.before))
    if not exact:
        result = near.sums.astype(dtype.numpy).view(np.uint16)
    else:  # with the bounds of their own row and column
        row, column = np.divmod(near.places, stored.shape[1])
        bound = factors.row_bound[start + row] * factors.column_norm[column] * UP + TINY
        with np.errstate(over="ignore", invalid="ignore"):
            low, result = _ends(near.sums, np.abs(near.sums) * np.float32(2.0**-22) + bound.astype(np.float32), dtype)
        uncertain = np.flatnonzero(low != result)
        if uncertain.size:
            old = near.before[uncertain].view(dtype.numpy)
            result[uncertain] = settled(old, dtype, factors, start, near.places[uncertain], stored.shape[1]).view(np.uint16)
    flat[near.places] = result
    return changed + int(np.count_nonzero(result != near.before))


def _ends(values: NDArray[np.float32], reach: NDArray[np.float32], dtype: DType) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    """Both ends of the interval around each value, rounded."""
    return (values - reach).astype(dtype.numpy).view(np.uint16), (values + reach).astype(dtype.numpy).view(np.uint16)
