"""A pickle assembler and the little archives the hostile corpus is made of. Payloads do one thing: create the canary file."""

from __future__ import annotations

import io
import struct
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

CODE, MALFORMED, CLEAN, UNKNOWN = "carries code", "malformed", "clean data", "unknown"


@dataclass(frozen=True)
class Case:
    """A file: its name, the class of trick it stands for, its bytes, the verdict scan must give."""

    name: str
    kind: str
    data: bytes
    verdict: str

    def write(self, folder: Path) -> Path:
        path = folder / self.name
        path.write_bytes(self.data)
        return path


def s(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def i(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw if len(raw) < 256 else b"\x8b" + struct.pack("<i", len(raw)) + raw


def by(raw: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(raw)) + raw


def g(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def sg(module: str, name: str) -> bytes:
    return s(module) + s(name) + b"\x93"


def tup(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def call(function: bytes, *args: bytes) -> bytes:
    return function + tup(*args) + b"R"


def prog(*parts: bytes, proto: int = 2) -> bytes:
    return b"\x80" + bytes([proto]) + b"".join(parts) + b"."


def shell(canary: str) -> bytes:
    return s(f"touch '{canary}'")


def python(canary: str) -> bytes:
    return s(f"open({canary!r}, 'w').close()")


def storage(key: str = "0", count: int = 4, kind: str = "FloatStorage", module: str = "torch") -> bytes:
    return tup(s("storage"), g(module, kind), s(key), s("cpu"), i(count)) + b"Q"


def tensor(shape=(2, 2), stride=(2, 1), offset=0, store: bytes | None = None, function: bytes | None = None) -> bytes:
    sizes, strides = tup(*map(i, shape)), tup(*map(i, stride))
    return call(
        function or g("torch._utils", "_rebuild_tensor_v2"),
        store or storage(),
        i(offset),
        sizes,
        strides,
        b"\x89",
        call(g("collections", "OrderedDict")),
    )


def mapping(**items: bytes) -> bytes:
    return b"}(" + b"".join(s(key) + value for key, value in items.items()) + b"u"


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data, method)
    return stream.getvalue()


def torch_zip(main: bytes, extra: dict[str, bytes] | None = None, root: str = "archive", method: int = zipfile.ZIP_STORED) -> bytes:
    members = {
        f"{root}/data.pkl": main,
        f"{root}/byteorder": b"little",
        f"{root}/data/0": struct.pack("<4f", 1, 2, 3, 4),
        f"{root}/version": b"3\n",
    }
    return zipped(members | (extra or {}), method)


def tarred(members: dict[str, bytes | tarfile.TarInfo]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, data in members.items():
            if isinstance(data, tarfile.TarInfo):
                archive.addfile(data)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


MAGIC = prog(b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19")


def legacy(main: bytes, keys: bytes | None = None, data: bytes | None = None, info: bytes | None = None) -> bytes:
    keys = prog(b"](" + s("0") + b"e") if keys is None else keys
    data = struct.pack("<q4f", 4, 1, 2, 3, 4) if data is None else data
    return MAGIC + prog(b"M\xe9\x03") + (info or prog(mapping(little_endian=b"\x88"))) + main + keys + data


def legacy_storage(key: str = "0", count: int = 4) -> bytes:
    return tup(s("storage"), g("torch", "FloatStorage"), s(key), s("cpu"), i(count), b"N") + b"Q"


def npy(descr: str, shape: str, data: bytes, order: str = "False") -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}".encode()
    header += b" " * (-(10 + len(header) + 1) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def sft(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data
