"""LitGPT's `attn.qkv`: one layer for q, k and v, of which any may be adapted.

Source: Lightning-AI/litgpt litgpt/lora.py LoRAQKVLinear of v0.5.13, and of the versions before v0.5.6. For n adapted parts lora_A is
(n * r, in), the parts' on top of each other, and lora_B (the adapted parts' rows, r). Until v0.5.5 the layer was `attn.attn`, its weight was
interleaved, for each query group its queries, its key and its value, and so are the rows of lora_B where all three parts are adapted: its
first block of rows, that of q, was then added to the first rows of the weight, whatever these are. Where fewer were adapted, their rows went
where they belong; before February 2024 they did not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any, NamedTuple

from upparam.algorithms.base import UNKNOWN, Scaling
from upparam.algorithms.lora import LoRA
from upparam.algorithms.slicing import join, take_rows
from upparam.bases.base import Base
from upparam.bases.layouts import LayoutMap, Order
from upparam.bases.layouts.gguf import config_of
from upparam.errors import MalformedError, RefusedError, UsageError
from upparam.tensors import Tensor

PARTS = ("q", "k", "v")
_ENABLED = ("lora_query", "lora_key", "lora_value")


class Heads(NamedTuple):
    """How many query heads and query groups a model has, and the rows of one head."""

    heads: int
    groups: int
    size: int

    @property
    def rows(self) -> dict[str, int]:
        """The rows of q, k and v."""
        return {"q": self.heads * self.size, "k": self.groups * self.size, "v": self.groups * self.size}


def heads_of(model: Mapping[str, Any]) -> Heads | None:
    """What LitGPT's model_config.yaml says; None where it does not."""
    heads, groups, size = (model.get(key) for key in ("n_head", "n_query_groups", "head_size"))
    groups = heads if groups is None else groups
    if size is None and isinstance(heads, int) and heads > 0 and isinstance(model.get("n_embd"), int):
        size = model["n_embd"] // heads
    if not (type(heads) is int and type(groups) is int and type(size) is int and heads > 0 and groups > 0 and size > 0):
        return None
    return Heads(heads, groups, size)


def heads_in(base: Base, one: LayoutMap, module: str) -> Heads | None:
    """Those of a base, from the number of heads in its config and the rows of its layers. None where they are not known."""
    config, out = config_of(base), one.to_reference(f"{module.rpartition('.')[0]}.proj")
    heads = config.get("num_attention_heads", config.get("n_head"))
    if not one.to_reference(module) or not out or type(heads) is not int or heads < 1 or out[0].shape[1] < heads:
        return None
    size = out[0].shape[1] // heads
    return Heads(heads, (one.rows(module) // size - heads) // 2, size)


def number(pair: Mapping[str, Tensor]) -> int:
    """How many parts the factors are of. Raises MalformedError where they do not fit together."""
    down, up = pair["A"], pair["B"]
    if len(down.shape) == len(up.shape) == 2 and up.shape[1] and down.shape[0] in (up.shape[1], 2 * up.shape[1], 3 * up.shape[1]):
        return down.shape[0] // up.shape[1]
    raise MalformedError(
        "lora_A and lora_B do not fit together", expected="(1 to 3 times r, in), (rows, r)", found=f"{down.shape}, {up.shape}"
    )


def possible(pair: Mapping[str, Tensor], heads: Heads) -> list[tuple[str, ...]]:
    """The parts that may be adapted, going by the rows of lora_B."""
    rows = heads.rows
    return [parts for parts in combinations(PARTS, number(pair)) if sum(rows[part] for part in parts) == pair["B"].shape[0]]


def adapted(pair: Mapping[str, Tensor], heads: Heads, said: Mapping[str, Any], targets: Sequence[str] | None) -> tuple[str, ...]:
    """The parts that are adapted: as hyperparameters.yaml says, or the user, or the rows alone where they allow one choice.

    Raises MalformedError or UsageError where what is said does not fit the factors, UsageError where nobody says it.
    """
    choices = possible(pair, heads)
    if not choices:
        raise MalformedError(
            "the rows of lora_B are no sum of those of q, k and v", expected=f"parts of {', '.join(f'{part} {rows}' for part, rows in heads.rows.items())}",
            found=f"{number(pair)} parts, {pair['B'].shape[0]} rows",
        )  # fmt: skip
    if all(isinstance(said.get(key), bool) for key in _ENABLED):
        told = tuple(part for part, key in zip(PARTS, _ENABLED, strict=True) if said[key])
        if told not in choices:
            raise MalformedError(
                "hyperparameters.yaml says that other parts are adapted", expected=", ".join(told), found=f"{pair['B'].shape[0]} rows"
            )
        return told
    if targets and number(pair) < len(PARTS):
        chosen = tuple(part for part in PARTS if part in targets)
        if chosen not in choices or not set(targets) <= set(PARTS):
            raise UsageError(
                "the factors are not of these parts", expected=" or ".join(", ".join(one) for one in choices), found=", ".join(targets)
            )
        return chosen
    if len(choices) > 1:
        raise UsageError(
            "which of q, k and v are adapted is not stored", found=" or ".join(", ".join(one) for one in choices),
            remedy="put hyperparameters.yaml beside the file, or name them with --target (LitGPT adapts q and v by default)",
        )  # fmt: skip
    return choices[0]


def deltas(
    pair: Mapping[str, Tensor], heads: Heads, parts: Sequence[str], scaling: Scaling, interleaved: bool, dated: bool
) -> dict[str, LoRA]:
    """The delta of each changed part, rows in transformers' order.

    `interleaved`: the layer is `attn.attn`. `dated`: it is known to be of March 2024 or later. Raises RefusedError where it must be known.
    """
    rows, rank = heads.rows, pair["B"].shape[1]
    made: dict[str, LoRA] = {}
    start = 0
    for place, part in enumerate(parts):
        up = pair["B"].rows(start, start + rows[part])
        made[part] = LoRA(up, pair["A"].rows(place * rank, (place + 1) * rank), scaling)
        start += rows[part]
    if not interleaved or heads.groups == 1:
        return made
    if len(parts) == len(PARTS):
        order = Order("groups", heads.groups, heads.heads // heads.groups)
        whole = stacked(list(made.values()))
        whole = replace(whole, up=take_rows(whole.up, order.foreign_rows(start)))
        edges = [0, rows["q"], rows["q"] + rows["k"], start]
        return {part: replace(whole, up=whole.up.rows(*edges[place : place + 2])) for place, part in enumerate(PARTS)}
    if not dated:
        raise RefusedError(
            "which rows of the interleaved weight were changed depends on the version: before February 2024 lit-gpt put them elsewhere",
            expected="hyperparameters.yaml beside it, which later versions save", remedy="merge it with the version that made it, and give 'upparam extract' the result",
        )  # fmt: skip
    return made


def stacked(parts: Sequence[LoRA | int]) -> LoRA:
    """The delta of the weight that stacks these parts, a number standing for rows that do not change. Its scale is theirs, unknown too."""
    known = [part if isinstance(part, int) or part.scaling != UNKNOWN else replace(part, scaling=Scaling()) for part in parts]
    whole = join(known)
    assert isinstance(whole, LoRA)
    return whole if known == list(parts) else replace(whole, scaling=UNKNOWN)
