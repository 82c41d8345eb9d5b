"""Refusals: what a dialect cannot hold, told as a list with what would help."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from upparam.adapter import ExtraKind, Target
from upparam.algorithms.base import Delta
from upparam.errors import Problem, RefusedError
from upparam.findings import Finding, error
from upparam.wording import counted

BAKE = "--bake-scale"
"""Put a scale that the dialect has no place for into the factors."""
LOWER = "--lowrank"
"""Replace a delta that the dialect has no words for by a plain LoRA."""
SCALE = "--scale"
"""Say what the files do not."""
_SHOWN = 8


def refuse(dialect: str, problems: Sequence[str | Problem], remedy: str | None = None) -> None:
    """Raise RefusedError listing what the dialect cannot hold, if anything. `<kind> <name>` means an extra, `<subject>: <why>` anything else."""
    if not problems:
        return
    found = [problem if isinstance(problem, Problem) else _told(problem) for problem in problems]
    raise RefusedError(
        f"{counted(len(found), 'thing')} that {dialect} cannot hold",
        found="; ".join(map(str, found[:_SHOWN])) + (" ..." if len(found) > _SHOWN else ""), remedy=remedy or remedies(found), problems=found,
    )  # fmt: skip


def _told(text: str) -> Problem:
    kind = next((kind.value for kind in ExtraKind if text.startswith(f"{kind.value} ")), None)
    subject, _, why = text.partition(": ")
    return Problem(subject, why, cure=None if kind is None else f"--drop {kind}")


def other_scale(subject: str, delta: Delta, scale: float = 1.0, why: str = "") -> Problem:
    """The problem of a multiplier that the dialect cannot say: `scale` is the one it can."""
    return Problem(subject, why or f"a scale of {delta.known_scale():g}", cure=BAKE, scale=scale)


def because(subject: str, refusal: RefusedError) -> Problem:
    """What stands in the way of one delta, as its own refusal says it."""
    why = f"{refusal.message} ({refusal.found})" if refusal.found else refusal.message
    return Problem(subject, why, cure=next((problem.cure for problem in refusal.problems if problem.cure), None))


def other_rank(subject: str, rank: int, wanted: int, targets: tuple[Target, ...] = ()) -> Problem:
    """The problem of a rank beside larger ones in a dialect that has one rank for all: `wanted` is the largest."""
    return Problem(subject, f"rank {rank} beside {wanted}, and all must have one", targets, LOWER, rank=wanted)


_HOW = {
    SCALE: "give the scale with --scale or --alpha",
    BAKE: "put the scale into the factors with --bake-scale",
    LOWER: "approximate by plain LoRA with --lowrank auto or a rank",
}


def remedies(problems: Sequence[Problem]) -> str | None:
    """What would help against these, one way after the other; None where nothing does."""
    cures = Counter(problem.cure for problem in problems)
    ways = dict.fromkeys(_way(problem, cures[problem.cure]) for problem in problems if problem.cure)
    if any(problem.cure is None for problem in problems):
        ways["for the rest choose another dialect ('upparam dialects')" if ways else "choose another dialect ('upparam dialects')"] = None
    return ", ".join(ways) or None


def _way(problem: Problem, count: int) -> str:
    """One way out, in words; it is one for `count` problems."""
    if problem.cure == LOWER and problem.rank is not None:
        return "fill the smaller ranks up with zeros, which changes no number, with --lowrank auto"
    return _HOW.get(problem.cure or "", f"give {'it' if count == 1 else 'them'} up with {problem.cure}")


def out_of_order(module: str, refusal: RefusedError) -> Finding:
    """What is said of a delta that cannot be turned from the order of the file's rows into the reference's."""
    return error("rows-in-another-order", module, f"{refusal.message}, and here they lie in another order than in the reference names")
