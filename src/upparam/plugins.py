"""What other installed packages add: entry points of the groups `upparam.containers` and `upparam.dialects`."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint


@cache
def installed(group: str) -> tuple[EntryPoint, ...]:
    """The entry points of a group, in name order. The machinery for them is imported only where some package names the group."""
    if not _may_be_named(group):
        return ()
    from importlib.metadata import entry_points

    return tuple(sorted(entry_points(group=group), key=lambda point: point.name))


def _may_be_named(group: str) -> bool:
    """False when every package lies unpacked in a folder of `sys.path`, as pip leaves it, and none has the group in its list of entry points."""
    from importlib.machinery import PathFinder

    if any(finder is not PathFinder and hasattr(finder, "find_distributions") for finder in sys.meta_path):
        return True
    for folder in sys.path:
        try:
            with os.scandir(folder or os.curdir) as entries:
                told = [entry.path for entry in entries if entry.name.lower().endswith((".dist-info", ".egg-info"))]
        except NotADirectoryError:
            return True
        except OSError:
            continue
        if folder.lower().endswith(".egg"):
            return True
        for place in told:
            with suppress(OSError):
                if group.encode() in Path(place, "entry_points.txt").read_bytes():
                    return True
    return False
