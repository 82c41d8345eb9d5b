"""Lazy tensors: a dtype, a shape and the bytes of a source that hold the elements. Nothing is read until asked for.

numpy is imported only by the functions that hand out arrays, so reading headers and identifying files never pays for it.
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from upparam.errors import MalformedError, UnreadableError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class DType:
    """An element type: its name here (numpy's and ml_dtypes' spelling), bytes per element and safetensors' code for it."""

    name: str
    itemsize: int
    code: str

    @property
    def is_float(self) -> bool:
        """True for real floating-point types of any width."""
        return "float" in self.name

    @property
    def numpy(self) -> np.dtype[Any]:
        """The numpy dtype (little-endian); ml_dtypes supplies bfloat16 and the fp8 family."""
        return _numpy_dtype(self.name)

    def __str__(self) -> str:
        return self.name


_TABLE = (
    ("float64", 8, "F64"), ("float32", 4, "F32"), ("float16", 2, "F16"), ("bfloat16", 2, "BF16"),
    ("float8_e4m3fn", 1, "F8_E4M3"), ("float8_e5m2", 1, "F8_E5M2"), ("float8_e8m0fnu", 1, "F8_E8M0"),
    ("float8_e4m3fnuz", 1, "F8_E4M3FNUZ"), ("float8_e5m2fnuz", 1, "F8_E5M2FNUZ"),
    ("int64", 8, "I64"), ("int32", 4, "I32"), ("int16", 2, "I16"), ("int8", 1, "I8"),
    ("uint64", 8, "U64"), ("uint32", 4, "U32"), ("uint16", 2, "U16"), ("uint8", 1, "U8"),
    ("bool", 1, "BOOL"), ("complex64", 8, "C64"), ("complex128", 16, "C128"),
)  # fmt: skip
DTYPES: dict[str, DType] = {name: DType(name, itemsize, code) for name, itemsize, code in _TABLE}
_STRUCT_CODES = {
    "float64": "d", "float32": "f", "float16": "e", "int64": "q", "int32": "i", "int16": "h", "int8": "b",
    "uint64": "Q", "uint32": "I", "uint16": "H", "uint8": "B", "bool": "?",
}  # fmt: skip
BY_CODE: dict[str, DType] = {dtype.code: dtype for dtype in DTYPES.values()}


@cache
def _numpy_dtype(name: str) -> np.dtype[Any]:
    import numpy as np

    if name == "bfloat16" or name.startswith("float8"):
        import ml_dtypes

        found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
        return found
    return np.dtype(name)


def dtype_of(array: np.ndarray[Any, Any] | np.dtype[Any]) -> DType:
    """The DType of a numpy array or dtype. Raises MalformedError for one that no adapter file can hold (object, str, ...)."""
    name = str(getattr(array, "dtype", array))
    try:
        return DTYPES[name]
    except KeyError:
        raise MalformedError("an array of this dtype is not tensor data", found=name) from None


class Source(Protocol):
    """A span of bytes that can be read at any offset. `name` says which, for messages."""

    name: str
    size: int

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset`; raises MalformedError when the source is shorter."""
        ...


class FileSource:
    """A span of a regular file, read with positioned reads; safe to share between threads. The file is opened on first use."""

    def __init__(self, path: Path | str, start: int = 0, size: int | None = None) -> None:
        self.path = Path(path)
        self.name = str(path)
        self.start = start
        self._fd: int | None = None
        self._lock = threading.Lock()
        if size is None:
            try:
                size = self.path.stat().st_size - start
            except OSError as problem:
                raise UnreadableError(problem.strerror or str(problem), file=path) from problem
        self.size = size

    def fileno(self) -> int:
        """The open descriptor, for callers that copy ranges."""
        if self._fd is None:
            with self._lock:
                if self._fd is None:
                    try:
                        self._fd = os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0))
                    except OSError as problem:
                        raise UnreadableError(problem.strerror or str(problem), file=self.path) from problem
        return self._fd

    def place(self, offset: int, size: int) -> tuple[int, int]:
        """The open descriptor and where in it `size` bytes from `offset` begin, for callers that read by themselves."""
        self._check(offset, size)
        return self.fileno(), self.start + offset

    def span(self, offset: int, size: int) -> FileSource:
        """A narrower span of the same file."""
        return FileSource(self.path, self.start + offset, size)

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset`."""
        self._check(offset, size)
        parts: list[bytes] = []
        at, left = self.start + offset, size
        while left:
            part = self._attempt(os.pread, left, at)
            if not part:
                raise MalformedError(
                    "the file ends early", file=self.path, expected=f"{size} bytes at {self.start + offset}", found=f"{size - left}"
                )
            parts.append(part)
            at, left = at + len(part), left - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` (writable, bytes) from `offset`, without an intermediate copy."""
        self._check(offset, len(buffer))
        at, view = self.start + offset, buffer
        while view:
            count = self._attempt(os.preadv, [view], at)
            if not count:
                raise MalformedError(
                    "the file ends early", file=self.path, expected=f"{len(buffer)} bytes", found=f"{len(buffer) - len(view)}"
                )
            at, view = at + count, view[count:]

    def _attempt(self, call: Callable[..., Any], what: Any, at: int) -> Any:
        try:
            return call(self.fileno(), what, at)
        except OSError as problem:
            raise UnreadableError(problem.strerror or str(problem), file=self.path) from problem

    def _check(self, offset: int, size: int) -> None:
        if offset < 0 or size < 0 or offset + size > self.size:
            raise MalformedError(
                "a read reaches outside the file", file=self.path, expected=f"within {self.size} bytes", found=f"{offset}+{size}"
            )

    def close(self) -> None:
        """Close the descriptor; a later read opens the file again."""
        with self._lock:
            if self._fd is not None:
                os.close(self._fd)
                self._fd = None

    def __del__(self) -> None:
        # An interpreter that ends takes modules away before objects, and the descriptor goes with the process.
        if os is not None and getattr(self, "_fd", None) is not None:
            self.close()


class MemorySource:
    """Bytes already in memory."""

    def __init__(self, data: bytes | memoryview, name: str = "memory") -> None:
        self.data = memoryview(data).cast("B") if len(data) else memoryview(b"")
        self.name = name
        self.size = len(self.data)

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset`."""
        _within(self, offset, size)
        return bytes(self.data[offset : offset + size])

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`."""
        _within(self, offset, len(buffer))
        buffer[:] = self.data[offset : offset + len(buffer)]


def _within(source: Source, offset: int, size: int) -> None:
    if offset < 0 or size < 0 or offset + size > source.size:
        raise MalformedError(
            "a read reaches outside the data", file=source.name, expected=f"within {source.size} bytes", found=f"{offset}+{size}"
        )


class ComputedSource:
    """Bytes produced when first read, and produced anew at each read: results that are written once and never held."""

    def __init__(self, size: int, produce: Callable[[], bytes], name: str = "computed") -> None:
        self.size = size
        self.name = name
        self._produce = produce

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset`."""
        _within(self, offset, size)
        data = self._produce()
        if len(data) != self.size:
            raise MalformedError("a computed tensor has the wrong length", file=self.name, expected=self.size, found=len(data))
        return data if (offset, size) == (0, self.size) else data[offset : offset + size]


class JoinedSource:
    """Several contiguous tensors laid end to end: rows stacked without holding them all."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self.parts = tuple(parts)
        self.name = "+".join(part.source.name for part in self.parts[:3])
        self.size = sum(part.nbytes for part in self.parts)

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset`."""
        _within(self, offset, size)
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
        _within(self, offset, len(buffer))
        start, stop, at = offset, offset + len(buffer), 0
        for part in self.parts:
            low, high = max(start, at), min(stop, at + part.nbytes)
            if low < high:
                part.source.readinto(part.offset + low - at, buffer[low - start : high - start])  # type: ignore[attr-defined]
            at += part.nbytes


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
            array = _gathered(np.ndarray(self.shape, self.dtype.numpy, data.data, strides=steps))
        if self.big_endian:
            # Swapped as whole numbers, so that no NaN loses its payload; a complex number is two of them.
            part = self.dtype.itemsize // (2 if self.dtype.name.startswith("complex") else 1)
            array.reshape(-1).view(f"u{part}").byteswap(inplace=True)
        return array

    def doubles(self) -> NDArray[np.float64]:
        """The elements as a fresh, writable, C-contiguous float64 array: exact for every real dtype but 64-bit integers."""
        return doubles(self.read())

    def scalar(self) -> float:
        """The only element, read without numpy (alphas are read while identifying). Raises MalformedError when there is not exactly one."""
        if self.numel != 1:
            raise MalformedError("a tensor of one element was expected here", file=self.source.name, found=self.shape)
        data = self.source.read(self.offset, self.dtype.itemsize)
        if self.dtype.name == "bfloat16":
            data, code = (data + b"\0\0" if self.big_endian else b"\0\0" + data), "f"
        else:
            code = _STRUCT_CODES.get(self.dtype.name, "")
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


_OWN = threading.local()


def scratch(size: int, place: str = "") -> memoryview:
    """Memory of this thread for what is used up before the thread asks again for this place: new memory costs as much as filling it."""
    return memoryview(_held(size, place))[:size]


def _held(size: int, place: str) -> bytearray:
    """This thread's memory of a place, of `size` bytes or more."""
    held: dict[str, bytearray] = _OWN.__dict__
    if place not in held or len(held[place]) < size:
        held[place] = bytearray(size)
    return held[place]


def _gathered(view: NDArray[Any]) -> NDArray[Any]:
    """A C-contiguous copy of a strided view.

    The transpose of a wide matrix goes by blocks of its columns, put together before they are turned: its rows lie so far apart that they push each
    other out of the cache where the distance is a power of two, which makes numpy's own copy seven times slower.
    """
    import numpy as np

    if view.ndim != 2 or not view.T.flags.c_contiguous or view.shape[0] < 2 * _TURNED:
        copy: NDArray[Any] = view.copy()
        return copy
    array = np.empty(view.shape, view.dtype)
    block = np.empty((view.shape[1], _TURNED + 16), view.dtype)[:, :_TURNED]
    for start in range(0, view.shape[0], _TURNED):
        part = block[:, : min(_TURNED, view.shape[0] - start)]
        part[...] = view.T[:, start : start + _TURNED]
        array[start : start + _TURNED] = part.T
    return array


_TURNED = 256
"""Columns of a block that is transposed."""


def singles(array: NDArray[Any]) -> NDArray[np.float32]:
    """The array as float32, a copy; exact for every float dtype but float64. float16 takes a fifth of the time of numpy's own cast."""
    import numpy as np

    if array.dtype == np.float16 and array.size:
        # Exponent and fraction moved to their places in a float32, whose exponent counts from 112 lower.
        bits = array.view(np.int16).astype(np.int32)
        bits <<= 13
        bits &= np.int32(-0x70002000)  # 0x8FFFE000: the sign without its copies
        single = bits.view(np.float32)
        single *= np.float32(2.0**112)
        if max(single.max(), -single.min()) < 65536.0:  # what infinities and NaNs come out as
            return single
    with np.errstate(invalid="ignore", over="ignore"):
        return array.astype(np.float32)


def doubles(array: NDArray[Any]) -> NDArray[np.float64]:
    """The array as float64, a copy. float16 takes a third of the time of numpy's own cast."""
    import numpy as np

    with np.errstate(invalid="ignore"):
        return (singles(array) if array.dtype == np.float16 else array).astype(np.float64)


_FIRST, _COMPARED = 1 << 12, 1 << 18
"""Bytes that are compared before the rest is read."""


def same_bits(one: Tensor, other: Tensor) -> bool:
    """True when dtype, shape and every byte agree (NaN payloads and signed zeros included)."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    # What is not in a file may be computed anew at each read.
    if one.nbytes <= _FIRST:
        return one.raw() == other.raw()
    if not (lies_as_wanted(one) and lies_as_wanted(other)):
        return _same_words(one.read(), other.read())
    piece = max(getattr(tensor.source, "piece", _COMPARED) for tensor in (one, other))
    at, stop = 0, _FIRST
    while at < one.nbytes:
        ours, theirs = _held(stop - at, "one"), _held(stop - at, "other")
        view = memoryview(theirs)[: stop - at]
        one.source.readinto(one.offset + at, memoryview(ours)[: stop - at])  # type: ignore[attr-defined]
        other.source.readinto(other.offset + at, view)  # type: ignore[attr-defined]
        if not ours.startswith(view):  # two views would be compared element by element
            return False
        at, stop = stop, min(stop - stop % piece + piece, one.nbytes)
    return True


def _same_words(one: NDArray[Any], other: NDArray[Any]) -> bool:
    """True when two arrays of one size have the same bytes; compared by eight where they can be."""
    import numpy as np

    word = np.uint64 if one.nbytes % 8 == 0 else np.uint8
    return bool(np.array_equal(one.reshape(-1).view(word), other.reshape(-1).view(word)))


def lies_as_wanted(tensor: Tensor) -> bool:
    """True when any span of the tensor's bytes can be read into a buffer, and no others are read or computed for it."""
    return tensor.is_contiguous and not tensor.big_endian and hasattr(tensor.source, "readinto")
