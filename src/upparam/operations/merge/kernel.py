"""The innermost work of a merge: one tile of a stored weight becomes round(W + up @ down), exactly.

A tile is computed in float32 (float32 weights: in float64), with a bound on how far each sum can be from the true one. Where rounding
the two ends of that interval gives two different results the element is computed again in float64, in a fixed order; everywhere else
the fast result is proved right. So every route, compiled or numpy, gives the same bytes.
The bound: with |err(x*y)| and |err(x+y)| <= u = 2^-24 times the result (u the unit roundoff of float32), a sum of R products of
factors each rounded once is within (R + 4) u sum|up||down| of the true one (Higham, "Accuracy and Stability of Numerical
Algorithms", section 3.1), and sum|up||down| <= ||up_row|| ||down_column||.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from upparam.operations.merge.rounding import NO_INFINITY, largest, narrow, widen
from upparam.tensors import DType

TILE_ELEMENTS = 1 << 18
"""Elements of a tile: 1 MiB as float32, so that a tile and its companions stay in the second-level cache."""
_UNIT = 2.0**-24
_TINY = 1e-37
"""Absolute slack for products that underflow float32, and what makes every zero sum doubtful (its sign is decided in float64)."""
_KINDS = {"bfloat16": 0, "float16": 1, "float32": 2}
"""Dtypes the compiled kernel knows, by its numbers for them."""
_WIDTH = 32
"""Columns per panel are at most this many; column norms are padded to it."""


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
    try:
        from upparam._native import tile  # type: ignore[attr-defined, unused-ignore]
    except ImportError:
        pass
    else:
        for index, (name, lanes) in enumerate(tile.instruction_sets()):
            found[name] = Route(name, tile, index, lanes)
    found["numpy"] = _NUMPY
    return found


def best_route() -> Route:
    """The fastest route, or the one that the environment variable UPPARAM_KERNEL names."""
    found = routes()
    return found.get(os.environ.get("UPPARAM_KERNEL", "")) or next(iter(found.values()))


def aligned(count: int, dtype: Any) -> NDArray[Any]:
    """An uninitialised array whose first element lies on a cache line: vectors that straddle two lines cost twice."""
    size = count * np.dtype(dtype).itemsize
    room = np.empty(size + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + size].view(dtype)


class LowRank:
    """up (rows, R) with every scale in it, down (R, columns), for a range of rows of one stored weight; all that a tile needs.

    Whether the factors are finite is the caller's to check. Other forms of the factors are made when a route first asks for them.
    """

    def __init__(self, up: NDArray[np.float64], down: NDArray[np.float64]) -> None:
        self.up64 = np.ascontiguousarray(up)
        self.down64 = down
        # norms rounded upward by the factor, which also covers their own rounding
        self._row_norm = np.sqrt(np.einsum("ir,ir->i", up, up)) * (1 + 2.0**-16)
        norms = np.sqrt(np.einsum("rj,rj->j", down, down)) * (1 + 2.0**-16)
        self.column_norm: NDArray[np.float32] = np.zeros(-(-len(norms) // _WIDTH) * _WIDTH, np.float32)
        self.column_norm[: len(norms)] = norms
        self.widest = float(norms.max(initial=0.0))
        self._kept: dict[str, NDArray[Any]] = {}

    def row_bound(self, chunk: int | None = None) -> NDArray[np.float32]:
        """How far a float32 sum of each row may be from the true one, per unit of column norm.

        R products summed one after the other, or in runs of `chunk` whose sums are then added up.
        """
        rank = self.up64.shape[1]
        depth = rank + 4 if chunk is None else min(rank, chunk) + -(-rank // chunk) + 4
        return self._keep(f"bound{chunk}", lambda: (self._row_norm * (depth * _UNIT) + _TINY).astype(np.float32))

    @property
    def up(self) -> NDArray[np.float32]:
        """up in float32."""
        return self._keep("up", lambda: self.up64.astype(np.float32))

    @property
    def down(self) -> NDArray[np.float32]:
        """down in float32."""
        return self._keep("down", lambda: self.down64.astype(np.float32))

    def panels(self, width: int, dtype: Any) -> NDArray[Any]:
        """down as (columns / width, R, width), the last panel padded with zeros: what the compiled kernel streams through."""

        def make() -> NDArray[Any]:
            rank, columns = self.down64.shape
            count, whole = -(-columns // width), columns // width
            panels = aligned(count * rank * width, dtype).reshape(count, rank, width)
            panels[:whole] = self.down64[:, : whole * width].reshape(rank, whole, width).transpose(1, 0, 2)
            if whole < count:
                panels[whole, :, : columns - whole * width] = self.down64[:, whole * width :]
                panels[whole, :, columns - whole * width :] = 0
            return panels

        return self._keep(f"{width}{dtype}", make)

    @property
    def ups(self) -> NDArray[np.float64]:
        """up with its ranks padded to a multiple of 8, for `elements`."""
        return self._keep("ups", lambda: np.pad(self.up64, ((0, 0), (0, -self.up64.shape[1] % 8))))

    @property
    def downs(self) -> NDArray[np.float64]:
        """down as (columns, R), its ranks padded to a multiple of 8, for `elements`."""
        return self._keep("downs", lambda: np.ascontiguousarray(np.pad(self.down64, ((0, -len(self.down64) % 8), (0, 0))).T))

    def elements(self, flat: NDArray[np.intp], start: int, columns: int) -> NDArray[np.float64]:
        """up @ down in float64 at the places `flat` of a tile that begins at row `start`.

        Summed in the order that the compiled kernel uses too: eight running sums over every eighth rank, then pairs of them.
        """
        row, column = np.divmod(flat, columns)
        products = self.ups[row + start]
        products *= self.downs[column]
        lanes = np.zeros((len(flat), 8))
        for first in range(0, products.shape[1], 8):
            lanes += products[:, first : first + 8]
        pairs = lanes[:, :4] + lanes[:, 4:]
        total: NDArray[np.float64] = (pairs[:, 0] + pairs[:, 2]) + (pairs[:, 1] + pairs[:, 3])
        return total

    def _keep(self, name: str, make: Any) -> NDArray[Any]:
        found: NDArray[Any] | None = self._kept.get(name)
        if found is None:
            found = self._kept[name] = make()
        return found


class Scratch:
    """One thread's buffers, made once and used for every tile, and the route its tiles take."""

    def __init__(self, elements: int, route: Route | None = None) -> None:
        self.route = route or best_route()
        self.doubtful = np.empty(elements, np.uint32)
        if self.route.module is None:
            self.weight = np.empty(elements, np.float32)
            self.delta = np.empty(elements, np.float32)
            self.low = np.empty(elements, np.uint16)
            self.work = np.empty(elements, np.uint32)
            self.odd = np.empty(elements, np.uint32)
            self.differs = np.empty(elements, np.bool_)
            self.small = np.empty(elements, np.bool_)


def add_low_rank(
    stored: NDArray[Any], dtype: DType, factors: LowRank, start: int, scratch: Scratch, *, exact: bool = True
) -> tuple[int, int]:
    """Change `stored` (rows, columns) in place: round(W + up @ down), the rows being [start, start + rows) of `factors`.

    Returns (elements whose bits changed, elements that became infinite). `exact=False` leaves out the float64 check of near-ties.
    """
    if scratch.route.module is not None and dtype.name in _KINDS:
        return _add_compiled(stored, dtype, factors, start, scratch, exact)
    if scratch.route.module is None and dtype.name in ("bfloat16", "float16"):
        return _add_in_float32(stored, dtype, factors, start, scratch, exact)
    return _add_in_float64(stored, dtype, factors, start)


def _add_compiled(stored: NDArray[Any], dtype: DType, factors: LowRank, start: int, scratch: Scratch, exact: bool) -> tuple[int, int]:
    """Through the compiled kernel, which leaves doubtful elements as they were and lists them."""
    route, kind = scratch.route, _KINDS[dtype.name]
    rows, columns = stored.shape
    up: NDArray[Any]
    if kind == 2:
        up, panels = factors.up64, factors.panels(route.lanes, np.float64)
    else:
        up, panels = factors.up, factors.panels(2 * route.lanes, np.float32)
    codes = stored.view(np.uint32 if kind == 2 else np.uint16)
    found, changed = route.module.merge_tile(
        codes, rows, columns, up[start : start + rows], panels, up.shape[1], factors.row_bound(route.module.CHUNK)[start : start + rows],
        factors.column_norm, kind, exact, scratch.doubtful, route.number,
    )  # fmt: skip
    if not found:
        return changed, 0
    more, infinite = route.module.settle(
        codes, scratch.doubtful, found, columns, factors.ups[start:], factors.downs, factors.ups.shape[1], kind
    )
    return changed + more, infinite


def _add_in_float32(stored: NDArray[Any], dtype: DType, factors: LowRank, start: int, scratch: Scratch, exact: bool) -> tuple[int, int]:
    shape = (rows, _) = stored.shape
    size = stored.size
    weight, delta = scratch.weight[:size].reshape(shape), scratch.delta[:size].reshape(shape)
    low = scratch.low[:size].reshape(shape)
    differs = scratch.differs[:size].reshape(shape)
    weight[...] = stored
    np.matmul(factors.up[start : start + rows], factors.down, out=delta)
    with np.errstate(over="ignore", invalid="ignore"):
        np.add(weight, delta, out=weight)
        widest = max(float(weight.max()), -float(weight.min()))
        if not exact:
            _to_half_width(weight, dtype, low, scratch)
        else:
            bound = float(factors.row_bound()[start : start + rows].max()) * factors.widest + _TINY
            if not np.isfinite(bound) or not np.isfinite(widest):
                return _add_in_float64(stored, dtype, factors, start)
            _to_half_width(weight, dtype, low, scratch)
            doubtful = _doubtful(weight, dtype, bound, scratch)
            if doubtful.size * factors.up64.shape[1] > size // 2:  # so many that whole float64 tiles cost less
                return _add_in_float64(stored, dtype, factors, start)
            if doubtful.size:
                before = stored.reshape(-1)[doubtful]
                low.reshape(-1)[doubtful] = _settled(before, dtype, factors, start, doubtful, shape[1]).view(np.uint16)
    infinite = 0 if widest < largest(dtype) else _count_overflow(low.view(dtype.numpy), stored)
    codes = stored.view(np.uint16)
    np.not_equal(codes, low, out=differs)
    codes[...] = low
    return int(np.count_nonzero(differs)), infinite


_TIES = {"bfloat16": (0xFFFF, 0.0, 256), "float16": (0x1FFF, 2.0**-14, 64)}
"""The bits of a float32 that rounding takes away, the magnitude below which it takes more of them, and how near a tie, in units of the
last place of float32, a sum must be to be looked at."""


def _doubtful(sums: NDArray[np.float32], dtype: DType, bound: float, scratch: Scratch) -> NDArray[np.intp]:
    """Flat places of the sums that could round otherwise, each being within `bound` + |sum| 2^-22 of the true one.

    Where a sum is so large that this is less than `within` units of its last place (a unit is at least |sum| 2^-24) only sums that near
    to a tie can. Those and the small ones are looked at one by one, with both ends of the interval.
    """
    bits = sums.view(np.uint32)
    work = scratch.work[: bits.size].reshape(bits.shape)
    near, small = (room[: bits.size].reshape(bits.shape) for room in (scratch.differs, scratch.small))
    dropped, least, within = _TIES[dtype.name]
    np.bitwise_and(bits, np.uint32(dropped), out=work)
    work -= np.uint32(dropped // 2 + 1 - within)
    np.less_equal(work, np.uint32(2 * within), out=near)
    np.bitwise_and(bits, np.uint32(0x7FFFFFFF), out=work)
    np.less(work, np.float32(max(least, bound * 2.0**24 / (within - 8))).view(np.uint32), out=small)
    near |= small
    places = np.flatnonzero(near)
    chosen = sums.reshape(-1)[places]
    reach = np.abs(chosen) * np.float32(2.0**-22) + np.float32(bound)
    low, high = (chosen - reach).astype(dtype.numpy), (chosen + reach).astype(dtype.numpy)
    uncertain: NDArray[np.intp] = places[low.view(np.uint16) != high.view(np.uint16)]
    return uncertain


def _to_half_width(values: NDArray[np.float32], dtype: DType, codes: NDArray[np.uint16], scratch: Scratch) -> None:
    """float32 rounded to bfloat16 or float16 codes. float16 by integer arithmetic, several times as fast as numpy's own cast."""
    if dtype.name == "bfloat16":
        codes.view(dtype.numpy)[...] = values
        return
    bits = values.view(np.uint32)
    size = bits.size
    work = scratch.work[:size].reshape(bits.shape)
    np.bitwise_and(bits, np.uint32(0x7FFFFFFF), out=work)
    odd_lanes = np.logical_or(work < np.uint32(0x38800000), work >= np.uint32(0x477FE000))  # subnormal or too large in float16
    odd = scratch.odd[:size].reshape(bits.shape)
    np.right_shift(work, np.uint32(13), out=odd)
    np.bitwise_and(odd, np.uint32(1), out=odd)
    work += odd
    work += np.uint32((0xFFF - (112 << 23)) % 2**32)
    work >>= np.uint32(13)
    np.right_shift(bits, np.uint32(16), out=odd)
    np.bitwise_and(odd, np.uint32(0x8000), out=odd)
    work |= odd
    codes[...] = work
    rest = np.flatnonzero(odd_lanes)
    if rest.size:
        codes.reshape(-1)[rest] = values.reshape(-1)[rest].astype(np.float16).view(np.uint16)


def _settled(before: NDArray[Any], dtype: DType, factors: LowRank, start: int, flat: NDArray[np.intp], columns: int) -> NDArray[Any]:
    """The doubtful elements `flat` of a tile, whose stored values are `before`, decided in float64."""
    result = np.empty_like(before)
    step = max(64, (1 << 16) // factors.ups.shape[1])
    for at in range(0, len(flat), step):
        part = slice(at, at + step)
        true = widen(before[part]) + factors.elements(flat[part], start, columns)
        result[part] = _rounded(before[part], true, dtype)
    return result


def _add_in_float64(stored: NDArray[Any], dtype: DType, factors: LowRank, start: int) -> tuple[int, int]:
    """The same through float64 sums. What their own error leaves open is summed again in the fixed order, so that every route agrees."""
    changed = infinite = 0
    rank = factors.up64.shape[1]
    step = max(1, (TILE_ELEMENTS // 4) // max(1, stored.shape[1]))
    for at in range(0, len(stored), step):
        part = stored[at : at + step]
        first = start + at
        true = factors.up64[first : first + len(part)] @ factors.down64
        true += widen(part)
        bound = factors.row_bound()[first : first + len(part), None].astype(np.float64) * (2.0**-28 * factors.widest)
        bound = bound + np.abs(true) * 2.0**-51 + 1e-300 * (rank + 1)
        doubtful = np.flatnonzero(narrow(true - bound, dtype) != narrow(true + bound, dtype))
        if doubtful.size:
            sums = factors.elements(doubtful, first, stored.shape[1])
            true.reshape(-1)[doubtful] = widen(part.reshape(-1)[doubtful]) + sums
        more, over = store(part, true, dtype)
        changed, infinite = changed + more, infinite + over
    return changed, infinite


def store(stored: NDArray[Any], true: NDArray[np.float64], dtype: DType) -> tuple[int, int]:
    """Round float64 values into `stored` (same shape). Returns (elements whose bits changed, elements too large for the dtype)."""
    rounded = _rounded(stored, true, dtype)
    infinite = 0
    if true.size and not np.abs(true).max() < largest(dtype):
        if dtype.name in NO_INFINITY:
            infinite = int(np.count_nonzero(np.abs(true) > largest(dtype)))
        else:
            infinite = _count_overflow(rounded, stored)
    code = np.dtype(f"u{dtype.itemsize}")
    changed = int(np.count_nonzero(stored.view(code) != rounded.view(code)))
    stored[...] = rounded
    return changed, infinite


def _rounded(before: NDArray[Any], true: NDArray[np.float64], dtype: DType) -> NDArray[Any]:
    """`true` rounded once; a NaN of the base stays bit for bit as it was."""
    result = narrow(true, dtype)
    nan = np.isnan(true)
    if nan.any():
        result[nan] = before[nan]
    return result


def _count_overflow(now: NDArray[Any], before: NDArray[Any]) -> int:
    with np.errstate(invalid="ignore"):
        return int(np.count_nonzero(~np.isfinite(now) & np.isfinite(before)))
