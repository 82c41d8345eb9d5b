"""Bases whose fused projections stand apart, as libraries build them that have one layer for each of q, k, v, gate and up.

Source: huggingface/transformers src/transformers/models/phi3/modeling_phi3.py: qkv_proj stacks q, k and v, gate_up_proj gate and up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from upparam.adapter import Target
from upparam.bases.base import Base, Module


@dataclass(frozen=True)
class Unfused(Base):
    """A base under the names its modules would have apart; `lies` says of what rows of what module each such module consists."""

    lies: Mapping[str, Target] = field(default_factory=dict, compare=False)


def unfused(base: Base) -> Base:
    """The base with `qkv_proj` and `gate_up_proj` taken apart; the base itself where it has none.

    The rows of q follow from the width of `o_proj`, which takes the heads' outputs.
    """
    modules: list[Module] = []
    lies: dict[str, Target] = {}
    for module in base.modules:
        parent, _, leaf = module.path.rpartition(".")
        spans: dict[str, int] = {}
        out = base.by_path.get(f"{parent}.o_proj")
        if leaf == "qkv_proj" and out is not None:
            queries = out.shape[1]
            spans = {"q_proj": queries, "k_proj": (module.shape[0] - queries) // 2, "v_proj": (module.shape[0] - queries) // 2}
        elif leaf == "gate_up_proj" and len(module.shape) == 2:
            spans = {"gate_proj": module.shape[0] // 2, "up_proj": module.shape[0] // 2}
        if not spans:
            modules.append(module)
        start = 0
        for name, rows in spans.items():
            modules.append(module._replace(path=f"{parent}.{name}", shape=(rows, module.shape[1])))
            lies[f"{parent}.{name}"] = Target(module.path, (start, start + rows))
            start += rows
    return Unfused(base.name, tuple(modules), base.family, base.evidence, base.config, lies) if lies else base


def lies(base: Base, module: str) -> Target:
    """What a module of an unfused base is in the base itself."""
    return base.lies.get(module, Target(module)) if isinstance(base, Unfused) else Target(module)
