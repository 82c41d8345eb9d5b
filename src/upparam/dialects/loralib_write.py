"""Writing loralib: the state dict that its layers load, and beside it what they are built with."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from math import prod
from typing import Any

from upparam.adapter import Adapter, ExtraKind, Target
from upparam.algorithms import called
from upparam.algorithms.base import Delta
from upparam.algorithms.lora import LoRA
from upparam.algorithms.slicing import stack
from upparam.bases.layouts import LayoutMap, find
from upparam.dialects.base import NamedTensors, Package
from upparam.dialects.placing import base_of
from upparam.dialects.refusing import other_rank, other_scale, refuse
from upparam.dialects.words import alpha_for
from upparam.errors import Problem, RefusedError
from upparam.tensors import Tensor

FILE, SIDE = "lora.pt", "loralib.json"
_PATHS = ("reference", "peft", "diffusers", "triad")
"""Layouts in which a target is the path of a module, even where no base is known."""
Parts = list[tuple["tuple[int, int] | None", LoRA]]


def package(adapter: Adapter, options: Mapping[str, Any]) -> Package:
    """The two files. Raises RefusedError listing what loralib has no layers for, and where names are no module paths."""
    if adapter.layout not in _PATHS:
        raise RefusedError(
            "loralib needs the module names of the base, and the base is not known",
            file=adapter.files[0] if adapter.files else None, found=f"names in layout {adapter.layout}", remedy="name it with --base",
        )  # fmt: skip
    if not adapter.deltas:
        raise RefusedError("loralib saves no adapter without factors", file=adapter.files[0] if adapter.files else None)
    base = base_of(adapter, options)
    # The weight of an adapted module beside its factors is what a training checkpoint holds: the base's own.
    adapted = {f"{target.module}.weight" for target in adapter.deltas}
    problems = [
        f"{extra.kind.value} {extra.name}" for extra in adapter.extras
        if extra.kind not in (ExtraKind.BIAS, ExtraKind.SAVED_MODULE) or not extra.name.endswith((".weight", ".bias")) or extra.name in adapted
    ]  # fmt: skip
    problems += [f"{target}: {problem}" for target, delta in adapter.deltas.items() if (problem := _problem(target, delta)) is not None]
    refuse("loralib", problems)
    own = adapter.spelling if adapter.dialect == "loralib" else {}
    one = find(base, own["layout"]) if base is not None and "layout" in own else None
    modules: dict[str, Parts] = {}
    for target, delta in adapter.deltas.items():
        assert isinstance(delta, LoRA)
        modules.setdefault(target.module, []).append((target.rows, delta))
    tensors: dict[str, Tensor] = {}
    layers: dict[str, dict[str, Any]] = {}
    for module, parts in modules.items():
        known = None if base is None else base.by_path.get(module)
        name = _spelled(module, one)
        embedding = parts[0][1].embedding or (known is not None and known.kind == "Embedding")
        out = known.canonical[0] if known is not None else int(own.get(f"rows {module}", 0)) or None
        layers[name], down, up = _layer(module, parts, out, embedding=embedding)
        tensors |= {f"{name}.lora_A": down, f"{name}.lora_B": up}
    for extra in adapter.extras:
        module, _, leaf = extra.name.rpartition(".")
        tensors[f"{_spelled(module, one)}.{leaf}"] = extra.tensor
    structure: Any = dict(tensors)
    for key in reversed(own["where"].split("/") if "where" in own else ()):
        structure = {key: structure}
    side = json.dumps({"layers": layers}, indent=2, ensure_ascii=False) + "\n"
    return Package({FILE: NamedTensors(tensors, container="torch", structure=structure), SIDE: side.encode()})


def _spelled(module: str, one: LayoutMap | None) -> str:
    place = None if one is None else one.to_foreign(module)
    return module if place is None else place.foreign


def _problem(target: Target, delta: Delta) -> str | None:
    if target.parameter != "weight":
        return f"a delta of the {target.parameter}"
    if type(delta) is not LoRA:
        return f"{called(delta.algorithm)} delta"
    if delta.mid is not None:
        return "a Tucker core"
    if prod(delta.shape[2:]) != 1:
        return "a convolution: its layer factors the kernel in another way"
    return "the scale is unknown; give it with --alpha or --scale" if delta.scale is None else None


def _layer(module: str, parts: Parts, out: int | None, *, embedding: bool) -> tuple[dict[str, Any], Tensor, Tensor]:
    """What a module's layer is built with, its lora_A and its lora_B."""
    first = parts[0][1]
    first.known_scale()  # raises where it is no finite number
    alpha = alpha_for(first)
    arguments: dict[str, Any] = {"r": first.rank, "lora_alpha": _number(float(first.rank) if alpha is None else alpha)}
    downs = [part.down.reshape(part.down.shape[:2]) for _, part in parts]
    ups = [part.up.reshape(part.up.shape[:2]) for _, part in parts]
    if parts[0][0] is None:
        if not embedding:
            return arguments, downs[0], ups[0]
        return {"num_embeddings": ups[0].shape[0], **arguments}, ups[0].T, downs[0].T
    arguments["enable_lora"] = _enabled(module, parts, out)
    order = sorted(range(len(parts)), key=lambda index: parts[index][0] or (0, 0))
    return arguments, stack([downs[index] for index in order]), stack([ups[index] for index in order])


def _uneven(module: str, parts: Parts) -> list[Problem]:
    """Slices of one layer whose ranks or scales differ."""
    rank, scale = max(part.rank for _, part in parts), Counter(part.known_scale() for _, part in parts).most_common(1)[0][0]
    ranks = [
        other_rank(str(target), part.rank, rank, (target,)) for rows, part in parts if part.rank < rank and (target := Target(module, rows))
    ]
    return ranks or [
        other_scale(str(Target(module, rows)), part, scale, f"scale {part.scale:g} beside {scale:g}, and a MergedLinear has one for all its parts")
        for rows, part in parts if part.scale != scale
    ]  # fmt: skip


def _enabled(module: str, parts: Parts, out: int | None) -> list[bool]:
    """`enable_lora` of a MergedLinear. Raises RefusedError where the slices are not equal blocks of one rank, scale and dtype."""
    spans = sorted(span for span, _ in parts if span is not None)
    size = spans[0][1] - spans[0][0]
    alike = {(part.rank, part.known_scale(), part.up.dtype, part.down.dtype) for _, part in parts}
    blocks = out // size if out is not None and out % size == 0 else 0
    refuse("loralib", _uneven(module, parts))
    if len(spans) < len(parts) or len(alike) > 1 or not blocks or any(low % size or high - low != size for low, high in spans):
        shown = ", ".join(f"rows {low} to {high}" for low, high in spans)
        why = (
            "slices that are not equal blocks of one rank, scale and dtype"
            if out is not None
            else "slices of a weight whose size is not known"
        )
        raise RefusedError(
            f"{why}: a MergedLinear adapts nothing else",
            tensor=module,
            found=shown,
            remedy=None if out is not None else "name the base with --base",
        )
    return [(block * size, (block + 1) * size) in spans for block in range(blocks)]


def _number(value: float) -> float | int:
    return int(value) if value == int(value) else value
