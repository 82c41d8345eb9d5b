"""Tiny diffusers pipelines built from config, seeded adapters for them, and what their weights become when the adapter is merged by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from upparam.adapter import Adapter, BaseHint, Target
from upparam.algorithms.base import ScaleRule, Scaling
from upparam.algorithms.lora import LoRA
from upparam.bases.base import Base, Module
from upparam.tensors import Tensor

WIDTH = 32


def clip(with_projection: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=100, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=16,
        projection_dim=WIDTH,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if with_projection else CLIPTextModel)(config)


def sd15() -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(1)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=WIDTH, attention_head_dim=8, norm_num_groups=8,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=None, text_encoder=clip(), tokenizer=None, unet=unet, scheduler=DDIMScheduler(clip_sample=False), safety_checker=None,
        feature_extractor=None, image_encoder=None, requires_safety_checker=False,
    )  # fmt: skip


def sdxl() -> Any:
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    torch.manual_seed(2)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64, 64), layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2, 2),
        cross_attention_dim=2 * WIDTH, attention_head_dim=8, norm_num_groups=8, use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + WIDTH,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=None, text_encoder=clip(), text_encoder_2=clip(True), tokenizer=None, tokenizer_2=None, unet=unet,
        scheduler=DDIMScheduler(clip_sample=False), feature_extractor=None, image_encoder=None,
    )  # fmt: skip


def flux() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(3)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=clip(), tokenizer=None, text_encoder_2=None, tokenizer_2=None,
        transformer=transformer,
    )  # fmt: skip


def components(pipe: Any) -> dict[str, Any]:
    """The components an adapter can change."""
    names = ("unet", "transformer", "text_encoder", "text_encoder_2")
    return {name: part for name in names if (part := getattr(pipe, name, None)) is not None}


def public(component: str, path: str) -> str:
    """The reference path of a module; transformers 5 leaves out CLIP's `text_model.` where there is no projection."""
    inner = component.startswith("text_encoder") and not path.startswith(("text_model.", "text_projection"))
    return f"{component}.{'text_model.' if inner else ''}{path}"


def base_of(pipe: Any, name: str = "tiny") -> Base:
    """The pipeline as a base, modules in traversal order."""
    modules = [
        Module(public(component, path), type(module).__name__, tuple(module.weight.shape))
        for component, part in components(pipe).items()
        for path, module in part.named_modules()
        if isinstance(getattr(module, "weight", None), torch.Tensor)
    ]
    return Base(name, tuple(modules))


def seeded(base: Base, wanted: Any, *, rank: int = 4, alpha: float | None = 2.0, seed: int = 0, dtype: Any = np.float32) -> Adapter:
    """A LoRA over every module whose path `wanted` says yes to."""
    rng = np.random.default_rng(seed)
    adapter = Adapter({}, "test", base=BaseHint(base.name, 1.0))
    for module in base.modules:
        if len(module.shape) not in (2, 4) or module.kind == "Embedding" or not wanted(module.path):
            continue
        out, into, *kernel = module.shape
        up = rng.standard_normal((out, rank, *([1] * len(kernel)))).astype(dtype) * dtype(0.05)
        down = rng.standard_normal((rank, into, *kernel)).astype(dtype) * dtype(0.05)
        adapter.deltas[Target(module.path)] = LoRA(Tensor.of(up), Tensor.of(down), Scaling(ScaleRule.ALPHA_OVER_RANK, alpha))
    return adapter


def merged(pipe: Any, adapter: Adapter) -> None:
    """Add every delta to the pipeline's weights, computed from the factors by torch alone."""
    modules = {public(component, path): module for component, part in components(pipe).items() for path, module in part.named_modules()}
    for target, delta in adapter.deltas.items():
        assert isinstance(delta, LoRA) and delta.scale is not None
        up, down = torch.from_numpy(delta.up.read()).double(), torch.from_numpy(delta.down.read()).double()
        weight = modules[target.module].weight
        change = delta.scale * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        weight.data = (weight.data.double() + change).to(weight.dtype)


def outputs(pipe: Any) -> list[torch.Tensor]:
    """What every component computes for fixed inputs."""
    generator = torch.Generator().manual_seed(5)
    found = []
    with torch.no_grad():
        for component, part in components(pipe).items():
            if component == "unet":
                context = torch.randn(1, 5, part.config.cross_attention_dim, generator=generator)
                more = {}
                if part.config.addition_embed_type:
                    more = {"added_cond_kwargs": {"text_embeds": torch.randn(1, WIDTH, generator=generator), "time_ids": torch.ones(1, 6)}}
                found.append(part(torch.randn(1, 4, 8, 8, generator=generator), 7, context, **more).sample)
            elif component == "transformer":
                found.append(
                    part(
                        hidden_states=torch.randn(1, 6, 4, generator=generator), encoder_hidden_states=torch.randn(1, 5, WIDTH, generator=generator),
                        pooled_projections=torch.randn(1, WIDTH, generator=generator), timestep=torch.tensor([0.5]), img_ids=torch.ones(6, 3),
                        txt_ids=torch.zeros(5, 3), guidance=torch.tensor([3.5]),
                    ).sample
                )  # fmt: skip
            else:
                found.append(part(torch.arange(1, 9)[None]).last_hidden_state)
    return found
