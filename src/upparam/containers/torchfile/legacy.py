"""torch pickle streams (torch.save before 1.6, or with `_use_new_zipfile_serialization=False`).

Five pickles in a row - a magic number, the protocol version, facts about the system, the object, the list of storage keys - then for every
key the number of elements (int64) and the raw little-endian elements. Source: `_legacy_save` and `_legacy_load` in
torch/serialization.py and `THPStorage_writeFileRaw` in torch/csrc/serialization.cpp of pytorch/pytorch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from upparam.containers import tars
from upparam.containers.base import Head, Opaque, TensorFile
from upparam.containers.evidence import tensor_file
from upparam.containers.machine import Examination, new_budget
from upparam.containers.symbols import Broken, Storage, StorageType, summary
from upparam.containers.torchfile.stream import Stream
from upparam.containers.torchfile.zipped import storage_id
from upparam.errors import MalformedError, UpparamError
from upparam.findings import Finding, warning
from upparam.sources import Source

name = "torch-legacy"
title = "torch pickle stream"

MAGIC = 0x1950A86A20F9469CFC6C
VERSION = 1001
_MAGIC_BYTES = b"\x8a\x0a" + MAGIC.to_bytes(10, "little")
_MAGIC_TEXT = str(MAGIC).encode()


def sniff(head: Head) -> bool:
    """The magic number, and no tar header around it: torch's own loader tries tar first."""
    return marked(head) and not tars.sniff(head)


def marked(head: Head) -> bool:
    """The magic number, pickled in any protocol, within the first bytes."""
    return _MAGIC_BYTES in head.data[:40] or _MAGIC_TEXT in head.data[:40]


def read(source: Source, path: Path) -> TensorFile:
    """Names, dtypes, shapes and byte ranges. Raises MalformedError or LimitError, naming the tensor where one is at fault."""
    seen, findings = take_apart(source, path)
    return tensor_file(path, name, seen, findings)


def take_apart(source: Source, path: Path) -> tuple[Examination, list[Finding]]:
    """The object's examination (its problem left in it) and findings. The object is read twice: storages lie behind it."""
    stream = Stream(source, path, new_budget(source.size))
    for what, expected in (("magic number", MAGIC), ("protocol version", VERSION)):
        found = stream.value(window=256)
        if found != expected:
            raise MalformedError(f"a wrong {what}", file=path, expected=expected, found=summary(found))
    stream.value(window=1024)
    start, budget = stream.at, stream.budget
    asked = _Asked()
    seen = stream.examine(asked)
    if seen.problem is not None:
        seen.uses = stream.uses
        return seen, []
    try:
        keys = stream.value()
        if not isinstance(keys, list) or not all(isinstance(key, (str, int)) for key in keys):
            raise MalformedError("the list of storage keys is none", file=path, found=summary(keys))
    except UpparamError as problem:
        seen.problem, seen.uses = problem, stream.uses
        return seen, []
    placed, findings = _place(stream, [str(key) for key in keys], asked, path)
    stream.at, stream.budget = start, budget
    seen = stream.examine(placed)
    seen.uses = stream.uses
    return seen, findings


def _split(name: Any) -> tuple[Any, str, int, tuple[str, int, int] | None]:
    """(storage type, root key, elements, view) of a persistent id; a view is (key, offset, elements)."""
    kind, key, count = storage_id(name, 6)
    view = name[5]
    if view is None:
        return kind, key, count, None
    if type(view) is not tuple or len(view) != 3 or type(view[1]) is not int or type(view[2]) is not int or min(view[1:]) < 0:
        raise MalformedError("a storage view of the wrong form", found=summary(view))
    return kind, key, count, (summary(view[0]), view[1], view[2])


def _module(name: Any) -> bool:
    return type(name) is tuple and len(name) == 4 and name[0] in ("module", b"module")


class _Asked:
    """First reading: which storages there are. Tensors made of them are thrown away."""

    def __init__(self) -> None:
        self.storages: dict[str, tuple[StorageType, int]] = {}

    def __call__(self, name: Any) -> Any:
        if _module(name):
            return name[1]
        kind, key, count, _ = _split(name)
        if isinstance(kind, Opaque):
            raise MalformedError("a storage of an element type upparam does not read", found=kind.qualname)
        self.storages.setdefault(key, (kind, count))
        return Broken(MalformedError("not placed yet"))


class _Placed:
    """Second reading: where the storages lie."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}

    def __call__(self, name: Any) -> Any:
        if _module(name):
            return name[1]
        kind, key, _, view = _split(name)
        storage = self.found.get(key) or Broken(MalformedError("a storage that the file does not hold", found=f"key {key[:40]}"))
        if view is None or isinstance(storage, Broken):
            return storage
        itemsize = kind.dtype.itemsize if kind.dtype else 1
        _, offset, count = view
        if (offset + count) * itemsize > storage.nbytes:
            return Broken(
                MalformedError("a storage view reaches outside its storage", expected=storage.nbytes, found=(offset + count) * itemsize)
            )
        return Storage(storage.dtype, storage.source, storage.start + offset * itemsize, count * itemsize)


def _place(stream: Stream, keys: list[str], asked: _Asked, path: Path) -> tuple[_Placed, list[Finding]]:
    placed = _Placed()
    for key in keys:
        if key not in asked.storages or key in placed.found:
            raise MalformedError("a storage that no tensor names, or named twice", file=path, found=f"key {key[:40]}")
        kind, count = asked.storages[key]
        nbytes = count * (kind.dtype.itemsize if kind.dtype else 1)
        try:
            (said,) = stream.numbers("<q")
            if said != count:
                raise MalformedError("a storage of another size than its tensors expect", expected=f"{count} elements", found=said)
            placed.found[key] = Storage(kind.dtype, stream.source, stream.at, nbytes)
            if stream.at + nbytes > stream.source.size:
                raise MalformedError(
                    "the file ends before the tensor's data does", expected=f"{stream.at + nbytes} bytes", found=stream.source.size,
                    remedy="the file is truncated; fetch it again",
                )  # fmt: skip
        except UpparamError as problem:
            for left in keys[keys.index(key) :]:
                placed.found[left] = Broken(problem)
            return placed, []
        stream.at += nbytes
    if stream.at < stream.source.size:
        return placed, [
            warning("trailing-bytes", path.name, f"{stream.source.size - stream.at} bytes follow the last storage and belong to none")
        ]
    return placed, []
