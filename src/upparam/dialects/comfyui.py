"""ComfyUI: a module's path in the model's own file and its factors, `diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight`.

ComfyUI calls it its generic form; ai-toolkit, diffusion-pipe, musubi-tuner and OneTrainer write it, black-forest-labs without the prefix.
Sources: comfyanonymous/ComfyUI comfy/lora.py (model_lora_keys_unet, model_lora_keys_clip), comfy/lora_convert.py, comfy/weight_adapter/*.py;
ostris/ai-toolkit toolkit/network_mixins.py; Nerogar/OneTrainer modules/modelSaver/mixin/LoRASaverMixin.py (_save_comfy, _save_original).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from upparam.adapter import Adapter, ExtraKind, Target
from upparam.algorithms.base import Delta
from upparam.bases import inventory
from upparam.bases.base import Base
from upparam.bases.layouts import LayoutMap, find
from upparam.containers.base import TensorFile
from upparam.dialects import by_diffusers
from upparam.dialects import comfyui_words as words
from upparam.dialects.base import Bundle, Match, NamedTensors, Package, ReadOptions
from upparam.dialects.carried import carried
from upparam.dialects.comfyui_names import COMPONENTS, DENOISER, TEXT, named_alike, resolve
from upparam.dialects.placing import PARTS_KEY, Parts, Unfit, base_of, layout_for, to_foreign, untranslated
from upparam.dialects.refusing import because, refuse
from upparam.dialects.spelling import alpha_of, chosen, form_of, remember
from upparam.dialects.spoken import Spoken, heard
from upparam.dialects.tokens import bundle_name
from upparam.errors import Problem, RefusedError
from upparam.patterns import regex
from upparam.tensors import Tensor

_BARE = regex(
    r"(double_blocks|single_blocks|joint_blocks|input_blocks|middle_block|output_blocks|individual_token_refiner)\.\d+\.|"
    r"(img_in|txt_in|time_in|vector_in|guidance_in|final_layer)\.|blocks\.\d+\.(self_attn|cross_attn|ffn|adaln_modulation_\w+)\."
)
"""How the authors' names of a denoiser begin when no prefix says whose they are."""
_DIFFUSERS_WORDS = ("ab", "kohya", "linear")
_UNKNOWN = "no base that upparam knows has all these modules in these shapes, or several do and mean different ones; name it with --base"
_WORDS = {"flux.2": "ab", "flux": "kohya", "z-image": "linear"}
"""How factors are spelled of a base (the beginning of its name, or its family) so that diffusers reads the file as well; others as lora_A, lora_B."""
_SPLIT_FAMILIES = ("flux", "sd3", "z-image")
"""Families whose fused weights ComfyUI reads by their parts too, under diffusers' names (comfy/utils.py *_to_diffusers)."""


class ComfyUI:
    """The dialect."""

    name = "comfyui"
    title = "ComfyUI (the model's own names)"
    writable = True
    algorithms = words.ALGORITHMS

    def match(self, file: TensorFile) -> Match | None:
        """The share of names that are a known word after a path below `diffusion_model.`, `text_encoders.`, or an author's block."""
        named = bare = others = foreign = 0
        for name in file.tensors:
            found = words.split(name)
            if found is None:
                continue
            if name.startswith((DENOISER, "model." + DENOISER, TEXT)):
                named += 1
            elif _BARE.match(name):
                bare += 1
            elif name.startswith(COMPONENTS):
                others += 1
                foreign += found[1] in words.FOREIGN
        # diffusers' names with words diffusers does not have, or beside names of ours, are for ComfyUI.
        hits = named + bare + (others if named or bare or foreign else 0)
        if not hits:
            return None
        share = hits / len(file.tensors)
        evidence = f"{hits} of {len(file.tensors)} names are [diffusion_model.]<module of the model's own file>.<factor>"
        return Match(self.name, round((0.97 if named else 0.93 if bare else 0.96) * share, 3), (evidence,))

    def gather(self, file: TensorFile, siblings: Sequence[TensorFile]) -> list[TensorFile]:
        """One file is one adapter."""
        return [file]

    def read(self, bundle: Bundle, options: ReadOptions) -> Adapter:
        """The adapter; modules in reference names where a base has them all, else as the file names them (layout 'comfyui')."""
        file = bundle.main
        groups, rest = words.grouped(file.tensors)
        adapter, found = heard(file, self.name, groups, rest, partial(resolve, base=options.base), _UNKNOWN, named_alike)
        _note(adapter, groups, found)
        return adapter

    def write(self, adapter: Adapter, options: Mapping[str, Any]) -> Package:
        """One safetensors file. Raises RefusedError for what ComfyUI has no words or names for."""
        told: Parts = {}
        problems: list[str | Problem] = [*self._passed_over(adapter, options)]
        named, saved = self._named(adapter, options, told, problems)
        bare = _control(adapter, named, saved) and not problems
        spelling = {} if bare else adapter.spelling if adapter.dialect == self.name else {}
        tensors: dict[str, Tensor] = {}
        base = None if bare or adapter.layout != "reference" else base_of(adapter, options)
        pair = _pair_for(base)
        # An alpha equal to the rank changes nothing here; where diffusers fails over any, only a file that was for ComfyUI keeps it.
        kept = adapter.dialect == self.name or by_diffusers.takes_alpha(base)
        stored = kept and any(key.split(" ", 1)[0] == "alpha" for key in adapter.spelling)
        for (module, parameter), delta in named.items():
            try:
                spelled = words.spell(delta, chosen(spelling, "pair", module) or pair, parameter)
                alpha = words.stored_alpha(delta)
            except RefusedError as problem:
                problems.append(because(module if parameter == "weight" else f"{module}.{parameter}", problem))
                continue
            if "diff_b" in spelled and (bare or f"bias {module}" in spelling):
                spelled["lora_B.bias"] = spelled.pop("diff_b")
            tensors |= {f"{module}.{word}": tensor for word, tensor in spelled.items()}
            said = not words.is_plain(delta) or delta.scale != 1.0 or stored
            if alpha is not None and said and not bare:
                tensors[f"{module}.alpha"] = alpha_of(
                    spelling, module, alpha, next(iter(spelled.values())).dtype, exact=words.is_turn(delta)
                )
        for module, tensor in saved.items():
            tensors[f"{module}.scale" if bare or spelling.get(f"saved {module}") == "scale" else f"{module}.set_weight"] = tensor
        tensors |= _reshapes(adapter, options, named, spelling, bare)
        tensors |= {bundle_name(extra.name): extra.tensor for extra in adapter.extras if extra.kind is ExtraKind.TEXTUAL_INVERSION}
        refuse(self.name, problems)
        if bare:
            tensors = {name.removeprefix(DENOISER): tensor for name, tensor in tensors.items()}
        metadata = carried(adapter, self.name)
        if told:
            metadata[PARTS_KEY] = json.dumps(told, separators=(",", ":"))
        return Package({"lora.safetensors": NamedTensors(tensors, metadata)}, folder=False)

    def _passed_over(self, adapter: Adapter, options: Mapping[str, Any]) -> list[str]:
        """Changes of biases that the base does not have."""
        base = None if adapter.dialect == self.name or adapter.layout != "reference" else base_of(adapter, options)
        modules = {} if base is None else base.by_path
        lost = [target for target in adapter.deltas if target.parameter == "bias" and (at := modules.get(target.module)) and not at.bias]
        return [f"{target}: a delta of a bias that the base does not have, which ComfyUI would pass over" for target in lost]

    def _named(
        self, adapter: Adapter, options: Mapping[str, Any], told: Parts, problems: list[str | Problem]
    ) -> tuple[dict[tuple[str, str], Delta], dict[str, Tensor]]:
        """((module as ComfyUI names it, parameter) -> delta, norm as ComfyUI names it -> weight that replaces the base's)."""
        saved: dict[str, Tensor] = {}
        if adapter.layout == "comfyui":
            for extra in adapter.extras:
                if extra.kind is ExtraKind.SAVED_MODULE:
                    saved[extra.name.removesuffix(".weight")] = extra.tensor
                elif extra.kind is not ExtraKind.TEXTUAL_INVERSION:
                    problems.append(f"{extra.kind.value} {extra.name}")
            return {(target.module, target.parameter): delta for target, delta in adapter.deltas.items()}, saved
        if adapter.layout not in ("reference", "diffusers"):
            raise untranslated(adapter, options, self.name)
        one = layout_for(adapter, options, "comfyui")
        naming = _Naming(one, base_of(adapter, options), adapter.spelling if adapter.dialect == self.name else {})
        for extra in adapter.extras:
            module = extra.name.removesuffix(".weight")
            place = one.to_foreign(module) if extra.name.endswith(".weight") and extra.kind is ExtraKind.SAVED_MODULE else None
            if place is not None and place.part.span is None and place.part.order.plain and extra.tensor.shape == place.part.shape:
                saved[naming.styled(place.foreign, module)] = extra.tensor
            elif extra.kind is not ExtraKind.TEXTUAL_INVERSION:
                problems.append(f"{extra.kind.value} {extra.name}")
        return naming.deltas(adapter.deltas, told), saved


class _Naming(NamedTuple):
    """How targets are named in a file: the layout, the base it is of, and the choices of the file they came from."""

    one: LayoutMap
    base: Base | None
    spelling: Mapping[str, str]

    def deltas(self, deltas: Mapping[Target, Delta], told: Parts) -> dict[tuple[str, str], Delta]:
        """(name, parameter) -> delta. Parts of a fused weight are joined, or named apart where that is impossible and ComfyUI reads it."""
        groups: dict[tuple[str, str], dict[Target, Delta]] = {}
        found: dict[tuple[str, str], Delta] = {}
        apart = {target: delta for target, delta in deltas.items() if self.style(target.module)[0] == "reference" and target.rows is None}
        nameless = {target: delta for target, delta in deltas.items() if target not in apart and self.one.to_foreign(target.module) is None}
        if nameless:
            to_foreign(self.one, nameless)  # which says so
        for target, delta in deltas.items():
            foreign = self.apart(target.module) if target in apart else self.one.places[target.module].foreign
            if target in apart:
                found[foreign, target.parameter] = delta
            else:
                groups.setdefault((foreign, target.parameter), {})[target] = delta
        unfit = Unfit()
        for (foreign, parameter), members in groups.items():
            first = next(iter(members))
            try:
                whole = to_foreign(self.one, members, told)[foreign]
            except RefusedError as problem:
                if parameter != "weight" or not problem.problems or not self.splits(foreign, members):
                    unfit.note(foreign, problem, problem.problems)
                    continue
                found |= {(target.module, parameter): delta for target, delta in members.items()}
            else:
                found[self.styled(foreign, first.module), parameter] = whole
        unfit.refuse()
        return found

    def splits(self, foreign: str, members: Mapping[Target, Delta]) -> bool:
        """True when ComfyUI reads these parts of a fused weight under diffusers' names."""
        family = self.base.family if self.base is not None else ""
        return (
            family in _SPLIT_FAMILIES and foreign.startswith(DENOISER) and len(members) > 1 and not any(target.rows for target in members)
        )

    def style(self, module: str) -> tuple[str, str]:
        """(layout, prefix) of the names of this module's component."""
        component = module.split(".", 1)[0]
        layout, _, prefix = self.spelling.get(f"style {module}", self.spelling.get(f"style {component}", "")).partition(" ")
        default = DENOISER if component in ("transformer", "unet") else ""
        return (layout, prefix) if layout else ("comfyui", default)

    def styled(self, foreign: str, module: str) -> str:
        """The layout's name with the prefix of the source."""
        return self.style(module)[1] + foreign[len(DENOISER) :] if foreign.startswith(DENOISER) else foreign

    def apart(self, module: str) -> str:
        """diffusers' name with the prefix of the source."""
        component, _, path = module.partition(".")
        return self.style(module)[1] + path if component in ("transformer", "unet") else module


def _note(adapter: Adapter, groups: Mapping[str, words.Group], found: Spoken | None) -> None:
    """Remember the source's free choices: prefixes, the words of factors, the form of alphas."""
    spelling = adapter.spelling
    for module, group in groups.items():
        known = None if found is None else found.names.get(module)
        if known is not None:
            one, foreign = known
            reference = one.to_reference(foreign)[0].module
            own = foreign.split(".", 1)[1] if one.name == "reference" or foreign.startswith(DENOISER) else foreign
            style = f"{one.name} {module[: len(module) - len(own)]}"
            component = reference.split(".", 1)[0]
            if spelling.setdefault(f"style {component}", style) != style:
                spelling |= {f"style {part.module}": style for part in one.to_reference(foreign)}
        if group.pair is not None:
            remember(spelling, "pair", module, group.pair)
        if "alpha" in group.roles:
            remember(spelling, "alpha", module, form_of(group.roles["alpha"]))
        if group.names.get("diff_b", "").endswith(".lora_B.bias"):
            spelling[f"bias {module}"] = "lora_B"
        if group.names.get("set_weight", "").endswith(".scale"):
            spelling[f"saved {module}"] = "scale"
        if "reshape_weight" in group.roles:
            spelling[f"reshape {module}"] = "yes"


def _pair_for(base: Base | None) -> str:
    """The spelling of a LoRA's factors where the source does not say: a name of `words.PAIRS`."""
    if base is None:
        return "ab"
    return next((pair for kind, pair in _WORDS.items() if base.name.startswith(kind) or base.family == kind), "ab")


def _control(adapter: Adapter, named: Mapping[tuple[str, str], Delta], saved: Mapping[str, Tensor]) -> bool:
    """True when this is a control adapter of FLUX, which ComfyUI and diffusers know by names without a prefix.

    There a bias is one of up, scaled with the rest, so the scale must be 1.
    """
    marks = (DENOISER + "img_in", "weight") in named and DENOISER + "single_blocks.0.norm.key_norm" in saved
    return marks and all(module.startswith(DENOISER) and delta.scale == 1.0 for (module, _), delta in named.items())


def _reshapes(
    adapter: Adapter, options: Mapping[str, Any], named: Mapping[tuple[str, str], Delta], spelling: Mapping[str, str], bare: bool
) -> dict[str, Tensor]:
    """`reshape_weight` for modules wider than in the model the adapter is loaded into (the input of control adapters): ComfyUI pads them."""
    base = base_of(adapter, options) if adapter.layout == "reference" else None
    fact = inventory.known().get(base.name) if base is not None else None
    parent = (
        inventory.load(fact.variant_of) if fact is not None and fact.variant_of is not None and fact.variant_of.startswith("flux") else None
    )
    one = find(parent, "comfyui") if parent is not None else None
    found: dict[str, Tensor] = {}
    for (module, parameter), delta in named.items():
        parts = one.to_reference(module) if one is not None else ()
        wider = len(parts) == 1 and len(delta.shape) == 2 and delta.shape[1] > parts[0].shape[1]
        if parameter == "weight" and not bare and (wider or f"reshape {module}" in spelling):
            import numpy as np

            found[f"{module}.reshape_weight"] = Tensor.of(np.array(delta.shape, dtype=np.int64))
    return found


dialect = ComfyUI()
