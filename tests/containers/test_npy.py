"""npy and npz against numpy itself: every dtype, order and version both ways, and headers that lie."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from upparam.containers import head_of, nested, npy, open_all, zips
from upparam.containers.base import LONE, TensorFile
from upparam.dtypes import DTYPES
from upparam.errors import LimitError, MalformedError, RefusedError
from upparam.findings import Severity
from upparam.sources import FileSource, MemorySource
from upparam.tensors import Tensor, same_bits

NAMED = ["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1", "c8", "c16"]
UNNAMED = [name for name in DTYPES if name.startswith(("bfloat", "float8"))]


def save(array: np.ndarray, version: tuple[int, int] | None = None) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, version, allow_pickle=True)
    return stream.getvalue()


def read(data: bytes) -> TensorFile:
    return npy.single.read(MemorySource(data, "a.npy"), Path("a.npy"))


def read_npz(data: bytes) -> TensorFile:
    return npy.archive.read(MemorySource(data, "a.npz"), Path("a.npz"))


def sniffed(member: Any, data: bytes) -> bool:
    return bool(member.sniff(head_of(MemorySource(data, "x"), Path("x"))))


def raw_npy(header: str | bytes, data: bytes = b"", version: tuple[int, int] = (1, 0)) -> bytes:
    text = header if isinstance(header, bytes) else header.encode("latin-1")
    return npy.MAGIC + bytes(version) + struct.pack("<H" if version == (1, 0) else "<I", len(text)) + text + data


def fields(descr: str = "'<f4'", order: str = "False", shape: str = "(2,)") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n"


kinds = st.sampled_from([order + kind for kind in NAMED for order in ("<", ">")])


@settings(max_examples=200, deadline=None)
@given(
    kinds,
    hnp.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4),
    st.booleans(),
    st.sampled_from([(1, 0), (2, 0), (3, 0)]),
    st.integers(0, 99),
)
def test_what_numpy_writes_we_read(kind: str, shape: tuple[int, ...], fortran: bool, version: tuple[int, int], seed: int) -> None:
    dtype = np.dtype(kind)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    data = np.random.default_rng(seed).integers(0, 2 if dtype.kind == "b" else 256, size, np.uint8)
    array = np.asarray(data.view(dtype).reshape(shape), order="F" if fortran else "C")
    file = read(save(array, version))
    tensor = file.tensors[LONE]
    assert tensor.shape == shape and tensor.dtype.name == dtype.newbyteorder("=").name and not file.findings
    native = array if dtype.isnative else array.byteswap()
    assert tensor.read().tobytes() == native.tobytes()


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(list(DTYPES)), hnp.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4), st.integers(0, 99))
def test_what_we_write_numpy_reads(name: str, shape: tuple[int, ...], seed: int) -> None:
    dtype = DTYPES[name]
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    array = np.random.default_rng(seed).integers(0, 2 if name == "bool" else 256, size, np.uint8).view(dtype.numpy).reshape(shape)
    stream = io.BytesIO()
    npy.write_npy(stream, Tensor.of(array))
    data = stream.getvalue()
    assert (len(data) - array.nbytes) % 64 == 0, "the data is aligned as numpy aligns it"
    theirs = np.load(io.BytesIO(data), allow_pickle=False)
    assert theirs.shape == shape and theirs.tobytes() == array.tobytes()
    assert theirs.dtype == (dtype.numpy if name not in UNNAMED else np.dtype(f"V{dtype.itemsize}"))
    if name not in UNNAMED:
        assert data == save(array), "byte for byte what numpy writes"
    ours = read(data)
    assert same_bits(ours.tensors[LONE], Tensor.of(array)) and not ours.findings, "no dtype is guessed"


def test_what_ml_dtypes_writes() -> None:
    array = np.array([1.5, -2, 3e-3], ml_dtypes.bfloat16)
    file = read(save(array))
    assert same_bits(file.tensors[LONE], Tensor.of(array))
    (finding,) = file.findings
    assert finding.code == "inferred-dtype" and finding.severity is Severity.WARNING and "bfloat16" in finding.message
    assert finding.confidence is not None and finding.confidence < 1
    eights = read(save(np.zeros(2, ml_dtypes.float8_e5m2)))
    assert eights.tensors[LONE].dtype.name == "float8_e5m2" and eights.findings[0].code == "inferred-dtype"
    with pytest.raises(MalformedError, match="8-bit floats"):
        read(save(np.zeros(2, ml_dtypes.float8_e4m3fn)))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([{"a": 1}, None]), "object array"),
        (np.array(["text"]), "text"),
        (np.array([b"bytes"]), "bytes strings"),
        (np.zeros(2, [("a", "f4"), ("b", "i4", (2,))]), "records"),
        (np.zeros(2, "M8[s]"), "dates"),
        (np.zeros(2, "m8[ns]"), "time spans"),
        (np.zeros(2, "V7"), "nameless bytes"),
        (np.zeros(2, np.longdouble), "no tensor data"),
        (np.zeros(2, np.clongdouble), "no tensor data"),
    ],
)
def test_arrays_that_are_no_numbers_are_refused(array: np.ndarray, message: str) -> None:
    with pytest.raises(MalformedError, match=message) as caught:
        read(save(array))
    assert caught.value.file == "a.npy"


BROKEN: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "too short"),
    "only magic": (npy.MAGIC + b"\1\0", "too short"),
    "another version": (raw_npy(fields(), bytes(8), (4, 0)), "version that does not exist"),
    "version 1.1": (npy.MAGIC + b"\1\1" + save(np.zeros(2))[8:], "version that does not exist"),
    "header past the end": (raw_npy(fields(), bytes(8))[:30], "ends inside its header"),
    "data cut short": (raw_npy(fields(), bytes(7)), "data ends before"),
    "a size that lies": (raw_npy(fields(shape="(99999999999,)"), bytes(8)), "data ends before"),
    "a size past 64 bits": (raw_npy(fields(shape="(99999999999999999999,)"), bytes(8)), "no machine"),
    "nothing of something huge": (raw_npy(fields(shape="(0, 9999999999, 9999999999)")), "no machine"),
    "a number of 21 digits": (raw_npy(fields(shape="(999999999999999999999,)"), bytes(8)), "not the dict"),
    "a negative size": (raw_npy(fields(shape="(-2,)"), bytes(8)), "not the dict"),
    "a float size": (raw_npy(fields(shape="(2.0,)"), bytes(8)), "not the dict"),
    "a truth for a size": (raw_npy(fields(shape="(True,)"), bytes(8)), "not the dict"),
    "a list of sizes": (raw_npy(fields(shape="[2]"), bytes(8)), "not the dict"),
    "a number for a shape": (raw_npy(fields(shape="(2)"), bytes(8)), "not the dict"),
    "a call": (raw_npy(fields(shape="__import__('os').system('false')"), bytes(8)), "not the dict"),
    "a sum": (raw_npy(fields(shape="(1 + 1,)"), bytes(8)), "not the dict"),
    "deep brackets": (raw_npy("(" * 60_000, bytes(8)), "not the dict"),
    "deep list": (raw_npy(fields(descr="[" * 10_000), bytes(8)), "not the dict"),
    "deep signs": (raw_npy("-" * 60_000 + "1", bytes(8)), "not the dict"),
    "a key twice": (raw_npy("{'descr': '<f4', 'descr': '<f8', 'fortran_order': False, 'shape': (1,)}", bytes(8)), "not the dict"),
    "a key missing": (raw_npy("{'descr': '<f4', 'shape': (2,)}", bytes(8)), "not the dict"),
    "a key too many": (raw_npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2,), 'x': 'y'}", bytes(8)), "not the dict"),
    "order a string": (raw_npy(fields(order="'no'"), bytes(8)), "not the dict"),
    "text behind the dict": (raw_npy(fields() + "boo", bytes(8)), "not the dict"),
    "two dicts": (raw_npy(fields() + fields(), bytes(8)), "not the dict"),
    "not closed": (raw_npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2,", bytes(8)), "not the dict"),
    "empty header": (raw_npy("", bytes(8)), "not the dict"),
    "an escape in a string": (raw_npy(fields(descr=r"'\x3cf4'"), bytes(8)), "not the dict"),
    "bad UTF-8": (raw_npy(b"{'descr': '\xff'", b"", (3, 0)), "not UTF-8"),
    "no byte order": (raw_npy(fields(descr="'|f4'"), bytes(8)), "without its byte order"),
    "an unknown kind": (raw_npy(fields(descr="'<q4'"), bytes(8)), "no tensor data"),
    "an odd width": (raw_npy(fields(descr="'<f3'"), bytes(8)), "no tensor data"),
    "an empty kind": (raw_npy(fields(descr="''"), bytes(8)), "no tensor data"),
    "a note that does not fit": (raw_npy(fields(descr="'<f4'")[:-1] + "# dtype: bfloat16\n", bytes(8)), "note"),
    "a note of another width": (raw_npy(fields(descr="'<V1'")[:-1] + "# dtype: bfloat16\n", bytes(8)), "note"),
    "a note that names nothing": (raw_npy(fields(descr="'<V2'")[:-1] + "# dtype: posit16\n", bytes(8)), "note"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_arrays_say_what_is_wrong(case: str) -> None:
    data, message = BROKEN[case]
    with pytest.raises(MalformedError, match=message) as caught:
        read(data)
    assert caught.value.line().isprintable() and len(caught.value.line()) < 400


def test_limits() -> None:
    with pytest.raises(LimitError, match="header is longer"):
        read(raw_npy(fields() + " " * 70_000, bytes(8), (2, 0)))
    with pytest.raises(LimitError, match="dimensions"):
        read(raw_npy(fields(shape="(" + "1, " * 40 + ")"), bytes(4)))


def test_python_2_numbers_and_quotes() -> None:
    tensor = read(raw_npy('{"shape": (2L, 1L), "fortran_order": True, "descr": "<f4"}\n', bytes(8))).tensors[LONE]
    assert tensor.shape == (2, 1)


def test_native_order_is_assumed_and_said() -> None:
    file = read(raw_npy(fields(descr="'=f4'"), bytes(8)))
    assert file.tensors[LONE].dtype.name == "float32" and [finding.code for finding in file.findings] == ["assumed-byte-order"]


def test_bytes_behind_the_array_are_a_finding() -> None:
    file = read(save(np.zeros(3)) + b"xyz")
    assert list(file.tensors) == [LONE] and [finding.code for finding in file.findings] == ["trailing-bytes"]


def test_arrays_saved_one_after_another_are_all_read() -> None:
    made = [np.arange(3, dtype=np.float32), np.zeros((0, 2)), np.arange(4).reshape(2, 2)]
    file = read(b"".join(map(save, made)))
    assert [tensor.read().tolist() for tensor in file.tensors.values()] == [array.tolist() for array in made]
    assert list(file.tensors) == ["0", "1", "2"]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damage_never_escapes_the_error_tree(data: st.DataObject) -> None:
    good = bytearray(save(np.arange(6, dtype=">f4").reshape(2, 3)))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    try:
        file = read(bytes(good))
    except MalformedError:
        return
    for tensor in file.tensors.values():
        assert tensor.read().shape == tensor.shape


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z"), exclude_characters="/\\:"), max_size=8), kinds, max_size=5),
    st.booleans(),
    st.integers(0, 99),
)  # fmt: skip
def test_npz_both_ways(made: dict[str, str], packed: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    found = {name.replace("..", "_"): rng.integers(0, 2, (rng.integers(0, 5), 3)).astype(kind) for name, kind in made.items()}
    stream = io.BytesIO()
    if packed or not all(name.isidentifier() and name != "file" for name in found):
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as out:
            for name, array in found.items():
                out.writestr(name + ".npy", save(array))
    else:
        np.savez(stream, **found)
    file = read_npz(stream.getvalue())
    assert list(file.tensors) == list(found)
    assert all(np.array_equal(tensor.read(), found[name]) for name, tensor in file.tensors.items())
    again = io.BytesIO()
    npy.write_npz(again, file.tensors)
    with np.load(io.BytesIO(again.getvalue()), allow_pickle=False) as theirs:
        assert list(theirs) == list(found) and all(np.array_equal(theirs[name], array) for name, array in found.items())
    assert sniffed(npy.archive, again.getvalue()) == bool(found)


def test_npz_keeps_the_dtypes_numpy_cannot_name() -> None:
    tensors = {name: Tensor(DTYPES[name], (3, 2), MemorySource(bytes(range(6 * DTYPES[name].itemsize)))) for name in UNNAMED}
    stream = io.BytesIO()
    npy.write_npz(stream, tensors)
    file = read_npz(stream.getvalue())
    assert not file.findings and all(same_bits(file.tensors[name], tensors[name]) for name in UNNAMED)
    with np.load(io.BytesIO(stream.getvalue()), allow_pickle=False) as theirs:
        assert theirs["bfloat16"].view(ml_dtypes.bfloat16).tobytes() == tensors["bfloat16"].raw()


def test_npz_is_the_same_each_time_and_plain() -> None:
    tensors = {"b": Tensor.of(np.arange(3.0)), "a/b": Tensor.of(np.arange(2, dtype=np.int8))}
    one, two = io.BytesIO(), io.BytesIO()
    npy.write_npz(one, tensors)
    npy.write_npz(two, tensors)
    assert one.getvalue() == two.getvalue()
    archive = zips.read_archive(MemorySource(one.getvalue()), Path("x"))
    assert not archive.findings and all(member.method == zips.STORED and member.check_crc() for member in archive.members)


@pytest.mark.parametrize("name", ["../x", "/x", "a\0b", "C:x", "a/../b", "\\x", "a\nb", "\ud800"])
def test_npz_refuses_names_that_loaders_would_misread(name: str) -> None:
    with pytest.raises(RefusedError):
        npy.write_npz(io.BytesIO(), {name: Tensor.of(np.zeros(1))})


def test_npz_with_a_duplicate_is_refused() -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as out:
        out.writestr("a.npy", save(np.zeros(1)))
        with pytest.warns(UserWarning, match="Duplicate"):
            out.writestr("a.npy", save(np.ones(1)))
    with pytest.raises(MalformedError, match="same name"):
        read_npz(stream.getvalue())


def test_npz_with_an_object_array_names_it() -> None:
    stream = io.BytesIO()
    np.savez(stream, good=np.zeros(2), evil=np.array([None]))
    with pytest.raises(MalformedError, match="object array") as caught:
        read_npz(stream.getvalue())
    assert caught.value.tensor == "evil" and caught.value.file == "a.npz"


def test_npz_that_is_cut_short_says_so() -> None:
    stream = io.BytesIO()
    np.savez(stream, a=np.zeros(200), b=np.zeros(200))
    data = stream.getvalue()[:-40]
    assert sniffed(npy.archive, data)
    with pytest.raises(MalformedError, match="zip"):
        read_npz(data)


def test_sniffing_tells_npz_from_other_zips() -> None:
    def zipped(*names: str) -> bytes:
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as out:
            for name in names:
                out.writestr(name, save(np.zeros(1)))
        return stream.getvalue()

    assert sniffed(npy.archive, zipped("a.npy", "b/c.npy"))
    assert not sniffed(npy.archive, zipped("archive/data.pkl", "archive/data/0", "a.npy"))
    assert not sniffed(npy.archive, zipped("a.npy", "config.json"))
    assert not sniffed(npy.archive, zipped())
    assert sniffed(npy.single, save(np.zeros(1))) and not sniffed(npy.single, b"NUMPY") and not sniffed(npy.archive, save(np.zeros(1)))


def test_reading_headers_of_a_packed_npz_inflates_no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.BytesIO()
    np.savez_compressed(stream, **{f"m{index}": np.arange(500_000.0) for index in range(4)})
    taken = []
    take = nested.InflatedSource._take
    monkeypatch.setattr(nested.InflatedSource, "_take", lambda self, size: taken.append(size) or take(self, size))
    file = read_npz(stream.getvalue())
    assert [tensor.shape for tensor in file.tensors.values()] == [(500_000,)] * 4
    assert sum(taken) == 4 * 128
    assert np.array_equal(file.tensors["m3"].rows(3, 5).read(), [3, 4]) and np.array_equal(file.tensors["m3"].read(), np.arange(500_000.0))


def test_the_mlx_adapter_of_the_corpus(corpus: Path) -> None:
    path = corpus / "mlx-npz" / "adapters.npz"
    (file,) = open_all(path)
    assert file.container == "npz" and not file.findings
    with np.load(path) as theirs:
        assert set(theirs) == set(file.tensors)
        assert all(np.array_equal(theirs[name], tensor.read()) for name, tensor in file.tensors.items())
    stream = io.BytesIO()
    npy.write_npz(stream, file.tensors)
    back = read_npz(stream.getvalue())
    assert all(same_bits(back.tensors[name], tensor) for name, tensor in file.tensors.items())
    assert isinstance(file.tensors["model.layers.31.self_attn.v_proj.lora_b"].source, nested.SpanSource | FileSource)
