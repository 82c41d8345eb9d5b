"""Tensors into a stream: bytes that lie in a file go through a small buffer, and two threads fill a real file."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from io import BufferedWriter
from typing import Any, TypeVar

from upparam.arrays import scratch
from upparam.carrying import carried
from upparam.errors import UpparamError
from upparam.tensors import Tensor

Made = TypeVar("Made")


def put(stream: Any, tensors: Mapping[str, Tensor], padded: Callable[[int], int] = int) -> None:
    """The bytes of the named tensors one after the other from where the stream is, zeros behind each up to the size that `padded` makes of its own."""
    if isinstance(stream, BufferedWriter) and sum(tensor.nbytes for tensor in tensors.values()) > _GROUP:
        _put_side_by_side(stream, tensors, padded)
        return
    for name, tensor in tensors.items():
        for chunk in chunks(tensor, name):
            stream.write(chunk)
        stream.write(bytes(padded(tensor.nbytes) - tensor.nbytes))


_GROUP = 4 << 20
"""Bytes that a thread takes at a time, where tensors are smaller."""


def _put_side_by_side(stream: BufferedWriter, tensors: Mapping[str, Tensor], padded: Callable[[int], int]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    start = at = stream.tell()
    groups: list[list[tuple[int, str, Tensor]]] = [[]]
    for name, tensor in tensors.items():
        if at - start > _GROUP:
            groups.append([])
            start = at
        groups[-1].append((at, name, tensor))
        at += padded(tensor.nbytes)
    stream.flush()
    descriptor = stream.fileno()
    make_room(descriptor, at)

    def work(group: Sequence[tuple[int, str, Tensor]]) -> None:
        done = carried(descriptor, [(offset, tensor) for offset, _, tensor in group])
        for offset, name, tensor in (place for place, whole in zip(group, done, strict=True) if not whole):
            for chunk in chunks(tensor, name):
                offset += write_at(descriptor, chunk, offset)

    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(work, group) for group in groups]
        try:
            for future in futures:
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)
    stream.seek(at)


def make_room(descriptor: int, size: int) -> None:
    """Give a file its size. Room found at once costs less than room found page by page, and a full disk is told before the work."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as problem:
            if problem.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):  # file systems that know no such thing
                raise
    os.ftruncate(descriptor, size)


_AT_ONCE = 512 << 10
"""Bytes of one write. The system takes memory for a file in pieces as large as a write, and often has to make room for larger ones first: half of
the merges whose writes were of 1 MiB took twice the system time of the others, and few of those of half as much."""


def write_at(descriptor: int, data: bytes | memoryview, offset: int) -> int:
    """All of `data` at `offset`; returns its size."""
    view = memoryview(data)
    while view:
        count = os.pwrite(descriptor, view[:_AT_ONCE], offset)
        view, offset = view[count:], offset + count
    return len(data)


def chunks(tensor: Tensor, name: str | None = None, size: int = 1 << 20) -> Iterable[bytes | memoryview]:
    """The tensor's little-endian bytes, in pieces when any span of them can be read, so that a huge table never fills memory.

    Each piece is to be used before the next is asked for: they share a buffer, which stays in the cache.
    What goes wrong while a tensor is computed is told of `name`.
    """
    readinto = getattr(tensor.source, "readinto", None)
    if readinto is None or not tensor.is_contiguous or tensor.big_endian:
        yield _told(name, lambda: tensor.read().reshape(-1).view("u1").data) if tensor.numel else b""
        return
    size = getattr(tensor.source, "piece", size)
    buffer = scratch(size)
    for at in range(0, tensor.nbytes, size):
        part = buffer[: min(size, tensor.nbytes - at)]
        _told(name, readinto, tensor.offset + at, part)
        yield part


def _told(name: str | None, make: Callable[..., Made], *given: Any) -> Made:
    try:
        return make(*given)
    except UpparamError as problem:
        problem.locate(tensor=name)
        raise
