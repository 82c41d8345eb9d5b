"""Whole single-file checkpoints: every component under the prefix the all-in-one file gives it.

Source: huggingface/diffusers src/diffusers/loaders/single_file_utils.py (CHECKPOINT_KEY_NAMES, LDM_CLIP_PREFIX_TO_REMOVE);
comfyanonymous/ComfyUI comfy/supported_models.py.
"""

from __future__ import annotations

from upparam.bases.base import Base
from upparam.bases.layouts.base import Component, LayoutMap, assemble, has, same, under
from upparam.bases.layouts.clip import OPEN_CLIP
from upparam.bases.layouts.mmdit import sd3
from upparam.bases.layouts.unet import ldm_unet

_DENOISER = "model.diffusion_model."
_CLIP_L_LAYERS = 12


def ldm(base: Base) -> LayoutMap | None:
    """Stable Diffusion 1 and 2 single files. SD1 keeps CLIP-L's own names, SD2 holds OpenCLIP's (a deeper one, of which 23 layers are used)."""
    embedding = "text_encoder.text_model.embeddings.token_embedding"
    if not has(base, "unet.down_blocks.") or embedding not in base.by_path or has(base, "text_encoder_2."):
        return None
    clip_l = not has(base, f"text_encoder.text_model.encoder.layers.{_CLIP_L_LAYERS}.")
    text = under("cond_stage_model.transformer.", same) if clip_l else under("cond_stage_model.model.", OPEN_CLIP)
    return assemble("ldm", base, [Component("unet.", under(_DENOISER, ldm_unet(base))), Component("text_encoder.", text)])


def sgm(base: Base) -> LayoutMap | None:
    """Stable Diffusion XL single files, and its refiner's (which has the second text encoder only)."""
    if not has(base, "unet.down_blocks.") or not has(base, "text_encoder_2."):
        return None
    components = [Component("unet.", under(_DENOISER, ldm_unet(base)))]
    embedders = [name for name in ("text_encoder.", "text_encoder_2.") if has(base, name)]
    for number, name in enumerate(embedders):
        at = f"conditioner.embedders.{number}."
        naming = under(at + "transformer.", same) if name == "text_encoder." else under(at + "model.", OPEN_CLIP)
        components.append(Component(name, naming))
    return assemble("sgm", base, components)


def mmdit(base: Base) -> LayoutMap | None:
    """Stable Diffusion 3 single files with their text encoders."""
    if not (has(base, "transformer.pos_embed.proj") and has(base, "transformer.transformer_blocks.0.attn.add_q_proj")):
        return None
    encoders = {"text_encoder.": "clip_l", "text_encoder_2.": "clip_g", "text_encoder_3.": "t5xxl"}
    texts = [Component(ours, under(f"text_encoders.{theirs}.transformer.", same)) for ours, theirs in encoders.items()]
    return assemble("mmdit", base, [Component("transformer.", under(_DENOISER, sd3(base))), *texts])
