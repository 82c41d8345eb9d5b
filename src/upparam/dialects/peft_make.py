"""A whole `adapter_config.json`, for an adapter that came from elsewhere or has changed since.

Sources: huggingface/peft src/peft/tuners/{lora,loha,lokr}/config.py, src/peft/tuners/lokr/layer.py (factorization),
src/peft/tuners/tuners_utils.py (check_target_module_exists), src/peft/peft_model.py (heads saved with a task).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isclose
from typing import Any

from upparam.adapter import Adapter, Extra, ExtraKind, Target
from upparam.algorithms import TITLES
from upparam.algorithms.base import Delta, ScaleRule
from upparam.algorithms.lokr import LoKr
from upparam.bases import inventory
from upparam.bases.base import Base
from upparam.dialects.base import ReadOptions
from upparam.dialects.peft_config import conditions, number, of_parameters, patterned, scaling_of, targeted, words
from upparam.dialects.peft_kinds import ALPHA_WORD, PEFT_TYPES, deltas_of, method_of
from upparam.dialects.peft_method import Method, Written
from upparam.dialects.peft_names import Sorted
from upparam.errors import RefusedError
from upparam.tensors import Tensor

_EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "word_embeddings", "embed_in", "embed_out", "shared")
"""Modules that PEFT saves whole when the vocabulary was resized or they are adapted, without listing them in modules_to_save."""

_TASKS_WITH_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
_HEADS = ("classifier", "score", "qa_outputs")
"""Modules that PEFT saves for these tasks without being told (peft src/peft/peft_model.py)."""


@dataclass(frozen=True)
class Model:
    """One model to be saved: its deltas by PEFT's module names, its extras under PEFT's names, the base's modules as PEFT names them.

    `biased` when every up has a bias.
    """

    deltas: Mapping[str, Delta]
    extras: Sequence[Extra]
    base: Base | None
    biased: bool = False

    @property
    def type(self) -> str:
        """PEFT's word for the algorithm. Raises RefusedError for several that PEFT does not hold in one adapter."""
        types = Counter(PEFT_TYPES[delta.algorithm] for delta in self.deltas.values())
        decomposed = {delta.algorithm == "dora" for delta in self.deltas.values()}
        if len(types) > 1 or len(decomposed) > 1:
            kinds = Counter(delta.algorithm for delta in self.deltas.values())
            raise RefusedError(
                "PEFT has one algorithm for all modules of an adapter",
                found=", ".join(f"{count} {TITLES[kind]}" for kind, count in kinds.items()),
            )
        return next(iter(types))

    @property
    def method(self) -> Method | None:
        """How PEFT holds the deltas where that is another way than LoRA's, LoHa's and LoKr's."""
        return method_of(next(iter(self.deltas.values())))

    def names(self, kind: ExtraKind) -> list[str]:
        """The names of the extras of one kind."""
        return [extra.name for extra in self.extras if extra.kind is kind]


def for_saving(adapter: Adapter, component: str, model: Model) -> Mapping[str, Any]:
    """The config to save with one component: the adapter's own verbatim while it is true, else a complete new one.

    Raises RefusedError for what PEFT has no config for.
    """
    own = dict(adapter.config) if adapter.dialect == "peft" else {}
    if component and f"config:{component}" in adapter.spelling:
        own = json.loads(adapter.spelling[f"config:{component}"]) or {}
    if model.method is not None:
        return own if _still_read(own, model, adapter) else _made(adapter, own, model)
    untouched = adapter.spelling.get("targets") == str(len(adapter.deltas))
    if untouched and own and (adapter.conditions or not conditions(own)):
        for config in (own, _restated(own, model)):
            if _still_true(config, model, adapter.transposed_base):
                return config
    return _made(adapter, own, model)


def _still_true(config: Mapping[str, Any], model: Model, transposed: bool | None) -> bool:
    """Whether a config that came with an adapter describes these modules as they are now."""
    if not config or (config.get("peft_type") or "LORA") != model.type or config.get("enable_lora"):
        return False
    dora = any(delta.algorithm == "dora" for delta in model.deltas.values())
    if (bool(config.get("use_dora")), bool(config.get("lora_bias"))) != (dora, model.biased):
        return False
    for module, delta in model.deltas.items():
        r = patterned(config.get("rank_pattern"), module, number(config, "r"))
        scale, said = delta.scale, scaling_of(config, module, delta.rank or 0, ReadOptions()).value(delta.rank)
        if r != (delta.rank or r) or not (
            targeted(config.get("target_modules"), module) or targeted(config.get("target_parameters"), module)
        ):
            return False
        if scale is None or said is None or not isclose(scale, said, rel_tol=1e-12):
            return False
    return _rest_true(config, model, transposed)


def _rest_true(config: Mapping[str, Any], model: Model, transposed: bool | None) -> bool:
    """Whether the config says which modules were saved whole, and how the base stores its weights."""
    saved = {name.rsplit(".", 1)[0] for name in model.names(ExtraKind.SAVED_MODULE)}
    listed = words(config, "modules_to_save")
    unlisted = {module for module in saved if not any(module.endswith(word) for word in listed)} - set(model.deltas)
    heads = _EMBEDDINGS + (_HEADS if config.get("task_type") in _TASKS_WITH_HEAD else ())
    if any(module.rsplit(".", 1)[-1] not in heads for module in unlisted) or (listed and not saved):
        return False
    return transposed is None or bool(config.get("fan_in_fan_out")) is transposed


def _restated(config: Mapping[str, Any], model: Model) -> dict[str, Any]:
    """A config of LoRAs with the ranks and alphas that its modules have now, and nothing else changed."""
    ranks = {module: delta.rank or 0 for module, delta in model.deltas.items()}
    said = _ranked(model.deltas, "LORA", ranks, bool(config.get("use_rslora")))
    return {**config, **{key: value for key, value in said.items() if value or key in config}}


def _still_read(config: Mapping[str, Any], model: Model, adapter: Adapter) -> bool:
    """The same for the other methods: whether reading these factors with the config gives these deltas, and it names their modules."""
    method = model.method
    if not config or method is None or config.get("peft_type") != model.type or adapter.spelling.get("targets") != str(len(model.deltas)):
        return False
    shared = {name.removeprefix("base_model."): tensor for name, tensor in method.shared(model.deltas).items()}
    for module, delta in model.deltas.items():
        factors = {word.removesuffix(".weight"): tensor for word, tensor in method.spell(delta, None).items()}
        again = deltas_of(module, factors, config, ReadOptions(), Sorted(shared=shared))
        same = not isinstance(again, str) and _alike(again.get(Target(module)), delta)
        if not same or not method.loads(config, module, delta) or not targeted(config.get("target_modules"), module):
            return False
    return _rest_true(config, model, adapter.transposed_base)


def _alike(one: Delta | None, other: Delta) -> bool:
    """Whether two deltas agree in all but their tensors, and in these by shape."""
    if type(one) is not type(other) or one is None:
        return False
    shapes = [[(role, tensor.shape, tensor.dtype) for role, tensor in delta.factors().items()] for delta in (one, other)]
    plain = [{name: value for name, value in vars(delta).items() if not isinstance(value, Tensor)} for delta in (one, other)]
    for values in plain:
        values.pop("columns", None)
    return shapes[0] == shapes[1] and plain[0] == plain[1]


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


def _made(adapter: Adapter, old: Mapping[str, Any], model: Model) -> dict[str, Any]:
    """A complete config for these modules.

    Rank and alpha are those most modules have; rank_pattern and alpha_pattern say the rest. target_modules are endings of paths where
    the base shows that these mean exactly the adapter's modules, whole paths otherwise.
    """
    kind, names = model.type, model.deltas
    parameters = [name for name in names if names[name].algorithm == "expert-lora" or of_parameters(old, name.rpartition(".")[0])]
    saved = model.names(ExtraKind.SAVED_MODULE)
    made: dict[str, Any] = {
        "auto_mapping": None, "base_model_name_or_path": None, "inference_mode": True, "layers_pattern": None, "layers_to_transform": None,
        "modules_to_save": _whole(sorted({path.rsplit(".", 1)[0] for path in saved} - set(names)), old), "peft_type": kind, "revision": None,
        "target_modules": target_modules([name for name in names if name not in parameters], model.base), "task_type": _task(saved),
    }  # fmt: skip
    method = model.method
    if method is not None:
        written = Written(names, made["target_modules"], old if old.get("peft_type") == kind else {}, model.base)
        made |= _of_method(method, written, model, adapter)
    elif kind == "LORA":
        biases = {path.rsplit(".", 1)[0] for path in model.names(ExtraKind.BIAS)}
        rooted = all(delta.scaling.rule is ScaleRule.ALPHA_OVER_SQRT_RANK and delta.scaling.divisor is None for delta in names.values())
        made |= _ranked(names, kind, {module: delta.rank or 0 for module, delta in names.items()}, rooted) | {
            "bias": "none" if not biases else "lora_only" if biases <= set(names) else "all", "fan_in_fan_out": _conv1d(adapter, names, model.base),
            "init_lora_weights": True, "lora_bias": model.biased, "lora_dropout": 0.0, "target_parameters": sorted(parameters) or None,
            "use_dora": any(delta.algorithm == "dora" for delta in names.values()), "use_rslora": rooted,
        }  # fmt: skip
    else:
        ranks = {module: delta.rank or 0 for module, delta in names.items()} if kind == "LOHA" else _lokr_ranks(names)
        cores = [delta for delta in names.values() if delta.factors().keys() & {"t1", "t2"}]
        made |= _ranked(names, kind, ranks, False) | {
            "init_weights": True, "module_dropout": 0.0, "rank_dropout": 0.0, "use_effective_conv2d": bool(cores),
        }  # fmt: skip
        if kind == "LOKR":
            made |= _lokr_shape([delta for delta in names.values() if isinstance(delta, LoKr)], ranks.values())
    return made | _kept(old, adapter, bool(saved))


def _of_method(method: Method, written: Written, model: Model, adapter: Adapter) -> dict[str, Any]:
    """The settings of one of the other methods: its own, whether biases were trained, and how the base stores its weights."""
    made = method.settings(written) | {key: written.old[key] for key in method.kept if key in written.old}
    biases = {path.rsplit(".", 1)[0] for path in model.names(ExtraKind.BIAS)}
    if method.biases:
        made["bias"] = "none" if not biases else method.biases if biases <= set(written.deltas) else "all"
    elif biases:
        raise RefusedError(f"PEFT trains no biases beside {method.type}", found=sorted(biases)[0])
    if method.transposes:
        made["fan_in_fan_out"] = _conv1d(adapter, written.deltas, model.base)
    return made


def _ranked(names: Mapping[str, Delta], kind: str, ranks: Mapping[str, int], rooted: bool) -> dict[str, Any]:
    """Rank and alpha of every module: the commonest as r and alpha, the others in patterns."""
    alphas = {module: _alpha(delta, ranks[module], rooted) for module, delta in names.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "r": rank, ALPHA_WORD[kind]: _plain(alpha),
        "rank_pattern": {_pattern(module, names): value for module, value in ranks.items() if value != rank},
        "alpha_pattern": {_pattern(module, names): _plain(value) for module, value in alphas.items() if value != alpha},
    }  # fmt: skip


def _alpha(delta: Delta, rank: int, rooted: bool) -> float:
    """The alpha that gives the delta's scale with this rank: the stored one where that says the same."""
    scaling = delta.scaling
    stored = scaling.divisor in (None, rank) and delta.rank is not None and (rooted or scaling.rule is ScaleRule.ALPHA_OVER_RANK)
    return scaling.alpha if stored and scaling.alpha is not None else delta.known_scale() * rank


def _lokr_ranks(names: Mapping[str, Delta]) -> dict[str, int]:
    """PEFT's r of each module: that of its factors, and for full factors the least with which PEFT makes them full."""
    ranks: dict[str, int] = {}
    for module, delta in names.items():
        assert isinstance(delta, LoKr)
        full = max((side for tensor in (delta.w1, delta.w2) if tensor is not None for side in tensor.shape[:2]), default=1)
        ranks[module] = delta.rank or -(-full // 2)
    return ranks


def _lokr_shape(deltas: Sequence[LoKr], ranks: Iterable[int]) -> dict[str, Any]:
    """decompose_both and the decompose_factor with which PEFT makes factors of these sizes. Raises RefusedError where it has none."""
    both = any(delta.w1 is None for delta in deltas)
    found = [_halves(delta) for delta in deltas]
    for factor in (-1, *sorted({side for (a, _), (b, _) in found for side in (a, b)})):
        good = all(
            (a, c) == factorization(a * c, factor) and (b, d) == factorization(b * d, factor)
            and (delta.w1 is None) == (both and rank < max(a, b) / 2) and (delta.w2 is None) == (rank < max(c, d) / 2)
            for ((a, c), (b, d)), delta, rank in zip(found, deltas, ranks, strict=True)
        )  # fmt: skip
        if good:
            return {"decompose_both": both, "decompose_factor": factor, "rank_dropout_scale": False}
    raise RefusedError("PEFT would make LoKr factors of other sizes for these modules")


def _halves(delta: LoKr) -> tuple[tuple[int, int], tuple[int, int]]:
    """((a, c), (b, d)) of w1 (a, b) and w2 (c, d)."""
    first = delta.w1 if delta.w1 is not None else delta.w1_a
    second = delta.w1 if delta.w1 is not None else delta.w1_b
    assert first is not None and second is not None
    a, b = first.shape[0], second.shape[1]
    return (a, delta.shape[0] // a), (b, delta.shape[1] // b)


def factorization(dimension: int, factor: int) -> tuple[int, int]:
    """The two numbers, smaller first unless `factor` divides, into which PEFT splits a dimension: by `factor`, or (-1) near its root."""
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    limit = dimension if factor == -1 else factor
    small = max((side for side in range(1, int(dimension**0.5) + 1) if dimension % side == 0 and side <= limit), default=1)
    return small, dimension // small


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


def _whole(modules: list[str], old: Mapping[str, Any]) -> list[str] | None:
    """What modules_to_save says of these: the old words where they, or the old task, name each of them."""
    listed = words(old, "modules_to_save")
    heads = _HEADS if old.get("task_type") in _TASKS_WITH_HEAD else ()
    if modules and all(any(module.endswith(word) for word in listed) or module.rsplit(".", 1)[-1] in heads for module in modules):
        return list(listed) or None
    return modules or None


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
