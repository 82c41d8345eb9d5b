"""PEFT in the forms it takes in the wild: checkpoints, several components, trained tokens, resized vocabularies, what is no adapter."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402
from tests.dialects.files import tensor_file  # noqa: E402
from tests.dialects.test_peft import TOKENS, bert, llama, loaded_strictly, output, repeatable, save, trained  # noqa: E402
from tests.matrix.specimens import specimen  # noqa: E402

from upparam.adapter import ExtraKind  # noqa: E402
from upparam.algorithms.lowrank import RankRule  # noqa: E402
from upparam.bases.find import find_base  # noqa: E402
from upparam.containers import open_file  # noqa: E402
from upparam.dialects import get  # noqa: E402
from upparam.dialects.base import ReadOptions  # noqa: E402
from upparam.dialects.peft_names import sort  # noqa: E402
from upparam.errors import DeadAdapterError, NotAnAdapterError, RefusedError  # noqa: E402
from upparam.operations.convert import convert, write_adapter  # noqa: E402
from upparam.operations.extract import extract  # noqa: E402
from upparam.operations.merge import merge  # noqa: E402
from upparam.operations.opening import open_adapter  # noqa: E402
from upparam.tensors import Tensor  # noqa: E402

Q = "base_model.model.model.layers.0.self_attn.q_proj"
FACTORS = {f"{Q}.lora_A.weight": torch.ones(4, 32), f"{Q}.lora_B.weight": torch.ones(32, 4)}


def adapted(model: Any, folder: Path, **settings: Any) -> Any:
    """`model` with a seeded adapter, saved to `folder`."""
    torch.manual_seed(5)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, **settings))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    wrapped.save_pretrained(folder)
    return wrapped


def same_files(theirs: Path, ours: Path) -> None:
    """Every tensor and the config come back."""
    one, other = (load_file(where / "adapter_model.safetensors") for where in (theirs, ours))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert json.loads((theirs / "adapter_config.json").read_text()) == json.loads((ours / "adapter_config.json").read_text())


@pytest.mark.parametrize("base", ["sd1.5", "flux.1-dev"])
def test_several_components_are_folders_and_open_as_one(base: str, tmp_path: Path) -> None:
    adapter = specimen("text encoder", base)
    write_adapter(adapter, tmp_path / "out", "peft")
    main = "unet" if base == "sd1.5" else "transformer"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {main, "text_encoder"}
    again = open_adapter(tmp_path / "out")
    assert set(again.deltas) == set(adapter.deltas)
    convert(tmp_path / "out", tmp_path / "again", "peft")
    for component in (main, "text_encoder"):
        same_files(tmp_path / "out" / component, tmp_path / "again" / component)
    alone = open_adapter(tmp_path / "out" / main)
    assert set(alone.deltas) == {target for target in adapter.deltas if target.module.startswith(main)}


def test_each_component_loads_in_its_model(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    write_adapter(specimen("text encoder", "sd1.5"), tmp_path / "out", "peft")
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(cross_attention_dim=768)
    loaded_strictly(unet, tmp_path / "out/unet")


@pytest.mark.parametrize(("front", "nest"), [("", ""), ("module.", ""), ("model.", "state_dict"), ("_orig_mod.", ""), ("", "module")])
def test_a_checkpoint_inside_a_trainers_wrapper(front: str, nest: str, tmp_path: Path) -> None:
    model = bert()
    again = bert()
    again.load_state_dict(model.state_dict())
    wrapped = adapted(model, tmp_path / "theirs", target_modules=["query"], bias="all", task_type="SEQ_CLS")
    expected = output(wrapped, TOKENS)
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    state = {front + key: value for key, value in wrapped.state_dict().items()}
    torch.save({nest: state, "epoch": 1} if nest else state, checkpoint / "pytorch_model.bin")
    (checkpoint / "adapter_config.json").write_text((tmp_path / "theirs/adapter_config.json").read_text())
    adapter = open_adapter(checkpoint)
    assert any(extra.name.endswith("LayerNorm.bias") for extra in adapter.extras)
    assert any(finding.code == "base-weights-beside" for finding in adapter.findings)
    convert(checkpoint, tmp_path / "ours", "peft")
    theirs, ours = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours"))
    doubled = {f"base_model.model.classifier.{word}.bias" for word in ("modules_to_save", "original_module")}
    assert theirs.keys() - doubled == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in ours)
    assert torch.equal(output(loaded_strictly(again, tmp_path / "ours"), TOKENS), expected)


@pytest.mark.parametrize(
    "inner", ["_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module._checkpoint_wrapped_module."]
)
def test_wrappers_around_single_blocks_are_no_part_of_a_modules_name(inner: str, tmp_path: Path) -> None:
    """Names that kept them would be of modules no base has, and PEFT would load the result without applying it."""
    model = bert()
    again = bert()
    again.load_state_dict(model.state_dict())
    wrapped = adapted(model, tmp_path / "theirs", target_modules=["query", "dense"], task_type="SEQ_CLS")
    theirs = load_file(tmp_path / "theirs/adapter_model.safetensors")
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    state = {re.sub(r"(layer\.\d+\.|^)", rf"\1{inner}", key): value for key, value in theirs.items()}
    torch.save(state, checkpoint / "adapter_model.bin")
    (checkpoint / "adapter_config.json").write_text((tmp_path / "theirs/adapter_config.json").read_text())
    convert(checkpoint, tmp_path / "ours", "peft")
    ours = load_file(tmp_path / "ours/adapter_model.safetensors")
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[key], ours[key]) for key in ours)
    assert torch.equal(output(loaded_strictly(again, tmp_path / "ours"), TOKENS), output(wrapped, TOKENS))


def test_trained_tokens_ride_along(tmp_path: Path) -> None:
    adapted(llama(), tmp_path / "theirs", target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 5]})
    adapter = open_adapter(tmp_path / "theirs")
    assert [(extra.kind, extra.tensor.shape) for extra in adapter.extras] == [(ExtraKind.OTHER, (2, 32))]
    convert(tmp_path / "theirs", tmp_path / "ours", "peft")
    same_files(tmp_path / "theirs", tmp_path / "ours")
    loaded_strictly(llama(), tmp_path / "ours")
    llama().save_pretrained(tmp_path / "base")
    with pytest.raises(RefusedError, match="other"):
        merge(tmp_path / "base", tmp_path / "theirs", tmp_path / "merged")


def test_a_resized_vocabulary_comes_back(tmp_path: Path) -> None:
    model = llama()
    model.resize_token_embeddings(48, mean_resizing=False)
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    wrapped.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    adapter = open_adapter(tmp_path / "theirs")
    assert {extra.name for extra in adapter.extras} == {"model.embed_tokens.weight", "lm_head.weight"}
    convert(tmp_path / "theirs", tmp_path / "ours", "peft")
    same_files(tmp_path / "theirs", tmp_path / "ours")


def test_a_dropped_head_leaves_a_config_that_loads(tmp_path: Path) -> None:
    adapted(bert(), tmp_path / "theirs", target_modules=["query"], task_type="SEQ_CLS")
    convert(tmp_path / "theirs", tmp_path / "ours", "peft", drop={"saved-module"})
    config = json.loads((tmp_path / "ours/adapter_config.json").read_text())
    assert (config["modules_to_save"], config["task_type"]) == (None, None)
    loaded_strictly(bert(), tmp_path / "ours")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"init_lora_weights": "pissa"}, "initial factors"),
        ({"init_lora_weights": "olora"}, "initial factors"),
        ({"init_lora_weights": "pissa_niter_4"}, "initial factors"),
        ({"alora_invocation_tokens": [1, 2]}, "invocation"),
        ({"layer_replication": [[0, 1], [0, 2]]}, "repeated layers"),
    ],
)
def test_what_the_factors_alone_do_not_say_is_not_lost(settings: dict[str, Any], reason: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "theirs", FACTORS, {"target_modules": [Q.removeprefix("base_model.model.")], **settings})
    assert reason in open_adapter(folder).conditions[0]
    convert(folder, tmp_path / "ours", "peft")
    same_files(folder, tmp_path / "ours")
    llama().save_pretrained(tmp_path / "base")
    with pytest.raises(RefusedError, match=reason):
        merge(tmp_path / "base", folder, tmp_path / "merged")
    with pytest.raises(RefusedError, match="--drop conditions"):
        convert(folder, tmp_path / "diffusers", "diffusers")
    convert(folder, tmp_path / "plain", "peft", drop={"conditions"})
    config = json.loads((tmp_path / "plain/adapter_config.json").read_text())
    assert (
        config.get("init_lora_weights", True) is True and not config.get("alora_invocation_tokens") and not config.get("layer_replication")
    )


def test_plain_initialisations_are_no_condition(tmp_path: Path) -> None:
    for index, start in enumerate([True, False, "gaussian", "eva", "orthogonal"]):
        assert not open_adapter(save(tmp_path / str(index), FACTORS, {"init_lora_weights": start})).conditions


def test_pissa_really_changes_the_base(tmp_path: Path) -> None:
    """The condition is true: with the same factors PEFT computes something else than W + scale B A."""
    wrapped = adapted(llama(), tmp_path / "theirs", target_modules=["q_proj"], init_lora_weights="pissa")
    torch.manual_seed(3)
    base = llama()
    merged = peft.PeftModel.from_pretrained(base, tmp_path / "theirs").merge_and_unload()
    torch.manual_seed(3)
    weight = llama().model.layers[0].self_attn.q_proj.weight
    layer = wrapped.base_model.model.model.layers[0].self_attn.q_proj
    assert not torch.allclose(merged.model.layers[0].self_attn.q_proj.weight, weight + layer.get_delta_weight("default"), atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (peft.PromptTuningConfig, {"num_virtual_tokens": 3}),
        (peft.PrefixTuningConfig, {"num_virtual_tokens": 3}),
        (peft.PromptEncoderConfig, {"num_virtual_tokens": 3, "encoder_hidden_size": 8}),
    ],
)
def test_virtual_tokens_are_named_and_refused(kind: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    peft.get_peft_model(llama(), kind(task_type="CAUSAL_LM", **settings)).save_pretrained(tmp_path / "theirs")
    with pytest.raises(NotAnAdapterError, match="learns inputs, not changes of weights"):
        open_adapter(tmp_path / "theirs")
    (tmp_path / "theirs/adapter_config.json").unlink()
    with pytest.raises(NotAnAdapterError, match="learns inputs"):
        open_adapter(tmp_path / "theirs")


def test_an_unknown_method_of_peft_is_named(tmp_path: Path) -> None:
    model = peft.get_peft_model(llama(), peft.FourierFTConfig(n_frequency=10, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "theirs")
    with pytest.raises(NotAnAdapterError, match=r"FOURIERFT.*merge_and_unload"):
        open_adapter(tmp_path / "theirs")


def test_bottleneck_adapters_are_explained(tmp_path: Path) -> None:
    """Names as adapter-hub/adapters saves them (pytorch_adapter.bin)."""
    stem = "bert.encoder.layer.0.output.adapters.sst.adapter"
    tensors = {f"{stem}_down.0.weight": torch.ones(4, 8), f"{stem}_down.0.bias": torch.ones(4), f"{stem}_up.weight": torch.ones(8, 4)}
    save_file(tensors, tmp_path / "adapter.safetensors")
    with pytest.raises(NotAnAdapterError, match="non-linearity"):
        open_adapter(tmp_path / "adapter.safetensors")


def test_words_of_adapters_are_never_taken_for_saved_modules(tmp_path: Path) -> None:
    folder = save(tmp_path / "a", FACTORS | {f"{Q}.lora_diag": torch.ones(4), "base_model.model.model.norm.weight": torch.ones(32)}, {})
    adapter = open_adapter(folder)
    assert list(adapter.leftovers) == [f"{Q}.lora_diag"]
    assert [extra.name for extra in adapter.extras] == ["model.norm.weight"]


def test_an_adapter_of_one_layer_is_no_checkpoint(tmp_path: Path) -> None:
    """An adapted embedding is saved with the base's own weight beside its factors; that does not make the file a checkpoint."""
    base, expected = trained("llama embeddings", tmp_path / "theirs")
    adapter = open_adapter(tmp_path / "theirs")
    assert [extra.name for extra in adapter.extras] == ["model.embed_tokens.weight"]
    merge_base = base()
    merge_base.config.tie_word_embeddings = False
    merge_base.save_pretrained(tmp_path / "base")
    merge(tmp_path / "base", tmp_path / "theirs", tmp_path / "merged")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(output(again, TOKENS), expected, atol=1e-4)


def test_no_tensor_is_lost_in_reading(tmp_path: Path) -> None:
    """A tensor of every kind of name: each is a factor, an extra, a leftover, or counted among the base's own weights."""
    odd = {
        f"{Q}.lora_B.bias": torch.ones(32),
        "base_model.vera_A": torch.ones(4, 32),
        "something": torch.ones(3),
        f"{Q}.lora_E": torch.ones(4, 1),
    }
    tensors = {
        **FACTORS, **{key.replace("q_proj", "v_proj"): value.clone() for key, value in FACTORS.items()}, **odd,
        "base_model.model.lm_head.weight": torch.ones(40, 32), "base_model.model.model.norm.bias": torch.ones(32),
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 32),
    }  # fmt: skip
    adapter = open_adapter(save(tmp_path / "a", tensors, {"bias": "all"}))
    held = sum(len(delta.factors()) for delta in adapter.deltas.values()) + len(adapter.extras) + len(adapter.leftovers)
    assert held == len(tensors)
    with pytest.raises(RefusedError, match="--drop leftovers"):
        convert(tmp_path / "a", tmp_path / "ours", "peft")


def test_factors_of_an_unknown_kind_are_not_called_dead(tmp_path: Path) -> None:
    folder = save(tmp_path / "a", {f"{Q}.lora_E": torch.ones(4, 1), f"{Q}.hada_w1_a": torch.ones(4, 4)}, {})
    with pytest.raises(RefusedError, match="does not know"):
        open_adapter(folder)


@pytest.mark.parametrize(
    ("kind", "have", "missing"),
    [("OFT", "oft_s", "oft_r"), ("BOFT", "boft_s", "boft_R"), ("ADALORA", "lora_E", "lora_A and lora_B"), ("VERA", "vera_lambda_b", "vera_lambda_d")],
)  # fmt: skip
def test_what_is_missing_is_named(kind: str, have: str, missing: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "a", {f"{Q}.{have}": torch.ones(4, 1)}, {"peft_type": kind})
    with pytest.raises(DeadAdapterError, match=f"no module has its {missing} "):
        open_adapter(folder)


def test_loralib_and_its_like_are_not_taken_for_peft() -> None:
    tensors = {f"transformer.h.0.attn.c_attn.lora_{word}": Tensor.of(np.ones((4, 4), np.float32)) for word in "AB"}
    assert get("peft").match(tensor_file(tensors)) is None
    assert get("peft").match(tensor_file({f"{name}.weight": tensor for name, tensor in tensors.items()})) is not None


def test_a_lora_of_a_grouped_convolution_is_told_and_the_rest_is_read(tmp_path: Path) -> None:
    """No product of two matrices gives its dW; PEFT itself runs it and refuses to merge it."""
    model = torch.nn.Sequential(torch.nn.Conv2d(8, 16, 3, groups=4), torch.nn.Flatten(), torch.nn.LazyLinear(16))
    model(torch.zeros(1, 8, 5, 5))
    adapted(model, tmp_path / "lora", target_modules=["0", "2"])
    adapter = open_adapter(tmp_path / "lora")
    assert [target.module for target in adapter.deltas] == ["2"] and len(adapter.leftovers) == 2
    assert any("a convolution with 4 groups" in finding.message for finding in adapter.findings)
    with pytest.raises(RefusedError, match="2 tensors"):
        write_adapter(adapter, tmp_path / "out", "peft")


@pytest.mark.parametrize("targets", [["embed_tokens"], ["embed_tokens", "layers.0.self_attn.q_proj"]])
def test_a_head_trained_beside_an_adapted_embedding_is_no_sign_of_a_checkpoint(targets: list[str], tmp_path: Path) -> None:
    """PEFT saves the embedding's own weight under its factors; with the head beside it the file was taken for one, and the head left out."""
    again = repeatable(llama)
    settings = {"target_modules": targets, "modules_to_save": ["lm_head", "norm"]}
    expected = output(adapted(again(), tmp_path / "theirs", **settings), TOKENS)
    adapter = open_adapter(tmp_path / "theirs")
    assert {extra.name for extra in adapter.extras} == {
        "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight",
        *(f"model.layers.{block}.{name}_layernorm.weight" for block in range(2) for name in ("input", "post_attention")),
    }  # fmt: skip
    match = get("peft").match(open_file(tmp_path / "theirs/adapter_model.safetensors"))
    assert match is not None and not any("checkpoint" in told for told in match.evidence)
    convert(tmp_path / "theirs", tmp_path / "ours", "peft")
    same_files(tmp_path / "theirs", tmp_path / "ours")
    assert torch.equal(output(loaded_strictly(again(), tmp_path / "ours"), TOKENS), expected)
    with pytest.raises(
        RefusedError, match=r"1 thing that loralib cannot hold \(found saved-module model.embed_tokens.weight\).*--drop saved-module"
    ):
        convert(tmp_path / "theirs", tmp_path / "loralib", "loralib")


def test_repeated_layers_are_more_than_the_base_has(tmp_path: Path) -> None:
    again = repeatable(llama)
    expected = output(adapted(again(), tmp_path / "theirs", target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]]), TOKENS)
    again().save_pretrained(tmp_path / "base")
    read = ReadOptions(base=find_base(str(tmp_path / "base")))
    convert(tmp_path / "theirs", tmp_path / "split", "triad", read=read)
    convert(tmp_path / "split", tmp_path / "ours", "peft", read=read)
    same_files(tmp_path / "theirs", tmp_path / "ours")
    assert torch.equal(output(loaded_strictly(again(), tmp_path / "ours"), TOKENS), expected)


def test_factors_stored_as_their_blocks_are_not_called_broken(tmp_path: Path) -> None:
    """And the remedy that the refusal names leads to an adapter that computes the same."""
    again = repeatable(llama)
    settings = peft.tuners.lora.config.BdLoraConfig(target_modules_bd_b=["q_proj"], target_modules_bd_a=["o_proj"], nblocks=2)
    wrapped = adapted(again(), tmp_path / "theirs", target_modules=["q_proj", "o_proj"], use_bdlora=settings)
    expected = output(wrapped, TOKENS)
    with pytest.raises(
        RefusedError, match=r"self_attn.q_proj.*BD-LoRA.*stored as its blocks.*lora_A \(4, 32\), lora_B \(32, 2\).*merge_and_unload"
    ):
        open_adapter(tmp_path / "theirs")
    wrapped.merge_and_unload().save_pretrained(tmp_path / "merged")
    again().save_pretrained(tmp_path / "base")
    extract(tmp_path / "merged", tmp_path / "base", tmp_path / "ours", "peft", RankRule(4))
    assert torch.allclose(output(loaded_strictly(again(), tmp_path / "ours"), TOKENS), expected, atol=1e-5)


def test_a_listed_module_is_taken_with_all_that_lies_in_it() -> None:
    """Also beside an adapted embedding and its weight, which look like a training checkpoint's own weights."""
    shapes = {
        "embed_tokens.lora_embedding_A": (2, 9), "embed_tokens.lora_embedding_B": (4, 2), "embed_tokens.weight": (9, 4),
        "score.0.weight": (3, 4), "score.1.running_mean": (3,),
    }  # fmt: skip
    tensors = {f"base_model.model.{name}": Tensor.of(np.zeros(shape, np.float32)) for name, shape in shapes.items()}
    found = sort(tensors, ["score"])
    assert list(found.saved) == ["embed_tokens.weight", "score.0.weight", "score.1.running_mean"]
    assert not found.base and not found.unknown
