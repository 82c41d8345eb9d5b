"""Real FLUX adapters name modules of the FLUX layouts, every one of them, with the layout's shapes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from upparam.bases import inventory
from upparam.bases.layouts import layout

FACTORS = (
    ".lora_up.weight",
    ".lora_B.weight",
    ".lora_A.weight",
    ".lora_down.weight",
    ".alpha",
    ".dora_scale",
    ".lora_B.bias",
    ".lokr_w1",
    ".lokr_w2",
)


def module_of(name: str) -> str:
    return next((name[: -len(factor)] for factor in FACTORS if name.endswith(factor)), name)


def control(name: str) -> str:
    # The norms of control LoRAs are whole tensors, spelled as in the checkpoint.
    return name.removesuffix(".scale")


def onetrainer(name: str) -> str:
    return name.replace("lora_transformer_", "lora_unet_").replace("lora_te2_", "lora_te3_")


@pytest.mark.parametrize(
    ("keyset", "base", "kind", "spelled"),
    [
        ("flux_lora_kohya_format", "flux.1-dev", "kohya", str),
        ("flux_dora_onetrainer_format", "flux.1-dev", "kohya-diffusers", onetrainer),
        ("flux_control_lora_format", "flux.1-control-dev", "original", control),
        ("flux_lokr_bfl_format", "flux.1-dev", "original", lambda name: name.removeprefix("diffusion_model.")),
        ("flux_lora_diffusers_format", "flux.1-dev", "reference", str),
        (
            "flux_lora_diffusers_base_model_format",
            "flux.1-dev",
            "reference",
            lambda name: name.replace("base_model.model.", "transformer."),
        ),
        ("krea2_lora_kohya_format", "krea-2", "kohya", str),
        ("qwen_image_lora_diffusers_format", "qwen-image", "reference", lambda name: f"transformer.{name}"),
    ],
)
def test_every_key_maps(keyset: str, base: str, kind: str, spelled: Callable[[str], str], corpus: Path) -> None:
    one = layout(inventory.load(base), kind)
    shapes = json.loads((corpus / "keysets" / f"{keyset}.json").read_text())
    for name, shape in shapes.items():
        foreign = spelled(module_of(name))
        parts = one.to_reference(foreign)
        assert parts, name
        if name.endswith((".lora_up.weight", ".lora_B.weight")):
            assert shape[0] == one.rows(foreign), name
        elif name.endswith((".lora_down.weight", ".lora_A.weight")):
            assert shape[1] == parts[0].shape[1], name
