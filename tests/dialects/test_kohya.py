"""kohya: sd-scripts' names, alphas, metadata and hashes, restated here from its source."""

from __future__ import annotations

import hashlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tests.dialects.files import filled, keyset, read, same, tensor_file, written

from upparam import dialects
from upparam.adapter import Adapter, Extra, ExtraKind, Target
from upparam.algorithms.base import BAKED, UNKNOWN, ScaleRule, Scaling
from upparam.algorithms.dora import DoRA
from upparam.algorithms.lora import LoRA
from upparam.algorithms.lowrank import RankRule
from upparam.bases import inventory
from upparam.bases.layouts import layout
from upparam.dialects.base import ReadOptions
from upparam.dialects.kohya_metadata import hashes
from upparam.errors import DeadAdapterError, MalformedError, RefusedError
from upparam.operations.convert import convert, write_adapter
from upparam.operations.merge import merge
from upparam.operations.opening import open_adapter
from upparam.operations.proof import distance
from upparam.operations.resize import resize
from upparam.tensors import Tensor

LAYER = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def pair(module: str, out: int, into: int, rank: int = 4, **more: Any) -> dict[str, list[int]]:
    return {f"{module}.lora_down.weight": [rank, into], f"{module}.lora_up.weight": [out, rank], **more}


def attention(base: str, kind: str = "kohya", alpha: bool = True) -> dict[str, list[int]]:
    """Names of the attention of a base as sd-scripts writes them."""
    shapes: dict[str, list[int]] = {}
    one = layout(inventory.load(base), kind)
    for foreign, parts in one.foreign.items():
        if len(parts[0].shape) == 2 and ("attn" in foreign or "mlp" in foreign):
            shapes |= pair(foreign, one.rows(foreign), parts[0].shape[1])
            if alpha:
                shapes[f"{foreign}.alpha"] = []
    return shapes


@pytest.mark.parametrize(
    "base", ["sd1.5", "sd2", "sdxl", "sdxl-refiner", "sd3-medium", "sd3.5-large", "flux.1-dev", "wan2.1-t2v-1.3b", "z-image", "gpt2"]
)
@pytest.mark.parametrize("alpha", [True, False])
def test_reads_every_name_and_writes_it_again(base: str, alpha: bool) -> None:
    tensors = filled(attention(base, alpha=alpha))
    adapter = read("kohya", tensors)
    assert adapter.layout == "reference" and not adapter.leftovers and not adapter.findings
    assert adapter.base is not None and base in (adapter.base.name, *adapter.base.lookalikes)
    assert {target.module for target in adapter.deltas} <= set(inventory.load(base).by_path)
    same(dict(written("kohya", adapter).tensors), tensors)


@pytest.mark.parametrize("base", ["sd1.5", "sdxl", "flux.1-dev", "sd3-medium"])
@pytest.mark.parametrize("kind", ["kohya-diffusers", "kohya-original"])
def test_other_layouts_under_the_same_prefixes_are_kept(base: str, kind: str) -> None:
    tensors = filled(attention(base, kind))
    adapter = read("kohya", tensors)
    assert not adapter.leftovers
    same(dict(written("kohya", adapter).tensors), tensors)
    target = next(iter(adapter.deltas))
    assert target.module in inventory.load(base).by_path


@pytest.mark.parametrize(
    ("prefix", "other"), [("lora_te_", "lora_te1_"), ("lora_unet_", "lora_transformer_"), ("lora_te_", "lora_text_encoder_")]
)
def test_prefixes_of_other_writers_are_kept(prefix: str, other: str) -> None:
    shapes = {name.replace(prefix, other): shape for name, shape in attention("sd1.5").items()}
    adapter = read("kohya", filled(shapes))
    assert not adapter.leftovers
    same(dict(written("kohya", adapter).tensors), filled(shapes))


def test_alpha_keeps_its_dtype_and_shape() -> None:
    shapes = attention("sd1.5", alpha=False)
    tensors = filled(shapes, np.float16)
    modules = list(dict.fromkeys(name.split(".")[0] for name in shapes))
    for number, module in enumerate(modules):
        value = np.array([4.0] if number % 2 else 0.3, np.float32 if number % 3 else np.float64)
        tensors[f"{module}.alpha"] = Tensor.of(value)
    adapter = read("kohya", tensors)
    same(dict(written("kohya", adapter).tensors), tensors)


def test_scale_is_alpha_over_rank_and_absent_alpha_is_rank() -> None:
    shapes = attention("sd1.5")
    tensors = filled(shapes, alpha=2.0)
    del tensors[f"{LAYER}.alpha"]
    adapter = read("kohya", tensors)
    scales = {target.module: delta.scale for target, delta in adapter.deltas.items()}
    assert scales.pop("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q") == 1.0
    assert set(scales.values()) == {0.5}


@pytest.mark.parametrize(
    ("scaling", "alpha"),
    [
        (Scaling(ScaleRule.ALPHA_OVER_SQRT_RANK, 8.0), 16.0),
        (Scaling(ScaleRule.ALPHA_OVER_RANK, 8.0, divisor=8.0), 4.0),
        (Scaling(ScaleRule.EXPLICIT, multiplier=20.0), 80.0),
        (BAKED, None),
        (Scaling(), None),
    ],
)
def test_other_scale_rules_become_an_alpha(scaling: Scaling, alpha: float | None) -> None:
    module = "unet.mid_block.attentions.0.proj_in"
    adapter = one_layer(module, scaling)
    out = written("kohya", adapter, base=inventory.load("sd2"))
    name = "lora_unet_mid_block_attentions_0_proj_in.alpha"
    assert (out.tensors[name].scalar() if alpha is not None else name not in out.tensors) == (alpha if alpha is not None else True)


def one_layer(module: str, scaling: Scaling) -> Adapter:
    tensors = filled({"up": [1280, 4], "down": [4, 1280]})
    return Adapter({Target(module): LoRA(tensors["up"], tensors["down"], scaling)}, "test")


def test_an_unknown_scale_is_refused() -> None:
    with pytest.raises(RefusedError, match="never guessed"):
        written("kohya", one_layer("unet.mid_block.attentions.0.proj_in", UNKNOWN), base=inventory.load("sd2"))


def test_locon_keeps_convolutions_and_tucker_cores() -> None:
    module = "lora_unet_down_blocks_1_resnets_0_conv1"
    shapes = attention("sd1.5") | {
        f"{module}.lora_down.weight": [4, 320, 1, 1], f"{module}.lora_mid.weight": [4, 4, 3, 3], f"{module}.lora_up.weight": [640, 4, 1, 1],
        "lora_unet_mid_block_resnets_0_conv2.lora_down.weight": [4, 1280, 3, 3], "lora_unet_mid_block_resnets_0_conv2.lora_up.weight": [1280, 4, 1, 1],
    }  # fmt: skip
    adapter = read("kohya", filled(shapes))
    assert adapter.deltas[Target("unet.down_blocks.1.resnets.0.conv1")].shape == (640, 320, 3, 3)
    assert not adapter.leftovers
    same(dict(written("kohya", adapter).tensors), filled(shapes))


def test_names_no_base_has_are_kept_as_they_are(corpus: Path) -> None:
    for name in ("anima_lora_kohya_format", "anima_lora_kohya_with_te_format"):
        tensors = keyset(corpus / "keysets" / f"{name}.json")
        adapter = read("kohya", tensors)
        assert adapter.layout == "kohya" and adapter.base is None and not adapter.leftovers
        same(dict(written("kohya", adapter).tensors), tensors)
        with pytest.raises(RefusedError, match="base is not known"):
            written("diffusers", adapter)


def test_a_named_base_decides() -> None:
    tensors = filled(attention("sd1.5"))
    adapter = read("kohya", tensors, base=inventory.load("sd1.5"))
    assert adapter.base is not None and adapter.base.stated and adapter.base.confidence == 1.0
    wrong = read("kohya", tensors, base=inventory.load("flux.1-dev"))
    assert wrong.layout == "kohya" and wrong.base is None


def test_metadata_names_the_base() -> None:
    shapes = {name: shape for name, shape in attention("flux.1-dev").items() if "double_blocks" in name}
    silent, said = read("kohya", filled(shapes)), read("kohya", filled(shapes), {"modelspec.architecture": "flux-1-schnell/lora"})
    assert silent.base is not None and said.base is not None
    assert silent.base.name == "flux.1-dev" and "flux.1-schnell" in silent.base.lookalikes
    assert said.base.name == "flux.1-schnell" and said.base.stated


def test_a_module_the_base_lacks_is_left_over_and_said() -> None:
    tensors = filled(attention("sd1.5") | pair("lora_unet_no_such_block_to_q", 320, 320))
    adapter = read("kohya", tensors)
    assert set(adapter.leftovers) == {"lora_unet_no_such_block_to_q.lora_up.weight", "lora_unet_no_such_block_to_q.lora_down.weight"}
    assert [finding.code for finding in adapter.findings] == ["unknown-module"]


def test_a_module_named_twice_loses_nothing() -> None:
    twice = pair("lora_te1_text_model_encoder_layers_0_mlp_fc1", 3072, 768)
    adapter = read("kohya", filled(attention("sd1.5") | twice))
    assert set(adapter.leftovers) == set(twice) and [finding.code for finding in adapter.findings] == ["unknown-module"]


def test_an_orphan_is_left_over_and_said() -> None:
    tensors = filled(attention("sd1.5"))
    del tensors[f"{LAYER}.lora_up.weight"]
    adapter = read("kohya", tensors)
    assert set(adapter.leftovers) == {f"{LAYER}.lora_down.weight", f"{LAYER}.alpha"}
    assert [finding.code for finding in adapter.findings] == ["orphan"]
    with pytest.raises(DeadAdapterError):
        read("kohya", filled({f"{LAYER}.lora_down.weight": [4, 320], f"{LAYER}.alpha": []}))


def test_factors_that_do_not_fit_name_the_module() -> None:
    with pytest.raises(MalformedError, match=LAYER):
        read("kohya", filled({f"{LAYER}.lora_down.weight": [4, 320], f"{LAYER}.lora_up.weight": [320, 8]}))


def test_unknown_words_are_never_dropped() -> None:
    tensors = filled(attention("sd1.5")) | filled({f"{LAYER}.lora_magic": [3], "something.else": [2], "lora_unet_lonely.alpha": []})
    adapter = read("kohya", tensors)
    assert set(adapter.leftovers) == {f"{LAYER}.lora_magic", "something.else", "lora_unet_lonely.alpha"}


def test_extras_are_refused_by_name_and_tokens_are_bundled() -> None:
    adapter = read("kohya", filled(attention("sd1.5")))
    token = filled({"t": [2, 768]})["t"]
    adapter.extras = [Extra(ExtraKind.TEXTUAL_INVERSION, "<s1>", token)]
    out = written("kohya", adapter)
    assert "bundle_emb.<s1>.string_to_param.*" in out.tensors
    again = read("kohya", out.tensors, out.metadata)
    assert [(extra.kind, extra.name) for extra in again.extras] == [(ExtraKind.TEXTUAL_INVERSION, "<s1>")]
    adapter.extras = [Extra(ExtraKind.SAVED_MODULE, "score.weight", token)]
    with pytest.raises(RefusedError, match=r"saved-module score\.weight.*--drop"):
        written("kohya", adapter)


def test_without_a_base_names_cannot_be_made() -> None:
    adapter = one_layer("unet.mid_block.attentions.0.proj_in", Scaling())
    with pytest.raises(RefusedError, match="--base"):
        written("kohya", adapter)


# Names, restated from sd-scripts networks/lora.py LoRANetwork.create_modules: prefix, name of a listed class, name of its Linear or Conv2d.
CLASSES = {
    "lora_unet": ("Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"),
    "lora_te": ("CLIPAttention", "CLIPSdpaAttention", "CLIPMLP"),
}


def test_names_are_those_sd_scripts_makes() -> None:
    pytest.importorskip("diffusers")
    from tests.dialects import pipelines

    pipe = pipelines.sd15()
    base = pipelines.base_of(pipe)
    expected = set()
    for prefix, root in (("lora_unet", pipe.unet), ("lora_te", pipe.text_encoder)):
        for name, module in root.named_modules():
            if type(module).__name__ in CLASSES[prefix]:
                for child, leaf in module.named_modules():
                    if type(leaf).__name__ in ("Linear", "Conv2d", "LoRACompatibleConv", "LoRACompatibleLinear"):
                        inner = "text_model." if prefix == "lora_te" else ""
                        expected.add(f"{prefix}.{inner}{name}.{child}".replace(".", "_"))
    assert len(expected) > 100
    assert expected <= set(layout(base, "kohya").foreign)


# Hashes, restated from sd-scripts library/train_util.py precalculate_safetensors_hashes.
def sd_scripts_hashes(tensors: dict[str, Any], metadata: dict[str, str]) -> tuple[str, str]:
    from safetensors.torch import save

    stream = BytesIO(save(tensors, {key: value for key, value in metadata.items() if key.startswith("ss_")}))
    length = int.from_bytes(stream.read(8), "little")
    stream.seek(8 + length)
    model = hashlib.sha256(stream.read()).hexdigest()
    stream.seek(0x100000)
    return model, hashlib.sha256(stream.read(0x10000)).hexdigest()[:8]


@pytest.mark.parametrize(
    "metadata",
    [{}, {"ss_a": "b"}, {"ss_tag_frequency": '{"ä\\n\x01": "\U0001f600/\x7f"}', "modelspec.title": "x" * 1000}, {"format": "pt"}],
    ids=["none", "one", "odd", "other"],
)
@pytest.mark.parametrize("elements", [10, 300_000, 700_000])
def test_hashes_are_sd_scripts_own(metadata: dict[str, str], elements: int) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(elements)
    arrays = {"b.weight": rng.standard_normal(elements).astype(np.float32), "a.alpha": np.array(4, np.float16), "c": rng.integers(0, 9, 7)}
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    tensors["d"] = torch.randn(3).to(torch.bfloat16)
    ours = {name: Tensor.of(array) for name, array in arrays.items()}
    import ml_dtypes

    ours["d"] = Tensor.of(tensors["d"].view(torch.int16).numpy().view(ml_dtypes.bfloat16))
    assert hashes(ours, metadata) == sd_scripts_hashes(tensors, metadata)


def test_metadata_of_a_kohya_file_is_kept_and_its_hashes_made_anew() -> None:
    torch = pytest.importorskip("torch")
    tensors = filled(attention("sd1.5"))
    said = {
        "ss_network_dim": "4",
        "ss_tag_frequency": "{}",
        "modelspec.title": "mine",
        "sshs_model_hash": "stale",
        "sshs_legacy_hash": "stale",
    }
    out = written("kohya", read("kohya", tensors, said))
    model, legacy = sd_scripts_hashes({name: torch.from_numpy(tensor.read()) for name, tensor in tensors.items()}, said)
    assert dict(out.metadata) == said | {"sshs_model_hash": model, "sshs_legacy_hash": legacy}
    assert not written("kohya", read("kohya", tensors)).metadata


def test_metadata_is_filled_in_for_other_sources() -> None:
    adapter = read("kohya", filled(attention("sdxl"), alpha=2.0))
    adapter.dialect = "peft"
    found = written("kohya", adapter).metadata
    expected = {
        "ss_network_module": "networks.lora", "ss_network_dim": "4", "ss_network_alpha": "2.0", "ss_base_model_version": "sdxl_base_v1-0",
        "ss_v2": "False", "modelspec.sai_model_spec": "1.0.1", "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models", "modelspec.title": "LoRA", "modelspec.resolution": "1024x1024",
    }  # fmt: skip
    assert {key: found[key] for key in expected} == expected
    assert set(found) - set(expected) == {"sshs_model_hash", "sshs_legacy_hash"}


def test_match_says_what_it_rests_on() -> None:
    member = dialects.get("kohya")
    match = member.match(tensor_file(filled(attention("sd1.5")), {"ss_network_module": "networks.lora"}))
    assert match is not None and match.confidence > 0.9
    assert "ss_network_module" in " ".join(match.evidence) and "names" in match.evidence[0]
    assert member.match(tensor_file(filled({"unet.down_blocks.0.to_q.lora_down.weight": [4, 4]}))) is None
    assert member.match(tensor_file(filled({"lora_unet_x.alpha": []}))) is None


@pytest.mark.parametrize("name", ["flux_lora_kohya_format", "krea2_lora_kohya_format"])
def test_key_sets_go_to_diffusers_and_back(name: str, corpus: Path) -> None:
    tensors = keyset(corpus / "keysets" / f"{name}.json")
    adapter = read("kohya", tensors)
    assert adapter.layout == "reference" and not adapter.leftovers
    same(dict(written("kohya", adapter).tensors), tensors)
    out = written("diffusers", adapter)
    again = read("diffusers", out.tensors, out.metadata)
    assert again.deltas.keys() == adapter.deltas.keys()
    same(dict(written("kohya", again).tensors), tensors)


def test_flux_as_diffusers_own_converter_reads_it(corpus: Path) -> None:
    """Same modules and the same dW as _convert_kohya_flux_lora_to_diffusers, which bakes alpha / rank into the factors."""
    torch = pytest.importorskip("torch")
    conversion = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    everything = keyset(corpus / "keysets" / "flux_lora_kohya_format.json", dtype=np.float32)
    blocks = ("double_blocks_0_", "single_blocks_0_", "double_blocks_18_", "single_blocks_37_")
    tensors = {name: tensor for name, tensor in everything.items() if any(block in name for block in blocks)}
    theirs = conversion._convert_kohya_flux_lora_to_diffusers({name: torch.from_numpy(tensor.read()) for name, tensor in tensors.items()})
    modules = {name.rsplit(".lora_", 1)[0] for name in theirs}
    adapter = read("kohya", tensors)
    assert {target.module for target in adapter.deltas} == modules
    for target, delta in adapter.deltas.items():
        baked = LoRA(*(Tensor.of(theirs[f"{target.module}.{factor}.weight"].numpy()) for factor in ("lora_B", "lora_A")), scaling=BAKED)
        assert distance({target: delta}, {target: baked}) < 1e-6, target


def test_flux_parts_with_their_own_down_are_joined_exactly() -> None:
    base = inventory.load("flux.1-dev")
    names = [f"transformer.transformer_blocks.0.attn.{part}" for part in ("to_q", "to_k", "to_v")]
    factors = filled({f"{name} {role}": shape for name in names for role, shape in (("up", [3072, 4]), ("down", [4, 3072]))}, np.float32)
    adapter = Adapter({Target(name): LoRA(factors[f"{name} up"], factors[f"{name} down"], Scaling(alpha=2.0)) for name in names}, "test")
    out = written("kohya", adapter, base=base)
    down, up = (out.tensors[f"lora_unet_double_blocks_0_img_attn_qkv.lora_{role}.weight"] for role in ("down", "up"))
    assert (down.shape, up.shape) == ((12, 3072), (9216, 12))
    assert out.tensors["lora_unet_double_blocks_0_img_attn_qkv.alpha"].scalar() == 6.0
    whole = 0.5 * up.read() @ down.read()
    for number, name in enumerate(names):
        expected = 0.5 * factors[f"{name} up"].read() @ factors[f"{name} down"].read()
        assert np.abs(whole[number * 3072 : (number + 1) * 3072] - expected).max() < 1e-5


def test_part_of_a_fused_weight_is_padded_with_rows_that_do_nothing() -> None:
    base = inventory.load("flux.1-dev")
    name = "transformer.single_transformer_blocks.3.proj_mlp"
    factors = filled({"up": [12288, 4], "down": [4, 3072]})
    out = written("kohya", Adapter({Target(name): LoRA(factors["up"], factors["down"])}, "test"), base=base)
    up = out.tensors["lora_unet_single_blocks_3_linear1.lora_up.weight"].read()
    assert up.shape == (21504, 4) and not up[:9216].any() and (up[9216:] == factors["up"].read()).all()


def flux_parts(alphas: list[float | None], rank: int = 4) -> Adapter:
    """Every attention part of two blocks with factors of its own; the rest of linear1 untouched."""
    adapter = Adapter({}, "test")
    names = [f"transformer.{kind}.0.attn.to_{part}" for kind in ("transformer_blocks", "single_transformer_blocks") for part in "qkv"]
    for number, name in enumerate(names):
        factors = filled({"up": [3072, rank], "down": [rank, 3072]}, seed=number)
        adapter.deltas[Target(name)] = LoRA(factors["up"], factors["down"], Scaling(alpha=alphas[number // 3]))
    return adapter


@pytest.mark.parametrize("alphas", [[None, None], [2.0, 4.0], [4.0, None]])
def test_joined_parts_come_apart_bit_for_bit(alphas: list[float | None]) -> None:
    base = inventory.load("flux.1-dev")
    adapter = flux_parts(alphas)
    out = written("kohya", adapter, base=base)
    assert len([name for name in out.tensors if name.endswith("lora_up.weight")]) == 2
    again = read("kohya", out.tensors, out.metadata, base=base)
    assert again.deltas.keys() == adapter.deltas.keys() and "upparam.parts" not in again.metadata
    for target, delta in adapter.deltas.items():
        assert again.deltas[target].scaling == delta.scaling
        same(dict(again.deltas[target].factors()), dict(delta.factors()))
    same(dict(written("kohya", again, base=base).tensors), dict(out.tensors))


@pytest.mark.parametrize(
    "lie",
    [
        "{}",
        "nonsense",
        "[]",
        '{"lora_unet_single_blocks_0_linear1":[null,null,null,null]}',
        '{"lora_unet_single_blocks_0_linear1":[[0,2,2],null,null,null]}',
    ],
)
def test_what_metadata_says_of_parts_is_believed_only_where_the_factors_bear_it_out(lie: str) -> None:
    base = inventory.load("flux.1-dev")
    adapter = flux_parts([2.0, 2.0])
    out = written("kohya", adapter, base=base)
    again = read("kohya", out.tensors, dict(out.metadata) | {"upparam.parts": lie}, base=base)
    for target, delta in adapter.deltas.items():
        assert distance({target: delta}, {target: again.deltas[target]}) < 1e-6


@pytest.mark.parametrize(
    "name",
    [
        "sd15-justin",
        "sd-vfph55",
        "sd15-haseebae",
        "sd15-catundchat/pytorch_lora_weights.safetensors",
        "cloneofsimo/lora_disney.safetensors",
    ],
)
def test_corpus_files_convert_to_kohya_with_nothing_left_over(name: str, corpus: Path, tmp_path: Path) -> None:
    path = corpus / name
    path = path / "pytorch_lora_weights.safetensors" if path.is_dir() else path
    receipt = convert(path, tmp_path / "lora.safetensors", "kohya")
    source, again = open_adapter(path), open_adapter(tmp_path / "lora.safetensors")
    assert again.dialect == "kohya" and not again.leftovers and again.deltas.keys() == source.deltas.keys()
    assert f"{len(source.deltas)} of {len(source.deltas)} modules bit-identical" in receipt.proofs[0]
    assert again.metadata["sshs_model_hash"] == hashes(dict(open_file_tensors(tmp_path / "lora.safetensors")), {})[0]


def open_file_tensors(path: Path) -> dict[str, Tensor]:
    from upparam.containers import open_file

    return open_file(path).tensors


@pytest.mark.parametrize("prefix", ["lora_unet_", "lycoris_"])
@pytest.mark.parametrize("component", ["", "unet"])
def test_a_denoiser_outside_its_pipeline_gets_what_is_named_after_it(tmp_path: Path, prefix: str, component: str) -> None:
    """A lone unet folder of no known model: its own names, underscored, follow the prefix."""
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
    rng = np.random.default_rng(0)
    weight, up, down = (rng.standard_normal(shape).astype(np.float32) for shape in ((24, 40), (24, 2), (2, 40)))
    base = tmp_path / "base" / component
    base.mkdir(parents=True)
    save_file({f"{name}.weight": weight}, base / "diffusion_pytorch_model.safetensors")
    if component:
        (tmp_path / "base/model_index.json").write_text('{"unet": ["diffusers", "UNet2DConditionModel"]}')
    stem = prefix + name.replace(".", "_")
    save_file(
        {f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": down, f"{stem}.alpha": np.array(2, np.float32)},
        tmp_path / "a.safetensors",
    )
    merge(tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "out")
    got = load_file(tmp_path / "out" / component / "diffusion_pytorch_model.safetensors")[f"{name}.weight"]
    assert np.array_equal(got, (weight + up.astype(np.float64) @ down).astype(np.float32))


@pytest.mark.parametrize("magnitudes", [False, True])
def test_joined_parts_of_another_rule_and_with_magnitudes_come_apart_bit_for_bit(magnitudes: bool, tmp_path: Path) -> None:
    """alpha / sqrt(rank) becomes the alpha that means the same; the magnitudes of rows go where their rows go."""
    base = inventory.load("flux.1-dev")
    adapter = flux_parts([2.0, 2.0])
    for number, (target, delta) in enumerate(adapter.deltas.items()):
        assert isinstance(delta, LoRA)
        scaling = Scaling(ScaleRule.ALPHA_OVER_SQRT_RANK, 2.0)
        adapter.deltas[target] = LoRA(delta.up, delta.down, scaling)
        if magnitudes:
            magnitude = filled({"m": [3072]}, seed=50 + number)["m"]
            adapter.deltas[target] = DoRA(delta.up, delta.down, magnitude, scaling)
    if magnitudes:
        # Of linear1 the rows of the MLP must be there: what norms they have is not known.
        adapter.deltas = {target: delta for target, delta in adapter.deltas.items() if "single" not in target.module}
    write_adapter(adapter, tmp_path / "a.safetensors", "lycoris", read=ReadOptions(base=base))
    again = open_adapter(tmp_path / "a.safetensors", options=ReadOptions(base=base))
    assert again.deltas.keys() == adapter.deltas.keys()
    for target, delta in adapter.deltas.items():
        assert again.deltas[target].scale == delta.scale
        same(dict(again.deltas[target].factors()), dict(delta.factors()))


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"ss_network_dim": "4"}, []), ({"ss_network_dim": "Dynamic"}, []), ({}, []), ({"ss_base_model_version": "sd_v1"}, []),
        ({"ss_network_dim": "2", "ss_network_args": '{"split_qkv": "True"}'}, []),
        ({"ss_network_dim": "128"}, ["the metadata states a rank that no module has"]),
        ({"ss_base_model_version": "sdxl_base_v1-0"}, ["the metadata names sdxl, and the modules are those of sd1.5"]),
    ],
)  # fmt: skip
def test_metadata_that_contradicts_the_tensors_is_said(metadata: dict[str, str], said: list[str]) -> None:
    shapes = {}
    for module in inventory.load("sd1.5").modules:
        if module.path.startswith("unet.") and module.path.endswith(("to_q", "to_k", "to_v")):
            name = f"lora_unet_{module.path.removeprefix('unet.').replace('.', '_')}"
            shapes |= {f"{name}.lora_down.weight": [4, module.shape[1]], f"{name}.lora_up.weight": [module.shape[0], 4]}
    adapter = read("kohya", filled(shapes), metadata)
    assert [finding.message for finding in adapter.findings if finding.code == "metadata-differs"] == said


def test_ranks_that_changed_in_another_dialect_are_stated_as_they_are(tmp_path: Path) -> None:
    base = inventory.load("sd1.5")
    shapes = {
        f"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn{n}_to_q.{word}.weight": shape
        for n in "12" for word, shape in (("lora_down", [8, 1280]), ("lora_up", [1280, 8]))
    }  # fmt: skip
    stated = {"ss_network_dim": "8", "ss_network_alpha": "8", "ss_tag_frequency": "{}", "modelspec.hash_sha256": "0x00"}
    read_as = ReadOptions(base=base)
    adapter = read("kohya", filled(shapes), stated, base=base)
    write_adapter(adapter, tmp_path / "a", "diffusers", read=read_as)
    resize(tmp_path / "a", tmp_path / "b", RankRule(4), read=read_as)
    convert(tmp_path / "b", tmp_path / "c.safetensors", "kohya", read=read_as)
    found = open_adapter(tmp_path / "c.safetensors", options=read_as)
    assert found.metadata["ss_network_dim"] == "4" and found.metadata["ss_tag_frequency"] == "{}"
    assert "modelspec.hash_sha256" not in found.metadata
    convert(tmp_path / "a", tmp_path / "d.safetensors", "kohya", read=read_as)
    assert open_adapter(tmp_path / "d.safetensors", options=read_as).metadata["ss_network_dim"] == "8"
