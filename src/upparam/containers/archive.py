"""Outer archives around tensor files: zip, tar, and single files packed with gzip, bzip2, xz, zlib or lzma. Nothing is ever unpacked to a path.

torch's own zip and tar forms and npz are told before these. Members are handed over as sources; what is no regular file, or is named so
that it would land outside the archive's folder, is a finding and is left out.
"""

from __future__ import annotations

import re
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from upparam.containers import tars
from upparam.containers.base import Head
from upparam.containers.nested import SpanSource, backing
from upparam.containers.zips import read_archive
from upparam.errors import LimitError, MalformedError, UnreadableError
from upparam.findings import Finding, error
from upparam.limits import MAX_INFLATE_RATIO, MAX_INFLATED, MAX_UNPACKED_IN_MEMORY
from upparam.patterns import regex
from upparam.sources import Source

_CHUNK = 1 << 20
_XZ_MEMORY = 256 << 20
"""Bytes an xz decoder may use; the strongest preset needs 65 MiB."""
_PACKED = {
    rb"\x1f\x8b\x08[\x00-\x1f]": "gz",
    rb"BZh[1-9](1AY&SY|\x17rE8P\x90)": "bz2",
    rb"\xfd7zXZ\x00": "xz",
}
"""As much of each header as is fixed: two bytes alone would claim one headerless file in 65,536."""
_TRIED = {rb"\x78[\x01\x5e\x9c\xda]": "zlib", rb"\x5d\x00\x00..[\x00-\x04\xff]": "lzma"}
"""What joblib writes besides; so short a mark counts only where the data behind it unpacks."""
_JOBLIB_OLD = regex(rb"ZF0x[0-9a-f]{1,16}L? *(?=\x78)")
"""joblib before 0.10: the length in text, then zlib data. Source: joblib/numpy_pickle_compat.py."""
_PROBE = 4096
_SUFFIXES = (".gz", ".bz2", ".xz", ".z", ".lzma", ".tgz", ".tbz2", ".txz")
_PLAIN = (
    ".json", ".txt", ".md", ".png", ".jpg", ".jpeg", ".gif", ".webp", ".py", ".yaml", ".yml", ".toml", ".csv", ".tsv", ".log", ".html",
    ".jsonl", ".jinja", ".ini", ".cfg", ".sh", ".ipynb", ".gitattributes", ".gitignore", ".pdf", ".mp4", ".svg",
)  # fmt: skip


@dataclass(frozen=True)
class Contents:
    """What an outer archive holds: regular files that may be tensor files, those passed over for their name, and what was odd."""

    kind: str
    members: list[tuple[str, Source]]
    findings: list[Finding] = field(default_factory=list)
    passed_over: list[tuple[str, Source]] = field(default_factory=list)


def sniff(head: Head) -> bool:
    """A zip, tar, gzip, bzip2, xz, zlib or lzma by its magic number (tar: by its first header's checksum)."""
    return head.data[:4] in (b"PK\x03\x04", b"PK\x05\x06") or _packing(head.data[:_PROBE]) is not None or tars.sniff(head)


def contents(source: Source, path: Path) -> Contents:
    """Kind, members, and findings. Raises MalformedError for broken or truncated archives and LimitError for ones that inflate beyond reason.

    Files that are plainly no tensors by their name (json, txt, png ...) are listed as passed over, not opened.
    """
    start = source.read(0, min(_PROBE, source.size))
    if start[:2] == b"PK":
        return _zip(source, path)
    packing = _packing(start)
    if packing is not None:
        old = _JOBLIB_OLD.match(start)
        source = SpanSource(source, old.end(), source.size - old.end()) if old else source
        inner = path.name[: -len(path.suffix)] if path.suffix.lower() in _SUFFIXES else path.name
        if path.suffix.lower() in (".tgz", ".tbz2", ".txz"):
            inner += ".tar"
        return Contents(packing, [(inner, _unpack(source, path, packing))])
    archive = tars.read_archive(source, path)
    kept = [(member.name, member.source) for member in archive.members if not tars.unsafe(member.name)]
    return _sorted("tar", kept, archive.findings)


def _zip(source: Source, path: Path) -> Contents:
    archive = read_archive(source, path)
    findings = list(archive.findings)
    kept: list[tuple[str, Source]] = []
    for member in archive.members:
        if tars.unsafe(member.name):
            continue
        try:
            kept.append((member.name, member.source))
        except MalformedError as problem:
            findings.append(error("zip-unreadable-member", path.name, problem.message, member.name))
    return _sorted("zip", kept, findings)


def _sorted(kind: str, files: list[tuple[str, Source]], findings: list[Finding]) -> Contents:
    plain = [file for file in files if file[0].lower().endswith(_PLAIN)]
    return Contents(kind, [file for file in files if not file[0].lower().endswith(_PLAIN)], findings, plain)


def _packing(data: bytes) -> str | None:
    for pattern, kind in _PACKED.items():
        if re.match(pattern, data, re.S):
            return kind
    old = _JOBLIB_OLD.match(data)
    data = data[old.end() :] if old else data
    tried = next((kind for pattern, kind in _TRIED.items() if re.match(pattern, data, re.S)), None)
    if tried is None:
        return None
    make, broken = _decoder(tried)
    engine = make()
    try:
        found = engine.decompress(data, _PROBE)
    except (broken, EOFError, ValueError):
        return None
    return tried if engine.eof or len(found) >= 64 else None


def _decoder(kind: str) -> tuple[Callable[[], Any], type[Exception]]:
    """(maker of decompressors, the error they raise). bz2 and lzma are imported only when a file needs them."""
    if kind == "gz":
        return lambda: zlib.decompressobj(31), zlib.error
    if kind == "bz2":
        import bz2

        return bz2.BZ2Decompressor, OSError
    if kind == "zlib":
        return zlib.decompressobj, zlib.error
    import lzma

    if kind == "lzma":
        return lambda: lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=_XZ_MEMORY), lzma.LZMAError
    return lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY), lzma.LZMAError


class SpooledSource:
    """Bytes in an anonymous temporary file (in memory while small), gone when the last reference goes."""

    def __init__(self, stream: IO[bytes], size: int, name: str, backing: int) -> None:
        self._stream, self.size, self.name, self.backing = stream, size, name, backing
        self._lock = threading.Lock()

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset`."""
        if offset < 0 or size < 0 or offset + size > self.size:
            raise MalformedError(
                "a read reaches outside the unpacked data", file=self.name, expected=f"within {self.size} bytes", found=f"{offset}+{size}"
            )
        with self._lock:
            self._stream.seek(offset)
            return self._stream.read(size)


def _unpack(source: Source, path: Path, kind: str) -> Source:
    """The unpacked bytes, spooled: their size is known only at the end of the stream."""
    import tempfile

    stream: IO[bytes] = tempfile.SpooledTemporaryFile(max_size=MAX_UNPACKED_IN_MEMORY)  # noqa: SIM115 - lives as long as the source
    packed = backing(source)
    limit = min(MAX_INFLATED, packed * MAX_INFLATE_RATIO + _CHUNK)
    size = 0
    for part in _parts(source, path, kind):
        size += len(part)
        if size > limit:
            raise LimitError(
                f"the {kind} data inflates beyond any honest ratio", file=path, expected=f"<= {limit} bytes from {packed}", found="more"
            )  # fmt: skip
        try:
            stream.write(part)
        except OSError as problem:
            raise UnreadableError(f"no room to unpack it: {problem.strerror}", file=path) from problem
    return SpooledSource(stream, size, f"{source.name}/{path.stem}", packed)


def _parts(source: Source, path: Path, kind: str) -> Iterator[bytes]:
    """The unpacked bytes in pieces of at most a chunk. Several streams in a row are one file; zeros may follow the last."""
    make, broken = _decoder(kind)
    engine, ready, eaten, streams = make(), b"", 0, 1
    while True:
        if not ready and eaten < source.size and getattr(engine, "needs_input", True):
            ready = source.read(eaten, min(_CHUNK, source.size - eaten))
            eaten += len(ready)
        try:
            part = engine.decompress(ready, _CHUNK)
        except (broken, EOFError, ValueError) as problem:
            raise MalformedError(f"the {kind} data is broken: {problem}", file=path) from problem
        # zlib hands back what it did not take; bz2 and lzma keep it and ask for no more until they need it.
        ready = getattr(engine, "unconsumed_tail", b"")
        yield part
        if engine.eof:
            ready = engine.unused_data
            if not ready:
                ready = source.read(eaten, min(_CHUNK, source.size - eaten))
                eaten += len(ready)
            if not ready.strip(b"\0") and eaten >= source.size:
                return
            if _packing(ready[:_PROBE]) is None:
                raise MalformedError(
                    f"something that is no {kind} data follows it", file=path, found=f"{ready[:8].hex()} before byte {eaten}"
                )
            engine, streams = make(), streams + 1
            if streams > 1000 + eaten // 1024:
                raise LimitError(f"more {kind} streams in a row than any real file", file=path, found=streams)
        elif not part and not ready and eaten >= source.size:
            raise MalformedError(f"the {kind} data ends early", file=path, remedy="the download is truncated; fetch it again")
