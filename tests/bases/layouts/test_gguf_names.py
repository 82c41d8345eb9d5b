"""llama.cpp's names against the gguf library's own map, and its row orders against an independent statement of the converter's arithmetic."""

from __future__ import annotations

import re

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")

from upparam.bases import inventory  # noqa: E402
from upparam.bases.base import Base  # noqa: E402
from upparam.bases.layouts import available, layout  # noqa: E402

ARCHES = {
    "llama": "LLAMA", "mistral": "LLAMA", "qwen1.5": "QWEN2", "qwen2": "QWEN2", "qwen3": "QWEN3", "gemma-2-": "GEMMA2", "gemma-3": "GEMMA3",
    "gemma": "GEMMA", "phi-3": "PHI3", "phi-4": "PHI3", "phi": "PHI2", "gpt2": "GPT2", "falcon": "FALCON", "bloom": "BLOOM", "neox": "GPTNEOX",
}  # fmt: skip


def arch(name: str, family: str) -> int:
    # gemma-2-2b is Gemma 2; gemma-2b is Gemma 1.
    word = next((word for word in ARCHES if name.startswith(word)), family)
    found: int = getattr(gguf.MODEL_ARCH, ARCHES[word])
    return found


@pytest.mark.parametrize("name", [name for name in inventory.names() if "gguf" in available(inventory.load(name))])
def test_names_are_the_librarys(name: str) -> None:
    base = inventory.load(name)
    one = layout(base, "gguf")
    kind = arch(name, base.family)
    names = gguf.get_tensor_name_map(kind, 128)
    for module, place in one.places.items():
        public = module.replace("model.language_model.", "model.")
        # LlamaModel.modify_tensors stacks a mixture's experts under this name.
        public = re.sub(r"^model\.layers\.(\d+)\.block_sparse_moe\.experts\.\d+\.", r"layers.\1.feed_forward.experts.", public)
        # BLOOM's converter takes `transformer.` off first.
        spellings = {names.get_name(key + ".weight", try_suffixes=(".weight",)) for key in (public, public.removeprefix("transformer."))}
        assert place.foreign + ".weight" in spellings, module


@pytest.mark.parametrize(
    ("name", "module", "heads"),
    [
        ("llama-3-8b", "model.layers.3.self_attn.q_proj", 32),
        ("llama-3-8b", "model.layers.3.self_attn.k_proj", 8),
        ("mistral-7b", "model.layers.0.self_attn.k_proj", 8),
        ("tinyllama-1.1b", "model.layers.0.self_attn.q_proj", 32),
    ],
)
def test_rotary_halves_are_interleaved(name: str, module: str, heads: int) -> None:
    part = layout(inventory.load(name), "gguf").places[module].part
    rows = np.arange(part.shape[0])
    # convert_hf_to_gguf.py LlamaModel.permute
    expected = rows.reshape(heads, 2, part.shape[0] // heads // 2).swapaxes(1, 2).reshape(-1)
    assert (np.array(part.order.foreign_rows(part.shape[0])) == expected).all()


@pytest.mark.parametrize(
    ("name", "module", "groups", "per_group"),
    [
        ("falcon-40b", "transformer.h.0.self_attention.query_key_value", 8, 16),
        ("falcon-7b", "transformer.h.0.self_attention.query_key_value", 1, 71),
        ("bloom-560m", "transformer.h.0.self_attention.query_key_value", 16, 1),
        ("pythia-70m", "gpt_neox.layers.0.attention.query_key_value", 8, 1),
    ],
)
def test_fused_qkv_is_regrouped(name: str, module: str, groups: int, per_group: int) -> None:
    part = layout(inventory.load(name), "gguf").places[module].part
    qkv = np.arange(part.shape[0]).reshape(groups, per_group + 2, -1)
    # convert_hf_to_gguf.py FalconModel, BloomModel, GPTNeoXModel modify_tensors
    expected = np.concatenate([qkv[:, :-2].reshape(-1), qkv[:, [-2]].reshape(-1), qkv[:, [-1]].reshape(-1)])
    assert (np.array(part.order.foreign_rows(part.shape[0])) == expected).all()


@pytest.mark.parametrize("name", ["qwen3-0.6b", "gemma-2-2b", "phi-3-mini", "gpt2"])
def test_others_keep_their_rows(name: str) -> None:
    assert all(place.part.order.plain for place in layout(inventory.load(name), "gguf").places.values())


def test_the_groups_of_a_fused_qkv_follow_from_its_rows() -> None:
    """transformers saves num_kv_heads = num_attention_heads for a Falcon that has one key head for all."""
    known = inventory.load("falcon-7b")
    config = {"model_type": "falcon", "num_attention_heads": 71, "num_kv_heads": 71, "multi_query": True}
    base = Base("resaved", known.modules, config=config)
    assert layout(base, "gguf").places["transformer.h.0.self_attention.query_key_value"].part.order.plain
