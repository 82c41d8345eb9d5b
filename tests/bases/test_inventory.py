"""Inventories against facts that do not come from the generator: published parameter counts, key lists of other projects, ids."""

from __future__ import annotations

import time
from math import prod

import pytest

from upparam.bases import inventory
from upparam.bases.base import Module
from upparam.errors import UsageError

PARAMETERS = {
    # as Hugging Face's pages and the models' papers give them, tied heads counted once
    "gpt2": 124_439_808, "gpt2-xl": 1_557_611_200, "llama-2-7b": 6_738_415_616, "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192, "llama-3-8b": 8_030_261_248, "llama-3-70b": 70_553_706_496, "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824, "tinyllama-1.1b": 1_100_048_384, "mistral-7b": 7_241_732_096, "mistral-7b-v0.3": 7_248_023_552,
    "mistral-nemo-12b": 12_247_782_400, "mixtral-8x7b": 46_702_792_704, "mixtral-8x22b": 140_620_634_112, "qwen2-0.5b": 494_032_768,
    "qwen2-1.5b": 1_543_714_304, "qwen2.5-3b": 3_085_938_688, "qwen2-7b": 7_615_616_512, "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352, "qwen2-72b": 72_706_203_648, "qwen3-0.6b": 596_049_920, "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360, "qwen3-32b": 32_762_123_264, "gemma-2b": 2_506_172_416, "gemma-7b": 8_537_680_896,
    "gemma-2-2b": 2_614_341_888, "gemma-2-9b": 9_241_705_984, "gemma-2-27b": 27_227_128_320, "gemma-3-1b": 999_885_952,
    "phi-2": 2_779_683_840, "phi-3-mini": 3_821_079_552, "phi-3-medium": 13_960_238_080, "phi-4": 14_659_507_200,
    "falcon-7b": 6_921_720_704, "bloom-560m": 559_214_592, "bloom-7b1": 7_069_016_064, "pythia-1b": 1_011_781_632,
    "pythia-12b": 11_846_072_320, "gpt-neox-20b": 20_554_567_680, "gpt-j-6b": 6_050_882_784, "opt-350m": 331_196_416,
    "opt-1.3b": 1_315_758_080, "t5-small": 60_506_624, "t5-base": 222_903_552, "t5-3b": 2_851_598_336, "whisper-tiny": 37_760_640,
    "whisper-small": 241_734_912, "whisper-large-v2": 1_543_304_960, "whisper-large-v3": 1_543_490_560,
    "whisper-large-v3-turbo": 808_878_080,
}  # fmt: skip

COMPONENTS = {
    # elements of all weights and biases of ljleb/sd-mecha sd_mecha/extensions/builtin/model_configs: sd1-ldm.yaml, sdxl-diffusers_unet_only.yaml,
    # flux-flux.yaml, sd3-comfyui.yaml (there without the bare position table of 192*192*1536 and 1000 sigmas)
    ("sd1.5", "unet."): 859_520_964,
    ("sd1.5", "text_encoder."): 123_060_480,
    ("sdxl", "unet."): 2_567_463_684,
    ("flux.1-dev", "transformer."): 11_901_408_320,
    ("flux.1-dev", "text_encoder."): 123_060_480,
    ("sd3-medium", "transformer."): 2_084_952_104 - 192 * 192 * 1536 - 1000,
    ("sd3-medium", "text_encoder."): 123_650_305 - 1,
    ("sd3-medium", "text_encoder_2."): 694_659_841 - 1,
    ("sd2", "unet."): 865_910_724,  # stabilityai/stable-diffusion-2-1
    ("qwen-image", "transformer."): 20_430_401_088,  # Qwen/Qwen-Image
}

TENSORS = {
    # names in ostris/ai-toolkit toolkit/keymaps/stable_diffusion_*.json (UNet) and in the text encoders of the same files
    ("sd1.5", "unet."): 686,
    ("sd2", "unet."): 686,
    ("sdxl", "unet."): 1680,
    ("sdxl-refiner", "unet."): 1220,
    ("sd1.5", "text_encoder."): 196,
}

FACTS = {
    # module: (class, shape as stored, bias), each from the source named
    ("sd1.5", "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"): ("Linear", (320, 768), False),
    ("sd1.5", "unet.down_blocks.0.attentions.0.proj_in"): ("Conv2d", (320, 320, 1, 1), True),
    ("sd2", "unet.down_blocks.0.attentions.0.proj_in"): ("Linear", (320, 320), True),
    ("sdxl", "unet.mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj"): ("Linear", (10240, 1280), True),
    ("sdxl", "unet.add_embedding.linear_1"): ("Linear", (1280, 2816), True),
    ("flux.1-dev", "transformer.single_transformer_blocks.37.proj_out"): ("Linear", (3072, 15360), True),
    ("gpt2", "transformer.h.11.attn.c_attn"): ("Conv1D", (768, 2304), True),
    ("bloom-560m", "transformer.h.23.self_attention.query_key_value"): ("Linear", (3072, 1024), True),
    ("falcon-7b", "transformer.h.0.self_attention.query_key_value"): ("Linear", (4672, 4544), False),
    ("phi-3-mini", "model.layers.0.mlp.gate_up_proj"): ("Linear", (16384, 3072), False),
    ("mixtral-8x7b", "model.layers.31.block_sparse_moe.experts.7.w2"): ("Linear", (4096, 14336), False),
    ("vit-base-patch16-224", "vit.encoder.layer.11.attention.attention.query"): ("Linear", (768, 768), True),
    ("sam-vit-h", "image_encoder.blocks.31.attn.qkv"): ("Linear", (3840, 1280), True),
    ("whisper-small", "model.encoder.conv1"): ("Conv1d", (768, 80, 3), True),
    ("distilbert-base-uncased", "distilbert.transformer.layer.5.attention.q_lin"): ("Linear", (768, 768), True),
}


def elements(module: Module) -> int:
    return prod(module.shape) + (module.canonical[0] if module.bias else 0)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    modules = inventory.load(name).modules
    tied = {"lm_head", "encoder.embed_tokens", "decoder.embed_tokens", "proj_out"}
    whole = sum(map(elements, modules))
    assert PARAMETERS[name] in (whole, whole - sum(elements(module) for module in modules if module.path in tied))


@pytest.mark.parametrize(("name", "component"), COMPONENTS)
def test_component_sizes_agree_with_other_projects(name: str, component: str) -> None:
    modules = [module for module in inventory.load(name).modules if module.path.startswith(component)]
    assert sum(map(elements, modules)) == COMPONENTS[name, component]


@pytest.mark.parametrize(("name", "component"), TENSORS)
def test_tensor_counts_agree_with_other_projects(name: str, component: str) -> None:
    modules = [module for module in inventory.load(name).modules if module.path.startswith(component)]
    assert sum(1 + module.bias for module in modules) == TENSORS[name, component]


@pytest.mark.parametrize(("name", "path"), FACTS)
def test_spot_facts(name: str, path: str) -> None:
    module = inventory.load(name).by_path[path]
    assert (module.kind, module.shape, module.bias) == FACTS[name, path]


def test_every_inventory_loads_with_unique_paths_and_the_stated_count() -> None:
    for name, fact in inventory.known().items():
        base = inventory.load(name)
        assert len(base.modules) == len(base.by_path) == fact.modules > 15
        assert base.family == fact.family
        assert all(module.kind and all(size > 0 for size in module.shape) for module in base.modules)


def test_components_come_first_in_pipelines() -> None:
    found = {module.path.split(".")[0] for module in inventory.load("sd3-medium").modules}
    assert found == {"transformer", "text_encoder", "text_encoder_2", "text_encoder_3"}


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("bigscience/bloom-560m", "bloom-560m"),
        ("gpt2", "gpt2"),
        ("openai-community/GPT2", "gpt2"),
        ("distilbert-base-uncased", "distilbert-base-uncased"),
        ("runwayml/stable-diffusion-v1-5", "sd1.5"),
        ("meta-llama/Llama-2-7b-hf", "llama-2-7b"),
        ("unsloth/meta-llama-3.1-8b-bnb-4bit", "llama-3-8b"),
        ("unsloth/Llama-3.2-1B-Instruct-unsloth-bnb-4bit", "llama-3.2-1b"),
        ("/models/FLUX.1-dev/", "flux.1-dev"),
        ("C:\\models\\Mistral-7B-v0.1", "mistral-7b"),
        ("stabilityai/stable-diffusion-xl-base-1.0", "sdxl"),
        ("nobody/nothing", None),
        ("", None),
        ("model", None),
    ],
)
def test_resolve(said: str, meant: str | None) -> None:
    assert inventory.resolve(said) == meant


def test_every_id_resolves_to_its_own_base() -> None:
    for name, fact in inventory.known().items():
        assert inventory.resolve(name) == name
        assert {identifier: inventory.resolve(identifier) for identifier in fact.ids} == dict.fromkeys(fact.ids, name)


def test_an_unknown_name_is_refused_with_a_remedy() -> None:
    with pytest.raises(UsageError, match="upparam bases"):
        inventory.load("no-such-base")


def test_loading_one_inventory_is_quick() -> None:
    inventory.known()
    inventory.load.cache_clear()
    best = min(_seconds("flux.1-dev") for _ in range(5))
    assert best < 0.02  # about 1 ms on an idle machine; the bound allows for a busy one


def _seconds(name: str) -> float:
    inventory.load.cache_clear()
    start = time.perf_counter()
    inventory.load(name)
    return time.perf_counter() - start
