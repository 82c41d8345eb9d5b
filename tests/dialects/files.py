"""Adapter files in memory: key sets filled with seeded values, read and written without a disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from upparam import dialects
from upparam.adapter import Adapter
from upparam.containers.base import TensorFile
from upparam.dialects.base import Bundle, NamedTensors, ReadOptions
from upparam.tensors import Tensor


def filled(shapes: Mapping[str, list[int]], dtype: Any = np.float16, alpha: float = 8.0, seed: int = 0) -> dict[str, Tensor]:
    """Seeded values for names and shapes; scalars are alphas."""
    rng = np.random.default_rng(seed)
    return {
        name: Tensor.of((rng.standard_normal(shape) * 0.05 if shape else np.array(alpha)).astype(dtype)) for name, shape in shapes.items()
    }


def keyset(path: Path, **more: Any) -> dict[str, Tensor]:
    """A key set of the corpus, filled."""
    return filled(json.loads(path.read_text()), **more)


def tensor_file(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, name: str = "lora.safetensors") -> TensorFile:
    return TensorFile(Path(name), "safetensors", dict(tensors), dict(metadata or {}))


def read(dialect: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, **options: Any) -> Adapter:
    """The adapter that `dialect` reads from these tensors."""
    return dialects.get(dialect).read(Bundle([tensor_file(tensors, metadata)], Path()), ReadOptions(**options))


def written(dialect: str, adapter: Adapter, **options: Any) -> NamedTensors:
    """The one tensor file that `dialect` writes, with the metadata that is made while it is written."""
    (content,) = (file for file in dialects.get(dialect).write(adapter, options).files.values() if isinstance(file, NamedTensors))
    return content if content.late is None else replace(content, metadata={**content.metadata, **content.late()}, late=None)


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Same names, dtypes, shapes and bits."""
    assert set(one) == set(other), sorted(set(one) ^ set(other))[:6]
    for name, tensor in one.items():
        assert (tensor.dtype, tensor.shape) == (other[name].dtype, other[name].shape), name
        assert tensor.raw() == other[name].raw(), name
