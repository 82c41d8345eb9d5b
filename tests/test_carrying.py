"""Bytes carried and compared many tensors at a call: the compiled module does what the tensors do one by one, and leaves errors to them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from upparam import carrying
from upparam._native import compiled
from upparam.dtypes import DTYPES
from upparam.errors import MalformedError
from upparam.sources import FileSource
from upparam.tensors import Tensor

BUILT = compiled("carry", carrying._INTERFACE) is not None
ROOM = carrying._ROOM
SIZES = (0, 1, 4095, 4096, 4097, ROOM // 2 - 1, ROOM // 2, ROOM // 2 + 4096, ROOM, ROOM + 1, 3 * ROOM + 7)


@pytest.fixture(params=[pytest.param("compiled", marks=pytest.mark.skipif(not BUILT, reason="the compiled module is not built")), "python"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "python":
        monkeypatch.setattr(carrying, "wanted", lambda *_: None)
    yield request.param


def laid(path: Path, seed: int = 0) -> list[Tensor]:
    """A file of tensors of all the sizes, a byte apart, and the tensors."""
    path.write_bytes(np.random.default_rng(seed).bytes(sum(SIZES) + len(SIZES)))
    source, at, found = FileSource(path), 1, []
    for size in SIZES:
        found.append(Tensor(DTYPES["uint8"], (size,), source, at))
        at += size + 1
    return found


def test_what_is_carried_is_what_the_tensors_hold(tmp_path: Path, route: str) -> None:
    tensors = laid(tmp_path / "in")
    turned = Tensor(DTYPES["uint8"], (64, 3), tensors[-1].source, 5).T
    places, at = [], 11
    for tensor in (*tensors, turned):
        places.append((at, tensor))
        at += tensor.nbytes + 2
    (tmp_path / "out").write_bytes(b"")
    with (tmp_path / "out").open("r+b") as stream:
        done = carrying.carried(stream.fileno(), places)
    assert done == [route == "compiled" and tensor is not turned for _, tensor in places]
    data = (tmp_path / "out").read_bytes()
    for (at, tensor), whole in zip(places, done, strict=True):
        if whole:
            assert data[at : at + tensor.nbytes] == tensor.raw()
            assert not data[at + tensor.nbytes : at + tensor.nbytes + 2].strip(b"\0")


def test_the_same_bytes_are_the_same(tmp_path: Path, route: str) -> None:
    assert carrying.same_each(list(zip(laid(tmp_path / "one"), laid(tmp_path / "other"), strict=True))) == [True] * len(SIZES)


@pytest.mark.parametrize("where", ["first", "middle", "last", 4095, 4096, ROOM // 2 - 1, ROOM // 2, ROOM // 2 + 4095, ROOM // 2 + 4096])
def test_one_other_byte_is_found_wherever_it_lies(tmp_path: Path, route: str, where: str | int) -> None:
    ours, theirs = laid(tmp_path / "one"), laid(tmp_path / "other")
    data = bytearray((tmp_path / "other").read_bytes())
    expected = []
    for tensor in theirs:
        at = {"first": 0, "middle": tensor.nbytes // 2, "last": tensor.nbytes - 1}.get(where, where) if isinstance(where, str) else where
        expected.append(not 0 <= at < tensor.nbytes)
        if not expected[-1]:
            data[tensor.offset + at] ^= 1
    (tmp_path / "other").write_bytes(data)
    assert carrying.same_each(list(zip(ours, theirs, strict=True))) == expected


def test_other_dtypes_and_shapes_are_not_the_same(tmp_path: Path, route: str) -> None:
    (tmp_path / "w").write_bytes(bytes(64))
    one, source = Tensor(DTYPES["int8"], (8, 8), FileSource(tmp_path / "w")), FileSource(tmp_path / "w")
    others = [Tensor(DTYPES["uint8"], (8, 8), source), Tensor(DTYPES["int8"], (64,), source), Tensor(DTYPES["int8"], (8, 8), source).T]
    assert carrying.same_each([(one, other) for other in others]) == [False, False, True]


def test_a_file_that_became_shorter_is_told_and_not_taken_for_zeros(tmp_path: Path, route: str) -> None:
    ours, theirs = laid(tmp_path / "one"), laid(tmp_path / "other")
    os.truncate(tmp_path / "other", theirs[-1].offset + 10)
    with pytest.raises(MalformedError, match="ends early"):
        carrying.same_each(list(zip(ours, theirs, strict=True)))


def test_what_cannot_be_read_is_left_to_do(tmp_path: Path, route: str) -> None:
    tensors = laid(tmp_path / "in")
    os.truncate(tmp_path / "in", tensors[-1].offset + 10)
    beyond = Tensor(DTYPES["uint8"], (9,), tensors[0].source, sum(SIZES) + len(SIZES) - 3)
    gone = Tensor(DTYPES["uint8"], (9,), FileSource(tmp_path / "gone", size=9))
    with (tmp_path / "out").open("xb") as stream:
        done = carrying.carried(stream.fileno(), [(tensor.offset, tensor) for tensor in (*tensors, beyond, gone)])
    assert done == [route == "compiled"] * (len(tensors) - 1) + [False] * 3


@pytest.mark.skipif(not BUILT, reason="the compiled module is not built")
@pytest.mark.parametrize("spans", [7, [(1, 2, 3, 4)], [[0, 0, 0, 0, 0]], [(0, 0, "x", 0, 0)], [(0, 0, 0, 1 << 70, 0)]])
def test_the_compiled_module_refuses_what_is_no_span(spans: object) -> None:
    module = compiled("carry", carrying._INTERFACE)
    for call in (module.copy, module.same):
        with pytest.raises((TypeError, OverflowError)):
            call(spans, bytearray(64))
        with pytest.raises(ValueError, match="buffer"):
            call([], bytearray(1))
