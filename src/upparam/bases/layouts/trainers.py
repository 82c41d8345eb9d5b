"""Names that single trainers gave the modules of FLUX and its kin: XLabs' attention processors, OneTrainer's own form and its OMI form.

Sources: XLabs-AI/x-flux src/flux/modules/layers.py (DoubleStreamBlockLoraProcessor, SingleStreamBlockLoraProcessor);
Nerogar/OneTrainer modules/util/convert_lora_util.py (convert_to_mixture) and, until 2026, modules/util/convert/lora/convert_*.py (omi_prefix).
"""

from __future__ import annotations

from upparam.bases.base import Base
from upparam.bases.layouts.base import Component, LayoutMap, Naming, Spot, Table, assemble, has, same, stacked, under
from upparam.bases.layouts.comfyui import ENCODERS, encoder
from upparam.bases.layouts.denoiser import component, original
from upparam.bases.layouts.kohya import underscored

_TWO, _ONE = "transformer_blocks.{}.", "single_transformer_blocks.{}."
_DOUBLE, _SINGLE = "double_blocks.{}.processor.", "single_blocks.{}.processor."

XLABS = Table(
    {
        **stacked(_DOUBLE + "qkv_lora1", [f"{_TWO}attn.to_{part}" for part in "qkv"]),
        **stacked(_DOUBLE + "qkv_lora2", [f"{_TWO}attn.add_{part}_proj" for part in "qkv"]),
        _TWO + "attn.to_out.0": _DOUBLE + "proj_lora1",
        _TWO + "attn.to_add_out": _DOUBLE + "proj_lora2",
        # Of linear1, which holds the first half of the MLP too, only q, k and v are changed.
        **stacked(_SINGLE + "qkv_lora", [f"{_ONE}attn.to_{part}" for part in "qkv"]),
        _ONE + "proj_out": _SINGLE + "proj_lora",
    }
)
"""Attention of FLUX -> XLabs' processors; nothing else has a name there."""


def xlabs(base: Base) -> LayoutMap | None:
    """The attention of FLUX.1; None for other bases."""
    flux = _is_flux(base) and not has(base, "transformer.distilled_guidance_layer.")
    return assemble("xlabs", base, [Component("transformer.", XLABS)]) if flux else None


def _is_flux(base: Base) -> bool:
    """True for FLUX.1 and Chroma; FLUX.2's single blocks and HunyuanVideo's input go by other names."""
    return has(base, "transformer.single_transformer_blocks.0.proj_mlp") and "transformer.x_embedder" in base.by_path


def onetrainer(base: Base) -> LayoutMap | None:
    """Pipelines with a transformer under diffusers' names, dots as underscores, text encoders numbered by their component; None for others.

    Those with a UNet go by kohya's names there, and Anima came after it.
    """
    if component(base) != "transformer." or has(base, "text_conditioner."):
        return None
    numbered = {name: f"lora_te{number}_" for number, name in enumerate(ENCODERS, 1)}
    texts = [Component(name, under(prefix, same)) for name, prefix in numbered.items()]
    return assemble("onetrainer", base, [Component("transformer.", under("lora_transformer_", same)), *texts], rename=underscored)


_OMI_ENCODERS = {"clip_l": "clip_l.", "clip_g": "clip_g.", "t5xxl": "t5."}


def omi(base: Base) -> LayoutMap | None:
    """FLUX.1, Chroma and SDXL: the authors' names, the parts of a fused weight numbered apart; None for other bases."""
    start, naming = component(base), original(base)
    sdxl = has(base, "unet.add_embedding.") and has(base, "text_encoder.") and has(base, "text_encoder_2.")
    if start is None or naming is None or not (sdxl or _is_flux(base)):
        return None
    fused = {path for path, parts in assemble("original", base, [Component(start, naming)]).foreign.items() if len(parts) > 1}
    components = [Component(start, under(start, _numbered(naming, fused)))]
    for name in ENCODERS:
        known = _OMI_ENCODERS.get(encoder(base, name) or "")
        if known is not None:
            components.append(Component(name, under(known, same)))
    return assemble("omi", base, components)


def _numbered(naming: Naming, fused: set[str]) -> Naming:
    def apart(path: str) -> Spot | None:
        spot = naming(path)
        spot = Spot(spot) if isinstance(spot, str) else spot
        if spot is None:
            return None
        if spot.foreign in fused:
            return spot._replace(foreign=f"{spot.foreign}.{spot.slot}", slot=0)
        return spot._replace(foreign="img_in.proj") if spot.foreign == "img_in" else spot

    return apart
