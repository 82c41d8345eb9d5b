"""Between a file's names and the reference: which base and layout the names are of, deltas cut into reference targets, and joined again."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from upparam.adapter import Adapter, BaseHint, Target
from upparam.algorithms.base import Delta, fits_weight
from upparam.bases import inventory
from upparam.bases.base import Base
from upparam.bases.layouts import LayoutMap, Place, available, find
from upparam.bases.recognise import recognise, recognise_underscored
from upparam.dialects.refusing import BAKE, refuse
from upparam.dialects.words import alpha_for
from upparam.errors import Problem, RefusedError
from upparam.wording import counted, counted_of

Shape = tuple[int, ...]

_ENOUGH = 0.5
"""Share of the names that a base's layout must explain before the names are taken to be of that base."""

_VOCABULARY = 20_000
"""Rows from which on a weight is an embedding's or a head's."""

_TRIED = 4
"""Suggested bases that are tried, best first."""


@dataclass(frozen=True)
class Resolved:
    """Names explained: the layout they are of, the layout's own name for each, and what is known about the base.

    Names that the layout does not have, or has with another shape, are not in `names`.
    """

    layout: LayoutMap
    names: Mapping[str, str]
    hint: BaseHint


def resolve(
    shapes: Mapping[str, Shape],
    layouts: Sequence[str],
    base: Base | None = None,
    *,
    stated: str | None = None,
    underscored: bool = False,
    aliases: Sequence[tuple[str, str]] = (),
) -> Resolved | None:
    """The base and the first of `layouts` that explain most of these names and delta shapes; None when none explains enough.

    `base` is the one the user named; without it the recogniser suggests some, of which none is taken that has a module of one of these names
    in another shape, unless the file itself states it. `underscored` names have lost their dots. `aliases` are
    prefixes some writers use, and the layout's own in their place. The last answer is remembered: adapters that are combined or compared,
    and what is read back as proof, mostly have the modules of the one before.
    """
    asked = (list(shapes.items()), tuple(layouts), stated, underscored, tuple(aliases))
    for before, given, found in _last:
        if given is base and before == asked:
            return found
    found = _resolved(shapes, layouts, base, stated, underscored, aliases)
    _last[:] = [(asked, base, found)]
    return found


_last: list[tuple[Any, Base | None, Resolved | None]] = []
"""What was last asked and answered."""


def _resolved(
    shapes: Mapping[str, Shape],
    layouts: Sequence[str],
    base: Base | None,
    stated: str | None,
    underscored: bool,
    aliases: Sequence[tuple[str, str]],
) -> Resolved | None:
    hints = _suggested(shapes, base, stated, underscored)
    best: Resolved | None = None
    for hint, candidate in hints:
        for name in layouts:
            one = find(candidate, name)
            names = {} if one is None else _explained(one, shapes, aliases)
            if one is not None and not hint.stated and _contradicted(one, shapes, aliases):
                continue
            if one is not None and names and (best is None or len(names) > len(best.names)):
                best = Resolved(one, names, hint)
            if len(names) == len(shapes):
                return best
    return best if best is not None and len(best.names) >= _ENOUGH * len(shapes) else None


def _suggested(shapes: Mapping[str, Shape], base: Base | None, stated: str | None, underscored: bool) -> Iterable[tuple[BaseHint, Base]]:
    if base is not None:
        yield BaseHint(base.name, 1.0, ("named by the user", *base.evidence), True), base
        return
    # A norm's vector tells little of a base, and the recogniser knows none.
    matrices = {name: shape for name, shape in shapes.items() if len(shape) > 1} or shapes
    for hint in (recognise_underscored if underscored else recognise)(matrices, stated=stated)[:_TRIED]:
        name = inventory.resolve(hint.name)
        if name is not None:
            yield hint, inventory.load(name)


def _explained(one: LayoutMap, shapes: Mapping[str, Shape], aliases: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Given name -> the layout's, for those it has with that shape. A second spelling of a module already named is not explained."""
    found: dict[str, str] = {}
    taken: set[str] = set()
    for given, shape in shapes.items():
        others = (own + given[len(alias) :] for alias, own in aliases if given.startswith(alias))
        for foreign in (given, *others):
            parts = one.to_reference(foreign)
            if parts and foreign not in taken and alike(shape, (one.rows(foreign), *parts[0].shape[1:])):
                found[given] = foreign
                taken.add(foreign)
                break
    return found


def _contradicted(one: LayoutMap, shapes: Mapping[str, Shape], aliases: Sequence[tuple[str, str]]) -> bool:
    """True when the base has a module of one of these names in another shape, and in no spelling the right one: then it is another base.

    Vocabularies are resized, so an embedding or a head of other rows says nothing.
    """
    for given, shape in shapes.items():
        forms = (given, *(own + given[len(alias) :] for alias, own in aliases if given.startswith(alias)))
        found = [(one.rows(form), *parts[0].shape[1:]) for form in forms if (parts := one.to_reference(form))]
        if found and not any(alike(shape, theirs) or (shape[1:] == theirs[1:] and theirs[0] >= _VOCABULARY) for theirs in found):
            return True
    return False


def alike(one: Shape, other: Shape) -> bool:
    """True when a delta and a weight are of the same shape but for kernel axes of size 1, a flattened kernel, or sizes the delta does not tell.

    Which of the two is the delta's does not matter.
    """
    return fits_weight(one, other) or fits_weight(other, one)


PARTS_KEY = "upparam.parts"
"""Metadata under which a file of joined deltas says how they were joined, so that they come apart again bit for bit."""

Parts = dict[str, list[list[float | None] | None]]
"""Foreign module -> per stacked part None (not changed: its rows are zeros) or [first column, last column, alpha] of its own factors."""


def take_parts(metadata: dict[str, str]) -> Parts:
    """The parts a file's metadata tells of, removed from it; {} when it tells of none or of something else."""
    try:
        value = json.loads(metadata.pop(PARTS_KEY, "{}"))
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def to_targets(one: LayoutMap, foreign: str, delta: Delta, told: Parts | None = None) -> dict[Target, Delta]:
    """The reference targets a delta of a foreign module changes: cut where the foreign weight stacks several, rows in reference order.

    `told` is what the file's metadata says about how its parts were joined; it is believed only where the factors bear it out.
    """
    from upparam.algorithms.slicing import cut, reorder, unjoin

    parts = one.to_reference(foreign)
    pieces: Sequence[Delta | None] | None = None
    if told and foreign in told and all(part.span for part in parts):
        pieces = unjoin(delta, [part.span for part in parts if part.span], told[foreign])
    if pieces is None:
        pieces = [cut(delta, *part.span) if part.span else delta for part in parts]
    found: dict[Target, Delta] = {}
    for part, piece in zip(parts, pieces, strict=True):
        if piece is None:
            continue
        if not part.order.plain:
            piece = reorder(piece, part.order.reference_rows(piece.shape[0] or part.shape[0]))
        found[Target(part.module)] = piece
    return found


class Member(NamedTuple):
    """The delta of rows [start, stop) of a foreign weight."""

    start: int
    stop: int
    delta: Delta


def named(one: LayoutMap, deltas: Mapping[Target, Delta], told: Parts | None = None) -> dict[tuple[str, str], Delta]:
    """(foreign module, parameter) -> delta: `to_foreign` of each parameter's deltas."""
    found: dict[tuple[str, str], Delta] = {}
    for parameter in dict.fromkeys(target.parameter for target in deltas):
        members = {target: delta for target, delta in deltas.items() if target.parameter == parameter}
        found |= {(foreign, parameter): delta for foreign, delta in to_foreign(one, members, told).items()}
    return found


def to_foreign(one: LayoutMap, deltas: Mapping[Target, Delta], told: Parts | None = None) -> dict[str, Delta]:
    """The foreign modules that these reference targets change, in the order of first appearance; parts of a stacked weight joined.

    `told`, when given, is filled with what the file must say so that joined parts come apart again (metadata PARTS_KEY). Raises
    RefusedError listing targets that the layout has no name for, and where parts cannot be joined exactly.
    """
    from upparam.algorithms.slicing import join, reorder

    missing = [str(target) for target in deltas if one.to_foreign(target.module) is None]
    if missing:
        raise RefusedError(
            f"{counted(len(missing), 'target', 'has', 'have')} no name in the {one.name} layout of {one.base.name}",
            tensor=missing[0],
            found=", ".join(missing[:5]) + (" ..." if len(missing) > 5 else ""),
        )
    _refuse_misfits(one, deltas)
    pieces: dict[str, list[Member]] = {}
    unfit = Unfit()
    for target, delta in _whole_where_reordered(one, deltas, unfit).items():
        foreign, part = one.places[target.module]
        if not part.order.plain:
            try:
                delta = reorder(delta, part.order.foreign_rows(delta.shape[0] or part.shape[0]))
            except RefusedError as problem:
                unfit.note(foreign, problem, [Problem(str(target), problem.message, (target,))])
        start = part.span[0] if part.span else 0
        low, high = target.rows or (0, part.shape[0])
        pieces.setdefault(foreign, []).append(Member(start + low, start + high, delta))
    found: dict[str, Delta] = {}
    for foreign, members in pieces.items():
        try:
            found[foreign] = join(_with_gaps(members, one.rows(foreign)))
        except RefusedError as problem:
            own = [target for target in deltas if one.places[target.module].foreign == foreign]
            unfit.note(foreign, problem, _unjoined(foreign, own, deltas, problem))
            continue
        if told is not None and (how := _how_joined(one, foreign, members, found[foreign])):
            told[foreign] = how
    unfit.refuse()
    return found


class Unfit:
    """What stands in the way of one foreign module after another, told at the end as one refusal."""

    def __init__(self) -> None:
        self.first: tuple[str, RefusedError] | None = None
        self.problems: list[Problem] = []

    def note(self, foreign: str, problem: RefusedError, problems: Sequence[Problem]) -> None:
        """Keep a refusal about a foreign module and the problems it lists."""
        self.first = self.first or (foreign, problem)
        self.problems += problems

    def refuse(self) -> None:
        """Raise RefusedError, in the words of the first, where anything was noted."""
        if self.first is not None:
            foreign, problem = self.first
            raise RefusedError(
                problem.message,
                tensor=foreign,
                expected=problem.expected,
                found=problem.found,
                remedy=problem.remedy,
                problems=self.problems,
            ) from None


def _refuse_misfits(one: LayoutMap, deltas: Mapping[Target, Delta]) -> None:
    """Raise RefusedError for targets whose weight has another shape in this base. Vocabularies are resized, so their rows say nothing."""
    misfits = []
    for target, delta in deltas.items():
        if target.parameter != "weight":
            continue
        whole = one.places[target.module].part.shape
        wanted = whole if target.rows is None else (target.rows[1] - target.rows[0], *whole[1:])
        resized = wanted[0] >= _VOCABULARY and delta.shape[1:] == wanted[1:]
        if not resized and not fits_weight(delta.shape, wanted):
            misfits.append((target, delta.shape, wanted))
    if misfits:
        target, found, wanted = misfits[0]
        raise RefusedError(
            f"{counted_of(len(misfits), len(deltas), 'target', 'has', 'have')} another shape in {one.base.name}: it is not the base of this adapter",
            tensor=str(target), expected=wanted, found=found, remedy="name the base it was made for with --base",
        )  # fmt: skip


def _unjoined(foreign: str, targets: Sequence[Target], deltas: Mapping[Target, Delta], problem: RefusedError) -> list[Problem]:
    """Why the parts of a fused weight cannot be joined, told of those that would have to change."""
    scales = Counter(deltas[target].scale for target in targets)
    if not any(one.cure == BAKE for one in problem.problems):
        return [Problem(foreign, problem.message, tuple(targets))]
    common = scales.most_common(1)[0][0] or 1.0
    others = tuple(target for target in targets if deltas[target].scale != common)
    return [Problem(foreign, problem.message, others, BAKE, common)]


def _whole_where_reordered(one: LayoutMap, deltas: Mapping[Target, Delta], unfit: Unfit) -> dict[Target, Delta]:
    """The deltas, slices of a weight joined where its rows lie in another order here: a slice of it is no slice there."""
    from upparam.algorithms.slicing import join

    found: dict[Target, Delta] = {}
    sliced: dict[str, list[Member]] = {}
    for target, delta in deltas.items():
        if target.rows is None or one.places[target.module].part.order.plain:
            found[target] = delta
        else:
            sliced.setdefault(target.module, []).append(Member(*target.rows, delta))
            found[Target(target.module)] = delta
    for module, members in sliced.items():
        try:
            found[Target(module)] = join(_with_gaps(members, one.places[module].part.shape[0]))
        except RefusedError as problem:
            unfit.note(module, problem, _unjoined(module, [Target(module, (low, high)) for low, high, _ in members], deltas, problem))
            del found[Target(module)]
    return found


def _how_joined(one: LayoutMap, foreign: str, members: list[Member], whole: Delta) -> list[list[float | None] | None]:
    """Where each part's factors lie in the joined LoRA or DoRA; [] when cutting by rows gives them back anyway, or parts are not whole modules."""
    from upparam.algorithms.dora import DoRA
    from upparam.algorithms.lora import LoRA

    spans = [part.span or (0, part.shape[0]) for part in one.to_reference(foreign)]
    starts = {member.start: member.delta for member in members}
    whole_parts = all(low not in starts or starts[low].shape[0] == high - low for low, high in spans)
    if len(spans) < 2 or type(whole) not in (LoRA, DoRA) or not whole_parts or not set(starts) <= {low for low, _ in spans}:
        return []
    apart = len(members) > 1 and whole.rank == sum(member.delta.rank or 0 for member in members)
    if not apart and len(members) == len(spans):
        return []
    found: list[list[float | None] | None] = []
    column = 0
    for low, _ in spans:
        if low not in starts:
            found.append(None)
            continue
        rank = starts[low].rank or 0
        found.append([column, column + rank, alpha_for(starts[low])])
        column += rank if apart else 0
    return found


def _with_gaps(members: list[Member], rows: int) -> list[Delta | int]:
    found: list[Delta | int] = []
    at = 0
    for start, stop, delta in sorted(members, key=lambda member: member.start):
        if start > at:
            found.append(start - at)
        found.append(delta)
        at = stop
    return [*found, rows - at] if at < rows else found


def base_of(adapter: Adapter, options: Mapping[str, object]) -> Base | None:
    """The base to write for: the one in the write options, else the inventory the adapter's hint names; None when neither is known."""
    given = options.get("base")
    if isinstance(given, Base):
        return given
    name = inventory.resolve(adapter.base.name) if adapter.base is not None else None
    return None if name is None else inventory.load(name)


def refuse_parameters(adapter: Adapter, dialect: str) -> None:
    """Raise RefusedError for deltas of parameters that have no name of their own in `dialect` (a mixture's stacked experts), whatever the base."""
    bare = [target for target in adapter.deltas if target.parameter not in ("weight", "bias")]
    refuse(dialect, [f"{target.module}: a delta of the {target.parameter}" for target in bare])


def untranslated(adapter: Adapter, options: Mapping[str, object], dialect: str) -> RefusedError:
    """Why names that stayed another naming's cannot be written: no base is known, or the one the user named has not these modules.

    Raises RefusedError where no base would help.
    """
    refuse_parameters(adapter, dialect)
    file, base = adapter.files[0] if adapter.files else None, options.get("base")
    if not isinstance(base, Base):
        return RefusedError(
            f"the module names are those of {adapter.layout}, and the base that could translate them is not known",
            file=file, remedy="name it with --base",
        )  # fmt: skip
    shown = next((f", such as {target} {delta.shape}" for target, delta in adapter.deltas.items()), "")
    wanted = f"most of these {len(adapter.deltas)} modules in their shapes" if len(adapter.deltas) > 1 else "this module in its shape"
    return RefusedError(
        f"the module names are those of {adapter.layout}, and the base named is not the one that could translate them",
        file=file, expected=wanted + shown, found=base.name,
        remedy="name the base it was made for with --base",
    )  # fmt: skip


OWN_NAMES = "names of"
"""Key of `Adapter.spelling`: the layout and base whose names the file itself has."""


def note_layout(spelling: dict[str, str], one: LayoutMap) -> None:
    """Remember the layout that explained a file's names, and of which base."""
    spelling["layout"], spelling[OWN_NAMES] = one.name, _named_by(one)


def _named_by(one: LayoutMap) -> str:
    return f"{one.base.name} in {one.name}"


def layout_for(adapter: Adapter, options: Mapping[str, object], name: str) -> LayoutMap:
    """The layout in which to name this adapter's targets.

    Raises RefusedError when the base is not known, or known only as one of several that would give the targets different names: then
    any choice would be a guess. Where it only leads back to the names that the file has, nothing is guessed.
    """
    base = base_of(adapter, options)
    if base is None:
        raise RefusedError(
            f"the {name} names follow from the base, and which base this adapter is for is not known",
            file=adapter.files[0] if adapter.files else None, remedy="name it with --base",
        )  # fmt: skip
    one = find(base, name)
    if one is None:
        raise RefusedError(f"{base.name} has no {name} names", expected="one of " + ", ".join(available(base)), found=name)
    hint = adapter.base
    if isinstance(options.get("base"), Base) or hint is None or hint.stated or adapter.spelling.get(OWN_NAMES) == _named_by(one):
        return one
    for other in hint.lookalikes:
        alike_name = inventory.resolve(other)
        theirs = None if alike_name is None else find(inventory.load(alike_name), name)
        for target in adapter.deltas:
            ours, place = one.to_foreign(target.module), None if theirs is None else theirs.to_foreign(target.module)
            if theirs is not None and ours is not None and (place is None or _where(place) != _where(ours)):
                raise RefusedError(
                    f"{hint.name} and {other} fit this adapter alike and give its targets different names", tensor=str(target),
                    expected=f"{one.name} names of one base", remedy="name it with --base",
                )  # fmt: skip
    return one


def _where(place: Place) -> tuple[object, ...]:
    return place.foreign, place.part.span, place.part.order
