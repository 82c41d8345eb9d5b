"""Combined factors made row by row: any span of them, in whatever pieces it is asked for, has the bytes of the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upparam.dtypes import DTYPES
from upparam.operations.combine import beside as module
from upparam.operations.combine.beside import beside, widened
from upparam.sources import FileSource
from upparam.tensors import Tensor, same_bits

DTYPE = st.sampled_from([np.float16, np.float32, ml_dtypes.bfloat16, np.float64])


def drawn(seed: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
    """Any bits but those of infinities and NaNs, subnormals among them."""
    values = np.random.default_rng(seed).standard_normal(shape) * np.exp2(np.random.default_rng(seed + 1).integers(-26, 15, shape))
    return values.astype(dtype)


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 9), st.lists(st.tuples(st.integers(1, 5), DTYPE, st.booleans(), st.floats(-3, 3)), min_size=1, max_size=4),
    st.integers(0, 500), st.integers(0, 500), st.integers(0, 99),
)  # fmt: skip
def test_any_span_of_factors_side_by_side(rows: int, parts: list[tuple[int, Any, bool, float]], start: int, stop: int, seed: int) -> None:
    """Transposed views, which cannot be read by rows, included."""
    arrays = [drawn(seed + n, (rows, rank), dtype) for n, (rank, dtype, *_) in enumerate(parts)]
    tensors = [Tensor.of(array.T).T if turned else Tensor.of(array) for array, (_, _, turned, _) in zip(arrays, parts, strict=True)]
    own = [factor for *_, factor in parts]
    found = beside(tensors, own, DTYPES["float32"])
    with np.errstate(over="ignore"):
        meant = np.concatenate([array.astype(np.float64) * factor for array, factor in zip(arrays, own, strict=True)], axis=1).astype(
            np.float32
        )
    np.testing.assert_array_equal(found.read(), meant)
    assert found.source.read(0, found.nbytes) == meant.tobytes()
    low, high = sorted((start % (found.nbytes + 1), stop % (found.nbytes + 1)))
    assert found.raw_range(low, high) == meant.tobytes()[low:high]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=4), st.sampled_from([np.float16, ml_dtypes.bfloat16, np.float32]), st.integers(0, 99)
)
def test_without_factors_every_bit_stays(ranks: list[int], dtype: Any, seed: int) -> None:
    size = np.dtype(dtype).itemsize
    arrays = [np.frombuffer(np.random.default_rng(seed + n).bytes(7 * rank * size), dtype).reshape(7, rank) for n, rank in enumerate(ranks)]
    found = beside([Tensor.of(array) for array in arrays], None, DTYPES[np.dtype(dtype).name])
    assert found.raw() == np.concatenate([array.view(f"u{size}") for array in arrays], axis=1).tobytes()
    assert found.raw_range(3, 3) == b""


def test_widened_in_pieces_is_what_numpy_makes_of_it(tmp_path: Path) -> None:
    """Every float16 and bfloat16 there is, infinities and NaNs with them, from a file and from memory."""
    codes = np.arange(1 << 16, dtype=np.uint16)
    (tmp_path / "codes").write_bytes(codes.tobytes())
    for name, dtype in (("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)):
        stored = Tensor(DTYPES[name], (256, 256), FileSource(tmp_path / "codes"))
        meant = codes.view(dtype).astype(np.float32)
        np.testing.assert_array_equal(widened(stored, DTYPES["float32"]).read().reshape(-1), meant)
        np.testing.assert_array_equal(widened(Tensor.of(codes.view(dtype)), DTYPES["float32"]).read(), meant)


def test_compiled_and_numpy_give_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every finite float16 and bfloat16, and as many float32, times numbers that round, overflow and vanish."""
    if module.wanted("spread", module._INTERFACE) is None:
        pytest.skip("the compiled module is not built")
    monkeypatch.setattr(module, "_refuse_overflow", lambda *_: None)  # what overflows is refused before either comes to it
    codes = np.arange(1 << 16, dtype=np.uint16)
    for dtype in (np.float16, ml_dtypes.bfloat16, np.float32):
        values = codes.view(dtype) if np.dtype(dtype).itemsize == 2 else (codes.astype(np.uint32) << 16 | codes[::-1]).view(np.float32)
        with np.errstate(invalid="ignore"):
            values = values[np.isfinite(values.astype(np.float64))]
        parts = [Tensor.of(values[: len(values) // rank * rank].reshape(-1, rank)[:2000]) for rank in (3, 8, 29)]
        for factors in ([1 / 3, -1.7, 1e-30], [2.0, 1e39, 0.0]):
            made = beside(parts, factors, DTYPES["float32"]).raw(), widened(parts[0], DTYPES["float32"]).raw()
            with monkeypatch.context() as patch:
                patch.setattr(module, "wanted", lambda *_: None)
                assert made == (beside(parts, factors, DTYPES["float32"]).raw(), widened(parts[0], DTYPES["float32"]).raw())


def test_one_changed_byte_is_seen_wherever_it_lies(tmp_path: Path) -> None:
    """Comparing goes by pieces of whole rows; files larger than a few of them, a byte of each changed."""
    random = np.random.default_rng(0)
    parts = [random.standard_normal((3000, rank)).astype(np.float32) for rank in (40, 7, 90)]
    made = beside([Tensor.of(part) for part in parts], None, DTYPES["float32"])
    data = bytearray(np.concatenate(parts, axis=1).tobytes())
    file = tmp_path / "whole"
    for at in [None, 0, 4095, 4096, *random.integers(0, len(data), 20).tolist(), len(data) - 1]:
        changed = bytearray(data)
        if at is not None:
            changed[at] ^= 1
        file.write_bytes(changed)
        assert same_bits(made, Tensor(DTYPES["float32"], (3000, 137), FileSource(file))) is (at is None)
