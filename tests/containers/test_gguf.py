"""GGUF against the real `gguf` library's writer, in both byte orders; and headers that lie."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from upparam.containers import gguf as ours
from upparam.containers import open_file
from upparam.containers.base import TensorFile
from upparam.errors import LimitError, MalformedError, RefusedError
from upparam.limits import MAX_GGUF_ARRAY_SHOWN
from upparam.sources import MemorySource
from upparam.tensors import Tensor

gguf = pytest.importorskip("gguf")
ORDERS = [gguf.GGUFEndian.LITTLE, gguf.GGUFEndian.BIG]


def write(path: Path, tensors: dict[str, Any], order: Any = ORDERS[0], keys: Any = None, alignment: int | None = None) -> Path:
    """A file by the real writer; a value may be an array or (quantised array, type)."""
    writer = gguf.GGUFWriter(path, "llama", endianess=order)
    if alignment:
        writer.add_custom_alignment(alignment)
    if keys:
        keys(writer)
    for name, value in tensors.items():
        array, kind = value if isinstance(value, tuple) else (value, None)
        writer.add_tensor(name, array.copy(), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read(data: bytes) -> TensorFile:
    return ours.read(MemorySource(data, "a.gguf"), Path("a.gguf"))


def text(value: str, order: str = "<") -> bytes:
    return struct.pack(order + "Q", len(value.encode())) + value.encode()


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def info(name: str, dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def file_of(keys: list[bytes], infos: list[bytes], data: bytes = b"", version: int = 3, counts: tuple[int, int] | None = None) -> bytes:
    tensors, pairs = counts or (len(infos), len(keys))
    head = ours.MAGIC + struct.pack("<IQQ", version, tensors, pairs) + b"".join(keys) + b"".join(infos)
    return head + bytes(-len(head) % 32) + data


def test_the_type_table_is_the_library_s() -> None:
    theirs = {int(kind): (kind.name, *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType}
    known = ours.QUANTISED | {number: (name, 1, size) for number, name, size in ((0, "F32", 4), (1, "F16", 2), (24, "I8", 1), (25, "I16", 2), (26, "I32", 4), (27, "I64", 8), (28, "F64", 8), (30, "BF16", 2))}  # fmt: skip
    assert {number: known[number] for number in theirs if number in known} == {
        number: entry for number, entry in theirs.items() if number in known
    }
    assert len(known.keys() & theirs.keys()) >= 30


def metadata(writer: Any) -> None:
    writer.add_string("general.name", "naïve 名")
    writer.add_uint32("n", 4_000_000_000)
    writer.add_int64("below", -5)
    writer.add_float32("adapter.lora.alpha", 16.0)
    writer.add_bool("yes", True)
    writer.add_array("sizes", [1, 2, 3])
    writer.add_array("words", ["a", "b"])
    writer.add_array("tokens", [f"token{index}" for index in range(MAX_GGUF_ARRAY_SHOWN + 1)])
    writer.add_array("scores", [float(index) for index in range(MAX_GGUF_ARRAY_SHOWN + 1)])


@pytest.mark.parametrize("order", ORDERS)
def test_metadata_and_tensors(tmp_path: Path, order: Any) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "blk.0.attn_q.weight.lora_a": rng.standard_normal((4, 64)).astype(np.float32),
        "blk.0.attn_q.weight.lora_b": rng.standard_normal((96, 4)).astype(np.float16),
        "i8": np.arange(-3, 4, dtype=np.int8),
        "i16": np.arange(3, dtype=np.int16),
        "i32": np.arange(6, dtype=np.int32).reshape(1, 2, 3),
        "i64": np.arange(2, dtype=np.int64),
        "f64": rng.standard_normal((2, 2, 2, 2)),
    }
    file = open_file(write(tmp_path / "a.gguf", arrays, order, metadata))
    assert file.container == "gguf" and file.structure is None and list(file.tensors) == list(arrays)
    for name, array in arrays.items():
        tensor = file.tensors[name]
        assert tensor.shape == array.shape and np.array_equal(tensor.read(), array)
    assert file.metadata["general.architecture"] == "llama" and file.metadata["general.name"] == "naïve 名"
    plain = {"n": "4000000000", "below": "-5", "adapter.lora.alpha": "16.0", "yes": "true", "sizes": "[1, 2, 3]", "words": '["a", "b"]'}
    assert plain.items() <= file.metadata.items()
    tokens, scores = json.loads(file.metadata["tokens"]), json.loads(file.metadata["scores"])
    assert tokens["length"] == scores["length"] == MAX_GGUF_ARRAY_SHOWN + 1
    assert tokens["first"][:2] == ["token0", "token1"] and scores["first"][:3] == [0.0, 1.0, 2.0]
    data = (tmp_path / "a.gguf").read_bytes()
    raw = np.frombuffer(data[scores["start"] : scores["end"]], ">f4" if order == gguf.GGUFEndian.BIG else "<f4")
    assert np.array_equal(raw, np.arange(MAX_GGUF_ARRAY_SHOWN + 1)), "the byte range holds the array"
    assert b"token1024" in data[tokens["start"] : tokens["end"]]
    assert [finding.code for finding in file.findings] == ["gguf-long-array"] * 2


@pytest.mark.parametrize("order", ORDERS)
def test_bfloat16(tmp_path: Path, order: Any) -> None:
    array = np.random.default_rng(1).standard_normal((8, 32)).astype(ml_dtypes.bfloat16)
    stored = array.view(np.uint16) if order == ORDERS[0] else array.view(np.uint16).byteswap()
    path = write(tmp_path / "a.gguf", {"w": (stored.view(np.uint8), gguf.GGMLQuantizationType.BF16)}, order)
    tensor = open_file(path).tensors["w"]
    assert tensor.dtype.name == "bfloat16" and tensor.shape == (8, 32)
    assert tensor.read().tobytes() == array.tobytes()


def test_quantised_tensors_are_placed_not_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    array = rng.standard_normal((4, 64)).astype(np.float32)
    packed = gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q8_0)
    path = write(tmp_path / "a.gguf", {"q": (packed, gguf.GGMLQuantizationType.Q8_0), "f": array})
    file = open_file(path)
    assert list(file.tensors) == ["f"] and np.array_equal(file.tensors["f"].read(), array)
    placed = file.structure["quantised"]["q"]
    assert (placed.type, placed.shape, placed.nbytes) == ("Q8_0", (4, 64), packed.nbytes)
    assert path.read_bytes()[placed.offset : placed.offset + placed.nbytes] == packed.tobytes()
    assert [finding.code for finding in file.findings] == ["gguf-quantised"] and file.findings[0].evidence == ("1 x Q8_0",)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.text("abc.019_", min_size=1, max_size=12),
        hnp.arrays(st.sampled_from([np.float32, np.float16, np.int8, np.int32]), hnp.array_shapes(max_dims=4, max_side=5)),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from(ORDERS),
    st.sampled_from([None, 32, 64, 4096]),
)
def test_round_trip(tmp_path: Path, arrays: dict[str, Any], order: Any, alignment: int | None) -> None:
    file = open_file(write(tmp_path / "a.gguf", arrays, order, alignment=alignment))
    assert list(file.tensors) == list(arrays)
    for name, array in arrays.items():
        assert file.tensors[name].shape == array.shape and file.tensors[name].read().tobytes() == array.tobytes()
        assert alignment is None or file.tensors[name].offset % alignment == 0


def written(tensors: dict[str, Any], metadata: dict[str, str]) -> bytes:
    stream = io.BytesIO()
    ours.write(stream, {name: Tensor.of(array) for name, array in tensors.items()}, metadata)
    return stream.getvalue()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.text("abc.019_ä", min_size=1, max_size=12),
        hnp.arrays(st.sampled_from([np.float32, np.float16, np.float64, np.int8, np.int32]), hnp.array_shapes(max_dims=4, max_side=5)),
        min_size=1,
        max_size=5,
    )
)
def test_the_library_reads_what_we_write(tmp_path: Path, arrays: dict[str, Any]) -> None:
    (tmp_path / "a.gguf").write_bytes(written(arrays, {"general.architecture": "llama"}))
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    assert [tensor.name for tensor in reader.tensors] == list(arrays)
    for tensor in reader.tensors:
        array = arrays[tensor.name]
        assert tensor.shape.tolist() == list(array.shape[::-1]) and tensor.data_offset % 32 == 0
        assert tensor.data.dtype == array.dtype and tensor.data.tobytes() == array.tobytes()


def test_what_the_library_wrote_is_written_again_with_its_types(tmp_path: Path) -> None:
    def keys(writer: Any) -> None:
        writer.add_string("general.name", "8")
        writer.add_tags(["a", "b"])
        writer.add_float32("adapter.lora.alpha", 16.0)
        writer.add_uint32("llama.block_count", 4_000_000_000)
        writer.add_int32("llama.below", -5)
        writer.add_int64("llama.far_below", -(1 << 40))
        writer.add_uint64("llama.above", 1 << 40)
        writer.add_float32("llama.rope.freq_base", 0.5)
        writer.add_bool("tokenizer.ggml.add_bos_token", True)
        writer.add_array("llama.sizes", [1, 2])
        writer.add_array("tokenizer.ggml.tokens", ["a", "ß"])
        writer.add_string("custom", "[1, 2]")
        writer.add_file_type(1)

    path = write(tmp_path / "a.gguf", {"w": np.ones((2, 3), np.float32)}, keys=keys)
    (tmp_path / "b.gguf").write_bytes(written({"w": np.ones((2, 3), np.float32)}, open_file(path).metadata))
    one, other = (gguf.GGUFReader(file).fields for file in (path, tmp_path / "b.gguf"))
    assert {key: field.contents() for key, field in one.items()} == {key: field.contents() for key, field in other.items()}
    changed = {key for key, field in one.items() if field.types != other[key].types}
    assert changed == {"llama.sizes"}, "the library writes whole numbers of an array as int32, we as uint32"


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"w": np.zeros(3, np.complex64)}, {}, "no type for these elements"),
        ({"w": np.zeros(3, np.uint8)}, {}, "no type for these elements"),
        ({"w": np.zeros((), np.float32)}, {}, "number of dimensions"),
        ({"w": np.zeros((1,) * 5, np.float32)}, {}, "number of dimensions"),
        ({"w" * 64: np.zeros(3, np.float32)}, {}, "longer than ggml allows"),
        ({}, {"adapter.lora.alpha": "much"}, "cannot be written as GGUF's type"),
        ({}, {"general.file_type": "-1"}, "cannot be written as GGUF's type"),
        ({}, {"general.tags": '"a"'}, "cannot be written as GGUF's type"),
        ({}, {"tokenizer.ggml.tokens": '{"length": 5000}'}, "cannot be written as GGUF's type"),
    ],
)
def test_what_gguf_has_no_room_for(tensors: dict[str, Any], metadata: dict[str, str], message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        written(tensors, metadata)


def test_version_2_and_unknown_types() -> None:
    file = read(file_of([], [info("a", (2,)), info("new", (8,), 99, 32)], bytes(32 + 20), version=2))
    assert list(file.tensors) == ["a"]
    assert file.structure["quantised"]["new"] == ours.QuantisedTensor("type 99", (8,), file.tensors["a"].offset + 32, 20)


ALIGN = "general.alignment"
BROKEN: dict[str, tuple[bytes, str]] = {
    "only magic": (ours.MAGIC, "too short"),
    "version 1": (file_of([], [], version=1), "version"),
    "version 9": (file_of([], [], version=9), "version"),
    "more tensors than bytes": (file_of([], [], counts=(1000, 0)), "ends inside its header"),
    "more keys than bytes": (file_of([], [], counts=(0, 1000)), "ends inside its header"),
    "a name longer than the file": (file_of([struct.pack("<Q", 1 << 62)], []), "ends inside its header"),
    "a string longer than the file": (file_of([key("a", 8, struct.pack("<Q", 1 << 40))], []), "ends inside its header"),
    "an array longer than the file": (file_of([key("a", 9, struct.pack("<IQ", 4, 1 << 60))], []), "longer than the file"),
    "an array of strings longer than the file": (file_of([key("a", 9, struct.pack("<IQ", 8, 1 << 60))], []), "longer than the file"),
    "long array of strings cut short": (file_of([key("a", 9, struct.pack("<IQ", 8, 2000) + text("x") * 2000)[:-500]], []), "ends inside|longer"),
    "an unknown value type": (file_of([key("a", 13, b"")], []), "value type that does not exist"),
    "an array of an unknown type": (file_of([key("a", 9, struct.pack("<IQ", 13, 1)) + bytes(8)], []), "value type that does not exist"),
    "a truth of 2": (file_of([key("a", 7, b"\2")], []), "neither 0 nor 1"),
    "a key twice": (file_of([key("a", 0, b"\1"), key("a", 0, b"\1")], []), "twice"),
    "a tensor twice": (file_of([], [info("a", (2,)), info("a", (2,), 0, 32)], bytes(64)), "twice"),
    "alignment 0": (file_of([key(ALIGN, 4, struct.pack("<I", 0))], []), "power of two"),
    "alignment 24": (file_of([key(ALIGN, 4, struct.pack("<I", 24))], []), "power of two"),
    "alignment a string": (file_of([key(ALIGN, 8, text("32"))], []), "power of two"),
    "alignment huge": (file_of([key(ALIGN, 4, struct.pack("<I", 1 << 31))], []), "power of two"),
    "data cut short": (file_of([], [info("a", (100,))], bytes(64)), "data ends before"),
    "an offset that lies": (file_of([], [info("a", (2,), 0, 1 << 62)], bytes(64)), "data ends before"),
    "a size that lies": (file_of([], [info("a", (1 << 60, 1 << 60))], bytes(64)), "data ends before|no machine"),
    "nothing of something huge": (file_of([], [info("a", (0, 1 << 40, 1 << 40))], bytes(64)), "no machine"),
    "an overlap": (file_of([], [info("a", (16,)), info("b", (4,), 0, 32)], bytes(64)), "overlap those of 'a'"),
    "broken blocks": (file_of([], [info("a", (33,), 8)], bytes(64)), "blocks of 32"),
    "a scalar of blocks": (file_of([], [info("a", (), 8)], bytes(64)), "blocks of 32"),
    "a quantised size that lies": (file_of([], [info("a", (1 << 60, 4), 8)], bytes(64)), "data ends before"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_say_what_is_wrong(case: str) -> None:
    data, message = BROKEN[case]
    with pytest.raises(MalformedError, match=message) as caught:
        read(data)
    assert caught.value.file == "a.gguf" and caught.value.line().isprintable()


def test_limits() -> None:
    with pytest.raises(LimitError, match="more tensors"):
        read(file_of([], [], counts=(1 << 60, 0)))
    with pytest.raises(LimitError, match="metadata keys"):
        read(file_of([], [], counts=(0, 1 << 60)))
    with pytest.raises(LimitError, match="dimensions"):
        read(file_of([], [text("a") + struct.pack("<I", 1 << 31)], bytes(64)))
    nested = struct.pack("<IQ", 9, 1) * 50
    with pytest.raises(LimitError, match="deeper"):
        read(file_of([key("a", 9, nested)], [], bytes(64)))
    with pytest.raises(LimitError, match="nests more arrays"):
        read(file_of([key("a", 9, struct.pack("<IQ", 9, 2000) + struct.pack("<IQ", 0, 0) * 2000)], []))


def test_names_that_are_not_utf8_are_kept_and_said() -> None:
    file = read(file_of([struct.pack("<Q", 1) + b"\xff" + struct.pack("<I", 0) + b"\1"], []))
    assert file.metadata == {"\\xff": "1"} and [finding.code for finding in file.findings] == ["gguf-not-utf8"]


def test_misaligned_data_is_a_finding() -> None:
    file = read(file_of([], [info("a", (2,), 0, 4)], bytes(32)))
    assert [finding.code for finding in file.findings] == ["gguf-misaligned"]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damage_never_escapes_the_error_tree(data: st.DataObject) -> None:
    keys = [key("a", 8, text("value")), key("b", 9, struct.pack("<IQ", 4, 2) + bytes(8)), key(ALIGN, 4, struct.pack("<I", 32))]
    good = bytearray(file_of(keys, [info("w", (2, 3)), info("q", (32,), 8, 32)], bytes(96)))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(4, len(good) - 1))] = data.draw(st.integers(0, 255))
    try:
        file = read(bytes(good[: data.draw(st.integers(0, len(good)))]))
    except MalformedError:
        return
    for tensor in file.tensors.values():
        assert tensor.read().shape == tensor.shape


def test_a_vocabulary_is_passed_quickly() -> None:
    tokens = b"".join(text(f"token {index}") for index in range(150_000))
    data = file_of([key("tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, 150_000) + tokens)], [info("a", (2,))], bytes(8))
    file = read(data)
    assert json.loads(file.metadata["tokenizer.ggml.tokens"])["length"] == 150_000 and file.tensors["a"].shape == (2,)
