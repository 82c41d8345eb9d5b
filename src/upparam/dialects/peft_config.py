"""PEFT's `adapter_config.json`: the scale it gives each module, and a whole config for an adapter that came from elsewhere.

Sources: huggingface/peft src/peft/tuners/lora/config.py, src/peft/tuners/lora/layer.py (scaling), src/peft/utils/other.py
(get_pattern_key), src/peft/tuners/tuners_utils.py (check_target_module_exists).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from math import isclose, isfinite
from typing import Any

from upparam.adapter import FROM_BASE, REPEATED
from upparam.algorithms.base import UNKNOWN, ScaleRule, Scaling
from upparam.dialects.base import ReadOptions
from upparam.errors import LimitError, MalformedError, UsageError
from upparam.patterns import regex

FILE = "adapter_config.json"


MAX_REPEATS = 2
"""Unbounded repeats (`*`, `+`, `{n,}`) a pattern may have, none of them of a group, so that no pattern can be made to match forever."""
MAX_PATH = 256
"""Length of a module path above which a pattern is only compared, not matched."""
_REPEAT = regex(r"(?<!\\)(?:[*+]|\{\d*,\d*\})")
_GROUP_REPEAT = regex(r"(?<!\\)\)(?:[*+]|\{)")


def number(config: Mapping[str, Any], key: str) -> float | None:
    """A finite number of the config; None when it is absent or null. Raises MalformedError for anything else."""
    value = config.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not isfinite(value):
        raise MalformedError(f"{key} is not a number", file=FILE, found=repr(value)[:80])
    return float(value)


def words(config: Mapping[str, Any] | None, key: str) -> tuple[str, ...]:
    """A list of names in the config; () when it is absent or null. Raises MalformedError for anything else."""
    value = (config or {}).get(key)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise MalformedError(f"{key} is not a list of names", file=FILE, found=repr(value)[:80])
    return tuple(value)


def matches(pattern: str, path: str, *, whole: bool = False) -> bool:
    """Whether a regular expression of a config means this module path: the end of it, or (`whole`) all of it.

    Never for one that is no regular expression. Raises LimitError for one so elaborate that matching it could take forever.
    """
    compiled = _compiled(pattern, whole)
    return compiled is not None and len(path) <= MAX_PATH and compiled.match(path) is not None


@lru_cache(maxsize=1 << 13)
def _compiled(pattern: str, whole: bool) -> re.Pattern[str] | None:
    if len(_REPEAT.findall(pattern)) > MAX_REPEATS or _GROUP_REPEAT.search(pattern):
        raise LimitError(
            "a pattern too elaborate to be matched safely", file=FILE, found=pattern[:80],
            expected=f"at most {MAX_REPEATS} unbounded repeats, none of a group", remedy="write the module names out",
        )  # fmt: skip
    try:
        return re.compile(rf"({pattern})\Z" if whole else rf"(.*\.)?({pattern})$")
    except (re.error, OverflowError, RecursionError):
        return None


def patterned(patterns: Any, module: str, default: float | None) -> float | None:
    """The value of the first pattern that matches the end of the module's path, else of the path itself, else the default (get_pattern_key)."""
    if not isinstance(patterns, Mapping):
        return default
    for pattern in patterns:
        if matches(pattern, module):
            return number(patterns, pattern)
    return number(patterns, module) if module in patterns else default


def scaling_of(config: Mapping[str, Any] | None, module: str, rank: int, options: ReadOptions) -> Scaling:
    """The scale of one module: alpha / r (/ sqrt(r) with use_rslora), each by its pattern; what the user said where no config does.

    `rank` is that of the factors, 0 where they have none (two full Kronecker factors); then r must be known for alpha to mean anything.
    Raises UsageError when the user says another alpha or scale than the config.
    """
    config = config or {}
    rule = ScaleRule.ALPHA_OVER_SQRT_RANK if config.get("use_rslora") is True else ScaleRule.ALPHA_OVER_RANK
    key = "lora_alpha" if "lora_alpha" in config or "alpha" not in config else "alpha"
    r = patterned(config.get("rank_pattern"), module, number(config, "r"))
    if r is not None and r <= 0:
        raise MalformedError("r is not a positive number", file=FILE, tensor=module, found=r)
    if r is None and not rank:
        r = options.rank
    divisor = r if r != rank else None
    if number(config, key) is None:
        if options.scale is not None:
            return Scaling(ScaleRule.EXPLICIT, multiplier=options.scale)
        return UNKNOWN if options.alpha is None or not (rank or r) else Scaling(rule, options.alpha, divisor=divisor)
    alpha = patterned(config.get("alpha_pattern"), module, number(config, key))
    scaling = Scaling(rule, alpha, divisor=divisor) if rank or r else UNKNOWN
    agreed(scaling, alpha, rank, module, options)
    return scaling


def agreed(scaling: Scaling, alpha: float | None, rank: int, module: str, options: ReadOptions) -> None:
    """Raise UsageError where the user says another alpha or scale than the config."""
    if options.alpha is not None and options.alpha != alpha:
        raise UsageError(
            "the config says another alpha",
            file=FILE,
            tensor=module,
            expected=None if alpha is None else f"{alpha:g}",
            found=f"--alpha {options.alpha:g}",
        )
    value = scaling.value(rank)
    if options.scale is not None and (value is None or not isclose(value, options.scale, rel_tol=1e-9)):
        raise UsageError("the config says another scale", file=FILE, tensor=module, expected=value, found=f"--scale {options.scale:g}")


def of_parameters(config: Mapping[str, Any] | None, module: str) -> bool:
    """Whether the factors are of bare parameters of this module (`target_parameters`: the experts of a mixture, stacked)."""
    bare = re.sub(r"(\.base_layer)+$", "", module)
    owners = {parameter.rpartition(".")[0] for parameter in words(config, "target_parameters")}
    return any(bare == owner or bare.endswith(f".{owner}") for owner in owners if owner)


_TAKES_FROM_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def conditions(config: Mapping[str, Any]) -> list[str]:
    """Why the factors alone are not the change to the base's weights, one sentence for each reason."""
    found = []
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_TAKES_FROM_BASE):
        found.append(
            f"init_lora_weights is {start}: {FROM_BASE} before training; the change is the difference to the initial adapter, which "
            "convert and merge take with --initial (PEFT: path_initial_model_for_weight_conversion)"
            + ("; the model that was trained also lacked what quantising the base lost" if start.lower() == "loftq" else "")
        )
    if config.get("kasa_config"):
        found.append("KaSA: on loading, PEFT first takes the smallest singular values out of the base's weights")
    if config.get("alora_invocation_tokens"):
        found.append("Activated LoRA: it acts only on tokens from its invocation sequence on, so no weight can hold it")
    if config.get("layer_replication"):
        found.append(f"layer_replication {config['layer_replication']}: {REPEATED}")
    if config.get("use_qalora"):
        found.append("QA-LoRA: inputs are pooled in groups before lora_A")
    if config.get("use_bdlora"):
        found.append("BD-LoRA: one of the factors is block-diagonal and stored as its blocks")
    return found


def targeted(targets: Any, module: str) -> bool:
    """Whether `target_modules` means this module: a regular expression over the path, or a list of path endings."""
    if isinstance(targets, str):
        return targets == "all-linear" or matches(targets, module, whole=True)
    if not isinstance(targets, Sequence):
        return False
    wanted = {f"{word}" for word in targets}
    endings = accumulate(reversed(module.split(".")), lambda ending, name: f"{name}.{ending}")
    return any(ending in wanted for ending in endings)
