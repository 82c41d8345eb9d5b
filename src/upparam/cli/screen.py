"""What commands print, made safe to look at: names come from files and from paths that strangers chose.

A terminal obeys control characters (colours, cursor moves, titles, even answers typed back), and bidirectional marks show a text in another
order than it has. Both are written as \\uXXXX, which JSON reads as the same character, and so is whatever the stream cannot encode.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any, cast

from upparam.report.text import coloured, escaped


class Screen:
    """A text stream that writes to another one, escaped, with marks such as `warning:` in colour where that is a terminal.

    `stream` is the other one, for what draws on purpose. Where it takes nothing more (a full disk, a reader that has gone), `lost` says why and
    the rest goes nowhere, so that a command does its work and exits with its own code all the same.
    """

    lost: OSError | None = None

    def __init__(self, stream: IO[str]) -> None:
        self.stream = stream
        plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        self._colours = not plain and bool(getattr(stream, "isatty", bool)())

    def write(self, text: str) -> int:
        """Write `text`, escaped; what the stream's encoding lacks becomes \\uXXXX too."""
        shown = coloured(escaped(text)) if self._colours else escaped(text)
        with self._heard():
            try:
                self.stream.write(shown)
            except UnicodeEncodeError:
                self.stream.write("".join(mark if mark.isascii() else _units(mark) for mark in shown))
        return len(text)

    def flush(self) -> None:
        """Send on what was written."""
        with self._heard():
            self.stream.flush()

    @contextmanager
    def _heard(self) -> Iterator[None]:
        try:
            yield
        except OSError as problem:
            self.lost = problem
            with suppress(OSError, ValueError):  # also for the interpreter, which flushes when it ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _units(mark: str) -> str:
    raw = mark.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{raw[at] << 8 | raw[at + 1]:04x}" for at in range(0, len(raw), 2))


@contextmanager
def screened() -> Iterator[Screen]:
    """Everything printed inside goes through a Screen; gives that of stdout."""
    out, err = sys.stdout, sys.stderr
    screen = Screen(out)
    sys.stdout, sys.stderr = cast("Any", screen), cast("Any", Screen(err))
    try:
        yield screen
    finally:
        sys.stdout, sys.stderr = out, err
