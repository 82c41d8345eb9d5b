"""What training changed where it began from the base's own weights: against PEFT's own conversion and its trained models."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from peft.tuners.lora.config import CordaConfig, EvaConfig, LoraGAConfig  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tests.dialects.test_peft import TOKENS, gpt2, llama, loaded_strictly, output  # noqa: E402

from upparam.cli import main  # noqa: E402
from upparam.errors import MismatchError, RefusedError, UsageError  # noqa: E402
from upparam.operations.convert import convert  # noqa: E402
from upparam.operations.merge import merge  # noqa: E402
from upparam.operations.opening import open_adapter  # noqa: E402

CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "pissa": (llama, {"init_lora_weights": "pissa"}),
    "pissa approximate": (llama, {"init_lora_weights": "pissa_niter_4", "rank_pattern": {"layers.0.self_attn.q_proj": 3}}),
    "olora": (llama, {"init_lora_weights": "olora"}),
    "pissa rslora": (llama, {"init_lora_weights": "pissa", "use_rslora": True}),
    "pissa conv1d": (gpt2, {"init_lora_weights": "pissa", "target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "corda": (llama, {"init_lora_weights": "corda", "corda_config": CordaConfig(corda_method="kpm")}),
    "lora_ga": (llama, {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()}),
}
SAMPLES = torch.arange(256).reshape(8, 32) % 40


def prepared(model: Any, config: Any) -> None:
    """What CorDA and LoRA-GA look at before training: the weight seen through the covariance of inputs, and gradients of a first step."""
    if config.init_lora_weights == "corda":
        # PEFT's preprocess_corda needs another library for its table of results alone; they are left where its initialisation looks for them.
        for name, module in model.named_modules():
            if name.endswith(tuple(config.target_modules)):
                values = torch.randn(64, module.weight.shape[1], generator=torch.Generator().manual_seed(1))
                covariance = values.T @ values / 64
                up, sizes, down = torch.linalg.svd(module.weight.data @ covariance, full_matrices=False)
                right = torch.linalg.solve(covariance, down.T)
                module.eigens = SimpleNamespace(U_WC=up[:, : config.r], S_WC=sizes[: config.r], V_WC=right[:, : config.r])
    elif config.init_lora_weights == "lora_ga":
        from peft.tuners.lora.loraga import preprocess_loraga

        preprocess_loraga(model, config, lambda: model(input_ids=SAMPLES, labels=SAMPLES).loss.backward())


def trained(name: str, where: Path) -> tuple[Any, Any]:
    """The base as published in `base`, the first adapter in `initial`, the last in `trained`, PEFT's conversion in `theirs`."""
    make, settings = CASES[name]
    torch.manual_seed(3)
    base = make()
    base.save_pretrained(where / "base")
    state = {key: value.clone() for key, value in base.state_dict().items()}

    def again() -> Any:
        model = make()
        model.load_state_dict(state)
        return model

    torch.manual_seed(5)
    config = peft.LoraConfig(**({"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]} | settings))
    prepared(base, config)
    model = peft.get_peft_model(base, config)
    word = model.peft_config["default"].init_lora_weights
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(where / "initial")
    model.peft_config["default"].init_lora_weights = word
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())) * 0.1)
    expected = output(model, TOKENS)
    model.save_pretrained(where / "trained")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(where / "theirs", path_initial_model_for_weight_conversion=str(where / "initial"))
    return again, expected


@pytest.mark.parametrize("name", CASES)
def test_converted_as_the_library_does(name: str, tmp_path: Path) -> None:
    base, expected = trained(name, tmp_path)
    receipt = convert(tmp_path / "trained", tmp_path / "ours", "peft", initial=tmp_path / "initial")
    assert "bit-identical" in receipt.proofs[0]
    theirs, ours = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)
    configs = [json.loads((tmp_path / folder / "adapter_config.json").read_text()) for folder in ("theirs", "ours")]
    for key in ("r", "lora_alpha", "init_lora_weights", "use_rslora", "fan_in_fan_out"):
        assert configs[0][key] == configs[1][key] or pytest.approx(configs[0][key]) == configs[1][key], key
    assert torch.allclose(output(loaded_strictly(base(), tmp_path / "ours"), TOKENS), expected, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_merged_into_the_published_base(name: str, tmp_path: Path) -> None:
    base, expected = trained(name, tmp_path)
    with pytest.raises(RefusedError, match=r"init_lora_weights is .*--initial"):
        merge(tmp_path / "base", tmp_path / "trained", tmp_path / "refused")
    assert (
        main(
            [
                "merge",
                str(tmp_path / "base"),
                str(tmp_path / "trained"),
                "--initial",
                str(tmp_path / "initial"),
                "-o",
                str(tmp_path / "merged"),
            ]
        )
        == 0
    )
    model = base()
    model.load_state_dict(load_file(tmp_path / "merged/model.safetensors"), strict=False)
    assert torch.allclose(output(model, TOKENS), expected, atol=1e-5)
    assert not torch.allclose(output(base(), TOKENS), expected, atol=1e-3)


def test_without_it_the_word_is_kept_and_other_dialects_refuse(tmp_path: Path) -> None:
    trained("pissa", tmp_path)
    convert(tmp_path / "trained", tmp_path / "ours", "peft")
    assert json.loads((tmp_path / "ours/adapter_config.json").read_text())["init_lora_weights"] == "pissa"
    with pytest.raises(RefusedError, match="under which conditions"):
        convert(tmp_path / "trained", tmp_path / "ours.safetensors", "gguf-lora")
    assert open_adapter(tmp_path / "initial").conditions == []


def test_another_adapter_is_no_initial_one(tmp_path: Path) -> None:
    trained("pissa", tmp_path)
    path = tmp_path / "initial/adapter_model.safetensors"
    tensors = load_file(path)
    config = tmp_path / "initial/adapter_config.json"
    told = json.loads(config.read_text())
    config.write_text(json.dumps(told | {"lora_alpha": 7}))
    with pytest.raises(MismatchError, match=r"another scale.*expected 1.5, found 1.75"):
        convert(tmp_path / "trained", tmp_path / "ours", "peft", initial=tmp_path / "initial")
    config.write_text(json.dumps(told))
    save_file({key: tensor.half() for key, tensor in tensors.items()}, path)
    with pytest.raises(MismatchError, match="another dtype"):
        convert(tmp_path / "trained", tmp_path / "ours", "peft", initial=tmp_path / "initial")
    save_file({key: tensor for key, tensor in tensors.items() if "q_proj" in key}, path)
    with pytest.raises(MismatchError, match="changes other modules"):
        convert(tmp_path / "trained", tmp_path / "ours", "peft", initial=tmp_path / "initial")
    with pytest.raises(UsageError, match="belongs to one adapter"):
        merge(tmp_path / "base", [tmp_path / "trained", tmp_path / "theirs"], tmp_path / "ours", initial=tmp_path / "initial")
    assert not (tmp_path / "ours").exists()


def test_a_magnitude_has_no_difference(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        peft.get_peft_model(llama(), peft.LoraConfig(r=2, use_dora=True, target_modules=["q_proj"])).save_pretrained(tmp_path / folder)
    with pytest.raises(RefusedError, match="no concatenation"):
        convert(tmp_path / "a", tmp_path / "ours", "peft", initial=tmp_path / "b")


@pytest.mark.parametrize("word", ["eva", "orthogonal", "mica", "gaussian"])
def test_beginnings_that_leave_the_base_alone_are_plain_adapters(word: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    base = llama()
    base.save_pretrained(tmp_path / "base")
    state = {key: value.clone() for key, value in base.state_dict().items()}
    settings = {"eva_config": EvaConfig()} if word == "eva" else {}
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=word, **settings))
    if word == "eva":
        peft.initialize_lora_eva_weights(model, [{"input_ids": SAMPLES}] * 4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())) * 0.1)
    expected = output(model, TOKENS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "trained")
    assert open_adapter(tmp_path / "trained").conditions == []
    merge(tmp_path / "base", tmp_path / "trained", tmp_path / "merged")
    again = llama()
    again.load_state_dict(state)
    again.load_state_dict(load_file(tmp_path / "merged/model.safetensors"), strict=False)
    assert torch.allclose(output(again, TOKENS), expected, atol=1e-5)
