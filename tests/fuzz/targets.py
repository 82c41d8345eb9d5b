"""What is fuzzed: one target a container, and the two operations that read files in their own way (scan and salvage).

A target takes bytes and may only return or raise an UpparamError. Where another reader of the same format is at hand it is asked too: what
upparam calls sound must be read the same by the reader people load it with, and what it calls free of code must make Python's own unpickler
ask for no global outside the allowlist (the unpickler's `find_class` is replaced, so nothing is imported or called).
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import pickle
import re
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.fuzz import folders
from tests.hostile.asm import g, i, legacy, legacy_storage, mapping, npy, prog, s, sft, tarred, tensor, torch_zip, tup, zipped
from tests.hostile.corpus import hostile

from upparam import containers
from upparam.containers import archive, ggla, gguf, lookalikes, pickles, safetensors, tars, torchfile, zips
from upparam.containers import npy as numpy_files
from upparam.containers.base import TensorFile
from upparam.containers.machine import examine
from upparam.containers.reconstructors import RENAMED, trust
from upparam.containers.symbols import Trust
from upparam.errors import UpparamError
from upparam.findings import Severity
from upparam.operations import salvage
from upparam.operations.scan.fast import safetensors_tensors
from upparam.operations.scan.files import _Look
from upparam.operations.scan.verdict import FileScan, Verdict
from upparam.sources import MemorySource

PATH = Path("fuzzed.bin")
SMALL = 1 << 16
Target = Callable[[bytes], None]


def read_some(file: TensorFile) -> None:
    """Read the data of small tensors: a header may promise what its bytes do not hold."""
    for _, one in zip(range(8), file.tensors.values(), strict=False):
        if one.nbytes <= SMALL:
            assert one.read().shape == one.shape


class Stub:
    """Stands for every class and function a pickle names; can be made, called, filled."""

    def __new__(cls, *args: Any, **more: Any) -> Stub:
        return object.__new__(cls)

    def __init__(self, *args: Any, **more: Any) -> None: ...

    def __call__(self, *args: Any, **more: Any) -> Stub:
        return self

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, item: Any) -> None: ...

    def extend(self, items: Any) -> None: ...

    def __hash__(self) -> int:
        return 1


class Asking(pickle._Unpickler):  # type: ignore[name-defined, misc]
    """Python's own unpickler with its imports replaced by notes."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self.asked: set[tuple[str, str]] = set()

    def find_class(self, module: str, name: str) -> Any:
        self.asked.add((module, name))
        return Stub

    def persistent_load(self, name: Any) -> Any:
        return name


def no_hidden_import(data: bytes) -> None:
    """Python's unpickler asks for nothing that is not on the allowlist. Call it for pickles that were called free of code."""
    real = Asking(data)
    with contextlib.suppress(Exception):
        real.load()
    for module, name in real.asked:
        assert trust(RENAMED.get(module, module), name) is not Trust.CODE, (module, name)


def pickle_program(data: bytes) -> None:
    seen = examine(data, persistent=lambda name: name if type(name) is str else "outside")
    if len(data) < 4096 and seen.problem is None and not seen.code:
        no_hidden_import(data[: seen.stop])


def pickle_file(data: bytes) -> None:
    source = MemorySource(data)
    if pickles.sniff(containers.head_of(source, PATH)):
        read_some(pickles.read(source, PATH))


def torch_zip_program(data: bytes) -> None:
    """The input is the main pickle of an otherwise sound torch zip file."""
    source = MemorySource(torch_zip(data))
    file = torchfile.zipped.read(source, PATH)
    read_some(file)


def torch_zip_file(data: bytes) -> None:
    source = MemorySource(data)
    if torchfile.zipped.sniff(containers.head_of(source, PATH)):
        read_some(torchfile.zipped.read(source, PATH))


def torch_stream(data: bytes) -> None:
    read_some(torchfile.legacy.read(MemorySource(data), PATH))


def summed(data: bytes) -> bytes:
    """A tar whose header checksums are right again: a wrong one would end every execution at its first block."""
    out = bytearray(data)
    for at in range(0, len(out) - 511, 512):
        if out[at + 257 : at + 262] == b"ustar":
            total = sum(out[at : at + 148]) + 8 * 32 + sum(out[at + 156 : at + 512])
            out[at + 148 : at + 156] = b"%06o\0 " % total
    return bytes(out)


def torch_tar(data: bytes) -> None:
    source = MemorySource(summed(data))
    if torchfile.tarred.sniff(containers.head_of(source, PATH)):
        read_some(torchfile.tarred.read(source, PATH))


def zip_file(data: bytes) -> None:
    found = zips.read_archive(MemorySource(data), PATH)
    held = {}
    for member in found.members[:8]:
        with contextlib.suppress(UpparamError):
            if member.size <= SMALL:
                held[member.name] = member.source.read(0, member.size) if member.check_crc() else None
    if any(finding.severity is Severity.ERROR for finding in found.findings):
        return
    with contextlib.suppress(NotImplementedError), zipfile.ZipFile(io.BytesIO(data)) as theirs:
        names = [info.filename for info in theirs.infolist() if not info.is_dir()]
        assert names == [member.name for member in found.members], (names, [member.name for member in found.members])
        for name, ours in held.items():
            if ours is not None:
                assert theirs.read(name) == ours, name


def tar_file(data: bytes) -> None:
    data = summed(data)
    found = tars.read_archive(MemorySource(data), PATH)
    if found.findings:
        return
    with contextlib.suppress(tarfile.TarError), tarfile.open(fileobj=io.BytesIO(data)) as theirs:
        files = [(_shown(member.name), theirs.extractfile(member).read(SMALL)) for member in theirs if member.isreg()]  # type: ignore[union-attr]
        ours = [(member.name.rstrip("/"), member.source.read(0, min(member.size, SMALL))) for member in found.members]
        assert files == ours, (files[:4], ours[:4])


def _shown(name: str) -> str:
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def packed(data: bytes) -> None:
    if archive.sniff(containers.head_of(MemorySource(data), PATH)):
        for _, member in archive.contents(MemorySource(data), PATH).members[:8]:
            with contextlib.suppress(UpparamError):
                member.read(0, min(member.size, SMALL))


def npy_file(data: bytes) -> None:
    import numpy as np

    file = numpy_files.single.read(MemorySource(data), PATH)
    one = next(iter(file.tensors.values()))
    if one.nbytes > SMALL or b"# dtype" in data[:4096] or one.dtype.name.startswith(("float8", "bfloat")):
        return
    ours = one.read()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = np.load(io.BytesIO(data), allow_pickle=False)
    assert theirs.shape == ours.shape and (theirs.dtype.kind == "V" or theirs.tobytes() == ours.astype(theirs.dtype).tobytes())


def npz_file(data: bytes) -> None:
    source = MemorySource(data)
    if numpy_files.archive.sniff(containers.head_of(source, PATH)):
        read_some(numpy_files.archive.read(source, PATH))


def safetensors_file(data: bytes) -> None:
    source = MemorySource(data)
    if not safetensors.sniff(containers.head_of(source, PATH)):
        return
    fast = safetensors_tensors(source, PATH)
    try:
        file = safetensors.read(source, PATH)
    except UpparamError:
        assert fast is None, "the fast check accepts what the reader refuses"
        raise
    assert fast is None or fast == len(file.tensors)
    read_some(file)
    reference = _reference()
    if reference is not None and not file.findings:
        theirs = dict(reference(data))
        assert {name: list(value["shape"]) for name, value in theirs.items()} == {
            name: list(one.shape) for name, one in file.tensors.items()
        }


def _reference() -> Any:
    try:
        from safetensors import deserialize
    except ImportError:
        return None
    return deserialize


def gguf_file(data: bytes) -> None:
    read_some(gguf.read(MemorySource(data), PATH))


def ggla_file(data: bytes) -> None:
    read_some(ggla.read(MemorySource(data), PATH))


def anything(data: bytes) -> None:
    """The whole way a file goes: sniffing, archives around it, every container; and its name when it is none."""
    source = MemorySource(data)
    lookalikes.recognise(containers.head_of(source, PATH))
    for file in containers._open(source, PATH, ()):
        read_some(file)


def scanning(data: bytes) -> None:
    """Scan never raises, and its verdict holds for Python's unpickler."""
    report = FileScan(PATH)
    _Look(report).at(MemorySource(data), PATH, ())
    report.facts()
    if report.verdict is Verdict.CLEAN and report.formats == ["pickle"] and len(data) < 4096:
        no_hidden_import(data)


def salvaging(data: bytes) -> None:
    found = salvage._damaged(MemorySource(data), PATH)
    for _, one in zip(range(8), found.tensors.values() if found else (), strict=False):
        if one.nbytes <= SMALL:
            with contextlib.suppress(UpparamError):
                one.read()


TARGETS: dict[str, Target] = {
    "pickle-program": pickle_program, "pickle-file": pickle_file, "torch-zip-program": torch_zip_program, "torch-zip": torch_zip_file,
    "torch-stream": torch_stream, "torch-tar": torch_tar, "zip": zip_file, "tar": tar_file, "packed": packed, "npy": npy_file, "npz": npz_file,
    "safetensors": safetensors_file, "gguf": gguf_file, "ggla": ggla_file, "anything": anything, "scan": scanning, "salvage": salvaging,
    "names": folders.names_and_shapes, "config": folders.config_beside,
}  # fmt: skip


def run(name: str, data: bytes) -> None:
    """One execution. Returns, or raises something that is a finding."""
    with contextlib.suppress(UpparamError):
        TARGETS[name](data)


def _sound() -> Iterator[bytes]:
    """Small sound files of every format."""
    yield from (pickle.dumps({"a": [1, 2.5, "x", None, True, b"y" * 9], "b": (1, {2}), "c": 1 << 70}, protocol) for protocol in range(6))
    yield prog(mapping(w=tensor(), v=tensor((4,), (1,))))
    yield torch_zip(prog(mapping(w=tensor())))
    yield legacy(prog(mapping(w=tensor(store=legacy_storage()))))
    yield from (pack(torch_zip(prog(mapping(w=tensor())))) for pack in (gzip.compress, bz2.compress, lzma.compress, zlib.compress))
    array = npy("'<f4'", "(2, 3)", bytes(24))
    yield from (array, npy("'>i2'", "(3,)", bytes(6), "True"), zipped({"a.npy": array, "b.npy": npy("'<f2'", "()", bytes(2))}))
    yield zipped({"a.npy": array}, zipfile.ZIP_DEFLATED)
    yield tarred({"a.npy": array, "long" * 40 + ".bin": b"x" * 600})
    yield sft(
        b'{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"BF16","shape":[2],"data_offsets":[4,8]}}',
        bytes(8),
    )
    text = struct.pack("<Q", 4) + b"name"
    keys = text + struct.pack("<I", 8) + text + text + struct.pack("<If", 6, 1.0) + text + struct.pack("<IIQ", 9, 4, 2) + bytes(8)
    info = text + struct.pack("<IQQIQ", 2, 4, 2, 0, 0)
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 3) + keys + info
    yield head + bytes(-len(head) % 32) + bytes(32)
    entry = struct.pack("<iii", 2, 5, 0) + struct.pack("<ii", 4, 2) + b"a.lora"[:5]
    head = b"algg" + struct.pack("<Iii", 1, 4, 8) + entry
    yield head + bytes(-len(head) % 32) + bytes(32)
    members = {
        "sys_info": prog(mapping(protocol_version=i(1000))), "pickle": prog(mapping(w=b"P5\n")),
        "tensors": prog(b"K\x01") + prog(tup(i(5), i(1), g("torch", "FloatTensor"))) + struct.pack("<iiqqqqq", 2, 0, 2, 2, 2, 1, 0),
        "storages": prog(b"K\x01") + prog(tup(i(1), s("cpu"), g("torch", "FloatStorage"))) + struct.pack("<q4f", 4, 1, 2, 3, 4) + prog(b"]"),
    }  # fmt: skip
    yield tarred(members)


_PICKLE = rb"\x80|[(\]}cI]"
STARTS: dict[str, bytes] = {
    "pickle-program": _PICKLE, "pickle-file": _PICKLE, "torch-zip-program": rb"\x80", "torch-zip": b"PK", "torch-stream": rb"\x80.\x8a\x0al\xfc",
    "torch-tar": rb".{257}ustar", "zip": b"PK", "tar": rb".{257}ustar", "packed": rb"\x1f\x8b|BZh|\xfd7zXZ|\x78|\x5d", "npy": rb"\x93NUMPY", "npz": b"PK",
    "safetensors": rb".{8}\{", "gguf": b"GGUF", "ggla": b"algg",
}  # fmt: skip
"""How inputs of a target begin; other seeds would end at its first check."""


def seeds(name: str) -> list[bytes]:
    """Sound files first, then the hostile corpus, as far as they are small and of the target's format."""
    if name in ("names", "config"):
        return folders.NAMES if name == "names" else folders.CONFIGS
    found = [*_sound(), *(case.data for case in hostile("/nonexistent/canary") if len(case.data) <= 8192)]
    return [data for data in found if re.match(STARTS.get(name, b""), data, re.S)]
