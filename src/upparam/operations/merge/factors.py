"""The factors of a low-rank change in the forms that the routes of the kernel take, and how far their float32 sums can be off.

With |err(x*y)| and |err(x+y)| <= u = 2^-24 times the result (u the unit roundoff of float32), a product that takes part in n rounded
operations on its way into a sum is off by at most (about) n u of itself (Higham, "Accuracy and Stability of Numerical Algorithms", section
3.1); and sum_k |up_k| |down_k| <= ||up_row|| ||down_column||, also where both are weighted.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from upparam.operations.merge.kernel import Route

UNIT = 2.0**-24
TINY = 1e-37
"""Absolute slack for products that underflow float32, and what makes every zero sum doubtful (its sign is decided in float64)."""
KINDS = {"bfloat16": 0, "float16": 1, "float32": 2, "float8_e4m3fn": 3, "float8_e5m2": 4}
"""Dtypes the compiled kernel knows, by its numbers for them."""
UP = 1 + 2.0**-16
"""What norms are multiplied by, so that they are never too small."""

Form = TypeVar("Form")


def aligned(count: int, dtype: Any) -> NDArray[Any]:
    """An uninitialised array whose first element lies on a cache line: vectors that straddle two lines cost twice."""
    size = count * np.dtype(dtype).itemsize
    room = np.empty(size + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + size].view(dtype)


class Packed(NamedTuple):
    """The factors as the compiled kernel takes them: `down` in panels, and how far a sum may be from the true one."""

    up: NDArray[Any]
    """(rows, R padded with zeros to a multiple of 8)."""
    panels: NDArray[Any]
    up64: NDArray[np.float64] | None
    """`up` in float64 where float32 does not hold its values."""
    downs: NDArray[Any]
    """`down` as (columns, R padded as above), in float64 where float32 does not hold its values."""
    row_bound: NDArray[np.float32]
    panel_norm: NDArray[np.float32]


class Part(NamedTuple):
    """factor * up (rows, r) @ down (r, columns), the factors in float32 or float64."""

    up: NDArray[Any]
    down: NDArray[Any]
    factor: float = 1.0


def _plain(matrix: NDArray[Any]) -> NDArray[Any]:
    """The matrix in C order, in float64 where it is not in float32."""
    return np.ascontiguousarray(matrix, matrix.dtype if matrix.dtype == np.float32 else np.float64)


class LowRank:
    """The sum of `parts`, all of one shape, for a range of rows of one stored weight: up (rows, R) with every factor in it, down (R, columns).

    Whether all is finite is the caller's to check. Forms of the factors are made when a route first asks for them.
    """

    def __init__(self, up: NDArray[Any], down: NDArray[Any], factor: float = 1.0, beside: Sequence[Part] = ()) -> None:
        self.parts = [Part(_plain(part.up), _plain(part.down), float(part.factor)) for part in (Part(up, down, factor), *beside)]
        self.rank = sum(len(part.down) for part in self.parts)
        """R."""
        self._kept: dict[str, Any] = {}
        self._lock = threading.RLock()  # some forms are made from others

    @property
    def up64(self) -> NDArray[np.float64]:
        """up in float64."""
        return self.kept(
            "up64", lambda: np.concatenate([np.multiply(part.up, part.factor, dtype=np.float64) for part in self.parts], axis=1)
        )

    @property
    def down64(self) -> NDArray[np.float64]:
        """down in float64."""
        return self.kept("down64", lambda: np.concatenate([part.down for part in self.parts], dtype=np.float64))

    @property
    def row_norm(self) -> NDArray[np.float64]:
        """The norm of each row of up, rounded upward."""
        return self.kept("row", lambda: np.sqrt((self.up64 * self.up64) @ np.ones(self.rank)) * UP)

    @property
    def column_norm(self) -> NDArray[np.float64]:
        """The norm of each column of down, rounded upward."""
        return self.kept("norm", lambda: np.sqrt(np.einsum("rj,rj->j", self.down64, self.down64)) * UP)

    @property
    def widest(self) -> float:
        """The largest of the column norms."""
        return self.kept("widest", lambda: float(self.column_norm.max(initial=0.0)))

    def packed(self, route: Route, kind: int) -> Packed:
        """The factors for the compiled kernel.

        It sums CHUNK ranks at a time and then those sums. The product of rank k takes part in the rest of its chunk's additions and in those
        of the chunks from its own on; it is rounded itself where the instruction set has no fused multiply-add, and so are the factors that
        float32 does not hold: weights[k] roundings. So the sum is within u sum_k weights[k] |up_k| |down_k| of the true one (Higham, as
        above), and that is at most u times the product of the two norms weighted by them.
        """
        return self.kept(f"packed {route.name} {kind}", lambda: self._pack(route, kind))

    def _pack(self, route: Route, kind: int) -> Packed:
        tile, single = route.module, kind == KINDS["float32"]
        ranks, rank, rows, columns = np.arange(self.rank), self.rank, len(self.parts[0].up), self.parts[0].down.shape[1]
        starts = ranks // tile.CHUNK * tile.CHUNK
        weights = (
            np.minimum(tile.CHUNK, rank - starts) - (ranks - starts) + (-(-rank // tile.CHUNK) - ranks // tile.CHUNK).astype(np.float64)
        )
        width = route.lanes if single else 2 * route.lanes
        count = -(-columns // width)
        padded = rank + -rank % 8
        up = aligned(rows * padded, np.float64 if single else np.float32).reshape(rows, padded)
        downs = aligned(columns * padded, up.dtype).reshape(columns, padded)
        up[:, rank:] = downs[:, rank:] = 0
        panels = aligned(count * rank * width, up.dtype)
        row_squares, column_squares = np.zeros((2, rows)), np.zeros((2, columns))
        same_up, same_down, at = True, True, 0
        for part in self.parts:
            held = tile.lay_up(part.up, *part.up.shape, part.factor, up, rank, at, kind, weights, row_squares, route.number)
            same_up = held and same_up
            held = tile.lay_down(part.down, *part.down.shape, 1.0, panels, rank, at, kind, weights, column_squares, route.number, downs)
            same_down = held and same_down
            at += len(part.down)
        rounded = 1.0 if single else float((not same_up) + (not same_down) + (route.name == "portable"))
        row_norm, column_norm = (np.sqrt(squares[0] + rounded * squares[1]) * UP for squares in (row_squares, column_squares))
        bound = row_norm * (UNIT * (1 + 2 * UNIT * (float(weights.max(initial=0.0)) + rounded))) + TINY
        norms = np.zeros(count * width, np.float32)
        norms[:columns] = column_norm
        return Packed(
            up, panels, None if same_up else self.ups, downs if same_down else self.downs, bound.astype(np.float32),
            norms.reshape(count, width).max(axis=1, initial=0.0),
        )  # fmt: skip

    @property
    def ups(self) -> NDArray[np.float64]:
        """up with its ranks padded to a multiple of 8, for `elements`."""
        return self.kept("ups", lambda: np.pad(self.up64, ((0, 0), (0, -self.rank % 8))))

    @property
    def downs(self) -> NDArray[np.float64]:
        """down as (columns, R), its ranks padded to a multiple of 8, for `elements`."""
        return self.kept("downs", lambda: np.ascontiguousarray(np.pad(self.down64, ((0, -len(self.down64) % 8), (0, 0))).T))

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

    def kept(self, name: str, make: Callable[[], Form]) -> Form:
        """A form of the factors, made once: two threads that both want it do not both make it."""
        if name not in self._kept:
            with self._lock:
                if name not in self._kept:
                    self._kept[name] = make()
        found: Form = self._kept[name]
        return found
