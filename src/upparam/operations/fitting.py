"""Make an adapter fit a dialect, by arithmetic that the user has asked for: only deltas that the dialect refuses are changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import sqrt
from pathlib import Path
from typing import Any

from upparam.adapter import Adapter, Target
from upparam.algorithms.base import Delta
from upparam.algorithms.lora import LoRA
from upparam.algorithms.lowrank import RankRule
from upparam.dialects import restated
from upparam.dialects.base import Dialect, Package
from upparam.dialects.refusing import BAKE, LOWER
from upparam.errors import Problem, RefusedError
from upparam.operations.advising import ROUNDS, advised, explained
from upparam.operations.baking import Baked, bake
from upparam.operations.lowering import Lowered, lower, lowerable
from upparam.operations.padding import Padded, pad, paddable
from upparam.operations.spool import Keep
from upparam.operations.threads import in_threads
from upparam.progress import Progress, silent
from upparam.tensors import Tensor


@dataclass
class Arithmetic:
    """What the user allows to be computed, where the new factors go, and what was done."""

    bake_scale: bool = False
    lowrank: RankRule | None = None
    weights: Path | None = None
    """The base model on disk, for deltas whose dW depends on it."""
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
            found["rounding"] = "none" if worst.error == 0.0 else f"{worst.error:.2g} or less (worst {worst.target})"
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
    for _ in range(ROUNDS):
        try:
            return adapter, member.write(adapter, options)
        except RefusedError as problem:
            told = explained(problem, adapter, options)
            changed = _cured(adapter, told, how)
            if not changed:
                raise advised(problem, told, adapter, member, options, how.weights is not None) from problem
            deltas = {target: changed.get(target, delta) for target, delta in adapter.deltas.items()}
            adapter = restated(replace(adapter, deltas=deltas))
    raise RefusedError(f"the adapter does not come to fit {member.name}", file=adapter.files[0] if adapter.files else None)


def _cured(adapter: Adapter, problems: Iterable[Problem], how: Arithmetic) -> dict[Target, Delta]:
    """The deltas that had to change, changed as far as the user allows it."""
    left: dict[Target, float] = {}
    low: dict[Target, Delta] = {}
    ranks: dict[Target, int] = {}
    for problem in problems:
        for target in problem.targets:
            delta = adapter.deltas[target]
            if problem.cure == BAKE and how.bake_scale:
                left[target] = problem.scale
            elif problem.cure == LOWER and how.lowrank is not None and paddable(delta, problem.rank):
                ranks[target] = problem.rank or 0
            elif problem.cure == LOWER and how.lowrank is not None and lowerable(target, delta):
                low[target] = delta
    changed, baked = bake({target: adapter.deltas[target] for target in left}, left)
    how.baked += baked
    changed |= _lowered(adapter, low, how)
    for target, rank in ranks.items():
        changed[target], padded = pad(target, changed.get(target, adapter.deltas[target]), rank)
        how.padded.append(padded)
    return changed


def _lowered(adapter: Adapter, deltas: Mapping[Target, Delta], how: Arithmetic) -> dict[Target, LoRA]:
    from upparam.operations.base_weights import weights_of

    rule = how.lowrank
    if rule is None or not deltas:
        return {}
    dependent = {target: delta for target, delta in deltas.items() if not delta.additive}
    weights = weights_of(adapter, dependent, how.weights) if dependent and how.weights is not None else {}

    def work(target: Target) -> tuple[LoRA, Lowered]:
        return lower(target, deltas[target], rule, weights.pop(target, None), how.keep)

    order = list(deltas)
    sizes = [max(1, deltas[target].shape[0]) for target in order]
    done = list(in_threads(work, order, sizes, how.threads, how.progress))
    how.lowered += [facts for _, facts in done]
    return {target: lora for target, (lora, _) in zip(order, done, strict=True)}
