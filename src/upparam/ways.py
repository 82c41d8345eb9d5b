"""Ways: how the compiled module `carry` comes to the bytes of a tensor that lie in files, in a form that it takes.

A source that knows says so by `way(offset, size)`; None where no way leads to those bytes but reading them.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

Way = tuple[Any, ...]
"""Its kind, then what the kind takes."""
Span = tuple[int, int, int]
"""Descriptor, offset, size."""
NUMBER = 4
"""Bytes of a row's number where rows are picked."""
_LYING, _BESIDE, _TURNED, _PICKED = range(4)


def lying(spans: Sequence[Span]) -> Way:
    """Spans one after the other."""
    return _LYING, tuple(spans)


def spans_of(way: Way | None) -> tuple[Span, ...] | None:
    """The spans of which a way is made that is nothing but spans one after the other; None of any other."""
    return way[1] if way is not None and way[0] == _LYING else None


def beside(rows: int, spans: Sequence[Span]) -> Way:
    """`rows` rows, each with the bytes of a row of every span in turn; the sizes are those of a row."""
    return _BESIDE, rows, tuple(spans)


def turned(descriptor: int, offset: int, rows: int, columns: int, item: int) -> Way:
    """A stored matrix (rows, columns) of items of `item` bytes, turned to (columns, rows)."""
    return _TURNED, descriptor, offset, rows, columns, item


def picked(descriptor: int, offset: int, stored: int, width: int, order: array[int]) -> Way:
    """Of `stored` rows of `width` bytes those of the numbers in `order` (unsigned, of NUMBER bytes), in its order."""
    return _PICKED, descriptor, offset, stored, width, order


def step(way: Way) -> int:
    """Bytes of which only whole multiples can be fetched: those of a row."""
    kind, *told = way
    if kind == _LYING:
        return 1
    if kind == _BESIDE:
        return sum(size for _, _, size in told[1])
    width: int = told[2] * told[4] if kind == _TURNED else told[3]
    return width


def held(way: Way, room: int) -> int:
    """Bytes of memory that fetching takes beside a buffer of `room` bytes."""
    kind, *told = way
    if kind in (_LYING, _BESIDE):
        return room if kind == _BESIDE else 0
    size: int = told[2] * told[3] * told[4] if kind == _TURNED else told[2] * told[3]
    return -(-size // 64) * 64
