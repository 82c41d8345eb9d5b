"""Adapters name modules as transformers 5 has them in memory, checkpoints as older versions did: merged as PEFT does, and extracted so that it loads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import upparam
from upparam.adapter import Target
from upparam.bases.versions import FAMILIES, Older, newer, rules_of
from upparam.errors import MismatchError

_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT = {**_SIZES, "vocab_size": 96, "num_key_value_heads": 2}
_IMAGE = {**_SIZES, "image_size": 28, "patch_size": 7}
_ROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}

MODELS: dict[str, tuple[str, Callable[[], Any], tuple[str, ...] | str]] = {
    "vit": ("ViTForImageClassification", lambda: transformers.ViTConfig(**_IMAGE), "all-linear"),
    "dinov2": ("Dinov2ForImageClassification", lambda: transformers.Dinov2Config(**_IMAGE), "all-linear"),
    "dinov2 giant": ("Dinov2ForImageClassification", lambda: transformers.Dinov2Config(**_IMAGE, use_swiglu_ffn=True), "all-linear"),
    "dinov2_with_registers giant": (
        "Dinov2WithRegistersModel", lambda: transformers.Dinov2WithRegistersConfig(**_IMAGE, use_swiglu_ffn=True), "all-linear",
    ),
    "nomic_bert": ("NomicBertModel", lambda: transformers.NomicBertConfig(**_SIZES, vocab_size=96), "all-linear"),
    "nomic_bert head": ("NomicBertForMaskedLM", lambda: transformers.NomicBertConfig(**_SIZES, vocab_size=96), ("q_proj", "v_proj", "up_proj")),
    "gte": ("GteModel", lambda: transformers.GteConfig(**_SIZES, vocab_size=96), "all-linear"),
    "gte head": ("GteForSequenceClassification", lambda: transformers.GteConfig(**_SIZES, vocab_size=96), "all-linear"),
    "jina_embeddings_v3": ("JinaEmbeddingsV3Model", lambda: transformers.JinaEmbeddingsV3Config(**_SIZES, vocab_size=96), "all-linear"),
    "gpt_neox": (
        "GPTNeoXForCausalLM", lambda: transformers.GPTNeoXConfig(**_SIZES, vocab_size=96), ("query_key_value", "dense", "lm_head"),
    ),
    "mixtral": ("MixtralForCausalLM", lambda: transformers.MixtralConfig(**_TEXT, num_local_experts=4), ("q_proj", "o_proj", "gate")),
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration",
        lambda: transformers.Qwen2VLConfig(
            text_config={**_TEXT, **_ROPE}, vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4}
        ),
        "all-linear",
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        lambda: transformers.LlavaConfig(text_config=transformers.LlamaConfig(**_TEXT), vision_config=transformers.CLIPVisionConfig(**_IMAGE)),
        "all-linear",
    ),
    "swin": (
        "SwinForImageClassification",
        lambda: transformers.SwinConfig(embed_dim=16, depths=[1, 1], num_heads=[2, 4], image_size=32, patch_size=4, window_size=4), "all-linear",
    ),
}  # fmt: skip


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def trained(kind: str, folder: Path, **options: Any) -> None:
    """A base as its files are (`base`), an adapter of it, and the model that PEFT merges (`merged`)."""
    name, config, targets = MODELS[kind]
    torch.manual_seed(0)
    model = getattr(transformers, name)(config())
    model.save_pretrained(folder / "base")
    wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=targets, **options))
    with torch.no_grad():
        for parameter_name, parameter in wrapped.named_parameters():
            if "modules_to_save" in parameter_name:
                parameter.add_(1.0)
    wrapped.save_pretrained(folder / "adapter")
    wrapped.merge_and_unload().save_pretrained(folder / "merged")


def same(one: Path, other: Path) -> None:
    ours, theirs = tensors(one), tensors(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=2e-7, msg=name)


@pytest.mark.parametrize("kind", MODELS)
def test_merged_as_peft_does_and_extracted_so_that_it_loads(kind: str, tmp_path: Path) -> None:
    trained(kind, tmp_path)
    assert upparam.verify(tmp_path / "adapter", base=tmp_path / "base").sound
    upparam.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "ours")
    same(tmp_path / "ours", tmp_path / "merged")

    receipt = upparam.extract(tmp_path / "merged", tmp_path / "base", tmp_path / "extracted", "peft", auto=True)
    assert any(finding.code == "names-in-memory" for finding in receipt.findings)
    model = getattr(transformers, MODELS[kind][0]).from_pretrained(tmp_path / "base")
    PeftModel.from_pretrained(model, tmp_path / "extracted").merge_and_unload().save_pretrained(tmp_path / "again")
    same(tmp_path / "again", tmp_path / "merged")


@pytest.mark.parametrize(("kind", "saved"), [("gpt_neox", "lm_head"), ("llava", "multi_modal_projector.linear_1")])
def test_saved_modules_replace_the_weights_they_are(kind: str, saved: str, tmp_path: Path) -> None:
    """Under its name in memory none is in the file: it would have been added beside the one that counts."""
    trained(kind, tmp_path, modules_to_save=[saved], exclude_modules=[saved])
    receipt = upparam.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "ours")
    assert receipt.counts["tensors_added"] == 0
    same(tmp_path / "ours", tmp_path / "merged")


@pytest.mark.parametrize("kind", ["dinov2 giant", "nomic_bert", "gte"])
@pytest.mark.parametrize("options", [{"use_dora": True}, {"use_rslora": True, "rank_pattern": {"q_proj": 2}}], ids=["dora", "rslora"])
def test_each_part_has_its_own_delta(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    trained(kind, tmp_path, **options)
    upparam.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "ours")
    same(tmp_path / "ours", tmp_path / "merged")


def test_a_part_that_was_saved_whole_is_refused(tmp_path: Path) -> None:
    trained("nomic_bert", tmp_path, modules_to_save=["k_proj"], exclude_modules=["k_proj"])
    with pytest.raises(MismatchError, match=r"layers\.0\.self_attn\.k_proj\.weight: encoder\.layers\.0\.attn\.Wqkv\[32:64\] in the base"):
        upparam.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "ours")


def test_saved_modules_under_an_older_name(tmp_path: Path) -> None:
    trained("nomic_bert", tmp_path, modules_to_save=["o_proj", "post_mlp_layernorm"], exclude_modules=["o_proj", "post_mlp_layernorm"])
    receipt = upparam.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "ours")
    assert receipt.counts["tensors_added"] == 0
    same(tmp_path / "ours", tmp_path / "merged")


@pytest.mark.parametrize("kind", ["vit", "nomic_bert"])
def test_a_base_given_by_path_has_its_modules_under_both_names(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(kind, tmp_path)
    from upparam.cli import main

    words = ["convert", f"{tmp_path}/adapter", "--to", "triad", "-o", f"{tmp_path}/parts", "--base", f"{tmp_path}/base"]
    assert main(words) == 0, capsys.readouterr().err


def test_what_two_families_would_name_otherwise_is_not_guessed() -> None:
    """`x.layers` is one thing in ViT and another in Swin; a name that no rule leads to is nobody's."""
    vit, swin = "vit.encoder.layer.0.attention.attention.query", "swin.encoder.layers.0.attention.self.query"
    older = Older({f"{vit}.weight": (4, 4), f"{swin}.weight": (4, 4)})
    assert older("vit.layers.0.attention.q_proj.weight") == Target(vit)
    assert older("swin.encoder.layers.0.attention.q_proj.weight") == Target(swin)
    assert older("swin.encoder.layers.1.attention.q_proj.weight") is None
    # Two names would become one.
    assert Older({"visual.a.weight": (4, 4), "model.visual.a.weight": (4, 4)})("model.visual.a.weight") is None


def test_parts_of_a_weight_are_its_rows_where_these_can_be_shared_out() -> None:
    whole = "encoder.layers.0.attn.Wqkv"
    assert Older({f"{whole}.weight": (12, 4)})("layers.0.self_attn.k_proj.weight") == Target(whole, (4, 8))
    assert Older({f"{whole}.bias": (12,)})("layers.0.self_attn.v_proj.bias") == Target(whole, (8, 12), "bias")
    assert Older({f"{whole}.weight": (13, 4)})("layers.0.self_attn.k_proj.weight") is None


@pytest.mark.parametrize("rules", FAMILIES.values(), ids=[types[0] for types in FAMILIES])
def test_newer_names_stay(rules: Any) -> None:
    for name in (
        "visual.blocks.0.attn.qkv.weight",
        "language_model.model.layers.0.mlp.up_proj.weight",
        "vit.encoder.layer.0.output.dense.weight",
    ):
        once = newer(name, rules)
        assert [again for one in once for again in newer(one, rules)] == list(once)
    assert rules_of("llama") == ()
