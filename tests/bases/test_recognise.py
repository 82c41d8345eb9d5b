"""The recogniser on real adapters, on look-alikes, and on adapters that leave the answer open."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from upparam.adapter import BaseHint
from upparam.bases import inventory
from upparam.bases.numbered import recognise_shapes_only
from upparam.bases.recognise import recognise, recognise_underscored

Shape = tuple[int, ...]

_UP = re.compile(r"(\.lora_B(\.default)?\.weight|(_lora|\.lora_linear_layer|\.lora)\.up\.weight|\.lora_up\.weight|\.lora_b)$")

CORPUS = {
    # file -> base as manifest.tsv says it
    "sd15-diffusers-old-bin/pytorch_lora_weights.bin": "sd1.5",
    "sd15-justin/pytorch_lora_weights.safetensors": "sd2",
    "sd15-catundchat/pytorch_lora_weights.bin": "sd1.5",
    "sd15-catundchat/pytorch_lora_weights.safetensors": "sd1.5",
    "sd15-haseebae/pytorch_lora_weights.safetensors": "sd1.5",
    "sd-vfph55/pytorch_lora_weights.safetensors": "sd2",
    "peft-sd-unet/adapter_model.safetensors": "sd1.5",
    "peft-gpt2/adapter_model.safetensors": "gpt2",
    "peft-gpt2-tigrinya/adapter_model.safetensors": "gpt2",
    "peft-bloom/adapter_model.bin": "bloom-560m",
}


def tensor_shapes(path: Path) -> dict[str, Shape]:
    """Every tensor's shape in a safetensors, npz, torch or key-set (JSON) file."""
    if path.suffix == ".json":
        return {name: tuple(shape) for name, shape in json.loads(path.read_text()).items()}
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return {name: arrays[name].shape for name in arrays.files}
    if path.suffix == ".bin":
        import torch

        return {name: tuple(value.shape) for name, value in torch.load(path, weights_only=True, map_location="cpu").items()}
    with safe_open(path, "numpy") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - not a dict


def targets(path: Path) -> dict[str, Shape]:
    """Module path as the file gives it -> delta shape (out, in, *kernel), for every up/down pair."""
    shapes = tensor_shapes(path)
    found = {}
    for name, up in shapes.items():
        match = _UP.search(name)
        if match is None:
            continue
        suffix = match.group(0)
        swapped = suffix.replace("lora_B", "lora_A").replace(".up.", ".down.").replace("lora_up", "lora_down").replace("lora_b", "lora_a")
        down = shapes[name[: match.start()] + swapped]
        module = name[: match.start()].removeprefix("base_model.model.").replace(".processor.to_out", ".to_out.0").replace(".processor", "")
        found[module] = (up[1], down[0]) if suffix == ".lora_b" else (up[0], down[1], *down[2:])
    return found


def of(base: str, pattern: str) -> dict[str, Shape]:
    """The targets of an adapter over every module whose path matches."""
    return {module.path: module.canonical for module in inventory.load(base).modules if re.search(pattern, module.path)}


def by_name(hints: list[BaseHint]) -> dict[str, BaseHint]:
    return {hint.name: hint for hint in hints}


@pytest.mark.parametrize("file", CORPUS)
def test_real_adapters(corpus: Path, file: str) -> None:
    best, *rest = recognise(targets(corpus / file))
    assert best.name == CORPUS[file]
    assert best.confidence >= 0.85
    assert all(hint.confidence < 0.1 for hint in rest)
    assert "fit in name and shape" in best.evidence[0]


def test_a_real_adapter_that_two_bases_fit(corpus: Path) -> None:
    shapes = targets(corpus / "peft-distilbert-imdb/adapter_model.safetensors")
    first, second = recognise(shapes)
    assert {first.name, second.name} == {"distilbert-base-uncased", "distilbert-base-cased"}
    assert first.confidence == second.confidence < 0.5
    assert first.lookalikes == (second.name,) and any("word_embeddings" in text for text in first.evidence)
    stated = recognise(shapes, stated="distilbert-base-uncased")[0]
    assert stated.name == "distilbert-base-uncased" and stated.stated and stated.confidence > 0.95


def test_a_real_adapter_of_four_layers_names_every_base_it_may_be_for(corpus: Path) -> None:
    hints = recognise(targets(corpus / "mlx-npz/adapters.npz"))
    assert {"llama-3-8b", "mistral-7b", "mistral-7b-v0.3", "mixtral-8x7b", "qwen3-8b"} == {hint.name for hint in hints}
    assert all(hint.confidence < 0.2 for hint in hints)
    assert any("layers 28-31 of 32" in text for text in hints[0].evidence)


@pytest.mark.parametrize(
    ("file", "fitting"),
    [
        ("flux_lora_diffusers_format.json", {"flux.1-dev", "flux.1-schnell"}),
        ("flux_control_lora_format.json", {"flux.1-control-dev"}),
        ("krea2_lora_kohya_format.json", {"krea-2"}),
        ("flux_lora_kohya_format.json", {"flux.1-dev", "flux.1-schnell"}),
        ("flux_dora_onetrainer_format.json", {"flux.1-dev", "flux.1-schnell"}),
        # Kin at best: some of their shapes are those of no model.
        ("anima_lora_kohya_format.json", {"anima", "cosmos-predict2-2b"}),
        ("anima_lora_kohya_with_te_format.json", set()),
        ("anima_lora_peft_format.json", {"anima", "cosmos-predict2-2b"}),
    ],
)
def test_real_key_sets(corpus: Path, file: str, fitting: set[str]) -> None:
    shapes = targets(corpus / "keysets" / file)
    hints = (recognise_underscored if any(name.startswith("lora_") for name in shapes) else recognise)(shapes)
    assert {hint.name for hint in hints if hint.confidence > 0.1} == fitting


def test_cloneofsimo_by_order(corpus: Path) -> None:
    shapes = tensor_shapes(corpus / "cloneofsimo/lora_disney.safetensors")

    def ordered(component: str) -> list[Shape]:
        count = sum(name.startswith(f"{component}:") for name in shapes) // 2
        return [(shapes[f"{component}:{index}:up"][0], shapes[f"{component}:{index}:down"][1]) for index in range(count)]

    (best,) = recognise_shapes_only(ordered("unet"))
    assert best.name == "sd1.5" and best.confidence > 0.9 and "cloneofsimo-unet'" in best.evidence[0]
    assert {hint.name for hint in recognise_shapes_only(ordered("text_encoder"))} == {"sd1.5", "sdxl"}


def test_sam_lora_by_order(corpus: Path) -> None:
    shapes = tensor_shapes(corpus / "sam-lora/lora_rank2.safetensors")
    pairs = [(shapes[f"w_b_{index:03}"][0], shapes[f"w_a_{index:03}"][1]) for index in range(len(shapes) // 2)]
    hints = by_name(recognise_shapes_only(pairs, "qkv-slices"))
    assert set(hints) == {"sam-vit-b"} and hints["sam-vit-b"].confidence > 0.9
    unsure = by_name(recognise_shapes_only(pairs))
    assert unsure["sam-vit-b"].confidence < 0.5 and "vit-base-patch16-224" in unsure["sam-vit-b"].lookalikes


@pytest.mark.parametrize(
    ("base", "pattern", "fitting"),
    [
        ("llama-2-7b", r"layers.*_proj$", {"llama-2-7b", "llama-7b", "codellama-7b", "qwen1.5-7b"}),
        ("llama-2-7b", r"[qv]_proj$", {"llama-2-7b", "llama-7b", "codellama-7b", "qwen1.5-7b"}),
        ("mistral-7b", r"layers.*_proj$", {"mistral-7b", "mistral-7b-v0.3", "llama-3-8b"}),
        ("llama-3-8b", r"layers.*_proj$", {"mistral-7b", "mistral-7b-v0.3", "llama-3-8b"}),
        ("llama-3-8b", r"_proj$|lm_head", {"llama-3-8b"}),
        ("mistral-7b", r"[qv]_proj$", {"mistral-7b", "mistral-7b-v0.3", "llama-3-8b", "mixtral-8x7b"}),
        ("llama-2-13b", r"[qv]_proj$", {"llama-2-13b", "llama-13b", "codellama-13b", "qwen1.5-14b"}),
        ("mixtral-8x7b", r"w[123]$", {"mixtral-8x7b"}),
        ("phi-3-mini", r"qkv_proj|gate_up", {"phi-3-mini"}),
        ("falcon-7b", r"query_key_value", {"falcon-7b"}),
        ("pythia-1b", r"query_key_value", {"pythia-1b"}),
        ("t5-base", r"\.(q|v)$", {"t5-base", "flan-t5-base"}),
        ("t5-base", r"\.(q|wi)$", {"t5-base"}),
        ("whisper-small", r"(q|v)_proj", {"whisper-small", "whisper-small.en"}),
        ("gpt2-medium", r"c_attn", {"gpt2-medium"}),
        ("sd1.5", r"^unet.*attn2\.to_k", {"sd1.5"}),
        ("sd2", r"^unet.*attn2\.to_k", {"sd2"}),
        ("sdxl", r"^unet.*attn[12]\.to_[qkv]", {"sdxl"}),
        ("sdxl-refiner", r"^unet.*attn2\.to_k", {"sdxl-refiner"}),
        ("sd1.5", r"^unet.*attn1\.to_q", {"sd1.5", "sd2"}),
        ("sd3-medium", r"^transformer.*attn\.to_q", {"sd3-medium", "sd3.5-medium"}),
        ("sd3.5-medium", r"^transformer.*attn2?\.to_q", {"sd3.5-medium"}),
        ("wan2.1-t2v-14b", r"^transformer.*attn[12]\.to_[qkv]$", {"wan2.1-t2v-14b", "wan2.2-i2v-a14b", "wan2.1-i2v-14b"}),
        ("wan2.1-t2v-1.3b", r"^transformer.*attn[12]\.to_[qkv]$", {"wan2.1-t2v-1.3b"}),
        ("qwen-image", r"attn\.to_[qkv]$", {"qwen-image"}),
        ("z-image", r"attention\.to_[qkv]$", {"z-image"}),
    ],
)
def test_lookalikes_share_the_confidence(base: str, pattern: str, fitting: set[str]) -> None:
    hints = recognise(of(base, pattern))
    likely = {hint.name for hint in hints if hint.confidence >= 0.5 * hints[0].confidence}
    assert likely == fitting
    assert sum(hint.confidence for hint in hints) <= 1.0
    mine = by_name(hints)[base]
    assert fitting - {base} <= set(mine.lookalikes)
    if len(fitting) > 1:
        assert mine.confidence <= 0.5


def test_the_module_that_would_tell_is_named() -> None:
    best = recognise(of("mistral-7b", r"layers.*_proj$"))[0]
    assert any("embed_tokens" in text or "lm_head" in text for text in best.evidence)


def test_what_ruled_relatives_out_is_named() -> None:
    best = recognise(of("sd2", r"^unet.*attn2\.to_k"))[0]
    assert any("320x1024" in text and "320x768 in sd1.5" in text for text in best.evidence)
    assert "cross-attention keys read 1024" in best.evidence


def test_a_variant_that_fits_as_well_does_not_halve_the_confidence() -> None:
    best = recognise(of("sdxl", r"^unet.*to_k$"))[0]
    assert best.confidence > 0.8 and best.lookalikes == ("sdxl-inpainting",)
    assert recognise(of("sd1.5-inpainting", r"^unet\.(conv_in|.*to_k)$"))[0].name == "sd1.5-inpainting"


def test_partial_adapters_are_less_sure() -> None:
    whole = recognise(of("gpt2-medium", r"c_attn"))[0]
    part = by_name(recognise(of("gpt2-medium", r"h\.[0-3]\.attn\.c_attn")))
    assert part["gpt2-medium"].confidence < whole.confidence
    one_layer = recognise(of("pythia-1.4b", r"layers\.3\."))
    assert {hint.name for hint in one_layer} == {"pythia-1b", "pythia-1.4b"}


@pytest.mark.parametrize(
    ("base", "pattern", "missing"),
    [("gpt2", "c_attn", "transformer."), ("sd1.5", r"^unet.*to_k$", "unet."), ("bert-base-uncased", "query|value", "bert.")],
)
def test_names_without_their_prefix(base: str, pattern: str, missing: str) -> None:
    shapes = {path.removeprefix(missing): shape for path, shape in of(base, pattern).items()}
    assert base in {hint.name for hint in recognise(shapes)[:4]}


def test_names_with_a_prefix_too_many() -> None:
    shapes = {f"base_model.model.{path}": shape for path, shape in of("gpt2", "c_attn").items()}
    assert recognise(shapes)[0].name == "gpt2"
    comfy = {path.replace("unet.", "diffusion_model."): shape for path, shape in of("sd1.5", r"^unet.*to_k$").items()}
    assert recognise(comfy)[0].name == "sd1.5"


def test_gemma_3_before_and_after_transformers_turned_its_names_round() -> None:
    shapes = of("gemma-3-4b", r"language_model.*(q|v)_proj$")
    turned = {path.replace("model.language_model.", "language_model.model."): shape for path, shape in shapes.items()}
    assert turned != shapes
    assert recognise(shapes)[0].name == recognise(turned)[0].name == "gemma-3-4b"


def test_an_embedding_delta_may_come_either_way_round() -> None:
    shapes = of("gpt2", "c_attn")
    for shape in ((50257, 768), (768, 50257)):
        best = recognise(shapes | {"transformer.wte": shape})[0]
        assert best.name == "gpt2" and best.evidence[0].startswith("all 13")


def test_a_grown_vocabulary_does_not_hide_the_base() -> None:
    shapes = of("llama-3-8b", r"layers.*_proj$") | {"lm_head": (128258, 4096)}
    hints = recognise(shapes)
    assert hints[0].name == "llama-3-8b" and hints[0].confidence > 0.8
    assert "vocabulary of another size" in hints[0].evidence[0]


@pytest.mark.parametrize(
    ("stated", "first", "sure"),
    [
        ("unsloth/meta-llama-3.1-8b-bnb-4bit", "llama-3-8b", (0.95, 1.0)),
        ("mistralai/Mistral-7B-v0.1", "mistral-7b", (0.95, 1.0)),
        ("someone/my-own-8b", "someone/my-own-8b", (0.5, 0.95)),
    ],
)
def test_what_the_file_states_is_checked(stated: str, first: str, sure: tuple[float, float]) -> None:
    best = recognise(of("llama-3-8b", r"layers.*_proj$"), stated=stated)[0]
    assert best.name == first and best.stated
    assert sure[0] <= best.confidence <= sure[1]


def test_a_false_statement_is_doubted() -> None:
    hints = recognise(of("sdxl", r"^unet.*to_k$"), stated="runwayml/stable-diffusion-v1-5")
    assert hints[0].name == "sdxl" and not hints[0].stated
    assert by_name(hints)["sd1.5"].confidence <= 0.1


@pytest.mark.parametrize("layout", ["kohya", "kohya-diffusers", "kohya-original"])
@pytest.mark.parametrize("base", ["sd1.5", "sd2", "sdxl", "flux.1-dev", "sd3-medium", "wan2.1-t2v-1.3b", "chroma"])
def test_underscored_names_of_every_layout(base: str, layout: str) -> None:
    from upparam.bases import layouts

    found = layouts.layout(inventory.load(base), layout)
    names = {foreign: (found.rows(foreign), *parts[0].shape[1:]) for foreign, parts in found.foreign.items() if len(parts[0].shape) > 1}
    hints = recognise_underscored(names)
    assert hints[0].name == base and hints[0].confidence > 0.45, hints[:2]


def test_nothing_fits_nothing() -> None:
    assert recognise({}) == [] == recognise_underscored({}) == recognise_shapes_only([])
    assert recognise({"encoder.foo": (3, 5)}) == []
    assert recognise({f"layers.{index}.self_attn.q_proj": (77, 77) for index in range(4)}) == []
    assert recognise_shapes_only([(320, 321)]) == []


def test_names_that_fit_with_shapes_that_do_not_are_kin_at_best() -> None:
    shapes = of("gpt2", "c_attn|c_fc") | {"transformer.h.0.mlp.c_fc": (3000, 768)}
    best = recognise(shapes)[0]
    assert best.name == "gpt2" and best.confidence <= 0.3
    assert any("3000x768" in text for text in best.evidence)


def test_recognising_is_quick() -> None:
    shapes = of("sdxl", r"^unet.*to_[qkv]$")
    recognise(shapes)
    best = min(_seconds(shapes) for _ in range(5))
    assert best < 0.06  # 5 ms on an idle machine; the bound allows for a busy one


def _seconds(shapes: dict[str, Shape]) -> float:
    start = time.perf_counter()
    recognise(shapes)
    return time.perf_counter() - start
