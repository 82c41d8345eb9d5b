"""The config in a diffusers file's header: what PEFT was told for each component of the pipeline, by which its files are scaled.

Sources: huggingface/diffusers src/diffusers/loaders/lora_base.py, utils/peft_utils.py (_create_lora_config); huggingface/peft
src/peft/utils/other.py (get_pattern_key).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from upparam.adapter import Adapter
from upparam.algorithms.base import UNKNOWN, Delta, ScaleRule, Scaling
from upparam.algorithms.dora import DoRA
from upparam.containers.base import TensorFile
from upparam.dialects import peft_config
from upparam.dialects.carried import ADAPTER_CONFIG
from upparam.dialects.peft_check import contradictions, magnitudes_missing
from upparam.dialects.words import alpha_for
from upparam.errors import MalformedError

CLIP = "text_model."
"""In front of CLIP's modules in files and in transformers before 5; from 5 on the modules themselves go without it."""


def config_of(file: TensorFile) -> dict[str, Any]:
    """The header's `lora_adapter_metadata`, {} when there is none. Raises MalformedError when it is no JSON object."""
    text = file.metadata.get(ADAPTER_CONFIG)
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise MalformedError(f"metadata {ADAPTER_CONFIG} is not valid JSON: {problem}", file=file.path) from problem
    if not isinstance(value, dict):
        raise MalformedError(f"metadata {ADAPTER_CONFIG} is not a JSON object", file=file.path, found=type(value).__name__)
    return value


def scaling_of(config: Mapping[str, Any], component: str, module: str, rank: int) -> Scaling:
    """The scale that a component's config gives a module of this rank; 1 where it has none, unknown where one says no alpha."""
    alpha = _patterned(config.get(f"{component}.alpha_pattern"), module, config.get(f"{component}.lora_alpha"))
    if not isinstance(alpha, (int, float)):
        # PEFT takes a number of its own for an alpha that a config does not say.
        return UNKNOWN if any(key.startswith(f"{component}.") for key in config) else Scaling()
    r = _patterned(config.get(f"{component}.rank_pattern"), module, config.get(f"{component}.r"))
    rule = ScaleRule.ALPHA_OVER_SQRT_RANK if config.get(f"{component}.use_rslora") is True else ScaleRule.ALPHA_OVER_RANK
    return Scaling(rule, float(alpha), divisor=float(r) if isinstance(r, (int, float)) and r != rank else None)


def _patterned(patterns: Any, module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of the module's path, with or without CLIP's prefix, as it stands there."""
    for pattern, value in (patterns or {}).items() if isinstance(patterns, Mapping) else ():
        if any(peft_config.matches(pattern, name) for name in (module, module.removeprefix(CLIP))):
            return value
    return default


def hold_against(config: Mapping[str, Any], adapter: Adapter, deltas: Mapping[str, Delta], subject: str) -> None:
    """Say where the header's configs, which diffusers hands to PEFT as they are, do not go with the factors.

    `target_modules` decide nothing there: diffusers gives PEFT the tensors with the config, and those name the modules.
    """
    for component in dict.fromkeys(path.split(".", 1)[0] for path in deltas):
        start = f"{component}."
        own = {key[len(start) :]: value for key, value in config.items() if key.startswith(start) and key != f"{start}target_modules"}
        if not own:
            continue
        named = {path[len(start) :]: delta.factors() for path, delta in deltas.items() if path.startswith(start)}
        factors = {
            path: {"lora_A": roles["down"], **{role: roles[role] for role in roles.keys() & {"magnitude"}}} for path, roles in named.items()
        }
        adapter.findings += contradictions(f"{subject} ({ADAPTER_CONFIG}, {component})", {**own, "peft_type": "LORA"}, factors)
        for reason in magnitudes_missing(own, factors):
            adapter.hold_under(reason, subject)


def written(deltas: Mapping[str, Delta], biases: Collection[str] = ()) -> dict[str, Any]:
    """The metadata for these modules, {} when every one has scale 1 and no alpha. PEFT wants whole configs, so all of a component is said."""
    config: dict[str, Any] = {}
    for component in dict.fromkeys(module.split(".", 1)[0] for module in deltas):
        own = {module[len(component) + 1 :]: delta for module, delta in deltas.items() if module.startswith(component + ".")}
        alphas = {module: alpha_for(delta) for module, delta in own.items()}
        if all(alpha is None for alpha in alphas.values()):
            continue
        ranks = {module: delta.rank or 1 for module, delta in own.items()}
        settled = {module: _number(ranks[module] if alpha is None else alpha) for module, alpha in alphas.items()}
        r, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(settled.values()).most_common(1)[0][0]
        values = {
            "r": r,
            "lora_alpha": alpha,
            "rank_pattern": {_anchored(module): rank for module, rank in ranks.items() if rank != r},
            "alpha_pattern": {_anchored(module): value for module, value in settled.items() if value != alpha},
            "target_modules": sorted(module.removeprefix(CLIP) for module in own),
            "use_dora": any(type(delta) is DoRA for delta in own.values()),
            "lora_bias": any(f"{component}.{module}" in biases for module in own),
        }
        config |= {f"{component}.{key}": value for key, value in values.items()}
    return config


def _anchored(module: str) -> str:
    """The pattern that means this module: '^' before the whole path, as diffusers writes it, so that `proj_out` is not `x.proj_out` too.

    CLIP's modules must be found with and without `text_model.` in front.
    """
    return module.removeprefix(CLIP) if module.startswith(CLIP) else f"^{module}"


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else float(value)


def still_says(text: str | None, deltas: Mapping[str, Delta]) -> bool:
    """True when the adapter metadata brought along gives each of these modules its scale: it is then kept verbatim."""
    if text is None:
        return False
    try:
        config = json.loads(text)
    except ValueError:
        return False
    if not isinstance(config, dict):
        return False
    for module, delta in deltas.items():
        component, _, path = module.partition(".")
        if scaling_of(config, component, path, delta.rank or 1).value(delta.rank) != delta.scale:
            return False
    return True
