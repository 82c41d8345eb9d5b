"""Which files of a folder are the model, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from upparam.checkpoint import Checkpoint
from upparam.errors import AmbiguousError, MalformedError, UnreadableError


def weights(path: Path, *names: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.full((2, 3), index, np.float32) for index, name in enumerate(names)}, path)
    return path


def index(folder: Path, stem: str, weight_map: dict[str, str]) -> Path:
    path = folder / f"{stem}.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def test_single_file_takes_the_config_beside_it(tmp_path: Path) -> None:
    path = weights(tmp_path / "model.safetensors", "a.weight")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    checkpoint = Checkpoint.open(path)
    assert list(checkpoint.tensors) == ["a.weight"] and checkpoint.shapes["a.weight"] == (2, 3) and checkpoint.nbytes == 24
    assert checkpoint.config == {"model_type": "gpt2"} and checkpoint.side_files == () and not checkpoint.is_folder


def test_sharded_folder_with_index_carries_everything_else(tmp_path: Path) -> None:
    for number, name in enumerate(("a.weight", "b.weight"), 1):
        weights(tmp_path / f"model-{number:05}-of-00002.safetensors", name)
    index(
        tmp_path,
        "model.safetensors",
        {"a.weight": "model-00001-of-00002.safetensors", "b.weight": "model-00002-of-00002.safetensors"},
    )
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    weights(tmp_path / "original" / "consolidated.safetensors", "a.weight")
    weights(tmp_path / "adapter_model.safetensors", "a.lora_A.weight")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "x.json").write_text("{}")
    checkpoint = Checkpoint.open(tmp_path)
    assert [file.relative for file in checkpoint.files] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert sorted(checkpoint.tensors) == ["a.weight", "b.weight"]
    assert [side.relative for side in checkpoint.side_files] == ["config.json", "model.safetensors.index.json", "tokenizer.json"]
    assert checkpoint.unread == ("adapter_model.safetensors", "original/consolidated.safetensors")
    assert Checkpoint.open(tmp_path / "model.safetensors.index.json").shapes == checkpoint.shapes


def test_shards_without_index_and_a_missing_one(tmp_path: Path) -> None:
    for number, name in enumerate(("a.weight", "b.weight", "c.weight"), 1):
        weights(tmp_path / f"model-{number:05}-of-00003.safetensors", name)
    assert len(Checkpoint.open(tmp_path).files) == 3
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UnreadableError, match="numbers 2 are not here"):
        Checkpoint.open(tmp_path)


def test_unnumbered_files_are_one_model_only_when_disjoint(tmp_path: Path) -> None:
    weights(tmp_path / "first.safetensors", "a.weight")
    weights(tmp_path / "second.safetensors", "b.weight")
    assert sorted(Checkpoint.open(tmp_path).tensors) == ["a.weight", "b.weight"]
    weights(tmp_path / "third.safetensors", "a.weight")
    with pytest.raises(AmbiguousError, match="several models"):
        Checkpoint.open(tmp_path)


def test_plain_names_win_over_variants_and_torch_files(tmp_path: Path) -> None:
    weights(tmp_path / "model.fp16.safetensors", "a.weight")
    weights(tmp_path / "model.safetensors", "a.weight")
    index(tmp_path, "pytorch_model.bin", {"a.weight": "pytorch_model-00001-of-00001.bin"})
    checkpoint = Checkpoint.open(tmp_path)
    assert [file.relative for file in checkpoint.files] == ["model.safetensors"]
    assert checkpoint.unread == ("model.fp16.safetensors",)


def test_diffusers_folder(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"unet": ["diffusers", "UNet2DConditionModel"], "text_encoder": ["transformers", "CLIP"]}')
    weights(tmp_path / "unet" / "diffusion_pytorch_model.safetensors", "conv_in.weight")
    weights(tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors", "conv_in.weight")
    weights(tmp_path / "text_encoder" / "model.safetensors", "conv_in.weight")
    weights(tmp_path / "v1-5-pruned.safetensors", "conv_in.weight")
    (tmp_path / "unet" / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    checkpoint = Checkpoint.open(tmp_path)
    assert sorted(checkpoint.tensors) == ["text_encoder.conv_in.weight", "unet.conv_in.weight"]
    assert checkpoint.configs == {"unet": {"_class_name": "UNet2DConditionModel"}} and checkpoint.config is None
    assert checkpoint.unread == ("unet/diffusion_pytorch_model.fp16.safetensors", "v1-5-pruned.safetensors")


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnreadableError, match="no model weights"):
        Checkpoint.open(tmp_path)
    weights(tmp_path / "m-00001-of-00002.safetensors", "a.weight")
    shards = index(tmp_path, "m.safetensors", {"a.weight": "m-00001-of-00002.safetensors", "b": "m-00002-of-00002.safetensors"})
    with pytest.raises(UnreadableError, match="shards that the index names are missing"):
        Checkpoint.open(tmp_path)
    weights(tmp_path / "m-00002-of-00002.safetensors", "a.weight")
    with pytest.raises(MalformedError, match="two files"):
        Checkpoint.open(tmp_path)
    weights(tmp_path / "m-00002-of-00002.safetensors", "c.weight")
    with pytest.raises(MalformedError, match="its shard does not hold"):
        Checkpoint.open(tmp_path)
    shards.write_text('{"weight_map": {"a": "../elsewhere.safetensors"}}')
    with pytest.raises(MalformedError, match="outside its folder"):
        Checkpoint.open(tmp_path)


def test_an_index_may_name_shards_in_subfolders(tmp_path: Path) -> None:
    elsewhere, base = tmp_path / "elsewhere", tmp_path / "base"
    weights(base / "parts/one.safetensors", "a.weight")
    weights(elsewhere / "two.safetensors", "b.weight")
    shards = index(base, "model.safetensors", {"a.weight": "./parts/one.safetensors"})
    checkpoint = Checkpoint.open(base)
    assert [file.relative for file in checkpoint.files] == ["parts/one.safetensors"] and checkpoint.unread == ()
    (base / "parts/two.safetensors").symlink_to(elsewhere / "two.safetensors")  # as in huggingface_hub's cache
    index(base, "model.safetensors", {"a.weight": "parts/one.safetensors", "b.weight": "parts/two.safetensors"})
    assert sorted(Checkpoint.open(base).tensors) == ["a.weight", "b.weight"]
    (base / "out").symlink_to(elsewhere)
    for escape in (
        "../elsewhere/two.safetensors",
        str(elsewhere / "two.safetensors"),
        "out/two.safetensors",
        "parts/../../elsewhere/two.safetensors",
    ):
        shards.write_text(json.dumps({"weight_map": {"a.weight": "parts/one.safetensors", "b.weight": escape}}))
        with pytest.raises(MalformedError, match="outside its folder"):
            Checkpoint.open(base)


def test_a_link_to_the_folder_itself_is_not_followed(tmp_path: Path) -> None:
    weights(tmp_path / "model.safetensors", "a.weight")
    (tmp_path / "sub").mkdir()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "sub/again").symlink_to(tmp_path)
    assert [side.relative for side in Checkpoint.open(tmp_path).side_files] == ["config.json"]


def test_a_training_state_is_its_model(tmp_path: Path) -> None:
    """PyTorch Lightning's .ckpt, as the Stable Diffusion trainers write it: the model lies under 'state_dict', beside what training needs."""
    torch = pytest.importorskip("torch")
    weights = {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(2, 3), "model_ema.decay": torch.tensor(0.5)}
    optimizer = {"state": {0: {"exp_avg": torch.zeros(2, 3)}}}
    torch.save({"state_dict": weights, "optimizer_states": [optimizer], "epoch": 3}, tmp_path / "lightning.ckpt")
    assert list(Checkpoint.open(tmp_path / "lightning.ckpt").tensors) == list(weights)
    torch.save(weights, tmp_path / "plain.ckpt")
    assert list(Checkpoint.open(tmp_path / "plain.ckpt").tensors) == list(weights)
