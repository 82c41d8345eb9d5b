"""Inner products of stored factors: every route gives those of float64, however the factors lie and whatever they are stored in."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upparam.algorithms.gram import gram, root, routes

DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64, ml_dtypes.float8_e4m3fn]
Factor = tuple[int, Any, bool]


def stored(rank: int, columns: int, dtype: Any, across: bool, seed: int) -> np.ndarray[Any, Any]:
    """(rank, columns), rows of sizes from 1 to 1/300; across: the transpose of what lies in memory."""
    values = np.random.default_rng(seed).standard_normal((rank, columns)) * np.logspace(0, -2.5, rank)[:, None]
    factor = values.astype(dtype)
    return np.ascontiguousarray(factor.T).T if across else factor


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 75), st.sampled_from(DTYPES), st.booleans()), min_size=1, max_size=2),
    st.integers(1, 450), st.sampled_from(routes()), st.integers(0, 99),
)  # fmt: skip
def test_products_are_those_of_float64(factors: list[Factor], columns: int, route: str, seed: int) -> None:
    """Within the rounding of sums in any order: n eps |a| |b|; with float32 products that of its epsilon over a few hundred of them."""
    arrays = [stored(rank, columns, dtype, across, seed + n) for n, (rank, dtype, across) in enumerate(factors)]
    whole = np.concatenate([array.astype(np.float64) for array in arrays])
    lengths = np.linalg.norm(whole, axis=1)
    sizes = lengths[:, None] * lengths
    found = gram(*arrays, route=route)
    assert found.shape == (len(whole), len(whole)) and (found == found.T).all()
    assert (np.abs(found - whole @ whole.T) <= columns * 2.0**-53 * sizes).all()
    if not any(array.dtype == np.float64 for array in arrays):
        rough = gram(*arrays, coarse=True, route=route)
        assert (np.abs(rough - whole @ whole.T) <= 256 * 2.0**-24 * sizes).all()


@pytest.mark.parametrize("route", routes())
def test_every_16_bit_code_is_read_as_numpy_reads_it(route: str) -> None:
    """Subnormals, infinities and NaNs: the square of each as the inner product of a row of one element with itself."""
    codes = np.arange(1 << 16, dtype=np.uint16)
    for dtype in (np.float16, ml_dtypes.bfloat16):
        values = codes.view(dtype)
        squares = np.concatenate([gram(part, route=route).diagonal() for part in values.reshape(-1, 512, 1)])
        with np.errstate(invalid="ignore"):
            np.testing.assert_array_equal(squares, np.square(values.astype(np.float64)))


@pytest.mark.parametrize("route", routes())
@pytest.mark.parametrize("across", [False, True])
def test_what_is_not_finite_shows(route: str, across: bool) -> None:
    for value in (np.nan, np.inf):
        factor = stored(40, 300, np.float16, across, 0)
        factor[17, 211] = value
        assert not np.isfinite(gram(factor, route=route)[17, 17]) and not np.isfinite(gram(factor, coarse=True, route=route)[17, 17])


def test_no_columns_no_products() -> None:
    for route in routes():
        assert (gram(np.zeros((3, 0), np.float16), np.zeros((2, 0), np.float16), route=route) == np.zeros((5, 5))).all()


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 120), st.integers(0, 99))
def test_roots_invert(rank: int, seed: int) -> None:
    """(lengths lower) (lengths lower)^T is the matrix, rows from 1 to 1e-8 long, and the inverse is the inverse."""
    rows = stored(rank, 3 * rank, np.float64, False, seed) * np.logspace(0, -8, rank)[:, None]
    products = rows @ rows.T
    found = root(products)
    assert found is not None
    lower = found.lengths[:, None] * found.lower
    np.testing.assert_allclose(lower @ lower.T, products, rtol=0, atol=1e-13 * float(np.abs(products).max()))
    np.testing.assert_allclose(found.inverse @ found.lower, np.eye(rank), atol=1e-11)


def test_dependent_rows_have_no_root() -> None:
    rows = stored(5, 40, np.float64, False, 0)
    assert root(np.vstack([rows, rows[:1]]) @ np.vstack([rows, rows[:1]]).T) is None
    assert root(np.zeros((2, 2))) is None
