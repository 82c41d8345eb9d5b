"""Fuzz targets one floor up: names, shapes, metadata and side files that are well-formed and mean nothing. They go through real files."""

from __future__ import annotations

import atexit
import contextlib
import json
import shutil
import tempfile
from math import prod
from pathlib import Path
from typing import Any

from tests.hostile.asm import sft

from upparam.errors import UpparamError
from upparam.operations.identify import identify
from upparam.operations.inspect import inspect_file
from upparam.operations.opening import open_adapter

_LARGEST = 4096
"""Elements of one tensor, so that an execution stays short."""


def _folder() -> Path:
    memory = Path("/dev/shm")
    folder = tempfile.mkdtemp(prefix="upparam-fuzz-", dir=memory if memory.is_dir() else None)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


FOLDER = _folder()


def _tensors(shapes: dict[str, Any], metadata: dict[str, Any]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {str(key): str(value) for key, value in metadata.items()}} if metadata else {}
    at = 0
    for name, shape in shapes.items():
        sizes = [size if type(size) is int and 0 <= size <= _LARGEST else 1 for size in (shape if isinstance(shape, list) else [])][:8]
        if prod(sizes) > _LARGEST:
            sizes = sizes[:1]
        entries[name] = {"dtype": "F32", "shape": sizes, "data_offsets": [at, at + 4 * prod(sizes)]}
        at += 4 * prod(sizes)
    return sft(json.dumps(entries).encode(), bytes(at))


def _through(path: Path) -> None:
    """Identify, inspect and open; each may refuse, none may break."""
    json.dumps(identify(path).facts())
    with contextlib.suppress(UpparamError):
        json.dumps(inspect_file(path).facts())
    with contextlib.suppress(UpparamError):
        open_adapter(path)


def names_and_shapes(data: bytes) -> None:
    """The input is JSON: names to shapes under "t", metadata under "m"; the file made of it is sound."""
    try:
        found = json.loads(data)
        shapes, metadata = found["t"], found.get("m", {})
        names = "".join([*shapes, *map(str, metadata), *map(str, metadata.values())])
        names.encode()
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return
    path = FOLDER / "names.safetensors"
    path.write_bytes(_tensors(shapes, metadata))
    _through(path)


def config_beside(data: bytes) -> None:
    """The input is the adapter_config.json beside a sound PEFT adapter."""
    folder = FOLDER / "peft"
    if not folder.exists():
        folder.mkdir()
        modules = [f"base_model.model.model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "qv"]
        shapes = {f"{module}.lora_{part}.weight": shape for module in modules for part, shape in (("A", [2, 8]), ("B", [8, 2]))}
        (folder / "adapter_model.safetensors").write_bytes(_tensors(shapes, {"format": "pt"}))
    (folder / "adapter_config.json").write_bytes(data)
    _through(folder)


def _json(**value: Any) -> bytes:
    return json.dumps(value).encode()


CONFIGS = [
    _json(peft_type="LORA", r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], base_model_name_or_path="x", task_type="CAUSAL_LM", bias="none"),
    _json(peft_type="LORA", r=2, lora_alpha=4, target_modules="model.*q_proj", rank_pattern={"q_proj": 2}, alpha_pattern={"^model.*": 8}, use_rslora=True,
          modules_to_save=["lm_head"], layers_to_transform=[0, 1], layers_pattern="layers", use_dora=False, fan_in_fan_out=False),
    _json(peft_type="LOHA", r=2, alpha=4, target_modules=["q_proj"], module_dropout=0.0, use_effective_conv2d=False),
    _json(peft_type="IA3", target_modules=["k_proj"], feedforward_modules=["down_proj"]), _json(peft_type="ADALORA", r=8, init_r=12, target_r=8, rank_pattern={}),
]  # fmt: skip

_UNET, _TE = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
NAMES = [
    _json(t={f"{_UNET}.lora_up.weight": [320, 4], f"{_UNET}.lora_down.weight": [4, 320], f"{_UNET}.alpha": []},
          m={"ss_network_dim": "4", "ss_network_alpha": "2", "ss_network_args": '{"conv_dim": "4", "rank_dropout": null}', "ss_base_model_version": "sd_v1"}),
    _json(t={f"{_TE}.hada_w1_a": [8, 2], f"{_TE}.hada_w1_b": [2, 8], f"{_TE}.hada_w2_a": [8, 2], f"{_TE}.hada_w2_b": [2, 8], f"{_TE}.alpha": []}),
    _json(t={f"{_TE}.lokr_w1": [4, 4], f"{_TE}.lokr_w2_a": [2, 2], f"{_TE}.lokr_w2_b": [2, 2], f"{_TE}.alpha": []}),
    _json(t={"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight": [4, 8], "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.weight": [8, 4]},
          m={"lora_adapter_metadata": '{"unet.r": 4, "unet.lora_alpha": 4, "unet.target_modules": ["to_q"]}'}),
    _json(t={"base_model.model.h.0.attn.c_attn.lora_A.weight": [2, 8], "base_model.model.h.0.attn.c_attn.lora_B.weight": [24, 2], "base_model.model.h.0.attn.c_attn.lora_magnitude_vector": [24]}),
    _json(t={"unet:0:up": [8, 4], "unet:0:down": [4, 8], "unet:1:up": [8, 4], "unet:1:down": [4, 8]}, m={"unet": '["CrossAttention", "Attention"]', "unet:0:rank": "4", "unet:1:rank": "4"}),
    _json(t={f"w_a_{n:03}": [4, 8] for n in range(2)} | {f"w_b_{n:03}": [8, 4] for n in range(2)}),
    _json(t={"model.layers.0.self_attn.q_proj.lora_a": [8, 2], "model.layers.0.self_attn.q_proj.lora_b": [2, 8]}),
    _json(t={"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": [4, 8], "transformer.single_transformer_blocks.0.attn.to_q.lora_B.weight": [8, 4]}),
    _json(t={"double_blocks.0.processor.qkv_lora1.down.weight": [4, 8], "double_blocks.0.processor.qkv_lora1.up.weight": [24, 4]}),
    _json(t={"diffusion_model.blocks.0.self_attn.q.diff": [8, 8], "diffusion_model.blocks.0.self_attn.q.diff_b": [8], "diffusion_model.blocks.0.norm.w_norm": [8]}),
    _json(t={"transformer_blocks.0.attn.to_q.oft_blocks": [2, 4, 4], "transformer_blocks.0.attn.to_q.alpha": []}),
    _json(t={"enc.layers.0.attn.lora_A": [2, 8], "enc.layers.0.attn.lora_B": [8, 2], "up": [8, 2], "down": [2, 8]}),
]  # fmt: skip
