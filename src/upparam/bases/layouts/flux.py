"""FLUX and Chroma under the names of Black Forest Labs' files (`double_blocks.0.img_attn.qkv`, `single_blocks.0.linear1`).

Source: black-forest-labs/flux src/flux/model.py; huggingface/diffusers single_file_utils.py (convert_flux_transformer_checkpoint_to_diffusers,
convert_flux2_transformer_checkpoint_to_diffusers, convert_chroma_transformer_checkpoint_to_diffusers).
"""

from __future__ import annotations

from upparam.bases.layouts.base import SWAP, Spot, Table, stacked

_TWO, _ONE = "transformer_blocks.{}.", "single_transformer_blocks.{}."
_DOUBLE, _SINGLE = "double_blocks.{}.", "single_blocks.{}."

_ATTENTION: dict[str, str | Spot] = {
    **stacked(_DOUBLE + "img_attn.qkv", [_TWO + "attn.to_q", _TWO + "attn.to_k", _TWO + "attn.to_v"]),
    **stacked(_DOUBLE + "txt_attn.qkv", [_TWO + "attn.add_q_proj", _TWO + "attn.add_k_proj", _TWO + "attn.add_v_proj"]),
    _TWO + "attn.to_out.0": _DOUBLE + "img_attn.proj",
    _TWO + "attn.to_add_out": _DOUBLE + "txt_attn.proj",
    _TWO + "attn.norm_q": Spot(_DOUBLE + "img_attn.norm.query_norm", weight=".scale"),
    _TWO + "attn.norm_k": Spot(_DOUBLE + "img_attn.norm.key_norm", weight=".scale"),
    _TWO + "attn.norm_added_q": Spot(_DOUBLE + "txt_attn.norm.query_norm", weight=".scale"),
    _TWO + "attn.norm_added_k": Spot(_DOUBLE + "txt_attn.norm.key_norm", weight=".scale"),
    _ONE + "attn.norm_q": Spot(_SINGLE + "norm.query_norm", weight=".scale"),
    _ONE + "attn.norm_k": Spot(_SINGLE + "norm.key_norm", weight=".scale"),
    "context_embedder": "txt_in",
    "x_embedder": "img_in",
    # The original computes (shift, scale) in its last modulation, diffusers (scale, shift).
    "norm_out.linear": Spot("final_layer.adaLN_modulation.1", order=SWAP),
    "proj_out": "final_layer.linear",
}

FLUX = Table(
    {
        **_ATTENTION,
        "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
        "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
        "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
        "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
        "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
        _TWO + "norm1.linear": _DOUBLE + "img_mod.lin",
        _TWO + "norm1_context.linear": _DOUBLE + "txt_mod.lin",
        _TWO + "ff.net.0.proj": _DOUBLE + "img_mlp.0",
        _TWO + "ff.net.2": _DOUBLE + "img_mlp.2",
        _TWO + "ff_context.net.0.proj": _DOUBLE + "txt_mlp.0",
        _TWO + "ff_context.net.2": _DOUBLE + "txt_mlp.2",
        _ONE + "norm.linear": _SINGLE + "modulation.lin",
        **stacked(_SINGLE + "linear1", [_ONE + "attn.to_q", _ONE + "attn.to_k", _ONE + "attn.to_v", _ONE + "proj_mlp"]),
        _ONE + "proj_out": _SINGLE + "linear2",
        # Chroma computes every modulation in one small network instead.
        "distilled_guidance_layer.in_proj": "distilled_guidance_layer.in_proj",
        "distilled_guidance_layer.out_proj": "distilled_guidance_layer.out_proj",
        "distilled_guidance_layer.layers.{}.linear_1": "distilled_guidance_layer.layers.{}.in_layer",
        "distilled_guidance_layer.layers.{}.linear_2": "distilled_guidance_layer.layers.{}.out_layer",
        "distilled_guidance_layer.norms.{}": Spot("distilled_guidance_layer.norms.{}", weight=".scale"),
    }
)
"""FLUX.1 and Chroma: reference names of the transformer -> the original's."""

FLUX2 = Table(
    {
        **_ATTENTION,
        "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
        "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
        "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
        "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
        "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
        "single_stream_modulation.linear": "single_stream_modulation.lin",
        _TWO + "ff.linear_in": _DOUBLE + "img_mlp.0",
        _TWO + "ff.linear_out": _DOUBLE + "img_mlp.2",
        _TWO + "ff_context.linear_in": _DOUBLE + "txt_mlp.0",
        _TWO + "ff_context.linear_out": _DOUBLE + "txt_mlp.2",
        _ONE + "attn.to_qkv_mlp_proj": _SINGLE + "linear1",
        _ONE + "attn.to_out": _SINGLE + "linear2",
    }
)
"""FLUX.2: the same blocks, modulation shared between them."""
