"""kohya's names: a prefix per component and every dot an underscore, so that only an inventory can tell them apart again.

Source: kohya-ss/sd-scripts networks/lora.py, networks/lora_flux.py, networks/lora_sd3.py (LORA_PREFIX_*).
"""

from __future__ import annotations

from upparam.bases.base import Base
from upparam.bases.layouts.base import Component, LayoutMap, Naming, assemble, has, same, under
from upparam.bases.layouts.denoiser import beside, component, original


def text_prefixes(base: Base) -> dict[str, str]:
    """Component -> kohya prefix of each text encoder. T5 is `lora_te3` wherever it stands; one CLIP alone is `lora_te`."""
    encoders = [name for name in ("text_encoder.", "text_encoder_2.", "text_encoder_3.") if has(base, name)]
    prefixes = {name: f"lora_te{name[len('text_encoder_') : -1] or 1}_" for name in encoders}
    prefixes |= {name: "lora_te3_" for name in encoders if has(base, name + "encoder.block.")}
    return {"text_encoder.": "lora_te_"} if prefixes == {"text_encoder.": "lora_te1_"} else prefixes


def build(base: Base, denoiser: Naming, name: str) -> LayoutMap:
    """The layout with this naming of the denoiser."""
    components = [Component(text, under(prefix, same)) for text, prefix in text_prefixes(base).items()]
    start = component(base)
    if start is not None:
        components += [Component(start, under("lora_unet_", denoiser)), *beside(base, "lora_unet_")]
    return assemble(name, base, components, rename=underscored)


def underscored(path: str) -> str:
    """The name with every dot an underscore."""
    return path.replace(".", "_")


def kohya(base: Base) -> LayoutMap:
    """What sd-scripts writes: diffusers names for SD 1 and 2, the authors' names for everything later.

    It knows pipelines only; other bases get the prefix LyCORIS gives any module (lycoris/wrapper.py LORA_PREFIX).
    """
    if component(base) is None:
        return assemble("kohya", base, [Component("", under("lycoris_", same))], rename=underscored)
    if has(base, "unet.") and not has(base, "text_encoder_2."):
        return build(base, same, "kohya")
    return build(base, original(base) or same, "kohya")


def kohya_diffusers(base: Base) -> LayoutMap | None:
    """The same with diffusers names throughout, as OneTrainer and diffusers' own exporter write SDXL."""
    return None if component(base) is None else build(base, same, "kohya-diffusers")


def kohya_original(base: Base) -> LayoutMap | None:
    """The same with the authors' names throughout, SD 1 and 2 too."""
    naming = None if component(base) is None else original(base)
    return None if naming is None else build(base, naming, "kohya-original")
