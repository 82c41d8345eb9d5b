"""The innermost work of a merge: one tile of a stored weight becomes round(W + up @ down), exactly.

A tile is computed in float32 (float32 weights: in float64), with a bound on how far each sum can be from the true one. Where rounding
the two ends of that interval gives two different results the element is computed again in float64, in a fixed order; everywhere else
the fast result is proved right. So every route, compiled or numpy, gives the same bytes.
The bounds are those of `factors`.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from upparam._native import compiled
from upparam.dtypes import DType
from upparam.operations.merge.factors import KINDS, LowRank
from upparam.operations.merge.in_float32 import ROUNDINGS, Buffers, add_in_float32
from upparam.operations.merge.in_float64 import add_in_float64

TILE_ELEMENTS = 1 << 19
"""Elements of a tile: 1 MiB in 16 bits. Larger reads and writes take less of the kernel's time, larger tiles leave the second-level cache."""
ON_DEVICE = ("bfloat16", "float16", "float32")
"""Dtypes of tiles that a device computes."""
_INTERFACE = 6
"""What the compiled module must say it speaks; one left over from older source does not."""


class Route(NamedTuple):
    """How tiles are computed: the compiled module and which of its instruction sets, or numpy (module None)."""

    name: str
    module: Any = None
    number: int = 0
    lanes: int = 0


_NUMPY = Route("numpy")


def routes() -> dict[str, Route]:
    """Every route this installation and processor offer, fastest first; `numpy` is always there."""
    found: dict[str, Route] = {}
    tile = compiled("tile", _INTERFACE)
    for index, (name, lanes) in enumerate(tile.instruction_sets() if tile is not None else ()):
        found[name] = Route(name, tile, index, lanes)
    found["numpy"] = _NUMPY
    return found


def best_route() -> Route:
    """The fastest route, or the one that the environment variable UPPARAM_KERNEL names."""
    found = routes()
    return found.get(os.environ.get("UPPARAM_KERNEL", "")) or next(iter(found.values()))


class Lane(Protocol):
    """One thread's way to a device: tiles of ON_DEVICE go there instead of through the kernel here (see `on_device`)."""

    raw: Any
    """Memory of the host that tiles are read into: a writable buffer of bytes."""
    elements: int
    """Elements of a tile worth sending."""

    def add_low_rank(self, stored: NDArray[Any], dtype: DType, factors: LowRank, start: int) -> tuple[int, int]:
        """What `add_low_rank` of this module does, with the same bytes as its result."""
        ...


class Device(Protocol):
    """Where tiles are computed instead of on the processor."""

    def lane(self, widest: int) -> Lane:
        """A new lane for the thread that asks, for rows of up to `widest` elements."""
        ...


class Scratch:
    """The route a thread's tiles take, and the buffers it needs, made once and used for every tile."""

    def __init__(self, widest: int, route: Route | None = None, lane: Lane | None = None) -> None:
        """`widest`: elements of the longest row."""
        self.route = route or best_route()
        self.lane = lane
        self.buffers = Buffers(widest) if self.route.module is None and lane is None else None


def add_low_rank(
    stored: NDArray[Any], dtype: DType, factors: LowRank, start: int, scratch: Scratch, *, exact: bool = True
) -> tuple[int, int]:
    """Change `stored` (rows, columns) in place: round(W + up @ down), the rows being [start, start + rows) of `factors`.

    Returns (elements whose bits changed, elements that became infinite). `exact=False` leaves out the float64 check of near-ties.
    """
    if scratch.lane is not None and dtype.name in ON_DEVICE and stored.size:
        return scratch.lane.add_low_rank(stored, dtype, factors, start)
    if scratch.route.module is not None and dtype.name in KINDS:
        return _compiled(stored, KINDS[dtype.name], KINDS[dtype.name], factors, start, scratch, exact, None)
    if scratch.buffers is not None and dtype.name in ROUNDINGS and stored.size:
        return add_in_float32(stored, dtype, factors, start, scratch.buffers, exact)
    return add_in_float64(stored, dtype, factors, start)


def convert_low_rank(
    given: NDArray[np.float32], out: NDArray[Any], dtype: DType, factors: LowRank, start: int, scratch: Scratch
) -> tuple[int, int] | None:
    """Put round(W + up @ down) into `out` (rows, columns) of another, narrower dtype than the weights, which are `given` and finite.

    Returns (elements that differ from W rounded alone, elements that became infinite), or None where this is not compiled.
    """
    if scratch.route.module is None or dtype.name not in KINDS or dtype.itemsize > 2:
        return None
    return _compiled(out, KINDS[dtype.name], KINDS["float16"], factors, start, scratch, True, given)


def _compiled(
    stored: NDArray[Any], kind: int, layout: int, factors: LowRank, start: int, scratch: Scratch, exact: bool, given: NDArray[Any] | None
) -> tuple[int, int]:
    """`kind` is that of `stored`, `layout` that for which the factors are laid out."""
    route, (rows, columns) = scratch.route, stored.shape
    form, part = factors.packed(route, layout), slice(start, start + rows)
    changed: int
    infinite: int
    changed, infinite = route.module.merge_tile(
        stored.view(f"u{stored.itemsize}"), rows, columns, form.up[part], None if form.up64 is None else form.up64[part],
        form.panels, form.downs, factors.rank, form.row_bound[part], form.panel_norm, kind, exact, route.number, given,
    )  # fmt: skip
    return changed, infinite
