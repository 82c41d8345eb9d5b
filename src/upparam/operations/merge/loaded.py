"""One changed tensor with its deltas in memory: rows of the result, in the orientation the base stores."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import pairwise
from math import isfinite, prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upparam.algorithms.base import Update
from upparam.arrays import floats
from upparam.errors import MalformedError
from upparam.operations.merge.factors import LowRank, Part
from upparam.operations.merge.in_float64 import store, too_large
from upparam.operations.merge.kernel import Scratch, add_low_rank, convert_low_rank
from upparam.operations.merge.packing import decode, encode
from upparam.operations.merge.planned import Piece, Work
from upparam.operations.merge.rounding import narrow, widen
from upparam.tensors import Tensor

Rows = Callable[[int, int], NDArray[np.float64]]
"""(start, stop) -> those rows of a stored weight in float64, (stop - start, columns)."""


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """A tensor's shape as rows and columns: the first axis against all others."""
    return (shape[0] if shape else 1), prod(shape[1:])


class BaseRows:
    """Rows of a tensor where it lies: straight from the file when it is contiguous there, else from one copy in memory."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.count, self.columns = matrix_shape(tensor.shape)
        self.row_bytes = self.columns * tensor.dtype.itemsize
        direct = tensor.is_contiguous and not tensor.big_endian
        self._readinto = getattr(tensor.source, "readinto", None) if direct else None
        self._data = None if self._readinto else memoryview(tensor.raw())

    def readinto(self, start: int, buffer: memoryview) -> None:
        """Fill `buffer` (bytes of whole rows) from row `start`."""
        at = start * self.row_bytes
        if self._readinto is not None:
            self._readinto(self.tensor.offset + at, buffer)
        else:
            assert self._data is not None
            buffer[:] = self._data[at : at + len(buffer)]

    def stored(self, start: int, stop: int) -> NDArray[Any]:
        """Rows [start, stop) as stored, fresh and writable."""
        buffer = bytearray((stop - start) * self.row_bytes)
        self.readinto(start, memoryview(buffer))
        return np.frombuffer(buffer, self.tensor.dtype.numpy).reshape(stop - start, self.columns)

    def __call__(self, start: int, stop: int) -> NDArray[np.float64]:
        """Rows [start, stop) in float64."""
        return widen(self.stored(start, stop))


class PackedRows(BaseRows):
    """Rows of a quantised weight: `stored` gives bytes, calling gives values."""

    def __call__(self, start: int, stop: int) -> NDArray[np.float64]:
        """Rows [start, stop) in float64, decoded."""
        return decode(self.stored(start, stop))


class ScaledRows(BaseRows):
    """Rows of a scaled fp8 weight: the stored value times its scale, which is one number, one a row, or one a block."""

    def __init__(self, tensor: Tensor, scale: Tensor) -> None:
        super().__init__(tensor)
        grid: NDArray[Any] = widen(scale.read())
        grid = grid.reshape(1, 1) if grid.size == 1 else grid.reshape(len(grid), -1)
        self._grid = grid
        self._height, self._width = _block(self.count, grid.shape[0]), _block(self.columns, grid.shape[1])

    @property
    def by_row(self) -> NDArray[np.float64] | None:
        """The scale of each row as a column (rows, 1); None where it differs within rows, or is 0 or no number somewhere."""
        usable = self._grid.shape[1] == 1 and bool(np.isfinite(self._grid).all() and (self._grid != 0).all())
        return self.scales(0, self.count) if usable else None

    def scales(self, start: int, stop: int) -> NDArray[np.float64]:
        """The scale of every element of rows [start, stop), broadcastable to them."""
        rows = self._grid[np.arange(start, stop) // self._height]
        return rows if rows.shape[1] == 1 else np.repeat(rows, self._width, axis=1)[:, : self.columns]

    def __call__(self, start: int, stop: int) -> NDArray[np.float64]:
        """Rows [start, stop) in float64, scaled."""
        return super().__call__(start, stop) * self.scales(start, stop)


def rows_of(work: Work, tensor: Tensor) -> BaseRows:
    """Rows of a base tensor as its work says it is stored: plain, scaled fp8, or in blocks."""
    return PackedRows(tensor) if work.packing else BaseRows(tensor) if work.scale is None else ScaledRows(tensor, work.scale)


def _block(size: int, count: int) -> int:
    """Elements a block spans when `count` scales cover `size` elements: 128 (DeepSeek's, the last block may be partial), else an equal share.

    Raises MalformedError when neither fits.
    """
    if count == -(-size // 128) and count > 1:
        return 128
    if size % count:
        raise MalformedError("scales that do not cover the weight evenly", expected=f"a count that divides {size}", found=count)
    return size // count


class Loaded:
    """A work whose factors are in memory. Made when its first chunk begins, dropped after its last.

    Raises MalformedError when a factor holds NaN or Inf.
    """

    def __init__(self, work: Work) -> None:
        self.work = work
        # deltas on a replaced weight (an embedding saved beside its LoRA) change the saved one
        source = work.replacement if work.replacement is not None and work.pieces else work.tensor
        self.base = rows_of(work, source)
        self._before = None if source is work.tensor else rows_of(work, work.tensor)
        self.updates = [piece.delta.load() for piece in work.pieces]
        self.segments: list[tuple[int, int, LowRank | None]] | None = None
        self._chain: Rows | None = None
        if work.replacement is not None and not work.pieces:
            self._chain = BaseRows(work.replacement)
            return
        forms = [update.floats() if piece.delta.additive else None for piece, update in zip(work.pieces, self.updates, strict=True)]
        scales = self.base.by_row if isinstance(self.base, ScaledRows) else None
        if all(form is not None for form in forms) and (work.scale is None or scales is not None) and not work.packing:
            self.segments = self._cut([form for form in forms if form is not None], scales)
        else:
            self._chain = self._compose()

    def _cut(
        self, forms: list[tuple[NDArray[Any], NDArray[Any]]], scales: NDArray[np.float64] | None
    ) -> list[tuple[int, int, LowRank | None]]:
        """Row ranges of the stored weight with one pair of factors each: all deltas that reach them, side by side.

        What is stored times `scales` (rows, 1) is the weight, so what is added to it is divided by them.
        """
        rows, columns = self.base.count, self.base.columns
        laid: list[tuple[int, int, Part]] = []
        for piece, update, (up, down) in zip(self.work.pieces, self.updates, forms, strict=True):
            down = down.reshape(up.shape[1], -1)
            factor = update.scale * piece.multiplier
            if not (isfinite(_largest(up) * factor) and isfinite(_largest(down))):
                raise _not_finite(piece, update)
            start, stop = piece.rows or (0, columns if piece.transposed else rows)
            if piece.transposed:
                wide = np.zeros((up.shape[1], columns))
                wide[:, start:stop] = np.multiply(up, factor, dtype=np.float64).T
                up, down, factor, start, stop = down.T, wide, 1.0, 0, rows
            if scales is not None:
                up = up / scales[start:stop]
            laid.append((start, stop, Part(up, down, factor)))
        marks = sorted({0, rows, *(mark for start, stop, _ in laid for mark in (start, stop))})
        segments: list[tuple[int, int, LowRank | None]] = []
        for first, last in pairwise(marks):
            reach = [
                part._replace(up=part.up[first - start : last - start]) for start, stop, part in laid if start <= first and last <= stop
            ]
            segments.append((first, last, LowRank(*reach[0], beside=reach[1:]) if reach else None))
        return segments

    def _compose(self) -> Rows:
        """The changed rows through every delta's own W', in the order given, without rounding between them."""
        rows: Rows = self.base
        for piece, update in zip(self.work.pieces, self.updates, strict=True):
            rows = _transposed(rows, piece, update, self.base) if piece.transposed else _changed(rows, piece, update, self.base.count)
        return rows

    def true(self, start: int, stop: int) -> NDArray[np.float64]:
        """Rows [start, stop) of the result in float64, in units of what is stored, before rounding."""
        if self._chain is not None:
            result = self._chain(start, stop)
            return result / self.base.scales(start, stop) if isinstance(self.base, ScaledRows) else result
        assert self.segments is not None
        result = widen(self.base.stored(start, stop))
        for first, last, factors in self.segments:
            low, high = max(first, start), min(last, stop)
            if low < high and factors is not None:
                result[low - start : high - start] += factors.up64[low - first : high - first] @ factors.down64
        return result

    @property
    def through_kernel(self) -> bool:
        """True when tiles are sums W + up @ down that stay in their dtype: what the kernel, or a device, computes."""
        return self.segments is not None and not self.work.packing and self.work.dtype == self.base.tensor.dtype

    def change(self, stored: NDArray[Any], start: int, scratch: Scratch, exact: bool) -> tuple[NDArray[Any], int, int]:
        """Rows from `start` as stored in the base -> (the same rows as they are to be written, elements changed, elements now infinite).

        `stored` (rows, columns) is changed in place and returned when the dtype stays.
        """
        written, changed, infinite = self._change(stored, start, scratch, exact)
        if self._before is not None:  # counted against what the base holds, not against what takes its place
            plain = narrow(self._before(start, start + len(stored)), self.work.dtype)
            code = np.dtype(f"u{self.work.dtype.itemsize}")
            changed = int(np.count_nonzero(plain.view(code) != written.view(code)))
        return written, changed, infinite

    def _change(self, stored: NDArray[Any], start: int, scratch: Scratch, exact: bool) -> tuple[NDArray[Any], int, int]:
        dtype = self.work.dtype
        stop = start + len(stored)
        if isinstance(self._chain, BaseRows) and not dtype.is_float:  # a counter or the like of a saved module: its bits
            brought = self._chain.stored(start, stop)
            return brought, int(np.count_nonzero(brought != stored)), 0
        if self.work.packing:
            packed = encode(self.true(start, stop))
            return packed, int(np.count_nonzero(decode(packed) != decode(stored))), 0
        if dtype != self.base.tensor.dtype:
            return self._converted(stored, start, scratch)
        if self.segments is None:
            return stored, *store(stored, self.true(start, stop), dtype)
        changed = infinite = 0
        for first, last, factors in self.segments:
            low, high = max(first, start), min(last, stop)
            if low < high and factors is not None:
                more, over = add_low_rank(stored[low - start : high - start], dtype, factors, low - first, scratch, exact=exact)
                changed, infinite = changed + more, infinite + over
        return stored, changed, infinite

    def _converted(self, stored: NDArray[Any], start: int, scratch: Scratch) -> tuple[NDArray[Any], int, int]:
        """`change` where the result has another dtype than the base."""
        dtype, given = self.work.dtype, floats(stored)
        if self.segments is not None and given.dtype == np.float32 and np.isfinite(given).all():
            out = np.empty(stored.shape, dtype.numpy)
            found = [self._convert_segment(given, out, start, segment, scratch) for segment in self.segments]
            counts = [one for one in found if one is not None]
            if len(counts) == len(found):
                return out, sum(changed for changed, _ in counts), sum(infinite for _, infinite in counts)
        plain, true = narrow(given, dtype), self.true(start, start + len(stored))
        changed, _ = store(plain, true, dtype)
        return plain, changed, too_large(plain, stored, true, dtype)  # also where the base's own value is what is too large

    def _convert_segment(
        self, given: NDArray[np.float32], out: NDArray[Any], start: int, segment: tuple[int, int, LowRank | None], scratch: Scratch
    ) -> tuple[int, int] | None:
        """Elements changed and too large in the rows of one segment; None where the kernel does not convert."""
        first, last, factors = segment
        part = slice(max(first, start) - start, max(0, min(last - start, len(given))))
        if part.start >= part.stop:
            return 0, 0
        if factors is not None and self.work.dtype.name == "float32":
            out[part] = given[part]
            return add_low_rank(out[part], self.work.dtype, factors, start + part.start - first, scratch)
        if factors is not None:
            return convert_low_rank(given[part], out[part], self.work.dtype, factors, start + part.start - first, scratch)
        out[part] = narrow(given[part], self.work.dtype)
        return 0, too_large(out[part], given[part], widen(given[part]), self.work.dtype)

    def reference(self, row: int, columns: slice) -> NDArray[np.float64]:
        """One row of the result in float64 (of a quantised weight: its bytes), straight from the deltas: no segments, no tiles, nothing shared with the fast path."""
        if self.segments is None:
            only: NDArray[np.float64] = self.true(row, row + 1)
            return (encode(only).astype(np.float64) if self.work.packing else only)[0, columns]
        result = self.base(row, row + 1)[0]
        for piece, update in zip(self.work.pieces, self.updates, strict=True):
            form = update.floats()
            assert form is not None
            up, down = form
            down = down.reshape(up.shape[1], -1)
            factor = update.scale * piece.multiplier
            start, stop = piece.rows or (0, len(up))
            if piece.transposed:
                result[start:stop] += factor * (up @ down[:, row].astype(np.float64))
            elif start <= row < stop:
                result[columns] += factor * _combined(up[row - start], down[:, columns])
        if isinstance(self.base, ScaledRows):
            result = result / self.base.scales(row, row + 1)[0]
        row_part: NDArray[np.float64] = result[columns]
        return row_part


def _combined(weights: NDArray[Any], rows: NDArray[Any]) -> NDArray[np.float64]:
    """weights (r,) @ rows (r, columns) in float64, some rows at a time: they need not all be widened at once."""
    total = np.zeros(rows.shape[1])
    for at in range(0, len(rows), 32):
        total += weights[at : at + 32].astype(np.float64) @ rows[at : at + 32].astype(np.float64)
    return total


def _not_finite(piece: Piece, update: Update) -> MalformedError:
    """Whether the factors or the scale are to blame."""
    form = update.floats()
    if form is not None and all(isfinite(_largest(factor)) for factor in form):
        scale = f"scale {update.scale:g} x multiplier {piece.multiplier:g}"
        return MalformedError(
            "the factors times the scale are no finite numbers", file=_origin(piece), tensor=str(piece.target), found=scale
        )
    return MalformedError("the factors hold NaN or Inf", file=_origin(piece), tensor=str(piece.target), remedy="see 'upparam verify'")


def _origin(piece: Piece) -> str | None:
    """Where a piece's factors come from: of several adapters, the one to blame."""
    return next((factor.source.name for factor in piece.delta.factors().values()), None)


def _largest(values: NDArray[Any]) -> float:
    """The largest magnitude; NaN or infinite where a value is."""
    return max(float(values.max(initial=0.0)), -float(values.min(initial=0.0))) if values.size else 0.0


def _changed(before: Rows, piece: Piece, update: Update, count: int) -> Rows:
    """Rows of a weight of `count` rows with one delta applied to those it changes."""
    first, last = piece.rows or (0, count)

    def rows(start: int, stop: int) -> NDArray[np.float64]:
        result = before(start, stop)
        low, high = max(first, start), min(last, stop)
        if low < high:
            part = result[low - start : high - start]
            if piece.delta.additive:
                part += piece.multiplier * update.rows(low - first, high - first)
            else:
                merged = update.merged(lambda a, b: before(first + a, first + b), low - first, high - first).reshape(part.shape)
                if piece.multiplier == 1.0:
                    part[...] = merged
                else:
                    with np.errstate(invalid="ignore"):
                        part[...] = np.where(np.isfinite(part), part + piece.multiplier * (merged - part), merged)  # Inf - Inf is none
            _check_finite(part, piece, lambda: before(low, high))
        return result

    return rows


def _transposed(before: Rows, piece: Piece, update: Update, base: BaseRows) -> Rows:
    """The same for a weight stored as (in, out): the changed weight is formed whole, once, since its rows are columns here."""
    lock = threading.Lock()
    kept: list[NDArray[np.float64]] = []

    def whole() -> NDArray[np.float64]:
        with lock:
            if not kept:
                true = np.ascontiguousarray(before(0, base.count).T)
                result = _changed(lambda a, b: true[a:b].copy(), piece, update, base.columns)(0, base.columns)
                kept.append(np.ascontiguousarray(result.T))
        return kept[0]

    return lambda start, stop: whole()[start:stop].copy()


def _check_finite(rows: NDArray[np.float64], piece: Piece, before: Callable[[], NDArray[np.float64]]) -> None:
    """Raise MalformedError for NaN or Inf where there was none before: the base may hold some of its own."""
    lost = ~np.isfinite(rows)
    if not lost.any():
        return
    held = np.isfinite(before())
    if not held[lost].any():
        return
    spread = "the base holds some in this weight, and a change that depends on the weight spreads them" if not held.all() else None
    raise MalformedError(
        "the changed weight holds NaN or Inf", file=_origin(piece), tensor=str(piece.target), found=spread,
        remedy="leave it out with --skip" if spread else "see 'upparam verify'",
    )  # fmt: skip
