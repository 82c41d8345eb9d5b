"""Resize against numpy's full SVD of the materialised dW, through every form a LoRA has, and through the real file formats."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from tests.matrix import specimens

from upparam.adapter import Adapter, Target
from upparam.algorithms.base import BAKED, Delta, ScaleRule, Scaling, Update
from upparam.algorithms.dora import DoRA
from upparam.algorithms.loha import LoHa
from upparam.algorithms.lokr import LoKr
from upparam.algorithms.lora import LoRA
from upparam.algorithms.lowrank import RankRule
from upparam.bases.inventory import load
from upparam.cli import main
from upparam.containers import open_file
from upparam.dialects.base import ReadOptions
from upparam.errors import MalformedError, OutputExistsError, RefusedError
from upparam.operations.combine import combine
from upparam.operations.convert import write_adapter
from upparam.operations.opening import open_adapter
from upparam.operations.resize import resize, resized
from upparam.tensors import Tensor, same_bits

from .merging import adapter, save


def random_lora(
    rows: int, columns: int, rank: int, seed: int = 0, dtype: object = np.float32, alpha: float | None = None, kernel: tuple[int, ...] = ()
) -> LoRA:
    random = np.random.default_rng(seed)
    fall = np.logspace(0, -1.5, rank)
    up = (random.standard_normal((rows, rank)) * fall).astype(dtype).reshape(rows, rank, *(1 for _ in kernel))
    down = random.standard_normal((rank, columns, *kernel)).astype(dtype)
    return LoRA(Tensor.of(up), Tensor.of(down), Scaling(alpha=alpha))


def dense(delta: object) -> np.ndarray:
    """scale * dW as a matrix (out, rest), from the definition."""
    assert isinstance(delta, LoRA)
    up, down = delta.matrices()
    return delta.known_scale() * (up @ down)


def best(matrix: np.ndarray, rank: int) -> float:
    sigma = np.linalg.svd(matrix, compute_uv=False)
    return float(np.linalg.norm(sigma[rank:]))


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("kernel", [(), (1, 1), (3, 3)])
def test_equals_the_full_svd(dtype: object, kernel: tuple[int, ...]) -> None:
    delta = random_lora(70, 50, 24, dtype=dtype, alpha=12.0, kernel=kernel)
    result, (cut,) = resized(adapter({"m": delta}), RankRule(8))
    new = result.deltas[Target("m")]
    assert isinstance(new, LoRA)
    assert (new.rank, new.shape, new.scale) == (8, delta.shape, delta.scale)
    assert (new.up.dtype, new.down.dtype) == (delta.up.dtype, delta.down.dtype)
    assert len(new.up.shape) == len(delta.up.shape)
    whole = dense(delta)
    norm = float(np.linalg.norm(whole))
    achieved = float(np.linalg.norm(whole - dense(new)))
    epsilon = float(ml_dtypes.finfo(np.dtype(dtype)).eps)
    assert achieved <= 1.0001 * best(whole, 8) + epsilon * norm
    assert cut.error == pytest.approx(achieved / norm, rel=1e-6)
    assert cut.optimum == pytest.approx(best(whole, 8) / norm, rel=1e-6)
    assert cut.energy == pytest.approx(1 - (best(whole, 8) / norm) ** 2)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 30), st.integers(2, 30), st.integers(1, 10), st.integers(0, 2**32 - 1))
def test_gauge_does_not_matter(rows: int, columns: int, rank: int, seed: int) -> None:
    delta = random_lora(rows, columns, rank, seed, np.float64)
    random = np.random.default_rng(seed)
    turn, _ = np.linalg.qr(random.standard_normal((rank, rank)))
    gauge = turn * np.logspace(0, 2, rank)
    up, down = delta.matrices()
    other = LoRA(Tensor.of(up @ gauge), Tensor.of(np.linalg.solve(gauge, down)))
    keep = max(1, rank // 2)
    (one, (first,)), (two, (second,)) = (resized(adapter({"m": one}), RankRule(keep)) for one in (delta, other))
    assert first.error == pytest.approx(second.error, abs=1e-7)
    np.testing.assert_allclose(np.linalg.norm(dense(one.deltas[Target("m")])), np.linalg.norm(dense(two.deltas[Target("m")])), rtol=1e-7)


@pytest.mark.parametrize("rank", [4, 16])
def test_concatenation_and_back(rank: int) -> None:
    """An adapter put on top of itself has twice the rank and resizes back to itself, times two."""
    delta = random_lora(40, 60, rank)
    doubled = LoRA(Tensor.of(np.hstack([delta.up.read()] * 2)), Tensor.of(np.vstack([delta.down.read()] * 2)), Scaling())
    result, (cut,) = resized(adapter({"m": doubled}), RankRule(error=1e-5))
    new = result.deltas[Target("m")]
    assert new.rank == rank
    assert cut.error < 1e-6
    np.testing.assert_allclose(dense(new), 2 * dense(delta), atol=1e-5)


def test_small_enough_already_keeps_its_bits() -> None:
    delta = random_lora(20, 30, 4, alpha=3.0)
    result, (cut,) = resized(adapter({"m": delta}), RankRule(8), alpha="rank")
    assert result.deltas[Target("m")] is delta
    assert (cut.rank, cut.new_rank, cut.error) == (4, 4, 0.0)


@pytest.mark.parametrize("rule", ["scale", "keep", "rank"])
@pytest.mark.parametrize(
    "scaling",
    [
        Scaling(), Scaling(alpha=4.0), Scaling(alpha=-4.0), Scaling(alpha=0.0), Scaling(ScaleRule.ALPHA_OVER_SQRT_RANK, 4.0),
        Scaling(alpha=4.0, divisor=32.0), Scaling(ScaleRule.EXPLICIT, multiplier=20.0), BAKED,
    ],
)  # fmt: skip
def test_alpha_rules_keep_the_effect(rule: str, scaling: Scaling) -> None:
    delta = replace(random_lora(30, 20, 8, dtype=np.float64), scaling=scaling)
    result, (cut,) = resized(adapter({"m": delta}), RankRule(4), alpha=rule)  # type: ignore[arg-type]
    new = result.deltas[Target("m")]
    whole = dense(delta)
    assert np.linalg.norm(whole - dense(new)) == pytest.approx(best(whole, 4), rel=1e-9, abs=1e-12)
    assert cut.error == pytest.approx(cut.optimum, rel=1e-6)
    if scaling.rule is ScaleRule.ALPHA_OVER_RANK and scaling.alpha:
        assert new.alpha == pytest.approx({"scale": delta.known_scale() * 4, "keep": scaling.alpha, "rank": 4.0}[rule])
        assert rule != "scale" or new.scale == pytest.approx(delta.scale)


def test_rules_choose_each_module_its_rank() -> None:
    deltas = {f"m{seed}": random_lora(40, 30, 10, seed) for seed in range(4)}
    deltas["flat"] = LoRA(Tensor.of(np.eye(40, 10)), Tensor.of(np.eye(10, 30)))
    for rule in (RankRule(error=0.2), RankRule(energy=0.96), RankRule(fro=0.98), RankRule(6, energy=0.999)):
        result, cuts = resized(adapter(deltas), rule)
        for (name, delta), cut in zip(deltas.items(), cuts, strict=True):
            sigma = np.linalg.svd(dense(delta), compute_uv=False)
            expected = RankRule.choose(rule, sigma[:10])
            assert result.deltas[Target(name)].rank == cut.new_rank == expected


def test_parts_that_share_their_down_stay_together() -> None:
    """q, k and v cut from one fused LoRA are resized as one: the fused weight's optimum, and one down factor still."""
    whole = random_lora(90, 40, 16)
    deltas = {Target("q"): replace(whole, up=whole.up.rows(0, 30)), Target("k"): replace(whole, up=whole.up.rows(30, 60)),
              Target("v"): replace(whole, up=whole.up.rows(60, 90))}  # fmt: skip
    result, cuts = resized(Adapter(dict(deltas), "test"), RankRule(6))
    assert len(cuts) == 1 and cuts[0].targets == ("q", "k", "v")
    parts = [result.deltas[target] for target in deltas]
    assert all(same_bits(part.factors()["down"], parts[0].factors()["down"]) for part in parts)
    stacked = np.vstack([dense(part) for part in parts])
    assert np.linalg.norm(dense(whole) - stacked) == pytest.approx(best(dense(whole), 6), rel=1e-4)


def test_modules_that_merely_share_a_down_are_cut_alone() -> None:
    one, other = random_lora(30, 40, 16, 1), random_lora(20, 40, 16, 2)
    other = replace(other, down=one.down)
    result, cuts = resized(adapter({"a": one, "b": other}), RankRule(6))
    assert [cut.targets for cut in cuts] == [("a",), ("b",)]
    for name, delta in (("a", one), ("b", other)):
        assert np.linalg.norm(dense(delta) - dense(result.deltas[Target(name)])) == pytest.approx(best(dense(delta), 6), rel=1e-4)


def test_tucker_stays_tucker() -> None:
    random = np.random.default_rng(0)
    fall = 1.7 ** -np.arange(12)
    mid = random.standard_normal((12, 12, 3, 3)) * fall[:, None, None, None] * fall[None, :, None, None]
    up, down = random.standard_normal((40, 12, 1, 1)), random.standard_normal((12, 30, 1, 1))
    delta = LoRA(*(Tensor.of(part.astype(np.float32)) for part in (up, down)), Scaling(alpha=6.0), Tensor.of(mid.astype(np.float32)))
    for rule in (RankRule(5), RankRule(99, conv_rank=5), RankRule(error=0.1)):
        result, (cut,) = resized(adapter({"m": delta}), rule)
        new = result.deltas[Target("m")]
        assert isinstance(new, LoRA) and new.mid is not None
        assert (new.shape, new.scale) == (delta.shape, delta.scale)
        assert new.mid.shape == (cut.new_rank, cut.new_rank, 3, 3)
        whole = dense(delta)
        gap = np.linalg.norm(whole - dense(new)) / np.linalg.norm(whole)
        assert cut.error == pytest.approx(gap, rel=1e-4)
        assert gap < 0.1
    for enough in (RankRule(12), RankRule(5, conv_rank=20)):
        assert resized(adapter({"m": delta}), enough)[0].deltas[Target("m")] is delta


def test_embedding_and_zero() -> None:
    embedding = replace(random_lora(100, 16, 8), embedding=True)
    untrained = LoRA(Tensor.of(np.zeros((20, 8), np.float16)), Tensor.of(np.ones((8, 10), np.float16)))
    result, cuts = resized(adapter({"e": embedding, "z": untrained}), RankRule(4))
    new = result.deltas[Target("e")]
    assert isinstance(new, LoRA) and new.embedding and new.rank == 4
    zero = result.deltas[Target("z")]
    assert zero.rank == 4 and not dense(zero).any() and zero.factors()["down"].read().all()
    assert (cuts[1].error, cuts[1].energy) == (0.0, 1.0)


@pytest.mark.parametrize("alpha", ["scale", "keep", "rank"])
@pytest.mark.parametrize("tucker", [False, True])
def test_nothing_is_lost_of_an_effect_of_zero(alpha: str, tucker: bool) -> None:
    """alpha 0: dW is zero before and after, however much of up @ down is cut away."""
    rng = np.random.default_rng(0)
    shapes = ((20, 8, 1, 1), (8, 10, 1, 1), (8, 8, 3, 3)) if tucker else ((20, 8), (8, 10))
    up, down, *mid = (Tensor.of(rng.standard_normal(shape).astype(np.float32)) for shape in shapes)
    result, (cut,) = resized(adapter({"m": LoRA(up, down, Scaling(alpha=0.0), *mid)}), RankRule(3), alpha=alpha)  # type: ignore[arg-type]
    assert not dense(result.deltas[Target("m")]).any() and cut.new_rank == 3
    assert (cut.energy, cut.error) == (1.0, 0.0) and cut.optimum == (None if tucker else 0.0)


def test_an_error_that_float64_cannot_tell_is_said_as_that() -> None:
    """Rank 4 in factors of rank 8, in float64: what is lost lies below what subtracting squares shows."""
    for seed in range(10):
        rng = np.random.default_rng(seed)
        up = rng.standard_normal((40, 4)) @ rng.standard_normal((4, 8))
        delta = LoRA(Tensor.of(up), Tensor.of(rng.standard_normal((8, 30))), Scaling(alpha=8.0))
        _, (cut,) = resized(adapter({"m": delta}), RankRule(4))
        assert 1e-8 < cut.error < 1e-6


def test_why_a_dora_is_not_resized_is_said() -> None:
    lora = random_lora(20, 16, 8)
    dora = DoRA(magnitude=Tensor.of(np.ones((20, 1), np.float32)), up=lora.up, down=lora.down, scaling=lora.scaling)
    result, _ = resized(adapter({"a": dora, "b": random_lora(20, 20, 8)}), RankRule(2))
    assert "no rank" not in result.findings[0].message and "more than its factors" in result.findings[0].message


def test_what_cannot_be_resized_is_said() -> None:
    bad = LoRA(Tensor.of(np.full((4, 2), np.nan, np.float32)), Tensor.of(np.ones((2, 4), np.float32)))
    with pytest.raises(MalformedError) as caught:
        resized(adapter({"some.module": bad}), RankRule(1))
    assert caught.value.tensor == "some.module"
    unknown = replace(random_lora(4, 4, 2), scaling=Scaling(ScaleRule.UNKNOWN))
    with pytest.raises(RefusedError):
        resized(adapter({"m": unknown}), RankRule(1))
    with pytest.raises(RefusedError):
        resized(adapter({}), RankRule(1))
    lora = random_lora(20, 16, 8)
    dora = DoRA(magnitude=Tensor.of(np.ones((20, 1), np.float32)), up=lora.up, down=lora.down, scaling=lora.scaling)
    with pytest.raises(RefusedError, match="upparam extract"):
        resized(adapter({"a": dora}), RankRule(2))
    huge = LoRA(Tensor.of(np.full((4, 2), 6e4, np.float16)), Tensor.of(np.full((2, 4), 6e4, np.float16)), Scaling(alpha=2**24))
    with pytest.raises(RefusedError, match="float16"):
        resized(adapter({"m": huge}), RankRule(1), alpha="rank")


def kohya_file(path: Path, rank: int = 8) -> Path:
    arrays: dict[str, np.ndarray] = {}
    random = np.random.default_rng(0)
    prefix = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1"
    for name, rows, columns in (("to_q", 320, 320), ("to_k", 320, 320)):
        arrays[f"{prefix}_{name}.lora_up.weight"] = random.standard_normal((rows, rank)).astype(np.float16)
        arrays[f"{prefix}_{name}.lora_down.weight"] = random.standard_normal((rank, columns)).astype(np.float16)
        arrays[f"{prefix}_{name}.alpha"] = np.array(rank / 2, np.float16)
    return save(path, arrays, {"ss_network_dim": str(rank), "ss_network_alpha": str(rank / 2), "ss_other": "kept"})


def test_kohya_file_and_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = kohya_file(tmp_path / "in.safetensors")
    out = tmp_path / "out.safetensors"
    assert main(["resize", str(source), "--rank", "4", "-o", str(out), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["counts"]["resized"] == 2
    assert facts["counts"]["ranks"] == "8 to 4"
    assert [module["new_rank"] for module in facts["modules"]] == [4, 4]
    assert all(0 < module["optimum"] <= module["error"] < 1 for module in facts["modules"])
    file = open_file(out)
    assert file.metadata == {"ss_network_dim": "4", "ss_network_alpha": "2.0", "ss_other": "kept"}
    assert {tensor.dtype.name for tensor in file.tensors.values()} == {"float16"}
    before, after = open_adapter(source), open_adapter(out)
    for target, delta in before.deltas.items():
        new = after.deltas[target]
        assert (new.rank, new.scale) == (4, delta.scale)
        whole = dense(delta)
        assert np.linalg.norm(whole - dense(new)) <= 1.001 * best(whole, 4)
    assert sorted(tmp_path.iterdir()) == [source, out]
    with pytest.raises(OutputExistsError):
        resize(source, out, RankRule(2))
    assert main(["resize", str(source), "-o", str(tmp_path / "none.safetensors")]) == 2
    assert not (tmp_path / "none.safetensors").exists()


def test_memory_and_disk_give_the_same(tmp_path: Path) -> None:
    source = kohya_file(tmp_path / "in.safetensors")
    out = tmp_path / "out.safetensors"
    resize(source, out, RankRule(3), threads=2)
    inside, _ = resized(open_adapter(source), RankRule(3), threads=1)
    after = open_adapter(out)
    for target, delta in inside.deltas.items():
        for role, factor in delta.factors().items():
            assert same_bits(factor, after.deltas[target].factors()[role])


def test_diffusers_config_says_the_new_rank(tmp_path: Path) -> None:
    """Metadata that states r=8 must not outlive the resize: diffusers would make layers of the wrong size."""
    source = kohya_file(tmp_path / "in.safetensors")
    resize(source, tmp_path / "diffusers", RankRule(6), to="diffusers")
    resize(tmp_path / "diffusers", tmp_path / "again", RankRule(4))
    file = open_file(tmp_path / "again" / "pytorch_lora_weights.safetensors")
    config = json.loads(file.metadata["lora_adapter_metadata"])
    assert (config["unet.r"], config["unet.lora_alpha"]) == (4, 2)


class Kronecker(Delta):
    """An algorithm without low-rank form, as a stand-in for those that have their own files: dW = left (x) right."""

    algorithm = "kronecker"

    def __init__(self, left: np.ndarray, right: np.ndarray, alpha: float) -> None:
        self.left, self.right, self.scaling = left, right, Scaling(alpha=alpha)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.left.shape[0] * self.right.shape[0], self.left.shape[1] * self.right.shape[1])

    @property
    def rank(self) -> int:
        return 4

    def factors(self) -> dict[str, Tensor]:
        return {"left": Tensor.of(self.left), "right": Tensor.of(self.right)}

    def load(self) -> Update:
        whole, scale, shape = np.kron(self.left, self.right).astype(np.float64), self.known_scale(), self.shape

        class Whole(Update):
            def rows(self, start: int, stop: int) -> np.ndarray:
                return scale * whole[start:stop]

        update = Whole()
        update.shape, update.scale = shape, scale
        return update


@pytest.mark.parametrize("rule", [RankRule(10), RankRule(error=0.2), RankRule(energy=0.9)])
@pytest.mark.parametrize("alpha", ["scale", "keep", "rank"])
def test_other_algorithms_become_lora(rule: RankRule, alpha: str) -> None:
    random = np.random.default_rng(0)
    fall = np.logspace(0, -2, 12)
    left = random.standard_normal((12, 12)).astype(np.float32) * fall.astype(np.float32)
    delta = Kronecker(left, random.standard_normal((16, 20)).astype(np.float32), 2.0)
    result, (cut,) = resized(adapter({"m": delta}), rule, alpha=alpha)  # type: ignore[arg-type]
    new = result.deltas[Target("m")]
    whole = delta.load().rows(0, delta.shape[0])
    sigma = np.linalg.svd(whole, compute_uv=False)
    assert type(new) is LoRA and new.rank == cut.new_rank == rule.choose(sigma)
    gap = float(np.linalg.norm(whole - dense(new)))
    assert gap <= 1.005 * best(whole, new.rank) + 1e-6 * float(np.linalg.norm(whole))
    assert cut.error == pytest.approx(gap / np.linalg.norm(whole), rel=1e-5)
    assert cut.algorithm == "kronecker"
    assert new.alpha == pytest.approx({"scale": 0.5 * new.rank, "keep": 2.0, "rank": new.rank}[alpha])


@pytest.mark.parametrize(("alpha", "number"), [("scale", 1.5), ("keep", 2.0), ("rank", 3.0)])
def test_alpha_of_what_was_no_lora_follows_the_rule_too(alpha: str, number: float) -> None:
    random = np.random.default_rng(0)
    shapes = (12, 4), (4, 10), (12, 4), (4, 10)
    parts = [Tensor.of(random.standard_normal(shape).astype(np.float32)) for shape in shapes]
    delta = LoHa(*parts, scaling=Scaling(alpha=2.0))
    result, (cut,) = resized(adapter({"m": delta}), RankRule(3), alpha=alpha)  # type: ignore[arg-type]
    new, whole = result.deltas[Target("m")], delta.load().rows(0, 12)
    assert new.alpha == number and cut.error == pytest.approx(best(whole, 3) / np.linalg.norm(whole), rel=1e-6)
    assert np.linalg.norm(whole - dense(new)) == pytest.approx(best(whole, 3), rel=1e-6)


def test_deltas_without_a_rank_stay_and_are_said() -> None:
    class Fixed(Kronecker):
        algorithm = "fixed"
        additive = False

    fixed = Fixed(np.eye(2), np.eye(2), 4.0)
    result, cuts = resized(adapter({"a": fixed, "b": random_lora(20, 20, 8)}), RankRule(2))
    assert result.deltas[Target("a")] is fixed and len(cuts) == 1
    assert [finding.code for finding in result.findings] == ["not-resized"]
    with pytest.raises(RefusedError, match="rank to change"):
        resized(adapter({"a": fixed}), RankRule(2))


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {"v_proj": 6}}])
def test_peft_loads_what_was_resized(tmp_path: Path, options: dict[str, object]) -> None:
    """The config names the new ranks, and the real peft computes with them what the truncated dW says."""
    import peft
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=120,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=12, target_modules=["q_proj", "v_proj", "down_proj"], **options))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    wrapped.save_pretrained(tmp_path / "adapter")
    resize(tmp_path / "adapter", tmp_path / "out", RankRule(4))
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written["r"] == 4
    before, after = open_adapter(tmp_path / "adapter"), open_adapter(tmp_path / "out")
    fresh = transformers.LlamaForCausalLM(config).eval()
    fresh.load_state_dict(
        {name.replace(".base_layer", ""): value for name, value in wrapped.base_model.model.state_dict().items() if "lora_" not in name}
    )
    loaded = peft.PeftModel.from_pretrained(fresh, str(tmp_path / "out"))
    weights = {
        name: (layer.get_delta_weight("default"))
        for name, layer in loaded.base_model.model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }
    assert len(weights) == len(before.deltas) == 6
    for target, delta in before.deltas.items():
        assert np.linalg.norm(dense(delta) - dense(after.deltas[target])) <= 1.0001 * best(dense(delta), 4) + 1e-6
        (theirs,) = (value for name, value in weights.items() if target.module.endswith(name))
        np.testing.assert_allclose(theirs.detach().numpy(), dense(after.deltas[target]), atol=1e-6)


def test_the_names_of_the_file_need_no_base(tmp_path: Path) -> None:
    """Bases that name the module otherwise fit it as well, but nothing is to be named: the file is written in its own words again."""
    name = "lora_unet_mid_block_resnets_0_conv1"
    random = np.random.default_rng(3)
    shapes = {"lora_up.weight": (1280, 4, 1, 1), "lora_down.weight": (4, 1280, 3, 3)}
    factors = {f"{name}.{word}": random.standard_normal(shape).astype(np.float32) for word, shape in shapes.items()}
    save_file(factors | {f"{name}.alpha": np.array(2, np.float32)}, tmp_path / "a.safetensors")
    source = open_adapter(tmp_path / "a.safetensors")
    assert source.base is not None and source.base.lookalikes and not source.base.stated
    resize(tmp_path / "a.safetensors", tmp_path / "b.safetensors", RankRule(2))
    combine([(tmp_path / "a.safetensors", 1.0), (tmp_path / "b.safetensors", 0.5)], tmp_path / "c.safetensors")
    for written in ("b.safetensors", "c.safetensors"):
        assert open_file(tmp_path / written).tensors.keys() == {*factors, f"{name}.alpha"}
    # Beside names that were explained by another base it is not known whether one base explains them all.
    other = open_adapter(tmp_path / "a.safetensors", options=ReadOptions(base=load("sdxl")))
    mixed = [(source, 1.0), (replace(other, base=replace(source.base, name="sdxl")), 1.0)]
    with pytest.raises(RefusedError, match="fit this adapter alike"):
        combine(mixed, tmp_path / "d.safetensors")


@pytest.mark.parametrize("form", ["torch", "npy", "raw"])
def test_a_split_adapter_stays_one(tmp_path: Path, form: str) -> None:
    """By default what is written has the dialect, and the format, of the files that were read."""
    write_adapter(specimens.plain("sd1.5"), tmp_path / "whole.safetensors", "kohya")
    write_adapter(open_adapter(tmp_path / "whole.safetensors"), tmp_path / "one", "triad", options={"format": form})
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    receipt = resize(tmp_path / "one", tmp_path / "two", RankRule(1))
    combined = combine([(tmp_path / "two", 1.0), (tmp_path / "one", 2.0)], tmp_path / "three")
    assert combined.operation == "combine (concat) to triad" and receipt.counts["resized"]
    for out in ("two", "three"):
        assert sorted(path.name for path in (tmp_path / out).iterdir()) == files
        assert open_adapter(tmp_path / out).dialect == "kohya"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [np.inf, np.nan])
@pytest.mark.parametrize("algorithm", ["lora", "tucker", "loha", "lokr"])
def test_values_that_are_not_finite_are_told_and_numpy_says_nothing(algorithm: str, value: float) -> None:
    random = np.random.default_rng(0)

    def drawn(*shape: int) -> Tensor:
        return Tensor.of(random.standard_normal(shape).astype(np.float32))

    broken = drawn(4, 10).read().copy()
    broken[0, 0] = value
    down, scaling = Tensor.of(broken), Scaling(alpha=2.0)
    delta: Delta = {
        "lora": lambda: LoRA(drawn(12, 4), down, scaling),
        "tucker": lambda: LoRA(drawn(12, 4), down, scaling, mid=drawn(4, 4, 3, 3)),
        "loha": lambda: LoHa(drawn(12, 4), drawn(4, 10), drawn(12, 4), down, scaling=scaling),
        "lokr": lambda: LoKr(scaling=scaling, w1=drawn(2, 2), w2_a=drawn(6, 4), w2_b=down),
    }[algorithm]()
    with pytest.raises(MalformedError, match="not finite"):
        resized(adapter({"m": delta}), RankRule(2))
