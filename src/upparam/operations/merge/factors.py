"""The factors of a low-rank change in the forms that the routes of the kernel take, and how far their float32 sums can be off.

With |err(x*y)| and |err(x+y)| <= u = 2^-24 times the result (u the unit roundoff of float32), a product that takes part in n rounded
operations on its way into a sum is off by at most (about) n u of itself (Higham, "Accuracy and Stability of Numerical Algorithms", section
3.1); and sum_k |up_k| |down_k| <= ||up_row|| ||down_column||, also where both are weighted.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from upparam.operations.merge.kernel import Route

NUMPY_CHUNK = 32
"""Ranks that numpy sums in one product: short sums have smaller errors, so that fewer elements are uncertain."""
UNIT = 2.0**-24
TINY = 1e-37
"""Absolute slack for products that underflow float32, and what makes every zero sum doubtful (its sign is decided in float64)."""
KINDS = {"bfloat16": 0, "float16": 1, "float32": 2}
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
        return self.kept("bound", self._row_bound)

    def _row_bound(self) -> NDArray[np.float64]:
        rounded = (not self._single(self.up, self.up64)) + (not self._single(self.down, self.down64))
        depth = min(self.rank, NUMPY_CHUNK) + -(-self.rank // NUMPY_CHUNK) + rounded
        bound: NDArray[np.float64] = self.row_norm * (depth * UNIT * UP) + TINY
        return bound

    @property
    def rank(self) -> int:
        """R."""
        return int(self.up64.shape[1])

    @property
    def row_norm(self) -> NDArray[np.float64]:
        """The norm of each row of up, rounded upward."""
        return self.kept("row", lambda: self._weighted(np.ones(self.rank)))

    @staticmethod
    def _single(narrow: NDArray[np.float32], wide: NDArray[np.float64]) -> bool:
        """True when float32 holds every value."""
        return bool((narrow == wide).all())

    @property
    def column_norm(self) -> NDArray[np.float64]:
        """The norm of each column of down, rounded upward."""
        return self.kept("norm", lambda: np.sqrt(np.einsum("rj,rj->j", self.down64, self.down64)) * UP)

    @property
    def widest(self) -> float:
        """The largest of the column norms."""
        return self.kept("widest", lambda: float(self.column_norm.max(initial=0.0)))

    @property
    def up(self) -> NDArray[np.float32]:
        """up in float32."""
        return self.kept("up", lambda: self.up64.astype(np.float32))

    @property
    def down(self) -> NDArray[np.float32]:
        """down in float32."""
        return self.kept("down", lambda: self.down64.astype(np.float32))

    def _weighted(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """sqrt(sum_k weights[k] up[i, k]^2) of each row, rounded upward by a factor that also covers its own rounding."""
        norm: NDArray[np.float64] = np.sqrt((self.up64 * self.up64) @ weights) * UP
        return norm

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
        split = kind == KINDS["bfloat16"]
        tile.pack(self.down64, rank, columns, width, split, weights, panels, single, downs, not same, norms)
        bound = self._weighted(weights) * (UNIT * (1 + 2 * UNIT * float(weights.max(initial=0.0)))) + TINY
        return Packed(self.up64 if single else self.up, panels, downs, bound.astype(np.float32), norms)

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
