"""torch zip files (torch.save since 1.6) and TorchScript archives: `ROOT/data.pkl` describes tensors, `ROOT/data/KEY` holds storages.

Source: `_save` and `_load` in torch/serialization.py and caffe2/serialize/inline_container.cc of pytorch/pytorch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upparam.containers.base import Head, Opaque, TensorFile
from upparam.containers.evidence import tensor_file
from upparam.containers.machine import Examination, examine, new_budget, program
from upparam.containers.symbols import Broken, Storage, StorageType, summary
from upparam.containers.zips import ZipArchive, ZipMember, members_by_headers, read_archive
from upparam.errors import MalformedError, UpparamError
from upparam.findings import Finding, error
from upparam.sources import Source

name = "torch-zip"
title = "torch zip file"

MAIN = "data.pkl"


def sniff(head: Head) -> bool:
    """A zip whose first member is ROOT/data.pkl, or whose directory lists one."""
    if head.data[:4] != b"PK\x03\x04":
        return False
    first = _first_name(head.data)
    if first.count("/") == 1 and first.endswith("/" + MAIN):
        return True
    if first.endswith(".npy") or "/" not in first:
        return False
    try:
        return root_of(read_archive(head.source, Path(head.name))) is not None
    except UpparamError:
        return False


def _first_name(data: bytes) -> str:
    return data[30 : 30 + int.from_bytes(data[26:28], "little")].decode("latin-1")


def root_of(archive: ZipArchive) -> str | None:
    """The top folder with the main pickle: the one of the first member, as torch's own reader takes it."""
    roots = [
        member.name.removesuffix(MAIN) for member in archive.members if member.name.endswith("/" + MAIN) and member.name.count("/") == 1
    ]
    if not roots:
        return None
    first = archive.members[0].name.split("/")[0] + "/"
    return first if first in roots else roots[0]


@dataclass
class Opened:
    """A torch zip file taken apart: its members by name below the root, its findings, what its main pickle gave."""

    archive: ZipArchive
    root: str
    records: dict[str, ZipMember]
    findings: list[Finding]
    seen: Examination


def read(source: Source, path: Path) -> TensorFile:
    """Names, dtypes, shapes and byte ranges. Raises MalformedError or LimitError, naming the tensor where one is at fault."""
    opened = take_apart(source, path)
    return tensor_file(path, name, opened.seen, opened.findings, where=opened.root + MAIN)


def take_apart(source: Source, path: Path, archive: ZipArchive | None = None) -> Opened:
    """Read the archive (unless it is given) and its main pickle; what is wrong with the pickle is left in `seen.problem`."""
    archive = archive or read_archive(source, path)
    root = root_of(archive)
    if root is None:
        raise MalformedError("a torch zip file without its main pickle", file=path, expected=f"a member ROOT/{MAIN}")
    records: dict[str, ZipMember] = {}
    for member in archive.members:
        if member.name in records:
            raise MalformedError(
                "two members of the same name: loaders differ in which one they read", file=path, found=member.name,
                remedy="the file is crafted; do not trust it",
            )  # fmt: skip
        records[member.name] = member
    folded = {name.casefold() for name in records}
    if len(folded) != len(records):
        raise MalformedError(
            "members that differ only in upper and lower case: torch's own reader takes them for one", file=path,
            found=f"{len(records) - len(folded)} of {len(records)}", remedy="the file is crafted; do not trust it",
        )  # fmt: skip
    big_endian = _byteorder(records.get(root + "byteorder"), path)
    main = records[root + MAIN]
    storages = Storages(source, records, root, big_endian)
    where, base = (source, main.stored_at) if main.stored_at is not None else (main.source, 0)
    seen = examine(program(main.source), source=where, base=base, persistent=storages, budget=new_budget(source.size))
    findings = list(archive.findings)
    if root + "constants.pkl" in records or any(member.startswith(root + "code/") for member in records):
        findings.append(
            error("torchscript", path.name, "a TorchScript archive: it carries a program, which was not run",
                  *[member for member in records if member.startswith(root + "code/")][:4])
        )  # fmt: skip
    return Opened(archive, root, records, findings, seen)


def take_apart_damaged(source: Source, path: Path) -> Opened:
    """The same for an archive without its directory, from the members that are whole."""
    members, _ = members_by_headers(source, path)
    return take_apart(source, path, ZipArchive(members, []))


def _byteorder(member: ZipMember | None, path: Path) -> bool:
    if member is None:
        return False
    said = member.source.read(0, min(member.size, 16))
    if said not in (b"little", b"big"):
        raise MalformedError("an unknown byte order", file=path, expected="little or big", found=repr(said))
    return said == b"big"


class Storages:
    """What persistent ids of a torch zip file mean: ('storage', type, key, location, elements) is the member data/KEY."""

    def __init__(self, source: Source, records: dict[str, ZipMember], root: str, big_endian: bool) -> None:
        self.source, self.records, self.root, self.big_endian = source, records, root, big_endian
        self.known: dict[str, Any] = {}

    def __call__(self, name: Any) -> Any:
        """The Storage, an Opaque for element types upparam does not read, or Broken when the member cannot back it."""
        kind, key, count = storage_id(name, 5)
        if isinstance(kind, Opaque):
            return kind
        if key not in self.known:
            try:
                self.known[key] = self.find(kind, key, count)
            except UpparamError as problem:
                self.known[key] = Broken(problem)
        return self.known[key]

    def find(self, kind: StorageType, key: str, count: int) -> Storage:
        """The bytes of one storage."""
        nbytes = count * (kind.dtype.itemsize if kind.dtype else 1)
        member = self.records.get(f"{self.root}data/{key}")
        if member is None:
            if nbytes == 0:
                return Storage(kind.dtype, self.source, 0, 0, self.big_endian)
            raise MalformedError("the member that holds a storage is missing", expected=f"{self.root}data/{key}")
        if member.size < nbytes:
            raise MalformedError("a storage is shorter than its tensors", expected=f"{nbytes} bytes", found=member.size)
        data = member.source
        if member.stored_at is not None:
            return Storage(kind.dtype, self.source, member.stored_at, nbytes, self.big_endian)
        return Storage(kind.dtype, data, 0, nbytes, self.big_endian)


def storage_id(name: Any, length: int) -> tuple[Any, str, int]:
    """(storage type, key, elements) of a persistent id. Raises MalformedError for anything else."""
    if type(name) is not tuple or len(name) != length or name[0] not in ("storage", b"storage"):
        raise MalformedError("a reference that is no torch storage", found=summary(name))
    kind, key, count = name[1], name[2], name[4]
    if type(kind) is not StorageType and not isinstance(kind, Opaque):
        raise MalformedError("a storage of an unknown type", found=summary(kind))
    if not isinstance(key, (str, int)) or type(count) is not int or not 0 <= count < 1 << 62:
        raise MalformedError("a storage whose key or size is no such thing", found=summary((key, count)))
    return kind, summary(key) if isinstance(key, int) else key, count
