"""SHA-256 of the adapter files, worked out by the merge's own threads while weights stream."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from upparam.operations.merge.planned import Ingredient, Plan
from upparam.operations.merge.stream import Buffers, Task

_CHUNK = 1 << 20


def adapter_files(ingredient: Ingredient) -> list[Path]:
    """The files whose bytes are the adapter: the path itself, or the adapter's tensor files in a folder. Empty for one built in memory."""
    path = ingredient.path
    if path is None:
        return []
    if path.is_file():
        return [path]
    found = [Path(name) if Path(name).is_absolute() else path / Path(name).name for name in ingredient.adapter.files]
    return sorted({file for file in found if file.is_file()})


class Hashes:
    """The hash of each ingredient by its index; filled in by the tasks. Several files are hashed one after the other."""

    def __init__(self, plan: Plan) -> None:
        self._files = {index: files for index, item in enumerate(plan.ingredients) if (files := adapter_files(item))}
        self.found: dict[int, str] = {}

    def blank(self) -> Mapping[int, str]:
        """Placeholders as long as the hashes, so that headers can be sized before they are known."""
        return dict.fromkeys(self._files, "0" * 64)

    def tasks(self) -> list[Task]:
        """One task an adapter."""
        return [_Hash(self, index, files) for index, files in self._files.items()]


@dataclass
class _Hash:
    hashes: Hashes
    index: int
    files: list[Path]
    size: int = 0
    what: str = "hashing the adapter"

    def run(self, buffers: Buffers) -> None:
        """Hash in chunks."""
        digest = hashlib.sha256()
        view = memoryview(buffers.raw)[:_CHUNK]
        for path in self.files:
            with path.open("rb", buffering=0) as stream:
                while count := stream.readinto(view):
                    digest.update(view[:count])
        self.hashes.found[self.index] = digest.hexdigest()
