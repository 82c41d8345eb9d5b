"""ggla: llama.cpp's LoRA files from before GGUF (`ggml-adapter-model.bin`). A fixed header with rank and alpha, then tensor after tensor.

Dimensions are stored fastest axis first and are reversed here to row-major; the down factors (`.loraA`) were written transposed, as (in, rank).
Source: ggml-org/llama.cpp `convert-lora-to-ggml.py` and `llama_apply_lora_from_file_internal` (both removed in 2024).
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from upparam.containers.base import Head, TensorFile
from upparam.dtypes import DTYPES
from upparam.errors import LimitError, MalformedError
from upparam.limits import MAX_TENSORS
from upparam.sources import Source
from upparam.tensors import Tensor

name = "ggla"
title = "llama.cpp LoRA before GGUF (ggla)"

MAGIC = b"algg"
_TYPES = {0: "float32", 1: "float16"}
_MAX_NAME = 4096
_ALIGNMENT = 32


def sniff(head: Head) -> bool:
    """The magic number (a little-endian word, so its letters stand backwards) and version 1."""
    return head.data[:8] == MAGIC + b"\1\0\0\0"


def read(source: Source, path: Path) -> TensorFile:
    """Names, types, shapes and places; `lora_r` and `lora_alpha` as metadata. Raises MalformedError or LimitError, naming the tensor."""

    def bad(message: str, tensor: str | None = None, **facts: Any) -> MalformedError:
        return MalformedError(message, file=path, tensor=tensor, **facts)

    def take(code: str, at: int) -> tuple[Any, ...]:
        size = struct.calcsize(code)
        if at + size > source.size:
            raise bad(
                "the file ends inside a header", expected=f"{at + size} bytes", found=source.size, remedy="it is truncated; fetch it again"
            )
        return struct.unpack(code, source.read(at, size))

    rank, alpha = take("<4x4xii", 0)
    tensors: dict[str, Tensor] = {}
    at = 16
    while at < source.size:
        dims, length, kind = take("<iii", at)
        if not 1 <= dims <= 2 or kind not in _TYPES:
            raise bad("a tensor that old llama.cpp could not have written", expected="1 or 2 dimensions of type 0 or 1", found=(dims, kind))
        if not 0 < length <= _MAX_NAME:
            raise LimitError("a tensor name longer than any real one", file=path, expected=f"1 to {_MAX_NAME}", found=length)
        shape = take(f"<{dims}i", at + 12)[::-1]
        start = at + 12 + 4 * dims
        key = take(f"<{length}s", start)[0].decode("utf-8", "backslashreplace")
        if key in tensors:
            raise bad("the file names a tensor twice", key)
        tensor = Tensor(DTYPES[_TYPES[kind]], shape, source, -(-(start + length) // _ALIGNMENT) * _ALIGNMENT)
        try:
            tensor.check(key)
        except MalformedError as problem:
            raise bad(problem.message, key, expected=problem.expected, found=problem.found, remedy=problem.remedy) from None
        tensors[key] = tensor
        if len(tensors) > MAX_TENSORS:
            raise LimitError("more tensors than any real file", file=path, expected=f"<= {MAX_TENSORS}")
        at = tensor.offset + tensor.nbytes
    return TensorFile(path, name, tensors, {"lora_r": str(rank), "lora_alpha": str(alpha)}, data_start=16)
