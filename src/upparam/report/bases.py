"""Bases as facts and text: the list of what is known, and one base with its modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from upparam.bases.base import Base
from upparam.bases.inventory import known


def listing(facts: Sequence[dict[str, Any]]) -> str:
    """One line a base under its family."""
    width = max(len(fact["name"]) for fact in facts)
    lines: list[str] = []
    family = None
    for fact in facts:
        if fact["family"] != family:
            family = fact["family"]
            lines.append(f"{family}:")
        lines.append(f"  {fact['name']:{width}}  {fact['modules']:5} modules  {fact['title']}")
    return "\n".join([*lines, f"{len(facts)} bases. A model id or the path of a checkpoint works wherever a name does."])


def base_facts(base: Base, *, modules: bool) -> dict[str, Any]:
    """Name, family, ids, how many modules of which class, evidence, and with `modules` every module in order."""
    kinds: dict[str, int] = {}
    for module in base.modules:
        kinds[module.kind or "unknown"] = kinds.get(module.kind or "unknown", 0) + 1
    fact = known().get(base.name)
    facts: dict[str, Any] = {"name": base.name, "family": base.family}
    if fact is not None:
        facts |= {"title": fact.title, "ids": list(fact.ids)}
    facts |= {"modules": len(base.modules), "classes": kinds, "evidence": list(base.evidence)}
    if modules:
        facts["module_list"] = [
            {"path": module.path, "class": module.kind, "shape": list(module.shape), "bias": module.bias} for module in base.modules
        ]
    return facts


def base_text(facts: dict[str, Any]) -> str:
    """The facts of `base_facts` for people."""
    lines = [f"{facts['name']}: {facts.get('title', 'a base read from its own file')}"]
    if facts["family"]:
        lines.append(f"  family   {facts['family']}")
    if facts.get("ids"):
        lines.append(f"  also     {', '.join(facts['ids'])}")
    classes = ", ".join(f"{count} {kind}" for kind, count in sorted(facts["classes"].items(), key=lambda pair: -pair[1])[:6])
    lines.append(f"  modules  {facts['modules']} ({classes})")
    lines += [f"  because  {text}" for text in facts["evidence"]]
    for index, module in enumerate(facts.get("module_list", ())):
        shape = "x".join(map(str, module["shape"]))
        lines.append(f"  {index:5}  {module['path']}  {module['class']} {shape}{' + bias' if module['bias'] else ''}")
    return "\n".join(lines)
