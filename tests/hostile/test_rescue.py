"""A file that carries code and whole tensors: the tensors are rescued, the code stays behind and is named."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from upparam.cli import main
from upparam.operations.scan import Verdict, scan_file

NAMES = [f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{part}.weight" for layer in (0, 1) for part in "AB"]


class Payload:
    """What a pickle calls when it is loaded: it would make the canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch '{self.canary}'",)


def values() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return {name: torch.randn(2, 8) if "lora_A" in name else torch.randn(8, 2) for name in NAMES}


@pytest.fixture(params=["zip", "legacy"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A PEFT adapter whose .bin holds a payload between its tensors."""
    path = tmp_path / "adapter"
    path.mkdir()
    tensors = values()
    first, *rest = tensors
    evil = {first: tensors[first], "payload": Payload(tmp_path / "canary"), **{name: tensors[name] for name in rest}}
    torch.save(evil, path / "adapter_model.bin", _use_new_zipfile_serialization=request.param == "zip")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], "base_model_name_or_path": "x"}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("command", ["convert", "assemble"])
def test_tensors_come_out_and_code_is_named(command: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = scan_file(folder / "adapter_model.bin")
    assert report.verdict is Verdict.CODE and report.tensors == 4
    out = tmp_path / "out"
    code = main([command, str(folder), "--to", "peft", "-o", str(out)])
    shown = capsys.readouterr()
    assert code == 1 and "system" in shown.out and "nothing was run" in shown.out
    written = load_file(out / "adapter_model.safetensors")
    assert set(written) == set(NAMES)
    for name, value in values().items():
        np.testing.assert_array_equal(written[name], value.numpy())
    assert scan_file(out / "adapter_model.safetensors").verdict is Verdict.CLEAN
    assert not (tmp_path / "canary").exists()


def test_the_payload_is_real(folder: Path, tmp_path: Path) -> None:
    torch.load(folder / "adapter_model.bin", weights_only=False)
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("keep", [0.5, 0.8])
def test_cut_and_with_code(folder: Path, tmp_path: Path, keep: float, capsys: pytest.CaptureFixture[str]) -> None:
    """Even truncated, what is whole is listed and written, and nothing runs."""
    path = tmp_path / "cut.bin"
    data = (folder / "adapter_model.bin").read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    assert main(["inspect", str(path)]) == 3
    listing = capsys.readouterr()
    out = tmp_path / "rescued.safetensors"
    code = main(["inspect", str(path), "--salvage", str(out)])
    assert code in (0, 1, 3) and not (tmp_path / "canary").exists()
    if out.exists():
        whole = load_file(out)
        assert whole and set(whole) <= set(NAMES) and all(name in listing.out for name in whole)
        for name, value in whole.items():
            np.testing.assert_array_equal(value, values()[name].numpy())


def test_a_member_that_breaks_does_not_hide_the_others(tmp_path: Path) -> None:
    path = tmp_path / "w.bin"
    torch.save({"a": torch.arange(4.0), "b": torch.arange(400.0)}, path)
    data = bytearray(path.read_bytes())
    at = data.index(struct.pack("<4f", 396, 397, 398, 399))
    del data[at:]
    path.write_bytes(data)
    from upparam.operations.salvage import salvage

    found = salvage(path)
    assert set(found.tensors) == {"a"} and set(found.lost) == {"b"}
