"""ggla: files laid out byte for byte as llama.cpp's old converter wrote them."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upparam.containers import ggla, head_of
from upparam.containers.base import TensorFile
from upparam.errors import MalformedError
from upparam.sources import MemorySource


def write(arrays: dict[str, np.ndarray], rank: int = 8, alpha: int = 16) -> bytes:
    """The layout of write_file_header and write_tensor_header in llama.cpp's convert-lora-to-ggml.py."""
    out = bytearray(b"ggla"[::-1] + struct.pack("<iii", 1, rank, alpha))
    for name, array in arrays.items():
        kind = {"float32": 0, "float16": 1}[array.dtype.name]
        out += struct.pack(f"<iii{array.ndim}i", array.ndim, len(name), kind, *array.shape[::-1]) + name.encode()
        out += bytes(-len(out) % 32) + array.tobytes()
    return bytes(out)


def read(data: bytes) -> TensorFile:
    return ggla.read(MemorySource(data, "a.bin"), Path("a.bin"))


ARRAYS = {
    "layers.0.attention.wq.weight.loraA": np.arange(256, dtype=np.float32).reshape(32, 8),
    "layers.0.attention.wq.weight.loraB": np.arange(328, dtype=np.float16).reshape(41, 8),
    "bias": np.arange(3, dtype=np.float32),
}


def test_reads_what_the_converter_wrote() -> None:
    data = write(ARRAYS)
    assert ggla.sniff(head_of(MemorySource(data), Path("x")))
    file = read(data)
    assert file.metadata == {"lora_r": "8", "lora_alpha": "16"} and list(file.tensors) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert file.tensors[name].shape == array.shape and np.array_equal(file.tensors[name].read(), array)


def test_another_version_is_not_ours() -> None:
    data = b"algg" + struct.pack("<iii", 2, 8, 16)
    assert not ggla.sniff(head_of(MemorySource(data), Path("x")))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"algg\1\0\0\0", "ends inside a header"),
        (write(ARRAYS)[:-1], "data ends before"),
        (write(ARRAYS)[:30], "ends inside a header"),
        (write({"a": np.zeros(1, np.float32)}) + write({"a": np.zeros(1, np.float32)})[16:36], "twice|ends"),
        (write({}) + struct.pack("<iii", 2, 1 << 30, 0), "longer than any real"),
        (write({}) + struct.pack("<iii", 2, -1, 0), "longer than any real"),
        (write({}) + struct.pack("<iii", 1 << 30, 1, 0), "could not have written"),
        (write({}) + struct.pack("<iii", 2, 1, 2), "could not have written"),
        (write({}) + struct.pack("<iiiii", 2, 1, 0, -1, -1) + b"a", "negative"),
        (write({}) + struct.pack("<iiiii", 2, 1, 0, 1 << 30, 1 << 30) + b"a", "data ends before"),
    ],
)
def test_broken_files_say_what_is_wrong(data: bytes, message: str) -> None:
    with pytest.raises(MalformedError, match=message) as caught:
        read(data)
    assert caught.value.file == "a.bin"


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damage_never_escapes_the_error_tree(data: st.DataObject) -> None:
    good = bytearray(write(ARRAYS))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(8, len(good) - 1))] = data.draw(st.integers(0, 255))
    try:
        file = read(bytes(good))
    except MalformedError:
        return
    for tensor in file.tensors.values():
        assert tensor.read().shape == tensor.shape
