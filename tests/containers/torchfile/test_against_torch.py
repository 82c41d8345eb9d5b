"""What torch.save writes reads back bit for bit, and what we write torch.load(weights_only=True) loads."""

from __future__ import annotations

import io
import warnings
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from upparam.containers import open_file
from upparam.containers.base import LONE, Opaque
from upparam.containers.torchfile import zipped
from upparam.containers.torchfile.write import write
from upparam.dtypes import DTYPES
from upparam.errors import MalformedError, RefusedError
from upparam.sources import MemorySource
from upparam.tensors import Tensor

DTYPE_NAMES = [name for name in DTYPES if hasattr(torch, name)]
FORMS = ["zip", "legacy"]


def save(value, path: Path, form: str = "zip", **more) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=form == "zip", **more)
    return path


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def sample(dtype: str, shape=(3, 5)) -> torch.Tensor:
    size = DTYPES[dtype].itemsize
    count = int(np.prod(shape)) * size
    data = np.random.default_rng(7).integers(0, 2 if dtype == "bool" else 256, count, dtype=np.uint8)
    return torch.from_numpy(data).view(getattr(torch, dtype)).reshape(shape)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_every_dtype(tmp_path, dtype, form):
    tensor = sample(dtype)
    try:
        path = save({"w": tensor, "e": tensor[:0]}, tmp_path / "a.bin", form)
    except Exception as problem:
        pytest.skip(f"torch itself cannot save {dtype} so: {problem}")
    found = open_file(path)
    assert found.container == f"torch-{form}"
    assert found.tensors["w"].dtype.name == dtype and found.tensors["w"].shape == (3, 5)
    assert found.tensors["w"].raw() == bits(tensor)
    assert found.tensors["e"].shape == (0, 5) and found.tensors["e"].raw() == b""
    assert found.findings == []


VIEWS = {
    "transposed": lambda t: t.T,
    "row slice": lambda t: t[2:5],
    "column slice": lambda t: t[:, 3:7],
    "stepped": lambda t: t[::2, 1::3],
    "expanded": lambda t: t[:1].expand(6, -1),
    "one element": lambda t: t[3, 4],
    "permuted": lambda t: t.reshape(2, 4, 10).permute(2, 0, 1),
    "diagonal": lambda t: t.diagonal(),
    "overlapping": lambda t: t.reshape(-1).unfold(0, 5, 2),
    "empty": lambda t: t[4:4],
    "0-d": lambda t: torch.tensor(2.5),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", VIEWS)
def test_views(tmp_path, name, form):
    base = torch.arange(80, dtype=torch.float32).reshape(8, 10)
    view = VIEWS[name](base)
    found = open_file(save({"base": base, "view": view, "again": view}, tmp_path / "a.pt", form))
    for key in ("view", "again"):
        assert found.tensors[key].shape == tuple(view.shape)
        assert found.tensors[key].raw() == bits(view)
        np.testing.assert_array_equal(found.tensors[key].read(), view.numpy())
    assert found.tensors["base"].raw() == bits(base)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_nested_objects_and_protocols(tmp_path, form, protocol):
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    value = {
        "state": OrderedDict(model.state_dict()), "parameter": model.weight, "opt": optimizer.state_dict(), "buffer": torch.nn.Buffer(torch.ones(2)),
        "numbers": [1, -1, 2**40, -(2**70), 1.5, float("inf"), True, None, 3 + 4j], "text": ["häß", "", "名前", "\U0001f600"], "raw": b"\x00\xff",
        "set": {1, 2}, "frozen": frozenset({"a"}), "tuple": (1, (2, 3)), "size": torch.Size([2, 3]), "dtype": torch.float16,
        "device": torch.device("cuda", 1), "array": np.arange(6, dtype=np.float32).reshape(2, 3).T, "scalar": np.float64(0.1), "big": np.array([1, 2], ">i4"),
    }  # fmt: skip
    found = open_file(save(value, tmp_path / "a.pth", form, pickle_protocol=protocol))
    assert not [finding for finding in found.findings if finding.severity.name == "ERROR"]
    structure = found.structure
    assert structure["numbers"] == value["numbers"] and structure["text"] == value["text"] and structure["tuple"] == (1, (2, 3))
    assert structure["raw"] == b"\x00\xff" and structure["set"] == {1, 2} and structure["frozen"] == frozenset({"a"})
    assert (
        structure["size"] == (2, 3)
        and structure["dtype"] is DTYPES["float16"]
        and structure["device"] == "cuda:1"
        and structure["scalar"] == 0.1
    )
    np.testing.assert_array_equal(found.tensors["array"].read(), value["array"])
    np.testing.assert_array_equal(found.tensors["big"].read(), value["big"])
    assert found.tensors["state/weight"].raw() == bits(model.weight) == found.tensors["parameter"].raw()
    assert found.tensors["opt/state/0/exp_avg"].raw() == bits(optimizer.state_dict()["state"][0]["exp_avg"])
    assert structure["opt"]["param_groups"][0]["lr"] == 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_lone_tensor_list_and_byte_ranges(tmp_path, form):
    assert open_file(save(torch.arange(4), tmp_path / "a.pt", form)).tensors[LONE].read().tolist() == [0, 1, 2, 3]
    found = open_file(save([torch.zeros(2), torch.ones(3)], tmp_path / "b.pt", form))
    assert list(found.tensors) == ["0", "1"]
    tensor = found.tensors["1"]
    assert (tmp_path / "b.pt").read_bytes()[tensor.offset : tensor.offset + 12] == tensor.raw()


def test_parameter_with_attributes(tmp_path):
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.note = "kept elsewhere"
    tensor = torch.arange(3.0)
    tensor.note = {"a": 1}
    found = open_file(save({"p": parameter, "t": tensor}, tmp_path / "a.pt"))
    assert found.tensors["p"].read().tolist() == [1, 1, 1] and found.tensors["t"].read().tolist() == [0, 1, 2]


def test_forms_not_read_are_said(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = {
            "ok": torch.ones(2), "sparse": torch.eye(3).to_sparse(), "csr": torch.eye(3).to_sparse_csr(), "conj": torch.ones(2, dtype=torch.complex64).conj(),
            "quantised": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "meta": torch.empty(2, device="meta"),
        }  # fmt: skip
        found = open_file(save(value, tmp_path / "a.pt"))
    assert "ok" in found.tensors and not {"sparse", "csr", "quantised", "meta", "conj"} & set(found.tensors)
    assert [finding.code for finding in found.findings] == ["unread-tensors"]
    assert isinstance(found.structure["quantised"], Opaque)


def test_a_pickled_module_is_code_and_its_tensors_are_named(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(2, 3))
    found = open_file(save(module, tmp_path / "model.pt"))
    assert {finding.code for finding in found.findings} == {"pickle-code"}
    assert any("torch.nn.modules.container.Sequential" in finding.message for finding in found.findings)
    assert bits(module[0].weight) in {tensor.raw() for tensor in found.tensors.values()}


def test_big_endian_storages(tmp_path):
    value = {"w": torch.arange(5, dtype=torch.int32), "h": torch.tensor([1.0, -2.0], dtype=torch.bfloat16)}
    path = save(value, tmp_path / "a.pt")
    import zipfile

    turned = tmp_path / "big.pt"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(turned, "w") as new:
        for item in old.infolist():
            data = old.read(item)
            if item.filename.endswith("byteorder"):
                data = b"big"
            elif "/data/" in item.filename:
                width = {20: 4, 4: 2}[len(data)]
                data = np.frombuffer(data, f"u{width}").byteswap().tobytes()
            new.writestr(item.filename, data)
    found, theirs = open_file(turned), torch.load(turned, weights_only=True)
    for key, tensor in theirs.items():
        assert found.tensors[key].raw() == bits(tensor) == bits(value[key])


def test_deflated_members_read(tmp_path):
    import zipfile

    path = save({"w": torch.arange(5000.0)}, tmp_path / "a.pt")
    packed = tmp_path / "packed.pt"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for item in old.infolist():
            new.writestr(item.filename, old.read(item))
    assert open_file(packed).tensors["w"].read().tolist() == list(range(5000))


@pytest.mark.parametrize("form", FORMS)
def test_truncation_is_an_error_that_says_so(tmp_path, form):
    path = save({"a": torch.ones(300), "b": torch.ones(300)}, tmp_path / "a.pt", form)
    whole = path.read_bytes()
    for cut in (len(whole) - 10, len(whole) - 800, len(whole) // 2, 100, 60):
        path.write_bytes(whole[:cut])
        with pytest.raises(MalformedError, match=r"truncated|ends|end record|directory"):
            open_file(path)


def load_ours(structure) -> dict:
    stream = io.BytesIO()
    write(stream, structure)
    return torch.load(io.BytesIO(stream.getvalue()), weights_only=True)


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_torch_loads_what_we_write(dtype):
    theirs = sample(dtype, (2, 3))
    ours = Tensor(DTYPES[dtype], (2, 3), MemorySource(bits(theirs)))
    loaded = load_ours({"w": ours, "t": ours.T, "none": ours.rows(0, 0), "s": [ours, 1, 2.5, None, True, "ü", b"\xff", (2**40, -5)]})
    assert loaded["w"].dtype == getattr(torch, dtype) and loaded["w"].shape == (2, 3) and bits(loaded["w"]) == bits(theirs)
    assert bits(loaded["t"]) == bits(theirs.T) and loaded["none"].shape == (0, 3)
    assert loaded["s"][1:] == [1, 2.5, None, True, "ü", b"\xff", (2**40, -5)]
    assert loaded["w"].untyped_storage().data_ptr() == loaded["s"][0].untyped_storage().data_ptr()


def test_memory_mapped_load_and_alignment(tmp_path):
    path = tmp_path / "ours.pt"
    with path.open("wb") as stream:
        write(stream, {f"t{index}": Tensor.of(np.arange(index, dtype=np.float32)) for index in range(1, 20)})
    loaded = torch.load(path, weights_only=True, mmap=True)
    assert all(loaded[f"t{index}"].tolist() == list(range(index)) for index in range(1, 20))
    found = open_file(path)
    assert all(tensor.offset % 64 == 0 for tensor in found.tensors.values()) and found.findings == []
    import zipfile

    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


def test_what_cannot_be_written_is_refused():
    with pytest.raises(RefusedError, match="a/b"):
        write(io.BytesIO(), {"a": {"b": object()}})


scalars = (
    st.none() | st.booleans() | st.integers(-(2**200), 2**200) | st.floats(allow_nan=False) | st.text(max_size=20) | st.binary(max_size=20)
)
arrays = st.builds(
    lambda dtype, shape, seed: Tensor.of(np.random.default_rng(seed).integers(0, 100, shape).astype(dtype)),
    st.sampled_from(["float32", "int8", "float16", "uint64", "complex64", "bool"]),
    st.lists(st.integers(0, 4), max_size=4).map(tuple),
    st.integers(0, 2**32),
)
structures = st.recursive(
    scalars | arrays,
    lambda inner: st.lists(inner, max_size=4) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(st.text(max_size=8) | st.integers(-9, 9), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


def alike(one, other) -> bool:
    if isinstance(one, Tensor):
        raw, shape = (other.raw(), other.shape) if isinstance(other, Tensor) else (bits(other), tuple(other.shape))
        return one.raw() == raw and one.shape == shape
    if isinstance(one, dict):
        return list(one) == list(other) and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(alike, one, other))
    return type(one) is type(other) and one == other


@given(structures)
@settings(max_examples=150, deadline=None)
def test_round_trip(structure):
    stream = io.BytesIO()
    write(stream, structure)
    found = zipped.read(MemorySource(stream.getvalue()), Path("x.pt"))
    assert alike(structure, found.structure) and found.findings == []
    assert alike(structure, torch.load(io.BytesIO(stream.getvalue()), weights_only=True))
