"""Merge LoRAs of known rank into a base and extract with --auto: is the rank found, and where does rounding to the stored dtype swallow it?

    python benchmarks/extract_rank.py [--side 512]

A LoRA whose singular values fall by a factor of ten is added to a weight of standard deviation 0.02 (as trained language models have) and
rounded to the dtype. `found` is the rank that extract chooses, `above` how many of the LoRA's own singular values lie above the noise floor
that extract states: what of it can be told from rounding at all. Size is ||dW|| / ||W||. The arithmetic is numpy's, in float64.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np

from upparam.checkpoint import Checkpoint
from upparam.containers.safetensors import write
from upparam.errors import RefusedError
from upparam.operations.extract import extracted
from upparam.tensors import Tensor

RANKS = (4, 8, 16, 32, 64)
SIZES = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3)
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def save(path: Path, weight: np.ndarray) -> Checkpoint:
    with path.open("wb") as stream:
        write(stream, {"layers.0.q_proj.weight": Tensor.of(weight)}, {})
    return Checkpoint.open(path)


def measured(folder: Path, kind: type, rank: int, size: float, side: int) -> str:
    """'found of rank (above)' for one matrix."""
    random = np.random.default_rng(rank)
    base = (0.02 * random.standard_normal((side, side))).astype(kind)
    up, down = (np.linalg.qr(random.standard_normal((side, rank)))[0] for _ in range(2))
    sigma = np.logspace(0, -1, rank)
    sigma *= size * float(np.linalg.norm(base.astype(np.float64))) / float(np.linalg.norm(sigma))
    tuned = (base.astype(np.float64) + up * sigma @ down.T).astype(kind)
    one, other = save(folder / "tuned.safetensors", tuned), save(folder / "base.safetensors", base)
    try:
        (module,) = extracted(one, other, auto=True).modules
    except RefusedError:
        return "below the noise"
    return f"{module.rank} ({int((sigma > module.floor).sum())})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=512, help="rows and columns of the weight")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name, kind in DTYPES.items():
            print(f"\n## {name}: rank found (singular values of the LoRA above the stated floor)\n")
            print("| size | " + " | ".join(f"r={rank}" for rank in RANKS) + " |\n|---|" + "---|" * len(RANKS))
            for size in SIZES:
                row = [measured(Path(folder), kind, rank, size, args.side) for rank in RANKS]
                print(f"| {size:g} | " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
