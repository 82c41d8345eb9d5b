"""A sharded training checkpoint (`pytorch_model-00001-of-00003.bin`) as the one file it stands for.

Source of the names: huggingface/transformers src/transformers/modeling_utils.py (shard_checkpoint), huggingface_hub serialization.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from upparam.containers.base import TensorFile
from upparam.errors import MalformedError
from upparam.findings import error
from upparam.patterns import regex
from upparam.tensors import Tensor

_SHARD = regex(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})(?P<ending>\.\w+)$")


def others(file: TensorFile, siblings: Sequence[TensorFile]) -> list[TensorFile]:
    """The other parts of the checkpoint that a file is a part of; [] where it is none."""
    own = _SHARD.match(file.name)
    if own is None:
        return []
    whole = own["stem"], own["total"], own["ending"]
    return [
        other for other in siblings
        if (its := _SHARD.match(other.name)) is not None and (its["stem"], its["total"], its["ending"]) == whole and other.path.parent == file.path.parent
    ]  # fmt: skip


def joined(files: Sequence[TensorFile]) -> list[TensorFile]:
    """The files with the parts of a sharded checkpoint joined to one, and a finding where parts are missing."""
    own = _SHARD.match(files[0].name)
    if own is None:
        return list(files)
    parts = sorted(files, key=lambda file: file.name)
    tensors: dict[str, Tensor] = {}
    for file in parts:
        twice = next((name for name in file.tensors if name in tensors), None)
        if twice is not None:
            raise MalformedError("two files of a sharded checkpoint hold this tensor", file=file.path, tensor=twice)
        tensors |= file.tensors
    findings = [finding for file in parts for finding in file.findings]
    if len(parts) < int(own["total"]):
        there = ", ".join(file.name for file in parts)
        findings.append(
            error("shards-missing", files[0].name, f"{len(parts)} of the checkpoint's {int(own['total'])} files are here", there)
        )
    return [replace(files[0], tensors=tensors, findings=findings)]
