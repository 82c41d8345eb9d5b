"""What two adapters, or two models, are to each other as a whole: one verdict, one sentence, and the numbers behind it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from enum import Enum
from math import ceil, log10, prod, sqrt
from typing import Any

from upparam.errors import EXIT_FINDINGS, EXIT_OK
from upparam.findings import Finding
from upparam.operations.compare.module import NEAR, SAME, Alike, ModuleComparison
from upparam.wording import counted

CHANCE = 6.0
"""Standard deviations of the cosine of independent deltas above which a cosine is not chance."""

_EXACT = 2.0**-40
"""A relative error of a multiplier below which none is told from another."""


class Verdict(str, Enum):
    """What the second is to the first. The value is what `--accept` and JSON say."""

    BITS = "bit-equal"
    EQUAL = "equal"
    SCALED = "scaled"
    RESIZED = "resized"
    NEAR = "near-duplicate"
    PARTLY = "partly-shared"
    RELATED = "related"
    UNRELATED = "unrelated"
    UNDECIDED = "not-comparable"
    NOISE = "within-rounding"
    """Models only: they differ by no more than rounding explains."""
    LOW_RANK = "low-rank-change"
    """Models only: every changed matrix differs by a low rank, as a merged adapter leaves it."""
    CHANGED = "changed"
    """Models only."""


ACCEPTED = frozenset((Verdict.BITS, Verdict.EQUAL))
"""Verdicts that count as the same."""


@dataclass(frozen=True)
class ExtraComparison:
    """A tensor that rides along, in one or both. `alike` is BITS, ROUNDED or DIFFERENT; None where only one has it (`only`: 0 or 1)."""

    kind: str
    name: str
    alike: Alike | None
    distance: float | None = None
    only: int | None = None

    def facts(self) -> dict[str, Any]:
        """JSON-ready facts."""
        where = {} if self.only is None else {"only_in": ("first", "second")[self.only]}
        return {"kind": self.kind, "name": self.name, "alike": self.alike and self.alike.value, "distance": self.distance} | where


@dataclass(frozen=True)
class Alone:
    """A target that only one adapter changes (`only`: 0 or 1), and the norm of its dW, None where it cannot be told."""

    target: str
    only: int
    norm: float | None

    def facts(self) -> dict[str, Any]:
        """JSON-ready facts."""
        return {"target": self.target, "only_in": ("first", "second")[self.only], "norm": self.norm}


@dataclass
class Comparison:
    """Two adapters compared. Totals are over all modules, those that only one has included as zero in the other.

    `chance` is the cosine up to which adapters trained apart come by accident (CHANCE standard deviations); `multiplier` the one that
    explains the second by the first, None where modules have different ones.
    """

    first: str
    second: str
    verdict: Verdict
    summary: str
    modules: list[ModuleComparison]
    alone: list[Alone] = field(default_factory=list)
    extras: list[ExtraComparison] = field(default_factory=list)
    norms: tuple[float, float] | None = None
    cosine: float | None = None
    distance: float | None = None
    multiplier: float | None = None
    chance: float | None = None
    findings: list[Finding] = field(default_factory=list)
    accepted: Collection[Verdict] = ACCEPTED
    dialects: tuple[str, str] = ("", "")
    bases: tuple[str | None, str | None] = (None, None)

    @property
    def exit_code(self) -> int:
        """0 when the verdict is one of `accepted`, else 1."""
        return EXIT_OK if self.verdict in self.accepted else EXIT_FINDINGS

    def counts(self) -> dict[str, int]:
        """How many modules stand in which relation."""
        return dict(Counter(module.alike.value for module in self.modules))

    def facts(self) -> dict[str, Any]:
        """JSON-ready facts."""
        return {
            "kind": "adapters", "first": self.first, "second": self.second, "verdict": self.verdict.value, "summary": self.summary,
            "dialects": list(self.dialects), "bases": list(self.bases), "counts": self.counts(),
            "norms": None if self.norms is None else list(self.norms), "cosine": self.cosine, "distance": self.distance,
            "multiplier": self.multiplier, "chance": self.chance, "modules": [module.facts() for module in self.modules],
            "alone": [one.facts() for one in self.alone], "extras": [extra.facts() for extra in self.extras],
            "findings": [finding.facts() for finding in self.findings],
        }  # fmt: skip


def decide(result: Comparison) -> None:
    """Fill in totals, verdict and summary from the modules, what is alone, and the extras."""
    _totals(result)
    result.verdict, result.summary = _verdict(result)


def _totals(result: Comparison) -> None:
    known = [module for module in result.modules if module.norms[0] is not None and module.norms[1] is not None]
    if len(known) < len(result.modules) or any(one.norm is None for one in result.alone):
        return
    squares = [sum((module.norms[side] or 0.0) ** 2 for module in known) for side in (0, 1)]
    for one in result.alone:
        squares[one.only] += (one.norm or 0.0) ** 2
    # Bit-equal modules have no inner product of their own.
    inner = sum(module.inner if module.inner is not None else (module.norms[0] or 0.0) ** 2 for module in known)
    result.norms = (sqrt(squares[0]), sqrt(squares[1]))
    if not all(squares):
        return
    size = result.norms[0] * result.norms[1]
    result.cosine = max(-1.0, min(1.0, inner / size))
    gaps = sum((module.distance or 0.0) ** 2 * max(module.norms[0] or 0.0, module.norms[1] or 0.0) ** 2 for module in known)
    gaps += sum((one.norm or 0.0) ** 2 for one in result.alone)
    result.distance = sqrt(gaps) / max(result.norms)
    # Matrices turned at random have inner products of variance ||A||^2 ||B||^2 / (rows columns).
    variance = sum(((module.norms[0] or 0.0) * (module.norms[1] or 0.0)) ** 2 / max(prod(module.shape), 1) for module in known)
    result.chance = min(1.0, CHANCE * sqrt(variance) / size)


def _verdict(result: Comparison) -> tuple[Verdict, str]:
    modules = result.modules
    kinds = {module.alike for module in modules}
    beside = _beside(result)
    if not modules:
        return Verdict.UNRELATED, "no module in common" + _tail(beside)
    if kinds <= SAME | {Alike.SCALED, Alike.RESIZED} and not beside:
        found = _whole(result, kinds)
        if found is not None:
            return found
    if not beside or kinds - SAME:
        near = _near(result)
        if near is not None:
            return Verdict.NEAR, near + _tail(beside)
    same = [module for module in modules if module.alike in SAME and any(module.norms)]
    if same:
        more = "" if len(same) == len(modules) else f", {_rest(modules, SAME)}"
        return Verdict.PARTLY, f"{len(same)} of {len(modules)} common modules are the same{more}" + _tail(beside)
    if result.cosine is None:
        if Alike.INCOMPARABLE in kinds:
            return Verdict.UNDECIDED, f"{_rest(modules, frozenset())}" + _tail(beside)
        return Verdict.UNRELATED, "one of them changes nothing: its dW is zero" + _tail(beside)
    figures = f"cosine {result.cosine:.4f} over {len(modules)} common modules, chance reaches {result.chance:.2g}"
    if abs(result.cosine) > (result.chance or 0.0):
        return Verdict.RELATED, f"different deltas that share something: {figures}" + _tail(beside)
    return Verdict.UNRELATED, f"the same modules, unrelated deltas: {figures}" + _tail(beside)


def _all(count: int) -> str:
    """All modules there are, in words."""
    return f"all {count} modules" if count > 1 else "its one module"


def _whole(result: Comparison, kinds: set[Alike]) -> tuple[Verdict, str] | None:
    """The verdict where every module is the same, scaled or resized."""
    modules, count = result.modules, len(result.modules)
    if kinds == {Alike.BITS}:
        if all(extra.alike is Alike.BITS for extra in result.extras):
            scales = "neither file says the scale" if any(None in module.scales for module in modules) else "the same scales"
            return Verdict.BITS, f"the same factors bit for bit in {_all(count)}, {scales}{_with(result)}"
        return (
            Verdict.EQUAL,
            f"the same factors bit for bit in {_all(count)}; saved tensors equal after rounding to the narrower dtype",
        )
    if kinds <= {Alike.BITS, Alike.ROUNDED}:
        return Verdict.EQUAL, f"the same factors, rounded to the narrower dtype, in {_all(count)}{_with(result)}"
    if kinds <= SAME:
        others = [module for module in modules if module.alike is Alike.EQUAL]
        off = max(module.distance or 0.0 for module in others)
        allowed = max(module.tolerance or 0.0 for module in others)
        return Verdict.EQUAL, (
            f"the same dW through other factors in {len(others)} of {count} modules: relative distance {off:.2g} or less, "
            f"where rounding explains {allowed:.2g}"
        )  # fmt: skip
    if kinds <= SAME | {Alike.SCALED}:
        return _scaled(result)
    if kinds <= SAME | {Alike.RESIZED}:
        sides = {module.smaller for module in modules if module.alike is Alike.RESIZED}
        if len(sides) == 1:
            small, large = ("first", "second") if sides == {0} else ("second", "first")
            cut = [module for module in modules if module.alike is Alike.RESIZED]
            lost = max(module.distance or 0.0 for module in cut)
            return Verdict.RESIZED, (
                f"the {small} is the {large} resized: in {len(cut)} of {count} modules its dW is the best approximation of its rank "
                f"(relative distance up to {lost:.2g})"
            )  # fmt: skip
    return None


def _scaled(result: Comparison) -> tuple[Verdict, str]:
    modules = [module for module in result.modules if any(module.norms)]
    numbers = [module.multiplier for module in modules]
    if any(number is None for number in numbers):
        return Verdict.SCALED, "the same factors; the effective scale is not in the files of one of them"
    known = _known(modules)
    shared, agree = _shared(known)
    count, best = len(known), min(certainty for (_, certainty), module in zip(known, modules, strict=True) if not module.at_least)
    told = f"{shared:.{min(max(3, ceil(-log10(max(best, _EXACT)))), 12)}g}"
    if all(agree):
        result.multiplier = shared
        off = max(abs(number / shared - 1.0) for number, _ in known)
        return Verdict.SCALED, (
            f"the second is the first times {told}, the same in {_all(count)} within {off:.1g}, "
            f"where rounding explains {max(certainty for _, certainty in known):.1g}"
        )  # fmt: skip
    others = [number for (number, _), same in zip(known, agree, strict=True) if not same]
    if 2 * len(others) < count:
        return Verdict.SCALED, (
            f"the second is the first times {told} in {count - len(others)} of {count} modules; in the rest times {_span(others)}, further "
            "from that than rounding explains"
        )  # fmt: skip
    return Verdict.SCALED, (
        f"each module of the second is that of the first times a number of its own, {_span([number for number, _ in known])}, "
        "further apart than rounding explains"
    )  # fmt: skip


def one_multiplier(modules: Sequence[ModuleComparison]) -> bool:
    """True when rounding explains how far the multipliers of modules that are the same or scaled lie apart."""
    moved = [module for module in modules if any(module.norms)]
    return any(module.multiplier is None for module in moved) or all(_shared(_known(moved))[1])


def _known(modules: Sequence[ModuleComparison]) -> list[tuple[float, float]]:
    """(multiplier, certainty) of each. Of factors that are the same it is 1, whatever rounding one of them made of the best."""
    exact = (Alike.BITS, Alike.ROUNDED)
    return [(1.0, 0.0) if module.alike in exact else (module.multiplier or 0.0, module.certainty or 0.0) for module in modules]


def _shared(numbers: Sequence[tuple[float, float]]) -> tuple[float, list[bool]]:
    """(the multiplier that most modules may have, which those are), from (multiplier, relative certainty) of each.

    Each allows for an interval. Of what the most of them have in common it is the point nearest to their mean by certainty.
    """
    known = [(number, max(certainty, _EXACT)) for number, certainty in numbers]
    spans = [(number - certainty * abs(number), number + certainty * abs(number)) for number, certainty in known]
    depth = most = 0
    place = 0.0
    for at, closes in sorted([(low, False) for low, _ in spans] + [(high, True) for _, high in spans]):
        depth += -1 if closes else 1
        if depth > most:
            most, place = depth, at
    agree = [low <= place <= high for low, high in spans]
    kept = [(number, certainty**-2) for (number, certainty), same in zip(known, agree, strict=True) if same]
    mean = sum(number * weight for number, weight in kept) / sum(weight for _, weight in kept)
    lows, highs = zip(*(span for span, same in zip(spans, agree, strict=True) if same), strict=True)
    return min(max(mean, *lows), *highs), agree


def _span(numbers: Sequence[float]) -> str:
    """From the smallest to the largest, with digits enough to tell them apart."""
    low, high = min(numbers), max(numbers)
    if low == high:
        return f"{low:.6g}"
    digits = next(digits for digits in range(4, 18) if f"{low:.{digits}g}" != f"{high:.{digits}g}")
    return f"from {low:.{digits + 1}g} to {high:.{digits + 1}g}"


def _near(result: Comparison) -> str | None:
    """A sentence when the whole of one is nearly a multiple of the other."""
    if result.norms is None or result.cosine is None or result.distance is None or not all(result.norms):
        return None
    rest = sqrt(max(1.0 - result.cosine**2, 0.0))
    if result.cosine <= 0 or rest > NEAR:
        return None
    best = result.cosine * result.norms[1] / result.norms[0]
    return f"cosine {result.cosine:.5f}, relative distance {result.distance:.2g}; nearest with a multiplier of {best:.4g}"


def _beside(result: Comparison) -> list[str]:
    """What differs beside the deltas of common modules. A module that one lacks and that is zero in the other is no difference."""
    found = []
    for side, word in ((0, "first"), (1, "second")):
        count = sum(one.only == side and one.norm != 0.0 for one in result.alone)
        if count:
            found.append(f"{counted(count, 'module')} only in the {word}")
    changed = [extra for extra in result.extras if extra.only is None and extra.alike is Alike.DIFFERENT]
    if changed:
        found.append(counted(len(changed), "saved tensor", "differs", "differ"))
    lonely = [extra for extra in result.extras if extra.only is not None]
    if lonely:
        found.append(f"{counted(len(lonely), 'saved tensor')} only in one")
    return found


def _rest(modules: Sequence[ModuleComparison], leaving: Collection[Alike]) -> str:
    counts = Counter(module.alike for module in modules if module.alike not in leaving)
    return ", ".join(f"{count} {kind.value}" for kind, count in counts.items())


def _with(result: Comparison) -> str:
    return f", and {counted(len(result.extras), 'saved tensor')}" if result.extras else ""


def _tail(parts: Sequence[str]) -> str:
    return "; " + ", ".join(parts) if parts else ""
