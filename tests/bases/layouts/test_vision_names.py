"""SAM's names in transformers against transformers' own model; ViT's in timm against facts about its source."""

from __future__ import annotations

import pytest

from upparam.bases import inventory
from upparam.bases.layouts import layout


def test_sam_has_the_names_of_transformers_own_model() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.SamModel(transformers.SamConfig())
    theirs = {name.removesuffix(".weight"): tuple(value.shape) for name, value in model.named_parameters() if name.endswith(".weight")}
    base = inventory.load("sam-vit-b")
    one = layout(base, "sam-hf")
    ours = {foreign: base.by_path[parts[0].module].shape for foreign, parts in one.foreign.items()}
    # Its tied positional embedding is a buffer in the original.
    left = {name for name in theirs if name not in ours}
    assert not left, sorted(left)[:5]
    assert {name: ours[name] for name in theirs} == theirs


def test_timm_stacks_q_k_and_v() -> None:
    one = layout(inventory.load("vit-base-patch16-224"), "timm")
    parts = one.to_reference("blocks.0.attn.qkv")
    assert [part.module.rsplit(".", 1)[1] for part in parts] == ["query", "key", "value"]
    assert [part.span for part in parts] == [(0, 768), (768, 1536), (1536, 2304)]
    assert one.to_reference("head")[0].module == "classifier"


def test_gpt2_without_its_wrapper() -> None:
    one = layout(inventory.load("gpt2"), "bare")
    assert one.to_reference("h.0.attn.c_attn")[0].module == "transformer.h.0.attn.c_attn"
    assert one.to_reference("lm_head")[0].module == "lm_head"
