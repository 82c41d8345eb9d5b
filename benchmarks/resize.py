"""Resize of an SDXL-sized LoRA from rank 64 to 32, against `cp`, sd-scripts' resize_lora.py and sft-cli, every contender once a round.

    python benchmarks/resize.py SCRATCH [--rounds 5] [--sd-scripts CHECKOUT] [--sft SFT]

sft (of the package sft-cli) reads PEFT's names alone, so it gets the same factors under those, and so does upparam beside it.

The peer materialises and decomposes every dW, minutes of work for the whole file, so it gets every twelfth module (one round), upparam the same file
beside it, and the whole is extrapolated by the share of modules. Its routine `resize_lora_model` is run as it is in the checkout, with stand-ins
for the two helper modules it imports and does not need here; without a checkout the same calls to torch are made. Errors are measured against numpy's SVD in float64.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from merge import UPPARAM, Run, generate, remove, timed

from upparam.operations.opening import open_adapter

PEER = """
import sys, types, importlib.util, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
checkout, source, out = sys.argv[1:4]
tensors = load_file(source)
if checkout:
    for name in ("library", "library.train_util", "library.model_util", "library.utils"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["library"].train_util = sys.modules["library.train_util"]
    sys.modules["library"].model_util = sys.modules["library.model_util"]
    sys.modules["library.utils"].setup_logging = lambda *a, **k: None
    spec = importlib.util.spec_from_file_location("resize_lora", Path(checkout) / "networks" / "resize_lora.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    floats = {name: tensor.to(torch.float) for name, tensor in tensors.items()}
    result = module.resize_lora_model(floats, 32, 32, torch.float16, None, None, None, False)[0]
else:
    result = {}
    for name in [name for name in tensors if name.endswith(".lora_down.weight")]:
        stem = name.removesuffix(".lora_down.weight")
        u, s, vh = torch.linalg.svd(tensors[stem + ".lora_up.weight"].float() @ tensors[name].float())
        result[name], result[stem + ".lora_up.weight"] = vh[:32].half().contiguous(), (u[:, :32] @ torch.diag(s[:32])).half().contiguous()
        result[stem + ".alpha"] = torch.tensor(float(tensors[stem + ".alpha"]) / 64 * 32).half()
save_file(result, out)
"""


def rounds(count: int, contenders: dict[str, Callable[[Path], Run]], out: Path) -> dict[str, Run]:
    """The best run of each contender."""
    best: dict[str, Run] = {}
    for _ in range(count):
        for name, run in contenders.items():
            result = run(out)
            remove(out)
            if name not in best or result.wall < best[name].wall:
                best[name] = result
    return best


def errors(source: Path, result: Path, count: int = 8) -> list[float]:
    """Error of the first `count` modules over the optimum, both in float64 from the files: 1 is a perfect truncation."""
    before, after = open_adapter(source), open_adapter(result)
    found = []
    for target, delta in list(before.deltas.items())[:count]:
        up, down = delta.load().low_rank()  # type: ignore[misc]
        new_up, new_down = after.deltas[target].load().low_rank()  # type: ignore[misc]
        whole = up @ down
        optimum = np.linalg.norm(np.linalg.svd(whole, compute_uv=False)[32:])
        found.append(float(np.linalg.norm(whole - new_up @ new_down) / optimum))
    return found


def against_sft(command: Path, source: Path, count: int, scratch: Path) -> None:
    """The same PEFT file resized by sft and by upparam, once a round each."""
    contenders: dict[str, Callable[[Path], Run]] = {
        "upparam": lambda out: timed([UPPARAM, "resize", str(source), "--rank", "32", "-o", str(out), "-q"]),
        "sft": lambda out: timed(
            [str(command), "lora", "resize", str(source), "--rank", "32", "-o", str(out / "adapter_model.safetensors")]
        ),
    }

    def into(name: str) -> Callable[[Path], Run]:
        def run(_: Path) -> Run:
            folder = scratch / f"resized-{name}"
            remove(folder)
            if name == "sft":
                folder.mkdir()
                shutil.copy(source.parent / "adapter_config.json", folder)
            return contenders[name](folder)

        return run

    print("## the same under PEFT's names, against sft lora resize")
    best = rounds(count, {name: into(name) for name in contenders}, scratch / "nothing")
    for name, run in best.items():
        found = errors(source, scratch / f"resized-{name}" / "adapter_model.safetensors")
        print(f"{name:12s} {run}   error over the optimum: worst {max(found):.6f}, best {min(found):.6f}")
        remove(scratch / f"resized-{name}")
    print(f"sft takes {best['sft'].wall / best['upparam'].wall:.1f}x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sd-scripts", type=Path, help="a checkout of kohya-ss/sd-scripts")
    parser.add_argument("--sft", type=Path, help="the command of sft-cli, in whatever environment it is installed")
    parser.add_argument("--no-peer", dest="peer", action="store_false")
    parser.add_argument("--clean", action="store_true", help="remove the inputs afterwards")
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    out = args.scratch / "resized.safetensors"

    def ours(source: Path) -> Callable[[Path], Run]:
        return lambda out: timed([UPPARAM, "resize", str(source), "--rank", "32", "-o", str(out), "-q"])

    whole = generate("sdxl_lora(path)", args.scratch / "sdxl-64.safetensors", "workbench_inputs")
    size = whole.stat().st_size / 1e6
    print(f"## {size:.0f} MB, 700 modules, rank 64 to 32")
    best = rounds(args.rounds, {"cp": lambda out: timed(["cp", str(whole), str(out)]), "upparam": ours(whole)}, out)
    for name, run in best.items():
        print(f"{name:12s} {run}")
    if args.sft is not None:
        peft = args.scratch / "sdxl-64-peft"
        if not peft.is_dir():
            subprocess.run([UPPARAM, "convert", whole, "--to", "peft", "-o", peft, "-q"], check=True)
        against_sft(args.sft, peft / "adapter_model.safetensors", args.rounds, args.scratch)
    if args.peer:
        part = generate("sdxl_lora(path, every=12)", args.scratch / "sdxl-64-part.safetensors", "workbench_inputs")
        checkout = "" if args.sd_scripts is None else str(args.sd_scripts)
        mine = rounds(args.rounds, {"upparam": ours(part)}, out)["upparam"]
        kept = args.scratch / "ours.safetensors"
        remove(kept)
        ours(part)(kept)
        peer = timed([sys.executable, "-c", PEER, checkout, str(part), str(out)])
        modules = len(open_adapter(part).deltas)
        title = "sd-scripts' routine" if checkout else "torch.linalg.svd as sd-scripts calls it"
        print(f"## {modules} of the modules, {title}")
        print(f"{'upparam':12s} {mine}\n{'peer':12s} {peer}   {peer.wall / mine.wall:.0f}x")
        print(
            f"whole file, extrapolated by modules: {peer.wall * 700 / modules:.0f} s, {peer.wall * 700 / modules / best['upparam'].wall:.0f}x"
        )
        for name, path in (("upparam", kept), ("peer", out)):
            worst = errors(part, path)
            print(f"{name:12s} error over the optimum: worst {max(worst):.6f}, best {min(worst):.6f}")
        remove(out)
        remove(kept)
    if args.clean:
        shutil.rmtree(args.scratch)


if __name__ == "__main__":
    main()
