"""What other installed packages add: entry points of the groups `upparam.containers` and `upparam.dialects`."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint


@cache
def installed(group: str) -> tuple[EntryPoint, ...]:
    """The entry points of a group, in name order. The machinery is imported here: it costs a quarter of the start of `identify`."""
    from importlib.metadata import entry_points

    return tuple(sorted(entry_points(group=group), key=lambda point: point.name))
