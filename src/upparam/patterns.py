"""Regular expressions that are compiled when first used: a command uses a fifth of those that the modules it imports define."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any


class _Pattern:
    """Stands for what `re.compile` makes; each of its methods is looked up once."""

    def __init__(self, text: str | bytes, flags: int = 0) -> None:
        self._text, self._flags = text, flags

    def __getattr__(self, name: str) -> Any:
        # re keeps what it compiled, so that a second method costs no second compilation.
        value = getattr(re.compile(self._text, self._flags), name)
        setattr(self, name, value)
        return value


if TYPE_CHECKING:
    from re import compile as regex
else:
    regex = _Pattern

__all__ = ["regex"]
