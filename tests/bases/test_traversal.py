"""Index orders against the classes and the search rule they come from, run for real on small models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from upparam.bases import inventory, traversal
from upparam.bases.base import Base, Module


def found_by_rule(model: Any, ancestors: set[str], kinds: tuple[type, ...]) -> list[str]:
    """cloneofsimo/lora's rule, stated anew: below each module of a listed class, in modules() order, every Linear (or Conv2d)."""
    names = {module: name for name, module in model.named_modules()}
    return [
        names[child]
        for module in model.modules()
        if type(module).__name__ in ancestors
        for child in module.modules()
        if isinstance(child, kinds)
    ]


def base_of(model: Any, prefix: str) -> Base:
    modules = [
        Module(prefix + name, type(module).__name__, tuple(module.weight.shape))
        for name, module in model.named_modules()
        if getattr(module, "weight", None) is not None
    ]
    return Base("small", tuple(modules))


def small_unet() -> Any:
    diffusers = pytest.importorskip("diffusers")
    import torch

    with torch.device("meta"):
        return diffusers.UNet2DConditionModel(
            block_out_channels=(8, 16), layers_per_block=2, norm_num_groups=4, cross_attention_dim=12, attention_head_dim=2,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )  # fmt: skip


def test_late_unet_order_is_the_rule_on_todays_classes() -> None:
    import torch

    model = small_unet()
    found = found_by_rule(model, {"CrossAttention", "Attention", "GEGLU"}, (torch.nn.Linear,))
    assert [item.module for item in traversal.cloneofsimo_unet_late(base_of(model, "unet."))] == [f"unet.{name}" for name in found]


def test_extended_unet_order_with_convolutions() -> None:
    import torch

    model = small_unet()
    classes = ("ResnetBlock2D", "CrossAttention", "Attention", "GEGLU")
    found = found_by_rule(model, set(classes), (torch.nn.Linear, torch.nn.Conv2d))
    assert [item.module for item in traversal.cloneofsimo_unet_late(base_of(model, "unet."), classes)] == [f"unet.{name}" for name in found]


def test_text_encoder_order_is_the_rule_on_clip() -> None:
    transformers = pytest.importorskip("transformers")
    import torch

    with torch.device("meta"):
        model = transformers.CLIPTextModelWithProjection(
            transformers.CLIPTextConfig(hidden_size=8, intermediate_size=16, num_hidden_layers=3)
        )
    found = found_by_rule(model, {"CLIPAttention"}, (torch.nn.Linear,))
    assert [item.module for item in traversal.cloneofsimo_text(base_of(model, "text_encoder."))] == [
        f"text_encoder.{name}" for name in found
    ]


def test_a_real_file_has_the_old_order_of_blocks(corpus: Path) -> None:
    with safe_open(corpus / "cloneofsimo" / "lora_disney.safetensors", "numpy") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - not a dict
    base = inventory.load("sd1.5")
    for component, order in (("unet", traversal.cloneofsimo_unet(base)), ("text_encoder", traversal.cloneofsimo_text(base))):
        stored = [
            (shapes[f"{component}:{index}:up"][0], shapes[f"{component}:{index}:down"][1])
            for index in range(sum(name.startswith(f"{component}:") for name in shapes) // 2)
        ]
        assert [item.shape for item in order] == stored
    late = [item.shape for item in traversal.cloneofsimo_unet_late(base)]
    assert late != [item.shape for item in traversal.cloneofsimo_unet(base)]
    assert sorted(late) == sorted(item.shape for item in traversal.cloneofsimo_unet(base))


def test_old_order_of_one_block() -> None:
    names = [item.module.split("transformer_blocks.0.")[1] for item in traversal.cloneofsimo_unet(inventory.load("sd1.5"))[:9]]
    attention = ["to_q", "to_k", "to_v", "to_out.0"]
    assert names == [*(f"attn1.{name}" for name in attention), "ff.net.0.proj", *(f"attn2.{name}" for name in attention)]


def test_sam_slices_alternate_q_and_v() -> None:
    order = traversal.qkv_slices(inventory.load("sam-vit-b"))
    assert len(order) == 24
    assert order[0] == ("image_encoder.blocks.0.attn.qkv", (0, 768), (768, 768))
    assert order[1] == ("image_encoder.blocks.0.attn.qkv", (1536, 2304), (768, 768))
    assert order[23].module == "image_encoder.blocks.11.attn.qkv"


def test_a_base_without_such_modules_has_no_order() -> None:
    assert all(not order(inventory.load("gpt2")) for order in traversal.RULES.values())
