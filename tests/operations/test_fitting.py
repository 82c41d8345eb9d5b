"""Convert with the arithmetic that was asked for: scales put into factors, other algorithms as plain LoRA; errors as told, the rest untouched."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.matrix.specimens import specimen

from upparam.adapter import Adapter, Target
from upparam.algorithms.base import Delta, Scaling
from upparam.algorithms.dora import DoRA
from upparam.algorithms.ia3 import IA3
from upparam.algorithms.lora import LoRA
from upparam.algorithms.lowrank import RankRule
from upparam.bases import inventory
from upparam.cli import main
from upparam.dialects.base import ReadOptions
from upparam.errors import MalformedError, RefusedError
from upparam.operations.convert import convert, write_adapter
from upparam.operations.fitting import Arithmetic
from upparam.operations.lowering import AUTO
from upparam.operations.opening import open_adapter
from upparam.tensors import Tensor, same_bits

from .merging import adapter, lora, save


def stated(base: str) -> ReadOptions:
    return ReadOptions(base=inventory.load(base))


def written(feature: str, base: str, dialect: str, out: Path, *, bake: bool = False, rule: RankRule | None = None) -> tuple[Any, Adapter]:
    receipt = write_adapter(specimen(feature, base), out, dialect, read=stated(base), arithmetic=Arithmetic(bake, rule))
    return receipt, open_adapter(out, dialect=dialect, options=stated(base))


def dense(delta: Delta) -> NDArray[np.float64]:
    """scale * dW, from the definition of a LoRA."""
    assert isinstance(delta, LoRA)
    up, down = delta.matrices()
    return delta.known_scale() * (up @ down)


def gap(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(one))


def changes(receipt: Any) -> dict[str, dict[str, Any]]:
    return {fact["target"]: fact for fact in receipt.modules if "change" in fact}


def test_a_scale_is_baked_only_when_asked_and_only_where_it_has_no_place(tmp_path: Path) -> None:
    before = specimen("mixed ranks", "sd1.5")
    with pytest.raises(RefusedError, match="--bake-scale"):
        written("mixed ranks", "sd1.5", "diffusers-old", tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    receipt, after = written("mixed ranks", "sd1.5", "diffusers-old", tmp_path / "out", bake=True)
    done = changes(receipt)
    for target, delta in before.deltas.items():
        new = after.deltas[target]
        if delta.scale == 1.0:
            assert same_bits(delta.up, new.up) and same_bits(delta.down, new.down)
            assert str(target) not in done
            continue
        assert new.scale == 1.0
        role = done[str(target)]["factor"]  # the other one keeps its bits
        assert same_bits(delta.factors()["down" if role == "up" else "up"], new.factors()["down" if role == "up" else "up"])
        error = done[str(target)]["error"]
        assert gap(dense(delta), dense(new)) == pytest.approx(error, rel=1e-6, abs=1e-15)
        power_of_two = np.log2(delta.scale).is_integer()
        # A power of two only costs what falls out of float16 at its small end.
        assert error < 1e-6 if power_of_two else 1e-5 < error < 5e-4
    # Where the scale has a place nothing is touched, whatever is allowed.
    receipt, _ = written("mixed ranks", "sd1.5", "diffusers", tmp_path / "kept", bake=True)
    assert not changes(receipt)
    assert "scales_baked_in" not in receipt.counts


@pytest.mark.parametrize("dialect", ["gguf-lora", "loralib", "peft"])
def test_one_scale_for_all_is_the_most_frequent(dialect: str, tmp_path: Path) -> None:
    before = specimen("mixed ranks", "llama-3-8b")
    receipt, after = written("mixed ranks", "llama-3-8b", dialect, tmp_path / ("out.gguf" if dialect == "gguf-lora" else "out"), bake=True)
    assert bool(changes(receipt)) == (dialect == "gguf-lora")
    for target, delta in before.deltas.items():
        assert gap(dense(delta), dense(after.deltas[target])) < 5e-4


def test_parts_of_different_scales_are_joined_by_baking(tmp_path: Path) -> None:
    before = specimen("mixed ranks", "flux.1-dev")
    with pytest.raises(RefusedError, match="--bake-scale"):
        written("mixed ranks", "flux.1-dev", "kohya", tmp_path / "refused.safetensors")
    receipt, after = written("mixed ranks", "flux.1-dev", "kohya", tmp_path / "out.safetensors", bake=True)
    done = changes(receipt)
    assert done
    for target, delta in before.deltas.items():
        new = after.deltas[target]
        assert new.rank == delta.rank
        assert gap(dense(delta), dense(new)) == pytest.approx(done.get(str(target), {"error": 0.0})["error"], rel=1e-6, abs=1e-12)


def test_small_factors_do_not_fall_out_of_float16(tmp_path: Path) -> None:
    """A zero-initialised up is small: down takes the scale where up would lose its last bits."""
    up, down = np.full((64, 4), 3e-7, np.float16), np.full((4, 64), 0.5, np.float16)
    path = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    one = adapter({path: LoRA(Tensor.of(up), Tensor.of(down), Scaling(alpha=1.0))})
    receipt = write_adapter(one, tmp_path / "out", "diffusers-old", arithmetic=Arithmetic(bake_scale=True))
    (fact,) = changes(receipt).values()
    assert (fact["factor"], fact["error"]) == ("down", 0.0)


@pytest.mark.parametrize("feature", ["LoHa", "LoKr"])
def test_other_algorithms_become_the_best_lora_of_that_rank(feature: str, tmp_path: Path) -> None:
    before = specimen(feature, "sd1.5")
    with pytest.raises(RefusedError, match="--lowrank"):
        written(feature, "sd1.5", "diffusers", tmp_path / "refused")
    receipt, after = written(feature, "sd1.5", "diffusers", tmp_path / "out", rule=RankRule(6))
    done = changes(receipt)
    lost = whole = 0.0
    for target, delta in before.deltas.items():
        matrix = delta.load().rows(0, delta.shape[0])
        found = gap(matrix, dense(after.deltas[target]))
        sigma = np.linalg.svd(matrix, compute_uv=False)
        optimum = float(np.linalg.norm(sigma[6:]) / np.linalg.norm(sigma))
        assert after.deltas[target].rank == done[str(target)]["rank"] == 6
        assert found == pytest.approx(done[str(target)]["error"], rel=1e-6)
        assert optimum <= found <= optimum * 1.006 + 1e-4
        lost, whole = lost + (found * np.linalg.norm(matrix)) ** 2, whole + np.linalg.norm(matrix) ** 2
    assert float(receipt.counts["error_in_total"]) == pytest.approx(np.sqrt(lost / whole), rel=1e-2)


def test_auto_takes_the_rank_that_one_percent_needs(tmp_path: Path) -> None:
    receipt, _ = written("LoHa", "sd1.5", "diffusers", tmp_path / "out", rule=AUTO)
    assert {fact["rank"] for fact in changes(receipt).values()} == {16}  # rank 4 times rank 4
    assert all(fact["error"] < 1e-3 for fact in changes(receipt).values())


def test_a_tucker_core_is_contracted_and_only_rounded(tmp_path: Path) -> None:
    before = specimen("conv with mid", "sd1.5")
    receipt, after = written("conv with mid", "sd1.5", "peft", tmp_path / "out", rule=AUTO)
    ((target, delta),) = before.deltas.items()
    new = after.deltas[target]
    assert new.mid is None and new.rank == delta.rank and new.scale == delta.scale
    assert same_bits(new.up, delta.up.reshape(new.up.shape))
    assert 0 < changes(receipt)[str(target)]["error"] == pytest.approx(gap(dense(delta), dense(new)), rel=1e-6)
    assert changes(receipt)[str(target)]["error"] < 5e-4
    receipt, after = written("conv with mid", "sd1.5", "peft", tmp_path / "cut", rule=RankRule(2))
    assert after.deltas[target].rank == 2
    assert changes(receipt)[str(target)]["error"] == pytest.approx(gap(dense(delta), dense(after.deltas[target])), rel=1e-6)


MODULE = "model.layers.0.self_attn.q_proj"


def dependent(kind: str, random: np.random.Generator) -> tuple[Delta, NDArray[np.float64], NDArray[np.float64]]:
    """(a delta whose dW depends on the weight, the weight, dW by the definition)."""
    weight = random.standard_normal((48, 32)).astype(np.float32)
    up, down = random.standard_normal((48, 4)).astype(np.float32), random.standard_normal((4, 32)).astype(np.float32)
    wide = weight.astype(np.float64)
    if kind == "dora":
        magnitude = (np.linalg.norm(wide, axis=1) * random.uniform(0.9, 1.1, 48)).astype(np.float32)
        whole = wide + 0.5 * (up.astype(np.float64) @ down.astype(np.float64))
        changed = magnitude[:, None] * whole / np.linalg.norm(whole, axis=1, keepdims=True)
        delta: Delta = DoRA(Tensor.of(up), Tensor.of(down), Tensor.of(magnitude), Scaling(alpha=2.0))
    else:
        gain = random.uniform(0.5, 1.5, 48).astype(np.float32)
        changed = gain[:, None].astype(np.float64) * wide
        delta = IA3(Tensor.of(gain))
    return delta, weight, changed - wide


@pytest.mark.parametrize("kind", ["dora", "ia3"])
def test_what_depends_on_the_weight_needs_it(kind: str, tmp_path: Path) -> None:
    delta, weight, change = dependent(kind, np.random.default_rng(5))
    beside = lora(np.ones((48, 2), np.float32), np.ones((2, 32), np.float32), 1.0)
    one = adapter({MODULE: delta, "model.layers.1.self_attn.q_proj": beside})
    base = save(tmp_path / "base/model.safetensors", {f"{MODULE}.weight": weight, "model.layers.1.self_attn.q_proj.weight": weight})
    with pytest.raises(RefusedError, match="--base"):
        write_adapter(one, tmp_path / "out", "loralib", arithmetic=Arithmetic(lowrank=RankRule(8)))
    how = Arithmetic(lowrank=RankRule(8), weights=base.parent)
    write_adapter(one, tmp_path / "out", "loralib", arithmetic=how)
    after = open_adapter(tmp_path / "out")
    new = after.deltas[Target(MODULE)]
    assert new.rank == 8
    sigma = np.linalg.svd(change, compute_uv=False)
    optimum = float(np.linalg.norm(sigma[8:]) / np.linalg.norm(sigma))
    assert optimum <= gap(change, dense(new)) <= optimum * 1.006 + 1e-6
    assert how.lowered[0].error == pytest.approx(gap(change, dense(new)), rel=1e-4)
    other = after.deltas[Target("model.layers.1.self_attn.q_proj")]
    assert same_bits(other.up, beside.up) and same_bits(other.down, beside.down)


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "mixed"
    write_adapter(specimen("mixed ranks", "sd1.5"), source, "peft", read=stated("sd1.5"))
    asked = ["convert", str(source), "--to", "diffusers-old", "-o", str(tmp_path / "out")]
    assert main(asked) == 4
    assert "--bake-scale" in capsys.readouterr().err
    assert main([*asked, "--json"]) == 4
    refusal = json.loads(capsys.readouterr().out)
    assert len(refusal["problems"]) == 4 and {problem["cure"] for problem in refusal["problems"]} == {"--bake-scale"}
    assert main([*asked, "--bake-scale", "--json"]) == 0
    receipt = json.loads(capsys.readouterr().out)
    assert receipt["counts"]["scales_baked_in"] == 4
    assert sum(fact.get("proof") == "bit-identical" for fact in receipt["modules"]) == 5
    assert sum(fact.get("change") == "bake-scale" for fact in receipt["modules"]) == 4
    hada = tmp_path / "hada"
    write_adapter(specimen("LoHa", "sd1.5"), hada, "peft", read=stated("sd1.5"))
    asked = ["convert", str(hada), "--to", "diffusers", "-o", str(tmp_path / "low")]
    assert main(asked) == 4
    assert "--lowrank" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*asked, "--lowrank", "0"])
    assert main([*asked, "--lowrank", "auto"]) == 0
    out = capsys.readouterr().out
    assert "5 approximated by plain LoRA" in out and "error in total" in out


def test_allowing_arithmetic_changes_nothing_that_fits(tmp_path: Path) -> None:
    for feature, base in (("plain", "sd1.5"), ("LoHa", "llama-3-8b"), ("DoRA", "llama-3-8b")):
        write_adapter(specimen(feature, base), tmp_path / feature, "peft", read=stated(base))
        how = Arithmetic(True, AUTO)
        receipt = convert(tmp_path / feature, tmp_path / f"{feature} again", "peft", arithmetic=how)
        assert not changes(receipt)
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            assert (tmp_path / feature / name).read_bytes() == (tmp_path / f"{feature} again" / name).read_bytes()


def test_which_file_and_tensor_holds_what_is_not_finite_is_told(tmp_path: Path) -> None:
    one = specimen("LoHa", "sd1.5")
    target, delta = next(iter(one.deltas.items()))
    nan = delta.on_factor(lambda factor: Tensor.of(np.full(factor.shape, np.nan, np.float32)))
    write_adapter(replace(one, deltas={**one.deltas, target: nan}), tmp_path / "hada", "peft", read=stated("sd1.5"))
    with pytest.raises(MalformedError, match="not finite") as caught:
        convert(tmp_path / "hada", tmp_path / "low", "diffusers", arithmetic=Arithmetic(lowrank=RankRule(2)))
    assert (Path(str(caught.value.file)).name, caught.value.tensor) == ("adapter_model.safetensors", str(target))
    assert not (tmp_path / "low").exists()
