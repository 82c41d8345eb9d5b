"""Stable Diffusion 3 under the names of Stability's files (`joint_blocks.0.x_block.attn.qkv`).

Source: Stability-AI/sd3.5 mmditx.py; huggingface/diffusers single_file_utils.py (convert_sd3_transformer_checkpoint_to_diffusers).
"""

from __future__ import annotations

from upparam.bases.base import Base
from upparam.bases.layouts.base import SWAP, Naming, Spot, Table, stacked

_HERE, _IMAGE, _TEXT = "transformer_blocks.{}.", "joint_blocks.{}.x_block.", "joint_blocks.{}.context_block."

_BLOCKS: dict[str, str | Spot] = {
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    **stacked(_IMAGE + "attn.qkv", [f"{_HERE}attn.to_{part}" for part in "qkv"]),
    **stacked(_TEXT + "attn.qkv", [f"{_HERE}attn.add_{part}_proj" for part in "qkv"]),
    **stacked(_IMAGE + "attn2.qkv", [f"{_HERE}attn2.to_{part}" for part in "qkv"]),
    _HERE + "attn.norm_q": _IMAGE + "attn.ln_q",
    _HERE + "attn.norm_k": _IMAGE + "attn.ln_k",
    _HERE + "attn.norm_added_q": _TEXT + "attn.ln_q",
    _HERE + "attn.norm_added_k": _TEXT + "attn.ln_k",
    _HERE + "attn2.norm_q": _IMAGE + "attn2.ln_q",
    _HERE + "attn2.norm_k": _IMAGE + "attn2.ln_k",
    _HERE + "attn.to_out.0": _IMAGE + "attn.proj",
    _HERE + "attn.to_add_out": _TEXT + "attn.proj",
    _HERE + "attn2.to_out.0": _IMAGE + "attn2.proj",
    _HERE + "norm1.linear": _IMAGE + "adaLN_modulation.1",
    _HERE + "norm1_context.linear": _TEXT + "adaLN_modulation.1",
    _HERE + "ff.net.0.proj": _IMAGE + "mlp.fc1",
    _HERE + "ff.net.2": _IMAGE + "mlp.fc2",
    _HERE + "ff_context.net.0.proj": _TEXT + "mlp.fc1",
    _HERE + "ff_context.net.2": _TEXT + "mlp.fc2",
    "norm_out.linear": Spot("final_layer.adaLN_modulation.1", order=SWAP),
    "proj_out": "final_layer.linear",
}


def sd3(base: Base, component: str = "transformer.") -> Naming:
    """The naming of this base's transformer: the last block's text modulation is a final one (shift and scale only, halves swapped)."""
    start = component + "transformer_blocks."
    last = max(int(module.path[len(start) :].split(".")[0]) for module in base.modules if module.path.startswith(start))
    swapped = Spot(f"joint_blocks.{last}.context_block.adaLN_modulation.1", order=SWAP)
    return Table({f"transformer_blocks.{last}.norm1_context.linear": swapped, **_BLOCKS})
