"""The undo journal of an in-place merge: what it says, and taking the merge back by it.

A journal lists ranges of files, whose old bytes it holds, and files that a new one took the place of, whose old one lies beside it under
another name. `undo` puts both back, bit for bit, and may itself be killed and run again.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from upparam.errors import MalformedError, RefusedError, UnreadableError
from upparam.operations.merge.stream import Copy, Task, run_tasks, write_all
from upparam.operations.receipt import Receipt
from upparam.progress import silent
from upparam.records import dataclass, field
from upparam.tensors import FileSource

MAGIC = b"upparam-undo 1\n\0"
PARTIAL, COMPLETE, APPLIED = b"partial ", b"complete", b"applied "
"""States, written at byte 16: old bytes still being gathered; gathered and the base perhaps half changed; the merge went through."""
HEAD = len(MAGIC) + 8


def journal_path(base: Path) -> Path:
    """Where the journal of a base lies: hidden, inside a folder or beside a file."""
    return base / ".upparam-undo" if base.is_dir() else base.with_name(f".{base.name}.upparam-undo")


def old_path(path: Path) -> Path:
    """Where a file is kept that a new one takes the place of."""
    return path.with_name(f".{path.name}.upparam-old")


def new_path(path: Path) -> Path:
    """Where the new file is written before it takes the old one's place."""
    return path.with_name(f".{path.name}.upparam-new")


@dataclass
class Journal:
    """An undo journal as read: its state, (file, offset in it, length, offset in the journal) of every range, and the files replaced."""

    path: Path
    state: bytes
    ranges: list[tuple[Path, int, int, int]] = field(default_factory=list)
    replaced: list[Path] = field(default_factory=list)
    what: list[str] = field(default_factory=list)

    @staticmethod
    def read(base: Path) -> Journal:
        """The journal of a base. Raises UnreadableError when there is none, MalformedError when it is damaged."""
        path = journal_path(base)
        if not path.is_file():
            raise UnreadableError("no undo journal lies here", file=base, expected=str(path))
        source = FileSource(path)
        if source.size < HEAD + 8 or source.read(0, len(MAGIC)) != MAGIC:
            return Journal(path, PARTIAL)
        state = source.read(len(MAGIC), 8)
        if state == PARTIAL:
            return Journal(path, state)
        length = int.from_bytes(source.read(HEAD, 8), "little")
        try:
            head = json.loads(source.read(HEAD + 8, length))
            root = base if base.is_dir() else base.parent
            at, ranges = HEAD + 8 + length, []
            for name, offset, size in head["ranges"]:
                ranges.append((root / name, int(offset), int(size), at))
                at += int(size)
            replaced = [root / name for name in head.get("replaced", ())]
        except (ValueError, KeyError, TypeError, AttributeError) as problem:
            raise MalformedError("the undo journal is damaged", file=path, found=str(problem)) from problem
        if at != source.size or state not in (COMPLETE, APPLIED):
            raise MalformedError("the undo journal is damaged", file=path, expected=f"{at} bytes", found=source.size)
        return Journal(path, state, ranges, replaced, head.get("what", []))


def set_state(path: Path, state: bytes) -> None:
    """Mark how far the merge is, on the disk."""
    fd = os.open(path, os.O_RDWR)
    try:
        write_all(fd, memoryview(state), len(MAGIC))
        os.fsync(fd)
    finally:
        os.close(fd)


def undo(base: Path | str, *, discard: bool = False) -> Receipt:
    """Take the last in-place merge back from its journal, or with `discard` make it final; the journal is removed.

    Raises UnreadableError when there is no journal, MalformedError when it is damaged, RefusedError for discarding the journal of a
    merge that was interrupted.
    """
    base = Path(base)
    journal = Journal.read(base)
    if discard and journal.state == COMPLETE:
        raise RefusedError(
            "the merge was interrupted and the base may be half changed; its journal is the only copy of the old bytes",
            file=journal.path, remedy=f"run 'upparam undo {base}' first",
        )  # fmt: skip
    restored = 0
    if not discard:
        restored = _restore(journal)
        for path in journal.replaced:
            _put_back(path)
    for path in _left_over(base, journal):
        path.unlink(missing_ok=True)
    journal.path.unlink()
    counts: dict[str, Any] = {
        "ranges_restored": 0 if discard else len(journal.ranges),
        "files_restored": 0 if discard else len(journal.replaced),
        "bytes": restored,
    }
    proof = "the journal is gone and the merge is final" if discard else "every restored range was read back and equals the journal"
    if not discard and journal.replaced:
        proof = "the old files are back in their places" + ("; " + proof if journal.ranges else "")
    if not discard and journal.state == PARTIAL:
        proof = "the merge had not changed anything yet"
    return Receipt("undo", [str(journal.path)], [str(base)], counts, [proof])


def _put_back(path: Path) -> None:
    """The old file under its name again. Where it is not kept any more (or not yet) the file under the name is the old one."""
    with suppress(FileNotFoundError):
        old_path(path).replace(path)
    sync_folder(path.parent)


def _left_over(base: Path, journal: Journal) -> list[Path]:
    """Files that are of no use any more: old ones' second names, and new ones that an interrupted merge never used."""
    found = [old_path(path) for path in journal.replaced]
    if journal.state != APPLIED:
        found += base.rglob(".*.upparam-new") if base.is_dir() else [new_path(base)]
    return found


def sync_folder(folder: Path) -> None:
    """Wait until renames in a folder are on the disk, where the system can say so."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _restore(journal: Journal) -> int:
    source = FileSource(journal.path)
    descriptors: dict[Path, int] = {}
    total = 0
    try:
        tasks: list[Task] = []
        for path, offset, size, at in journal.ranges:
            if path not in descriptors:
                descriptors[path] = os.open(path, os.O_RDWR)
            tasks.append(Copy(source, at, descriptors[path], offset, size))
            total += size
        run_tasks(tasks, 1, 1, silent)
        for fd in descriptors.values():
            os.fsync(fd)
        for path, offset, size, at in journal.ranges:
            for start in range(0, size, 1 << 20):
                count = min(1 << 20, size - start)
                if os.pread(descriptors[path], count, offset + start) != source.read(at + start, count):
                    raise UnreadableError("the restored bytes do not read back; the journal is kept", file=path)
    finally:
        for fd in descriptors.values():
            os.close(fd)
    return total
