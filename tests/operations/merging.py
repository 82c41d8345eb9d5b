"""What the merge tests share: small bases and adapters made in memory, and the float64 reference that every merge must equal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from upparam.adapter import Adapter, Target
from upparam.algorithms.base import Scaling
from upparam.algorithms.lora import LoRA
from upparam.containers import open_file
from upparam.containers.safetensors import write
from upparam.tensors import Tensor

NUMPY = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}


def save(path: Path, arrays: dict[str, NDArray[Any]], metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        write(stream, {name: Tensor.of(array) for name, array in arrays.items()}, metadata)
    return path


def load(path: Path) -> dict[str, NDArray[Any]]:
    return {name: tensor.read() for name, tensor in open_file(path).tensors.items()}


def lora(up: NDArray[Any], down: NDArray[Any], alpha: float | None = None) -> LoRA:
    return LoRA(Tensor.of(up), Tensor.of(down), Scaling(alpha=alpha))


def adapter(deltas: dict[str | Target, Any], **fields: Any) -> Adapter:
    return Adapter({key if isinstance(key, Target) else Target(key): delta for key, delta in deltas.items()}, "test", **fields)


def round_once(values: NDArray[np.float64], dtype: str) -> NDArray[Any]:
    """Round to nearest even by exact comparison with both neighbours: slow, and shares nothing with the code under test."""
    kind = NUMPY[dtype]
    if dtype in ("float64", "float32", "float16"):
        return values.astype(kind)
    info = ml_dtypes.finfo(kind)
    exponent = np.maximum(np.frexp(np.abs(values))[1] - 1, info.minexp)
    ulp = np.ldexp(1.0, exponent - info.nmant)
    scaled = values / ulp  # exact: division by a power of two
    return (np.rint(scaled) * ulp).astype(np.float32).astype(kind)


def ordered_distance(one: NDArray[Any], other: NDArray[Any]) -> NDArray[np.int64]:
    """How many representable values apart two arrays of one dtype are, element by element."""
    from upparam.operations.merge.rounding import ordered

    return np.abs(ordered(one) - ordered(other))


class TileCase(NamedTuple):
    """A tile of a stored weight (rows, columns) and the factors that change it: up (start + rows, r), down (r, columns)."""

    dtype: str
    weight: np.ndarray
    up: np.ndarray
    down: np.ndarray
    start: int


@st.composite
def tile_cases(draw: st.DrawFn, dtypes: Sequence[str] = ("bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e5m2")) -> TileCase:
    """Tiles of every dtype, shape and size of change, weights of every code among them, with rows and columns of zeros."""
    dtype = draw(st.sampled_from(dtypes))
    rows, columns, rank = draw(st.integers(1, 40)), draw(st.integers(1, 150)), draw(st.integers(1, 40))
    start, size = draw(st.integers(0, 9)), draw(st.sampled_from([1e-9, 1e-3, 1.0, 1e4]))
    strange, single = draw(st.booleans()), draw(st.booleans())
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    kind = NUMPY[dtype]
    weight = (rng.standard_normal((rows, columns)) * 0.05).astype(kind)
    if strange:  # every code: NaN, Inf, subnormals, both zeros
        code = np.dtype(f"u{kind.itemsize}")
        weight = rng.integers(0, 256**kind.itemsize, (rows, columns), dtype=np.uint64).astype(code).view(kind)
        weight[rng.random((rows, columns)) < 0.3] = -0.0
    up = rng.standard_normal((rows + start, rank)) * size
    up[rng.random(up.shape) < 0.2] = 0
    up[rng.random(len(up)) < 0.1] = 0
    down = rng.standard_normal((rank, columns))
    down[:, rng.random(columns) < 0.1] = 0
    if single:  # as adapters store them
        up, down = up.astype(np.float32).astype(np.float64), down.astype(np.float32).astype(np.float64)
    return TileCase(dtype, weight, up, down, start)
