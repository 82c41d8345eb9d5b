"""Merging into the base's own files, with an undo journal: nothing of the old model is lost until the journal is discarded.

Of a file that changes little, only the touched byte ranges are rewritten, after their old bytes have been copied into the journal. A file
that changes for the most part is written anew beside the old one, which costs one pass over its bytes instead of two, and takes its
place; the old one is kept under another name. Two phases: first the journal and the new files, synced, and the mark that they are
complete, while the base is still as it was; then the places are changed and the ranges rewritten, their weights being read from the
journal. A kill in the first phase leaves the base untouched, a kill in the second leaves a complete journal for `undo`.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from upparam.containers.writing import make_room, write_at
from upparam.errors import OutputExistsError, RefusedError, UnreadableError
from upparam.findings import info
from upparam.operations.merge.journal import (
    COMPLETE,
    HEAD,
    MAGIC,
    PARTIAL,
    journal_path,
    merged_as,
    new_path,
    old_path,
    set_applied,
    sync_folder,
    undo,
)
from upparam.operations.merge.kernel import TILE_ELEMENTS
from upparam.operations.merge.loaded import matrix_shape
from upparam.operations.merge.planned import Plan, Work
from upparam.operations.merge.proof import Samples, check_samples
from upparam.operations.merge.stream import Flusher, Shared, Task, run_tasks
from upparam.operations.merge.write import Outcome, append_changes, append_copy, place, stale, summary, tasks_with_changes
from upparam.progress import Progress, silent
from upparam.sources import FileSource
from upparam.tensors import Tensor

REPLACED_SHARE = 0.4
"""The touched share of a file from which it is written anew: rewriting ranges reads and writes every touched byte twice."""


@dataclass
class _Way:
    """Which works are done by rewriting ranges and which by new files, and what the tasks of both leave."""

    ranges: list[Work]
    files: dict[Path, list[Work]]
    exact: bool
    samples: Samples | None
    shares: list[Shared] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Bytes of room needed beside the base."""
        return sum(work.tensor.nbytes for work in self.ranges) + sum(path.stat().st_size for path in self.files)


def merge_in_place(plan: Plan, *, verify: bool, exact: bool, sync: bool, threads: int, progress: Progress) -> Outcome:
    """Carry the plan out inside the base's own files. Any failure puts the old bytes back before it is raised.

    Without `sync` neither the journal nor the base is waited for: a kill is still safe, a power cut is not.

    Raises RefusedError for what cannot be done in place (another dtype, added tensors, containers other than safetensors),
    OutputExistsError when a journal of an earlier merge is still there.
    """
    base = plan.checkpoint.path
    _check(plan)
    path = journal_path(base)
    _refuse_earlier(plan)
    way = _choose(plan, exact, Samples.for_works(len(plan.works)) if verify else None)
    moved = _prepare(plan, path, way, sync=sync, threads=threads, progress=progress)
    try:
        proof = _apply(plan, moved, way, sync=sync, threads=threads, progress=progress)
        outcome = summary(plan, way.shares)
        root = base if plan.checkpoint.is_folder else base.parent
        set_applied(path, root, _touched(plan), sync)
    except BaseException:
        undo(base)
        raise
    outcome.bytes = plan.touched_bytes
    kept = sum(left.stat().st_size for left in (path, *map(old_path, way.files)))
    outcome.proofs = [proof] if proof else []
    outcome.findings += stale(plan, kept=True)
    outcome.findings.append(
        info("undo-journal", path.name, f"'upparam undo {base}' takes the merge back; 'upparam undo --discard {base}' frees {kept:,} bytes")
    )
    return outcome


def _choose(plan: Plan, exact: bool, samples: Samples | None) -> _Way:
    """New files where most of a file changes and there is room for them, and where a file has other names (hard links), under which nothing changes.

    Raises UnreadableError when there is no room for the ranges of the others either.
    """
    by_file: dict[Path, list[Work]] = {}
    for work in plan.works.values():
        by_file.setdefault(work.file.path, []).append(work)
    mostly = {
        path: works for path, works in by_file.items() if sum(work.tensor.nbytes for work in works) >= REPLACED_SHARE * path.stat().st_size
    }
    linked = {path: works for path, works in by_file.items() if path.stat().st_nlink > 1}
    ways = [
        _Way([work for path, works in by_file.items() if path not in files for work in works], files, exact, samples)
        for files in (mostly | linked, linked)
    ]
    parent = plan.checkpoint.path.parent
    free = shutil.disk_usage(parent).free
    for way in ways:
        if way.size + (1 << 20) <= free:
            return way
    raise UnreadableError("not enough room for the undo journal", file=parent, expected=f"{ways[-1].size:,} bytes", found=f"{free:,} free")


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


def _refuse_earlier(plan: Plan) -> None:
    """Raise OutputExistsError where an earlier merge could still be taken back: of this base, or of one of its files under another name of the base."""
    base = plan.checkpoint.path
    files = dict.fromkeys(work.file.path for work in plan.works.values())
    earlier = base if journal_path(base).exists() else next(filter(None, map(merged_as, files)), None)
    if earlier is not None:
        raise OutputExistsError(
            "an undo journal of an earlier merge is here",
            file=journal_path(earlier),
            remedy=f"'upparam undo {earlier}' takes that merge back, with --discard it is made final",
        )
    for old in filter(Path.exists, map(old_path, files)):
        raise OutputExistsError(
            "the old weights that an earlier merge kept are here, and its journal is gone",
            file=old,
            remedy="move them away, or remove them",
        )


def _prepare(plan: Plan, path: Path, way: _Way, *, sync: bool, threads: int, progress: Progress) -> list[Work]:
    """Phase one: the journal and the new files, complete and synced. Returns the works of ranges, their tensors read from the journal."""
    root = plan.checkpoint.path if plan.checkpoint.is_folder else plan.checkpoint.path.parent
    head = {
        "ranges": [[work.file.relative, place(work.tensor), work.tensor.nbytes] for work in way.ranges],
        "replaced": [file.relative_to(root).as_posix() for file in way.files],
        "sizes": {work.file.relative: work.file.path.stat().st_size for work in way.ranges},
        "what": [str(item.path) for item in plan.ingredients],
    }
    text = json.dumps(head).encode()
    start = HEAD + 8 + len(text)
    descriptors: list[int] = []
    try:
        fd = _create(path, start + sum(work.tensor.nbytes for work in way.ranges), descriptors)
        write_at(fd, memoryview(MAGIC + PARTIAL + len(text).to_bytes(8, "little") + text), 0)
        tasks: list[Task] = []
        at = start
        for work in way.ranges:
            assert isinstance(work.tensor.source, FileSource)
            append_copy(tasks, work.tensor.source, work.tensor.offset, fd, at, work.tensor.nbytes)
            at += work.tensor.nbytes
        for file, works in way.files.items():
            new = _create(new_path(file), file.stat().st_size, descriptors, like=file)
            tasks += tasks_with_changes(file, works, new, way.shares, way.samples, way.exact)
        with Flusher(descriptors if sync else ()):
            run_tasks(tasks, threads, _widest(plan), progress if way.files else silent, plan.device)
        for descriptor in descriptors if sync else ():
            os.fsync(descriptor)
        if sync:
            for folder in {path.parent, *(file.parent for file in way.files)}:
                sync_folder(folder)
        write_at(fd, memoryview(COMPLETE), len(MAGIC))
        if sync:
            os.fsync(fd)
    except BaseException as problem:
        for left in (*map(new_path, way.files), path):
            left.unlink(missing_ok=True)
        if isinstance(problem, OSError) and problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UnreadableError(
                f"the undo journal could not be written: {problem.strerror}; the base is as it was", file=path
            ) from problem
        raise
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    source = FileSource(path)
    moved = []
    at = start
    for work in way.ranges:
        moved.append(replace(work, tensor=Tensor(work.tensor.dtype, work.tensor.shape, source, at)))
        at += work.tensor.nbytes
    return moved


def _create(path: Path, size: int, descriptors: list[int], like: Path | None = None) -> int:
    """A new file of that size, owned and permitted as `like` where the system lets us."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o600)
    descriptors.append(fd)
    make_room(fd, size)
    if like is not None:
        shutil.copymode(like, path)
        owner = like.stat()
        if hasattr(os, "fchown") and (owner.st_uid, owner.st_gid) != (os.geteuid(), os.getegid()):
            with suppress(PermissionError):
                os.fchown(fd, owner.st_uid, owner.st_gid)
    return fd


def _widest(plan: Plan) -> int:
    return max(TILE_ELEMENTS, *(matrix_shape(work.tensor.shape)[1] for work in plan.works.values()))


def _apply(plan: Plan, moved: list[Work], way: _Way, *, sync: bool, threads: int, progress: Progress) -> str | None:
    """Phase two: prove the new files and put them in their places, rewrite the ranges from the journal's old bytes and prove them."""
    new = {work.name: FileSource(new_path(file)) for file, works in way.files.items() for work in works}
    written = {name: replace(plan.works[name].tensor, source=source, offset=place(plan.works[name].tensor)) for name, source in new.items()}
    if way.samples is not None and written:  # before the base is touched; the ranges are looked at when they are written
        check_samples(way.samples, written, way.exact)
    for file in way.files:
        _take_place(file)
    for folder in {file.parent for file in way.files} if sync else ():
        sync_folder(folder)
    descriptors = {work.file.path: os.open(work.file.path, os.O_RDWR) for work in moved}
    try:
        tasks: list[Task] = []
        for work in moved:
            offset = place(plan.works[work.name].tensor)
            append_changes(tasks, work, descriptors[work.file.path], offset, way.shares, way.samples, way.exact)
        if tasks:
            run_tasks(tasks, threads, _widest(plan), progress, plan.device)
        for fd in descriptors.values() if sync else ():
            os.fsync(fd)
    finally:
        for fd in descriptors.values():
            os.close(fd)
    if way.samples is None:
        return None
    return check_samples(way.samples, {work.name: plan.works[work.name].tensor for work in way.ranges} | written, way.exact)


def _touched(plan: Plan) -> dict[Path, list[tuple[int, int]]]:
    """Where each file was written: offset and size of every changed tensor."""
    touched: dict[Path, list[tuple[int, int]]] = {}
    for work in plan.works.values():
        touched.setdefault(work.file.path, []).append((place(work.tensor), work.tensor.nbytes))
    return touched


def _take_place(file: Path) -> None:
    """The new file under the old one's name, which stays under another. Where the system has hard links there is a file under the name throughout."""
    old = old_path(file)
    try:
        os.link(file, old)
    except OSError:
        file.rename(old)
    new_path(file).replace(file)
