"""combine's methods against PEFT's add_weighted_adapter, numpy in float64, and readers that load what comes out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.operations.merging import adapter, lora
from tests.operations.test_combine import dense, factors, peft_folder

from upparam.adapter import Adapter, Target
from upparam.algorithms.base import Scaling
from upparam.algorithms.dora import DoRA
from upparam.algorithms.full import Full, Norm
from upparam.algorithms.ia3 import IA3
from upparam.algorithms.loha import LoHa
from upparam.algorithms.lokr import LoKr
from upparam.algorithms.lora import LoRA
from upparam.algorithms.lowrank import RankRule
from upparam.algorithms.slicing import cut, join
from upparam.cli import main
from upparam.dialects.base import ReadOptions
from upparam.errors import MalformedError, MismatchError, RefusedError, UsageError
from upparam.operations.combine import METHODS, combine, combined
from upparam.operations.combine.sparse import largest
from upparam.operations.merge.blocks import parse
from upparam.operations.opening import open_adapter
from upparam.tensors import Tensor

NAMES = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)]


def llama() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4
    )
    return transformers.LlamaForCausalLM(config)


def theirs(folders: list[Path], weights: list[float], method: str, **options: Any) -> list[NDArray[np.float64]]:
    """dW of each layer as PEFT combines the adapters."""
    peft = pytest.importorskip("peft")
    model = peft.PeftModel.from_pretrained(llama(), folders[0], adapter_name="0")
    for number, folder in enumerate(folders[1:], 1):
        model.load_adapter(folder, adapter_name=str(number))
    model.add_weighted_adapter([str(number) for number in range(len(folders))], weights, "sum", combination_type=method, **options)
    layers = model.base_model.model.model.layers
    return [layer.self_attn.q_proj.get_delta_weight("sum").detach().numpy().astype(np.float64) for layer in layers]


def close(found: NDArray[np.float64], meant: NDArray[np.float64], tolerance: float) -> bool:
    return float(np.linalg.norm(found - meant)) <= tolerance * float(np.linalg.norm(meant))


@pytest.mark.parametrize("weights", [[0.8, 0.5, 1.0], [1.0, -0.7, 0.4]])
@pytest.mark.parametrize("method", ["linear", "ties", "magnitude_prune", "svd", "ties_svd", "magnitude_prune_svd"])
def test_peft_combines_to_the_same(tmp_path: Path, method: str, weights: list[float]) -> None:
    folders = [peft_folder(tmp_path / str(number), number, 4, 2 * number + 3) for number in range(3)]
    density = 0.4 if METHODS[method].prune else None
    expected = theirs(folders, weights, method, density=density, svd_rank=6 if METHODS[method].cut else None)
    rule = RankRule(6) if METHODS[method].cut else None
    receipt = combine(list(zip(folders, weights, strict=True)), tmp_path / "ours", method=method, density=density, rule=rule)
    assert method in receipt.operation and receipt.counts["form"] == METHODS[method].form
    ours = open_adapter(tmp_path / "ours")
    for name, meant in zip(NAMES, expected, strict=True):
        assert ours.deltas[Target(name)].rank == (6 if rule else 4)
        assert close(dense(ours, name), meant, 2e-6 if rule is None else 2e-5)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
def test_peft_with_our_draws_combines_to_the_same(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The draws come from another generator than torch's; given ours, PEFT's arithmetic is the same."""
    import zlib

    import torch

    folders = [peft_folder(tmp_path / str(number), number, 4, 8) for number in range(2)]
    on_factors = METHODS[method].form == "factors"

    def draws() -> Iterator[NDArray[np.bool_]]:
        for name in NAMES:
            for role in (1, 0) if on_factors else (2,):  # PEFT does lora_A, our down, first
                shape = {0: (32, 4), 1: (4, 32), 2: (32, 32)}[role]
                for number in range(2):
                    yield np.random.default_rng((7, zlib.crc32(name.encode()), number, role)).random(shape, np.float32) < 0.5

    pending = draws()
    monkeypatch.setattr(torch, "bernoulli", lambda _: torch.from_numpy(next(pending).astype(np.float32)))
    expected = theirs(folders, [0.8, -0.5], method, density=0.5, svd_rank=None if on_factors else 5)
    assert next(pending, None) is None
    rule = None if on_factors else RankRule(5)
    combine([(folders[0], 0.8), (folders[1], -0.5)], tmp_path / "ours", method=method, density=0.5, seed=7, rule=rule)
    ours = open_adapter(tmp_path / "ours")
    for name, meant in zip(NAMES, expected, strict=True):
        assert close(dense(ours, name), meant, 2e-6 if on_factors else 2e-5)


def test_random_pruning_keeps_the_mean_and_its_seed() -> None:
    items = [(adapter({"m": lora(*factors(seed), alpha=6.0)}), weight) for seed, weight in ((1, 0.8), (2, -0.5))]
    meant = sum(weight * dense(one) for one, weight in items)

    def once(seed: int, threads: int = 1) -> NDArray[np.float64]:
        return dense(combined(items, method="dare_linear_svd", density=0.5, seed=seed, rule=RankRule(10), threads=threads).adapter)

    draws = [once(seed) for seed in range(400)]
    size = float(np.linalg.norm(meant))
    assert close(np.mean(draws, axis=0), meant, 0.15)  # each draw is off by about the size of dW, 400 of them by a twentieth of that
    assert np.mean([np.linalg.norm(draw - meant) for draw in draws]) > 0.5 * size
    np.testing.assert_array_equal(once(3), once(3, threads=4))
    assert not np.array_equal(once(3), once(4))
    whole = combined(items, method="dare_linear_svd", density=1.0, rule=RankRule(10)).adapter
    assert close(dense(whole), meant, 1e-6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=40), st.floats(0, 1))
def test_exactly_so_many_are_kept(values: list[int], density: float) -> None:
    array = np.array(values, np.float32)
    keep = largest(array, int(density * array.size))
    assert int(keep.sum()) == int(density * array.size)
    if keep.any() and not keep.all():
        assert np.abs(array[keep]).min() >= np.abs(array[~keep]).max()


@settings(max_examples=60, deadline=None)
@given(st.integers(4096, 20_000), st.floats(0, 1), st.sampled_from(["apart", "ties", "columns", "sorted", "same"]), st.integers(0, 99))
def test_the_largest_of_many_are_those_of_a_sort(size: int, density: float, kind: str, seed: int) -> None:
    """What a sample says of the others may be wrong: of columns of different sizes, of values in order, of many equal ones."""
    random = np.random.default_rng(seed)
    array = random.standard_normal(size)
    if kind == "ties":
        array = random.integers(-3, 4, size).astype(np.float64)
    elif kind == "columns":
        array *= np.logspace(0, -6, 16)[np.arange(size) % 16]
    elif kind == "sorted":
        array.sort()
    elif kind == "same":
        array[:] = -2.0
    count = int(density * size)
    meant = np.zeros(size, bool)
    meant[np.argsort(-np.abs(array), kind="stable")[:count]] = True
    np.testing.assert_array_equal(largest(array, count), meant)


def test_orthogonal_takes_out_what_is_shared() -> None:
    random = np.random.default_rng(0)
    shared_up, shared_down = random.standard_normal((12, 1)), random.standard_normal((1, 10))
    items = []
    for seed, weight in ((1, 1.0), (2, 0.5), (3, -2.0)):
        up, down = factors(seed, 2, np.float64)
        up, down = np.concatenate([up, shared_up], axis=1), np.concatenate([down, shared_down])
        items.append((adapter({"m": lora(up.astype(np.float32), down.astype(np.float32), alpha=6.0)}), weight))
    result = combined(items, method="orthogonal")
    delta = result.adapter.deltas[Target("m")]
    assert isinstance(delta, LoRA) and delta.rank == 9
    up, down = delta.matrices()
    parts = [delta.known_scale() * up[:, at : at + 3] @ down[at : at + 3] for at in (0, 3, 6)]
    whole = [weight * dense(one) for one, weight in items]
    assert close(parts[0], whole[0], 1e-6)
    for later, earlier in ((1, 0), (2, 0), (2, 1)):
        size = float(np.linalg.norm(whole[later]) * np.linalg.norm(whole[earlier]))
        assert np.linalg.norm(parts[earlier].T @ parts[later]) <= 1e-6 * size
        assert np.linalg.norm(parts[earlier] @ parts[later].T) <= 1e-6 * size
    before: list[NDArray[np.float64]] = []
    for number, part in enumerate(whole):  # the stated formula, in numpy
        columns = np.linalg.svd(np.concatenate([np.zeros((12, 1)), *before], axis=1))
        rows = np.linalg.svd(np.concatenate([np.zeros((10, 1)), *[one.T for one in before]], axis=1))
        off = []
        for basis in (columns, rows):
            own = basis[0][:, : int((basis[1] > 1e-6).sum())]
            off.append(np.eye(len(own)) - own @ own.T)
        meant = off[0] @ part @ off[1]
        assert close(parts[number], meant, 1e-5)
        left = result.modules[0]["left"][str(number)]
        assert left == pytest.approx(np.linalg.norm(meant) / np.linalg.norm(part), abs=1e-5)
        before.append(part)
    nothing = combined([(items[0][0], 1.0), (items[0][0], 1.0)], method="orthogonal")
    assert nothing.modules[0]["left"] == {"0": 1.0, "1": 0.0} and close(dense(nothing.adapter), whole[0], 1e-6)


def loha(seed: int) -> LoHa:
    random = np.random.default_rng(seed)
    parts = [Tensor.of(random.standard_normal(shape).astype(np.float32)) for shape in ((12, 2), (2, 10), (12, 2), (2, 10))]
    return LoHa(*parts, scaling=Scaling(alpha=1.0))


def tucker(seed: int) -> LoRA:
    random = np.random.default_rng(seed)
    shapes = ((12, 2, 1, 1), (2, 10, 1, 1), (2, 2, 3, 3))
    up, down, mid = (Tensor.of(random.standard_normal(shape).astype(np.float32)) for shape in shapes)
    return LoRA(up, down, Scaling(alpha=1.0), mid)


def lokr(seed: int) -> LoKr:
    """One of rank 300: it has no factors much narrower than itself."""
    random = np.random.default_rng(seed)
    parts = [Tensor.of(random.standard_normal(shape).astype(np.float32)) for shape in ((2, 2), (150, 160))]
    return LoKr(w1=parts[0], w2=parts[1])


def plain_conv(seed: int) -> LoRA:
    random = np.random.default_rng(seed)
    return lora(random.standard_normal((12, 3, 1, 1)).astype(np.float32), random.standard_normal((3, 10, 3, 3)).astype(np.float32), 2.0)


@pytest.mark.parametrize(
    ("one", "other"), [(loha(1), lora(*factors(2), alpha=6.0)), (loha(1), loha(2)), (tucker(1), plain_conv(2)), (tucker(1), tucker(2))]
)
@pytest.mark.parametrize("method", ["concat", "orthogonal", "svd"])
def test_other_algorithms_take_part_through_their_factors(one: Any, other: Any, method: str) -> None:
    items = [(adapter({"m": one}), 0.5), (adapter({"m": other}), -1.5)]
    rule = RankRule(12) if method == "svd" else None
    found = combined(items, method=method, rule=rule).adapter
    delta = found.deltas[Target("m")]
    assert type(delta) is LoRA and delta.mid is None and delta.shape == one.shape
    if method != "orthogonal":
        assert close(dense(found), sum(weight * dense(each) for each, weight in items), 1e-6)


@pytest.mark.parametrize("method", ["concat", "svd", "ties_svd"])
def test_a_delta_without_factors_is_cut_or_refused(method: str) -> None:
    random = np.random.default_rng(2)
    plain = lora(random.standard_normal((300, 3)).astype(np.float32), random.standard_normal((3, 320)).astype(np.float32), 6.0)
    items = [(adapter({"m": lokr(1)}), 1.0), (adapter({"m": plain}), 0.5)]
    if method == "concat":
        with pytest.raises(RefusedError, match="cannot be added to another by concatenation"):
            combined(items)
    density = 1.0 if METHODS[method].prune else None
    found = combined(items, method=method, density=density, rule=RankRule(20)).adapter
    assert type(found.deltas[Target("m")]) is LoRA
    if method != "ties_svd":
        meant = dense(items[0][0]) + 0.5 * dense(items[1][0])
        best = np.linalg.norm(np.linalg.svd(meant, compute_uv=False)[20:])
        assert np.linalg.norm(dense(found) - meant) <= 1.005 * best
    with pytest.raises(RefusedError, match="factors of plain LoRAs"):
        combined(items, method="linear")


def test_full_differences_and_norms_add_up() -> None:
    random = np.random.default_rng(0)
    matrices = [random.standard_normal((12, 10)).astype(np.float16) for _ in range(2)]
    vectors = [random.standard_normal(12).astype(np.float16) for _ in range(2)]
    items = [
        (adapter({"m": Full(Tensor.of(matrix)), "n": Norm(Tensor.of(vector))}), weight)
        for matrix, vector, weight in zip(matrices, vectors, (0.5, 2.0), strict=True)
    ]
    found = combined(items).adapter.deltas
    assert type(found[Target("m")]) is Full and type(found[Target("n")]) is Norm
    for name, parts in (("m", matrices), ("n", vectors)):
        meant = 0.5 * parts[0].astype(np.float64) + 2.0 * parts[1].astype(np.float64)
        np.testing.assert_allclose(found[Target(name)].factors()["diff"].read(), meant, rtol=1e-7, atol=1e-7)
    alone = combined([(adapter({"m": Full(Tensor.of(matrices[0]))}), 0.3)]).adapter
    np.testing.assert_allclose(dense(alone), 0.3 * matrices[0].astype(np.float64), rtol=1e-7)
    assert alone.deltas[Target("m")].scale == 1.0  # nothing but the difference itself is in a file


def test_what_depends_on_the_weight_stands_alone() -> None:
    up, down = factors(1)
    dora = DoRA(Tensor.of(up), Tensor.of(down), Tensor.of(np.ones(12, np.float32)), Scaling(alpha=6.0))
    other = adapter({"m": lora(*factors(2))})
    assert combined([(adapter({"m": dora}), 1.0), (adapter({"n": lora(up, down)}), 0.5)]).adapter.deltas[Target("m")] is dora
    with pytest.raises(RefusedError, match="cannot be weakened") as caught:
        combined([(adapter({"m": dora}), 0.5)])
    assert "upparam extract" in str(caught.value)
    for method in ("concat", "svd", "orthogonal", "linear"):
        with pytest.raises(RefusedError, match="a DoRA delta"):
            combined([(adapter({"m": dora}), 1.0), (other, 1.0)], method=method)


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("method", ["concat", "svd", "linear"])
def test_an_ia3_is_refused_for_what_it_is_and_not_for_the_size_it_does_not_tell(on_input: bool, method: str) -> None:
    up, down = factors(1)
    ia3 = IA3(Tensor.of(np.ones((1, down.shape[1]) if on_input else (up.shape[0], 1), np.float32)), on_input)
    pair = [(adapter({"m": lora(up, down)}), 1.0), (adapter({"m": ia3}), 1.0)]
    for items in (pair, pair[::-1]):
        with pytest.raises(RefusedError, match="an IA3 delta"):
            combined(items, method=method)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("method", [method for method in METHODS if method not in ("concat", "linear")])
def test_values_that_are_not_finite_are_told_with_the_file_that_holds_them(method: str, value: float) -> None:
    up, down = factors(1)
    broken = up.copy()
    broken[0, 0] = value
    items = [
        (replace(adapter({"m": lora(one, down)}), files=(name,)), 1.0) for one, name in ((up, "sound"), (broken, "broken"), (up, "third"))
    ]
    with pytest.raises(MalformedError, match="not finite") as caught:
        combined(items, method=method, density=None if METHODS[method].prune is None else 0.5)
    assert (caught.value.file, caught.value.tensor) == ("broken", "m")


def test_parts_of_a_fused_weight_go_on_sharing_their_factors() -> None:
    """q, k and v of one fused LoRA in each adapter: joined again they are one LoRA of the summed rank, not a block-diagonal of three."""

    def fused(seed: int, rank: int) -> Adapter:
        whole = lora(*factors(seed, rank), alpha=2.0)
        return Adapter({Target("qkv", (at, at + 4)): cut(whole, at, at + 4) for at in (0, 4, 8)}, "test")

    def whole(one: Adapter) -> Any:
        return join(list(one.deltas.values()))

    one, other = fused(1, 3), fused(2, 4)
    meant = 0.5 * whole(one).load().rows(0, 12) + 2 * whole(other).load().rows(0, 12)
    for method, rank in (("concat", 7), ("orthogonal", 7), ("svd", 4)):
        joined = whole(combined([(one, 0.5), (other, 2.0)], method=method).adapter)
        assert joined.rank == rank
        if method == "concat":
            assert close(joined.load().rows(0, 12), meant, 1e-6)
    cut_again = whole(combined([(one, 0.5), (other, 2.0)], rule=RankRule(4)).adapter)
    left, sigma, right = np.linalg.svd(meant)
    assert close(cut_again.load().rows(0, 12), left[:, :4] * sigma[:4] @ right[:4], 1e-6)
    apart = adapter({Target("qkv", (0, 4)): lora(*(part[:4] if part.shape[1] == 2 else part for part in factors(3, 2)))})
    mixed = combined([(one, 1.0), (apart, 1.0)]).adapter
    assert {target.rows: delta.rank for target, delta in mixed.deltas.items()} == {(0, 4): 5, (4, 8): 3, (8, 12): 3}


def test_block_weights_multiply_and_leave_out() -> None:
    inside, deep = "unet.down_blocks.0.attentions.0.proj_in", "unet.up_blocks.1.attentions.0.proj_in"
    one, other = (adapter({inside: lora(*factors(seed)), deep: lora(*factors(seed + 5))}) for seed in (1, 2))
    found = combined([(one, 1.0), (other, 0.5)], block_weight=parse(["IN01=0.3", "OUT03=0"])).adapter
    assert [target.module for target in found.deltas] == [inside]
    assert close(dense(found, inside), 0.3 * dense(one, inside) + 0.15 * dense(other, inside), 1e-6)
    assert "1 target with a block weight of their own, 1 left out" in {finding.message for finding in found.findings}
    with pytest.raises(RefusedError, match="nothing is left"):
        combined([(one, 1.0)], block_weight=parse(["*=0"]))
    warned = combined([(one, 1.0)], block_weight=parse(["IN09=0"])).adapter.findings
    assert any(finding.code == "block-weights" and finding.severity for finding in warned)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"method": "average"}, "no such method"),
        ({"method": "ties"}, "share of values to keep"),
        ({"method": "ties", "density": 0.0}, "share of values to keep"),
        ({"method": "dare_ties", "density": 1.5}, "share of values to keep"),
        ({"method": "linear", "density": 0.5}, "prunes nothing"),
    ],
)
def test_what_means_nothing_is_said(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        combined([(adapter({"m": lora(*factors(1))}), 1.0)], **options)


def test_ranks_and_numbers_that_cannot_be_added() -> None:
    one, other = adapter({"m": lora(*factors(1, 3))}), adapter({"m": lora(*factors(2, 4))})
    with pytest.raises(MismatchError, match="factors of one rank"):
        combined([(one, 1.0), (other, 1.0)], method="linear")
    up, down = factors(1)
    up[0, 0] = np.nan
    with pytest.raises(MalformedError, match="not finite"):
        combined([(one, 1.0), (adapter({"m": lora(up, down)}), 1.0)], method="ties", density=0.5)
    assert combined([(one, 1.0), (other, 1.0)], method="cat").method == "concat"


def test_svd_takes_the_largest_rank_by_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = peft_folder(tmp_path / "one", 1, 4, 8), peft_folder(tmp_path / "other", 2, 3, 3)
    call = ["combine", f"{one}@0.8", str(other), "-o", str(tmp_path / "out"), "--json", "--method"]
    assert main([*call, "svd"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["counts"]["ranks"] == "4" and facts["operation"] == "combine (svd) to peft" and len(facts["modules"]) == 2
    assert main([*call, "dare", "--density", "0.5", "--force"]) == 4
    assert "rank 4 as in" in json.loads(capsys.readouterr().out)["expected"]
    assert main([*call, "dare_ties_svd", "--density", "0.5", "--seed", "3", "--force"]) == 0
    counts = json.loads(capsys.readouterr().out)["counts"]
    assert (counts["form"], counts["density"], counts["seed"]) == ("dW", "0.5", 3)
    assert open_adapter(tmp_path / "out").ranks() == {4: 2}


@pytest.mark.parametrize("method", ["concat", "orthogonal", "linear", "ties", "svd"])
def test_diffusers_loads_what_was_combined(tmp_path: Path, method: str) -> None:
    """Two dialects in, a third out: the real pipeline computes what the combined dW says."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    from tests.dialects.pipelines import base_of, merged, outputs, sd15, seeded

    pipe = sd15()
    base = base_of(pipe)
    read = ReadOptions(base=base)
    for number, dialect in enumerate(("kohya", "peft")):
        one = seeded(base, lambda path: path.startswith("unet.") and ".attn1." in path, rank=3, seed=number + 1)
        one.save(tmp_path / dialect, dialect, read=read)
    density = 0.5 if METHODS[method].prune else None
    items = [(tmp_path / "kohya", 0.8), (tmp_path / "peft", 0.5)]
    combine(items, tmp_path / "out", method=method, to="diffusers", density=density, read=read)
    meant = open_adapter(tmp_path / "out", options=read)
    loaded = sd15()
    loaded.load_lora_weights(str(tmp_path / "out"))
    merged(pipe, meant)
    assert torch.allclose(outputs(loaded)[0], outputs(pipe)[0], atol=1e-4)


def _far(one: Any, role: str) -> Any:
    """The delta with every value of one factor 1e30 times as large: each still fits in float32."""
    return replace(one, **{role: Tensor.of(getattr(one, role).read() * np.float32(1e30))})


@pytest.mark.parametrize(
    ("one", "method", "options"),
    [
        (_far(_far(loha(1), "w1_a"), "w2_a"), "concat", {}),
        (_far(tucker(1), "up"), "concat", {}),
        (Full(Tensor.of(np.full((12, 10), 1e30, np.float32))), "concat", {}),
        (_far(lora(*factors(1)), "up"), "orthogonal", {}),
        (_far(lora(*factors(1)), "up"), "linear", {}),
        (_far(_far(lora(*factors(1)), "up"), "down"), "magnitude_prune_svd", {"density": 1.0}),
        (Full(Tensor.of(np.full((12, 10), 1e30, np.float32))), "ties_svd", {"density": 1.0, "rule": RankRule(2)}),
    ],
)  # fmt: skip
def test_computed_factors_too_large_for_their_dtype_are_refused(one: Any, method: str, options: dict[str, Any]) -> None:
    """Not written as Inf, whatever the algorithm the factors are of."""
    weight = 1e20 if method == "linear" else 1e10
    with pytest.raises(RefusedError, match="not fit in float32"):
        made = combined([(adapter({"m": one}), weight), (adapter({"m": one}), 1.0)], method=method, **options).adapter
        for factor in made.deltas[Target("m")].factors().values():
            factor.read()


@pytest.mark.parametrize("weights", [(1.0, -1.0), (0.3, 0.7, -1.0)])
@pytest.mark.parametrize("rule", [RankRule(2), RankRule(error=0.1), RankRule(energy=0.9)])
@pytest.mark.parametrize("one", [lora(*factors(1, 3), alpha=1.7), loha(1), tucker(1), lokr(1)], ids=lambda one: type(one).__name__)
def test_of_adapters_that_cancel_each_other_nothing_is_left_and_that_is_said(one: Any, rule: RankRule, weights: tuple[float, ...]) -> None:
    """No rank and no error of the dust that rounding leaves, through factors or (LoKr) through rows of dW."""
    result = combined([(adapter({"m": one}), weight) for weight in weights], method="svd", rule=rule)
    (facts,) = result.modules
    assert (facts["energy"], facts["error"], facts["norm"]) == (1.0, 0.0, 0.0)
    assert not dense(result.adapter).any() and (rule.rank is not None or facts["new_rank"] == 1)
    assert [finding.code for finding in result.adapter.findings if finding.severity] == ["nothing-left"]


@pytest.mark.parametrize("method", ["magnitude_prune_svd", "dare_linear_svd", "ties_svd"])
@pytest.mark.parametrize("weights", [(0.3, 0.7, -1.0), (1 / 3, 1 / 3, -2 / 3)])
def test_pruned_adapters_that_cancel_each_other_leave_no_dust(method: str, weights: tuple[float, ...]) -> None:
    result = combined(
        [(adapter({"m": lora(*factors(1, 4), alpha=2.0)}), weight) for weight in weights], method=method, rule=RankRule(4), density=1.0
    )
    assert not dense(result.adapter).any() and result.modules[0]["norm"] == 0.0
    assert "nothing-left" in {finding.code for finding in result.adapter.findings}


def test_the_error_of_a_cut_is_of_the_sum_and_not_of_its_rounding() -> None:
    """Two stages of one training, one taken from the other: what is left of factors rounded side by side to float32 is off by more than its own rounding."""
    up, down = (factor.astype(np.float64) for factor in factors(1, 6))
    later = lora((up + 1e-5 * factors(2, 6)[0]).astype(np.float32), down.astype(np.float32), alpha=2.0)
    items = [(adapter({"m": later}), 1 / 3), (adapter({"m": lora(*factors(1, 6), alpha=2.0)}), -1 / 3)]
    result = combined(items, method="svd", rule=RankRule(6))
    meant = sum(weight * dense(one) for one, weight in items)
    gap = np.linalg.norm(dense(result.adapter) - meant) / np.linalg.norm(meant)
    assert gap < 1e-6 and result.modules[0]["error"] == pytest.approx(gap, rel=0.5, abs=2e-7)
