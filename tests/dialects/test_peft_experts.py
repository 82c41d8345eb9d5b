"""PEFT's target_parameters: the experts of a mixture, against the real library on tiny models of both storage orders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402
from tests.dialects.test_peft import TOKENS, loaded_strictly, output, save  # noqa: E402

from upparam.adapter import Target  # noqa: E402
from upparam.algorithms.base import Scaling  # noqa: E402
from upparam.algorithms.experts import ExpertLoRA  # noqa: E402
from upparam.cli import main  # noqa: E402
from upparam.dialects.base import ReadOptions  # noqa: E402
from upparam.errors import AmbiguousError, DeadAdapterError, MalformedError, RefusedError  # noqa: E402
from upparam.operations.convert import convert  # noqa: E402
from upparam.operations.merge import merge  # noqa: E402
from upparam.operations.opening import open_adapter  # noqa: E402
from upparam.operations.resize import RankRule, resize  # noqa: E402
from upparam.tensors import Tensor  # noqa: E402

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 30}
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def qwen() -> Any:
    """Experts stored as (experts, out, in)."""
    config = transformers.Qwen3MoeConfig(**SMALL, intermediate_size=24, moe_intermediate_size=12, num_experts=4, num_experts_per_tok=2)
    return seeded(transformers.Qwen3MoeForCausalLM(config))


def gpt_oss(inner: int = 12) -> Any:
    """Experts stored as (experts, in, out)."""
    config = transformers.GptOssConfig(**SMALL, intermediate_size=inner, num_local_experts=4, num_experts_per_tok=2)
    return seeded(transformers.GptOssForCausalLM(config))


def seeded(model: Any) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.1)
    return model


def adapted(model: Any, folder: Path, parameters: list[str], **settings: Any) -> Any:
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=3, lora_alpha=6, target_parameters=parameters, target_modules=["q_proj"], **settings)
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) * 0.2)
    wrapped.save_pretrained(folder)
    return wrapped


@pytest.mark.parametrize("parameters", [BOTH, BOTH[:1], BOTH[1:]], ids=["both", "gate_up", "down"])
@pytest.mark.parametrize("build", [qwen, gpt_oss])
def test_read_written_and_merged_as_the_real_library_does(build: Any, parameters: list[str], tmp_path: Path) -> None:
    model = build()
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    wrapped = adapted(model, tmp_path / "theirs", parameters, rank_pattern={"down_proj": 2}, alpha_pattern={r"layers.0.*gate_up_proj": 5})
    expected = output(wrapped, TOKENS)
    adapter = open_adapter(tmp_path / "theirs")
    names = {target.parameter for target in adapter.deltas if target.module == "model.layers.0.mlp.experts"}
    assert names == {parameter.rpartition(".")[2] for parameter in parameters}
    assert not adapter.leftovers
    convert(tmp_path / "theirs", tmp_path / "ours", "peft")
    theirs, ours = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours"))
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[key], ours[key]) for key in theirs)
    assert torch.equal(output(loaded_strictly(build(), tmp_path / "ours"), TOKENS), expected)
    merge(tmp_path / "base.safetensors", tmp_path / "ours", tmp_path / "merged.safetensors")
    merged = load_file(tmp_path / "merged.safetensors")
    for name, value in wrapped.merge_and_unload().state_dict().items():
        assert torch.allclose(merged[name], value, atol=1e-6), name


def test_square_weights_lie_as_their_neighbours_do(tmp_path: Path) -> None:
    """gpt-oss has square down projections; only gate_up, not square, shows the order."""
    model = gpt_oss(inner=16)
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    wrapped = adapted(model, tmp_path / "theirs", BOTH)
    merge(tmp_path / "base.safetensors", tmp_path / "theirs", tmp_path / "merged.safetensors")
    merged = load_file(tmp_path / "merged.safetensors")
    for name, value in wrapped.merge_and_unload().state_dict().items():
        assert torch.allclose(merged[name], value, atol=1e-6), name
    adapted(gpt_oss(inner=16), tmp_path / "alone", BOTH[1:])
    with pytest.raises(AmbiguousError, match="square"):
        merge(tmp_path / "base.safetensors", tmp_path / "alone", tmp_path / "no.safetensors")


def test_a_rewritten_config_targets_the_same_parameters(tmp_path: Path) -> None:
    model = qwen()
    expected = output(adapted(model, tmp_path / "theirs", BOTH), TOKENS)
    (tmp_path / "theirs/extra.txt").write_text("")
    adapter = open_adapter(tmp_path / "theirs")
    adapter.spelling.pop("targets")
    adapter.save(tmp_path / "ours")
    config = json.loads((tmp_path / "ours/adapter_config.json").read_text())
    assert config["target_parameters"] == sorted(f"model.layers.{layer}.{name}" for layer in (0, 1) for name in BOTH)
    assert torch.equal(output(loaded_strictly(qwen(), tmp_path / "ours"), TOKENS), expected)


def test_without_the_rank_nothing_is_guessed(tmp_path: Path) -> None:
    adapted(qwen(), tmp_path / "theirs", BOTH[:1])
    path = tmp_path / "theirs/adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in config.items() if key != "r"}))
    with_rank = open_adapter(tmp_path / "theirs", options=ReadOptions(rank=3))
    assert isinstance(with_rank.deltas[Target("model.layers.0.mlp.experts", None, "gate_up_proj")], ExpertLoRA)
    without = open_adapter(tmp_path / "theirs")
    assert len(without.leftovers) == 4
    assert "parameter-unknown" in {finding.code for finding in without.findings}


def test_wrappers_that_cannot_be_told_apart_stay_unread(tmp_path: Path) -> None:
    stem = "base_model.model.layers.0.experts"
    tensors = {f"{stem}{nest}.lora_{word}.weight": torch.ones(8, 8) for nest in ("", ".base_layer") for word in "AB"}
    with pytest.raises(DeadAdapterError):
        open_adapter(save(tmp_path / "a", tensors, {"r": 4, "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}))


def test_resizing_leaves_experts_as_they_are(tmp_path: Path) -> None:
    adapted(qwen(), tmp_path / "theirs", BOTH[:1])
    receipt = resize(tmp_path / "theirs", tmp_path / "ours", RankRule(rank=2))
    assert "not-resized" in {finding.code for finding in receipt.findings}
    loaded_strictly(qwen(), tmp_path / "ours")


@pytest.mark.parametrize("swapped", [False, True])
def test_rows_and_norm_agree_with_each_experts_product(swapped: bool) -> None:
    rng = np.random.default_rng(0)
    up, down = rng.standard_normal((5, 12)).astype(np.float32), rng.standard_normal((12, 7)).astype(np.float32)
    delta = ExpertLoRA(Tensor.of(up), Tensor.of(down), 4, Scaling(alpha=1.5), swapped)
    weights = np.stack([up[:, expert::4].astype(np.float64) @ down[expert * 3 : expert * 3 + 3] for expert in range(4)]) * 0.5
    weights = weights.swapaxes(1, 2) if swapped else weights
    assert delta.shape == weights.shape and delta.rank == 3
    np.testing.assert_allclose(delta.load().rows(1, 3), weights[1:3].reshape(2, -1), rtol=1e-12)
    assert delta.frobenius() == pytest.approx(np.linalg.norm(weights), rel=1e-12)
    assert delta.other_way().shape == (4, *reversed(weights.shape[1:]))


def test_factors_that_do_not_divide_among_the_experts() -> None:
    with pytest.raises(MalformedError, match="experts"):
        ExpertLoRA(Tensor.of(np.ones((5, 10), np.float32)), Tensor.of(np.ones((10, 7), np.float32)), 4)


@pytest.mark.parametrize("build", [qwen, gpt_oss])
def test_inspect_and_verify_tell_the_norm_of_all_experts(build: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrapped = adapted(build(), tmp_path / "theirs", BOTH)
    wanted = {name: value.clone() for name, value in build().state_dict().items()}
    assert main(["inspect", str(tmp_path / "theirs"), "--json"]) == 0
    told = {module["target"]: module for module in json.loads(capsys.readouterr().out)["modules"]}
    assert main(["verify", str(tmp_path / "theirs")]) == 0
    merged = wrapped.merge_and_unload().state_dict()
    for name in ("model.layers.0.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"):
        change = merged[name].double() - wanted[name].double()
        assert told[name]["frobenius"] == pytest.approx(float(change.norm()), rel=1e-5)
        assert told[name]["spectral"] is None


@pytest.mark.parametrize("dialect", ["kohya", "lycoris", "comfyui", "onetrainer", "diffusers", "mlx", "gguf-lora", "loralib"])
def test_experts_alone_are_refused_for_what_they_are(dialect: str, tmp_path: Path) -> None:
    """No base would help: what stands in the way is the parameter, not its name."""
    wrapped = peft.get_peft_model(qwen(), peft.LoraConfig(r=2, target_modules=[], target_parameters=BOTH))
    wrapped.save_pretrained(tmp_path / "theirs")
    with pytest.raises(RefusedError, match=r"experts.*: a delta of the (gate_up|down)_proj.*peft and triad hold it") as told:
        convert(tmp_path / "theirs", tmp_path / "ours.safetensors", dialect)
    assert "--base" not in told.value.line()
