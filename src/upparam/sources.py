"""Sources: spans of bytes, in files, in memory or computed, that are read at any offset."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from upparam import ways
from upparam.errors import MalformedError, UnreadableError


class Source(Protocol):
    """A span of bytes that can be read at any offset. `name` says which, for messages."""

    name: str
    size: int

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset`; raises MalformedError when the source is shorter."""
        ...


class FileSource:
    """A span of a regular file, read with positioned reads; safe to share between threads. The file is opened on first use."""

    def __init__(self, path: Path | str, start: int = 0, size: int | None = None) -> None:
        self.path = Path(path)
        self.name = str(path)
        self.start = start
        self._fd: int | None = None
        self._lock = threading.Lock()
        if size is None:
            try:
                size = self.path.stat().st_size - start
            except OSError as problem:
                raise UnreadableError(problem.strerror or str(problem), file=path) from problem
        self.size = size

    def fileno(self) -> int:
        """The open descriptor, for callers that copy ranges."""
        if self._fd is None:
            with self._lock:
                if self._fd is None:
                    try:
                        self._fd = os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0))
                    except OSError as problem:
                        raise UnreadableError(problem.strerror or str(problem), file=self.path) from problem
        return self._fd

    def place(self, offset: int, size: int) -> tuple[int, int]:
        """The open descriptor and where in it `size` bytes from `offset` begin, for callers that read by themselves."""
        self._check(offset, size)
        return self.fileno(), self.start + offset

    def way(self, offset: int, size: int) -> ways.Way:
        """The way to `size` bytes from `offset`."""
        return ways.lying(((*self.place(offset, size), size),))

    def span(self, offset: int, size: int) -> FileSource:
        """A narrower span of the same file."""
        return FileSource(self.path, self.start + offset, size)

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset`."""
        self._check(offset, size)
        parts: list[bytes] = []
        at, left = self.start + offset, size
        while left:
            part = self._attempt(os.pread, left, at)
            if not part:
                raise MalformedError(
                    "the file ends early", file=self.path, expected=f"{size} bytes at {self.start + offset}", found=f"{size - left}"
                )
            parts.append(part)
            at, left = at + len(part), left - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` (writable, bytes) from `offset`, without an intermediate copy."""
        self._check(offset, len(buffer))
        at, view = self.start + offset, buffer
        while view:
            count = self._attempt(os.preadv, [view], at)
            if not count:
                raise MalformedError(
                    "the file ends early", file=self.path, expected=f"{len(buffer)} bytes", found=f"{len(buffer) - len(view)}"
                )
            at, view = at + count, view[count:]

    def _attempt(self, call: Callable[..., Any], what: Any, at: int) -> Any:
        try:
            return call(self.fileno(), what, at)
        except OSError as problem:
            raise UnreadableError(problem.strerror or str(problem), file=self.path) from problem

    def _check(self, offset: int, size: int) -> None:
        if offset < 0 or size < 0 or offset + size > self.size:
            raise MalformedError(
                "a read reaches outside the file", file=self.path, expected=f"within {self.size} bytes", found=f"{offset}+{size}"
            )

    def close(self) -> None:
        """Close the descriptor; a later read opens the file again."""
        with self._lock:
            if self._fd is not None:
                os.close(self._fd)
                self._fd = None

    def __del__(self) -> None:
        # An interpreter that ends takes modules away before objects, and the descriptor goes with the process.
        if os is not None and getattr(self, "_fd", None) is not None:
            self.close()


class MemorySource:
    """Bytes already in memory."""

    def __init__(self, data: bytes | memoryview, name: str = "memory") -> None:
        self.data = memoryview(data).cast("B") if len(data) else memoryview(b"")
        self.name = name
        self.size = len(self.data)

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset`."""
        within(self, offset, size)
        return bytes(self.data[offset : offset + size])

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`."""
        within(self, offset, len(buffer))
        buffer[:] = self.data[offset : offset + len(buffer)]


def within(source: Source, offset: int, size: int) -> None:
    """Raise MalformedError unless the source has `size` bytes from `offset` on."""
    if offset < 0 or size < 0 or offset + size > source.size:
        raise MalformedError(
            "a read reaches outside the data", file=source.name, expected=f"within {source.size} bytes", found=f"{offset}+{size}"
        )


class ComputedSource:
    """Bytes produced when first read, and produced anew at each read: results that are written once and never held."""

    def __init__(self, size: int, produce: Callable[[], bytes], name: str = "computed") -> None:
        self.size = size
        self.name = name
        self._produce = produce

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset`."""
        within(self, offset, size)
        data = self._produce()
        if len(data) != self.size:
            raise MalformedError("a computed tensor has the wrong length", file=self.name, expected=self.size, found=len(data))
        return data if (offset, size) == (0, self.size) else data[offset : offset + size]
