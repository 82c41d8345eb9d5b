"""Block weights: ids agree with the layouts' own block numbers, presets and vectors mean what their users know."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from tests.operations.merging import adapter, lora, save

from upparam.adapter import Target
from upparam.bases import inventory
from upparam.bases.layouts import layout
from upparam.errors import UsageError
from upparam.operations.merge import prepare
from upparam.operations.merge.blocks import IDS, PRESETS, block_of, parse

ATTENTION = "attn1.to_q"


@pytest.mark.parametrize(("name", "naming"), [("sd1.5", "ldm"), ("sdxl", "sgm")])
def test_every_unet_module_is_in_the_block_its_ldm_name_says(name: str, naming: str) -> None:
    base = inventory.load(name)
    places = layout(base, naming).places
    checked = 0
    for module in base.modules:
        if not module.path.startswith("unet.") or module.path not in places:
            continue
        foreign = places[module.path].foreign
        number = re.search(r"(input|output)_blocks\.(\d+)", foreign)
        wanted = f"{'IN' if number[1] == 'input' else 'OUT'}{int(number[2]):02}" if number else "M00" if "middle_block" in foreign else None
        assert block_of(module.path) == wanted == block_of(foreign), module.path
        checked += wanted is not None
    assert checked > 250


def test_every_flux_module_is_in_its_block() -> None:
    base = inventory.load("flux.1-dev")
    places = layout(base, "original").places
    for module in base.modules:
        if module.path in places and module.path.startswith("transformer."):
            foreign = places[module.path].foreign
            assert block_of(module.path, True) == block_of(foreign, True) is not None, module.path
    assert block_of("text_encoder.text_model.encoder.layers.0.mlp.fc1", True) == "CLIP"
    assert block_of("text_encoder_2.encoder.block.0.layer.0.SelfAttention.q", True) == "T5"


def test_presets_vectors_ranges_and_globs() -> None:
    inside = Target("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q")  # IN01
    deep = Target("unet.up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k")  # OUT03
    text, other = Target("text_encoder.text_model.encoder.layers.0.mlp.fc1"), Target("unet.time_embedding.linear_1")
    assert [parse(["INALL"])(target) for target in (inside, deep, text, other)] == [1, 0, 1, 1]
    assert [parse(["OUTALL"])(target) for target in (inside, deep, text)] == [0, 1, 1]
    vector = ",".join(["0.25", *["1"] * 7, "0.5", *["1"] * 8])
    assert [parse([vector])(target) for target in (inside, deep, text)] == [1, 0.5, 0.25]
    assert [parse(["IN05-OUT05=0.3"])(target) for target in (inside, deep)] == [1, 0.3]
    assert [parse(["INALL", "*.attn1.*=0.7"])(target) for target in (inside, deep)] == [0.7, 0]
    assert parse(["BASE=0"])(text) == 0
    single = Target("transformer.single_transformer_blocks.7.attn.to_q")
    assert parse(["S07=0.2"])(single) == 0.2 and parse(["FLUXALL"])(single) == 1
    assert all(len(values) in IDS for values in PRESETS.values())


@pytest.mark.parametrize("text", ["1,2,3", "NOPE", "IN01=x", "1,1,1,1,1,1,1,1,1,1,1,x"])
def test_what_is_no_block_weight(text: str) -> None:
    with pytest.raises(UsageError, match="block weight"):
        parse([text])


def test_weights_that_name_no_block_of_the_adapter_are_said(tmp_path: Path) -> None:
    base = save(tmp_path / "b.safetensors", {"model.layers.0.q.weight": np.ones((4, 6), np.float32)})
    item = adapter({"model.layers.0.q": lora(np.ones((4, 1), np.float32), np.ones((1, 6), np.float32))})
    assert [finding.code for finding in prepare(base, item, block_weight=parse(["NONE"])).findings] == ["block-weights"]
    assert not prepare(base, item, block_weight=parse(["*.q=0.5"])).findings
    assert not prepare(base, item, block_weight=parse(["*.q=1"])).findings
    found = prepare(base, item, block_weight=parse(["*.q=0.5", "*.p=0"])).findings
    assert [(finding.code, finding.subject) for finding in found] == [("idle-glob", "*.p")]


def test_a_preset_of_ones_names_its_blocks_all_the_same() -> None:
    inside = Target("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q")
    assert parse(["ALL"]).names(inside) and parse(["NONE"]).names(inside)
    assert not parse(["ALL"]).names(Target("unet.time_embedding.linear_1")) and not parse(["IN05=0.5"]).names(inside)
