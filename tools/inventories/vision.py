"""Vision, speech and two-tower models. Config values are those of the public models' config.json (SAM: segment_anything/build_sam.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from inventories import Entry, Row, linear, norm, on_meta, trace
from inventories.text import hf

ENTRIES: list[Entry] = []


def add(
    name: str, family: str, title: str, build: Callable[[], list[Row]], config: dict[str, Any], *ids: str, variant_of: str | None = None
) -> None:
    """Register a base."""
    ENTRIES.append(Entry(name, family, title, build, config, ids, variant_of))


def vit_layer(prefix: str, width: int, ffn: int) -> list[Row]:
    """One encoder layer of ViT under its public names and in the order transformers 4 builds it (5 renames and reorders it)."""
    attention = [linear(f"{prefix}.attention.attention.{name}", width, width) for name in ("query", "key", "value")]
    return [
        *attention,
        linear(f"{prefix}.attention.output.dense", width, width),
        linear(f"{prefix}.intermediate.dense", ffn, width),
        linear(f"{prefix}.output.dense", width, ffn),
        norm(f"{prefix}.layernorm_before", width),
        norm(f"{prefix}.layernorm_after", width),
    ]


def vit(width: int, ffn: int, layers: int, patch: int, classes: int) -> list[Row]:
    """ViTForImageClassification."""
    rows = [Row("vit.embeddings.patch_embeddings.projection", "Conv2d", (width, 3, patch, patch), True)]
    for layer in range(layers):
        rows += vit_layer(f"vit.encoder.layer.{layer}", width, ffn)
    return [*rows, norm("vit.layernorm", width), linear("classifier", classes, width)]


def dinov2(width: int, layers: int, swiglu: bool) -> list[Row]:
    """Dinov2Model (no head)."""
    rows = [Row("embeddings.patch_embeddings.projection", "Conv2d", (width, 3, 14, 14), True)]
    for layer in range(layers):
        at = f"encoder.layer.{layer}"
        hidden = (int(4 * width * 2 / 3) + 7) // 8 * 8
        mlp = (
            [linear(f"{at}.mlp.weights_in", 2 * hidden, width), linear(f"{at}.mlp.weights_out", width, hidden)]
            if swiglu
            else [linear(f"{at}.mlp.fc1", 4 * width, width), linear(f"{at}.mlp.fc2", width, 4 * width)]
        )
        rows += [
            norm(f"{at}.norm1", width),
            *[linear(f"{at}.attention.attention.{name}", width, width) for name in ("query", "key", "value")],
            linear(f"{at}.attention.output.dense", width, width),
            norm(f"{at}.norm2", width),
            *mlp,
        ]
    return [*rows, norm("layernorm", width)]


def sam(width: int, layers: int) -> list[Row]:
    """Segment Anything as facebookresearch/segment-anything names it (segment_anything/modeling), modules in construction order."""
    rows = [Row("image_encoder.patch_embed.proj", "Conv2d", (width, 3, 16, 16), True)]
    for layer in range(layers):
        at = f"image_encoder.blocks.{layer}"
        rows += [norm(f"{at}.norm1", width), linear(f"{at}.attn.qkv", 3 * width, width), linear(f"{at}.attn.proj", width, width)]
        rows += [norm(f"{at}.norm2", width), linear(f"{at}.mlp.lin1", 4 * width, width), linear(f"{at}.mlp.lin2", width, 4 * width)]
    rows += [
        Row("image_encoder.neck.0", "Conv2d", (256, width, 1, 1), False),
        norm("image_encoder.neck.1", 256, "LayerNorm2d"),
        Row("image_encoder.neck.2", "Conv2d", (256, 256, 3, 3), False),
        norm("image_encoder.neck.3", 256, "LayerNorm2d"),
        *[Row(f"prompt_encoder.point_embeddings.{index}", "Embedding", (1, 256), False) for index in range(4)],
        Row("prompt_encoder.not_a_point_embed", "Embedding", (1, 256), False),
        Row("prompt_encoder.mask_downscaling.0", "Conv2d", (4, 1, 2, 2), True),
        norm("prompt_encoder.mask_downscaling.1", 4, "LayerNorm2d"),
        Row("prompt_encoder.mask_downscaling.3", "Conv2d", (16, 4, 2, 2), True),
        norm("prompt_encoder.mask_downscaling.4", 16, "LayerNorm2d"),
        Row("prompt_encoder.mask_downscaling.6", "Conv2d", (256, 16, 1, 1), True),
        Row("prompt_encoder.no_mask_embed", "Embedding", (1, 256), False),
    ]

    def attention(at: str, inner: int) -> list[Row]:
        return [*[linear(f"{at}.{name}_proj", inner, 256) for name in "qkv"], linear(f"{at}.out_proj", 256, inner)]

    for layer in range(2):
        at = f"mask_decoder.transformer.layers.{layer}"
        rows += [*attention(f"{at}.self_attn", 256), norm(f"{at}.norm1", 256)]
        rows += [*attention(f"{at}.cross_attn_token_to_image", 128), norm(f"{at}.norm2", 256)]
        rows += [
            linear(f"{at}.mlp.lin1", 2048, 256),
            linear(f"{at}.mlp.lin2", 256, 2048),
            norm(f"{at}.norm3", 256),
            norm(f"{at}.norm4", 256),
        ]
        rows += attention(f"{at}.cross_attn_image_to_token", 128)
    rows += [*attention("mask_decoder.transformer.final_attn_token_to_image", 128), norm("mask_decoder.transformer.norm_final_attn", 256)]
    rows += [
        Row("mask_decoder.iou_token", "Embedding", (1, 256), False),
        Row("mask_decoder.mask_tokens", "Embedding", (4, 256), False),
        Row("mask_decoder.output_upscaling.0", "ConvTranspose2d", (256, 64, 2, 2), True),
        norm("mask_decoder.output_upscaling.1", 64, "LayerNorm2d"),
        Row("mask_decoder.output_upscaling.3", "ConvTranspose2d", (64, 32, 2, 2), True),
    ]
    for index in range(4):
        at = f"mask_decoder.output_hypernetworks_mlps.{index}.layers"
        rows += [linear(f"{at}.0", 256, 256), linear(f"{at}.1", 256, 256), linear(f"{at}.2", 32, 256)]
    at = "mask_decoder.iou_prediction_head.layers"
    return [*rows, linear(f"{at}.0", 256, 256), linear(f"{at}.1", 256, 256), linear(f"{at}.2", 4, 256)]


def clip(text: tuple[int, int, int, int], vision: tuple[int, int, int, int, int, int], projection: int) -> list[Row]:
    """CLIPModel, both towers."""
    import transformers

    words = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size", "image_size")
    settings = transformers.CLIPConfig(
        text_config=dict(zip(words, text, strict=False)), vision_config=dict(zip(words, vision, strict=True)), projection_dim=projection
    )
    return trace(on_meta(lambda: transformers.CLIPModel(settings)))


def _register() -> None:
    for name, title, width, ffn, layers, heads, patch, size, classes, *ids in (
        ("vit-base-patch16-224", "ViT base, patch 16", 768, 3072, 12, 12, 16, 224, 1000, "google/vit-base-patch16-224"),
        ("vit-base-patch16-224-in21k", "ViT base, patch 16, 21k classes", 768, 3072, 12, 12, 16, 224, 21843, "google/vit-base-patch16-224-in21k"),
        ("vit-base-patch32-384", "ViT base, patch 32", 768, 3072, 12, 12, 32, 384, 1000, "google/vit-base-patch32-384"),
        ("vit-large-patch16-224", "ViT large, patch 16", 1024, 4096, 24, 16, 16, 224, 1000, "google/vit-large-patch16-224"),
        ("vit-large-patch16-224-in21k", "ViT large, patch 16, 21k classes", 1024, 4096, 24, 16, 16, 224, 21843,
         "google/vit-large-patch16-224-in21k"),
    ):  # fmt: skip
        config = {"model_type": "vit", "hidden_size": width, "intermediate_size": ffn, "num_hidden_layers": layers,
                  "num_attention_heads": heads, "patch_size": patch, "image_size": size}  # fmt: skip

        def rows(width: int = width, ffn: int = ffn, layers: int = layers, patch: int = patch, classes: int = classes) -> list[Row]:
            return vit(width, ffn, layers, patch, classes)

        add(name, "vit", title, rows, config, *ids, variant_of=name.removesuffix("-in21k") if name.endswith("-in21k") else None)
    for size, width, layers, heads in (("small", 384, 12, 6), ("base", 768, 12, 12), ("large", 1024, 24, 16), ("giant", 1536, 40, 24)):
        swiglu = size == "giant"
        config = {"model_type": "dinov2", "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "patch_size": 14}
        add(
            f"dinov2-{size}",
            "dinov2",
            f"DINOv2 {size}",
            lambda w=width, n=layers, s=swiglu: dinov2(w, n, s),
            config,
            f"facebook/dinov2-{size}",
        )
    for size, width, layers in (("b", 768, 12), ("l", 1024, 24), ("h", 1280, 32)):
        word = {"b": "base", "l": "large", "h": "huge"}[size]
        add(f"sam-vit-{size}", "sam", f"Segment Anything ViT-{size.upper()}", lambda w=width, n=layers: sam(w, n), {}, f"facebook/sam-vit-{word}",
            f"sam_vit_{size}")  # fmt: skip
    for name, title, text, vision, projection, *ids in (
        ("clip-vit-base-patch32", "CLIP ViT-B/32", (512, 2048, 12, 8), (768, 3072, 12, 12, 32, 224), 512, "openai/clip-vit-base-patch32"),
        ("clip-vit-base-patch16", "CLIP ViT-B/16", (512, 2048, 12, 8), (768, 3072, 12, 12, 16, 224), 512, "openai/clip-vit-base-patch16"),
        ("clip-vit-large-patch14", "CLIP ViT-L/14", (768, 3072, 12, 12), (1024, 4096, 24, 16, 14, 224), 768, "openai/clip-vit-large-patch14"),
        ("clip-vit-h-14", "OpenCLIP ViT-H/14", (1024, 4096, 24, 16), (1280, 5120, 32, 16, 14, 224), 1024, "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
        ("clip-vit-bigg-14", "OpenCLIP ViT-bigG/14", (1280, 5120, 32, 20), (1664, 8192, 48, 16, 14, 224), 1280,
         "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"),
    ):  # fmt: skip
        config = {
            "model_type": "clip", "projection_dim": projection,
            "text_config": {"hidden_size": text[0], "num_hidden_layers": text[2]},
            "vision_config": {"hidden_size": vision[0], "num_hidden_layers": vision[2], "patch_size": vision[4]},
        }  # fmt: skip
        add(name, "clip", title, lambda t=text, v=vision, p=projection: clip(t, v, p), config, *ids)
    for size, width, layers, heads, mels, vocab, decoder, *ids in (
        ("tiny", 384, 4, 6, 80, 51865, 4), ("tiny.en", 384, 4, 6, 80, 51864, 4), ("base", 512, 6, 8, 80, 51865, 6),
        ("base.en", 512, 6, 8, 80, 51864, 6), ("small", 768, 12, 12, 80, 51865, 12), ("small.en", 768, 12, 12, 80, 51864, 12),
        ("medium", 1024, 24, 16, 80, 51865, 24), ("medium.en", 1024, 24, 16, 80, 51864, 24),
        ("large-v2", 1280, 32, 20, 80, 51865, 32, "openai/whisper-large", "openai/whisper-large-v1"),
        ("large-v3", 1280, 32, 20, 128, 51866, 32), ("large-v3-turbo", 1280, 32, 20, 128, 51866, 4),
    ):  # fmt: skip
        config = {
            "model_type": "whisper", "d_model": width, "encoder_layers": layers, "decoder_layers": decoder, "encoder_attention_heads": heads,
            "decoder_attention_heads": heads, "encoder_ffn_dim": 4 * width, "decoder_ffn_dim": 4 * width, "num_mel_bins": mels, "vocab_size": vocab,
        }  # fmt: skip
        add(f"whisper-{size}", "whisper", f"Whisper {size}", lambda c=config: hf("WhisperForConditionalGeneration", c), config,
            f"openai/whisper-{size}", *ids)  # fmt: skip


_register()
