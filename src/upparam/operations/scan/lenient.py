"""What careless or different readers find in a file: programs behind zip headers that no trusted directory lists, behind the header of an
array, at the start of a file of another format; code in Keras configurations. Everything is read, nothing run.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

from upparam.containers import nested, npy, tars, zips
from upparam.containers.base import Head, Opaque
from upparam.containers.machine import Examination, Use, examine, new_budget
from upparam.containers.symbols import Trust
from upparam.errors import UpparamError
from upparam.limits import MAX_PICKLE_BYTES
from upparam.patterns import regex
from upparam.sources import MemorySource, Source

_MAX_HEADERS = 10_000
_SEARCHED = 64 << 20
"""Bytes of a zip with a broken directory that are searched for members, and bytes inflated on the way."""
_INFLATED = 1 << 20
_WINDOWS = (1 << 16, 1 << 20, 1 << 24, MAX_PICKLE_BYTES)
_LOCAL = b"PK\x03\x04"
_OURS = ("keras", "tensorflow", "tf_keras", "builtins", "numpy")
_LAYER = regex(rb'"class_name"\s*:\s*"(Lambda|__lambda__)"')
_ESCAPE = regex(rb"\\u00([0-7][0-9a-fA-F])")
_FAR = 64 << 20
"""Bytes from which the end of a packed member is looked at only if it is packed as tensors and archives are."""
_BLOCK, _OVERLAP = 1 << 20, 1 << 10


class Outside:
    """What persistent ids mean to a pickle whose container is not known: nothing, but reading goes on behind them."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, name: object) -> Opaque:
        """The same stand-in for every id."""
        self.asked += 1
        return Opaque("data stored outside the pickle")


def called(uses: Mapping[str, Use]) -> dict[str, Use]:
    """The uses that run something under a name that can be one: in bytes that are no pickle by their mark, the rest is chance."""
    return {
        name: use
        for name, use in uses.items()
        if use.trust is Trust.CODE and use.how != "named" and all(map(str.isidentifier, name.split(".")))
    }


def program_at_start(head: Head, name: str, known: bool) -> Examination | None:
    """The pickle that calls something from the first byte on, whatever else the file is; None when there is none.

    Only as much is read as the program before its first break needs: a long text may stand before the call. Loaders of a file of a `known`
    other format have no data outside it for references.
    """
    for window in _WINDOWS:
        data = head.data if window <= len(head.data) else head.source.read(0, min(head.size, window))
        seen = examine(data, source=MemorySource(data, name), persistent=None if known else Outside())
        if called(seen.uses):
            return seen
        if not seen.ended or len(data) >= head.size:
            return None
    return None


def programs_by_headers(source: Source, path: Path) -> Iterator[tuple[str, Examination]]:
    """(member, examination) for the pickles of a zip whose directory cannot be trusted, by the members' own headers, packed or not."""
    data = source.read(0, min(source.size, _SEARCHED))
    view, budget, inflated = memoryview(data), new_budget(len(data)), 0
    at = data.find(_LOCAL)
    for _ in range(_MAX_HEADERS):
        if at < 0 or at + 30 > len(data):
            return
        named, extra = int.from_bytes(data[at + 26 : at + 28], "little"), int.from_bytes(data[at + 28 : at + 30], "little")
        start = at + 30 + named + extra
        name = data[at + 30 : at + 30 + named].decode("utf-8", "replace")
        if _marked(data[start : start + 2]):
            yield name, examine(data, source=MemorySource(data, path.name), start=start, persistent=Outside(), budget=budget)
        elif inflated < _SEARCHED:
            try:
                packed = zlib.decompressobj(-15).decompress(view[start : start + _INFLATED], _INFLATED)
            except zlib.error:
                packed = b""
            inflated += len(packed)
            if _marked(packed[:2]):
                yield name, examine(packed, persistent=Outside(), budget=budget)
        at = data.find(_LOCAL, at + 4)


def _marked(start: bytes) -> bool:
    return len(start) == 2 and start[0] == 0x80 and start[1] <= 5


def program_in_npy(source: Source, path: Path) -> tuple[int, Examination] | None:
    """Where the pickle of the first array of objects starts and what it says; arrays before it are passed over. None when there is none."""
    at = 0
    while source.read(at, min(10, source.size - at))[:6] == npy.MAGIC:
        try:
            header = npy.read_header(source, path, at)
        except UpparamError:
            break
        at = header.data_start + prod(header.shape) * header.dtype.itemsize
        if at >= source.size:
            return None
    head = source.read(at, min(source.size - at, 1 << 17))
    wide = 2 if head[6:7] == b"\x01" else 4
    start = 8 + wide + int.from_bytes(head[8 : 8 + wide], "little")
    if head[:6] != npy.MAGIC or start > len(head) or at + start >= source.size:
        return None
    data = source.read(at + start, min(source.size - at - start, MAX_PICKLE_BYTES))
    seen = examine(data, source=source, base=at + start)
    objects = re.search(rb"['\"][<>=|]?O[48]?['\"]", head[:start])
    return (at + start, seen) if objects or called(seen.uses) else None


def zip_at_end(head: Head, source: Source, path: Path) -> zips.ZipArchive | None:
    """The archive that a zip reader finds at the end of something that is none; without members where only careless readers find one.

    A zip that lies whole in a member of a tar is that member's own.
    """
    if isinstance(source, nested.InflatedSource) and source.size > _FAR and source.size > nested.HONEST * source.packed.size:
        return None
    end = zips.find_end(source)
    if end is None or source.size < end + 22:
        return None
    try:
        found = zips.read_archive(source, path)
    except UpparamError:
        start = max(0, end - _BLOCK)
        return zips.ZipArchive([], []) if b"PK\x01\x02" in source.read(start, end - start) else None
    if not found.members:
        return None
    return None if tars.sniff(head) and _in_a_member(source, path, found, end) else found


def _in_a_member(source: Source, path: Path, archive: zips.ZipArchive, end: int) -> bool:
    try:
        members = [member.source for member in tars.read_archive(source, path).members]
    except UpparamError:
        return False
    spans = [(span.start, span.start + span.size) for span in members if isinstance(span, nested.SpanSource)]
    return any(start < end + 22 <= stop and all(start < one.data_at <= end for one in archive.members) for start, stop in spans)


def keras_code(text: bytes) -> str | None:
    """What runs when Keras builds the model of this configuration: a Lambda layer or a class of a module the file names. Else None."""
    try:
        root = json.loads(text)
    except (ValueError, RecursionError):
        found = _LAYER.search(_ESCAPE.sub(_unescaped, text))
        return found[1].decode() if found else None
    left: list[Any] = [root]
    while left:
        node = left.pop()
        if isinstance(node, dict):
            kind, module = node.get("class_name"), node.get("module")
            if kind in ("Lambda", "__lambda__"):
                return str(kind)
            if isinstance(kind, str) and isinstance(module, str) and module.split(".")[0] not in _OURS:
                return f"{module}.{kind}"
            left.extend(node.values())
        elif isinstance(node, list):
            left.extend(node)
    return None


def keras_code_in_hdf5(source: Source) -> bool:
    """True when a Lambda layer stands in the bytes of an HDF5 file (its model_config attribute is stored as it is)."""
    for at in range(0, source.size, _BLOCK):
        block = source.read(at, min(_BLOCK + _OVERLAP, source.size - at))
        if _LAYER.search(_ESCAPE.sub(_unescaped, block)):
            return True
    return False


def _unescaped(match: re.Match[bytes]) -> bytes:
    return bytes([int(match[1], 16)])
