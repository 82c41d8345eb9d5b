"""The undo journal of an in-place merge: what it says, and taking the merge back by it.

A journal lists ranges of files, whose old bytes it holds, and files that a new one took the place of, whose old one lies beside it under
another name. `undo` puts both back, bit for bit, and may itself be killed and run again. When the merge has gone through, the journal also
gets what it left: size, time of change and a hash of sampled bytes of each file, so that `undo` does not write over what changed later.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from upparam.checkpoint import INDEX_SUFFIX
from upparam.containers.writing import write_at
from upparam.errors import MalformedError, RefusedError, UnreadableError
from upparam.findings import Finding, warning
from upparam.operations.merge.stream import Copy, Task, run_tasks
from upparam.operations.receipt import Receipt
from upparam.progress import silent
from upparam.sources import FileSource

MAGIC = b"upparam-undo 1\n\0"
PARTIAL, COMPLETE, APPLIED = b"partial ", b"complete", b"applied "
"""States, written at byte 16: old bytes still being gathered; gathered and the base perhaps half changed; the merge went through."""
HEAD = len(MAGIC) + 8
SAMPLE, PLACES = 4 << 10, 1024
"""Bytes of a sample, and how many are taken of a file at most: a few milliseconds."""


def journal_path(base: Path) -> Path:
    """Where the journal of a base lies: hidden, inside a folder or beside a file."""
    return base / ".upparam-undo" if base.is_dir() else _hidden(base, "undo")


def old_path(path: Path) -> Path:
    """Where a file is kept that a new one takes the place of."""
    return _hidden(path, "old")


def new_path(path: Path) -> Path:
    """Where the new file is written before it takes the old one's place."""
    return _hidden(path, "new")


_NAME_BYTES = 255
"""What file systems allow a name."""


def _hidden(path: Path, what: str) -> Path:
    """The hidden file of ours beside another; where its name would be too long, a hash stands for the end of the other's."""
    name, ending = os.fsencode(path.name), f".upparam-{what}"
    if 1 + len(name) + len(ending) > _NAME_BYTES:
        digest = hashlib.sha256(name).hexdigest()[:16]
        name = os.fsencode(name[: _NAME_BYTES - len(digest) - len(ending) - 2].decode("utf-8", "ignore") + "." + digest)
    return path.with_name(f".{os.fsdecode(name)}{ending}")


@dataclass(frozen=True)
class Left:
    """A file as the merge left it: bytes, time of change in ns, and the SHA-256 of SAMPLE bytes from each of these offsets."""

    size: int
    changed: int
    sampled: str
    places: Sequence[int]

    @staticmethod
    def parse(size: object, changed: object, sampled: str, places: Sequence[object]) -> Left:
        """As the journal says it. Raises ValueError or TypeError for anything else."""
        numbers = [int(str(number)) for number in (size, changed, *places)]
        if not all(0 <= number < 1 << 63 for number in numbers):
            raise ValueError("a number is out of range")
        return Left(numbers[0], numbers[1], sampled, numbers[2:])

    @staticmethod
    def of(path: Path, places: Sequence[int]) -> Left:
        """The file as it is now."""
        state, digest = path.stat(), hashlib.sha256()
        fd = os.open(path, os.O_RDONLY)
        try:
            for place in places:
                digest.update(os.pread(fd, SAMPLE, place))
        finally:
            os.close(fd)
        return Left(state.st_size, state.st_mtime_ns, digest.hexdigest(), places)

    def differs(self, path: Path) -> str | None:
        """What is known of a later change; None where there was none."""
        now = Left.of(path, self.places)
        if now.size != self.size:
            return f"{path.name} is {now.size:,} bytes long and was {self.size:,}"
        if now.sampled != self.sampled:
            return f"{path.name} holds other bytes where the merge wrote"
        if now.changed != self.changed:
            return f"{path.name} was written or copied since, though all bytes looked at are as the merge left them"
        return None


@dataclass
class Journal:
    """An undo journal as read: its state, (file, offset in it, length, offset in the journal) of every range, and the files replaced.

    `sizes` are those of the files of ranges, `left` what the merge left where it went through.
    """

    path: Path
    state: bytes
    ranges: list[tuple[Path, int, int, int]] = field(default_factory=list)
    replaced: list[Path] = field(default_factory=list)
    what: list[str] = field(default_factory=list)
    sizes: dict[Path, int] = field(default_factory=dict)
    left: dict[Path, Left] = field(default_factory=dict)

    @staticmethod
    def read(base: Path) -> Journal:
        """The journal of a base. Raises UnreadableError when there is none, MalformedError when it is damaged."""
        path = journal_path(base)
        if not path.is_file():
            other = _merged_otherwise(base)
            raise UnreadableError(
                "no undo journal lies here", file=base, expected=str(path),
                remedy=None if other is None else f"what was merged under another name of the base is taken back with 'upparam undo {other}'",
            )  # fmt: skip
        source = FileSource(path)
        if source.size < HEAD + 8 or source.read(0, len(MAGIC)) != MAGIC:
            return Journal(path, PARTIAL)
        state = source.read(len(MAGIC), 8)
        if state == PARTIAL:
            return Journal(path, state)
        length = int.from_bytes(source.read(HEAD, 8), "little")
        try:
            head = json.loads(source.read(HEAD + 8, length))
            at, ranges = HEAD + 8 + length, []
            for name, offset, size in head["ranges"]:
                if min(int(offset), int(size)) < 0:
                    raise ValueError("a number is out of range")
                ranges.append((_named(base, name), int(offset), int(size), at))
                at += int(size)
            replaced = [_named(base, name) for name in head.get("replaced", ())]
            sizes = {_named(base, name): int(size) for name, size in head.get("sizes", {}).items()}
            left: dict[Path, Left] = {}
            if state == APPLIED and at < source.size:
                said = json.loads(source.read(at, source.size - at))
                left = {_named(base, name): Left.parse(*facts) for name, facts in said.items()}
                at = source.size
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as problem:
            raise MalformedError("the undo journal is damaged", file=path, found=str(problem)) from problem
        if at > source.size or state not in (COMPLETE, APPLIED):
            raise MalformedError("the undo journal is damaged", file=path, expected=f"{at} bytes", found=source.size)
        return Journal(path, state, ranges, replaced, head.get("what", []), sizes, left)

    def later(self) -> list[str]:
        """What says that the files were changed after the merge, or are others."""
        found = [
            f"{path.name} is {path.stat().st_size:,} bytes long and was {size:,}"
            for path, size in self.sizes.items()
            if path.is_file() and path.stat().st_size != size
        ]
        if found or self.state != APPLIED:
            return found
        return [said for path, left in self.left.items() if path.is_file() and (said := left.differs(path)) is not None]


def _named(base: Path, name: str) -> Path:
    """A file that a journal names. Raises ValueError for one outside the base: a journal that came with a download is not to be trusted."""
    parts = Path(name).parts
    if Path(name).is_absolute() or ".." in parts or not parts or (not base.is_dir() and name != base.name):
        raise ValueError(f"it names a file outside the base: {name}")
    path = base / name if base.is_dir() else base
    if path.is_symlink():
        raise ValueError(f"it names a symbolic link: {name}")
    return path


def merged_as(part: Path) -> Path | None:
    """The base (a file or folder itself, or a folder above it) by whose name a merge changed it that can still be taken back; None where there is none."""
    part = part.parent.resolve() / part.name
    return next((base for base in (part, *part.parents) if journal_path(base).is_file() and _may_concern(base, part)), None)


def _merged_otherwise(base: Path) -> Path | None:
    """Another name under which a base that has no journal was merged: a file or component of it, or a folder above."""
    ending = "upparam-undo"
    for path in sorted((*base.glob(f".*{ending}"), *base.glob(f"*/.*{ending}"))):
        name = path.name.removesuffix(ending).strip(".")
        if journal_path(path.parent / name) == path:
            return path.parent / name
    return merged_as(base) if base.exists() else None


def _may_concern(base: Path, part: Path) -> bool:
    try:
        journal = Journal.read(base)
    except MalformedError:
        return True
    return journal.state == PARTIAL or any(
        path.is_relative_to(part) for path in (*journal.replaced, *(path for path, *_ in journal.ranges))
    )


def set_state(path: Path, state: bytes, sync: bool = True) -> None:
    """Mark how far the merge is, on the disk."""
    _write(path, state, len(MAGIC), sync)


def _write(path: Path, data: bytes, offset: int | None, sync: bool) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        write_at(fd, memoryview(data), os.fstat(fd).st_size if offset is None else offset)
        if sync:
            os.fsync(fd)
    finally:
        os.close(fd)


def set_applied(path: Path, root: Path, touched: Mapping[Path, Sequence[tuple[int, int]]], sync: bool = True) -> None:
    """Mark that the merge went through, after what it left of each file, whose ranges (offset, size) it wrote."""
    left = {}
    for file, ranges in touched.items():
        places = [offset + part * max(0, size - SAMPLE) // 3 for offset, size in ranges for part in range(4)]
        places = places[:: -(-len(places) // PLACES)]
        found = Left.of(file, places)
        left[file.relative_to(root).as_posix()] = (found.size, found.changed, found.sampled, places)
    _write(path, json.dumps(left).encode(), None, sync)
    set_state(path, APPLIED, sync)


def undo(base: Path | str, *, discard: bool = False, force: bool = False) -> Receipt:
    """Take the last in-place merge back from its journal, or with `discard` make it final; the journal is removed.

    Raises UnreadableError when there is no journal or what it needs is gone, MalformedError when it is damaged, RefusedError for discarding
    the journal of a merge that was interrupted, and, unless `force` is given, where the files were changed after the merge.
    """
    base = Path(base)
    if base.name.endswith(INDEX_SUFFIX) and base.is_file():
        base = base.parent  # as `Checkpoint.open` takes it
    journal = Journal.read(base)
    if discard and journal.state == COMPLETE:
        raise RefusedError(
            "the merge was interrupted and the base may be half changed; its journal is the only copy of the old bytes",
            file=journal.path, remedy=f"run 'upparam undo {base}' first",
        )  # fmt: skip
    restored = 0
    findings: list[Finding] = []
    if not discard:
        findings = _check_later(base, journal, force)
        if journal.state == APPLIED:
            set_state(journal.path, COMPLETE)  # from here on the base may be half changed, until the journal is gone
        try:
            restored = _restore(journal)
            for path in journal.replaced:
                _put_back(path)
                restored += path.stat().st_size
        except KeyboardInterrupt:
            raise UnreadableError(
                "undo was interrupted, and the base may be half restored; its journal is kept", file=base, remedy=f"run 'upparam undo {base}' again"
            ) from None  # fmt: skip
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
    return Receipt("undo", [str(journal.path)], [str(base)], counts, [proof], findings)


def _check_later(base: Path, journal: Journal, force: bool) -> list[Finding]:
    """A warning where `force` lets later changes be written over. Raises what `undo` raises before it touches anything."""
    needed = {path for path, *_ in journal.ranges} | ({old_path(path) for path in journal.replaced} if journal.state == APPLIED else set())
    gone = sorted(path for path in needed if not path.is_file())
    if gone:
        raise UnreadableError(
            "a file that undo needs is gone, and nothing was changed", file=gone[0],
            remedy=f"put it back, or make the merge final with 'upparam undo --discard {base}'",
        )  # fmt: skip
    later = journal.later()
    if later and not force:
        raise RefusedError(
            "the files changed after the merge, and undo would write the old bytes over that", file=base, found="; ".join(later[:4]),
            remedy=f"give --force to do so, or keep them as they are with 'upparam undo --discard {base}'",
        )  # fmt: skip
    return [warning("changed-later", str(base), "what changed after the merge was written over, as asked", *later)] if later else []


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
