"""Bare pickles: Python objects with numpy arrays (or torch storages saved by hand) inside, joblib's uncompressed files among them."""

from __future__ import annotations

from pathlib import Path

from upparam.containers import marks
from upparam.containers.base import Head, TensorFile
from upparam.containers.evidence import tensor_file
from upparam.containers.machine import Examination, examine, new_budget, program
from upparam.findings import Finding, warning
from upparam.sources import MemorySource, Source

name = "pickle"
title = "Python pickle"


def sniff(head: Head) -> bool:
    """A protocol mark and a program that runs on the symbolic machine for a while; in the old protocols, one that ends with the file."""
    data = head.data
    if len(data) < 2 or not marks.pickle(head):
        return False
    marked = data[0] == 0x80
    if marked and data[1] > 5:
        return False
    seen = examine(data, source=MemorySource(data, head.name))
    if seen.problem is None:
        return marked or not head.source.read(seen.stop, min(head.size - seen.stop, 16)).strip()
    grown = seen.ended and head.size > len(data)
    if not marked:
        return grown and bool(seen.uses) and all(use.qualname.isascii() and use.qualname.isprintable() for use in seen.uses.values())
    return grown or seen.stop >= 24 or bool(seen.uses)


def read(source: Source, path: Path) -> TensorFile:
    """Names, dtypes, shapes and byte ranges of the arrays. Raises MalformedError or LimitError."""
    seen, findings = take_apart(source, path)
    return tensor_file(path, name, seen, findings)


def take_apart(source: Source, path: Path) -> tuple[Examination, list[Finding]]:
    """The examination (its problem left in it) and findings."""
    seen = examine(program(source), source=source, budget=new_budget(source.size))
    if seen.problem is None and seen.stop < source.size and source.read(seen.stop, min(64, source.size - seen.stop)).strip():
        return seen, [
            warning("trailing-bytes", path.name, f"{source.size - seen.stop} bytes follow the pickle", f"it ends at byte {seen.stop}")
        ]
    return seen, []
