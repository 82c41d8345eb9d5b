"""Orders: which module an index means in dialects that number modules instead of naming them.

A rule lists a base's targets in the order the writer met them. Sources: cloneofsimo/lora lora_diffusion/lora.py (_find_modules_v2: each
ancestor of a listed class in modules() order, its Linear or Conv2d descendants in turn); MathieuNlp/Sam_LoRA src/lora.py and
JamesQFreeman/LoRA-ViT lora.py (per block one q and one v factor of the fused qkv).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from upparam.bases.base import Base, Module


class Indexed(NamedTuple):
    """What an index stands for: a module, and the output rows of it when only a slice is meant."""

    module: str
    rows: tuple[int, int] | None
    shape: tuple[int, ...]
    """Shape of the delta: (out, in, *kernel)."""


UNET_CLASSES = ("CrossAttention", "Attention", "GEGLU")
"""cloneofsimo's default ancestors in the UNet; its extended list adds ResnetBlock2D."""

_ANCESTORS = {
    "CrossAttention": r"\.attn[12]\.",
    "Attention": r"\.attn[12]\.",
    "GEGLU": r"\.ff\.net\.0\.",
    "ResnetBlock2D": r"\.resnets\.\d+\.",
    "CLIPAttention": r"\.self_attn\.",
}
"""What marks a descendant of each class in reference paths."""


def cloneofsimo_unet(base: Base, classes: Iterable[str] = UNET_CLASSES) -> list[Indexed]:
    """UNet targets in cloneofsimo's order.

    The diffusers releases of its time (up to 0.11) built a transformer block as attn1, ff, attn2; later ones as attn1, attn2, ff. Files
    in the wild follow the old order, so that is what the rule gives: within a block ff moves before attn2.
    """
    return _cloneofsimo(_ff_before_attn2(_component(base, "unet.")), classes)


def cloneofsimo_unet_late(base: Base, classes: Iterable[str] = UNET_CLASSES) -> list[Indexed]:
    """The same under diffusers 0.12 and later, where a block is attn1, attn2, ff."""
    return _cloneofsimo(_component(base, "unet."), classes)


def cloneofsimo_text(base: Base, classes: Iterable[str] = ("CLIPAttention",)) -> list[Indexed]:
    """Text encoder targets in cloneofsimo's order: k, v, q, out of each layer, as transformers builds CLIPAttention."""
    return _cloneofsimo(_component(base, "text_encoder."), classes)


def qkv_slices(base: Base) -> list[Indexed]:
    """The q rows, then the v rows of each block's fused qkv: Sam_LoRA's `w_a_000`, `w_a_001`, ... over SAM's image encoder."""
    found = []
    for module in base.modules:
        if re.fullmatch(r"image_encoder\.blocks\.\d+\.attn\.qkv", module.path):
            out, into = module.shape
            third = out // 3
            found += [Indexed(module.path, (0, third), (third, into)), Indexed(module.path, (2 * third, out), (third, into))]
    return found


def split_qv(base: Base) -> list[Indexed]:
    """Query, then value of each layer where they are separate modules (LoRA-ViT over a ViT)."""
    wanted = re.compile(r"vit\.encoder\.layer\.\d+\.attention\.attention\.(query|value)")
    return [Indexed(module.path, None, module.shape) for module in base.modules if wanted.fullmatch(module.path)]


RULES: dict[str, Callable[[Base], list[Indexed]]] = {
    "cloneofsimo-unet": cloneofsimo_unet,
    "cloneofsimo-unet-late": cloneofsimo_unet_late,
    "cloneofsimo-text": cloneofsimo_text,
    "qkv-slices": qkv_slices,
    "split-qv": split_qv,
}
"""Every order by name."""


def _component(base: Base, prefix: str) -> list[Module]:
    """The modules of one component; all of them when the base has no components (a bare UNet read from a file)."""
    inside = [module for module in base.modules if module.path.startswith(prefix)]
    bare = {"unet.": ("down_blocks.", "mid_block.", "up_blocks."), "text_encoder.": ("text_model.",)}[prefix]
    return inside or [module for module in base.modules if module.path.startswith(bare)]


def _ff_before_attn2(modules: Sequence[Module]) -> list[Module]:
    """The modules with each transformer block's ff moved before its attn2."""
    found: list[Module] = []
    waiting: list[Module] = []
    for module in modules:
        if ".attn2." in module.path:
            waiting.append(module)
            continue
        if waiting and ".ff." not in module.path and ".norm3" not in module.path:
            found += waiting
            waiting = []
        found.append(module)
    return found + waiting


def _cloneofsimo(modules: Sequence[Module], classes: Iterable[str]) -> list[Indexed]:
    patterns = {_ANCESTORS[name] for name in classes if name in _ANCESTORS}
    wanted = re.compile("|".join(sorted(patterns)) or r"(?!)")
    convolutions = any(name == "ResnetBlock2D" for name in classes)
    kinds = {"Linear", "LoRACompatibleLinear", ""} | ({"Conv2d", "LoRACompatibleConv"} if convolutions else set())
    return [
        Indexed(module.path, None, module.shape)
        for module in modules
        if module.kind in kinds and len(module.shape) in (2, 4) and wanted.search(module.path)
    ]
