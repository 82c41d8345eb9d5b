"""Compare two rank-128 LoRAs of 500 SDXL modules, against reading both files, every contender once a round.

    python benchmarks/compare.py SCRATCH [--rounds 5]

What two adapters are to each other decides how much has to be computed, so each case is timed: trained apart, the same dW through other
factors, that times a number, one resized, the same file twice. `cat` of both files is the floor. With --quiet no principal angles are computed. The dense route
forms both dW of every 25th module in float32 with numpy and takes their cosine, nothing else; it is extrapolated by the number of modules.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from merge import UPPARAM, Run, asked, generate, timed

from upparam.containers import open_file
from upparam.containers.safetensors import write
from upparam.operations.opening import open_adapter
from upparam.tensors import Tensor

MODULES = 500


def turned(path: Path, source: Path, times: float = 1.0) -> None:
    """The same dW, times a number, through other factors: up @ Q and Q^T @ down with a random rotation each, in float16."""
    random = np.random.default_rng(3)
    file = open_file(source)
    tensors = dict(file.tensors)
    for name in [name for name in tensors if name.endswith(".lora_up.weight")]:
        partner = name.replace("lora_up", "lora_down")
        up, down = tensors[name].read().astype(np.float32), tensors[partner].read().astype(np.float32)
        turn = np.linalg.qr(random.standard_normal((up.shape[1], up.shape[1])))[0].astype(np.float32)
        tensors[name], tensors[partner] = Tensor.of((up @ turn * times).astype(np.float16)), Tensor.of((turn.T @ down).astype(np.float16))
    with path.open("wb") as stream:
        write(stream, tensors, dict(file.metadata))


def dense(one: Path, other: Path, every: int = 25) -> tuple[float, int]:
    """Seconds and modules of the route that forms both dW: float32 products and their cosine."""
    first, second = open_adapter(one), open_adapter(other)
    targets = list(first.deltas)[::every]
    begun = time.perf_counter()
    for target in targets:
        weights = []
        for adapter in (first, second):
            factors = adapter.deltas[target].factors()
            weights.append((factors["up"].read().astype(np.float32) @ factors["down"].read().astype(np.float32)).reshape(-1))
        float(weights[0] @ weights[1] / np.linalg.norm(weights[0]) / np.linalg.norm(weights[1]))
    return time.perf_counter() - begun, len(targets)


def apart_from_this(function: Callable[..., Any], *given: Any) -> Any:
    """Run in a process of its own: the memory this one once held would count as that of every child it starts later."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *given).result()


def main() -> None:
    args = asked(__doc__)
    call = f"sdxl_lora(path, rank=128, most={MODULES}, seed="
    one = generate(f"{call}0)", args.scratch / "one.safetensors", "workbench_inputs")
    apart = generate(f"{call}1)", args.scratch / "apart.safetensors", "workbench_inputs")
    gauge, scaled = args.scratch / "gauge.safetensors", args.scratch / "scaled.safetensors"
    for path, times in ((gauge, 1.0), (scaled, 0.7)):
        if not path.exists():
            apart_from_this(turned, path, one, np.float32(times))
    resized = args.scratch / "resized.safetensors"
    if not resized.exists():
        subprocess.run([UPPARAM, "resize", str(one), "--rank", "64", "-o", str(resized), "-q"], check=True)
    print(f"## {MODULES} modules of rank 128, {one.stat().st_size / 1e6:.0f} MB each")
    for title, other in (
        ("trained apart", apart),
        ("other factors", gauge),
        ("... times 0.7", scaled),
        ("resized to 64", resized),
        ("the same file", one),
    ):
        best: dict[str, Run] = {}
        for _ in range(args.rounds):
            command = [UPPARAM, "compare", str(one), str(other), "--accept", "unrelated", "--accept", "equal", "--accept", "resized",
                       "--accept", "bit-equal", "--accept", "scaled"]  # fmt: skip
            for name, what in (
                ("cat", ["sh", "-c", f"cat '{one}' '{other}' > /dev/null"]), ("--quiet", [*command, "--quiet"]), ("with angles", command),
            ):  # fmt: skip
                run = timed(what)
                if name not in best or run.wall < best[name].wall:
                    best[name] = run
        print(f"{title:14s} cat {best['cat'].wall:.2f} s")
        for name in ("--quiet", "with angles"):
            print(f"    upparam, {name:12s} {best[name]}   {best[name].wall / best['cat'].wall:.1f}x the floor", flush=True)
    seconds, count = apart_from_this(dense, one, apart)
    print(f"dense dW in numpy, cosine alone: {seconds:.2f} s for {count} modules, {seconds * MODULES / count:.0f} s for all (extrapolated)")
    if args.clean:
        shutil.rmtree(args.scratch)


if __name__ == "__main__":
    main()
