"""Truncation through the factors against numpy's full SVD of the materialised product, in float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upparam.algorithms.lowrank import RankRule, difference, gram_spectral, qr_spectral, spectral, truncate, tucker_truncate
from upparam.errors import MalformedError, UsageError


def factors(rows: int, rank: int, columns: int, seed: int, decay: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    fall = decay ** -np.arange(rank)
    return random.standard_normal((rows, rank)) * fall, random.standard_normal((rank, columns))


def best(matrix: np.ndarray, rank: int) -> np.ndarray:
    left, sigma, right = np.linalg.svd(matrix, full_matrices=False)
    return (left[:, :rank] * sigma[:rank]) @ right[:rank]


SIZES = st.tuples(st.integers(1, 40), st.integers(1, 12), st.integers(1, 40), st.integers(0, 2**32 - 1))


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(1, 12))
def test_equals_the_full_svd(sizes: tuple[int, int, int, int], rank: int) -> None:
    rows, inner, columns, seed = sizes
    up, down = factors(rows, inner, columns, seed, 1.3)
    found, chosen = truncate(up, down, RankRule(rank))
    assert chosen <= min(rank, inner)
    cut_up, cut_down = found.factors(chosen)
    whole = up @ down
    norm = np.linalg.norm(whole)
    optimal = np.linalg.norm(whole - best(whole, rank))
    assert np.linalg.norm(whole - cut_up @ cut_down) <= 1.0001 * optimal + 1e-8 * norm
    sigma = np.linalg.svd(whole, compute_uv=False)
    count = min(len(sigma), len(found.sigma))
    np.testing.assert_allclose(found.sigma[:count], sigma[:count], atol=max(found.floor, 1e-12 * norm))


@settings(max_examples=40, deadline=None)
@given(SIZES, st.floats(-3, 3))
def test_gauge_does_not_matter(sizes: tuple[int, int, int, int], power: float) -> None:
    """U G and G^-1 D are the same adapter: same spectrum, same cut."""
    rows, inner, columns, seed = sizes
    up, down = factors(rows, inner, columns, seed, 1.5)
    random = np.random.default_rng(seed + 1)
    turn, _ = np.linalg.qr(random.standard_normal((inner, inner)))
    gauge = turn * np.logspace(0, power, inner)
    rule = RankRule(max(1, inner // 2))
    one, rank = truncate(up, down, rule)
    other, same = truncate(up @ gauge, np.linalg.solve(gauge, down), rule)
    assert rank == same
    norm = one.norm
    np.testing.assert_allclose(one.sigma[:rank], other.sigma[:rank], atol=1e-7 * norm)
    first, second = one.factors(rank), other.factors(rank)
    if rank < len(one.sigma) and one.sigma[rank - 1] - one.sigma[rank] > 1e-3 * norm:
        np.testing.assert_allclose(first[0] @ first[1], second[0] @ second[1], atol=1e-5 * norm)


def test_the_gram_route_gives_way_to_qr_where_it_cannot_tell() -> None:
    """Columns that nearly cancel: the Gram matrices lose the small values, and the rule asks for them."""
    random = np.random.default_rng(3)
    up, down = random.standard_normal((200, 8)), random.standard_normal((8, 150))
    gauge = np.eye(8) * np.logspace(0, 9, 8)
    up, down = up @ gauge, np.linalg.solve(gauge, down)
    whole = up @ down
    rule = RankRule(error=1e-9)
    found, rank = truncate(up, down, rule, resolution=1e-16)
    assert rank == 8
    cut = found.factors(rank)
    assert np.linalg.norm(whole - cut[0] @ cut[1]) <= 1e-9 * np.linalg.norm(whole)
    assert qr_spectral(up, down).floor < gram_spectral(up, down).floor


def test_more_columns_than_rows() -> None:
    """A concatenation may have more rank than the matrix has rows."""
    up, down = factors(12, 40, 20, 5)
    for found in (gram_spectral(up, down), qr_spectral(up, down)):
        cut = found.factors(12)
        np.testing.assert_allclose(cut[0] @ cut[1], up @ down, atol=1e-6)
        sigma = np.linalg.svd(up @ down, compute_uv=False)
        np.testing.assert_allclose(found.sigma[:12], sigma, atol=found.floor)
        assert found.tail(12) <= 2 * found.floor * np.sqrt(40)


def test_the_rank_of_a_rank_deficient_pair() -> None:
    up, down = factors(60, 6, 50, 7)
    doubled = spectral(np.hstack([up, up]), np.vstack([down, down]))
    assert RankRule(error=1e-6).choose(doubled.sigma) == 6
    cut = doubled.factors(6)
    np.testing.assert_allclose(cut[0] @ cut[1], 2 * up @ down, atol=1e-9)


def test_zero_and_not_finite() -> None:
    up, down = np.zeros((10, 4)), np.ones((4, 8))
    found, rank = truncate(up, down, RankRule(2))
    assert not np.any(found.factors(rank)[0] @ found.factors(rank)[1])
    for bad in (np.nan, np.inf, 1e200):
        with pytest.raises(MalformedError):
            truncate(np.full((3, 2), bad), np.ones((2, 3)), RankRule(1))


def test_difference_through_the_factors() -> None:
    up, down = factors(30, 5, 40, 1)
    other_up, other_down = factors(30, 3, 40, 2)
    assert difference(up, down, other_up, other_down) == pytest.approx(np.linalg.norm(up @ down - other_up @ other_down))
    assert difference(up, down, up, down) <= 1e-7 * np.linalg.norm(up @ down)


def test_rules() -> None:
    sigma = np.array([4.0, 2.0, 1.0, 0.5])
    total = float((sigma**2).sum())
    assert RankRule(3).choose(sigma) == 3
    assert RankRule(9).choose(sigma) == 4
    assert RankRule(energy=20 / total).choose(sigma) == 2
    assert RankRule(energy=20.1 / total).choose(sigma) == 3
    assert RankRule(error=np.sqrt(1.25 / total)).choose(sigma) == 2
    assert RankRule(fro=np.sqrt(20 / total)).choose(sigma) == 2
    assert RankRule(energy=1.0).choose(sigma) == 4
    assert RankRule(energy=0.0).choose(sigma) == 1
    assert RankRule(2, error=0.0).choose(sigma) == 2
    assert RankRule(4, conv_rank=2).choose(sigma, conv=True) == 2
    assert RankRule(error=0.5).choose(sigma[:2], total=total + 100.0) == 2
    assert RankRule(1).choose(np.zeros(3)) == 1
    for wrong in ({}, {"rank": 0}, {"energy": 1.5}, {"error": -0.1}, {"fro": float("nan")}):
        with pytest.raises(UsageError):
            RankRule(**wrong)  # type: ignore[arg-type]


def contract(up: np.ndarray, mid: np.ndarray, down: np.ndarray) -> np.ndarray:
    return np.einsum("op,pqx,qi->oix", up, mid, down)


@pytest.mark.parametrize("rank", [1, 3, 6, 8])
def test_tucker_form(rank: int) -> None:
    random = np.random.default_rng(rank)
    fall = 1.6 ** -np.arange(8)
    up, down = random.standard_normal((20, 8)), random.standard_normal((8, 24))
    mid = random.standard_normal((8, 8, 9)) * fall[:, None, None] * fall[None, :, None]
    whole = contract(up, mid, down)
    cut_up, cut_mid, cut_down, lost = tucker_truncate(up, mid, down, RankRule(rank))
    assert (cut_up.shape, cut_mid.shape, cut_down.shape) == ((20, rank), (rank, rank, 9), (rank, 24))
    gap = np.linalg.norm(whole - contract(cut_up, cut_mid, cut_down)) / np.linalg.norm(whole)
    assert gap**2 == pytest.approx(lost, abs=1e-12)
    # The bounds of every Tucker form: no better than the best matrix in either mode, no worse than both together.
    tails = [
        np.linalg.norm(np.linalg.svd(m, compute_uv=False)[rank:]) for m in (whole.reshape(20, -1), whole.swapaxes(0, 1).reshape(24, -1))
    ]
    norm = np.linalg.norm(whole)
    assert max(tails) / norm - 1e-12 <= gap <= np.hypot(*tails) / norm + 1e-12


def test_tucker_keeps_what_is_asked() -> None:
    random = np.random.default_rng(0)
    fall = 2.0 ** -np.arange(10)
    up, down = random.standard_normal((30, 10)), random.standard_normal((10, 30))
    mid = random.standard_normal((10, 10, 9)) * fall[:, None, None] * fall[None, :, None]
    cut = tucker_truncate(up, mid, down, RankRule(error=0.05))
    assert cut[3] <= 0.05**2
    assert 1 < cut[0].shape[1] < 10
