"""What a symbolic pickle machine computes with: stand-ins for the objects a pickle would build, and their final plain form.

Nothing here can call or import anything a pickle names. A `Global` is two strings; a `Record` is the name of a class with the arguments it
would have got; storages, arrays and blobs are byte ranges of the file.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from math import prod
from typing import Any

from upparam.containers.base import Opaque
from upparam.dtypes import DType
from upparam.errors import LimitError, MalformedError, UpparamError
from upparam.limits import MAX_EXPANDED, MAX_PICKLE_DEPTH
from upparam.sources import MemorySource, Source
from upparam.tensors import Tensor, contiguous_strides

MAX_SUMMARY = 160
"""Characters of an argument summary."""


class Trust(Enum):
    """What a global is to us."""

    DATA = "data"
    """Builds tensors, numbers or plain collections; its meaning is known and done here."""
    INERT = "inert"
    """A class of plain fields (settings, enums, dates): kept by name. Loading it needs its library, not code from the file."""
    CODE = "code"
    """Anything else: a loader would import and call it."""


@dataclass(frozen=True, eq=False)
class Global:
    """A module attribute the pickle names. `offset` is that of the opcode."""

    module: str
    name: str
    offset: int

    @property
    def qualname(self) -> str:
        """'module.name'."""
        return f"{self.module}.{self.name}"


@dataclass(frozen=True, eq=False)
class StorageType:
    """A torch storage class; `dtype` is None for untyped storages."""

    dtype: DType | None


@dataclass(frozen=True, eq=False)
class Storage:
    """A torch storage: `nbytes` bytes of `source` from `start`. `dtype` is None when untyped."""

    dtype: DType | None
    source: Source
    start: int
    nbytes: int
    big_endian: bool = False


@dataclass(frozen=True, eq=False)
class Blob:
    """Bytes of the pickle itself, not copied out of it."""

    source: Source
    start: int
    size: int

    def bytes(self) -> bytes:
        """The bytes."""
        return self.source.read(self.start, self.size)


@dataclass(eq=False)
class Record:
    """An object of a class that is not built: the class by name, what it would have been called with, and what was put into it."""

    qualname: str
    args: tuple[Any, ...]
    state: list[Any] = field(default_factory=list)
    items: list[Any] = field(default_factory=list)
    entries: dict[Any, Any] = field(default_factory=dict)


@dataclass(eq=False)
class ArrayType:
    """A numpy dtype being built. `code` is numpy's type string such as 'f4'; `order` '<', '>', '=' or '|'."""

    code: str
    order: str = "="

    @property
    def dtype(self) -> DType | None:
        """Our dtype, or None for element types that are no tensor data (objects, strings, records, dates)."""
        return NUMPY_CODES.get(self.code.lstrip("<>=|"))

    @property
    def big_endian(self) -> bool:
        """True for big-endian elements."""
        return self.order == ">" or self.code.startswith(">")


@dataclass(eq=False)
class Array:
    """A numpy array being built: empty until its state arrives. `found` is then a Tensor, or an Opaque for what is no tensor data."""

    found: Any = None


@dataclass(frozen=True, eq=False)
class Broken:
    """A tensor whose description the file cannot back; kept so that the error can name it."""

    problem: UpparamError


NUMPY_CODES: dict[str, DType] = {}


def _fill_codes() -> None:
    from upparam.dtypes import DTYPES

    names = {"f2": "float16", "f4": "float32", "f8": "float64", "b1": "bool", "c8": "complex64", "c16": "complex128", "?": "bool",
             "e": "float16", "f": "float32", "d": "float64", "b": "int8", "B": "uint8", "h": "int16", "H": "uint16", "i": "int32",
             "I": "uint32", "l": "int64", "L": "uint64", "q": "int64", "Q": "uint64"}  # fmt: skip
    names |= {f"i{size}": f"int{8 * size}" for size in (1, 2, 4, 8)} | {f"u{size}": f"uint{8 * size}" for size in (1, 2, 4, 8)}
    names |= {name: name for name in DTYPES}
    NUMPY_CODES.update({code: DTYPES[name] for code, name in names.items()})


_fill_codes()

PLAIN = frozenset({int, str, float, bool, type(None), complex, bytes, Tensor, DType, Opaque})
"""Types that stand for themselves and hold nothing to settle."""
CONTAINERS = frozenset({list, tuple, dict, set, frozenset})


@dataclass
class Budget:
    """What is left of the documented limits while one file is read."""

    opcodes: int
    objects: int
    memo: int
    nbytes: int
    copied: int

    def take(self, count: int) -> None:
        """Charge `count` objects copied or built at once. Raises LimitError when they are used up."""
        self.objects -= count
        if self.objects < 0:
            raise LimitError("a pickle builds more objects than any real file")

    def copy(self, count: int) -> None:
        """Charge `count` bytes copied. Raises LimitError when a small pickle multiplies bytes."""
        self.copied -= count
        if self.copied < 0:
            raise LimitError("a pickle multiplies its own bytes", expected="copies within four times its size")

    def hold(self, count: int) -> None:
        """Charge `count` bytes of tensor. Raises LimitError when views claim far more than the file holds."""
        self.nbytes -= count
        if self.nbytes < 0:
            raise LimitError("the tensors together claim far more bytes than the file holds", remedy="the file is crafted; do not trust it")


def view(storage: Storage, dtype: DType, offset: int, shape: tuple[int, ...], strides: tuple[int, ...] | None, budget: Budget) -> Tensor:
    """A tensor over a storage; `offset` and `strides` in elements. Raises MalformedError or LimitError when the storage cannot back it."""
    if offset < 0 or (shape and min(shape) < 0) or (strides and min(strides) < 0) or (strides is not None and len(strides) != len(shape)):
        raise MalformedError("a negative size, stride or offset", found=f"shape {shape}, strides {strides}, offset {offset}")
    if strides == contiguous_strides(shape):
        strides = None
    itemsize = dtype.itemsize
    nbytes = prod(shape) * itemsize
    found = Tensor(dtype, shape, storage.source, storage.start + offset * itemsize, strides, storage.big_endian)
    span = nbytes if strides is None else found.span
    if nbytes and offset * itemsize + span > storage.nbytes:
        raise MalformedError("the storage ends before the tensor does", expected=f"{offset * itemsize + span} bytes", found=storage.nbytes)
    if nbytes > max(storage.nbytes, MAX_EXPANDED):
        raise LimitError("a view repeats a few bytes into more than any real tensor", expected=f"<= {MAX_EXPANDED} bytes", found=nbytes)
    budget.hold(nbytes)
    return found


def array(data: Any, kind: ArrayType, shape: Any, fortran: bool, budget: Budget) -> Any:
    """A numpy array's Tensor over `data` (Blob, bytes or str of latin-1), or an Opaque where the elements are no tensor data."""
    if not whole_numbers(shape):
        raise MalformedError("an array's shape is not whole numbers", found=summary(shape))
    shape = tuple(shape)
    dtype = kind.dtype
    if dtype is None:
        return Opaque("numpy.ndarray", (f"{kind.order}{kind.code}", shape))
    if isinstance(data, Blob):
        storage = Storage(dtype, data.source, data.start, data.size, kind.big_endian)
    elif isinstance(data, (bytes, str)):
        raw = data if isinstance(data, bytes) else latin1(data)
        storage = Storage(dtype, MemorySource(raw, "pickle"), 0, len(raw), kind.big_endian)
    else:
        raise MalformedError("an array without its bytes", found=summary(data))
    strides = contiguous_strides(shape[::-1])[::-1] if fortran and len(shape) > 1 else None
    return view(storage, dtype, 0, shape, strides, budget)


def latin1(text: str) -> bytes:
    """Bytes that old pickles carry as text. Raises MalformedError for text that is no such thing."""
    try:
        return text.encode("latin-1")
    except UnicodeEncodeError:
        raise MalformedError("bytes written as text hold characters above 255") from None


def whole_numbers(values: Any) -> bool:
    """True for a short tuple or list of ints."""
    from upparam.limits import MAX_DIMS

    return (
        isinstance(values, (tuple, list))
        and len(values) <= MAX_DIMS
        and all(type(value) is int and abs(value) < 1 << 62 for value in values)
    )


def clean(text: str, limit: int = MAX_SUMMARY) -> str:
    """`text` fit for a terminal: control characters and lone surrogates escaped, cut to `limit` characters."""
    cut = text if len(text) <= limit else text[: limit - 3] + "..."
    if cut.isascii() and cut.isprintable():
        return cut
    return "".join(mark if mark.isprintable() else mark.encode("unicode_escape", "backslashreplace").decode() for mark in cut)


def summary(value: Any, limit: int = MAX_SUMMARY) -> str:
    """One bounded line about a symbolic value, never longer than `limit`, whatever it holds."""
    parts: list[str] = []
    _summarise(value, parts, 3, [limit])
    return clean("".join(parts), limit)


def _summarise(value: Any, parts: list[str], depth: int, left: list[int]) -> None:
    text = _short(value)
    if text is None:
        items: Iterable[Any] = value.items() if isinstance(value, dict) else value
        opening, closing = "[]" if type(value) is list else "()" if type(value) is tuple else "{}"
        parts.append(opening)
        if depth == 0 and value:
            parts.append("...")
        elif depth:
            for index, item in enumerate(items):
                if left[0] <= 0:
                    break
                if index:
                    parts.append(", ")
                if isinstance(value, dict):
                    _summarise(item[0], parts, depth - 1, left)
                    parts.append(": ")
                    item = item[1]
                _summarise(item, parts, depth - 1, left)
        parts.append(closing)
        return
    parts.append(text)
    left[0] -= len(text)


def _short(value: Any) -> str | None:
    kind = type(value)
    if kind in CONTAINERS:
        return None
    if kind is str or kind is bytes:
        return repr(value[:80]) + ("..." if len(value) > 80 else "")
    if kind is int:
        return str(value) if value.bit_length() <= 128 else f"a {value.bit_length()}-bit integer"
    if kind is Global:
        return str(value.qualname)[:80]
    if kind is Record:
        return f"<{value.qualname[:80]}>"
    if kind is Opaque:
        return f"<{value.qualname[:80]}>"
    if kind is Tensor:
        return f"<tensor {value.dtype} {list(value.shape)}>"
    if kind is Blob:
        return f"<{value.size} bytes>"
    if kind in (float, bool, complex, type(None), DType):
        return str(value)
    return f"<{kind.__name__.lower()}>"


def settle(root: Any) -> Any:
    """The plain form of what a machine built: dicts, lists, scalars, Tensors and Opaque. Linear in the number of distinct objects.

    Shared parts stay shared; a cycle is cut with an Opaque named 'cycle'. Raises LimitError deeper than MAX_PICKLE_DEPTH.
    """
    done: dict[int, tuple[Any, int]] = {}
    alive: list[Any] = []
    active: set[int] = set()
    stack: list[tuple[Any, bool]] = [(root, False)]
    while stack:
        node, ready = stack.pop()
        if type(node) in PLAIN or id(node) in done:
            continue
        children = _children(node)
        if not ready:
            if id(node) in active:
                continue
            active.add(id(node))
            stack.append((node, True))
            stack.extend((child, False) for child in children if type(child) not in PLAIN and id(child) not in done)
            continue
        values, height = [], 0
        for child in children:
            if type(child) in PLAIN:
                values.append(child)
                continue
            value, below = done.get(id(child), (Opaque("cycle"), 0))
            values.append(value)
            height = max(height, below)
        if height + 1 > MAX_PICKLE_DEPTH:
            raise LimitError("objects nested deeper than in any real file", expected=f"<= {MAX_PICKLE_DEPTH}")
        alive.append(node)
        done[id(node)] = (_rebuilt(node, values), height + 1)
    return root if type(root) in PLAIN else done[id(root)][0]


def _children(node: Any) -> list[Any]:
    kind = type(node)
    if kind is dict:
        return list(node.values())
    if kind is list or kind is tuple or kind is set or kind is frozenset:
        return list(node)
    if kind is Record:
        return [*node.args, *node.state, *node.items, *node.entries.values()]
    return []


def _rebuilt(node: Any, values: list[Any]) -> Any:
    kind = type(node)
    if kind is dict:
        return dict(zip(node, values, strict=True))
    if kind is list:
        return values
    if kind is tuple:
        return tuple(values)
    if kind is set or kind is frozenset:
        return node
    if kind is Record:
        first = len(node.args) + len(node.state)
        found = values[:first]
        last = first + len(node.items)
        if node.items:
            found.append(values[first:last])
        if node.entries:
            found.append(dict(zip(node.entries, values[last:], strict=True)))
        return Opaque(node.qualname, tuple(found))
    if kind is Global:
        return Opaque(node.qualname)
    if kind is Array:
        return Opaque("numpy.ndarray") if node.found is None else node.found
    if kind is ArrayType:
        return node.dtype or Opaque("numpy.dtype", (node.code,))
    if kind is Blob:
        return node.bytes()
    if kind is Storage:
        dtype = node.dtype or NUMPY_CODES["u1"]
        return Tensor(dtype, (node.nbytes // dtype.itemsize,), node.source, node.start, None, node.big_endian)
    if kind is StorageType:
        return Opaque("torch.Storage", (node.dtype,))
    if kind is Broken:
        return node
    raise AssertionError(kind)
