"""OneTrainer's dialect: its own names and its OMI names, read, written again, and as ComfyUI reads them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tests.dialects import comfy_rules
from tests.dialects.files import filled, read, same, tensor_file, written

from upparam import dialects
from upparam.adapter import Adapter, ExtraKind, Target
from upparam.algorithms.dora import DoRA
from upparam.bases import inventory
from upparam.errors import DeadAdapterError, RefusedError

FLUX = inventory.load("flux.1-dev")
BLOCK = "lora_transformer_transformer_blocks_0_"
OWN = {
    f"{BLOCK}attn_to_q": (3072, 3072), f"{BLOCK}attn_to_out_0": (3072, 3072), f"{BLOCK}ff_net_0_proj": (12288, 3072), f"{BLOCK}norm1_linear": (18432, 3072),
    "lora_transformer_single_transformer_blocks_37_proj_mlp": (12288, 3072), "lora_transformer_norm_out_linear": (6144, 3072),
    "lora_te1_text_model_encoder_layers_0_mlp_fc1": (3072, 768), "lora_te2_encoder_block_0_layer_0_SelfAttention_q": (4096, 4096),
}  # fmt: skip


def shapes(modules: dict[str, tuple[int, int]], rank: int = 2, *, dora: bool = False) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for name, (out, into) in modules.items():
        found |= {f"{name}.lora_down.weight": [rank, into], f"{name}.lora_up.weight": [out, rank], f"{name}.alpha": []}
        found |= {f"{name}.dora_scale": [1, into]} if dora else {}
    return found


@pytest.mark.parametrize("dora", [False, True])
def test_its_own_names(dora: bool) -> None:
    tensors = filled(shapes(OWN, dora=dora))
    (match, *_) = dialects.matches(tensor_file(tensors))
    assert match.dialect == "onetrainer" and match.confidence == 0.98
    adapter = read("onetrainer", tensors)
    assert not adapter.leftovers and adapter.base is not None and adapter.base.name == "flux.1-dev"
    assert {target.module for target in adapter.deltas} == {
        "transformer.transformer_blocks.0.attn.to_q", "transformer.transformer_blocks.0.attn.to_out.0", "transformer.transformer_blocks.0.ff.net.0.proj",
        "transformer.transformer_blocks.0.norm1.linear", "transformer.single_transformer_blocks.37.proj_mlp", "transformer.norm_out.linear",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1", "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q",
    }  # fmt: skip
    assert all(delta.scale == 4.0 and (type(delta) is DoRA) is dora for delta in adapter.deltas.values())
    same(written("onetrainer", adapter).tensors, tensors)


def test_comfyui_reads_its_own_names() -> None:
    modules = {name: shape for name, shape in OWN.items() if "norm_out" not in name}
    tensors = filled(shapes(modules))
    model = {
        "diffusion_model.double_blocks.0.img_attn.qkv.weight": (9216, 3072), "diffusion_model.double_blocks.0.img_attn.proj.weight": (3072, 3072),
        "diffusion_model.single_blocks.37.linear1.weight": (21504, 3072),
    }  # fmt: skip
    clip = dict.fromkeys(("clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight", "t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight"), ())  # fmt: skip
    found = comfy_rules.load({name: tensor.read() for name, tensor in tensors.items()}, comfy_rules.flux_keys(model, clip))
    assert not found.left
    ((rows, _, _),) = found.changes["diffusion_model.single_blocks.37.linear1.weight"]
    assert rows == (9216, 21504)


OMI = {
    # Name in the file: (shape, reference module), as convert_flux_lora.py pairs them.
    "transformer.double_blocks.0.img_attn.qkv.0": ((3072, 3072), "transformer.transformer_blocks.0.attn.to_q"),
    "transformer.double_blocks.0.img_attn.qkv.1": ((3072, 3072), "transformer.transformer_blocks.0.attn.to_k"),
    "transformer.double_blocks.0.img_attn.qkv.2": ((3072, 3072), "transformer.transformer_blocks.0.attn.to_v"),
    "transformer.double_blocks.0.txt_attn.qkv.0": ((3072, 3072), "transformer.transformer_blocks.0.attn.add_q_proj"),
    "transformer.double_blocks.0.txt_attn.qkv.1": ((3072, 3072), "transformer.transformer_blocks.0.attn.add_k_proj"),
    "transformer.double_blocks.0.txt_attn.qkv.2": ((3072, 3072), "transformer.transformer_blocks.0.attn.add_v_proj"),
    "transformer.double_blocks.0.img_attn.proj": ((3072, 3072), "transformer.transformer_blocks.0.attn.to_out.0"),
    "transformer.double_blocks.0.txt_attn.proj": ((3072, 3072), "transformer.transformer_blocks.0.attn.to_add_out"),
    "transformer.double_blocks.0.img_mlp.0": ((12288, 3072), "transformer.transformer_blocks.0.ff.net.0.proj"),
    "transformer.double_blocks.0.txt_mlp.2": ((3072, 12288), "transformer.transformer_blocks.0.ff_context.net.2"),
    "transformer.double_blocks.0.img_mod.lin": ((18432, 3072), "transformer.transformer_blocks.0.norm1.linear"),
    "transformer.single_blocks.5.linear1.0": ((3072, 3072), "transformer.single_transformer_blocks.5.attn.to_q"),
    "transformer.single_blocks.5.linear1.3": ((12288, 3072), "transformer.single_transformer_blocks.5.proj_mlp"),
    "transformer.single_blocks.5.linear2": ((3072, 15360), "transformer.single_transformer_blocks.5.proj_out"),
    "transformer.single_blocks.5.modulation.lin": ((9216, 3072), "transformer.single_transformer_blocks.5.norm.linear"),
    "transformer.img_in.proj": ((3072, 64), "transformer.x_embedder"),
    "transformer.txt_in": ((3072, 4096), "transformer.context_embedder"),
    "transformer.vector_in.in_layer": ((3072, 768), "transformer.time_text_embed.text_embedder.linear_1"),
    "transformer.final_layer.linear": ((64, 3072), "transformer.proj_out"),
    "transformer.final_layer.adaLN_modulation.1": ((6144, 3072), "transformer.norm_out.linear"),
    "clip_l.text_model.encoder.layers.0.mlp.fc1": ((3072, 768), "text_encoder.text_model.encoder.layers.0.mlp.fc1"),
    "t5.encoder.block.0.layer.0.SelfAttention.q": ((4096, 4096), "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q"),
}


def test_omi_names_of_flux() -> None:
    tensors = filled(shapes({name: shape for name, (shape, _) in OMI.items()}))
    (match, *_) = dialects.matches(tensor_file(tensors))
    assert match.dialect == "onetrainer"
    adapter = read("onetrainer", tensors)
    assert not adapter.leftovers and adapter.base is not None and adapter.base.name == "flux.1-dev"
    for name, (_, module) in OMI.items():
        factors = adapter.deltas[Target(module)].factors()
        assert factors["down"].raw() == tensors[f"{name}.lora_down.weight"].raw(), name
        up = tensors[f"{name}.lora_up.weight"].read()
        # "swap_chunks": the authors hold (shift, scale), diffusers (scale, shift).
        expected = np.roll(up, 3072, axis=0) if name.endswith("adaLN_modulation.1") else up
        assert (factors["up"].read() == expected).all(), name
    same(written("onetrainer", adapter).tensors, tensors)


def test_omi_names_of_sdxl_and_chroma() -> None:
    sdxl = {
        "unet.input_blocks.4.1.transformer_blocks.0.attn1.to_q": (640, 640), "unet.middle_block.1.proj_in": (1280, 1280),
        "clip_g.text_model.encoder.layers.31.mlp.fc1": (5120, 1280), "clip_l.text_model.encoder.layers.0.self_attn.q_proj": (768, 768),
    }  # fmt: skip
    tensors = filled(shapes(sdxl))
    assert dialects.matches(tensor_file(tensors))[0].dialect == "onetrainer"
    adapter = read("onetrainer", tensors)
    assert adapter.base is not None and adapter.base.name == "sdxl" and not adapter.leftovers
    assert Target("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q") in adapter.deltas
    same(written("onetrainer", adapter).tensors, tensors)
    chroma = {
        "transformer.distilled_guidance_layer.layers.0.in_layer": (5120, 5120),
        "transformer.double_blocks.0.img_attn.qkv.2": (3072, 3072),
    }
    tensors = filled(shapes(chroma))
    adapter = read("onetrainer", tensors)
    assert adapter.base is not None and adapter.base.name == "chroma" and not adapter.leftovers
    same(written("onetrainer", adapter).tensors, tensors)


def test_from_its_own_to_omi_and_back() -> None:
    own = read("onetrainer", filled(shapes(OWN)))
    content = written("onetrainer", own, layout="omi")
    assert "transformer.double_blocks.0.img_attn.qkv.0.lora_up.weight" in content.tensors
    again = read("onetrainer", content.tensors)
    same(written("onetrainer", again, layout="onetrainer").tensors, filled(shapes(OWN)))


@pytest.mark.parametrize(("prefix", "base"), [("lora_te_", "chroma"), ("lora_te1_", "chroma"), ("lora_te3_", "flux.1-dev")])
def test_other_numbers_of_t5(prefix: str, base: str) -> None:
    modules = {f"{BLOCK}attn_to_q": (3072, 3072), f"{prefix}encoder_block_0_layer_0_SelfAttention_q": (4096, 4096)}
    if base == "flux.1-dev":
        modules["lora_te1_text_model_encoder_layers_0_mlp_fc1"] = (3072, 768)
    else:
        modules["lora_transformer_distilled_guidance_layer_in_proj"] = (5120, 64)
    tensors = filled(shapes(modules))
    adapter = read("onetrainer", tensors)
    assert not adapter.leftovers and adapter.base is not None and adapter.base.name == base
    same(written("onetrainer", adapter).tensors, tensors)


def test_bundled_tokens_ride_along() -> None:
    tensors = filled(
        {**shapes(OWN), "bundle_emb.<cat>.clip_l": [2, 768], "bundle_emb.<cat>.t5": [2, 4096], "bundle_emb.<cat>.t5_out": [2, 4096]}
    )
    adapter = read("onetrainer", tensors)
    assert not adapter.leftovers and {extra.name for extra in adapter.extras} == {"<cat>.clip_l", "<cat>.t5", "<cat>.t5_out"}
    assert all(extra.kind is ExtraKind.TEXTUAL_INVERSION for extra in adapter.extras)
    same(written("onetrainer", adapter).tensors, tensors)
    same(written("comfyui", read("comfyui", written("comfyui", adapter).tensors)).tensors, written("comfyui", adapter).tensors)


def test_fused_weights_come_apart_into_its_names() -> None:
    name = "diffusion_model.double_blocks.0.img_attn.qkv"
    tensors = filled({f"{name}.lora_A.weight": [2, 3072], f"{name}.lora_B.weight": [9216, 2], f"{name}.alpha": []})
    content = written("onetrainer", read("comfyui", tensors))
    assert {name.split(".")[0] for name in content.tensors} == {f"{BLOCK}attn_to_{part}" for part in "qkv"}
    whole = tensors[f"{name}.lora_B.weight"].read()
    assert (content.tensors[f"{BLOCK}attn_to_k.lora_up.weight"].read() == whole[3072:6144]).all()
    with pytest.raises(RefusedError, match="fit this adapter alike"):
        written("comfyui", read("onetrainer", content.tensors))
    back = written("comfyui", read("onetrainer", content.tensors), base=FLUX)
    # The spelling of FLUX that diffusers reads as well.
    same(back.tensors, {key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): tensor for key, tensor in tensors.items()})


def test_an_alpha_that_is_absent_elsewhere_is_the_rank_here() -> None:
    module = "diffusion_model.double_blocks.0.img_attn.proj"
    tensors = filled({f"{module}.lora_A.weight": [2, 3072], f"{module}.lora_B.weight": [3072, 2]})
    content = written("onetrainer", read("comfyui", tensors, base=FLUX))
    assert content.tensors[f"{BLOCK}attn_to_out_0.alpha"].scalar() == 2.0
    bare = {name: tensor for name, tensor in content.tensors.items() if not name.endswith(".alpha")}
    same(written("onetrainer", read("onetrainer", bare, base=FLUX)).tensors, bare)


def test_what_it_has_no_words_or_names_for() -> None:
    adapter = read(
        "comfyui", filled({"img_in.lora_A.weight": [2, 64], "img_in.lora_B.weight": [3072, 2], "img_in.lora_B.bias": [3072]}), base=FLUX
    )
    with pytest.raises(RefusedError) as caught:
        written("onetrainer", adapter)
    assert "a delta of the bias" in str(caught.value.found)
    with pytest.raises(RefusedError, match="names are those of kohya"):
        written("onetrainer", Adapter(dict(read("onetrainer", filled(shapes(OWN))).deltas), "kohya", layout="kohya"))
    with pytest.raises(RefusedError, match="no onetrainer names"):
        written("onetrainer", replace(adapter, base=None), base=inventory.load("sd1.5"))


def test_shapes_of_no_base_keep_the_names_of_the_file() -> None:
    for modules in ({**OWN, f"{BLOCK}attn_to_k": (3072, 64)}, {"transformer.double_blocks.0.img_attn.proj": (77, 77)}):
        tensors = filled(shapes(modules))
        adapter = read("onetrainer", tensors)
        assert (
            adapter.layout == "onetrainer" and not adapter.leftovers and [finding.code for finding in adapter.findings] == ["base-unknown"]
        )
        same(written("onetrainer", adapter).tensors, tensors)


def test_orphans_and_dead_files() -> None:
    adapter = read("onetrainer", filled({**shapes(OWN), f"{BLOCK}attn_to_k.lora_up.weight": [3072, 2]}))
    assert list(adapter.leftovers) == [f"{BLOCK}attn_to_k.lora_up.weight"] and [finding.code for finding in adapter.findings] == ["orphan"]
    with pytest.raises(DeadAdapterError):
        read("onetrainer", filled({f"{BLOCK}attn_to_k.lora_up.weight": [3072, 2]}))


def test_kohyas_and_diffusers_files_are_not_claimed() -> None:
    for name in (
        "lora_unet_double_blocks_0_img_attn_qkv", "lora_te1_text_model_encoder_layers_0_mlp_fc1", "transformer.transformer_blocks.0.attn.to_q",
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    ):  # fmt: skip
        assert dialects.get("onetrainer").match(tensor_file(filled(shapes({name: (4, 4)})))) is None, name
