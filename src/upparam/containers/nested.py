"""Sources inside other sources: a span of one, and what a deflated span inflates to."""

from __future__ import annotations

import threading
import zlib
from typing import IO

from upparam.errors import LimitError, MalformedError
from upparam.sources import Source

_KEPT = 64 << 20
"""Inflated members up to this size are kept once read twice; larger ones go to a temporary file."""
HONEST = 20
"""Times its packed size that a large member may inflate to and still be spooled: tensors and archives stay far below."""
_MAX_RESTARTS = 4


class SpanSource:
    """A span of another source, sharing its descriptor."""

    def __init__(self, parent: Source, start: int, size: int, name: str | None = None) -> None:
        self.parent, self.start, self.size = parent, start, size
        self.name = name or parent.name

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset`."""
        if offset < 0 or size < 0 or offset + size > self.size:
            raise MalformedError(
                "a read reaches outside the member", file=self.name, expected=f"within {self.size} bytes", found=f"{offset}+{size}"
            )
        return self.parent.read(self.start + offset, size)


class InflatedSource:
    """A deflated span, inflated as far as it is asked for; never more than the declared size, and never kept when large.

    Forward reads continue where the last one stopped, so that a header costs no more than itself; a read behind it starts anew, and
    keeps a member of up to 64 MiB whole from then on, a larger one in an anonymous temporary file. One that inflates beyond all tensors
    and archives is started anew a few times only, so that no order of reads makes it run without end.
    """

    def __init__(self, packed: Source, size: int, name: str) -> None:
        self.packed, self.size, self.name = packed, size, name
        self._lock = threading.Lock()
        self._whole: bytes | None = None
        self._file: IO[bytes] | None = None
        self._restarts = 0
        self._restart()

    def _restart(self) -> None:
        self._stream = zlib.decompressobj(-15)
        self._eaten = self._at = 0
        self._ready = b""

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset`. Raises MalformedError when the stream is broken or ends early."""
        if offset < 0 or size < 0 or offset + size > self.size:
            raise MalformedError(
                "a read reaches outside the member", file=self.name, expected=f"within {self.size} bytes", found=f"{offset}+{size}"
            )
        with self._lock:
            if self._whole is None and self._file is None and offset < self._at:
                self._restart()
                self._keep()
            if self._whole is not None:
                return self._whole[offset : offset + size]
            if self._file is not None:
                self._file.seek(offset)
                return self._file.read(size)
            while self._at < offset:
                self._take(min(offset - self._at, 1 << 20))
            return self._take(size)

    def _keep(self) -> None:
        """Make later reads cheap. Raises LimitError for what would be inflated again and again."""
        if self.size <= _KEPT:
            self._whole = self._take(self.size)
        elif self.size <= HONEST * self.packed.size:
            import tempfile

            file = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the source
            for at in range(0, self.size, 1 << 20):
                file.write(self._take(min(1 << 20, self.size - at)))
            self._file = file
        else:
            self._restarts += 1
            if self._restarts > _MAX_RESTARTS:
                raise LimitError(
                    "a member that inflates far beyond any tensor is read again and again", file=self.name,
                    expected=f"<= {HONEST} times {self.packed.size} bytes", found=self.size, remedy="unpack it and name what is inside",
                )  # fmt: skip

    def ends(self) -> bool:
        """True when nothing is left of the stream after a read up to the declared size."""
        with self._lock:
            while not self._stream.eof:
                if not self._ready and self._eaten < self.packed.size:
                    self._ready = self.packed.read(self._eaten, min(1 << 18, self.packed.size - self._eaten))
                    self._eaten += len(self._ready)
                elif not self._ready:
                    return False
                try:
                    if self._stream.decompress(self._ready, 1):
                        return False
                except zlib.error:
                    return False
                self._ready = self._stream.unconsumed_tail
            return self._eaten == self.packed.size and not self._stream.unused_data

    def _take(self, size: int) -> bytes:
        parts: list[bytes] = []
        left = size
        # Until this succeeds, the position is one that no read continues from: an error must not shift what is read next.
        at, self._at = self._at, self.size + 1
        while left:
            if not self._ready and not self._stream.eof and self._eaten < self.packed.size:
                self._ready = self.packed.read(self._eaten, min(1 << 18, self.packed.size - self._eaten))
                self._eaten += len(self._ready)
            try:
                part = self._stream.decompress(self._ready, left)
            except zlib.error as problem:
                raise MalformedError(f"the compressed data is broken: {problem}", file=self.name) from problem
            self._ready = self._stream.unconsumed_tail
            if not part and not self._ready and (self._stream.eof or self._eaten >= self.packed.size):
                raise MalformedError(
                    "the compressed data ends early", file=self.name, expected=f"{self.size} bytes", found=at + size - left
                )
            if not part and self._stream.eof:
                raise MalformedError(
                    "the compressed data ends early", file=self.name, expected=f"{self.size} bytes", found=at + size - left
                )
            parts.append(part)
            left -= len(part)
        self._at = at + size
        return parts[0] if len(parts) == 1 else b"".join(parts)


def backing(source: Source) -> int:
    """Bytes of the real file behind a source, however often packed: what an unpacked size is measured by."""
    if isinstance(source, InflatedSource):
        return backing(source.packed)
    if isinstance(source, SpanSource):
        return min(source.size, backing(source.parent))
    return getattr(source, "backing", source.size)
