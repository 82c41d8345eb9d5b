"""PEFT's AdaLoRA: a truncated SVD for each module, of which training keeps some singular values.

PEFT divides alpha by the rank that training began with (init_r), plus 1e-5, however few values are left; `rank_pattern` says for each module
which of the first init_r are. A file holds those alone, none at all for some modules. Source: huggingface/peft
src/peft/tuners/adalora/{config,model,layer}.py (get_delta_weight, resize_modules_by_rank_pattern).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import isclose
from typing import Any

from upparam.algorithms.adalora import MARGIN, AdaLoRA
from upparam.algorithms.base import UNKNOWN, Delta, ScaleRule, Scaling
from upparam.bases.base import Module
from upparam.dialects.peft_config import agreed, number
from upparam.dialects.peft_method import Given, Method, Written
from upparam.errors import MalformedError, RefusedError
from upparam.tensors import Tensor


def _read(given: Given) -> Delta:
    roles = given.roles
    bare = AdaLoRA(roles["lora_B"], roles["lora_E"], roles["lora_A"], UNKNOWN)
    return replace(bare, scaling=_scaling(given, bare.rank))


def _scaling(given: Given, rank: int) -> Scaling:
    """alpha / (init_r + 1e-5). A checkpoint that was not saved by PEFT holds init_r as `ranknum`."""
    config, options, module = given.config or {}, given.options, given.module
    begun, alpha = number(config, "init_r"), number(config, "lora_alpha")
    if begun is None and "ranknum" in given.roles:
        begun = _number(given.roles["ranknum"])
    if begun is None and options.rank is not None:
        begun = float(options.rank)
    if begun is not None and begun < max(rank, 1):
        raise MalformedError("AdaLoRA began with a lower rank than is left", expected=f">= {rank}", found=f"{begun:g}")
    if alpha is None and options.scale is not None:
        return Scaling(ScaleRule.EXPLICIT, multiplier=options.scale)
    stated = alpha if alpha is not None else options.alpha
    if begun is None or stated is None:
        return UNKNOWN
    scaling = Scaling(ScaleRule.ALPHA_OVER_RANK, stated if stated > 0 else begun, divisor=begun + MARGIN)
    agreed(scaling, stated, rank, module, options)
    return scaling


def _number(tensor: Tensor) -> float:
    if tensor.numel != 1:
        raise MalformedError("ranknum is not one number", found=tensor.shape)
    return float(tensor.doubles().reshape(-1)[0])


def _spell(delta: AdaLoRA, known: Module | None) -> dict[str, Tensor]:
    if known is not None and known.kind == "Embedding":
        raise RefusedError("an adalora of an Embedding")
    return {"lora_E": delta.values.reshape((delta.rank, 1)), "lora_A": delta.down, "lora_B": delta.up}


def _settings(written: Written) -> dict[str, Any]:
    """init_r is that of the deltas' own scale where they have one, else the largest rank."""
    deltas = written.deltas
    ranks = {module: delta.rank or 0 for module, delta in deltas.items()}
    begun = {round(delta.scaling.divisor - MARGIN) for delta in deltas.values() if delta.scaling.divisor is not None}
    init = max([*ranks.values(), *begun, 1])
    scales = [delta.known_scale() for delta in deltas.values()]
    if not all(isclose(scale, scales[0], rel_tol=1e-12) for scale in scales):
        raise RefusedError(
            "an AdaLoRA in PEFT has one scale for all modules", found=", ".join(f"{scale:g}" for scale in sorted(set(scales))[:4])
        )
    alphas = {delta.alpha for delta in deltas.values() if delta.scaling.divisor == init + MARGIN}
    alpha = alphas.pop() if len(alphas) == 1 and None not in alphas else scales[0] * (init + MARGIN)
    if alpha is None or alpha <= 0:
        raise RefusedError("PEFT takes an alpha that is not positive for the rank", found=scales[0])
    cut = {f"{module}.lora_E": [True] * rank + [False] * (init - rank) for module, rank in ranks.items() if rank != init}
    return {
        "alpha_pattern": {}, "beta1": 0.85, "beta2": 0.85, "deltaT": 1, "init_lora_weights": True, "init_r": init,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha, "lora_dropout": 0.0, "orth_reg_weight": 0.5, "r": 8,
        "rank_pattern": cut or None, "target_r": min(8, init), "tfinal": 0, "tinit": 0, "total_step": 1, "use_dora": False, "use_rslora": False,
    }  # fmt: skip


def left(config: Mapping[str, Any], module: str) -> float | None:
    """How many singular values of a module a config says are left; None where it does not say."""
    pattern = config.get("rank_pattern")
    mask = pattern.get(f"{module}.lora_E") if isinstance(pattern, Mapping) else None
    return sum(value is True for value in mask) if isinstance(mask, list) else number(config, "init_r")


def _loads(config: Mapping[str, Any], module: str, delta: AdaLoRA) -> bool:
    return left(config, module) == delta.rank


METHOD = Method(
    "ADALORA", ("adalora",), frozenset(("lora_A", "lora_B", "lora_E")), _read, _spell, _settings, more=frozenset(("ranknum",)), loads=_loads,
    kept=("lora_dropout", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"), biases="lora_only",
)  # fmt: skip
