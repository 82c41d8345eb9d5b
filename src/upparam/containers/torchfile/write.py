"""Write a torch zip file that `torch.load(weights_only=True)` reads, without torch and with one tensor in memory at a time.

Storages are aligned to 64 bytes as torch's own writer does, so the file can be memory-mapped. Source: `_save` in torch/serialization.py,
`Tensor._reduce_ex_internal` in torch/_tensor.py and caffe2/serialize/inline_container.cc of pytorch/pytorch.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from typing import IO, Any

from upparam.containers.writing import chunks
from upparam.errors import RefusedError
from upparam.tensors import Tensor, contiguous_strides

ALIGNMENT = 64
ROOT = "archive"

_TYPED = {
    "float64": "Double", "float32": "Float", "float16": "Half", "bfloat16": "BFloat16", "int64": "Long", "int32": "Int", "int16": "Short",
    "int8": "Char", "uint8": "Byte", "bool": "Bool", "complex64": "ComplexFloat", "complex128": "ComplexDouble",
}  # fmt: skip
_FULL32 = 0xFFFFFFFF
_DATE = 1 << 5 | 1
"""1980-01-01, so that equal tensors give equal files."""


def write(stream: IO[bytes], structure: Any) -> None:
    """Write `structure` (nested dicts, lists and tuples of Tensors, numbers, strings, bytes and None) as a torch zip file.

    The same Tensor object twice becomes one shared storage. Raises RefusedError for anything a weights-only load could not read back.
    """
    pickler = _Pickler()
    pickler.value(structure, "")
    zipped = _Zip(stream)
    zipped.add(f"{ROOT}/data.pkl", [b"\x80\x02" + b"".join(pickler.parts) + b"."])
    zipped.add(f"{ROOT}/byteorder", [b"little"])
    for key, (name, tensor) in enumerate(pickler.storages):
        zipped.add(f"{ROOT}/data/{key}", chunks(tensor, name), tensor.nbytes)
    zipped.add(f"{ROOT}/version", [b"3\n"])
    zipped.close()


class _Pickler:
    """Emits protocol 2 opcodes: only data, and the two rebuild functions that weights-only loading allows."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.storages: list[tuple[str, Tensor]] = []
        self.keys: dict[int, int] = {}

    def put(self, *parts: bytes) -> None:
        self.parts += parts

    def value(self, value: Any, path: str) -> None:
        kind = type(value)
        if kind is Tensor:
            self.tensor(value, path)
        elif kind is dict or (isinstance(value, dict) and kind.__module__ == "collections"):
            self.put(b"}")
            for key, item in value.items():
                self.value(key, path)
                self.value(item, f"{path}/{key}")
                self.put(b"s")
        elif kind is list:
            self.put(b"]")
            for index, item in enumerate(value):
                self.value(item, f"{path}/{index}")
                self.put(b"a")
        elif kind is tuple:
            self.put(b"(")
            for index, item in enumerate(value):
                self.value(item, f"{path}/{index}")
            self.put(b"t")
        else:
            self.scalar(value, path)

    def scalar(self, value: Any, path: str) -> None:
        kind = type(value)
        if value is None or kind is bool:
            self.put(b"N" if value is None else b"\x88" if value else b"\x89")
        elif kind is int and value.bit_length() <= 31:
            self.put(b"J" + struct.pack("<i", value))
        elif kind is int and value.bit_length() <= 255 * 8 - 1:
            raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            self.put(b"\x8a" + bytes([len(raw)]) + raw)
        elif kind is float:
            self.put(b"G" + struct.pack(">d", value))
        elif kind is str:
            raw = value.encode("utf-8", "surrogatepass")
            self.put(b"X" + struct.pack("<I", len(raw)) + raw)
        elif kind is bytes:
            self.put(b"c_codecs\nencode\n(")
            self.scalar(value.decode("latin-1"), path)
            self.scalar("latin1", path)
            self.put(b"tR")
        else:
            raise RefusedError(
                "a torch file for weights-only loading cannot hold this", tensor=path.lstrip("/") or None,
                expected="tensors, numbers, strings, bytes, lists, tuples and dicts", found=kind.__name__,
            )  # fmt: skip

    def tensor(self, tensor: Tensor, path: str) -> None:
        """torch._utils._rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict()), or v3 with a dtype for newer element types."""
        key = self.keys.get(id(tensor))
        if key is None:
            key = self.keys[id(tensor)] = len(self.storages)
            self.storages.append((path.lstrip("/"), tensor))
        typed = _TYPED.get(tensor.dtype.name)
        self.put(b"ctorch._utils\n_rebuild_tensor_v2\n(" if typed else b"ctorch._utils\n_rebuild_tensor_v3\n(", b"(")
        self.scalar("storage", path)
        self.put(f"ctorch\n{typed}Storage\n".encode() if typed else b"ctorch.storage\nUntypedStorage\n")
        self.scalar(str(key), path)
        self.scalar("cpu", path)
        self.scalar(tensor.numel if typed else tensor.nbytes, path)
        self.put(b"tQ")
        self.scalar(0, path)
        self.value(tensor.shape, path)
        self.value(contiguous_strides(tensor.shape), path)
        self.put(b"\x89ccollections\nOrderedDict\n)R")
        if not typed:
            self.put(f"ctorch\n{tensor.dtype.name}\n".encode())
        self.put(b"tR")


class _Zip:
    """Stored members with their CRC behind them (a data descriptor), so that nothing is read twice and the stream need not seek."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream = stream
        self.at = 0
        self.entries: list[bytes] = []

    def put(self, data: bytes | memoryview) -> None:
        self.stream.write(data)
        self.at += len(data)

    def add(self, name: str, parts: Iterable[bytes | memoryview], size: int = 0) -> None:
        """A member; `size` decides whether its fields need 64 bits."""
        raw, header, wide = name.encode(), self.at, size >= _FULL32
        extra = struct.pack("<HHQQ", 1, 16, 0, 0) if wide else b""
        padding = -(header + 30 + len(raw) + len(extra) + 4) % ALIGNMENT
        extra += b"FB" + struct.pack("<H", padding) + b"Z" * padding
        said = _FULL32 if wide else 0
        self.put(
            struct.pack("<4s5H3L2H", b"PK\x03\x04", 45 if wide else 20, 0x808, 0, 0, _DATE, 0, said, said, len(raw), len(extra))
            + raw
            + extra
        )
        crc, start = 0, self.at
        for part in parts:
            crc = zlib.crc32(part, crc)
            self.put(part)
        size = self.at - start
        self.put(b"PK\x07\x08" + struct.pack("<LQQ" if wide else "<LLL", crc, size, size))
        self.entry(raw, header, crc, size)

    def entry(self, raw: bytes, header: int, crc: int, size: int) -> None:
        values = [value for value in (size, size, header) if value >= _FULL32]
        extra = struct.pack(f"<HH{len(values)}Q", 1, 8 * len(values), *values) if values else b""
        narrow = [min(value, _FULL32) for value in (size, size, header)]
        fields = (
            45 if values else 20,
            45 if values else 20,
            0x808,
            0,
            0,
            _DATE,
            crc,
            narrow[0],
            narrow[1],
            len(raw),
            len(extra),
            0,
            0,
            0,
            0,
        )
        self.entries.append(struct.pack("<4s6H3L5H2L", b"PK\x01\x02", *fields, narrow[2]) + raw + extra)

    def close(self) -> None:
        """The directory, with its 64-bit end record as torch's writer always leaves one."""
        start, count = self.at, len(self.entries)
        for entry in self.entries:
            self.put(entry)
        end = self.at
        self.put(struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, end - start, start))
        self.put(struct.pack("<4sLQL", b"PK\x06\x07", 0, end, 1))
        few = min(count, 0xFFFF)
        self.put(struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, few, few, min(end - start, _FULL32), min(start, _FULL32), 0))
