"""The words kohya's and LyCORIS' files use for factors, and the deltas they spell: `<module>.lora_up.weight`, `<module>.alpha`, ...

Sources: kohya-ss/sd-scripts networks/lora.py; KohakuBlueleaf/LyCORIS lycoris/modules/*.py (`weight_list` of each module).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from math import isfinite
from typing import NamedTuple

from upparam.algorithms import called
from upparam.algorithms.base import Delta, ScaleRule, Scaling
from upparam.algorithms.lora import LoRA
from upparam.dtypes import DTYPES, DType
from upparam.errors import RefusedError
from upparam.sources import MemorySource
from upparam.tensors import Tensor

LORA = ("lora_up.weight", "lora_down.weight", "lora_mid.weight")
WORDS = (*LORA, "alpha", "dora_scale")
"""Every word, without the dot before it."""


def split(name: str, words: Collection[str] = WORDS) -> tuple[str, str] | None:
    """(module, word) of a tensor name; None when it ends in none of the words. Of two that fit the longer is meant."""
    head, _, last = name.rpartition(".")
    inner, _, middle = head.rpartition(".")
    if inner and f"{middle}.{last}" in words:
        return inner, f"{middle}.{last}"
    return (head, last) if head and last in words else None


Words = Mapping[str, Tensor]
"""The tensors of one module by word."""


def grouped(tensors: Mapping[str, Tensor], words: Collection[str] = WORDS) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """(tensors by module and word, tensors that end in none of the words)."""
    groups: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        found = split(name, words)
        if found is None:
            rest[name] = tensor
        else:
            groups.setdefault(found[0], {})[found[1]] = tensor
    return groups, rest


def scaling_of(words: Words) -> Scaling:
    """alpha / rank with alpha as stored; absent alpha means alpha = rank."""
    alpha = words.get("alpha")
    return Scaling(ScaleRule.ALPHA_OVER_RANK, None if alpha is None else alpha.scalar())


class Form(NamedTuple):
    """One way words spell deltas: the words it needs, those it may have, what they build (by base parameter), and words that rule it out."""

    needs: tuple[str, ...]
    may: tuple[str, ...]
    build: Callable[[Words], dict[str, Delta]]
    unless: tuple[str, ...] = ()


def _lora(words: Words) -> dict[str, Delta]:
    return {"weight": LoRA(words["lora_up.weight"], words["lora_down.weight"], scaling_of(words), words.get("lora_mid.weight"))}


LORA_FORMS = (Form(LORA[:2], ("lora_mid.weight", "alpha"), _lora),)
"""What sd-scripts itself writes."""


class Built(NamedTuple):
    """What a module's words came to: deltas by base parameter, and the words that no form explains."""

    deltas: dict[str, Delta]
    unexplained: tuple[str, ...]


def build(words: Words, forms: Sequence[Form]) -> Built:
    """The deltas of the first form whose needs are there, and of further forms with words and parameters of their own."""
    deltas: dict[str, Delta] = {}
    left = dict(words)
    for form in forms:
        if all(word in left for word in form.needs) and not any(word in left for word in form.unless):
            found = form.build(left)
            if found.keys() & deltas.keys():
                continue
            deltas |= found
            left = {word: tensor for word, tensor in left.items() if word not in form.needs and word not in form.may}
    return Built(deltas, tuple(left))


def words_of(delta: Delta) -> dict[str, Tensor]:
    """The factors of a LoRA by word, without alpha."""
    if type(delta) is not LoRA or delta.embedding:
        what = " of an embedding" if getattr(delta, "embedding", False) else ""
        raise RefusedError(f"{called(delta.algorithm)} delta{what} has no form in this dialect")
    mid = {} if delta.mid is None else {"lora_mid.weight": delta.mid}
    return {"lora_up.weight": delta.up, "lora_down.weight": delta.down, **mid}


def alpha_for(delta: Delta) -> float | None:
    """The alpha that gives the delta's effective scale under alpha / rank: as stored where that rule is its own, None for absent.

    Raises RefusedError when the scale is unknown.
    """
    scaling = delta.scaling
    if scaling.rule is ScaleRule.ALPHA_OVER_RANK and scaling.divisor in (None, delta.rank):
        return scaling.alpha
    if scaling.rule is ScaleRule.BAKED:
        return None
    return delta.known_scale() * (delta.rank or 1)


def _packed(value: float, kind: DType) -> bytes | None:
    """The number's bytes, made without numpy; None for one that is not exact in `kind`, or a kind that is no common float."""
    code = {"float16": "<e", "float32": "<f", "float64": "<d", "bfloat16": "<f"}.get(kind.name)
    try:
        data = b"" if code is None else struct.pack(code, value)
    except OverflowError:
        return None
    if code is None or struct.unpack(code, data)[0] != value or (kind.name == "bfloat16" and data[:2] != b"\0\0"):
        return None
    return data[2:] if kind.name == "bfloat16" else data


def alpha_tensor(value: float, dtype: DType | None, like: DType, dims: int = 0, *, exact: bool = False) -> Tensor:
    """Alpha as a tensor: of `dtype` where given, else of the factors' dtype when that holds it exactly, else float32 (`exact`: float64).

    Raises RefusedError for a finite value that would be stored as infinity, or as zero where it is none.
    """
    kinds = [kind for kind in (dtype, like, DTYPES["float32"], DTYPES["float64"] if exact else None) if kind is not None]
    for kind in kinds:
        data = _packed(value, kind)
        if data is not None:
            return Tensor(kind, (1,) * dims, MemorySource(data))
    import numpy as np

    for kind in kinds:
        with np.errstate(over="ignore"):
            array = np.array(value, dtype=np.float64).astype(kind.numpy)
        if float(array) == value:
            return Tensor.of(array.reshape((1,) * dims))
    if isfinite(value) and (not isfinite(float(array)) or (value and not array)):
        raise RefusedError(f"alpha does not fit in {kinds[-1]}", found=f"{value:g}")
    return Tensor.of(array.reshape((1,) * dims))
