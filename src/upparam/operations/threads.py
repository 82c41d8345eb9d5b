"""Work on modules side by side: numpy lets go of the interpreter inside its products and decompositions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from upparam.operations.merge import default_threads
from upparam.progress import Progress

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(
    work: Callable[[Item], Result], items: Sequence[Item], sizes: Sequence[int], threads: int | None, progress: Progress
) -> Iterable[Result]:
    """The results of `work` for each item, in order, computed on `threads` threads. The first exception stops the rest."""
    total, done = sum(sizes), 0
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
