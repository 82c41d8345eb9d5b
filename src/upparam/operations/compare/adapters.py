"""Two adapters side by side: their targets brought together whatever their dialects, compared module by module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from upparam.adapter import Adapter, Extra, Target
from upparam.algorithms.base import Delta
from upparam.algorithms.slicing import join
from upparam.errors import RefusedError, UpparamError
from upparam.findings import Finding, warning
from upparam.operations.compare.module import SAME, Alike, Asked, ModuleComparison, compare_deltas
from upparam.operations.compare.verdict import Alone, Comparison, ExtraComparison, Verdict, decide, one_multiplier
from upparam.operations.extract.difference import same_weights
from upparam.operations.threads import in_threads
from upparam.progress import Progress, silent
from upparam.tensors import same_bits
from upparam.wording import counted

Job = tuple[Target, Delta, Delta]
SHARED = 0.95
"""Overlap of two spaces from which they are called the same: an average angle of 13 degrees."""
_MANY = 16
"""Modules from which on one of them is looked at beforehand."""
Grouped = dict[tuple[str, str], dict[Target, Delta]]


def compare_adapters(
    one: Adapter,
    other: Adapter,
    names: tuple[str, str] = ("first", "second"),
    *,
    angles: bool = True,
    threads: int | None = None,
    progress: Progress = silent,
) -> Comparison:
    """What two adapters are to each other, after both were read into the canonical form. Every factor is read once or twice.

    `angles` says whether principal angles, on which no verdict rests, are computed too.

    Raises RefusedError when they share no module name and it is not known that they name modules alike.
    """
    jobs, alone, problems = _matched(one, other)
    if not jobs and not problems and one.deltas and other.deltas:
        _refuse_strangers(one, other, names)
    sizes = [sum(factor.nbytes for delta in job[1:] for factor in delta.factors().values()) for job in jobs]
    first = _first(jobs, sizes)
    asked = Asked(angles, expected=None if first is None else first[1].multiplier)
    found = list(in_threads(partial(_compare, asked), jobs, sizes, threads, progress))
    if first is not None:
        found[first[0]] = first[1]
    kinds = {module.alike for module in found}
    if Alike.SCALED in kinds and kinds <= SAME | {Alike.SCALED}:
        # Whether all share one multiplier takes that of equal ones as exactly as those of the scaled are known.
        sure = partial(_compare, Asked(certain=True))
        found = [sure(job) if module.alike is Alike.EQUAL else module for job, module in zip(jobs, found, strict=True)]
        if first is not None and not one_multiplier(found):
            found = [sure(job) if module.alike is Alike.SCALED else module for job, module in zip(jobs, found, strict=True)]
    result = Comparison(
        *names, Verdict.UNDECIDED, "", [*found, *problems], alone, _extras(one, other), dialects=(one.dialect, other.dialect),
        bases=(_base(one), _base(other)),
    )  # fmt: skip
    result.findings += _findings(one, other, names, result)
    decide(result)
    return result


def _first(jobs: Sequence[Job], sizes: Sequence[int]) -> tuple[int, ModuleComparison] | None:
    """(place, comparison) of the largest of many modules where its deltas are multiples: what it tells is likely true of the others.

    How far rounding scatters a multiplier costs half as much as all else about a module; few are so far from the first that it matters.
    """
    if len(jobs) < _MANY:
        return None
    place = max(range(len(jobs)), key=sizes.__getitem__)
    module = _compare(Asked(angles=False), jobs[place])
    return (place, module) if module.alike is Alike.SCALED and module.multiplier is not None else None


def _compare(asked: Asked, job: Job) -> ModuleComparison:
    target, mine, theirs = job
    try:
        return compare_deltas(str(target), mine, theirs, asked)
    except UpparamError as problem:
        problem.locate(tensor=str(target))
        raise


def _base(adapter: Adapter) -> str | None:
    return None if adapter.base is None else adapter.base.name


def _matched(one: Adapter, other: Adapter) -> tuple[list[Job], list[Alone], list[ModuleComparison]]:
    """Pairs of deltas of one target, targets of one adapter alone, and modules whose parts cannot be brought together."""
    mine, theirs = _grouped(one.deltas), _grouped(other.deltas)
    jobs: list[Job] = []
    alone = [_alone(target, delta, 0) for key, parts in mine.items() if key not in theirs for target, delta in parts.items()]
    problems: list[ModuleComparison] = []
    for key, parts in mine.items():
        if key not in theirs:
            continue
        others = theirs[key]
        if any((target.rows is None) is not (next(iter(others)).rows is None) for target in parts):
            try:
                jobs.append((Target(key[0], None, key[1]), _joined(parts), _joined(others)))
            except RefusedError as problem:
                problems.append(_apart(Target(key[0], None, key[1]), parts, others, problem.message))
            continue
        jobs += [(target, delta, others[target]) for target, delta in parts.items() if target in others]
        alone += [_alone(target, delta, 0) for target, delta in parts.items() if target not in others]
        alone += [_alone(target, delta, 1) for target, delta in others.items() if target not in parts]
    alone += [_alone(target, delta, 1) for key, parts in theirs.items() if key not in mine for target, delta in parts.items()]
    return jobs, alone, problems


def _grouped(deltas: Mapping[Target, Delta]) -> Grouped:
    found: Grouped = {}
    for target, delta in deltas.items():
        found.setdefault((target.module, target.parameter), {})[target] = delta
    return found


def _joined(parts: Mapping[Target, Delta]) -> Delta:
    """The delta of the whole weight; rows of which no part tells do not change. Raises RefusedError where parts cannot be joined."""
    pieces: list[Delta | int] = []
    at = 0
    for target, delta in sorted(parts.items(), key=lambda item: item[0].rows or (0, 0)):
        start, stop = target.rows or (0, delta.shape[0])
        if start > at:
            pieces.append(start - at)
        pieces.append(delta)
        at = stop
    return join(pieces)


def _apart(target: Target, mine: Mapping[Target, Delta], theirs: Mapping[Target, Delta], reason: str) -> ModuleComparison:
    one, other = next(iter(mine.values())), next(iter(theirs.values()))
    dtypes = [" ".join(dict.fromkeys(factor.dtype.name for factor in delta.factors().values())) for delta in (one, other)]
    return ModuleComparison(
        str(target), one.shape, Alike.INCOMPARABLE, (one.algorithm, other.algorithm), (one.rank, other.rank), (one.alpha, other.alpha),
        (one.scale, other.scale), (dtypes[0], dtypes[1]), reason=reason,
    )  # fmt: skip


def _alone(target: Target, delta: Delta, only: int) -> Alone:
    try:
        norm = delta.frobenius() if delta.additive else None
    except UpparamError:
        norm = None
    return Alone(str(target), only, norm)


def _extras(one: Adapter, other: Adapter) -> list[ExtraComparison]:
    mine, theirs = _named(one), _named(other)
    found = []
    for key, extra in mine.items():
        twin = theirs.get(key)
        found.append(ExtraComparison(*key, None, only=0) if twin is None else _extra(extra, twin))
    return [*found, *(ExtraComparison(*key, None, only=1) for key in theirs if key not in mine)]


def _named(adapter: Adapter) -> dict[tuple[str, str], Extra]:
    return {(extra.kind.value, extra.name): extra for extra in adapter.extras}


def _extra(one: Extra, other: Extra) -> ExtraComparison:
    import numpy as np

    mine, theirs = one.tensor, other.tensor
    kind, name = one.kind.value, one.name
    if same_bits(mine, theirs):
        return ExtraComparison(kind, name, Alike.BITS, 0.0)
    if mine.shape != theirs.shape or not mine.dtype.is_float or not theirs.dtype.is_float:
        return ExtraComparison(kind, name, Alike.DIFFERENT)
    rounded = same_weights(mine, theirs) or same_weights(theirs, mine)
    first, second = mine.doubles(), theirs.doubles()
    size = float(max(np.linalg.norm(first), np.linalg.norm(second)))
    off = float(np.linalg.norm(first - second)) / size if 0 < size < float("inf") else None
    return ExtraComparison(kind, name, Alike.ROUNDED if rounded else Alike.DIFFERENT, off)


def _refuse_strangers(one: Adapter, other: Adapter, names: tuple[str, str]) -> None:
    """Raise unless both name modules alike, so that having none in common means something."""
    alike = one.dialect == other.dialect and one.layout == other.layout
    known = one.base is not None and other.base is not None and one.layout == other.layout == "reference"
    if not alike and not known:
        raise RefusedError(
            "the adapters name their modules in different ways, and the base of one is not known", file=names[0],
            expected=f"names such as {next(iter(one.deltas))}", found=f"{next(iter(other.deltas))} in {names[1]}",
            remedy="name the base with --base",
        )  # fmt: skip


def _findings(one: Adapter, other: Adapter, names: tuple[str, str], result: Comparison) -> list[Finding]:
    found = [finding for adapter in (one, other) for finding in adapter.findings if finding.severity]
    for adapter, name in zip((one, other), names, strict=True):
        if adapter.leftovers:
            found.append(
                warning("leftovers", name, f"not compared, as no rule explains them: {counted(len(adapter.leftovers), 'tensor')}", *list(adapter.leftovers)[:3])
            )  # fmt: skip
        if adapter.conditions:
            found.append(warning("conditions", name, "the deltas are not the whole change", *adapter.conditions))
    if one.base is not None and other.base is not None and one.base.name != other.base.name:
        found.append(warning("bases-differ", names[1], "the adapters seem to be for different bases", one.base.name, other.base.name))
    if one.layout != other.layout and result.alone:
        found.append(
            warning("layouts-differ", names[1], "names were not brought together everywhere; naming the base may match more modules", one.layout, other.layout)
        )  # fmt: skip
    return [*dict.fromkeys(found), *_shared_spaces(result, names)]


def _shared_spaces(result: Comparison, names: tuple[str, str]) -> list[Finding]:
    """What the angles tell beyond the verdict: factors that span nearly the same space though the deltas differ."""
    found = []
    apart = [module for module in result.modules if module.alike is Alike.DIFFERENT and module.columns and module.rows]
    for side, words in (("rows", "down factors span the same rows"), ("columns", "up factors span the same columns")):
        shared = [module for module in apart if (angles := getattr(module, side)).overlap > SHARED and angles.chance < 0.5]
        if shared:
            found.append(
                warning(
                    f"same-{side}", names[1],
                    f"the deltas differ, but in {len(shared)} of {len(apart)} modules their {words}, as after starting from the same random factor",
                    f"{shared[0].target}: overlap {getattr(shared[0], side).overlap:.4f}, of random spaces {getattr(shared[0], side).chance:.2g}",
                )
            )  # fmt: skip
    return found
