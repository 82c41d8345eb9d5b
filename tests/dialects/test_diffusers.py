"""diffusers, current and old: names of every year, the adapter metadata in the header, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.dialects.files import filled, keyset, read, same, tensor_file, written

from upparam import dialects
from upparam.adapter import Adapter, Extra, ExtraKind, Target
from upparam.algorithms.base import ScaleRule, Scaling
from upparam.algorithms.lora import LoRA
from upparam.bases import inventory
from upparam.containers.safetensors import write
from upparam.dialects.carried import ADAPTER_CONFIG
from upparam.dialects.diffusers import FORMS
from upparam.dialects.peft_names import LANGUAGE
from upparam.errors import DeadAdapterError, MalformedError, RefusedError
from upparam.operations.convert import convert
from upparam.operations.opening import open_adapter
from upparam.tensors import Tensor

TO_Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def named(base: str, form: str = "peft", rank: int = 4, bare: str = "") -> dict[str, list[int]]:
    """Names of the attention of a base in one of diffusers' forms."""
    shapes: dict[str, list[int]] = {}
    for module in inventory.load(base).modules:
        attention = any(
            module.path.endswith(part) for part in ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
        )
        if attention and ".SelfAttention" not in module.path:
            name = module.path.removeprefix(bare)
            shapes[f"{name}.{FORMS[form].down}"] = [rank, module.shape[1]]
            shapes[f"{name}.{FORMS[form].up}"] = [module.shape[0], rank]
    return shapes


@pytest.mark.parametrize("base", ["sd1.5", "sd2", "sdxl", "flux.1-dev", "sd3-medium", "qwen-image"])
@pytest.mark.parametrize("form", list(FORMS))
def test_every_form_is_read_and_written_again(base: str, form: str) -> None:
    tensors = filled(named(base, form))
    adapter = read("diffusers", tensors)
    assert adapter.layout == "reference" and not adapter.leftovers and not adapter.findings
    assert adapter.base is not None and base in (adapter.base.name, *adapter.base.lookalikes)
    assert all(delta.scale == 1.0 and delta.alpha is None for delta in adapter.deltas.values())
    out = written("diffusers", adapter)
    same(dict(out.tensors), tensors)
    assert ADAPTER_CONFIG not in out.metadata


def test_forms_mixed_as_old_scripts_mixed_them() -> None:
    shapes = {name: shape for name, shape in named("sd1.5", "linear").items() if name.startswith("unet.")}
    shapes |= {name: shape for name, shape in named("sd1.5", "text").items() if name.startswith("text_encoder.")}
    shapes["unet.mid_block.resnets.0.conv1.lora_A.weight"], shapes["unet.mid_block.resnets.0.conv1.lora_B.weight"] = (
        [4, 1280, 3, 3],
        [1280, 4, 1, 1],
    )
    shapes[f"{TO_Q}.lora_A.weight"], shapes[f"{TO_Q}.lora_B.weight"] = (
        shapes.pop(f"{TO_Q}.lora.down.weight"),
        shapes.pop(f"{TO_Q}.lora.up.weight"),
    )
    tensors = filled(shapes)
    same(dict(written("diffusers", read("diffusers", tensors)).tensors), tensors)


@pytest.mark.parametrize(("base", "bare"), [("sd1.5", "unet."), ("qwen-image", "transformer."), ("flux.1-dev", "transformer.")])
def test_names_without_a_component(base: str, bare: str) -> None:
    shapes = {name: shape for name, shape in named(base, bare=bare).items() if not name.startswith("text_encoder")}
    adapter = read("diffusers", filled(shapes))
    assert all(target.module.startswith(bare) for target in adapter.deltas) and adapter.layout == "reference"
    same(dict(written("diffusers", adapter).tensors), filled(shapes))


def test_key_sets_of_the_corpus(corpus: Path) -> None:
    for name, base in (("flux_lora_diffusers_format", "flux.1-dev"), ("qwen_image_lora_diffusers_format", "qwen-image")):
        tensors = keyset(corpus / "keysets" / f"{name}.json")
        match = dialects.get("diffusers").match(tensor_file(tensors))
        assert match is not None and match.confidence >= 0.7
        adapter = read("diffusers", tensors)
        assert adapter.base is not None and base in (adapter.base.name, *adapter.base.lookalikes) and not adapter.leftovers
        same(dict(written("diffusers", adapter).tensors), tensors)
        if base == "qwen-image":
            # Three attention layers of this width are FLUX's as well as Qwen's; kohya's names differ between them.
            with pytest.raises(RefusedError, match=r"fit this adapter alike.*--base"):
                written("kohya", adapter)
        adapter = read("diffusers", tensors, base=inventory.load(base))
        back = written("kohya", adapter)
        again = read("kohya", back.tensors, back.metadata, base=inventory.load(base))
        assert again.deltas.keys() == adapter.deltas.keys()
        for target, delta in adapter.deltas.items():
            same(dict(again.deltas[target].factors()), dict(delta.factors()))


def config(**values: Any) -> dict[str, str]:
    return {"format": "pt", ADAPTER_CONFIG: json.dumps(values)}


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ({"unet.r": 4, "unet.lora_alpha": 8}, 2.0),
        ({"unet.r": 4, "unet.lora_alpha": 8, "unet.use_rslora": True}, 4.0),
        ({"unet.r": 16, "unet.lora_alpha": 8}, 0.5),
        ({"unet.r": 16, "unet.rank_pattern": {"attn1.to_q": 4}, "unet.lora_alpha": 8}, 2.0),
        ({"unet.r": 4, "unet.lora_alpha": 8, "unet.alpha_pattern": {"^down_blocks.0.*to_q": 1}}, 0.25),
        ({"unet.r": 4, "unet.lora_alpha": 8, "unet.alpha_pattern": {"(broken": 1}}, 2.0),
        ({"transformer.r": 4, "transformer.lora_alpha": 8}, 1.0),
    ],
)
def test_header_metadata_gives_the_scale_as_peft_reads_it(values: dict[str, Any], scale: float) -> None:
    said = config(**values)
    adapter = read("diffusers", filled(named("sd1.5")), said)
    assert adapter.deltas[Target(TO_Q)].scale == scale
    if any(key.startswith("unet") for key in values):
        assert dict(written("diffusers", adapter).metadata) == said


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({}, None),
        ({"r": 8}, "rank-differs"),
        ({"r": None}, "rank-missing"),
        ({"target_modules": ["to_k"]}, None),
        ({"use_dora": True}, "condition"),
        ({"lora_alpha": None}, "alpha-missing"),
    ],
)
def test_header_metadata_that_does_not_go_with_the_factors_is_said(changed: dict[str, Any], code: str | None) -> None:
    """diffusers makes PEFT's config of it as it is (diffusers utils/peft_utils.py)."""
    held = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj"],
        **changed,
    }
    adapter = read("diffusers", filled(named("sd1.5")), config(**{f"unet.{key}": value for key, value in held.items()}))
    said = {finding.code for finding in adapter.findings} & {"rank-differs", "rank-missing", "not-targeted", "condition", "alpha-missing"}
    assert said == ({code} if code else set())
    assert (adapter.deltas[Target(TO_Q)].scale is None) is (code == "alpha-missing")


@pytest.mark.parametrize("text", ["[1]", "{", "7"])
def test_broken_header_metadata_is_said(text: str) -> None:
    with pytest.raises(MalformedError, match=ADAPTER_CONFIG):
        read("diffusers", filled(named("sd1.5")), {ADAPTER_CONFIG: text})


def test_alphas_go_into_the_header_and_come_back() -> None:
    adapter = read("diffusers", filled(named("sd1.5")))
    for number, (target, delta) in enumerate(adapter.deltas.items()):
        assert isinstance(delta, LoRA)
        adapter.deltas[target] = LoRA(delta.up, delta.down, Scaling(alpha=[2.0, 4.0, 0.5][number % 3]))
    out = written("diffusers", adapter)
    again = read("diffusers", out.tensors, out.metadata)
    assert {target: delta.scaling for target, delta in again.deltas.items()} == {
        target: delta.scaling for target, delta in adapter.deltas.items()
    }
    values = json.loads(out.metadata[ADAPTER_CONFIG])
    assert values["unet.lora_alpha"] in (2, 4) and set(values["unet.alpha_pattern"].values()) >= {0.5}
    assert "text_model." not in str(values["text_encoder.target_modules"])


def test_metadata_that_no_longer_holds_is_made_anew() -> None:
    adapter = read("diffusers", filled(named("sd1.5")), config(**{"unet.r": 4, "unet.lora_alpha": 8}))
    for target, delta in adapter.deltas.items():
        assert isinstance(delta, LoRA)
        adapter.deltas[target] = LoRA(delta.up, delta.down, Scaling(alpha=1.0))
    assert json.loads(written("diffusers", adapter).metadata[ADAPTER_CONFIG])["unet.lora_alpha"] == 1


def test_alpha_tensors_are_kept_as_tensors() -> None:
    tensors = filled(named("qwen-image", "kohya"))
    for name in [name for name in tensors if name.endswith("lora_up.weight")]:
        tensors[name.replace("lora_up.weight", "alpha")] = Tensor.of(np.array(2.0, np.float32))
    adapter = read("diffusers", tensors)
    assert {delta.scale for delta in adapter.deltas.values()} == {0.5} and not adapter.leftovers
    same(dict(written("diffusers", adapter).tensors), tensors)


def test_orphans_unknown_names_and_nothing_at_all() -> None:
    tensors = filled(named("sd1.5"))
    del tensors[f"{TO_Q}.lora_B.weight"]
    tensors |= filled({"unet.mystery": [3], "unet.lonely.alpha": []})
    adapter = read("diffusers", tensors)
    assert set(adapter.leftovers) == {f"{TO_Q}.lora_A.weight", "unet.mystery", "unet.lonely.alpha"}
    assert [finding.code for finding in adapter.findings] == ["orphan"]
    with pytest.raises(DeadAdapterError):
        read("diffusers", filled({f"{TO_Q}.lora_A.weight": [4, 320]}))
    with pytest.raises(MalformedError, match="attn1"):
        read("diffusers", filled({f"{TO_Q}.lora_A.weight": [4, 320], f"{TO_Q}.lora_B.weight": [320, 5]}))


@pytest.mark.parametrize(("dialect", "factor"), [("diffusers", "to_q.lora_{}.weight"), ("diffusers-old", "processor.to_q_lora.{}.weight")])
def test_a_module_named_twice_loses_nothing(dialect: str, factor: str) -> None:
    roles = ("A", "B") if dialect == "diffusers" else ("down", "up")
    inner = TO_Q.removeprefix("unet.").removesuffix("to_q")
    shapes = {
        f"{prefix}{inner}{factor.format(role)}": shape
        for prefix in ("unet.", "")
        for role, shape in zip(roles, ([4, 320], [320, 4]), strict=True)
    }
    adapter = read(dialect, filled(shapes))
    assert set(adapter.leftovers) == {name for name in shapes if not name.startswith("unet.")}
    assert {finding.code for finding in adapter.findings} == {"named-twice"} and len(adapter.deltas) == 1


def adapter_of(module: str, **more: Any) -> Adapter:
    tensors = filled({"up": [64, 4], "down": [4, 64]})
    return Adapter({Target(module): LoRA(tensors["up"], tensors["down"], **more)}, "test")


@pytest.mark.parametrize(
    ("adapter", "why"),
    [
        (adapter_of("text_encoder_2.encoder.block.0.layer.0.SelfAttention.q"), "T5"),
        (adapter_of("model.layers.0.self_attn.q_proj"), "component"),
        (adapter_of("unet.conv_in", embedding=True), "LoRA delta of an embedding"),
        (Adapter({Target("unet.x", parameter="bias"): adapter_of("unet.x").deltas[Target("unet.x")]}, "test"), "bias"),
    ],
)
def test_what_diffusers_does_not_load_is_refused(adapter: Adapter, why: str) -> None:
    with pytest.raises(RefusedError, match=why):
        written("diffusers", adapter)


def test_extras_are_refused_by_name() -> None:
    adapter = read("diffusers", filled(named("sd1.5")))
    adapter.extras = [Extra(ExtraKind.TEXTUAL_INVERSION, "<s1>", filled({"t": [1, 768]})["t"])]
    for dialect in ("diffusers", "diffusers-old"):
        with pytest.raises(RefusedError, match=r"textual-inversion <s1>.*--drop"):
            written(dialect, adapter)


def test_slices_of_a_fused_weight_need_the_base() -> None:
    adapter = adapter_of("unet.x")
    adapter.deltas = {Target("unet.x", (0, 64)): next(iter(adapter.deltas.values()))}
    with pytest.raises(RefusedError, match="--base"):
        written("diffusers", adapter)
    name = "transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj"
    tensors = filled({"up": [6144, 4], "down": [4, 6144]})
    adapter = Adapter({Target(name, (6144, 12288)): LoRA(tensors["up"], tensors["down"])}, "test")
    up = written("diffusers", adapter, base=inventory.load("flux.2-dev")).tensors[f"{name}.lora_B.weight"].read()
    assert up.shape == (55296, 4) and (up[6144:12288] == tensors["up"].read()).all() and not up[:6144].any() and not up[12288:].any()


# diffusers-old


def old(base: str, prefix: str = "unet.") -> dict[str, list[int]]:
    parts = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out.0": "to_out"}
    shapes: dict[str, list[int]] = {}
    for module in inventory.load(base).modules:
        for tail, part in parts.items():
            if module.path.startswith("unet.") and module.path.endswith("." + tail):
                name = f"{prefix}{module.path[5:].removesuffix('.' + tail)}.processor.{part}_lora"
                shapes |= {f"{name}.down.weight": [4, module.shape[1]], f"{name}.up.weight": [module.shape[0], 4]}
    return shapes


@pytest.mark.parametrize("base", ["sd1.5", "sd2"])
@pytest.mark.parametrize("prefix", ["unet.", ""])
def test_old_processors_with_and_without_their_component(base: str, prefix: str) -> None:
    tensors = filled(old(base, prefix))
    match = dialects.get("diffusers-old").match(tensor_file(tensors))
    assert match is not None and match.confidence > 0.9 and ("without" in match.evidence[0]) == (not prefix)
    adapter = read("diffusers-old", tensors)
    assert adapter.base is not None and adapter.base.name == base and not adapter.leftovers
    assert Target("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0") in adapter.deltas
    same(dict(written("diffusers-old", adapter).tensors), tensors)


def test_old_text_encoder_names() -> None:
    layer = "text_encoder.text_model.encoder.layers.0.self_attn"
    tensors = filled(
        {
            f"{layer}.{part}_lora.{role}.weight": shape
            for part in ("to_q", "to_out")
            for role, shape in (("down", [4, 768]), ("up", [768, 4]))
        }
    )
    adapter = read("diffusers-old", tensors)
    assert [target.module for target in adapter.deltas] == [f"{layer}.q_proj", f"{layer}.out_proj"]
    same(dict(written("diffusers-old", adapter).tensors), tensors)


def test_old_form_holds_attention_at_scale_one_only() -> None:
    with pytest.raises(RefusedError, match="not an attention projection"):
        written("diffusers-old", adapter_of("unet.mid_block.resnets.0.conv1"))
    for scaling in (Scaling(alpha=2.0), Scaling(ScaleRule.EXPLICIT, multiplier=20.0)):
        with pytest.raises(RefusedError, match="--bake-scale"):
            written("diffusers-old", adapter_of(TO_Q, scaling=scaling))
    assert written("diffusers-old", adapter_of(TO_Q, scaling=Scaling(alpha=4.0))).tensors


def test_old_orphans_and_others_are_left_over() -> None:
    tensors = filled(old("sd1.5"))
    gone = next(name for name in tensors if name.endswith("up.weight"))
    del tensors[gone]
    tensors |= filled({"unet.extra": [2]})
    adapter = read("diffusers-old", tensors)
    assert set(adapter.leftovers) == {gone.replace(".up.", ".down."), "unet.extra"}
    assert [finding.code for finding in adapter.findings] == ["orphan"]


@pytest.mark.parametrize(
    ("name", "dialect", "base", "count"),
    [
        ("sd15-diffusers-old-bin/pytorch_lora_weights.bin", "diffusers-old", "sd1.5", 128),
        ("sd15-catundchat/pytorch_lora_weights.bin", "diffusers-old", "sd1.5", 128),
        ("sd15-catundchat/pytorch_lora_weights.safetensors", "diffusers-old", "sd1.5", 128),
        ("sd15-haseebae/pytorch_lora_weights.safetensors", "diffusers-old", "sd1.5", 128),
        ("sd15-justin/pytorch_lora_weights.safetensors", "diffusers", "sd2", 128),
        ("sd-vfph55/pytorch_lora_weights.safetensors", "diffusers", "sd2", 128),
    ],
)
def test_corpus(name: str, dialect: str, base: str, count: int, corpus: Path, tmp_path: Path) -> None:
    adapter = open_adapter(corpus / name)
    assert (adapter.dialect, adapter.layout, len(adapter.deltas)) == (dialect, "reference", count)
    assert adapter.base is not None and adapter.base.name == base and adapter.base.confidence > 0.9
    assert not adapter.leftovers and not adapter.extras
    path: Path = corpus / name
    for number, to in enumerate(("kohya", "diffusers", "diffusers-old", "cloneofsimo", dialect)):
        out = tmp_path / f"{number}{'' if to.startswith('diffusers') else '.safetensors'}"
        convert(path, out, to)
        path = out
    again = open_adapter(path)
    assert list(again.deltas) and again.deltas.keys() == adapter.deltas.keys()
    for target, delta in adapter.deltas.items():
        same(dict(again.deltas[target].factors()), dict(delta.factors()))
        assert again.deltas[target].scale == delta.scale


def test_a_magnitude_under_two_names_is_no_one_magnitude() -> None:
    """PEFT has spelled it both ways; the second is left over, not put in the place of the first."""
    module = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    shapes = {f"{module}.lora_A.weight": [4, 320], f"{module}.lora_B.weight": [320, 4], f"{module}.lora_magnitude_vector": [320]}
    adapter = read("diffusers", filled(shapes | {f"{module}.lora_magnitude_vector.weight": [320]}))
    assert list(adapter.leftovers) == [f"{module}.lora_magnitude_vector.weight"]


@pytest.mark.parametrize(
    "module",
    [
        "transformer.h.0.attn.c_attn", "transformer.h.1.self_attention.query_key_value", "transformer.h.0.attn.q_proj", "transformer.wte",
        "transformer.encoder.layers.0.self_attention.query_key_value", "transformer.layer.0.attention.q_lin", "transformer.blocks.0.attn.Wqkv",
    ],
)  # fmt: skip
def test_language_models_whose_body_is_called_transformer_are_no_pipeline(module: str, tmp_path: Path) -> None:
    """Such names without `base_model.model.` are PEFT's, whose scale is unknown without its config; diffusers cannot hold them."""
    file = filled({f"{module}.lora_A.weight": [4, 8], f"{module}.lora_B.weight": [12, 4]})
    with (tmp_path / "a.safetensors").open("wb") as stream:
        write(stream, file)
    adapter = open_adapter(tmp_path / "a.safetensors")
    assert adapter.dialect == "peft" and next(iter(adapter.deltas.values())).scale is None
    pair = filled({"up": [12, 4], "down": [4, 8]})
    named = Adapter({Target(module): LoRA(pair["up"], pair["down"], Scaling(ScaleRule.ALPHA_OVER_RANK, 4.0))}, "test")
    with pytest.raises(RefusedError, match="not a module of a pipeline's component"):
        dialects.get("diffusers").write(named, {})


def test_no_module_of_a_pipeline_is_taken_for_a_language_models() -> None:
    pipelines = [inventory.load(name) for name in inventory.known()]
    paths = [
        path
        for base in pipelines
        for path in base.by_path
        if any(one.startswith(("unet.", "transformer.norm_out", "transformer.proj_out")) for one in base.by_path)
    ]
    assert len(paths) > 20_000 and not [path for path in paths if LANGUAGE.fullmatch(path)]
