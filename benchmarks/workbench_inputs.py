"""Inputs of the resize and extract benchmarks, made from a seed: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from upparam.bases import inventory
from upparam.bases.layouts import layout
from upparam.containers.safetensors import write
from upparam.tensors import Tensor


def sdxl_lora(path: Path, rank: int = 64, every: int = 1) -> Path:
    """A kohya LoRA over every linear layer of SDXL's transformer blocks: 700 modules, 335 MB in fp16 at rank 64; `every` n-th module only.

    Singular values fall as those of trained adapters do, by a factor of about 30 over the rank.
    """
    base = inventory.load("sdxl")
    names = layout(base, "kohya")
    random = np.random.default_rng(0)
    fall = np.logspace(0, -1.5, rank, dtype=np.float32)
    tensors: dict[str, Tensor] = {}
    modules = [module for module in base.modules if ".transformer_blocks." in module.path and module.kind == "Linear"]
    for module in modules[::every]:
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
