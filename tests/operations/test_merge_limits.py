"""What a merge says of numbers no dtype holds: overflow, scales that are none, holes in the base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.operations.merging import adapter, load, lora, save

from upparam.adapter import Target
from upparam.algorithms.dora import DoRA
from upparam.algorithms.ia3 import IA3
from upparam.algorithms.loha import LoHa
from upparam.errors import MalformedError, UsageError
from upparam.operations.merge import merge
from upparam.operations.merge.blocks import parse
from upparam.tensors import Tensor


@pytest.mark.parametrize(
    ("wide", "dtype", "became"), [("float32", "float16", "infinite"), ("float16", "float8_e4m3fn", "the largest it has")]
)
def test_what_another_dtype_cannot_hold_is_a_finding(tmp_path: Path, wide: str, dtype: str, became: str) -> None:
    """Also where no adapter reaches, and where it is the base's own value that is too large."""
    rng = np.random.default_rng(5)
    weight = rng.standard_normal((6, 8)).astype(wide)
    weight[1, 2] = 60000 if wide == "float16" else 1e6
    norm = np.array([1, 2000 if wide == "float16" else -1e6, np.nan], wide)
    base = save(tmp_path / "base.safetensors", {"m.weight": weight, "norm": norm, "small": norm[:1]})
    given = adapter({"m": lora(rng.standard_normal((6, 2)) * 0.1, rng.standard_normal((2, 8)) * 0.1)})
    found = {
        item.subject: item for item in merge(base, given, tmp_path / "out.safetensors", dtype=dtype).findings if item.code == "overflow"
    }
    assert set(found) == {"m.weight", "norm"}
    assert found["m.weight"].message == f"1 element too large for {dtype} and became {became}"
    assert found["norm"].message == f"1 element of 1 tensor only converted, too large for {dtype} and became {became}"
    assert not [item for item in merge(base, given, tmp_path / "same.safetensors").findings if item.code == "overflow"]


@pytest.mark.parametrize("kind", ["loha", "ia3"])
def test_holes_under_deltas_that_are_not_low_rank(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((6, 8)).astype(np.float32)
    weight[2, 3] = np.nan
    weight[4, 0] = np.inf
    base = save(tmp_path / "base.safetensors", {"m.weight": weight})

    def draw(*shape: int) -> Tensor:
        return Tensor.of(rng.standard_normal(shape).astype(np.float32))

    delta = LoHa(draw(6, 2), draw(2, 8), draw(6, 2), draw(2, 8)) if kind == "loha" else IA3(draw(6, 1))
    for scale in (1.0, 0.5):
        merge(base, (adapter({"m": delta}), scale), tmp_path / f"{scale}.safetensors")
        out = load(tmp_path / f"{scale}.safetensors")["m.weight"]
        assert np.isnan(out[2, 3]) and np.isinf(out[4, 0]) and np.isfinite(out).sum() == out.size - 2


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("scale", [1e39, -1e200])
def test_a_scale_beyond_float32_is_a_finding_and_nothing_else(tmp_path: Path, scale: float) -> None:
    base = save(tmp_path / "base.safetensors", {"m.weight": np.ones((6, 8), np.float16)})
    receipt = merge(base, (adapter({"m": lora(np.ones((6, 2)), np.ones((2, 8)))}), scale), tmp_path / "out.safetensors")
    assert [item.code for item in receipt.findings] == ["overflow"]
    assert (load(tmp_path / "out.safetensors")["m.weight"] == np.copysign(np.inf, scale)).all()


def test_scales_that_are_no_numbers_are_not_the_factors_fault(tmp_path: Path) -> None:
    base = save(tmp_path / "base.safetensors", {"m.weight": np.ones((6, 8), np.float16)})
    given = adapter({"m": lora(np.full((6, 2), 1e10), np.ones((2, 8)))})
    for scale in (float("nan"), float("inf")):
        with pytest.raises(UsageError, match="the scale is no finite number"):
            merge(base, (given, scale), tmp_path / "out.safetensors")
    with pytest.raises(MalformedError, match="the factors times the scale are no finite numbers"):
        merge(base, (given, 1e300), tmp_path / "out.safetensors")
    with pytest.raises(UsageError, match="not a block weight"):
        parse(["*=nan"])


def test_globs_that_match_nothing_and_orders_that_matter_are_said(tmp_path: Path) -> None:
    base = save(tmp_path / "base.safetensors", {"m.weight": np.ones((6, 8), np.float32), "n.weight": np.ones((6, 8), np.float32)})
    plain = adapter({"m": lora(np.ones((6, 2)), np.ones((2, 8))), "n": lora(np.ones((6, 2)), np.ones((2, 8)))})
    scaling = adapter({"m": IA3(Tensor.of(np.full((6, 1), 3.0, np.float32)))})
    said = {item.code: item for item in merge(base, plain, tmp_path / "a.safetensors", only=["n", "m"], skip=["o", "n"]).findings}
    assert said["idle-glob"].subject == "o" and len(said) == 1
    for number, order in enumerate(([plain, scaling], [scaling, plain])):
        out = tmp_path / f"{number}.safetensors"
        said = {item.code: item for item in merge(base, order, out).findings}
        assert said["order-matters"].subject == "m.weight" and len(said) == 1
        assert (load(out)["m.weight"] == (9 if number == 0 else 5)).all()


def test_a_dora_after_another_adapter_is_said_to_differ_from_peft(tmp_path: Path) -> None:
    """PEFT's norm is that of W + dW of the DoRA alone: equal to ours when it comes first, and only then."""
    rng = np.random.default_rng(0)
    weight, up, down = (rng.standard_normal(shape) for shape in ((6, 8), (6, 2), (2, 8)))
    base = save(tmp_path / "base.safetensors", {"m.weight": weight, "n.weight": weight})
    plain = adapter({"m": lora(up, down)})
    dora = adapter({"m": DoRA(Tensor.of(up), Tensor.of(down), Tensor.of(np.ones(6)))})
    elsewhere = adapter({"n": DoRA(Tensor.of(up), Tensor.of(down), Tensor.of(np.ones(6)))})
    gain = 1 / np.linalg.norm(weight + up @ down, axis=1, keepdims=True)
    expected = {"first": gain * (weight + up @ down) + up @ down, "later": gain * (weight + 2 * up @ down)}
    for name, order in (("first", [dora, plain]), ("later", [plain, dora])):
        codes = [item.code for item in merge(base, order, tmp_path / f"{name}.safetensors").findings]
        assert codes == ["order-matters", *(["norm-of-changed"] if name == "later" else [])]
        peft = np.allclose(load(tmp_path / f"{name}.safetensors")["m.weight"], expected[name], rtol=0, atol=1e-12)
        assert peft is (name == "first")
    assert not merge(base, [plain, elsewhere], tmp_path / "apart.safetensors").findings


def test_where_the_order_does_not_matter_nothing_is_said_of_it(tmp_path: Path) -> None:
    base = save(tmp_path / "base.safetensors", {"m.weight": np.ones((6, 8), np.float32)})
    outputs = adapter({"m": IA3(Tensor.of(np.full((6, 1), 3.0, np.float32)))})
    inputs = adapter({"m": IA3(Tensor.of(np.arange(8, dtype=np.float32)), on_input=True)})
    assert not merge(base, [outputs, inputs], tmp_path / "a.safetensors").findings
    assert not merge(base, [inputs, outputs], tmp_path / "b.safetensors").findings
    assert np.array_equal(load(tmp_path / "a.safetensors")["m.weight"], load(tmp_path / "b.safetensors")["m.weight"])
    rows = [
        adapter({Target("m", span): DoRA(Tensor.of(np.ones((3, 1))), Tensor.of(np.ones((1, 8))), Tensor.of(np.ones(3)))})
        for span in ((0, 3), (3, 6))
    ]
    assert not merge(base, rows, tmp_path / "c.safetensors").findings


def peft(folder: Path, magnitude: Any = None, hole: bool = False) -> Path:
    rng = np.random.default_rng(5)
    up, down = rng.standard_normal((6, 2)).astype(np.float32), rng.standard_normal((2, 8)).astype(np.float32)
    if hole:
        up[1, 1] = np.inf
    factors = {"lora_A.weight": down, "lora_B.weight": up} | ({} if magnitude is None else {"lora_magnitude_vector": magnitude})
    save(folder / "adapter_model.safetensors", {f"base_model.model.m.{name}": array for name, array in factors.items()})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["m"], "use_dora": magnitude is not None}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_of_several_adapters_the_one_that_is_not_finite_is_named(tmp_path: Path) -> None:
    base = save(tmp_path / "b.safetensors", {"m.weight": np.ones((6, 8), np.float32)})
    sound, broken = peft(tmp_path / "sound"), peft(tmp_path / "broken", hole=True)
    for beside in ((), (peft(tmp_path / "dora", np.ones(6, np.float32)),)):  # sums of factors, and one change after the other
        with pytest.raises(MalformedError, match=r"broken.adapter_model\.safetensors: tensor 'm': .*NaN or Inf"):
            merge(base, [sound, broken, *beside], tmp_path / "o.safetensors")


def test_a_hole_of_the_base_that_a_norm_spreads_is_not_the_adapters_fault(tmp_path: Path) -> None:
    weight = np.ones((6, 8), np.float32)
    weight[2, 3] = np.nan
    base = save(tmp_path / "b.safetensors", {"m.weight": weight})
    with pytest.raises(MalformedError, match=r"the base holds some in this weight.*--skip"):
        merge(base, peft(tmp_path / "dora", np.ones(6, np.float32)), tmp_path / "o.safetensors")
