"""The words ComfyUI reads after a module's name, and the deltas they spell: `.lora_A.weight`, `.lokr_w1`, `.diff_b`, `.set_weight`, ...

Sources: comfyanonymous/ComfyUI comfy/weight_adapter/*.py and comfy/lora.py (load_lora); black-forest-labs' control adapters for `.lora_B.bias`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from upparam.algorithms.base import Delta, ScaleRule, Scaling
from upparam.algorithms.dora import DoHa, DoKr, DoRA
from upparam.algorithms.loha import LoHa
from upparam.algorithms.lokr import LoKr
from upparam.algorithms.lora import LoRA
from upparam.dialects.words import alpha_for
from upparam.errors import RefusedError
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
LOKR = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
LOHA = ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")
_SINGLE = {f"lokr_{role}": f"lokr_{role}" for role in LOKR} | {f"hada_{role}": f"hada_{role}" for role in LOHA}
_SINGLE |= {word: word for word in ("alpha", "dora_scale", "diff", "diff_b", "set_weight", "reshape_weight")} | {"lora_B.bias": "diff_b"}
_WORDS: dict[str, tuple[str | None, str]] = {word: (None, role) for word, role in _SINGLE.items()}
_WORDS |= {word: (name, role) for name, pair in PAIRS.items() for role, word in pair._asdict().items() if word is not None}
_ENDING = re.compile(r"(.+?)\.(" + "|".join(re.escape(word) for word in sorted(_WORDS, key=len, reverse=True)) + ")")
_NORM = re.compile(r"(.+\.(query_norm|key_norm))\.scale")
"""A norm's weight under its own name, as black-forest-labs' control adapters carry it."""


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
    left = dict(group.roles)
    deltas: dict[str, Delta] = {}
    weight = _weight(left)
    if weight is not None:
        deltas["weight"] = weight
    if "diff_b" in left and (group.names["diff_b"].endswith(".diff_b") or weight is None or weight.scale == 1.0):
        from upparam.algorithms.full import Full

        # The bias of lora_B is scaled with the rest; alone, or at a scale of 1, it is the whole change.
        deltas["bias"] = Full(left.pop("diff_b"))
    if weight is not None and "reshape_weight" in left and _sizes(left["reshape_weight"]) == list(weight.shape):
        del left["reshape_weight"]
    return Built(deltas, left.pop("set_weight", None), tuple(left))


def _sizes(tensor: Tensor) -> list[float]:
    """The few numbers of a `reshape_weight`; [] for a tensor that is none."""
    return [float(size) for size in tensor.doubles()] if len(tensor.shape) == 1 and tensor.numel <= 8 else []


def _weight(left: dict[str, Tensor]) -> Delta | None:
    """The delta of the weight; its tensors are taken out of `left`."""
    alpha = left.get("alpha")
    scaling = Scaling(ScaleRule.ALPHA_OVER_RANK, None if alpha is None else alpha.scalar())
    lokr = {role: left[f"lokr_{role}"] for role in LOKR if f"lokr_{role}" in left}
    hada = {role: left[f"hada_{role}"] for role in LOHA if f"hada_{role}" in left}
    magnitude = left.get("dora_scale")
    found: Delta | None = None
    used: tuple[str, ...] = ()
    if "down" in left and "up" in left:
        factors = (left["up"], left["down"])
        mid = left.get("mid")
        found = LoRA(*factors, scaling, mid) if magnitude is None else DoRA(*factors, magnitude, scaling, mid)
        used = ("down", "up", "mid")
    elif ("w1" in lokr or {"w1_a", "w1_b"} <= lokr.keys()) and ("w2" in lokr or {"w2_a", "w2_b"} <= lokr.keys()):
        found = LoKr(scaling=scaling, **lokr) if magnitude is None else DoKr(magnitude, scaling=scaling, **lokr)
        used = tuple(f"lokr_{role}" for role in lokr)
    elif {"w1_a", "w1_b", "w2_a", "w2_b"} <= hada.keys():
        found = LoHa(scaling=scaling, **hada) if magnitude is None else DoHa(magnitude=magnitude, scaling=scaling, **hada)
        used = tuple(f"hada_{role}" for role in hada)
    elif "diff" in left:
        from upparam.algorithms.full import Full

        left.pop("alpha", None)
        return Full(left.pop("diff"))
    if found is None:
        return None
    for role in (*used, "alpha", "dora_scale"):
        left.pop(role, None)
    return found


def spell(delta: Delta, pair: str) -> dict[str, Tensor]:
    """The words of a delta of a weight, without alpha. Raises RefusedError where ComfyUI has none, or would apply another scale."""
    plain = type(delta)
    magnitude = {"dora_scale": delta.magnitude} if isinstance(delta, (DoRA, DoHa, DoKr)) else {}
    factors = {role: factor for role, factor in delta.factors().items() if role != "magnitude"}
    if plain in (LoRA, DoRA) and not getattr(delta, "embedding", False):
        words = PAIRS[pair if "mid" not in factors or PAIRS[pair].mid else "kohya"]._asdict()
        # In the order down, up, as every writer puts them.
        return {words[role]: factors[role] for role in ("down", "up", "mid") if role in factors} | magnitude
    if plain in (LoKr, DoKr):
        if delta.rank is None and delta.known_scale() != 1.0:
            raise RefusedError("ComfyUI reads two full Kronecker factors with a scale of 1", found=f"{delta.scale:g}")
        return {f"lokr_{role}": factor for role, factor in factors.items()} | magnitude
    if plain in (LoHa, DoHa):
        return {f"hada_{role}": factor for role, factor in factors.items()} | magnitude
    if delta.algorithm == "full":
        return {"diff": factors["diff"]}
    raise RefusedError(f"a {delta.algorithm} delta has no form in this dialect")


def stored_alpha(delta: Delta) -> float | None:
    """The alpha to store beside a delta's words; None for none."""
    return None if delta.algorithm == "full" else alpha_for(delta)
