"""Combined factors that are never held: their bytes are made from the stored ones a few rows at a time, wherever they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from upparam import ways
from upparam._native import wanted
from upparam.arrays import singles
from upparam.dtypes import DType
from upparam.errors import RefusedError
from upparam.operations.recast import largest_finite
from upparam.tensors import Tensor, lies_as_wanted

if TYPE_CHECKING:
    from numpy.typing import NDArray

_KINDS = {"bfloat16": 0, "float16": 1, "float32": 2}
"""The compiled module's numbers for dtypes."""
_INTERFACE = 1
"""What the compiled module must say it speaks; one left over from older source does not."""
_PIECE = 1 << 20
"""Bytes, or a little less, that a reader had best ask for at a time: what each request costs is then small beside what it brings."""
Fill = Callable[[int, int, memoryview], None]
"""(start, stop, buffer): put the bytes of those rows into the buffer."""


class RowSource:
    """`rows` rows of `width` bytes each, made by `fill` when they are read, and made anew at each read."""

    def __init__(self, rows: int, width: int, fill: Fill, name: str, told: Callable[[], ways.Way | None] | None = None) -> None:
        self.size, self.name = rows * width, name
        self._width, self._fill, self._told = width, fill, told
        self.piece = max(1, _PIECE // width) * width

    def way(self, offset: int, size: int) -> ways.Way | None:
        """The way to all rows, where their bytes are those of files; none to some of them."""
        return None if self._told is None or (offset, size) != (0, self.size) else self._told()

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset`."""
        buffer = bytearray(size)
        self.readinto(offset, memoryview(buffer))
        return bytes(buffer)

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`."""
        if not len(buffer):
            return
        start, stop = offset // self._width, -(-(offset + len(buffer)) // self._width)
        skipped = offset - start * self._width
        if not skipped and (stop - start) * self._width == len(buffer):
            self._fill(start, stop, buffer)
            return
        whole = memoryview(bytearray((stop - start) * self._width))
        self._fill(start, stop, whole)
        buffer[:] = whole[skipped : skipped + len(buffer)]


def beside(parts: Sequence[Tensor], factors: Sequence[float] | None, dtype: DType) -> Tensor:
    """(rows, sum of ranks): matrices (rows, rank) side by side; with `factors` each times its own in float64, rounded once to `dtype`.

    Without factors the bits stay, and all must be of `dtype`. Raises RefusedError, when read, where a finite value becomes too large.
    """
    if not all(lies_as_wanted(part) for part in parts):
        shape = (parts[0].shape[0], sum(part.shape[1] for part in parts))
        return Tensor.computed(
            dtype, shape, lambda: beside([Tensor.of(part.read()) for part in parts], factors, dtype).read(), "combined up"
        )
    rows, ranks = parts[0].shape[0], [part.shape[1] for part in parts]
    width = sum(ranks) * dtype.itemsize

    def fill(start: int, stop: int, buffer: memoryview) -> None:
        import numpy as np

        at, count = 0, stop - start
        for number, (part, rank) in enumerate(zip(parts, ranks, strict=True)):
            values = _elements(part, start * rank, count * rank)
            if factors is not None and abs(factors[number]) > 1.0:
                _refuse_overflow(values, factors[number], dtype)
            if factors is not None and _spread(buffer, at, width, values, rank, factors[number], dtype):
                at += rank * dtype.itemsize
                continue
            if factors is not None:
                values = _times(values, factors[number], dtype)
            # A row of a part is moved as one item: element by element takes twice as long, or five times where ranks are small.
            item = np.dtype((np.void, rank * dtype.itemsize))
            np.ndarray((count,), item, buffer, at, (width,))[...] = values.view(item)
            at += item.itemsize

    def told() -> ways.Way | None:
        spans: list[ways.Span] = []
        for part, rank in zip(parts, ranks, strict=True):
            own = ways.spans_of(part.way())
            if own is None or len(own) != 1:
                return None
            descriptor, at, _ = own[0]
            spans.append((descriptor, at, rank * dtype.itemsize))
        return ways.beside(rows, spans)

    return Tensor(dtype, (rows, sum(ranks)), RowSource(rows, width, fill, "combined up", told if factors is None else None))


def _refuse_overflow(values: NDArray[Any], factor: float, dtype: DType) -> None:
    """Raise where a finite value times the factor does not fit in the dtype."""
    from upparam.operations.merge.rounding import largest

    size = largest_finite(singles(values) if values.dtype.itemsize < 4 else values)
    if size * abs(factor) > largest(dtype):
        raise RefusedError(
            f"a multiplier makes a factor too large for {dtype}", found=f"{size:.3g} times {factor:.3g}", remedy="give a smaller multiplier"
        )


def widened(tensor: Tensor, dtype: DType) -> Tensor:
    """The same values in a dtype that holds them all."""
    if tensor.dtype == dtype:
        return tensor
    if not lies_as_wanted(tensor):
        return Tensor.computed(dtype, tensor.shape, lambda: _times(tensor.read(), None, dtype), tensor.source.name)

    def fill(start: int, stop: int, buffer: memoryview) -> None:
        import numpy as np

        values = _elements(tensor, start, stop - start)
        if not _spread(buffer, 0, len(buffer), values, len(values), 1.0, dtype):
            np.frombuffer(buffer, dtype.numpy)[:] = _times(values, None, dtype)

    return Tensor(dtype, tensor.shape, RowSource(prod(tensor.shape), dtype.itemsize, fill, tensor.source.name))


def _elements(tensor: Tensor, start: int, count: int) -> NDArray[Any]:
    """`count` elements from number `start` of a tensor that lies as wanted."""
    import numpy as np

    values = np.empty(count, tensor.dtype.numpy)
    tensor.source.readinto(tensor.offset + start * values.itemsize, values.view(np.uint8).data)  # type: ignore[attr-defined]
    return values


def _spread(buffer: memoryview, at: int, stride: int, values: NDArray[Any], rank: int, factor: float, dtype: DType) -> bool:
    """Put rows of `rank` elements times a factor into the buffer, from byte `at` on and `stride` bytes apart; False where only numpy can."""
    module = wanted("spread", _INTERFACE)
    if module is None or dtype.name != "float32" or str(values.dtype) not in _KINDS:
        return False
    stored = values.view("u1").data
    module.spread(buffer, at, stride, stored, _KINDS[str(values.dtype)], len(values) // rank, rank, factor)
    return True


def _times(values: NDArray[Any], factor: float | None, dtype: DType) -> NDArray[Any]:
    import numpy as np

    wide = singles(values) if values.dtype.itemsize < 4 else values
    if factor is None:
        return wide.astype(dtype.numpy, copy=False)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.multiply(wide, factor, dtype=np.float64).astype(dtype.numpy)
