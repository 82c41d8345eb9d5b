"""Which delta a module's factors make, by the words PEFT gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from upparam.adapter import Target
from upparam.algorithms.base import Delta
from upparam.algorithms.experts import ExpertLoRA
from upparam.algorithms.lora import LoRA
from upparam.bases.base import Module
from upparam.dialects import peft_config
from upparam.dialects.base import ReadOptions
from upparam.dialects.peft_names import Sorted
from upparam.errors import MalformedError, RefusedError
from upparam.tensors import Tensor


def deltas_of(
    module: str, roles: Mapping[str, Tensor], config: Mapping[str, Any] | None, options: ReadOptions, names: Sorted
) -> dict[Target, Delta]:
    """The deltas of one module; {} where the factors make none that is known."""
    if roles.keys() == {"lora_embedding_A", "lora_embedding_B"}:
        down, up = roles["lora_embedding_B"].T, roles["lora_embedding_A"].T
        scaling = peft_config.scaling_of(config, module, down.shape[0], options)
        return {Target(module): LoRA(up, down, scaling, embedding=True)}
    if roles.keys() == {"lora_A", "lora_B"} and not peft_config.of_parameters(config, module):
        up, down = roles["lora_B"], roles["lora_A"]
        enabled = (config or {}).get("enable_lora")
        if isinstance(enabled, list) and up.shape[1] != down.shape[0]:
            return _merged_linear(module, up, down, enabled, config, options)
        return {Target(module): LoRA(up, down, peft_config.scaling_of(config, module, down.shape[0], options))}
    return {}


def _merged_linear(
    module: str, up: Tensor, down: Tensor, enabled: Sequence[Any], config: Mapping[str, Any] | None, options: ReadOptions
) -> dict[Target, Delta]:
    """PEFT before 0.3 adapted parts of a fused weight: of len(enabled) equal blocks of rows each enabled one has its own up and down.

    Source: huggingface/peft v0.2.0 src/peft/tuners/lora.py MergedLinear (zero_pad, conv1d with groups).
    """
    groups = sum(value is True for value in enabled)
    if not groups or down.shape[0] % groups or up.shape[0] % groups or up.shape[1] * groups != down.shape[0]:
        raise MalformedError(
            "the factors do not fit enable_lora", expected=f"{groups} groups of equal rank", found=f"lora_A {down.shape}, lora_B {up.shape}"
        )
    rank, rows = down.shape[0] // groups, up.shape[0] // groups
    up = up.reshape(up.shape[:2])
    found: dict[Target, Delta] = {}
    for group, block in enumerate(index for index, value in enumerate(enabled) if value is True):
        scaling = peft_config.scaling_of(config, module, rank, options)
        piece = LoRA(up.rows(group * rows, (group + 1) * rows), down.rows(group * rank, (group + 1) * rank), scaling)
        found[Target(module, (block * rows, (block + 1) * rows))] = piece
    return found


def spelled(target: Target, delta: Delta, known: Module | None = None) -> dict[str, Tensor]:
    """A delta's factors by PEFT's words, in the form the base's module has where that is known: an embedding, a convolution, a matrix.

    Raises RefusedError for what PEFT has no words for.
    """
    if isinstance(delta, ExpertLoRA) or (target.parameter not in ("weight", "bias") and type(delta) is LoRA and len(delta.shape) == 2):
        return {"lora_A.weight": delta.down, "lora_B.weight": delta.up}
    if target.parameter != "weight":
        raise RefusedError(f"a delta of the {target.parameter}")
    if type(delta) is not LoRA:
        raise RefusedError(f"a {delta.algorithm} delta")
    if delta.mid is not None:
        raise RefusedError("a Tucker core")
    if delta.embedding or (known is not None and known.kind == "Embedding"):
        return {"lora_embedding_A": delta.up.T, "lora_embedding_B": delta.down.T}
    up, down = delta.up, delta.down
    if known is not None and prod(known.shape[2:]) == prod(down.shape[2:]) == 1:
        ones = (1,) * (len(known.shape) - 2)
        up, down = up.reshape((*up.shape[:2], *ones)), down.reshape((*down.shape[:2], *ones))
    return {"lora_A.weight": down, "lora_B.weight": up}
