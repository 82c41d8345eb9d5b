"""Singular values and truncation of up @ down through the factors: only r x r matrices are ever decomposed, dW is never formed.

With up = Q B (B from the Cholesky factor or the eigenvectors of the Gram matrix up^T up) the squared singular values of up @ down are the eigenvalues
of B (down down^T) B^T. Squaring costs digits: singular values are known to about sqrt(r eps) |up| |down|. Where that is too coarse for
the truncation asked for, both factors go through QR instead, whose error is eps |up| |down|. Everything is in float64.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isfinite, sqrt
from typing import TYPE_CHECKING, NamedTuple

from upparam.algorithms.gram import INDEPENDENT, gram, root
from upparam.errors import MalformedError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class RankRule:
    """How many singular values to keep. Each condition given must hold; `rank` is a cap on top of the others.

    `energy` is the share of the sum of squares to keep, `error` the relative Frobenius error allowed, `fro` the share of the Frobenius
    norm to keep (sd-scripts' `sv_fro`; energy = fro^2). `conv_rank` is the cap for kernels larger than 1x1, `rank` where not given.
    Raises UsageError for values that mean nothing.
    """

    rank: int | None = None
    energy: float | None = None
    error: float | None = None
    fro: float | None = None
    conv_rank: int | None = None

    def __post_init__(self) -> None:
        for name in ("rank", "conv_rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1", found=value)
        for name in ("energy", "error", "fro"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value <= 1.0:
                raise UsageError(f"{name} is a share between 0 and 1", found=value)
        if all(getattr(self, name) is None for name in ("rank", "energy", "error", "fro", "conv_rank")):
            raise UsageError("no rank rule", expected="a rank, energy, error or fro")

    def cap(self, conv: bool = False) -> int | None:
        """The largest rank allowed, None for any."""
        return self.conv_rank if conv and self.conv_rank is not None else self.rank

    @property
    def lost(self) -> float | None:
        """The largest share of the sum of squares that may be lost; None when only a rank is asked for."""
        shares = [] if self.energy is None else [1.0 - self.energy]
        shares += [] if self.error is None else [self.error**2]
        shares += [] if self.fro is None else [1.0 - self.fro**2]
        return min(shares) if shares else None

    def choose(self, sigma: Matrix, conv: bool = False, total: float | None = None) -> int:
        """How many of these singular values (descending) to keep, at least 1. `total` is the sum of all squares, where there are more."""
        import numpy as np

        squares = np.square(sigma)
        total = float(squares.sum()) if total is None else total
        count = len(squares)
        if self.lost is not None:
            # What is lost by keeping k values; summed from the small end, so that small tails keep their digits.
            beyond = max(total - float(squares.sum()), 0.0)
            tails = np.append(np.cumsum(squares[::-1])[::-1], 0.0) + beyond
            fits = np.flatnonzero(tails <= self.lost * total * (1 + 1e-12))
            count = int(fits[0]) if fits.size else count
        cap = self.cap(conv)
        return max(1, count if cap is None else min(count, cap))


@dataclass(frozen=True)
class Spectral:
    """up @ down = (left @ mix) diag(sigma) (mixed @ right) with orthonormal outer factors. `left` and `right` are the given factors or their Q.

    `sigma` (q,) descending; `floor` is how far each may be off.
    """

    left: Matrix
    mix: Matrix
    sigma: Matrix
    mixed: Matrix
    right: Matrix
    floor: float

    def factors(self, rank: int) -> tuple[Matrix, Matrix]:
        """(up (out, rank), down (rank, in)): the best approximation of that rank, the singular values shared evenly.

        Signs are settled (each column of up leans towards a fixed vector), so that equal matrices give equal factors. Values that are
        zero give zero columns and rows.
        """
        import numpy as np

        rank = min(rank, len(self.sigma))
        half = np.sqrt(self.sigma[:rank])
        compass = np.cos(np.arange(self.left.shape[0], dtype=np.float64) ** 1.5)
        half_signed = np.where((compass @ self.left) @ self.mix[:, :rank] < 0, -half, half)
        return self.left @ (self.mix[:, :rank] * half_signed), (half_signed[:, None] * self.mixed[:rank]) @ self.right

    def gap(self, up: Matrix, down: Matrix, factor: float = 1.0) -> float:
        """||dW - factor * up @ down||_F for other factors, through r x k matrices; what float64 can tell from none, some 1e-7 of the norms, where it is less."""
        core = (self.mix * self.sigma) @ self.mixed
        cross = float(((self.left.T @ up) * (core @ (self.right @ down.T))).sum())
        own = float(((up.T @ up) * (down @ down.T)).sum())
        floor = _difference_floor(self.norm, abs(factor) * _lengths(up, down))
        return max(sqrt(max(self.norm**2 - 2 * factor * cross + factor**2 * own, 0.0)), floor)

    def tail(self, rank: int) -> float:
        """The Frobenius norm of what keeping `rank` values loses: the error of the best approximation."""
        rest = self.sigma[rank:]
        return sqrt(float(rest @ rest))

    @property
    def norm(self) -> float:
        """||up @ down||_F."""
        return sqrt(float(self.sigma @ self.sigma))


class Core(NamedTuple):
    """The spectrum of up @ down as far as the Gram matrices tell: up @ mix and mixed @ down have orthonormal columns and rows; see Spectral."""

    mix: Matrix
    sigma: Matrix
    mixed: Matrix
    floor: float


def core_spectral(ours: Matrix, theirs: Matrix) -> Core:
    """The spectrum from up^T up and down down^T (r, r), float64. Raises MalformedError when not finite."""
    import numpy as np

    floor = _floor(ours, theirs)
    turn, back = _root(ours)
    values, rotation = np.linalg.eigh(turn @ theirs @ turn.T)
    values, rotation = values[::-1], rotation[:, ::-1]
    sigma = np.sqrt(np.maximum(values, 0.0))
    inverse = np.divide(1.0, sigma, out=np.zeros_like(sigma), where=sigma > 0)
    return Core(back @ rotation, sigma, inverse[:, None] * (rotation.T @ turn), floor)


def core_values(ours: Matrix, theirs: Matrix) -> tuple[Matrix, float]:
    """(singular values, descending; how far each may be off) as `core_spectral` has them, without the vectors."""
    import numpy as np

    floor = _floor(ours, theirs)
    turn, _ = _root(ours)
    return np.sqrt(np.maximum(np.linalg.eigvalsh(turn @ theirs @ turn.T)[::-1], 0.0)), floor


def _floor(ours: Matrix, theirs: Matrix) -> float:
    import numpy as np

    size = sqrt(float(np.trace(ours)) * float(np.trace(theirs)))
    if not isfinite(size):
        raise MalformedError("a factor holds values that are not finite, or too large to square")
    return sqrt(len(ours) * float(np.finfo(np.float64).eps)) * size


def gram_spectral(up: Matrix, down: Matrix) -> Spectral:
    """The spectrum by the Gram matrices (see the module): up (out, r), down (r, in), float64. Raises MalformedError when not finite."""
    core = core_spectral(gram(up.T), gram(down))
    return Spectral(up, core.mix, core.sigma, core.mixed, down, core.floor)


def _root(products: Matrix) -> tuple[Matrix, Matrix]:
    """(B, C), both (r, r), with B^T B the Gram matrix and C the inverse of B: from the Cholesky factor, or the eigenvectors where it is nearly
    singular.

    Directions that cannot be told from none are zero in both.
    """
    import numpy as np

    found = root(products)
    if found is not None:
        diagonal = found.lower.diagonal() * found.lengths
        if diagonal.min(initial=1.0) > INDEPENDENT * diagonal.max(initial=0.0):
            return (found.lower * found.lengths[:, None]).T, (found.inverse / found.lengths).T
    squares, vectors = np.linalg.eigh(products)
    known_ones = squares > len(squares) * float(np.finfo(np.float64).eps) * max(float(squares[-1]), 0.0)
    turn = np.sqrt(np.where(known_ones, squares, 0.0))
    inverse = np.divide(1.0, turn, out=np.zeros_like(turn), where=known_ones)
    return turn[:, None] * vectors.T, vectors * inverse


def qr_spectral(up: Matrix, down: Matrix) -> Spectral:
    """The spectrum by QR of both factors and the SVD of the core: backward stable, slower. Raises MalformedError when not finite."""
    import numpy as np

    size = sqrt(float(np.vdot(up, up)) * float(np.vdot(down, down)))
    if not isfinite(size):
        raise MalformedError("a factor holds values that are not finite, or too large to square")
    left, core = np.linalg.qr(up)
    right, coredown = np.linalg.qr(down.T)
    mix, sigma, mixed = np.linalg.svd(core @ coredown.T, full_matrices=False)
    eps = float(np.finfo(np.float64).eps)
    return Spectral(left, mix, sigma, mixed, right.T, up.shape[1] * eps * size)


def spectral(up: Matrix, down: Matrix) -> Spectral:
    """The spectrum of up @ down, sharp enough for every singular value that float32 factors can tell: by Gram matrices, else by QR."""
    found = gram_spectral(up, down)
    return found if found.floor <= 1e-8 * found.norm else qr_spectral(up, down)


def truncate(up: Matrix, down: Matrix, rule: RankRule, *, conv: bool = False, resolution: float = 6e-8) -> tuple[Spectral, int]:
    """The spectrum of up @ down and the rank that `rule` chooses, precise enough that the truncation loses at most 1.0001x the optimum.

    `resolution` is the relative precision of the dtype the result is stored in: an optimal error below it need not be told from zero.
    The squared error of the Gram route may exceed the optimum by floor^2, so the floor may be 1% of the larger of the two.
    Factors that cancel each other, as far as float64 tells, have singular values of zero.
    """
    found = gram_spectral(up, down)
    rank = rule.choose(found.sigma, conv)
    if found.floor > 0.01 * max(found.tail(rank), resolution * found.norm):
        found = qr_spectral(up, down)
        if found.norm <= _NOTHING * _lengths(up, down):
            found = replace(found, sigma=found.sigma * 0.0)
        rank = rule.choose(found.sigma, conv)
    return found, min(rank, len(found.sigma))


_NOTHING = 16 * 2.0**-52
"""Columns of up that cancel each other leave up to 5 eps of their lengths through QR (measured to 150,000 rows and 250 columns); as little is zero.
What the roundings of float32 factors leave is a million times as much."""


def difference(up: Matrix, down: Matrix, other_up: Matrix, other_down: Matrix) -> float:
    """||up @ down - other_up @ other_down||_F through the Gram matrices of the factors; what float64 can tell from none, some 1e-7 of the norms,
    where it is less."""
    own = float(((up.T @ up) * (down @ down.T)).sum())
    cross = float(((up.T @ other_up) * (down @ other_down.T)).sum())
    theirs = float(((other_up.T @ other_up) * (other_down @ other_down.T)).sum())
    floor = _difference_floor(_lengths(up, down), _lengths(other_up, other_down))
    return max(sqrt(max(own - 2 * cross + theirs, 0.0)), floor)


def _lengths(up: Matrix, down: Matrix) -> float:
    """The sum over k of |up[:, k]| |down[k]|: what the terms of ||up @ down||^2 add up to at most is its square."""
    import numpy as np

    return float(np.linalg.norm(up, axis=0) @ np.linalg.norm(down, axis=1))


def _difference_floor(one: float, other: float) -> float:
    """What a distance made by subtracting squares may be off, from the sizes of the terms: each is off by a few eps."""
    return sqrt(4 * 2.0**-52 * (one**2 + other**2))


def tucker_truncate(up: Matrix, mid: Matrix, down: Matrix, rule: RankRule) -> tuple[Matrix, Matrix, Matrix, float]:
    """(up (out, k), mid (k, k, kernel), down (k, in), lost share of the sum of squares): a Tucker form cut to rank k in both modes.

    up (out, r), mid (r, r, kernel), down (r, in), float64; dW[o, i, x] = up[o, p] mid[p, q, x] down[q, i]. Both factors are made
    orthonormal by QR, the core is cut by higher-order SVD (De Lathauwer, De Moor, Vandewalle 2000) and refined by three sweeps of
    higher-order orthogonal iteration. k is the smallest that keeps what `rule` asks in the worst case: the losses of both modes added.
    """
    import numpy as np

    left, turn = np.linalg.qr(up)
    right, turned = np.linalg.qr(down.T)
    with np.errstate(over="ignore", invalid="ignore"):  # told below
        core = np.einsum("ap,pqx,bq->abx", turn, mid, turned, optimize=True)
        total = float(np.vdot(core, core))
    if not isfinite(total):
        raise MalformedError("a factor holds values that are not finite, or too large to square")
    first, values, _ = np.linalg.svd(core.reshape(core.shape[0], -1), full_matrices=False)
    second, others, _ = np.linalg.svd(core.transpose(1, 0, 2).reshape(core.shape[1], -1), full_matrices=False)
    count = min(len(values), len(others))
    rank = 1
    while rank < count and _loss(values, rank) + _loss(others, rank) > (0.0 if rule.lost is None else rule.lost) * total:
        rank += 1
    cap = rule.cap(conv=True)
    rank = min(count if rule.lost is None else rank, cap or count)
    first, second = first[:, :rank], second[:, :rank]
    for _ in range(3):
        half = np.einsum("abx,bq->aqx", core, second).reshape(core.shape[0], -1)
        first = np.linalg.svd(half, full_matrices=False)[0][:, :rank]
        half = np.einsum("abx,ap->bpx", core, first).reshape(core.shape[1], -1)
        second = np.linalg.svd(half, full_matrices=False)[0][:, :rank]
    small = np.einsum("abx,ap,bq->pqx", core, first, second, optimize=True)
    kept = float(np.vdot(small, small))
    # The size is shared by the three factors, so that none leaves the range of a 16-bit dtype before the others.
    share = sqrt(kept / rank) ** (1 / 3) if kept else 0.0
    share = share or 1.0
    return left @ first * share, small / share**2, (right @ second).T * share, max(total - kept, 0.0) / total if total else 0.0


def _loss(sigma: Matrix, rank: int) -> float:
    rest = sigma[rank:]
    return float(rest @ rest)
