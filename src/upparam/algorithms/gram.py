"""Inner products of the rows of factors as they are stored, compiled where that is built, else by numpy; what follows from them: Cholesky factors, and how
the spaces of two lie to each other."""

from __future__ import annotations

import os
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from upparam._native import compiled
from upparam.arrays import doubles, singles

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_KINDS = {"bfloat16": 0, "float16": 1, "float32": 2, "float64": 3}
"""The compiled module's numbers for dtypes; factors of others are widened first."""
_INTERFACE = 2
"""What the compiled module must say it speaks; one left over from older source does not."""
_TILE = 1024
"""Columns that numpy multiplies at a time: a tile of both factors stays near the cache."""


@cache
def routes() -> tuple[str, ...]:
    """The compiled module's instruction sets that this processor has, fastest first, then `numpy`, which is always there."""
    module = compiled("gram", _INTERFACE)
    return (*(module.instruction_sets() if module is not None else ()), "numpy")


def gram(*factors: NDArray[Any], coarse: bool = False, route: str | None = None) -> NDArray[np.float64]:
    """The inner products of all rows of one or two factors (r, n), the first's before the second's: (r, r) or (r + s, r + s), float64.

    A factor that is stored the other way round comes as the transpose of that. Products are of float64, or with `coarse` of float32,
    whose sums of some hundred products are then added up in float64. What is not finite comes out as infinity or NaN. `route` is one of
    `routes`, the fastest or what the environment variable UPPARAM_KERNEL names when None.
    """
    import numpy as np

    number = _number(route)
    if number is None:
        return _by_numpy(factors, coarse)
    module = compiled("gram", _INTERFACE)
    parts = []
    for factor in factors:
        factor = factor if str(factor.dtype) in _KINDS else singles(factor)
        across = factor.ndim == 2 and not factor.flags.c_contiguous and factor.T.flags.c_contiguous
        stored = factor.T if across else np.ascontiguousarray(factor)
        parts.append((stored.reshape(-1).view(np.uint8), len(factor), _KINDS[str(factor.dtype)], across))
    count = sum(len(factor) for factor in factors)
    result = np.empty((count, count))
    module.gram(result.reshape(-1).view(np.uint8), factors[0].shape[1], tuple(parts), not coarse, number)
    return result


def _number(route: str | None) -> int | None:
    """The compiled module's number for a route, its fastest or what the environment says when None; None for numpy's."""
    found = routes()
    route = route or os.environ.get("UPPARAM_KERNEL", "")
    number = found.index(route) if route in found else 0
    return None if found[number] == "numpy" else number


def _by_numpy(factors: tuple[NDArray[Any], ...], coarse: bool) -> NDArray[np.float64]:
    import numpy as np

    sizes = [len(factor) for factor in factors]
    whole = np.zeros((sum(sizes), sum(sizes)))
    # Rows lie side by side in memory as they do in the factors: those of an up are its columns.
    first = factors[0]
    kind, widen = (np.float32, singles) if coarse else (np.float64, doubles)
    tile = np.empty((_TILE, sum(sizes)), kind).T if first.strides[0] < first.strides[1] else np.empty((sum(sizes), _TILE), kind)
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, first.shape[1], _TILE):
            part, at = tile[:, : min(_TILE, first.shape[1] - start)], 0
            for factor, size in zip(factors, sizes, strict=True):
                part[at : at + size] = widen(factor[:, start : start + _TILE])
                at += size
            whole += part @ part.T
    return whole


class Root(NamedTuple):
    """A Gram matrix as (lengths lower) (lengths lower)^T: the lengths of the rows (r,), the Cholesky factor of the rows made unit, its inverse."""

    lengths: NDArray[np.float64]
    lower: NDArray[np.float64]
    inverse: NDArray[np.float64]


INDEPENDENT = 1e-5
"""Ratio of the smallest to the largest value of the Cholesky diagonal of unit rows below which these may be dependent."""


def root(products: NDArray[np.float64], least: float = INDEPENDENT) -> Root | None:
    """The root of a Gram matrix; None where its rows may be dependent: see INDEPENDENT for `least`."""
    import numpy as np

    diagonal = products.diagonal()
    if not diagonal.min(initial=1.0) > 0.0:
        return None
    lengths = np.sqrt(diagonal)
    try:
        lower: NDArray[np.float64] = np.linalg.cholesky(products / lengths[:, None] / lengths).astype(np.float64, copy=False)
    except np.linalg.LinAlgError:
        return None
    if not lower.diagonal().min(initial=1.0) > least * lower.diagonal().max(initial=1.0):
        return None
    return Root(lengths, lower, _inverse(lower))


def _inverse(lower: NDArray[np.float64]) -> NDArray[np.float64]:
    """The inverse of a lower triangular matrix, by halves: numpy has only that of full matrices, which takes twice as long."""
    import numpy as np

    count = len(lower)
    if count <= 48:
        small: NDArray[np.float64] = np.linalg.inv(lower).astype(np.float64, copy=False)
        return small
    half = count // 2
    found = np.zeros_like(lower)
    found[:half, :half], found[half:, half:] = _inverse(lower[:half, :half]), _inverse(lower[half:, half:])
    found[half:, :half] = -(found[half:, half:] @ lower[half:, :half] @ found[:half, :half])
    return found


class Cosines(NamedTuple):
    """The squared cosines of the principal angles between two spaces: how many, the smallest, the largest, and their sum."""

    number: int
    smallest: float
    largest: float
    total: float

    @classmethod
    def of(cls, cross: NDArray[np.float64]) -> Cosines:
        """Those whose cosines are the singular values of the product of two orthonormal bases. Source: Bjorck & Golub 1973."""
        import numpy as np

        if not cross.size:
            return cls(0, 0.0, 0.0, 0.0)
        squares = np.linalg.eigvalsh(cross @ cross.T if len(cross) <= cross.shape[1] else cross.T @ cross)
        return cls(len(squares), float(squares[0]), float(squares[-1]), float(squares.sum()))


def cosines(products: NDArray[np.float64], rank: int, least: float = INDEPENDENT, route: str | None = None) -> Cosines | None:
    """Of the space of the first `rank` rows and that of the others, from the inner products of all; None where the rows of one may be
    dependent: see INDEPENDENT for `least`, and `gram` for `route`."""
    import numpy as np

    number = _number(route)
    if number is None or not 0 < rank < len(products):
        one, other = root(products[:rank, :rank], least), root(products[rank:, rank:], least)
        if one is None or other is None:
            return None
        return Cosines.of((one.inverse / one.lengths) @ products[:rank, rank:] @ (other.inverse / other.lengths).T)
    whole = np.ascontiguousarray(products).reshape(-1).view(np.uint8)
    found = compiled("gram", _INTERFACE).spaces(whole, rank, least, number)
    return None if found is None else Cosines(min(rank, len(products) - rank), *found)
