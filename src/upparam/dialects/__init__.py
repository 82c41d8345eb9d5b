"""Dialects: how names and side files become an adapter. One file a member; this table is all the rest of the program knows of them."""

from __future__ import annotations

import importlib
from functools import cache

from upparam.adapter import Adapter
from upparam.containers.base import TensorFile
from upparam.dialects.base import Dialect, Match
from upparam.errors import UsageError
from upparam.plugins import installed

DIALECTS: dict[str, str] = {
    "peft": "upparam.dialects.peft",
    "onetrainer": "upparam.dialects.onetrainer",
    "lycoris": "upparam.dialects.lycoris",
    "kohya": "upparam.dialects.kohya",
    "kohya-oft": "upparam.dialects.kohya_oft",
    "comfyui": "upparam.dialects.comfyui",
    "xlabs": "upparam.dialects.xlabs",
    "diffusers": "upparam.dialects.diffusers",
    "diffusers-old": "upparam.dialects.diffusers_old",
    "cloneofsimo": "upparam.dialects.cloneofsimo",
    "mlx": "upparam.dialects.mlx",
    "gguf-lora": "upparam.dialects.gguf_lora",
    "ggla": "upparam.dialects.ggla",
    "torchtune": "upparam.dialects.torchtune",
    "litgpt": "upparam.dialects.litgpt",
    "loralib": "upparam.dialects.loralib",
    "sam-lora": "upparam.dialects.sam_lora",
    "triad": "upparam.dialects.triad",
}
"""Dialect name to the module that holds `dialect`, a Dialect. Order decides between equal matches."""


@cache
def get(name: str) -> Dialect:
    """The dialect of that name, ours or an installed plugin's. Raises UsageError listing what there is."""
    if name in DIALECTS:
        found: Dialect = importlib.import_module(DIALECTS[name]).dialect
        return found
    plugins = {point.name: point for point in installed("upparam.dialects")}
    if name in plugins:
        plugin: Dialect = plugins[name].load()
        return plugin
    raise UsageError("no such dialect", expected="one of " + ", ".join(names()), found=name)


def names() -> list[str]:
    """Every dialect there is, ours and the installed plugins'."""
    return [*DIALECTS, *(point.name for point in installed("upparam.dialects") if point.name not in DIALECTS)]


def matches(file: TensorFile) -> list[Match]:
    """Every dialect that recognises the file, best first. Plugins are asked only where none of ours is sure."""
    found: list[Match] = []
    for name in DIALECTS:
        match = get(name).match(file)
        if match is not None:
            found.append(match)
            if match.alone:
                break
    if not any(match.confidence >= 0.9 for match in found):
        for point in installed("upparam.dialects"):
            match = get(point.name).match(file)
            if match is not None:
                found.append(match)
    return sorted(found, key=lambda match: -match.confidence)


def restated(adapter: Adapter, before: Adapter | None = None) -> Adapter:
    """The adapter with what its metadata says about ranks and alphas made true again, after an operation that changed them.

    What was said of `before`, the adapter that was changed, stays where the change leaves it as true as it was. Only a dialect that has such statements has a `restated` of its own; elsewhere nothing is said and nothing changes.
    """
    own = getattr(get(adapter.dialect), "restated", None) if adapter.dialect in DIALECTS else None
    changed: Adapter = adapter if own is None else own(adapter, before)
    return changed
