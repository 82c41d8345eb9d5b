"""Outer archives around tensor files: zip, tar, and single files packed with gzip, bzip2 or xz. Nothing is ever unpacked to a path.

torch's own zip and tar forms and npz are told before these. Members are handed over as sources; what is no regular file, or is named so
that it would land outside the archive's folder, is a finding and is left out.
"""

from __future__ import annotations

import threading
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from upparam.containers import tars
from upparam.containers.base import Head
from upparam.containers.zips import read_archive
from upparam.errors import LimitError, MalformedError, UnreadableError
from upparam.findings import Finding, error
from upparam.limits import MAX_INFLATE_RATIO, MAX_INFLATED, MAX_UNPACKED_IN_MEMORY
from upparam.tensors import Source

_CHUNK = 1 << 20
_XZ_MEMORY = 256 << 20
"""Bytes an xz decoder may use; the strongest preset needs 65 MiB."""
_PACKED = {b"\x1f\x8b": "gz", b"BZh": "bz2", b"\xfd7zXZ\0": "xz"}
_SUFFIXES = (".gz", ".bz2", ".xz", ".tgz", ".tbz2", ".txz")
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
    """A zip, tar, gzip, bzip2 or xz by its magic number (tar: by its first header's checksum)."""
    return head.data[:4] in (b"PK\x03\x04", b"PK\x05\x06") or _packing(head.data) is not None or tars.sniff(head)


def members(source: Source, path: Path) -> tuple[str, list[tuple[str, Source]]]:
    """(kind, members) of an outer archive; see `contents`."""
    found = contents(source, path)
    return found.kind, found.members


def contents(source: Source, path: Path) -> Contents:
    """Kind, members, and findings. Raises MalformedError for broken or truncated archives and LimitError for ones that inflate beyond reason.

    Files that are plainly no tensors by their name (json, txt, png ...) are listed as passed over, not opened.
    """
    start = source.read(0, min(8, source.size))
    if start[:2] == b"PK":
        return _zip(source, path)
    packing = _packing(start)
    if packing is not None:
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
    return next((kind for magic, kind in _PACKED.items() if data.startswith(magic)), None)


def _engine(kind: str) -> Any:
    """A fresh decompressor. bz2 and lzma are imported when a file needs them: `identify` of other files never pays for it."""
    if kind == "gz":
        return zlib.decompressobj(31)
    if kind == "bz2":
        import bz2

        return bz2.BZ2Decompressor()
    import lzma

    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)


class SpooledSource:
    """Bytes in an anonymous temporary file (in memory while small), gone when the last reference goes."""

    def __init__(self, stream: IO[bytes], size: int, name: str) -> None:
        self._stream, self.size, self.name = stream, size, name
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
    """The unpacked bytes, spooled: their size is known only at the end of the stream. Several streams in a row are one file."""
    import tempfile

    stream: IO[bytes] = tempfile.SpooledTemporaryFile(max_size=MAX_UNPACKED_IN_MEMORY)  # noqa: SIM115 - lives as long as the source
    limit = min(MAX_INFLATED, source.size * MAX_INFLATE_RATIO + _CHUNK)
    eaten = size = streams = 0
    ready = b""
    engine = _engine(kind)
    try:
        while True:
            if not ready and eaten < source.size and getattr(engine, "needs_input", True):
                ready = source.read(eaten, min(_CHUNK, source.size - eaten))
                eaten += len(ready)
            part, ready, ended = _step(engine, ready)
            size += len(part)
            if size > limit:
                raise LimitError(
                    f"the {kind} data inflates beyond any honest ratio",
                    file=path,
                    expected=f"<= {limit} bytes",
                    found=f"more, from {source.size}",
                )
            stream.write(part)
            if ended:
                rest = ready or source.read(eaten, min(_CHUNK, source.size - eaten))
                eaten = eaten if ready else eaten + len(rest)
                if not rest.strip(b"\0") and eaten >= source.size:
                    break
                if _packing(rest) is None:
                    raise MalformedError(f"something follows the {kind} data", file=path, found=f"{rest[:8].hex()} before byte {eaten}")
                engine, ready, streams = _engine(kind), rest, streams + 1
                if streams > 1000 + eaten // 1024:
                    raise LimitError(f"more {kind} streams in a row than any real file", file=path, found=streams)
            elif not part and not ready and eaten >= source.size:
                raise MalformedError(f"the {kind} data ends early", file=path, found=f"{size} bytes unpacked", remedy="fetch it again")
    except (zlib.error, OSError, EOFError, ValueError, *_xz_errors(kind)) as problem:
        if isinstance(problem, OSError) and problem.errno is not None:
            raise UnreadableError(f"no room to unpack it: {problem.strerror}", file=path) from problem
        raise MalformedError(f"the {kind} data is broken: {problem}", file=path) from problem
    return SpooledSource(stream, size, f"{source.name}/{path.stem}")


def _xz_errors(kind: str) -> tuple[type[Exception], ...]:
    if kind != "xz":
        return ()
    import lzma

    return (lzma.LZMAError,)


def _step(engine: Any, data: bytes) -> tuple[bytes, bytes, bool]:
    """(at most a chunk of unpacked bytes, the input not yet taken, whether the stream ended) of one decompression step."""
    part = engine.decompress(data, _CHUNK)
    if engine.eof:
        return part, engine.unused_data, True
    if hasattr(engine, "unconsumed_tail"):
        return part, engine.unconsumed_tail, False
    # bz2 and lzma keep what they did not take themselves, and want to be called with nothing until they need more.
    return part, b"", False
