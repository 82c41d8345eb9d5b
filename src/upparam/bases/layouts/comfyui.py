"""ComfyUI's names: the denoiser as its authors name it below `diffusion_model.`, text encoders below `text_encoders.<which>.transformer.`.

Sources: comfyanonymous/ComfyUI comfy/lora.py (model_lora_keys_unet, model_lora_keys_clip), comfy/text_encoders/*.py (clip_l, clip_g, t5xxl ...).
"""

from __future__ import annotations

from upparam.bases.base import Base
from upparam.bases.layouts.base import Component, LayoutMap, assemble, has, same, under
from upparam.bases.layouts.denoiser import beside, component, original

_CLIPS = {768: "clip_l", 1024: "clip_h", 1280: "clip_g"}
"""CLIP's text tower by its width."""
ENCODERS = ("text_encoder.", "text_encoder_2.", "text_encoder_3.")


def encoder(base: Base, name: str) -> str | None:
    """What ComfyUI calls the text encoder of this component: 'clip_l', 't5xxl', ...; None for an encoder it has no such name for."""
    if has(base, name + "encoder.block."):
        return "umt5xxl" if base.family == "wan" else "t5xxl"
    if base.family == "anima" and has(base, name + "layers."):
        return "qwen3_06b"
    embedding = base.by_path.get(name + "text_model.embeddings.token_embedding")
    return None if embedding is None else _CLIPS.get(embedding.shape[1])


def comfyui(base: Base) -> LayoutMap | None:
    """A pipeline whose denoiser's own names we know, with its text encoders; None for other bases."""
    start, naming = component(base), original(base)
    if start is None or naming is None:
        return None
    components = [Component(start, under("diffusion_model.", naming)), *beside(base, "diffusion_model.")]
    for name in ENCODERS:
        known = encoder(base, name)
        if known is not None:
            # transformers' wrapper of a language model is part of the name.
            inner = "model." if known.startswith("qwen") else ""
            components.append(Component(name, under(f"text_encoders.{known}.transformer.{inner}", same)))
    return assemble("comfyui", base, components)
