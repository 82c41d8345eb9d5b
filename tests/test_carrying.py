"""Bytes carried and compared many tensors at a call: the compiled module does what the tensors do one by one, and leaves errors to them."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from upparam import carrying
from upparam._native import compiled
from upparam.algorithms.slicing import take_rows
from upparam.dtypes import DTYPES
from upparam.errors import MalformedError
from upparam.operations.combine.beside import beside
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


def put(path: Path, tensors: list[Tensor]) -> tuple[list[bool], list[Tensor]]:
    """What was carried to a file, two bytes between one tensor and the next, and where each came to lie."""
    places, at = [], 11
    for tensor in tensors:
        places.append((at, tensor))
        at += tensor.nbytes + 2
    with path.open("xb") as stream:
        done = carrying.carried(stream.fileno(), places)
        stream.truncate(at)
    source = FileSource(path)
    return done, [replace(tensor, source=source, offset=at, strides=None) for at, tensor in places]


def test_what_is_carried_is_what_the_tensors_hold(tmp_path: Path, route: str) -> None:
    tensors = laid(tmp_path / "in")
    done, there = put(tmp_path / "out", tensors)
    assert done == [route == "compiled"] * len(SIZES)
    data = (tmp_path / "out").read_bytes()
    for ours, theirs, whole in zip(tensors, there, done, strict=True):
        if whole:
            assert data[theirs.offset : theirs.offset + ours.nbytes] == ours.raw()
            assert not data[theirs.offset + ours.nbytes : theirs.offset + ours.nbytes + 2].strip(b"\0")


ITEMS = ("uint8", "bfloat16", "float32", "float64")
SHAPES = ((1, 1), (3, 64), (33, 95), (96, 256), (31, 4096), (16, ROOM // 64 + 5), (300, 7))


def views(path: Path) -> list[Tensor]:
    """Tensors whose bytes lie otherwise than wanted: turned, rows picked, rows stacked, columns side by side."""
    path.write_bytes(np.random.default_rng(5).bytes(1 << 23))
    source, found = FileSource(path), []
    for item in ITEMS:
        for number, shape in enumerate(SHAPES):
            one, other = (Tensor(DTYPES[item], shape, source, 1 + (8 * number + at) * 4096) for at in range(2))
            rows = np.random.default_rng(number).permutation(shape[0]).tolist()
            found += [one.T, take_rows(one, rows), take_rows(one, rows[: len(rows) // 2 + 1])]
            found += [Tensor.stack([one, other.rows(0, 1), one]), beside([one, other, other], None, DTYPES[item])]
    return found


def test_views_are_carried_as_what_they_read(tmp_path: Path, route: str) -> None:
    tensors = views(tmp_path / "in")
    done, there = put(tmp_path / "out", tensors)
    assert all(done) if route == "compiled" else not any(done)
    assert not any(done) or [tensor.raw() for tensor in there] == [tensor.raw() for tensor in tensors]


def test_views_are_the_same_as_what_they_read(tmp_path: Path, route: str) -> None:
    tensors = views(tmp_path / "in")
    (tmp_path / "out").write_bytes(b"".join(tensor.raw() for tensor in tensors))
    at, there, source = 0, [], FileSource(tmp_path / "out")
    for tensor in tensors:
        there.append(replace(tensor, source=source, offset=at, strides=None))
        at += tensor.nbytes
    pairs = list(zip(tensors, there, strict=True))
    assert all(carrying.same_each(pairs)) and all(carrying.same_each([(theirs, ours) for ours, theirs in pairs]))
    assert all(carrying.same_each([(ours, ours) for ours, _ in pairs]))
    assert all(carrying.same_each([(ours.T, theirs.T) for ours, theirs in pairs]))
    data = bytearray((tmp_path / "out").read_bytes())
    for tensor in there:  # one bit somewhere in each
        data[tensor.offset + tensor.nbytes * 2 // 3] ^= 4
    (tmp_path / "out").write_bytes(data)
    assert not any(carrying.same_each(pairs)) and not any(carrying.same_each([(theirs, ours) for ours, theirs in pairs]))


def test_the_compiled_module_goes_every_way(tmp_path: Path) -> None:
    """Else the tests above would compare the route of Python with itself."""
    kinds = [way[0] for tensor in views(tmp_path / "in") if (way := carrying._way(tensor)) is not None]
    assert len(kinds) == len(ITEMS) * len(SHAPES) * 5 and set(kinds) == {0, 1, 2, 3}


def test_what_does_not_fit_into_the_buffer_is_left_to_python(tmp_path: Path) -> None:
    with (tmp_path / "w").open("xb") as stream:
        stream.truncate(1 << 26)
    whole = Tensor(DTYPES["uint8"], (1 << 25,), FileSource(tmp_path / "w"))
    wide = whole.reshape((2, 1 << 24)).T
    assert carrying._way(wide) is None and carrying._way(wide.reshape((1 << 24, 2, 1))) is None
    assert carrying._way(whole.reshape((1 << 24, 2)).T) is None
    assert carrying._way(beside([whole.reshape((2, 1 << 24))] * 2, None, DTYPES["uint8"])) is None


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
@pytest.mark.parametrize(
    "way",
    [7, (), (9,), (0, 7), (0, [[0, 0, 0]]), (0, [(0, "x", 0)]), (0, [(0, 1 << 70, 0)]), (0, [(0, 0, -1)]), (1, 1, [(0, 0, 40)]), (1, 2, [(0, 0, 0)]),
     (1, 1 << 62, [(0, 0, 8)]), (2, 0, 0, 2, 2, 3), (2, 0, 0, 0, 2, 2), (2, 0, 0, 2, 1 << 61, 2), (2, 0, 0, 8, 8, 8), (3, 0, 0, 1, 4, array("I", [1])),
     (3, 0, 0, 1, 0, array("I", [0])), (3, 0, 0, 1, 4, 7), (3, 0, 0, 100, 4, array("I", [0]))],
)  # fmt: skip
def test_the_compiled_module_refuses_what_is_no_way(way: object) -> None:
    module = compiled("carry", carrying._INTERFACE)
    for call, job in ((module.copy, (way, 0, 0)), (module.same, (way, way)), (module.same, ((0, ()), way))):
        with pytest.raises((TypeError, OverflowError, ValueError)):
            call([job], bytearray(128), 64)
        with pytest.raises(TypeError):
            call([[*job]], bytearray(128), 64)
        for buffer, room in ((bytearray(1), 1), (bytearray(8), 9)):
            with pytest.raises(ValueError, match="buffer"):
                call([], buffer, room)
