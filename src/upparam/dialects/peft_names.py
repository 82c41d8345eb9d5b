"""PEFT's tensor names taken apart: which module, which factor, which adapter, and what is a base weight that was saved along.

Sources: huggingface/peft src/peft/utils/save_and_load.py (what a save strips), src/peft/tuners/*/layer.py (names of the factors).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from upparam.errors import AmbiguousError
from upparam.tensors import Tensor

WRAPPER = "base_model.model."
"""What PeftModel puts before every module path of the base."""

FACTORS = {
    "lora_A": "lora_A", "lora_B": "lora_B", "lora_embedding_A": "lora_embedding_A", "lora_embedding_B": "lora_embedding_B",
    "lora_magnitude_vector": "magnitude", "lora_E": "lora_E", "ranknum": "ranknum",
    "hada_w1_a": "hada_w1_a", "hada_w1_b": "hada_w1_b", "hada_w2_a": "hada_w2_a", "hada_w2_b": "hada_w2_b", "hada_t1": "hada_t1", "hada_t2": "hada_t2",
    "lokr_w1": "lokr_w1", "lokr_w1_a": "lokr_w1_a", "lokr_w1_b": "lokr_w1_b", "lokr_w2": "lokr_w2", "lokr_w2_a": "lokr_w2_a",
    "lokr_w2_b": "lokr_w2_b", "lokr_t2": "lokr_t2", "ia3_l": "ia3_l", "vera_lambda_b": "vera_lambda_b", "vera_lambda_d": "vera_lambda_d",
    "oft_R": "oft_R", "oft_r": "oft_r", "oft_s": "oft_s", "boft_R": "boft_R", "boft_s": "boft_s",
}  # fmt: skip
"""Words that name a factor, and the role it plays here."""

_FACTOR = re.compile(rf"^(?P<module>.+)\.(?P<word>{'|'.join(sorted(FACTORS, key=len, reverse=True))})(?P<rest>(\.[^.]+)*)$")
_SHARED = re.compile(r"^(base_model\.)?(vera_[AB])(\.[^.]+)?$")


class Part(NamedTuple):
    """One factor's name: `module` without PEFT's wrapper, role, adapter name ('' where a save has stripped it), and what it is of."""

    module: str
    role: str
    adapter: str
    bias: bool
    wrapped: bool


def part_of(name: str) -> Part | None:
    """The parts of a tensor name, or None when it names no factor."""
    found = _FACTOR.match(name)
    if found is None:
        return None
    rest = [word for word in found["rest"].split(".") if word]
    bias = bool(rest) and rest[-1] == "bias"
    if rest and rest[-1] in ("weight", "bias"):
        rest.pop()
    if len(rest) > 1:
        return None
    module = found["module"]
    return Part(module.removeprefix(WRAPPER), FACTORS[found["word"]], rest[0] if rest else "", bias, module.startswith(WRAPPER))


@dataclass
class Sorted:
    """A file's tensors by what they are.

    `factors`: module -> role -> tensor; `biases`: module -> the bias of its lora_B; `shared`: projections that all modules use (VeRA);
    `saved`: other tensors by base parameter path; `base`: the base's own weights that a training checkpoint holds beside them.
    """

    factors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    shared: dict[str, Tensor] = field(default_factory=dict)
    saved: dict[str, Tensor] = field(default_factory=dict)
    base: list[str] = field(default_factory=list)
    adapter: str = ""
    wrapped: bool = True


_TRAINING = re.compile(r"\.(base_layer|original_module)\.")


def sort(tensors: Mapping[str, Tensor]) -> Sorted:
    """Sort a file's tensors. Raises AmbiguousError when it holds several adapters by name."""
    parts = {name: part for name in tensors if (part := part_of(name)) is not None}
    adapters = sorted({part.adapter for part in parts.values()} - {""})
    if len(adapters) > 1:
        raise AmbiguousError("several adapters are in one file", found=", ".join(adapters), remedy="save each by itself with PEFT")
    result = Sorted(adapter=adapters[0] if adapters else "", wrapped=all(part.wrapped for part in parts.values()))
    for name, part in parts.items():
        if part.bias:
            result.biases[part.module] = tensors[name]
        else:
            result.factors.setdefault(part.module, {})[part.role] = tensors[name]
    rest = [name for name in tensors if name not in parts]
    checkpoint = is_checkpoint(rest, result.factors)
    for name in rest:
        shared = _SHARED.match(name)
        if shared is not None:
            result.shared[shared[2]] = tensors[name]
        elif saved := _saved(name, result.adapter):
            result.saved[saved] = tensors[name]
        elif checkpoint:
            result.base.append(name)
        else:
            result.saved[name.removeprefix(WRAPPER)] = tensors[name]
    return result


def is_checkpoint(rest: Iterable[str], modules: Iterable[str]) -> bool:
    """True when the tensors that are no factors are the base's own weights: a training checkpoint, not a saved adapter."""
    names = set(rest)
    plain = {name.removeprefix(WRAPPER) for name in names}
    return any(_TRAINING.search(name) for name in names) or any(f"{module}.weight" in plain for module in modules)


def _saved(name: str, adapter: str) -> str | None:
    """The base parameter that `<module>.modules_to_save.<adapter>.weight` replaces; None for other names."""
    path = name.removeprefix(WRAPPER)
    head, mark, tail = path.partition(".modules_to_save.")
    if not mark:
        return None
    return f"{head}.{tail.removeprefix(adapter + '.') if adapter else tail.removeprefix('default.')}"
