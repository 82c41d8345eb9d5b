"""What PEFT makes of a config that does not go with the tensors beside it.

Sources: huggingface/peft src/peft/tuners/tuners_utils.py (check_target_module_exists), src/peft/utils/save_and_load.py
(set_peft_model_state_dict, which loads without `strict`), src/peft/tuners/lora/config.py (defaults), src/peft/tuners/lora/dora.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from upparam.dialects import peft_adalora, peft_config
from upparam.findings import Finding, error, warning
from upparam.tensors import Tensor

Factors = Mapping[str, Mapping[str, Tensor]]
"""Tensors by the module's path in the base and the name `peft_names` gives the factor."""
_DEFAULT = 8
"""What LoraConfig takes for r and for lora_alpha where a config has neither."""
_MAGNITUDE = "magnitude"
_DOWN = ("lora_A", "lora_embedding_A")


def contradictions(subject: str, config: Mapping[str, Any], factors: Factors) -> list[Finding]:
    """Findings about factors that PEFT would not load, would leave out in silence, or would take otherwise than the tensors say."""
    found: list[Finding] = []
    if wrong := _other_ranks(config, factors):
        found.append(
            error("rank-differs", subject, f"{_modules(wrong)} another rank than the config says; PEFT will not load them", wrong[0])
        )
    if config.get("peft_type") == "LORA" and config.get("r") is None and any(_down(roles) is not None for roles in factors.values()):
        found += _without_r(subject, config, factors)
    if config.get("peft_type") == "LORA" and config.get("lora_alpha") is None:
        found.append(
            warning(
                "alpha-missing",
                subject,
                f"the config has no lora_alpha, for which PEFT takes {_DEFAULT}",
                f"say so with --alpha {_DEFAULT}",
            )
        )
    targets = config.get("target_modules")
    if isinstance(targets, (str, list)) and targets and targets != "all-linear":
        outside = [
            module for module in factors if not peft_config.targeted(targets, module) and not peft_config.of_parameters(config, module)
        ]
        if outside:
            what = f"{_modules(outside)} factors, and the config's target_modules do not name them: PEFT leaves them out in silence"
            found.append(error("not-targeted", subject, what, f"such as {outside[0]}"))
    ignored = [module for module, roles in factors.items() if _MAGNITUDE in roles] if config.get("use_dora") is not True else []
    if ignored:
        what = f"{_modules(ignored)} magnitudes of a DoRA, and the config's use_dora is not true: PEFT leaves these out in silence"
        found.append(error("magnitudes-unused", subject, what, f"such as {ignored[0]}"))
    return found


def magnitudes_missing(config: Mapping[str, Any], factors: Factors) -> list[str]:
    """The condition under which a DoRA without its magnitudes holds, as one sentence; [] where they are all there."""
    lacking = [module for module, roles in factors.items() if _down(roles) is not None and _MAGNITUDE not in roles]
    if config.get("use_dora") is not True or not lacking:
        return []
    return [
        f"use_dora is true and {_modules(lacking)} no magnitude (such as {lacking[0]}): PEFT starts them as the norms of the base's weights, "
        "so what it computes is no plain LoRA"
    ]


def _without_r(subject: str, config: Mapping[str, Any], factors: Factors) -> Iterable[Finding]:
    if "r" in config:
        return [error("rank-missing", subject, "r is null in the config; PEFT cannot load that")]
    ranks = {
        down.shape[0]
        for module, roles in factors.items()
        if (down := _down(roles)) is not None and peft_config.patterned(config.get("rank_pattern"), module, None) is None
    }
    if ranks <= {_DEFAULT}:
        return []
    shown = ", ".join(map(str, sorted(ranks)))
    return [
        error("rank-missing", subject, f"the config has no r, for which PEFT takes {_DEFAULT}; it will not load factors of rank {shown}")
    ]


def _other_ranks(config: Mapping[str, Any], factors: Factors) -> list[str]:
    """Modules whose factors have another rank than the config tells, with both."""
    wrong = []
    for module, roles in factors.items():
        if "lora_E" in roles:
            told, have = peft_adalora.left(config, module), (*roles["lora_E"].shape, 0)[0]
            if told is not None and have != told:
                wrong.append(f"{module}: {have}, config {told:g}")
            continue
        down = _down(roles)
        r = peft_config.patterned(config.get("rank_pattern"), module, peft_config.number(config, "r"))
        if down is None or r is None or config.get("enable_lora") or config.get("target_parameters"):
            continue
        if down.shape[0] != r:
            wrong.append(f"{module}: {down.shape[0]}, config {r:g}")
    return wrong


def _down(roles: Mapping[str, Tensor]) -> Tensor | None:
    return next((roles[word] for word in _DOWN if word in roles), None)


def _modules(found: list[str]) -> str:
    return f"{len(found)} modules have" if len(found) > 1 else "1 module has"
