"""PEFT's `adapter_config.json`: the scale it gives each module, and a whole config for an adapter that came from elsewhere.

Sources: huggingface/peft src/peft/tuners/lora/config.py, src/peft/tuners/lora/layer.py (scaling), src/peft/utils/other.py
(get_pattern_key), src/peft/tuners/tuners_utils.py (check_target_module_exists).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from math import isclose, isfinite
from typing import Any

from upparam.adapter import Adapter, Extra, ExtraKind
from upparam.algorithms.base import UNKNOWN, Delta, ScaleRule, Scaling
from upparam.algorithms.experts import ExpertLoRA
from upparam.bases import inventory
from upparam.bases.base import Base
from upparam.dialects.base import ReadOptions
from upparam.errors import LimitError, MalformedError, UsageError

FILE = "adapter_config.json"


MAX_REPEATS = 2
"""Unbounded repeats (`*`, `+`, `{n,}`) a pattern may have, none of them of a group, so that no pattern can be made to match forever."""
MAX_PATH = 256
"""Length of a module path above which a pattern is only compared, not matched."""
_REPEAT = re.compile(r"(?<!\\)(?:[*+]|\{\d*,\d*\})")
_GROUP_REPEAT = re.compile(r"(?<!\\)\)(?:[*+]|\{)")


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
    if len(_REPEAT.findall(pattern)) > MAX_REPEATS or _GROUP_REPEAT.search(pattern):
        raise LimitError(
            "a pattern too elaborate to be matched safely", file=FILE, found=pattern[:80],
            expected=f"at most {MAX_REPEATS} unbounded repeats, none of a group", remedy="write the module names out",
        )  # fmt: skip
    try:
        return len(path) <= MAX_PATH and re.match(rf"({pattern})\Z" if whole else rf"(.*\.)?({pattern})$", path) is not None
    except re.error:
        return False


def patterned(patterns: Any, module: str, default: float | None) -> float | None:
    """The value of the first pattern that matches the end of the module's path, else of the path itself, else the default (get_pattern_key)."""
    if not isinstance(patterns, Mapping):
        return default
    for pattern in patterns:
        if matches(pattern, module):
            return number(patterns, pattern)
    return number(patterns, module) if module in patterns else default


def scaling_of(config: Mapping[str, Any] | None, module: str, rank: int, options: ReadOptions) -> Scaling:
    """The scale of one module: lora_alpha / r (/ sqrt(r) with use_rslora), each by its pattern; what the user said where no config does.

    Raises UsageError when the user says another alpha or scale than the config.
    """
    if config is None or number(config, "lora_alpha") is None:
        rule = ScaleRule.ALPHA_OVER_SQRT_RANK if config and config.get("use_rslora") is True else ScaleRule.ALPHA_OVER_RANK
        if options.scale is not None:
            return Scaling(ScaleRule.EXPLICIT, multiplier=options.scale)
        return UNKNOWN if options.alpha is None else Scaling(rule, options.alpha)
    alpha = patterned(config.get("alpha_pattern"), module, number(config, "lora_alpha"))
    r = patterned(config.get("rank_pattern"), module, number(config, "r"))
    if r is not None and r <= 0:
        raise MalformedError("r is not a positive number", file=FILE, tensor=module, found=r)
    rule = ScaleRule.ALPHA_OVER_SQRT_RANK if config.get("use_rslora") is True else ScaleRule.ALPHA_OVER_RANK
    scaling = Scaling(rule, alpha, divisor=r if r is not None and r != rank else None)
    if options.alpha is not None and options.alpha != alpha:
        raise UsageError(
            "the config says another alpha", file=FILE, tensor=module, expected=f"{alpha:g}", found=f"--alpha {options.alpha:g}"
        )
    value = scaling.value(rank)
    if options.scale is not None and (value is None or not isclose(value, options.scale, rel_tol=1e-9)):
        raise UsageError("the config says another scale", file=FILE, tensor=module, expected=value, found=f"--scale {options.scale:g}")
    return scaling


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
            f"init_lora_weights is {start}: the initial factors were taken out of the base's weights before training; the change is "
            "the difference to the initial adapter (PEFT's path_initial_model_for_weight_conversion makes a plain LoRA of it)"
        )
    if config.get("kasa_config"):
        found.append("KaSA: on loading, PEFT first takes the smallest singular values out of the base's weights")
    if config.get("alora_invocation_tokens"):
        found.append("Activated LoRA: it acts only on tokens from its invocation sequence on, so no weight can hold it")
    if config.get("layer_replication"):
        found.append(
            f"layer_replication {config['layer_replication']}: its layers are those of a model with repeated layers, not of the base"
        )
    if config.get("use_qalora"):
        found.append("QA-LoRA: inputs are pooled in groups before lora_A")
    if config.get("use_bdlora"):
        found.append("BD-LoRA: one of the factors is block-diagonal and stored as its blocks")
    return found


_EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "word_embeddings", "embed_in", "embed_out", "shared")
"""Modules that PEFT saves whole when the vocabulary was resized or they are adapted, without listing them in modules_to_save."""

_TASKS_WITH_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
_HEADS = ("classifier", "score", "qa_outputs")
"""Modules that PEFT saves for these tasks without being told (peft src/peft/peft_model.py)."""


def for_saving(
    adapter: Adapter, component: str, names: Mapping[str, Delta], extras: Sequence[Extra], base: Base | None
) -> Mapping[str, Any]:
    """The config to save with these modules of one component: the adapter's own verbatim while it is true, else a complete new one.

    `names` and `extras` go by PEFT's names; `base` holds the component's modules by their own names.
    """
    own = dict(adapter.config) if adapter.dialect == "peft" else {}
    if component and f"config:{component}" in adapter.spelling:
        own = json.loads(adapter.spelling[f"config:{component}"]) or {}
    heads = [extra.name for extra in extras if extra.kind is ExtraKind.SAVED_MODULE]
    untouched = adapter.spelling.get("targets") == str(len(adapter.deltas))
    if untouched and (adapter.conditions or not conditions(own)) and _still_true(own, names, heads, adapter.transposed_base):
        return own
    biases = [extra.name for extra in extras if extra.kind is ExtraKind.BIAS]
    return _made(adapter, own, names, heads, biases, base)


def _still_true(config: Mapping[str, Any], names: Mapping[str, Delta], saved: Sequence[str], transposed: bool | None) -> bool:
    """Whether a config that came with an adapter describes these modules as they are now."""
    if not config or config.get("peft_type") not in (None, "LORA") or config.get("enable_lora"):
        return False
    for module, delta in names.items():
        r = patterned(config.get("rank_pattern"), module, number(config, "r"))
        scale, said = delta.scale, scaling_of(config, module, delta.rank or 0, ReadOptions()).value(delta.rank)
        if r != delta.rank or not (targeted(config.get("target_modules"), module) or targeted(config.get("target_parameters"), module)):
            return False
        if scale is None or said is None or not isclose(scale, said, rel_tol=1e-12):
            return False
    listed = words(config, "modules_to_save")
    heads = _EMBEDDINGS + (_HEADS if config.get("task_type") in _TASKS_WITH_HEAD else ())
    unlisted = {path.rsplit(".", 1)[0] for path in saved if not any(path.rsplit(".", 1)[0].endswith(word) for word in listed)}
    if any(module not in names and module.rsplit(".", 1)[-1] not in heads for module in unlisted) or (listed and not saved):
        return False
    return transposed is None or bool(config.get("fan_in_fan_out")) is transposed


def targeted(targets: Any, module: str) -> bool:
    """Whether `target_modules` means this module: a regular expression over the path, or a list of path endings."""
    if isinstance(targets, str):
        return targets == "all-linear" or matches(targets, module, whole=True)
    return isinstance(targets, Sequence) and any(module == word or module.endswith(f".{word}") for word in targets)


_KEPT = (
    "base_model_name_or_path", "task_type", "inference_mode", "lora_dropout", "revision", "init_lora_weights", "auto_mapping",
    "trainable_token_indices", "alora_invocation_tokens", "layer_replication", "kasa_config", "use_qalora", "qalora_group_size", "use_bdlora",
    "corda_config", "loftq_config", "lora_ga_config",
)  # fmt: skip


def _kept(old: Mapping[str, Any], adapter: Adapter, heads: bool) -> dict[str, Any]:
    """What a rewritten config keeps of an old one: what does not follow from the tensors."""
    found = {key: old[key] for key in _KEPT if key in old}
    if found.get("base_model_name_or_path") is None and (name := _model_id(adapter)) is not None:
        found["base_model_name_or_path"] = name
    if not adapter.conditions and conditions(old):
        found = {key: value for key, value in found.items() if not conditions({key: value})}
    if found.get("task_type") in _TASKS_WITH_HEAD and old.get("modules_to_save") and not heads:
        found["task_type"] = None
    return found


_CONV1D = "Conv1D"


def _made(
    adapter: Adapter, old: Mapping[str, Any], names: Mapping[str, Delta], saved: Sequence[str], biases: Sequence[str], base: Base | None
) -> dict[str, Any]:
    """A complete LoraConfig for these modules (by PEFT's names). `saved` and `biases` are parameter paths saved whole.

    r and lora_alpha are those most modules have; rank_pattern and alpha_pattern say the rest. target_modules are endings of paths where
    the base shows that these mean exactly the adapter's modules, whole paths otherwise.
    """
    parameters = [name for name, delta in names.items() if isinstance(delta, ExpertLoRA) or of_parameters(old, name.rpartition(".")[0])]
    ranks = {module: delta.rank or 0 for module, delta in names.items()}
    rooted = all(delta.scaling.rule is ScaleRule.ALPHA_OVER_SQRT_RANK and delta.scaling.divisor is None for delta in names.values())
    alphas = {module: _alpha(delta, rooted) for module, delta in names.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "alpha_pattern": {_pattern(module, names): _plain(value) for module, value in alphas.items() if value != alpha},
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "bias": "none" if not biases else "lora_only" if {path.rsplit(".", 1)[0] for path in biases} <= set(names) else "all",
        "fan_in_fan_out": _conv1d(adapter, names, base),
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": _plain(alpha),
        "lora_dropout": 0.0,
        "modules_to_save": sorted({path.rsplit(".", 1)[0] for path in saved} - set(names)) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {_pattern(module, names): value for module, value in ranks.items() if value != rank},
        "revision": None,
        "target_modules": target_modules([name for name in names if name not in parameters], base),
        "target_parameters": sorted(parameters) or None,
        "task_type": _task(saved),
        "use_dora": any(delta.algorithm == "dora" for delta in names.values()),
        "use_rslora": rooted,
    } | _kept(old, adapter, bool(saved))


def _alpha(delta: Delta, rooted: bool) -> float:
    rank, scaling = delta.rank or 1, delta.scaling
    if scaling.alpha is not None and scaling.divisor is None and (rooted or scaling.rule is ScaleRule.ALPHA_OVER_RANK):
        return scaling.alpha
    return delta.known_scale() * rank


def _plain(value: float) -> float:
    return int(value) if value == int(value) else value


def _pattern(module: str, names: Mapping[str, Delta]) -> str:
    """A pattern that means this module among the adapter's and no other."""
    own = re.escape(module)
    return own if sum(bool(re.match(rf"(.*\.)?({own})$", name)) for name in names) == 1 else f"^{own}"


_NO_TARGETS = ("LayerNorm", "RMSNorm", "GroupNorm", "BatchNorm2d")


def target_modules(modules: Sequence[str], base: Base | None) -> list[str] | str:
    """What means exactly these modules of the base: endings of paths, else whole paths, else a regular expression.

    Whole paths where the base is not known.
    """
    whole = sorted(modules)
    if base is None:
        return whole
    everything = [found.path for found in base.modules if found.kind not in _NO_TARGETS]
    endings = sorted({path.rsplit(".", 1)[-1] for path in modules})
    if not any(word.isdigit() for word in endings) and {path for path in everything if targeted(endings, path)} == set(modules):
        return endings
    if {path for path in everything if targeted(whole, path)} <= set(modules):
        return whole
    return "|".join(re.escape(path) for path in whole)


def _conv1d(adapter: Adapter, names: Mapping[str, Delta], base: Base | None) -> bool:
    """Whether the base stores these weights as (in, out): its module classes say, else what the adapter said itself."""
    kinds = {found.kind for module in names if base is not None and (found := base.by_path.get(module)) is not None}
    return _CONV1D in kinds if kinds - {""} else adapter.transposed_base is True


def _task(saved: Sequence[str]) -> str | None:
    """The task that a saved head tells of; None where it leaves several possible."""
    heads = {path.split(".")[-2] for path in saved if "." in path}
    if "score" in heads:
        return "SEQ_CLS"
    if "qa_outputs" in heads:
        return "QUESTION_ANS"
    return None


def _model_id(adapter: Adapter) -> str | None:
    """The model id of a base that the adapter itself or the user named."""
    hint = adapter.base
    if hint is None or not hint.stated:
        return None
    if "/" in hint.name:
        return hint.name
    known = inventory.known().get(hint.name)
    return known.ids[0] if known is not None and known.ids else hint.name
