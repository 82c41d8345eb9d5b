"""From the module names ComfyUI reads to places in a base: `diffusion_model.` names, bare ones, diffusers' names, text encoders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

from upparam.adapter import BaseHint
from upparam.bases import inventory
from upparam.bases.base import Base
from upparam.bases.layouts import LayoutMap, find
from upparam.bases.recognise import recognise
from upparam.dialects.placing import Shape, alike
from upparam.dialects.spoken import Named, Spoken
from upparam.patterns import regex

DENOISER = "diffusion_model."
TEXT = "text_encoders."
COMPONENTS = ("transformer.", "unet.", "text_encoder.", "text_encoder_2.", "text_encoder_3.")
_WRAPPED = regex(r"(base_model\.model\.)?(model\.)?diffusion_model\.")
_ENCODER = regex(r"text_encoders\.\w+\.transformer\.")
_NUMBERED = (("text_encoders.clip_g.transformer.", "text_encoder_2."), ("text_encoders.qwen3_06b.transformer.model.", "text_encoder."))
"""Encoders whose modules alone would be taken for those of others."""
_TRIED = 4
"""Suggested bases that are tried, best first."""


def resolve(shapes: Mapping[str, Shape], base: Base | None) -> Spoken | None:
    """The base that has these modules with these delta shapes.

    Without a named base one is only taken when it explains every name and has none of them in another shape: a file may leave modules
    out, but a base that contradicts it is not its base. With a named one what it does not have is simply not in `names`.
    """
    if base is not None:
        hint = BaseHint(base.name, 1.0, ("named by the user", *base.evidence), True)
        names = _explained(base, shapes)
        return Spoken(base, hint, names, partial(located, _layouts(base))) if names else None
    for hint in _suggested(shapes):
        name = inventory.resolve(hint.name)
        known = None if name is None else inventory.load(name)
        names = {} if known is None else _explained(known, shapes)
        if known is not None and len(names) == len(shapes):
            return Spoken(known, hint, names, partial(located, _layouts(known))) if _alone(hint, names, shapes) else None
    return None


def _alone(hint: BaseHint, names: Mapping[str, Named], shapes: Mapping[str, Shape]) -> bool:
    """True when every base that fits as well means the same modules by these names; else the choice would be a guess."""
    known = inventory.known()
    mine = inventory.resolve(hint.name)
    for other in hint.lookalikes:
        resolved = inventory.resolve(other)
        if resolved is not None and mine is not None and (known[resolved].variant_of == mine or known[mine].variant_of == resolved):
            continue  # the same modules, a few of them wider
        theirs = {} if resolved is None else _explained(inventory.load(resolved), shapes)
        if len(theirs) == len(shapes) and any(_meant(*theirs[name]) != _meant(*own) for name, own in names.items()):
            return False
    return True


def _meant(one: LayoutMap, foreign: str) -> list[tuple[object, ...]]:
    return [(part.module, part.span, part.order) for part in one.to_reference(foreign)]


_NUMBER = regex(r"(?<=\.)\d+(?=\.|$)")


def named_alike(shapes: Mapping[str, Shape]) -> str | None:
    """What speaks for a base that has modules of these names but not in these shapes, as a sentence; None when there is none."""
    index = {template: found for file in ("_original.json", "_shapes.json") for template, found in inventory.data(file).items()}
    names, bases = inventory.names(), set(range(len(inventory.names())))
    odd: tuple[str, Shape, list[int]] | None = None
    for name, shape in shapes.items():
        bare = _WRAPPED.sub("", name)
        templates = [_NUMBER.sub("#", form) for form in (name, f"transformer.{bare}", f"unet.{bare}")]
        entries = [entry for template in templates for entry in index.get(template, ())]
        bases &= {base for entry in entries for base in entry[3]}
        if not bases:
            return None
        theirs = [entry[0] for entry in entries if bases & set(entry[3])]
        if odd is None and not any(alike(shape, tuple(one)) for one in theirs):
            odd = (bare, shape, theirs[0])
    shown = ", ".join(names[base] for base in sorted(bases)[:3])
    if odd is None:
        return f"its names are those of {shown}"
    return f"its names are those of {shown}, but {odd[0]} changes a weight of {odd[1]}, there {tuple(odd[2])}"


def _suggested(shapes: Mapping[str, Shape]) -> Iterable[BaseHint]:
    """What the recogniser says to these modules, text encoders' prefixes taken off; CLIP-G is the second one wherever it stands."""

    def bare(name: str) -> str:
        for theirs, ours in _NUMBERED:
            if name.startswith(theirs):
                return ours + name[len(theirs) :]
        return _WRAPPED.sub("", _ENCODER.sub("", name))

    # A norm's vector tells little of a base, and the recogniser knows none.
    return recognise({bare(name): shape for name, shape in shapes.items() if len(shape) > 1})[:_TRIED]


def _explained(base: Base, shapes: Mapping[str, Shape]) -> dict[str, Named]:
    layouts = _layouts(base)
    found: dict[str, Named] = {}
    for name, shape in shapes.items():
        place = located(layouts, name)
        if place is not None and _fits(shape, place[0], place[1]):
            found[name] = place
    return found


def _layouts(base: Base) -> list[LayoutMap]:
    return [one for one in (find(base, "comfyui"), find(base, "reference")) if one is not None]


def located(layouts: Iterable[LayoutMap], name: str) -> Named | None:
    """The layout that has a module of this name, under one of the forms ComfyUI reads, and the layout's own name for it."""
    bare = _WRAPPED.sub("", name)
    for one in layouts:
        own = (DENOISER + bare,) if one.name == "comfyui" else (f"transformer.{bare}", f"unet.{bare}")
        for candidate in (name, *own):
            if one.to_reference(candidate):
                return one, candidate
    return None


def _fits(shape: Shape, one: LayoutMap, foreign: str) -> bool:
    return alike(shape, (one.rows(foreign), *one.to_reference(foreign)[0].shape[1:]))
