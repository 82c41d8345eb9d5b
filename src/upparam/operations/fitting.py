"""Make an adapter fit a dialect, by arithmetic that the user has asked for: only deltas that the dialect refuses are changed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upparam.adapter import Adapter
from upparam.dialects.base import Dialect, Package
from upparam.dialects.refusing import BAKE, LOWER, SCALE
from upparam.errors import RefusedError
from upparam.progress import Progress, silent
from upparam.tensors import Tensor
from upparam.wording import at_most

if TYPE_CHECKING:
    from upparam.algorithms.lowrank import RankRule
    from upparam.operations.baking import Baked
    from upparam.operations.lowering import Lowered
    from upparam.operations.padding import Padded
    from upparam.operations.spool import Keep


@dataclass
class Arithmetic:
    """What the user allows to be computed, where the new factors go, and what was done."""

    bake_scale: bool = False
    lowrank: RankRule | None = None
    weights: Path | None = None
    """The base model on disk, for deltas whose dW depends on it."""
    offered: Collection[str] = (BAKE, LOWER, SCALE)
    """The cures that the command at hand has options for, besides --drop: a refusal advises no others."""
    keep: Keep = Tensor.of
    threads: int | None = None
    progress: Progress = silent
    baked: list[Baked] = field(default_factory=list)
    lowered: list[Lowered] = field(default_factory=list)
    padded: list[Padded] = field(default_factory=list)

    def counts(self) -> dict[str, Any]:
        """The numbers of the receipt, {} where nothing was computed."""
        found: dict[str, Any] = {}
        if self.baked:
            worst = max(self.baked, key=lambda one: one.error)
            found["scales_baked_in"] = len(self.baked)
            found["rounding"] = "none" if worst.error == 0.0 else f"{at_most(worst.error, 2)} (worst {worst.target})"
        if self.lowered:
            worst_low = max(self.lowered, key=lambda one: one.error)
            total = sqrt(sum(one.norm**2 for one in self.lowered))
            lost = sqrt(sum((one.error * one.norm) ** 2 for one in self.lowered))
            ranks = sorted({one.rank for one in self.lowered})
            found["approximated_by_plain_LoRA"] = len(self.lowered)
            found["of_rank"] = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
            found["error_in_total"] = f"{lost / total if total else 0.0:.3g}"
            found["worst"] = f"{worst_low.error:.3g} ({worst_low.target})"
        if self.padded:
            found["ranks_filled_up_with_zeros"] = f"{len(self.padded)} (to {max(one.new for one in self.padded)}; dW stays exactly)"
        return found

    def facts(self) -> list[dict[str, Any]]:
        """What was computed, target by target."""
        return [one.facts() for one in self.baked] + [one.facts() for one in self.lowered] + [one.facts() for one in self.padded]


def fitted(adapter: Adapter, member: Dialect, options: Mapping[str, Any], how: Arithmetic) -> tuple[Adapter, Package]:
    """The adapter as the dialect can hold it, and its package.

    Raises RefusedError, naming the options that would help, where the arithmetic allowed does not suffice.
    """
    try:
        return adapter, member.write(adapter, options)
    except RefusedError as problem:
        from upparam.operations.curing import cured

        return cured(problem, adapter, member, options, how)
