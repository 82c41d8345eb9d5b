"""Our layouts against diffusers' own single-file converters: row by row, on tensors whose values are row numbers."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
single_file = pytest.importorskip("diffusers.loaders.single_file_utils")

from upparam.bases import inventory  # noqa: E402
from upparam.bases.layouts import LayoutMap, layout  # noqa: E402


def numbered(one: LayoutMap, component: str, prefix: str = "") -> tuple[dict[str, Any], dict[str, Any]]:
    """(reference state dict, foreign state dict) of one component's weights: every row holds a number that no other row has."""
    reference, foreign, at = {}, {}, 0
    for name, parts in one.foreign.items():
        if not parts[0].module.startswith(component):
            continue
        stacked = []
        for part in parts:
            rows = torch.arange(at, at + part.shape[0], dtype=torch.int64)[:, None].expand(-1, part.shape[1] if part.transposed else 1)
            at += part.shape[0]
            reference[part.module[len(component) :] + ".weight"] = rows
            stacked.append(rows[list(part.order.foreign_rows(part.shape[0]))])
        weight = torch.cat(stacked)
        foreign[prefix + one.tensor_name(name)] = weight.T if parts[0].transposed else weight
    return reference, foreign


def same(converted: dict[str, Any], reference: dict[str, Any]) -> None:
    """Every reference weight comes out of diffusers' converter under its name with its rows in order; nothing else but biases does."""
    weights = {name: value for name, value in converted.items() if value is not None and name.endswith(".weight")}
    assert set(weights) == set(reference)
    for name, value in reference.items():
        assert torch.equal(weights[name].reshape(value.shape), value), name


def with_biases(state: dict[str, Any]) -> dict[str, Any]:
    """The converters pop biases beside weights; give them some."""
    extra = {}
    for name, value in state.items():
        if name.endswith(".weight"):
            extra.setdefault(name.removesuffix("weight") + "bias", value[:, 0])
    return {**extra, **state}


def biased(convert: Callable[..., Any]) -> Callable[[dict[str, Any]], Any]:
    return lambda state: convert(with_biases(state))


@pytest.mark.parametrize("name", ["sd1.5", "sd2", "sdxl", "sdxl-refiner"])
def test_unet(name: str) -> None:
    base = inventory.load(name)
    kind = "ldm" if name in ("sd1.5", "sd2") else "sgm"
    reference, foreign = numbered(layout(base, kind), "unet.")
    config = {"layers_per_block": 2, **({"addition_embed_type": "text_time"} if kind == "sgm" else {})}
    same(single_file.convert_ldm_unet_checkpoint(with_biases(foreign), config), reference)


@pytest.mark.parametrize(
    ("name", "kind", "component", "prefix"),
    [
        ("sd2", "ldm", "text_encoder.", "cond_stage_model.model."),
        ("sdxl", "sgm", "text_encoder_2.", "conditioner.embedders.1.model."),
        ("sdxl-refiner", "sgm", "text_encoder_2.", "conditioner.embedders.0.model."),
    ],
)
def test_open_clip(name: str, kind: str, component: str, prefix: str) -> None:
    base = inventory.load(name)
    reference, foreign = numbered(layout(base, kind), component)
    width = base.by_path[component + "text_model.embeddings.token_embedding"].shape[1]
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=width))
    same(single_file.convert_open_clip_checkpoint(model, foreign, prefix), reference)


@pytest.mark.parametrize(("name", "kind"), [("sd1.5", "ldm"), ("sdxl", "sgm")])
def test_clip_l(name: str, kind: str) -> None:
    reference, foreign = numbered(layout(inventory.load(name), kind), "text_encoder.")
    same(single_file.convert_ldm_clip_checkpoint(foreign), reference)


def sd3(state: dict[str, Any]) -> Any:
    return single_file.convert_sd3_transformer_checkpoint_to_diffusers(with_biases(state) | {"pos_embed": torch.zeros(1)})


def chroma(state: dict[str, Any]) -> Any:
    return single_file.convert_chroma_transformer_checkpoint_to_diffusers(with_biases(state))


@pytest.mark.parametrize(
    ("name", "convert"),
    [
        ("sd3-medium", sd3),
        ("sd3.5-medium", sd3),
        ("sd3.5-large", sd3),
        ("flux.1-dev", biased(single_file.convert_flux_transformer_checkpoint_to_diffusers)),
        ("flux.1-schnell", biased(single_file.convert_flux_transformer_checkpoint_to_diffusers)),
        ("flux.2-dev", single_file.convert_flux2_transformer_checkpoint_to_diffusers),
        ("chroma", chroma),
        ("wan2.1-t2v-1.3b", single_file.convert_wan_transformer_to_diffusers),
        ("wan2.1-i2v-14b", single_file.convert_wan_transformer_to_diffusers),
        ("wan2.2-ti2v-5b", single_file.convert_wan_transformer_to_diffusers),
        ("lumina2", single_file.convert_lumina2_to_diffusers),
        ("z-image", single_file.convert_z_image_transformer_checkpoint_to_diffusers),
        ("krea-2", single_file.convert_krea2_transformer_checkpoint_to_diffusers),
        ("hunyuan-video", single_file.convert_hunyuan_video_transformer_to_diffusers),
        ("ltx-video", single_file.convert_ltx_transformer_checkpoint_to_diffusers),
    ],
)
def test_transformer(name: str, convert: Callable[..., Any]) -> None:
    base = inventory.load(name)
    reference, foreign = numbered(layout(base, "original"), "transformer.")
    if name == "sd3-medium" or name.startswith("sd3.5"):
        prefixed = numbered(layout(base, "mmdit"), "transformer.")[1]
        assert list(prefixed) == [f"model.diffusion_model.{key}" for key in foreign]
    same(convert(foreign), reference)
