"""Layouts: other namings of a base's modules. One file a family of names; this table is all the rest of the program knows of them.

`layout(base, name)` gives a LayoutMap: `to_reference(foreign)` the reference modules stacked in a foreign weight, `to_foreign(module)`
where a reference module lies, `foreign` everything, `tensor_names` for checkpoints. Maps are computed from rules over the base's
modules, so they fit any depth and width.
"""

from __future__ import annotations

import importlib
from functools import lru_cache

from upparam.bases.base import Base
from upparam.bases.layouts.base import SAME, SWAP, LayoutMap, Order, Part, Place
from upparam.errors import UsageError

__all__ = ["LAYOUTS", "SAME", "SWAP", "LayoutMap", "Order", "Part", "Place", "available", "find", "layout"]

LAYOUTS: dict[str, str] = {
    "reference": "plain:reference",
    "original": "plain:authors",
    "ldm": "checkpoint:ldm",
    "sgm": "checkpoint:sgm",
    "mmdit": "checkpoint:mmdit",
    "kohya": "kohya:kohya",
    "kohya-diffusers": "kohya:kohya_diffusers",
    "kohya-original": "kohya:kohya_original",
    "comfyui": "comfyui:comfyui",
    "xlabs": "trainers:xlabs",
    "onetrainer": "trainers:onetrainer",
    "omi": "trainers:omi",
    "gguf": "gguf:gguf",
    "torchtune": "torchtune:torchtune",
    "litgpt": "litgpt:litgpt",
    "bare": "plain:bare",
    "sam-hf": "vision:sam_hf",
    "timm": "vision:timm",
}
"""Layout name to 'module:function' below this package; the function takes a Base and gives a LayoutMap, or None where it has no such naming."""


@lru_cache(maxsize=64)
def find(base: Base, name: str) -> LayoutMap | None:
    """The layout of that name; None where the base has no such naming. Raises UsageError for an unknown name."""
    if name not in LAYOUTS:
        raise UsageError("no such layout", expected="one of " + ", ".join(LAYOUTS), found=name)
    module, function = LAYOUTS[name].split(":")
    found: LayoutMap | None = getattr(importlib.import_module(f"{__name__}.{module}"), function)(base)
    return found


def layout(base: Base, name: str) -> LayoutMap:
    """The layout of that name. Raises UsageError where the base has no such naming, saying which it has."""
    found = find(base, name)
    if found is None:
        raise UsageError(f"{base.name} has no {name} names", expected="one of " + ", ".join(available(base)), found=name)
    return found


def available(base: Base) -> list[str]:
    """The layouts this base has."""
    return [name for name in LAYOUTS if find(base, name) is not None]
