"""Inner products of stored factors: every route gives those of float64, however the factors lie and whatever they are stored in."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import scipy.linalg
from hypothesis import example, given, settings
from hypothesis import strategies as st

from upparam._native import compiled
from upparam.algorithms.gram import _INTERFACE, Cosines, cosines, gram, root, routes

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


@settings(max_examples=150, deadline=None)
@example(5, 1, "same", routes()[-1], 46)
@given(
    st.integers(1, 90),
    st.integers(1, 90),
    st.sampled_from(["apart", "shared", "near", "same"]),
    st.sampled_from(routes()),
    st.integers(0, 99),
)
def test_angles_between_spaces_are_those_of_orthonormal_bases(rank: int, rank2: int, kind: str, route: str, seed: int) -> None:
    """Spaces drawn apart, that share directions, that nearly do, and one space through other rows."""
    rng = np.random.default_rng(seed)
    one = stored(rank, 250, np.float64, False, seed)
    other = rng.standard_normal((rank if kind == "same" else rank2, 250))
    if kind == "same":
        other = (np.linalg.qr(other[:, :rank])[0] + 2 * np.eye(rank)) @ one
    elif kind != "apart":
        common = min(len(one), len(other), 1 + seed % 7)
        other[:common] = one[:common] + (1e-5 if kind == "near" else 0.0) * other[:common]
    found = cosines(gram(one, other), len(one), route=route)
    squares = np.cos(scipy.linalg.subspace_angles(one.T, other.T)) ** 2
    assert found is not None and found.number == min(len(one), len(other))
    # Products of rows lose their condition squared; scipy's orthonormal bases do not.
    lost = 16 * np.finfo(np.float64).eps * (np.linalg.cond(one) ** 2 + np.linalg.cond(other) ** 2)
    assert found[1:3] == pytest.approx((squares.min(), squares.max()), rel=0, abs=lost)
    assert found[3] == pytest.approx(squares.sum(), rel=0, abs=lost * found.number)


@pytest.mark.parametrize("route", routes())
def test_spaces_of_orthogonal_rows_and_of_none(route: str) -> None:
    """Products that are exactly 0 or 1, where a reduction has nothing to reflect; and a side without rows."""
    apart = cosines(np.eye(70), 30, route=route)
    assert apart is not None and apart == pytest.approx((30, 0.0, 0.0, 0.0), abs=1e-15)
    rows = np.eye(40)[np.arange(60) % 40]
    same = cosines(rows @ rows.T, 40, route=route)
    assert same == pytest.approx((20, 1.0, 1.0, 20.0), abs=1e-14)
    assert cosines(np.eye(4), 0, route=route) == cosines(np.eye(4), 4, route=route) == Cosines(0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("route", routes())
def test_no_angles_where_rows_may_be_dependent(route: str) -> None:
    rows = stored(5, 40, np.float64, False, 0)
    for bad in (rows[:1], 0 * rows[:1], np.full((1, 40), np.nan), rows[:1] + 1e-7 * rows[1:2]):
        for parts in ((np.vstack([rows, bad]), rows[:3]), (rows[:3], np.vstack([rows, bad]))):
            whole = np.vstack(parts)
            assert cosines(whole @ whole.T, len(parts[0]), route=route) is None
    # Unit rows whose Cholesky diagonal is 1 and 0.6: enough for one bound, too little for another.
    rows = np.array([[1.0, 0.0], [0.8, 0.6], [3.0, 4.0]])
    assert cosines(rows @ rows.T, 2, 0.5, route) is not None and cosines(rows @ rows.T, 2, 0.7, route) is None


def test_compiled_spaces_refuse_what_is_no_square() -> None:
    module = compiled("gram", _INTERFACE)
    if module is None:
        pytest.skip("the compiled module is not built")
    for size, rank in ((48, 1), (72, 0), (72, 3)):
        with pytest.raises(ValueError, match="square"):
            module.spaces(np.zeros(size, np.uint8), rank, 1e-5, 0)
    with pytest.raises(ValueError, match="instruction set"):
        module.spaces(np.zeros(72, np.uint8), 1, 1e-5, 9)
