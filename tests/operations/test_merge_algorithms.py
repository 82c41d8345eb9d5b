"""Algorithms that are no plain up @ down: additive ones without low-rank form, and those whose W' depends on W, in every orientation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from tests.operations.merging import adapter, load, lora, round_once, save

from upparam.adapter import Target
from upparam.algorithms.base import BAKED, Delta, RowReader, Scaling, Update
from upparam.errors import MalformedError
from upparam.operations.merge import merge
from upparam.tensors import Tensor

RNG = np.random.default_rng(21)


class DenseUpdate(Update):
    def __init__(self, value: Any) -> None:
        self.value, self.shape, self.scale = value, value.shape, 1.0

    def rows(self, start: int, stop: int) -> Any:
        return self.value[start:stop].reshape(stop - start, -1)


class NormUpdate(DenseUpdate):
    """W' = magnitude * (W + dW) / column norm of (W + dW): DoRA's form, which needs the whole weight."""

    def merged(self, weight: RowReader, start: int, stop: int) -> Any:
        whole = weight(0, self.shape[0]) + self.value
        return 2.0 * whole[start:stop] / np.linalg.norm(whole, axis=0)


@dataclass(frozen=True)
class Dense(Delta):
    value: Any
    algorithm: ClassVar[str] = "dense"
    scaling: Scaling = BAKED

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    @property
    def rank(self) -> None:
        return None

    def factors(self) -> Mapping[str, Tensor]:
        return {"value": Tensor.of(self.value)}

    def load(self) -> Update:
        return DenseUpdate(self.value)


@dataclass(frozen=True)
class Normed(Dense):
    algorithm: ClassVar[str] = "normed"
    additive: ClassVar[bool] = False

    def load(self) -> Update:
        return NormUpdate(self.value)


def normed(weight: Any, value: Any) -> Any:
    whole = weight + value
    return 2.0 * whole / np.linalg.norm(whole, axis=0)


def start(tmp_path: Path, *shape: int, conv1d: bool = False) -> tuple[Path, Any]:
    weight = (RNG.standard_normal(shape) * 0.1).astype(np.float16)
    (tmp_path / "config.json").write_text('{"model_type": "%s"}' % ("gpt2" if conv1d else "llama"))
    return save(tmp_path / "b.safetensors", {"h.0.c_fc.weight": weight}), weight.astype(np.float64)


@pytest.mark.parametrize("kind", [Dense, Normed])
@pytest.mark.parametrize("multiplier", [1.0, -0.25])
def test_whole_weights(tmp_path: Path, kind: Any, multiplier: float) -> None:
    base, weight = start(tmp_path, 30, 20)
    value = RNG.standard_normal((30, 20))
    merge(base, (adapter({"h.0.c_fc": kind(value)}), multiplier), tmp_path / "o.safetensors")
    change = value if kind is Dense else normed(weight, value) - weight
    got = load(tmp_path / "o.safetensors")["h.0.c_fc.weight"]
    assert np.array_equal(got, round_once(weight + multiplier * change, "float16"))


@pytest.mark.parametrize("kind", [Dense, Normed])
def test_conv1d_weights(tmp_path: Path, kind: Any) -> None:
    base, weight = start(tmp_path, 20, 80, conv1d=True)
    value = RNG.standard_normal((80, 20))
    merge(base, adapter({"h.0.c_fc": kind(value)}), tmp_path / "o.safetensors")
    true = weight.T + value if kind is Dense else normed(weight.T, value)
    assert np.array_equal(load(tmp_path / "o.safetensors")["h.0.c_fc.weight"], round_once(true.T, "float16"))


def test_slices_mixed_with_low_rank_in_the_order_given(tmp_path: Path) -> None:
    base, weight = start(tmp_path, 30, 20)
    value, low = RNG.standard_normal((10, 20)), lora(RNG.standard_normal((30, 3)), RNG.standard_normal((3, 20)))
    first = adapter({"h.0.c_fc": low})
    second = adapter({Target("h.0.c_fc", (10, 20)): Normed(value)})
    merge(base, [first, second], tmp_path / "o.safetensors")
    true = weight + low.load().rows(0, 30)
    true[10:20] = normed(true[10:20], value)
    assert np.array_equal(load(tmp_path / "o.safetensors")["h.0.c_fc.weight"], round_once(true, "float16"))


def test_vectors_and_biases(tmp_path: Path) -> None:
    norm = (RNG.standard_normal(16) * 0.1).astype(np.float16)
    base = save(tmp_path / "b.safetensors", {"norm.weight": norm, "norm.bias": norm})
    change = RNG.standard_normal(16)
    merge(base, adapter({"norm": Dense(change), Target("norm", None, "bias"): Dense(-change)}), tmp_path / "o.safetensors")
    got = load(tmp_path / "o.safetensors")
    assert np.array_equal(got["norm.weight"], round_once(norm.astype(np.float64) + change, "float16"))
    assert np.array_equal(got["norm.bias"], round_once(norm.astype(np.float64) - change, "float16"))


@pytest.mark.parametrize("kind", ["dense", "low-rank"])
def test_nan_in_the_adapter_stops_the_merge(tmp_path: Path, kind: str) -> None:
    base, _ = start(tmp_path, 30, 20)
    value = RNG.standard_normal((30, 20))
    value[3, 4] = np.nan
    delta = Dense(value) if kind == "dense" else lora(value[:, :5], RNG.standard_normal((5, 20)))
    with pytest.raises(MalformedError, match=r"NaN or Inf"):
        merge(base, adapter({"h.0.c_fc": delta}), tmp_path / "o.safetensors")
    assert not (tmp_path / "o.safetensors").exists()
