"""PEFT: the real library loads what we write, with every key, and computes the same; its own files come back bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from upparam.dialects.base import ReadOptions  # noqa: E402
from upparam.errors import DeadAdapterError, NotAnAdapterError, RefusedError, SeveralAdaptersError, UsageError  # noqa: E402
from upparam.operations.convert import convert, write_adapter  # noqa: E402
from upparam.operations.opening import open_adapter  # noqa: E402


def llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    return transformers.LlamaForCausalLM(config)


def llama_classifier() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    return transformers.LlamaForSequenceClassification(config)


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=16))


def bert() -> Any:
    config = transformers.BertConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    return transformers.BertForSequenceClassification(config)


def bare_bert() -> Any:
    """Without a head, so that names have no `bert.` in front."""
    config = transformers.BertConfig(vocab_size=40, hidden_size=768, num_hidden_layers=1, num_attention_heads=4, intermediate_size=3072)
    return transformers.BertModel(config, add_pooling_layer=False)


class ConvNet(torch.nn.Module):  # type: ignore[misc, name-defined, unused-ignore]
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.second = torch.nn.Conv2d(8, 8, 1)
        self.head = torch.nn.Linear(8, 5)

    def forward(self, x: Any) -> Any:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))).mean((-1, -2)))


TOKENS = torch.arange(12).reshape(2, 6)
CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "llama": (llama, {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}),
    "llama patterns": (
        llama,
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"layers.0.self_attn.q_proj": 6}, "alpha_pattern": {"v_proj": 3}},
    ),
    "llama rslora": (llama, {"target_modules": ["q_proj"], "use_rslora": True}),
    "llama some layers": (llama, {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "llama regular expression": (llama, {"target_modules": r".*layers\.1.*(q|k)_proj"}),
    "llama all linear": (llama, {"target_modules": "all-linear"}),
    "llama embeddings": (llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "llama head saved": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "llama score": (llama_classifier, {"target_modules": ["q_proj"], "task_type": "SEQ_CLS"}),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "bert": (bert, {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "bert biases": (bert, {"target_modules": ["query", "value"], "bias": "lora_only"}),
    "bert all biases": (bert, {"target_modules": ["query"], "bias": "all"}),
    "bert without a head": (bare_bert, {"target_modules": ["query", "dense"], "task_type": "FEATURE_EXTRACTION"}),
    "bert biases of up": (
        bert,
        {"target_modules": ["query", "value"], "lora_bias": True, "alpha_pattern": {"value": 3}, "task_type": "SEQ_CLS"},
    ),
    "conv": (ConvNet, {"target_modules": ["first", "second", "head"]}),
    "conv biases of up": (ConvNet, {"target_modules": ["first", "second", "head"], "lora_bias": True}),
}


def inputs(model: Any) -> Any:
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1)) if isinstance(model, ConvNet) else TOKENS


def output(model: Any, given: Any) -> Any:
    model.eval()
    with torch.no_grad():
        found = model(given)
    return found if isinstance(found, torch.Tensor) else found[0]


def repeatable(build: Callable[[], Any]) -> Callable[[], Any]:
    """What makes the same seeded model again and again."""
    torch.manual_seed(3)
    state = build().state_dict()

    def again() -> Any:
        model = build()
        model.load_state_dict(state)
        return model

    return again


def trained(name: str, folder: Path) -> tuple[Callable[[], Any], Any]:
    """Save an adapter with seeded factors (the last step of any training) and return how to make its base, and its outputs."""
    build, settings = CASES[name]
    torch.manual_seed(3)
    base = build()
    base_state = {key: value.clone() for key, value in base.state_dict().items()}

    def again() -> Any:
        model = build()
        model.load_state_dict(base_state)
        return model

    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=6, lora_dropout=0.0, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    model.save_pretrained(folder)
    return again, output(model, inputs(base))


def loaded_strictly(model: Any, folder: Path) -> Any:
    """The model with the adapter in `folder`; no key missing, none unexpected."""
    config = peft.PeftConfig.from_pretrained(folder)
    wrapped = peft.get_peft_model(model, config)
    state = peft.load_peft_weights(str(folder), device="cpu")
    result = peft.set_peft_model_state_dict(wrapped, state)
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora_" in key or "modules_to_save" in key]
    return wrapped


@pytest.mark.parametrize("name", CASES)
def test_the_real_library_loads_what_we_write_and_computes_the_same(name: str, tmp_path: Path) -> None:
    base, expected = trained(name, tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours", "peft")
    assert json.loads((tmp_path / "ours/adapter_config.json").read_text()) == json.loads(
        (tmp_path / "theirs/adapter_config.json").read_text()
    )
    theirs, ours = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)
    model = base()
    assert torch.equal(output(loaded_strictly(model, tmp_path / "ours"), inputs(model)), expected)


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("llama patterns", "llama rslora", "bert biases of up")])
def test_an_adapter_without_its_config_is_healed(name: str, tmp_path: Path) -> None:
    base, expected = trained(name, tmp_path / "theirs")
    (tmp_path / "theirs/adapter_config.json").unlink()
    adapter = open_adapter(tmp_path / "theirs")
    assert all(delta.scale is None for delta in adapter.deltas.values())
    with pytest.raises(RefusedError, match="--alpha"):
        convert(tmp_path / "theirs", tmp_path / "ours", "peft")
    assert not (tmp_path / "ours").exists()
    adapter = open_adapter(tmp_path / "theirs", options=ReadOptions(alpha=6.0))
    adapter.transposed_base = True if name == "gpt2" else None
    write_adapter(adapter, tmp_path / "ours", "peft", read=ReadOptions(alpha=6.0))
    model = base()
    assert torch.equal(output(loaded_strictly(model, tmp_path / "ours"), inputs(model)), expected)


def test_healing_finds_rank_patterns(tmp_path: Path) -> None:
    trained("llama patterns", tmp_path / "theirs")
    (tmp_path / "theirs/adapter_config.json").unlink()
    convert(tmp_path / "theirs", tmp_path / "ours", "peft", read=ReadOptions(alpha=6.0))
    config = json.loads((tmp_path / "ours/adapter_config.json").read_text())
    assert config["r"] == 4
    assert list(config["rank_pattern"].values()) == [6]
    loaded_strictly(llama(), tmp_path / "ours")


def test_a_training_checkpoint_gives_its_adapter(tmp_path: Path) -> None:
    base, expected = trained("llama head saved", tmp_path / "theirs")
    model = peft.PeftModel.from_pretrained(base(), tmp_path / "theirs")
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    torch.save(model.state_dict(), checkpoint / "pytorch_model.bin")
    adapter = open_adapter(checkpoint / "pytorch_model.bin", options=ReadOptions(alpha=6.0))
    assert not adapter.leftovers
    assert [extra.name for extra in adapter.extras] == ["lm_head.weight"]
    (note,) = [finding for finding in adapter.findings if finding.code == "base-weights-beside"]
    assert "base's own weights" in note.message
    convert(checkpoint / "pytorch_model.bin", tmp_path / "ours", "peft", read=ReadOptions(alpha=6.0))
    assert torch.equal(output(loaded_strictly(base(), tmp_path / "ours"), TOKENS), expected)


def test_names_without_the_wrapper_are_read(tmp_path: Path) -> None:
    base, expected = trained("llama", tmp_path / "theirs")
    path = tmp_path / "theirs/adapter_model.safetensors"
    save_file({key.removeprefix("base_model.model."): value for key, value in load_file(path).items()}, path)
    convert(tmp_path / "theirs", tmp_path / "ours", "peft")
    assert torch.equal(output(loaded_strictly(base(), tmp_path / "ours"), TOKENS), expected)


def save(folder: Path, tensors: dict[str, Any], config: dict[str, Any] | None = None) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8} | config))
    return folder


Q = "base_model.model.model.layers.0.self_attn.q_proj"


def test_what_the_user_says_must_not_contradict_the_config(tmp_path: Path) -> None:
    folder = save(tmp_path / "a", {f"{Q}.lora_A.weight": torch.ones(4, 8), f"{Q}.lora_B.weight": torch.ones(8, 4)}, {})
    assert open_adapter(folder, options=ReadOptions(alpha=8.0)).deltas
    with pytest.raises(UsageError, match="another alpha"):
        open_adapter(folder, options=ReadOptions(alpha=16.0))
    with pytest.raises(UsageError, match="another scale"):
        open_adapter(folder, options=ReadOptions(scale=1.0))


def test_several_adapters_in_one_file(tmp_path: Path) -> None:
    tensors = {f"{Q}.lora_{factor}.{name}.weight": torch.ones(4, 4) for factor in "AB" for name in ("one", "two")}
    with pytest.raises(SeveralAdaptersError, match=r"one, two.*--adapter NAME") as caught:
        open_adapter(save(tmp_path / "a", tensors, {}))
    assert caught.value.names == ("one", "two") and str(caught.value.file).endswith("adapter_model.safetensors")


def test_only_half_an_adapter_is_dead(tmp_path: Path) -> None:
    with pytest.raises(DeadAdapterError, match="lora_B"):
        open_adapter(save(tmp_path / "a", {f"{Q}.lora_A.weight": torch.ones(4, 4)}, {}))


def test_prompt_tuning_is_explained_and_refused(tmp_path: Path) -> None:
    tensors = {f"{Q}.lora_A.weight": torch.ones(4, 4), f"{Q}.lora_B.weight": torch.ones(4, 4)}
    with pytest.raises(NotAnAdapterError, match="prompt tuning learns inputs"):
        open_adapter(save(tmp_path / "a", tensors, {"peft_type": "PROMPT_TUNING"}))


def test_an_odd_factor_is_left_over_and_said(tmp_path: Path) -> None:
    good = {f"{Q}.lora_A.weight": torch.ones(4, 8), f"{Q}.lora_B.weight": torch.ones(8, 4)}
    adapter = open_adapter(save(tmp_path / "a", good | {f"{Q.replace('q_', 'k_')}.lora_A.weight": torch.ones(4, 8)}, {}))
    assert len(adapter.deltas) == 1 and len(adapter.leftovers) == 1
    assert "orphan" in {finding.code for finding in adapter.findings}


@pytest.mark.parametrize("folder", ["peft-bloom", "peft-gpt2", "peft-distilbert-imdb", "peft-sd-unet", "peft-gpt2-tigrinya"])
def test_real_adapters_come_back(corpus: Path, folder: str, tmp_path: Path) -> None:
    receipt = convert(corpus / folder, tmp_path / "out", "peft")
    assert "bit-identical" in receipt.proofs[0]
    if folder != "peft-bloom":
        theirs, ours = (load_file(where / "adapter_model.safetensors") for where in (corpus / folder, tmp_path / "out"))
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[key], ours[key]) for key in theirs)
        assert json.loads((corpus / folder / "adapter_config.json").read_text()) == json.loads(
            (tmp_path / "out/adapter_config.json").read_text()
        )


def test_the_old_merged_linear_form_becomes_one_that_todays_library_loads(corpus: Path, tmp_path: Path) -> None:
    """Against PEFT v0.2.0's own arithmetic (MergedLinear: grouped B, zero-padded rows), on a Bloom of one layer."""
    source = torch.load(corpus / "peft-bloom/adapter_model.bin", weights_only=True, map_location="cpu")
    stem = "base_model.model.transformer.h.0.self_attention.query_key_value"
    a, b = source[f"{stem}.lora_A.weight"], source[f"{stem}.lora_B.weight"].squeeze(-1)
    expected = torch.zeros(3072, 1024)
    expected[:1024], expected[2048:] = 2 * b[:1024] @ a[:8], 2 * b[1024:] @ a[8:]
    convert(corpus / "peft-bloom", tmp_path / "out", "peft")
    config = transformers.BloomConfig(vocab_size=64, hidden_size=1024, n_layer=24, n_head=16)
    with torch.device("meta"):
        model = transformers.BloomForCausalLM(config)
    model = loaded_strictly(model.to_empty(device="cpu"), tmp_path / "out")
    layer = model.base_model.model.transformer.h[0].self_attention.query_key_value
    np.testing.assert_allclose(layer.get_delta_weight("default").detach().numpy(), expected.numpy(), atol=1e-6)


def test_kohya_files_become_peft_adapters_of_one_component(corpus: Path, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    convert(corpus / "sd15-haseebae", tmp_path / "out", "peft")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 4)
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(cross_attention_dim=768)
    loaded_strictly(unet, tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
