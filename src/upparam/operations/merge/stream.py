"""The moving of bytes: copies and changed row chunks in file order, worked off by a few threads with fixed buffers."""

from __future__ import annotations

import mmap
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from upparam.arrays import floats
from upparam.containers.writing import write_at
from upparam.dtypes import DType
from upparam.operations.merge.in_float64 import too_large
from upparam.operations.merge.kernel import TILE_ELEMENTS, Device, Scratch
from upparam.operations.merge.loaded import BaseRows, Loaded, matrix_shape
from upparam.operations.merge.planned import Work
from upparam.operations.merge.rounding import narrow
from upparam.operations.threads import keep_freed_memory, one_blas_thread
from upparam.progress import Progress
from upparam.sources import FileSource
from upparam.tensors import Tensor

COPY_CHUNK = 1 << 20
TASK_BYTES = 32 << 20
"""Bytes of base weight one task covers; large tensors are shared by threads in tasks of this size."""
_IN_FLOAT64 = 1 << 17
"""Elements of a tile that is computed in float64: several arrays of 1 MiB each."""


class Buffers:
    """One thread's memory: raw bytes for reading and copying, and the kernel's tiles."""

    def __init__(self, elements: int, device: Device | None = None) -> None:
        lane = None if device is None else device.lane(elements)
        self.tile = TILE_ELEMENTS if lane is None else lane.elements
        # whole pages: aligned for copies and for the kernel
        self.raw = mmap.mmap(-1, max(COPY_CHUNK, elements * 8)) if lane is None else lane.raw
        self.scratch = Scratch(elements, lane=lane)


class Task(Protocol):
    """A piece of work for one thread. `size` counts bytes of output for progress."""

    size: int
    what: str

    def run(self, buffers: Buffers) -> None:
        """Do it."""
        ...


@dataclass
class Copy:
    """A range of bytes that goes to the output as it is."""

    source: FileSource
    start: int
    fd: int
    offset: int
    size: int
    what: str = "copying"

    def run(self, buffers: Buffers) -> None:
        """Copy in chunks through the thread's buffer (measured twice as fast as copy_file_range into preallocated ext4)."""
        view = memoryview(buffers.raw)
        for at in range(0, self.size, COPY_CHUNK):
            part = view[: min(COPY_CHUNK, self.size - at)]
            self.source.readinto(self.start + at, part)
            write_at(self.fd, part, self.offset + at)


@dataclass
class Convert:
    """An untouched tensor written in another dtype, or one that does not lie contiguously in its file. `overflow` counts what was too large."""

    name: str
    tensor: Tensor
    dtype: DType
    fd: int
    offset: int
    size: int
    what: str = "converting"
    overflow: int = 0

    def run(self, buffers: Buffers) -> None:
        """Round tile by tile, or copy the bytes when the dtype stays."""
        if self.dtype == self.tensor.dtype:
            write_at(self.fd, memoryview(self.tensor.raw()), self.offset)
            return
        rows = BaseRows(self.tensor)
        step = max(1, TILE_ELEMENTS // max(1, rows.columns))
        for start in range(0, rows.count, step):
            stored = rows.stored(start, min(start + step, rows.count))
            true = floats(stored)
            written = narrow(true, self.dtype)
            self.overflow += too_large(written, stored, true, self.dtype)
            write_at(self.fd, as_bytes(written), self.offset + start * rows.columns * self.dtype.itemsize)


class Shared:
    """A work's factors, loaded by the first task that needs them and let go by the last."""

    def __init__(self, work: Work, tasks: int) -> None:
        self.work = work
        self.elements = 0
        self.infinite = 0
        self._left = tasks
        self._loaded: Loaded | None = None
        self._lock = threading.Lock()

    def take(self) -> Loaded:
        """The loaded work."""
        with self._lock:
            if self._loaded is None:
                self._loaded = Loaded(self.work)
            return self._loaded

    def done(self, changed: int, infinite: int) -> None:
        """Count one task's outcome and drop the factors after the last."""
        with self._lock:
            self.elements += changed
            self.infinite += infinite
            self._left -= 1
            if not self._left:
                self._loaded = None


Observer = Callable[[Loaded, int, int], None]
"""Called with the loaded work and the row range a task covered, while the factors are still in memory."""


@dataclass
class Change:
    """Rows [start, stop) of a changed tensor."""

    shared: Shared
    start: int
    stop: int
    fd: int
    offset: int
    exact: bool = True
    observe: Observer | None = None
    what: str = field(init=False)
    size: int = field(init=False)

    def __post_init__(self) -> None:
        work = self.shared.work
        self.what = work.name
        self.size = (self.stop - self.start) * matrix_shape(work.tensor.shape)[1] * work.dtype.itemsize

    def run(self, buffers: Buffers) -> None:
        """Read, change, write, tile by tile."""
        loaded = self.shared.take()
        changed = infinite = 0
        for start, tile in tiles(loaded, self.start, self.stop, buffers):
            written, more, over = loaded.change(tile, start, buffers.scratch, self.exact)
            write_at(self.fd, as_bytes(written), self.offset + start * loaded.base.columns * loaded.work.dtype.itemsize)
            changed, infinite = changed + more, infinite + over
        if self.observe is not None:
            self.observe(loaded, self.start, self.stop)
        self.shared.done(changed, infinite)


def tiles(loaded: Loaded, start: int, stop: int, buffers: Buffers) -> Iterator[tuple[int, Any]]:
    """Tiles of the base's rows [start, stop), each (first row, stored elements in the thread's buffer)."""
    base = loaded.base
    step = max(1, (buffers.tile if loaded.through_kernel else _IN_FLOAT64) // max(1, base.columns))
    view = memoryview(buffers.raw)
    for at in range(start, stop, step):
        count = min(step, stop - at)
        part = view[: count * base.row_bytes]
        base.readinto(at, part)
        yield at, np.frombuffer(part, base.tensor.dtype.numpy).reshape(count, base.columns)


def as_bytes(array: Any) -> memoryview:
    """The bytes of a C-contiguous array, whatever its dtype."""
    return memoryview(array.reshape(-1).view(np.uint8))


def chunks_of(work: Work) -> list[tuple[int, int]]:
    """Row ranges of a work, one a task."""
    rows, columns = matrix_shape(work.tensor.shape)
    step = max(1, TASK_BYTES // max(1, columns * work.tensor.dtype.itemsize))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


class Flusher:
    """Sends what is written to the disk while the work goes on, so that the sync at the end finds little left to do."""

    def __init__(self, descriptors: Sequence[int], every: float = 0.1) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(list(descriptors), every), daemon=True)

    def _work(self, descriptors: list[int], every: float) -> None:
        while not self._stop.wait(every):
            for fd in descriptors:
                try:
                    os.fdatasync(fd)
                except OSError:
                    return  # the sync at the end reports it

    def __enter__(self) -> Flusher:
        self._thread.start()
        return self

    def __exit__(self, *problem: object) -> None:
        self._stop.set()
        self._thread.join()


class Lanes:
    """Tasks dealt to workers by the file they write, each file's in order: a file system lets one writer into a file at a time."""

    def __init__(self, tasks: Sequence[Task], workers: int) -> None:
        files: dict[int | None, list[Task]] = {}
        for task in tasks:
            files.setdefault(getattr(task, "fd", None), []).append(task)
        self._lanes: list[deque[Task]] = [deque() for _ in range(workers)]
        load = [0] * workers
        for file in files.values():
            lane = load.index(min(load))
            self._lanes[lane] += file
            load[lane] += sum(task.size for task in file)

    def next(self, worker: int) -> Task | None:
        """What `worker` does next: of its own files, and when they are done, helping where most is left. Not to be called by two at once."""
        lane = self._lanes[worker] or max(self._lanes, key=len)
        return lane.popleft() if lane else None


@one_blas_thread()
def run_tasks(tasks: Sequence[Task], threads: int, elements: int, progress: Progress, device: Device | None = None) -> None:
    """Work tasks off on `threads` threads, tiles through `device` where one is given. The first exception stops all and is raised; so does a KeyboardInterrupt."""
    keep_freed_memory()
    count = max(1, min(threads, len(tasks)))
    lanes, lock = Lanes(tasks, count), threading.Lock()
    total = sum(task.size for task in tasks)
    state: dict[str, Any] = {"done": 0, "what": "", "problem": None, "stop": False}

    def work(number: int) -> None:
        try:
            buffers = Buffers(elements, device)
            while not state["stop"]:
                with lock:
                    task = lanes.next(number)
                if task is None:
                    return
                with np.errstate(over="ignore", invalid="ignore"):  # tasks count what overflows, and it is said as a finding
                    task.run(buffers)
                with lock:
                    state["done"] += task.size
                    state["what"] = task.what
        except BaseException as problem:
            with lock:
                state["problem"] = state["problem"] or problem
            state["stop"] = True

    workers = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(count)]
    for worker in workers:
        worker.start()
    try:
        for worker in workers:
            while worker.is_alive():
                worker.join(0.1)
                progress(state["done"], total, state["what"])
    finally:
        state["stop"] = True
        for worker in workers:
            worker.join()
    if state["problem"] is not None:
        raise state["problem"]
