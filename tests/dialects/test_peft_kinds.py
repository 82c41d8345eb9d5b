"""PEFT beyond plain LoRA: DoRA, LoHa, LoKr against the real library, read, healed, written, merged, and brought in from LyCORIS' sizes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from safetensors.torch import load_file, save_file  # noqa: E402
from tests.dialects.test_peft import ConvNet, bert, gpt2, inputs, llama, output, repeatable  # noqa: E402

from upparam.adapter import Adapter, Target  # noqa: E402
from upparam.algorithms.base import ScaleRule, Scaling  # noqa: E402
from upparam.algorithms.dora import DoRA  # noqa: E402
from upparam.algorithms.loha import LoHa  # noqa: E402
from upparam.algorithms.lokr import LoKr  # noqa: E402
from upparam.algorithms.lora import LoRA  # noqa: E402
from upparam.bases import inventory  # noqa: E402
from upparam.dialects import get  # noqa: E402
from upparam.dialects.base import ReadOptions  # noqa: E402
from upparam.dialects.peft_make import factorization  # noqa: E402
from upparam.errors import MalformedError, RefusedError  # noqa: E402
from upparam.operations.convert import convert, write_adapter  # noqa: E402
from upparam.operations.merge import merge  # noqa: E402
from upparam.operations.opening import open_adapter  # noqa: E402
from upparam.tensors import Tensor  # noqa: E402

CASES: dict[str, tuple[Callable[[], Any], Any]] = {
    "dora": (llama, peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=["q_proj", "down_proj"])),
    "dora conv1d": (gpt2, peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, fan_in_fan_out=True, target_modules=["c_attn", "c_fc"])),
    "dora conv": (ConvNet, peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=["first", "second", "head"])),
    "dora embedding": (bert, peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=["word_embeddings", "query"])),
    "loha": (llama, peft.LoHaConfig(r=4, alpha=6, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 2}, alpha_pattern={"q_proj": 3})),
    "loha conv": (ConvNet, peft.LoHaConfig(r=3, alpha=6, target_modules=["first", "second", "head"])),
    "loha cores": (ConvNet, peft.LoHaConfig(r=3, alpha=6, target_modules=["first", "head"], use_effective_conv2d=True)),
    "lokr": (llama, peft.LoKrConfig(r=2, alpha=6, target_modules=["q_proj", "down_proj"])),
    "lokr both": (llama, peft.LoKrConfig(r=2, alpha=6, target_modules=["q_proj", "down_proj"], decompose_both=True)),
    "lokr full": (llama, peft.LoKrConfig(r=64, alpha=6, target_modules=["q_proj"])),
    "lokr factor": (llama, peft.LoKrConfig(r=2, alpha=6, target_modules=["q_proj"], decompose_factor=4)),
    "lokr conv": (ConvNet, peft.LoKrConfig(r=1, alpha=6, target_modules=["first", "second", "head"])),
    "lokr cores": (ConvNet, peft.LoKrConfig(r=1, alpha=6, target_modules=["first", "head"], use_effective_conv2d=True)),
}  # fmt: skip
FLAT = ("loha conv", "lokr conv")
"""Cases whose kernels lie flattened in a factor."""


def trained(name: str, folder: Path) -> tuple[Callable[[], Any], Any]:
    """A seeded adapter in `folder`, how to make its base again, and the adapted model."""
    build, config = CASES[name]
    base = repeatable(build)

    wrapped = peft.get_peft_model(base(), config)
    torch.manual_seed(4)
    with torch.no_grad():
        for key, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter * 1.25 if "magnitude" in key else torch.randn(parameter.shape) * 0.3)
    wrapped.save_pretrained(folder)
    return base, wrapped


def loads(model: Any, folder: Path) -> Any:
    """The model with the adapter in `folder`; every factor is there and none is too many."""
    wrapped = peft.get_peft_model(model, peft.PeftConfig.from_pretrained(folder))
    result = peft.set_peft_model_state_dict(wrapped, peft.load_peft_weights(str(folder), device="cpu"))
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if any(word in key for word in ("lora_", "hada_", "lokr_"))]
    return wrapped


def same_tensors(theirs: Path, ours: Path) -> None:
    one, other = (load_file(where / "adapter_model.safetensors") for where in (theirs, ours))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", CASES)
def test_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    trained(name, tmp_path / "theirs")
    receipt = convert(tmp_path / "theirs", tmp_path / "ours", "peft")
    assert "bit-identical" in receipt.proofs[0]
    same_tensors(tmp_path / "theirs", tmp_path / "ours")
    assert json.loads((tmp_path / "ours/adapter_config.json").read_text()) == json.loads(
        (tmp_path / "theirs/adapter_config.json").read_text()
    )


@pytest.mark.parametrize("name", CASES)
def test_a_new_config_computes_the_same(name: str, tmp_path: Path) -> None:
    base, wrapped = trained(name, tmp_path / "theirs")
    adapter = open_adapter(tmp_path / "theirs")
    adapter.config.clear()
    adapter.config["fan_in_fan_out"] = name == "dora conv1d"
    adapter.save(tmp_path / "ours")
    same_tensors(tmp_path / "theirs", tmp_path / "ours")
    model = base()
    given = inputs(model)
    assert torch.equal(output(loads(model, tmp_path / "ours"), given), output(wrapped, given))


@pytest.mark.parametrize("name", [name for name in CASES if name not in FLAT])
def test_merges_as_the_library_does(name: str, tmp_path: Path) -> None:
    base, wrapped = trained(name, tmp_path / "theirs")
    model = base()
    if isinstance(model, ConvNet):
        (tmp_path / "base").mkdir()
        save_file(model.state_dict(), tmp_path / "base/model.safetensors")
    else:
        model.save_pretrained(tmp_path / "base")
    merge(tmp_path / "base", tmp_path / "theirs", tmp_path / "merged")
    merged = load_file(tmp_path / "merged/model.safetensors")
    for key, value in wrapped.merge_and_unload().state_dict().items():
        if key in merged:
            assert torch.allclose(merged[key], value, atol=2e-6), key


@pytest.mark.parametrize("name", ["dora", "loha", "lokr"])
def test_without_its_config_only_alpha_is_missing(name: str, tmp_path: Path) -> None:
    trained(name, tmp_path / "theirs")
    (tmp_path / "theirs/adapter_config.json").unlink()
    adapter = open_adapter(tmp_path / "theirs")
    assert all(delta.scale is None for delta in adapter.deltas.values())
    known = open_adapter(tmp_path / "theirs", options=ReadOptions(alpha=6.0))
    assert {delta.scale for delta in known.deltas.values()} == {6.0 / (delta.rank or 1) for delta in known.deltas.values()}


def test_full_kronecker_factors_need_the_rank_too(tmp_path: Path) -> None:
    trained("lokr full", tmp_path / "theirs")
    (tmp_path / "theirs/adapter_config.json").unlink()
    assert next(iter(open_adapter(tmp_path / "theirs", options=ReadOptions(alpha=6.0)).deltas.values())).scale is None
    known = open_adapter(tmp_path / "theirs", options=ReadOptions(alpha=6.0, rank=64))
    assert next(iter(known.deltas.values())).scale == 6 / 64


def random(*shape: int, seed: int = 0) -> Tensor:
    return Tensor.of(np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32))


def test_adapters_from_elsewhere_load(tmp_path: Path) -> None:
    """LyCORIS' sizes: factor 8, full and factored halves, alpha that is not r."""
    layer = "model.layers.{}.self_attn.q_proj"
    deltas = {
        Target(layer.format(0)): LoKr(w1=random(8, 8), w2=random(4, 4), scaling=Scaling(ScaleRule.EXPLICIT, multiplier=0.5)),
        Target(layer.format(1)): LoKr(w1=random(8, 8), w2=random(4, 4, seed=1), scaling=Scaling(alpha=3.0)),
    }
    write_adapter(Adapter(dict(deltas), "specimen", layout="peft"), tmp_path / "ours", "peft")
    wrapped = loads(llama(), tmp_path / "ours")
    for number, scale in enumerate((0.5, 1.0)):
        module = wrapped.base_model.model.model.layers[number].self_attn.q_proj
        expected = deltas[Target(layer.format(number))].load().rows(0, 32)
        np.testing.assert_allclose(module.get_delta_weight("default").detach().numpy(), expected, rtol=1e-5, atol=1e-6)
        assert np.isclose(module.scaling["default"], scale)


@pytest.mark.parametrize("factor", [-1, 1, 4, 6, 8, 16, 1000])
def test_factorization_is_the_librarys(factor: int) -> None:
    from peft.tuners.lokr.layer import factorization as theirs

    for dimension in [*range(1, 300), 768, 1280, 4096, 11008]:
        assert factorization(dimension, factor) == theirs(dimension, factor), dimension


@pytest.mark.parametrize(
    ("deltas", "reason"),
    [
        ([DoRA(random(4, 2), random(2, 6), random(1, 6), Scaling())], "norm for each column"),
        ([DoRA(random(4, 2), random(2, 6), random(4, 1), Scaling()), LoRA(random(4, 2), random(2, 6))], "one algorithm"),
        ([LoHa(random(4, 2), random(2, 6), random(4, 2), random(2, 6)), LoRA(random(4, 2), random(2, 6))], "one algorithm"),
        ([LoKr(w1=random(3, 2), w2=random(2, 2)), LoKr(w1=random(2, 2), w2=random(3, 2))], "other sizes"),
    ],
)
def test_what_the_library_cannot_hold_is_refused(deltas: list[Any], reason: str) -> None:
    adapter = Adapter({Target(f"a.{number}.b"): delta for number, delta in enumerate(deltas)}, "specimen", layout="peft")
    with pytest.raises(RefusedError, match=reason):
        get("peft").write(adapter, {})


@pytest.mark.parametrize("module", ["transformer.h.0.attn.c_attn", "transformer.wte"])
def test_lycoris_kinds_are_refused_where_the_library_has_no_layer_for_them(module: str) -> None:
    base = inventory.load("gpt2")
    out, into = base.by_path[module].canonical
    adapter = Adapter(
        {Target(module): LoHa(random(out, 1), random(1, into), random(out, 1), random(1, into))}, "specimen", layout="reference"
    )
    with pytest.raises(RefusedError, match="a LoHa of a"):
        get("peft").write(adapter, {"base": base})


def test_a_magnitude_of_another_size_is_malformed(tmp_path: Path) -> None:
    trained("dora", tmp_path / "theirs")
    path = tmp_path / "theirs/adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if "magnitude" in key)
    save_file(tensors | {key: torch.ones(3)}, path)
    with pytest.raises(MalformedError, match="magnitude"):
        open_adapter(tmp_path / "theirs")


def test_a_missing_half_is_left_over(tmp_path: Path) -> None:
    trained("loha", tmp_path / "theirs")
    path = tmp_path / "theirs/adapter_model.safetensors"
    tensors = load_file(path)
    del tensors[next(key for key in tensors if key.endswith("hada_w2_b"))]
    save_file(tensors, path)
    adapter = open_adapter(tmp_path / "theirs")
    assert len(adapter.leftovers) == 3
    assert "orphan" in {finding.code for finding in adapter.findings}
