"""Files scanned per second: safetensors against the standard library's json alone, torch zip files against picklescan.

    python benchmarks/scan.py [--files 1000] [--tensors 1000] [--peer PYTHON]

`--peer` is a Python with picklescan installed (an environment of its own: it is no dependency of this project).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from upparam.containers.safetensors import header_bytes
from upparam.containers.torchfile.write import write
from upparam.dtypes import DTYPES
from upparam.operations.scan import scan
from upparam.sources import MemorySource
from upparam.tensors import Tensor

ROUNDS = 3


def make(folder: Path, files: int, tensors: int) -> tuple[list[Path], list[Path]]:
    """`files` safetensors adapters (sparse data: only headers are read) and a tenth as many torch zip files."""
    factor = {
        f"base_model.model.model.layers.{n // 14}.self_attn.q{n % 14}_proj.lora_{'AB'[n % 2]}.weight": (16, 64 + n % 7)
        for n in range(tensors)
    }
    plain, zipped = [], []
    for number in range(files):
        lazy = {name: Tensor(DTYPES["float16"], shape, MemorySource(b"")) for name, shape in factor.items()}
        header = header_bytes(lazy, {"format": "pt", "n": str(number)})
        path = folder / f"{number:05}.safetensors"
        with path.open("wb") as stream:
            stream.write(header)
            stream.truncate(len(header) + sum(tensor.nbytes for tensor in lazy.values()))
        plain.append(path)
    for number in range(max(1, files // 10)):
        path = folder / f"{number:05}.pt"
        with path.open("wb") as stream:
            write(stream, {name: Tensor.of(np.zeros((4, 4), np.float16)) for name in factor})
        zipped.append(path)
    return plain, zipped


def cost(work: Callable[[], object]) -> tuple[float, float]:
    """(wall, processor) seconds of the best of a few rounds, children included, after one round to warm the page cache."""
    work()
    rounds = []
    for _ in range(ROUNDS):
        begun, before = time.perf_counter(), os.times()
        work()
        after = os.times()
        rounds.append((time.perf_counter() - begun, sum(after[:4]) - sum(before[:4])))
    return min(wall for wall, _ in rounds), min(processor for _, processor in rounds)


def parse_headers(paths: list[Path]) -> None:
    """The floor: read and parse the JSON header, check nothing."""
    for path in paths:
        with path.open("rb") as stream:
            json.loads(stream.read(int.from_bytes(stream.read(8), "little")))


PEER = "import sys; from picklescan.scanner import scan_file_path\nfor path in sys.stdin.read().split(chr(10)): scan_file_path(path)"


def main() -> None:
    """Print files per second and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--tensors", type=int, default=1000)
    parser.add_argument("--peer", metavar="PYTHON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        plain, zipped = make(Path(folder), args.files, args.tensors)
        print(f"files per second of wall (of processor) time, best of {ROUNDS}; {args.files} safetensors files of {args.tensors} tensors")
        floor = rates("json.loads alone, one process", len(plain), cost(lambda: parse_headers(plain)))
        for jobs in (1, 2):
            ours = rates(f"upparam scan, {jobs} process(es)", len(plain), cost(lambda jobs=jobs: list(scan(plain, jobs=jobs))))
            print(f"    {ours / floor:.2f} of json alone, by processor time")
        print(f"{len(zipped)} torch zip files of {args.tensors} tensors, one process")
        ours = rates("upparam scan", len(zipped), cost(lambda: list(scan(zipped, jobs=1))))
        if args.peer:
            names = "\n".join(map(str, zipped))

            def peer(text: str) -> None:
                subprocess.run([args.peer, "-c", PEER], input=text, text=True, check=True, capture_output=True)

            start, whole = cost(lambda: peer(str(zipped[0]))), cost(lambda: peer(names))
            theirs = rates("picklescan, start-up taken off", len(zipped) - 1, (whole[0] - start[0], whole[1] - start[1]))
            print(f"    upparam is {ours / theirs:.1f}x, by processor time")


def rates(name: str, files: int, taken: tuple[float, float]) -> float:
    """Print one line; the rate by processor time."""
    print(f"  {name:32} {files / taken[0]:8.0f} ({files / taken[1]:.0f})")
    return files / taken[1]


if __name__ == "__main__":
    main()
