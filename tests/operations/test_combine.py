"""combine: the sum of dW is the sum, to the last bit where nothing has to be rounded; the real PEFT agrees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.operations.merging import adapter, lora, save

from upparam.adapter import Adapter, Extra, ExtraKind, Target
from upparam.algorithms.lora import LoRA
from upparam.algorithms.lowrank import RankRule
from upparam.cli import main
from upparam.containers import open_file
from upparam.errors import MismatchError, RefusedError, UsageError
from upparam.operations.combine import combine, combined
from upparam.operations.opening import open_adapter
from upparam.tensors import Tensor


def factors(seed: int, rank: int = 3, dtype: Any = np.float32) -> tuple[NDArray[Any], NDArray[Any]]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((12, rank)).astype(dtype), rng.standard_normal((rank, 10)).astype(dtype)


def dense(one: Adapter, name: str = "m") -> NDArray[np.float64]:
    delta = one.deltas[Target(name)]
    rows: NDArray[np.float64] = delta.load().rows(0, delta.shape[0])
    return rows


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 5), st.floats(-2, 2).map(lambda weight: round(weight, 6)), st.sampled_from([np.float16, np.float32])),
        min_size=1,
        max_size=4,
    ).filter(lambda members: any(weight for _, weight, _ in members)),
    st.integers(0, 99),
)
def test_the_sum_is_the_sum(members: list[tuple[int, float, Any]], seed: int) -> None:
    """To one rounding of float32, which holds any multiplier of six decimals; one of 1e-83 would leave its range."""
    items = [(adapter({"m": lora(*factors(seed + n, rank, dtype), alpha=6.0)}), weight) for n, (rank, weight, dtype) in enumerate(members)]
    found = combined(items).adapter
    expected = sum(weight * dense(one) for one, weight in items)
    assert found.deltas[Target("m")].rank == sum(rank for rank, _, _ in members)
    size = sum(abs(weight) * np.linalg.norm(dense(one)) for one, weight in items)
    assert np.linalg.norm(dense(found) - expected) <= 2.0**-23 * size


def test_equal_scales_keep_every_bit() -> None:
    (up, down), (up2, down2) = factors(1, 3, np.float16), factors(2, 5, np.float16)
    found = combined(
        [(adapter({"m": lora(up, down, alpha=6.0)}), 1.0), (adapter({"m": lora(up2, down2, alpha=10.0)}), 1.0)]
    ).adapter.deltas[Target("m")]
    assert found.scale == 2.0
    parts = found.factors()
    np.testing.assert_array_equal(parts["up"].read(), np.concatenate([up, up2], axis=1))
    np.testing.assert_array_equal(parts["down"].read(), np.concatenate([down, down2]))
    assert parts["up"].dtype.name == "float16"


def test_a_module_of_one_adapter_alone_keeps_its_factors() -> None:
    one, other = adapter({"m": lora(*factors(1), alpha=6.0)}), adapter({"n": lora(*factors(2), alpha=6.0)})
    found = combined([(one, 0.5), (other, 1.0)]).adapter
    assert found.deltas[Target("m")].factors()["up"] is one.deltas[Target("m")].factors()["up"]
    assert (found.deltas[Target("m")].scale, found.deltas[Target("n")].scale) == (1.0, 2.0)


def test_what_cannot_be_combined_is_said() -> None:
    one = adapter({"m": lora(*factors(1))})
    with pytest.raises(UsageError):
        combined([])
    with pytest.raises(MismatchError, match="different shapes"):
        combined([(one, 1.0), (adapter({"m": lora(np.ones((7, 2), np.float32), np.ones((2, 10), np.float32))}), 1.0)])
    with pytest.raises(RefusedError, match="different ways"):
        combined([(one, 1.0), (adapter({"m": lora(*factors(2))}, layout="kohya"), 1.0)])
    with pytest.raises(RefusedError, match="rows of this weight"):
        combined([(one, 1.0), (adapter({Target("m", (0, 12)): lora(*factors(2))}), 1.0)])


def test_multipliers_that_are_all_zero_are_refused() -> None:
    """They gave an adapter that changes nothing, without a word; one of two may well be 0."""
    one, other = (adapter({"m": lora(*factors(seed))}) for seed in (1, 2))
    with pytest.raises(RefusedError, match="every multiplier is 0"):
        combined([(one, 0.0), (other, 0.0)])
    assert np.allclose(dense(combined([(one, 0.0), (other, 1.0)]).adapter), dense(other))


def test_extras_of_one_name_must_agree() -> None:
    def having(value: float) -> Adapter:
        return adapter({"m": lora(*factors(1))}, extras=[Extra(ExtraKind.SAVED_MODULE, "head.weight", Tensor.of(np.full(3, value)))])

    assert len(combined([(having(1), 1.0), (having(1), 1.0)]).adapter.extras) == 1
    with pytest.raises(MismatchError, match="saved-module"):
        combined([(having(1), 1.0), (having(2), 1.0)])


def peft_folder(folder: Path, seed: int, rank: int, alpha: int) -> Path:
    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in range(2):
        stem = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{stem}.lora_A.weight"] = (rng.standard_normal((rank, 32)) * 0.1).astype(np.float32)
        tensors[f"{stem}.lora_B.weight"] = (rng.standard_normal((32, rank)) * 0.1).astype(np.float32)
    save(folder / "adapter_model.safetensors", tensors)
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"})
    )
    return folder


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_the_real_library_agrees(tmp_path: Path, method: str) -> None:
    torch, peft, transformers = (pytest.importorskip(name) for name in ("torch", "peft", "transformers"))
    one, other = peft_folder(tmp_path / "one", 1, 4, 8), peft_folder(tmp_path / "other", 2, 3, 3)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4
    )
    model = peft.PeftModel.from_pretrained(transformers.LlamaForCausalLM(config), one, adapter_name="one")
    model.load_adapter(other, adapter_name="other")
    model.add_weighted_adapter(["one", "other"], [0.8, 0.5], "both", combination_type=method, svd_rank=4 if method == "svd" else None)
    rule = RankRule(rank=4) if method == "svd" else None
    combine([(one, 0.8), (other, 0.5)], tmp_path / "ours", rule=rule)
    ours = open_adapter(tmp_path / "ours")
    for layer in range(2):
        module = model.base_model.model.model.layers[layer].self_attn.q_proj
        theirs = module.get_delta_weight("both").detach().numpy().astype(np.float64)
        mine = dense(ours, f"model.layers.{layer}.self_attn.q_proj")
        assert np.linalg.norm(mine - theirs) <= 1e-5 * np.linalg.norm(theirs)
    model.load_adapter(tmp_path / "ours", adapter_name="ours")
    assert torch.isfinite(model(torch.arange(6)[None]).logits).all()


def test_the_receipt_says_what_block_weights_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = peft_folder(tmp_path / "one", 1, 4, 8)
    asked = ["combine", str(folder), "-o", str(tmp_path / "two"), "--force", "--block-weights"]
    assert main([*asked, "*layers.0*=0", "--block-weights", "*layers.1*=0.5"]) == 0
    assert "1 target with a block weight of their own, 1 left out" in capsys.readouterr().out
    assert main([*asked, "*nothing*=0.5"]) == 0
    assert capsys.readouterr().out.count("the block weights leave every module as it is") == 1


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = peft_folder(tmp_path / "one", 1, 4, 8), peft_folder(tmp_path / "other", 2, 3, 3)
    assert main(["combine", f"{one}@0.8", str(other), "-o", str(tmp_path / "out"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["counts"]["targets"] == 2 and facts["inputs"] == [f"{one}@0.8", f"{other}@1"]
    assert main(["combine", str(one), str(other), "-o", str(tmp_path / "small"), "--rank", "2", "-q"]) == 0
    assert open_adapter(tmp_path / "small").ranks() == {2: 2}


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_multiplier_that_overflows_a_factor_is_refused_and_nothing_is_left(tmp_path: Path, dtype: Any) -> None:
    """Not Inf in a file called fine; Inf that was there before is no overflow."""
    up, down = factors(0, dtype=dtype)
    one, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    stem = "lora_unet_mid_block_attentions_0_proj_in"
    for path in (one, other):
        save(path, {f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": down, f"{stem}.alpha": np.array(3, np.float32)})
    with pytest.raises(RefusedError, match="too large for float32"):
        combine([(one, 1e39), (other, 1.0)], tmp_path / "out.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]
    for multiplier in (float("nan"), float("inf")):
        with pytest.raises(UsageError, match="finite"):
            combine([(one, multiplier), (other, 1.0)], tmp_path / "out.safetensors")
    up[0, 0] = np.inf
    save(one, {f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": down, f"{stem}.alpha": np.array(3, np.float32)})
    combine([(one, 2.0), (other, 1.0)], tmp_path / "out.safetensors")
    made = next(iter(open_adapter(tmp_path / "out.safetensors").deltas.values()))
    assert isinstance(made, LoRA) and np.isinf(made.up.doubles()).sum() == 1


def having(seed: int, name: str, value: float, kind: ExtraKind = ExtraKind.SAVED_MODULE) -> Adapter:
    return adapter({"m": lora(*factors(seed))}, extras=[Extra(kind, name, Tensor.of(np.full(3, value, np.float32)))])


@pytest.mark.parametrize("kind", [ExtraKind.SAVED_MODULE, ExtraKind.BIAS])
def test_that_no_multiplier_weakens_a_saved_tensor_is_said(kind: ExtraKind) -> None:
    """As merge says it; of an adapter with multiplier 0 nothing is applied, there as here."""
    one, other = having(1, "head.weight", 1.0, kind), adapter({"m": lora(*factors(2))})
    for multiplier, codes, kept in (
        (1.0, [], 1),
        (0.5, ["whole-replacement"], 1),
        (-1.0, ["whole-replacement"], 1),
        (0.0, ["left-out"], 0),
    ):
        made = combined([(other, 0.3), (one, multiplier)]).adapter
        assert [finding.code for finding in made.findings if finding.severity] == codes and len(made.extras) == kept


def test_saved_tensors_that_differ_are_given_up_by_name(tmp_path: Path) -> None:
    one, other = peft_folder(tmp_path / "one", 1, 4, 8), peft_folder(tmp_path / "other", 2, 4, 8)
    for folder, value in ((one, 1.0), (other, 2.0)):
        config = json.loads((folder / "adapter_config.json").read_text()) | {"modules_to_save": ["lm_head"]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        tensors = {name: tensor.read() for name, tensor in open_file(folder / "adapter_model.safetensors").tensors.items()}
        save(folder / "adapter_model.safetensors", tensors | {"base_model.model.lm_head.weight": np.full((40, 32), value, np.float32)})
    with pytest.raises(MismatchError, match="--drop saved-module"):
        combine([(one, 1.0), (other, 1.0)], tmp_path / "out")
    receipt = combine([(one, 1.0), (other, 1.0)], tmp_path / "out", drop=["saved-module"])
    assert [finding.code for finding in receipt.findings] == ["given-up", "given-up"]
    assert not open_adapter(tmp_path / "out").extras


@pytest.mark.parametrize(
    ("multiplier", "problem"), [(1e308, "the scale too large"), (1e200, "alpha does not fit"), (1e-60, "alpha does not fit")]
)
@pytest.mark.filterwarnings("error")
def test_an_alpha_that_its_dtype_cannot_hold_is_refused(tmp_path: Path, multiplier: float, problem: str) -> None:
    """Not stored as infinity, nor as zero."""
    up, down = factors(0)
    stem = "lora_unet_mid_block_attentions_0_proj_in"
    path = save(
        tmp_path / "a.safetensors",
        {f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": down, f"{stem}.alpha": np.array(6, np.float32)},
    )
    with pytest.raises(RefusedError, match=problem):
        combine([(path, multiplier)], tmp_path / "out.safetensors")
    assert [one.name for one in tmp_path.iterdir()] == ["a.safetensors"]
