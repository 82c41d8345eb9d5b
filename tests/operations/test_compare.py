"""compare: every verdict on adapters made to deserve it, every number against numpy and scipy in float64."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.operations.merging import adapter, lora
from tests.operations.test_combine import peft_folder

from upparam.adapter import Adapter, BaseHint, Extra, ExtraKind, Target
from upparam.algorithms.base import Delta, ScaleRule, Scaling
from upparam.algorithms.dora import DoRA
from upparam.algorithms.full import Full
from upparam.algorithms.ia3 import IA3
from upparam.algorithms.loha import LoHa
from upparam.algorithms.lora import LoRA
from upparam.algorithms.lowrank import RankRule
from upparam.algorithms.relation import Form, Pair, Precision
from upparam.algorithms.slicing import cut
from upparam.cli import main
from upparam.errors import RefusedError, UsageError
from upparam.operations.combine import combine
from upparam.operations.compare import adapters, compare
from upparam.operations.compare.module import Alike, compare_deltas
from upparam.operations.compare.verdict import Comparison, Verdict
from upparam.operations.edit import edit
from upparam.operations.opening import open_adapter
from upparam.operations.resize import resize, resized
from upparam.tensors import Tensor

Array = NDArray[Any]
NAMES = ("a", "b", "c", "d")


def pair(seed: int, rank: int = 8, shape: tuple[int, int] = (96, 80), dtype: Any = np.float32) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    fall = np.logspace(0, -1, rank)
    return (rng.standard_normal((shape[0], rank)) * fall * 0.1).astype(dtype), (rng.standard_normal((rank, shape[1])) * 0.1).astype(dtype)


def several(seed: int, rank: int = 8, dtype: Any = np.float32, alpha: float = 4.0) -> Adapter:
    return adapter({name: lora(*pair(100 * seed + number, rank, dtype=dtype), alpha) for number, name in enumerate(NAMES)})


def mapped(one: Adapter, change: Any) -> Adapter:
    return replace(one, deltas={target: change(delta) for target, delta in one.deltas.items()})


def turned(delta: LoRA, gauge: Array, dtype: Any, share: float = 1.0) -> LoRA:
    """The same dW through other factors: up @ G * share and G^-1 @ down."""
    up, down = delta.matrices()
    made = (up @ gauge * share).astype(dtype), np.linalg.solve(gauge, down).astype(dtype)
    alpha = delta.known_scale() * delta.rank / share
    return lora(*made, alpha)


def dense(delta: Delta) -> NDArray[np.float64]:
    return delta.load().rows(0, delta.shape[0])


def verdict(one: Adapter, other: Adapter) -> tuple[Verdict, Comparison]:
    found = compare(one, other)
    assert isinstance(found, Comparison)
    return found.verdict, found


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(1, 12), st.sampled_from([np.float64, np.float32, np.float16, ml_dtypes.bfloat16]),
    st.sampled_from([1.0, 0.25, -3.0, 1.7]), st.integers(0, 2),
)  # fmt: skip
def test_a_change_of_gauge_is_no_change(seed: int, rank: int, dtype: Any, share: float, more: int) -> None:
    """up G, G^-1 down with any invertible G, a scale moved between alpha and factors, zero columns added: one dW."""
    rng = np.random.default_rng(seed)
    delta = lora(*pair(seed, rank), 4.0)
    left, _ = np.linalg.qr(rng.standard_normal((rank, rank)))
    other = turned(delta, left * np.exp(rng.uniform(-0.7, 0.7, rank)), dtype, share)
    if more:
        up, down = other.up.read(), other.down.read()
        up = np.concatenate([up, np.zeros((len(up), more), up.dtype)], axis=1)
        down = np.concatenate([down, np.ones((more, down.shape[1]), down.dtype)])
        other = lora(up, down, other.known_scale() * (rank + more))
    for one, two in ((delta, other), (other, delta)):
        found = compare_deltas("m", one, two)
        assert found.alike is Alike.EQUAL or np.array_equal(dense(one), dense(two))
        gap = np.linalg.norm(dense(one) - dense(two)) / max(np.linalg.norm(dense(one)), np.linalg.norm(dense(two)))
        assert found.distance is not None and found.tolerance is not None
        assert found.distance == pytest.approx(gap, abs=3e-7) and gap <= found.tolerance


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6), st.sampled_from([0.0, 1e-4, 1e-2, 0.3, 1.0]), st.sampled_from([np.float64, np.float32, np.float16]), st.integers(2, 12),
    st.integers(2, 12),
)  # fmt: skip
def test_numbers_are_those_of_dense_matrices(seed: int, mixed: float, dtype: Any, rank: int, rank2: int) -> None:
    up, down = pair(seed, rank, dtype=dtype)
    up2, down2 = pair(seed + 1, rank2, dtype=dtype)
    if rank == rank2:
        up2 = ((1 - mixed) * up.astype(np.float64) + mixed * up2.astype(np.float64)).astype(dtype)
        down2 = ((1 - mixed) * down.astype(np.float64) + mixed * down2.astype(np.float64)).astype(dtype)
    one, other = lora(up, down, 2.0), lora(up2, down2, 3.0)
    found = compare_deltas("m", one, other)
    first, second = dense(one), dense(other)
    norms = [float(np.linalg.norm(part)) for part in (first, second)]
    assert found.norms == pytest.approx(norms, rel=2e-6)
    assert found.cosine == pytest.approx(float((first * second).sum()) / norms[0] / norms[1], abs=1e-6)
    assert found.distance == pytest.approx(float(np.linalg.norm(first - second)) / max(norms), rel=2e-5, abs=1e-6)
    assert found.multiplier == pytest.approx(float((first * second).sum()) / norms[0] ** 2, abs=1e-5)
    if found.columns is not None and found.rows is not None:
        for angles, ours, theirs in ((found.columns, up, up2), (found.rows, down.T, down2.T)):
            meant = np.degrees(scipy.linalg.subspace_angles(ours.astype(np.float64), theirs.astype(np.float64)))
            assert (angles.largest, angles.smallest) == pytest.approx((meant[0], meant[-1]), abs=0.02)
            assert angles.overlap == pytest.approx(float(np.square(np.cos(np.radians(meant))).mean()), abs=1e-4)


def test_float32_products_say_different_only_where_float64_does() -> None:
    """The quick way and the exact one side by side, from far apart to equal."""
    precision = Precision(2.0**-24, 2.0**-150)
    for seed in range(3):
        up, down = pair(seed)
        for mixed in (1.0, 0.5, 0.2, 0.05, 1e-3, 0.0):
            other = tuple(
                ((1 - mixed) * mine + mixed * theirs).astype(np.float32) for mine, theirs in zip((up, down), pair(seed + 50), strict=True)
            )
            found = compare_deltas("m", lora(up, down), lora(*other))
            forms = [Form(*factors, 1.0, precision) for factors in ((up, down), other)]  # type: ignore[arg-type]
            exact = Pair(forms[0], forms[1]).relation()
            coarse = Pair(forms[0], forms[1], coarse=True).relation()
            assert coarse.squares == pytest.approx(exact.squares, rel=1e-5)
            assert abs(coarse.distance() - exact.distance()) <= coarse.floor
            assert (found.alike is Alike.DIFFERENT) == (mixed >= 0.2)


def test_the_same_bits_in_another_dialect(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "one", 1, 4, 8)
    open_adapter(folder).save(tmp_path / "two", "triad")
    kind, found = verdict(open_adapter(folder), open_adapter(tmp_path / "two"))
    assert kind is Verdict.BITS and found.exit_code == 0 and found.cosine == pytest.approx(1.0) and found.distance == 0.0
    assert found.norms is not None and found.norms[0] == pytest.approx(found.norms[1])


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_rounded_to_a_narrower_dtype(tmp_path: Path, dtype: str) -> None:
    folder = peft_folder(tmp_path / "one", 1, 4, 8)
    edit(folder, tmp_path / "two", dtype=dtype)
    for one, other in (("one", "two"), ("two", "one")):
        kind, found = verdict(open_adapter(tmp_path / one), open_adapter(tmp_path / other))
        assert kind is Verdict.EQUAL and {module.alike for module in found.modules} == {Alike.ROUNDED}
        assert "rounded to the narrower dtype" in found.summary


def test_equal_through_other_factors() -> None:
    one = several(1)
    rng = np.random.default_rng(0)
    kind, found = verdict(one, mapped(one, lambda delta: turned(delta, rng.standard_normal((8, 8)), np.float32)))
    assert kind is Verdict.EQUAL and found.counts() == {"equal": 4}
    assert verdict(one, mapped(one, lambda delta: turned(delta, np.eye(8), np.float32, 0.5)))[0] is Verdict.EQUAL


def test_scaled_as_a_whole_and_by_module() -> None:
    one = several(1)
    kind, found = verdict(one, mapped(one, lambda delta: replace(delta, scaling=Scaling(alpha=6.0))))
    assert kind is Verdict.SCALED and found.multiplier == pytest.approx(1.5) and found.exit_code == 1
    numbers = iter((0.5, 1.0, 2.0, -1.0))
    kind, found = verdict(one, mapped(one, lambda delta: replace(delta, scaling=Scaling(alpha=4.0 * next(numbers)))))
    assert kind is Verdict.SCALED and found.multiplier is None and "from -1 to 2" in found.summary


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("swapped", [False, True])
def test_resized_is_recognised_from_both_sides(dtype: Any, swapped: bool) -> None:
    one = several(1, 12, dtype)
    small, _ = resized(one, RankRule(5))
    kind, found = verdict(small, one) if swapped else verdict(one, small)
    assert kind is Verdict.RESIZED and f"the {'first' if swapped else 'second'} is the" in found.summary
    assert all(module.facts()["smaller"] == ("first" if swapped else "second") for module in found.modules)


def test_a_low_rank_piece_that_is_not_the_best_is_not_resized() -> None:
    one = several(1, 12)

    def worst(delta: LoRA) -> LoRA:
        left, sigma, right = np.linalg.svd(dense(delta), full_matrices=False)
        kept = slice(1, 6)  # without the largest
        return lora((left[:, kept] * sigma[kept]).astype(np.float32), right[kept].astype(np.float32))

    assert verdict(one, mapped(one, worst))[0] is not Verdict.RESIZED


def test_near_duplicates_are_not_called_equal() -> None:
    """Through 8 bits and back, or 3 % of other training: near, at any dtype they are stored in."""
    one = several(1, dtype=np.float16)

    def coarse(delta: LoRA) -> LoRA:
        return lora(*(part.read().astype(ml_dtypes.float8_e4m3fn).astype(np.float16) for part in (delta.up, delta.down)), 4.0)

    kind, found = verdict(one, mapped(one, coarse))
    assert kind is Verdict.NEAR and found.cosine is not None and found.cosine > 0.995
    rng = np.random.default_rng(3)

    def trained_on(delta: LoRA) -> LoRA:
        up, down = delta.up.doubles(), delta.down.doubles()
        up += 0.03 * np.linalg.norm(up) * rng.standard_normal(up.shape) / np.sqrt(up.size)
        return lora(up.astype(np.float16), down.astype(np.float16), 4.0)

    assert verdict(one, mapped(one, trained_on))[0] is Verdict.NEAR


@pytest.mark.parametrize("moved", [1e-5, 1e-4, 1e-3])
def test_little_training_shows_in_float32(moved: float) -> None:
    one = several(1)
    rng = np.random.default_rng(4)

    def trained_on(delta: LoRA) -> LoRA:
        up = delta.up.doubles()
        up *= 1 + moved * rng.standard_normal(up.shape)
        return lora(up.astype(np.float32), delta.down.read(), 4.0)

    assert verdict(one, mapped(one, trained_on))[0] is Verdict.NEAR


def test_partly_related_and_unrelated() -> None:
    one, other = several(1), several(2)
    mixed = replace(one, deltas={**one.deltas, Target("a"): other.deltas[Target("a")]})
    kind, found = verdict(one, mixed)
    assert kind is Verdict.PARTLY and "3 of 4 common modules are the same" in found.summary
    kind, found = verdict(one, other)
    assert kind is Verdict.UNRELATED and abs(found.cosine or 1) < (found.chance or 0) < 0.5
    half = adapter({
        target.module: lora(
            np.concatenate([delta.up.read(), theirs.up.read()], axis=1), np.concatenate([delta.down.read(), theirs.down.read()]), 8.0
        )
        for (target, delta), theirs in zip(one.deltas.items(), other.deltas.values(), strict=True)
        if isinstance(delta, LoRA) and isinstance(theirs, LoRA)
    })  # fmt: skip
    kind, found = verdict(one, half)
    assert kind is Verdict.RELATED and found.cosine == pytest.approx(0.7, abs=0.2)
    strangers = adapter({"x": lora(*pair(1))}, base=BaseHint("sdxl", 1.0))
    assert verdict(replace(one, base=BaseHint("sdxl", 1.0)), strangers)[0] is Verdict.UNRELATED


def test_a_shared_start_is_told() -> None:
    """Two trainings from one seed: the same down factors at first, other ups."""
    one = several(1, 4)
    other = adapter({
        target.module: lora(pair(900 + number, 4)[0], delta.down.read(), 4.0)
        for number, (target, delta) in enumerate(one.deltas.items()) if isinstance(delta, LoRA)
    })  # fmt: skip
    _, found = verdict(one, other)
    assert [finding.code for finding in found.findings] == ["same-rows"]
    assert found.modules[0].rows is not None and found.modules[0].rows.overlap == pytest.approx(1.0, abs=1e-3)


def test_what_cannot_be_compared_is_not_guessed() -> None:
    up, down = pair(1)
    other = adapter({"m": lora(*pair(2, shape=(40, 80)))})
    kind, found = verdict(adapter({"m": lora(up, down)}), other)
    assert kind is Verdict.UNDECIDED and "other shapes" in found.modules[0].reason
    broken = up.copy()
    broken[3, 2] = np.nan
    kind, found = verdict(adapter({"m": lora(broken, down)}), adapter({"m": lora(up, down)}))
    assert kind is Verdict.UNDECIDED and "not finite" in found.modules[0].reason
    assert verdict(adapter({"m": lora(broken, down)}), adapter({"m": lora(broken, down)}))[0] is Verdict.BITS
    vector = IA3(Tensor.of(np.ones((96, 1), np.float32)))
    assert compare_deltas("m", vector, lora(up, down)).alike is Alike.INCOMPARABLE
    assert compare_deltas("m", vector, IA3(Tensor.of(np.ones((96, 1), np.float32)))).alike is Alike.BITS
    with pytest.raises(RefusedError, match="different ways"):
        compare(adapter({"m": lora(up, down)}), adapter({"n": lora(up, down)}, layout="kohya"))
    with pytest.raises(UsageError, match="no such verdict"):
        compare(other, other, accept=["alike"])


def test_unknown_scales_are_left_out_of_the_comparison() -> None:
    up, down = pair(1)
    unknown, known = LoRA(Tensor.of(up), Tensor.of(down), Scaling(ScaleRule.UNKNOWN)), lora(up, down, 4.0)
    assert compare_deltas("m", unknown, replace(unknown)).alike is Alike.BITS
    half = compare_deltas("m", unknown, known)
    assert half.alike is Alike.SCALED and half.multiplier is None and "not in the files" in half.reason
    other = compare_deltas("m", unknown, lora(*pair(2), 4.0))
    assert other.alike is Alike.DIFFERENT and other.multiplier is None


def test_magnitudes_count() -> None:
    up, down = pair(1)
    magnitude = np.abs(np.random.default_rng(0).standard_normal((96, 1))).astype(np.float32)

    def dora(factors: tuple[Array, Array], by: float) -> DoRA:
        return DoRA(Tensor.of(factors[0]), Tensor.of(factors[1]), Tensor.of(magnitude * np.float32(by)), Scaling(alpha=4.0))

    gauge = np.diag(np.linspace(0.5, 2, 8)).astype(np.float32)
    other = ((up @ gauge).astype(np.float32), np.linalg.solve(gauge, down).astype(np.float32))
    assert compare_deltas("m", dora((up, down), 1), dora(other, 1)).alike is Alike.EQUAL
    assert compare_deltas("m", dora((up, down), 1), dora(other, 1.01)).alike is Alike.DIFFERENT
    assert compare_deltas("m", dora((up, down), 1), lora(up, down, 4.0)).alike is Alike.INCOMPARABLE


def test_other_algorithms_by_their_dw() -> None:
    rng = np.random.default_rng(0)
    parts = [rng.standard_normal(shape).astype(np.float32) for shape in ((96, 3), (3, 80), (96, 3), (3, 80))]
    loha = LoHa(*map(Tensor.of, parts), scaling=Scaling(alpha=3.0))
    whole = dense(loha)
    assert compare_deltas("m", loha, Full(Tensor.of(whole.astype(np.float32)))).alike is Alike.EQUAL
    best = np.linalg.svd(whole, full_matrices=False)
    plain = lora((best[0][:, :9] * best[1][:9]).astype(np.float32), best[2][:9].astype(np.float32))
    found = compare_deltas("m", loha, plain)
    assert found.alike is Alike.EQUAL and found.algorithms == ("loha", "lora")
    assert compare_deltas("m", Full(Tensor.of((whole * 0.9).astype(np.float32))), loha).alike is Alike.SCALED


def test_parts_of_a_fused_weight_against_the_whole() -> None:
    whole = lora(*pair(1), 4.0)
    parts = Adapter({Target("m", (at, at + 32)): cut(whole, at, at + 32) for at in (0, 32, 64)}, "test")
    kind, found = verdict(parts, adapter({"m": whole}))
    assert kind is Verdict.BITS and len(found.modules) == 1


def test_what_only_one_has() -> None:
    one = several(1)
    zero = adapter(
        {
            **{target.module: delta for target, delta in one.deltas.items()},
            "z": lora(np.zeros((96, 2), np.float32), np.ones((2, 80), np.float32)),
        }
    )
    kind, found = verdict(one, zero)
    assert kind is Verdict.BITS and found.alone[0].norm == 0.0
    more = adapter({**{target.module: delta for target, delta in one.deltas.items()}, "z": lora(*pair(9))})
    kind, found = verdict(one, more)
    assert kind is Verdict.PARTLY and "1 module only in the second" in found.summary


def test_saved_tensors_count() -> None:
    def having(value: Array) -> Adapter:
        return replace(several(1), extras=[Extra(ExtraKind.SAVED_MODULE, "head.weight", Tensor.of(value))])

    head = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)
    assert verdict(having(head), having(head))[0] is Verdict.BITS
    assert verdict(having(head), having(head.astype(np.float16)))[0] is Verdict.EQUAL
    kind, found = verdict(having(head), having(head * 1.5))
    assert kind is Verdict.PARTLY and found.extras[0].distance == pytest.approx(1 / 3, rel=1e-6)
    assert verdict(having(head), several(1))[0] is Verdict.PARTLY


def test_what_resize_and_combine_leave(tmp_path: Path) -> None:
    """resize after concat gives the first back; the sum with its negative is nothing."""
    folder = peft_folder(tmp_path / "one", 1, 4, 8)
    combine([(folder, 0.5), (folder, 0.5)], tmp_path / "twice")
    assert verdict(open_adapter(folder), open_adapter(tmp_path / "twice"))[0] is Verdict.EQUAL
    resize(tmp_path / "twice", tmp_path / "back", RankRule(4))
    assert verdict(open_adapter(folder), open_adapter(tmp_path / "back"))[0] is Verdict.EQUAL
    combine([(folder, 1.0), (folder, -1.0)], tmp_path / "nothing")
    kind, found = verdict(open_adapter(folder), open_adapter(tmp_path / "nothing"))
    assert kind is Verdict.UNRELATED and found.norms is not None and found.norms[1] <= 1e-6 * found.norms[0]


def test_nothing_but_angles_is_missing_without_angles() -> None:
    """Trained apart, turned, resized: verdict and numbers are the same, whether angles are asked for or not."""
    base = several(1, rank=12, dtype=np.float16)
    others = [
        several(2, rank=12, dtype=np.float16),
        mapped(base, lambda delta: turned(delta, np.eye(12)[::-1] * 0.5, np.float32)),
        resized(base, RankRule(5))[0],
    ]
    for other in others:
        told, quick = (compare(base, other, angles=angles).facts() for angles in (True, False))
        for module in (*told["modules"], *quick["modules"]):
            module["columns"] = module["rows"] = None
        assert {**told, "findings": []} == {**quick, "findings": []}


def test_threads_do_not_matter() -> None:
    one, other = several(1), several(2)
    assert compare(one, other, threads=1).facts() == compare(one, other, threads=4).facts()


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = peft_folder(tmp_path / "one", 1, 4, 8), peft_folder(tmp_path / "other", 2, 3, 3)
    assert main(["compare", str(one), str(one)]) == 0
    assert "bit-equal" in capsys.readouterr().out
    assert main(["compare", str(one), str(other), "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert facts["verdict"] == "unrelated" and len(facts["modules"]) == 2 and facts["modules"][0]["columns"]["number"] == 3
    assert main(["compare", str(one), str(other), "--accept", "unrelated", "-q"]) == 0
    assert main(["compare", str(one), str(tmp_path / "absent")]) == 3
    assert main(["compare", str(one), str(other), "--all"]) == 1
    assert "self_attn.q_proj" in capsys.readouterr().out


def stored(delta: LoRA, dtype: Any, share: float = 1.0) -> LoRA:
    """share * dW through the same factors in another dtype."""
    up, down = delta.matrices()
    return lora((up * share).astype(dtype), down.astype(dtype), delta.alpha)


def test_a_hundredth_is_not_rounding() -> None:
    """bf16 rounds by up to 0.4 %, this way and that: a multiplier that every module shares is none of it, nor is 1 % of noise."""
    one = several(1)
    narrow = mapped(one, lambda delta: stored(delta, ml_dtypes.bfloat16))
    for share in (1.01, 0.99, 1.004):
        for first in (one, narrow):
            kind, found = verdict(first, mapped(one, lambda delta, share=share: stored(delta, ml_dtypes.bfloat16, share)))
            assert kind is Verdict.SCALED and found.exit_code == 1
            assert found.multiplier == pytest.approx(share, abs=5e-4)
    rng = np.random.default_rng(5)

    def noisy(delta: LoRA) -> LoRA:
        up, down = delta.matrices()
        return lora(*((part * (1 + 0.01 * rng.standard_normal(part.shape))).astype(ml_dtypes.bfloat16) for part in (up, down)), 4.0)

    assert verdict(narrow, mapped(one, noisy))[0] is Verdict.NEAR


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 4, 16]), st.sampled_from([np.float16, ml_dtypes.bfloat16]))
def test_rounding_twice_is_still_equal(seed: int, rank: int, dtype: Any) -> None:
    """Through fp16 and back, and another gauge made of the rounded factors and rounded again."""
    delta = lora(*pair(seed, rank, shape=(256, 192)), 4.0)
    narrow = stored(delta, dtype)
    left, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((rank, rank)))
    for other in (stored(stored(delta, np.float16), dtype), turned(narrow, left, dtype), turned(turned(narrow, left, dtype), left, dtype)):
        for one in (delta, narrow):
            found = compare_deltas("m", one, other)
            assert found.alike in (Alike.BITS, Alike.ROUNDED, Alike.EQUAL), (found.distance, found.tolerance, found.multiplier)


def test_a_distance_that_float64_cannot_tell_is_said_as_that() -> None:
    """Subtracting squares leaves 1e-8 to 1e-7 of the norms: less is not said, nor is 0 of factors that differ."""
    for seed in range(20):
        delta = lora(*pair(seed), 4.0)
        other = turned(delta, np.linalg.qr(np.random.default_rng(seed).standard_normal((8, 8)))[0], np.float32)
        found = compare_deltas("m", delta, other)
        gap = np.linalg.norm(dense(delta) - dense(other)) / np.linalg.norm(dense(delta))
        assert found.alike is Alike.EQUAL and found.distance is not None and 0.5 * gap < found.distance < 2e-6


def times(one: Adapter, numbers: list[float], dtype: Any, seed: int) -> Adapter:
    """Each module's dW times its number, through other factors (a rotation of the given ones), rounded once to the dtype."""
    rng, each = np.random.default_rng(seed), iter(numbers)

    def change(delta: LoRA) -> LoRA:
        up, down = delta.matrices()
        gauge = np.linalg.qr(rng.standard_normal((delta.rank, delta.rank)))[0]
        return lora((up @ gauge * next(each)).astype(dtype), (gauge.T @ down).astype(dtype), delta.alpha)

    return mapped(one, change)


def various(seed: int, dtype: Any) -> Adapter:
    """Six modules of ranks from 1 to 16 and sides from 60 to 300, whose multipliers rounding scatters by very different amounts."""
    rng = np.random.default_rng(seed)
    shapes = [((int(rng.integers(60, 300)), int(rng.integers(60, 300))), int(rng.choice([1, 2, 4, 16]))) for _ in range(6)]
    return adapter({f"m{number}": lora(*pair(10 * seed + number, rank, shape, dtype), 4.0) for number, (shape, rank) in enumerate(shapes)})


SCATTER = {np.float32: 2e-5, np.float16: 1e-3, ml_dtypes.bfloat16: 8e-3}
"""More than rounding moves the multiplier of any module of `various`."""


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(list(SCATTER)), st.sampled_from([1.01, 0.5003, -2.7, 1e-3, 40.0]))
def test_one_multiplier_of_all_modules_is_found_through_rounding(seed: int, dtype: Any, number: float) -> None:
    kind, found = verdict(one := various(seed, dtype), times(one, [number] * 6, dtype, seed))
    assert kind is Verdict.SCALED and "the same in all 6 modules within" in found.summary, found.summary
    assert found.multiplier is not None and abs(found.multiplier / number - 1) < SCATTER[dtype] / 4
    for module in found.modules:
        assert module.certainty is not None and module.certainty < SCATTER[dtype]
        assert module.multiplier is not None and abs(module.multiplier / number - 1) <= module.certainty


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(list(SCATTER)), st.sampled_from([1.01, 0.5003, -2.7]), st.integers(0, 5))
def test_a_module_with_a_multiplier_of_its_own_shows(seed: int, dtype: Any, number: float, which: int) -> None:
    """By two to three times what rounding explains: in bf16 1.6 %, which is less than its deltas may be apart."""
    numbers = [number] * 6
    numbers[which] *= 1 + 2 * SCATTER[dtype]
    kind, found = verdict(one := various(seed, dtype), times(one, numbers, dtype, seed))
    assert kind is Verdict.SCALED and found.multiplier is None
    told = re.search(r"times (.+) in 5 of 6 modules; in the rest times (.+), further", found.summary)
    assert told is not None, found.summary
    assert float(told[1]) == pytest.approx(number, rel=SCATTER[dtype] / 4)
    assert float(told[2]) == pytest.approx(numbers[which], rel=SCATTER[dtype])


@pytest.mark.parametrize("dtype", list(SCATTER))
@pytest.mark.parametrize("seed", range(5))
def test_multipliers_that_differ_by_little_are_told_from_one(dtype: Any, seed: int) -> None:
    """A ramp, and half of the modules unchanged: each is equal or scaled for itself, all together no multiple."""
    step, one = SCATTER[dtype], various(seed, dtype)
    kind, found = verdict(one, times(one, [0.8 * (1 + step * at) for at in range(0, 12, 2)], dtype, seed))
    assert kind is Verdict.SCALED and found.multiplier is None and "a number of its own, from " in found.summary
    kind, found = verdict(one, times(one, [1.0, 1 + 2 * step] * 3, dtype, seed))
    assert kind is Verdict.SCALED and found.multiplier is None and found.counts()["scaled"] == 3
    first = next(iter(one.deltas))
    kind, found = verdict(
        one, mapped(one, lambda delta: replace(delta, scaling=Scaling(alpha=4.0 * (1 + 2 * step))) if delta is one.deltas[first] else delta)
    )
    assert kind is Verdict.SCALED and "times 1 in 5 of 6 modules; in the rest" in found.summary


def test_modules_too_small_to_tell_the_multiplier_share_it() -> None:
    """Where a small module alone counts as equal and a large one shows 1.002, both are the same multiple."""
    for seed in range(20):
        one = adapter({"small": lora(*pair(seed, 1, (30, 20)), 1.0), "large": lora(*pair(seed + 50, 32, (500, 400)), 32.0)})
        kind, found = verdict(one, times(one, [1.002] * 2, ml_dtypes.bfloat16, seed))
        assert found.counts() == {"equal": 1, "scaled": 1} and kind is Verdict.SCALED
        assert "the same in all 2 modules" in found.summary and found.multiplier == pytest.approx(1.002, abs=3e-4)


@pytest.mark.parametrize("shape", [(96, 80), (300, 520)])  # the larger goes through in several blocks, the last not a whole one
@pytest.mark.parametrize("size", [1.0, 1e-15, 1e15])
def test_what_rounding_scatters_a_multiplier_by(size: float, shape: tuple[int, int]) -> None:
    """Against the formula in float64, whatever the size of the factors: <e, slope> of independent errors e of a third of unit^2 x^2 + step^2."""
    for precision in (Precision(2.0**-9, 0.0), Precision(2.0**-11, 2.0**-25 * size)):
        forms = [Form(*(part * size for part in pair(seed, 5, shape)), 3.0, precision) for seed in (1, 2)]
        expected = 0.0
        for form in forms:
            up, down = form.up.astype(np.float64), form.down.astype(np.float64)
            slopes = (up, up @ (down @ down.T)), (down, (up.T @ up) @ down)
            for part, slope in slopes:
                expected += (
                    float((((precision.unit * part) ** 2 + precision.step**2) * slope**2).sum()) / 3 / float(np.linalg.norm(up @ down)) ** 4
                )
        assert Pair(forms[0], forms[1]).sway() == pytest.approx(expected**0.5, rel=1e-4)


@pytest.mark.parametrize("dtype", list(SCATTER))
def test_what_one_module_tells_beforehand_changes_no_verdict(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The multiplier of one module spares the others the sums over their elements, unless one of them may have another."""
    swayed: list[Pair] = []
    plain = Pair.sway
    monkeypatch.setattr(Pair, "sway", lambda pair: swayed.append(pair) or plain(pair))
    step = SCATTER[dtype]
    spared = 0
    for seed in range(8):
        one = various(seed, dtype)
        own = [0.7] * 6
        own[seed % 6] *= 1 + 2 * step
        for numbers in ([0.7] * 6, own, [0.8 * (1 + step * at) for at in range(0, 12, 2)], [1.0, 1 + 2 * step] * 3):
            other = times(one, numbers, dtype, seed)
            told, sums = [], []
            for many in (10**9, 1):
                monkeypatch.setattr(adapters, "_MANY", many)
                swayed.clear()
                kind, found = verdict(one, other)
                told.append((kind, found.counts(), re.sub(r"within .*", "", found.summary), found.multiplier is None))
                sums.append(len(swayed))
            assert told[0] == told[1]
            spared += sums[0] - sums[1] if numbers == [0.7] * 6 else 0
    assert spared > 8 * 6 // 2
