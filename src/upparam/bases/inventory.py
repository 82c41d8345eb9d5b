"""The shipped inventories: which bases upparam knows, under which names, and their modules in traversal order.

`data/<family>.json` holds one program per base: a leaf is [path, kind, shape] (and a 1 when the module has a bias), a block is
[prefix, start, stop, program] and stands for the program once per index, under `prefix<index>.`. A base that differs from another of its
family in a few shapes is written as ["=", the other's name, {path: shape}]. `data/_index.json` holds the names.
`tools/make_inventories.py` writes both; see there for where the values come from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from upparam.bases.base import Base, Module
from upparam.errors import UsageError
from upparam.patterns import regex

DATA = Path(__file__).with_name("data")


class Known(NamedTuple):
    """A base upparam knows: family, title for people, model ids and other names, how many modules, and the base it is a variant of.

    A variant has the same layers and differs only in a few input or output channels (an inpainting UNet); adapters fit both.
    """

    family: str
    title: str
    ids: tuple[str, ...]
    modules: int
    variant_of: str | None


def data(name: str) -> Any:
    """The JSON value of a shipped data file."""
    return json.loads((DATA / name).read_bytes())


@cache
def known() -> dict[str, Known]:
    """Every base by name, in listing order."""
    return {
        name: Known(fact["family"], fact["title"], tuple(fact["ids"]), fact["modules"], fact.get("variant_of"))
        for name, fact in data("_index.json").items()
    }


def names() -> list[str]:
    """The names of all shipped inventories."""
    return list(known())


@cache
def load(name: str) -> Base:
    """The base of that name (or any name `resolve` takes). Raises UsageError for a name nothing answers to."""
    resolved = resolve(name)
    if resolved is None:
        raise UsageError("no inventory of that name", found=name, remedy="'upparam bases' lists the names")
    family = known()[resolved].family
    return Base(resolved, tuple(_modules(data(f"{family}.json"), resolved)), family, ("a shipped inventory",))


def _modules(programs: dict[str, Any], name: str) -> Iterator[Module]:
    program = programs[name]
    if program[0] != "=":
        yield from expand(program)
        return
    shapes = program[2]
    for module in _modules(programs, program[1]):
        yield module._replace(shape=tuple(shapes[module.path])) if module.path in shapes else module


def expand(program: list[Any], prefix: str = "") -> Iterator[Module]:
    """The modules a program stands for, in order."""
    for item in program:
        if isinstance(item[1], int):
            head, start, stop, body = item
            for index in range(start, stop):
                yield from expand(body, f"{prefix}{head}{index}.")
        else:
            yield Module(prefix + item[0], item[1], tuple(item[2]), len(item) == 4)


_QUANTISED = regex(r"-(unsloth-bnb-4bit|bnb-4bit|bnb-8bit|gptq(-int[48])?|awq|gguf|4bit|8bit|bf16|fp16|fp8|mlx)$")


@cache
def _aliases() -> dict[str, str]:
    """Lower-case names to inventories: own names, ids, and ids without their owner where that is not ambiguous."""
    found: dict[str, str] = {}
    short: dict[str, set[str]] = {}
    for name, fact in known().items():
        found[name] = name
        for identifier in fact.ids:
            found.setdefault(identifier.lower(), name)
            short.setdefault(identifier.lower().rsplit("/", 1)[-1], set()).add(name)
    for tail, owners in short.items():
        if len(owners) == 1:
            found.setdefault(tail, next(iter(owners)))
    return found


def resolve(name_or_id: str) -> str | None:
    """The inventory a name, model id or path ending in one stands for; None when nothing is known by it.

    Case, a quantisation suffix (`-bnb-4bit`, `-GPTQ`), an owner and a file extension do not matter.
    """
    aliases = _aliases()
    word = name_or_id.strip().lower().replace("\\", "/").rstrip("/")
    for candidate in (word, re.sub(r"\.(safetensors|ckpt|bin|pt|gguf)$", "", word.rsplit("/", 1)[-1])):
        while True:
            if candidate in aliases:
                return aliases[candidate]
            shorter = _QUANTISED.sub("", candidate)
            if shorter == candidate:
                break
            candidate = shorter
    return None
