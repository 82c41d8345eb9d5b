"""safetensors: every check of the format, and the real library reading what we write and writing what we read."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from upparam.containers import safetensors as ours
from upparam.containers.base import Head
from upparam.dtypes import DTYPES
from upparam.errors import LimitError, MalformedError, RefusedError
from upparam.limits import MAX_SAFETENSORS_HEADER
from upparam.sources import FileSource, MemorySource
from upparam.tensors import Tensor, same_bits

PATH = Path("a.safetensors")


def file_of(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": list(offsets)}


def read(data: bytes) -> Any:
    return ours.read(MemorySource(data, "a.safetensors"), PATH)


def write(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    stream = io.BytesIO()
    ours.write(stream, tensors, metadata)
    return stream.getvalue()


arrays = st.dictionaries(
    st.text(st.characters(codec="utf-8"), max_size=8).filter(lambda name: name != "__metadata__"),
    st.sampled_from(
        [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.int32, np.int16, np.int8, np.uint8, np.bool_]
    ).flatmap(lambda dtype: hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4).map(lambda shape: (dtype, shape))),
    max_size=6,
)


@settings(max_examples=100, deadline=None)
@given(
    arrays,
    st.none()
    | st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=5), st.text(st.characters(codec="utf-8"), max_size=9), min_size=1, max_size=3
    ),
    st.integers(0, 99),
)
def test_round_trip_and_the_real_library(made: dict[str, Any], metadata: dict[str, str] | None, seed: int) -> None:
    rng = np.random.default_rng(seed)
    found = {}
    for name, (dtype, shape) in made.items():
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        found[name] = rng.integers(0, 2 if dtype is np.bool_ else 256, size, np.uint8).view(dtype).reshape(shape)
    data = write({name: Tensor.of(array) for name, array in found.items()}, metadata)
    file = read(data)
    assert file.metadata == (metadata or {}) and not file.findings
    assert {name: (tensor.shape, tensor.raw()) for name, tensor in file.tensors.items()} == {
        name: (array.shape, array.tobytes()) for name, array in found.items()
    }
    theirs = {name: (tuple(view["shape"]), bytes(view["data"])) for name, view in safetensors.deserialize(data)}
    assert theirs == {name: (array.shape, array.tobytes()) for name, array in found.items()}
    again = read(safetensors.numpy.save(found, metadata))
    assert all(same_bits(again.tensors[name], file.tensors[name]) for name in found) and again.metadata == file.metadata


def test_the_layout_is_that_of_the_real_writer() -> None:
    found = {
        "b": np.zeros(3, np.float16),
        "a": np.zeros(2, np.float16),
        "z": np.zeros(5, np.float32),
        "i": np.zeros(1, np.int8),
        "n": np.zeros(1, np.int64),
    }
    tensors = {name: Tensor.of(array) for name, array in found.items()}
    assert list(ours.layout_order(tensors)) == list(read(safetensors.numpy.save(found)).tensors)
    assert write(tensors, {"k": "v"}) == safetensors.numpy.save(found, {"k": "v"}), "byte for byte"


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_comes_back(name: str) -> None:
    dtype = DTYPES[name]
    raw = bytes(range(1, 1 + 4 * dtype.itemsize)) if name != "bool" else b"\0\1\1\0"
    tensor = Tensor(dtype, (2, 2), MemorySource(raw))
    back = read(write({"t": tensor})).tensors["t"]
    assert same_bits(back, tensor)


def test_torch_reads_what_we_write(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    load = pytest.importorskip("safetensors.torch").load
    names = {"bfloat16": torch.bfloat16, "float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2, "uint16": torch.uint16}
    tensors = {name: Tensor(DTYPES[name], (2, 3), MemorySource(bytes(range(6 * DTYPES[name].itemsize)))) for name in names}
    for name, tensor in load(write(tensors)).items():
        assert tensor.dtype == names[name] and tuple(tensor.shape) == (2, 3)
        assert bytes(tensor.view(torch.uint8).flatten().tolist()) == tensors[name].raw()


def test_views_and_byte_order_are_written_straight(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    big = Tensor(DTYPES["float32"], (3, 4), MemorySource(array.astype(">f4").tobytes()), big_endian=True)
    (tmp_path / "w").write_bytes(array.tobytes())
    plain = Tensor(DTYPES["float32"], (3, 4), FileSource(tmp_path / "w"))
    theirs = safetensors.numpy.load(write({"big": big, "t": big.T, "file": plain, "cut": plain.rows(1, 2)}))
    assert np.array_equal(theirs["big"], array) and np.array_equal(theirs["t"], array.T)
    assert np.array_equal(theirs["file"], array) and np.array_equal(theirs["cut"], array[1:2])


def test_an_empty_file_of_no_tensors() -> None:
    assert read(write({})).tensors == {} and safetensors.numpy.load(write({})) == {}


BROKEN: dict[str, tuple[bytes, str]] = {
    "seven bytes": (b"1234567", "too short"),
    "header past the end": (file_of({"a": entry()}, bytes(8))[:20], "ends inside its header"),
    "no JSON": (file_of(b"{nonsense"), "not valid JSON"),
    "not UTF-8": (file_of(b'{"\xff": 1}'), "not valid JSON"),
    "UTF-16": (file_of('{"a": 1}'.encode("utf-16")), "not valid JSON"),
    "deep": (file_of(b'{"a":' * 100_000), "not valid JSON"),
    "a list": (file_of([1]), "not a JSON object"),
    "a huge number": (file_of(b'{"a":' + b"9" * 10_000 + b"}"), "not valid JSON"),
    "twice": (file_of(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'), "twice"),
    "a key of an entry twice": (file_of(b'{"a":{"dtype":"U8","dtype":"I8","shape":[0],"data_offsets":[0,0]}}'), "twice"),
    "metadata of numbers": (file_of({"__metadata__": {"a": 1}}), "strings to strings"),
    "metadata a list": (file_of({"__metadata__": []}), "strings to strings"),
    "entry a list": (file_of({"a": []}), "needs dtype"),
    "entry a number": (file_of({"a": 3}), "needs dtype"),
    "no shape": (file_of({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)), "needs dtype"),
    "shape a string": (file_of({"a": entry(shape="", offsets=(0, 4))}, bytes(4)), "needs dtype"),
    "shape an object": (file_of({"a": entry(shape={}, offsets=(0, 4))}, bytes(4)), "needs dtype"),
    "shape of floats": (file_of({"a": entry(shape=[2.0])}, bytes(8)), "needs dtype"),
    "shape of truths": (file_of({"a": entry(shape=[True], offsets=(0, 4))}, bytes(4)), "needs dtype"),
    "a negative size": (file_of({"a": entry(shape=[-2])}, bytes(8)), "needs dtype"),
    "a size past 64 bits": (file_of({"a": entry(shape=[0, 1 << 64], offsets=(0, 0))}), "needs dtype"),
    "sizes whose product is past 64 bits": (file_of({"a": entry(shape=[0, 1 << 40, 1 << 40], offsets=(0, 0))}), "no machine"),
    "three offsets": (file_of({"a": entry(offsets=(0, 8, 9))}, bytes(8)), "needs dtype"),
    "offsets backwards": (file_of({"a": entry(offsets=(8, 0))}, bytes(8)), "needs dtype"),
    "negative offsets": (file_of({"a": entry(offsets=(-8, 0))}, bytes(8)), "needs dtype"),
    "dtype a list": (file_of({"a": entry(dtype=["F32"])}, bytes(8)), "element type"),
    "an unknown dtype": (file_of({"a": entry(dtype="F4")}, bytes(8)), "element type"),
    "too few bytes for the shape": (file_of({"a": entry(shape=(3,))}, bytes(8)), "disagree"),
    "too many bytes for the shape": (file_of({"a": entry(shape=(1,))}, bytes(8)), "disagree"),
    "data cut short": (file_of({"a": entry()}, bytes(7)), "ends before the data"),
    "an overlap": (file_of({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)), "overlap those of 'a'"),
    "a tensor inside another": (file_of({"a": entry(), "b": entry(shape=(1,), offsets=(0, 4))}, bytes(8)), "overlap"),
    "a gap": (file_of({"a": entry(), "b": entry(offsets=(9, 17))}, bytes(17)), "gap of 1 bytes"),
    "a gap at the start": (file_of({"a": entry(offsets=(4, 12))}, bytes(12)), "gap of 4 bytes"),
    "half a surrogate pair as a name": (file_of(b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'), "not Unicode"),
    "half a surrogate pair in metadata": (file_of(b'{"__metadata__":{"a":"\\udc00"}}'), "not Unicode"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_say_what_is_wrong(case: str) -> None:
    data, message = BROKEN[case]
    with pytest.raises(MalformedError, match=message) as caught:
        read(data)
    assert caught.value.file == "a.safetensors" and caught.value.line().isprintable()


LENIENT = {"twice", "sizes whose product is past 64 bits"}
"""Where we are stricter: of a name given twice the library reads one in silence."""


@pytest.mark.parametrize("case", sorted(BROKEN.keys() - LENIENT))
def test_the_real_reader_refuses_them_too(case: str) -> None:
    with pytest.raises(safetensors.SafetensorError):
        safetensors.deserialize(BROKEN[case][0])


def test_limits() -> None:
    with pytest.raises(LimitError, match="longer than any real one"):
        read((MAX_SAFETENSORS_HEADER + 1).to_bytes(8, "little") + b"{")
    with pytest.raises(LimitError, match="dimensions"):
        read(file_of({"a": entry(shape=(1,) * 33, offsets=(0, 4))}, bytes(4)))


def test_bytes_behind_the_data_are_a_finding() -> None:
    file = read(file_of({"a": entry()}, bytes(11)))
    assert [finding.code for finding in file.findings] == ["trailing-bytes"] and "3 bytes" in file.findings[0].message


def test_null_metadata_is_none() -> None:
    assert read(file_of({"__metadata__": None, "a": entry()}, bytes(8))).metadata == {}


def test_a_tensor_named_like_the_metadata_is_refused() -> None:
    with pytest.raises(RefusedError):
        write({"__metadata__": Tensor.of(np.zeros(1, np.float32))})


def test_sniff() -> None:
    good = file_of({"a": entry()}, bytes(8))

    def sniff(data: bytes) -> bool:
        return ours.sniff(Head(data, len(data), "x", MemorySource(data)))

    assert sniff(good) and not sniff(good[:8]) and not sniff(b"\x80\x02}" + good) and not sniff(b"{" * 20)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damage_never_escapes_the_error_tree(data: st.DataObject) -> None:
    good = bytearray(write({"a": Tensor.of(np.arange(4, dtype=np.float32)), "b": Tensor.of(np.zeros((2, 2), np.int8))}, {"k": "v"}))
    for _ in range(data.draw(st.integers(1, 3))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(good[: data.draw(st.integers(0, len(good)))])
    try:
        file = read(cut)
    except MalformedError:
        return
    for tensor in file.tensors.values():
        assert tensor.read().shape == tensor.shape


def test_the_corpus_equals_the_real_reader(corpus: Path) -> None:
    paths = [path for path in sorted(corpus.rglob("*.safetensors")) if path.stat().st_size > 1000]
    assert len(paths) > 5
    for path in paths:
        file = ours.read(FileSource(path), path)
        with safetensors.safe_open(path, "np") as theirs:
            assert set(theirs.keys()) == set(file.tensors) and (theirs.metadata() or {}) == file.metadata
            for name, tensor in file.tensors.items():
                assert theirs.get_tensor(name).tobytes() == tensor.raw()
