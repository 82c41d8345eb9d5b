"""diffusers: what `save_lora_weights` writes. `unet.<module>.lora_A.weight`, text encoders `<module>.lora_linear_layer.down.weight`.

Sources: huggingface/diffusers src/diffusers/loaders/lora_base.py (save and metadata), utils/state_dict_utils.py (the forms of one factor
pair over the years), utils/peft_utils.py. Without metadata every scale is 1; `lora_adapter_metadata` in the header holds PEFT's config
values per component (`transformer.r`, `transformer.lora_alpha`, patterns). Module names are the reference names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from upparam.adapter import Adapter, Extra, ExtraKind, Target
from upparam.algorithms import called
from upparam.algorithms.base import Delta, ScaleRule, Scaling
from upparam.algorithms.dora import DoRA
from upparam.algorithms.lora import LoRA
from upparam.bases.base import with_text_model
from upparam.containers.base import TensorFile
from upparam.dialects import diffusers_header as header
from upparam.dialects import up_bias
from upparam.dialects.base import Bundle, Match, NamedTensors, Package, ReadOptions
from upparam.dialects.carried import ADAPTER_CONFIG, carried
from upparam.dialects.diffusers_header import CLIP
from upparam.dialects.peft_magnitude import decomposed, magnitude_of
from upparam.dialects.peft_names import LANGUAGE
from upparam.dialects.placing import layout_for, refuse_parameters, resolve, to_foreign, to_targets
from upparam.dialects.refusing import refuse
from upparam.dialects.spelling import chosen, form_of, remember
from upparam.dialects.words import alpha_for, alpha_tensor
from upparam.dtypes import DTYPES
from upparam.errors import DeadAdapterError, MalformedError, Problem, RefusedError
from upparam.findings import error, warning
from upparam.patterns import regex
from upparam.tensors import Tensor

COMPONENTS = ("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3", "prior", "text_conditioner")
_BARE = regex(r"(down_blocks|mid_block|up_blocks|transformer_blocks|single_transformer_blocks)\.")


class Form(NamedTuple):
    """One spelling of a factor pair."""

    down: str
    up: str


FORMS: dict[str, Form] = {
    "peft": Form("lora_A.weight", "lora_B.weight"),
    "linear": Form("lora.down.weight", "lora.up.weight"),
    "text": Form("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
    "kohya": Form("lora_down.weight", "lora_up.weight"),
}
"""`linear` and `text` until 2023, `peft` since; `kohya` words under diffusers names are what several trainers write."""
_WITH_PEFT = {up_bias.WORD: "bias", "lora_magnitude_vector.weight": "magnitude", "lora_magnitude_vector": "magnitude"}
"""What PEFT writes beside its factors: the bias of up (`lora_bias`), the magnitude of DoRA, one number a row."""
_ENDINGS = {ending: (form, role) for form, pair in FORMS.items() for ending, role in ((pair.down, "down"), (pair.up, "up"))}
_ENDINGS |= {ending: ("peft", role) for ending, role in _WITH_PEFT.items()}
_NORM = regex(r"(transformer\..+\.norm_(?:added_)?[qk])\.weight")
"""Norms whose weights FLUX's control adapters replace (loaders/lora_pipeline.py `_control_lora_supported_norm_keys`)."""
_ENDING = regex(r"(.+)\.(" + "|".join(re.escape(ending) for ending in (*_ENDINGS, "alpha")) + ")")


class Pair(NamedTuple):
    """The tensors of one module: its name in the file, the form, and up, down and alpha where they are there."""

    form: str
    tensors: dict[str, Tensor]


def pairs(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Pair], dict[str, Tensor]]:
    """(factors by module as the file names it, tensors in no form)."""
    found: dict[str, Pair] = {}
    rest: dict[str, Tensor] = {}
    alphas: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = _ENDING.fullmatch(name)
        if match is None:
            rest[name] = tensor
        elif match.group(2) == "alpha":
            alphas[match.group(1)] = tensor
        else:
            form, role = _ENDINGS[match.group(2)]
            pair = found.setdefault(match.group(1), Pair(form, {}))
            if pair.form == form and role not in pair.tensors:
                pair.tensors[role] = tensor
            else:
                rest[name] = tensor
    for module, alpha in alphas.items():
        if module in found:
            found[module].tensors["alpha"] = alpha
        else:
            rest[f"{module}.alpha"] = alpha
    return found, rest


def with_component(module: str) -> tuple[str, str]:
    """(component, module with the component in front); a name without one is of the UNet or transformer its blocks belong to."""
    first = module.split(".", 1)[0]
    if first in COMPONENTS:
        return first, module
    component = "unet" if first in ("down_blocks", "mid_block", "up_blocks", "conv_in", "conv_out", "time_embedding") else "transformer"
    return component, f"{component}.{module}"


class Diffusers:
    """The current dialect and the lora-linear one before it."""

    name = "diffusers"
    title = "diffusers (save_lora_weights)"
    writable = True
    algorithms = ("lora", "dora", "full")

    def match(self, file: TensorFile) -> Match | None:
        """The share of names that are a component (or one of its blocks), a dotted path and a factor's ending."""
        hits = named = 0
        roles = set()
        for name in file.tensors:
            found = _ENDING.fullmatch(name)
            if found is not None:
                roles.add(_ENDINGS.get(found.group(2), ("", ""))[1])
            else:
                found = _NORM.fullmatch(name)
            if found is None:
                continue
            if found.group(1).split(".", 1)[0] in COMPONENTS:
                if LANGUAGE.fullmatch(found.group(1)):
                    continue
                named += 1
                hits += 1
            elif _BARE.match(name):
                hits += 1
        if not hits:
            return None
        evidence = [f"{hits} of {len(file.tensors)} names are <component>.<module>.<lora_A|lora.down|lora_linear_layer...>"]
        if ADAPTER_CONFIG in file.metadata:
            evidence.append(f"metadata {ADAPTER_CONFIG}")
        sure = 0.95 if named else 0.7
        # One half alone may be a triad's file, and what a GGUF says of itself goes first.
        alone = named == len(file.tensors) and roles >= {"up", "down"} and file.container != "gguf"
        return Match(self.name, round(sure * hits / len(file.tensors), 3), tuple(evidence), alone)

    def gather(self, file: TensorFile, siblings: Sequence[TensorFile]) -> list[TensorFile]:
        """One file is one adapter."""
        return [file]

    def read(self, bundle: Bundle, options: ReadOptions) -> Adapter:
        """The adapter. Raises MalformedError where the header's adapter metadata is not what diffusers writes."""
        file = bundle.main
        found, leftovers = pairs(file.tensors)
        config = header.config_of(file)
        adapter = Adapter(
            {}, self.name, metadata=dict(file.metadata), files=(str(file.path),), leftovers=leftovers, findings=list(file.findings)
        )
        deltas: dict[str, Delta] = {}
        biases: dict[str, Tensor] = {}
        for module, (form, tensors) in found.items():
            component, named = with_component(module)
            path = with_text_model(named)
            if "up" not in tensors or "down" not in tensors or path in deltas:
                give_back(adapter, module, form, tensors)
                continue
            deltas[path] = _lora(file, path, tensors, _scaling(path, component, tensors, config))
            _note(adapter.spelling, module, named, form, tensors)
            if "bias" in tensors:
                biases[path] = tensors["bias"]
        settle(adapter, deltas, file, options)
        _take_beside(adapter, biases)
        header.hold_against(config, adapter, deltas, file.name)
        return adapter

    def restated(self, adapter: Adapter, before: Adapter | None) -> Adapter:
        """The adapter without the config its header brought, which would give layers their old ranks; a new one is written."""
        return replace(adapter, metadata={key: value for key, value in adapter.metadata.items() if key != ADAPTER_CONFIG})

    def write(self, adapter: Adapter, options: Mapping[str, Any]) -> Package:
        """A folder with `pytorch_lora_weights.safetensors`. Raises RefusedError for extras and for deltas diffusers does not load."""
        deltas = reference_deltas(adapter, options, self.name)
        spelling = adapter.spelling if adapter.dialect == self.name else {}
        norms = {
            extra.name: extra.tensor for extra in adapter.extras if extra.kind is ExtraKind.SAVED_MODULE and _NORM.fullmatch(extra.name)
        }
        problems: list[str | Problem] = [f"{extra.kind.value} {extra.name}" for extra in adapter.extras if extra.name not in norms]
        biases = up_bias.taken(deltas)
        tensors: dict[str, Tensor] = dict(norms)
        stored: dict[str, Delta] = {}
        problems += _mixed(deltas)
        for target, delta in deltas.items():
            if target.module in biases and target.parameter == "bias":
                continue
            problem = unwritable(target, delta)
            if problem is not None:
                problems.append(f"{target}: {problem}")
                continue
            assert isinstance(delta, (LoRA, DoRA))
            form = "peft" if target.module in biases else _form(spelling, target.module)
            module = _spelled(spelling, target.module)
            tensors[f"{module}.{FORMS[form].down}"], tensors[f"{module}.{FORMS[form].up}"] = delta.down, delta.up
            tensors |= {f"{module}.{word}": its for word, its in magnitude_of(delta, kernel=len(delta.down.shape) - 2).items()}
            if target.module in biases:
                tensors[f"{module}.{up_bias.WORD}"] = biases[target.module].factors()["diff"]
            if f"alpha {target.module}" in spelling or "alpha" in spelling:
                alpha = alpha_for(delta)
                if alpha is not None:
                    tensors[f"{module}.alpha"] = _alpha(spelling, target.module, alpha, delta)
                    continue
            stored[target.module] = delta
        refuse(self.name, problems or _unfit_biases(biases, deltas))
        metadata = {"format": "pt", **carried(adapter, self.name, config=True)}
        config = header.written(stored, set(biases))
        if not header.still_says(adapter.metadata.get(ADAPTER_CONFIG), stored):
            metadata.pop(ADAPTER_CONFIG, None)
            if config:
                metadata[ADAPTER_CONFIG] = json.dumps(config, indent=2, sort_keys=True)
        return Package({"pytorch_lora_weights.safetensors": NamedTensors(tensors, metadata)})


def _take_beside(adapter: Adapter, biases: Mapping[str, Tensor]) -> None:
    """Biases of up as deltas of the base's biases, and the weights of norms as what replaces the base's."""
    for path, bias in biases.items():
        beside = up_bias.change_of(adapter.deltas.get(Target(path)), bias)
        if beside is not None:
            adapter.deltas[Target(path, parameter="bias")] = beside
        else:
            adapter.leftovers[f"{path}.{up_bias.WORD}"] = bias
            adapter.findings.append(
                error(
                    "lora-bias", path, "a bias of lora_B beside no plain LoRA of as many outputs, where diffusers has none", f"{bias.shape}"
                )
            )
    for name in list(adapter.leftovers):
        found = _NORM.fullmatch(name)
        if found is not None and len(adapter.leftovers[name].shape) == 1:
            adapter.extras.append(Extra(ExtraKind.SAVED_MODULE, name, adapter.leftovers.pop(name)))


def _lora(file: TensorFile, module: str, tensors: Mapping[str, Tensor], scaling: Scaling) -> LoRA | DoRA:
    try:
        return decomposed(LoRA(tensors["up"], tensors["down"], scaling), tensors.get("magnitude"))
    except MalformedError as problem:
        raise MalformedError(problem.message, file=file.path, tensor=module, expected=problem.expected, found=problem.found) from None


def give_back(adapter: Adapter, module: str, form: str, tensors: Mapping[str, Tensor]) -> None:
    """Put a module without one of its factors, or named a second time, among the leftovers, with a finding."""
    for role, tensor in tensors.items():
        ending = (
            getattr(FORMS[form], role) if role in Form._fields else next((word for word, its in _WITH_PEFT.items() if its == role), role)
        )
        adapter.leftovers[f"{module}.{ending}"] = tensor
    if "up" in tensors and "down" in tensors:
        adapter.findings.append(error("named-twice", module, "another name in the file means the same module"))
    else:
        adapter.findings.append(error("orphan", module, "a factor without its partner: the module cannot be applied", ", ".join(tensors)))


def settle(adapter: Adapter, deltas: Mapping[str, Delta], file: TensorFile, options: ReadOptions) -> None:
    """Name the base and put each delta under its target. Raises DeadAdapterError when no module has both factors."""
    if not deltas:
        raise DeadAdapterError("no module has both its up and its down factor", file=file.path, found=", ".join(list(file.tensors)[:3]))
    found = resolve({path: delta.shape for path, delta in deltas.items()}, ("reference",), options.base)
    adapter.base = None if found is None else found.hint
    adapter.layout = "diffusers" if found is None else "reference"
    for path, delta in deltas.items():
        if found is None:
            adapter.deltas[Target(path)] = delta
        elif path in found.names:
            adapter.deltas |= to_targets(found.layout, found.names[path], delta)
        else:
            # diffusers' names are the reference names: nothing is lost by keeping one that this base does not have.
            adapter.deltas[Target(path)] = delta
            adapter.findings.append(
                warning("unknown-module", path, f"{found.layout.base.name} has no such module of this shape", f"{delta.shape}")
            )


def _scaling(path: str, component: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Scaling:
    """What is stored about a module's scale: an alpha tensor, else the component's config, else nothing (scale 1)."""
    if "alpha" in tensors:
        return Scaling(ScaleRule.ALPHA_OVER_RANK, tensors["alpha"].scalar())
    return header.scaling_of(config, component, path[len(component) + 1 :], next(iter(tensors["down"].shape), 0))


def _note(spelling: dict[str, str], module: str, named: str, form: str, tensors: Mapping[str, Tensor]) -> None:
    """Remember how the module was spelled; `named` is its name with the component in front."""
    if module != named:
        spelling["bare"] = named[: len(named) - len(module)]
    path = with_text_model(named)
    if named.startswith("text_encoder"):
        remember(spelling, f"clip of {named.split('.', 1)[0]}", path, "text_model" if path == named else "bare")
    key = _kind(path)
    if spelling.setdefault(key, form) != form:
        spelling[f"form {path}"] = form
    if "alpha" in tensors:
        remember(spelling, "alpha", path, form_of(tensors["alpha"]))


def _kind(path: str) -> str:
    """Component and the module's own name without numbers: modules alike in both are spelled alike."""
    words = [word for word in path.split(".") if not word.isdigit()]
    return f"form of {words[0]} {words[-1]}"


def _form(spelling: Mapping[str, str], path: str) -> str:
    default = "text" if path.startswith("text_encoder") else "peft"
    return spelling.get(f"form {path}", spelling.get(_kind(path), default))


def _spelled(spelling: Mapping[str, str], path: str) -> str:
    """The module's name as the file had it: without its component, without `text_model.`."""
    component = path.split(".", 1)[0]
    if chosen(spelling, f"clip of {component}", path) == "bare":
        path = f"{component}.{path.removeprefix(f'{component}.').removeprefix(CLIP)}"
    return path.removeprefix(spelling.get("bare", "\0"))


def _alpha(spelling: Mapping[str, str], path: str, value: float, delta: LoRA | DoRA) -> Tensor:
    dtype, dims = spelling.get(f"alpha {path}", spelling.get("alpha", "float32 0")).split()
    return alpha_tensor(value, DTYPES[dtype], delta.up.dtype, int(dims))


def reference_deltas(adapter: Adapter, options: Mapping[str, Any], dialect: str) -> dict[Target, Delta]:
    """The adapter's deltas under whole reference modules: slices of a fused weight joined. Raises RefusedError where names are others."""
    if adapter.layout not in ("reference", "diffusers"):
        refuse_parameters(adapter, dialect)
        raise RefusedError(
            f"{dialect} needs the module names of the base, and the base is not known",
            file=adapter.files[0] if adapter.files else None, found=f"names in layout {adapter.layout}", remedy="name it with --base",
        )  # fmt: skip
    if not any(target.rows for target in adapter.deltas):
        return adapter.deltas
    one = layout_for(adapter, options, "reference")
    found: dict[Target, Delta] = {}
    for parameter in dict.fromkeys(target.parameter for target in adapter.deltas):
        own = {target: delta for target, delta in adapter.deltas.items() if target.parameter == parameter}
        found |= {Target(module, parameter=parameter): delta for module, delta in to_foreign(one, own).items()}
    return found


def unwritable(target: Target, delta: Delta) -> str | None:
    """Why diffusers would not load this delta of a weight; None when it does."""
    if type(delta) is not DoRA:
        return unloadable(target, delta)
    if not delta.per_row:
        return "a DoRA with a norm for each input, where diffusers has one for each output"
    return unloadable(target, delta.direction)


def _mixed(deltas: Mapping[Target, Delta]) -> list[str]:
    """Components of which only some modules have a magnitude: diffusers' loader expects one in all of them or in none."""
    found = []
    for component, own in _by_component(deltas).items():
        plain = [target for target, delta in own.items() if target.parameter == "weight" and type(delta) is not DoRA]
        if plain and any(type(delta) is DoRA for delta in own.values()):
            found.append(f"{plain[0]}: no DoRA, where diffusers has one in every module of the {component} or in none")
    return found


def _unfit_biases(biases: Mapping[str, Delta], deltas: Mapping[Target, Delta]) -> list[str | Problem]:
    """Why these cannot be biases of up; every component has a setting of its own."""
    return [
        problem for component, own in _by_component(deltas).items()
        for problem in up_bias.unfit({module: bias for module, bias in biases.items() if Target(module, parameter="bias") in own}, own, f"diffusers in the {component}")
    ]  # fmt: skip


def _by_component(deltas: Mapping[Target, Delta]) -> dict[str, dict[Target, Delta]]:
    found: dict[str, dict[Target, Delta]] = {}
    for target, delta in deltas.items():
        found.setdefault(target.module.split(".", 1)[0], {})[target] = delta
    return found


def unloadable(target: Target, delta: Delta) -> str | None:
    """Why diffusers would not load this delta; None when it does."""
    if target.parameter != "weight":
        return f"a delta of the {target.parameter}"
    if type(delta) is not LoRA or delta.embedding:
        return f"{called(delta.algorithm)} delta" + (" of an embedding" if getattr(delta, "embedding", False) else "")
    if delta.mid is not None:
        return "a Tucker core"
    if ".SelfAttention." in target.module or ".DenseReluDense." in target.module:
        return "a T5 encoder, which diffusers loads no LoRA into"
    if re.match(r"text_encoder(_\d)?\.layers\.", target.module):
        return "a language model as text encoder, which diffusers loads no LoRA into"
    own = target.module.split(".", 1)[0] in COMPONENTS and not LANGUAGE.fullmatch(target.module)
    return None if own else "not a module of a pipeline's component"


dialect = Diffusers()
