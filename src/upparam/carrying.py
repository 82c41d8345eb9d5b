"""Bytes carried from file to file, and compared between files, many tensors at a call: compiled where that is built, else tensor by tensor.

Two threads that let go of the interpreter only for one small read or write after the other wake each other so often that the system runs
both on one core. A call of the compiled module lasts for as many tensors as it gets.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from upparam._native import wanted
from upparam.arrays import scratch
from upparam.errors import UpparamError
from upparam.sources import FileSource
from upparam.tensors import Tensor, same_bits

_INTERFACE = 1
"""What the compiled module must say it speaks; one left over from older source does not."""
_ROOM = 1 << 19
"""Bytes of the buffer: what goes through it stays in the cache of a core."""


def carried(descriptor: int, places: Sequence[tuple[int, Tensor]]) -> list[bool]:
    """Write each tensor of which the bytes lie in a file as wanted to its (offset, tensor) place of an open file, and say which were.

    What is False is left to do: nothing raises here, so that an error is that of the tensor.
    """
    module = wanted("carry", _INTERFACE)
    spans = {number: span for number, (_, tensor) in enumerate(places) if module is not None and (span := _span(tensor)) is not None}
    if not spans:
        return [False] * len(places)
    wholes = module.copy(
        [(*span, descriptor, places[number][0], places[number][1].nbytes) for number, span in spans.items()], scratch(_ROOM)
    )
    done = dict(zip(spans, wholes, strict=True))
    return [bool(done.get(number)) for number in range(len(places))]


def same_each(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[bool]:
    """`same_bits` of each pair."""
    module = wanted("carry", _INTERFACE)
    spans = {
        number: (*ours, *theirs, one.nbytes) for number, (one, other) in enumerate(pairs)
        if module is not None and one.dtype == other.dtype and one.shape == other.shape
        and (ours := _span(one)) is not None and (theirs := _span(other)) is not None
    }  # fmt: skip
    same = dict(zip(spans, module.same(list(spans.values()), scratch(_ROOM)), strict=True)) if spans else {}
    # Of what was not found the same, same_bits says whether it differs or cannot be read.
    return [bool(same.get(number)) or same_bits(one, other) for number, (one, other) in enumerate(pairs)]


def _span(tensor: Tensor) -> tuple[int, int] | None:
    """Descriptor and offset of a tensor that lies in a file as wanted; None of any other, and where the file is not there or too short."""
    if type(tensor.source) is not FileSource or not tensor.is_contiguous or tensor.big_endian:
        return None
    with suppress(UpparamError):
        return tensor.source.place(tensor.offset, tensor.nbytes)
    return None
