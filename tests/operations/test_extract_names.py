"""Extract where only names bring two models together: Stable Diffusion of no known size, square Conv1D weights, norms with a bias."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.operations.merging import load, save

from upparam.adapter import ExtraKind
from upparam.algorithms.lowrank import RankRule
from upparam.bases.header import base_from_path
from upparam.bases.layouts import layout
from upparam.checkpoint import Checkpoint
from upparam.cli import main
from upparam.errors import RefusedError
from upparam.operations.compare import compare
from upparam.operations.extract import extract, extracted


def narrow_pipeline(folder: Path, seed: int) -> tuple[Path, dict[str, np.ndarray]]:
    """A Stable Diffusion 1 of 32 channels in folders as diffusers writes it, and the tensors of the authors' single file by their names there."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    torch.manual_seed(seed)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64, 64, 64), layers_per_block=2, cross_attention_dim=32, attention_head_dim=4, norm_num_groups=16,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )  # fmt: skip
    config = transformers.CLIPTextConfig(
        vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=12, num_attention_heads=4, bos_token_id=1, eos_token_id=2
    )
    text = transformers.CLIPTextModel(config)
    unet.save_pretrained(folder / "unet")
    text.save_pretrained(folder / "text_encoder")
    parts = {"unet": ["diffusers", "UNet2DConditionModel"], "text_encoder": ["transformers", "CLIPTextModel"]}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline", **parts}))
    names = layout(base_from_path(folder), "ldm")
    state = {f"unet.{name}": value.numpy() for name, value in unet.state_dict().items()}
    state |= {f"text_encoder.text_model.{name.removeprefix('text_model.')}": value.numpy() for name, value in text.state_dict().items()}
    single = {}
    for name, value in state.items():
        module, _, leaf = name.rpartition(".")
        place = names.to_foreign(module)
        if place is not None:
            single[names.tensor_name(place.foreign, leaf)] = value
    theirs = {name: torch.from_numpy(value) for name, value in single.items() if name.startswith("model.diffusion_model.")}
    back = convert_ldm_unet_checkpoint(theirs, unet.config)
    assert set(back) == set(unet.state_dict()) and all(torch.equal(back[name], value) for name, value in unet.state_dict().items())
    return folder, single


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """(tuned, base) in folders and in single files."""
    root = tmp_path_factory.mktemp("narrow")
    folders, files = [], []
    for seed, name in enumerate(("tuned", "base")):
        folder, single = narrow_pipeline(root / name, seed)
        folders.append(folder)
        files.append(save(root / f"{name}.safetensors", single))
    return {"folders": (folders[0], folders[1]), "files": (files[0], files[1])}


@pytest.mark.parametrize(("tuned", "base"), [("files", "files"), ("files", "folders"), ("folders", "files")])
def test_single_files_of_no_known_size_pair_with_folders_and_get_their_names(
    pairs: dict[str, tuple[Path, Path]], tmp_path: Path, tuned: str, base: str
) -> None:
    """Kohya's loaders know modules by diffusers' names alone: a file with other names changes nothing, without a word."""
    written = {}
    for which, (one, other) in {"folders": pairs["folders"], "given": (pairs[tuned][0], pairs[base][1])}.items():
        out = tmp_path / f"{which}.safetensors"
        extract(one, other, out, "kohya", RankRule(4), only=["*attentions*", "*mlp*"], drop=["bias", "saved-module"])
        written[which] = load(out)
    assert set(written["given"]) == set(written["folders"])
    assert all(np.array_equal(written["given"][name], value) for name, value in written["folders"].items())
    assert "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight" in written["given"]
    assert "lora_te_text_model_encoder_layers_11_mlp_fc1.lora_up.weight" in written["given"]
    told = [compare(one, other) for one, other in (pairs["folders"], (pairs[tuned][0], pairs[base][1]))]
    assert told[0].summary == told[1].summary


def gpt2(folder: Path, seed: int) -> Path:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=99, n_positions=16, bos_token_id=1, eos_token_id=2)
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "ln_" in name:
                value += torch.randn_like(value) / 10
    model.save_pretrained(folder, max_shard_size="40KB" if seed else "60KB")
    return folder


def test_a_whole_gpt2_goes_through_peft(tmp_path: Path) -> None:
    """attn.c_proj is square, so that its shape does not tell that it is stored as (in, out); ln_1 is saved with its bias."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    base, tuned = gpt2(tmp_path / "base", 0), gpt2(tmp_path / "tuned", 1)
    receipt = extract(tuned, base, tmp_path / "adapter", "peft", RankRule(32))
    assert receipt.counts["targets"] == 10
    model = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "adapter"))
    merged: dict[str, Any] = model.merge_and_unload().state_dict()
    for name, value in transformers.AutoModelForCausalLM.from_pretrained(tuned).state_dict().items():
        if name != "lm_head.weight":
            assert torch.allclose(merged[name], value, atol=1e-6, rtol=0), name


def test_the_bias_of_a_saved_norm_is_saved_with_it(tmp_path: Path) -> None:
    base, tuned = gpt2(tmp_path / "base", 0), gpt2(tmp_path / "tuned", 1)
    extras = extracted(Checkpoint.open(tuned), Checkpoint.open(base), RankRule(4)).adapter.extras
    kinds = {extra.name: extra.kind for extra in extras}
    assert kinds["transformer.h.0.ln_1.bias"] is kinds["transformer.h.0.ln_1.weight"] is ExtraKind.SAVED_MODULE
    assert set(kinds.values()) == {ExtraKind.SAVED_MODULE}


def test_a_dialect_without_embeddings_says_what_to_leave_out(tmp_path: Path) -> None:
    """The advice, taken literally, leads to a file."""
    base, tuned = gpt2(tmp_path / "base", 0), gpt2(tmp_path / "tuned", 1)
    out = tmp_path / "lora.safetensors"
    with pytest.raises(RefusedError) as caught:
        extract(tuned, base, out, "kohya", RankRule(4))
    assert caught.value.remedy is not None
    advice = caught.value.remedy.partition(", or ")[0].removeprefix("leave out what it cannot hold with ")
    assert main(["extract", str(tuned), str(base), "-o", str(out), "--to", "kohya", "--rank", "4", *advice.split()]) == 0
    assert out.exists()
