"""What commands print, made safe to look at: names come from files and from paths that strangers chose.

A terminal obeys control characters (colours, cursor moves, titles, even answers typed back), and bidirectional marks show a text in another
order than it has. Both are written as \\uXXXX, which JSON reads as the same character, and so is whatever the stream cannot encode.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, cast

from upparam.report.text import coloured, escaped


class Screen:
    """A text stream that writes to another one, escaped, with marks such as `warning:` in colour where that is a terminal.

    `stream` is the other one, for what draws on purpose.
    """

    def __init__(self, stream: IO[str]) -> None:
        self.stream = stream
        plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        self._colours = not plain and bool(getattr(stream, "isatty", bool)())

    def write(self, text: str) -> int:
        """Write `text`, escaped; what the stream's encoding lacks becomes \\uXXXX too."""
        shown = coloured(escaped(text)) if self._colours else escaped(text)
        try:
            self.stream.write(shown)
        except UnicodeEncodeError:
            self.stream.write("".join(mark if mark.isascii() else _units(mark) for mark in shown))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _units(mark: str) -> str:
    raw = mark.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{raw[at] << 8 | raw[at + 1]:04x}" for at in range(0, len(raw), 2))


@contextmanager
def screened() -> Iterator[None]:
    """Everything printed inside goes through a Screen."""
    out, err = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = cast("Any", Screen(out)), cast("Any", Screen(err))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = out, err
