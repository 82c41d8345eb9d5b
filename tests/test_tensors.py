"""Lazy tensors against numpy: every view, every dtype, both byte orders, and the limits of what a source can back."""

from __future__ import annotations

import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upparam.dtypes import BY_CODE, DTYPES, dtype_of
from upparam.errors import MalformedError, UnreadableError
from upparam.sources import ComputedSource, FileSource, MemorySource
from upparam.tensors import Tensor, contiguous_strides, same_bits


def random_bits(dtype: np.dtype, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """An array of arbitrary bit patterns: NaN payloads, infinities and signed zeros included (bool: 0 and 1)."""
    count = int(np.prod(shape, dtype=np.int64))
    data = np.random.default_rng(seed).integers(0, 2 if dtype.kind == "b" else 256, count * dtype.itemsize, np.uint8)
    return data.view(dtype).reshape(shape)


def bits(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array).tobytes()


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_reads_its_bits(name: str) -> None:
    dtype = DTYPES[name]
    assert dtype.numpy.itemsize == dtype.itemsize and BY_CODE[dtype.code] is dtype and dtype_of(dtype.numpy) is dtype
    array = random_bits(dtype.numpy, (3, 5))
    tensor = Tensor.of(array)
    assert tensor.shape == (3, 5) and tensor.nbytes == array.nbytes
    read = tensor.read()
    assert read.dtype == array.dtype and bits(read) == bits(array) == tensor.raw()
    assert read.flags.writeable and read.flags.c_contiguous and not np.shares_memory(read, array)


@pytest.mark.parametrize("name", DTYPES)
def test_big_endian_keeps_nan_payloads(name: str) -> None:
    array = random_bits(DTYPES[name].numpy, (4, 3), seed=1)
    part = array.itemsize // (2 if array.dtype.kind == "c" else 1)
    swapped = array.reshape(-1).view(f"u{part}").byteswap().tobytes()
    tensor = Tensor(DTYPES[name], (4, 3), MemorySource(swapped), big_endian=True)
    assert bits(tensor.read()) == bits(array) == tensor.raw()
    assert bits(tensor.T.read()) == bits(array.T)
    assert bits(tensor.rows(1, 3).reshape((6,)).read()) == bits(array[1:3].reshape(6))
    assert bits(tensor.T.reshape((2, 6)).read()) == bits(array.T.reshape(2, 6))
    assert tensor.read().dtype.isnative


def test_big_endian_arrays_in_memory() -> None:
    array = np.arange(6, dtype=">f4").reshape(2, 3)
    assert np.array_equal(Tensor.of(array).read(), array)


views = st.sampled_from(("T", "rows", "columns", "flat", "ones", "halve"))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=0, max_size=4), st.lists(st.tuples(views, st.integers(0, 5), st.integers(0, 5)), max_size=5))
def test_chains_of_views_equal_numpy(shape: list[int], chain: list[tuple[str, int, int]]) -> None:
    array = np.arange(int(np.prod(shape, dtype=np.int64)), dtype=np.int32).reshape(shape)
    tensor = Tensor.of(array)
    for kind, one, other in chain:
        if kind == "T":
            array, tensor = array.T, tensor.T
        elif kind == "rows" and array.ndim:
            start, stop = sorted((min(one, array.shape[0]), min(other, array.shape[0])))
            array, tensor = array[start:stop], tensor.rows(start, stop)
        elif kind == "columns" and array.ndim == 2:
            start, stop = sorted((min(one, array.shape[1]), min(other, array.shape[1])))
            array, tensor = array[:, start:stop], tensor.columns(start, stop)
        elif kind == "flat":
            array, tensor = array.reshape(-1), tensor.reshape((array.size,))
        elif kind == "ones":
            array, tensor = array.reshape(1, *array.shape, 1), tensor.reshape((1, *array.shape, 1))
        elif kind == "halve" and array.size % 2 == 0:
            array, tensor = array.reshape(2, -1), tensor.reshape((2, array.size // 2))
    tensor.check()
    read = tensor.read()
    assert read.shape == array.shape and np.array_equal(read, array) and read.flags.c_contiguous
    assert tensor.raw() == bits(array) and tensor.numel == array.size


def test_views_of_contiguous_rows_copy_nothing() -> None:
    tensor = Tensor.of(np.arange(12, dtype=np.float32).reshape(4, 3))
    assert tensor.rows(1, 3).source is tensor.source and tensor.rows(1, 3).is_contiguous
    assert tensor.T.source is tensor.source and not tensor.T.is_contiguous and tensor.T.T.is_contiguous
    assert tensor.reshape((2, 6)).source is tensor.source
    assert tensor.T.reshape((3, 1, 4)).source is tensor.source, "axes of size 1 come for free"


def test_strides_of_storages() -> None:
    storage = np.arange(20, dtype=np.float32)
    tensor = Tensor(DTYPES["float32"], (3, 2), MemorySource(storage.tobytes()), offset=8, strides=(5, 2))
    tensor.check()
    expected = np.lib.stride_tricks.as_strided(storage[2:], (3, 2), (20, 8))
    assert np.array_equal(tensor.read(), expected)
    assert tensor.span == ((2 * 5 + 1 * 2) + 1) * 4
    expanded = Tensor(DTYPES["float32"], (4, 3), MemorySource(storage.tobytes()), strides=(0, 1))
    assert np.array_equal(expanded.read(), np.tile(storage[:3], (4, 1))) and expanded.span == 12


@pytest.mark.parametrize(
    ("shape", "strides", "offset"),
    [
        ((4,), None, 0),
        ((3,), None, 4),
        ((2, 2), (2, 2), 0),
        ((-1,), None, 0),
        ((2,), (-1,), 4),
        ((2,), None, -4),
        ((2,), (1, 1), 0),
        ((0, 1 << 70), None, 0),
        ((1 << 61, 0, 8), None, 0),
        ((1 << 62,), (0,), 0),
        ((0,), None, 13),
    ],
)  # fmt: skip
def test_what_the_source_cannot_back_is_refused(shape: tuple[int, ...], strides: tuple[int, ...] | None, offset: int) -> None:
    tensor = Tensor(DTYPES["float32"], shape, MemorySource(bytes(12), "f.bin"), offset, strides)
    with pytest.raises(MalformedError, match=r"f\.bin"):
        tensor.check("t")
    with pytest.raises(MalformedError):
        tensor.read()


def test_views_outside_are_refused() -> None:
    tensor = Tensor.of(np.zeros((4, 3), np.float32))
    for start, stop in ((0, 5), (-1, 2), (3, 2)):
        with pytest.raises(MalformedError, match="rows outside"):
            tensor.rows(start, stop)
    with pytest.raises(MalformedError):
        Tensor.of(np.float32(1)).rows(0, 1)
    for shape in ((5, 3), (-4, -3), (), (12, 0)):
        with pytest.raises(MalformedError, match="reshape"):
            tensor.reshape(shape)


def test_scalars_and_empties() -> None:
    for array in (np.float32(2.5), np.zeros((0,), np.float16), np.zeros((3, 0, 2), np.int64), np.array(True)):
        array = np.asarray(array)
        read = Tensor.of(array).read()
        assert read.shape == array.shape and read.dtype == array.dtype and np.array_equal(read, array)
    assert Tensor.of(np.asarray(np.float32(2.5))).T.read() == np.float32(2.5)


def test_non_contiguous_arrays_are_copied_in() -> None:
    array = np.arange(24, dtype=ml_dtypes.bfloat16).reshape(4, 6)[::2, ::3]
    assert np.array_equal(Tensor.of(array).read(), array)


@pytest.mark.parametrize("array", [np.array(["a"]), np.array([None]), np.zeros(2, "M8[s]"), np.zeros(2, "V2"), np.zeros(2, np.longdouble)])
def test_arrays_that_are_no_tensors(array: np.ndarray) -> None:
    with pytest.raises(MalformedError, match="not tensor data"):
        Tensor.of(array)


def test_stack_joins_lazily() -> None:
    whole = np.arange(30, dtype=np.float32).reshape(10, 3)
    parts = [Tensor.of(whole[:2]), Tensor.of(np.ascontiguousarray(whole[2:7].T)).T, Tensor.of(whole[7:7]), Tensor.of(whole[7:])]
    stacked = Tensor.stack(parts)
    assert np.array_equal(stacked.read(), whole) and stacked.raw() == whole.tobytes()
    for start in range(10):
        assert np.array_equal(stacked.rows(start, min(start + 3, 10)).read(), whole[start : start + 3])
    assert np.array_equal(stacked.columns(1, 3).read(), whole[:, 1:3])
    with pytest.raises(MalformedError):
        stacked.source.read(100, 30)


def test_stack_reads_only_the_rows_asked_for(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(np.arange(1000, dtype=np.float32).tobytes())

    class Counting(FileSource):
        taken = 0

        def read(self, offset: int, size: int) -> bytes:
            Counting.taken += size
            return super().read(offset, size)

    part = Tensor(DTYPES["float32"], (100, 10), Counting(tmp_path / "w"))
    assert np.array_equal(Tensor.stack([part, part]).rows(105, 107).raw(), np.arange(50, 70, dtype=np.float32).tobytes())
    assert Counting.taken == 80


def test_parts_that_do_not_stack() -> None:
    one = Tensor.of(np.zeros((2, 3), np.float32))
    for other in (np.zeros((2, 4), np.float32), np.zeros((2, 3), np.float16), np.float32(0), np.zeros((2,), np.float32)):
        with pytest.raises(MalformedError):
            Tensor.stack([one, Tensor.of(np.asarray(other))])
    with pytest.raises(MalformedError):
        Tensor.stack([])


def test_computed_tensors() -> None:
    made = []

    def produce() -> np.ndarray:
        made.append(1)
        return np.arange(6, dtype=np.float32).reshape(2, 3)

    tensor = Tensor.computed(DTYPES["float32"], (2, 3), produce)
    assert not made and tensor.nbytes == 24
    assert np.array_equal(tensor.read(), produce()) and np.array_equal(tensor.rows(1, 2).read(), [[3, 4, 5]])
    with pytest.raises(MalformedError, match="came out wrong"):
        Tensor.computed(DTYPES["float16"], (2, 3), produce).read()
    with pytest.raises(MalformedError, match="came out wrong"):
        Tensor.computed(DTYPES["float32"], (3, 2), produce).read()
    with pytest.raises(MalformedError, match="wrong length"):
        ComputedSource(4, lambda: b"12345").read(0, 4)
    with pytest.raises(MalformedError, match="outside"):
        ComputedSource(4, lambda: b"1234").read(2, 4)


def test_same_bits() -> None:
    nans = np.array([0x7FC00000, 0x7FC00001, 0x80000000], np.uint32).view(np.float32)
    other = nans.copy()
    assert same_bits(Tensor.of(nans), Tensor.of(other))
    other.view(np.uint32)[1] ^= 2
    assert not same_bits(Tensor.of(nans), Tensor.of(other)), "NaN payloads count"
    zeros = np.array([0.0], np.float32)
    assert not same_bits(Tensor.of(zeros), Tensor.of(-zeros)), "signed zeros count"
    assert not same_bits(Tensor.of(nans), Tensor.of(nans.reshape(3, 1)))
    assert not same_bits(Tensor.of(nans), Tensor.of(nans.view(np.int32)))
    square = np.arange(9, dtype=np.float32).reshape(3, 3)
    assert same_bits(Tensor.of(square).T, Tensor.of(np.ascontiguousarray(square.T)))


def test_scalar_equals_numpy() -> None:
    for name, dtype in DTYPES.items():
        if name.startswith("complex"):
            continue
        array = np.asarray([1], dtype.numpy)
        for big in (False, True):
            data = array.view(f"u{dtype.itemsize}").byteswap().tobytes() if big else array.tobytes()
            assert Tensor(dtype, (1, 1), MemorySource(data), big_endian=big).scalar() == 1.0, (name, big)
    with pytest.raises(MalformedError, match="one element"):
        Tensor.of(np.zeros(2, np.float32)).scalar()


def test_file_sources(tmp_path: Path) -> None:
    path = tmp_path / "data.bin"
    path.write_bytes(bytes(range(100)))
    source = FileSource(path, 10, 50)
    assert source.size == 50 and source.read(0, 3) == b"\x0a\x0b\x0c" and source.read(50, 0) == b""
    assert source.span(5, 10).read(0, 2) == b"\x0f\x10"
    buffer = bytearray(4)
    source.readinto(46, memoryview(buffer))
    assert bytes(buffer) == bytes(range(56, 60))
    for offset, size in ((49, 2), (-1, 1), (0, -1)):
        with pytest.raises(MalformedError, match="outside"):
            source.read(offset, size)
    with pytest.raises(MalformedError, match="outside"):
        source.readinto(48, memoryview(bytearray(4)))
    source.close()
    assert source.read(0, 1) == b"\x0a", "a closed source opens again"


def test_a_file_that_shrinks_under_us(tmp_path: Path) -> None:
    path = tmp_path / "data.bin"
    path.write_bytes(bytes(100))
    source = FileSource(path)
    os.truncate(path, 40)
    with pytest.raises(MalformedError, match="ends early"):
        source.read(0, 100)
    with pytest.raises(MalformedError, match="ends early"):
        source.readinto(0, memoryview(bytearray(100)))
    with pytest.raises(MalformedError, match="ends early"):
        Tensor(DTYPES["uint8"], (100,), source).read()


def test_paths_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UnreadableError, match="No such file"):
        FileSource(tmp_path / "missing")
    with pytest.raises(UnreadableError, match="directory"):
        FileSource(tmp_path).read(0, 1)


def test_memory_sources() -> None:
    source = MemorySource(np.arange(4, dtype=np.uint16).data.cast("B"))
    assert source.size == 8 and source.read(2, 2) == b"\x01\x00"
    with pytest.raises(MalformedError, match="outside"):
        source.read(7, 2)


def test_contiguous_strides() -> None:
    assert contiguous_strides((2, 3, 4)) == (12, 4, 1) and contiguous_strides(()) == () and contiguous_strides((3, 0, 2)) == (2, 2, 1)


def test_doubles_are_exact_for_every_float16() -> None:
    every = np.arange(65536, dtype=np.uint16).view(np.float16)
    np.testing.assert_array_equal(Tensor.of(every).doubles(), every.astype(np.float64))
    finite = every[np.isfinite(every)].reshape(-1, 31)
    found = Tensor.of(finite).doubles()
    np.testing.assert_array_equal(found.view(np.uint64), finite.astype(np.float64).view(np.uint64))
    assert Tensor.of(np.zeros((0, 3), np.float16)).doubles().shape == (0, 3)
