"""Zip archives, read by their central directory with every check a loader might skip.

Loaders disagree about broken zips: some follow the central directory, some the local headers, some shift offsets for data put before the
archive. Whatever they could disagree about is a finding here, and where two readings of the members are possible the archive is refused.
Source of the layout: PKWARE APPNOTE.TXT 6.3 (sections 4.3 and 4.4).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from upparam.containers.nested import InflatedSource, SpanSource
from upparam.errors import LimitError, MalformedError
from upparam.findings import Finding, error, warning
from upparam.limits import MAX_ARCHIVE_MEMBERS, MAX_INFLATE_RATIO, MAX_INFLATED, MAX_ODDITIES
from upparam.sources import Source
from upparam.wording import counted

STORED, DEFLATED = 0, 8

_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = struct.Struct("<4sLQL")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_FULL32 = 0xFFFFFFFF
_ENCRYPTED, _STREAMED, _STRONG, _MASKED = 1 << 0, 1 << 3, 1 << 6, 1 << 13
_PATCHED = 1 << 5
_NEWEST = 63
"""Version 6.3 of the specification; nothing needs a later one, and readers that look at the field refuse it."""
_UNICODE_PATH = 0x7075
"""Extra field with another name for a member (Info-ZIP); some readers prefer it, most do not know it."""


@dataclass(frozen=True)
class ZipMember:
    """One file of an archive. `stored_at` is where its bytes lie in the archive's own source when they are not compressed."""

    name: str
    size: int
    compressed_size: int
    method: int
    crc: int
    flags: int = field(repr=False)
    data_at: int = field(repr=False)
    archive: Source = field(repr=False)

    @property
    def encrypted(self) -> bool:
        """True when the bytes are encrypted; they are never read."""
        return bool(self.flags & (_ENCRYPTED | _STRONG | _MASKED))

    @property
    def stored_at(self) -> int | None:
        """Byte offset of the data in the archive, None when compressed or encrypted."""
        return self.data_at if self.method == STORED and not self.encrypted else None

    @property
    def source(self) -> Source:
        """The member's bytes. Raises MalformedError (encrypted, odd compression) or LimitError (inflates beyond what is honest)."""
        where = f"{self.archive.name}/{self.name}"
        if self.encrypted:
            raise MalformedError("an encrypted archive member cannot be read", file=where, remedy="decrypt the archive first")
        packed = SpanSource(self.archive, self.data_at, self.compressed_size, where)
        if self.method == STORED:
            if self.size != self.compressed_size:
                raise MalformedError("a stored member with two sizes", file=where, expected=self.compressed_size, found=self.size)
            return packed
        if self.method != DEFLATED:
            raise MalformedError(
                "a compression method upparam does not read", file=where, expected="stored or deflated", found=f"method {self.method}"
            )
        if self.size > MAX_INFLATED or self.size > self.compressed_size * MAX_INFLATE_RATIO + 1024:
            raise LimitError(
                "the member claims to inflate beyond what deflate can honestly do", file=where,
                expected=f"<= {MAX_INFLATE_RATIO} times {self.compressed_size} bytes", found=self.size,
            )  # fmt: skip
        return InflatedSource(packed, self.size, where)

    def check_crc(self) -> bool:
        """Read the whole member; True when its CRC-32 is the one the directory states and its packed data ends where the member does."""
        source, crc = self.source, 0
        for at in range(0, self.size, 1 << 20):
            crc = zlib.crc32(source.read(at, min(1 << 20, self.size - at)), crc)
        return crc == self.crc and (not isinstance(source, InflatedSource) or source.ends())


@dataclass(frozen=True)
class ZipArchive:
    """The members in directory order and every oddity of the archive's structure."""

    members: list[ZipMember]
    findings: list[Finding]
    comment: bytes = b""


def members(source: Source, path: Path) -> list[ZipMember]:
    """The members of a zip archive; folders are left out. See `read_archive` for the findings about its structure."""
    return read_archive(source, path).members


def find_end(source: Source) -> int | None:
    """Offset of the end-of-central-directory record nearest to the end of the source, or None when there is none."""
    start = max(0, source.size - (_END.size + 0xFFFF))
    tail = source.read(start, source.size - start)
    at = tail.rfind(b"PK\x05\x06", 0, max(0, len(tail) - _END.size + 4))
    return None if at < 0 else start + at


def read_archive(source: Source, path: Path) -> ZipArchive:
    """Read the central directory, compare it with every local header, and report whatever two loaders could read differently.

    Raises MalformedError when there is no directory, when it is broken, or when two different ones could be meant; LimitError past
    MAX_ARCHIVE_MEMBERS. No member data is read.
    """
    return _Reader(source, path).run()


def members_by_headers(source: Source, path: Path) -> tuple[list[ZipMember], str | None]:
    """The whole members of an archive whose directory is lost, found by walking the local headers, and the name of the one cut short.

    Where sizes stand behind the data (torch writes so), the end is the first data descriptor that states the distance to it.
    """
    found: list[ZipMember] = []
    at = 0
    while at + _LOCAL.size <= source.size and len(found) < MAX_ARCHIVE_MEMBERS:
        fields = _LOCAL.unpack(source.read(at, _LOCAL.size))
        if fields[0] != b"PK\x03\x04":
            break
        _, _, flags, method, _, _, crc, packed, size, named, extra = fields
        start = at + _LOCAL.size + named + extra
        if start > source.size:
            break
        name = _name(source.read(at + _LOCAL.size, named), flags)
        if flags & _STREAMED and not packed:
            ended = _descriptor_after(source, start)
            if ended is None:
                return found, name
            crc, packed, size, at = ended
        else:
            if _FULL32 in (size, packed):
                more = source.read(at + _LOCAL.size + named, extra)
                size, packed, _ = _Reader(source, path).wide(more, size, packed, 0)
            at = start + packed
            if at > source.size:
                return found, name
        if not name.endswith("/"):
            found.append(ZipMember(name, size, packed, method, crc, flags, start, source))
    return found, None


def _descriptor_after(source: Source, start: int) -> tuple[int, int, int, int] | None:
    """(crc, packed size, size, end) of the data descriptor that belongs to data from `start`."""
    step, overlap = 1 << 20, 24
    for base in range(start, source.size, step):
        block = source.read(base, min(step + overlap, source.size - base))
        where = block.find(b"PK\x07\x08")
        while 0 <= where < step and where + 16 <= len(block):
            crc, packed, size = struct.unpack_from("<LLL", block, where + 4)
            if packed == base + where - start:
                return crc, packed, size, base + where + 16
            if where + 24 <= len(block):
                crc, wide, size = struct.unpack_from("<LQQ", block, where + 4)
                if wide == base + where - start:
                    return crc, wide, size, base + where + 24
            where = block.find(b"PK\x07\x08", where + 4)
    return None


class _Reader:
    def __init__(self, source: Source, path: Path) -> None:
        self.source, self.path = source, path
        self.findings: list[Finding] = []

    def bad(self, message: str, **facts: object) -> MalformedError:
        return MalformedError(message, file=self.path, **facts)  # type: ignore[arg-type]

    def odd(self, code: str, message: str, *evidence: str) -> None:
        if len(self.findings) < MAX_ODDITIES:
            self.findings.append(error(code, self.path.name, message, *evidence))

    def run(self) -> ZipArchive:
        count, size, offset, end, comment = self.end()
        if count > MAX_ARCHIVE_MEMBERS:
            raise LimitError("more archive members than any real file", file=self.path, expected=f"<= {MAX_ARCHIVE_MEMBERS}", found=count)
        if size > end:
            raise self.bad("the zip directory is larger than the file", expected=f"<= {end} bytes", found=size)
        shift = self.place(offset, size, end)
        entries = list(self.central(self.source.read(offset + shift, size), count))
        found: list[ZipMember] = []
        spans: list[tuple[int, int]] = []
        for entry in entries:
            member, stop = self.member(entry, shift, offset + shift)
            spans.append((entry[7] + shift, stop))
            if not member.name.endswith("/"):
                found.append(member)
        self.names([member.name for member in found])
        self.coverage(spans, offset + shift)
        return ZipArchive(found, self.findings, comment)

    def end(self) -> tuple[int, int, int, int, bytes]:
        """(entries, directory size, directory offset, where the directory must end, comment)."""
        end = find_end(self.source)
        if end is None:
            raise self.bad(
                "not a complete zip archive: it has no directory at its end",
                remedy="the file is truncated; fetch it again, or see --salvage",
            )
        record = self.source.read(end, _END.size)
        _, disk, first, here, count, size, offset, length = _END.unpack(record)
        after = self.source.size - end - _END.size
        comment = self.source.read(end + _END.size, min(length, after))
        if after > length:
            self.findings.append(warning("zip-trailing-bytes", self.path.name, f"{after - length} bytes follow the end of the archive"))
            self.hidden(end + _END.size + length, self.source.size)
        if b"PK\x05\x06" in self.source.read(end + _END.size, after):
            self.odd("zip-two-ends", "two end records: readers differ in which one they take", f"one at {end}, another behind it")
        stop = end
        locator = self.source.read(end - _LOCATOR64.size, _LOCATOR64.size) if end >= _LOCATOR64.size else b""
        if locator[:4] == b"PK\x06\x07":
            wide, stop = self.end64(_LOCATOR64.unpack(locator), end - _LOCATOR64.size)
            narrow = (here, count, size, offset)
            if any(value not in (other, 0xFFFF, _FULL32) for value, other in zip(narrow, wide[2:], strict=True)):
                self.odd("zip-end-mismatch", "the zip64 record and the end record disagree", f"{wide[2:]} and {narrow}")
            disk, first, here, count, size, offset = wide
        if disk or first or here != count:
            raise self.bad("an archive split over several files", found=f"disk {disk}")
        return count, size, offset, stop, comment

    def end64(self, locator: tuple[int, ...], limit: int) -> tuple[tuple[int, ...], int]:
        """The zip64 end record (disks, entries here, entries, directory size, directory offset) and where it lies.

        Some readers go where the locator says, some take what stands right before it; both must be the same plain record.
        """
        _, disk, at, disks = locator
        before = limit - _END64.size
        for place in (at, before):
            if 0 <= place <= before:
                fields = _END64.unpack(self.source.read(place, _END64.size))
                if fields[0] == b"PK\x06\x06":
                    if place != before or at != before or fields[1] != _END64.size - 12 or disk or disks > 1:
                        self.odd(
                            "zip-end-mismatch",
                            "the zip64 record is not one plain record right before its locator",
                            f"at {place}, said {at}",
                        )
                    return fields[4:], place
        raise self.bad("the zip64 record is not where the locator says", found=at)

    def place(self, offset: int, size: int, end: int) -> int:
        """How far the archive was shifted by data put before it; refuses when two directories could be meant."""
        shift = end - size - offset
        if shift == 0:
            return 0
        stated = self.source.read(offset, 4) if 0 <= offset <= self.source.size - 4 else b""
        shifted = self.source.read(end - size, 4) if size >= 4 else b""
        mark = b"PK\x01\x02"
        if stated == mark and shifted == mark:
            raise self.bad(
                "two zip directories: loaders would disagree about the members",
                expected=f"one at {offset}", found=f"another at {end - size}", remedy="the file is crafted; do not trust it",
            )  # fmt: skip
        if stated == mark:
            self.odd("zip-gap", f"{shift} bytes between the zip directory and its end record", f"directory at {offset}")
            return 0
        if shifted == mark and shift > 0:
            self.findings.append(
                warning("zip-prepended", self.path.name, f"{shift} bytes stand before the zip archive", f"directory at {end - size}, stated {offset}")
            )  # fmt: skip
            return shift
        if size == 0 and shift > 0:
            return 0
        raise self.bad("the zip directory is not where the end record says", expected=f"at {offset}", found=stated.hex() or "nothing")

    def central(self, data: bytes, count: int) -> Iterator[tuple[str, int, int, int, int, int, int, int]]:
        """(name, made by, flags, method, crc, compressed, size, header offset) of each entry."""
        at = seen = 0
        while at < len(data):
            if len(data) - at < _CENTRAL.size:
                raise self.bad("the zip directory ends inside an entry")
            fields = _CENTRAL.unpack_from(data, at)
            if fields[0] != b"PK\x01\x02":
                raise self.bad("the zip directory holds something that is no entry", found=fields[0].hex())
            made, needed, flags, method, _, _, crc, packed, size, named, extra, comment, _, _, outer, header = fields[1:]
            start = at + _CENTRAL.size
            raw = data[start : start + named]
            more = data[start + named : start + named + extra]
            at = start + named + extra + comment
            if at > len(data):
                raise self.bad("the zip directory ends inside an entry")
            if _FULL32 in (size, packed, header):
                size, packed, header = self.wide(more, size, packed, header)
            if needed & 0xFF > _NEWEST or flags & _PATCHED:
                self.odd(
                    "zip-flags",
                    "a member that some readers refuse and others read",
                    _name(raw, flags),
                    f"version {needed}, flags {flags:#x}",
                )
            self.other_name(more, raw, flags)
            if outer >> 16 & 0xF000 == 0xA000 and made >> 8 == 3:
                self.odd("zip-symlink", "a member is a symbolic link", _name(raw, flags))
            yield _name(raw, flags), made, flags, method, crc, packed, size, header
            seen += 1
            if seen > MAX_ARCHIVE_MEMBERS:
                raise LimitError("more archive members than any real file", file=self.path, expected=f"<= {MAX_ARCHIVE_MEMBERS}")
        if seen != count:
            self.odd("zip-count", "the zip directory holds another number of members than the end record says", f"{seen}, said {count}")

    def other_name(self, extra: bytes, raw: bytes, flags: int) -> None:
        """A finding for an extra field that names the member otherwise (APPNOTE 4.6.9: version, CRC, UTF-8 name)."""
        at = 0
        while at + 4 <= len(extra):
            tag, length = struct.unpack_from("<HH", extra, at)
            said = extra[at + 9 : at + 4 + length]
            if tag == _UNICODE_PATH and said != raw:
                shown = said[:200].decode("utf-8", "backslashreplace")
                self.odd("zip-header-mismatch", f"an extra field gives '{_name(raw, flags)}' another name", f"name {shown!r}")
            at += 4 + length

    def wide(self, extra: bytes, *values: int) -> tuple[int, int, int]:
        """The 64-bit sizes and offset of an entry whose 32-bit fields are all ones."""
        at = 0
        while at + 4 <= len(extra):
            tag, length = struct.unpack_from("<HH", extra, at)
            if tag == 1:
                wanted = sum(value == _FULL32 for value in values)
                if length < 8 * wanted or at + 4 + length > len(extra):
                    break
                numbers = iter(struct.unpack_from(f"<{wanted}Q", extra, at + 4))
                size, packed, header = (next(numbers) if value == _FULL32 else value for value in values)
                return size, packed, header
            at += 4 + length
        raise self.bad("a zip64 entry without its 64-bit sizes")

    def member(self, entry: tuple[str, int, int, int, int, int, int, int], shift: int, limit: int) -> tuple[ZipMember, int]:
        """The member, and where its bytes (with the descriptor that may follow) end."""
        name, _, flags, method, crc, packed, size, header = entry
        header += shift
        if header + _LOCAL.size > limit:
            raise self.bad("a member's header lies outside the archive", tensor=name, expected=f"before {limit}", found=header)
        raw = self.source.read(header, min(_LOCAL.size + 320, limit - header))
        fields = _LOCAL.unpack_from(raw)
        if fields[0] != b"PK\x03\x04":
            raise self.bad("a member's header is not where the directory says", tensor=name, found=fields[0].hex())
        _, _, lflags, lmethod, _, _, lcrc, lpacked, lsize, lnamed, lextra = fields
        if _LOCAL.size + lnamed + lextra > len(raw):
            raw = self.source.read(header, min(_LOCAL.size + lnamed + lextra, limit - header))
        lname = _name(raw[_LOCAL.size : _LOCAL.size + lnamed], lflags)
        start = header + _LOCAL.size + lnamed + lextra
        if start + packed > limit:
            raise self.bad("a member reaches outside the archive", tensor=name, expected=f"<= {limit}", found=start + packed)
        differs = []
        if lname != name:
            differs.append(f"name {lname!r}")
        if lmethod != method:
            differs.append(f"method {lmethod}, directory {method}")
        if (lflags ^ flags) & (_ENCRYPTED | _STRONG | _MASKED):
            differs.append(f"flags {lflags:#x}, directory {flags:#x}")
        if lsize == _FULL32 or lpacked == _FULL32:
            try:
                lsize, lpacked, _ = self.wide(raw[_LOCAL.size + lnamed : _LOCAL.size + lnamed + lextra], lsize, lpacked, 0)
            except MalformedError:
                differs.append("64-bit sizes missing")
        streamed = bool(lflags & _STREAMED)
        for what, local, stated in (("crc", lcrc, crc), ("packed size", lpacked, packed), ("size", lsize, size)):
            if local != stated and not (streamed and local == 0):
                differs.append(f"{what} {local}, directory {stated}")
        self.other_name(raw[_LOCAL.size + lnamed : _LOCAL.size + lnamed + lextra], raw[_LOCAL.size : _LOCAL.size + lnamed], lflags)
        if differs:
            self.odd("zip-header-mismatch", f"local header and directory disagree about '{name}'", *differs)
        if flags & (_ENCRYPTED | _STRONG | _MASKED) or lflags & (_ENCRYPTED | _STRONG | _MASKED):
            self.odd("zip-encrypted", f"member '{name}' is marked encrypted", f"flags {flags:#x}")
        elif method not in (STORED, DEFLATED):
            self.odd("zip-method", f"member '{name}' uses an odd compression method", f"method {method}")
        elif method == STORED and packed != size:
            self.odd("zip-sizes", f"stored member '{name}' has two sizes", f"{packed} and {size}")
        elif size > packed * MAX_INFLATE_RATIO + 1024 or size > MAX_INFLATED:
            self.odd("zip-bomb", f"member '{name}' claims to inflate beyond what deflate can honestly do", f"{packed} to {size} bytes")
        stop = start + packed
        if streamed:
            length, said = self.descriptor(stop, limit)
            stop += length
            if said != (crc, packed, size):
                self.odd(
                    "zip-header-mismatch",
                    f"the descriptor behind '{name}' and the directory disagree",
                    f"{said}, directory {(crc, packed, size)}",
                )
        return ZipMember(name, size, packed, method, crc, flags, start, self.source), stop

    def descriptor(self, at: int, limit: int) -> tuple[int, tuple[int, ...]]:
        """(length, (crc, packed size, size)) of the data descriptor at `at`: 16 bytes, 24 in zip64, without the signature 4 less."""
        data = self.source.read(at, min(28, limit - at))
        signed = 4 if data[:4] == b"PK\x07\x08" else 0
        for length, layout in ((12 + signed, "<LLL"), (20 + signed, "<LQQ")):
            if len(data) >= length and (data[length : length + 2] == b"PK" or at + length == limit):
                return length, struct.unpack_from(layout, data, signed)
        return min(12 + signed, limit - at), ()

    def names(self, names: list[str]) -> None:
        """Names that are one to some reader: the same, with a backslash for a slash, or cut at a NUL."""
        if len({_as_read(name) for name in names}) != len(names):
            seen: set[str] = set()
            twice = []
            for name in map(_as_read, names):
                if name in seen:
                    twice.append(name)
                seen.add(name)
            self.odd(
                "zip-duplicate",
                f"{counted(len(twice), 'member', 'appears', 'appear')} twice: loaders differ in which one they read",
                *twice[:5],
            )
        unsafe = [
            name
            for name in names
            if name.startswith(("/", "\\")) or "\0" in name or ":" in name[:2] or ".." in name.replace("\\", "/").split("/")
        ]
        if unsafe:
            self.odd("zip-unsafe-name", "member names that point outside the archive's own folder", *unsafe[:5])

    def coverage(self, spans: list[tuple[int, int]], limit: int) -> None:
        """Members must not share bytes, and no bytes before, between or behind them may hide another member."""
        at = 0
        for start, stop in sorted(spans):
            if start < at:
                self.odd("zip-overlap", "archive members share bytes", f"one at {start} starts before {at}")
                return
            if start > at:
                self.hidden(at, start)
            at = max(at, stop)
        if spans and at < limit:
            self.hidden(at, limit)

    def hidden(self, start: int, stop: int) -> None:
        for at in range(start, stop, 1 << 20):
            if b"PK\x03\x04" in self.source.read(at, min((1 << 20) + 3, stop - at)):
                self.odd("zip-hidden-member", "a member that the zip directory does not list", f"local header in {start}..{stop}")
                return


def _as_read(name: str) -> str:
    return name.split("\0")[0].replace("\\", "/")


def _name(raw: bytes, flags: int) -> str:
    return raw.decode("utf-8", "surrogateescape") if flags & 1 << 11 else raw.decode("utf-8" if raw.isascii() else "cp437")
