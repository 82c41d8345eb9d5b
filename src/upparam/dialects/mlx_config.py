"""mlx-lm's `adapter_config.json`: for which modules `load_adapters` makes room, and whether that is for those of the factors beside it.

Source: ml-explore/mlx-lm mlx_lm/tuner/utils.py (linear_to_lora_layers, load_adapters: weights are loaded without `strict`, so factors of
a module without room are left out in silence).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from upparam.adapter import Adapter
from upparam.bases import inventory
from upparam.bases.base import Base
from upparam.findings import Finding, error, warning
from upparam.patterns import regex
from upparam.wording import counted_of

_LAYER = regex(r"((?:.+\.)?(?:layers|h))\.(\d+)\.(.+)")
_FIRST = "first layer"
"""Spelling: the first layer with factors, which the config's `num_layers` reaches; how many there are in all it does not say."""


def note_layers(adapter: Adapter, modules: Iterable[str]) -> None:
    """Remember which layers the source's config was for."""
    layers = _touched(modules)
    if layers:
        adapter.spelling[_FIRST] = str(min(layers))


def contradictions(adapter: Adapter, modules: Sequence[str]) -> list[Finding]:
    """Findings about factors of these modules (by mlx-lm's names) that mlx-lm would not load, or would leave out in silence."""
    found: list[Finding] = []
    rank = _parameters(adapter.config).get("rank")
    wrong = [target for target, delta in adapter.deltas.items() if delta.rank != rank]
    if isinstance(rank, int) and wrong:
        found.append(
            warning(
                "rank-differs", str(wrong[0]), f"{counted_of(len(wrong), len(modules), 'module', 'has', 'have')} another rank than the config; mlx-lm will not load them",
                f"config {rank}, here {adapter.deltas[wrong[0]].rank}",
            )
        )  # fmt: skip
    name = inventory.resolve(adapter.base.name) if adapter.base is not None and not adapter.base.lookalikes else None
    outside = _left_out(adapter.config, modules, None if name is None else inventory.load(name))
    if outside:
        what = f"{counted_of(len(outside), len(modules), 'module', 'has', 'have')} factors, and the config's keys or num_layers do not reach them"
        found.append(error("not-targeted", outside[0], f"{what}: mlx-lm leaves them out in silence", *outside[:5]))
    return found


def whole(adapter: Adapter, modules: Sequence[str], rank: int, scale: float, base: Base | None) -> dict[str, Any]:
    """The config `load_adapters` needs; the adapter's own kept where it is one of mlx-lm's, with rank, scale, keys and layers made true."""
    own = dict(adapter.config) if adapter.dialect == "mlx" else {}
    parameters = dict(_parameters(own))
    if parameters.get("alpha") is not None:
        del parameters["alpha"]
    if any(not _named(parameters.get("keys"), module) for module in modules):
        parameters.pop("keys", None)
    layers = _touched(modules)
    if layers and min(layers) < int(adapter.spelling.get(_FIRST, "0")):
        own.pop("num_layers", None)
        own.pop("lora_layers", None)
    keys = dict.fromkeys(match.group(3) if (match := _LAYER.fullmatch(name)) else name for name in modules)
    defaults = {"rank": rank, "dropout": 0.0, "scale": scale, "keys": list(keys)}
    config: dict[str, Any] = {"fine_tune_type": "lora", "num_layers": _reach(layers, base), **own}
    config["lora_parameters"] = {**defaults, **parameters, "rank": rank, "scale": scale}
    if "model" not in config and adapter.base is not None and adapter.base.stated:
        known = inventory.known().get(inventory.resolve(adapter.base.name) or "")
        config["model"] = known.ids[0] if known is not None and known.ids else adapter.base.name
    return config


def _parameters(config: Mapping[str, Any]) -> Mapping[str, Any]:
    found = config.get("lora_parameters")
    return found if isinstance(found, dict) else {}


def _left_out(config: Mapping[str, Any], modules: Sequence[str], base: Base | None) -> list[str]:
    """Modules without room: certainly so, whatever the depth of a base that is not known."""
    keys = _parameters(config).get("keys")
    found = [module for module in modules if not _named(keys, module)]
    last = config.get("num_layers", config.get("lora_layers"))
    if isinstance(last, int) and last > 0:
        depth = _depth(base) or max(_touched(modules), default=-1) + 1
        found += [
            module for module in modules
            if (match := _LAYER.fullmatch(module)) and int(match.group(2)) < depth - last and module not in (keys or ()) and module not in found
        ]  # fmt: skip
    return found


def _named(keys: Any, module: str) -> bool:
    """Whether the keys of a config mean this module, by its path in its layer or in the model. None means the model's default ones."""
    if not isinstance(keys, list):
        return True
    match = _LAYER.fullmatch(module)
    return module in keys or (match is not None and match.group(3) in keys)


def _touched(modules: Iterable[str]) -> list[int]:
    return [int(match.group(2)) for name in modules if (match := _LAYER.fullmatch(name))]


def _depth(base: Base | None) -> int:
    """How many layers the base has; 0 where it is not known."""
    return 1 + max((int(match.group(2)) for module in base.modules if (match := _LAYER.fullmatch(module.path))), default=-1) if base else 0


def _reach(touched: Sequence[int], base: Base | None) -> int:
    """How many of the last layers get factors: enough to reach the first one touched; -1 (all) where the base's depth is not known."""
    total = _depth(base)
    return total - min(touched) if touched and total > max(touched) else -1
