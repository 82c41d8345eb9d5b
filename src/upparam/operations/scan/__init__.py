"""Scan: would loading this file run something it chooses? A verdict per file, with the evidence. Nothing in a file is executed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from upparam.errors import UnreadableError
from upparam.operations.scan.files import scan_file
from upparam.operations.scan.verdict import FileScan, Verdict
from upparam.progress import Progress, silent

__all__ = ["FileScan", "Verdict", "files_in", "scan", "scan_file"]

_MANY = 200
"""Files from which a process pool pays for its start."""


def files_in(paths: Iterable[Path | str], *, recursive: bool = False) -> Iterator[Path]:
    """The files that paths name: a file is itself, a folder its files (with `recursive` also those below), hidden ones too.

    Symbolic links inside a folder are followed to files and never to folders. Raises UnreadableError for a path that does not exist.
    """
    for given in paths:
        path = Path(given)
        if not os.path.lexists(path):
            raise UnreadableError("no such file or folder", file=path)
        if not path.is_dir():
            yield path
        elif recursive:
            for folder, folders, files in os.walk(path):
                folders[:] = sorted(name for name in folders if name != ".git")
                yield from (Path(folder) / name for name in sorted(files))
        else:
            yield from (member for member in sorted(path.iterdir()) if not member.is_dir())


def scan(
    paths: Sequence[Path | str], *, recursive: bool = False, jobs: int | None = None, progress: Progress = silent
) -> Iterator[FileScan]:
    """Scan every file, in order. Many files are shared among `jobs` processes (default: one per CPU). Raises UnreadableError for missing paths."""
    files = list(files_in(paths, recursive=recursive))
    workers = min(jobs or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else jobs or os.cpu_count() or 1, 16)
    if len(files) < _MANY or workers < 2:
        found: Iterable[FileScan] = map(scan_file, files)
        yield from _counted(found, files, progress)
        return
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(workers) as pool:
        yield from _counted(pool.map(scan_file, files, chunksize=min(64, len(files) // (4 * workers))), files, progress)


def _counted(found: Iterable[FileScan], files: list[Path], progress: Progress) -> Iterator[FileScan]:
    for done, report in enumerate(found, 1):
        yield report
        progress(done, len(files), report.path.name)
