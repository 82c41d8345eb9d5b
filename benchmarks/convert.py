"""Convert half a gigabyte of factors against `cp`, every contender once a round, ratios taken within a round.

    python benchmarks/convert.py SCRATCH [--rounds 5]

Inputs are made from a seed (1 GB in SCRATCH; removed with --clean). upparam reads, writes, re-opens what it wrote, compares every factor with the
source, waits for the disk and renames; "cp, then sync" waits for the disk as well, `cp` and `--no-sync` do not. Wall time is from the start of the
process to its exit, interpreter and imports included; CPU is user and system time, which other work on the machine sways less.
"""

from __future__ import annotations

import compileall
import shutil
from pathlib import Path

from merge import UPPARAM, Run, asked, generate, remove, timed

import upparam

CASES = {"kohya SDXL, r=96": ("sdxl", ("peft", "diffusers", "comfyui")), "PEFT Llama 3 8B, r=96": ("llama", ("mlx", "gguf-lora", "kohya"))}


def main() -> None:
    args = asked(__doc__)
    compileall.compile_dir(str(Path(upparam.__file__).parent), quiet=1)
    inputs = {
        "sdxl": generate("sdxl_lora(path, rank=96)", args.scratch / "sdxl.safetensors", "workbench_inputs"),
        "llama": generate("llama_peft(path)", args.scratch / "llama", "workbench_inputs"),
    }
    for title, (name, dialects) in CASES.items():
        source, out = inputs[name], args.scratch / "out"
        size = sum(file.stat().st_size for file in ([source] if source.is_file() else source.iterdir()))
        print(f"## {title}, {size / 1e6:.0f} MB")
        contenders = {
            "cp": ["cp", "-r", str(source), str(out)],
            "cp, then sync": ["sh", "-c", f"cp -r '{source}' '{out}' && find '{out}' -type f -exec sync {{}} +"],
        }
        for dialect in dialects:
            command = [UPPARAM, "convert", str(source), "--to", dialect, "-o", str(out), "-q"]
            contenders |= {f"to {dialect}": command, f"to {dialect} --no-sync": [*command, "--no-sync"]}
        runs: dict[str, list[Run]] = {contender: [] for contender in contenders}
        for _ in range(args.rounds):
            for contender, command in contenders.items():
                remove(out)
                runs[contender].append(timed(command))
        remove(out)
        for contender, found in runs.items():
            floor = runs["cp" if contender.endswith(("cp", "--no-sync")) else "cp, then sync"]
            best = min(run.wall for run in found)
            ratios = sorted(run.wall / theirs.wall for run, theirs in zip(found, floor, strict=True))
            cpu = min(run.user + run.system for run in found)
            print(
                f"{contender:22s} {best:5.2f} s  CPU {cpu:4.2f} s  {max(run.peak for run in found):4.0f} MB  "
                f"{best / min(run.wall for run in floor):4.1f}x of the best, by round {' '.join(f'{ratio:.1f}' for ratio in ratios)}"
            )
    if args.clean:
        shutil.rmtree(args.scratch)


if __name__ == "__main__":
    main()
