"""edit changes the files an adapter came in, and nothing in them that it was not asked for: unexplained tensors, containers, configs."""

from __future__ import annotations

import json
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from tests.matrix import specimens
from tests.operations.test_combine import peft_folder
from tests.operations.test_edit import STEM, dense, digest, kohya_file, names

from upparam.cli import main
from upparam.containers import open_file
from upparam.dialects.base import NamedTensors
from upparam.errors import RefusedError
from upparam.operations.convert import write_adapter, write_file
from upparam.operations.edit import edit
from upparam.operations.late import Late
from upparam.operations.opening import open_adapter
from upparam.tensors import Tensor

torch = pytest.importorskip("torch")
STRANGE = {"some.mystery": np.arange(15, dtype=np.float32).reshape(3, 5), "odd": np.array([np.nan, 1], np.float16)}
WRITERS = {"safetensors": "safetensors", "npz": "npz", "torch-zip": "torch", "gguf": "gguf"}


def with_strangers(path: Path, strangers: dict[str, Any] = STRANGE) -> Path:
    """The file with tensors that no dialect knows, before and behind its own."""
    file, new = open_file(path), path.with_name("new")
    (first, *rest) = ((name, Tensor.of(array)) for name, array in strangers.items())
    with Late() as late:
        write_file(
            NamedTensors(dict([first]) | dict(file.tensors) | dict(rest), dict(file.metadata), WRITERS[file.container]), new, True, late
        )
    new.replace(path)
    return path


def tensors_of(path: Path) -> dict[str, Tensor]:
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return {name: tensor for file in files if file.suffix not in (".json", ".md") for name, tensor in open_file(file).tensors.items()}


DIALECTS = {
    "peft": "llama-3-8b", "kohya": "sd1.5", "lycoris": "sd1.5", "comfyui": "flux.1-dev", "xlabs": "flux.1-dev", "diffusers": "sd1.5",
    "diffusers-old": "sd1.5", "cloneofsimo": "sd1.5", "mlx": "llama-3-8b", "loralib": "gpt2", "gguf-lora": "llama-3-8b",
}  # fmt: skip


@pytest.mark.parametrize("dialect", DIALECTS)
def test_unexplained_tensors_are_carried_bit_for_bit(tmp_path: Path, dialect: str) -> None:
    base = DIALECTS[dialect]
    make = {"diffusers-old": specimens.every_attention, "cloneofsimo": specimens.every_attention, "xlabs": specimens.fused}
    path = tmp_path / ("one.safetensors" if dialect in ("kohya", "lycoris", "comfyui", "xlabs", "cloneofsimo") else "one")
    write_adapter(make.get(dialect, specimens.plain)(base), path, dialect)
    with_strangers(Path(open_adapter(path).files[0]))
    source, before = open_adapter(path), tensors_of(path)
    assert set(source.leftovers) == set(STRANGE)
    targets = list(source.deltas)
    changes: list[dict[str, Any]] = [{"dtype": "bf16"}, {"scale": 1.0, "keep_scale": True}]
    if dialect != "loralib":
        changes.append({"metadata": {"note": "x"}})
    if dialect not in ("cloneofsimo", "comfyui", "xlabs"):  # a walk has no gaps; a part of a fused weight does not go alone
        changes += [{"remove": [f"{targets[-1]}*"]}, {"remove": [f"{targets[-1]}*"], "dtype": "fp32"}]
    for number, change in enumerate(changes):
        out = tmp_path / f"{number}{path.suffix}"
        receipt = edit(path, out, **change)
        after = tensors_of(out)
        assert [finding.code for finding in receipt.findings] == ["carried"]
        for name, array in STRANGE.items():
            assert after[name].raw() == array.tobytes() and after[name].shape == array.shape
        again = open_adapter(out)
        assert set(again.deltas) == set(targets) - (set(targets[-1:]) if "remove" in change else set())
        if "dtype" not in change:
            assert all(tensor.raw() == before[name].raw() for name, tensor in after.items() if not name.endswith("alpha"))
        else:
            kind = {"bf16": "bfloat16", "fp32": "float32"}[change["dtype"]]
            assert again.dtypes() == {kind: sum(len(delta.factors()) for delta in again.deltas.values())}
    out = tmp_path / f"less{path.suffix}"
    receipt = edit(path, out, remove=["odd"])
    assert set(before) - set(tensors_of(out)) == {"odd"} and receipt.counts["removed"] == 1
    assert sorted(finding.code for finding in receipt.findings) == ["carried", "given-up"]
    receipt = edit(path, tmp_path / f"none{path.suffix}", dtype="bf16", drop=["leftovers"])
    assert not open_adapter(tmp_path / f"none{path.suffix}").leftovers
    assert [finding.code for finding in receipt.findings] == ["given-up"] * 2


def test_in_place_with_unexplained_tensors_and_hashes_that_are_true(tmp_path: Path) -> None:
    import hashlib

    path = with_strangers(kohya_file(tmp_path / "a.safetensors"))
    edit(path, in_place=True, remove=["*to_v"], metadata={"ss_note": None})
    file = open_file(path)
    assert {name for name in file.tensors if "lora" not in name} == set(STRANGE) and "ss_note" not in file.metadata
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    assert file.metadata["sshs_model_hash"] == hashlib.sha256(whole[start:]).hexdigest()
    assert names(tmp_path) == ["a.safetensors"]


def test_an_unexplained_part_of_a_module_does_not_stay_alone(tmp_path: Path) -> None:
    part = f"{STEM}q.lora_mystery.weight"
    path = with_strangers(kohya_file(tmp_path / "a.safetensors"), {part: np.ones((2, 2), np.float32)})
    held = digest(path)
    for change in ({"remove": ["*to_q"]}, {"keep": ["*to_k"]}, {"rename": [("*.attentions.0.*", "*.attentions.1.*")]}):
        with pytest.raises(RefusedError, match=rf"{part}.*belong to modules.*--drop leftovers"):
            edit(path, in_place=True, **change)  # type: ignore[arg-type]
    assert digest(path) == held
    edit(path, tmp_path / "b.safetensors", remove=["*to_k"])
    assert part in open_file(tmp_path / "b.safetensors").tensors
    edit(path, tmp_path / "c.safetensors", remove=["*to_q", part])
    assert not [name for name in open_file(tmp_path / "c.safetensors").tensors if "to_q" in name]
    edit(path, tmp_path / "d.safetensors", rename=[("*.attentions.0.*", "*.attentions.1.*")], drop=["leftovers"])
    assert not open_adapter(tmp_path / "d.safetensors").leftovers


def test_a_new_name_that_is_taken_is_refused(tmp_path: Path) -> None:
    new = STEM.replace("attentions_0", "attentions_1")
    path = with_strangers(kohya_file(tmp_path / "a.safetensors"), {f"{new}q.lora_up.weight": np.ones((2, 2), np.float32)})
    with pytest.raises(RefusedError, match="cannot leave the unexplained tensors"):
        edit(path, tmp_path / "b.safetensors", rename=[("*.attentions.0.*", "*.attentions.1.*")])
    assert names(tmp_path) == ["a.safetensors"]


def torch_kohya(path: Path, wrap: Any = dict, **options: Any) -> Path:
    content = {
        name: torch.from_numpy(tensor.read().copy()) for name, tensor in open_file(kohya_file(path.with_suffix(".x"))).tensors.items()
    }
    path.with_suffix(".x").unlink()
    torch.save(wrap(content), path, **options)
    return path


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt"])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_torch_file_stays_one_in_place(tmp_path: Path, suffix: str, legacy: bool) -> None:
    path = torch_kohya(tmp_path / f"a{suffix}", OrderedDict, _use_new_zipfile_serialization=not legacy)
    before = torch.load(path, weights_only=True)
    receipt = edit(path, in_place=True, dtype="bf16", remove=["*to_v"])
    after = torch.load(path, weights_only=True)
    assert list(after) == [name for name in before if "to_v" not in name]
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name] if name.endswith("alpha") else before[name].bfloat16())
    assert names(tmp_path) == [path.name]
    assert [finding.code for finding in receipt.findings] == (["container"] if legacy else [])


def test_a_torch_file_elsewhere_is_what_its_name_says(tmp_path: Path) -> None:
    path = torch_kohya(tmp_path / "a.pt")
    edit(path, tmp_path / "b.pt", dtype="bf16")
    assert open_file(tmp_path / "b.pt").container == "torch-zip"
    receipt = edit(path, tmp_path / "c.safetensors", dtype="bf16", metadata={"ss_note": "x"})
    found = open_file(tmp_path / "c.safetensors")
    assert found.container == "safetensors" and found.metadata == {"ss_note": "x"}
    assert [finding.code for finding in receipt.findings] == ["container"]
    with pytest.raises(RefusedError, match=r"no metadata.*safetensors"):
        edit(path, in_place=True, metadata={"ss_note": "x"})


def test_what_lies_around_the_tensors_stays(tmp_path: Path) -> None:
    path = torch_kohya(tmp_path / "a.ckpt", lambda tensors: {"epoch": 3, **tensors, "hyper": {"lr": 0.5, "names": ["a", None]}})
    held = path.read_bytes()
    edit(path, in_place=True, dtype="bf16", remove=["*to_v"])
    found = torch.load(path, weights_only=True)
    assert (found["epoch"], found["hyper"]) == (3, {"lr": 0.5, "names": ["a", None]})
    assert {tensor.dtype for name, tensor in found.items() if "lora_" in name and "alpha" not in name} == {torch.bfloat16}
    assert not [name for name in found if "to_v" in name]
    path.write_bytes(held)
    new = STEM.replace("attentions_0", "attentions_1")
    edit(path, in_place=True, rename=[("*.attentions.0.*", "*.attentions.1.*")])
    assert f"{new}q.lora_up.weight" in torch.load(path, weights_only=True)
    path.write_bytes(held)
    receipt = edit(path, tmp_path / "b.safetensors", dtype="bf16")
    assert "no-tensors" in [finding.code for finding in receipt.findings]


class Odd:
    """Something a pickle can hold and a weights-only load does not."""


def test_a_torch_file_that_holds_objects_is_written_as_safetensors_only(tmp_path: Path) -> None:
    path = torch_kohya(tmp_path / "a.ckpt", lambda tensors: {**tensors, "callback": Odd()})
    held = digest(path)
    with pytest.raises(RefusedError, match=r"more than plain data.*Odd.*-o NAME\.safetensors"):
        edit(path, in_place=True, dtype="bf16")
    assert digest(path) == held and names(tmp_path) == ["a.ckpt"]
    receipt = edit(path, tmp_path / "b.safetensors", dtype="bf16")
    assert any("callback" in said for finding in receipt.findings for said in finding.evidence)
    assert open_adapter(tmp_path / "b.safetensors").dtypes() == {"bfloat16": 6}


def test_code_is_never_carried(tmp_path: Path) -> None:
    """Not even where only the config changes and the file could have been copied."""
    import zipfile

    folder = peft_folder(tmp_path / "one", 1, 4, 8)
    weights, path = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
    inner = {name: torch.from_numpy(tensor.read().copy()) for name, tensor in open_file(weights).tensors.items()}
    torch.save(inner, path)
    weights.unlink()
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("adapter_model/code/evil.py", "import os")
    receipt = edit(folder, tmp_path / "two", metadata={"config.lora_dropout": "0.5"})
    assert "left-behind" in [finding.code for finding in receipt.findings]
    with zipfile.ZipFile(tmp_path / "two" / "adapter_model.bin") as archive:
        assert not [name for name in archive.namelist() if "evil" in name]
    found = torch.load(tmp_path / "two" / "adapter_model.bin", weights_only=True)
    assert found.keys() == inner.keys() and all(torch.equal(tensor, inner[name]) for name, tensor in found.items())


def test_the_real_peft_loads_an_edited_bin(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from tests.operations.test_combine_methods import llama

    folder = peft_folder(tmp_path / "one", 1, 4, 8)
    weights = folder / "adapter_model.safetensors"
    torch.save(
        {name: torch.from_numpy(tensor.read().copy()) for name, tensor in open_file(weights).tensors.items()}, folder / "adapter_model.bin"
    )
    weights.unlink()
    config = (folder / "adapter_config.json").read_bytes()
    edit(folder, in_place=True, dtype="bf16")
    assert names(folder) == ["adapter_config.json", "adapter_model.bin"] and (folder / "adapter_config.json").read_bytes() == config
    meant = open_adapter(folder)
    model = peft.PeftModel.from_pretrained(llama(), folder)
    for target, delta in meant.deltas.items():
        layer = model.base_model.model.get_submodule(target.module)
        np.testing.assert_allclose(layer.get_delta_weight("default").detach().float().numpy(), dense(delta), rtol=1e-4, atol=1e-5)


def test_the_real_diffusers_loads_an_edited_bin(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    folder = tmp_path / "one"
    write_adapter(specimens.plain("sd1.5"), folder, "diffusers")
    weights = folder / "pytorch_lora_weights.safetensors"
    torch.save(
        {name: torch.from_numpy(tensor.read().copy()) for name, tensor in open_file(weights).tensors.items()}, weights.with_suffix(".bin")
    )
    weights.unlink()
    edit(folder, in_place=True, dtype="fp32", remove=["*attn1.to_q"])
    found, _ = StableDiffusionLoraLoaderMixin.lora_state_dict(folder, weight_name="pytorch_lora_weights.bin", use_safetensors=False)
    assert found and not [name for name in found if "attn1.to_q" in name] and {tensor.dtype for tensor in found.values()} == {torch.float32}


def test_side_files_stay_byte_for_byte_but_for_the_keys_that_change(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "one", 1, 4, 8)
    config = json.loads((folder / "adapter_config.json").read_text()) | {"unknown_to_all": [1, {"a": None}], "lora_dropout": 0.1}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))
    held, weights = (folder / "adapter_config.json").read_bytes(), digest(folder / "adapter_model.safetensors")
    edit(folder, tmp_path / "two", dtype="bf16")
    assert (tmp_path / "two" / "adapter_config.json").read_bytes() == held
    edit(folder, tmp_path / "three", metadata={"config.lora_dropout": "0.5"})
    assert json.loads((tmp_path / "three" / "adapter_config.json").read_text()) == config | {"lora_dropout": 0.5}
    assert digest(tmp_path / "three" / "adapter_model.safetensors") == weights
    edit(folder, tmp_path / "four", alpha=5.0)
    assert json.loads((tmp_path / "four" / "adapter_config.json").read_text()) == config | {"lora_alpha": 5}


def test_a_config_keeps_keys_that_only_its_owner_knows(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "one", 1, 4, 8)
    config = json.loads((folder / "adapter_config.json").read_text()) | {"unknown_to_all": [1], "lora_dropout": 0.1}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    edit(folder, in_place=True, remove=["*layers.0*"], metadata={"config.lora_dropout": None})
    found = json.loads((folder / "adapter_config.json").read_text())
    assert found["unknown_to_all"] == [1] and "lora_dropout" not in found
    assert found["target_modules"] == ["model.layers.1.self_attn.q_proj"] and found["r"] == config["r"]


def test_a_training_checkpoint_in_a_nested_dict(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "one", 1, 4, 8)
    weights = folder / "adapter_model.safetensors"
    inner = {name: torch.from_numpy(tensor.read().copy()) for name, tensor in open_file(weights).tensors.items()}
    torch.save({"step": 7, "state_dict": inner}, folder / "adapter_model.bin")
    weights.unlink()
    edit(folder, in_place=True, dtype="bf16", remove=["*layers.0*"])
    found = torch.load(folder / "adapter_model.bin", weights_only=True)
    assert found["step"] == 7 and list(found["state_dict"]) == [name for name in inner if "layers.0" not in name]
    assert all(torch.equal(tensor, inner[name].bfloat16()) for name, tensor in found["state_dict"].items())


def test_metadata_can_be_taken_out_to_the_last_key(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "one", 1, 4, 8)
    keys = open_file(folder / "adapter_model.safetensors").metadata
    edit(folder, in_place=True, metadata={"format": "pt", "a": "b"})
    edit(folder, in_place=True, metadata=dict.fromkeys([*keys, "format", "a"]))
    assert open_file(folder / "adapter_model.safetensors").metadata == {}


def mlx_npz(folder: Path) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for number in range(2):
        for name in "qv":
            stem = f"model.layers.{number}.self_attn.{name}_proj"
            arrays |= {f"{stem}.lora_a": rng.standard_normal((64, 4)), f"{stem}.lora_b": rng.standard_normal((4, 64))}
    np.savez(folder / "adapters.npz", **{name: array.astype(np.float32) for name, array in arrays.items()})
    return folder


def test_a_scale_that_is_not_known_need_not_be(tmp_path: Path) -> None:
    folder = mlx_npz(tmp_path / "one")
    edit(folder, tmp_path / "two", dtype="fp16", remove=["*layers.1*q_proj"])
    assert names(tmp_path / "two") == ["adapters.npz"]
    found = np.load(tmp_path / "two" / "adapters.npz")
    old = np.load(folder / "adapters.npz")
    assert len(found.files) == 6 and all(np.array_equal(found[name], old[name].astype(np.float16)) for name in found.files)
    assert all(delta.scale is None for delta in open_adapter(tmp_path / "two").deltas.values())
    with pytest.raises(RefusedError, match="never guessed"):
        edit(folder, tmp_path / "three", scale=1.0, keep_scale=True)
    held = digest(folder / "adapters.npz")
    for scale in (2.0, 1.0):
        shutil.copytree(folder, tmp_path / f"{scale}")
        receipt = edit(tmp_path / f"{scale}", in_place=True, scale=scale)
        assert (
            names(tmp_path / f"{scale}") == ["adapter_config.json", "adapters.npz"]
            and digest(tmp_path / f"{scale}" / "adapters.npz") == held
        )
        assert {delta.scale for delta in open_adapter(tmp_path / f"{scale}").deltas.values()} == {scale} and not receipt.findings


def merged_linear(folder: Path) -> Path:
    """PEFT's MergedLinear of before 0.3: q and v of a fused qkv share a file's tensors, which today's form does not have."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    stem = "base_model.model.transformer.h.0.self_attention.query_key_value"
    torch.save(
        {
            f"{stem}.lora_A.weight": torch.from_numpy(rng.standard_normal((16, 1024)).astype(np.float32)),
            f"{stem}.lora_B.weight": torch.from_numpy(rng.standard_normal((2048, 8, 1)).astype(np.float32)),
        },
        folder / "adapter_model.bin",
    )
    config = {
        "peft_type": "LORA",
        "r": 8,
        "lora_alpha": 16,
        "enable_lora": [True, False, True],
        "fan_in_fan_out": True,
        "merge_weights": False,
    }
    config |= {
        "target_modules": ["query_key_value"],
        "base_model_name_or_path": "bigscience/bloom-560m",
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_an_old_form_stays_what_it_is(tmp_path: Path) -> None:
    folder = merged_linear(tmp_path / "one")
    before = torch.load(folder / "adapter_model.bin", weights_only=True)
    config = (folder / "adapter_config.json").read_bytes()
    edit(folder, tmp_path / "two", dtype="bf16")
    after = torch.load(tmp_path / "two" / "adapter_model.bin", weights_only=True)
    assert all(torch.equal(after[name], tensor.bfloat16()) for name, tensor in before.items())
    assert (tmp_path / "two" / "adapter_config.json").read_bytes() == config
    for change in ({"scale": 1.0, "keep_scale": True}, {"alpha": 3.0}):
        with pytest.raises(RefusedError, match="present form"):
            edit(folder, tmp_path / "three", **change)  # type: ignore[arg-type]
    assert names(tmp_path) == ["one", "two"]


def test_a_file_that_does_not_say_its_base_is_read_back_as_it_was_read(tmp_path: Path) -> None:
    write_adapter(specimens.plain("sam-vit-b"), tmp_path / "a.safetensors", "sam-lora", verify=False)
    targets = set(open_adapter(tmp_path / "a.safetensors").deltas)
    edit(tmp_path / "a.safetensors", in_place=True, dtype="bf16")
    assert set(open_adapter(tmp_path / "a.safetensors").deltas) == targets


def test_names_nobody_has_are_refused(tmp_path: Path) -> None:
    write_adapter(specimens.plain("sam-vit-b"), tmp_path / "a.safetensors", "sam-lora", verify=False)
    with pytest.raises(RefusedError, match="not read as the same adapter"):
        edit(tmp_path / "a.safetensors", in_place=True, rename=[("w_a_000", "w_a_zero")])


@pytest.mark.parametrize("out", [None, "two"])
def test_the_files_of_a_triad(tmp_path: Path, out: str | None) -> None:
    """Each keeps its own; what nobody explains goes by its name in the adapter, which is not that in the file."""
    folder = tmp_path / "one"
    shutil.copytree(Path(__file__).parents[2] / "demo" / "mystery", folder)
    downs = torch.load(folder / "down-param.bin", weights_only=True)
    torch.save({"weird.thing": torch.ones(3, 4), **downs, "other": torch.ones(2)}, folder / "down-param.bin")
    ups, config = digest(folder / "up-param.bin"), digest(folder / "config.json")
    where: dict[str, Any] = {"in_place": True} if out is None else {"out": tmp_path / out}
    receipt = edit(folder, remove=["weird*"], **where)
    after = folder if out is None else tmp_path / out
    assert (digest(after / "up-param.bin"), digest(after / "config.json")) == (ups, config)
    assert list(torch.load(after / "down-param.bin", weights_only=True)) == [*downs, "other"]
    assert receipt.counts["tensors_gone"] == 1 and receipt.counts["tensors_kept"] == 29
    edit(after, in_place=True, dtype="bf16", remove=["*layers.0*"])
    left = torch.load(after / "down-param.bin", weights_only=True)
    assert list(left) == [*(name for name in downs if "layers.0" not in name), "other"]
    assert left.pop("other").tolist() == [1, 1] and all(torch.equal(tensor, downs[name].bfloat16()) for name, tensor in left.items())


def test_a_split_adapter_stays_one(tmp_path: Path) -> None:
    """Whose adapter was split is remembered, and the files are those of a triad all the same."""
    write_adapter(specimens.plain("sd1.5"), tmp_path / "whole.safetensors", "kohya")
    write_adapter(open_adapter(tmp_path / "whole.safetensors"), tmp_path / "one", "triad")
    before = open_adapter(tmp_path / "one")
    assert (before.dialect, before.found_as) == ("kohya", "triad")
    for changes in ({"alpha": 7.0}, {"dtype": "bf16"}, {"scale": 1.0, "keep_scale": True}):
        out = tmp_path / next(iter(changes))
        edit(tmp_path / "one", out, **changes)  # type: ignore[arg-type]
        after = open_adapter(out)
        assert names(out) == names(tmp_path / "one") and (after.dialect, after.found_as) == ("kohya", "triad")
        assert after.deltas.keys() == before.deltas.keys()
    assert all(delta.alpha == 7.0 for delta in open_adapter(tmp_path / "alpha").deltas.values())
    held = digest(tmp_path / "one" / "up-param.bin")
    edit(tmp_path / "one", in_place=True, alpha=7.0)
    assert digest(tmp_path / "one" / "up-param.bin") == held


def test_what_the_dialect_cannot_say_is_a_refusal(tmp_path: Path) -> None:
    """Not a failed proof: PEFT's VeRA has no multiplier, and what is left of an adapter may be none."""
    write_adapter(specimens.vera("llama-3-8b"), tmp_path / "vera", "peft")
    with pytest.raises(RefusedError, match=r"does not hold this multiplier.*--bake"):
        edit(tmp_path / "vera", tmp_path / "out", scale=0.5)
    write_adapter(specimens.adalora("llama-3-8b"), tmp_path / "ada", "peft")
    empty = next(target for target, delta in open_adapter(tmp_path / "ada").deltas.items() if not delta.rank)
    with pytest.raises(RefusedError, match="would be left is not read as an adapter of peft"):
        edit(tmp_path / "ada", tmp_path / "out", keep=[f"{empty}*"], dtype="fp32")
    assert names(tmp_path) == ["ada", "vera"]


def test_parts_of_a_fused_weight_go_together(tmp_path: Path) -> None:
    write_adapter(specimens.plain("flux.1-dev"), tmp_path / "a.safetensors", "kohya")
    with pytest.raises(RefusedError, match="go and stay together"):
        edit(tmp_path / "a.safetensors", tmp_path / "b.safetensors", remove=["*.transformer_blocks.0.attn.to_q"])
    edit(tmp_path / "a.safetensors", tmp_path / "b.safetensors", remove=[f"*.transformer_blocks.0.attn.to_{part}" for part in "qkv"])
    assert names(tmp_path) == ["a.safetensors", "b.safetensors"]


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = with_strangers(kohya_file(tmp_path / "a.safetensors"))
    assert main(["edit", str(path), "--in-place", "--dtype", "bf16", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    (carried,) = facts["findings"]
    assert (carried["code"], carried["severity"], carried["evidence"]) == ("carried", "info", list(STRANGE))
    assert facts["counts"]["tensors_kept"] == 5 and facts["counts"]["tensors_changed"] == 6
    assert main(["edit", str(path), "--in-place", "--set", "a=b"]) == 0
    assert "2 tensors that no rule explains were carried bit for bit" in capsys.readouterr().out
    assert main(["edit", str(path), "--in-place", "--remove", "odd", "--drop", "leftovers"]) == 2
    assert np.array_equal(open_file(path).tensors["some.mystery"].read(), STRANGE["some.mystery"]) and ml_dtypes
