"""Image and video pipelines: the denoiser and the text encoders adapters change. Values are those of the public models' config.json."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from inventories import Entry, Row, on_meta, prefixed, trace
from inventories.text import clip_text, hf, t5_encoder

ENTRIES: list[Entry] = []


def denoiser(prefix: str, class_name: str, config: dict[str, Any]) -> list[Row]:
    """The rows of a diffusers model class under a component prefix."""
    import diffusers

    return trace(on_meta(lambda: getattr(diffusers, class_name)(**config)), prefix)


def clip_l(prefix: str, projection: bool = False) -> list[Row]:
    """The text tower of openai/clip-vit-large-patch14."""
    return prefixed(prefix, clip_text(768, 3072, 12, 12, 768 if projection else None))


def clip_g(prefix: str) -> list[Row]:
    """The text tower of laion/CLIP-ViT-bigG-14, with its projection."""
    return prefixed(prefix, clip_text(1280, 5120, 32, 20, 1280))


def t5_xxl(prefix: str) -> list[Row]:
    """The encoder of T5 v1.1 XXL."""
    return prefixed(prefix, t5_encoder())


def umt5_xxl(prefix: str) -> list[Row]:
    """The encoder of google/umt5-xxl."""
    import transformers

    settings = transformers.UMT5Config(
        d_model=4096,
        d_ff=10240,
        d_kv=64,
        num_layers=24,
        num_heads=64,
        vocab_size=256384,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return prefixed(prefix, trace(on_meta(lambda: transformers.UMT5EncoderModel(settings))))


def add(
    name: str, family: str, title: str, class_name: str, config: dict[str, Any], *ids: str,
    text: Callable[[], list[Row]] = list, prefix: str = "transformer.", variant_of: str | None = None,
) -> None:  # fmt: skip
    """Register a pipeline: denoiser first, then its text encoders."""

    def build() -> list[Row]:
        return [*denoiser(prefix, class_name, config), *text()]

    ENTRIES.append(Entry(name, family, title, build, {"_class_name": class_name, **config}, ids, variant_of))


def _stable_diffusion() -> None:
    cross, plain = "CrossAttnDownBlock2D", "DownBlock2D"
    up = {cross: "CrossAttnUpBlock2D", plain: "UpBlock2D"}

    def unet(name: str, title: str, downs: list[str], config: dict[str, Any], text: Callable[[], list[Row]], *ids: str) -> None:
        blocks = {"down_block_types": downs, "up_block_types": [up[kind] for kind in reversed(downs)]}
        parent = name.removesuffix("-inpainting")
        add(name, "sd", title, "UNet2DConditionModel", {**blocks, **config}, *ids, text=text, prefix="unet.",
            variant_of=parent if parent != name else None)  # fmt: skip

    four = [cross, cross, cross, plain]
    widths = [320, 640, 1280, 1280]
    sd1 = {"block_out_channels": widths, "attention_head_dim": 8, "cross_attention_dim": 768, "in_channels": 4}
    sd2 = {
        "block_out_channels": widths,
        "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
        "in_channels": 4,
    }

    def clip_h() -> list[Row]:
        return prefixed("text_encoder.", clip_text(1024, 4096, 23, 16))

    unet("sd1.5", "Stable Diffusion 1.x", four, sd1, lambda: clip_l("text_encoder."), "runwayml/stable-diffusion-v1-5",
         "stable-diffusion-v1-5/stable-diffusion-v1-5", "CompVis/stable-diffusion-v1-4", "CompVis/stable-diffusion-v1-1", "sd1", "sd15",
         "sd1.4", "sd_v1", "stable-diffusion-v1-5", "sd_1.5", "SD 1.5", "Lykon/dreamshaper-8", "SG161222/Realistic_Vision_V5.1_noVAE")  # fmt: skip
    unet("sd1.5-inpainting", "Stable Diffusion 1.x inpainting", four, sd1 | {"in_channels": 9}, lambda: clip_l("text_encoder."),
         "runwayml/stable-diffusion-inpainting", "stable-diffusion-v1-5/stable-diffusion-inpainting")  # fmt: skip
    unet("sd2", "Stable Diffusion 2.x", four, sd2, clip_h, "stabilityai/stable-diffusion-2", "stabilityai/stable-diffusion-2-base",
         "stabilityai/stable-diffusion-2-1", "stabilityai/stable-diffusion-2-1-base", "sd2.1", "sd21", "sd20", "sd2.0", "sd_v2",
         "stable-diffusion-v2-1", "stable-diffusion-2-1", "SD 2.1")  # fmt: skip
    unet("sd2-inpainting", "Stable Diffusion 2 inpainting", four, sd2 | {"in_channels": 9}, clip_h,
         "stabilityai/stable-diffusion-2-inpainting")  # fmt: skip
    sdxl = {
        "block_out_channels": widths[:3], "transformer_layers_per_block": [1, 2, 10], "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048, "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816, "in_channels": 4,
    }  # fmt: skip
    both: Callable[[], list[Row]] = lambda: [*clip_l("text_encoder."), *clip_g("text_encoder_2.")]  # noqa: E731
    unet("sdxl", "Stable Diffusion XL", [plain, cross, cross], sdxl, both, "stabilityai/stable-diffusion-xl-base-1.0", "stabilityai/sdxl-turbo",
         "sdxl1.0", "sdxl_base_v1-0", "sdxl-base", "stable-diffusion-xl-v1-base", "SDXL 1.0", "cagliostrolab/animagine-xl-3.1",
         "stablediffusionapi/pony-diffusion-v6-xl", "pony", "illustrious", "OnomaAIResearch/Illustrious-xl-early-release-v0")  # fmt: skip
    unet("sdxl-inpainting", "Stable Diffusion XL inpainting", [plain, cross, cross], sdxl | {"in_channels": 9}, both,
         "diffusers/stable-diffusion-xl-1.0-inpainting-0.1")  # fmt: skip
    refiner = {
        "block_out_channels": [384, 768, 1536, 1536], "transformer_layers_per_block": 4, "attention_head_dim": [6, 12, 24, 24],
        "cross_attention_dim": 1280, "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2560, "in_channels": 4,
    }  # fmt: skip
    unet("sdxl-refiner", "Stable Diffusion XL refiner", [plain, cross, cross, plain], refiner, lambda: clip_g("text_encoder_2."),
         "stabilityai/stable-diffusion-xl-refiner-1.0", "stable-diffusion-xl-v1-refiner")  # fmt: skip


def _mmdit() -> None:
    def three() -> list[Row]:
        return [*clip_l("text_encoder.", projection=True), *clip_g("text_encoder_2."), *t5_xxl("text_encoder_3.")]

    def sd3(name: str, title: str, layers: int, size: int, *ids: str, **more: Any) -> None:
        config = {"num_layers": layers, "num_attention_heads": layers, "attention_head_dim": 64, "joint_attention_dim": 4096,
                  "caption_projection_dim": 64 * layers, "pooled_projection_dim": 2048, "pos_embed_max_size": size, **more}  # fmt: skip
        add(name, "sd3", title, "SD3Transformer2DModel", config, *ids, text=three)

    sd3("sd3-medium", "Stable Diffusion 3 medium", 24, 192, "stabilityai/stable-diffusion-3-medium",
        "stabilityai/stable-diffusion-3-medium-diffusers", "sd3", "SD 3", "stable-diffusion-3-medium")  # fmt: skip
    sd3("sd3.5-medium", "Stable Diffusion 3.5 medium", 24, 384, "stabilityai/stable-diffusion-3.5-medium", qk_norm="rms_norm",
        dual_attention_layers=list(range(13)))  # fmt: skip
    sd3("sd3.5-large", "Stable Diffusion 3.5 large", 38, 192, "stabilityai/stable-diffusion-3.5-large",
        "stabilityai/stable-diffusion-3.5-large-turbo", qk_norm="rms_norm")  # fmt: skip

    def two() -> list[Row]:
        return [*clip_l("text_encoder."), *t5_xxl("text_encoder_2.")]

    def flux(name: str, title: str, *ids: str, **more: Any) -> None:
        config = {"num_layers": 19, "num_single_layers": 38, "num_attention_heads": 24, "attention_head_dim": 128, "joint_attention_dim": 4096,
                  "pooled_projection_dim": 768, "in_channels": 64, **more}  # fmt: skip
        variant_of = "flux.1-dev" if "in_channels" in more else None
        add(name, "flux", title, "FluxTransformer2DModel", config, *ids, text=two, variant_of=variant_of)

    flux("flux.1-dev", "FLUX.1 dev, Kontext, Krea", "black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-Kontext-dev",
         "black-forest-labs/FLUX.1-Krea-dev", "flux", "flux1", "flux-dev", "flux1-dev", "flux1d", "Flux.1 D", guidance_embeds=True)  # fmt: skip
    flux("flux.1-schnell", "FLUX.1 schnell", "black-forest-labs/FLUX.1-schnell", "flux-schnell", "flux1-schnell", "flux1s", "Flux.1 S",
         guidance_embeds=False)  # fmt: skip
    flux("flux.1-fill-dev", "FLUX.1 Fill dev", "black-forest-labs/FLUX.1-Fill-dev", guidance_embeds=True, in_channels=384, out_channels=64)
    flux("flux.1-control-dev", "FLUX.1 Canny / Depth dev", "black-forest-labs/FLUX.1-Canny-dev", "black-forest-labs/FLUX.1-Depth-dev",
         guidance_embeds=True, in_channels=128, out_channels=64)  # fmt: skip
    add("flux.2-dev", "flux", "FLUX.2 dev (transformer)", "Flux2Transformer2DModel",
        {"num_layers": 8, "num_single_layers": 48, "num_attention_heads": 48, "joint_attention_dim": 15360}, "black-forest-labs/FLUX.2-dev")  # fmt: skip
    add("chroma", "flux", "Chroma1", "ChromaTransformer2DModel", {"num_layers": 19, "num_single_layers": 38}, "lodestones/Chroma",
        "lodestones/Chroma1-HD", "lodestones/Chroma1-Base", text=lambda: t5_xxl("text_encoder."))  # fmt: skip


def _others() -> None:
    def wan(name: str, title: str, heads: int, ffn: int, layers: int, *ids: str, **more: Any) -> None:
        config = {"num_attention_heads": heads, "attention_head_dim": 128, "ffn_dim": ffn, "num_layers": layers, **more}
        add(name, "wan", title, "WanTransformer3DModel", config, *ids, text=lambda: umt5_xxl("text_encoder."))

    wan(
        "wan2.1-t2v-1.3b",
        "Wan 2.1 text-to-video 1.3B",
        12,
        8960,
        30,
        "Wan-AI/Wan2.1-T2V-1.3B",
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        in_channels=16,
    )
    wan("wan2.1-t2v-14b", "Wan 2.1 / 2.2 text-to-video 14B", 40, 13824, 40, "Wan-AI/Wan2.1-T2V-14B", "Wan-AI/Wan2.1-T2V-14B-Diffusers",
        "Wan-AI/Wan2.2-T2V-A14B", "Wan-AI/Wan2.2-T2V-A14B-Diffusers", "wan2.2-t2v-a14b", in_channels=16)  # fmt: skip
    wan("wan2.1-i2v-14b", "Wan 2.1 image-to-video 14B", 40, 13824, 40, "Wan-AI/Wan2.1-I2V-14B-480P", "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
        "Wan-AI/Wan2.1-I2V-14B-720P", "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers", in_channels=36, image_dim=1280, added_kv_proj_dim=5120)  # fmt: skip
    wan("wan2.2-i2v-a14b", "Wan 2.2 image-to-video A14B", 40, 13824, 40, "Wan-AI/Wan2.2-I2V-A14B", "Wan-AI/Wan2.2-I2V-A14B-Diffusers",
        in_channels=36)  # fmt: skip
    wan("wan2.2-ti2v-5b", "Wan 2.2 text/image-to-video 5B", 24, 14336, 30, "Wan-AI/Wan2.2-TI2V-5B", "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
        in_channels=48, out_channels=48)  # fmt: skip
    add("qwen-image", "qwen-image", "Qwen-Image (transformer)", "QwenImageTransformer2DModel", {"num_layers": 60, "joint_attention_dim": 3584},
        "Qwen/Qwen-Image", "Qwen/Qwen-Image-Edit", "Qwen/Qwen-Image-2512", "Qwen/Qwen-Image-Edit-2509")  # fmt: skip
    add("z-image", "z-image", "Z-Image (transformer)", "ZImageTransformer2DModel", {"dim": 3840, "n_layers": 30, "n_refiner_layers": 2},
        "Tongyi-MAI/Z-Image-Turbo", "Tongyi-MAI/Z-Image")  # fmt: skip
    add("lumina2", "lumina2", "Lumina Image 2.0 (transformer)", "Lumina2Transformer2DModel",
        {"hidden_size": 2304, "num_layers": 26, "num_attention_heads": 24, "num_kv_heads": 8, "cap_feat_dim": 2304},
        "Alpha-VLLM/Lumina-Image-2.0")  # fmt: skip
    add("hidream-i1", "hidream", "HiDream-I1 (transformer)", "HiDreamImageTransformer2DModel",
        {"patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 16, "num_single_layers": 32, "num_attention_heads": 20,
         "caption_channels": [4096, 4096], "num_routed_experts": 4, "max_resolution": [128, 128], "axes_dims_rope": [64, 32, 32],
         "llama_layers": [*range(32), *[31] * 16]},
        "HiDream-ai/HiDream-I1-Full", "HiDream-ai/HiDream-I1-Dev", "HiDream-ai/HiDream-I1-Fast")  # fmt: skip
    add("ltx-video", "ltx", "LTX-Video 2B (transformer)", "LTXVideoTransformer3DModel", {"num_layers": 28, "num_attention_heads": 32},
        "Lightricks/LTX-Video", text=lambda: t5_xxl("text_encoder."))  # fmt: skip
    add("hunyuan-video", "hunyuan-video", "HunyuanVideo (transformer)", "HunyuanVideoTransformer3DModel", {"num_layers": 20, "num_single_layers": 40},
        "hunyuanvideo-community/HunyuanVideo", "tencent/HunyuanVideo", text=lambda: clip_l("text_encoder_2."))  # fmt: skip
    add("auraflow", "auraflow", "AuraFlow (transformer)", "AuraFlowTransformer2DModel", {"num_mmdit_layers": 4, "num_single_dit_layers": 32},
        "fal/AuraFlow", "fal/AuraFlow-v0.2", "fal/AuraFlow-v0.3")  # fmt: skip
    add("pixart-sigma", "pixart", "PixArt Sigma", "PixArtTransformer2DModel",
        {"num_layers": 28, "num_attention_heads": 16, "caption_channels": 4096, "use_additional_conditions": False},
        "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", text=lambda: t5_xxl("text_encoder."))  # fmt: skip
    add("pixart-alpha", "pixart", "PixArt Alpha 1024", "PixArtTransformer2DModel",
        {"num_layers": 28, "num_attention_heads": 16, "caption_channels": 4096, "use_additional_conditions": True},
        "PixArt-alpha/PixArt-XL-2-1024-MS", text=lambda: t5_xxl("text_encoder."))  # fmt: skip
    add("cogvideox-2b", "cogvideox", "CogVideoX 2B", "CogVideoXTransformer3DModel", {"num_layers": 30, "num_attention_heads": 30},
        "THUDM/CogVideoX-2b", "zai-org/CogVideoX-2b", text=lambda: t5_xxl("text_encoder."))  # fmt: skip
    add("cogvideox-5b", "cogvideox", "CogVideoX 5B", "CogVideoXTransformer3DModel",
        {"num_layers": 42, "num_attention_heads": 48, "use_rotary_positional_embeddings": True},
        "THUDM/CogVideoX-5b", "zai-org/CogVideoX-5b", text=lambda: t5_xxl("text_encoder."))  # fmt: skip
    add("mochi-1", "mochi", "Mochi 1 preview", "MochiTransformer3DModel", {"num_layers": 48, "num_attention_heads": 24}, "genmo/mochi-1-preview",
        text=lambda: t5_xxl("text_encoder."))  # fmt: skip
    add("sana-1.6b", "sana", "Sana 1.6B (transformer)", "SanaTransformer2DModel", {"num_layers": 20, "num_attention_heads": 70},
        "Efficient-Large-Model/Sana_1600M_1024px_diffusers", "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers")  # fmt: skip

    def conditioned() -> list[Row]:
        qwen3 = {"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
                 "num_key_value_heads": 8, "vocab_size": 151936, "head_dim": 128}  # fmt: skip
        return [*denoiser("text_conditioner.", "AnimaTextConditioner", {}), *prefixed("text_encoder.", hf("Qwen3Model", qwen3))]

    cosmos2 = {"num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 128, "text_embed_dim": 1024, "adaln_lora_dim": 256,
               "in_channels": 16, "out_channels": 16, "extra_pos_embed_type": None}  # fmt: skip
    add("cosmos-predict2-2b", "cosmos", "Cosmos-Predict2 2B Text2Image (transformer)", "CosmosTransformer3DModel", cosmos2,
        "nvidia/Cosmos-Predict2-2B-Text2Image")  # fmt: skip
    # Its transformer's config is that of Cosmos-Predict2, so no config leads back to it.
    ENTRIES.append(Entry("anima", "anima", "Anima", lambda: [*denoiser("transformer.", "CosmosTransformer3DModel", cosmos2), *conditioned()],
                         ids=("circlestone-labs/Anima",)))  # fmt: skip
    add("krea-2", "krea", "Krea 2 (transformer)", "Krea2Transformer2DModel", {"num_layers": 28, "num_attention_heads": 48})


for _register in (_stable_diffusion, _mmdit, _others):
    _register()
