"""npy and npz: one numpy array with a short text header; a zip of such arrays.

The header is a Python dict literal. It is read by a strict parser of exactly that literal, never evaluated. Arrays that hold objects
(a pickle in disguise), records, text or dates are refused. Source of the layout: numpy/numpy `numpy/lib/_format_impl.py` (docstring).

numpy has no name for bfloat16 and the 8-bit floats: ml_dtypes and MLX save them with the descr '<V2', '<V1' or '<f1', and what they were
is lost. We write the same descr and put the lost name behind the dict as a Python comment inside the header's padding
(`# dtype: bfloat16`): `numpy.load` gives the same bits as a void array, `.view(ml_dtypes.bfloat16)` gives them back, and our own reader
needs no guess. Without that note '<V2' is read as bfloat16, and '<f1' as float8_e5m2, with a finding that says so; '<V1' fits several
types and is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from upparam.containers.base import LONE, Head, TensorFile
from upparam.containers.writing import chunks
from upparam.containers.zips import ZipMember, read_archive
from upparam.dtypes import DTYPES, DType
from upparam.errors import LimitError, MalformedError, RefusedError, UpparamError
from upparam.findings import Finding, warning
from upparam.limits import MAX_DIMS, MAX_NPY_HEADER, MAX_TENSORS
from upparam.sources import Source
from upparam.tensors import Tensor, contiguous_strides

MAGIC = b"\x93NUMPY"
_SUFFIX = ".npy"
_NATIVE = {
    "f2": "float16", "f4": "float32", "f8": "float64", "i1": "int8", "i2": "int16", "i4": "int32", "i8": "int64",
    "u1": "uint8", "u2": "uint16", "u4": "uint32", "u8": "uint64", "b1": "bool", "c8": "complex64", "c16": "complex128",
}  # fmt: skip
_NAMED = {name: descr for descr, name in _NATIVE.items()}
_NAMELESS = {
    "bfloat16": "<V2", "float8_e4m3fn": "<V1", "float8_e5m2": "<f1", "float8_e8m0fnu": "<V1",
    "float8_e4m3fnuz": "<V1", "float8_e5m2fnuz": "<V1",
}  # fmt: skip
"""What ml_dtypes saves these as; numpy refuses to load '<f1', so we write '<V1' for every 8-bit float."""
_INFERRED = {"<V2": "bfloat16", "|V2": "bfloat16", "<f1": "float8_e5m2", "|f1": "float8_e5m2"}
_REFUSED = {
    "O": ("an object array: its data is a pickle, not numbers", "save plain numeric arrays"),
    "U": ("an array of text, not numbers", None),
    "S": ("an array of bytes strings, not numbers", None),
    "a": ("an array of bytes strings, not numbers", None),
    "M": ("an array of dates, not numbers", None),
    "m": ("an array of time spans, not numbers", None),
    "V": ("an array of nameless bytes; ml_dtypes saves several 8-bit floats this way and their name is lost", "save it as safetensors"),
}
_TOKEN = r"\s*(?:(?P<text>'[^'\\\n]*'|\"[^\"\\\n]*\")|(?P<word>True|False)|(?P<number>0+|[1-9]\d{0,19})L?(?![\w.])|(?P<mark>[{}(),:\[\]]))"
_NOTE = r"#\s*dtype:\s*(\w+)\s*\Z"


@dataclass(frozen=True)
class NpyHeader:
    """What a header says: element type, shape, order, byte order, where the data starts; `findings` for what was inferred."""

    dtype: DType
    shape: tuple[int, ...]
    fortran: bool
    big_endian: bool
    data_start: int
    findings: tuple[Finding, ...] = ()


def read_header(source: Source, path: Path, at: int = 0, name: str | None = None) -> NpyHeader:
    """The header at byte `at` of a source. `name` is the array's, for messages. Raises MalformedError or LimitError."""

    def bad(message: str, **facts: Any) -> MalformedError:
        return MalformedError(message, file=path, tensor=name, **facts)

    if source.size - at < 10:
        raise bad("too short for an npy array", expected="at least 10 bytes", found=source.size - at)
    start = source.read(at, 10)
    if start[:6] != MAGIC:
        raise bad("not an npy array", expected=MAGIC.hex(), found=start[:6].hex())
    version = (start[6], start[7])
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise bad("an npy version that does not exist", expected="1.0, 2.0 or 3.0", found=f"{version[0]}.{version[1]}")
    wide = 2 if version == (1, 0) else 4
    if source.size - at < 8 + wide:
        raise bad("the file ends inside its header", found=source.size - at)
    # Read strictly forwards: an inflated member is then never inflated further than its header.
    length = int.from_bytes(start[8:10] if wide == 2 else start[8:10] + source.read(at + 10, 2), "little")
    if length > MAX_NPY_HEADER:
        raise LimitError("the header is longer than any real one", file=path, tensor=name, expected=f"<= {MAX_NPY_HEADER}", found=length)
    data_start = at + 8 + wide + length
    if data_start > source.size:
        raise bad("the file ends inside its header", expected=f"{data_start} bytes", found=source.size, remedy="fetch it again")
    try:
        text = source.read(at + 8 + wide, length).decode("utf-8" if version == (3, 0) else "latin-1")
    except UnicodeDecodeError as problem:
        raise bad("the header is not UTF-8 text") from problem
    try:
        descr, fortran, shape, note = _parse(text)
    except ValueError as problem:
        raise bad(f"the header is not the dict an npy array starts with: {problem}", found=repr(text.strip()[:120])) from problem
    if len(shape) > MAX_DIMS:
        raise LimitError("more dimensions than any real array", file=path, tensor=name, expected=f"<= {MAX_DIMS}", found=len(shape))
    dtype, big_endian, findings = _dtype(descr, note, name or path.name, bad)
    return NpyHeader(dtype, shape, fortran, big_endian, data_start, findings)


def _parse(text: str) -> tuple[str, bool, tuple[int, ...], str | None]:
    """descr, fortran_order and shape of the header's dict, and the dtype note behind it. Raises ValueError."""
    tokens: list[tuple[str, str]] = []
    at = 0
    token = re.compile(_TOKEN, re.ASCII)
    while match := token.match(text, at):
        assert match.lastgroup is not None
        tokens.append((match.lastgroup, match[match.lastgroup]))
        at = match.end()
    rest = text[at:].strip(" \t\n\f")
    note = re.fullmatch(_NOTE, rest)
    if rest and note is None:
        raise ValueError(f"unexpected {rest[:20]!r}")
    found: dict[str, Any] = {}
    left = iter([*tokens, ("end", "")])

    def take(kind: str, value: str | None = None) -> str:
        have = next(left, ("end", ""))
        if have[0] != kind or (value is not None and have[1] != value):
            raise ValueError(f"expected {value or kind}, found {have[1] or 'its end'}")
        return have[1]

    take("mark", "{")
    while True:
        kind, value = next(left)
        if (kind, value) == ("mark", "}"):
            break
        key = value[1:-1]
        if kind != "text" or key in found:
            raise ValueError(f"unexpected {value or 'end'}")
        take("mark", ":")
        found[key] = _value(left)
        kind, value = next(left)
        if (kind, value) == ("mark", "}"):
            break
        if (kind, value) != ("mark", ","):
            raise ValueError(f"unexpected {value or 'end'}")
    take("end")
    descr, fortran, shape = found.get("descr"), found.get("fortran_order"), found.get("shape")
    if set(found) != {"descr", "fortran_order", "shape"} or type(fortran) is not bool or not isinstance(shape, tuple):
        raise ValueError("it needs exactly descr, fortran_order and shape")
    if not all(type(size) is int for size in shape):
        raise ValueError("shape must hold whole numbers")
    return descr if isinstance(descr, str) else "records", fortran, shape, note[1] if note else None


def _value(left: Any) -> Any:
    """A string, a truth value, or a flat tuple of numbers; a list (a record type) comes back as an empty list, its tokens passed over."""
    kind, value = next(left)
    if kind == "text":
        return value[1:-1]
    if kind == "word":
        return value == "True"
    if (kind, value) == ("mark", "("):
        items: list[int] = []
        comma = False
        while True:
            kind, value = next(left)
            if (kind, value) == ("mark", ")"):
                if len(items) == 1 and not comma:
                    raise ValueError("shape is not a tuple")
                return tuple(items)
            if (kind, value) == ("mark", ",") and items and not comma:
                comma = True
            elif kind == "number" and (comma or not items):
                items.append(int(value))
                comma = False
            else:
                raise ValueError(f"unexpected {value or 'end'} in a tuple")
    if (kind, value) == ("mark", "["):
        depth = 1
        while depth:
            kind, value = next(left)
            if kind == "end":
                raise ValueError("a list without an end")
            depth += {"[": 1, "]": -1}.get(value, 0) if kind == "mark" else 0
        return []
    raise ValueError(f"unexpected {value or 'end'}")


def _dtype(descr: str, note: str | None, subject: str, bad: Any) -> tuple[DType, bool, tuple[Finding, ...]]:
    if descr == "records":
        raise bad("an array of records (a structured dtype), not of numbers", expected="a numeric dtype", found="a list of fields")
    order, kind = (descr[:1], descr[1:]) if descr[:1] in ("<", ">", "|", "=") else ("", descr)
    nameless = kind in ("V2", "V1", "f1") and order in ("<", "|")
    if note is not None:
        if not nameless or note not in _NAMELESS or DTYPES[note].itemsize != int(kind[1]):
            raise bad("the header's dtype note does not fit its descr", expected=descr, found=note)
        return DTYPES[note], False, ()
    inferred = _INFERRED.get(descr)
    if inferred:
        found = warning(
            "inferred-dtype", subject, f"read as {inferred}: the file says only '{descr}', numpy having no name for it",
            f"ml_dtypes and MLX save {inferred} arrays as '{descr}'", confidence=0.95,
        )  # fmt: skip
        return DTYPES[inferred], False, (found,)
    if kind in _NATIVE and order:
        if order == "=":
            assumed = warning(
                "assumed-byte-order",
                subject,
                "the byte order is that of the machine that wrote it; read as little-endian",
                f"descr '{descr}'",
            )
            return DTYPES[_NATIVE[kind]], False, (assumed,)
        dtype = DTYPES[_NATIVE[kind]]
        if order == "|" and dtype.itemsize > 1:
            raise bad("a dtype without its byte order", expected=f"'<{kind}' or '>{kind}'", found=descr)
        return dtype, order == ">" and dtype.itemsize > 1, ()
    message, remedy = _REFUSED.get(kind[:1], ("an element type that is no tensor data", None))
    raise bad(message, expected="numbers", found=f"descr '{descr}'", remedy=remedy)


def _tensor(source: Source, path: Path, header: NpyHeader, name: str | None) -> Tensor:
    strides = contiguous_strides(header.shape[::-1])[::-1] if header.fortran and len(header.shape) > 1 else None
    tensor = Tensor(header.dtype, header.shape, source, header.data_start, strides, header.big_endian)
    try:
        tensor.check(name)
    except MalformedError as problem:
        raise MalformedError(
            problem.message, file=path, tensor=name, expected=problem.expected, found=problem.found, remedy=problem.remedy
        ) from None
    return tensor


class _Single:
    """One npy array, or several that were saved one after another to the same file."""

    name = "npy"
    title = "numpy array (.npy)"

    def sniff(self, head: Head) -> bool:
        """The magic string."""
        return head.data.startswith(MAGIC)

    def read(self, source: Source, path: Path) -> TensorFile:
        """The array as LONE; arrays saved one after another as '0', '1', ... Raises MalformedError or LimitError."""
        found: list[Tensor] = []
        findings: list[Finding] = []
        at = 0
        while True:
            header = read_header(source, path, at)
            tensor = _tensor(source, path, header, None)
            found.append(tensor)
            findings += header.findings
            at = header.data_start + tensor.nbytes
            if source.read(at, min(len(MAGIC), source.size - at)) != MAGIC:
                break
            if len(found) >= MAX_TENSORS:
                raise LimitError("more arrays than any real file", file=path, expected=f"<= {MAX_TENSORS}")
        if at < source.size:
            findings.append(warning("trailing-bytes", path.name, f"{source.size - at} bytes follow the array", f"data ends at {at}"))
        tensors = {LONE: found[0]} if len(found) == 1 else {str(index): tensor for index, tensor in enumerate(found)}
        return TensorFile(path, self.name, tensors, findings=findings)


class _Archive:
    """A zip whose members are npy arrays."""

    name = "npz"
    title = "numpy archive (.npz)"

    def sniff(self, head: Head) -> bool:
        """A zip that starts with a member named *.npy and holds no other kind (a damaged directory leaves it at the first)."""
        if head.data[:4] != b"PK\x03\x04" or not _first_member(head.data).endswith(_SUFFIX):
            return False
        try:
            members = read_archive(head.source, Path(head.name)).members
        except UpparamError:
            return True
        return bool(members) and all(member.name.endswith(_SUFFIX) for member in members)

    def read(self, source: Source, path: Path) -> TensorFile:
        """Every member under its name without '.npy'. Raises MalformedError (a duplicate name, a member of objects) or LimitError."""
        archive = read_archive(source, path)
        tensors: dict[str, Tensor] = {}
        findings = list(archive.findings)
        for member in archive.members:
            key = member.name.removesuffix(_SUFFIX)
            if key in tensors:
                raise MalformedError("two members of the same name", file=path, tensor=key, remedy="the file is malformed or crafted")
            tensor, seen = _member(member, path, key)
            tensors[key] = tensor
            findings += seen
        return TensorFile(path, self.name, tensors, findings=findings)


def _first_member(data: bytes) -> str:
    return data[30 : 30 + int.from_bytes(data[26:28], "little")].decode("utf-8", "replace")


def _member(member: ZipMember, path: Path, key: str) -> tuple[Tensor, list[Finding]]:
    # The header is read through a source of its own, so that a deflated member's decompressor is not kept for each tensor.
    header = read_header(member.source, path, 0, key)
    tensor = _tensor(member.source, path, header, key)
    findings = list(header.findings)
    extra = member.size - header.data_start - tensor.nbytes
    if extra:
        findings.append(warning("trailing-bytes", key, f"{extra} bytes follow the array", f"data ends at {member.size - extra}"))
    return tensor, findings


single = _Single()
archive = _Archive()


def write_npy(stream: IO[bytes], tensor: Tensor) -> None:
    """Write one array (npy 1.0, C order, little-endian). bfloat16 and the 8-bit floats carry their name as a note (see the module's text)."""
    stream.write(_header(tensor))
    for chunk in chunks(tensor):
        stream.write(chunk)


def _header(tensor: Tensor) -> bytes:
    name = tensor.dtype.name
    if name in _NAMED:
        kind = _NAMED[name]
        descr, note = ("|" if tensor.dtype.itemsize == 1 else "<") + kind, ""
    else:
        descr, note = f"<V{tensor.dtype.itemsize}", f" # dtype: {name}"
    shape = "(" + ", ".join(map(str, tensor.shape)) + ("," if len(tensor.shape) == 1 else "") + ")"
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}{note}".encode("ascii")
    text += b" " * (-(len(MAGIC) + 4 + len(text) + 1) % 64) + b"\n"
    return MAGIC + b"\x01\x00" + len(text).to_bytes(2, "little") + text


def write_npz(stream: IO[bytes], tensors: Mapping[str, Tensor]) -> None:
    """Write an npz: stored (uncompressed) members in the given order, the same bytes each time.

    Raises RefusedError for a name that a zip member cannot have without loaders reading another one (NUL, an absolute path, '..').
    """
    import zipfile

    for key in tensors:
        if (
            "\0" in key
            or key.startswith(("/", "\\"))
            or ":" in key[:2]
            or ".." in key.replace("\\", "/").split("/")
            or not key.isprintable()
        ):
            raise RefusedError("a name that an npz cannot carry safely", tensor=key, remedy="write safetensors instead, or rename it")
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as out:
        for key, tensor in tensors.items():
            entry = zipfile.ZipInfo(key + _SUFFIX, date_time=(1980, 1, 1, 0, 0, 0))
            entry.external_attr = 0o644 << 16
            with out.open(entry, "w", force_zip64=tensor.nbytes >= 1 << 31) as member:
                write_npy(member, tensor)
