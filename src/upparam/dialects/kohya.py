"""kohya: what sd-scripts and the web UIs exchange. One file, `lora_unet_down_blocks_0_...to_q.lora_up.weight`, alpha per module.

Sources: kohya-ss/sd-scripts networks/lora.py, networks/lora_flux.py, networks/lora_sd3.py; scale alpha / rank, absent alpha = rank.
SD 1 and 2 use diffusers' block names, later models those of their authors; both, and the prefixes other trainers use, are read.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from upparam.adapter import Adapter, ExtraKind, Target
from upparam.algorithms.base import Delta
from upparam.containers.base import TensorFile
from upparam.dialects import kohya_metadata, words
from upparam.dialects.base import Bundle, Match, NamedTensors, Package, ReadOptions
from upparam.dialects.placing import (
    PARTS_KEY,
    Parts,
    Resolved,
    Shape,
    base_of,
    layout_for,
    named,
    note_layout,
    resolve,
    take_parts,
    to_targets,
    untranslated,
)
from upparam.dialects.refusing import because, out_of_order, refuse
from upparam.dialects.spelling import alpha_of, form_of, note_prefixes, remember, respelled
from upparam.dialects.tokens import bundle_name, bundled
from upparam.errors import DeadAdapterError, MalformedError, Problem, RefusedError
from upparam.findings import Finding, error, warning
from upparam.patterns import regex
from upparam.tensors import Tensor

MODULE = regex(r"(lora_(unet|te[123]?|transformer|prior_unet|text_encoder(_2)?)|lycoris)_[A-Za-z0-9_\-]+")
"""How names of modules begin: a component's prefix, or LyCORIS' own, which stands for any."""
_LAYOUTS = ("kohya", "kohya-diffusers", "kohya-original")
_ALIASES = (
    ("lora_te1_", "lora_te_"),
    ("lora_te_", "lora_te1_"),
    ("lora_te2_", "lora_te3_"),
    ("lora_transformer_", "lora_unet_"),
    ("lora_prior_unet_", "lora_unet_"),
    ("lora_text_encoder_2_", "lora_te2_"),
    ("lora_text_encoder_", "lora_te_"),
    ("lora_text_encoder_", "lora_te1_"),
    ("lycoris_", "lora_unet_"),
    ("lycoris_", "lora_te_"),
    ("lycoris_", "lora_te1_"),
    ("lora_unet_", "lycoris_"),  # of a denoiser that lies by itself, outside its pipeline
)
"""Prefixes other writers use, and sd-scripts' own in their place."""


class Kohya:
    """The dialect; `LyCORIS` widens its words."""

    name = "kohya"
    title = "kohya / sd-scripts"
    writable = True
    algorithms: tuple[str, ...] = ("lora",)
    module = "networks.lora"
    """What `ss_network_module` says of a file we complete."""

    def vocabulary(self) -> Collection[str]:
        """Words that end a tensor's name."""
        return words.WORDS

    def forms(self) -> Sequence[words.Form]:
        """How words spell deltas."""
        return words.LORA_FORMS

    def spell(self, adapter: Adapter, module: str, parameter: str, delta: Delta) -> dict[str, Tensor]:
        """The words of a delta of one parameter of a module, alpha included. Raises RefusedError where there are none."""
        if parameter != "weight":
            raise RefusedError(f"a delta of the {parameter} has no form in {self.name}")
        return words.words_of(delta) | stored_alpha(adapter, module, words.alpha_for(delta), delta)

    def match(self, file: TensorFile) -> Match | None:
        """The share of names that are a known prefix, underscores, and one of the words."""
        vocabulary = self.vocabulary()
        parts = [part for name in file.tensors if (part := words.split(name, vocabulary))]
        hits = sum(MODULE.fullmatch(module) is not None for module, _ in parts)
        if not hits or not any(name.endswith(words.LORA[:2]) for name in file.tensors):
            return None
        own = sorted({word.removesuffix(".weight") for _, word in parts})
        evidence = [f"{hits} of {len(file.tensors)} names are lora_<component>_<module>.<{'|'.join(own)}>"]
        if "ss_network_module" in file.metadata:
            evidence.append(f"metadata ss_network_module = {file.metadata['ss_network_module']}")
        # One half alone may be a triad's file, and what a GGUF says of itself goes first.
        halves = all(any(name.endswith(word) for name in file.tensors) for word in words.LORA[:2])
        alone = hits == len(file.tensors) and halves and file.container != "gguf"
        return Match(self.name, round(0.97 * hits / len(file.tensors), 3), tuple(evidence), alone)

    def gather(self, file: TensorFile, siblings: Sequence[TensorFile]) -> list[TensorFile]:
        """One file is one adapter."""
        return [file]

    def read(self, bundle: Bundle, options: ReadOptions) -> Adapter:
        """The adapter; modules in reference names when a base explains them, else as the file names them (layout 'kohya')."""
        file = bundle.main
        groups, rest = words.grouped(file.tensors, self.vocabulary())
        extras, leftovers = bundled(rest)
        deltas: dict[str, dict[str, Delta]] = {}
        findings: list[Finding] = list(file.findings)
        for module, group in groups.items():
            try:
                built = words.build(group, self.forms())
            except MalformedError as problem:
                raise MalformedError(
                    problem.message, file=file.path, tensor=module, expected=problem.expected, found=problem.found
                ) from problem
            leftovers |= {f"{module}.{word}": group[word] for word in built.unexplained}
            if not built.deltas:
                findings.append(error("orphan", module, "a factor without its partner: the module cannot be applied", *group))
            else:
                deltas[module] = built.deltas
                if built.unexplained:
                    findings.append(error("unexplained", module, f"words that no form of {self.name} explains", *built.unexplained))
        if not deltas:
            raise DeadAdapterError("no module has both its up and its down factor", file=file.path, found=", ".join(list(file.tensors)[:3]))
        shapes = {module: _shape(built) for module, built in deltas.items()}
        stated = kohya_metadata.stated_base(file.metadata)
        found = resolve(shapes, _LAYOUTS, options.base, stated=stated, underscored=True, aliases=_ALIASES)
        adapter = Adapter(
            {}, self.name, extras, metadata=dict(file.metadata), spelling=_spelling(groups, found), files=(str(file.path),), leftovers=leftovers,
            findings=findings, layout="kohya" if found is None else "reference", base=None if found is None else found.hint,
        )  # fmt: skip
        told = take_parts(adapter.metadata)
        for module, spelled in deltas.items():
            _settle(adapter, module, spelled, groups[module], found, told)
        if not told:
            adapter.findings += kohya_metadata.contradictions(adapter, file.path.name)
        return adapter

    def write(self, adapter: Adapter, options: Mapping[str, Any]) -> Package:
        """One safetensors file. Raises RefusedError for extras, for deltas without words here, and where the base is not known."""
        base = base_of(adapter, options)
        told: Parts = {}
        deltas = self.names(adapter, options, told)
        problems: list[str | Problem] = [
            f"{extra.kind.value} {extra.name}" for extra in adapter.extras if extra.kind is not ExtraKind.TEXTUAL_INVERSION
        ]
        tensors = {bundle_name(extra.name): extra.tensor for extra in adapter.extras if extra.kind is ExtraKind.TEXTUAL_INVERSION}
        for (module, parameter), delta in deltas.items():
            try:
                spelled = self.spell(adapter, module, parameter, delta)
            except RefusedError as problem:
                problems.append(because(module if parameter == "weight" else f"{module}.{parameter}", problem))
                continue
            tensors |= {f"{module}.{word}": tensor for word, tensor in spelled.items()}
        refuse(self.name, problems)
        metadata, late = kohya_metadata.stamped_later(tensors, kohya_metadata.written(adapter, base, self.module))
        if told:
            metadata[PARTS_KEY] = json.dumps(told, separators=(",", ":"))
        return Package({"lora.safetensors": NamedTensors(tensors, metadata, late=late)}, folder=False)

    def restated(self, adapter: Adapter, before: Adapter | None) -> Adapter:
        """The adapter with `ss_network_dim` and `ss_network_alpha`, where its metadata has them, as its deltas are."""
        return replace(adapter, metadata=kohya_metadata.restated(adapter, before))

    def names(self, adapter: Adapter, options: Mapping[str, Any], told: Parts) -> dict[tuple[str, str], Delta]:
        """(module as this dialect names it, parameter) -> delta."""
        if adapter.layout == "kohya":
            return {(target.module, target.parameter): delta for target, delta in adapter.deltas.items()}
        if adapter.layout != "reference":
            raise untranslated(adapter, options, self.name)
        spelling = adapter.spelling if adapter.dialect in ("kohya", "lycoris") else {}
        one = layout_for(adapter, options, str(options.get("layout") or spelling.get("layout", "kohya")))
        return {
            (respelled(foreign, spelling), parameter): delta for (foreign, parameter), delta in named(one, adapter.deltas, told).items()
        }


def _shape(built: Mapping[str, Delta]) -> Shape:
    """The shape of the weight a module's deltas are for; of one that has only a bias the outputs."""
    return built["weight"].shape if "weight" in built else (*next(iter(built.values())).shape, 0)


def _settle(adapter: Adapter, module: str, built: Mapping[str, Delta], group: words.Words, found: Resolved | None, told: Parts) -> None:
    """Put a module's deltas under their targets; a module the base does not have goes to the leftovers, with a finding."""
    if found is None:
        adapter.deltas |= {Target(module, parameter=parameter): delta for parameter, delta in built.items()}
        return
    foreign = found.names.get(module)
    if foreign is None or any(delta.shape != (found.layout.rows(foreign),) for parameter, delta in built.items() if parameter != "weight"):
        adapter.leftovers |= {f"{module}.{word}": tensor for word, tensor in group.items()}
        adapter.findings.append(
            warning(
                "unknown-module", module, f"{found.layout.base.name} has no such module of this shape, or it is named twice",
                f"{next(iter(built.values())).shape}",
            )
        )  # fmt: skip
        return
    try:
        adapter.deltas |= {
            target._replace(parameter=parameter): piece
            for parameter, delta in built.items()
            for target, piece in to_targets(found.layout, foreign, delta, told).items()
        }
    except RefusedError as problem:
        adapter.leftovers |= {f"{module}.{word}": tensor for word, tensor in group.items()}
        adapter.findings.append(out_of_order(module, problem))


def _spelling(groups: Mapping[str, words.Words], found: Resolved | None) -> dict[str, str]:
    """Layout, prefixes and the form of alphas, so that the same file can be written again."""
    spelling: dict[str, str] = {}
    if found is not None:
        note_layout(spelling, found.layout)
        note_prefixes(spelling, found.names.items(), _ALIASES)
    for module, group in groups.items():
        if "alpha" in group:
            remember(spelling, "alpha", module, form_of(group["alpha"]))
    return spelling


def stored_alpha(adapter: Adapter, module: str, value: float | None, delta: Delta, *, exact: bool = False) -> dict[str, Tensor]:
    """`alpha` as it is written beside a delta's words (see `spelling.alpha_of`); {} for none."""
    if value is None:
        return {}
    spelling = adapter.spelling if adapter.dialect in ("kohya", "lycoris") else {}
    return {"alpha": alpha_of(spelling, module, value, next(iter(delta.factors().values())).dtype, exact=exact)}


dialect = Kohya()
