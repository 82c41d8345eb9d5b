"""Where there is one of a thing, its word is singular, and so is what is said of it; several are them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from upparam.adapter import Adapter, Target
from upparam.algorithms.base import BAKED
from upparam.algorithms.lora import LoRA
from upparam.bases import inventory
from upparam.dialects import get
from upparam.dialects.base import ReadOptions
from upparam.dialects.refusing import refuse
from upparam.errors import MismatchError, RefusedError
from upparam.operations.combine import combine
from upparam.operations.compare import compare
from upparam.operations.convert import convert
from upparam.operations.extract import extract
from upparam.operations.merge import merge
from upparam.operations.verify import verify
from upparam.report.comparison import comparison_text
from upparam.tensors import Tensor


def test_comparisons_of_one_module_or_weight(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, module in (("a", "lora_unet_x"), ("b", "lora_unet_y")):
        pair = {f"{module}.lora_down.weight": rng.standard_normal((2, 8)), f"{module}.lora_up.weight": rng.standard_normal((8, 2))}
        save_file({key: value.astype(np.float32) for key, value in pair.items()}, tmp_path / f"{name}.safetensors")
        weights = {"layers.0.q_proj.weight": rng.standard_normal((64, 64)), "layers.0.k_proj.weight": np.ones((64, 64))}
        save_file({key: value.astype(np.float32) for key, value in weights.items()}, tmp_path / f"model_{name}.safetensors")
    one, other = (tmp_path / f"{name}.safetensors" for name in "ab")
    assert "its one module" in compare(one, one).summary
    assert "1 module only in the first, 1 module only in the second" in compare(one, other).summary
    models = comparison_text(compare(tmp_path / "model_a.safetensors", tmp_path / "model_b.safetensors"))
    assert "1 weight bit-equal · 1 weight different" in models


def ones(*shape: int) -> np.ndarray[Any, Any]:
    return np.ones(shape, np.float32)


def peft(folder: Path, *, saved: int = 0, norms: int = 2, blank: int = 0, spoilt: int = 0, modules: int = 2) -> Path:
    """A LoRA of square modules; of them `blank` change nothing, `spoilt` elements are NaN, and `saved` norms lie beside."""
    folder.mkdir()
    tensors = {}
    for number in range(modules):
        up, down = ones(8, 2), ones(2, 8)
        up[:] = 0 if number < blank else 1
        down[0, : spoilt if number == 0 else 0] = np.nan
        tensors |= {f"base_model.model.layers.{number}.q_proj.lora_{word}.weight": value for word, value in (("A", down), ("B", up))}
    tensors |= {f"base_model.model.layers.{number}.norm.weight": norms * ones(8) for number in range(saved)}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], "modules_to_save": ["norm"] if saved else None}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def said(path: Path, code: str) -> str:
    return next(finding.message for finding in verify(path).findings if finding.code == code)


def test_what_verify_says_of_one(tmp_path: Path) -> None:
    assert said(peft(tmp_path / "a", blank=1), "partly-untrained") == "1 of 2 targets has an all-zero factor and changes nothing"
    assert said(peft(tmp_path / "b", blank=2, modules=3), "partly-untrained").startswith("2 of 3 targets have")
    assert said(peft(tmp_path / "c", spoilt=1), "not-finite") == "1 element of 1 of 2 targets is NaN or Inf"
    assert said(peft(tmp_path / "d", spoilt=2, modules=1), "not-finite") == "2 elements of 1 target are NaN or Inf"
    for number, words in ((1, "1 of 2 targets stores no alpha"), (2, "2 of 2 targets store no alpha")):
        stem, path = "lora_unet_a", tmp_path / f"{number}.safetensors"
        pairs = {f"{stem}{one}.lora_{way}.weight": value for one in "12" for way, value in (("up", ones(8, 2)), ("down", ones(2, 8)))}
        save_file(pairs | {f"{stem}{one}.alpha": np.array(2.0, np.float32) for one in "12"[number:]}, path)
        assert said(path, "alpha-missing").startswith(words)


@pytest.mark.parametrize(
    ("saved", "words"),
    [(1, ("1 saved tensor", "replaces", "differs", "is")), (2, ("2 saved tensors", "replace", "differ", "are"))],
)
def test_saved_tensors(saved: int, words: tuple[str, ...], tmp_path: Path) -> None:
    these, replaces, differs, are = words
    adapter, plain = peft(tmp_path / "adapter", saved=saved), peft(tmp_path / "plain")
    (tmp_path / "base").mkdir()
    weights = {f"layers.{number}.{name}.weight": value for number in (0, 1) for name, value in (("q_proj", ones(8, 8)), ("norm", ones(8)))}
    save_file(weights, tmp_path / "base/model.safetensors")
    (tmp_path / "base/config.json").write_text('{"model_type": "llama"}')
    for receipt in (
        merge(tmp_path / "base", (adapter, 0.5), tmp_path / "merged"), combine([(adapter, 0.5), (plain, 1.0)], tmp_path / "sum"),
    ):  # fmt: skip
        assert [finding.message[:40] for finding in receipt.findings if finding.code == "whole-replacement"] == [
            f"{these} {replaces} the base's whole, whatever"[:40]
        ]
    left = combine([(adapter, 0.0), (plain, 1.0)], tmp_path / "less").findings
    assert f"{these} of an adapter with multiplier 0 {are} left out" in [finding.message for finding in left]
    other = peft(tmp_path / "other", saved=saved, norms=3)
    assert f"{these} {differs}" in compare(adapter, other).summary and f"{these} only in one" in compare(adapter, plain).summary


@pytest.mark.parametrize(("count", "things", "them"), [(1, "1 thing", "it"), (3, "3 things", "them")])
def test_what_a_dialect_cannot_hold(count: int, things: str, them: str) -> None:
    with pytest.raises(RefusedError, match=rf"{things} that x cannot hold .*give {them} up with --drop saved-module"):
        refuse("x", [f"saved-module head.{number}" for number in range(count)])


def test_targets_of_another_base(tmp_path: Path) -> None:
    known = ReadOptions(base=inventory.load("sd1.5"))
    with pytest.raises(MismatchError, match=r": 1 target does not fit the base named"):
        convert(peft(tmp_path / "one", modules=1), tmp_path / "x", "kohya", read=known)
    with pytest.raises(MismatchError, match=r": 2 of 2 targets do not fit the base named"):
        convert(peft(tmp_path / "two"), tmp_path / "x", "kohya", read=known)


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("unet.mid_block.attentions.0.proj_in", "1 module is outside every walk"), ("vae.x", "1 module belongs to a component"),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q", r"\d+ modules of the walk are not changed"),
    ],
)  # fmt: skip
def test_what_has_no_number(module: str, said: str) -> None:
    adapter = Adapter({Target(module): LoRA(Tensor.of(ones(8, 2)), Tensor.of(ones(2, 8)), BAKED)}, "test")
    with pytest.raises(RefusedError, match=f"{said}"):
        get("cloneofsimo").write(adapter, {"base": inventory.load("sd2")})


def test_differences_of_models(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    first = {f"layers.{number}.q_proj.weight": rng.standard_normal((256, 256)).astype(np.float32) for number in (0, 1)}
    second = {**first, "layers.0.q_proj.weight": rng.standard_normal((256, 256)).astype(np.float32)}
    for name, weights in (("a", first), ("b", second)):
        save_file(weights, tmp_path / f"{name}.safetensors")
    models = tmp_path / "b.safetensors", tmp_path / "a.safetensors"
    with pytest.raises(RefusedError, match=r": 1 difference has no low rank"):
        extract(*models, tmp_path / "x", "triad", auto=True)
    with pytest.raises(RefusedError, match="found 2 weights are equal"):
        extract(models[1], models[1], tmp_path / "x", "triad", auto=True)
