"""Inputs of the merge benchmark, made from a seed: nothing is downloaded. Weights are Gaussian noise of a realistic size."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

HIDDEN, MIDDLE, HEADS_KV, VOCABULARY = 2048, 5632, 512, 32000
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HEADS_KV, HIDDEN), "self_attn.v_proj": (HEADS_KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (MIDDLE, HIDDEN), "mlp.up_proj": (MIDDLE, HIDDEN), "mlp.down_proj": (HIDDEN, MIDDLE),
}  # fmt: skip
CODES = {
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(np.float16): "F16",
    np.dtype(np.float32): "F32",
    np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
}


class Noise:
    """A pool of Gaussian values in one dtype from which tensors are cut at pseudo-random places: fast, and no two tensors alike."""

    def __init__(self, dtype: object, scale: float, seed: int) -> None:
        self.dtype = np.dtype(dtype)
        self._random = np.random.default_rng(seed)
        pool = self._random.standard_normal(1 << 23, np.float32) * scale
        self._pool = pool.astype(self.dtype)

    def pieces(self, count: int) -> Iterator[bytes]:
        while count:
            start = int(self._random.integers(0, 1 << 22))
            part = self._pool[start : start + min(count, 1 << 22)]
            yield part.tobytes()
            count -= len(part)


def write(path: Path, shapes: dict[str, tuple[int, ...]], noise: Noise, scalars: dict[str, float] | None = None) -> None:
    scalars = scalars or {}
    header, at, size = {"__metadata__": {"format": "pt"}}, 0, noise.dtype.itemsize
    for name, shape in {**shapes, **dict.fromkeys(scalars, ())}.items():
        stop = at + int(np.prod(shape, dtype=np.int64)) * size
        header[name] = {"dtype": CODES[noise.dtype], "shape": list(shape), "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for shape in shapes.values():
            for piece in noise.pieces(int(np.prod(shape, dtype=np.int64))):
                stream.write(piece)
        for value in scalars.values():
            stream.write(np.array(value, noise.dtype).tobytes())


def llama(folder: Path, layers: int = 24, shards: int = 3, dtype: object = ml_dtypes.bfloat16) -> Path:
    """A Llama-like checkpoint of `shards` files with index and config: 2.43 GB in bf16 at 24 layers."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        for name, shape in LINEARS.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{name}.weight"] = (HIDDEN,)
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    names = list(shapes)
    noise, weight_map = Noise(dtype, 0.02, 1), {}
    for shard in range(shards):
        part = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        write(folder / file, {name: shapes[name] for name in part}, noise)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": MIDDLE, "num_hidden_layers": layers,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": VOCABULARY, "rms_norm_eps": 1e-5,
        "torch_dtype": "bfloat16", "tie_word_embeddings": False, "max_position_embeddings": 2048,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def peft(
    folder: Path, layers: int = 24, rank: int = 16, modules: tuple[str, ...] = tuple(LINEARS), seed: int = 2, dora: bool = False
) -> Path:
    """A PEFT LoRA in float32 on `modules` of every layer, or a DoRA (whose magnitudes are noise)."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {}
    for layer in range(layers):
        for name in modules:
            out, inn = LINEARS[name]
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            shapes |= {f"{prefix}.lora_A.weight": (rank, inn), f"{prefix}.lora_B.weight": (out, rank)}
            if dora:
                shapes[f"{prefix}.lora_magnitude_vector"] = (out,)
    write(folder / "adapter_model.safetensors", shapes, Noise(np.float32, 0.02, seed))
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
        "target_modules": sorted({name.rpartition(".")[2] for name in modules}), "base_model_name_or_path": "base", "inference_mode": True, "use_dora": dora,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def sd15_base() -> object:
    """The inventory whose modules the synthetic checkpoint has."""
    from upparam.bases import inventory

    return inventory.load("sd1.5")


def sd15(path: Path) -> Path:
    """A checkpoint with the tensor names and shapes of Stable Diffusion 1.5 in LDM layout (UNet, text encoder; VAE as padding), fp16."""
    from upparam.bases.layouts import layout

    base = sd15_base()
    names = layout(base, "ldm")  # type: ignore[arg-type]
    shapes: dict[str, tuple[int, ...]] = {}
    for foreign, parts in names.foreign.items():
        shape = parts[0].shape
        shapes[names.tensor_name(foreign)] = shape
        if len(shape) > 1 and not foreign.endswith("embedding"):
            shapes[names.tensor_name(foreign, "bias")] = shape[:1]
    shapes["first_stage_model.decoder.padding"] = (83_653_863,)
    write(path, shapes, Noise(np.float16, 0.03, 3))
    return path


def kohya(path: Path, rank: int = 32) -> Path:
    """A kohya LoRA in fp16 on the attention and feed-forward linears of the UNet and of the text encoder: 264 modules."""
    from upparam.bases.layouts import layout

    base = sd15_base()
    names = layout(base, "kohya")  # type: ignore[arg-type]
    shapes: dict[str, tuple[int, ...]] = {}
    alphas: dict[str, float] = {}
    for module, place in names.places.items():
        shape = place.part.shape
        unet = module.startswith("unet.") and (".attentions." in module) and len(shape) in (2, 4) and "norm" not in module
        text = module.startswith("text_encoder.") and (".self_attn." in module or ".mlp." in module)
        if unet or text:
            kernel = (1,) * (len(shape) - 2)
            shapes[f"{place.foreign}.lora_down.weight"] = (rank, shape[1], *kernel)
            shapes[f"{place.foreign}.lora_up.weight"] = (shape[0], rank, *kernel)
            alphas[f"{place.foreign}.alpha"] = rank / 2
    write(path, shapes, Noise(np.float16, 0.02, 4), alphas)
    return path
