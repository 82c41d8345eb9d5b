"""Lazy tensors: a dtype, a shape and the bytes of a source that hold the elements. Nothing is read until asked for.

numpy is imported only by the functions that hand out arrays, so reading headers and identifying files never pays for it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, Any

from upparam import ways
from upparam.arrays import doubles, floats, gathered, held, same_words, scratch
from upparam.dtypes import STRUCT_CODES, DType, dtype_of
from upparam.errors import MalformedError
from upparam.sources import ComputedSource, MemorySource, Source, within

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


_FIRST, _COMPARED = 1 << 12, 1 << 18
"""Bytes that are compared before the rest is read."""


class JoinedSource:
    """Several contiguous tensors laid end to end: rows stacked without holding them all."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self.parts = tuple(parts)
        self.name = "+".join(part.source.name for part in self.parts[:3])
        self.size = sum(part.nbytes for part in self.parts)

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset`."""
        within(self, offset, size)
        found: list[bytes] = []
        start, stop, at = offset, offset + size, 0
        for part in self.parts:
            low, high = max(start, at), min(stop, at + part.nbytes)
            if low < high:
                found.append(part.raw_range(low - at, high - at))
            at += part.nbytes
        return b"".join(found)


class LyingSource(JoinedSource):
    """The same where every part lies as wanted: any span goes straight into a buffer."""

    @property
    def piece(self) -> int:
        """Bytes to ask for at a time."""
        return max(getattr(part.source, "piece", _COMPARED) for part in self.parts)

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`."""
        within(self, offset, len(buffer))
        start, stop, at = offset, offset + len(buffer), 0
        for part in self.parts:
            low, high = max(start, at), min(stop, at + part.nbytes)
            if low < high:
                part.source.readinto(part.offset + low - at, buffer[low - start : high - start])  # type: ignore[attr-defined]
            at += part.nbytes

    def way(self, offset: int, size: int) -> ways.Way | None:
        """The way to all bytes, where each part lies in a file; none to some of them."""
        if (offset, size) != (0, self.size):
            return None
        spans: list[ways.Span] = []
        for part in self.parts:
            own = ways.spans_of(part.way())
            if own is None:
                return None
            spans += own
        return ways.lying(spans)


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """C-order strides in elements for `shape`."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


@dataclass(frozen=True)
class Tensor:
    """A tensor that has not been read yet.

    `offset` is in bytes within `source`; `strides` are in elements, None meaning C-contiguous. Views (transposed, rows, reshape)
    share the source. Constructing one does not check that the bytes exist: containers do that once, with `check()`.
    """

    dtype: DType
    shape: tuple[int, ...]
    source: Source = field(repr=False)
    offset: int = 0
    strides: tuple[int, ...] | None = None
    big_endian: bool = False

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements, laid out contiguously."""
        return self.numel * self.dtype.itemsize

    @property
    def is_contiguous(self) -> bool:
        """True when the elements lie in C order without gaps."""
        if self.strides is None or self.numel <= 1:
            return True
        wanted = contiguous_strides(self.shape)
        return all(size == 1 or have == want for size, have, want in zip(self.shape, self.strides, wanted, strict=True))

    @property
    def span(self) -> int:
        """Bytes from `offset` to the end of the last element."""
        if not self.numel:
            return 0
        if self.is_contiguous:
            return self.nbytes
        assert self.strides is not None
        return (sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True)) + 1) * self.dtype.itemsize

    def way(self) -> ways.Way | None:
        """The way to the bytes of a contiguous tensor, where its source knows one."""
        told = getattr(self.source, "way", None)
        return None if told is None else told(self.offset, self.nbytes)

    def check(self, name: str | None = None) -> None:
        """Raise MalformedError unless the source can back every element (negative strides and sizes are refused too)."""
        if any(size < 0 for size in self.shape) or any(stride < 0 for stride in self.strides or ()) or self.offset < 0:
            raise MalformedError(
                "negative size, stride or offset", file=self.source.name, tensor=name, found=f"{self.shape} {self.strides} {self.offset}"
            )
        if self.strides is not None and len(self.strides) != len(self.shape):
            raise MalformedError(
                "strides and shape differ in length", file=self.source.name, tensor=name, found=f"{self.shape} {self.strides}"
            )
        if prod(max(size, 1) for size in self.shape) * self.dtype.itemsize >= 1 << 63:
            raise MalformedError("a shape no machine can address", file=self.source.name, tensor=name, found=self.shape)
        if self.offset + self.span > self.source.size:
            raise MalformedError(
                "the data ends before the tensor does", file=self.source.name, tensor=name,
                expected=f"{self.offset + self.span} bytes", found=f"{self.source.size}",
                remedy="the file is truncated or its header lies; fetch it again",
            )  # fmt: skip

    def read(self) -> NDArray[Any]:
        """The elements as a fresh, writable, C-contiguous, native-endian numpy array. Raises MalformedError like `check()`."""
        import numpy as np

        self.check()
        data = np.empty(self.span, np.uint8) if self.is_contiguous else np.frombuffer(scratch(self.span), np.uint8)
        if hasattr(self.source, "readinto"):
            self.source.readinto(self.offset, data.data)
        elif self.span:
            data[:] = np.frombuffer(self.source.read(self.offset, self.span), np.uint8)
        if self.is_contiguous:
            array = data.view(self.dtype.numpy).reshape(self.shape)
        else:
            assert self.strides is not None
            steps = tuple(stride * self.dtype.itemsize for stride in self.strides)
            array = gathered(np.ndarray(self.shape, self.dtype.numpy, data.data, strides=steps))
        if self.big_endian:
            # Swapped as whole numbers, so that no NaN loses its payload; a complex number is two of them.
            part = self.dtype.itemsize // (2 if self.dtype.name.startswith("complex") else 1)
            array.reshape(-1).view(f"u{part}").byteswap(inplace=True)
        return array

    def doubles(self) -> NDArray[np.float64]:
        """The elements as a fresh, writable, C-contiguous float64 array: exact for every real dtype but 64-bit integers."""
        return doubles(self.read())

    def floats(self) -> NDArray[Any]:
        """The same in float32 where that holds every value of the dtype."""
        return floats(self.read())

    def scalar(self) -> float:
        """The only element, read without numpy (alphas are read while identifying). Raises MalformedError when there is not exactly one."""
        if self.numel != 1:
            raise MalformedError("a tensor of one element was expected here", file=self.source.name, found=self.shape)
        data = self.source.read(self.offset, self.dtype.itemsize)
        if self.dtype.name == "bfloat16":
            data, code = (data + b"\0\0" if self.big_endian else b"\0\0" + data), "f"
        else:
            code = STRUCT_CODES.get(self.dtype.name, "")
        if not code:
            return float(self.read().reshape(-1)[0])
        (value,) = struct.unpack((">" if self.big_endian else "<") + code, data)
        return float(value)

    def raw(self) -> bytes:
        """The elements as little-endian C-order bytes, exactly as safetensors would store them."""
        if self.is_contiguous and not self.big_endian:
            return self.source.read(self.offset, self.nbytes)
        return self.read().tobytes()

    def raw_range(self, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop` of `raw()`, reading no others where the elements lie as they are wanted."""
        if self.is_contiguous and not self.big_endian:
            return self.source.read(self.offset + start, stop - start)
        return self.raw()[start:stop]

    @property
    def T(self) -> Tensor:  # noqa: N802 - numpy's and torch's name for it
        """The transposed view (axes reversed)."""
        strides = self.strides or contiguous_strides(self.shape)
        return replace(self, shape=self.shape[::-1], strides=strides[::-1])

    def rows(self, start: int, stop: int) -> Tensor:
        """The view of `self[start:stop]` along the first axis."""
        if not self.shape or not 0 <= start <= stop <= self.shape[0]:
            raise MalformedError("rows outside the tensor", file=self.source.name, expected=f"within {self.shape}", found=f"{start}:{stop}")
        shape = (stop - start, *self.shape[1:])
        # A view of nothing stays where it is: it must not point behind the source.
        step = (self.strides or contiguous_strides(self.shape))[0] if prod(shape) else 0
        return replace(self, shape=shape, offset=self.offset + start * step * self.dtype.itemsize)

    def columns(self, start: int, stop: int) -> Tensor:
        """The view of `self[:, start:stop]` of a matrix."""
        return self.T.rows(start, stop).T

    def reshape(self, shape: Sequence[int]) -> Tensor:
        """The view with another shape of as many elements. Free when contiguous, or when only axes of size 1 come or go; else computed when read."""
        shape = tuple(shape)
        if prod(shape) != self.numel or any(size < 0 for size in shape):
            raise MalformedError("a reshape changes the number of elements", file=self.source.name, expected=self.shape, found=shape)
        if self.is_contiguous:
            return replace(self, shape=shape, strides=None)
        kept = [(size, stride) for size, stride in zip(self.shape, self.strides or (), strict=True) if size != 1]
        if [size for size, _ in kept] == [size for size in shape if size != 1]:
            left = iter(kept)
            return replace(self, shape=shape, strides=tuple(1 if size == 1 else next(left)[1] for size in shape))
        return Tensor(self.dtype, shape, ComputedSource(self.nbytes, self.raw, self.source.name))

    @staticmethod
    def of(array: NDArray[Any], name: str = "memory") -> Tensor:
        """A tensor over an array already in memory (copied if it is not contiguous)."""
        import numpy as np

        array = np.ascontiguousarray(array).reshape(array.shape)
        if array.dtype.byteorder == ">":
            array = array.astype(array.dtype.newbyteorder("="))
        dtype = dtype_of(array)
        data = array.reshape(-1).view(np.uint8).data if array.size else b""
        return Tensor(dtype, tuple(array.shape), MemorySource(data, name))

    @staticmethod
    def computed(dtype: DType, shape: Sequence[int], produce: Callable[[], NDArray[Any]], name: str = "computed") -> Tensor:
        """A tensor whose array is made by `produce` each time it is read; it must have this dtype and shape."""
        shape = tuple(shape)

        def make() -> bytes:
            array = produce()
            if tuple(array.shape) != shape or array.dtype != dtype.numpy:
                raise MalformedError(
                    "a computed tensor came out wrong", tensor=name, expected=f"{dtype} {shape}", found=f"{array.dtype} {array.shape}"
                )
            return array.tobytes()

        return Tensor(dtype, shape, ComputedSource(prod(shape) * dtype.itemsize, make, name))

    @staticmethod
    def stack(parts: Sequence[Tensor]) -> Tensor:
        """`parts` joined along the first axis, lazily. They must agree in dtype and in every other axis, and there must be one."""
        if not parts or not all(part.shape for part in parts):
            raise MalformedError("nothing to stack, or tensors without a first axis", found=[part.shape for part in parts])
        first = parts[0]
        for part in parts[1:]:
            if part.dtype != first.dtype or part.shape[1:] != first.shape[1:]:
                raise MalformedError(
                    "parts that do not stack", expected=f"{first.dtype} (*, {first.shape[1:]})", found=f"{part.dtype} {part.shape}"
                )
        kind = LyingSource if all(lies_as_wanted(part) for part in parts) else JoinedSource
        return Tensor(first.dtype, (sum(part.shape[0] for part in parts), *first.shape[1:]), kind(parts))


def same_bits(one: Tensor, other: Tensor) -> bool:
    """True when dtype, shape and every byte agree (NaN payloads and signed zeros included)."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    # What is not in a file may be computed anew at each read.
    if one.nbytes <= _FIRST:
        return one.raw() == other.raw()
    if not (lies_as_wanted(one) and lies_as_wanted(other)):
        return same_words(one.read(), other.read())
    piece = max(getattr(tensor.source, "piece", _COMPARED) for tensor in (one, other))
    at, stop = 0, _FIRST
    while at < one.nbytes:
        ours, theirs = held(stop - at, "one"), held(stop - at, "other")
        view = memoryview(theirs)[: stop - at]
        one.source.readinto(one.offset + at, memoryview(ours)[: stop - at])  # type: ignore[attr-defined]
        other.source.readinto(other.offset + at, view)  # type: ignore[attr-defined]
        if not ours.startswith(view):  # two views would be compared element by element
            return False
        at, stop = stop, min(stop - stop % piece + piece, one.nbytes)
    return True


def lies_as_wanted(tensor: Tensor) -> bool:
    """True when any span of the tensor's bytes can be read into a buffer, and no others are read or computed for it."""
    return tensor.is_contiguous and not tensor.big_endian and hasattr(tensor.source, "readinto")
