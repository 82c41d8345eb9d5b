"""BLAS keeps to one thread under ours, and the caller gets the number back; a command keeps the memory it freed."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
import threading

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from upparam.operations.merge.stream import run_tasks
from upparam.operations.threads import in_threads, one_blas_thread


def blas_threads() -> set[int]:
    np.ones((2, 2)) @ np.ones((2, 2))
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


@pytest.fixture(autouse=True)
def two_threads():
    with threadpool_limits(2, user_api="blas"):
        yield
        assert blas_threads() == {2}


def test_work_in_threads_has_one_each() -> None:
    found = list(in_threads(lambda _: blas_threads(), [0, 1, 2], [1, 1, 1], 2, lambda *_: None))
    assert found == [{1}] * 3


def test_work_that_fails_gives_the_number_back() -> None:
    with pytest.raises(ZeroDivisionError):
        list(in_threads(lambda one: 1 // one, [1, 0], [1, 1], 2, lambda *_: None))


def test_merging_has_one_each() -> None:
    found: list[set[int]] = []

    class Task:
        what, size, file = "a tensor", 1, 0

        def run(self, buffers: object) -> None:
            found.append(blas_threads())

    run_tasks([Task(), Task()], 2, 16, lambda *_: None)  # type: ignore[list-item]
    assert found == [{1}, {1}]


def test_of_several_that_overlap_the_first_puts_it_back() -> None:
    """A second one would remember the 1 it found, and leave that behind."""
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with one_blas_thread():
            inside.set()
            leave.wait()

    thread = threading.Thread(target=other)
    with one_blas_thread():
        thread.start()
        inside.wait()
        assert blas_threads() == {1}
    leave.set()
    thread.join()
    assert blas_threads() == {2}


def test_a_process_that_has_not_imported_numpy_yet_is_limited_too() -> None:
    code = """if True:
        from upparam.operations.threads import in_threads
        def work(_):
            import numpy
            from threadpoolctl import threadpool_info
            return [library["num_threads"] for library in threadpool_info()]
        print(list(in_threads(work, [0, 1], [1, 1], 2, lambda *_: None)))"""
    environ = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ, check=True).stdout == "[[1], [1]]\n"


def test_importing_and_resizing_sets_nothing_for_the_process() -> None:
    code = """if True:
        import os, sys
        import upparam.operations.resize, upparam.operations.merge, upparam.operations.combine, upparam.operations.compare, upparam.operations.extract
        for call in (lambda: upparam.merge("absent", "absent", "out"), lambda: upparam.resize("absent", "out", upparam.RankRule(1))):
            try: call()
            except upparam.UpparamError: pass
        print(sorted(name for name in os.environ if name.endswith("_NUM_THREADS")))"""
    environ = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ, check=True).stdout == "[]\n"


FAULTS = """
import resource, sys
from upparam.operations import threads
if sys.argv[1] == "command":
    threads.own_process()
import numpy as np

def work(_):
    for _ in range(30):
        arrays = [np.ones(size << 20, np.uint8) for size in (1, 2, 3, 5)]
        del arrays

before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
list(threads.in_threads(work, [0, 1], [1, 1], 2, lambda *_: None))
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_a_command_is_given_its_pages_once() -> None:
    """30 times 11 MiB on two threads: as a library we leave malloc as it is, which gives them back and asks anew."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("of glibc's malloc only")

    def faults(kind: str) -> int:
        # Left alone malloc moves its thresholds by what it has met, on one thread sooner than on the other; given them, it keeps them.
        given = {"MALLOC_MMAP_THRESHOLD_": str(128 << 10), "MALLOC_TRIM_THRESHOLD_": str(128 << 10)}
        run = subprocess.run([sys.executable, "-c", FAULTS, kind], capture_output=True, text=True, check=True, env={**os.environ, **given})
        return int(run.stdout)

    pages = (11 << 20) // resource.getpagesize()
    assert faults("command") < 4 * pages
    assert faults("library") > 20 * pages
