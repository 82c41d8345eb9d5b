"""The compiled kernel, in every instruction set this processor has, gives the bytes that numpy gives; and nobody needs it."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.operations.merging import NUMPY, TileCase, round_once, tile_cases

from upparam.arrays import floats
from upparam.dtypes import DTYPES
from upparam.operations.merge import in_float32
from upparam.operations.merge.factors import LowRank, Part
from upparam.operations.merge.in_float64 import add_in_float64, store, too_large
from upparam.operations.merge.kernel import Scratch, add_low_rank, best_route, convert_low_rank, routes
from upparam.operations.merge.rounding import narrow

ROOT = Path(__file__).parents[2]


@settings(max_examples=120, deadline=None)
@given(tile_cases())
def test_all_routes_give_the_same_bytes(case: TileCase) -> None:
    dtype, weight, up, down, start = case
    factors = LowRank(up, down)
    results = {}
    for name, route in routes().items():
        tile = weight.copy()
        counts = add_low_rank(tile, DTYPES[dtype], factors, start, Scratch(tile.size, route))
        results[name] = (tile.tobytes(), counts)
    assert len(set(results.values())) == 1, {name: counts for name, (_, counts) in results.items()}
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        true = weight.astype(np.float32).astype(np.float64) + up[start:] @ factors.down64
    most = {"float16": 65504.0, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}.get(dtype, float(np.finfo(np.float32).max))
    finite = np.isfinite(true) & (np.abs(true) < 0.99 * most)
    got = np.frombuffer(results["numpy"][0], weight.dtype).reshape(weight.shape)
    assert np.array_equal(got[finite].astype(np.float32), round_once(true[finite], dtype).astype(np.float32))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("columns", [64, 63, 1])
@pytest.mark.parametrize("rank", [0, 2, 16, 40])
def test_numpy_in_every_cut(monkeypatch: pytest.MonkeyPatch, dtype: str, columns: int, rank: int) -> None:
    """Blocks, products and widths smaller than the tile; sums at ties, a hair beside them and far below what is normal in float16."""
    for name, value in (("BLOCK", 900), ("_PRODUCT", 1500), ("_WIDTH", 7)):
        monkeypatch.setattr(in_float32, name, value)
    rng = np.random.default_rng(rank)
    half = 2.0 ** (-8 if dtype == "bfloat16" else -11)
    for scale, hair in ((1.0, 2.0**-26), (1.0, 2.0**-45), (1.0, 0.0), (2.0**-14, 2.0**-40), (2.0**-20, 2.0**-30)):
        weight = (rng.uniform(1, 2, (50, columns)) * rng.choice([-1, 1], (50, columns)) * scale).astype(NUMPY[dtype])
        up, down = rng.standard_normal((50, rank)) * hair * scale, rng.standard_normal((rank, columns))
        up[:, :1], down[:1] = half * scale, rng.choice([-1, 0.5, 1], (rank, columns))[:1]  # where the weight's exponent stays: a tie
        expected, got = weight.copy(), weight.copy()
        counts = add_in_float64(expected, DTYPES[dtype], LowRank(up, down), 0)
        assert add_low_rank(got, DTYPES[dtype], LowRank(up, down), 0, Scratch(columns, routes()["numpy"])) == counts
        assert got.tobytes() == expected.tobytes()
        true = weight.astype(np.float64) + up @ down
        assert np.array_equal(got.astype(np.float64), round_once(true, dtype).astype(np.float64))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("rank", [16, 70])
def test_numpy_where_changes_outweigh_weights(dtype: str, rank: int) -> None:
    """What a float32 sum may be off is then many of its units: without the bound dozens of these elements would be wrong."""
    rng = np.random.default_rng(rank)
    expected = (rng.standard_normal((1000, 601)) * 0.01).astype(NUMPY[dtype])
    got = expected.copy()
    factors = LowRank(rng.standard_normal((1000, rank)), rng.standard_normal((rank, 601)))
    counts = add_in_float64(expected, DTYPES[dtype], factors, 0)
    assert add_low_rank(got, DTYPES[dtype], factors, 0, Scratch(601, routes()["numpy"])) == counts
    assert np.array_equal(got.view(np.uint16), expected.view(np.uint16))


def test_the_route_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPPARAM_KERNEL", "numpy")
    assert best_route().name == "numpy"
    monkeypatch.setenv("UPPARAM_KERNEL", "no-such")
    assert best_route().name == next(iter(routes()))


def test_a_module_built_from_older_source_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    route = best_route()
    if route.module is None:
        pytest.skip("the compiled kernel is not built here")
    monkeypatch.delattr(route.module, "INTERFACE")
    assert list(routes()) == ["numpy"]


def test_the_kernel_refuses_buffers_that_are_too_small() -> None:
    route = best_route()
    if route.module is None:
        pytest.skip("the compiled kernel is not built here")
    stored, good, double = np.zeros(16, np.uint16), np.zeros(64, np.float32), np.zeros(64)
    # a 4 x 4 tile of rank 1: stored, rows, columns, up, up64, panels, downs, rank, row_bound, panel_norm, kind, exact, set, given
    whole = (stored, 4, 4, good, double, good, double, 1, good, good, 0, True, route.number, good)
    assert route.module.merge_tile(*whole) == (0, 0)
    assert route.module.merge_tile(*whole[:4], None, good, good, *whole[7:]) == (0, 0)
    assert route.module.merge_tile(*whole[:13], None) == (0, 0)
    for place in (0, 3, 4, 5, 6, 8, 9, 13):
        short = [*whole]
        short[place] = short[place][:0]
        with pytest.raises(ValueError, match="too small"):
            route.module.merge_tile(*short)
    # matrices of 2 x 40 as ranks 1 to 2 of up, and 1 to 40 of down: matrix, rows, columns, factor, out, rank, at, kind, weights, squares, set, downs (of lay_down)
    for lay, rank, more in ((route.module.lay_up, 41, ()), (route.module.lay_down, 3, (np.zeros((40, 8), np.float32),))):
        whole = (
            np.zeros((2, 40)),
            2,
            40,
            1.0,
            np.zeros(4 * 64, np.float32),
            rank,
            1,
            0,
            np.ones(41),
            np.zeros((2, 40)),
            route.number,
            *more,
        )
        assert lay(*whole) is True
        for place in (0, 4, 8, 9, *range(11, len(whole))):
            short = [*whole]
            short[place] = short[place][:0]
            with pytest.raises(ValueError, match="too small"):
                lay(*short)
        for place, wrong in ((1, 400), (2, 400), (5, 1), (6, 2), (6, -1), (7, 5), (10, 9)):
            with pytest.raises(ValueError, match="too small"):
                lay(*whole[:place], wrong, *whole[place + 1 :])


@settings(max_examples=60, deadline=None)
@given(tile_cases(), st.sampled_from([1.0, 0.5, -2.0, 0.7, 1e-3]), st.integers(1, 40))
def test_factors_laid_side_by_side_give_the_bytes_of_joined_ones(case: TileCase, factor: float, more: int) -> None:
    """In float32 and in float64, with factors that float32 holds and that it does not."""
    dtype, weight, up, down, start = case
    rng = np.random.default_rng(more)
    narrow = rng.standard_normal((len(up), more)).astype(np.float32), rng.standard_normal((more, down.shape[1])).astype(np.float32)
    joined = LowRank(
        np.concatenate([up * 0.3, narrow[0] * np.float64(factor)], axis=1), np.concatenate([down, narrow[1].astype(np.float64)])
    )
    parts = LowRank(up, down, 0.3, beside=[Part(*narrow, factor)])
    assert parts.rank == joined.rank
    results = set()
    for route in routes().values():
        for factors in (joined, parts):
            tile = weight.copy()
            counts = add_low_rank(tile, DTYPES[dtype], factors, start, Scratch(tile.size, route))
            results.add((tile.tobytes(), counts))
    assert len(results) == 1


@settings(max_examples=120, deadline=None)
@given(tile_cases(), st.sampled_from(["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"]))
def test_what_becomes_another_dtype_is_what_float64_says(case: TileCase, name: str) -> None:
    """Weights of every code of theirs, summed and rounded once into a narrower type than float32, and counted against themselves rounded."""
    dtype, (_, weight, up, down, start) = DTYPES[name], case
    given = floats(weight)
    given[~np.isfinite(given)] = 0
    factors = LowRank(up, down)
    with np.errstate(all="ignore"):
        expected, true = narrow(given, dtype), given.astype(np.float64)
        add = factors.elements(np.arange(weight.size), start, weight.shape[1])  # in the order that decides
        true += add.reshape(weight.shape)
        changed, _ = store(expected, true, dtype)
        beyond = too_large(expected, given, true, dtype)
    for route in routes().values():
        out = np.empty(weight.shape, dtype.numpy)
        found = convert_low_rank(given, out, dtype, factors, start, Scratch(weight.size, route))
        if route.module is None:
            assert found is None
            continue
        assert found == (changed, beyond) and out.tobytes() == expected.tobytes()


def test_what_float32_does_not_hold_is_said() -> None:
    """Near-ties are settled from float32 factors where those hold every value, and from float64 where they do not."""
    up, down = np.array([[1.0, 2.0]] * 3, np.float32), np.array([[1.0] * 5, [3.0] * 5], np.float32)
    for route in routes().values():
        if route.module is not None:
            for factor, wide in ((2.0, False), (0.7, True), (2.0**-150, True)):
                form = LowRank(up, down, factor).packed(route, 0)
                assert (form.up64 is not None) is wide and form.downs.dtype == np.float32
            form = LowRank(up, down * np.float64(0.1)).packed(route, 1)
            assert form.up64 is None and form.downs.dtype == np.float64


def test_installing_without_a_compiler_succeeds(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")],
        cwd=ROOT, env={**os.environ, "CC": "/bin/false"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("*.so"))
