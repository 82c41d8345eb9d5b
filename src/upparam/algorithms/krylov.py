"""The leading singular values of a matrix that can only be multiplied: adaptive block Krylov that knows about what it misses.

A random block (Halko, Martinsson & Tropp 2011) is enlarged by block Krylov steps (Musco & Musco 2015), always by the part of
A A^T u that lies outside the space found so far, for the leading Ritz vectors u. The norm of that part also tells how much the
values may still grow: for a Ritz value t with residual r and everything outside the space below m, by about r^2 / (t - m) and by no
more than r. With the first value not wanted as m this is an estimate, kept on the safe side. The work stops when it says that the error
of the truncation cannot be lowered by the tolerance any more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, Any, Protocol

from upparam.algorithms.base import tiles
from upparam.errors import MalformedError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_MARGIN = 4
"""Values that are found beyond those wanted, so that what is not wanted is known to be small."""
_STEP = 72
"""The most columns one step adds."""


class Operator(Protocol):
    """A matrix A (rows, columns) known by its products. Blocks come and go in `dtype`."""

    shape: tuple[int, int]
    dtype: Any

    def apply(self, block: NDArray[Any]) -> NDArray[Any]:
        """A @ block."""
        ...

    def adjoint(self, block: NDArray[Any]) -> NDArray[Any]:
        """A^T @ block."""
        ...


class Dense:
    """A float32 matrix in memory. `exact` multiplies in float64, tile by tile: for differences that hold more than 16-bit rounding noise."""

    def __init__(self, matrix: NDArray[np.float32], exact: bool = False) -> None:
        import numpy as np

        self.matrix = matrix
        self.shape = (matrix.shape[0], matrix.shape[1])
        self.dtype = np.float64 if exact else np.float32
        self._step = max(1, (1 << 19) // max(1, matrix.shape[1]))

    def apply(self, block: NDArray[Any]) -> NDArray[Any]:
        """A @ block."""
        import numpy as np

        if self.dtype is np.float32:
            product: NDArray[Any] = self.matrix @ block
            return product
        out = np.empty((self.shape[0], block.shape[1]))
        for start in range(0, self.shape[0], self._step):
            np.matmul(self.matrix[start : start + self._step].astype(np.float64), block, out=out[start : start + self._step])
        return out

    def adjoint(self, block: NDArray[Any]) -> NDArray[Any]:
        """A^T @ block."""
        import numpy as np

        if self.dtype is np.float32:
            product: NDArray[Any] = self.matrix.T @ block
            return product
        out = np.zeros((self.shape[1], block.shape[1]))
        for start in range(0, self.shape[0], self._step):
            out += self.matrix[start : start + self._step].astype(np.float64).T @ block[start : start + self._step]
        return out


class Rows:
    """A matrix of which rows can be made, a tile at a time (an algorithm's dW): `rows(start, stop)` gives float64 (stop - start, columns)."""

    def __init__(self, shape: tuple[int, int], rows: Callable[[int, int], NDArray[np.float64]]) -> None:
        import numpy as np

        self.shape, self.dtype = shape, np.float64
        self._rows = rows

    def total(self) -> float:
        """||A||_F^2."""
        found = 0.0
        for start, stop in tiles(self.shape):
            part = self._rows(start, stop)
            found += float((part * part).sum())
        return found

    def apply(self, block: NDArray[Any]) -> NDArray[Any]:
        """A @ block."""
        import numpy as np

        return np.vstack([self._rows(start, stop) @ block for start, stop in tiles(self.shape)])

    def adjoint(self, block: NDArray[Any]) -> NDArray[Any]:
        """A^T @ block."""
        import numpy as np

        out = np.zeros((self.shape[1], block.shape[1]))
        for start, stop in tiles(self.shape):
            out += self._rows(start, stop).T @ block[start:stop]
        return out


class _Transposed:
    def __init__(self, operator: Operator) -> None:
        self.shape, self.dtype = operator.shape[::-1], operator.dtype
        self.apply, self.adjoint = operator.adjoint, operator.apply


@dataclass(frozen=True)
class Leading:
    """The leading singular triplets: A ~ left (rows, k) diag(sigma) right^T, right (columns, k), float64, descending.

    `missed` estimates how much larger the sum of the k squares can be for the best approximation; `following` are the squares found of the next values.
    """

    left: NDArray[np.float64]
    sigma: NDArray[np.float64]
    right: NDArray[np.float64]
    missed: float
    following: NDArray[np.float64]
    products: int
    """Columns multiplied by A or its transpose in all."""

    def factors(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(up (rows, k), down (k, columns)), the singular values shared evenly."""
        import numpy as np

        half = np.sqrt(self.sigma)
        return self.left * half, half[:, None] * self.right.T


def leading(
    operator: Operator,
    total: float,
    want: Callable[[NDArray[np.float64]], int],
    *,
    start: int = 24,
    seed: int | tuple[int, ...] = 0,
    tolerance: float = 0.005,
) -> Leading:
    """The leading singular triplets of A, as many as `want` says of the values found so far (all of them: go on looking).

    `total` is ||A||_F^2; `start` the size of the first block (a few more than the values expected); `seed` makes it repeatable.
    The error of the truncation is meant to exceed the best possible one by at most the share `tolerance` (or is rounding noise). Where the space
    would grow to a large part of the matrix, all singular values are found instead. Raises MalformedError when A is not finite.
    """
    import numpy as np

    if operator.shape[0] > operator.shape[1]:
        found = leading(_Transposed(operator), total, want, start=start, seed=seed, tolerance=tolerance)
        return Leading(found.right, found.sigma, found.left, found.missed, found.following, found.products)
    if not np.isfinite(total):
        raise MalformedError("a matrix with values that are not finite has no singular values", found=total)
    rows, columns = operator.shape
    limit = rows
    space = _Space(operator, rows)
    width = min(start, limit)
    if 4 * width >= limit or total == 0.0:
        return space.all_of(want)
    random = np.random.default_rng(seed)
    space.add(operator.apply(random.standard_normal((columns, width)).astype(operator.dtype)))
    space.products += width
    before = -1
    while True:
        squares, vectors = space.ritz()
        sigma = np.sqrt(squares)
        count = want(sigma)
        few = count + _MARGIN > len(squares)
        residual = space.residual(vectors[:, : min(len(squares), max(count + _MARGIN, width), _STEP if few else limit)])
        missed = _missed(squares, np.einsum("ij,ij->j", residual, residual, dtype=np.float64), count)
        tail = max(total - float(squares[:count].sum()), 0.0)
        small = missed <= max(2 * tolerance * tail, (1e-13 if operator.dtype is np.float64 else 1e-9) * total)
        if small and not few and count == before:
            return space.found(squares, vectors, count, missed)
        before = count
        if 2 * (len(squares) + residual.shape[1]) >= limit or not space.add(residual):
            return space.all_of(want)


def _missed(squares: NDArray[np.float64], residuals: NDArray[np.float64], count: int) -> float:
    """How much the sum of the first `count` squares can still grow, from the squared residuals of their Ritz vectors."""
    import numpy as np

    count = min(count, len(residuals))
    gap = np.maximum(squares[:count] - squares[min(count, len(squares) - 1)], 1e-300)
    with np.errstate(over="ignore"):
        return float(np.minimum(np.sqrt(residuals[:count]), residuals[:count] / gap).sum())


class _Space:
    """An orthonormal basis (rows, q) and A^T basis (columns, q)."""

    def __init__(self, operator: Operator, rows: int) -> None:
        import numpy as np

        self.operator = operator
        self.basis = np.empty((rows, 0), operator.dtype)
        self.image = np.empty((operator.shape[1], 0), operator.dtype)
        self.products = 0

    def add(self, block: NDArray[Any]) -> bool:
        """Enlarge the space by these columns; False when they hold nothing new."""
        import numpy as np

        sizes = np.sqrt(np.einsum("ij,ij->j", block, block, dtype=np.float64))
        block = block[:, sizes > 1e-14 * max(float(sizes.max(initial=0.0)), 1e-300)]
        if not block.shape[1]:
            return False
        new, _ = np.linalg.qr(block)
        # Columns that were nearly dependent come out with parts of the old space: taken out once more.
        new = new - self.basis @ (self.basis.T @ new)
        new, _ = np.linalg.qr(new)
        self.basis = np.hstack([self.basis, new])
        self.image = np.hstack([self.image, self.operator.adjoint(new)])
        self.products += new.shape[1]
        return True

    def ritz(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Squared Ritz values, descending, and their vectors in the basis."""
        import numpy as np

        image = self.image.astype(np.float64, copy=False)
        squares, vectors = np.linalg.eigh(image.T @ image)
        return np.maximum(squares[::-1], 0.0), vectors[:, ::-1]

    def residual(self, vectors: NDArray[np.float64]) -> NDArray[Any]:
        """(1 - Q Q^T) A A^T u for these Ritz vectors."""
        block = self.operator.apply(self.image @ vectors.astype(self.operator.dtype))
        self.products += block.shape[1]
        for _ in range(2):
            block = block - self.basis @ (self.basis.T @ block)
        return block

    def found(self, squares: NDArray[np.float64], vectors: NDArray[np.float64], count: int, missed: float) -> Leading:
        """The first `count` triplets."""
        import numpy as np

        sigma = np.sqrt(squares[:count])
        inverse = np.divide(1.0, sigma, out=np.zeros_like(sigma), where=sigma > 0)
        left = self.basis @ vectors[:, :count]
        right = (self.image @ vectors[:, :count]) * inverse
        return Leading(left.astype(np.float64), sigma, right.astype(np.float64), missed, squares[count:], self.products)

    def all_of(self, want: Callable[[NDArray[np.float64]], int]) -> Leading:
        """Every singular value, from the Gram matrix of the rows."""
        import numpy as np

        self.basis = np.eye(self.basis.shape[0], dtype=self.operator.dtype)
        self.image = self.operator.adjoint(self.basis)
        self.products += self.basis.shape[0]
        squares, vectors = self.ritz()
        return self.found(squares, vectors, min(want(np.sqrt(squares)), len(squares)), 0.0)


def optimum(total: float, found: Leading) -> float:
    """About the smallest error any approximation of this rank can have: sqrt(||A||^2 - sum of squares - what may be missed)."""
    return sqrt(max(total - float(found.sigma @ found.sigma) - found.missed, 0.0))
