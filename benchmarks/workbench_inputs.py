"""Inputs of the resize and extract benchmarks, made from a seed: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from upparam.bases import inventory
from upparam.bases.layouts import layout
from upparam.containers.safetensors import write
from upparam.tensors import Tensor


def sdxl_lora(path: Path, rank: int = 64, every: int = 1, seed: int = 0, most: int | None = None) -> Path:
    """A kohya LoRA over every linear layer of SDXL's transformer blocks: 700 modules, 335 MB in fp16 at rank 64; `every` n-th module only,
    and of those the first `most`.

    Singular values fall as those of trained adapters do, by a factor of about 30 over the rank.
    """
    base = inventory.load("sdxl")
    names = layout(base, "kohya")
    random = np.random.default_rng(seed)
    fall = np.logspace(0, -1.5, rank, dtype=np.float32)
    tensors: dict[str, Tensor] = {}
    modules = [module for module in base.modules if ".transformer_blocks." in module.path and module.kind == "Linear"]
    for module in modules[::every][:most]:
        place = names.to_foreign(module.path)
        assert place is not None
        rows, columns = module.shape
        up = random.standard_normal((rows, rank), np.float32) * fall / np.sqrt(rank)
        down = random.standard_normal((rank, columns), np.float32) / np.sqrt(columns)
        tensors[f"{place.foreign}.lora_up.weight"] = Tensor.of(up.astype(np.float16))
        tensors[f"{place.foreign}.lora_down.weight"] = Tensor.of(down.astype(np.float16))
        tensors[f"{place.foreign}.alpha"] = Tensor.of(np.array(rank / 2, np.float16))
    metadata = {"ss_network_dim": str(rank), "ss_network_alpha": str(rank / 2), "ss_network_module": "networks.lora",
                "ss_base_model_version": "sdxl_base_v1-0"}  # fmt: skip
    with path.open("wb") as stream:
        write(stream, tensors, metadata)
    return path


def tuned_llama(folder: Path, base: Path, rank: int | None, dtype: str = "bfloat16") -> Path:
    """The checkpoint at `base` after training: every linear layer of its blocks plus a delta of this rank, rounded to its dtype.

    `rank` None: as full fine-tuning leaves it, singular values falling with the square root of their number; made from a few dense draws.
    """
    import shutil

    from upparam.containers import open_file

    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(7)
    cache: dict[tuple[int, ...], np.ndarray] = {}
    for file in sorted(base.iterdir()):
        if file.suffix != ".safetensors":
            shutil.copyfile(file, folder / file.name)
            continue
        tensors = dict(open_file(file).tensors)
        for name, tensor in tensors.items():
            if name.endswith("proj.weight"):
                delta = _low(random, tensor.shape, rank) if rank else _full(random, tensor.shape, cache)
                tensors[name] = Tensor.computed(tensor.dtype, tensor.shape, _sum(tensor, delta))
        with (folder / file.name).open("wb") as stream:
            write(stream, tensors, {"format": "pt"})
    return folder


def _low(random: np.random.Generator, shape: tuple[int, ...], rank: int) -> tuple[np.ndarray, np.ndarray]:
    fall = np.logspace(0, -1, rank, dtype=np.float32)
    up = random.standard_normal((shape[0], rank), np.float32) * fall * 2e-3 / np.sqrt(rank, dtype=np.float32)
    return up, random.standard_normal((rank, shape[1]), np.float32)


def _full(random: np.random.Generator, shape: tuple[int, ...], cache: dict[tuple[int, ...], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Orthonormal columns with falling values, once for each shape; other modules get its columns in another order of signs."""
    count = min(shape) // 2
    if shape not in cache:
        cache[shape] = np.linalg.qr(random.standard_normal((shape[0], count), np.float32))[0]
    values = np.arange(1, count + 1, dtype=np.float32) ** -0.5 * 0.3
    return cache[shape] * values, random.standard_normal((count, shape[1]), np.float32) / np.sqrt(shape[1], dtype=np.float32)


def _sum(tensor: Tensor, delta: tuple[np.ndarray, np.ndarray]):  # type: ignore[no-untyped-def]
    return lambda: (tensor.read().astype(np.float32) + delta[0] @ delta[1]).astype(tensor.dtype.numpy)


def sd15_tuned(path: Path, base: Path, rank: int = 16) -> Path:
    """The SD 1.5 checkpoint at `base` with a LoRA of this rank merged into its attention and feed-forward layers."""
    import merge_inputs

    from upparam.operations.merge import merge

    adapter = merge_inputs.kohya(path.with_suffix(".lora"), rank)
    merge(base, adapter, path, sync=False)
    adapter.unlink()
    return path


def llama_peft(folder: Path, rank: int = 96, layers: int = 32) -> Path:
    """A PEFT adapter of every linear layer of Llama 3 8B in bfloat16: 503 MB at rank 96."""
    import json

    import ml_dtypes

    shapes = {
        "self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (1024, 4096), "self_attn.v_proj": (1024, 4096), "self_attn.o_proj": (4096, 4096),
        "mlp.gate_proj": (14336, 4096), "mlp.up_proj": (14336, 4096), "mlp.down_proj": (4096, 14336),
    }  # fmt: skip
    random = np.random.default_rng(0)
    tensors: dict[str, Tensor] = {}
    for layer in range(layers):
        for name, (rows, columns) in shapes.items():
            module = f"base_model.model.model.layers.{layer}.{name}"
            for word, shape in (("lora_A", (rank, columns)), ("lora_B", (rows, rank))):
                values = random.standard_normal(shape, np.float32) * 0.02
                tensors[f"{module}.{word}.weight"] = Tensor.of(values.astype(ml_dtypes.bfloat16))
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "target_modules": [name.split(".")[1] for name in shapes],
        "base_model_name_or_path": "meta-llama/Meta-Llama-3-8B", "bias": "none", "fan_in_fan_out": False, "lora_dropout": 0.0,
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    with (folder / "adapter_model.safetensors").open("wb") as stream:
        write(stream, tensors, {"format": "pt"})
    return folder
