"""A pipeline's denoiser under the names of its authors' own files, whichever it is: what kohya, ComfyUI and most trainers build on."""

from __future__ import annotations

from upparam.bases.base import Base
from upparam.bases.layouts.base import Component, Naming, has, same, under
from upparam.bases.layouts.dit import COSMOS2, HUNYUAN_VIDEO, KREA2, LTX, LUMINA2, WAN, Z_IMAGE
from upparam.bases.layouts.flux import FLUX, FLUX2
from upparam.bases.layouts.mmdit import sd3
from upparam.bases.layouts.unet import ldm_unet

_BY_MODULE: tuple[tuple[str, Naming], ...] = (
    ("transformer.context_embedder.token_refiner", HUNYUAN_VIDEO),
    ("transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj", FLUX2),
    ("transformer.single_transformer_blocks.0.proj_mlp", FLUX),
    ("transformer.proj_in", LTX),
    ("transformer.condition_embedder.time_proj", WAN),
    ("transformer.all_x_embedder", Z_IMAGE),
    ("transformer.time_caption_embed", LUMINA2),
    ("transformer.text_fusion", KREA2),
    ("transformer.time_embed.t_embedder", COSMOS2),
    ("transformer.txt_norm", same),  # Qwen-Image: published in diffusers' own names
)
"""A module only this architecture has, and its original naming."""


def component(base: Base) -> str | None:
    """The component of the base that denoises: 'unet.', 'transformer.', or None when it is no pipeline."""
    if has(base, "unet."):
        return "unet."
    # Language models keep their blocks under `transformer.` too.
    language = any(has(base, f"transformer.{part}.") for part in ("h", "wte", "word_embeddings", "layer"))
    return "transformer." if has(base, "transformer.") and not language else None


def original(base: Base) -> Naming | None:
    """The naming of the base's denoiser in its authors' files; None where we know none."""
    if has(base, "unet.down_blocks."):
        return ldm_unet(base)
    if has(base, "transformer.pos_embed.proj") and has(base, "transformer.transformer_blocks.0.attn.add_q_proj"):
        return sd3(base)
    return next((naming for mark, naming in _BY_MODULE if has(base, mark)), None)


def beside(base: Base, prefix: str) -> list[Component]:
    """Components that the authors keep within the denoiser's file: Anima's text conditioner, `llm_adapter` there."""
    return [Component("text_conditioner.", under(f"{prefix}llm_adapter.", same))] if has(base, "text_conditioner.") else []
