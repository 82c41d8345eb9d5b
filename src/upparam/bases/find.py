"""From what a user names to a base: a path on disk, an inventory's name, or a model id that an inventory knows."""

from __future__ import annotations

from pathlib import Path

from upparam.bases.base import Base
from upparam.errors import UsageError


def find_base(name: str) -> Base:
    """The base a user named. A path that exists wins. Raises UsageError for a name nothing answers to."""
    if Path(name).exists():
        from upparam.bases.header import base_from_path

        return base_from_path(Path(name))
    from upparam.bases import inventory

    known = inventory.resolve(name)
    if known is None:
        raise UsageError("no such base: neither a path nor a known name", found=name, remedy="'upparam bases' lists the names")
    return inventory.load(known)
