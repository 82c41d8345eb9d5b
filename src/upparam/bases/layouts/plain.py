"""Names without decoration: the reference itself, and the denoiser as its authors name it."""

from __future__ import annotations

from upparam.bases.base import Base
from upparam.bases.layouts import denoiser
from upparam.bases.layouts.base import Component, LayoutMap, assemble, same


def reference(base: Base) -> LayoutMap:
    """Every module under its reference name."""
    return assemble("reference", base, [Component("", same)])


def authors(base: Base) -> LayoutMap | None:
    """The denoiser alone under its authors' names (`double_blocks.0.img_attn.qkv`, `input_blocks.1.0...`), without a prefix."""
    start = denoiser.component(base)
    naming = denoiser.original(base)
    return None if start is None or naming is None else assemble("original", base, [Component(start, naming)])
