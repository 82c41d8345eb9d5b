"""How two matrices known by their factors relate: norms, inner product, distance, principal angles; neither matrix is ever formed.

Everything follows from the Gram matrices of the factors, multiplied in float64, or in float32 to tell whether two matrices are far apart.
Subtracting squares costs half the digits: a distance is known to about sqrt(8 rank eps) of the norms, some 1e-7 in float64, which `Relation.floor`
states.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from math import atan2, isfinite, sqrt
from typing import TYPE_CHECKING, Any, NamedTuple

from upparam.algorithms.gram import INDEPENDENT, Cosines, cosines, gram
from upparam.arrays import singles
from upparam.errors import MalformedError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Matrix = NDArray[np.float64]

_COARSE = 3e-2
"""What `INDEPENDENT` is where products are of float32: there angles are known to 1e-4, else to 1e-6."""


class Precision(NamedTuple):
    """How exactly values are stored: `unit` is the largest relative rounding error, `step` the largest absolute one next to zero."""

    unit: float
    step: float


class Form(NamedTuple):
    """A matrix scale * up @ down with up (out, r) and down (r, rest) of any float dtype, and the precision its factors are stored in."""

    up: NDArray[Any]
    down: NDArray[Any]
    scale: float
    precision: Precision


@dataclass(frozen=True)
class Relation:
    """||A||^2, ||B||^2 and <A, B> of two matrices of one shape, and how far each can be off.

    `spread` is, for each, how far independent relative errors of size 1 in every element of its factors would move it (the root of the
    expected square), `noise` how far rounding each element once to the precision it is stored in does. `floor` is how far a distance
    computed from these numbers may be off because they are float64.
    """

    squares: tuple[float, float]
    inner: float
    spread: tuple[float, float]
    noise: tuple[float, float]
    floor: float

    @cached_property
    def norms(self) -> tuple[float, float]:
        """(||A||_F, ||B||_F)."""
        return sqrt(self.squares[0]), sqrt(self.squares[1])

    @property
    def cosine(self) -> float | None:
        """<A, B> / (||A|| ||B||), None where one of them is zero."""
        size = self.norms[0] * self.norms[1]
        return max(-1.0, min(1.0, self.inner / size)) if size else None

    @property
    def multiplier(self) -> float | None:
        """The c for which c A is nearest to B; None where A is zero."""
        return self.inner / self.squares[0] if self.squares[0] else None

    def distance(self, multiplier: float = 1.0) -> float:
        """||multiplier * A - B||_F."""
        square = multiplier**2 * self.squares[0] - 2 * multiplier * self.inner + self.squares[1]
        return sqrt(max(square, 0.0))


class Angles(NamedTuple):
    """Principal angles between two spaces: how many, as many as the smaller rank (0 where one is zero), the smallest and the largest in
    radians, and the mean squared cosine."""

    number: int
    smallest: float
    largest: float
    overlap: float


class Cut(NamedTuple):
    """How one matrix lies to the best approximation of its `rank` of another: `off` is their distance, `sigma` the other's singular values,
    `floor` how far both may be off."""

    rank: int
    sigma: Matrix
    off: float
    floor: float


@dataclass(frozen=True)
class Pair:
    """Two forms of matrices of one shape, and the products of their factors: of float64, or with `coarse` of float32.

    Raises MalformedError when a factor is not finite.
    """

    one: Form
    other: Form
    coarse: bool = False
    _whole: tuple[Matrix, Matrix] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        import numpy as np

        (up, down, *_), (up2, down2, *_) = self.one, self.other
        if len(up) != len(up2) or down.shape[1] != down2.shape[1]:
            raise MalformedError(
                "matrices of different shapes have no inner product", expected=(len(up), down.shape[1]), found=(len(up2), down2.shape[1])
            )
        with np.errstate(over="ignore", invalid="ignore"):
            whole = gram(up.T, up2.T, coarse=self.coarse), gram(down, down2, coarse=self.coarse)
            object.__setattr__(self, "_whole", whole)
            size = sum(float(np.trace(products)) for products in whole)
        if not isfinite(size):
            raise MalformedError("a factor holds values that are not finite, or too large to square")

    @cached_property
    def _ups(self) -> tuple[Matrix, Matrix, Matrix]:
        return _parts(self._whole[0], self.one.up.shape[1])

    @cached_property
    def _downs(self) -> tuple[Matrix, Matrix, Matrix]:
        return _parts(self._whole[1], self.one.up.shape[1])

    def relation(self) -> Relation:
        """The numbers."""
        import numpy as np

        squares, spreads, noises, sizes = [], [], [], []
        for form, up, down in zip((self.one, self.other), self._ups, self._downs, strict=False):
            squares.append(max(form.scale**2 * float((up * down).sum()), 0.0))
            spread, noise = _noise(form, up.diagonal(), down.diagonal())
            spreads.append(spread)
            noises.append(noise)
            sizes.append(form.scale**2 * float(np.sqrt(up.diagonal() * down.diagonal()).sum()) ** 2)
        inner = self.one.scale * self.other.scale * float((self._ups[2] * self._downs[2]).sum())
        # Each of the r x r terms is off by a few eps of |up_k| |up_l| |down_k| |down_l|, the lengths of columns and rows.
        floor = sqrt(4 * (2.0**-23 if self.coarse else 2.0**-52) * sum(sizes))
        return Relation((squares[0], squares[1]), inner, (spreads[0], spreads[1]), (noises[0], noises[1]), floor)

    def sway(self) -> float:
        """The relative standard deviation of the best multiplier of two matrices that are multiples of each other, when each factor element is
        rounded once; 0 where they are zero.

        An error e in up moves <A, A> by <e, up (down down^T)>, one in down by <e, (up^T up) down>.
        """
        import numpy as np

        total = 0.0
        for form, ups, downs in zip((self.one, self.other), self._ups, self._downs, strict=False):
            square, variance = float((ups * downs).sum()), 0.0
            for factor, own, other in ((form.up.T, ups, downs), (form.down, downs, ups)):
                length, beside = sqrt(float(np.trace(own))), float(np.trace(other))
                if not length or not beside:
                    continue
                slopes, weighted = _slopes(factor, length, (other / beside).astype(np.float32))
                unit, step = form.precision.unit, form.precision.step / length
                variance += (unit**2 * weighted + step**2 * slopes) * (length**2 * beside) ** 2 / 3
            total += variance / square**2 if square > 0.0 else 0.0
        return sqrt(total)

    def cut(self, smaller: int) -> Cut | None:
        """Whether the matrix `smaller` (0 or 1) is a truncation of the other: see Cut. None where its rank is not less than the other's.

        Everything is r x r: the other = U S V^T through the Gram matrices, and <U_k S_k V_k^T, up @ down> from the products of the factors.
        """
        from upparam.algorithms.lowrank import core_spectral, core_values

        larger = 1 - smaller
        cut, whole = ((self.one, self.other)[index] for index in (smaller, larger))
        own, own_floor = core_values(self._ups[smaller], self._downs[smaller])
        full = core_spectral(self._ups[larger], self._downs[larger])
        rank = int((own > max(own_floor, 1e-7 * own[0])).sum())
        if not 0 < rank < len(full.sigma):
            return None
        across = [cross if larger == 0 else cross.T for cross in (self._ups[2], self._downs[2])]
        left, right = full.mix[:, :rank].T @ across[0], full.mixed[:rank] @ across[1]
        inner = whole.scale * cut.scale * float((full.sigma[:rank, None] * left * right).sum())
        sigma = abs(whole.scale) * full.sigma
        square = cut.scale**2 * float((self._ups[smaller] * self._downs[smaller]).sum())
        kept = float(sigma[:rank] @ sigma[:rank])
        floor = abs(whole.scale) * full.floor + abs(cut.scale) * own_floor
        return Cut(rank, sigma, sqrt(max(kept - 2 * inner + square, 0.0)), floor)

    def angles(self) -> tuple[Angles, Angles] | None:
        """Between the two column spaces and between the two row spaces.

        The spaces are those of the matrices as stored, small singular values included. Angles below 1e-7 cannot be told from zero. None
        where float32 products do not tell.
        """
        least = _COARSE if self.coarse else INDEPENDENT
        columns, rows = (cosines(whole, self.one.up.shape[1], least) for whole in self._whole)
        if columns is not None and rows is not None:
            return _angles(columns), _angles(rows)
        if self.coarse:
            return None
        # Dependent columns in one factor take directions from the other: only the singular vectors then tell the spaces.
        (left, right), (left2, right2) = _spaces(self.one), _spaces(self.other)
        return _angles(Cosines.of(left.T @ left2)), _angles(Cosines.of(right @ right2.T))


_BLOCK = 256
"""Columns that `_slopes` goes through at a time: what it makes of them stays in the cache."""


def _slopes(factor: NDArray[Any], length: float, near: NDArray[np.float32]) -> tuple[float, float]:
    """The sums of s^2 and of (s v)^2 over the elements of a factor (r, n), v = factor / length and s = near v, `near` symmetric (r, r).

    Float32 is enough for a deviation, of factors and products brought near 1.
    """
    import numpy as np

    slopes = weighted = 0.0
    turned = factor.strides[0] < factor.strides[1]  # an up: its rows, which are columns here, lie together
    for start in range(0, factor.shape[1], _BLOCK):
        part = factor[:, start : start + _BLOCK]
        part = part.T if turned else part
        values = singles(part / length if part.dtype == np.float64 else part)
        values /= 1.0 if part.dtype == np.float64 else length
        slope = values @ near if turned else near @ values
        flat = slope.reshape(-1)
        slopes += float(flat @ flat)
        slope *= values
        weighted += float(flat @ flat)
    return slopes, weighted


def _parts(whole: Matrix, rank: int) -> tuple[Matrix, Matrix, Matrix]:
    """(A A^T, B B^T, A B^T) of the products of the rows of A and B, of which A has `rank`."""
    return whole[:rank, :rank], whole[rank:, rank:], whole[:rank, rank:]


def _noise(form: Form, ups: Matrix, downs: Matrix) -> tuple[float, float]:
    """(spread, noise) of a form (see `Relation`), from the squared norms of the columns of up and of the rows of down.

    Errors in a column of up are multiplied by its row of down, and the other way round. A rounding error lies anywhere in +-unit |x| at
    most, with a mean square of a third of that; next to zero it lies in +-step.
    """
    spread = abs(form.scale) * sqrt(2 * float(ups @ downs))
    steps = form.precision.step**2 * (len(form.up) * float(downs.sum()) + form.down.shape[1] * float(ups.sum()))
    return spread, sqrt(((form.precision.unit * spread) ** 2 + form.scale**2 * steps) / 3)


def _angles(found: Cosines) -> Angles:
    # The arc sine tells small angles from one another, as far as the squares do.
    squares = [min(max(square, 0.0), 1.0) for square in (found.largest, found.smallest)]
    least, most = (atan2(sqrt(1.0 - square), sqrt(square)) for square in squares)
    return Angles(found.number, least, most, found.total / found.number if found.number else 0.0)


def _spaces(form: Form) -> tuple[Matrix, Matrix]:
    """Orthonormal bases (out, q) of the columns and (q, rest) of the rows of up @ down, singular values within rounding of zero left out."""
    from upparam.algorithms.lowrank import qr_spectral

    found = qr_spectral(form.up.astype("f8", copy=False), form.down.astype("f8", copy=False))
    rank = int((found.sigma > found.floor).sum())
    return found.left @ found.mix[:, :rank], found.mixed[:rank] @ found.right
