"""How many elements of 10^8 are wrongly rounded, with and without the check of near-ties, and what the check costs in the kernel.

    python benchmarks/merge_exact.py [--elements 100000000] [--rank 16]

The reference is the float64 sum rounded once. Every route of this machine is measured; times are of the kernel alone, best of all tiles.
"""

from __future__ import annotations

import argparse
import os
import time

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

from upparam.dtypes import DTYPES
from upparam.operations.merge.factors import LowRank
from upparam.operations.merge.kernel import Scratch, add_low_rank, routes
from upparam.operations.merge.rounding import narrow, ordered, widen

ROWS, COLUMNS = 128, 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=10**8)
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    pool = rng.standard_normal((4 * ROWS, COLUMNS))
    for dtype in ("bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e5m2"):
        scratches = {name: Scratch(ROWS * COLUMNS, route) for name, route in routes().items()}
        wrong = {(name, exact): 0 for name in scratches for exact in (True, False)}
        best = dict.fromkeys(wrong, 9.0)
        tiles = -(-args.elements // (ROWS * COLUMNS))
        for tile in range(tiles):
            start = int(rng.integers(0, 3 * ROWS))
            weight = np.roll(pool[start : start + ROWS] * 0.02, tile, axis=1).astype(DTYPES[dtype].numpy)
            up, down = (
                (rng.standard_normal(shape) * 0.02).astype(np.float32).astype(np.float64)
                for shape in ((ROWS, args.rank), (args.rank, COLUMNS))
            )
            factors = LowRank(up * 0.5, down)  # the scale is part of up
            true = narrow(widen(weight) + factors.up64 @ factors.down64, DTYPES[dtype])
            for scratch in scratches.values():  # forms of the factors that are made once a module, not once a tile
                add_low_rank(weight[:8].copy(), DTYPES[dtype], factors, 0, scratch)
            for (name, exact), count in wrong.items():
                stored = weight.copy()
                begun = time.perf_counter()
                add_low_rank(stored, DTYPES[dtype], factors, 0, scratches[name], exact=exact)
                best[name, exact] = min(best[name, exact], time.perf_counter() - begun)
                wrong[name, exact] = count + int(np.count_nonzero(ordered(stored) != ordered(true)))
        for name in scratches:
            ratio = best[name, True] / best[name, False]
            print(
                f"{dtype:9s} {name:9s} {tiles * ROWS * COLUMNS:,} elements: {wrong[name, True]} wrong with the check, {wrong[name, False]:,} without;"
                f" {best[name, True] * 1e9 / (ROWS * COLUMNS):.2f} against {best[name, False] * 1e9 / (ROWS * COLUMNS):.2f} ns an element ({ratio:.2f}x)",
                flush=True,
            )


if __name__ == "__main__":
    main()
