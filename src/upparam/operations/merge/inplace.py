"""Merging into the base's own files, with an undo journal: only touched byte ranges are rewritten.

Two phases. First the old bytes of every range that will change are copied into a journal beside the base, which is synced and then
marked complete; the base is still as it was. Then the ranges are rewritten, the weights being read from the journal. A kill in the
first phase leaves the base untouched, a kill in the second leaves a complete journal: `undo` copies the old bytes back, bit for bit,
and may itself be killed and run again. After success the journal stays, so the merge can be taken back, until it is discarded.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from upparam.errors import MalformedError, OutputExistsError, RefusedError, UnreadableError
from upparam.findings import info
from upparam.operations.merge.kernel import TILE_ELEMENTS
from upparam.operations.merge.loaded import matrix_shape
from upparam.operations.merge.plan import Plan, Work
from upparam.operations.merge.proof import Samples, check_samples
from upparam.operations.merge.stream import Change, Copy, Shared, Task, chunks_of, run_tasks, write_all
from upparam.operations.merge.write import Outcome, append_copy, summary
from upparam.operations.receipt import Receipt
from upparam.progress import Progress, silent
from upparam.tensors import FileSource, Tensor

_MAGIC = b"upparam-undo 1\n\0"
_PARTIAL, _COMPLETE, _APPLIED = b"partial ", b"complete", b"applied "
"""States, written at byte 16: old bytes still being gathered; gathered and the base perhaps half changed; the merge went through."""
_HEAD = len(_MAGIC) + 8


def journal_path(base: Path) -> Path:
    """Where the journal of a base lies: hidden, inside a folder or beside a file."""
    return base / ".upparam-undo" if base.is_dir() else base.with_name(f".{base.name}.upparam-undo")


@dataclass
class Journal:
    """An undo journal as read: its state, and (file, offset in it, length, offset in the journal) of every range."""

    path: Path
    state: bytes
    ranges: list[tuple[Path, int, int, int]]
    what: list[str]

    @staticmethod
    def read(base: Path) -> Journal:
        """The journal of a base. Raises UnreadableError when there is none, MalformedError when it is damaged."""
        path = journal_path(base)
        if not path.is_file():
            raise UnreadableError("no undo journal lies here", file=base, expected=str(path))
        source = FileSource(path)
        if source.size < _HEAD + 8 or source.read(0, len(_MAGIC)) != _MAGIC:
            return Journal(path, _PARTIAL, [], [])
        state = source.read(len(_MAGIC), 8)
        if state == _PARTIAL:
            return Journal(path, state, [], [])
        length = int.from_bytes(source.read(_HEAD, 8), "little")
        try:
            head = json.loads(source.read(_HEAD + 8, length))
            root = base if base.is_dir() else base.parent
            at, ranges = _HEAD + 8 + length, []
            for name, offset, size in head["ranges"]:
                ranges.append((root / name, int(offset), int(size), at))
                at += int(size)
        except (ValueError, KeyError, TypeError) as problem:
            raise MalformedError("the undo journal is damaged", file=path, found=str(problem)) from problem
        if at != source.size or state not in (_COMPLETE, _APPLIED):
            raise MalformedError("the undo journal is damaged", file=path, expected=f"{at} bytes", found=source.size)
        return Journal(path, state, ranges, head.get("what", []))


def merge_in_place(plan: Plan, *, verify: bool, exact: bool, sync: bool, threads: int, progress: Progress) -> Outcome:
    """Carry the plan out inside the base's own files. Any failure puts the old bytes back before it is raised.

    Without `sync` neither the journal nor the base is waited for: a kill is still safe, a power cut is not.

    Raises RefusedError for what cannot be done in place (another dtype, added tensors, containers other than safetensors),
    OutputExistsError when a journal of an earlier merge is still there.
    """
    base = plan.checkpoint.path
    _check(plan)
    path = journal_path(base)
    if path.exists():
        raise OutputExistsError(
            "an undo journal of an earlier merge is here",
            file=path,
            remedy=f"'upparam undo {base}' takes that merge back, with --discard it is made final",
        )
    works = list(plan.works.values())
    moved = _gather(plan, path, works, threads, sync)
    try:
        outcome = _apply(plan, moved, verify=verify, exact=exact, sync=sync, threads=threads, progress=progress)
        _set_state(path, _APPLIED)
    except BaseException:
        undo(base)
        raise
    outcome.findings.append(
        info(
            "undo-journal",
            path.name,
            f"'upparam undo {base}' takes the merge back; 'upparam undo --discard {base}' frees {path.stat().st_size:,} bytes",
        )
    )
    return outcome


def _check(plan: Plan) -> None:
    base = plan.checkpoint.path
    if plan.added:
        raise RefusedError("in place no tensor can be added", file=base, found=", ".join(plan.added), remedy="write elsewhere with -o")
    for work in plan.works.values():
        if work.dtype != work.tensor.dtype:
            raise RefusedError("in place the dtype cannot change", file=base, tensor=work.name, remedy="write elsewhere with -o")
        if work.file.container not in ("safetensors", "gguf") or work.tensor.big_endian or not isinstance(work.tensor.source, FileSource):
            raise RefusedError(
                "only safetensors and GGUF files are changed in place",
                file=work.file.path,
                found=work.file.container,
                remedy="write elsewhere with -o",
            )
        if not os.access(work.file.path, os.W_OK):
            raise UnreadableError("no permission to write", file=work.file.path)
        if work.file.path.is_symlink():
            raise RefusedError(
                "the file is a symbolic link (a shared cache?); changing it in place would change it for everyone",
                file=work.file.path, remedy="name the real file, or write elsewhere with -o",
            )  # fmt: skip


def _gather(plan: Plan, path: Path, works: list[Work], threads: int, sync: bool) -> list[Work]:
    """Phase one: the journal, complete and synced. Returns the works with their tensors read from it."""
    head = {
        "ranges": [[work.file.relative, _position(work.tensor), work.tensor.nbytes] for work in works],
        "what": [str(item.path) for item in plan.ingredients],
    }
    text = json.dumps(head).encode()
    start = _HEAD + 8 + len(text)
    size = start + sum(work.tensor.nbytes for work in works)
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise UnreadableError("not enough room for the undo journal", file=path.parent, expected=f"{size:,} bytes", found=f"{free:,} free")
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, size)
        write_all(fd, memoryview(_MAGIC + _PARTIAL + len(text).to_bytes(8, "little") + text), 0)
        tasks: list[Task] = []
        at = start
        for work in works:
            assert isinstance(work.tensor.source, FileSource)
            append_copy(tasks, work.tensor.source, work.tensor.offset, fd, at, work.tensor.nbytes)
            at += work.tensor.nbytes
        run_tasks(tasks, threads, 1, silent)
        if sync:
            os.fsync(fd)
        write_all(fd, memoryview(_COMPLETE), len(_MAGIC))
        if sync:
            os.fsync(fd)
    except BaseException as problem:
        os.close(fd)
        path.unlink()
        if isinstance(problem, OSError) and problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UnreadableError(
                f"the undo journal could not be written: {problem.strerror}; the base is as it was", file=path
            ) from problem
        raise
    os.close(fd)
    source = FileSource(path)
    moved = []
    at = start
    for work in works:
        moved.append(replace(work, tensor=Tensor(work.tensor.dtype, work.tensor.shape, source, at)))
        at += work.tensor.nbytes
    return moved


def _position(tensor: Tensor) -> int:
    assert isinstance(tensor.source, FileSource)
    return tensor.source.start + tensor.offset


def _apply(plan: Plan, moved: list[Work], *, verify: bool, exact: bool, sync: bool, threads: int, progress: Progress) -> Outcome:
    """Phase two: rewrite the ranges from the journal's old bytes."""
    samples = Samples.for_works(len(moved)) if verify else None
    descriptors = {work.file.path: os.open(work.file.path, os.O_RDWR) for work in moved}
    try:
        shares: list[Shared] = []
        tasks: list[Task] = []
        for work in moved:
            chunks = chunks_of(work)
            shared = Shared(work, len(chunks))
            shares.append(shared)
            offset = _position(plan.works[work.name].tensor)
            observe = samples.observe if samples else None
            tasks += [Change(shared, low, high, descriptors[work.file.path], offset, exact, observe) for low, high in chunks]
        widest = max(matrix_shape(work.tensor.shape)[1] for work in moved)
        run_tasks(tasks, threads, max(TILE_ELEMENTS, widest), progress)
        for fd in descriptors.values() if sync else ():
            os.fsync(fd)
    finally:
        for fd in descriptors.values():
            os.close(fd)
    outcome = summary(plan, shares)
    outcome.bytes = plan.touched_bytes
    if samples is not None:
        outcome.proofs = [check_samples(samples, {name: work.tensor for name, work in plan.works.items()}, exact)]
    return outcome


def _set_state(path: Path, state: bytes) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        write_all(fd, memoryview(state), len(_MAGIC))
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
    if discard and journal.state == _COMPLETE:
        raise RefusedError(
            "the merge was interrupted and the base may be half changed; its journal is the only copy of the old bytes",
            file=journal.path, remedy=f"run 'upparam undo {base}' first",
        )  # fmt: skip
    restored = 0
    if not discard:
        restored = _restore(journal)
    journal.path.unlink()
    counts: dict[str, Any] = {"ranges_restored": 0 if discard else len(journal.ranges), "bytes": restored}
    proof = "the journal is gone and the merge is final" if discard else "every restored range was read back and equals the journal"
    if not discard and not journal.ranges:
        proof = "the merge had not changed anything yet"
    return Receipt("undo", [str(journal.path)], [str(base)], counts, [proof])


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
