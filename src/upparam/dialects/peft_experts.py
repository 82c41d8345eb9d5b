"""PEFT's `target_parameters`: LoRA on bare parameters, such as the stacked weights of a mixture's experts.

PEFT wraps the module that owns the parameters once for each, the one the model defines first innermost (`experts.base_layer.lora_A`
inside `experts.lora_A`); which parameter a wrapper is for is not in the tensors' names. Source: huggingface/peft
src/peft/tuners/tuners_utils.py _inject_parameters, src/peft/tuners/lora/layer.py ParamWrapper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from upparam.adapter import Target
from upparam.algorithms.base import Delta
from upparam.algorithms.experts import ExpertLoRA
from upparam.algorithms.lora import LoRA
from upparam.dialects import peft_config
from upparam.dialects.base import ReadOptions
from upparam.patterns import regex
from upparam.tensors import Tensor

Roles = Mapping[str, Tensor]
_NESTED = regex(r"(\.base_layer)+$")


def parameter_deltas(
    factors: Mapping[str, Roles], config: Mapping[str, Any] | None, options: ReadOptions
) -> tuple[dict[Target, Delta], set[str]]:
    """(deltas of bare parameters, the module paths whose factors they took).

    Paths that are of parameters and cannot be told apart, or whose rank is not known, are in neither.
    """
    owners: dict[str, list[str]] = {}
    for module in factors:
        if peft_config.of_parameters(config, module):
            owners.setdefault(_NESTED.sub("", module), []).append(module)
    found: dict[Target, Delta] = {}
    taken: set[str] = set()
    for owner, wrappers in owners.items():
        wrappers.sort(key=len, reverse=True)  # innermost first
        pairs = [factors[wrapper] for wrapper in wrappers]
        if any(pair.keys() != {"lora_A", "lora_B"} or len(pair["lora_A"].shape) != 2 for pair in pairs):
            continue
        for wrapper, pair, name in zip(wrappers, pairs, _names(owner, pairs, config), strict=False):
            delta = _delta(f"{owner}.{name}", pair, config, options)
            if delta is not None:
                found[Target(owner, None, name)] = delta
                taken.add(wrapper)
    return found, taken


def _names(owner: str, pairs: Sequence[Roles], config: Mapping[str, Any] | None) -> list[str]:
    """The parameter of each wrapper, innermost first; [] where it is not certain."""
    listed = [parameter.rpartition(".") for parameter in peft_config.words(config, "target_parameters")]
    names = sorted({name for holder, _, name in listed if owner == holder or owner.endswith(f".{holder}")})
    if len(names) != len(pairs):
        return []
    if len(names) == 1:
        return names
    if len(names) != 2 or not ("down" in names[0] and "gate_up" in names[1]):
        return []
    down, up = names
    first, second = ((pair["lora_A"].shape[1], pair["lora_B"].shape[0]) for pair in pairs)
    ways = [order for order, (one, other) in (((up, down), (first, second)), ((down, up), (second, first))) if _feeds(one, other)]
    return list(ways[0]) if len(ways) == 1 else []


def _feeds(up: tuple[int, int], down: tuple[int, int]) -> bool:
    """Whether (in, out) of a gate_up projection and of a down projection are of one layer: hidden -> 2 x inner, inner -> hidden."""
    straight = up[0] == down[1] and up[1] == 2 * down[0]
    swapped = up[1] == down[0] and up[0] == 2 * down[1]
    return straight or swapped


def _delta(path: str, pair: Roles, config: Mapping[str, Any] | None, options: ReadOptions) -> Delta | None:
    up, down = pair["lora_B"], pair["lora_A"]
    r = peft_config.patterned((config or {}).get("rank_pattern"), path, peft_config.number(config or {}, "r")) or options.rank
    if not r or r < 1 or down.shape[0] % int(r) or up.shape[1] != down.shape[0]:
        return None
    scaling = peft_config.scaling_of(config, path, int(r), options)
    experts = down.shape[0] // int(r)
    return LoRA(up, down, scaling) if experts == 1 else ExpertLoRA(up, down, experts, scaling)


def nesting_of(target: Target, targets: Sequence[Target]) -> str:
    """What follows the module's path in the name of a parameter's factors, given all targets of bare parameters, innermost first."""
    same = [other.parameter for other in targets if other.module == target.module]
    return ".base_layer" * (len(same) - 1 - same.index(target.parameter))
