"""Tar archives, read header by header without unpacking anything: ustar, GNU long names, pax names and sizes, old v7.

Only regular files are members. Links, devices and names that point outside the archive's own folder are findings and are never followed.
Source of the layout: POSIX.1-2017 pax, "pax Interchange Format" and "ustar Interchange Format"; GNU tar manual, "Basic Tar Format".
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from upparam.containers.base import Head
from upparam.containers.nested import SpanSource
from upparam.errors import LimitError, MalformedError
from upparam.findings import Finding, error, warning
from upparam.limits import MAX_ARCHIVE_MEMBERS, MAX_ODDITIES, MAX_TAR_NAME
from upparam.sources import Source

BLOCK = 512
_PER_MEMBER = ("path", "size", "linkpath", "GNU.sparse.name", "GNU.sparse.realsize", "GNU.sparse.map")
_KINDS = {
    "1": "a hard link", "2": "a symbolic link", "3": "a character device", "4": "a block device", "5": "a folder", "6": "a FIFO",
    "S": "a sparse file", "M": "a continued volume", "V": "a volume label",
}  # fmt: skip


@dataclass(frozen=True)
class TarMember:
    """A regular file of the archive and its bytes."""

    name: str
    source: Source

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.source.size


@dataclass(frozen=True)
class TarArchive:
    """The regular files in order and everything odd about the rest."""

    members: list[TarMember]
    findings: list[Finding]


def sniff(head: Head) -> bool:
    """A first header whose checksum is right (old tars carry no magic string)."""
    return len(head.data) >= BLOCK and head.data[0] != 0 and _checksum(head.data[:BLOCK])


def unsafe(name: str) -> bool:
    """True for a member name that points outside the archive's own folder: absolute, a drive, a '..' part, a NUL."""
    return name.startswith(("/", "\\")) or ":" in name[:2] or "\0" in name or ".." in name.replace("\\", "/").split("/")


def read_archive(source: Source, path: Path) -> TarArchive:
    """The archive's regular files. Raises MalformedError for a broken header or a truncated member, LimitError past the limits."""
    if source.size < BLOCK:
        raise MalformedError("too short for a tar archive", file=path, expected=f"at least {BLOCK} bytes", found=source.size)
    members: list[TarMember] = []
    findings: list[Finding] = []
    at, count = 0, 0
    pending: dict[str, str] = {}
    seen: set[str] = set()
    while at + BLOCK <= source.size:
        header = source.read(at, BLOCK)
        if not header.strip(b"\0"):
            findings += _after_end(source, path, at)
            break
        if not _checksum(header):
            raise MalformedError("a tar header with a wrong checksum", file=path, found=f"at byte {at}")
        _check_numbers(header, path, at, findings)
        count += 1
        if count > MAX_ARCHIVE_MEMBERS:
            raise LimitError("more archive members than any real file", file=path, expected=f"<= {MAX_ARCHIVE_MEMBERS}")
        kind = header[156:157].decode("latin-1")
        size = _number(header[124:136], path, at)
        if kind not in ("L", "K", "x", "g") and "size" in pending:
            size = _decimal(pending["size"], path)
        start = at + BLOCK
        if start + size > source.size:
            raise MalformedError(
                "the archive ends inside a member", file=path, tensor=_name(header, pending),
                expected=f"{start + size} bytes", found=source.size, remedy="the download is truncated; fetch it again",
            )  # fmt: skip
        at = start + -(-size // BLOCK) * BLOCK
        if kind in ("L", "K", "x", "g"):
            if size > MAX_TAR_NAME:
                raise LimitError("a tar name record longer than any real one", file=path, expected=f"<= {MAX_TAR_NAME}", found=size)
            told = _extended(kind, source.read(start, size), path)
            if kind == "g" and any(key in told for key in _PER_MEMBER):
                findings.append(
                    error("tar-global-header", path.name, "a global header renames or resizes all members: tools differ", f"byte {at}")
                )
            elif any(pending.get(key, told[key]) != told[key] for key in told):
                findings.append(
                    error("tar-two-names", path.name, "two records describe one member differently: tools differ", f"byte {at}")
                )
            pending |= told if kind != "g" else {}
            continue
        name = _name(header, pending)
        sparse = any(key.startswith("GNU.sparse") for key in pending)
        pending = {}
        if kind in ("0", "\0", "7") and not sparse:
            if name.endswith("/") and not size:
                continue
            if name.endswith("/"):
                findings.append(error("tar-odd-header", path.name, "a folder with bytes of its own: tools differ in what they hold", name))
            if name in seen:
                findings.append(
                    error("tar-duplicate", path.name, "two members of the same name: tools differ in which one they keep", name)
                )
            seen.add(name)
            if unsafe(name):
                findings.append(error("tar-unsafe-name", path.name, "a member name that points outside the archive's own folder", name))
            members.append(TarMember(name, SpanSource(source, start, size, f"{source.name}/{name}")))
        elif kind != "5" or size:
            findings.append(_special(header, kind, name, sparse, size, path))
    else:
        findings.append(warning("tar-no-end", path.name, "the archive has no end mark: it may be cut short", f"last member ends at {at}"))
    findings.sort(key=lambda finding: -finding.severity)
    return TarArchive(members, findings[:MAX_ODDITIES])


def _special(header: bytes, kind: str, name: str, sparse: bool, size: int, path: Path) -> Finding:
    """A member that is no regular file. One with bytes is an error: some tools keep them as a file, some pass over them, some read headers there."""
    what = "a sparse file" if sparse else _KINDS.get(kind, f"of the unknown type {kind!r}")
    target = header[157:257].split(b"\0")[0].decode("utf-8", "backslashreplace")
    shown = f"{name} -> {target}" if kind in ("1", "2") else name
    if size or sparse or kind == "S":
        return error("tar-odd-header", path.name, f"a member is {what} with bytes that tools differ about; it was not read", shown)
    return warning("tar-special-member", path.name, f"a member is {what}; it was not followed", shown)


def _after_end(source: Source, path: Path, at: int) -> list[Finding]:
    """A finding when anything but zeros follows the end mark: some tools read on, others stop."""
    for start in range(at, source.size, 1 << 20):
        block = source.read(start, min(1 << 20, source.size - start))
        if block.strip(b"\0"):
            first = start + len(block) - len(block.lstrip(b"\0"))
            return [
                warning("trailing-bytes", path.name, "data follows the end of the archive and belongs to no member", f"from byte {first}")
            ]
    return []


def _checksum(header: bytes) -> bool:
    field = header[148:156].strip(b"\0 ")
    if not re.fullmatch(rb"[0-7]{1,7}", field):
        return False
    stated = int(field, 8)
    unsigned = sum(header) - sum(header[148:156]) + 8 * 32
    return stated == unsigned or stated == unsigned - 256 * sum(byte > 127 for byte in header[:148] + header[156:])


def _number(field: bytes, path: Path, at: int) -> int:
    if field[0] & 0x80:
        if field[0] != 0x80:
            raise MalformedError("a tar member with a negative size", file=path, found=f"at byte {at}")
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b"\0 ")
    if not re.fullmatch(rb"[0-7]*", digits):
        raise MalformedError("a tar member whose size is no number", file=path, found=f"{field!r} at byte {at}")
    return int(digits or b"0", 8)


def _check_numbers(header: bytes, path: Path, at: int, findings: list[Finding]) -> None:
    """A finding for a mode, owner, time or device that is no number: some tools end the archive there, others read on."""
    for field in (header[100:108], header[108:116], header[116:124], header[136:148], header[329:337], header[337:345]):
        if not field[0] & 0x80 and not re.fullmatch(rb" *[0-7]* *", field.split(b"\0")[0]):
            findings.append(
                error("tar-odd-header", path.name, "a header field that is no number: tools differ in where they stop", f"byte {at}")
            )
            return


def _decimal(text: str, path: Path) -> int:
    if not re.fullmatch(r"[0-9]{1,20}", text):
        raise MalformedError("a tar member whose size is no number", file=path, found=text[:40])
    return int(text)


def _name(header: bytes, pending: dict[str, str]) -> str:
    if "path" in pending:
        return pending["path"]
    name = header[:100].split(b"\0")[0]
    if header[257:263] == b"ustar\0" and header[345:500].strip(b"\0"):
        name = header[345:500].split(b"\0")[0] + b"/" + name
    return name.decode("utf-8", "backslashreplace")


def _extended(kind: str, data: bytes, path: Path) -> dict[str, str]:
    """What a long-name or pax record says of the next member, a global header of all that follow."""
    if kind == "L":
        return {"path": data.split(b"\0")[0].decode("utf-8", "backslashreplace")}
    if kind == "K":
        return {"linkpath": data.split(b"\0")[0].decode("utf-8", "backslashreplace")}
    found: dict[str, str] = {}
    at = 0
    while at < len(data) and data[at : at + 1] != b"\0":
        match = re.compile(rb"(\d{1,9}) ([^=\n]+)=").match(data, at)
        if match is None or not match.end() - at < int(match[1]) <= len(data) - at:
            raise MalformedError("a broken pax record in the tar archive", file=path, found=repr(data[at : at + 40]))
        stop = at + int(match[1])
        found[match[2].decode("utf-8", "backslashreplace")] = data[match.end() : stop - 1].decode("utf-8", "backslashreplace")
        at = stop
    return found
