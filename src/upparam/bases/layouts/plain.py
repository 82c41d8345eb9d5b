"""Names without decoration: the reference itself, and the denoiser as its authors name it."""

from __future__ import annotations

from upparam.bases.base import Base
from upparam.bases.layouts import denoiser
from upparam.bases.layouts.base import Component, LayoutMap, assemble, has, same


def reference(base: Base) -> LayoutMap:
    """Every module under its reference name."""
    return assemble("reference", base, [Component("", same)])


def authors(base: Base) -> LayoutMap | None:
    """The denoiser alone under its authors' names (`double_blocks.0.img_attn.qkv`, `input_blocks.1.0...`), without a prefix."""
    start = denoiser.component(base)
    naming = denoiser.original(base)
    return None if start is None or naming is None else assemble("original", base, [Component(start, naming), *denoiser.beside(base, "")])


_WRAPPERS = ("transformer.", "model.", "gpt_neox.", "bert.", "roberta.", "distilbert.", "vit.", "deberta.", "albert.")


def bare(base: Base) -> LayoutMap | None:
    """The body without its head's wrapper, as the plain model class saves it (`h.0.attn.c_attn` of GPT-2); heads keep their names."""
    wrapper = next((name for name in _WRAPPERS if has(base, name)), None)
    if wrapper is None or denoiser.component(base) is not None:
        return None
    return assemble("bare", base, [Component("", lambda path: path.removeprefix(wrapper))])
