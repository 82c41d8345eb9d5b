"""What a dialect refuses of an adapter, changed as far as the user has asked for the arithmetic, until the dialect writes it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from upparam.adapter import Adapter, Target
from upparam.algorithms.base import Delta
from upparam.algorithms.lora import LoRA
from upparam.dialects import restated
from upparam.dialects.base import Dialect, Package
from upparam.dialects.refusing import BAKE, LOWER
from upparam.errors import Problem, RefusedError, UpparamError
from upparam.operations.advising import ROUNDS, advised, explained
from upparam.operations.baking import bake
from upparam.operations.fitting import Arithmetic
from upparam.operations.lowering import Lowered, lower, lowerable
from upparam.operations.padding import pad, paddable
from upparam.operations.threads import in_threads


def cured(problem: RefusedError, adapter: Adapter, member: Dialect, options: Mapping[str, Any], how: Arithmetic) -> tuple[Adapter, Package]:
    """The adapter that was refused as the dialect can hold it, and its package; see `upparam.operations.fitting.fitted`."""
    for _ in range(ROUNDS):
        told = explained(problem, adapter, options)
        changed = _changed(adapter, told, how)
        if not changed:
            raise advised(problem, told, adapter, member, options, how) from problem
        deltas = {target: changed.get(target, delta) for target, delta in adapter.deltas.items()}
        adapter = restated(replace(adapter, deltas=deltas))
        try:
            return adapter, member.write(adapter, options)
        except RefusedError as another:
            problem = another
    raise RefusedError(f"the adapter does not come to fit {member.name}", file=adapter.files[0] if adapter.files else None)


def _changed(adapter: Adapter, problems: Iterable[Problem], how: Arithmetic) -> dict[Target, Delta]:
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
        try:
            return lower(target, deltas[target], rule, weights.pop(target, None), how.keep)
        except UpparamError as problem:
            problem.locate(file=adapter.files[0] if adapter.files else None, tensor=str(target))
            raise

    order = list(deltas)
    sizes = [max(1, deltas[target].shape[0]) for target in order]
    done = list(in_threads(work, order, sizes, how.threads, how.progress))
    how.lowered += [facts for _, facts in done]
    return {target: lora for target, (lora, _) in zip(order, done, strict=True)}
