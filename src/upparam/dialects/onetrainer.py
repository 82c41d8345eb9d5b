"""OneTrainer: `lora_transformer_transformer_blocks_0_attn_to_q.lora_up.weight`, diffusers' names with kohya's words, and its OMI form.

OMI names modules as their authors do and numbers the parts of fused weights: `transformer.double_blocks.0.img_attn.qkv.0.lora_up.weight`.
Sources: Nerogar/OneTrainer modules/util/convert_lora_util.py (convert_to_mixture, kohya_flatten); until 2026
modules/util/convert/lora/convert_lora_util.py and convert_*_lora.py; modules/modelSaver/flux/FluxLoRASaver.py (bundle_emb).
What OneTrainer writes for UNets is kohya's form, and its newer choices are those of kohya, diffusers and ComfyUI.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from upparam.adapter import Adapter, BaseHint, ExtraKind
from upparam.algorithms import called
from upparam.algorithms.base import Delta
from upparam.bases import inventory
from upparam.bases.base import Base
from upparam.bases.layouts import LayoutMap, find
from upparam.bases.recognise import recognise
from upparam.containers.base import TensorFile
from upparam.dialects import comfyui_words as words
from upparam.dialects import placing
from upparam.dialects.base import Bundle, Match, NamedTensors, Package, ReadOptions
from upparam.dialects.carried import carried
from upparam.dialects.placing import PARTS_KEY, Parts, Shape, alike, layout_for, named, untranslated
from upparam.dialects.refusing import because, refuse
from upparam.dialects.spelling import alpha_of, form_of, note_prefixes, remember, respelled
from upparam.dialects.spoken import Named, Spoken, heard
from upparam.dialects.tokens import bundle_name
from upparam.errors import Problem, RefusedError
from upparam.patterns import regex

_OWN = regex(r"lora_transformer_[A-Za-z0-9_\-]+")
_TEXT = regex(r"lora_te\d?_[A-Za-z0-9_\-]+")
_OMI = regex(
    r"transformer\.((double_blocks|single_blocks)\.\d+|img_in|txt_in|time_in|vector_in|guidance_in|final_layer|distilled_guidance_layer)\.|"
    r"unet\.(input_blocks|middle_block|output_blocks|time_embed|label_emb|out)\.|(clip_l|clip_g)\.text_|t5\.encoder\."
)
_ALIASES = (("lora_te_", "lora_te1_"), ("lora_te3_", "lora_te2_"))
"""Chroma's T5 was `lora_te`; T5 of FLUX is `lora_te3` to others."""
_UNKNOWN = "no base that upparam knows has all these modules in these shapes; name it with --base"
_OMI_BASES = ("flux.1-dev", "chroma", "sdxl")


class OneTrainer:
    """The dialect."""

    name = "onetrainer"
    title = "OneTrainer (its own and its OMI names)"
    writable = True
    algorithms = ("lora", "dora", "loha", "doha", "lokr", "dokr", "full")

    def match(self, file: TensorFile) -> Match | None:
        """The share of names that are `lora_transformer_<module>` or OMI's, with the text encoders and tokens beside them."""
        if not any(name.startswith("lora_transformer_") or _OMI.match(name) for name in file.tensors):
            return None
        own = text = omi = tokens = 0
        for name in file.tensors:
            found = words.split(name)
            own += found is not None and _OWN.fullmatch(found[0]) is not None
            text += found is not None and _TEXT.fullmatch(found[0]) is not None
            omi += found is not None and _OMI.match(name) is not None
            tokens += name.startswith("bundle_emb.")
        if not own and not omi:
            return None
        share = (max(own + text, omi) + tokens) / len(file.tensors)
        form = "lora_transformer_<module> and lora_te<n>_<module>" if own else "the authors' modules, parts of fused ones numbered"
        return Match(
            self.name, round(0.98 * share, 3), (f"{share:.0%} of {len(file.tensors)} names are {form}, as OneTrainer writes them",)
        )

    def gather(self, file: TensorFile, siblings: Sequence[TensorFile]) -> list[TensorFile]:
        """One file is one adapter."""
        return [file]

    def read(self, bundle: Bundle, options: ReadOptions) -> Adapter:
        """The adapter; modules in reference names where a base has them all, else as the file names them (layout 'onetrainer')."""
        file = bundle.main
        groups, rest = words.grouped(file.tensors)
        adapter, found = heard(file, self.name, groups, rest, partial(_resolve, base=options.base), _UNKNOWN)
        _note(adapter, groups, found)
        return adapter

    def write(self, adapter: Adapter, options: Mapping[str, Any]) -> Package:
        """One safetensors file in OneTrainer's own form, or as the source was. Raises RefusedError for what has no words or names there."""
        told: Parts = {}
        spelling = adapter.spelling if adapter.dialect == self.name else {}
        deltas = self._named(adapter, options, spelling, told)
        problems: list[str | Problem] = [
            f"{extra.kind.value} {extra.name}" for extra in adapter.extras if extra.kind is not ExtraKind.TEXTUAL_INVERSION
        ]
        tensors = {bundle_name(extra.name): extra.tensor for extra in adapter.extras if extra.kind is ExtraKind.TEXTUAL_INVERSION}
        for (module, parameter), delta in deltas.items():
            if parameter != "weight":
                problems.append(f"{module}: a delta of the {parameter}")
                continue
            if delta.algorithm not in self.algorithms:
                problems.append(f"{module}: {called(delta.algorithm)} delta")
                continue
            try:
                factors = words.spell(delta, "kohya")
                alpha = words.stored_alpha(delta)
            except RefusedError as problem:
                problems.append(because(module, problem))
                continue
            if alpha is None and adapter.dialect != self.name and delta.algorithm != "full":
                # Its own files always have one; versions before 2026 take an absent one for that of their settings.
                alpha = delta.rank
            tensors |= {f"{module}.{word}": tensor for word, tensor in factors.items()}
            if alpha is not None:
                tensors[f"{module}.alpha"] = alpha_of(spelling, module, alpha, next(iter(factors.values())).dtype)
        refuse(self.name, problems)
        metadata = carried(adapter, self.name)
        if told:
            metadata[PARTS_KEY] = json.dumps(told, separators=(",", ":"))
        return Package({"lora.safetensors": NamedTensors(tensors, metadata)}, folder=False)

    def _named(
        self, adapter: Adapter, options: Mapping[str, Any], spelling: Mapping[str, str], told: Parts
    ) -> dict[tuple[str, str], Delta]:
        """(module as OneTrainer names it, parameter) -> delta."""
        if adapter.layout == "onetrainer":
            return {(target.module, target.parameter): delta for target, delta in adapter.deltas.items()}
        if adapter.layout not in ("reference", "diffusers"):
            raise untranslated(adapter, options, self.name)
        one = layout_for(adapter, options, str(options.get("layout") or spelling.get("layout", "onetrainer")))
        return {
            (respelled(foreign, spelling), parameter): delta for (foreign, parameter), delta in named(one, adapter.deltas, told).items()
        }


def _resolve(shapes: Mapping[str, Shape], base: Base | None) -> Spoken | None:
    """The base and layout that explain these names; without a named base only one that explains them all."""
    if any(name.startswith("lora_") for name in shapes):
        found = placing.resolve(shapes, ("onetrainer", "kohya-diffusers"), base, underscored=True, aliases=_ALIASES)
        if found is None or (base is None and len(found.names) < len(shapes)):
            return None
        names: dict[str, Named] = {module: (found.layout, own) for module, own in found.names.items()}
        return Spoken(found.layout.base, found.hint, names, lambda name: None)
    for candidate in [base] if base is not None else map(inventory.load, _OMI_BASES):
        one = find(candidate, "omi")
        names = {} if one is None else {name: (one, name) for name, shape in shapes.items() if _fits(one, name, shape)}
        if one is not None and names and (base is not None or len(names) == len(shapes)):
            return Spoken(candidate, _hint(candidate, one, names, base is not None), names, partial(_located, one))
    return None


def _fits(one: LayoutMap, name: str, shape: Shape) -> bool:
    parts = one.to_reference(name)
    return bool(parts) and alike(shape, (one.rows(name), *parts[0].shape[1:]))


def _located(one: LayoutMap, name: str) -> Named | None:
    return (one, name) if one.to_reference(name) else None


def _hint(base: Base, one: LayoutMap, names: Mapping[str, Named], named: bool) -> BaseHint:
    """What the recogniser says of these modules in reference names, where it is this base or a look-alike of it."""
    if named:
        return BaseHint(base.name, 1.0, ("named by the user", *base.evidence), True)
    parts = [one.to_reference(name)[0] for name in names]
    for hint in recognise({part.module: part.shape for part in parts}):
        if hint.name == base.name:
            return hint
    return BaseHint(base.name, 0.5, (f"all {len(names)} targets fit in name and shape",))


def _note(adapter: Adapter, groups: Mapping[str, words.Group], found: Spoken | None) -> None:
    """Remember the source's form, prefixes and alphas."""
    spelling = adapter.spelling
    for module, group in groups.items():
        known = None if found is None else found.names.get(module)
        if known is not None:
            placing.note_layout(spelling, known[0])
            note_prefixes(spelling, [(module, known[1])], _ALIASES)
        if "alpha" in group.roles:
            remember(spelling, "alpha", module, form_of(group.roles["alpha"]))


dialect = OneTrainer()
