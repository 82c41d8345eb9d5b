"""upparam's dataclasses against the standard ones: the same classes made by both decorators have to behave alike."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from types import ModuleType
from typing import Any, ClassVar

import pytest

from upparam import records
from upparam.tensors import DTYPES, MemorySource, Tensor

BOTH = pytest.mark.parametrize("words", [dataclasses, records], ids=["standard", "ours"])


def classes(words: Any) -> tuple[type[Any], type[Any], type[Any]]:
    """A frozen class, one that inherits from it, and a mutable one that has everything else."""

    @words.dataclass(frozen=True)
    class Point:
        x: int
        y: int = 2
        note: str = words.field(default="", repr=False, compare=False)
        axes: ClassVar[int] = 2

    @words.dataclass(frozen=True)
    class Point3(Point):
        z: int = 3
        y: int = 20

    @words.dataclass
    class Bag:
        name: str
        held: list[int] = words.field(default_factory=list)
        total: int = words.field(init=False)
        seen: set[int] = words.field(default_factory=set, init=False)

        def __post_init__(self) -> None:
            self.total = sum(self.held)

    return Point, Point3, Bag


@BOTH
def test_objects_hold_what_they_are_given(words: ModuleType) -> None:
    point, point3, bag = classes(words)
    assert (point(1).x, point(1).y, point(1, note="n").note, point.axes, point.y) == (1, 2, "n", 2, 2)
    assert vars(point3(1, z=5)) == {"x": 1, "y": 20, "note": "", "z": 5}
    one, other = bag("a", [1, 2]), bag("a")
    assert (one.total, other.held, other.seen) == (3, [], set())
    other.held.append(1)
    other.seen.add(1)
    assert bag("a").held == [] and bag("a").seen == set()


@BOTH
@pytest.mark.parametrize(
    ("args", "kwargs"), [((), {}), ((1, 2, "", 4), {}), ((1,), {"x": 1}), ((1,), {"w": 1}), ((), {"y": 1, "note": ""}), ((), {"w": 1})]
)
def test_wrong_arguments_are_type_errors(words: ModuleType, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    point, _, bag = classes(words)
    with pytest.raises(TypeError):
        point(*args, **kwargs)
    with pytest.raises(TypeError):
        bag("a", total=1)
    with pytest.raises(TypeError):
        bag("a", seen={1})


@BOTH
def test_equality_hash_and_repr(words: ModuleType) -> None:
    point, point3, bag = classes(words)
    assert point(1) == point(1, note="not compared") and hash(point(1)) == hash(point(1, note="not compared"))
    assert point(1) != point(2) and point(1) != point3(1) and point(1) != (1, 2)
    assert repr(point(1, note="hidden")).endswith("Point(x=1, y=2)")
    assert bag("a", [1]) == bag("a", [1]) != bag("a", [2])
    nan = float("nan")
    assert point(nan) == point(nan)  # the same object, as within a tuple
    with pytest.raises(TypeError):
        hash(bag("a"))

    @words.dataclass(frozen=True, eq=False)
    class Thing:
        x: int

    assert Thing(1) != Thing(1) and len({Thing(1), Thing(1)}) == 2


@BOTH
def test_frozen_objects_refuse_changes(words: ModuleType) -> None:
    point, _, bag = classes(words)
    one = point(1)
    with pytest.raises(AttributeError):
        one.x = 2
    with pytest.raises(AttributeError):
        del one.x
    with pytest.raises(AttributeError):
        one.new = 2
    assert one.x == 1
    changed = bag("a")
    changed.name = "b"
    assert changed.name == "b"


@BOTH
@pytest.mark.parametrize("replace", [dataclasses.replace, records.replace], ids=["standard", "ours"])
def test_replace_takes_both(words: ModuleType, replace: Any) -> None:
    point, _, bag = classes(words)
    assert replace(point(1, note="n"), x=7) == point(7) and replace(point(1, note="n"), x=7).note == "n"
    one = bag("a", [1, 2])
    one.seen.add(3)
    assert (replace(one, held=[5]).total, replace(one, name="b").seen) == (5, set())
    with pytest.raises(TypeError):
        replace(point(1), w=1)


@BOTH
def test_standard_readers_understand_both(words: ModuleType) -> None:
    point, point3, bag = classes(words)
    assert (
        [field.name for field in dataclasses.fields(point3)] == [field.name for field in records.fields(point3)] == ["x", "y", "note", "z"]
    )
    for asdict in (dataclasses.asdict, records.asdict):
        assert asdict(bag("a", [1])) == {"name": "a", "held": [1], "total": 1, "seen": set()}
        nested = {"name": "a", "held": [{"x": 1, "y": 2, "note": ""}], "total": 0, "seen": set()}
        one = bag("a")
        one.held.append(point(1))
        assert asdict(one) == nested
    assert dataclasses.is_dataclass(point(1))
    assert list(inspect.signature(point3).parameters) == ["x", "y", "note", "z"]
    assert inspect.signature(point3).parameters["y"].default == 20


def test_a_standard_dataclass_may_inherit_from_ours() -> None:
    point, _, _ = classes(records)

    @dataclasses.dataclass(frozen=True)
    class Named(point):  # type: ignore[misc, valid-type]
        name: str = "n"

    one = Named(1, name="m")
    assert (one.y, records.replace(one, x=3)) == (2, Named(3, name="m"))
    assert [field.name for field in records.fields(one)] == ["x", "y", "note", "name"]


def test_copies_and_pickles_of_what_a_library_user_holds() -> None:
    tensor = Tensor(DTYPES["float32"], (2,), MemorySource(bytes(8)))
    assert tensor.numel == 2  # a cached property, which a frozen object may still keep
    assert copy.copy(tensor) == tensor
    assert pickle.loads(pickle.dumps(DTYPES["bfloat16"])) == DTYPES["bfloat16"]
    assert records.replace(tensor, shape=(1,)).numel == 1
