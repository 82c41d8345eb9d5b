"""Extract against full SVDs: mergekit's routine on a Llama-like pair (2.43 GB bf16), sd-scripts' on an SD 1.5 pair (2.13 GB fp16).

    python benchmarks/extract.py SCRATCH [--rounds 3] [--cases llama,full,sd15]

The tuned models are the base plus a rank-16 delta (`llama`, `sd15`) or plus differences as full fine-tuning leaves them (`full`), rounded to the stored dtype.
A full SVD of every module takes minutes, so the peers get the modules of one layer or block, upparam the same beside them, and the whole is
extrapolated by elements, which favours the peer: wide matrices cost it more. The peers' routines, per module:
arcee-ai/mergekit mergekit/scripts/extract_lora.py: subtract in the stored dtype, torch.linalg.svd(full_matrices=False) in float32, factors cast to the model's dtype;
kohya-ss/sd-scripts networks/extract_lora_from_models.py: subtract in the stored dtype, torch.linalg.svd in float32, U and Vh clamped at the 0.99 quantile of their values.
Errors are measured in float64 from the files, against the optimum from numpy's SVD in float64.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from fnmatch import fnmatchcase
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from merge import UPPARAM, Run, generate, remove, timed

from upparam.checkpoint import Checkpoint
from upparam.containers import open_file
from upparam.operations.extract.pairing import locate
from upparam.operations.opening import open_adapter

PEER = """
import sys, json, torch
from safetensors import safe_open
from safetensors.torch import save_file
routine, rank, names, out = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4]
result = {}
for name, (tuned, base, key) in names.items():
    with safe_open(tuned, "pt") as one, safe_open(base, "pt") as other:
        stored = one.get_tensor(key) - other.get_tensor(key)
    matrix = stored.to(torch.float32).flatten(1)
    if routine == "mergekit":
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        half = torch.diag(torch.sqrt(s[:rank]))
        up, down = u[:, :rank] @ half, half @ vh[:rank]
    else:
        u, s, vh = torch.linalg.svd(matrix)
        up, down = u[:, :rank] @ torch.diag(s[:rank]), vh[:rank]
        highest = torch.quantile(torch.cat([up.flatten(), down.flatten()]), 0.99)
        up, down = up.clamp(-highest, highest), down.clamp(-highest, highest)
    result[name + ".up"], result[name + ".down"] = up.to(stored.dtype).contiguous(), down.to(stored.dtype).contiguous()
save_file(result, out)
"""


def part_of(tuned: Path, base: Path, only: str) -> dict[str, tuple[str, str, str]]:
    """Reference module -> (tuned file, base file, tensor), for the matrices that match and differ."""
    one, other = Checkpoint.open(tuned), Checkpoint.open(base)
    places = locate(one).places
    found = {}
    for (module, parameter), place in places.items():
        if parameter == "weight" and fnmatchcase(module, only):
            file, tensor = one.tensors[place.tensor]
            theirs, before = other.tensors[place.tensor]
            if len(tensor.shape) > 1 and tensor.raw() != before.raw():
                found[module] = (str(file.path), str(theirs.path), place.tensor)
    return found


def weight(where: tuple[str, str, str]) -> int:
    return open_file(where[0]).tensors[where[2]].numel


def errors(part: dict[str, tuple[str, str, str]], rank: int, factors: dict[str, tuple[np.ndarray, np.ndarray]]) -> list[float]:
    """Error over the optimum for each module of the part, in float64."""
    found = []
    for module, (tuned, base, key) in part.items():
        one, other = open_file(tuned).tensors[key].doubles(), open_file(base).tensors[key].doubles()
        gap = (one - other).reshape(one.shape[0], -1)
        up, down = factors[module]
        best = np.linalg.norm(np.linalg.svd(gap, compute_uv=False)[rank:])
        found.append(float(np.linalg.norm(gap - up @ down) / best))
    return found


def apart(function: Callable[..., Any], *given: Any) -> Any:
    """Run in a process of its own: the memory this one once held would count as that of every child it starts later."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *given).result()


def ours_errors(part: dict[str, tuple[str, str, str]], rank: int, out: Path) -> list[float]:
    return errors(part, rank, {target.module: delta.load().low_rank() for target, delta in open_adapter(out).deltas.items()})  # type: ignore[misc]


def peer_errors(part: dict[str, tuple[str, str, str]], rank: int, out: Path) -> list[float]:
    tensors = open_file(out).tensors
    return errors(part, rank, {module: (tensors[f"{module}.up"].doubles(), tensors[f"{module}.down"].doubles()) for module in part})


def case(title: str, tuned: Path, base: Path, rank: int, to: str, only: str, routine: str, args: argparse.Namespace) -> None:
    print(f"\n## {title}", flush=True)
    out = args.scratch / ("extracted.safetensors" if to == "kohya" else "extracted")

    def ours(*options: str) -> Run:
        remove(out)
        return timed([UPPARAM, "extract", str(tuned), str(base), "--to", to, "--rank", str(rank), "-o", str(out), "-q", *options])

    whole = min((ours() for _ in range(args.rounds)), key=lambda run: run.wall)
    print(f"{'upparam, whole':24s} {whole}", flush=True)
    if not args.peer:
        return
    part = apart(part_of, tuned, base, only)
    mine = min((ours("--only", only) for _ in range(args.rounds)), key=lambda run: run.wall)
    theirs = args.scratch / "peer.safetensors"
    names = {module: list(where) for module, where in part.items()}
    peer = timed([sys.executable, "-c", PEER, routine, str(rank), json.dumps(names), str(theirs)])
    print(f"{len(part)} modules ({only}), {routine}'s routine")
    for name, run, measure, path in (("upparam", mine, ours_errors, out), (routine, peer, peer_errors, theirs)):
        ratios = apart(measure, part, rank, path)
        print(f"{name:24s} {run}   error over the optimum: {min(ratios):.4f} to {max(ratios):.4f}", flush=True)
    modules = apart(part_of, tuned, base, "*")
    share = sum(weight(where) for where in modules.values()) / sum(weight(where) for where in part.values())
    print(
        f"{peer.wall / mine.wall:.0f}x here; the whole, extrapolated by elements: {peer.wall * share:.0f} s, {peer.wall * share / whole.wall:.0f}x"
    )
    remove(theirs)
    remove(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", default="llama,full,sd15")
    parser.add_argument("--no-peer", dest="peer", action="store_false")
    parser.add_argument("--clean", action="store_true", help="remove the inputs afterwards")
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    wanted = args.cases.split(",")
    inputs = "workbench_inputs"
    if {"llama", "full"} & set(wanted):
        llama = generate("llama(path)", args.scratch / "llama")
    if "llama" in wanted:
        tuned = generate("tuned_llama(path, path.parent / 'llama', 16)", args.scratch / "llama-r16", inputs)
        case("2.43 GB bf16, a rank-16 difference, r=16", tuned, llama, 16, "peft", "model.layers.0.*", "mergekit", args)
    if "full" in wanted:
        tuned = generate("tuned_llama(path, path.parent / 'llama', None)", args.scratch / "llama-full", inputs)
        case("2.43 GB bf16, a full-rank difference, r=64", tuned, llama, 64, "peft", "model.layers.0.*", "mergekit", args)
    if "sd15" in wanted:
        base = generate("sd15(path)", args.scratch / "sd15.safetensors")
        tuned = generate("sd15_tuned(path, path.parent / 'sd15.safetensors')", args.scratch / "sd15-tuned.safetensors", inputs)
        case("2.13 GB SD 1.5 fp16, a rank-16 difference, r=16", tuned, base, 16, "kohya", "unet.mid_block.*", "sd-scripts", args)
    if args.clean:
        shutil.rmtree(args.scratch)


if __name__ == "__main__":
    main()
