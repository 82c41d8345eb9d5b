"""Which base a GGUF adapter is for. llama.cpp's names do not tell it, and the order of rows of q, k and fused qkv hangs on it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache

from upparam.adapter import Adapter
from upparam.bases import inventory
from upparam.bases.base import Base
from upparam.bases.layouts import find, layout
from upparam.bases.layouts.gguf import architecture
from upparam.bases.recognise import recognise
from upparam.dialects.agreeing import agreed, named
from upparam.dialects.base import ReadOptions
from upparam.dialects.placing import Resolved
from upparam.errors import UsageError
from upparam.patterns import regex

ARCHITECTURE = "general.architecture"
_HUB = regex(r"https?://huggingface\.co/")
_EXAMPLES = {
    "llama": "llama-2-7b", "qwen2": "qwen2-0.5b", "qwen3": "qwen3-0.6b", "gemma": "gemma-2b", "gemma2": "gemma-2-2b", "gemma3": "gemma-3-1b",
    "phi2": "phi-2", "phi3": "phi-3-mini", "gpt2": "gpt2", "falcon": "falcon-7b", "bloom": "bloom-560m", "gptneox": "pythia-70m",
}  # fmt: skip
"""A base of each architecture, from whose names those of every other follow."""


def resolved(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]], options: ReadOptions) -> Resolved | None:
    """The base's layout, and the base named on the adapter; None, with a finding, where the tensors do not tell enough.

    `shapes` are those of the changed weights by llama.cpp's name. Enough is told when one base has every name in its shape, and every
    base that fits alike has the same rows under the same names. Raises UsageError when the base the user named does not have them.
    """
    arch = adapter.metadata.get(ARCHITECTURE)
    if options.base is not None:
        return _named(adapter, shapes, options.base, arch)
    hints = recognise(_translated(arch, shapes), stated=_stated(adapter.metadata)) if arch in _EXAMPLES else []
    said = f"no base of architecture {arch} that upparam knows has all these tensors" if arch else f"the header has no {ARCHITECTURE}"
    return agreed(adapter, shapes, hints, lambda base: find(base, "gguf") if architecture(base) == arch else None, said)


def _named(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]], base: Base, arch: str | None) -> Resolved:
    check_config(base)
    if arch is not None and architecture(base) not in (None, arch):
        raise UsageError("the adapter is for another architecture", file=adapter.files[0], expected=arch, found=architecture(base))
    return named(adapter, shapes, base, layout(base, "gguf"))


def check_config(base: Base) -> None:
    """Raise UsageError for a base of the user's own whose config is not known: names and the order of rows follow from it."""
    if architecture(base) is None and base.name not in inventory.names():
        model = base.config.get("model_type")
        raise UsageError(
            "llama.cpp's names and its order of rows follow from the base's config", file=base.name,
            found=f"model_type {model}" if model else "no config.json", expected="a model_type that llama.cpp runs and upparam knows",
            remedy=None if model else "give the folder that holds its weights and its config.json",
        )  # fmt: skip


@cache
def _words(arch: str) -> Mapping[str, str]:
    """llama.cpp's names -> transformers', with {} for the layer, for every base of an architecture."""
    one = find(inventory.load(_EXAMPLES[arch]), "gguf")
    found: dict[str, str] = {}
    for foreign, parts in one.foreign.items() if one is not None else ():
        if not re.search(r"\.[1-9]\d*\.", foreign):
            found[foreign.replace("blk.0.", "blk.{}.")] = re.sub(r"\.0\.", ".{}.", parts[0].module, count=1)
    return found


def _translated(arch: str | None, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """transformers' names of these tensors, for the recogniser; names that have none stay."""
    words = _words(str(arch))
    found = {}
    for name, shape in shapes.items():
        layer = re.match(r"blk\.(\d+)\.", name)
        word = words.get(re.sub(r"^blk\.\d+\.", "blk.{}.", name), name)
        found[word.format(layer.group(1)) if layer else word] = shape
    return found


def _stated(metadata: Mapping[str, str]) -> str | None:
    """The base the header names: the model's address, else its name."""
    address = metadata.get("general.base_model.0.repo_url")
    if address:
        return _HUB.sub("", address)
    name = metadata.get("general.base_model.0.name")
    return name.replace(" ", "-") if name and inventory.resolve(name.replace(" ", "-")) else None
