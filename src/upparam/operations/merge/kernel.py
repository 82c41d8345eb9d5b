"""The innermost work of a merge: one tile of a stored weight becomes round(W + up @ down), exactly.

A tile is computed in float32 (float32 weights: in float64), with a bound on how far each sum can be from the true one. Where rounding
the two ends of that interval gives two different results the element is computed again in float64, in a fixed order; everywhere else
the fast result is proved right. So every route, compiled or numpy, gives the same bytes.
The bound: with |err(x*y)| and |err(x+y)| <= u = 2^-24 times the result (u the unit roundoff of float32), a sum of R products of
factors each rounded once is within (R + 4) u sum|up||down| of the true one (Higham, "Accuracy and Stability of Numerical
Algorithms", section 3.1), and sum|up||down| <= ||up_row|| ||down_column||.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from upparam.operations.merge.rounding import NO_INFINITY, largest, narrow, widen
from upparam.tensors import DType

TILE_ELEMENTS = 1 << 18
"""Elements of a tile: 1 MiB as float32, so that a tile and its companions stay in the second-level cache."""
NUMPY_TILE = 1 << 16
"""Elements of a block that numpy works on in one go: with its companions it stays in the second-level cache."""
NUMPY_CHUNK = 32
"""Ranks that numpy sums in one product: short sums have smaller errors, so that fewer elements are uncertain."""
_UNIT = 2.0**-24
_TINY = 1e-37
"""Absolute slack for products that underflow float32, and what makes every zero sum doubtful (its sign is decided in float64)."""
_KINDS = {"bfloat16": 0, "float16": 1, "float32": 2}
"""Dtypes the compiled kernel knows, by its numbers for them."""
_UP = 1 + 2.0**-16
"""What norms are multiplied by, so that they are never too small."""


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


Form = TypeVar("Form")


class Packed(NamedTuple):
    """The factors as the compiled kernel takes them: `down` in panels, and how far a sum may be from the true one."""

    up: NDArray[Any]
    panels: NDArray[Any]
    downs: NDArray[Any]
    """`down` as (columns, R padded to a multiple of 8), in float64 where float32 does not hold its values."""
    row_bound: NDArray[np.float32]
    panel_norm: NDArray[np.float32]


class LowRank:
    """up (rows, R) with every scale in it, down (R, columns), for a range of rows of one stored weight; all that a tile needs.

    Whether the factors are finite is the caller's to check. Other forms of the factors are made when a route first asks for them.
    """

    def __init__(self, up: NDArray[np.float64], down: NDArray[np.float64]) -> None:
        self.up64 = np.ascontiguousarray(up)
        self.down64 = np.ascontiguousarray(down)
        self._kept: dict[str, Any] = {}
        self._lock = threading.RLock()  # some forms are made from others

    @property
    def row_bound(self) -> NDArray[np.float64]:
        """How far a float32 sum of R products may be from the true one, for each row per unit of column norm.

        Sums of NUMPY_CHUNK products each, in whatever order, that are then added one to the other.
        """
        rank = self.up64.shape[1]
        rounded = (not self._single(self.up, self.up64)) + (not self._single(self.down, self.down64))
        depth = min(rank, NUMPY_CHUNK) + -(-rank // NUMPY_CHUNK) + rounded
        return self._keep("bound", lambda: self._row_norm(np.ones(rank)) * (depth * _UNIT * _UP) + _TINY)

    @staticmethod
    def _single(narrow: NDArray[np.float32], wide: NDArray[np.float64]) -> bool:
        """True when float32 holds every value."""
        return bool((narrow == wide).all())

    @property
    def column_norm(self) -> NDArray[np.float64]:
        """The norm of each column of down, rounded upward."""
        return self._keep("norm", lambda: np.sqrt(np.einsum("rj,rj->j", self.down64, self.down64)) * _UP)

    @property
    def widest(self) -> float:
        """The largest of the column norms."""
        return self._keep("widest", lambda: float(self.column_norm.max(initial=0.0)))

    @property
    def up(self) -> NDArray[np.float32]:
        """up in float32."""
        return self._keep("up", lambda: self.up64.astype(np.float32))

    @property
    def down(self) -> NDArray[np.float32]:
        """down in float32."""
        return self._keep("down", lambda: self.down64.astype(np.float32))

    def _row_norm(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """sqrt(sum_k weights[k] up[i, k]^2) of each row, rounded upward by a factor that also covers its own rounding."""
        norm: NDArray[np.float64] = np.sqrt((self.up64 * self.up64) @ weights) * _UP
        return norm

    def packed(self, route: Route, kind: int) -> Packed:
        """The factors for the compiled kernel.

        It sums CHUNK ranks at a time and then those sums. The product of rank k takes part in the rest of its chunk's additions and in those
        of the chunks from its own on; it is rounded itself where the instruction set has no fused multiply-add, and so are the factors that
        float32 does not hold: weights[k] roundings. So the sum is within u sum_k weights[k] |up_k| |down_k| of the true one (Higham, as
        above), and that is at most u times the product of the two norms weighted by them.
        """
        return self._keep(f"packed {route.name} {kind}", lambda: self._pack(route, kind))

    def _pack(self, route: Route, kind: int) -> Packed:
        tile, single = route.module, kind == _KINDS["float32"]
        rank, columns = self.down64.shape
        same = self._single(self.down, self.down64)
        rounded = 1.0 if single else float((not same) + (not self._single(self.up, self.up64)) + (route.name == "portable"))
        ranks, chunk = np.arange(rank), tile.CHUNK
        starts = ranks // chunk * chunk
        weights = np.minimum(chunk, rank - starts) - (ranks - starts) + (-(-rank // chunk) - ranks // chunk) + rounded
        width = route.lanes if single else 2 * route.lanes
        count = -(-columns // width)
        panels = aligned(count * rank * width, np.float64 if single else np.float32)
        downs = np.empty((columns, rank + -rank % 8), np.float32 if same else np.float64)
        norms = np.empty(count, np.float32)
        split = kind == _KINDS["bfloat16"]
        tile.pack(self.down64, rank, columns, width, split, weights, panels, single, downs, not same, norms)
        bound = self._row_norm(weights) * (_UNIT * (1 + 2 * _UNIT * float(weights.max(initial=0.0)))) + _TINY
        return Packed(self.up64 if single else self.up, panels, downs, bound.astype(np.float32), norms)

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

    def _keep(self, name: str, make: Callable[[], Form]) -> Form:
        """A form of the factors, made once: two threads that both want it do not both make it."""
        if name not in self._kept:
            with self._lock:
                if name not in self._kept:
                    self._kept[name] = make()
        found: Form = self._kept[name]
        return found


class Scratch:
    """One thread's buffers, made once and used for every tile, and the route its tiles take."""

    def __init__(self, widest: int, route: Route | None = None) -> None:
        """`widest`: elements of the longest row."""
        self.route = route or best_route()
        if self.route.module is None:
            elements = max(NUMPY_TILE, widest)
            self.weight = aligned(elements, np.float32)
            self.delta = aligned(elements, np.float32)
            self.part = aligned(elements, np.float32)
            self.code = aligned(elements, np.uint16)
            self.sign = aligned(elements, np.uint16)
            self.near = aligned(elements, np.bool_)
            self.small = aligned(elements, np.bool_)


def add_low_rank(
    stored: NDArray[Any], dtype: DType, factors: LowRank, start: int, scratch: Scratch, *, exact: bool = True
) -> tuple[int, int]:
    """Change `stored` (rows, columns) in place: round(W + up @ down), the rows being [start, start + rows) of `factors`.

    Returns (elements whose bits changed, elements that became infinite). `exact=False` leaves out the float64 check of near-ties.
    """
    if scratch.route.module is not None and dtype.name in _KINDS:
        return _add_compiled(stored, dtype, factors, start, scratch, exact)
    if scratch.route.module is None and dtype.name in _DROPPED and stored.size:
        return _add_in_float32(stored, dtype, factors, start, scratch, exact)
    return _add_in_float64(stored, dtype, factors, start)


def _add_compiled(stored: NDArray[Any], dtype: DType, factors: LowRank, start: int, scratch: Scratch, exact: bool) -> tuple[int, int]:
    route, kind = scratch.route, _KINDS[dtype.name]
    rows, columns = stored.shape
    form, part = factors.packed(route, kind), slice(start, start + rows)
    changed: int
    infinite: int
    changed, infinite = route.module.merge_tile(
        stored.view(np.uint32 if kind == _KINDS["float32"] else np.uint16), rows, columns, form.up[part], factors.up64[part], form.panels, form.downs,
        form.up.shape[1], form.row_bound[part], form.panel_norm, kind, form.downs.dtype == np.float64, exact, route.number,
    )  # fmt: skip
    return changed, infinite


def _add_in_float32(stored: NDArray[Any], dtype: DType, factors: LowRank, start: int, scratch: Scratch, exact: bool) -> tuple[int, int]:
    """Through numpy: in blocks of rows that stay in the cache, what is near a tie being decided once for the whole tile."""
    changed = infinite = 0
    kept: list[Near] = []
    columns = stored.shape[1]
    step = max(1, NUMPY_TILE // max(1, columns))
    bound = float(factors.row_bound[start : start + len(stored)].max(initial=0.0)) * factors.widest + _TINY
    for at in range(0, len(stored), step):
        block = stored[at : at + step]
        with np.errstate(over="ignore", invalid="ignore"):
            found = _block(block, dtype, factors, start + at, scratch, bound)
        if found is None:
            more, over = _add_in_float64(block, dtype, factors, start + at)
            infinite += over
        else:
            more, near = found
            kept.append(near._replace(places=near.places + at * columns))
        changed += more
    if kept:
        near = Near(*(np.concatenate(parts) for parts in zip(*kept, strict=True)))
        changed += _decide(stored, dtype, factors, start, bound if exact else None, near)
    return changed, infinite


_ORDINARY = {"bfloat16": 1e36, "float16": 4e9}
"""Squared norms below which no element of a block is near what its dtype cannot hold."""
_CERTAIN = {"bfloat16": 2.0**-9, "float16": 2.0**-12}
"""The bound times the rank, in units of the weights' root mean square, above which float64 throughout costs less."""


class Near(NamedTuple):
    """Elements near a tie: flat places, their float32 sums and their codes before."""

    places: NDArray[np.intp]
    sums: NDArray[np.float32]
    before: NDArray[np.uint16]


def _block(stored: NDArray[Any], dtype: DType, factors: LowRank, start: int, scratch: Scratch, bound: float) -> tuple[int, Near] | None:
    """Round one block in place: elements changed, and those whose rounding is still to be decided.

    None, and nothing changed, where float64 is the way: something is large, infinite or NaN, or too much would be uncertain.
    """
    shape, size = stored.shape, stored.size
    sums, delta, code, marked = (room[:size].reshape(shape) for room in (scratch.weight, scratch.delta, scratch.code, scratch.near))
    codes = stored.view(np.uint16)
    _widened(codes, dtype, sums)
    up, down = factors.up[start : start + len(stored)], factors.down
    np.matmul(up[:, :NUMPY_CHUNK], down[:NUMPY_CHUNK], out=delta)
    for first in range(NUMPY_CHUNK, len(down), NUMPY_CHUNK):
        delta += np.matmul(up[:, first : first + NUMPY_CHUNK], down[first : first + NUMPY_CHUNK], out=scratch.part[:size].reshape(shape))
    sums += delta
    square = float(np.vdot(sums, sums))
    if not square < _ORDINARY[dtype.name] or not np.isfinite(bound):
        return None
    if bound * len(down) > _CERTAIN[dtype.name] * math.sqrt(square / size):
        return None  # so many would be uncertain that float64 throughout costs less
    _round_and_mark(sums, dtype, bound, scratch)
    places = np.flatnonzero(marked)
    values = sums.reshape(-1)[places]
    near = Near(places, values, codes.reshape(-1)[places])
    np.not_equal(codes, code, out=marked)
    codes[...] = code
    return int(np.count_nonzero(marked)), near


def _widened(codes: NDArray[np.uint16], dtype: DType, values: NDArray[np.float32]) -> None:
    """16-bit codes as float32. Infinite and NaN float16 come out as 65536 and more."""
    if dtype.name == "bfloat16":
        values[...] = codes.view(dtype.numpy)
        return
    bits = values.view(np.int32)
    np.left_shift(codes.view(np.int16), 13, out=bits, dtype=np.int32)  # the sign runs along the top three bits
    bits &= np.int32(-0x70002000)
    values *= np.float32(2.0**112)


_DROPPED = {"bfloat16": (16, 0), "float16": (13, 112 << 23)}
"""The bits of a float32 that rounding takes away, and what the exponent's bias is less by."""


def _round_and_mark(sums: NDArray[np.float32], dtype: DType, bound: float, scratch: Scratch) -> None:
    """Fill `scratch.code` with the sums rounded and `scratch.near` with where that is not certain; spends the other float buffers.

    As the compiled kernel does it: each true sum is within `bound` of the one here, and an element is certain where both ends of that
    interval, moved outward by 4 units in the last place of float32 for the rounding of the sum and of the ends, round alike. No tie lies
    between such ends, so ties may be rounded as is cheapest. An end beyond zero carries a sign bit and never agrees.
    """
    shape, size = sums.shape, sums.size
    dropped, less = _DROPPED[dtype.name]
    high, low = (room[:size].reshape(shape) for room in (scratch.delta, scratch.part))
    code, sign, near = (room[:size].reshape(shape) for room in (scratch.code, scratch.sign, scratch.near))
    half = 1 << (dropped - 1)
    np.abs(sums, out=high)
    np.subtract(high, np.float32(bound), out=low)
    high += np.float32(bound)
    bits = high.view(np.uint32)
    if less:  # below the normal numbers of the type more bits are taken away
        np.less(bits, np.float32(2.0**-14).view(np.uint32), out=scratch.small[:size].reshape(shape))
    for end, outward in ((bits, 4), (low.view(np.uint32), -4)):
        end += np.uint32((half + outward - less) % 2**32)
        end >>= np.uint32(dropped)
    np.not_equal(bits, low.view(np.uint32), out=near)
    if less:
        near |= scratch.small[:size].reshape(shape)
    code[...] = bits
    np.right_shift(sums.view(np.uint32), np.uint32(16), out=sign, casting="unsafe")
    sign &= np.uint16(0x8000)
    code |= sign


def _decide(stored: NDArray[Any], dtype: DType, factors: LowRank, start: int, bound: float | None, near: Near) -> int:
    """Round what is near a tie, the uncertain in float64 (without a bound: all as float32 has it). Returns how many more now differ."""
    flat = stored.view(np.uint16).reshape(-1)
    changed = -int(np.count_nonzero(flat[near.places] != near.before))
    if bound is None:
        result = near.sums.astype(dtype.numpy).view(np.uint16)
    else:
        result = _certain(stored.shape[1], dtype, factors, start, bound, near)
    flat[near.places] = result
    return changed + int(np.count_nonzero(result != near.before))


def _certain(columns: int, dtype: DType, factors: LowRank, start: int, bound: float, near: Near) -> NDArray[np.uint16]:
    with np.errstate(over="ignore", invalid="ignore"):
        reach = np.abs(near.sums) * np.float32(2.0**-22)
        low, result = _ends(near.sums, reach + np.float32(bound), dtype)
        some = np.flatnonzero(low != result)
        # those once more, with the bounds of their own row and column
        row, column = np.divmod(near.places[some], columns)
        own = factors.row_bound[start + row] * factors.column_norm[column] * _UP + _TINY
        low, high = _ends(near.sums[some], reach[some] + own.astype(np.float32), dtype)
    result[some] = high
    uncertain = some[low != high]
    if uncertain.size:
        old = near.before[uncertain].view(dtype.numpy)
        result[uncertain] = _settled(old, dtype, factors, start, near.places[uncertain], columns).view(np.uint16)
    return result


def _ends(values: NDArray[np.float32], reach: NDArray[np.float32], dtype: DType) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    """Both ends of the interval around each value, rounded."""
    return (values - reach).astype(dtype.numpy).view(np.uint16), (values + reach).astype(dtype.numpy).view(np.uint16)


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
        with np.errstate(invalid="ignore", over="ignore"):  # Inf and NaN of the base
            part = stored[at : at + step]
            first = start + at
            true = factors.up64[first : first + len(part)] @ factors.down64
            true += widen(part)
            bound = factors.row_bound[first : first + len(part), None] * (2.0**-28 * factors.widest)
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
