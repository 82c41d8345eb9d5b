"""Start-up: `upparam --help` and `upparam identify` of a safetensors adapter, cold processes, beside the interpreter itself.

    python benchmarks/startup.py [--rounds 20] [--adapter FILE] [--peer COMMAND ...]

A peer is a command line to which the adapter's path is added (for example `--peer "sft info"`). Rounds are interleaved; the table shows
the median and the best of each, and the ratio to `python -S -c pass` taken within each round.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

UPPARAM = Path(sys.executable).with_name("upparam")


def adapter(path: Path) -> Path:
    """A PEFT adapter of 32 layers x 4 projections in float16, as one downloads."""
    random = np.random.default_rng(0)
    factors = {}
    for layer in range(32):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            stem = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            out = 1024 if name in ("k_proj", "v_proj") else 4096
            factors[f"{stem}.lora_A.weight"] = random.standard_normal((8, 4096)).astype(np.float16)
            factors[f"{stem}.lora_B.weight"] = random.standard_normal((out, 8)).astype(np.float16)
    save_file(factors, path)
    (path.parent / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}')
    return path


def seconds(command: list[str]) -> float:
    begun = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--peer", action="append", default=[])
    args = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    with tempfile.TemporaryDirectory() as folder:
        path = args.adapter or adapter(Path(folder) / "adapter_model.safetensors")
        commands = {
            "python -S -c pass": [sys.executable, "-S", "-c", "pass"],
            "python -c 'import numpy'": [sys.executable, "-c", "import numpy"],
            "upparam --help": [str(UPPARAM), "--help"],
            "upparam identify": [str(UPPARAM), "identify", str(path)],
            **{peer: [*shlex.split(peer), str(path)] for peer in args.peer},
        }
        for command in commands.values():
            seconds(command)
        times: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(args.rounds):
            for name, command in commands.items():
                times[name].append(seconds(command))
    floor = times["python -S -c pass"]
    print(f"{'command':32} {'median':>8} {'best':>8} {'x floor':>8}")
    for name, taken in times.items():
        ratio = statistics.median(mine / its for mine, its in zip(taken, floor, strict=True))
        print(f"{name:32} {statistics.median(taken):7.3f}s {min(taken):7.3f}s {ratio:8.1f}")


if __name__ == "__main__":
    main()
