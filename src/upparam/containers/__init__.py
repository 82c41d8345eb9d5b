"""Containers: how bytes become named tensors. One file a member; this table is all the rest of the program knows of them."""

from __future__ import annotations

import importlib
import os
import stat
from functools import cache
from pathlib import Path
from typing import Any

from upparam.containers.base import Container, Head, TensorFile
from upparam.containers.marks import Mark, anything, begins, pickle, tar, torch_stream
from upparam.errors import AmbiguousError, LimitError, UnreadableError
from upparam.limits import MAX_ARCHIVE_NESTING, SNIFF_BYTES
from upparam.plugins import installed
from upparam.sources import FileSource, Source

CONTAINERS: dict[str, Mark] = {
    "upparam.containers.safetensors": anything,
    "upparam.containers.gguf": begins(b"GGUF"),
    "upparam.containers.ggla": begins(b"algg"),
    "upparam.containers.torchfile.zipped": begins(b"PK"),
    "upparam.containers.torchfile.legacy": torch_stream,
    "upparam.containers.torchfile.tarred": tar,
    "upparam.containers.npy:single": begins(b"\x93NUMPY"),
    "upparam.containers.npy:archive": begins(b"PK"),
    "upparam.containers.pickles": pickle,
}
"""Every container that can be told from its bytes, most specific first: a module, or an object in one, and how its files begin.

One is imported when it is asked, and asked about files that begin as its own do. Headerless files carry no mark: see `raw`.
"""


@cache
def _member(place: str) -> Any:
    module, _, name = place.partition(":")
    found = importlib.import_module(module)
    return getattr(found, name) if name else found


def sniffed(head: Head) -> Container | None:
    """The first container of the table that takes the file."""
    asked = (_member(place) for place, mark in CONTAINERS.items() if mark(head))
    return next((container for container in asked if container.sniff(head)), None)


@cache
def plugins() -> tuple[Container, ...]:
    """Containers that installed packages add (entry points of the group `upparam.containers`); asked after all of ours."""
    return tuple(point.load() for point in installed("upparam.containers"))


def head_of(source: Source, path: Path) -> Head:
    """The first bytes of a source, for sniffing."""
    return Head(source.read(0, min(SNIFF_BYTES, source.size)), source.size, path.name, source)


def file_source(path: Path) -> FileSource:
    """The bytes of a regular file. Raises UnreadableError for what is missing, a device, FIFO or socket, or not permitted."""
    try:
        mode = path.stat().st_mode
    except OSError as problem:
        raise UnreadableError(problem.strerror or str(problem), file=path) from problem
    if not stat.S_ISREG(mode):
        raise UnreadableError("not a regular file", file=path, found=_kind(mode))
    if not os.access(path, os.R_OK):
        raise UnreadableError("permission denied", file=path)
    return FileSource(path)


def open_all(path: Path | str) -> list[TensorFile]:
    """Every tensor file in `path`: one, or the members of an outer zip, tar or gz. Empty when it holds none (see `lookalikes`)."""
    path = Path(path)
    return _open(file_source(path), path, ())


def open_file(path: Path | str) -> TensorFile:
    """The one tensor file in `path`. Raises UnreadableError saying what it is instead, AmbiguousError when an archive holds several."""
    found = open_all(path)
    if len(found) > 1:
        raise AmbiguousError(
            "the archive holds several tensor files",
            file=path,
            found=", ".join(file.name for file in found),
            remedy="unpack it and name one",
        )
    if not found:
        from upparam.containers import lookalikes

        look = lookalikes.recognise(head_of(file_source(Path(path)), Path(path)))
        raise UnreadableError(f"no tensors can be read from it: {look.message}", file=path, found=look.kind)
    return found[0]


def member_source(path: Path) -> Source | None:
    """The bytes of a file by its path: a regular file's, or of a member of the archive that some folder of its path is; None where there is none."""
    if path.is_file():
        return file_source(path)
    outer = next((part for part in path.parents if part.exists()), None)
    if outer is None or not outer.is_file():
        return None
    from upparam.containers import archive

    source: Source | None = file_source(outer)
    at, words = outer, list(path.relative_to(outer).parts)
    while source is not None and words:
        if not archive.sniff(head_of(source, at)):
            return None
        contents = archive.contents(source, at)
        held = dict([*contents.members, *contents.passed_over])
        count = next((count for count in range(len(words), 0, -1) if "/".join(words[:count]) in held), 0)
        source = held["/".join(words[:count])] if count else None
        at, words = at.joinpath(*words[:count]), words[count:]
    return source


def _open(source: Source, path: Path, wrapping: tuple[str, ...]) -> list[TensorFile]:
    head = head_of(source, path)
    container = sniffed(head)
    if container is not None:
        return [_read(container, source, path, wrapping)]
    from upparam.containers import archive

    if not archive.sniff(head):
        container = next((container for container in plugins() if container.sniff(head)), None)
        return [] if container is None else [_read(container, source, path, wrapping)]
    if len(wrapping) >= MAX_ARCHIVE_NESTING:
        raise LimitError("archives nested deeper than any real download", file=path, expected=f"<= {MAX_ARCHIVE_NESTING}")
    contents = archive.contents(source, path)
    found: list[TensorFile] = []
    for name, member in contents.members:
        found += _open(member, path / name, (*wrapping, contents.kind))
    for file in found:
        file.findings += contents.findings
    return found


def _read(container: Container, source: Source, path: Path, wrapping: tuple[str, ...]) -> TensorFile:
    file = container.read(source, path)
    file.wrapping = wrapping
    return file


def _kind(mode: int) -> str:
    kinds = (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a FIFO"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
        (stat.S_ISSOCK, "a socket"),
    )
    return next((text for test, text in kinds if test(mode)), "a special file")
