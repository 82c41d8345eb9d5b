"""Combine ten SDXL LoRAs of rank 16 into one, against reading them all and writing as many bytes as come out.

    python benchmarks/combine.py SCRATCH [--rounds 5]

Exact concatenation, first with every multiplier 1 (each bit stays: fp16 in, fp16 out), then with ten multipliers (float32 out, one rounding
each). The floor reads the ten files with `cat` and writes their bytes, or twice as many where the result is float32, then syncs; upparam
also interleaves the factors, re-opens what it wrote and proves it. `--method ties` and `svd` show what the arithmetic costs on top.
"""

from __future__ import annotations

import shutil

from merge import UPPARAM, Run, asked, generate, remove, timed

COUNT, RANK = 10, 16


def main() -> None:
    args = asked(__doc__)
    files = [
        generate(f"sdxl_lora(path, rank={RANK}, seed={number})", args.scratch / f"{number}.safetensors", "workbench_inputs")
        for number in range(COUNT)
    ]
    out, names = args.scratch / "out.safetensors", " ".join(f"'{file}'" for file in files)
    print(f"## {COUNT} LoRAs of rank {RANK}, {sum(file.stat().st_size for file in files) / 1e6:.0f} MB in all")
    plain, weighted = [str(file) for file in files], [f"{file}@{0.1 * (number + 1):.1f}" for number, file in enumerate(files)]
    for title, items, more, times in (
        ("multipliers of 1", plain, [], 1), ("ten multipliers", weighted, [], 2), ("ties", plain, ["--method", "ties", "--density", "0.5"], 1),
        ("svd to 16", weighted, ["--method", "svd"], 1),
    ):  # fmt: skip
        best: dict[str, Run] = {}
        copies = " ".join([names] * times)
        for _ in range(args.rounds):
            for name, command in (
                ("floor", ["sh", "-c", f"cat {names} > /dev/null && cat {copies} > '{out}' && sync '{out}'"]),
                ("upparam", [UPPARAM, "combine", *items, *more, "-o", str(out), "--quiet"]),
            ):
                remove(out)
                run = timed(command)
                if name not in best or run.wall < best[name].wall:
                    best[name] = run
        ratio = best["upparam"].wall / best["floor"].wall
        size = out.stat().st_size / 1e6
        print(
            f"{title:18s} floor {best['floor'].wall:.2f} s   upparam {best['upparam']}   {size:.0f} MB out, {ratio:.2f}x the floor",
            flush=True,
        )
        remove(out)
    if args.clean:
        shutil.rmtree(args.scratch)


if __name__ == "__main__":
    main()
