"""Damaged files: what is whole comes out bit for bit, what is not is named."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from upparam.cli import main
from upparam.containers import open_file
from upparam.containers.safetensors import write
from upparam.errors import MalformedError
from upparam.operations.salvage import salvage
from upparam.tensors import Tensor

VALUES = {f"layer.{index}.weight": np.full((40, 25), index, np.float32) for index in range(8)}


def made(tmp_path, form):
    path = tmp_path / f"weights.{form}"
    if form == "safetensors":
        with path.open("wb") as stream:
            write(stream, {name: Tensor.of(value) for name, value in VALUES.items()})
    elif form == "npz":
        np.savez(path, **VALUES)
    elif form == "pkl":
        path.write_bytes(pickle.dumps(VALUES))
    else:
        torch.save({name: torch.from_numpy(value) for name, value in VALUES.items()}, path, _use_new_zipfile_serialization=form == "zip")
    return path


@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy", "npz", "pkl"])
def test_truncated_files_give_back_what_is_whole(tmp_path, form):
    path = made(tmp_path, form)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 6 // 10])
    with pytest.raises(MalformedError):
        open_file(path)
    found = salvage(path)
    assert 3 <= len(found.tensors) <= 5
    for name, tensor in found.tensors.items():
        np.testing.assert_array_equal(tensor.read(), VALUES[name])
    if form in ("safetensors", "zip", "legacy"):
        assert set(found.lost) | set(found.tensors) == set(VALUES)


def test_a_wrong_checksum_loses_only_its_tensor(tmp_path):
    path = made(tmp_path, "zip")
    data = bytearray(path.read_bytes())
    target = open_file(path).tensors["layer.3.weight"]
    data[target.offset + 5] ^= 1
    data[data.rfind(b"PK\x05\x06")] = 0
    path.write_bytes(data)
    found = salvage(path)
    assert set(found.lost) == {"layer.3.weight"} and len(found.tensors) == 7


def test_commands(tmp_path, capsys):
    path = made(tmp_path, "zip")
    path.write_bytes(path.read_bytes()[:-9000])
    assert main(["inspect", str(path)]) == 3
    out = capsys.readouterr().out
    assert "still whole" in out and "layer.0.weight  float32 [40, 25]" in out and "layer.7.weight" in out.split("are lost")[1]
    saved = tmp_path / "saved.safetensors"
    assert main(["inspect", str(path), "--salvage", str(saved)]) == 0
    tensors = open_file(saved).tensors
    np.testing.assert_array_equal(tensors["layer.1.weight"].read(), VALUES["layer.1.weight"])
    assert main(["inspect", str(path), "--salvage", str(saved)]) == 2


def test_nothing_to_salvage_is_the_plain_error(tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(MalformedError):
        salvage(path)


def test_names_that_cannot_be_written_are_lost(tmp_path):
    header = b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}'
    path = tmp_path / "odd.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    found = salvage(path)
    assert list(found.tensors) == ["b"] and list(found.lost) == ["\\ud800"]
