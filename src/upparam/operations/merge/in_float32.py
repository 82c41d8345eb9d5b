"""The route through numpy for 16-bit weights: float32 sums in blocks that stay in the cache, what they leave open decided in float64.

What numpy costs is passes over memory, so there are few and most are of 32-bit integers in place. Two neighbouring 16-bit codes are taken as
one 32-bit number: elements of even columns are summed apart from those of odd columns, as the halves of such numbers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from upparam.dtypes import DType
from upparam.operations.merge.factors import TINY, UNIT, UP, LowRank, aligned
from upparam.operations.merge.in_float64 import add_in_float64, settled

BLOCK = 1 << 18
"""Elements of a block, 2.9 MB with its companions: with more threads would crowd the cache they share, with fewer the time of the calls shows."""
_CHUNK = 16
"""Ranks summed in one product: short sums have smaller errors, so that fewer elements are uncertain."""
_PRODUCT = 10**6
"""Multiplications of one product: up to so many OpenBLAS neither copies its operands nor clears the result first."""
_WIDTH = 1024
"""Columns of one product."""
_UPPER = np.uint32(0xFFFF0000)
_SIGN = np.uint32(0x80000000)
_FIRST = np.array([(number & -number).bit_length() - 1 for number in range(256)])
"""The lowest bit set of each byte."""
_NONE = np.empty(0, np.intp)
_MANY = 2
"""Where there is an uncertain element among every eight of one in so many, float64 throughout costs less."""


class _Rounding(NamedTuple):
    """A 16-bit type as the upper part of a float32."""

    dropped: int
    """The bits of a float32 that rounding takes away."""
    scale: float
    """What makes the exponents those of float32."""
    limit: float
    """Sums below it are finite in the type, with room to spare."""


ROUNDINGS = {
    "bfloat16": _Rounding(16, 1.0, 3e38),
    "float16": _Rounding(13, 2.0**112, 65000.0),
}


class Buffers:
    """One thread's memory for blocks."""

    def __init__(self, widest: int) -> None:
        """`widest`: elements of the longest row."""
        elements = max(BLOCK, widest + widest % 2)
        self.sums = aligned(elements, np.float32)
        self.other = aligned(elements, np.float32)
        self.code = aligned(elements // 2, np.uint32)
        self.marks = aligned(elements + -elements % 8, np.bool_)


class _Halves(NamedTuple):
    """The factors as this route takes them."""

    up: NDArray[np.float32]
    down: NDArray[np.float32]
    """(2, R, columns / 2): even columns, then odd ones. An odd number of columns is made even by the last one again."""
    largest: float
    """No element of up @ down is larger in magnitude."""
    error: NDArray[np.float64]
    """How far a float32 sum of each row may be from the true one."""


def _halves(factors: LowRank) -> _Halves:
    rank, columns = factors.down64.shape
    half = (columns + 1) // 2
    up, down = factors.up64.astype(np.float32), aligned(2 * rank * half, np.float32).reshape(2, rank, half)
    down[1, :, -1:] = factors.down64[:, -1:]
    rounded = int((up != factors.up64).any())
    for side in (0, 1):
        wide = factors.down64[:, side::2]
        narrow = down[side, :, : wide.shape[1]]
        narrow[...] = wide
        rounded |= 2 * int((narrow != wide).any())
    depth = min(rank, _CHUNK) + -(-rank // _CHUNK) + rounded.bit_count()
    size = factors.row_norm * factors.widest
    return _Halves(up, down, float(size.max(initial=0.0)), size * (depth * UNIT * UP) + TINY)


def add_in_float32(stored: NDArray[Any], dtype: DType, factors: LowRank, start: int, scratch: Buffers, exact: bool) -> tuple[int, int]:
    """Through numpy: in blocks of rows that stay in the cache, what is near a tie being decided once for the whole tile."""
    changed = infinite = 0
    columns = stored.shape[1]
    form = factors.kept("halves", lambda: _halves(factors))
    step = max(1, BLOCK // (columns + columns % 2))
    flat = stored.view(np.uint16).reshape(-1)
    bound = float(form.error[start : start + len(stored)].max(initial=0.0)) * UP
    kept: list[tuple[NDArray[np.intp], NDArray[np.uint16]]] = []
    for at in range(0, len(stored), step):
        block = stored[at : at + step]
        codes = block.view(np.uint16)
        if columns % 2:
            codes = np.concatenate([codes, codes[:, -1:]], axis=1)
        with np.errstate(over="ignore", invalid="ignore"):
            near = _block(codes, dtype, form, start + at, scratch, bound, exact)
        if near is None:
            more, over = add_in_float64(block, dtype, factors, start + at)
            changed, infinite = changed + more, infinite + over
            continue
        if columns % 2:
            row, column = np.divmod(near, columns + 1)
            near = (row * columns + column)[column < columns]
            codes = block.view(np.uint16)
        code = scratch.code.view(np.uint16)[: (columns + columns % 2) * len(block)].reshape(len(block), -1)[:, :columns]
        differs = np.not_equal(code, codes, out=scratch.marks[: block.size].reshape(block.shape))
        changed += int(np.count_nonzero(differs))
        near += at * columns
        kept.append((near, flat[near]))
        codes[...] = code
    if exact and kept:
        places, before = (np.concatenate(parts) for parts in zip(*kept, strict=True))
        changed -= int(np.count_nonzero(flat[places] != before))
        after = settled(before.view(dtype.numpy), dtype, factors, start, places, columns, scratch.other).view(np.uint16)
        changed += int(np.count_nonzero(after != before))
        flat[places] = after
    return changed, infinite


def _block(
    codes: NDArray[np.uint16], dtype: DType, form: _Halves, start: int, scratch: Buffers, bound: float, exact: bool
) -> NDArray[np.intp] | None:
    """Round one block, of an even number of columns, into `scratch.code`: flat places of what is still to be decided.

    None where float64 is the way: something is large, infinite or NaN, or too much would be uncertain.
    """
    rows, half, size = len(codes), codes.shape[1] // 2, codes.size
    rule, part = ROUNDINGS[dtype.name], slice(start, start + rows)
    # positive codes are in the order of their values, negative ones too once the sign is taken away
    largest = max(int(codes.view(np.int16).max()), int(codes.max()) & 0x7FFF, 0)
    if not float(np.uint16(largest).view(dtype.numpy)) + form.largest < rule.limit:
        return None
    sums, other = (room[:size].reshape(2, rows, half) for room in (scratch.sums, scratch.other))
    code = scratch.code[: size // 2].reshape(rows, half)
    _multiply(form, part, sums, other)
    _widen(codes.view(np.uint32), rule, other)
    sums += other
    bits, spare = sums.view(np.uint32), other.view(np.uint32)
    if rule.scale == 1:  # a code is the upper half of a number
        if exact:
            np.abs(sums, out=other)
        _round(bits, spare, rule, exact)
        bits[0] >>= np.uint32(16)
        bits[1] &= _UPPER
        np.bitwise_or(bits[0], bits[1], out=code)
        return _uncertain(rule, other, bound, sums, scratch.marks) if exact else _NONE
    np.right_shift(bits[0], np.uint32(16), out=code)
    code &= np.uint32(0x8000)
    np.bitwise_and(bits[1], _SIGN, out=spare[1])
    code |= spare[1]
    bits &= ~_SIGN
    np.multiply(sums, np.float32(1 / rule.scale), out=other)
    _round(spare, bits, rule, exact)
    spare[0] >>= np.uint32(rule.dropped)
    spare[1] <<= np.uint32(16 - rule.dropped)
    spare[1] &= _UPPER
    code |= spare[0]
    code |= spare[1]
    return _uncertain(rule, sums, bound, other, scratch.marks) if exact else _NONE


def _round(bits: NDArray[np.uint32], spare: NDArray[np.uint32], rule: _Rounding, exact: bool) -> None:
    """Add to the magnitude what lets the bits dropped be cut off. Ties go to the even neighbour, or (`exact`) anywhere, as they are looked at again."""
    half = 1 << (rule.dropped - 1)
    if not exact:
        np.right_shift(bits, np.uint32(rule.dropped), out=spare)
        spare &= np.uint32(1)
        bits += spare
        half -= 1
    bits += np.uint32(half)


def _uncertain(
    rule: _Rounding, values: NDArray[np.float32], bound: float, other: NDArray[np.float32], marks: NDArray[np.bool_]
) -> NDArray[np.intp] | None:
    """Flat places (of pairs laid side by side) where the rounding of a sum of magnitude `values` is not certain; None where there are many.

    Each true sum is within `bound` of the one here, and an element is certain where both ends of that interval, moved outward by 2 units in
    the last place of float32 for the rounding of the sum and of the ends, round alike. No tie lies between such ends, so ties may be
    rounded as is cheapest. An end beyond zero carries a sign bit and never agrees. Spends `values` and `other`.
    """
    np.add(values, np.float32(bound), out=other)
    values -= np.float32(bound)
    for ends, outward in ((other, 2), (values, -2)):
        if rule.scale != 1:
            ends *= np.float32(1 / rule.scale)
        bits = ends.view(np.uint32)
        bits += np.uint32((1 << (rule.dropped - 1)) + outward)
    low = values.view(np.uint32)
    low ^= other.view(np.uint32)
    size = values.size
    marks = marks[: size + -size % 8]
    marks[size:] = False
    np.greater(low.reshape(-1), np.uint32((1 << rule.dropped) - 1), out=marks[:size])
    near = _places(marks)
    if near is None:
        return None
    second = near >= size // 2  # the odd columns
    near *= 2
    near -= second * (size - 1)
    return near


def _multiply(form: _Halves, part: slice, sums: NDArray[np.float32], spare: NDArray[np.float32]) -> None:
    """up @ down of the rows `part` into `sums` (2, rows, columns / 2)."""
    up = form.up[part]
    rank, half = form.down.shape[1:]
    step = max(1, _PRODUCT // (min(max(1, rank), _CHUNK) * min(half, _WIDTH)))
    for first in range(0, max(1, rank), _CHUNK):
        ranks = slice(first, first + _CHUNK)
        out = spare if first else sums
        for at in range(0, half, _WIDTH):
            columns = slice(at, at + _WIDTH)
            for row in range(0, len(up), step):
                rows = slice(row, row + step)
                for side in (0, 1):
                    np.matmul(up[rows, ranks], form.down[side, ranks, columns], out=out[side, rows, columns])
        if first:
            sums += spare


def _widen(pairs: NDArray[np.uint32], rule: _Rounding, values: NDArray[np.float32]) -> None:
    """Pairs of codes as float32, those in the lower halves first. Infinite and NaN float16 come out as 65536 and more."""
    bits = values.view(np.uint32)
    if rule.scale == 1:
        np.left_shift(pairs, np.uint32(16), out=bits[0])
        np.bitwise_and(pairs, _UPPER, out=bits[1])
        return
    whole = bits.view(np.int32)
    np.left_shift(pairs, np.uint32(16), out=bits[0])
    whole[0] >>= np.int32(3)  # the sign runs along the top three bits
    np.right_shift(pairs.view(np.int32), np.int32(3), out=whole[1])
    bits &= np.uint32(0x8FFFE000)
    values *= np.float32(rule.scale)


def _places(marks: NDArray[np.bool_]) -> NDArray[np.intp] | None:
    """Where marks are set; few are, so eight are looked at together. None where many are."""
    eights = np.packbits(marks, bitorder="little")
    group = np.flatnonzero(eights.view(np.bool_))
    if len(group) > len(eights) // _MANY:
        return None
    left = eights[group]
    found = [_NONE]
    while group.size:
        found.append(group * 8 + _FIRST.take(left, mode="clip"))
        left &= left - np.uint8(1)
        more = np.flatnonzero(left)
        group, left = group[more], left[more]
    return np.concatenate(found)
