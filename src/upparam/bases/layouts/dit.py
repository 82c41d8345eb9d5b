"""Wan, Lumina 2, Z-Image, Krea 2, HunyuanVideo, LTX-Video and Cosmos-Predict2 (with it Anima) under the names of their authors' files.

Sources: huggingface/diffusers src/diffusers/loaders/single_file_utils.py (convert_wan_transformer_to_diffusers,
convert_lumina2_to_diffusers, convert_z_image_transformer_checkpoint_to_diffusers, convert_krea2_transformer_checkpoint_to_diffusers,
convert_hunyuan_video_transformer_to_diffusers, convert_ltx_transformer_checkpoint_to_diffusers,
convert_cosmos_transformer_checkpoint_to_diffusers); kohya-ss/sd-scripts library/anima_models.py;
Wan-Video/Wan2.1 wan/modules/model.py; Alpha-VLLM/Lumina-Image-2.0 models/model.py.
"""

from __future__ import annotations

from upparam.bases.layouts.base import SWAP, Spot, Table, stacked


def _wan() -> dict[str, str | Spot]:
    lines: dict[str, str | Spot] = {
        "patch_embedding": "patch_embedding",
        "condition_embedder.time_embedder.linear_1": "time_embedding.0",
        "condition_embedder.time_embedder.linear_2": "time_embedding.2",
        "condition_embedder.time_proj": "time_projection.1",
        "condition_embedder.text_embedder.linear_1": "text_embedding.0",
        "condition_embedder.text_embedder.linear_2": "text_embedding.2",
        "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
        "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
        "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
        "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
        # The original numbers the norms in the order of use, diffusers in the order of its other models.
        "blocks.{}.norm1": "blocks.{}.norm1",
        "blocks.{}.norm2": "blocks.{}.norm3",
        "blocks.{}.norm3": "blocks.{}.norm2",
        "blocks.{}.ffn.net.0.proj": "blocks.{}.ffn.0",
        "blocks.{}.ffn.net.2": "blocks.{}.ffn.2",
        "proj_out": "head.head",
    }
    attention = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o", "norm_q": "norm_q", "norm_k": "norm_k"}
    image = {"add_k_proj": "k_img", "add_v_proj": "v_img", "norm_added_k": "norm_k_img"}
    for ours, theirs, parts in (("attn1", "self_attn", attention), ("attn2", "cross_attn", attention | image)):
        lines |= {f"blocks.{{}}.{ours}.{part}": f"blocks.{{}}.{theirs}.{name}" for part, name in parts.items()}
    return lines


def _lumina2() -> dict[str, str | Spot]:
    lines: dict[str, str | Spot] = {
        "x_embedder": "x_embedder",
        "time_caption_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_caption_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_caption_embed.caption_embedder.{}": "cap_embedder.{}",
        "norm_out.linear_1": "final_layer.adaLN_modulation.1",
        "norm_out.linear_2": "final_layer.linear",
    }
    parts = {
        "attn.norm_q": "attention.q_norm", "attn.norm_k": "attention.k_norm", "attn.to_out.0": "attention.out",
        "feed_forward.linear_1": "feed_forward.w1", "feed_forward.linear_2": "feed_forward.w2", "feed_forward.linear_3": "feed_forward.w3",
        "norm1.linear": "adaLN_modulation.1", "norm1.norm": "attention_norm1", "norm1": "attention_norm1", "norm2": "attention_norm2",
        "ffn_norm1": "ffn_norm1", "ffn_norm2": "ffn_norm2",
    }  # fmt: skip
    for group in ("noise_refiner", "context_refiner", "layers"):
        lines |= {f"{group}.{{}}.{part}": f"{group}.{{}}.{name}" for part, name in parts.items()}
        lines |= stacked(f"{group}.{{}}.attention.qkv", [f"{group}.{{}}.attn.to_{part}" for part in "qkv"])
    return lines


def _z_image() -> dict[str, str | Spot]:
    lines: dict[str, str | Spot] = {
        "all_x_embedder.2-1": "x_embedder",
        "all_final_layer.2-1.linear": "final_layer.linear",
        "all_final_layer.2-1.adaLN_modulation.1": "final_layer.adaLN_modulation.1",
        "t_embedder.mlp.{}": "t_embedder.mlp.{}",
        "cap_embedder.{}": "cap_embedder.{}",
    }
    parts = {"attention.norm_q": "attention.q_norm", "attention.norm_k": "attention.k_norm", "attention.to_out.0": "attention.out"}
    kept = (
        "feed_forward.w1",
        "feed_forward.w2",
        "feed_forward.w3",
        "attention_norm1",
        "attention_norm2",
        "ffn_norm1",
        "ffn_norm2",
        "adaLN_modulation.0",
    )
    parts |= {name: name for name in kept}
    for group in ("noise_refiner", "context_refiner", "layers"):
        lines |= {f"{group}.{{}}.{part}": f"{group}.{{}}.{name}" for part, name in parts.items()}
        lines |= stacked(f"{group}.{{}}.attention.qkv", [f"{group}.{{}}.attention.to_{part}" for part in "qkv"])
    return lines


def _krea2() -> dict[str, str | Spot]:
    lines: dict[str, str | Spot] = {
        "img_in": "first",
        "time_embed.linear_1": "tmlp.0",
        "time_embed.linear_2": "tmlp.2",
        "time_mod_proj": "tproj.1",
        "txt_in.norm": Spot("txtmlp.0", weight=".scale"),
        "txt_in.linear_1": "txtmlp.1",
        "txt_in.linear_2": "txtmlp.3",
        "text_fusion.projector": "txtfusion.projector",
        "final_layer.linear": "last.linear",
        "final_layer.norm": Spot("last.norm", weight=".scale"),
    }
    parts: dict[str, str] = {
        "attn.to_q": "attn.wq", "attn.to_k": "attn.wk", "attn.to_v": "attn.wv", "attn.to_out.0": "attn.wo", "attn.to_gate": "attn.gate",
        "ff.gate": "mlp.gate", "ff.up": "mlp.up", "ff.down": "mlp.down",
    }  # fmt: skip
    norms = {"attn.norm_q": "attn.qknorm.qnorm", "attn.norm_k": "attn.qknorm.knorm", "norm1": "prenorm", "norm2": "postnorm"}
    groups = {
        "transformer_blocks": "blocks",
        "text_fusion.layerwise_blocks": "txtfusion.layerwise_blocks",
        "text_fusion.refiner_blocks": "txtfusion.refiner_blocks",
    }
    for ours, theirs in groups.items():
        lines |= {f"{ours}.{{}}.{part}": f"{theirs}.{{}}.{name}" for part, name in parts.items()}
        lines |= {f"{ours}.{{}}.{part}": Spot(f"{theirs}.{{}}.{name}", weight=".scale") for part, name in norms.items()}
    return lines


def _hunyuan_video() -> dict[str, str | Spot]:
    two, one, refiner = "transformer_blocks.{}.", "single_transformer_blocks.{}.", "context_embedder.token_refiner.refiner_blocks.{}."
    double, single, token = "double_blocks.{}.", "single_blocks.{}.", "txt_in.individual_token_refiner.blocks.{}."
    lines: dict[str, str | Spot] = {
        "x_embedder.proj": "img_in.proj",
        "context_embedder.proj_in": "txt_in.input_embedder",
        "context_embedder.time_text_embed.timestep_embedder.linear_1": "txt_in.t_embedder.mlp.0",
        "context_embedder.time_text_embed.timestep_embedder.linear_2": "txt_in.t_embedder.mlp.2",
        "context_embedder.time_text_embed.text_embedder.linear_1": "txt_in.c_embedder.linear_1",
        "context_embedder.time_text_embed.text_embedder.linear_2": "txt_in.c_embedder.linear_2",
        "time_text_embed.timestep_embedder.linear_1": "time_in.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "time_in.mlp.2",
        "time_text_embed.guidance_embedder.linear_1": "guidance_in.mlp.0",
        "time_text_embed.guidance_embedder.linear_2": "guidance_in.mlp.2",
        "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
        "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
        **stacked(token + "self_attn_qkv", [f"{refiner}attn.to_{part}" for part in "qkv"]),
        refiner + "attn.to_out.0": token + "self_attn_proj",
        refiner + "norm1": token + "norm1",
        refiner + "norm2": token + "norm2",
        refiner + "norm_out.linear": token + "adaLN_modulation.1",
        refiner + "ff.net.0.proj": token + "mlp.fc1",
        refiner + "ff.net.2": token + "mlp.fc2",
        **stacked(double + "img_attn_qkv", [f"{two}attn.to_{part}" for part in "qkv"]),
        **stacked(double + "txt_attn_qkv", [f"{two}attn.add_{part}_proj" for part in "qkv"]),
        two + "attn.norm_q": double + "img_attn_q_norm",
        two + "attn.norm_k": double + "img_attn_k_norm",
        two + "attn.norm_added_q": double + "txt_attn_q_norm",
        two + "attn.norm_added_k": double + "txt_attn_k_norm",
        two + "attn.to_out.0": double + "img_attn_proj",
        two + "attn.to_add_out": double + "txt_attn_proj",
        two + "norm1.linear": double + "img_mod.linear",
        two + "norm1_context.linear": double + "txt_mod.linear",
        two + "ff.net.0.proj": double + "img_mlp.fc1",
        two + "ff.net.2": double + "img_mlp.fc2",
        two + "ff_context.net.0.proj": double + "txt_mlp.fc1",
        two + "ff_context.net.2": double + "txt_mlp.fc2",
        one + "norm.linear": single + "modulation.linear",
        **stacked(single + "linear1", [one + "attn.to_q", one + "attn.to_k", one + "attn.to_v", one + "proj_mlp"]),
        one + "proj_out": single + "linear2",
        one + "attn.norm_q": single + "q_norm",
        one + "attn.norm_k": single + "k_norm",
        "norm_out.linear": Spot("final_layer.adaLN_modulation.1", order=SWAP),
        "proj_out": "final_layer.linear",
    }
    return lines


def _ltx() -> dict[str, str | Spot]:
    lines: dict[str, str | Spot] = {"proj_in": "patchify_proj", "time_embed.linear": "adaln_single.linear", "proj_out": "proj_out"}
    for number in (1, 2):
        lines[f"time_embed.emb.timestep_embedder.linear_{number}"] = f"adaln_single.emb.timestep_embedder.linear_{number}"
        lines[f"caption_projection.linear_{number}"] = f"caption_projection.linear_{number}"
        for part, name in (("norm_q", "q_norm"), ("norm_k", "k_norm"), *((part, part) for part in ("to_q", "to_k", "to_v", "to_out.0"))):
            lines[f"transformer_blocks.{{}}.attn{number}.{part}"] = f"transformer_blocks.{{}}.attn{number}.{name}"
    return lines | {f"transformer_blocks.{{}}.{part}": f"transformer_blocks.{{}}.{part}" for part in ("ff.net.0.proj", "ff.net.2")}


def _cosmos2() -> dict[str, str | Spot]:
    lines: dict[str, str | Spot] = {
        "patch_embed.proj": "x_embedder.proj.1",
        "time_embed.t_embedder.linear_1": "t_embedder.1.linear_1",
        "time_embed.t_embedder.linear_2": "t_embedder.1.linear_2",
        "time_embed.norm": "t_embedding_norm",
        "norm_out.linear_1": "final_layer.adaln_modulation.1",
        "norm_out.linear_2": "final_layer.adaln_modulation.2",
        "proj_out": "final_layer.linear",
        "transformer_blocks.{}.ff.net.0.proj": "blocks.{}.mlp.layer1",
        "transformer_blocks.{}.ff.net.2": "blocks.{}.mlp.layer2",
    }
    parts = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out.0": "output_proj", "norm_q": "q_norm", "norm_k": "k_norm"}
    for ours, theirs in (("attn1", "self_attn"), ("attn2", "cross_attn")):
        lines |= {f"transformer_blocks.{{}}.{ours}.{part}": f"blocks.{{}}.{theirs}.{name}" for part, name in parts.items()}
    for norm, theirs in (("norm1", "self_attn"), ("norm2", "cross_attn"), ("norm3", "mlp")):
        for step in (1, 2):
            lines[f"transformer_blocks.{{}}.{norm}.linear_{step}"] = f"blocks.{{}}.adaln_modulation_{theirs}.{step}"
    return lines


WAN = Table(_wan())
"""Wan 2.1 and 2.2."""
LUMINA2 = Table(_lumina2())
"""Lumina Image 2.0."""
Z_IMAGE = Table(_z_image())
"""Z-Image."""
KREA2 = Table(_krea2())
"""Krea 2."""
HUNYUAN_VIDEO = Table(_hunyuan_video())
"""HunyuanVideo."""
LTX = Table(_ltx())
"""LTX-Video."""
COSMOS2 = Table(_cosmos2())
"""Cosmos-Predict2 and Anima, whose file has it below `net.`."""
