"""Adapters that between them use every feature a dialect may or may not hold, on real inventories, filled from a seed."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from math import prod
from typing import Any

import numpy as np

from upparam.adapter import Adapter, BaseHint, Extra, ExtraKind, Target
from upparam.algorithms.adalora import MARGIN, AdaLoRA
from upparam.algorithms.base import Delta, ScaleRule, Scaling
from upparam.algorithms.boft import BOFT, ButterflyOFT
from upparam.algorithms.dora import DoRA
from upparam.algorithms.full import Full, Norm
from upparam.algorithms.glora import GLoRA
from upparam.algorithms.ia3 import IA3
from upparam.algorithms.loha import LoHa
from upparam.algorithms.lokr import LoKr
from upparam.algorithms.lora import LoRA
from upparam.algorithms.oft import OFT, DiagOFT
from upparam.algorithms.sparse import SparseLoRA
from upparam.algorithms.vera import VeRA
from upparam.bases import inventory
from upparam.bases.base import Module
from upparam.tensors import Tensor

MODULES = {
    "sd1.5": (
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v", "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0",
        "unet.up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_q",
    ),
    "flux.1-dev": (
        "transformer.transformer_blocks.0.attn.to_q", "transformer.transformer_blocks.0.attn.to_k", "transformer.transformer_blocks.0.attn.to_v",
        "transformer.transformer_blocks.3.ff.net.0.proj", "transformer.single_transformer_blocks.1.attn.to_q",
        "transformer.single_transformer_blocks.1.attn.to_k", "transformer.single_transformer_blocks.1.attn.to_v",
        "transformer.single_transformer_blocks.1.proj_mlp",
    ),
    "llama-3-8b": (
        "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj", "model.layers.7.self_attn.o_proj",
    ),
    "gpt2": ("transformer.h.0.attn.c_attn", "transformer.h.0.mlp.c_fc", "transformer.h.5.attn.c_proj"),
    "sam-vit-b": (),
}  # fmt: skip
"""The targets of the specimens of each base; for SAM every qkv of the image encoder, q and v rows, as its trainers do."""
CONV = {"sd1.5": ("unet.down_blocks.0.resnets.0.conv1", "unet.down_blocks.0.attentions.0.proj_in")}
BIASED = {
    "sd1.5": ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0", "unet.down_blocks.0.resnets.0.conv1"),
    "flux.1-dev": MODULES["flux.1-dev"][:4],
}
TEXT = {
    "sd1.5": ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", "text_encoder.text_model.encoder.layers.3.mlp.fc1"),
    "flux.1-dev": ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj",),
}
NORM = {"sd1.5": "unet.down_blocks.0.attentions.0.norm"}
EMBEDDING = {"llama-3-8b": "model.embed_tokens", "gpt2": "transformer.wte"}
HEAD = {"llama-3-8b": "lm_head"}


def module(base: str, path: str) -> Module:
    found = inventory.load(base).by_path.get(path)
    assert found is not None, f"{path} is not a module of {base}"
    return found


def values(shape: tuple[int, ...], key: str) -> Tensor:
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    return Tensor.of((rng.standard_normal(shape) * 0.05).astype(np.float16))


def lora(
    base: str, path: str, rank: int = 4, scaling: Scaling | None = None, mid: bool = False, rows: tuple[int, int] | None = None
) -> LoRA:
    out, into, *kernel = module(base, path).canonical
    out = rows[1] - rows[0] if rows else out
    key, ones = f"{path}{rows}", [1] * len(kernel)
    down = (rank, into, *(ones if mid else kernel))
    core = values((rank, rank, *kernel), key + "mid") if mid else None
    return LoRA(values((out, rank, *ones), key + "up"), values(down, key + "down"), scaling or Scaling(alpha=float(rank)), core)


def targets(base: str) -> list[Target]:
    if base != "sam-vit-b":
        return [Target(path) for path in MODULES[base]]
    blocks = [found.path for found in inventory.load(base).modules if found.path.endswith(".attn.qkv")]
    return [Target(path, rows) for path in blocks for rows in ((0, 768), (1536, 2304))]


def adapter(base: str, deltas: dict[Target, Delta], extras: list[Extra] | None = None) -> Adapter:
    transposed = True if any(module(base, target.module).kind == "Conv1D" for target in deltas) else None
    hint = BaseHint(base, 1.0, ("a specimen",), True)
    return Adapter(deltas, "specimen", extras=extras or [], base=hint, layout="reference", transposed_base=transposed)


def plain(base: str) -> Adapter:
    return adapter(base, {target: lora(base, target.module, rows=target.rows) for target in targets(base)})


def every_attention(base: str) -> Adapter:
    """Every linear of every attention of the UNet, which dialects that number their modules need."""
    paths = [
        found.path for found in inventory.load(base).modules
        if found.path.startswith("unet.") and ".transformer_blocks." in found.path and found.path.endswith(("to_q", "to_k", "to_v", "to_out.0"))
    ]  # fmt: skip
    return adapter(base, {Target(path): lora(base, path, 1, Scaling(alpha=1.0)) for path in paths})


def fused(base: str) -> Adapter:
    """Image and text attention of two double blocks, q, k and v sharing their down factor: what trainers of the fused weights leave."""
    deltas: dict[Target, Delta] = {}
    for block in ("transformer.transformer_blocks.0", "transformer.transformer_blocks.18"):
        for names in (("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj"), ("to_out.0",), ("to_add_out",)):
            paths = [f"{block}.attn.{name}" for name in names]
            first = lora(base, paths[0])
            deltas |= {Target(path): replace(first, up=lora(base, path).up) for path in paths}
    return adapter(base, deltas)


def scaled(base: str) -> Adapter:
    scaling = Scaling(alpha=2.0)
    return adapter(base, {target: lora(base, target.module, scaling=scaling, rows=target.rows) for target in targets(base)})


def mixed(base: str) -> Adapter:
    """Ranks and alphas that differ from module to module."""
    return adapter(
        base,
        {
            target: lora(base, target.module, 2 + index % 3, Scaling(alpha=1.0 + index % 2), rows=target.rows)
            for index, target in enumerate(targets(base))
        },
    )


def rslora(base: str) -> Adapter:
    scaling = Scaling(ScaleRule.ALPHA_OVER_SQRT_RANK, 8.0)
    return adapter(base, {target: lora(base, target.module, scaling=scaling, rows=target.rows) for target in targets(base)})


def conv(base: str) -> Adapter:
    return adapter(base, {Target(path): lora(base, path) for path in CONV[base]})


def locon(base: str) -> Adapter:
    return adapter(base, {Target(CONV[base][0]): lora(base, CONV[base][0], mid=True)})


def text_encoder(base: str) -> Adapter:
    return adapter(base, plain(base).deltas | {Target(path): lora(base, path) for path in TEXT[base]})


def embedding(base: str) -> Adapter:
    path = EMBEDDING[base]
    rows, width = module(base, path).canonical
    delta = LoRA(values((rows, 4), path + "up"), values((4, width), path + "down"), Scaling(alpha=4.0), embedding=True)
    return adapter(base, {**plain(base).deltas, Target(path): delta})


def token(base: str) -> Adapter:
    extra = Extra(ExtraKind.TEXTUAL_INVERSION, "<s1>", values((1, 768), "token"))
    return adapter(base, every_attention(base).deltas, [extra])


def saved_head(base: str) -> Adapter:
    path = HEAD[base]
    out, into = 8, module(base, path).canonical[1]
    return adapter(base, plain(base).deltas, [Extra(ExtraKind.SAVED_MODULE, f"{path}.weight", values((out, into), path))])


def dora(base: str) -> Adapter:
    """Magnitudes of rows."""
    deltas: dict[Target, Delta] = {}
    for target in targets(base):
        plain = lora(base, target.module)
        deltas[target] = DoRA(plain.up, plain.down, values((plain.shape[0], 1), f"{target}magnitude"), plain.scaling)
    return adapter(base, deltas)


def loha(base: str) -> Adapter:
    deltas: dict[Target, Delta] = {}
    for target in targets(base):
        one, two = lora(base, target.module), lora(base, target.module, rows=(0, module(base, target.module).canonical[0]))
        deltas[target] = LoHa(one.up, one.down, two.up, two.down, scaling=one.scaling)
    return adapter(base, deltas)


def lokr(base: str) -> Adapter:
    deltas: dict[Target, Delta] = {}
    for target in targets(base):
        out, into = module(base, target.module).canonical
        w1, w2_a, w2_b = (values(shape, f"{target}{shape}") for shape in ((8, 8), (out // 8, 4), (4, into // 8)))
        deltas[target] = LoKr(w1=w1, w2_a=w2_a, w2_b=w2_b, scaling=Scaling(alpha=4.0))
    return adapter(base, deltas)


def sparse(base: str) -> Adapter:
    """LoRAs with the largest elements of what they leave out, as LyCORIS' script extracts them."""
    deltas: dict[Target, Delta] = {}
    for target in targets(base):
        plain, (out, into) = lora(base, target.module), module(base, target.module).canonical
        places = np.random.default_rng(out + into).choice(out * into, 50, replace=False)
        indices = np.stack(np.divmod(np.sort(places), into)).astype(np.int16)
        size = np.array([out, into], np.int16)
        deltas[target] = SparseLoRA(
            plain.up, plain.down, Tensor.of(indices), values((50,), f"{target}rest"), Tensor.of(size), plain.scaling
        )
    return adapter(base, deltas)


def glora(base: str) -> Adapter:
    deltas: dict[Target, Delta] = {}
    for target in targets(base):
        out, into = module(base, target.module).canonical
        shapes = {"a1": (into, 4), "a2": (4, into), "b1": (out, 4), "b2": (4, into)}
        deltas[target] = GLoRA(**{role: values(shape, f"{target}{role}") for role, shape in shapes.items()}, scaling=Scaling(alpha=2.0))
    return adapter(base, deltas)


def ia3(base: str) -> Adapter:
    """LyCORIS' form: what is added to 1, for outputs or inputs."""
    deltas: dict[Target, Delta] = {}
    for number, target in enumerate(targets(base)):
        size = module(base, target.module).canonical[number % 2]
        deltas[target] = IA3(values((size,), f"{target}ia3"), on_input=number % 2 == 1, from_one=True)
    return adapter(base, deltas)


def diag_oft(base: str) -> Adapter:
    """Turns of outputs, limited in size."""
    deltas: dict[Target, Delta] = {}
    for target in targets(base):
        out = module(base, target.module).canonical[0]
        blocks = values((out // 8, 8, 8), f"{target}blocks")
        deltas[target] = DiagOFT(blocks, constraint=0.0009765625, scaling=Scaling(ScaleRule.BAKED, 0.0009765625))
    return adapter(base, deltas)


def few_turns(base: str) -> Adapter:
    """Turns of outputs in as many blocks everywhere, as sd-scripts trains them."""
    deltas: dict[Target, Delta] = {}
    for target in targets(base):
        out = module(base, target.module).canonical[0]
        blocks = values((4, out // 4, out // 4), f"{target}blocks")
        deltas[target] = DiagOFT(blocks, constraint=0.0009765625, scaling=Scaling(ScaleRule.BAKED, 0.0009765625))
    return adapter(base, deltas)


def butterfly(base: str) -> Adapter:
    """Turns of outputs that lie far apart, and a factor for each row."""
    deltas: dict[Target, Delta] = {}
    for target in targets(base):
        out = module(base, target.module).canonical[0]
        blocks = values((2, 4, out // 4, out // 4), f"{target}blocks")
        deltas[target] = ButterflyOFT(blocks, values((out, 1), f"{target}rescale"), scaling=Scaling(ScaleRule.BAKED, 0.0))
    return adapter(base, deltas)


def adalora(base: str) -> Adapter:
    """Six singular values to begin with, of some modules fewer left, of one none."""
    deltas: dict[Target, Delta] = {}
    for number, target in enumerate(targets(base)):
        out, into = module(base, target.module).canonical[0], prod(module(base, target.module).canonical[1:])
        rank = (6, 4, 0)[number % 3]
        up, core, down = (values(shape, f"{target}{word}") for word, shape in (("B", (out, rank)), ("E", (rank, 1)), ("A", (rank, into))))
        deltas[target] = AdaLoRA(up, core, down, scaling=Scaling(alpha=3.0, divisor=6 + MARGIN))
    return adapter(base, deltas)


def peft_ia3(base: str) -> Adapter:
    """PEFT's form: the factor itself, for outputs with their biases, or inputs."""
    deltas: dict[Target, Delta] = {}
    for number, target in enumerate(targets(base)):
        size = module(base, target.module).canonical[number % 2]
        inputs = number % 2 == 1
        deltas[target] = IA3(values((1, size) if inputs else (size, 1), f"{target}ia3"), inputs, with_bias=not inputs)
    return adapter(base, deltas)


def vera(base: str) -> Adapter:
    sizes = {target: module(base, target.module).canonical for target in targets(base)}
    up = values((max(size[0] for size in sizes.values()), 4), "vera_B")
    down = values((4, max(size[1] for size in sizes.values())), "vera_A")
    deltas: dict[Target, Delta] = {
        target: VeRA(up.rows(0, size[0]), down, values(size[:1], f"{target}b"), values((4,), f"{target}d"), size[1])
        for target, size in sizes.items()
    }
    return adapter(base, deltas)


def oft(base: str) -> Adapter:
    """PEFT's turns of inputs, by its series."""
    deltas: dict[Target, Delta] = {
        target: OFT(values((module(base, target.module).canonical[1] // 8, 28), f"{target}R"), neumann=5) for target in targets(base)
    }
    return adapter(base, deltas)


def boft(base: str) -> Adapter:
    """PEFT's butterfly of inputs, two factors."""
    deltas: dict[Target, Delta] = {}
    for target in targets(base):
        out, into = module(base, target.module).canonical[:2]
        deltas[target] = BOFT(values((2, into // 8, 8, 8), f"{target}R"), values((out, 1), f"{target}s"))
    return adapter(base, deltas)


def full(base: str) -> Adapter:
    """Whole differences of weights and their biases."""
    deltas: dict[Target, Delta] = {}
    for path in CONV[base]:
        shape = module(base, path).canonical
        deltas[Target(path)] = Full(values(shape, f"{path}diff"))
        deltas[Target(path, parameter="bias")] = Full(values(shape[:1], f"{path}bias"))
    return adapter(base, deltas)


def up_biases(base: str) -> Adapter:
    """LoRAs whose up has a bias, scaled with the rest."""
    deltas: dict[Target, Delta] = {}
    for path in BIASED[base]:
        plain = lora(base, path, scaling=Scaling(alpha=2.0))
        deltas[Target(path)] = plain
        deltas[Target(path, parameter="bias")] = Full(values(plain.shape[:1], f"{path}bias"), Scaling(alpha=2.0, divisor=4.0))
    return adapter(base, deltas)


def norms(base: str) -> Adapter:
    path = NORM[base]
    size = module(base, path).canonical
    deltas: dict[Target, Delta] = {
        Target(path): Norm(values(size, path)),
        Target(path, parameter="bias"): Norm(values(size, f"{path}bias")),
    }
    return adapter(base, plain(base).deltas | deltas)


FEATURES: dict[str, tuple[Callable[[str], Adapter], tuple[str, ...]]] = {
    "plain": (plain, tuple(MODULES)),
    "every attention": (every_attention, ("sd1.5",)),
    "fused attention": (fused, ("flux.1-dev",)),
    "alpha": (scaled, tuple(MODULES)),
    "mixed ranks": (mixed, tuple(MODULES)),
    "rsLoRA": (rslora, ("llama-3-8b",)),
    "conv": (conv, tuple(CONV)),
    "conv with mid": (locon, tuple(CONV)),
    "DoRA": (dora, ("sd1.5", "llama-3-8b")),
    "LoHa": (loha, ("sd1.5", "llama-3-8b")),
    "LoKr": (lokr, ("sd1.5", "llama-3-8b")),
    "sparse remainder": (sparse, ("sd1.5",)),
    "GLoRA": (glora, ("sd1.5", "llama-3-8b")),
    "IA3": (ia3, ("sd1.5", "llama-3-8b")),
    "Diag-OFT": (diag_oft, ("sd1.5", "llama-3-8b")),
    "sd-scripts' OFT": (few_turns, ("sd1.5", "flux.1-dev")),
    "BOFT": (butterfly, ("sd1.5",)),
    "AdaLoRA": (adalora, ("sd1.5", "llama-3-8b")),
    "PEFT's IA3": (peft_ia3, ("sd1.5", "llama-3-8b")),
    "VeRA": (vera, ("sd1.5", "llama-3-8b")),
    "PEFT's OFT": (oft, ("sd1.5", "llama-3-8b")),
    "PEFT's BOFT": (boft, ("sd1.5", "llama-3-8b")),
    "full": (full, tuple(CONV)),
    "biases of up": (up_biases, tuple(BIASED)),
    "norm": (norms, tuple(NORM)),
    "text encoder": (text_encoder, tuple(TEXT)),
    "embedding": (embedding, tuple(EMBEDDING)),
    "token": (token, ("sd1.5",)),
    "saved module": (saved_head, tuple(HEAD)),
}
"""Feature -> what builds it, and the bases it is shown on."""


@cache
def specimen(feature: str, base: str) -> Any:
    return FEATURES[feature][0](base)
