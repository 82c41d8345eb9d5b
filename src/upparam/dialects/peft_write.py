"""Writing PEFT: deltas on whole modules, one folder for each saved model, names and configs that PEFT loads without a key too many."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from upparam.adapter import Adapter, Extra, ExtraKind, Target
from upparam.algorithms import TITLES, called
from upparam.algorithms.base import Delta
from upparam.algorithms.lora import LoRA
from upparam.bases.base import Base
from upparam.bases.layouts import layout
from upparam.dialects import peft_config, up_bias
from upparam.dialects.base import NamedTensors
from upparam.dialects.diffusers import COMPONENTS as PIPELINE
from upparam.dialects.peft_experts import nesting_of
from upparam.dialects.peft_kinds import PEFT_TYPES, method_of, spelled
from upparam.dialects.peft_make import Model, for_saving
from upparam.dialects.peft_names import COMPONENTS, LANGUAGE, TOKENS, WRAPPER
from upparam.dialects.peft_read import SLICES_KEY, Slices, naming_of
from upparam.dialects.placing import to_foreign
from upparam.dialects.prefixes import Naming
from upparam.dialects.refusing import LOWER, because
from upparam.errors import Problem, RefusedError
from upparam.patterns import regex
from upparam.tensors import Tensor

WEIGHTS = "adapter_model.safetensors"

_PATHS = ("reference", "peft", "diffusers", "triad")
"""Layouts in which a target is the path of a module, even where no base is known."""


def whole(adapter: Adapter, base: Base | None) -> dict[Target, Delta]:
    """The adapter's deltas on whole modules: slices of a fused weight joined.

    Raises RefusedError where the names are not module paths, and where slices cannot be joined or the base is not known.
    """
    if adapter.layout not in _PATHS:
        raise RefusedError(
            "peft needs the module names of the base, and the base is not known",
            file=adapter.files[0] if adapter.files else None, found=f"names in layout {adapter.layout}", remedy="name it with --base",
        )  # fmt: skip
    if not any(target.rows for target in adapter.deltas):
        return dict(adapter.deltas)
    if base is None:
        raise RefusedError(
            "parts of fused weights are joined by the base's shapes, and the base is not known",
            file=adapter.files[0] if adapter.files else None, tensor=str(next(target for target in adapter.deltas if target.rows)),
            remedy="name it with --base",
        )  # fmt: skip
    sliced = {target.module for target in adapter.deltas if target.rows}
    parts = {target: delta for target, delta in adapter.deltas.items() if target.module in sliced}
    joined: dict[Target, Delta] = {}
    for parameter in dict.fromkeys(target.parameter for target in parts):
        own = {target: delta for target, delta in parts.items() if target.parameter == parameter}
        joined |= {Target(module, parameter=parameter): delta for module, delta in to_foreign(layout(base, "reference"), own).items()}
    return joined | {target: delta for target, delta in adapter.deltas.items() if target not in parts}


def by_component(adapter: Adapter, deltas: Mapping[Target, Delta], base: Base | None) -> dict[str, dict[Target, Delta]]:
    """The deltas, as `whole` gives them, of each component of a pipeline; all under '' where the base is a lone network."""
    heads = {target.module.split(".", 1)[0] for target in deltas} | {extra.name.split(".", 1)[0] for extra in adapter.extras}
    components = heads & set(COMPONENTS)
    if adapter.layout == "peft":  # no base is known: what lay in a component's folder is the component's
        components = {component for component in components if f"config:{component}" in adapter.spelling}
    elif "transformer" in components and not _in_a_pipeline(adapter, deltas, base):
        components.discard("transformer")
    found: dict[str, dict[Target, Delta]] = {}
    for target, delta in deltas.items():
        head = target.module.split(".", 1)[0]
        found.setdefault(head if head in components else "", {})[target] = delta
    return found


_BLOCKS = regex(
    r"transformer\.(\w+_)?transformer_blocks\..*|transformer\.(blocks|noise_refiner|context_refiner|(double|single)_stream_blocks)\..*"
)
"""How diffusers calls the blocks of its transformers; `transformer.layers`, as Z-Image and Lumina 2 have as well, may be anything."""


def _in_a_pipeline(adapter: Adapter, deltas: Iterable[Target], base: Base | None) -> bool:
    """Whether `transformer.` is a pipeline's component and not part of a network's own names: by the base, who named them, or the names."""
    if any(LANGUAGE.fullmatch(target.module) for target in deltas):
        return False
    if base is not None and base.family:
        return all(module.path.split(".", 1)[0] in PIPELINE and not LANGUAGE.fullmatch(module.path) for module in base.modules)
    return adapter.dialect == "diffusers" or any(_BLOCKS.fullmatch(target.module) for target in deltas)


def outside(parts: Iterable[str], extras: Iterable[Extra]) -> list[str]:
    """Extras of components in which no module has factors, and those of none where there are several: PEFT saves no folder for them."""
    own = tuple(f"{part}." for part in parts if part)
    lost = [extra for extra in extras if own and not extra.name.startswith(own)]
    kinds = (ExtraKind.SAVED_MODULE, ExtraKind.BIAS)
    return [f"{extra.kind.value} {extra.name}" for extra in lost if extra.kind in kinds or len(own) > 1]


@dataclass
class Saved:
    """One model as PEFT saves it: tensors by name, its config, and what could not be held."""

    tensors: dict[str, Tensor]
    config: Mapping[str, object]
    slices: Slices
    problems: list[str | Problem]

    def files(self, metadata: Mapping[str, str]) -> dict[str, NamedTensors | bytes]:
        """The two files of the folder."""
        header = {"format": "pt", **metadata}
        if self.slices:
            header[SLICES_KEY] = json.dumps(self.slices, separators=(",", ":"))
        text = json.dumps(self.config, indent=2, ensure_ascii=False) + "\n"
        return {WEIGHTS: NamedTensors(self.tensors, header), peft_config.FILE: text.encode()}


def saved(adapter: Adapter, deltas: Mapping[Target, Delta], component: str, base: Base | None, *, alone: bool) -> Saved:
    """One component of the adapter ('' for that of a lone network), under PEFT's names: those it came with, else without the component."""
    naming = naming_of(adapter, "" if alone else component) or Naming(add=f"{component}." if component else "")
    tensors: dict[str, Tensor] = {}
    names: dict[str, Delta] = {}
    biases = up_bias.taken(deltas)
    problems: list[str | Problem] = []
    tensors |= {f"{WRAPPER}{naming.back(module)}.{up_bias.WORD}": delta.factors()["diff"] for module, delta in biases.items()}
    others = {target: delta for target, delta in deltas.items() if target.parameter != "bias" or target.module not in biases}
    bare = [target for target in others if target.parameter != "weight"]
    for target, delta in others.items():
        module = naming.back(target.module)
        wrapper = module + nesting_of(target, bare) if target in bare else module
        known = base.by_path.get(target.module) if base is not None else None
        try:
            tensors |= {f"{WRAPPER}{wrapper}.{word}": tensor for word, tensor in spelled(target, delta, known).items()}
            delta.known_scale()
        except RefusedError as problem:
            problems.append(because(str(target), problem))
            continue
        names[f"{module}.{target.parameter}" if target in bare else module] = delta
    extras = [replace(extra, name=naming.back(extra.name)) for extra in adapter.extras if alone or extra.name.startswith(f"{component}.")]
    for extra in extras:
        if extra.kind not in (ExtraKind.SAVED_MODULE, ExtraKind.BIAS, ExtraKind.TRAINING_AID) and not extra.name.endswith(TOKENS):
            problems.append(f"{extra.kind.value} {extra.name}")
            continue
        module, _, leaf = extra.name.rpartition(".")
        if extra.kind is ExtraKind.TRAINING_AID:
            rank = next((delta.rank for name, delta in names.items() if extra.name.startswith(f"{name}.lora_")), None)
            if extra.name.endswith(("std_prior", "gaussian_var_prior")) and rank not in (None, extra.tensor.shape[0]):
                problems.append(f"{extra.kind.value} {extra.name}: made for rank {extra.tensor.shape[0]}, where the factors have {rank}")
            tensors[f"{WRAPPER}{extra.name}"] = extra.tensor
            continue
        tensors[f"{WRAPPER}{module}.base_layer.{leaf}" if module in names else f"{WRAPPER}{extra.name}"] = extra.tensor
    if problems:
        return Saved({}, {}, {}, problems)
    if unfit := _mixed(others) or up_bias.unfit(biases, deltas, "PEFT"):
        return Saved({}, {}, {}, [*unfit])
    try:
        method = method_of(next(iter(names.values())))
        tensors |= method.shared(names) if method is not None else {}
        config = for_saving(adapter, component, Model(names, extras, _renamed(base, component, naming), bool(biases)))
    except RefusedError as problem:
        return Saved({}, {}, {}, [because(component or "the adapter", problem)._replace(targets=tuple(others))])
    return Saved(tensors, config, _slices(adapter, others, naming), [])


def _mixed(deltas: Mapping[Target, Delta]) -> list[Problem]:
    """Where the deltas are of several algorithms that PEFT does not hold in one adapter: those that would have to be plain LoRA."""
    kinds = {(PEFT_TYPES[delta.algorithm], delta.algorithm == "dora") for delta in deltas.values()}
    if len(kinds) < 2:
        return []
    counts = Counter(delta.algorithm for delta in deltas.values())
    why = f"PEFT has one algorithm for all modules of an adapter, and here are {', '.join(f'{count} {TITLES[kind]}' for kind, count in counts.items())}"
    return [
        Problem(str(target), f"{called(delta.algorithm)}; {why}", (target,), LOWER)
        for target, delta in deltas.items() if delta.algorithm not in ("lora", "expert-lora")
    ]  # fmt: skip


def _renamed(base: Base | None, component: str, naming: Naming) -> Base | None:
    """The base's modules of one component, as PEFT names them."""
    if base is None:
        return None
    prefix = naming.add or (f"{component}." if component else "")
    own = [module for module in base.modules if module.path.startswith(prefix)]
    return replace(base, modules=tuple(module._replace(path=naming.back(module.path)) for module in own))


def _slices(adapter: Adapter, joined: Mapping[Target, Delta], naming: Naming) -> Slices:
    """How the joined modules were made, so that reading gives the slices back bit for bit."""
    found: Slices = {}
    for target, delta in adapter.deltas.items():
        if target.rows is not None and type(delta) is LoRA and Target(target.module) in joined:
            found.setdefault(target.module, []).append([*target.rows, 0, delta.rank, delta.alpha])
    for target, delta in joined.items():
        pieces = found.get(target.module, [])
        if pieces and delta.rank == sum(int(piece[3] or 0) for piece in pieces) and len(pieces) > 1:
            at = 0
            for piece in sorted(pieces, key=lambda piece: piece[0] or 0):
                piece[2:4] = [at, at + int(piece[3] or 0)]
                at = int(piece[3] or 0)
    return {naming.back(module): pieces for module, pieces in found.items()}
