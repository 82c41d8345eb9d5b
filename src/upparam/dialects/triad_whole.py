"""What `split` writes into a triad's config so that the adapter comes back whole: everything of the canonical form but the tensors."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any

from upparam.adapter import Adapter, BaseHint, Extra, ExtraKind, Target
from upparam.algorithms import ALGORITHMS, called
from upparam.algorithms.base import Delta, ScaleRule, Scaling
from upparam.bases.base import Base
from upparam.dialects.prefixes import Naming, change
from upparam.errors import MalformedError, RefusedError
from upparam.tensors import Tensor

KEY = "upparam"
_PLAIN = (bool, int, float, str, type(None))


def factors_of(target: Target, delta: Delta) -> dict[str, Tensor]:
    """The delta's tensors by field. Raises RefusedError for one that is a part of another (a slice of rows without factors of its own)."""
    if delta.algorithm not in ALGORITHMS or type(delta) is not _class(delta.algorithm):
        raise RefusedError(f"{called(delta.algorithm)} delta over a part of a weight has no factors of its own", tensor=str(target))
    return {item.name: value for item in fields(delta) if isinstance(value := getattr(delta, item.name), Tensor)}  # type: ignore[arg-type]


def described(adapter: Adapter) -> dict[str, Any]:
    """The note: modules in order with algorithm, scale and plain fields; dialect, layout, base, metadata, config, spelling, extras."""
    modules = []
    for target, delta in adapter.deltas.items():
        plain = {item.name: value for item in fields(delta) if isinstance(value := getattr(delta, item.name), _PLAIN)}  # type: ignore[arg-type]
        scaling = asdict(delta.scaling) | {"rule": delta.scaling.rule.value}
        rows = list(target.rows) if target.rows else None
        modules.append(
            {"target": [target.module, rows, target.parameter], "algorithm": delta.algorithm, "scaling": scaling, "fields": plain}
        )
    return {
        "dialect": adapter.dialect, "layout": adapter.layout, "transposed_base": adapter.transposed_base,
        "base": None if adapter.base is None else asdict(adapter.base), "metadata": adapter.metadata, "config": adapter.config,
        "spelling": adapter.spelling, "conditions": adapter.conditions, "modules": modules,
        "extras": [[extra.kind.value, extra.name] for extra in adapter.extras],
    }  # fmt: skip


def restored(note: Mapping[str, Any], factors: Mapping[Any, Mapping[str, Tensor]], extras: Mapping[str, Tensor], file: str) -> Adapter:
    """The adapter a note describes. Raises MalformedError where the note is not of our form or a tensor it names is missing."""
    try:
        base = note["base"]
        adapter = Adapter(
            {}, str(note["dialect"]), metadata=dict(note["metadata"]), config=dict(note["config"]), layout=str(note["layout"]),
            base=None if base is None else BaseHint(
                str(base["name"]), float(base["confidence"]), tuple(base["evidence"]), bool(base["stated"]), tuple(base["lookalikes"])
            ),
            transposed_base=note["transposed_base"], spelling=dict(note["spelling"]), conditions=list(note["conditions"]),
            found_as="triad",
        )  # fmt: skip
        for module in note["modules"]:
            path, rows, parameter = module["target"]
            target = Target(path, tuple(rows) if rows else None, parameter)
            scaling = Scaling(**(module["scaling"] | {"rule": ScaleRule(module["scaling"]["rule"])}))
            if module["algorithm"] not in ALGORITHMS:
                raise MalformedError("an algorithm upparam does not know", file=file, tensor=str(target), found=module["algorithm"])
            have = factors.get(str(target), {})
            known = {item.name for item in fields(_class(module["algorithm"]))}  # type: ignore[arg-type]
            given = {name: value for name, value in module["fields"].items() if name in known and isinstance(value, _PLAIN)}
            adapter.deltas[target] = _class(module["algorithm"])(**{**given, **have, "scaling": scaling})
        for kind, name in note["extras"]:
            adapter.extras.append(Extra(ExtraKind(kind), name, extras[f"{kind}:{name}"]))
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        raise MalformedError("the config's upparam section does not describe these factors", file=file, found=str(problem)) from problem
    return adapter


def placed(adapter: Adapter, base: Base) -> None:
    """Put what was split under names that no base then explained under those of the base the user names, where it explains them."""
    shapes = {
        target.module: delta.shape for target, delta in adapter.deltas.items() if target.parameter == "weight" and target.rows is None
    }
    naming = change(base, shapes) if adapter.layout == "peft" else None
    if naming is None or (adapter.dialect != "peft" and naming != Naming()):
        return
    paths = [*(target.module for target in adapter.deltas), *(extra.name for extra in adapter.extras)]
    if adapter.dialect == "peft":
        adapter.spelling["names:"] = json.dumps([naming.strip, naming.add, *(path for path in paths if not path.startswith(naming.strip))])
    adapter.deltas = {target._replace(module=naming(target.module)): delta for target, delta in adapter.deltas.items()}
    adapter.extras = [replace(extra, name=naming(extra.name)) for extra in adapter.extras]
    adapter.base, adapter.layout = BaseHint(base.name, 1.0, ("named by the user", *base.evidence), True), "reference"


def _class(algorithm: str) -> type[Delta]:
    module, name = ALGORITHMS[algorithm].split(":")
    found: type[Delta] = getattr(importlib.import_module(module), name)
    return found
