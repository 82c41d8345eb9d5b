"""Tensors into files: two threads write what one would, views are turned right, and what fails leaves its own error."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from upparam.containers import gguf
from upparam.containers import safetensors as ours
from upparam.containers.torchfile import write as torchfile
from upparam.containers.writing import chunks, put
from upparam.dialects.kohya_metadata import hashes
from upparam.dtypes import DTYPES
from upparam.errors import MalformedError
from upparam.sources import FileSource, MemorySource
from upparam.tensors import Tensor, same_bits


def test_long_tensors_are_written_in_pieces(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(bytes(range(256)) * 4)
    tensor = Tensor(DTYPES["uint8"], (1024,), FileSource(tmp_path / "w"))
    pieces = [bytes(piece) for piece in chunks(tensor, size=100)]
    assert len(pieces) == 11 and b"".join(pieces) == tensor.raw()


def mixed(folder: Path) -> dict[str, Tensor]:
    """More than one thread's share: from a file, transposed, byte-swapped, computed, stacked, tiny and empty."""
    random = np.random.default_rng(3)
    wide = random.integers(0, 1 << 16, (96, 4096), np.uint16)
    (folder / "w").write_bytes(wide.tobytes() * 8)
    source = FileSource(folder / "w")
    whole = Tensor(DTYPES["float16"], (8 * 96, 4096), source)
    parts = {f"part {number}": whole.rows(96 * number, 96 * (number + 1)) for number in range(8)}
    turned = {f"turned {name}": part.T for name, part in parts.items()}
    floats = random.standard_normal((300, 700)).astype(np.float32)
    return {
        **parts, **turned, "whole": whole,
        "big endian": Tensor(DTYPES["float32"], floats.shape, MemorySource(floats.astype(">f4").tobytes()), big_endian=True),
        "computed": Tensor.computed(DTYPES["float32"], floats.T.shape, lambda: floats.T.copy()),
        "stacked": Tensor.stack([parts["part 3"], parts["part 1"]]),
        "one": Tensor.of(np.array(3.0, np.float16)),
        "none": Tensor.of(np.zeros((0, 4), np.float32)),
    }  # fmt: skip


def test_two_threads_write_what_one_would(tmp_path: Path) -> None:
    tensors = mixed(tmp_path)
    alone = io.BytesIO()
    ours.write(alone, tensors, {"format": "pt"})
    with (tmp_path / "out").open("xb") as stream:
        ours.write(stream, tensors, {"format": "pt"})
        stream.write(b"behind")
    assert (tmp_path / "out").read_bytes() == alone.getvalue() + b"behind"
    theirs = safetensors.numpy.load(alone.getvalue())
    assert all(theirs[name].tobytes() == tensor.read().tobytes() for name, tensor in tensors.items())


def test_gguf_pads_alike_on_both_ways(tmp_path: Path) -> None:
    tensors = {name.replace(" ", "_"): tensor for name, tensor in mixed(tmp_path).items() if tensor.numel and tensor.shape}
    metadata = {"general.architecture": "llama"}
    alone = io.BytesIO()
    gguf.write(alone, tensors, metadata)
    with (tmp_path / "out").open("xb") as stream:
        gguf.write(stream, tensors, metadata)
    assert (tmp_path / "out").read_bytes() == alone.getvalue()


def failing() -> Tensor:
    def fail() -> np.ndarray:
        raise MalformedError("no such values")

    return Tensor.computed(DTYPES["float32"], (4, 4), fail)


def test_what_fails_in_a_thread_is_raised(tmp_path: Path) -> None:
    with (tmp_path / "out").open("xb") as stream, pytest.raises(MalformedError, match="tensor 'last': no such values"):
        put(stream, mixed(tmp_path) | {"last": failing()})


def test_other_metadata_takes_its_place_in_a_written_file(tmp_path: Path) -> None:
    tensors = mixed(tmp_path)
    for name, digest in (("out", "000"), ("meant", "abc")):
        with (tmp_path / name).open("xb") as stream:
            ours.write(stream, tensors, {"format": "pt", "digest": digest, "last": "z"})
    ours.restate(tmp_path / "out", tensors, {"format": "pt", "digest": "abc", "last": "z"})
    assert (tmp_path / "out").read_bytes() == (tmp_path / "meant").read_bytes()
    with pytest.raises(MalformedError, match="not as long"):
        ours.restate(tmp_path / "out", tensors, {"format": "pt", "digest": "much too long", "last": "z"})
    assert (tmp_path / "out").read_bytes() == (tmp_path / "meant").read_bytes()


def test_the_tensor_that_cannot_be_made_is_named_whatever_is_written() -> None:
    for write in (ours.write, lambda stream, tensors: torchfile.write(stream, {"state": tensors}), lambda _, tensors: hashes(tensors, {})):
        with pytest.raises(MalformedError, match=r"tensor '(state/)?m.up': no such values"):
            write(io.BytesIO(), {"m.up": failing()})


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(500, 1100), st.sampled_from(["uint8", "float16", "float32", "float64"]))
def test_a_wide_matrix_is_turned(rows: int, columns: int, dtype: str) -> None:
    values = np.random.default_rng(rows * columns).integers(0, 250, (rows, columns)).astype(DTYPES[dtype].numpy)
    turned = Tensor.of(values).T.read()
    assert turned.flags.c_contiguous and np.array_equal(turned, values.T)


def test_a_bit_at_either_end_is_seen(tmp_path: Path) -> None:
    size = (1 << 16) * 3 + 5
    data = bytearray(np.random.default_rng(0).bytes(size))
    (tmp_path / "one").write_bytes(data)
    one = Tensor(DTYPES["uint8"], (size,), FileSource(tmp_path / "one"))
    for number, place in enumerate((None, 0, 4095, 4096, 1 << 16, size - 1)):
        changed = bytearray(data)
        if place is not None:
            changed[place] ^= 1
        (tmp_path / f"other {number}").write_bytes(changed)
        other = Tensor(DTYPES["uint8"], (size,), FileSource(tmp_path / f"other {number}"))
        assert same_bits(one, other) is (place is None)
        assert same_bits(one, Tensor.of(other.read())) is (place is None)


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL])
def test_file_systems_that_reserve_no_room_are_written_too(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
    values = {f"t{index}": np.full((3 << 18,), index, np.float32) for index in range(4)}
    with (tmp_path / "x.safetensors").open("wb") as stream:
        ours.write(stream, {name: Tensor.of(array) for name, array in values.items()})
    found = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    assert all(np.array_equal(found[name], array) for name, array in values.items())


def test_a_full_disk_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with (tmp_path / "x.safetensors").open("wb") as stream, pytest.raises(OSError, match="No space"):
        ours.write(stream, {"t": Tensor.of(np.zeros(2 << 20, np.float32))})
