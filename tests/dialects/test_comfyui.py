"""ComfyUI's dialect: read in every spelling, written so that ComfyUI's own rules load all of it and compute what diffusers computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.dialects import comfy_rules
from tests.dialects.files import filled, read, same, tensor_file, written

from upparam import dialects
from upparam.adapter import Adapter, BaseHint, ExtraKind, Target
from upparam.algorithms.base import Delta, ScaleRule, Scaling
from upparam.algorithms.boft import ButterflyOFT
from upparam.algorithms.dora import DoRA
from upparam.algorithms.full import Full
from upparam.algorithms.glora import GLoRA
from upparam.algorithms.lokr import LoKr
from upparam.algorithms.lora import LoRA
from upparam.algorithms.oft import DiagOFT
from upparam.algorithms.slicing import RowSlice
from upparam.bases import inventory
from upparam.bases.base import Base, Module
from upparam.bases.layouts import layout
from upparam.errors import DeadAdapterError, MalformedError, RefusedError
from upparam.operations.proof import same_delta
from upparam.tensors import Tensor

FLUX = inventory.load("flux.1-dev")
QKV = "diffusion_model.double_blocks.0.img_attn.qkv"
HIDDEN = 32


def values(shape: tuple[int, ...], seed: int) -> Tensor:
    return Tensor.of((np.random.default_rng(seed).standard_normal(shape) * 0.1).astype(np.float32))


def tiny() -> Base:
    """FLUX with two blocks of each kind, 32 wide."""
    kept = [
        module for module in FLUX.modules
        if module.path.startswith("transformer.") and not any(word.isdigit() and int(word) > 1 for word in module.path.split(".")[1:3])
    ]  # fmt: skip
    return Base("tiny", tuple(Module(path, kind, tuple(size // 96 if size >= 3072 else size for size in shape), bias) for path, kind, shape, bias in kept), "flux")  # fmt: skip


TINY = tiny()


def seeded(base: Base, wanted: Any, rank: int = 4, alpha: float | None = 2.0) -> Adapter:
    adapter = Adapter({}, "test", base=BaseHint(base.name, 1.0, stated=True))
    for number, module in enumerate(base.modules):
        if len(module.shape) == 2 and wanted(module.path):
            out, into = module.shape
            adapter.deltas[Target(module.path)] = LoRA(
                values((out, rank), number), values((rank, into), number + 1000), Scaling(alpha=alpha)
            )
    return adapter


def original(base: Base) -> dict[str, np.ndarray[Any, Any]]:
    """Random weights and biases of the tiny model under the names of its authors."""
    rng = np.random.default_rng(7)
    one = layout(base, "comfyui")
    found = {}
    for foreign, parts in one.foreign.items():
        shape = (one.rows(foreign), *parts[0].shape[1:])
        found[one.tensor_name(foreign)] = rng.standard_normal(shape)
        found[one.tensor_name(foreign, "bias")] = rng.standard_normal(shape[0])
    return found


def arrays(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray[Any, Any]]:
    return {name: tensor.read() for name, tensor in tensors.items()}


def loaded(
    tensors: Mapping[str, Tensor], weights: Mapping[str, np.ndarray[Any, Any]], clip: Mapping[str, Any] | None = None
) -> comfy_rules.Loaded:
    keys = comfy_rules.flux_keys({name: weight.shape for name, weight in weights.items()}, dict.fromkeys(clip or {}, ()))
    return comfy_rules.load(arrays(tensors), keys)


def expected(base: Base, adapter: Adapter, weights: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    """The changed weights: each target's rows found by ComfyUI's own table of diffusers' names, dW added to them."""
    keys = comfy_rules.flux_keys({name: weight.shape for name, weight in weights.items()}, {})
    found: dict[str, np.ndarray[Any, Any]] = {}
    for target, delta in adapter.deltas.items():
        assert isinstance(delta, LoRA) and delta.scale is not None
        change = delta.scale * (delta.up.doubles() @ delta.down.doubles())
        name = target.module
        if name == "transformer.norm_out.linear":
            # diffusers holds (scale, shift), the authors' file (shift, scale).
            slot, change = (
                comfy_rules.Slot("diffusion_model.final_layer.adaLN_modulation.1.weight"),
                np.roll(change, len(change) // 2, axis=0),
            )
        elif name.startswith("transformer.time_text_embed."):
            which, layer = name.removeprefix("transformer.time_text_embed.").split(".")
            short = {"timestep_embedder": "time_in", "guidance_embedder": "guidance_in", "text_embedder": "vector_in"}[which]
            slot = comfy_rules.Slot(f"diffusion_model.{short}.{'in' if layer == 'linear_1' else 'out'}_layer.weight")
        else:
            slot = keys[name]
        weight = found.setdefault(slot.weight, np.array(weights[slot.weight]))
        start, stop = slot.rows or (0, len(weight))
        weight[start:stop] += change
    return found


@pytest.mark.parametrize("alpha", [None, 2.0, 4.0])
def test_comfyui_loads_all_of_it_and_computes_the_same(alpha: float | None) -> None:
    adapter = seeded(TINY, lambda path: "norm_q" not in path, alpha=alpha)
    content = written("comfyui", adapter, base=TINY)
    weights = original(TINY)
    found = loaded(content.tensors, weights)
    assert not found.left
    changed, wanted = comfy_rules.applied(weights, found), expected(TINY, adapter, weights)
    assert changed.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert np.allclose(changed[name], weight, rtol=0, atol=1e-6), name
        assert np.abs(weight - weights[name]).max() > 1e-3
    again = read("comfyui", content.tensors, content.metadata, base=TINY)
    assert not again.leftovers and set(again.deltas) == set(adapter.deltas)
    assert all(same_delta(delta, again.deltas[target]) for target, delta in adapter.deltas.items())
    same(written("comfyui", again, base=TINY).tensors, content.tensors)


@pytest.mark.parametrize("prefix", ["diffusion_model.", "", "model.diffusion_model."])
@pytest.mark.parametrize(
    ("down", "up"),
    [
        ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight"), ("lora.down.weight", "lora.up.weight"),
        ("lora_A.default.weight", "lora_B.default.weight"), ("lora_A", "lora_B"),
    ],
)  # fmt: skip
def test_every_prefix_and_spelling(prefix: str, down: str, up: str) -> None:
    shapes = {
        f"{prefix}double_blocks.0.img_attn.qkv.{down}": [4, 3072], f"{prefix}double_blocks.0.img_attn.qkv.{up}": [9216, 4],
        f"{prefix}single_blocks.37.linear1.{down}": [4, 3072], f"{prefix}single_blocks.37.linear1.{up}": [21504, 4],
        f"{prefix}single_blocks.37.linear1.alpha": [], f"{prefix}double_blocks.0.img_attn.qkv.alpha": [],
    }  # fmt: skip
    tensors = filled(shapes)
    matched = dialects.matches(tensor_file(tensors))[0]
    assert matched.dialect == "comfyui" and matched.confidence > 0.9
    adapter = read("comfyui", tensors)
    assert not adapter.leftovers and adapter.base is not None and adapter.base.name == "flux.1-dev"
    assert {target.module for target in adapter.deltas} == {
        *(f"transformer.transformer_blocks.0.attn.to_{part}" for part in "qkv"),
        *(f"transformer.single_transformer_blocks.37.attn.to_{part}" for part in "qkv"), "transformer.single_transformer_blocks.37.proj_mlp",
    }  # fmt: skip
    assert all(delta.scale == 2.0 for delta in adapter.deltas.values())
    same(written("comfyui", adapter).tensors, tensors)


def test_diffusers_names_are_read_beside_its_own() -> None:
    shapes = {
        f"{QKV}.lora_A.weight": [4, 3072], f"{QKV}.lora_B.weight": [9216, 4],
        "transformer.transformer_blocks.1.attn.to_q.lora_A.weight": [4, 3072], "transformer.transformer_blocks.1.attn.to_q.lora_B.weight": [3072, 4],
    }  # fmt: skip
    tensors = filled(shapes)
    adapter = read("comfyui", tensors)
    assert Target("transformer.transformer_blocks.1.attn.to_q") in adapter.deltas and len(adapter.deltas) == 4
    same(written("comfyui", adapter).tensors, tensors)


def test_diffusers_names_behind_the_prefix() -> None:
    """ai-toolkit trains diffusers' Z-Image and puts the prefix before its names (extensions_built_in/diffusion_models/z_image)."""
    module = "diffusion_model.layers.0.attention.to_q"
    tensors = filled({f"{module}.lora_A.weight": [4, 3840], f"{module}.lora_B.weight": [3840, 4]})
    adapter = read("comfyui", tensors)
    assert (
        adapter.base is not None
        and adapter.base.name == "z-image"
        and list(adapter.deltas) == [Target("transformer.layers.0.attention.to_q")]
    )
    same(written("comfyui", adapter).tensors, tensors)


def test_one_module_named_twice_keeps_the_first() -> None:
    shapes = {
        f"{QKV}.lora_A.weight": [4, 3072], f"{QKV}.lora_B.weight": [9216, 4],
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": [4, 3072], "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": [3072, 4],
    }  # fmt: skip
    adapter = read("comfyui", filled(shapes))
    assert sorted(adapter.leftovers) == sorted(name for name in shapes if name.startswith("transformer."))
    assert [finding.code for finding in adapter.findings] == ["named-twice"]


def test_qkv_of_one_rank_is_cut_by_rows_and_joined_again() -> None:
    tensors = filled({f"{QKV}.lora_A.weight": [4, 3072], f"{QKV}.lora_B.weight": [9216, 4]})
    adapter = read("comfyui", tensors)
    whole = tensors[f"{QKV}.lora_B.weight"].read()
    for part, name in enumerate(("to_q", "to_k", "to_v")):
        delta = adapter.deltas[Target(f"transformer.transformer_blocks.0.attn.{name}")]
        assert isinstance(delta, LoRA)
        assert (delta.up.read() == whole[part * 3072 : (part + 1) * 3072]).all()
        assert delta.down.raw() == tensors[f"{QKV}.lora_A.weight"].raw()


def test_the_halves_of_the_final_modulation_change_places() -> None:
    name = "diffusion_model.final_layer.adaLN_modulation.1"
    tensors = filled({f"{name}.lora_A.weight": [4, 3072], f"{name}.lora_B.weight": [6144, 4], f"{name}.diff_b": [6144]})
    adapter = read("comfyui", tensors)
    delta, bias = (
        adapter.deltas[Target("transformer.norm_out.linear")],
        adapter.deltas[Target("transformer.norm_out.linear", parameter="bias")],
    )
    assert isinstance(delta, LoRA)
    assert (delta.up.read() == np.roll(tensors[f"{name}.lora_B.weight"].read(), 3072, axis=0)).all()
    assert (bias.factors()["diff"].read() == np.roll(tensors[f"{name}.diff_b"].read(), 3072)).all()
    same(written("comfyui", adapter).tensors, tensors)


def test_dora_with_a_norm_for_each_input_is_named_by_its_parts() -> None:
    """Three of them are no DoRA of the fused weight; ComfyUI reads each under diffusers' name and normalises its rows alone."""
    adapter = Adapter({}, "test", base=BaseHint("tiny", 1.0, stated=True))
    for number, name in enumerate(("to_q", "to_k", "to_v", "to_out.0")):
        adapter.deltas[Target(f"transformer.transformer_blocks.0.attn.{name}")] = DoRA(
            values((HIDDEN, 4), number),
            values((4, HIDDEN), number + 10),
            Tensor.of(np.abs(values((1, HIDDEN), number + 20).read()) + 1),
            Scaling(alpha=2.0),
        )
    content = written("comfyui", adapter, base=TINY)
    assert "transformer.transformer_blocks.0.attn.to_q.dora_scale" in content.tensors
    assert "diffusion_model.double_blocks.0.img_attn.proj.dora_scale" in content.tensors
    weights = original(TINY)
    found = loaded(content.tensors, weights)
    assert not found.left
    changed = comfy_rules.applied(weights, found)["diffusion_model.double_blocks.0.img_attn.qkv.weight"]
    for part, name in enumerate(("to_q", "to_k", "to_v")):
        delta = adapter.deltas[Target(f"transformer.transformer_blocks.0.attn.{name}")]
        rows = slice(part * HIDDEN, (part + 1) * HIDDEN)
        weight = weights["diffusion_model.double_blocks.0.img_attn.qkv.weight"][rows]
        assert np.allclose(changed[rows], delta.load().merged(lambda start, stop, weight=weight: np.array(weight[start:stop]), 0, HIDDEN))
    again = read("comfyui", content.tensors, base=TINY)
    assert not again.leftovers and all(same_delta(delta, again.deltas[target]) for target, delta in adapter.deltas.items())
    same(written("comfyui", again, base=TINY).tensors, content.tensors)
    with pytest.raises(RefusedError, match="DoRA deltas of parts cannot be joined"):
        written("comfyui", adapter, base=replace(TINY, family=""))


def test_dora_with_a_norm_for_each_row_is_joined() -> None:
    tensors = filled({f"{QKV}.lora_down.weight": [4, 3072], f"{QKV}.lora_up.weight": [9216, 4], f"{QKV}.dora_scale": [9216, 1]})
    adapter = read("comfyui", tensors)
    assert all(type(delta) is DoRA and delta.magnitude.shape == (3072, 1) for delta in adapter.deltas.values())
    same(written("comfyui", adapter).tensors, tensors)


def lokr(two_full: bool) -> dict[str, list[int]]:
    second = {f"{QKV}.lokr_w2": [288, 32]} if two_full else {f"{QKV}.lokr_w2_a": [288, 4], f"{QKV}.lokr_w2_b": [4, 32]}
    return {f"{QKV}.lokr_w1": [32, 96], **second, f"{QKV}.alpha": []}


@pytest.mark.parametrize(("two_full", "scale"), [(True, 1.0), (False, 2.0)])
def test_a_kronecker_product_over_a_fused_weight_stays_whole(two_full: bool, scale: float) -> None:
    tensors = filled(lokr(two_full))
    adapter = read("comfyui", tensors)
    assert adapter.base is not None and adapter.base.name == "flux.1-dev" and not adapter.leftovers
    assert all(delta.algorithm == "lokr" and delta.scale == scale for delta in adapter.deltas.values())
    if not two_full:
        assert any(isinstance(delta, RowSlice) for delta in adapter.deltas.values()) or len(adapter.deltas) == 3
    same(written("comfyui", adapter).tensors, tensors)
    weights = {f"{QKV}.weight": np.zeros((9216, 3072), dtype=np.float32)}
    (_, kind, _) = loaded(tensors, weights).changes[f"{QKV}.weight"][0]
    assert kind == "lokr"


def test_two_full_kronecker_factors_cannot_have_another_scale() -> None:
    delta = LoKr(w1=values((4, 4), 1), w2=values((8, 8), 2), scaling=Scaling(alpha=2.0, divisor=4.0))
    adapter = Adapter({Target("transformer.transformer_blocks.0.attn.to_out.0"): delta}, "test", base=BaseHint("tiny", 1.0, stated=True))
    with pytest.raises(RefusedError, match="scale of 1"):
        written("comfyui", adapter, base=TINY)


def test_turns_and_generalised_loras_are_applied_as_we_do() -> None:
    block = "transformer.transformer_blocks.0."
    deltas: dict[str, Delta] = {
        f"{block}attn.to_out.0": GLoRA(*(values(shape, seed) for seed, shape in enumerate(((32, 4), (4, 32), (32, 4), (4, 32)))), scaling=Scaling(alpha=2.0)),
        f"{block}ff.net.0.proj": GLoRA(*(values(shape, seed) for seed, shape in enumerate(((32, 4), (4, 32), (128, 4), (4, 32))))),
        f"{block}ff_context.net.0.proj": ButterflyOFT(values((3, 16, 8, 8), 5), values((128, 1), 6)),
        f"{block}ff_context.net.2": DiagOFT(values((4, 8, 8), 7), constraint=0.01, scaling=Scaling(ScaleRule.BAKED, 0.01)),
        f"{block}attn.to_add_out": Full(values((32, 32), 8)),
        **{f"{block}attn.to_{part}": DiagOFT(values((4, 8, 8), 9 + number)) for number, part in enumerate("qkv")},
        **{f"{block}attn.add_{part}_proj": ButterflyOFT(values((2, 4, 8, 8), 13 + number)) for number, part in enumerate("qkv")},
    }  # fmt: skip
    adapter = Adapter({Target(name): delta for name, delta in deltas.items()}, "test", base=BaseHint("tiny", 1.0, stated=True))
    content = written("comfyui", adapter, base=TINY)
    weights = original(TINY)
    found = loaded(content.tensors, weights)
    assert not found.left and f"{block}attn.add_q_proj.oft_blocks" in content.tensors and f"{QKV}.oft_blocks" in content.tensors
    changed = comfy_rules.applied(weights, found)
    keys = comfy_rules.flux_keys({name: weight.shape for name, weight in weights.items()}, {})
    for name, delta in deltas.items():
        start, stop = keys[name].rows or (0, len(weights[keys[name].weight]))
        before, after = (values_of[keys[name].weight][start:stop] for values_of in (weights, changed))
        want = delta.load().merged(lambda low, high, rows=before: np.array(rows[low:high]), 0, stop - start)
        assert np.allclose(after, want, rtol=0, atol=1e-6) and not np.allclose(after, before, rtol=0, atol=1e-3), name
    again = read("comfyui", content.tensors, content.metadata, base=TINY)
    assert not again.leftovers and all(same_delta(delta, again.deltas[target]) for target, delta in adapter.deltas.items())
    same(written("comfyui", again, base=TINY).tensors, content.tensors)


def test_loha_and_full_differences() -> None:
    module = "diffusion_model.double_blocks.0.img_attn.proj"
    tensors = filled({
        f"{module}.hada_w1_a": [3072, 4], f"{module}.hada_w1_b": [4, 3072], f"{module}.hada_w2_a": [3072, 4], f"{module}.hada_w2_b": [4, 3072],
        f"{module}.alpha": [], "diffusion_model.img_in.diff": [3072, 64], "diffusion_model.img_in.diff_b": [3072],
    })  # fmt: skip
    adapter = read("comfyui", tensors)
    kinds = {str(target): delta.algorithm for target, delta in adapter.deltas.items()}
    assert kinds == {
        "transformer.transformer_blocks.0.attn.to_out.0": "loha",
        "transformer.x_embedder": "full",
        "transformer.x_embedder.bias": "full",
    }
    same(written("comfyui", adapter).tensors, tensors)


CONTROL = {
    "img_in.lora_A.weight": [4, 128], "img_in.lora_B.weight": [3072, 4], "img_in.lora_B.bias": [3072],
    "single_blocks.0.linear1.lora_A.weight": [4, 3072], "single_blocks.0.linear1.lora_B.weight": [21504, 4], "single_blocks.0.linear1.lora_B.bias": [21504],
    "final_layer.adaLN_modulation.1.lora_A.weight": [4, 3072], "final_layer.adaLN_modulation.1.lora_B.weight": [6144, 4],
    "final_layer.adaLN_modulation.1.lora_B.bias": [6144],
    "single_blocks.0.norm.key_norm.scale": [128], "double_blocks.0.img_attn.norm.query_norm.scale": [128],
}  # fmt: skip


def test_control_adapters_carry_biases_and_norms() -> None:
    tensors = filled(CONTROL)
    adapter = read("comfyui", tensors)
    assert adapter.base is not None and adapter.base.name == "flux.1-control-dev" and not adapter.leftovers
    assert {extra.name for extra in adapter.extras} == {
        "transformer.single_transformer_blocks.0.attn.norm_k.weight", "transformer.transformer_blocks.0.attn.norm_q.weight",
    }  # fmt: skip
    assert all(extra.kind is ExtraKind.SAVED_MODULE for extra in adapter.extras)
    q = adapter.deltas[Target("transformer.single_transformer_blocks.0.attn.to_q", parameter="bias")]
    assert (q.factors()["diff"].read() == tensors["single_blocks.0.linear1.lora_B.bias"].read()[:3072]).all()
    same(written("comfyui", adapter).tensors, tensors)
    foreign = replace(adapter, dialect="test", spelling={})
    same(written("comfyui", foreign).tensors, tensors)


def test_control_adapters_with_a_prefix_say_how_wide_the_input_is() -> None:
    tensors = {f"diffusion_model.{name}": tensor for name, tensor in filled(CONTROL).items() if not name.endswith(".scale")}
    tensors |= {"diffusion_model.img_in.reshape_weight": Tensor.of(np.array([3072, 128]))}
    adapter = read("comfyui", tensors)
    assert not adapter.leftovers and not adapter.extras
    same(written("comfyui", adapter).tensors, tensors)
    again = written("comfyui", replace(adapter, dialect="test", spelling={})).tensors
    assert again["diffusion_model.img_in.reshape_weight"].read().tolist() == [3072, 128]
    assert "diffusion_model.img_in.diff_b" in again


def test_scaled_control_adapters_keep_the_prefix() -> None:
    adapter = read("comfyui", filled(CONTROL))
    scaled = {
        target: replace(delta, scaling=Scaling(alpha=8.0)) if isinstance(delta, LoRA) else delta for target, delta in adapter.deltas.items()
    }
    content = written("comfyui", replace(adapter, dialect="test", spelling={}, deltas=scaled))
    assert {
        "diffusion_model.img_in.alpha",
        "diffusion_model.img_in.diff_b",
        "diffusion_model.img_in.reshape_weight",
    } <= content.tensors.keys()
    again = read("comfyui", content.tensors)
    assert not again.leftovers and all(same_delta(delta, again.deltas[target]) for target, delta in scaled.items())
    assert {extra.name for extra in again.extras} == {extra.name for extra in adapter.extras}


def test_whole_weights_that_replace_the_bases() -> None:
    """`set_weight` of any module; not of the final modulation, whose rows stand otherwise in the reference."""
    tensors = filled(
        {f"{QKV}.lora_A.weight": [4, 3072], f"{QKV}.lora_B.weight": [9216, 4], "diffusion_model.img_in.set_weight": [3072, 64]}
    )
    adapter = read("comfyui", tensors, base=FLUX)
    assert [extra.name for extra in adapter.extras] == ["transformer.x_embedder.weight"] and not adapter.leftovers
    same(written("comfyui", adapter).tensors, tensors)
    for name, shape in (("final_layer.adaLN_modulation.1", [6144, 3072]), ("img_in", [3072, 65]), ("no_such_module", [3])):
        odd = {**tensors, f"diffusion_model.{name}.set_weight": filled({"a": shape})["a"]}
        found = read("comfyui", odd, base=FLUX)
        assert f"diffusion_model.{name}.set_weight" in found.leftovers, name


def test_factors_that_are_scalars_end_in_errors_of_ours() -> None:
    odd = {f"{QKV}.lokr_w1": [4, 4], f"{QKV}.lokr_w1_b": [], f"{QKV}.lokr_w2": [4, 4]}
    with pytest.raises(MalformedError) as caught:
        read("comfyui", filled(odd))
    assert caught.value.tensor == QKV
    with pytest.raises(MalformedError):
        read(
            "diffusers",
            filled(
                {
                    "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": [],
                    "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": [4],
                }
            ),
        )


@pytest.mark.parametrize("value", [np.array([3072.0, np.nan]), np.array([1, 2]), np.array(3), np.zeros((2, 2)), np.zeros(100_000)])
def test_a_reshape_that_says_something_else_is_left_over(value: np.ndarray[Any, Any]) -> None:
    tensors = filled({"diffusion_model.img_in.lora_A.weight": [4, 128], "diffusion_model.img_in.lora_B.weight": [3072, 4]})
    adapter = read(
        "comfyui", {**tensors, "diffusion_model.img_in.reshape_weight": Tensor.of(value)}, base=inventory.load("flux.1-control-dev")
    )
    assert list(adapter.leftovers) == ["diffusion_model.img_in.reshape_weight"]


def test_a_bias_of_up_that_is_scaled_is_not_taken_for_the_whole_change() -> None:
    tensors = filled({**CONTROL, "img_in.alpha": []}, alpha=8.0)
    adapter = read("comfyui", tensors)
    assert list(adapter.leftovers) == ["img_in.lora_B.bias"]


@pytest.mark.parametrize(
    ("base", "names"),
    [
        (
            "flux.1-dev",
            ("clip_l.transformer.text_model.encoder.layers.0.mlp.fc1", "t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q"),
        ),
        ("sdxl", ("clip_l.transformer.text_model.encoder.layers.0.mlp.fc1", "clip_g.transformer.text_model.encoder.layers.31.mlp.fc1")),
        ("wan2.1-t2v-14b", ("umt5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q",)),
    ],
)
def test_text_encoders(base: str, names: tuple[str, ...]) -> None:
    shapes: dict[str, list[int]] = {}
    one = layout(inventory.load(base), "comfyui")
    denoiser = next(
        foreign for foreign, parts in one.foreign.items() if foreign.startswith("diffusion_model.") and len(parts[0].shape) == 2
    )
    for name in (denoiser, *(f"text_encoders.{name}" for name in names)):
        shapes |= {f"{name}.lora_A.weight": [4, one.to_reference(name)[0].shape[1]], f"{name}.lora_B.weight": [one.rows(name), 4]}
    tensors = filled(shapes)
    adapter = read("comfyui", tensors, base=inventory.load(base))
    assert not adapter.leftovers and adapter.layout == "reference"
    same(written("comfyui", adapter, base=inventory.load(base)).tensors, tensors)
    if base == "flux.1-dev":
        model = {f"{name.removesuffix('.lora_A.weight')}.weight": np.zeros((1, 1)) for name in shapes if name.endswith("lora_A.weight")}
        clip = {name.removeprefix("text_encoders."): value for name, value in model.items() if name.startswith("text_encoders.")}
        assert not comfy_rules.load(arrays(tensors), comfy_rules.flux_keys({denoiser + ".weight": (1, 1)}, clip)).left


def test_a_base_that_contradicts_the_shapes_is_not_taken() -> None:
    shapes = {f"{QKV}.lora_A.weight": [4, 3072], f"{QKV}.lora_B.weight": [9216, 4]}
    shapes |= {
        "diffusion_model.double_blocks.0.img_attn.proj.lora_A.weight": [4, 1000],
        "diffusion_model.double_blocks.0.img_attn.proj.lora_B.weight": [3072, 4],
    }
    tensors = filled(shapes)
    adapter = read("comfyui", tensors)
    assert adapter.base is None and adapter.layout == "comfyui" and not adapter.leftovers
    (finding,) = adapter.findings
    assert finding.code == "base-unknown" and "flux.1-dev" in str(finding.evidence) and "(3072, 1000)" in str(finding.evidence)
    same(written("comfyui", adapter).tensors, tensors)
    for other in ("kohya", "diffusers", "peft"):
        with pytest.raises(RefusedError):
            written(other, adapter)
    named = read("comfyui", tensors, base=FLUX)
    assert len(named.leftovers) == 2 and [finding.code for finding in named.findings] == ["unknown-module"]


def test_other_layouts_without_a_base_are_refused() -> None:
    adapter = Adapter({Target("lora_unet_a"): LoRA(values((4, 2), 1), values((2, 4), 2))}, "kohya", layout="kohya")
    with pytest.raises(RefusedError, match="names are those of kohya"):
        written("comfyui", adapter)
    llama = Adapter(
        {Target("model.layers.0.self_attn.q_proj"): LoRA(values((4096, 2), 1), values((2, 4096), 2))},
        "peft",
        base=BaseHint("llama-3-8b", 1.0),
    )
    with pytest.raises(RefusedError, match="no comfyui names"):
        written("comfyui", llama)


def test_deltas_of_other_parameters_are_refused() -> None:
    lora = LoRA(values((HIDDEN, 2), 1), values((2, HIDDEN), 2))
    for parameter in ("bias", "scale_table"):
        target = Target("transformer.transformer_blocks.0.attn.to_out.0", parameter=parameter)
        with pytest.raises(RefusedError) as caught:
            written("comfyui", Adapter({target: lora}, "test", base=BaseHint("tiny", 1.0, stated=True)), base=TINY)
        assert f"a LoRA delta of the {parameter}" in str(caught.value.found)


def test_orphans_are_left_over_and_dead_files_are_called_so() -> None:
    tensors = filled(
        {f"{QKV}.lora_A.weight": [4, 3072], f"{QKV}.lora_B.weight": [9216, 4], "diffusion_model.img_in.lora_A.weight": [4, 64]}
    )
    adapter = read("comfyui", tensors)
    assert list(adapter.leftovers) == ["diffusion_model.img_in.lora_A.weight"] and [finding.code for finding in adapter.findings] == [
        "orphan"
    ]
    with pytest.raises(DeadAdapterError):
        read("comfyui", {"diffusion_model.img_in.lora_A.weight": tensors["diffusion_model.img_in.lora_A.weight"]})


def test_what_belongs_to_other_files_is_not_carried() -> None:
    adapter = seeded(TINY, lambda path: path.endswith("to_q"))
    adapter.metadata = {"sshs_model_hash": "x", "lora_adapter_metadata": "{}", "note": "kept"}
    metadata = written("comfyui", adapter, base=TINY).metadata
    assert metadata["note"] == "kept" and not [key for key in metadata if key.startswith(("sshs_", "lora_adapter"))]


def test_names_of_others_are_not_claimed(tmp_path: Path) -> None:
    for names in (
        ["model.layers.0.self_attn.q_proj.lora_A.weight"], ["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"], ["blocks.0.attn.qkv.lora_A.weight"],
        ["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"], ["diffusion_model.double_blocks.0.img_attn.qkv.weight"],
    ):  # fmt: skip
        assert dialects.get("comfyui").match(tensor_file(filled({name: [4, 4] for name in names}))) is None, names
