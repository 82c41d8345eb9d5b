"""What PEFT gets of a pipeline's transformer: names without the component, which its model has not, and a language model's body keeps its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from upparam.adapter import Adapter, Target
from upparam.algorithms.base import Scaling
from upparam.algorithms.lora import LoRA
from upparam.bases import inventory
from upparam.dialects.base import ReadOptions
from upparam.operations.convert import convert, write_adapter
from upparam.operations.opening import open_adapter
from upparam.tensors import Tensor


def lora(out: int, into: int) -> LoRA:
    rng = np.random.default_rng(out)
    up, down = rng.standard_normal((out, 2)).astype(np.float32), rng.standard_normal((2, into)).astype(np.float32)
    return LoRA(Tensor.of(up), Tensor.of(down), Scaling(alpha=2.0))


def modules(folder: Path) -> set[str]:
    """The names in PEFT's file, without the wrapper and the factor."""
    return {name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for name in load_file(folder / "adapter_model.safetensors")}


@pytest.mark.parametrize(
    ("base", "module"),
    [
        ("flux.1-dev", "single_transformer_blocks.7.attn.to_q"), ("flux.1-dev", "context_embedder"), ("z-image", "layers.12.attention.to_q"),
        ("z-image", "context_refiner.1.attention.to_q"), ("lumina2", "layers.3.attn.to_q"), ("hidream-i1", "double_stream_blocks.3.block.attn1.to_q"),
        ("auraflow", "joint_transformer_blocks.0.attn.to_q"), ("wan2.1-t2v-1.3b", "blocks.3.attn1.to_q"),
    ],
)  # fmt: skip
def test_the_component_is_no_part_of_a_name(base: str, module: str, tmp_path: Path) -> None:
    known = inventory.load(base)
    target = Target(f"transformer.{module}")
    out, into, *_ = known.by_path[target.module].canonical
    write_adapter(Adapter({target: lora(out, into)}, "test"), tmp_path / "p", "peft", read=ReadOptions(base=known))
    assert modules(tmp_path / "p") == {module}
    assert set(open_adapter(tmp_path / "p", options=ReadOptions(base=known)).deltas) == {target}


@pytest.mark.parametrize(
    ("base", "module"),
    [
        ("gpt2", "h.0.attn.c_attn"),
        ("falcon-7b", "h.0.self_attention.dense"),
        (None, "h.0.attn.c_attn"),
        (None, "blocks.0.attn.Wqkv"),
        (None, "layers.0.to_q"),
    ],
)
def test_the_body_of_a_language_model_is(base: str | None, module: str, tmp_path: Path) -> None:
    known = None if base is None else inventory.load(base)
    out, into = (8, 8) if known is None else known.by_path[f"transformer.{module}"].canonical
    adapter = Adapter({Target(f"transformer.{module}"): lora(out, into)}, "test")
    write_adapter(adapter, tmp_path / "p", "peft", read=ReadOptions(base=known))
    assert modules(tmp_path / "p") == {f"transformer.{module}"}


@pytest.mark.parametrize("component", ["transformer", "unet"])
def test_where_no_base_is_known_the_folder_tells_the_component(component: str, tmp_path: Path) -> None:
    """It was refused: read back, the names were other ones."""
    stem = f"{component}.vace_blocks.0.attn1.to_q"
    save_file(
        {f"{stem}.lora_A.weight": np.ones((2, 24), np.float32), f"{stem}.lora_B.weight": np.ones((40, 2), np.float32)},
        tmp_path / "a.safetensors",
    )
    convert(tmp_path / "a.safetensors", tmp_path / "p", "peft")
    assert modules(tmp_path / "p" / component) == {"vace_blocks.0.attn1.to_q"}
    assert set(open_adapter(tmp_path / "p").deltas) == {Target(stem)}
    convert(tmp_path / "p", tmp_path / "q", "peft")
    convert(tmp_path / "p" / component, tmp_path / "r", "peft")
    assert modules(tmp_path / "q" / component) == modules(tmp_path / "r") == {"vace_blocks.0.attn1.to_q"}
