"""One file with both factors of each module under names of its author's own: read, told from what only looks like it, and never called no adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tests.dialects.test_triad import factors, torch_file

from upparam.dialects.base import ReadOptions
from upparam.errors import RefusedError
from upparam.operations.convert import convert
from upparam.operations.identify import identify
from upparam.operations.opening import open_adapter

RNG = np.random.default_rng(11)


def up(rows: int = 64, rank: int = 4) -> NDArray[Any]:
    return RNG.standard_normal((rows, rank), dtype=np.float32)


def down(columns: int = 96, rank: int = 4) -> NDArray[Any]:
    return RNG.standard_normal((rank, columns), dtype=np.float32)


@pytest.mark.parametrize(
    ("first", "second", "module"),
    [
        ("layers.{}.q.up", "layers.{}.q.down", "layers.{}.q"),
        ("layers.{}.q.lora_up.weight", "layers.{}.q.lora_down.weight", "layers.{}.q"),
        ("layer{}_up", "layer{}_down", "layer{}"),
        ("layer{}_lora_up", "layer{}_lora_down", "layer{}"),
        ("blocks.{}.B", "blocks.{}.A", "blocks.{}"),
        ("blocks_{}.lora.up.weight", "blocks_{}.lora.down.weight", "blocks_{}"),
    ],
)
def test_pairs_by_module_are_read_bit_for_bit(tmp_path: Path, first: str, second: str, module: str) -> None:
    ups, downs = [up() for _ in range(3)], [down() for _ in range(3)]
    tensors = {first.format(i): ups[i] for i in range(3)} | {second.format(i): downs[i] for i in range(3)}
    save_file(tensors, tmp_path / "w.safetensors")
    adapter = open_adapter(tmp_path / "w.safetensors", options=ReadOptions(scale=0.5))
    assert not adapter.leftovers
    found = {name: (one, other, scale) for name, one, other, scale in factors(adapter)}
    assert set(found) == {module.format(i) for i in range(3)}
    for i in range(3):
        one, other, scale = found[module.format(i)]
        assert one.tobytes() == ups[i].tobytes() and other.tobytes() == downs[i].tobytes() and scale == 0.5


def test_a_file_of_one_pair_and_its_alpha(tmp_path: Path) -> None:
    one, other = up(), down()
    torch_file(tmp_path / "lora.pt", {"up": one, "down": other, "alpha": 8})
    np.savez(tmp_path / "lora.npz", up=one, down=other, alpha=np.float32(8))
    for name in ("lora.pt", "lora.npz"):
        adapter = open_adapter(tmp_path / name)
        ((_, first, second, scale),) = factors(adapter)
        assert first.tobytes() == one.tobytes() and second.tobytes() == other.tobytes() and scale == 2.0, name


def test_nested_dicts_name_the_modules(tmp_path: Path) -> None:
    torch_file(tmp_path / "lora.pt", {"layers": {str(i): {"up": up(), "down": down()} for i in range(2)}, "alpha": 8, "rank": 4})
    assert [(name, scale) for name, _, _, scale in factors(open_adapter(tmp_path / "lora.pt"))] == [("layers.0", 2.0), ("layers.1", 2.0)]


def test_factors_called_a_and_b_have_no_scale_until_it_is_given(tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", A=down(), B=up())
    adapter = open_adapter(tmp_path / "w.npz")
    assert [delta.scale for delta in adapter.deltas.values()] == [None]
    assert "scale-missing" in {finding.code for finding in adapter.findings}
    assert [delta.scale for delta in open_adapter(tmp_path / "w.npz", options=ReadOptions(alpha=8)).deltas.values()] == [2.0]
    (tmp_path / "config.json").write_text(json.dumps({"alpha": 16, "r": 4}))
    assert [delta.scale for delta in open_adapter(tmp_path / "w.npz").deltas.values()] == [4.0]


def test_other_tensors_beside_telling_words_stay_unexplained(tmp_path: Path) -> None:
    save_file(
        {"fc.lora_up.weight": up(), "fc.lora_down.weight": down(), "fc.weight": np.zeros((64, 96), np.float32)}, tmp_path / "w.safetensors"
    )
    adapter = open_adapter(tmp_path / "w.safetensors")
    assert list(adapter.leftovers) == ["fc.weight"] and [str(target) for target in adapter.deltas] == ["fc"]
    with pytest.raises(RefusedError):
        convert(tmp_path / "w.safetensors", tmp_path / "out", "peft")


@pytest.mark.parametrize(
    "tensors",
    [
        {"layer.0.adapter_down.weight": (4, 64), "layer.0.adapter_up.weight": (64, 4)},
        {"layer.0.adapter.down": (4, 64), "layer.0.adapter.up": (64, 4)},
        {"layers.0.mlp.down": (64, 256), "layers.0.mlp.up": (256, 64)},
        {"layers.0.mlp.down_proj.weight": (64, 256), "layers.0.mlp.up_proj.weight": (256, 64)},
        {"up": (64, 4), "down": (5, 96)},
        {"up": (64, 64, 64), "down": (64,)},
        {"q.up": (64, 4), "k.down": (4, 64)},
        {"q.up": (64, 4), "q.down": (4, 64), "other": (3,)},
        {"up": (2000, 1500), "down": (1500, 2000)},
        {"layers.0.q.lora_a.weight": (4, 64), "layers.0.q.lora_b.weight": (64, 4)},
        {"q.parametrizations.weight.0.lora_A": (4, 64), "q.parametrizations.weight.0.lora_B": (64, 4)},
    ],
)
def test_what_only_looks_like_pairs_is_no_adapter(tmp_path: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    save_file({name: np.zeros(shape, np.float32) for name, shape in tensors.items()}, tmp_path / "w.safetensors")
    found = identify(tmp_path / "w.safetensors")
    assert not found.adapters and len(found.files) == 1


def test_a_file_with_factors_in_its_names_is_never_said_to_hold_none(tmp_path: Path) -> None:
    save_file(
        {f"layers.{i}.q.{word}.weight": np.zeros(shape, np.float32) for i in range(2) for word, shape in (("lora_up", (64, 4)), ("lora_down", (5, 64)))},
        tmp_path / "w.safetensors",
    )  # fmt: skip
    (item,) = identify(tmp_path / "w.safetensors").files
    assert item.kind == "tensors" and "4 tensors named like an adapter's factors" in item.message and "no adapter" not in item.message
