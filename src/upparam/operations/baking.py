"""A scale put into the factors, for dialects that have no place for it: exact for powers of two, else rounded once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import frexp
from typing import Any

from upparam.adapter import Target
from upparam.algorithms.base import BAKED, Delta, ScaleRule, Scaling
from upparam.algorithms.lora import LoRA
from upparam.algorithms.slicing import RowSlice
from upparam.operations.recast import multiplied
from upparam.tensors import Tensor


@dataclass(frozen=True)
class Baked:
    """What became of one delta: its old and new scale, the factor that took the rest, and ||dW - dW'|| / ||dW|| (0 where it is exact)."""

    target: Target
    scale: float
    left: float
    role: str
    error: float

    def facts(self) -> dict[str, Any]:
        """JSON-ready facts."""
        return {
            "target": str(self.target), "change": "bake-scale", "scale": self.scale, "left": self.left, "factor": self.role, "error": self.error,
        }  # fmt: skip


def bakeable(delta: Delta) -> bool:
    """True for a delta one of whose factors can take over a multiplier."""
    return bool(getattr(delta, "linear", ())) and not isinstance(delta, RowSlice) and delta.scale not in (None, 0.0)


def bake(deltas: Mapping[Target, Delta], left: Mapping[Target, float]) -> tuple[dict[Target, Delta], list[Baked]]:
    """Deltas with the same dW whose scale is `left` for each. Parts that share their down factor go on sharing it.

    Of a LoRA the factor is `up`, or `down` where rounding loses far less there (up is often small enough to fall below the range of float16).
    """
    groups: dict[object, list[Target]] = {}
    for target, delta in deltas.items():
        groups.setdefault((_down(delta), left[target]), []).append(target)
    found: dict[Target, Delta] = {}
    done: list[Baked] = []
    for targets in groups.values():
        ways = [_baked({target: deltas[target] for target in targets}, left, role) for role in _roles(deltas[targets[0]])]
        errors = [max(one.error for one in facts) for _, facts in ways]
        changed, facts = ways[1 if len(ways) > 1 and 2 * errors[1] < errors[0] else 0]
        found |= changed
        done += facts
    return found, done


def _down(delta: Delta) -> object:
    if type(delta) is not LoRA:
        return id(delta)
    down = delta.down
    return id(down.source), down.offset, down.shape, down.strides, delta.scaling


def _roles(delta: Delta) -> tuple[str, ...]:
    """The factors that may take the multiplier over."""
    linear = tuple(role for role in getattr(delta, "linear", ()) if getattr(delta, role) is not None)[:1]
    return (*linear, "down") if type(delta) is LoRA else linear


def _baked(deltas: Mapping[Target, Delta], left: Mapping[Target, float], role: str) -> tuple[dict[Target, Delta], list[Baked]]:
    found: dict[Target, Delta] = {}
    done: list[Baked] = []
    shared: Tensor | None = None
    for target, delta in deltas.items():
        scale, rest = delta.known_scale(), left[target]
        scaling = as_alpha(rest, delta.rank)
        old: Tensor = getattr(delta, role)
        if role == "down":
            new = shared = shared or multiplied(old, scale / rest)
        else:
            new = multiplied(old, scale / rest)
        changed = replace(delta, **{role: new, "scaling": scaling})  # type: ignore[type-var]
        found[target] = changed
        done.append(Baked(target, scale, rest, role, _error(delta, changed, role, scale / rest)))
    return found, done


def as_alpha(multiplier: float, rank: int | None) -> Scaling:
    """The scaling of a multiplier: as alpha where that says exactly this one, which is how most dialects store it."""
    if multiplier == 1.0:
        return BAKED
    told = Scaling(alpha=multiplier * (rank or 1))
    return told if told.value(rank) == multiplier else Scaling(ScaleRule.EXPLICIT, multiplier=multiplier)


def _error(before: Delta, after: Delta, role: str, factor: float) -> float:
    """||dW - dW'|| / ||dW||: of a LoRA through r x r matrices, else that of the factor, to which dW is proportional."""
    import numpy as np

    old, new = getattr(before, role).doubles() * factor, getattr(after, role).doubles()
    gap = new - old
    if abs(frexp(factor)[0]) == 0.5 and not gap.any():
        return 0.0
    if type(before) is not LoRA or before.mid is not None:
        norm = float(np.linalg.norm(old))
        return float(np.linalg.norm(gap)) / norm if norm else 0.0
    other = (before.down if role == "up" else before.up).doubles()
    if role == "up":
        gram, one, two = other.reshape(before.rank, -1), gap.reshape(-1, before.rank).T, old.reshape(-1, before.rank).T
    else:
        gram, one, two = other.reshape(-1, before.rank).T, gap.reshape(before.rank, -1), old.reshape(before.rank, -1)
    gram = gram @ gram.T
    lost, norm = float(((one @ one.T) * gram).sum()), float(((two @ two.T) * gram).sum())
    return float(np.sqrt(max(lost, 0.0) / norm)) if norm > 0 else 0.0
