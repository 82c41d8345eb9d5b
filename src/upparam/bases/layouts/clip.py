"""CLIP's text tower under OpenCLIP's names (`transformer.resblocks.0.attn.in_proj`: q, k and v in one weight).

Source: mlfoundations/open_clip src/open_clip/transformer.py; huggingface/diffusers single_file_utils.py (convert_open_clip_checkpoint).
"""

from __future__ import annotations

from upparam.bases.layouts.base import Spot, Table, stacked

_LAYER = "text_model.encoder.layers.{}."
_BLOCK = "transformer.resblocks.{}."

OPEN_CLIP = Table(
    {
        "text_model.embeddings.token_embedding": "token_embedding",
        "text_model.embeddings.position_embedding": Spot("positional_embedding", weight=""),
        **stacked(_BLOCK + "attn.in_proj", [f"{_LAYER}self_attn.{part}_proj" for part in "qkv"], weight="_weight"),
        _LAYER + "self_attn.out_proj": _BLOCK + "attn.out_proj",
        _LAYER + "layer_norm1": _BLOCK + "ln_1",
        _LAYER + "layer_norm2": _BLOCK + "ln_2",
        _LAYER + "mlp.fc1": _BLOCK + "mlp.c_fc",
        _LAYER + "mlp.fc2": _BLOCK + "mlp.c_proj",
        "text_model.final_layer_norm": "ln_final",
        # open_clip multiplies by the bare parameter from the right, transformers keeps it as a Linear's weight.
        "text_projection": Spot("text_projection", weight="", transposed=True),
    }
)
"""Reference names of a text encoder -> OpenCLIP's."""
