"""Bases from the user's own files. Weights are holes: a real header in front of a sparse file, so full-size models cost nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path

import pytest

from upparam.bases import inventory, layouts
from upparam.bases.base import Module
from upparam.bases.header import base_from_config, base_from_path, base_from_shapes
from upparam.errors import AmbiguousError, UnreadableError

Shape = tuple[int, ...]


def write_sparse(path: Path, shapes: Mapping[str, Shape]) -> None:
    """A safetensors file of float16 zeros in name order, its data a hole."""
    header, at = {}, 0
    for name in sorted(shapes):
        size = 2 * prod(shapes[name])
        header[name] = {"dtype": "F16", "shape": list(shapes[name]), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + at)


def tensors(modules: Iterable[Module], strip: str = "") -> dict[str, Shape]:
    """Weights and biases as a checkpoint names them."""
    found: dict[str, Shape] = {}
    for module in modules:
        found[f"{module.path.removeprefix(strip)}.weight"] = module.shape
        if module.bias:
            found[f"{module.path.removeprefix(strip)}.bias"] = (module.canonical[0],)
    return found


def test_gpt2_as_published_without_prefix_and_head(tmp_path: Path) -> None:
    known = inventory.load("gpt2")
    shapes = tensors((module for module in known.modules if module.path != "lm_head"), strip="transformer.")
    shapes |= {f"h.{layer}.attn.bias": (1, 1, 1024, 1024) for layer in range(12)}  # the causal mask, which openai-community/gpt2 stores
    write_sparse(tmp_path / "model.safetensors", shapes)
    base = base_from_path(tmp_path / "model.safetensors")
    assert base.name == "gpt2" and base.modules == known.modules
    assert any("'transformer.' in front" in text for text in base.evidence)


def test_a_sharded_folder_with_a_tied_head(tmp_path: Path) -> None:
    known = inventory.load("llama-3.2-1b")
    shapes = tensors(module for module in known.modules if module.path != "lm_head")
    names = sorted(shapes)
    shards = {f"model-0000{part}-of-00002.safetensors": names[part - 1 :: 2] for part in (1, 2)}
    for file, inside in shards.items():
        write_sparse(tmp_path / file, {name: shapes[name] for name in inside})
    where = {name: file for file, inside in shards.items() for name in inside}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    base = base_from_path(tmp_path)
    assert base.name == "llama-3.2-1b" and base.modules == known.modules


def test_a_diffusers_folder_with_parts_no_inventory_lists(tmp_path: Path) -> None:
    known = inventory.load("sd1.5")
    for component, file in (("unet", "diffusion_pytorch_model.safetensors"), ("text_encoder", "model.safetensors")):
        inside = [module for module in known.modules if module.path.startswith(f"{component}.")]
        write_sparse(tmp_path / component / file, tensors(inside, strip=f"{component}."))
    write_sparse(tmp_path / "vae" / "diffusion_pytorch_model.safetensors", {"decoder.conv_in.weight": (512, 4, 3, 3)})
    (tmp_path / "model_index.json").write_text(json.dumps({"unet": ["diffusers", "x"], "text_encoder": ["t", "x"], "vae": ["d", "x"]}))
    base = base_from_path(tmp_path)
    assert base.name == "sd1.5"
    assert base.modules[: len(known.modules)] == known.modules
    assert [module.path for module in base.modules[len(known.modules) :]] == ["vae.decoder.conv_in"]


def test_a_grown_vocabulary_keeps_the_files_shape() -> None:
    known = inventory.load("llama-3.2-1b")
    shapes = tensors(module for module in known.modules if module.path != "lm_head") | {"model.embed_tokens.weight": (128264, 2048)}
    base = base_from_shapes(shapes)
    assert base.name == "llama-3.2-1b" and base.by_path["model.embed_tokens"].shape == (128264, 2048)
    assert [module.path for module in base.modules] == [module.path for module in known.modules]
    assert any("128264 rows" in text for text in base.evidence)


def test_a_task_head_follows_the_backbone() -> None:
    known = inventory.load("bert-base-uncased")
    body = [module for module in known.modules if module.path.startswith("bert.")]
    base = base_from_shapes(tensors(body) | {"classifier.weight": (2, 768), "classifier.bias": (2,)})
    assert [module.path for module in base.modules] == [*(module.path for module in body), "cls.predictions.decoder", "classifier"]


def test_a_bare_text_encoder_is_that_component_only() -> None:
    known = [module for module in inventory.load("flux.1-dev").modules if module.path.startswith("text_encoder_2.")]
    base = base_from_shapes(tensors(known, strip="text_encoder_2."))
    assert {module.kind for module in base.modules} == {module.kind for module in known} and len(base.modules) == len(known)


def test_another_width_is_another_model() -> None:
    shapes = tensors(inventory.load("gpt2").modules) | {"transformer.h.3.mlp.c_fc.weight": (768, 3000)}
    base = base_from_shapes(shapes)
    assert base.name == "unnamed" and base.by_path["transformer.h.3.mlp.c_fc"].shape == (768, 3000)


def test_a_bare_unet_file() -> None:
    known = [module for module in inventory.load("sdxl").modules if module.path.startswith("unet.")]
    base = base_from_shapes(tensors(known, strip="unet."))
    assert base.name == "sdxl" and list(base.modules) == known


def test_an_inpainting_unet_is_not_taken_for_its_parent() -> None:
    known = inventory.load("sd1.5-inpainting")
    assert base_from_shapes(tensors(known.modules)).name == "sd1.5-inpainting"


@pytest.mark.parametrize(("name", "layout"), [("sd1.5", "ldm"), ("sdxl", "sgm"), ("flux.1-dev", "original"), ("sd3-medium", "mmdit")])
def test_single_file_checkpoints_in_their_own_names(name: str, layout: str) -> None:
    known = inventory.load(name)
    there = layouts.layout(known, layout)
    shapes = {there.tensor_name(foreign): (there.rows(foreign), *parts[0].shape[1:]) for foreign, parts in there.foreign.items()}
    base = base_from_shapes(shapes)
    assert base.name == name and base.modules == known.modules
    assert any(f"in layout {layout}" in text for text in base.evidence)


@pytest.mark.parametrize("name", ["flux.1-dev", "sd3.5-medium", "wan2.1-t2v-1.3b", "lumina2", "sdxl"])
@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model."])
def test_denoisers_as_comfyui_saves_them(name: str, prefix: str) -> None:
    known = inventory.load(name)
    there = layouts.layout(known, "original")
    shapes = {f"{prefix}{there.tensor_name(one)}": (there.rows(one), *parts[0].shape[1:]) for one, parts in there.foreign.items()}
    base = base_from_shapes(shapes | {"vae.decoder.conv_in.weight": (512, 16, 3, 3)})
    assert base.name == name and base.modules == known.modules


def test_an_unknown_model_is_sorted_naturally_and_says_so() -> None:
    shapes = {f"stem.{index}.mix.weight": (24, 24) for index in (10, 2, 1)} | {
        "stem.2.mix.bias": (24,),
        "norm.weight": (24,),
        "scale": (3,),
    }
    base = base_from_shapes(shapes, name="mine")
    assert [module.path for module in base.modules] == ["norm", "stem.1.mix", "stem.2.mix", "stem.10.mix"]
    assert base.by_path["stem.2.mix"].bias and not base.by_path["stem.1.mix"].bias
    assert any("not known" in text for text in base.evidence)


def test_conv1d_is_told_by_the_config_or_the_fused_shape() -> None:
    shapes = {
        "h.0.attn.c_attn.weight": (24, 72),
        "h.0.attn.c_proj.weight": (24, 24),
        "h.0.mlp.c_fc.weight": (24, 96),
        "wte.weight": (9, 24),
    }
    kinds = {module.path: module.kind for module in base_from_shapes(shapes).modules}
    assert kinds == {"h.0.attn.c_attn": "Conv1D", "h.0.attn.c_proj": "Conv1D", "h.0.mlp.c_fc": "Conv1D", "wte": ""}
    square = {"h.0.attn.c_proj.weight": (24, 24)}
    assert base_from_shapes(square).modules[0].kind == ""
    assert base_from_shapes(square, config={"model_type": "gpt2"}).modules[0].kind == "Conv1D"


def test_a_quantised_file_takes_packed_shapes_from_the_inventory() -> None:
    known = inventory.load("llama-3.2-1b")
    shapes = tensors(module for module in known.modules if module.path != "lm_head")
    for module in known.modules:
        if module.path.endswith("down_proj"):
            shapes[f"{module.path}.weight"] = (prod(module.shape) // 2, 1)
            shapes[f"{module.path}.weight.absmax"] = (prod(module.shape) // 64,)
    base = base_from_shapes(shapes)
    assert base.name == "llama-3.2-1b" and base.modules == known.modules
    assert any("quantised" in text for text in base.evidence)


def test_weights_without_names_are_refused() -> None:
    with pytest.raises(UnreadableError, match="no module weights"):
        base_from_shapes({"scale": (3,)}, name="x")


LLAMA_2 = {
    # config.json of meta-llama/Llama-2-7b-hf
    "_name_or_path": "meta-llama/Llama-2-7b-hf", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 11008, "max_position_embeddings": 4096, "model_type": "llama", "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 32, "vocab_size": 32000, "tie_word_embeddings": False,
}  # fmt: skip


def test_a_config_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_2))
    for path in (tmp_path, tmp_path / "config.json"):
        base = base_from_path(path)
        assert base.name == "llama-2-7b" and base.modules == inventory.load("llama-2-7b").modules
    unnamed = {key: value for key, value in LLAMA_2.items() if key != "_name_or_path"}
    base = base_from_config(unnamed)
    assert base is not None and base.name == "llama-2-7b" and any("llama-7b has the same modules" in text for text in base.evidence)


def test_a_pipeline_of_configs_alone(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    unet = {"_class_name": "UNet2DConditionModel", "block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 1024,
            "attention_head_dim": [5, 10, 20, 20], "in_channels": 4, "use_linear_projection": True}  # fmt: skip
    (tmp_path / "unet" / "config.json").write_text(json.dumps(unet))
    assert base_from_path(tmp_path).name == "sd2"


def test_configs_that_match_nothing_or_too_much(tmp_path: Path) -> None:
    assert base_from_config(LLAMA_2 | {"hidden_size": 4000}) is None
    assert base_from_config(LLAMA_2 | {"vocab_size": 32003}) is None
    assert base_from_config({"model_type": "llama"}) is None
    assert base_from_config({}) is None
    with pytest.raises(AmbiguousError, match="several bases"):
        base_from_config({"model_type": "llama", "num_hidden_layers": 32, "num_attention_heads": 32})
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_2 | {"hidden_size": 4000}))
    with pytest.raises(UnreadableError, match="no shipped inventory"):
        base_from_path(tmp_path)


def test_every_inventory_config_leads_back_to_its_base() -> None:
    for name, config in inventory.data("_configs.json").items():
        base = base_from_config(config)
        expected = inventory.known()[name].variant_of if name.endswith("-in21k") else name
        assert base is not None and base.modules == inventory.load(str(expected)).modules, name
