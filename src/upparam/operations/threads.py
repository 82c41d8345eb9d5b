"""Work on modules side by side: numpy lets go of the interpreter inside its products and decompositions. What suits that of BLAS and memory."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from threading import Event, Lock
from typing import TypeVar

from upparam.progress import Progress

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(
    work: Callable[[Item], Result], items: Sequence[Item], sizes: Sequence[int], threads: int | None, progress: Progress
) -> Iterable[Result]:
    """The results of `work` for each item, in order, computed on `threads` threads. The first exception stops the rest."""
    total, done = sum(sizes), 0
    keep_freed_memory()
    if len(items) == 1:
        yield work(items[0])
        progress(total, total, "")
        return
    from concurrent.futures import ThreadPoolExecutor

    with one_blas_thread(), ThreadPoolExecutor(threads or default_threads()) as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            for future, size in zip(futures, sizes, strict=True):
                yield future.result()
                done += size
                progress(done, total, "")
        finally:
            for future in futures:
                future.cancel()


def default_threads() -> int:
    """Threads used when none are asked for: the cores this process may use, at most 8."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, count)


_limited = Lock()
"""Held while BLAS has one thread: by whoever set that, or for good by a command."""
_owned = Event()
"""Set where the process is a command's."""


def own_process() -> None:
    """The process is a command's: it has one BLAS thread for each of ours, and may keep what is freed.

    To be called before numpy is first imported. The user's own setting of BLAS stands.
    """
    for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"):
        os.environ.setdefault(name, "1")
    _limited.acquire(blocking=False)
    _owned.set()


@cache
def keep_freed_memory() -> None:
    """Let what is freed stay with the process, if it is ours: arrays of megabytes come and go by the hundred, one module after the other.

    Each would be asked of the system and every page of it cleared and put in place again: a third of a resize, a tenth of a merge of rank
    128. A no-op where malloc is not glibc's.
    """
    if not (_owned.is_set() and sys.platform.startswith("linux")):
        return
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most it takes
        mallopt(_M_TRIM_THRESHOLD, 64 << 20)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """One BLAS thread for each of ours while this lasts; then the caller's number is back.

    Where a process has imported numpy on its own, BLAS has a thread a core. As many threads of ours, each waiting for all of those,
    took a dozen times as long. The number is the process's, so of several that overlap the first sets it and puts it back.
    """
    if not _limited.acquire(blocking=False):
        yield
        return
    try:
        import numpy as np  # noqa: F401 - brings its BLAS, which must be there to be limited
        from threadpoolctl import threadpool_limits

        with threadpool_limits(1, user_api="blas"):
            yield
    finally:
        _limited.release()
