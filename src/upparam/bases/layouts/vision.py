"""Vision models under the names of their other homes: SAM as transformers has it, ViT as timm has it.

Sources: huggingface/transformers src/transformers/models/sam/convert_sam_to_hf.py; huggingface/pytorch-image-models
timm/models/vision_transformer.py (q, k and v in one `attn.qkv`).
"""

from __future__ import annotations

import re

from upparam.bases.base import Base
from upparam.bases.layouts.base import Component, LayoutMap, Spot, Table, assemble, has, stacked

_SAM = (
    (r"^image_encoder\.patch_embed\.proj", "vision_encoder.patch_embed.projection"),
    (r"^image_encoder\.blocks\.", "vision_encoder.layers."),
    (r"^image_encoder\.neck\.0", "vision_encoder.neck.conv1"),
    (r"^image_encoder\.neck\.1", "vision_encoder.neck.layer_norm1"),
    (r"^image_encoder\.neck\.2", "vision_encoder.neck.conv2"),
    (r"^image_encoder\.neck\.3", "vision_encoder.neck.layer_norm2"),
    (r"(?<=layers\.\d)\.norm([12])$", r".layer_norm\1"),
    (r"(?<=layers\.\d\d)\.norm([12])$", r".layer_norm\1"),
    (r"^prompt_encoder\.point_embeddings\.", "prompt_encoder.point_embed."),
    (r"^prompt_encoder\.mask_downscaling\.0", "prompt_encoder.mask_embed.conv1"),
    (r"^prompt_encoder\.mask_downscaling\.1", "prompt_encoder.mask_embed.layer_norm1"),
    (r"^prompt_encoder\.mask_downscaling\.3", "prompt_encoder.mask_embed.conv2"),
    (r"^prompt_encoder\.mask_downscaling\.4", "prompt_encoder.mask_embed.layer_norm2"),
    (r"^prompt_encoder\.mask_downscaling\.6", "prompt_encoder.mask_embed.conv3"),
    (r"^(mask_decoder\.transformer\..*)\.norm([1-4])$", r"\1.layer_norm\2"),
    (r"^mask_decoder\.transformer\.norm_final_attn", "mask_decoder.transformer.layer_norm_final_attn"),
    (r"^mask_decoder\.output_upscaling\.0", "mask_decoder.upscale_conv1"),
    (r"^mask_decoder\.output_upscaling\.1", "mask_decoder.upscale_layer_norm"),
    (r"^mask_decoder\.output_upscaling\.3", "mask_decoder.upscale_conv2"),
    (r"(mask_decoder\.(?:output_hypernetworks_mlps\.\d|iou_prediction_head))\.layers\.0$", r"\1.proj_in"),
    (r"(mask_decoder\.(?:output_hypernetworks_mlps\.\d|iou_prediction_head))\.layers\.1$", r"\1.layers.0"),
    (r"(mask_decoder\.(?:output_hypernetworks_mlps\.\d|iou_prediction_head))\.layers\.2$", r"\1.proj_out"),
)


def sam_hf(base: Base) -> LayoutMap | None:
    """Segment Anything under transformers' names."""
    if not has(base, "image_encoder.blocks.0.attn.qkv"):
        return None

    def name(path: str) -> str:
        for pattern, replacement in _SAM:
            path = re.sub(pattern, replacement, path)
        return path

    return assemble("sam-hf", base, [Component("", name)])


_LAYER = "vit.encoder.layer.{}."
_TIMM = Table(
    {
        "vit.embeddings.patch_embeddings.projection": "patch_embed.proj",
        **stacked("blocks.{}.attn.qkv", [f"{_LAYER}attention.attention.{part}" for part in ("query", "key", "value")]),
        _LAYER + "attention.output.dense": "blocks.{}.attn.proj",
        _LAYER + "intermediate.dense": "blocks.{}.mlp.fc1",
        _LAYER + "output.dense": "blocks.{}.mlp.fc2",
        _LAYER + "layernorm_before": "blocks.{}.norm1",
        _LAYER + "layernorm_after": "blocks.{}.norm2",
        "vit.layernorm": "norm",
        "vit.pooler.dense": Spot("pre_logits.fc"),
        "classifier": "head",
    }
)


def timm(base: Base) -> LayoutMap | None:
    """ViT under timm's names."""
    return assemble("timm", base, [Component("", _TIMM)]) if has(base, "vit.encoder.layer.0.attention.attention.query") else None
