"""Every layout of every inventory is a bijection: each reference module has one place, each foreign row is covered exactly once."""

from __future__ import annotations

import re

import numpy as np
import pytest

from upparam.bases import inventory
from upparam.bases.base import Base, Module
from upparam.bases.layouts import LAYOUTS, SWAP, LayoutMap, Order, available, denoiser, find, layout
from upparam.bases.layouts.base import Component, assemble
from upparam.errors import MalformedError, UsageError


def left_out(base: Base, kind: str, path: str) -> bool:
    """Modules a layout is not about: text encoders in `original`, all but attention in `xlabs`; the vision tower and Gemma's tied head in `gguf`."""
    if kind == "original":
        return not path.startswith((denoiser.component(base) or "", "text_conditioner."))
    if kind == "xlabs":
        return ".attn.to_" not in path and ".attn.add_" not in path and not re.fullmatch(r"transformer\.single\w+\.\d+\.proj_out", path)
    if kind == "gguf" and path == "lm_head":
        return base.name.startswith(("gemma-2b", "gemma-7b", "gemma-2-"))
    return kind == "gguf" and path.startswith(("model.vision_tower.", "model.multi_modal_projector."))


@pytest.mark.parametrize("name", inventory.names())
def test_every_name_maps_there_and_back(name: str) -> None:
    base = inventory.load(name)
    for kind in available(base):
        one = layout(base, kind)
        expected = {module.path: module.canonical for module in base.modules if not left_out(base, kind, module.path)}
        seen = {}
        for foreign, parts in one.foreign.items():
            at = 0
            for part in parts:
                place = one.to_foreign(part.module)
                assert place is not None and place.foreign == foreign and place.part == part
                start, stop = part.span or (0, part.shape[0])
                assert (start, stop) == (at, at + part.shape[0])
                at = stop
                seen[part.module] = part.shape
            assert at == one.rows(foreign)
        assert seen == expected, f"{kind} leaves out {sorted(set(expected) - set(seen))[:3]}"
        weights = {one.tensor_name(foreign): (foreign, "weight") for foreign in one.foreign}
        assert len(weights) == len(one.foreign) and weights.items() <= one.tensor_names.items()


def test_a_layout_the_base_does_not_have_is_refused() -> None:
    assert "ldm" in available(inventory.load("sd1.5")) and "ldm" not in available(inventory.load("gpt2"))
    with pytest.raises(UsageError, match="no ldm names"):
        layout(inventory.load("gpt2"), "ldm")
    with pytest.raises(UsageError, match="no such layout"):
        find(inventory.load("gpt2"), "klingon")


def test_colliding_names_are_refused() -> None:
    base = Base("two", (Module("a.b_c", "Linear", (2, 2)), Module("a.b.c", "Linear", (2, 2))))
    with pytest.raises(MalformedError, match="one name"):
        assemble("underscores", base, [Component("", str)], rename=lambda path: path.replace(".", "_"))


@pytest.mark.parametrize("order", [SWAP, Order("rope", 4), Order("groups", 2, 4), Order("groups", 8, 1)])
def test_orders_are_permutations_with_their_inverse(order: Order) -> None:
    forward, back = np.array(order.foreign_rows(96)), np.array(order.reference_rows(96))
    assert sorted(forward) == list(range(96)) and (forward[back] == np.arange(96)).all()
    assert (forward != np.arange(96)).any()
    with pytest.raises(MalformedError, match="rearranged"):
        order.foreign_rows(97)


@pytest.mark.parametrize(
    ("base", "kind", "foreign", "modules"),
    [
        ("sd1.5", "kohya", "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0", 1),
        ("sd1.5", "kohya", "lora_te_text_model_encoder_layers_0_self_attn_q_proj", 1),
        ("sdxl", "kohya", "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", 1),
        ("sdxl", "kohya", "lora_unet_output_blocks_2_2_conv", 1),
        ("sdxl", "kohya", "lora_te2_text_model_encoder_layers_0_mlp_fc1", 1),
        ("sdxl", "sgm", "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj", 3),
        ("sd2", "ldm", "cond_stage_model.model.transformer.resblocks.22.attn.in_proj", 3),
        ("chroma", "kohya", "lora_te3_encoder_block_0_layer_0_SelfAttention_q", 1),
        ("gpt2", "kohya", "lycoris_transformer_h_0_attn_c_attn", 1),
        ("sd1.5", "ldm", "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1", 1),
        ("flux.1-dev", "original", "single_blocks.37.linear1", 4),
        ("flux.1-dev", "kohya", "lora_unet_double_blocks_0_img_attn_qkv", 3),
        ("flux.1-dev", "kohya", "lora_te3_encoder_block_0_layer_0_SelfAttention_q", 1),
        ("sd3-medium", "kohya", "lora_unet_joint_blocks_0_x_block_attn_qkv", 3),
        ("flux.1-dev", "comfyui", "diffusion_model.single_blocks.37.linear1", 4),
        ("flux.1-dev", "comfyui", "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q", 1),
        ("sdxl", "comfyui", "text_encoders.clip_g.transformer.text_model.encoder.layers.0.mlp.fc1", 1),
        ("sd2", "comfyui", "text_encoders.clip_h.transformer.text_model.encoder.layers.0.mlp.fc1", 1),
        ("krea-2", "comfyui", "diffusion_model.txtfusion.layerwise_blocks.0.attn.wq", 1),
        ("flux.1-dev", "xlabs", "double_blocks.0.processor.qkv_lora2", 3),
        ("flux.1-dev", "xlabs", "single_blocks.0.processor.proj_lora", 1),
        ("flux.1-dev", "omi", "transformer.single_blocks.0.linear1.3", 1),
        ("flux.1-dev", "omi", "transformer.img_in.proj", 1),
        ("flux.1-dev", "omi", "t5.encoder.block.0.layer.0.SelfAttention.q", 1),
        ("flux.1-dev", "onetrainer", "lora_te2_encoder_block_0_layer_0_SelfAttention_q", 1),
        ("flux.1-dev", "onetrainer", "lora_transformer_single_transformer_blocks_0_proj_mlp", 1),
        ("sdxl", "omi", "unet.input_blocks.4.1.transformer_blocks.0.attn1.to_q", 1),
        ("sdxl", "omi", "clip_g.text_model.encoder.layers.0.mlp.fc1", 1),
        ("sd3-medium", "kohya", "lora_te3_encoder_block_0_layer_0_SelfAttention_q", 1),
    ],
)
def test_names_known_from_the_writers(base: str, kind: str, foreign: str, modules: int) -> None:
    assert len(layout(inventory.load(base), kind).to_reference(foreign)) == modules


def test_openclip_spells_its_fused_weight_without_a_dot() -> None:
    sgm = layout(inventory.load("sdxl"), "sgm")
    name = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj"
    assert sgm.tensor_name(name) == f"{name}_weight" and sgm.tensor_name(name, "bias") == f"{name}_bias"
    assert sgm.tensor_names[f"{name}_bias"] == (name, "bias")


def test_every_layout_is_had_by_some_base() -> None:
    found: set[str] = set()
    for name in inventory.names():
        found.update(available(inventory.load(name)))
    assert found == set(LAYOUTS)


def test_a_map_is_computed_once() -> None:
    assert isinstance(find(inventory.load("sd1.5"), "kohya"), LayoutMap)
    assert find(inventory.load("sd1.5"), "kohya") is find(inventory.load("sd1.5"), "kohya")
