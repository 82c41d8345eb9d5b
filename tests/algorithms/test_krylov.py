"""Leading singular values against numpy's full SVD, the bound on what is missed, and repeatability."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upparam.algorithms.krylov import Dense, Leading, leading, optimum
from upparam.algorithms.lowrank import RankRule
from upparam.errors import MalformedError


def with_values(values: np.ndarray, rows: int, columns: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    left, _ = np.linalg.qr(random.standard_normal((rows, len(values))))
    right, _ = np.linalg.qr(random.standard_normal((columns, len(values))))
    return (left * values) @ right.T


def run(matrix: np.ndarray, rule: RankRule, exact: bool = False, seed: int = 0, start: int = 24) -> tuple[Leading, float]:
    matrix = matrix.astype(np.float32)
    total = float(np.square(matrix.astype(np.float64)).sum())
    found = leading(Dense(matrix, exact), total, lambda sigma: rule.choose(sigma, total=total), start=start, seed=seed)
    up, down = found.factors()
    return found, float(np.linalg.norm(matrix - up @ down))


SPECTRA = {
    "power": lambda n: np.arange(1, n + 1) ** -0.5,
    "flat": lambda n: np.arange(1, n + 1) ** -0.15,
    "steep": lambda n: 0.9 ** np.arange(n),
    "plateau": lambda n: np.r_[np.ones(n // 2), 1e-3 * np.ones(n - n // 2)],
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(("rows", "columns"), [(400, 500), (500, 400)])
@pytest.mark.parametrize("rank", [1, 8, 24])
@pytest.mark.parametrize("exact", [False, True])
def test_error_within_half_a_percent_of_the_optimum(spectrum: str, rows: int, columns: int, rank: int, exact: bool) -> None:
    values = SPECTRA[spectrum](400)
    matrix = with_values(values, rows, columns, 7)
    found, error = run(matrix, RankRule(rank), exact, start=rank + 8)
    best = float(np.linalg.norm(values[rank:]))
    assert error <= 1.005 * best + 1e-6
    total = float(np.square(matrix).sum())
    assert optimum(total, found) <= best + 1e-5
    np.testing.assert_allclose(found.left.T @ found.left, np.eye(rank), atol=1e-5)
    np.testing.assert_allclose(found.right.T @ found.right, np.eye(rank), atol=1e-5)
    assert (found.left.shape, found.right.shape) == ((rows, rank), (columns, rank))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_small_matrices_are_exact(rows: int, columns: int, rank: int, seed: int) -> None:
    matrix = np.random.default_rng(seed).standard_normal((rows, columns))
    found, error = run(matrix, RankRule(rank), True)
    sigma = np.linalg.svd(matrix.astype(np.float32).astype(np.float64), compute_uv=False)
    count = min(rank, rows, columns)
    np.testing.assert_allclose(found.sigma, sigma[:count], rtol=1e-6, atol=1e-7)
    assert error == pytest.approx(float(np.linalg.norm(sigma[count:])), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("rank", [3, 20, 70, 130])
def test_true_rank_under_noise(rank: int) -> None:
    """Without knowing the rank: everything above the noise is found, nothing of the noise."""
    random = np.random.default_rng(rank)
    rows, columns = 600, 700
    noise = random.standard_normal((rows, columns)) * 1e-3
    matrix = (random.standard_normal((rows, rank)) @ random.standard_normal((rank, columns)) + noise).astype(np.float32)
    floor = 1.1e-3 * (np.sqrt(rows) + np.sqrt(columns))
    total = float(np.square(matrix.astype(np.float64)).sum())
    found = leading(Dense(matrix), total, lambda sigma: int((sigma > floor).sum()), seed=1)
    assert len(found.sigma) == rank
    assert found.products < 6 * (rank + 100)


def test_energy_needs_as_many_values_as_the_full_svd_says() -> None:
    values = SPECTRA["steep"](300)
    matrix = with_values(values, 300, 320, 3)
    rule = RankRule(energy=0.999)
    found, _ = run(matrix, rule, True)
    assert len(found.sigma) == rule.choose(values)


def test_the_seed_alone_decides() -> None:
    matrix = with_values(SPECTRA["power"](300), 300, 300, 4)
    one, _ = run(matrix, RankRule(8), seed=5)
    two, _ = run(matrix, RankRule(8), seed=5)
    other, _ = run(matrix, RankRule(8), seed=6)
    assert np.array_equal(one.left, two.left) and np.array_equal(one.right, two.right)
    assert not np.array_equal(one.left, other.left)


def test_zero_and_not_finite() -> None:
    found, error = run(np.zeros((200, 300)), RankRule(3))
    assert error == 0.0 and not found.sigma.any()
    with pytest.raises(MalformedError):
        leading(Dense(np.ones((4, 4), np.float32)), float("nan"), lambda sigma: 1)
