"""What options make of an adapter that a dialect has no place for as it is: one algorithm, one rank, one scale for all, rows in another order."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from tests.matrix import specimens
from tests.matrix.specimens import specimen, values

from upparam.adapter import Adapter, Target
from upparam.algorithms.base import Delta, Scaling
from upparam.algorithms.boft import ButterflyOFT
from upparam.algorithms.full import Full
from upparam.algorithms.lokr import LoKr
from upparam.algorithms.lora import LoRA
from upparam.algorithms.lowrank import RankRule
from upparam.algorithms.oft import DiagOFT
from upparam.algorithms.slicing import reorder
from upparam.bases import inventory
from upparam.bases.layouts import layout
from upparam.dialects.base import ReadOptions
from upparam.errors import RefusedError
from upparam.operations.convert import write_adapter
from upparam.operations.fitting import Arithmetic
from upparam.operations.lowering import AUTO
from upparam.operations.opening import open_adapter
from upparam.tensors import same_bits


def written(adapter: Adapter, base: str, dialect: str, out: Path, how: Arithmetic) -> tuple[Any, Adapter]:
    read = ReadOptions(base=inventory.load(base))
    receipt = write_adapter(adapter, out, dialect, read=read, arithmetic=how)
    return receipt, open_adapter(out, dialect=dialect, options=read)


def dense(delta: Delta) -> Any:
    return delta.load().rows(0, delta.shape[0])


def refusal(adapter: Adapter, base: str, dialect: str, out: Path) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        written(adapter, base, dialect, out, Arithmetic())
    return caught.value


@pytest.mark.parametrize("base", ["llama-3-8b", "sd1.5"])
def test_several_algorithms_become_one_peft_lora(base: str, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftConfig

    halves = [list(specimen(feature, base).deltas.items()) for feature in ("plain", "LoHa", "LoKr")]
    mixed = specimens.adapter(base, dict(halves[0][:1] + halves[1][1:2] + halves[2][2:3]))
    told = refusal(mixed, base, "peft", tmp_path / "refused")
    assert "1 LoRA, 1 LoHa, 1 LoKr" in str(told.found) and "--lowrank" in str(told.remedy)
    receipt, after = written(mixed, base, "peft", tmp_path / "out", Arithmetic(lowrank=AUTO, threads=1))
    done = {fact["target"]: fact for fact in receipt.modules if "change" in fact}
    assert after.algorithms() == {"lora": 3} and set(done) == {str(target) for target, _ in (*halves[1][1:2], *halves[2][2:3])}
    for target, delta in mixed.deltas.items():
        change = dense(delta)
        gap = float(np.linalg.norm(change - dense(after.deltas[target])) / np.linalg.norm(change))
        assert gap <= 0.011 if str(target) in done else gap == 0.0
        assert gap == pytest.approx(done.get(str(target), {}).get("error", 0.0), rel=1e-6)
    (folder,) = {path.parent for path in (tmp_path / "out").rglob("adapter_config.json")}
    config = PeftConfig.from_pretrained(str(folder))
    assert isinstance(config, LoraConfig)


def test_what_stands_in_the_way_of_all_modules_together_is_cured_too(tmp_path: Path) -> None:
    """Factors of other sizes than any setting of PEFT's would make, which no single module is to blame for."""
    one, other = "model.layers.0.self_attn.q_proj", "model.layers.7.self_attn.o_proj"
    w2_a, w2_b = values((512, 4), "a"), values((4, 512), "b")
    deltas = {
        Target(one): LoKr(w1=values((8, 8), "w1"), w2_a=w2_a, w2_b=w2_b, scaling=Scaling(alpha=4.0)),
        Target(other): LoKr(w1=values((16, 8), "w1"), w2_a=values((256, 4), "c"), w2_b=w2_b, scaling=Scaling(alpha=4.0)),
    }
    adapter = specimens.adapter("llama-3-8b", dict(deltas))
    told = refusal(adapter, "llama-3-8b", "peft", tmp_path / "refused")
    assert "other sizes" in str(told.found) and "--lowrank" in str(told.remedy)
    _, after = written(adapter, "llama-3-8b", "peft", tmp_path / "out", Arithmetic(lowrank=RankRule(4), threads=1))
    assert {type(delta) for delta in after.deltas.values()} == {LoRA}


def test_mixed_ranks_are_filled_up_with_zeros_for_mlx(tmp_path: Path) -> None:
    base = "llama-3-8b"
    paths = [target.module for target in specimens.targets(base)]
    adapter = specimens.adapter(
        base, {Target(path): specimens.lora(base, path, 2 + at, Scaling(alpha=2.0 * (2 + at))) for at, path in enumerate(paths)}
    )
    assert "filled up" not in str(told := refusal(adapter, base, "mlx", tmp_path / "no").remedy) and "--lowrank auto" in told
    receipt, after = written(adapter, base, "mlx", tmp_path / "out", Arithmetic(lowrank=AUTO))
    assert receipt.counts["ranks_filled_up_with_zeros"] == "3 (to 5; dW stays exactly)"
    assert "approximated_by_plain_LoRA" not in receipt.counts
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["lora_parameters"]["rank"] == 5
    stored = load_file(tmp_path / "out" / "adapters.safetensors")
    for target, delta in adapter.deltas.items():
        new = after.deltas[target]
        assert isinstance(delta, LoRA) and isinstance(new, LoRA) and new.rank == 5 and new.scale == delta.scale == 2.0
        assert (dense(new) == dense(delta)).all()
        # mlx-lm computes x @ lora_a @ lora_b: the stored numbers are the old ones and zeros.
        down, up = stored[f"{target.module}.lora_a"], stored[f"{target.module}.lora_b"]
        assert (down[:, : delta.rank] == delta.down.read().T).all() and (up[: delta.rank] == delta.up.read().T).all()
        assert not down[:, delta.rank :].any() and not up[delta.rank :].any()


def test_what_is_lowered_to_different_ranks_is_filled_up_too(tmp_path: Path) -> None:
    base = "llama-3-8b"
    deltas = dict(list(specimen("LoHa", base).deltas.items())[:1] + list(specimen("plain", base).deltas.items())[1:2])
    _, after = written(specimens.adapter(base, deltas), base, "mlx", tmp_path / "out", Arithmetic(bake_scale=True, lowrank=RankRule(3)))
    assert set(after.ranks()) == {4}


@pytest.mark.parametrize(("rank", "alpha", "option"), [(4, 8.0, "--bake-scale"), (2, 2.0, "--lowrank auto")])
def test_slices_of_a_merged_linear_get_one_scale_and_one_rank(rank: int, alpha: float, option: str, tmp_path: Path) -> None:
    path = "transformer.h.0.attn.c_attn"
    deltas: dict[Target, Delta] = {
        Target(path, rows): specimens.lora("gpt2", path, *how, rows=rows)
        for rows, how in (((0, 768), (4, Scaling(alpha=4.0))), ((1536, 2304), (rank, Scaling(alpha=alpha))))
    }
    adapter = replace(specimens.adapter("gpt2", deltas), transposed_base=True)
    assert option in str(refusal(adapter, "gpt2", "loralib", tmp_path / "refused").remedy)
    _, after = written(adapter, "gpt2", "loralib", tmp_path / "out", Arithmetic(bake_scale=True, lowrank=AUTO))
    for target, delta in deltas.items():
        assert (dense(after.deltas[target]) == dense(delta)).all()


def test_a_full_kronecker_product_takes_its_scale_in(tmp_path: Path) -> None:
    target = specimens.targets("sd1.5")[0]
    whole = LoKr(w1=values((8, 8), "w1"), w2=values((40, 40), "w2"), scaling=Scaling(alpha=0.5, divisor=1.0))
    adapter = specimens.adapter("sd1.5", {target: whole})
    assert whole.scale == 0.5
    for dialect in ("comfyui", "lycoris"):
        remedy = str(refusal(adapter, "sd1.5", dialect, tmp_path / f"{dialect}-refused").remedy)
        assert "--bake-scale" in remedy and "--lowrank" not in remedy
        receipt, after = written(adapter, "sd1.5", dialect, tmp_path / dialect, Arithmetic(bake_scale=True))
        assert type(after.deltas[target]) is LoKr and receipt.counts["rounding"] == "none"
        assert (dense(after.deltas[target]) == dense(whole)).all()


def test_a_difference_takes_its_scale_in(tmp_path: Path) -> None:
    target = Target(specimens.CONV["sd1.5"][0])
    whole = Full(values(specimens.module("sd1.5", target.module).canonical, "diff"), Scaling(alpha=0.25, divisor=1.0))
    adapter = specimens.adapter("sd1.5", {target: whole})
    assert "--bake-scale" in str(refusal(adapter, "sd1.5", "lycoris", tmp_path / "refused").remedy)
    _, after = written(adapter, "sd1.5", "lycoris", tmp_path / "out", Arithmetic(bake_scale=True))
    assert float(np.abs(dense(after.deltas[target]) - dense(whole)).max()) <= 2.0**-25


NORM_OUT = "transformer.norm_out.linear"


def test_turns_and_kronecker_products_follow_swapped_halves(tmp_path: Path) -> None:
    """The original FLUX has shift and scale of its last norm the other way round."""
    out, into = specimens.module("flux.1-dev", NORM_OUT).canonical
    order = layout(inventory.load("flux.1-dev"), "comfyui").places[NORM_OUT].part.order
    rows = list(order.foreign_rows(out))
    turn = DiagOFT(values((out // 8, 8, 8), "blocks"), constraint=0.001)
    product = LoKr(w1=values((8, 8), "w1"), w2=values((out // 8, into // 8), "w2"), scaling=Scaling(alpha=1.0))
    product = replace(product, scaling=Scaling())
    for number, delta in enumerate((turn, product)):
        adapter = specimens.adapter("flux.1-dev", {Target(NORM_OUT): delta})
        _, after = written(adapter, "flux.1-dev", "comfyui", tmp_path / f"{number}", Arithmetic())
        assert all(same_bits(factor, after.deltas[Target(NORM_OUT)].factors()[role]) for role, factor in delta.factors().items())
    weight = np.random.default_rng(0).standard_normal((out, 16))
    moved = reorder(turn, rows)
    plain = turn.load().merged(lambda start, stop: weight[start:stop].copy(), 0, out)
    there = moved.load().merged(lambda start, stop: weight[rows][start:stop].copy(), 0, out)
    assert (there == plain[rows]).all()
    assert (dense(reorder(product, rows)) == dense(product)[rows]).all()


def test_turns_that_cross_the_halves_are_not_offered_what_cannot_help(tmp_path: Path) -> None:
    out = specimens.module("flux.1-dev", NORM_OUT).canonical[0]
    crossing = {
        "butterfly": ButterflyOFT(values((2, 4, out // 4, out // 4), "blocks"), values((out, 1), "rescale")),
        "one block": DiagOFT(values((1, 12, 12), "b")),
    }
    adapter = specimens.adapter("flux.1-dev", {Target(NORM_OUT): crossing["butterfly"]})
    told = refusal(adapter, "flux.1-dev", "comfyui", tmp_path / "out")
    assert "cannot be rearranged" in told.message
    assert "--lowrank" in str(told.remedy) and "--base with the path of the model" in str(told.remedy)
    assert [problem.cure for problem in told.problems] == ["--lowrank"]
    swapped = [*range(6, 12), *range(6)]
    with pytest.raises(RefusedError, match="Diag-OFT"):
        reorder(crossing["one block"], swapped)


def test_every_module_in_the_way_is_told_and_cured_at_once(tmp_path: Path) -> None:
    """A hundred fused weights with parts of different scales: each was a round of its own."""
    deltas: dict[Target, Delta] = {}
    for block in range(19):
        for at, part in enumerate(("to_q", "to_k", "to_v")):
            path = f"transformer.transformer_blocks.{block}.attn.{part}"
            deltas[Target(path)] = specimens.lora("flux.1-dev", path, 2, Scaling(alpha=2.0 * 2**at))
    adapter = specimens.adapter("flux.1-dev", deltas)
    told = refusal(adapter, "flux.1-dev", "kohya", tmp_path / "refused")
    assert len(told.problems) == 19 and "--bake-scale" in str(told.remedy)
    receipt, after = written(adapter, "flux.1-dev", "kohya", tmp_path / "out", Arithmetic(bake_scale=True))
    assert receipt.counts["scales_baked_in"] == 38
    assert all(
        (dense(after.deltas[target]) == dense(delta)).all() for target, delta in deltas.items() if target.module.endswith("0.attn.to_v")
    )


@pytest.mark.parametrize("stem", ["lora_unet_final_layer_adaLN_modulation_1", "diffusion_model.final_layer.adaLN_modulation.1"])
def test_a_file_is_read_though_one_of_its_modules_cannot_be_turned_round(stem: str, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    out = specimens.module("flux.1-dev", NORM_OUT).canonical[0]
    other = stem.replace("final_layer_adaLN_modulation_1", "double_blocks_0_img_mlp_0").replace(
        "final_layer.adaLN_modulation.1", "double_blocks.0.img_mlp.0"
    )
    tensors = {
        f"{stem}.oft_blocks": np.zeros((2, 2, out // 2, out // 2), np.float16), f"{stem}.alpha": np.float16(0.0),
        f"{other}.lora_up.weight": np.ones((12288, 2), np.float16), f"{other}.lora_down.weight": np.ones((2, 3072), np.float16),
    }  # fmt: skip
    save_file({name: np.asarray(value) for name, value in tensors.items()}, tmp_path / "x.safetensors")
    adapter = open_adapter(tmp_path / "x.safetensors", options=ReadOptions(base=inventory.load("flux.1-dev")))
    assert list(adapter.deltas) == [Target("transformer.transformer_blocks.0.ff.net.0.proj")]
    assert set(adapter.leftovers) == {f"{stem}.oft_blocks", f"{stem}.alpha"}
    assert "rows-in-another-order" in {finding.code for finding in adapter.findings}
