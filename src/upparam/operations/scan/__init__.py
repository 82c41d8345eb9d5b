"""Scan: would loading this file run something it chooses? A verdict per file, with the evidence. Nothing in a file is executed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from upparam.errors import UnreadableError
from upparam.findings import error, warning
from upparam.operations.scan.files import scan_file
from upparam.operations.scan.verdict import PASSED_OVER, FileScan, Verdict
from upparam.progress import Progress, silent

__all__ = ["FileScan", "Verdict", "places", "scan", "scan_file"]

_MANY = 200
"""Files from which a process pool pays for its start."""


def places(paths: Iterable[Path | str], *, recursive: bool = False) -> Iterator[Path | FileScan]:
    """What paths name, in order: a file is itself, a folder its files (with `recursive` also those below), hidden ones too.

    A folder that is passed over comes as its own report, so that no answer is silent about it: one below another without `recursive`, one
    that cannot be listed, one behind a symbolic link (links are followed to files and never to folders). Only `.git` is passed over unsaid.
    Raises UnreadableError for a path that does not exist.
    """
    for given in paths:
        path = Path(given)
        if not os.path.lexists(path):
            raise UnreadableError("no such file or folder", file=path)
        if path.is_dir():
            yield from _inside(path, recursive)
        else:
            yield path


def _inside(folder: Path, recursive: bool) -> Iterator[Path | FileScan]:
    try:
        members = sorted(folder.iterdir())
    except OSError as problem:
        yield FileScan(folder, unreadable=True, findings=[error("unreadable", folder.name, problem.strerror or str(problem))])
        return
    folders: list[Path] = []
    for member in members:
        if member.is_dir():
            folders.append(member)
        else:
            yield member
    for member in folders:
        if member.is_symlink():
            said = "a link to a folder, which is not followed; scan its target"
            yield FileScan(member, findings=[warning(PASSED_OVER, member.name, said)])
        elif recursive and member.name != ".git":
            yield from _inside(member, recursive)
        elif not recursive:
            # Where nothing else was looked at, an exit code of 0 would speak of files nobody saw.
            lone = len(folders) == len(members)
            said = "a folder below; --recursive looks into it"
            yield FileScan(member, unreadable=lone, findings=[(error if lone else warning)(PASSED_OVER, member.name, said)])


def scan(
    paths: Sequence[Path | str], *, recursive: bool = False, jobs: int | None = None, progress: Progress = silent
) -> Iterator[FileScan]:
    """Scan every file, in order. Many files are shared among `jobs` processes (default: one per CPU). Raises UnreadableError for missing paths."""
    found = list(places(paths, recursive=recursive))
    files = [place for place in found if isinstance(place, Path)]
    workers = min(jobs or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else jobs or os.cpu_count() or 1, 16)
    if len(files) < _MANY or workers < 2:
        yield from _counted(map(scan_file, files), found, progress)
        return
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(workers) as pool:
        yield from _counted(pool.map(scan_file, files, chunksize=min(64, len(files) // (4 * workers))), found, progress)


def _counted(scans: Iterator[FileScan], found: Sequence[Path | FileScan], progress: Progress) -> Iterator[FileScan]:
    for done, place in enumerate(found, 1):
        report = next(scans) if isinstance(place, Path) else place
        yield report
        progress(done, len(found), report.path.name)
