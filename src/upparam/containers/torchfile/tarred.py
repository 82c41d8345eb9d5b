"""torch tar files (torch.save before 0.2): members `storages` (data), `tensors` (views) and `pickle` (the object that refers to them).

`storages`: a count, then per storage a pickle (key, location, type), its number of elements (int64) and its raw elements; last a pickled
list of views (key, key of the root, offset, elements). `tensors`: a count, then per tensor a pickle (key, storage key, type), the number of
dimensions (int32, 4 bytes of padding), sizes, strides and offset (int64). Source: `legacy_load` in torch/serialization.py of
pytorch/pytorch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from upparam.containers import tars
from upparam.containers.base import Head, TensorFile
from upparam.containers.evidence import tensor_file, with_file
from upparam.containers.machine import Examination, examine, new_budget, program
from upparam.containers.symbols import Broken, Storage, Trust, summary, view
from upparam.containers.torchfile.stream import Stream
from upparam.errors import LimitError, MalformedError, UpparamError
from upparam.findings import Finding
from upparam.limits import MAX_DIMS, MAX_TENSORS
from upparam.sources import Source

name = "torch-tar"
title = "torch tar file"

_MEMBERS = {"storages", "tensors", "pickle"}


def sniff(head: Head) -> bool:
    """A tar with the three members."""
    if not tars.sniff(head):
        return False
    try:
        return {_plain(member.name) for member in tars.read_archive(head.source, Path(head.name)).members} >= _MEMBERS
    except UpparamError:
        return False


def _plain(member: str) -> str:
    return member.removeprefix("./")


def read(source: Source, path: Path) -> TensorFile:
    """Names, dtypes, shapes and byte ranges. Raises MalformedError or LimitError, naming the tensor where one is at fault."""
    seen, findings = take_apart(source, path)
    return tensor_file(path, name, seen, findings, where="pickle")


def take_apart(source: Source, path: Path) -> tuple[Examination, list[Finding]]:
    """The object's examination (its problem left in it) and findings."""
    archive = tars.read_archive(source, path)
    members: dict[str, Source] = {}
    for member in archive.members:
        if _plain(member.name) in members:
            raise MalformedError(
                "two members of the same name: loaders differ in which one they read", file=path, found=_plain(member.name)[:80]
            )
        members[_plain(member.name)] = member.source
    budget = new_budget(source.size)
    storages = Stream(members["storages"], path, budget)
    roots = _storages(storages)
    tensors = Stream(members["tensors"], path, budget)
    known = _tensors(tensors, roots)

    def persistent(reference: Any) -> Any:
        if type(reference) is tuple and reference:
            return reference[0]
        try:
            return known[str(int(reference))]
        except (KeyError, ValueError, TypeError):
            raise MalformedError("a reference to a tensor the file does not hold", found=summary(reference)) from None

    seen = examine(program(members["pickle"]), source=members["pickle"], persistent=persistent, budget=tensors.budget)
    for name, use in {**storages.uses, **tensors.uses}.items():
        if use.trust is Trust.CODE or name not in seen.uses:
            seen.uses[name] = use
    if seen.problem is not None:
        seen.problem = with_file(seen.problem, path)
    return seen, archive.findings


def _count(stream: Stream) -> int:
    found = stream.value(window=256)
    if type(found) is not int or found < 0:
        raise MalformedError("a count that is none", file=stream.path, found=summary(found))
    if found > MAX_TENSORS:
        raise LimitError("more tensors than any real file", file=stream.path, expected=f"<= {MAX_TENSORS}", found=summary(found))
    return found


def _triple(stream: Stream) -> tuple[str, Any, Any]:
    found = stream.value(window=512)
    if type(found) is not tuple or len(found) != 3 or type(found[0]) is not int:
        raise MalformedError("an entry of the wrong form", file=stream.path, found=summary(found))
    return summary(found[0]), found[1], found[2]


def _storages(stream: Stream) -> dict[str, Storage]:
    found: dict[str, Storage] = {}
    for _ in range(_count(stream)):
        key, _, kind = _triple(stream)
        dtype = getattr(kind, "args", (None,))[0] if getattr(kind, "qualname", "") == "torch.Storage" else None
        if dtype is None:
            raise MalformedError("a storage of an element type upparam does not read", file=stream.path, found=summary(kind))
        (count,) = stream.numbers("<q")
        nbytes = count * dtype.itemsize
        if count < 0 or stream.at + nbytes > stream.source.size:
            raise MalformedError(
                "the file ends before a storage does", file=stream.path, expected=f"{nbytes} bytes", found=stream.source.size - stream.at,
                remedy="the file is truncated; fetch it again",
            )  # fmt: skip
        found[key] = Storage(dtype, stream.source, stream.at, nbytes)
        stream.at += nbytes
    views = stream.value()
    if not isinstance(views, list):
        raise MalformedError("the list of storage views is none", file=stream.path, found=summary(views))
    for entry in views:
        if type(entry) is not tuple or len(entry) != 4 or not all(type(number) is int for number in entry):
            raise MalformedError("a storage view of the wrong form", file=stream.path, found=summary(entry))
        root = found.get(summary(entry[1]))
        offset, count = entry[2:]
        if root is None or root.dtype is None or offset < 0 or count < 0 or (offset + count) * root.dtype.itemsize > root.nbytes:
            raise MalformedError("a storage view outside its storage", file=stream.path, found=summary(entry))
        size = root.dtype.itemsize
        found[summary(entry[0])] = Storage(root.dtype, root.source, root.start + offset * size, count * size)
    return found


def _tensors(stream: Stream, roots: dict[str, Storage]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for _ in range(_count(stream)):
        key, storage_key, _ = _triple(stream)
        (dims, _) = stream.numbers("<ii")
        if not 0 <= dims <= MAX_DIMS:
            raise LimitError("more dimensions than any real tensor", file=stream.path, expected=f"<= {MAX_DIMS}", found=dims)
        numbers = stream.numbers(f"<{2 * dims + 1}q")
        storage = roots.get(summary(storage_key))
        if storage is None or storage.dtype is None:
            raise MalformedError("a tensor whose storage is missing", file=stream.path, found=summary(storage_key))
        try:
            found[key] = view(storage, storage.dtype, numbers[-1], numbers[:dims], numbers[dims:-1], stream.budget)
        except UpparamError as problem:
            found[key] = Broken(problem)
    return found
