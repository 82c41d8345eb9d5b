"""Salvage: the tensors of a truncated or damaged file that are still whole, and what is lost with the reason."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from upparam.atomic import atomic_file, refuse_existing
from upparam.containers import file_source, head_of, npy, open_all, pickles, safetensors, torchfile
from upparam.containers.base import flatten, leaves
from upparam.containers.evidence import about_uses
from upparam.containers.machine import Examination
from upparam.containers.symbols import Broken
from upparam.containers.zips import ZipArchive, ZipMember, members_by_headers, read_archive
from upparam.errors import MalformedError, UpparamError, VerificationError
from upparam.findings import Finding, warning
from upparam.operations.receipt import Receipt
from upparam.sources import Source
from upparam.tensors import Tensor, same_bits
from upparam.wording import counted


@dataclass
class Salvage:
    """What is left of a file: whole tensors, and the others by name with the reason. `problem` is what reading it strictly said, if anything."""

    path: Path
    container: str
    tensors: dict[str, Tensor]
    lost: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    problem: UpparamError | None = None

    def facts(self) -> dict[str, Any]:
        """JSON-ready facts."""
        return {
            "path": str(self.path), "container": self.container,
            "recoverable": [{"name": name, "dtype": tensor.dtype.name, "shape": list(tensor.shape)} for name, tensor in self.tensors.items()],
            "lost": self.lost, "findings": [finding.facts() for finding in self.findings], "problem": self.problem.facts() if self.problem else None,
        }  # fmt: skip


def salvage(path: Path | str) -> Salvage:
    """Everything in a file that can still be read whole. Raises what strict reading raises when nothing can."""
    path = Path(path)
    try:
        files = open_all(path)
    except MalformedError as problem:
        found = _damaged(file_source(path), path)
        if found is None or not found.tensors:
            raise
        found.problem = problem
        return found
    if len(files) != 1:
        raise MalformedError("salvage takes one file at a time", file=path, found=f"{len(files)} tensor files")
    file = files[0]
    return Salvage(path, file.container, file.tensors, findings=file.findings)


def write_salvage(found: Salvage, out: Path | str, *, force: bool = False, verify: bool = True) -> Receipt:
    """Write the whole tensors to a safetensors file and read them back. Raises OutputExistsError, VerificationError."""
    out = Path(out)
    refuse_existing(out, force)
    begun = time.monotonic()
    proofs = []
    with atomic_file(out, force=force) as temporary:
        with temporary.open("wb") as stream:
            safetensors.write(stream, found.tensors, {"salvaged_from": found.path.name})
        if verify:
            written = open_all(temporary)[0].tensors
            for name, tensor in found.tensors.items():
                if name not in written or not same_bits(tensor, written[name]):
                    raise VerificationError("a salvaged tensor reads back differently", tensor=name)
            proofs.append(f"re-opened: {counted(len(written), 'tensor')} bit-identical")
    findings = list(found.findings)
    if found.lost:
        shown = [f"{name}: {reason}" for name, reason in list(found.lost.items())[:5]]
        findings.append(warning("tensors-lost", found.path.name, f"{counted(len(found.lost), 'tensor')} could not be recovered", *shown))
    return Receipt(
        "salvage", [str(found.path)], [str(out)], {"tensors": len(found.tensors), "lost": len(found.lost)}, proofs, findings, time.monotonic() - begun
    )  # fmt: skip


def _damaged(source: Source, path: Path) -> Salvage | None:
    head = head_of(source, path)
    try:
        if safetensors.sniff(head):
            tensors, lost = safetensors.intact(source, path)
            return Salvage(path, safetensors.name, tensors, lost)
        if head.data[:4] == b"PK\x03\x04":
            return _zip(source, path)
        if torchfile.legacy.sniff(head):
            seen, findings = torchfile.legacy.take_apart(source, path)
            return _from_pickle(path, torchfile.legacy.name, seen, findings)
        if pickles.sniff(head):
            seen, findings = pickles.take_apart(source, path)
            return _from_pickle(path, pickles.name, seen, findings)
    except UpparamError:
        return None
    return None


def _from_pickle(path: Path, container: str, seen: Examination, findings: list[Finding]) -> Salvage:
    findings = [*findings, *about_uses(seen.uses, path.name)]
    if seen.problem is None:
        lost = {name: broken.problem.message for name, broken in leaves(seen.value, Broken)}
        return Salvage(path, container, flatten(seen.value), lost, findings)
    tensors: dict[str, Tensor] = {}
    for number, (name, piece) in enumerate(seen.pieces):
        for inner, tensor in flatten(piece).items():
            label = "/".join(part for part in (name, inner if inner != "." else "") if part) or str(number)
            tensors[label if label not in tensors else f"{label}#{number}"] = tensor
    return Salvage(path, container, tensors, {}, findings)


def _zip(source: Source, path: Path) -> Salvage | None:
    try:
        archive = read_archive(source, path)
    except UpparamError:
        archive = ZipArchive(members_by_headers(source, path)[0], [])
    unique = {member.name: member for member in reversed(archive.members)}
    archive = ZipArchive(list(reversed(unique.values())), archive.findings)
    if torchfile.zipped.root_of(archive) is None:
        return _npz(archive, path)
    opened = torchfile.zipped.take_apart(source, path, archive)
    found = _from_pickle(path, torchfile.zipped.name, opened.seen, opened.findings)
    wrong = {
        member.data_at: member for name, member in opened.records.items() if name.startswith(opened.root + "data/") and not _sound(member)
    }
    spans = [(at, at + member.compressed_size) for at, member in wrong.items()]
    for name, tensor in list(found.tensors.items()):
        if any(start <= tensor.offset < stop for start, stop in spans):
            del found.tensors[name]
            found.lost[name] = "its storage's checksum is wrong"
    return found


def _sound(member: ZipMember) -> bool:
    try:
        return member.check_crc()
    except UpparamError:
        return False


def _npz(archive: ZipArchive, path: Path) -> Salvage | None:
    found = Salvage(path, npy.archive.name, {})
    for member in archive.members:
        if not member.name.endswith(".npy"):
            continue
        name = member.name.removesuffix(".npy")
        try:
            if not member.check_crc():
                found.lost[name] = "its checksum is wrong"
                continue
            found.tensors[name] = next(iter(npy.single.read(member.source, path).tensors.values()))
        except UpparamError as problem:
            found.lost[name] = problem.message
    return found if found.tensors else None
