"""XLabs' dialect: attention processors of FLUX.1, there and back, as diffusers and ComfyUI read them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tests.dialects import comfy_rules
from tests.dialects.files import filled, read, same, tensor_file, written

from upparam import dialects
from upparam.adapter import Adapter, BaseHint, Extra, ExtraKind, Target
from upparam.algorithms.base import Scaling
from upparam.algorithms.lora import LoRA
from upparam.bases import inventory
from upparam.errors import DeadAdapterError, MalformedError, RefusedError
from upparam.tensors import Tensor

FLUX = inventory.load("flux.1-dev")


def shapes(double: int = 2, single: int = 1, rank: int = 2, prefix: str = "") -> dict[str, list[int]]:
    """Names and shapes as train_flux_lora_deepspeed.py saves them."""
    found: dict[str, list[int]] = {}
    for block in range(double):
        for part, out in (("proj_lora1", 3072), ("proj_lora2", 3072), ("qkv_lora1", 9216), ("qkv_lora2", 9216)):
            name = f"{prefix}double_blocks.{block}.processor.{part}"
            found |= {f"{name}.down.weight": [rank, 3072], f"{name}.up.weight": [out, rank]}
    for block in range(single):
        for part, out, into in (("proj_lora", 3072, 15360), ("qkv_lora", 9216, 3072)):
            name = f"{prefix}single_blocks.{block}.processor.{part}"
            found |= {f"{name}.down.weight": [rank, into], f"{name}.up.weight": [out, rank]}
    return found


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_read_and_written_again(prefix: str) -> None:
    tensors = filled(shapes(prefix=prefix))
    (match, *_) = dialects.matches(tensor_file(tensors))
    assert match.dialect == "xlabs" and match.confidence == 0.99
    adapter = read("xlabs", tensors)
    assert (
        not adapter.leftovers
        and adapter.base is not None
        and adapter.base.name == "flux.1-dev"
        and "flux.1-schnell" in adapter.base.lookalikes
    )
    assert len(adapter.deltas) == 2 * 8 + 4
    assert all(delta.scale == 1.0 for delta in adapter.deltas.values())
    same(written("xlabs", adapter).tensors, tensors)


@pytest.mark.parametrize("other", ["diffusers", "comfyui", "kohya"])
def test_there_and_back_through_other_dialects(other: str) -> None:
    tensors = filled(shapes())
    content = written(other, read("xlabs", tensors), base=FLUX)
    between = read(other, content.tensors, content.metadata, base=FLUX)
    assert not between.leftovers
    same(written("xlabs", between, base=FLUX).tensors, tensors)


def test_diffusers_own_converter_gives_the_same_tensors() -> None:
    pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")
    from diffusers.loaders.lora_conversion_utils import _convert_xlabs_flux_lora_to_diffusers

    tensors = filled(shapes())
    theirs = _convert_xlabs_flux_lora_to_diffusers({name: torch.from_numpy(tensor.read()) for name, tensor in tensors.items()})
    ours = written("diffusers", read("xlabs", tensors)).tensors
    assert ours.keys() == theirs.keys()
    assert all((ours[name].read() == theirs[name].numpy()).all() for name in ours)


def test_comfyui_reads_a_whole_set_of_processors() -> None:
    """Of files with every block; others it does not recognise, which docs/formats.md tells."""
    tensors = filled(shapes(19, 38, rank=1))
    model = {"diffusion_model.single_blocks.0.linear1.weight": (21504, 3072)}
    for block in range(19):
        model |= {f"diffusion_model.double_blocks.{block}.{part}.qkv.weight": (9216, 3072) for part in ("img_attn", "txt_attn")}
        model |= {f"diffusion_model.double_blocks.{block}.{part}.proj.weight": (3072, 3072) for part in ("img_attn", "txt_attn")}
    for block in range(38):
        model |= {
            f"diffusion_model.single_blocks.{block}.linear1.weight": (21504, 3072),
            f"diffusion_model.single_blocks.{block}.linear2.weight": (3072, 15360),
        }
    found = comfy_rules.load({name: tensor.read() for name, tensor in tensors.items()}, comfy_rules.flux_keys(model, {}))
    assert not found.left
    ((rows, _, factors),) = found.changes["diffusion_model.single_blocks.3.linear1.weight"]
    assert rows == (0, 9216)
    adapter = read("xlabs", tensors)
    for part, name in enumerate(("to_q", "to_k", "to_v")):
        delta = adapter.deltas[Target(f"transformer.single_transformer_blocks.3.attn.{name}")]
        assert (delta.factors()["up"].read() == factors["up"][part * 3072 : (part + 1) * 3072]).all()
    assert Target("transformer.single_transformer_blocks.3.proj_mlp") not in adapter.deltas


def refused(adapter: Adapter, what: str) -> None:
    with pytest.raises(RefusedError) as caught:
        written("xlabs", adapter, base=FLUX)
    assert what in f"{caught.value.message} {caught.value.found}", (caught.value.message, caught.value.found)


def lora(out: int, into: int, rank: int = 2, alpha: float | None = None) -> LoRA:
    return LoRA(Tensor.of(np.ones((out, rank), np.float32)), Tensor.of(np.ones((rank, into), np.float32)), Scaling(alpha=alpha))


def test_what_x_flux_would_not_load_is_refused() -> None:
    whole = replace(read("xlabs", filled(shapes())), dialect="test", spelling={})
    deltas = dict(whole.deltas)
    refused(replace(whole, deltas={**deltas, Target("transformer.x_embedder"): lora(3072, 64)}), "no name in the xlabs layout")
    scaled = {target: replace(delta, scaling=Scaling(alpha=1.0)) for target, delta in deltas.items() if isinstance(delta, LoRA)}
    refused(replace(whole, deltas={**scaled}), "a scale of 0.5")
    out = Target("transformer.transformer_blocks.0.attn.to_out.0")
    refused(replace(whole, deltas={**deltas, out: lora(3072, 3072, rank=5)}), "rank 2 beside 5")
    refused(replace(whole, deltas={target: delta for target, delta in deltas.items() if target != out}), "proj_lora1: not changed")
    extra = Extra(ExtraKind.SAVED_MODULE, "transformer.transformer_blocks.0.attn.norm_q.weight", Tensor.of(np.ones(128, np.float32)))
    refused(replace(whole, extras=[extra]), "saved-module")
    refused(Adapter({Target("lora_unet_x"): lora(4, 4)}, "kohya", layout="kohya"), "names are those of kohya")


def test_other_shapes_keep_the_names_of_the_file() -> None:
    tensors = filled(
        {"double_blocks.0.processor.proj_lora1.down.weight": [2, 64], "double_blocks.0.processor.proj_lora1.up.weight": [64, 2]}
    )
    adapter = read("xlabs", tensors)
    assert adapter.layout == "xlabs" and adapter.base is None and [finding.code for finding in adapter.findings] == ["base-unknown"]
    same(written("xlabs", adapter).tensors, tensors)
    named = read("xlabs", tensors, base=FLUX)
    assert sorted(named.leftovers) == sorted(tensors) and [finding.code for finding in named.findings] == ["unknown-module"]


def test_orphans_strangers_and_factors_that_do_not_fit() -> None:
    good = shapes(1, 0)
    adapter = read("xlabs", filled({**good, "single_blocks.0.processor.qkv_lora.down.weight": [2, 3072], "stranger": [3]}))
    assert sorted(adapter.leftovers) == ["single_blocks.0.processor.qkv_lora.down.weight", "stranger"]
    assert [finding.code for finding in adapter.findings] == ["orphan"]
    with pytest.raises(DeadAdapterError):
        read("xlabs", filled({"double_blocks.0.processor.qkv_lora1.down.weight": [2, 3072]}))
    with pytest.raises(MalformedError) as caught:
        read("xlabs", filled({**good, "double_blocks.0.processor.qkv_lora1.up.weight": [9216, 3]}))
    assert caught.value.tensor == "double_blocks.0.processor.qkv_lora1"


def test_a_joined_file_comes_apart_bit_for_bit() -> None:
    """q, k and v with downs of their own: block-diagonal, noted, and proven by the zeros."""
    deltas = {}
    for part in ("to_q", "to_k", "to_v"):
        rng = np.random.default_rng(len(deltas))
        up, down = (Tensor.of(rng.standard_normal(shape).astype(np.float32)) for shape in ((3072, 2), (2, 3072)))
        deltas[Target(f"transformer.transformer_blocks.0.attn.{part}")] = LoRA(up, down)
        deltas[Target(f"transformer.transformer_blocks.0.attn.add_{part[-1]}_proj")] = LoRA(up, down)
    for name in ("to_out.0", "to_add_out"):
        deltas[Target(f"transformer.transformer_blocks.0.attn.{name}")] = lora(3072, 3072, rank=6)
    adapter = Adapter({**deltas}, "test", base=BaseHint("flux.1-dev", 1.0, stated=True))
    content = written("xlabs", adapter)
    again = read("xlabs", content.tensors, content.metadata)
    for target, delta in deltas.items():
        mine, theirs = delta.factors(), again.deltas[target].factors()
        assert all(mine[role].raw() == theirs[role].raw() for role in mine), str(target)
