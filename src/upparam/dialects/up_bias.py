"""The bias of up (`lora_B.bias`): PEFT's `lora_bias` gives up one, so the base's bias changes by the module's scale times it.

Source: huggingface/peft src/peft/tuners/lora/layer.py (`merge`), src/peft/tuners/lora/config.py (not with DoRA, not for embeddings).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import isclose
from typing import TYPE_CHECKING

from upparam.adapter import Target
from upparam.algorithms.base import Delta, ScaleRule
from upparam.algorithms.lora import LoRA
from upparam.dialects.refusing import other_scale
from upparam.errors import Problem
from upparam.tensors import Tensor

if TYPE_CHECKING:
    from upparam.algorithms.full import Full

WORD = "lora_B.bias"
_RULES = (ScaleRule.ALPHA_OVER_RANK, ScaleRule.ALPHA_OVER_SQRT_RANK)


def change_of(weight: Delta | None, bias: Tensor) -> Full | None:
    """What a bias of up, of shape (out,), does to the base's bias beside this delta of the weight; None where nothing known does it."""
    from upparam.algorithms.full import Full

    if type(weight) is not LoRA or weight.embedding or bias.shape != weight.shape[:1]:
        return None
    scaling = weight.scaling
    if scaling.rule in _RULES and scaling.divisor is None:
        scaling = replace(scaling, divisor=weight.rank)
    return Full(bias, scaling)


def taken(deltas: Mapping[Target, Delta]) -> dict[str, Delta]:
    """The deltas of biases that may be biases of up, by module."""
    return {target.module: delta for target, delta in deltas.items() if target.parameter == "bias" and delta.algorithm == "full"}


def unfit(biases: Mapping[str, Delta], deltas: Mapping[Target, Delta], where: str) -> list[Problem]:
    """Why these cannot be biases of up beside the deltas of the weights: each needs a LoRA of its module, of its scale, and all have one or none.

    `deltas` are those that share one setting for all, `where` says which these are.
    """
    found: list[Problem] = []
    for module, bias in biases.items():
        target, weight = Target(module, parameter="bias"), deltas.get(Target(module))
        if type(weight) is not LoRA or weight.embedding:
            found.append(Problem(str(target), "a delta of a bias whose weight has no plain LoRA", (target,)))
        elif bias.scale is not None and weight.scale is not None and not isclose(bias.scale, weight.scale, rel_tol=1e-12):
            why = (
                f"a delta of a bias with scale {bias.scale:g} beside one of the weight with scale {weight.scale:g}, and both have one scale"
            )
            found.append(other_scale(str(target), bias, weight.scale, why) if weight.scale else Problem(str(target), why, (target,)))
    if found or not biases:
        return found
    bare = [target for target in deltas if target.parameter == "weight" and target.module not in biases]
    own = tuple(Target(module, parameter="bias") for module in biases)
    return [Problem(str(bare[0]), f"no delta of the bias, and {where} has one in every module or in none", own)] if bare else []
