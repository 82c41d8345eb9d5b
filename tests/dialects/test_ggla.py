"""ggla against an independent statement of llama.cpp's old converter (ggerganov/llama.cpp convert-lora-to-ggml.py of 2023)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.containers.test_ggla import write

from upparam.adapter import Target
from upparam.bases import inventory
from upparam.cli import main
from upparam.dialects.base import ReadOptions
from upparam.errors import DeadAdapterError, MalformedError, RefusedError, UsageError
from upparam.operations.convert import convert, write_adapter
from upparam.operations.identify import identify
from upparam.operations.opening import open_adapter

META = {
    "q_proj": "attention.wq",
    "v_proj": "attention.wv",
    "o_proj": "attention.wo",
    "gate_proj": "feed_forward.w1",
    "down_proj": "feed_forward.w2",
}
OWN = {"q_proj": "attn_q", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate", "down_proj": "ffn_down"}


def converted(tensors: dict[str, Any], names: str) -> dict[str, Any]:
    """HF_SUBLAYER_TO_GGML of May 2023 and of September 2023; lora_A transposed as it is, lora_B as float32."""
    found = {}
    for name, array in tensors.items():
        *_, layer, _, word, factor = name.split(".")
        own = f"layers.{layer}.{META[word]}" if names == "meta" else f"blk.{layer}.{OWN[word]}"
        found[f"{own}.weight.lora{factor}"] = np.ascontiguousarray(array.T) if factor == "A" else array.astype(np.float32)
    return found


def trained(
    rank: int = 8, modules: tuple[str, ...] = ("self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.down_proj")
) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    found: dict[str, Any] = {}
    for layer in (0, 31):
        for module in modules:
            out, into = inventory.load("llama-7b").by_path[f"model.layers.{layer}.{module}"].canonical
            found[f"model.layers.{layer}.{module}.A"] = rng.standard_normal((rank, into)).astype(np.float16)
            found[f"model.layers.{layer}.{module}.B"] = rng.standard_normal((out, rank)).astype(np.float16)
    return found


def file(path: Path, tensors: dict[str, Any], rank: int = 8, alpha: int = 16) -> Path:
    path.write_bytes(write(tensors, rank, alpha))
    return path


@pytest.mark.parametrize("names", ["meta", "own"])
def test_what_was_trained_is_read(names: str, tmp_path: Path) -> None:
    tensors = trained()
    path = file(tmp_path / "ggml-adapter-model.bin", converted(tensors, names))
    adapter = open_adapter(path)
    assert adapter.dialect == "ggla" and adapter.layout == "reference" and not adapter.leftovers and len(adapter.deltas) == 8
    for target, delta in adapter.deltas.items():
        factors = delta.factors()
        assert delta.scale == 2.0 and np.array_equal(factors["down"].read(), tensors[f"{target}.A"])
        assert np.array_equal(factors["up"].read(), tensors[f"{target}.B"].astype(np.float32))
    assert "rows-misapplied" in {finding.code for finding in adapter.findings}
    assert adapter.base is not None and "llama-7b" in (adapter.base.name, *adapter.base.lookalikes)
    base = ReadOptions(base=inventory.load("llama-7b"))
    convert(path, tmp_path / "peft", "peft", read=base)
    again = open_adapter(tmp_path / "peft")
    assert (again.config["r"], again.config["lora_alpha"]) == (8, 16)
    for target, delta in adapter.deltas.items():
        assert {role: factor.raw() for role, factor in delta.factors().items()} == {
            role: factor.raw() for role, factor in again.deltas[target].factors().items()
        }
    # The successor takes it too, with the rows where llama.cpp wants them.
    assert main(["convert", str(path), "--to", "gguf-lora", "-o", str(tmp_path / "a.gguf"), "--base", "llama-7b"]) == 0
    up = open_adapter(tmp_path / "a.gguf", options=base).deltas[Target("model.layers.31.self_attn.q_proj")].factors()["up"]
    assert np.array_equal(up.read(), tensors["model.layers.31.self_attn.q_proj.B"].astype(np.float32))


def test_the_header_divides(tmp_path: Path) -> None:
    """The scale was lora_alpha / lora_r of the header, whatever the factors' rank."""
    path = file(tmp_path / "a.bin", converted(trained(rank=4), "own"), rank=8, alpha=4)
    adapter = open_adapter(path)
    assert {delta.scale for delta in adapter.deltas.values()} == {0.5}
    with pytest.raises(UsageError, match="contradicts"):
        open_adapter(path, options=ReadOptions(alpha=16.0))
    none = open_adapter(file(tmp_path / "none.bin", converted(trained(), "own"), rank=0))
    assert {delta.scale for delta in none.deltas.values()} == {None}


def test_identify_says_what_it_is(tmp_path: Path) -> None:
    identity = identify(file(tmp_path / "ggml-adapter-model.bin", converted(trained(), "meta")))
    (report,) = identity.adapters
    assert (report.dialect, report.kind, report.ranks, report.modules) == ("ggla", "adapter", {8: 8}, 8)
    assert identity.exit_code == 0


def test_bad_files_end_in_one_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = converted(trained(modules=("mlp.down_proj",)), "own")
    (a, first), (b, _), *_ = tensors.items()
    with pytest.raises(DeadAdapterError, match="both its loraA and its loraB"):
        open_adapter(file(tmp_path / "half.bin", {a: first}))
    with pytest.raises(MalformedError, match=r"down_proj.*do not fit"):
        open_adapter(file(tmp_path / "untransposed.bin", {a: np.ascontiguousarray(first.T), b: tensors[b]}))
    one = open_adapter(file(tmp_path / "stray.bin", tensors | {"blk.3.attn_qkv.weight.loraA": first, "blk.3.attn_v.weight.loraA": first}))
    assert set(one.leftovers) == {"blk.3.attn_qkv.weight.loraA", "blk.3.attn_v.weight.loraA"}
    assert "orphan" in {finding.code for finding in one.findings}
    assert main(["convert", str(tmp_path / "stray.bin"), "--to", "peft", "-o", str(tmp_path / "out")]) == 4
    out, err = capsys.readouterr()
    assert out == "" and "--drop leftovers" in err and err.count("\n") == 1
    with pytest.raises(RefusedError, match="does not write"):
        write_adapter(one, tmp_path / "x.bin", "ggla")
