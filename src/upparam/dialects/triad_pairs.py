"""One file with both factors of each module, under names no writer known to us has: `layers.0.q.up` and `.down`, `lora_A` and `lora_B`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from typing import NamedTuple

from upparam.containers.base import TensorFile
from upparam.patterns import regex

_HALVES = {"lora_A": "down", "lora_a": "down", "lora_B": "up", "lora_b": "up"}


def role_of(word: str) -> str:
    """up or down, by a dialect's word for the factor."""
    return _HALVES.get(word, "up" if word.endswith("up") else "down")


_PAIR = regex(
    r"(?:^|(?P<module>.+?)[./_])(?P<word>lora[_.](?:up|down|mid)|up|down|mid|(?<!lora_)[AB]|(?:^|(?<=[/_]))lora_[AB]|(?:lora_)?alpha)(\.default)?(\.weight)?",
    re.S,
)
"""Names with `.lora_A` behind a module are loralib's, PEFT's, or of libraries whose layers are no plain LoRA, which have names of their own."""
_OTHERS = regex(r"adapter|lllite|control|prompt|hyper|(^|[./])mlp$", re.I)
"""Modules whose `down` and `up` are layers: of bottleneck adapters, of networks beside the base, of feed-forward blocks."""
_TELLING = regex("lora[_.](up|down|mid)|(lora_)?alpha")
"""Words that only LoRA has."""


class Half(NamedTuple):
    """One tensor of a file that holds both factors of each module: whose it is (None where names tell no module), what, and by which word."""

    module: str | None
    role: str
    word: str


def paired(file: TensorFile) -> dict[str, Half]:
    """A file's tensors where it holds up and down of each module under a name of the module's: `layers.0.q.up`, `layer0_lora_down`, `A`.

    {} unless every tensor has such a name, every module both factors, and these are long and thin and fit together. Where the words are
    `lora_up` and `lora_down`, which say by themselves what they are, other tensors may lie beside them.
    """
    found: dict[str, Half] = {}
    for name in file.tensors:
        match = _PAIR.fullmatch(name)
        if match is not None:
            word = match["word"]
            role = (
                "alpha" if word.endswith("alpha") else "mid" if word.endswith("mid") else _HALVES.get(f"lora_{word[-1]}") or role_of(word)
            )
            found[name] = Half(None if match["module"] is None else match["module"].replace("/", "."), role, word)
    told = all(_TELLING.match(half.word) for half in found.values())
    if not told and (len(found) < len(file.tensors) or any(half.module and _OTHERS.search(half.module) for half in found.values())):
        return {}
    shapes: dict[tuple[str | None, str], tuple[int, ...]] = {
        (half.module, half.role): file.tensors[name].shape for name, half in found.items()
    }
    modules = {half.module for half in found.values() if half.role != "alpha"}
    if len(shapes) < len(found) or not modules or not all(_fit(shapes.get((one, "up")), shapes.get((one, "down"))) for one in modules):
        return {}
    return found


def _fit(up: tuple[int, ...] | None, down: tuple[int, ...] | None) -> bool:
    """True when these are the shapes of two thin factors that share a size, whichever way each is stored."""
    if up is None or down is None or not (thin(up) and thin(down)):
        return False
    if len(up) > 2 or len(down) > 2:
        return up[1] == down[0]
    return any(one[1] == other[0] <= min(one[0], other[1]) for one in (up, up[::-1]) for other in (down, down[::-1]))


def thin(shape: tuple[int, ...]) -> bool:
    """Longer than wide, as a factor is; or so small that nothing can be said."""
    if not 2 <= len(shape) <= 5:
        return False
    out, into = shape[0], prod(shape[1:])
    return min(out, into) <= 1024 and (min(out, into) * 2 <= max(out, into) or max(out, into) <= 64)


def sureness(halves: Mapping[str, Half], tensors: int) -> tuple[float, tuple[str, ...]]:
    """(how sure it is that a file of named pairs is an adapter, the evidence): words that only LoRA has say more than `up` and `down`."""
    told = all(half.word.startswith("lora") for half in halves.values() if half.role != "alpha")
    modules = {half.module for half in halves.values() if half.role != "alpha"}
    evidence = [
        f"{len(halves)} of {tensors} names are those of an up and a down factor of {len(modules)} module{'s' * (len(modules) != 1)}, such as {next(iter(halves))}",
        "long and thin as factors are, and they fit together",
    ]
    if not told:
        evidence.append("the layers of a bottleneck adapter can look the same")
    return (0.7 if told else 0.5) if len(halves) == tensors else 0.6, tuple(evidence)
