"""Folders as people have them: which of several adapters to use, what is missing, and what a failed save or download left behind."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save, save_file

import upparam
from upparam.algorithms.lowrank import RankRule
from upparam.errors import DeadAdapterError, MalformedError, NotAnAdapterError, UnreadableError
from upparam.operations.convert import convert
from upparam.operations.identify import Identity, identify
from upparam.operations.verify import verify

torch = pytest.importorskip("torch")
RNG = np.random.default_rng(5)
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}


def kohya(rank: int = 4) -> dict[str, np.ndarray]:
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    up, down = RNG.standard_normal((320, rank)), RNG.standard_normal((rank, 320))
    return {f"{stem}.lora_up.weight": up.astype(np.float16), f"{stem}.lora_down.weight": down.astype(np.float16)}


def factors(*, adapter: str = "", size: int = 16) -> dict[str, np.ndarray]:
    """PEFT's tensors of two layers; `adapter` is the name a full state dict keeps in them."""
    middle = f".{adapter}" if adapter else ""
    found = {}
    for layer in range(2):
        stem = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        found[f"{stem}.lora_A{middle}.weight"] = RNG.standard_normal((4, size)).astype(np.float32)
        found[f"{stem}.lora_B{middle}.weight"] = RNG.standard_normal((size, 4)).astype(np.float32)
    return found


def codes(found: Identity) -> dict[str, str]:
    return {finding.code: finding.message for finding in found.findings}


@pytest.mark.parametrize(
    ("names", "best"),
    [
        (["mychar-000001", "mychar-000002", "mychar"], "mychar"),
        (["mychar-step00000500", "mychar-step00001000"], "mychar-step00001000"),
        (["flux_000000250", "flux_000000500", "flux"], "flux"),
        (["0000100_adapters", "0000200_adapters", "adapters"], "adapters"),
    ],
)
def test_of_the_states_of_one_training_the_last_is_the_one_to_use(tmp_path: Path, names: list[str], best: str) -> None:
    for name in names:
        save_file(kohya(), tmp_path / f"{name}.safetensors")
    found = identify(tmp_path)
    assert f"use {best}.safetensors, the last" in codes(found)["states"]
    assert "several-adapters" not in codes(found) and found.exit_code == 0


def test_many_loras_of_one_shape_are_not_one_adapter(tmp_path: Path) -> None:
    for name in ("style_01", "style_02", "person"):
        save_file(kohya(), tmp_path / f"{name}.safetensors")
    said = codes(identify(tmp_path))
    assert said.keys() == {"several-adapters"}
    assert "3 different adapters" in said["several-adapters"] and "use " not in said["several-adapters"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no adapter_model.safetensors"),
        (b"", "an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n", "git-lfs pointer"),
        (b"<!DOCTYPE html><html><head></head><body>login</body></html>", "a web page"),
        (save(kohya())[:-100], "truncated"),
    ],
)
def test_a_config_without_weights_is_called_dead(tmp_path: Path, content: bytes | None, said: str) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    if content is not None:
        (tmp_path / "adapter_model.safetensors").write_bytes(content)
    found = identify(tmp_path)
    assert said in codes(found)["weights-missing"] and found.exit_code == 1
    with pytest.raises(UnreadableError) as caught:
        upparam.open(tmp_path)
    if content is not None:
        assert said in caught.value.line() and "adapter_model.safetensors" in caught.value.line()


def test_a_link_into_a_cache_that_is_gone(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "adapter_model.safetensors").symlink_to("../../blobs/gone")
    found = identify(tmp_path)
    assert [file.kind for file in found.files] == ["json", "broken-link"]
    assert "a link to a file that is not there" in codes(found)["weights-missing"]
    with pytest.raises(UnreadableError, match="a link to a file that is not there"):
        upparam.open(tmp_path)


def test_the_empty_adapter_model_of_a_failed_save(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    torch.save(OrderedDict(), tmp_path / "adapter_model.bin")
    found = identify(tmp_path)
    assert [report.kind for report in found.adapters] == ["dead-adapter"] and found.exit_code == 1
    with pytest.raises(DeadAdapterError, match="were not saved"):
        upparam.open(tmp_path)


def test_the_placeholders_that_zero_3_saves(tmp_path: Path) -> None:
    save_file({name: np.zeros(0, np.float32) for name in factors()}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(DeadAdapterError, match="zero_to_fp32"):
        upparam.open(tmp_path)
    assert [report.kind for report in identify(tmp_path).adapters] == ["dead-adapter"]


def sharded(folder: Path) -> dict[str, np.ndarray]:
    """A full state dict with an adapter in it, in two files that cut the adapter apart; returns the adapter's own tensors."""
    own = factors(adapter="default")
    base = {name.rsplit(".lora_A", 1)[0] + ".base_layer.weight": RNG.standard_normal((16, 16)) for name in own if "lora_A" in name}
    base |= {f"base_model.model.model.layers.{layer}.mlp.up_proj.weight": RNG.standard_normal((32, 16)) for layer in range(2)}
    names = sorted([*own, *base])
    everything = {name: torch.from_numpy({**own, **base}[name].astype(np.float32)) for name in names}
    cut = next(index for index, name in enumerate(names) if "lora_B" in name)
    for number, part in enumerate((names[:cut], names[cut:]), 1):
        torch.save({name: everything[name] for name in part}, folder / f"pytorch_model-{number:05}-of-00002.bin")
    (folder / "pytorch_model.bin.index.json").write_text(
        json.dumps({"weight_map": {name: f"pytorch_model-{1 if name in names[:cut] else 2:05}-of-00002.bin" for name in names}})
    )
    return own


def test_an_adapter_is_lifted_out_of_a_sharded_checkpoint(tmp_path: Path) -> None:
    own = sharded(tmp_path)
    (report,) = identify(tmp_path).adapters
    assert report.kind == "adapter" and report.modules == 2 and len(report.files) == 2 and report.extras == {}
    adapter = upparam.open(tmp_path, options=upparam.dialects.base.ReadOptions(alpha=8))
    assert adapter.extras == [] and not adapter.leftovers
    adapter.save(tmp_path / "out", dialect="peft")
    from safetensors.numpy import load_file

    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert written.keys() == {name.replace(".default", "") for name in own}
    assert all(np.array_equal(written[name.replace(".default", "")], value) for name, value in own.items())


def test_missing_shards_are_said(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "pytorch_model-00001-of-00002.bin").unlink()
    found = identify(tmp_path)
    assert "1 of the 2 files" in codes(found)["shards-missing"] and found.exit_code == 1


def test_half_an_adapter_is_not_converted_as_if_it_were_whole(tmp_path: Path) -> None:
    """The cut lies between two modules, so that what is there has no half without its other half."""
    folder = tmp_path / "lora"
    folder.mkdir()
    for number, layer in enumerate((0, 1), 1):
        mine = {name: value for name, value in factors().items() if f".{layer}." in name}
        assert len(mine) == 2
        save_file(mine, folder / f"adapter_model-{number:05}-of-00002.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    assert len(upparam.open(folder).deltas) == 2
    (folder / "adapter_model-00002-of-00002.safetensors").unlink()
    for use in (
        lambda: convert(folder, tmp_path / "out", "peft"),
        lambda: upparam.resize(folder, tmp_path / "out", RankRule(rank=1)),
        lambda: upparam.combine([(folder, 1.0), (folder, 1.0)], tmp_path / "out"),
        lambda: upparam.compare(folder, folder),
    ):
        with pytest.raises(DeadAdapterError, match="1 of the checkpoint's 2 files"):
            use()
    assert not (tmp_path / "out").exists()
    assert "shards-missing" in {finding.code for finding in verify(folder).findings}


@pytest.mark.parametrize("kind", ["zip", "tar.gz", "gz"])
def test_the_config_in_an_archive_is_read(tmp_path: Path, kind: str) -> None:
    weights, config = save(factors()), json.dumps(CONFIG).encode()
    path = tmp_path / f"lora.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("out/adapter_model.safetensors", weights)
            archive.writestr("out/adapter_config.json", config)
    elif kind == "tar.gz":
        with tarfile.open(path, "w:gz") as tar:
            for name, data in (("out/adapter_model.safetensors", weights), ("out/adapter_config.json", config)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    else:
        import gzip

        path = tmp_path / "adapter_model.safetensors.gz"
        path.write_bytes(gzip.compress(weights))
        (tmp_path / "adapter_config.json").write_bytes(config)
    adapter = upparam.open(path)
    assert {delta.scale for delta in adapter.deltas.values()} == {2.0}
    assert not [finding for finding in adapter.findings if finding.code == "config-missing"]


@pytest.mark.parametrize("text", ["", "<<<<<<< HEAD\n{}\n", "[]"])
def test_a_broken_config_says_how_to_make_a_new_one(tmp_path: Path, text: str) -> None:
    save_file(factors(), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(MalformedError, match="move it away and 'upparam assemble'"):
        upparam.open(tmp_path)


def test_files_named_for_another_container(tmp_path: Path) -> None:
    save_file(kohya(), tmp_path / "a.ckpt")
    torch.save({name: torch.from_numpy(value) for name, value in kohya().items()}, tmp_path / "b.safetensors")
    found = {file.path.name: [finding.code for finding in file.findings] for file in identify(tmp_path).files}
    assert "name-differs" in found["a.ckpt"] and "name-differs" in found["b.safetensors"]


def test_a_stated_base_that_cannot_be_is_a_warning(tmp_path: Path) -> None:
    save_file(factors(), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({**CONFIG, "base_model_name_or_path": "meta-llama/Llama-2-7b-hf"}))
    (report,) = identify(tmp_path).adapters
    (finding,) = [finding for finding in report.findings if finding.code == "base"]
    assert finding.severity.name == "WARNING" and "can hardly be true" in finding.message


def test_an_empty_folder_and_one_of_folders(tmp_path: Path) -> None:
    assert codes(identify(tmp_path)) == {"empty-folder": "an empty folder"}
    with pytest.raises(UnreadableError, match="an empty folder"):
        upparam.open(tmp_path)
    (tmp_path / "checkpoint-500").mkdir()
    assert "1 folder below was not looked into" in codes(identify(tmp_path))["folders-below"]
    assert identify(tmp_path, below=False).findings == []
    with pytest.raises(UnreadableError, match="checkpoint-500"):
        upparam.open(tmp_path)


def test_what_lies_there_instead_is_said_before_the_training_leftovers(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    torch.save({"state": {}, "param_groups": []}, tmp_path / "optimizer.pt")
    with pytest.raises(NotAnAdapterError, match="git-lfs pointer"):
        upparam.open(tmp_path)


def test_a_file_without_permission_is_unreadable_not_malformed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(kohya(), tmp_path / "x.safetensors")
    real = upparam.containers.os.access
    monkeypatch.setattr(upparam.containers.os, "access", lambda path, mode: not str(path).endswith("x.safetensors") and real(path, mode))
    (file,) = identify(tmp_path).files
    assert (file.kind, file.message) == ("unreadable", "permission denied")
