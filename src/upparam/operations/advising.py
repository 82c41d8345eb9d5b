"""What to do about a refusal: options are named only where a rehearsal with stand-ins shows that they lead to a written adapter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from upparam.adapter import Adapter, ExtraKind, Target, without
from upparam.algorithms.base import Delta, Scaling
from upparam.algorithms.lora import LoRA
from upparam.bases.layouts import available, find
from upparam.dialects import DIALECTS, get, restated
from upparam.dialects.base import Dialect
from upparam.dialects.placing import base_of
from upparam.dialects.refusing import BAKE, LOWER, SCALE, remedies
from upparam.errors import Problem, RefusedError, UpparamError
from upparam.operations.baking import as_alpha, bakeable
from upparam.operations.fitting import Arithmetic
from upparam.operations.lowering import lowerable
from upparam.operations.padding import pad, paddable
from upparam.tensors import Tensor

ROUNDS = 8
"""A dialect tells its problems in turns, of which each needs a round."""
_NEEDS_WEIGHTS = "which takes the base's weights: --base with the path of the model"


_FLAGS = {LOWER: f"{LOWER} auto", SCALE: f"{SCALE} S"}
"""Cures that take a value, with one."""


def explained(problem: RefusedError, adapter: Adapter, options: Mapping[str, Any]) -> list[Problem]:
    """The refusal's problems with the adapter's targets each is about, and the cure where only the algorithm stands in the way."""
    return [_explained(one, adapter, options) for one in problem.problems]


def _explained(problem: Problem, adapter: Adapter, options: Mapping[str, Any]) -> Problem:
    targets = tuple(_meant(problem, adapter, options))
    deltas = [adapter.deltas[target] for target in targets]
    cure = problem.cure
    if cure is None and targets and any(lowerable(target, delta) for target, delta in zip(targets, deltas, strict=True)):
        cure = LOWER
    if cure is None and targets and all(target.parameter == "bias" for target in targets):
        cure = f"--drop {ExtraKind.BIAS.value}"
    if cure == BAKE and not all(map(bakeable, deltas)):
        cure = LOWER
    return problem._replace(targets=targets, cure=cure)


def _meant(problem: Problem, adapter: Adapter, options: Mapping[str, Any]) -> Iterable[Target]:
    """The targets a problem is about: those it lists, those it names, or those of the foreign module (or its bias) it names."""
    if problem.targets:
        wanted = set(problem.targets)
        whole = {(target.module, target.parameter) for target in wanted if target.rows is None}
        return [target for target in adapter.deltas if target in wanted or (target.module, target.parameter) in whole]
    named = [target for target in adapter.deltas if problem.subject in (str(target), target.module)]
    base = base_of(adapter, options)
    if named or base is None:
        return named
    subject = problem.subject.removesuffix(".bias")
    for name in available(base):
        one = find(base, name)
        modules = {part.module for part in one.to_reference(subject)} if one is not None else set()
        own = [target for target in adapter.deltas if target.module in modules]
        if named := [target for target in own if target.parameter == "bias"] if subject != problem.subject else own:
            return named
    return []


def advised(
    problem: RefusedError, told: Sequence[Problem], adapter: Adapter, member: Dialect, options: Mapping[str, Any], how: Arithmetic
) -> RefusedError:
    """The refusal with a remedy that works: the options that lead to a written adapter, else the dialects that hold it as it is.

    `told` are its problems as `explained` gives them; `how` says which options the command has, and whether the base's weights are at hand.
    What takes options that only convert has is left to convert. A refusal that lists no problems and has a remedy of its own (the base to
    be named, say) keeps it.
    """
    if not problem.problems and problem.remedy is not None:
        return problem
    rehearsed = _rehearsed(told, adapter, member, options) if told else None
    needs_weights = how.weights is None and any(
        one.cure == LOWER and one.rank is None and _dependent(one, adapter) for one in rehearsed or ()
    )
    if rehearsed is not None and all(_offered(one, how) for one in rehearsed):
        remedy = f"{remedies(rehearsed)}, {_NEEDS_WEIGHTS}" if needs_weights else remedies(rehearsed)
    else:
        told = [one._replace(cure=None) for one in told]
        holding = [name for name in DIALECTS if name != member.name and _holds(name, adapter, options)]
        remedy = f"choose another dialect: {_listed(holding)} it as it is" if holding else None
        if remedy is not None and rehearsed is not None:
            flags = dict.fromkeys(_FLAGS.get(one.cure or "", one.cure) for one in rehearsed)
            words = ["upparam convert", f"--to {member.name}", *flags, *(["--base MODEL"] if needs_weights else [])]
            remedy = f"{remedy}; '{' '.join(map(str, words))}' then makes {member.name} of that"
    return RefusedError(
        problem.message, file=problem.file, tensor=problem.tensor, expected=problem.expected, found=problem.found, remedy=remedy, problems=told
    )  # fmt: skip


def _offered(problem: Problem, how: Arithmetic) -> bool:
    return problem.cure in how.offered or (problem.cure or "").startswith("--drop ")


def _listed(names: Sequence[str]) -> str:
    return f"{names[0]} holds" if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]} hold"


def _holds(name: str, adapter: Adapter, options: Mapping[str, Any]) -> bool:
    member = get(name)
    if not member.writable:
        return False
    try:
        member.write(adapter, options)
    except UpparamError:
        return False
    return True


def _dependent(problem: Problem, adapter: Adapter) -> bool:
    return any(target in adapter.deltas and not adapter.deltas[target].additive for target in problem.targets)


def _rehearsed(told: Sequence[Problem], adapter: Adapter, member: Dialect, options: Mapping[str, Any]) -> list[Problem] | None:
    """Every problem met on the way to a written adapter when each is cured by its option, with nothing computed; None where there is no way."""
    met: list[Problem] = []
    for _ in range(ROUNDS):
        if not all(one.cure for one in told):
            return None
        met += told
        changed = {
            target: stand for one in told for target in one.targets if (stand := _stand_in(one, target, adapter, options)) is not None
        }
        gone = {one.cure.removeprefix("--drop ") for one in told if one.cure is not None and one.cure.startswith("--drop ")}
        if not changed and not gone:
            return None
        options = {**options, "drop": frozenset(options.get("drop", ())) | gone}
        try:
            adapter = restated(without(replace(adapter, deltas={**adapter.deltas, **changed}), gone)[0])
            member.write(adapter, options)
        except RefusedError as problem:
            told = explained(problem, adapter, options)
            if not told:
                return None
        else:
            return met
    return None


def _stand_in(problem: Problem, target: Target, adapter: Adapter, options: Mapping[str, Any]) -> Delta | None:
    """A delta of the form the cure would give this one, its numbers not computed; None where the cure is none for it."""
    delta = adapter.deltas[target]
    if problem.cure == BAKE:
        return replace(delta, scaling=as_alpha(problem.scale, delta.rank))  # type: ignore[type-var]
    if problem.cure == SCALE:
        return replace(delta, scaling=as_alpha(1.0, delta.rank))  # type: ignore[type-var]
    if problem.cure != LOWER:
        return None
    if paddable(delta, problem.rank):
        return pad(target, delta, problem.rank or 0)[0]
    if not lowerable(target, delta):
        return None
    if type(delta) is LoRA:
        return replace(delta, mid=None, down=_blank(delta.down, (delta.rank, *delta.shape[1:])))
    known = base.by_path.get(target.module) if (base := base_of(adapter, options)) is not None else None
    shape = delta.shape if all(delta.shape) or known is None else known.canonical
    if target.rows is not None:
        shape = (target.rows[1] - target.rows[0], *shape[1:])
    if not prod(shape):
        return None
    factor = next(iter(delta.factors().values()))
    ones = [1] * len(shape[2:])
    return LoRA(_blank(factor, (shape[0], 1, *ones)), _blank(factor, (1, *shape[1:])), Scaling(alpha=1.0))


def _blank(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Zeros in the dtype of another tensor."""
    import numpy as np

    return Tensor.computed(like.dtype, shape, lambda: np.zeros(shape, like.dtype.numpy), "zeros")
