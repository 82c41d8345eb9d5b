"""Start-up: what a command costs before it does anything worth measuring. Cold processes on small files, beside the interpreter itself.

    python benchmarks/startup.py [--rounds 20] [--adapter FILE] [--peer COMMAND ...]

`identify` of a PEFT adapter, of one in kohya's form and of one in diffusers', and `convert` and `merge` of an adapter of eight modules into a base of
the same: their fixed cost, since 30 kB are read and written. A peer is a command line to which the PEFT adapter's path is added (for example
`--peer "sft info"`). Rounds are interleaved; the table shows the median and the best of each, and the ratio to `python -S -c pass` within each round.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from merge_inputs import kohya
from safetensors.numpy import save_file

import upparam
from upparam.operations.convert import convert

UPPARAM = Path(sys.executable).with_name("upparam")


def adapter(folder: Path, layers: int = 32, width: int = 4096, rank: int = 8) -> Path:
    """A PEFT adapter of layers x 4 projections in float16, as one downloads; returns its file."""
    random = np.random.default_rng(0)
    factors = {}
    for layer in range(layers):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            stem = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            out = width // 4 if name in ("k_proj", "v_proj") else width
            factors[f"{stem}.lora_A.weight"] = random.standard_normal((rank, width)).astype(np.float16)
            factors[f"{stem}.lora_B.weight"] = random.standard_normal((out, rank)).astype(np.float16)
    folder.mkdir()
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder / "adapter_model.safetensors"


def base(folder: Path, layers: int = 2, width: int = 64) -> Path:
    """A Llama of two layers that the small adapter fits."""
    random = np.random.default_rng(1)
    tensors = {"model.embed_tokens.weight": random.standard_normal((128, width)).astype(np.float16)}
    for layer in range(layers):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            out = width // 4 if name in ("k_proj", "v_proj") else width
            tensors[f"model.layers.{layer}.self_attn.{name}.weight"] = random.standard_normal((out, width)).astype(np.float16)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    return folder


def seconds(command: list[str], out: Path) -> float:
    shutil.rmtree(out, ignore_errors=True)
    begun = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--peer", action="append", default=[])
    args = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    compileall.compile_dir(str(Path(upparam.__file__).parent), quiet=1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = args.adapter or adapter(folder / "peft")
        small, llama, out = adapter(folder / "small", 2, 64, 4).parent, base(folder / "base"), folder / "out"
        web = kohya(folder / "kohya.safetensors", 4)
        convert(web, folder / "diffusers.safetensors", "diffusers")
        commands = {
            "python -S -c pass": [sys.executable, "-S", "-c", "pass"],
            "python -c 'import numpy'": [sys.executable, "-c", "import numpy"],
            "upparam --help": [str(UPPARAM), "--help"],
            "identify (PEFT)": [str(UPPARAM), "identify", str(path)],
            "identify (kohya)": [str(UPPARAM), "identify", str(web)],
            "identify (diffusers)": [str(UPPARAM), "identify", str(folder / "diffusers.safetensors")],
            "convert, 8 modules": [str(UPPARAM), "convert", str(small), "--to", "mlx", "-o", str(out), "-q"],
            "merge, 8 modules": [str(UPPARAM), "merge", str(llama), str(small), "-o", str(out), "-q"],
            **{peer: [*shlex.split(peer), str(path)] for peer in args.peer},
        }
        for command in commands.values():
            seconds(command, out)
        times: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(args.rounds):
            for name, command in commands.items():
                times[name].append(seconds(command, out))
    floor = times["python -S -c pass"]
    print(f"{'command':32} {'median':>8} {'best':>8} {'x floor':>8}")
    for name, taken in times.items():
        ratio = statistics.median(mine / its for mine, its in zip(taken, floor, strict=True))
        print(f"{name:32} {statistics.median(taken):7.3f}s {min(taken):7.3f}s {ratio:8.1f}")


if __name__ == "__main__":
    main()
