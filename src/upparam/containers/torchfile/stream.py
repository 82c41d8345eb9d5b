"""A file that holds pickles and raw bytes one after another: what torch.save wrote before it wrote zip files."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from upparam.containers.evidence import with_file
from upparam.containers.machine import Examination, Use, examine
from upparam.containers.symbols import Budget, Trust
from upparam.errors import LimitError, MalformedError
from upparam.limits import MAX_PICKLE_BYTES
from upparam.sources import Source

_WINDOW = 1 << 16


class Stream:
    """A place in a source. Pickles are read in windows that grow, so that the tensor data after them is never read along."""

    def __init__(self, source: Source, path: Path, budget: Budget) -> None:
        self.source, self.path, self.budget = source, path, budget
        self.at = 0
        self.uses: dict[str, Use] = {}

    def examine(self, persistent: Callable[[Any], Any] | None = None, window: int = _WINDOW) -> Examination:
        """The pickle that starts here; the place moves behind it. Its problem, if any, is left in it."""
        while True:
            size = min(window, self.source.size - self.at)
            budget = Budget(**vars(self.budget))
            seen = examine(self.source.read(self.at, size), source=self.source, base=self.at, persistent=persistent, budget=budget)
            if not seen.ended or size == self.source.size - self.at:
                break
            if size > MAX_PICKLE_BYTES:
                seen.problem = LimitError("a pickle longer than any real one", expected=f"<= {MAX_PICKLE_BYTES}")
                break
            window *= 4
        self.budget = budget
        self.at += seen.stop
        for name, use in seen.uses.items():
            known = self.uses.setdefault(name, use)
            if use.trust is Trust.CODE and known.trust is not Trust.CODE:
                self.uses[name] = use
        return seen

    def value(self, persistent: Callable[[Any], Any] | None = None, window: int = _WINDOW) -> Any:
        """The value of the pickle that starts here. Raises its problem."""
        seen = self.examine(persistent, window)
        if seen.problem is not None:
            raise with_file(seen.problem, self.path)
        return seen.value

    def numbers(self, layout: str) -> tuple[int, ...]:
        """Little-endian numbers in `struct` notation."""
        size = struct.calcsize(layout)
        return struct.unpack(layout, self.bytes(size))

    def bytes(self, size: int) -> bytes:
        """The next `size` bytes."""
        if size < 0 or self.at + size > self.source.size:
            raise MalformedError(
                "the file ends early", file=self.path, expected=f"{size} bytes at {self.at}", found=self.source.size - self.at,
                remedy="the file is truncated; fetch it again",
            )  # fmt: skip
        data = self.source.read(self.at, size)
        self.at += size
        return data
