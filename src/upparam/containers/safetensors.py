"""safetensors: 8 bytes of header length, a JSON header, then the data without gaps.

The header is read by our own code (no numpy, no extension module on the path of `identify`) with every check of the format:
lengths, offsets, overlaps and gaps, duplicate keys, dtype and shape against the byte range. Source: the format section of
huggingface/safetensors README.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from upparam.containers.base import Head, TensorFile
from upparam.containers.writing import put
from upparam.dtypes import BY_CODE
from upparam.errors import LimitError, MalformedError, RefusedError, VerificationError
from upparam.findings import Finding, warning
from upparam.limits import MAX_DIMS, MAX_SAFETENSORS_HEADER, MAX_TENSORS
from upparam.sources import Source
from upparam.tensors import Tensor

name = "safetensors"
title = "safetensors"


def sniff(head: Head) -> bool:
    """A plausible length followed by an opening brace."""
    if len(head.data) < 9 or head.data[8:9] != b"{":
        return False
    return int.from_bytes(head.data[:8], "little") <= max(MAX_SAFETENSORS_HEADER, head.size)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise MalformedError("the header names a key twice", tensor=key, remedy="the file is malformed or crafted; do not trust it")
            seen.add(key)
    return found


def read(source: Source, path: Path) -> TensorFile:
    """Names, dtypes, shapes and byte ranges. Raises MalformedError or LimitError, naming the tensor."""
    if source.size < 8:
        raise MalformedError("too short for a safetensors file", file=path, expected="at least 8 bytes", found=source.size)
    length = int.from_bytes(source.read(0, 8), "little")
    if length > MAX_SAFETENSORS_HEADER:
        raise LimitError("the header is longer than any real one", file=path, expected=f"<= {MAX_SAFETENSORS_HEADER}", found=length)
    if 8 + length > source.size:
        raise MalformedError(
            "the file ends inside its header",
            file=path,
            expected=f"{8 + length} bytes",
            found=source.size,
            remedy="the download is truncated; fetch it again",
        )
    try:
        text = source.read(8, length).decode("utf-8")
        header = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as problem:
        raise MalformedError(f"the header is not valid JSON: {problem}", file=path) from problem
    except MalformedError as problem:
        problem.file = str(path)
        raise type(problem)(problem.message, file=path, tensor=problem.tensor, remedy=problem.remedy) from None
    if not isinstance(header, dict):
        raise MalformedError("the header is not a JSON object", file=path, found=type(header).__name__)
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise MalformedError("__metadata__ must map strings to strings", file=path)
    if "\\u" in text:
        _check_surrogates(path, header, metadata)
    if len(header) > MAX_TENSORS:
        raise LimitError("more tensors than any real file", file=path, expected=f"<= {MAX_TENSORS}", found=len(header))
    data = 8 + length
    tensors: dict[str, Tensor] = {}
    ranges: list[tuple[int, int, str]] = []
    for key, entry in header.items():
        tensor, start, stop = _tensor(source, path, key, entry, data)
        tensors[key] = tensor
        ranges.append((start, stop, key))
    findings = _check_ranges(path, ranges, source.size - data)
    return TensorFile(path, name, tensors, metadata, findings=findings, data_start=data)


def _check_surrogates(path: Path, header: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """JSON can escape half a surrogate pair; no file system, terminal or other reader takes such a string."""
    for text in (*header, *metadata, *metadata.values()):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise MalformedError("a name or value is not Unicode text", file=path, found=ascii(text)[:80]) from None


def _tensor(source: Source, path: Path, key: str, entry: Any, data: int) -> tuple[Tensor, int, int]:
    try:
        code, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = (*shape, start, stop)
        integers = type(shape) is list and set(map(type, numbers)) == {int} and min(numbers) >= 0 and max(numbers) < 1 << 63
    except (TypeError, KeyError, ValueError):
        integers, code, shape, start, stop = False, None, (), 0, 0
    if not integers or start > stop:
        raise MalformedError("an entry needs dtype, shape and data_offsets of whole numbers", file=path, tensor=key, found=str(entry)[:120])
    dtype = BY_CODE.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise MalformedError(
            "an element type upparam does not read", file=path, tensor=key, expected="one of " + " ".join(BY_CODE), found=code
        )
    if len(shape) > MAX_DIMS:
        raise LimitError("more dimensions than any real tensor", file=path, tensor=key, expected=f"<= {MAX_DIMS}", found=len(shape))
    if prod(shape) * dtype.itemsize != stop - start:
        raise MalformedError(
            "shape and byte range disagree",
            file=path,
            tensor=key,
            expected=f"{prod(shape) * dtype.itemsize} bytes for {code} {shape}",
            found=stop - start,
        )
    tensor = Tensor(dtype, tuple(shape), source, data + start)
    if start == stop:
        tensor.check(key)
    return tensor, start, stop


def intact(source: Source, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a damaged file whose entry is right and whose bytes are all there, and the names of the others with the reason.

    Raises MalformedError when the header itself cannot be read.
    """
    length = int.from_bytes(source.read(0, min(8, source.size)), "little")
    if source.size < 8 or length > MAX_SAFETENSORS_HEADER or 8 + length > source.size:
        raise MalformedError("the file ends inside its header: nothing can be told about its tensors", file=path)
    try:
        header = json.loads(source.read(8, length))
    except (ValueError, RecursionError) as problem:
        raise MalformedError(f"the header is not valid JSON: {problem}", file=path) from problem
    tensors: dict[str, Tensor] = {}
    lost: dict[str, str] = {}
    for key, entry in header.items() if isinstance(header, dict) else ():
        if key == "__metadata__":
            continue
        try:
            _check_surrogates(path, {key: entry}, {})
            tensor, _, _ = _tensor(source, path, key, entry, 8 + length)
            tensor.check(key)
            tensors[key] = tensor
        except MalformedError as problem:
            lost[key.encode("utf-8", "backslashreplace").decode()] = problem.message
    return tensors, lost


def _check_ranges(path: Path, ranges: list[tuple[int, int, str]], available: int) -> list[Finding]:
    end, last = 0, ""
    for start, stop, key in sorted(ranges):
        if start < end:
            raise MalformedError(f"the bytes overlap those of '{last}'", file=path, tensor=key, expected=f"start >= {end}", found=start)
        if start > end:
            raise MalformedError(
                f"a gap of {start - end} bytes that no tensor owns", file=path, tensor=key, expected=f"start {end}", found=start
            )
        if stop > available:
            raise MalformedError(
                "the file ends before the data does", file=path, tensor=key, expected=f"{stop} bytes of data", found=available,
                remedy="the download is truncated; fetch it again",
            )  # fmt: skip
        end, last = stop, key
    if end < available:
        return [
            warning(
                "trailing-bytes", path.name, f"{available - end} bytes follow the last tensor and belong to none", f"data ends at {end}"
            )
        ]
    return []


def header_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """The length prefix and JSON header for these tensors laid out in the given order, padded so that data starts on 8 bytes."""
    if "__metadata__" in tensors:
        raise RefusedError("safetensors keeps this name for its metadata", tensor="__metadata__", remedy="rename the tensor")
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for key, tensor in tensors.items():
        header[key] = {"dtype": tensor.dtype.code, "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % 8)
    return len(text).to_bytes(8, "little") + text


def layout_order(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The order safetensors' own writer uses: by its list of dtypes (widest first, so that every tensor is aligned), then by name."""
    return dict(sorted(tensors.items(), key=lambda item: (_RANK[item[1].dtype.name], item[0])))


_RANK = {
    name: rank
    for rank, name in enumerate(
        ("complex128", "uint64", "int64", "float64", "complex64", "float32", "uint32", "int32", "bfloat16", "float16", "uint16", "int16",
         "float8_e5m2fnuz", "float8_e4m3fnuz", "float8_e8m0fnu", "float8_e4m3fn", "float8_e5m2", "int8", "uint8", "bool")
    )
}  # fmt: skip
"""The writer's order of dtypes, last declared first. Source: huggingface/safetensors safetensors/src/tensor.rs (enum Dtype, serialize)."""


def write(stream: Any, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file to a binary stream; to a real file with two threads, of which each has one tensor in memory where it has to be computed."""
    ordered = layout_order(tensors)
    stream.write(header_bytes(ordered, metadata))
    put(stream, ordered)


def restate(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Give the file that `write` made of these tensors other metadata of the same length, and read its header again.

    Raises MalformedError, and changes nothing, where the header would get another length; VerificationError where it reads back otherwise.
    """
    header = header_bytes(layout_order(tensors), metadata)
    with path.open("r+b") as stream:
        if 8 + int.from_bytes(stream.read(8), "little") != len(header):
            raise MalformedError("the new metadata is not as long as its place", file=path)
        stream.seek(0)
        stream.write(header)
    with path.open("rb") as stream:
        if stream.read(len(header)) != header:
            raise VerificationError("the header read back is not the one that was written", file=path)
