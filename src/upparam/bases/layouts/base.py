"""What a layout is: another naming of a base's modules, as a bijection between row ranges of its weights and of the reference's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

from upparam.bases.base import Base, Module
from upparam.errors import MalformedError
from upparam.patterns import regex


@dataclass(frozen=True)
class Order:
    """How the rows of a foreign weight lie against the reference's; the default is: the same.

    `swap`: the two halves change places (scale/shift of a final modulation). `rope`: within each of `heads` heads the reference's two
    halves of the rotary dimensions are interleaved (llama.cpp and Meta's files against Hugging Face's). `groups`: the reference holds,
    for each of `heads` groups, `per_group` query heads, one key head and one value head; the foreign weight all q, then all k, then all v.
    """

    kind: str = "same"
    heads: int = 0
    per_group: int = 1

    @property
    def plain(self) -> bool:
        """True when the rows lie as in the reference."""
        return self.kind == "same"

    def foreign_rows(self, rows: int) -> tuple[int, ...]:
        """For each row of the foreign weight, the reference row it is. Raises MalformedError when rows do not divide."""
        return _foreign_rows(self, rows)

    def reference_rows(self, rows: int) -> tuple[int, ...]:
        """For each row of the reference weight, the foreign row it is: the inverse of `foreign_rows`."""
        return _reference_rows(self, rows)


@lru_cache(maxsize=64)
def _foreign_rows(order: Order, rows: int) -> tuple[int, ...]:
    """Made once for all layers of a model."""
    if order.plain:
        return tuple(range(rows))
    heads, group = order.heads, order.per_group + 2
    parts = {"swap": 2, "rope": 2 * heads, "groups": heads * group}[order.kind]
    if not parts or rows % parts:
        raise MalformedError(f"rows that cannot be rearranged by '{order.kind}'", expected=f"a multiple of {parts}", found=rows)
    size = rows // parts
    if order.kind == "swap":
        return (*range(size, rows), *range(size))
    if order.kind == "rope":
        return tuple(row for start in range(0, rows, 2 * size) for first in range(start, start + size) for row in (first, first + size))
    blocks = [
        *(head * group + query for head in range(heads) for query in range(order.per_group)),
        *(head * group + order.per_group + other for other in range(2) for head in range(heads)),
    ]
    return tuple(row for block in blocks for row in range(block * size, (block + 1) * size))


@lru_cache(maxsize=64)
def _reference_rows(order: Order, rows: int) -> tuple[int, ...]:
    foreign = _foreign_rows(order, rows)
    return tuple(sorted(range(rows), key=foreign.__getitem__))


SAME = Order()
SWAP = Order("swap")


class Part(NamedTuple):
    """A reference module inside a foreign weight: rows `span` of it (None: the whole).

    `shape` is the reference weight's as (out, in, *kernel). `transposed` weights are stored as (in, out) under the foreign name.
    """

    module: str
    shape: tuple[int, ...]
    span: tuple[int, int] | None = None
    order: Order = SAME
    transposed: bool = False


class Place(NamedTuple):
    """Where a reference module lies in the foreign naming."""

    foreign: str
    part: Part


class Spot(NamedTuple):
    """Where a rule puts a reference module: the foreign name, its place among the modules stacked there, and how it is stored.

    `weight` is what follows the foreign name in a checkpoint's tensor names ('.weight', OpenCLIP's in_proj '_weight', '' for a bare
    parameter); the bias follows the same pattern.
    """

    foreign: str
    slot: int = 0
    order: Order = SAME
    weight: str = ".weight"
    transposed: bool = False


Naming = Callable[[str], "Spot | str | None"]
"""Reference path within a component -> where it lies; None when this naming has no such module."""


@dataclass(frozen=True)
class LayoutMap:
    """One naming of one base. `foreign` maps each foreign module to the pieces it is made of, in row order.

    `spelled` holds the endings of weights that are not '<module>.weight'. Build with `assemble`.
    """

    name: str
    base: Base
    foreign: Mapping[str, tuple[Part, ...]]
    spelled: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def places(self) -> Mapping[str, Place]:
        """Reference module -> where it lies."""
        return {part.module: Place(foreign, part) for foreign, parts in self.foreign.items() for part in parts}

    def to_reference(self, foreign: str) -> tuple[Part, ...]:
        """The pieces of a foreign module in row order; empty when this naming has no such module."""
        return self.foreign.get(foreign, ())

    def to_foreign(self, module: str) -> Place | None:
        """Where a reference module lies; None when this naming leaves it out."""
        return self.places.get(module)

    def rows(self, foreign: str) -> int:
        """Output rows of a foreign module's weight."""
        return sum(part.shape[0] for part in self.foreign[foreign])

    def tensor_name(self, foreign: str, parameter: str = "weight") -> str:
        """The name a checkpoint gives a foreign module's `weight` or `bias`."""
        return foreign + self.spelled.get(foreign, ".weight").replace("weight", parameter)

    @cached_property
    def tensor_names(self) -> Mapping[str, tuple[str, str]]:
        """Checkpoint tensor name -> (foreign module, parameter)."""
        found: dict[str, tuple[str, str]] = {}
        for foreign in self.foreign:
            found[self.tensor_name(foreign)] = (foreign, "weight")
            found.setdefault(self.tensor_name(foreign, "bias"), (foreign, "bias"))
        return found


class Component(NamedTuple):
    """A component of a base (`unet.`, `text_encoder.`; '' for a base of one) and how a layout names its modules."""

    reference: str
    naming: Naming


def assemble(name: str, base: Base, components: Iterable[Component], rename: Callable[[str], str] | None = None) -> LayoutMap:
    """The layout of `base` that these components describe. `rename` changes every finished foreign name (kohya's underscores).

    Raises MalformedError when two modules that are not stacked by a rule get one foreign name: such a naming cannot be read back.
    """
    stacked: dict[str, list[tuple[Spot, Module]]] = {}
    components = tuple(components)
    for module in base.modules:
        component = next((entry for entry in components if module.path.startswith(entry.reference)), None)
        spot = component.naming(module.path[len(component.reference) :]) if component else None
        if spot is None:
            continue
        spot = Spot(spot) if isinstance(spot, str) else spot
        if rename is not None:
            spot = spot._replace(foreign=rename(spot.foreign))
        stacked.setdefault(spot.foreign, []).append((spot, module))
    foreign = {path: _stack(name, path, members) for path, members in stacked.items()}
    spelled = {path: members[0][0].weight for path, members in stacked.items() if members[0][0].weight != ".weight"}
    return LayoutMap(name, base, foreign, spelled)


def _stack(name: str, path: str, members: list[tuple[Spot, Module]]) -> tuple[Part, ...]:
    members.sort(key=lambda member: member[0].slot)
    if len({spot.slot for spot, _ in members}) != len(members):
        shown = ", ".join(module.path for _, module in members[:3])
        raise MalformedError(f"layout {name} gives several modules one name", tensor=path, found=shown)
    parts: list[Part] = []
    at = 0
    for spot, module in members:
        shape = module.canonical
        span = (at, at + shape[0]) if len(members) > 1 else None
        parts.append(Part(module.path, shape, span, spot.order, spot.transposed))
        at += shape[0]
    return tuple(parts)


_NUMBER = regex(r"(?:^|(?<=\.))\d+(?=\.|$)")


class Table:
    """A naming written as data: reference template -> foreign template or Spot.

    {} in a reference template stands for any number; the foreign template repeats them in order. Numbers written out must agree.
    """

    def __init__(self, lines: Mapping[str, str | Spot]) -> None:
        self._lines: dict[str, list[tuple[tuple[str | None, ...], Spot]]] = {}
        for reference, line in lines.items():
            numbers = tuple(None if step == "{}" else step for step in reference.split(".") if step == "{}" or step.isdigit())
            spot = Spot(line) if isinstance(line, str) else line
            self._lines.setdefault(_NUMBER.sub("{}", reference), []).append((numbers, spot))

    def __call__(self, path: str) -> Spot | None:
        """Where the path lies; None when no line speaks of it."""
        numbers = _NUMBER.findall(path)
        for wanted, spot in self._lines.get(_NUMBER.sub("{}", path), ()):
            if all(want is None or want == number for want, number in zip(wanted, numbers, strict=True)):
                free = [number for want, number in zip(wanted, numbers, strict=True) if want is None]
                return spot._replace(foreign=spot.foreign.format(*free))
        return None


def same(path: str) -> str:
    """The naming that keeps the reference names."""
    return path


def under(prefix: str, naming: Naming) -> Naming:
    """The naming with `prefix` before every foreign name."""

    def prefixed(path: str) -> Spot | None:
        spot = naming(path)
        spot = Spot(spot) if isinstance(spot, str) else spot
        return None if spot is None else spot._replace(foreign=prefix + spot.foreign)

    return prefixed


def stacked(foreign: str, references: Sequence[str], **details: Any) -> dict[str, Spot]:
    """Table lines for reference modules whose rows lie on top of each other, in this order, in one foreign weight."""
    return {reference: Spot(foreign, slot, **details) for slot, reference in enumerate(references)}


def has(base: Base, start: str) -> bool:
    """True when the base has a module below this path."""
    return any(module.path.startswith(start) for module in base.modules)
