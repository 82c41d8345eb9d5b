"""Fused projections: cut the delta of a stacked weight into those of its parts, join parts into one, reorder rows. Exact by construction.

Nothing is computed when the parts share their down factor: `up` is cut and stacked as views of the stored bytes.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import isclose, prod
from typing import TYPE_CHECKING, Any

from upparam import ways
from upparam.algorithms import TITLES, called
from upparam.algorithms.base import BAKED, Delta, FactorChange, ScaleRule, Scaling, Update
from upparam.algorithms.lora import LoRA
from upparam.errors import Problem, RefusedError
from upparam.sources import ComputedSource
from upparam.tensors import Tensor, lies_as_wanted, same_bits

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class _RowsUpdate(Update):
    """A range of rows of another update."""

    def __init__(self, whole: Update, start: int, stop: int) -> None:
        self.whole, self.start, self.scale = whole, start, whole.scale
        self.shape = (stop - start, *whole.shape[1:])

    def rows(self, start: int, stop: int) -> NDArray[np.float64]:
        """Rows [start, stop) of the range."""
        return self.whole.rows(self.start + start, self.start + stop)


@dataclass(frozen=True)
class RowSlice(Delta):
    """Rows [start, stop) of a delta whose factors cannot be cut (a Kronecker product across a fused qkv, for example).

    It computes what those rows are; only a dialect that stacks the parts again can write it, by `join`.
    """

    whole: Delta
    start: int
    stop: int
    scaling: Scaling = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "scaling", self.whole.scaling)
        object.__setattr__(self, "algorithm", self.whole.algorithm)
        object.__setattr__(self, "additive", self.whole.additive)

    @property
    def shape(self) -> tuple[int, ...]:
        """(stop - start, in, *kernel)."""
        return (self.stop - self.start, *self.whole.shape[1:])

    @property
    def rank(self) -> int | None:
        """That of the whole delta."""
        return self.whole.rank

    @property
    def scale(self) -> float | None:
        """That of the whole delta."""
        return self.whole.scale

    def factors(self) -> Mapping[str, Tensor]:
        """The factors of the whole delta."""
        return self.whole.factors()

    def on_factor(self, change: FactorChange) -> RowSlice:
        """The same rows of the whole delta with one factor changed. Parts of one whole are no longer of one then, and cannot be joined."""
        return RowSlice(self.whole.on_factor(change), self.start, self.stop)

    def load(self) -> Update:
        """Factors in memory. Raises RefusedError when the rows alone do not say how the weight changes."""
        if not self.whole.additive:
            raise RefusedError(
                f"{called(self.whole.algorithm)} over a fused weight cannot be applied to a part of it alone",
                remedy="merge into a base that holds the fused weight",
            )
        return _RowsUpdate(self.whole.load(), self.start, self.stop)


def cut(delta: Delta, start: int, stop: int) -> Delta:
    """The delta of output rows [start, stop) alone."""
    if (start, stop) == (0, delta.shape[0]):
        return delta
    if type(delta) is LoRA:
        return replace(delta, up=delta.up.rows(start, stop))
    own: Delta | None = getattr(delta, "cut_rows", lambda *_: None)(start, stop)
    return own if own is not None else RowSlice(delta, start, stop)


def join(parts: Sequence[Delta | int]) -> Delta:
    """The delta of the weight that stacks these parts; a whole number stands for that many rows that do not change.

    Parts that share their down factor are stacked; others become one block-diagonal LoRA whose rank is the sum of theirs. Raises
    RefusedError where the parts cannot be joined exactly.
    """
    deltas = [part for part in parts if not isinstance(part, int)]
    if len(parts) == 1:
        return deltas[0]
    slices = [part for part in deltas if isinstance(part, RowSlice)]
    if slices:
        return _rejoined(slices, parts)
    if all(type(part) is LoRA for part in deltas):
        return _join_lora([part if isinstance(part, (LoRA, int)) else 0 for part in parts])
    joined: Delta | None = None
    if len(deltas) == len(parts) and len({type(part) for part in deltas}) == 1:
        joined = getattr(deltas[0], "join_rows", lambda *_: None)(deltas[1:])
    if joined is None:
        kinds = ", ".join(sorted({TITLES.get(part.algorithm, part.algorithm) for part in deltas}))
        raise RefusedError(
            f"{kinds} deltas of parts cannot be joined into one of the fused weight",
            found="some parts are not changed" if len(deltas) < len(parts) else None,
            remedy="approximate by plain LoRA with --lowrank",
        )
    return joined


def unjoin(delta: Delta, spans: Sequence[tuple[int, int]], told: Any) -> list[Delta | None] | None:
    """The parts a joined LoRA or DoRA was made of, with their own ranks; None when `told` is not of that form or the factors do not bear it out.

    `told` says per row span None (its rows are zeros) or [first column, last column, alpha]; every other column of those rows must be
    zero, and alpha must give the scale of the whole.
    """
    if type(delta) is not LoRA:
        own: list[Delta | None] | None = getattr(delta, "unjoin_rows", lambda *_: None)(spans, told)
        return own
    if delta.mid is not None or not isinstance(told, list) or len(told) != len(spans):
        return None
    up = delta.up.read()
    found: list[Delta | None] = []
    for (start, stop), how in zip(spans, told, strict=True):
        rows = up[start:stop]
        if how is None:
            if rows.any():
                return None
            found.append(None)
            continue
        part = _part(delta, rows, start, stop, how)
        if part is None:
            return None
        found.append(part)
    return found


def _part(delta: LoRA, rows: NDArray[Any], start: int, stop: int, how: Any) -> LoRA | None:
    if not isinstance(how, list) or len(how) != 3:
        return None
    low, high, alpha = how
    if (
        type(low) is not int
        or type(high) is not int
        or not 0 <= low < high <= delta.rank
        or not isinstance(alpha, (int, float, type(None)))
    ):
        return None
    if rows[:, :low].any() or rows[:, high:].any():
        return None
    scaling = Scaling(ScaleRule.ALPHA_OVER_RANK, None if alpha is None else float(alpha))
    scale, whole = scaling.value(high - low), delta.scale
    if scale is None or whole is None or not isclose(scale, whole, rel_tol=1e-12):
        return None
    up = delta.up.rows(start, stop).reshape((stop - start, delta.rank)).columns(low, high)
    return LoRA(up.reshape((stop - start, high - low, *delta.up.shape[2:])), delta.down.rows(low, high), scaling, embedding=delta.embedding)


def reorder(delta: Delta, rows: Sequence[int] | NDArray[Any]) -> Delta:
    """The delta of the weight whose row i is this one's row `rows[i]`."""
    if type(delta) is LoRA:
        return replace(delta, up=take_rows(delta.up, rows))
    own: Delta | None = getattr(delta, "take_rows", lambda *_: None)(rows)
    if own is None:
        raise RefusedError(f"the rows of {called(delta.algorithm)} delta cannot be rearranged without computing it")
    return own


def whole_blocks(rows: Sequence[int] | NDArray[Any], size: int) -> list[int] | None:
    """The blocks of `size` rows that these rows are, in their order; None where they are no whole blocks with their rows in order."""
    index = [int(row) for row in rows]
    starts = index[::size]
    whole = len(index) % size == 0 and all(start % size == 0 for start in starts)
    if not whole or any(index[at] != starts[at // size] + at % size for at in range(len(index))):
        return None
    return [start // size for start in starts]


def take_rows(tensor: Tensor, rows: Sequence[int] | NDArray[Any]) -> Tensor:
    """The tensor whose row i is `tensor`'s row `rows[i]`: stacked views where few runs suffice, else put together when read."""
    runs, order = _runs(tuple(map(int, rows)))
    if len(runs) <= _FEW:
        return stack([tensor.rows(low, high) for low, high in runs])
    shape = (len(order), *tensor.shape[1:])
    return Tensor(tensor.dtype, shape, _Picked(tensor, order, prod(shape) * tensor.dtype.itemsize))


_FEW = 4
"""Runs of rows that are views laid one after the other."""


@lru_cache(maxsize=16)
def _runs(rows: tuple[int, ...]) -> tuple[list[tuple[int, int]], array[int]]:
    """(first row and the one behind the last of each run of rows that follow each other, at most one run too many; all rows).

    Kept: every layer of a model has its rows in one of a few orders.
    """
    runs: list[tuple[int, int]] = []
    for row in rows:
        if runs and runs[-1][1] == row:
            runs[-1] = (runs[-1][0], row + 1)
        elif len(runs) > _FEW:
            break
        else:
            runs.append((row, row + 1))
    return runs, array("I", rows)


class _Picked(ComputedSource):
    """Rows of a tensor in an order of their own."""

    def __init__(self, tensor: Tensor, order: array[int], size: int) -> None:
        super().__init__(size, lambda: tensor.read()[order].tobytes(), tensor.source.name)
        self._tensor, self._order = tensor, order

    def way(self, offset: int, size: int) -> ways.Way | None:
        """The way to all rows, where the tensor lies in a file; none to some of them."""
        tensor = self._tensor
        if (offset, size) != (0, self.size) or not lies_as_wanted(tensor) or self._order.itemsize != ways.NUMBER:
            return None
        own = ways.spans_of(tensor.way())
        if own is None or len(own) != 1 or not tensor.nbytes:
            return None
        descriptor, at, _ = own[0]
        return ways.picked(descriptor, at, tensor.shape[0], tensor.nbytes // tensor.shape[0], self._order)


def stack(parts: Sequence[Tensor]) -> Tensor:
    """Tensors joined along the first axis; neighbouring views of one contiguous tensor become one view again."""
    merged: list[Tensor] = []
    for part in parts:
        last = merged[-1] if merged else None
        if last is not None and _follows(last, part):
            merged[-1] = replace(last, shape=(last.shape[0] + part.shape[0], *last.shape[1:]))
        else:
            merged.append(part)
    return merged[0] if len(merged) == 1 else Tensor.stack(merged)


def _follows(one: Tensor, other: Tensor) -> bool:
    return (
        one.source is other.source
        and (one.dtype, one.shape[1:], one.big_endian) == (other.dtype, other.shape[1:], other.big_endian)
        and one.is_contiguous
        and other.is_contiguous
        and one.offset + one.nbytes == other.offset
    )


def same_tensor(one: Tensor, other: Tensor) -> bool:
    """True when both are the same view of the same bytes, or hold the same bits."""
    view = (one.source is other.source, one.offset == other.offset, one.strides == other.strides, one.dtype == other.dtype)
    return (all(view) and one.shape == other.shape) or same_bits(one, other)


def _rejoined(slices: Sequence[RowSlice], parts: Sequence[Delta | int]) -> Delta:
    whole = slices[0].whole
    at = 0
    for part in parts:
        if not isinstance(part, RowSlice) or part.whole is not whole or part.start != at:
            raise RefusedError(
                f"parts of {called(whole.algorithm)} over a fused weight cannot be written apart from each other",
                remedy="approximate by plain LoRA with --lowrank",
            )
        at = part.stop
    if at != whole.shape[0]:
        raise RefusedError(f"only a part of {called(whole.algorithm)} over a fused weight is here", expected=whole.shape[0], found=at)
    return whole


def _join_lora(parts: Sequence[LoRA | int]) -> LoRA:
    deltas = [part for part in parts if isinstance(part, LoRA)]
    first = deltas[0]
    alike = all(_same_down(first, part) for part in deltas[1:])
    if alike:
        ups = [part.up if isinstance(part, LoRA) else _zeros(first.up, part) for part in parts]
        return replace(first, up=stack(ups))
    if any(part.mid is not None for part in deltas):
        raise RefusedError("LoRAs with different Tucker cores cannot be joined into one of the fused weight")
    return _block_diagonal(parts, deltas)


def _same_down(one: LoRA, other: LoRA) -> bool:
    if one.scaling != other.scaling or one.up.dtype != other.up.dtype or one.embedding != other.embedding:
        return False
    if (one.mid is None) != (other.mid is None) or not same_tensor(one.down, other.down):
        return False
    return one.mid is None or other.mid is None or same_tensor(one.mid, other.mid)


def _zeros(like: Tensor, rows: int) -> Tensor:
    import numpy as np

    shape = (rows, *like.shape[1:])
    return Tensor.computed(like.dtype, shape, lambda: np.zeros(shape, like.dtype.numpy), "zeros")


def one_scale(parts: Sequence[Delta]) -> float:
    """The scale that all these parts have. Raises RefusedError where they differ or one is not known."""
    scales = [part.known_scale() for part in parts]
    if not all(isclose(scale, scales[0], rel_tol=1e-12) for scale in scales):
        raise RefusedError(
            "parts of a fused weight with different scales cannot be joined without arithmetic",
            found=", ".join(f"{scale:g}" for scale in scales),
            remedy="put the scales into the factors with --bake-scale",
            problems=[Problem("scales", "differ from part to part", cure="--bake-scale")],
        )
    return scales[0]


def _block_diagonal(parts: Sequence[LoRA | int], deltas: Sequence[LoRA]) -> LoRA:
    """One LoRA of rank r1 + r2 + ...: downs on top of each other, each up in its own columns.

    Its scale must be every part's: alpha is scaled with the rank, exactly where alpha / rank is. Raises RefusedError when scales or dtypes differ.
    """
    import numpy as np

    scale = one_scale(deltas)
    dtypes = {part.up.dtype for part in deltas} | {part.down.dtype for part in deltas}
    if len(dtypes) > 1:
        raise RefusedError("parts of a fused weight with different dtypes cannot be joined", found=", ".join(sorted(map(str, dtypes))))
    rank = sum(part.rank for part in deltas)
    dtype = deltas[0].up.dtype
    rows = sum(part if isinstance(part, int) else part.up.shape[0] for part in parts)
    shape = (rows, rank, *deltas[0].up.shape[2:])

    def up() -> NDArray[Any]:
        whole = np.zeros(shape, dtype.numpy)
        row = column = 0
        for part in parts:
            if isinstance(part, int):
                row += part
                continue
            whole[row : row + part.up.shape[0], column : column + part.rank] = part.up.read()
            row, column = row + part.up.shape[0], column + part.rank
        return whole

    scaling = Scaling(ScaleRule.ALPHA_OVER_RANK, alpha=scale * rank) if deltas[0].scaling != BAKED else BAKED
    return LoRA(Tensor.computed(dtype, shape, up), stack([part.down for part in deltas]), scaling)
