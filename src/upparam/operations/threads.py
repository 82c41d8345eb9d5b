"""Work on modules side by side: numpy lets go of the interpreter inside its products and decompositions."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from upparam.progress import Progress

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(
    work: Callable[[Item], Result], items: Sequence[Item], sizes: Sequence[int], threads: int | None, progress: Progress
) -> Iterable[Result]:
    """The results of `work` for each item, in order, computed on `threads` threads. The first exception stops the rest."""
    total, done = sum(sizes), 0
    if len(items) == 1:
        yield work(items[0])
        progress(total, total, "")
        return
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(threads or default_threads()) as pool:
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


def pin_blas() -> None:
    """One BLAS thread for each of ours. Works only before numpy is first imported; later the caller's own setting stands."""
    if "numpy" not in sys.modules:
        for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"):
            os.environ.setdefault(name, "1")
