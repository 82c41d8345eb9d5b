"""One module of two adapters: what its two deltas are to each other, through the factors, and what that rests on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from enum import Enum
from math import degrees, isclose, prod, sqrt
from typing import TYPE_CHECKING, Any, NamedTuple

from upparam.algorithms.base import BAKED, Delta, Update, tiles
from upparam.algorithms.dora import Decomposed
from upparam.algorithms.relation import Angles as Between
from upparam.algorithms.relation import Cut, Form, Pair, Relation
from upparam.algorithms.slicing import RowSlice
from upparam.arrays import singles
from upparam.errors import MalformedError, RefusedError
from upparam.operations.compare.forms import form_of, precision, stored_form, unit
from upparam.operations.compare.rounding import EQUAL_CAP, allowance, certainty
from upparam.operations.extract.difference import same_weights
from upparam.operations.proof import same_delta
from upparam.tensors import Tensor

if TYPE_CHECKING:
    pass

NEAR = 0.1
"""Deltas are near-duplicates when what no multiplier explains is at most this share of ||dW||: a cosine of 0.995 or more.

A copy whose factors went through 8 bits lies at 0.04; deltas trained apart have cosines near 0, which is 1.0 by this measure.
"""


class Alike(str, Enum):
    """What one delta is to the other, the closest that holds."""

    BITS = "bit-equal"
    """The same factors bit for bit, and the same effective scale."""
    ROUNDED = "rounded"
    """The factors of one are those of the other, rounded to a narrower dtype."""
    EQUAL = "equal"
    """Other factors of the same dW (another gauge, or scale put into them), as far as the dtypes tell."""
    SCALED = "scaled"
    """dW of one is a multiple of the other's."""
    RESIZED = "resized"
    """dW of one is the best approximation of the other's of its rank."""
    NEAR = "near"
    """Near-duplicates, see NEAR."""
    DIFFERENT = "different"
    """None of these."""
    INCOMPARABLE = "not-comparable"
    """The factors alone do not tell, or the shapes differ."""


SAME = frozenset((Alike.BITS, Alike.ROUNDED, Alike.EQUAL))
"""The relations under which the two deltas do the same."""


class Angles(NamedTuple):
    """Principal angles between two spaces in degrees: how many there are, the smallest, the largest, and the mean squared cosine.

    `overlap` is 1 when one space lies in the other; that of random spaces is `chance`, the larger rank over the dimension.
    """

    number: int
    smallest: float
    largest: float
    overlap: float
    chance: float


@dataclass(frozen=True)
class ModuleComparison:
    """One module. Pairs are (first, second).

    `distance` = ||dW1 - dW2|| / max(||dW1||, ||dW2||), or what float64 can tell from none where that is larger; `tolerance` is the distance up to which they count as equal, from the dtypes;
    `multiplier` is the c for which c dW1 is nearest to dW2, and `certainty` the relative error of it that rounding explains (or
    `at_least` explains), of deltas that are the same or scaled. None where it was not computed or has no meaning. `smaller` is 0 or 1 where that one is the other resized. Norms include the scale, unless `scales` are unknown.
    """

    target: str
    shape: tuple[int, ...]
    alike: Alike
    algorithms: tuple[str, str]
    ranks: tuple[int | None, int | None]
    alphas: tuple[float | None, float | None]
    scales: tuple[float | None, float | None]
    dtypes: tuple[str, str]
    norms: tuple[float | None, float | None] = (None, None)
    inner: float | None = None
    cosine: float | None = None
    distance: float | None = None
    tolerance: float | None = None
    multiplier: float | None = None
    certainty: float | None = None
    at_least: bool = False
    smaller: int | None = None
    columns: Angles | None = None
    rows: Angles | None = None
    reason: str = ""

    def facts(self) -> dict[str, Any]:
        """JSON-ready facts."""
        found: dict[str, Any] = {
            item.name: getattr(self, item.name) for item in fields(self) if item.name not in ("inner", "smaller", "at_least")
        }
        for name in ("columns", "rows"):
            found[name] = None if found[name] is None else found[name]._asdict()
        more: dict[str, Any] = {} if self.smaller is None else {"smaller": ("first", "second")[self.smaller]}
        more |= {"certainty_at_least": True} if self.at_least else {}
        return (
            {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()} | {"alike": self.alike.value} | more
        )


class Asked(NamedTuple):
    """What is computed beyond what a module's own relation takes: principal angles, on which nothing rests, and `certain`, the certainty of
    the multiplier of equal deltas too as exactly as it can be known. Where the multiplier of scaled deltas lies so near `expected` that the
    least that rounding explains is enough, that is given as its certainty."""

    angles: bool = True
    certain: bool = False
    expected: float | None = None


_ALL = Asked()


def compare_deltas(target: str, one: Delta, other: Delta, asked: Asked = _ALL) -> ModuleComparison:
    """What two deltas of one target are to each other. Reads both; memory is bounded by their factors and a tile of dW."""
    found = ModuleComparison(
        target, one.shape, Alike.INCOMPARABLE, (one.algorithm, other.algorithm), (one.rank, other.rank), (one.alpha, other.alpha),
        (one.scale, other.scale), (_dtypes(one), _dtypes(other)),
    )  # fmt: skip
    if _flat(one.shape) != _flat(other.shape):
        return replace(found, reason=f"their weights have other shapes: {one.shape} and {other.shape}")
    if same_delta(one, other):
        norm = _norm(one)
        one_or_none = 1.0 if norm else None
        return replace(
            found, alike=Alike.BITS, norms=(norm, norm), cosine=one_or_none, distance=0.0, multiplier=one_or_none, certainty=0.0 if norm else None
        )  # fmt: skip
    try:
        numbers = _numbers(found, one, other, asked)
    except (MalformedError, RefusedError) as problem:
        numbers = replace(found, reason=problem.message)
    if _same_scale(one, other) and _rounded(one, other):
        return replace(numbers, alike=Alike.ROUNDED, columns=None, rows=None, reason="")
    return numbers


def _norm(delta: Delta) -> float | None:
    """||dW||, of the direction where there is a magnitude and without an unknown scale; None where there is none, or it is not known or finite."""
    delta = delta.direction if isinstance(delta, Decomposed) else delta
    if not delta.additive or 0 in delta.shape:
        return None
    norm = (_unscaled(delta) if delta.scale is None else delta).frobenius()
    return norm if norm < float("inf") else None


def _numbers(found: ModuleComparison, one: Delta, other: Delta, asked: Asked) -> ModuleComparison:
    """Norms, cosine, distance, angles and the relation they bear out; raises MalformedError for factors that are not finite."""
    if isinstance(one, Decomposed) and isinstance(other, Decomposed):
        return _decomposed(found, one, other, asked)
    if not one.additive or not other.additive:
        return _by_factor(found, one, other)
    note = ""
    unknown = [which for which, scale in (("the first", one.scale), ("the second", other.scale)) if scale is None]
    if unknown:
        note = f"the effective scale of {' and '.join(unknown)} is not in the files; compared without scales"
        one, other = _unscaled(one), _unscaled(other)
    found, half_known = replace(found, reason=note), len(unknown) == 1
    narrow = stored_form(one, 0), stored_form(other, 1)
    if narrow[0] is not None and narrow[1] is not None:
        apart = _far_apart(found, narrow[0], narrow[1], half_known, asked)
        if apart is not None:
            return apart
        pair = Pair(narrow[0], narrow[1])
        return _judged(found, pair.relation(), pair, half_known, asked)
    mine, theirs = one.load(), other.load()
    wide = form_of(one, mine), form_of(other, theirs)
    if wide[0] is not None and wide[1] is not None:
        pair = Pair(wide[0], wide[1])
        return _judged(found, pair.relation(), pair, half_known, asked)
    return _judged(found, _by_rows(one, other, mine, theirs), None, half_known, asked)


def _judged(found: ModuleComparison, relation: Relation, pair: Pair | None, half_known: bool, asked: Asked) -> ModuleComparison:
    norms, largest = relation.norms, max(relation.norms)
    allowed = allowance(relation)
    found = replace(
        found, norms=norms, inner=relation.inner, cosine=relation.cosine,
        distance=max(relation.distance(), relation.floor) / largest if largest else 0.0,
        tolerance=allowed / largest if largest else None, multiplier=relation.multiplier,
    )  # fmt: skip
    alike, smaller = _relation(relation, allowed, pair)
    if alike in (Alike.EQUAL, Alike.SCALED):
        off = abs((relation.multiplier or 1.0) - 1.0)
        enough = off if alike is Alike.EQUAL else abs((relation.multiplier or 0.0) / asked.expected - 1.0) if asked.expected else None
        known, least = certainty(relation, pair, _flat(found.shape), None if asked.certain else enough)
        if alike is Alike.EQUAL and off > known:
            scaled = relation.distance(relation.multiplier or 0.0) <= allowance(relation, relation.multiplier or 0.0)
            alike = Alike.SCALED if scaled else Alike.NEAR
        if alike is not Alike.NEAR and relation.multiplier is not None:
            found = replace(found, certainty=known, at_least=least)
    if half_known and alike is Alike.EQUAL:
        alike = Alike.SCALED
    if half_known:
        found = replace(found, multiplier=None, certainty=None, at_least=False)
    columns = rows = None
    told = pair.angles() if asked.angles and pair is not None and alike in (Alike.RESIZED, Alike.NEAR, Alike.DIFFERENT) else None
    if pair is not None and told is not None:
        columns, rows = _angles(told[0], pair, len(pair.one.up)), _angles(told[1], pair, pair.one.down.shape[1])
    return replace(found, alike=alike, smaller=smaller, columns=columns, rows=rows)


def _far_apart(found: ModuleComparison, one: Form, other: Form, half_known: bool, asked: Asked) -> ModuleComparison | None:
    """The comparison of two LoRAs that are plainly different, from products in float32; None where that is too coarse to say so.

    A few elements of both tell beforehand whether it is worth trying. What it gives is known to 1e-6 or so, angles to 1e-4.
    """
    if not _unlike(one, other):
        return None
    pair = Pair(one, other, coarse=True)
    relation = pair.relation()
    largest, smallest = max(relation.squares), min(relation.squares)
    multiplier = relation.multiplier
    plain = (
        smallest > 0.0 and multiplier is not None and relation.distance() > 2 * NEAR * sqrt(largest)
        and relation.distance(multiplier) > 2 * NEAR * relation.norms[1] and abs(relation.inner - smallest) > 4 * EQUAL_CAP * largest
    )  # fmt: skip
    result = _judged(found, relation, pair, half_known, asked) if plain else None
    told = result is not None and result.alike is Alike.DIFFERENT and (result.columns is not None or not asked.angles)
    return result if told else None


_SEEN = 96
"""Rows and columns that are looked at to tell whether two deltas are worth comparing in float32."""


def _unlike(one: Form, other: Form) -> bool:
    """True when some elements of one, spread over its rows and columns, are no multiple of those of the other."""
    import numpy as np

    rows, columns = (-(-size // _SEEN) for size in (len(one.up), one.down.shape[1]))
    with np.errstate(over="ignore", invalid="ignore"):
        mine, theirs = ((singles(form.up[::rows]) @ singles(form.down[:, ::columns])).reshape(-1) for form in (one, other))
        size = float(np.linalg.norm(mine)) * float(np.linalg.norm(theirs))
        return 0.0 < size < float("inf") and abs(float(mine @ theirs)) < 0.9 * size


def _relation(relation: Relation, allowed: float, pair: Pair | None) -> tuple[Alike, int | None]:
    if relation.distance() <= allowed:
        return Alike.EQUAL, None
    multiplier = relation.multiplier
    if not multiplier or not relation.squares[1]:
        return Alike.DIFFERENT, None
    rest = relation.distance(multiplier)
    if rest <= allowance(relation, multiplier):
        return Alike.SCALED, None
    if pair is not None:
        smaller = 0 if relation.norms[0] < relation.norms[1] else 1
        if _resized(relation, pair, smaller, allowed):
            return Alike.RESIZED, smaller
    near = relation.inner > 0 and rest <= NEAR * relation.norms[1]
    return (Alike.NEAR if near else Alike.DIFFERENT), None


def _resized(relation: Relation, pair: Pair, smaller: int, allowed: float) -> bool:
    """True when the one of smaller norm is the best approximation of its rank of the other.

    Whoever cut it rounded the singular vectors at the cut by about eps of their arithmetic over the gap between the singular values
    (Davis & Kahan); float32 is allowed for that.
    """
    small, large = relation.squares[smaller], relation.squares[1 - smaller]
    # A best approximation is orthogonal to what it leaves out.
    if abs(relation.inner - small) > 2 * EQUAL_CAP * large:
        return False
    found = pair.cut(smaller)
    if found is not None and found.floor > 0.25 * allowed:
        found = _sharp(*((pair.one, pair.other) if smaller == 0 else (pair.other, pair.one)))
    if found is None:
        return False
    rank, sigma = found.rank, found.sigma
    if sqrt(float(sigma[rank:] @ sigma[rank:])) <= allowed:
        return False
    gap = float(sigma[rank - 1] - sigma[rank])
    turned = 2.0**-20 * float(sigma[0] * sigma[rank - 1]) / gap if gap else sqrt(large)
    return found.off <= min(allowed + turned, EQUAL_CAP * sqrt(large))


def _sharp(cut: Form, whole: Form) -> Cut | None:
    """`Pair.cut` where the Gram matrices are too coarse: through the factors themselves."""
    from upparam.algorithms.lowrank import difference, spectral

    cut, whole = (form._replace(up=form.up.astype("f8", copy=False), down=form.down.astype("f8", copy=False)) for form in (cut, whole))
    own, full = spectral(cut.up, cut.down), spectral(whole.up, whole.down)
    rank = int((own.sigma > max(own.floor, 1e-7 * own.sigma[0])).sum())
    if not 0 < rank < len(full.sigma):
        return None
    up, down = full.factors(rank)
    off = difference(whole.scale * up, down, cut.scale * cut.up, cut.down)
    return Cut(rank, abs(whole.scale) * full.sigma, off, abs(whole.scale) * full.floor)


def _angles(found: Between, pair: Pair, dimension: int) -> Angles | None:
    if not found.number:
        return None
    rank = max(pair.one.up.shape[1], pair.other.up.shape[1])
    return Angles(found.number, degrees(found.smallest), degrees(found.largest), found.overlap, min(1.0, rank / dimension))


def _by_rows(one: Delta, other: Delta, mine: Update, theirs: Update) -> Relation:
    """The relation of two deltas of which one has no low-rank form, from tiles of both."""
    squares, inner = [0.0, 0.0], 0.0
    for start, stop in tiles(_flat(one.shape)):
        first, second = mine.rows(start, stop), theirs.rows(start, stop)
        squares[0] += float((first * first).sum())
        squares[1] += float((second * second).sum())
        inner += float((first * second).sum())
    if not sum(squares) < float("inf"):
        raise MalformedError("a factor holds values that are not finite, or too large to square")
    spread = [sqrt(square * len(delta.factors())) for square, delta in zip(squares, (one, other), strict=True)]
    noise = [precision(delta).unit * size for delta, size in zip((one, other), spread, strict=True)]
    floor = 2.0**-25 * sqrt(sum(squares))
    return Relation((squares[0], squares[1]), inner, (spread[0], spread[1]), (noise[0], noise[1]), floor)


def _decomposed(found: ModuleComparison, one: Decomposed, other: Decomposed, asked: Asked) -> ModuleComparison:
    """Deltas with a magnitude: equal when the directions are and the magnitudes are. Numbers are those of the directions."""
    import numpy as np

    inside = _numbers(found, one.direction, other.direction, asked)
    if one.per_row is not other.per_row:
        return replace(inside, alike=Alike.INCOMPARABLE, reason="one has a magnitude for each row, the other for each column")
    first, second = one.magnitude.doubles().reshape(-1), other.magnitude.doubles().reshape(-1)
    size = float(max(np.linalg.norm(first), np.linalg.norm(second)))
    off = float(np.linalg.norm(first - second)) / size if size else 0.0
    units = [unit(factor.dtype).unit for factor in (one.magnitude, other.magnitude)]
    same = off <= max(sum(units), 2.0**-22) and inside.alike in SAME
    return replace(
        inside, alike=Alike.EQUAL if same else Alike.DIFFERENT, smaller=None,
        reason="; ".join(part for part in (f"numbers are of the directions; the magnitudes differ by {off:.2g}", inside.reason) if part),
    )  # fmt: skip


def _by_factor(found: ModuleComparison, one: Delta, other: Delta) -> ModuleComparison:
    """Deltas whose change depends on the weight: the same when each factor is, as far as the dtypes tell; else nothing is claimed."""
    import numpy as np

    depends = f"how {' and '.join(dict.fromkeys(found.algorithms))} change a weight depends on the weight"
    mine, theirs = one.factors(), other.factors()
    if type(one) is not type(other) or _shapes(mine) != _shapes(theirs) or not _same_scale(one, other):
        return replace(found, reason=depends)
    worst = 0.0
    for role, factor in mine.items():
        first, second = factor.doubles(), theirs[role].doubles()
        size = float(max(np.linalg.norm(first), np.linalg.norm(second)))
        if not size < float("inf"):
            raise MalformedError("a factor holds values that are not finite, or too large to square")
        worst = max(worst, float(np.linalg.norm(first - second)) / size if size else 0.0)
    allowed = max(precision(one).unit + precision(other).unit, 2.0**-22)
    if worst <= allowed:
        return replace(
            found, alike=Alike.EQUAL, distance=worst, tolerance=allowed, reason="distance and tolerance are those of the factors"
        )
    return replace(found, reason=f"{depends}; their factors differ by up to {worst:.2g}")


def _same_scale(one: Delta, other: Delta) -> bool:
    if one.scale is None or other.scale is None:
        return one.scale is other.scale
    return isclose(one.scale, other.scale, rel_tol=1e-12)


def _rounded(one: Delta, other: Delta) -> bool:
    """True when each factor of one is the other's, rounded to the narrower of the two dtypes."""
    mine, theirs = one.factors(), other.factors()
    if one.algorithm != other.algorithm or _shapes(mine) != _shapes(theirs):
        return False
    return all(same_weights(factor, theirs[role]) or same_weights(theirs[role], factor) for role, factor in mine.items())


def _unscaled(delta: Delta) -> Delta:
    """The delta with a scale of 1."""
    if isinstance(delta, RowSlice):
        return RowSlice(_unscaled(delta.whole), delta.start, delta.stop)
    return replace(delta, scaling=BAKED)  # type: ignore[type-var]


def _shapes(factors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {role: factor.shape for role, factor in factors.items()}


def _dtypes(delta: Delta) -> str:
    return " ".join(dict.fromkeys(factor.dtype.name for factor in delta.factors().values()))


def _flat(shape: tuple[int, ...]) -> tuple[int, int]:
    return (shape[0] if shape else 1, prod(shape[1:]))
