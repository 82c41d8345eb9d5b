"""GGUF: llama.cpp's container; typed key-value pairs, tensor descriptions, then aligned data. Versions 2 and 3, either byte order.

Shapes are stored fastest axis first and are reversed here to row-major. Quantised tensors are no plain array: they are named, sized and
placed in `structure["quantised"]`, with a finding, and are not among `tensors`.
Sources: ggml-org/ggml `docs/gguf.md`; ggml-org/llama.cpp `gguf-py/gguf/constants.py` (type numbers, block sizes).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upparam.containers.base import Head, TensorFile
from upparam.containers.writing import put
from upparam.dtypes import DTYPES
from upparam.errors import LimitError, MalformedError, RefusedError
from upparam.findings import Finding, info, warning
from upparam.limits import MAX_DIMS, MAX_GGUF_ARRAY_SHOWN, MAX_GGUF_HEADER, MAX_GGUF_KEYS, MAX_GGUF_NESTING, MAX_TENSORS
from upparam.sources import Source
from upparam.tensors import Tensor
from upparam.wording import counted

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

name = "gguf"
title = "GGUF (llama.cpp)"

MAGIC = b"GGUF"
_PLAIN = {0: "float32", 1: "float16", 24: "int8", 25: "int16", 26: "int32", 27: "int64", 28: "float64", 30: "bfloat16"}
QUANTISED: dict[int, tuple[str, int, int]] = {
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 29: ("IQ1_M", 256, 56),
    34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip
"""Type number: (name, elements of a block, bytes of a block)."""
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_WINDOW = 1 << 20


@dataclass(frozen=True)
class QuantisedTensor:
    """Where a quantised tensor lies. `shape` is row-major; `offset` counts from the start of the file.

    `nbytes` follows from type and shape; for a type this version does not know it is the room up to the next tensor.
    """

    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def sniff(head: Head) -> bool:
    """The magic string."""
    return head.data.startswith(MAGIC)


def read(source: Source, path: Path) -> TensorFile:
    """Metadata, tensor names, types, shapes and places. Raises MalformedError or LimitError, naming the key or tensor.

    Metadata values are strings as they are and JSON text for the rest; an array longer than MAX_GGUF_ARRAY_SHOWN becomes a JSON object
    with its length, element type, byte range and first items.
    """
    return _Reader(source, path).run()


class _Reader:
    def __init__(self, source: Source, path: Path) -> None:
        self.source, self.path = source, path
        self.at = 4
        self.order = "<"
        self._window, self._start = b"", 0
        self.findings: list[Finding] = []

    def run(self) -> TensorFile:
        if self.source.size < 24 or self.source.read(0, 4) != MAGIC:
            raise self.bad("too short for a GGUF file", expected="at least 24 bytes", found=self.source.size)
        self.version()
        count, keys = self.number("Q"), self.number("Q")
        if count > MAX_TENSORS:
            raise LimitError("more tensors than any real file", file=self.path, expected=f"<= {MAX_TENSORS}", found=count)
        if keys > MAX_GGUF_KEYS:
            raise LimitError("more metadata keys than any real file", file=self.path, expected=f"<= {MAX_GGUF_KEYS}", found=keys)
        metadata, alignment = self.metadata(keys)
        entries = [self.entry() for _ in range(count)]
        data = -(-self.at // alignment) * alignment
        tensors, quantised = self.place(entries, data, alignment)
        structure = {"quantised": quantised} if quantised else None
        return TensorFile(self.path, name, tensors, metadata, structure, findings=self.findings, data_start=min(data, self.source.size))

    def version(self) -> None:
        version = self.number("I")
        if version & 0xFFFF == 0:
            self.order = ">"
            version = int.from_bytes(version.to_bytes(4, "little"), "big")
        if version not in (2, 3):
            remedy = "convert it again with a current llama.cpp" if version == 1 else None
            raise self.bad("a GGUF version upparam does not read", expected="2 or 3", found=version, remedy=remedy)

    def bad(self, message: str, tensor: str | None = None, **facts: Any) -> MalformedError:
        return MalformedError(message, file=self.path, tensor=tensor, **facts)

    def take(self, size: int) -> bytes:
        """The next `size` bytes of the header."""
        if size > self.source.size - self.at:
            raise self.bad("the file ends inside its header", expected=f"{size} bytes at {self.at}", found=self.source.size - self.at)
        if self.at + size > MAX_GGUF_HEADER:
            raise LimitError("the header is longer than any real one", file=self.path, expected=f"<= {MAX_GGUF_HEADER} bytes")
        start = self.at - self._start
        if not 0 <= start <= start + size <= len(self._window):
            self._start, start = self.at, 0
            self._window = self.source.read(self.at, min(max(size, _WINDOW), self.source.size - self.at))
        self.at += size
        return self._window[start : start + size]

    def number(self, code: str) -> Any:
        """The next number of a struct code, in the file's byte order."""
        return struct.unpack(self.order + code, self.take(struct.calcsize("=" + code)))[0]

    def text(self, what: str) -> str:
        raw = self.take(self.number("Q"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            self.findings.append(warning("gguf-not-utf8", self.path.name, f"{what} is not UTF-8 text", repr(raw[:60])))
            return raw.decode("utf-8", "backslashreplace")

    def metadata(self, keys: int) -> tuple[dict[str, str], int]:
        found: dict[str, str] = {}
        alignment = 32
        for _ in range(keys):
            key = self.text("a metadata key")
            if key in found:
                raise self.bad(f"the header names the key '{key}' twice", remedy="the file is malformed or crafted; do not trust it")
            kind = self.number("I")
            value = self.value(kind, key, 0)
            found[key] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            if key == "general.alignment":
                if kind != 4 or value < 8 or value & (value - 1) or value > 1 << 20:
                    raise self.bad("general.alignment must be a power of two from 8 up", found=f"{value} of type {kind}")
                alignment = value
        return found, alignment

    def value(self, kind: int, key: str, depth: int) -> Any:
        """A scalar, a string, a list, or for a long array a description of it."""
        if kind in _SCALARS:
            code = _SCALARS[kind]
            if code == "?":
                raw = self.number("B")
                if raw > 1:
                    raise self.bad(f"key '{key}' holds a truth value that is neither 0 nor 1", found=raw)
                return bool(raw)
            return self.number(code)
        if kind == _STRING:
            return self.text(f"the value of '{key}'")
        if kind != _ARRAY:
            raise self.bad(f"key '{key}' has a value type that does not exist", expected="0 to 12", found=kind)
        if depth >= MAX_GGUF_NESTING:
            raise LimitError(f"key '{key}' nests arrays deeper than any real file", file=self.path, expected=f"<= {MAX_GGUF_NESTING}")
        item, length = self.number("I"), self.number("Q")
        return self.array(item, length, key, depth)

    def array(self, item: int, length: int, key: str, depth: int) -> Any:
        start = self.at
        least = struct.calcsize("=" + _SCALARS[item]) if item in _SCALARS else 8
        if length * least > self.source.size - self.at:
            raise self.bad(
                f"the array of '{key}' is longer than the file", expected=f"{length} items", found=f"{self.source.size - self.at} bytes"
            )
        if length <= MAX_GGUF_ARRAY_SHOWN:
            return [self.value(item, key, depth + 1) for _ in range(length)]
        first = [self.value(item, key, depth + 1) for _ in range(8)]
        if item in _SCALARS:
            self.skip((length - 8) * least)
        elif item == _STRING:
            self.skip_strings(length - 8)
        else:
            raise LimitError(
                f"key '{key}' nests more arrays than any real file", file=self.path, expected=f"<= {MAX_GGUF_ARRAY_SHOWN}", found=length
            )
        if depth == 0:
            note = f"'{key}' holds {length} items; only the first are shown"
            self.findings.append(info("gguf-long-array", self.path.name, note, f"bytes {start} to {self.at}"))
        kind = "string" if item == _STRING else _SCALARS[item]
        return {"length": length, "type": kind, "first": first, "start": start, "end": self.at}

    def skip(self, size: int) -> None:
        if size > self.source.size - self.at:
            raise self.bad("the file ends inside its header", expected=f"{size} bytes at {self.at}", found=self.source.size - self.at)
        if self.at + size > MAX_GGUF_HEADER:
            raise LimitError("the header is longer than any real one", file=self.path, expected=f"<= {MAX_GGUF_HEADER} bytes")
        self.at += size

    def skip_strings(self, count: int) -> None:
        """Pass over strings a window at a time: a vocabulary has some 150,000 of them."""
        unpack = struct.Struct(self.order + "Q").unpack_from
        while count:
            window = self.source.read(self.at, min(_WINDOW, self.source.size - self.at))
            place, last = 0, len(window) - 8
            while count and place <= last:
                place += 8 + unpack(window, place)[0]
                count -= 1
            if not place:
                raise self.bad("the file ends inside its header", expected=f"8 bytes at {self.at}", found=len(window))
            self.skip(place)

    def entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """(name, row-major shape, type number, offset in the data) of the next tensor."""
        key = self.text("a tensor name")
        dims = self.number("I")
        if dims > MAX_DIMS:
            raise LimitError("more dimensions than any real tensor", file=self.path, tensor=key, expected=f"<= {MAX_DIMS}", found=dims)
        shape = tuple(self.number("Q") for _ in range(dims))[::-1]
        return key, shape, self.number("I"), self.number("Q")

    def place(
        self, entries: list[tuple[str, tuple[int, ...], int, int]], data: int, alignment: int
    ) -> tuple[dict[str, Tensor], dict[str, QuantisedTensor]]:
        tensors: dict[str, Tensor] = {}
        quantised: dict[str, QuantisedTensor] = {}
        spans: list[tuple[int, int, str]] = []
        rooms = _rooms([offset for *_, offset in entries], self.source.size - data)
        for key, shape, kind, offset in entries:
            if key in tensors or key in quantised:
                raise self.bad("the header names a tensor twice", key, remedy="the file is malformed or crafted; do not trust it")
            start = data + offset
            if offset % alignment:
                self.findings.append(
                    warning("gguf-misaligned", key, "the data does not start on the stated alignment", f"{offset} % {alignment}")
                )
            if kind in _PLAIN:
                tensor = Tensor(DTYPES[_PLAIN[kind]], shape, self.source, start, big_endian=self.order == ">")
                tensors[key] = tensor
                nbytes = tensor.nbytes
            else:
                quantised[key] = placed = self.quantised(key, shape, kind, start, rooms[offset])
                nbytes = placed.nbytes
            if start + nbytes > self.source.size:
                raise self.bad(
                    "the data ends before the tensor does", key, expected=f"{start + nbytes} bytes", found=self.source.size,
                    remedy="the file is truncated or its header lies; fetch it again",
                )  # fmt: skip
            if kind in _PLAIN:
                tensor.check(key)
            spans.append((start, start + nbytes, key))
        self.overlaps(spans)
        if quantised:
            self.summarise(quantised)
        return tensors, quantised

    def quantised(self, key: str, shape: tuple[int, ...], kind: int, start: int, room: int) -> QuantisedTensor:
        if kind not in QUANTISED:
            return QuantisedTensor(f"type {kind}", shape, start, room)
        label, block, size = QUANTISED[kind]
        if not shape or shape[-1] % block:
            raise self.bad(f"rows of {label} come in blocks of {block}", key, expected=f"a multiple of {block}", found=shape)
        return QuantisedTensor(label, shape, start, prod(shape) // block * size)

    def overlaps(self, spans: list[tuple[int, int, str]]) -> None:
        end, last = 0, ""
        for start, stop, key in sorted(spans):
            if start < end:
                raise self.bad(f"the bytes overlap those of '{last}'", key, expected=f"start >= {end}", found=start)
            if stop > start:
                end, last = stop, key

    def summarise(self, quantised: dict[str, QuantisedTensor]) -> None:
        kinds: dict[str, int] = {}
        for tensor in quantised.values():
            kinds[tensor.type] = kinds.get(tensor.type, 0) + 1
        listed = ", ".join(f"{count} x {kind}" for kind, count in sorted(kinds.items()))
        self.findings.append(
            warning(
                "gguf-quantised",
                self.path.name,
                f"{counted(len(quantised), 'tensor')} quantised, which cannot be read as plain numbers",
                listed,
            )
        )


def _rooms(offsets: list[int], size: int) -> dict[int, int]:
    """Bytes from each tensor's offset to the next one's, or to the end of the data."""
    ordered = sorted(set(offsets))
    return {offset: max(0, after - offset) for offset, after in zip(ordered, [*ordered[1:], size], strict=False)}


_TYPE_NUMBERS = {dtype: number for number, dtype in _PLAIN.items()}
_ALIGNMENT = 32
_MOST_DIMS = 4
"""ggml's GGML_MAX_DIMS."""
_LONGEST_NAME = 63
"""Bytes of a tensor name, ggml's GGML_MAX_NAME without the closing zero."""
_UINT32, _INT32, _FLOAT32, _BOOL, _UINT64, _INT64 = 4, 5, 6, 7, 10, 11
_TYPED = {
    "general.alignment": _UINT32, "general.quantization_version": _UINT32, "general.file_type": _UINT32, "general.base_model.count": _UINT32,
    "general.dataset.count": _UINT32, "adapter.lora.alpha": _FLOAT32, "adapter.alora.invocation_tokens": _UINT32,
    "general.tags": _STRING, "general.languages": _STRING, "general.datasets": _STRING,
}  # fmt: skip
"""Keys whose values are no single strings. Source: ggml-org/ggml docs/gguf.md; ggml-org/llama.cpp gguf-py/gguf/constants.py Keys."""
_ARRAYS = ("adapter.alora.invocation_tokens", "general.tags", "general.languages", "general.datasets")


def write(stream: Any, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a version 3 little-endian GGUF file to a binary stream, one tensor in memory at a time.

    Values of metadata are text as `read` gives it: each gets the type GGUF defines for its key, keys below the architecture's name and
    `tokenizer.` that of their JSON value, all others stay text. Raises RefusedError for a dtype, number of dimensions, name or value
    that GGUF has no room for.
    """
    keys = {key: value for key, value in metadata.items() if key != "general.alignment"}
    free = ("tokenizer.", f"{metadata.get('general.architecture', '')}.")
    out = bytearray(MAGIC + struct.pack("<IQQ", 3, len(tensors), len(keys)))
    for key, value in keys.items():
        out += _text(key) + _value(key, value, _TYPED.get(key), typed=key in _TYPED or key.startswith(free))
    at = 0
    for key, tensor in tensors.items():
        _fits(key, tensor)
        dims = len(tensor.shape)
        number = _TYPE_NUMBERS[tensor.dtype.name]
        out += _text(key) + struct.pack(f"<I{dims}QIQ", dims, *reversed(tensor.shape), number, at)
        at += _padded(tensor.nbytes)
    stream.write(bytes(out) + bytes(_padded(len(out)) - len(out)))
    put(stream, tensors, _padded)


def _fits(key: str, tensor: Tensor) -> None:
    if tensor.dtype.name not in _TYPE_NUMBERS:
        raise RefusedError("GGUF has no type for these elements", tensor=key, expected=", ".join(_TYPE_NUMBERS), found=tensor.dtype)
    if not 1 <= len(tensor.shape) <= _MOST_DIMS:
        raise RefusedError("a number of dimensions ggml does not hold", tensor=key, expected=f"1 to {_MOST_DIMS}", found=tensor.shape)
    if len(key.encode()) > _LONGEST_NAME:
        raise RefusedError("a name longer than ggml allows", tensor=key, expected=f"<= {_LONGEST_NAME} bytes", found=len(key.encode()))


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(key: str, text: str, known: int | None, *, typed: bool) -> bytes:
    """Type number and bytes of one metadata value; `known` is the type (of an array's items) that its key asks for."""
    if not typed:
        return struct.pack("<I", _STRING) + _text(text)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = text
    if isinstance(value, list) and (known is None or key in _ARRAYS):
        kind = known if known is not None else max(map(_kind, value), default=_STRING)
        if all(_holds(kind, item) for item in value):
            return struct.pack("<IIQ", _ARRAY, kind, len(value)) + b"".join(_scalar(kind, item) for item in value)
    kind = _kind(value) if known is None else known
    if key in _ARRAYS or isinstance(value, (list, dict)) or not _holds(kind, value):
        if known is not None or isinstance(value, (list, dict)):
            raise RefusedError(f"a value of '{key}' that cannot be written as GGUF's type for it", found=text[:80])
        kind, value = _STRING, text
    return struct.pack("<I", kind) + _scalar(kind, value)


def _kind(value: Any) -> int:
    if isinstance(value, bool):
        return _BOOL
    if isinstance(value, int):
        return _UINT32 if 0 <= value < 1 << 32 else _INT32 if -(1 << 31) <= value < 0 else _UINT64 if value >= 0 else _INT64
    return _FLOAT32 if isinstance(value, float) else _STRING


def _holds(kind: int, value: Any) -> bool:
    if kind == _STRING:
        return isinstance(value, str)
    if kind == _FLOAT32:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind == _BOOL:
        return isinstance(value, bool)
    low, high = {_UINT32: (0, 1 << 32), _INT32: (-(1 << 31), 1 << 31), _UINT64: (0, 1 << 64), _INT64: (-(1 << 63), 1 << 63)}[kind]
    return isinstance(value, int) and not isinstance(value, bool) and low <= value < high


def _scalar(kind: int, value: Any) -> bytes:
    return _text(value) if kind == _STRING else struct.pack("<" + _SCALARS[kind], value)


def dequantised(source: Source, tensor: QuantisedTensor) -> Tensor | None:
    """The float32 values of a little-endian Q8_0 tensor, computed when read: scale times whole number, exact in float32. None for other types.

    Source: ggml-org/ggml src/ggml-common.h block_q8_0 (a float16 and 32 int8).
    """
    if tensor.type != "Q8_0" or source.read(4, 4)[:2] == b"\0\0":
        return None

    def values() -> NDArray[np.float32]:
        import numpy as np

        blocks = np.frombuffer(source.read(tensor.offset, tensor.nbytes), np.dtype([("d", "<f2"), ("q", "i1", 32)]))
        return (blocks["d"].astype(np.float32)[:, None] * blocks["q"].astype(np.float32)).reshape(tensor.shape)

    return Tensor.computed(DTYPES["float32"], tensor.shape, values, source.name)
