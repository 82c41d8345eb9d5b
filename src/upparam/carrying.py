"""Bytes carried from file to file, and compared between files, many tensors at a call: compiled where that is built, else tensor by tensor.

Two threads that let go of the interpreter only for one small read or write after the other wake each other so often that the system runs
both on one core. A call of the compiled module lasts for as many tensors as it gets.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from upparam import ways
from upparam._native import wanted
from upparam.arrays import scratch
from upparam.errors import UpparamError
from upparam.sources import FileSource
from upparam.tensors import Tensor, same_bits

_INTERFACE = 2
"""What the compiled module must say it speaks; one left over from older source does not."""
_ROOM = 1 << 19
"""Bytes of the buffer: what goes through it stays in the cache of a core."""
_HELD = 16 << 20
"""Bytes of a tensor that is read whole to be turned or to have its rows picked."""


def carried(descriptor: int, places: Sequence[tuple[int, Tensor]]) -> list[bool]:
    """Write each tensor of which the bytes lie in files to its (offset, tensor) place of an open file, and say which were.

    What is False is left to do: nothing raises here, so that an error is that of the tensor.
    """
    module = wanted("carry", _INTERFACE)
    found = {number: way for number, (_, tensor) in enumerate(places) if module is not None and (way := _way(tensor)) is not None}
    if not found:
        return [False] * len(places)
    buffer = scratch(_ROOM + max(ways.held(way, _ROOM) for way in found.values()))
    wholes = module.copy([(way, descriptor, places[number][0]) for number, way in found.items()], buffer, _ROOM)
    done = dict(zip(found, wholes, strict=True))
    return [bool(done.get(number)) for number in range(len(places))]


def same_each(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[bool]:
    """`same_bits` of each pair."""
    module = wanted("carry", _INTERFACE)
    found = {
        number: (ours, theirs) for number, (one, other) in enumerate(map(_unturned, pairs))
        if module is not None and one.dtype == other.dtype and one.shape == other.shape
        and (ours := _way(one)) is not None and (theirs := _way(other)) is not None
    }  # fmt: skip
    same: dict[int, int] = {}
    if found:
        buffer = scratch(_ROOM + max(ways.held(ours, _ROOM) + ways.held(theirs, _ROOM) for ours, theirs in found.values()))
        same = dict(zip(found, module.same(list(found.values()), buffer, _ROOM), strict=True))
    # Of what was not found the same, same_bits says whether it differs or cannot be read.
    return [bool(same.get(number)) or same_bits(one, other) for number, (one, other) in enumerate(pairs)]


def _unturned(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Both the other way round where neither lies as wanted: what is turned alike is the same as it lies."""
    one, other = pair
    return pair if one.is_contiguous or other.is_contiguous else (one.T, other.T)


def _way(tensor: Tensor) -> ways.Way | None:
    """The way to the tensor's bytes; None where there is none that the compiled module goes, or a file is not there or too short."""
    way: ways.Way | None = None
    if tensor.big_endian:
        return None
    with suppress(UpparamError):
        if tensor.is_contiguous:
            way = tensor.way()
        elif type(tensor.source) is FileSource and len(tensor.shape) == 2 and tensor.T.is_contiguous and tensor.dtype.itemsize <= 8:
            columns, rows = tensor.shape
            way = ways.turned(*tensor.source.place(tensor.offset, tensor.nbytes), rows, columns, tensor.dtype.itemsize)
    return None if way is None or ways.step(way) > _ROOM // 2 or ways.held(way, _ROOM) > _HELD else way
