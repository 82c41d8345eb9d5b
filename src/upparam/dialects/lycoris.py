"""LyCORIS: kohya's names with the words of every algorithm LyCORIS has; `lycoris_<module>` where it wraps a model by itself.

Sources: KohakuBlueleaf/LyCORIS lycoris/wrapper.py (LORA_PREFIX, create_lycoris), lycoris/kohya.py (LORA_PREFIX_*, create_network),
lycoris/modules/*.py. What its versions changed is under the functions that care.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from math import isclose, prod, sqrt
from typing import Any

from upparam.adapter import Adapter
from upparam.algorithms.base import Delta, ScaleRule
from upparam.algorithms.boft import ButterflyOFT
from upparam.algorithms.full import Full, Norm
from upparam.algorithms.glora import GLoRA
from upparam.algorithms.ia3 import IA3
from upparam.algorithms.oft import DiagOFT
from upparam.algorithms.tlora import REASON, TLoRA
from upparam.containers.base import TensorFile
from upparam.dialects import lycoris_words, words
from upparam.dialects.base import Bundle, Match, ReadOptions
from upparam.dialects.kohya import MODULE, Kohya, stored_alpha
from upparam.dialects.placing import Parts
from upparam.dialects.refusing import refuse
from upparam.dialects.spelling import chosen, form, form_of, remember
from upparam.findings import info, warning
from upparam.tensors import Tensor
from upparam.wording import counted

_OLD_GLORA = (("a1.weight", "a2.weight"), ("b1.weight", "b2.weight"))


class LyCORIS(Kohya):
    """The dialect."""

    name = "lycoris"
    title = "LyCORIS"
    algorithms = lycoris_words.ALGORITHMS
    module = "lycoris.kohya"

    def vocabulary(self) -> Collection[str]:
        """Every word LyCORIS has."""
        return lycoris_words.WORDS

    def forms(self) -> Sequence[words.Form]:
        """How those words spell deltas."""
        return lycoris_words.FORMS

    def match(self, file: TensorFile) -> Match | None:
        """The share of names that are kohya's with LyCORIS' words, where a word, a prefix or the metadata is LyCORIS' own.

        A file of LoRAs alone under sd-scripts' prefixes is kohya's unless its metadata names `lycoris.kohya` as what trained it.
        """
        vocabulary = self.vocabulary()
        found = [part for name in file.tensors if (part := words.split(name, vocabulary)) and MODULE.fullmatch(part[0])]
        # `weight` alone is any model's; of IA3 it has `on_input` beside it.
        hits = sum(word != "weight" or f"{module}.on_input" in file.tensors for module, word in found)
        own = sorted({word for _, word in found if word in lycoris_words.OWN})
        stated = file.metadata.get("ss_network_module", "")
        if not hits:
            return None
        evidence = [f"{hits} of {len(file.tensors)} names are <prefix>_<module>.<word>"]
        evidence += [f"LyCORIS' words {', '.join(own)}"] if own else []
        evidence += [f"metadata ss_network_module = {stated}"] if stated else []
        marked = own or stated.startswith("lycoris") or any(module.startswith("lycoris_") for module, _ in found)
        return Match(self.name, round((0.975 if marked else 0.5) * hits / len(file.tensors), 3), tuple(evidence))

    def read(self, bundle: Bundle, options: ReadOptions) -> Adapter:
        """The adapter, as `Kohya.read` does, and what the file's version of LyCORIS did otherwise."""
        adapter = super().read(bundle, options)
        groups, _ = words.grouped(bundle.main.tensors, self.vocabulary())
        for module, group in groups.items():
            if "on_input" in group:
                remember(adapter.spelling, "on_input", module, form_of(group["on_input"]))
            if all(word in group for pair in _OLD_GLORA for word in pair):
                remember(adapter.spelling, "glora", module, "old" if lycoris_words.is_old_glora(group) else "new")
        if any(isinstance(delta, TLoRA) for delta in adapter.deltas.values()):
            adapter.hold_under(REASON, bundle.main.name)
        _note_scales(adapter, bundle.main.name)
        return adapter

    def names(self, adapter: Adapter, options: Mapping[str, Any], told: Parts) -> dict[tuple[str, str], Delta]:
        """The same, and another dialect's differences of norms as norms: LyCORIS reads those by other words."""
        named = super().names(adapter, options, told)
        if adapter.dialect == self.name:
            return named
        alone = [module for module, parameter in named if parameter == "bias" and not isinstance(named.get((module, "weight")), Full)]
        refuse(
            self.name,
            [f"{module}.bias: a delta of the bias beside none of the whole weight, which LyCORIS would pass over" for module in alone],
        )
        norms = {module for (module, parameter), delta in named.items() if parameter == "weight" and len(delta.shape) == 1}
        return {
            (module, parameter): Norm(delta.diff, delta.scaling) if module in norms and isinstance(delta, Full) else delta
            for (module, parameter), delta in named.items()
        }

    def spell(self, adapter: Adapter, module: str, parameter: str, delta: Delta) -> dict[str, Tensor]:
        """The words of a delta of one parameter of a module, alpha included. Raises RefusedError where there are none."""
        spelled = lycoris_words.spell(delta, parameter)
        own = adapter.dialect == self.name
        alpha = lycoris_words.stored_alpha(delta)
        if alpha is None and not own and not isinstance(delta, (Full, IA3)):
            # LyCORIS builds none of these modules without one: of an OFT it is the constraint, of two full Kronecker factors anything.
            alpha = 0.0 if isinstance(delta, (DiagOFT, ButterflyOFT)) else float(delta.rank or 1)
        spelling = adapter.spelling if own else {}
        if "on_input" in spelled and (kept := chosen(spelling, "on_input", module)):
            dtype, dims = form(kept)
            spelled["on_input"] = Tensor.of(spelled["on_input"].doubles().reshape((1,) * dims).astype(dtype.numpy))
        if isinstance(delta, GLoRA) and chosen(spelling, "glora", module) == "old":
            spelled |= {one: spelled[other] for pair in _OLD_GLORA for one, other in (pair, pair[::-1])}
        return spelled | stored_alpha(adapter, module, alpha, delta, exact=isinstance(delta, (DiagOFT, ButterflyOFT)))


def _note_scales(adapter: Adapter, name: str) -> None:
    """Where a version of LyCORIS trained with another scale than the one that it and every other reader takes from its file."""
    args = _arguments(adapter.metadata)
    if str(args.get("rs_lora", "False")).lower() != "false":
        trained = {target: times for target, delta in adapter.deltas.items() if (times := _unfolded(delta, args, adapter.metadata)) != 1.0}
        if trained:
            target, times = next(iter(trained.items()))
            adapter.findings.append(
                warning(
                    "rs-lora-lost", name,
                    f"trained with rs_lora, which the alpha of {counted(len(trained), 'target')} does not hold: readers scale down, and so does upparam",
                    f"{target}: scale {adapter.deltas[target].scale:g}, trained with {times:g} times that",
                )
            )  # fmt: skip
    old = [target for target, delta in adapter.deltas.items() if isinstance(delta, GLoRA) and delta.scale not in (0.0, 1.0)]
    if old and "old" in (adapter.spelling.get("glora"), *(value for key, value in adapter.spelling.items() if key.startswith("glora "))):
        adapter.findings.append(
            info(
                "glora-scaled-twice", name,
                "GLoRA of LyCORIS before 3.0: most of those versions scaled twice in training and once in a merge; readers scale once",
                f"{old[0]}: scale {adapter.deltas[old[0]].scale:g}",
            )
        )  # fmt: skip


def _arguments(metadata: Mapping[str, str]) -> Mapping[str, Any]:
    try:
        found = json.loads(metadata.get("ss_network_args", "{}"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _unfolded(delta: Delta, args: Mapping[str, Any], metadata: Mapping[str, str]) -> float:
    """How many times the stored scale a delta was trained with under rs_lora: sqrt(rank) where alpha does not hold that factor.

    LyCORIS multiplies the alpha it stores by it since July 2024 (after 3.0.0), that of GLoRA never; two full Kronecker factors take no
    alpha when they are read (lycoris/modules/locon.py, glora.py, lokr.py).
    """
    conv = prod(delta.shape[2:]) > 1
    if delta.algorithm in ("lokr", "dokr") and delta.rank is None:
        return sqrt(_number(args, metadata, "conv_dim" if conv else "", "ss_network_dim") or 1.0)
    if delta.scaling.rule is not ScaleRule.ALPHA_OVER_RANK or not delta.rank or not delta.alpha:
        return 1.0
    asked = _number(args, metadata, "conv_alpha" if conv else "", "ss_network_alpha")
    lost = delta.algorithm == "glora" or (asked is not None and isclose(delta.alpha, asked, rel_tol=1e-2))
    return sqrt(delta.rank) if lost else 1.0


def _number(args: Mapping[str, Any], metadata: Mapping[str, str], argument: str, key: str) -> float | None:
    """A positive number of the network's arguments, else of the metadata; None for anything else."""
    try:
        found = float(args.get(argument, metadata.get(key, "")))
    except (ValueError, TypeError):
        return None
    return found if 0 < found < float("inf") else None


dialect = LyCORIS()
