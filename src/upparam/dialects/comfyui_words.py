"""The words ComfyUI reads after a module's name, and the deltas they spell: `.lora_A.weight`, `.lokr_w1`, `.diff_b`, `.set_weight`, ...

Sources: comfyanonymous/ComfyUI comfy/weight_adapter/*.py and comfy/lora.py (load_lora); black-forest-labs' control adapters for `.lora_B.bias`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from upparam.algorithms import called
from upparam.algorithms.base import Delta
from upparam.algorithms.boft import ButterflyOFT
from upparam.algorithms.dora import DoRA
from upparam.algorithms.full import Full
from upparam.algorithms.ia3 import IA3
from upparam.algorithms.lora import LoRA
from upparam.algorithms.oft import DiagOFT
from upparam.algorithms.sparse import SparseLoRA
from upparam.algorithms.tlora import TLoRA
from upparam.dialects import lycoris_words, words
from upparam.dialects.lycoris_words import COMFYUI_FORMS, OWN, words_in
from upparam.errors import RefusedError
from upparam.patterns import regex
from upparam.tensors import Tensor


class Pair(NamedTuple):
    """One spelling of a LoRA's factors; `mid` where it has a word for a Tucker core."""

    down: str
    up: str
    mid: str | None = None


PAIRS: dict[str, Pair] = {
    "ab": Pair("lora_A.weight", "lora_B.weight"),
    "kohya": Pair("lora_down.weight", "lora_up.weight", "lora_mid.weight"),
    "linear": Pair("lora.down.weight", "lora.up.weight"),
    "named": Pair("lora_A.default.weight", "lora_B.default.weight"),
    "bare": Pair("lora_A", "lora_B"),
}
_CANONICAL = {"down": "lora_down.weight", "up": "lora_up.weight", "mid": "lora_mid.weight"}
"""A LoRA's roles and the words the forms know them by; all other words are their own."""
_SINGLE = {word: word for word in (*words_in(COMFYUI_FORMS), "set_weight", "reshape_weight") if word not in _CANONICAL.values()}
_WORDS: dict[str, tuple[str | None, str]] = {word: (None, role) for word, role in (_SINGLE | {"lora_B.bias": "diff_b"}).items()}
_WORDS |= {word: (name, role) for name, pair in PAIRS.items() for role, word in pair._asdict().items() if word is not None}
_ENDING = regex(r"(.+?)\.(" + "|".join(re.escape(word) for word in sorted(_WORDS, key=len, reverse=True)) + ")")
FOREIGN = OWN | {"set_weight"}
"""Words diffusers does not have."""
_NORM = regex(r"(.+\.(query_norm|key_norm))\.scale")
"""A norm's weight under its own name, as black-forest-labs' control adapters carry it."""
ALGORITHMS = tuple(name for name in lycoris_words.ALGORITHMS if name not in (IA3.algorithm, TLoRA.algorithm, SparseLoRA.algorithm))
"""The algorithms ComfyUI has words for."""


@dataclass
class Group:
    """The tensors of one module by role, the name each has in the file, and the spelling of its LoRA factors."""

    pair: str | None = None
    roles: dict[str, Tensor] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)


def split(name: str) -> tuple[str, str] | None:
    """(module, word) of a tensor name; None when it ends in none of the words."""
    found = _ENDING.fullmatch(name)
    if found is not None:
        return found.group(1), found.group(2)
    norm = _NORM.fullmatch(name)
    return None if norm is None else (norm.group(1), "scale")


def grouped(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Group], dict[str, Tensor]]:
    """(tensors by module and role, tensors that end in none of the words or say a second time what another says)."""
    groups: dict[str, Group] = {}
    rest: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        found = split(name)
        if found is None:
            rest[name] = tensor
            continue
        pair, role = (None, "set_weight") if found[1] == "scale" else _WORDS[found[1]]
        # A norm's parameter is `scale` in some versions of ComfyUI's FLUX, and then belongs to the module's name.
        module = found[0].removesuffix(".scale") if role == "set_weight" else found[0]
        group = groups.setdefault(module, Group())
        if role in group.roles or (pair is not None and group.pair not in (None, pair)):
            rest[name] = tensor
            continue
        group.pair = pair or group.pair
        group.roles[role], group.names[role] = tensor, name
    return groups, rest


class Built(NamedTuple):
    """What a module's tensors came to: deltas by base parameter, a weight that replaces the base's, and the roles nothing explains."""

    deltas: dict[str, Delta]
    saved: Tensor | None
    unexplained: tuple[str, ...]


def build(group: Group) -> Built:
    """The deltas a group spells. Raises MalformedError where factors do not fit together."""
    left = {_CANONICAL.get(role, role): tensor for role, tensor in group.roles.items()}
    saved, sizes = left.pop("set_weight", None), left.pop("reshape_weight", None)
    scaled_bias = None if group.names.get("diff_b", "").endswith(".diff_b") else left.pop("diff_b", None)
    deltas, unexplained = words.build(left, COMFYUI_FORMS)
    weight = deltas.get("weight")
    if scaled_bias is not None and (weight is None or weight.scale == 1.0):
        # The bias of lora_B is scaled with the rest; alone, or at a scale of 1, it is the whole change.
        deltas["bias"] = Full(scaled_bias)
    elif scaled_bias is not None:
        unexplained = (*unexplained, "diff_b")
    if sizes is not None and (weight is None or _sizes(sizes) != list(weight.shape)):
        unexplained = (*unexplained, "reshape_weight")
    roles = {word: role for role, word in _CANONICAL.items()}
    return Built(deltas, saved, tuple(roles.get(word, word) for word in unexplained))


def _sizes(tensor: Tensor) -> list[float]:
    """The few numbers of a `reshape_weight`; [] for a tensor that is none."""
    return [float(size) for size in tensor.doubles()] if len(tensor.shape) == 1 and tensor.numel <= 8 else []


def spell(delta: Delta, pair: str, parameter: str = "weight") -> dict[str, Tensor]:
    """The words of a delta, without alpha. Raises RefusedError where ComfyUI has none, or would apply something else."""
    if delta.algorithm not in ALGORITHMS:
        raise RefusedError(f"{called(delta.algorithm)} delta has no form in this dialect")
    if getattr(delta, "made", False) or getattr(delta, "bm", None) is not None:
        raise RefusedError(f"ComfyUI would not apply {called(delta.algorithm)} delta of this form")
    if type(delta) is DiagOFT and delta.rescale is not None:
        raise RefusedError("ComfyUI reads the row factors (rescale) of a Diag-OFT delta and does not apply them")
    found = lycoris_words.spell(delta, parameter)
    named = PAIRS[pair if _CANONICAL["mid"] not in found or PAIRS[pair].mid else "kohya"]._asdict()
    # In the order down, up, as every writer puts them.
    factors = {str(named[role]): found.pop(word) for role, word in _CANONICAL.items() if word in found}
    return factors | found


def stored_alpha(delta: Delta) -> float | None:
    """The alpha to store beside a delta's words; None for none.

    That of an OFT is the largest norm of its blocks; BOFT's must be there, or ComfyUI applies nothing.
    """
    alpha = lycoris_words.stored_alpha(delta)
    if not isinstance(delta, (DiagOFT, ButterflyOFT)):
        return alpha
    unstored = None if isinstance(delta, DiagOFT) else 0.0
    return unstored if alpha is None else delta.constraint * delta.shape[0]


def is_plain(delta: Delta) -> bool:
    """True for up and down with or without a norm, of which an absent alpha says a scale of 1."""
    return isinstance(delta, (LoRA, DoRA))


def is_turn(delta: Delta) -> bool:
    """True where alpha is no scale but a constraint, which no rounding may change."""
    return isinstance(delta, (DiagOFT, ButterflyOFT))
