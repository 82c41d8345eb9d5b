"""What a merge decides before the first byte: names, orientation, slices, what does not fit and what would change nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.operations.merging import NUMPY, adapter, load, lora, save

from upparam.adapter import Extra, ExtraKind, Target
from upparam.algorithms.base import Scaling
from upparam.algorithms.dora import DoRA
from upparam.algorithms.experts import ExpertLoRA
from upparam.bases import inventory, layouts
from upparam.bases.header import base_from_shapes
from upparam.errors import AmbiguousError, MismatchError, OutputExistsError, RefusedError, UsageError
from upparam.operations.merge import matching, merge, prepare
from upparam.operations.unmerge import unmerge
from upparam.report.merge import plan_text
from upparam.tensors import Tensor

RNG = np.random.default_rng(7)


def normal(*shape: int) -> Any:
    return RNG.standard_normal(shape).astype(np.float32)


def rank2(out: int, inn: int) -> Any:
    return lora(normal(out, 2), normal(2, inn))


def dense(delta: Any) -> Any:
    return delta.load().rows(0, delta.shape[0])


def merged(base: Path, item: Any, out: Path, **options: Any) -> dict[str, Any]:
    merge(base, item, out, **options)
    return load(out)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("model.layers.0.q_proj", "model.layers.0.q_proj"),
        ("base_model.model.model.layers.0.q_proj", "model.layers.0.q_proj"),
        ("layers.0.q_proj", "model.layers.0.q_proj"),
        ("transformer.h.0.mlp", "h.0.mlp"),
        ("h.0.mlp", "transformer.h.0.mlp"),
        ("model.layers.0.q_proj", "language_model.model.layers.0.q_proj"),
        ("unet.down.0.to_q", "down.0.to_q"),
        ("down.0.to_q", "unet.down.0.to_q"),
        ("unet.down.0.to_q", "model.diffusion_model.down.0.to_q"),
    ],
)
def test_prefixes_may_differ(tmp_path: Path, ours: str, theirs: str) -> None:
    delta, weight = rank2(4, 6), normal(4, 6)
    base = save(tmp_path / "b.safetensors", {f"{theirs}.weight": weight, "x.weight": normal(2, 2)})
    got = merged(base, adapter({ours: delta}), tmp_path / "o.safetensors")
    assert np.array_equal(got[f"{theirs}.weight"], (weight.astype(np.float64) + dense(delta)).astype(np.float32))


def test_two_places_that_fit_are_not_chosen_between(tmp_path: Path) -> None:
    base = save(tmp_path / "b.safetensors", {f"{part}.layers.0.q_proj.weight": normal(4, 6) for part in ("vision", "text")})
    with pytest.raises(AmbiguousError, match="several parts of the base"):
        merge(base, adapter({"layers.0.q_proj": rank2(4, 6)}), tmp_path / "o.safetensors")


def test_what_does_not_fit_is_listed_before_anything_is_written(tmp_path: Path) -> None:
    base = save(tmp_path / "b.safetensors", {"a.q.weight": normal(4, 6), "a.k.weight": normal(4, 6)})
    wrong = adapter({"a.q": rank2(4, 6), "a.k": rank2(5, 6), "a.v": rank2(4, 6)})
    with pytest.raises(MismatchError) as caught:
        merge(base, wrong, tmp_path / "o.safetensors")
    line = caught.value.line()
    assert "2 parts" in line and "a.k: shape (5, 6) against a.k.weight (4, 6)" in line and "a.v: not in the base" in line
    assert [path.name for path in tmp_path.iterdir()] == ["b.safetensors"]
    merge(base, wrong, tmp_path / "o.safetensors", skip=["a.v", "*.k"])
    with pytest.raises(OutputExistsError):
        merge(base, wrong, tmp_path / "o.safetensors", skip=["a.v", "*.k"])


def test_nothing_to_change_is_refused_with_the_reason(tmp_path: Path) -> None:
    base = save(tmp_path / "b.safetensors", {"a.q.weight": normal(4, 6).astype(np.float16)})
    out = tmp_path / "o.safetensors"
    untrained = lora(np.zeros((4, 2), np.float32), normal(2, 6))
    with pytest.raises(RefusedError, match="1 delta, all zero"):
        merge(base, adapter({"a.q": untrained}), out)
    with pytest.raises(RefusedError, match="scale 0"):
        merge(base, (adapter({"a.q": rank2(4, 6)}), 0.0), out)
    with pytest.raises(RefusedError, match="1 target, all left out"):
        merge(base, adapter({"a.q": rank2(4, 6)}), out, only=["b.*"])
    with pytest.raises(RefusedError, match="identical to the base"):
        merge(base, (adapter({"a.q": rank2(4, 6)}), 1e-12), out)
    with pytest.raises(UsageError, match="no dtype"):
        merge(base, adapter({"a.q": rank2(4, 6)}), out, dtype="int3")
    assert [path.name for path in tmp_path.iterdir()] == ["b.safetensors"]


def test_rows_of_a_fused_weight(tmp_path: Path) -> None:
    weight = normal(12, 5)
    base = save(tmp_path / "b.safetensors", {"qkv.weight": weight})
    query, value, whole = rank2(4, 5), rank2(5, 5), rank2(12, 5)
    deltas = {Target("qkv", (0, 4)): query, Target("qkv", (7, 12)): value, Target("qkv"): whole}
    got = merged(base, adapter(deltas), tmp_path / "o.safetensors")["qkv.weight"]
    true = weight.astype(np.float64) + dense(whole)
    true[:4] += dense(query)
    true[7:] += dense(value)
    assert np.array_equal(got, true.astype(np.float32))


def gpt2(folder: Path, config: bool) -> dict[str, Any]:
    weights = {"h.0.attn.c_attn.weight": normal(6, 18), "h.0.attn.c_proj.weight": normal(6, 6), "h.0.mlp.c_fc.weight": normal(6, 24)}
    save(folder / "model.safetensors", weights)
    if config:
        (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    return weights


@pytest.mark.parametrize("config", [True, False])
def test_conv1d_weights_are_stored_the_other_way(tmp_path: Path, config: bool) -> None:
    weights = gpt2(tmp_path, config)
    square, wide, part = rank2(6, 6), rank2(24, 6), rank2(6, 6)
    item = adapter({"h.0.attn.c_proj": square, "h.0.mlp.c_fc": wide, Target("h.0.attn.c_attn", (12, 18)): part})
    got = merged(tmp_path / "model.safetensors", item, tmp_path / "o.safetensors")
    expected = {name: value.astype(np.float64) for name, value in weights.items()}
    expected["h.0.attn.c_proj.weight"] += dense(square).T
    expected["h.0.mlp.c_fc.weight"] += dense(wide).T
    expected["h.0.attn.c_attn.weight"][:, 12:] += dense(part).T
    for name, value in expected.items():
        assert np.array_equal(got[name], value.astype(np.float32)), name


def test_an_undecided_square_weight_is_an_error_and_a_decided_one_is_not(tmp_path: Path) -> None:
    base = save(tmp_path / "b.safetensors", {"a.proj.weight": normal(6, 6), "a.up.weight": normal(9, 6)})
    square = rank2(6, 6)
    with pytest.raises(AmbiguousError, match="square"):
        prepare(base, adapter({"a.proj": square}))
    assert not prepare(base, adapter({"a.proj": square}, transposed_base=False)).works["a.proj.weight"].pieces[0].transposed
    assert prepare(base, adapter({"a.proj": square}, transposed_base=True)).works["a.proj.weight"].pieces[0].transposed
    assert not prepare(base, adapter({"a.proj": square, "a.up": rank2(9, 6)})).works["a.proj.weight"].pieces[0].transposed
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert not prepare(base, adapter({"a.proj": square})).works["a.proj.weight"].pieces[0].transposed


def test_saved_modules_replace_and_new_heads_are_added(tmp_path: Path) -> None:
    weights = {"model.q.weight": normal(4, 6).astype(np.float16), "model.norm.weight": normal(6).astype(np.float16)}
    weights["model.q.bias"] = normal(4).astype(np.float16)
    base = save(tmp_path / "b.safetensors", weights)
    norm, bias, score = normal(6), normal(4), normal(2, 6)
    extras = [
        Extra(ExtraKind.SAVED_MODULE, "model.norm.weight", Tensor.of(norm)),
        Extra(ExtraKind.BIAS, "model.q.bias", Tensor.of(bias)),
        Extra(ExtraKind.SAVED_MODULE, "score.weight", Tensor.of(score)),
    ]
    item = adapter({"model.q": rank2(4, 6)}, extras=extras)
    receipt = merge(base, item, tmp_path / "o.safetensors")
    got = load(tmp_path / "o.safetensors")
    assert np.array_equal(got["model.norm.weight"], norm.astype(np.float16))
    assert np.array_equal(got["model.q.bias"], bias.astype(np.float16))
    assert np.array_equal(got["score.weight"], score)
    assert {finding.code for finding in receipt.findings} == {"added-tensor"}
    assert receipt.counts["tensors_changed"] == 3 and receipt.counts["tensors_added"] == 1


def test_counters_of_a_saved_module_are_taken_bit_for_bit(tmp_path: Path) -> None:
    """Batch norms have such: `num_batches_tracked`, int64 without a dimension."""
    weights = {
        "q.weight": normal(4, 6),
        "bn.num_batches_tracked": np.array(7),
        "bn.mask": np.array([True, False]),
        "head.weight": np.ones((4, 6), np.int8),
    }
    base = save(tmp_path / "b.safetensors", weights)
    counter, mask = np.array((1 << 60) + 1), np.array([False, True])
    kept = {"bn.num_batches_tracked": counter, "bn.mask": mask}
    extras = [Extra(ExtraKind.SAVED_MODULE, name, Tensor.of(array)) for name, array in kept.items()]
    receipt = merge(base, adapter({"q": rank2(4, 6)}, extras=extras), tmp_path / "o.safetensors", dtype="bf16")
    got = load(tmp_path / "o.safetensors")
    assert all(got[name].dtype == array.dtype and np.array_equal(got[name], array) for name, array in kept.items())
    assert receipt.counts["tensors_changed"] == 3
    whole = Extra(ExtraKind.SAVED_MODULE, "head.weight", Tensor.of(normal(4, 6)))
    with pytest.raises(RefusedError, match=r"head\.weight.*quantised or in another kind of number.*--drop saved-module"):
        prepare(base, adapter({"q": rank2(4, 6)}, extras=[whole]))


def test_what_is_brought_and_changed_is_counted_against_the_base(tmp_path: Path) -> None:
    weight = normal(4, 6)
    base = save(tmp_path / "b.safetensors", {"q.weight": weight})
    nothing = lora(np.full((4, 2), 1e-30, np.float32), np.full((2, 6), 1e-9, np.float32))
    saved = weight + 1
    saved[0] = weight[0]
    for number, (brought, count) in enumerate(((saved, 18), (weight, 0))):
        item = adapter({"q": nothing}, extras=[Extra(ExtraKind.SAVED_MODULE, "q.weight", Tensor.of(brought))])
        if count:
            assert merge(base, item, tmp_path / f"o{number}.safetensors").counts["elements_changed"] == count
        else:
            with pytest.raises(RefusedError, match="identical to the base"):
                merge(base, item, tmp_path / f"o{number}.safetensors")


def test_a_weight_that_one_adapter_brings_and_another_changes_is_said(tmp_path: Path) -> None:
    base = save(tmp_path / "b.safetensors", {"model.q.weight": normal(4, 6), "model.k.weight": normal(4, 6)})
    saved, delta = normal(4, 6), rank2(4, 6)
    whole = adapter({"model.k": rank2(4, 6)}, extras=[Extra(ExtraKind.SAVED_MODULE, "model.q.weight", Tensor.of(saved))])
    changes = adapter({"model.q": delta})
    for number, items in enumerate(([whole, changes], [changes, whole])):
        out = tmp_path / f"o{number}.safetensors"
        receipt = merge(base, items, out)
        assert [(finding.code, finding.subject) for finding in receipt.findings] == [("replaced-and-changed", "model.q.weight")]
        assert np.array_equal(load(out)["model.q.weight"], (saved + dense(delta)).astype(np.float32))
        plan = prepare(base, items)
        assert {change["tensor"]: change["replaced"] for change in plan.facts(0)["changes"]} == {
            "model.q.weight": True,
            "model.k.weight": False,
        }
        assert "model.q.weight float32 4x6: replaced whole, lora r=2 scale 1" in plan_text(plan, 0)
    both = adapter({"model.q": delta}, extras=whole.extras)
    assert not merge(base, both, tmp_path / "both.safetensors").findings  # an embedding saved beside its LoRA
    with pytest.raises(MismatchError, match=r"replaced by two adapters.*one adapter after the other"):
        prepare(base, [whole, both])


@pytest.mark.parametrize("dtype", [None, "float32", "bf16", "float16"])
def test_a_module_the_base_lacks_gets_the_dtype_asked_for(tmp_path: Path, dtype: str | None) -> None:
    base = save(tmp_path / "b.safetensors", {"model.q.weight": normal(4, 6).astype(np.float16), "ids": np.arange(3)})
    score = normal(2, 6)
    extras = [
        Extra(ExtraKind.SAVED_MODULE, "score.weight", Tensor.of(score)),
        Extra(ExtraKind.SAVED_MODULE, "score.steps", Tensor.of(np.arange(2))),
    ]
    receipt = merge(base, adapter({"model.q": rank2(4, 6)}, extras=extras), tmp_path / "o.safetensors", dtype=dtype)
    got = load(tmp_path / "o.safetensors")
    kind = NUMPY[{"bf16": "bfloat16", None: "float32"}.get(dtype, str(dtype))]
    assert got["score.weight"].dtype == kind and np.array_equal(got["score.weight"], score.astype(kind))
    assert got["score.steps"].dtype == np.int64
    said = {finding.subject: finding for finding in receipt.findings if finding.code == "added-tensor"}
    own = dtype in (None, "float32")
    assert said["score.weight"].message.endswith("in its own dtype" if own else "in the dtype asked for")
    assert said["score.weight"].evidence == (f"(2, 6) {kind.name}",) and said["score.steps"].message.endswith("in its own dtype")
    assert receipt.proofs[-1].startswith("2 converted or added tensors are their source rounded once in 14 sampled")


def test_a_module_the_base_lacks_goes_to_its_component(tmp_path: Path) -> None:
    for component in ("text_encoder", "unet", "vae"):
        save(tmp_path / "base" / component / "model.safetensors", {"q.weight": normal(4, 6)})
    (tmp_path / "base/model_index.json").write_text('{"text_encoder": ["a", "b"], "unet": ["a", "b"], "vae": ["a", "b"]}')
    new = Extra(ExtraKind.SAVED_MODULE, "unet.new.weight", Tensor.of(normal(2, 2)))
    merge(tmp_path / "base", adapter({"unet.q": rank2(4, 6)}, extras=[new]), tmp_path / "out")
    assert np.array_equal(load(tmp_path / "out/unet/model.safetensors")["new.weight"], new.tensor.read())
    assert list(load(tmp_path / "out/vae/model.safetensors")) == ["q.weight"]
    with pytest.raises(MismatchError, match=r"other\.new\.weight: not in the base, which has no component of this name"):
        nowhere = Extra(ExtraKind.SAVED_MODULE, "other.new.weight", new.tensor)
        merge(tmp_path / "base", adapter({"unet.q": rank2(4, 6)}, extras=[nowhere]), tmp_path / "out2")


def test_what_cannot_be_merged_is_named_and_may_be_given_up(tmp_path: Path) -> None:
    base = save(tmp_path / "b.safetensors", {"q.weight": normal(4, 6)})
    token = Extra(ExtraKind.TEXTUAL_INVERSION, "<cat>", Tensor.of(normal(1, 6)))
    item = adapter({"q": rank2(4, 6)}, extras=[token], leftovers={"odd.key": Tensor.of(normal(2))})
    with pytest.raises(RefusedError, match=r"textual-inversion <cat>, leftover odd\.key.*with --drop textual-inversion --drop leftovers$"):
        merge(base, item, tmp_path / "o.safetensors")
    receipt = merge(base, item, tmp_path / "o.safetensors", drop=["textual-inversion", "leftovers"])
    assert [(finding.code, finding.subject) for finding in receipt.findings] == [("given-up", "<cat>"), ("given-up", "odd.key")]
    with pytest.raises(UsageError, match=r"no such kind to drop.*textual-inversion.*found leftover"):
        merge(base, item, tmp_path / "p.safetensors", drop=["leftover"])


def test_what_was_given_up_when_merging_is_given_up_when_taking_out(tmp_path: Path) -> None:
    base = save(tmp_path / "b.safetensors", {"q.weight": normal(4, 6), "norm.weight": normal(4)})
    item = adapter({"q": rank2(4, 6)}, extras=[Extra(ExtraKind.SAVED_MODULE, "norm.weight", Tensor.of(normal(4)))])
    merge(base, item, tmp_path / "m.safetensors", drop=["saved-module"])
    with pytest.raises(RefusedError, match="cannot be recovered"):
        unmerge(tmp_path / "m.safetensors", item, tmp_path / "u.safetensors")
    unmerge(tmp_path / "m.safetensors", item, tmp_path / "u.safetensors", drop=["saved-module"])
    assert np.abs(load(tmp_path / "u.safetensors")["q.weight"] - load(base)["q.weight"]).max() < 1e-6


@pytest.mark.parametrize(
    "part",
    [
        {"deltas": {"model.embed_tokens": lora(normal(12, 2), normal(2, 6))}},
        {"deltas": {}, "extras": [Extra(ExtraKind.SAVED_MODULE, "model.embed_tokens.weight", Tensor.of(normal(12, 6)))]},
    ],
)
def test_a_vocabulary_of_another_size_is_said_to_be_that(tmp_path: Path, part: dict[str, Any]) -> None:
    base = save(tmp_path / "b.safetensors", {"model.embed_tokens.weight": normal(10, 6), "model.q.weight": normal(10, 6)})
    with pytest.raises(MismatchError) as caught:
        merge(base, adapter(**part), tmp_path / "o.safetensors")
    assert "12 tokens, the base's model.embed_tokens.weight has 10" in str(caught.value.found)
    assert "resize_token_embeddings(12)" in str(caught.value.remedy) and "choose the base" not in str(caught.value.remedy)
    with pytest.raises(
        MismatchError, match=r"resize_token_embeddings\(12\).*for the rest choose the base it was made for; or leave these out with --skip"
    ):
        merge(base, adapter({**part["deltas"], "model.q": rank2(12, 6)}, extras=part.get("extras", [])), tmp_path / "o.safetensors")
    with pytest.raises(MismatchError, match="; choose the base it was made for; or leave these out with --skip"):
        merge(base, adapter({"model.q": rank2(12, 6)}), tmp_path / "o.safetensors")


def test_experts_that_the_base_stores_one_by_one_are_said_to_be_that(tmp_path: Path) -> None:
    """As Mixtral's files hold them (`block_sparse_moe.experts.N.w1`), which transformers 5 stacks when it loads them."""
    single = {f"model.layers.{layer}.block_sparse_moe.experts.{number}.w1.weight": normal(4, 6) for layer in (0, 11) for number in range(2)}
    base = save(tmp_path / "b.safetensors", {**single, "model.q.weight": normal(4, 6)})
    stacked = ExpertLoRA(Tensor.of(normal(8, 4)), Tensor.of(normal(4, 6)), 2, Scaling())
    with pytest.raises(MismatchError) as caught:
        merge(base, adapter({Target("model.layers.1.mlp.experts", None, "gate_up_proj"): stacked}), tmp_path / "o.safetensors")
    assert "every expert by itself" not in str(caught.value)
    with pytest.raises(MismatchError) as caught:
        merge(base, adapter({Target("model.layers.11.mlp.experts", None, "gate_up_proj"): stacked}), tmp_path / "o.safetensors")
    assert "every expert by itself (model.layers.11.block_sparse_moe.experts.0.w1.weight)" in str(caught.value.found)
    assert "save_original_format=False" in str(caught.value.remedy) and "choose the base" not in str(caught.value.remedy)


def test_tied_weights_are_pointed_out(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", {"model.embed_tokens.weight": normal(10, 6)})
    (tmp_path / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": true}')
    with pytest.raises(MismatchError, match=r"ties its output head.*tie_word_embeddings false"):
        merge(tmp_path, adapter({"lm_head": rank2(10, 6)}), tmp_path.with_name("out1"))
    receipt = merge(tmp_path, adapter({"model.embed_tokens": rank2(10, 6)}), tmp_path.with_name("out2"))
    assert [finding.code for finding in receipt.findings] == ["tied-weight"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("changed", ["model.embed_tokens", "lm_head", "model.layers.0.q"])
def test_tied_weights_that_are_both_stored_come_apart_and_that_is_said(tmp_path: Path, tied: bool, changed: str) -> None:
    shared = normal(10, 6)
    weights = {"model.embed_tokens.weight": shared, "lm_head.weight": shared, "model.layers.0.q.weight": normal(10, 6)}
    save(tmp_path / "base/model.safetensors", weights)
    (tmp_path / "base/config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": tied}))
    receipt = merge(tmp_path / "base", adapter({changed: rank2(10, 6)}), tmp_path / "out")
    said = [finding.subject for finding in receipt.findings if finding.code == "tied-weight" and "both are stored" in finding.message]
    assert said == ([f"{changed}.weight"] if tied and changed != "model.layers.0.q" else [])


def test_a_denoiser_as_comfyui_saves_it_takes_adapters_of_other_names() -> None:
    flux = inventory.load("flux.1-dev")
    authors = layouts.layout(flux, "original")
    names = {authors.tensor_name(one): (authors.rows(one), *parts[0].shape[1:]) for one, parts in authors.foreign.items()}
    shapes = {f"model.diffusion_model.{name}": shape for name, shape in names.items()} | {"vae.decoder.conv_in.weight": (512, 16, 3, 3)}
    delta = rank2(3072, 3072)
    spots, missing = matching.place({Target("transformer.transformer_blocks.0.attn.to_k"): delta}, shapes, base_from_shapes(shapes))
    assert [(spot.name, spot.place.rows) for spot in spots] == [("model.diffusion_model.double_blocks.0.img_attn.qkv.weight", (3072, 6144))]
    assert not missing


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    base = save(tmp_path / "b.safetensors", {"q.weight": np.zeros((4, 6), np.int8)})
    with pytest.raises(RefusedError, match="quantised"):
        merge(base, adapter({"q": rank2(4, 6)}), tmp_path / "o.safetensors")


def test_convolutions_and_their_kernels(tmp_path: Path) -> None:
    weights = {"conv.weight": normal(4, 3, 3, 3), "proj.weight": normal(5, 4, 1, 1)}
    base = save(tmp_path / "b.safetensors", weights)
    conv, proj = lora(normal(4, 2, 1, 1), normal(2, 3, 3, 3)), rank2(5, 4)
    got = merged(base, adapter({"conv": conv, "proj": proj}), tmp_path / "o.safetensors")
    for name, delta in (("conv", conv), ("proj", proj)):
        weight = weights[f"{name}.weight"]
        assert np.array_equal(got[f"{name}.weight"], (weight.astype(np.float64) + dense(delta).reshape(weight.shape)).astype(np.float32))


def test_single_file_checkpoints_through_their_layout(tmp_path: Path) -> None:
    """SD1.5 under LDM names: a reference target finds its tensor; SDXL's fused OpenCLIP qkv gets row slices."""
    from upparam.bases import inventory
    from upparam.bases.layouts import layout
    from upparam.operations.merge.planned import Ingredient

    base = inventory.load(
        "sdxl-base" if "sdxl-base" in inventory.known() else next(name for name in inventory.known() if name.startswith("sdxl"))
    )
    names = layout(base, "sgm")
    targets = [
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj",
        "text_encoder_2.text_model.encoder.layers.0.self_attn.v_proj",
    ]
    weights: dict[str, Any] = {}
    for target in targets:
        there = names.places[target]
        rows, columns = names.rows(there.foreign), there.part.shape[1]
        weights.setdefault(
            names.tensor_name(there.foreign), (np.arange(rows * columns) % 251 / 500).astype(np.float16).reshape(rows, columns)
        )
    path = save(tmp_path / "sdxl.safetensors", weights)
    deltas = {target: rank2(*names.places[target].part.shape) for target in targets}
    got = merged(path, Ingredient(adapter(deltas), 1.0, None, None, base), tmp_path / "o.safetensors")
    true = {name: value.astype(np.float64) for name, value in weights.items()}
    for target, delta in deltas.items():
        there = names.places[target]
        start, stop = there.part.span or (0, there.part.shape[0])
        true[names.tensor_name(there.foreign)][start:stop] += dense(delta)
    assert any(".in_proj_weight" in name for name in got)
    for name, value in true.items():
        assert np.array_equal(got[name], value.astype(np.float16)), name


def test_a_multiplier_is_no_scale_of_what_depends_on_the_weight(tmp_path: Path) -> None:
    """Of a LoRA it is part of the scale; of a DoRA it is the share of W' - W."""
    base = save(
        tmp_path / "b.safetensors", {name: RNG.standard_normal((12, 6)).astype(np.float32) for name in ("model.q.weight", "model.v.weight")}
    )
    plain = lora(RNG.standard_normal((12, 2)).astype(np.float32), RNG.standard_normal((2, 6)).astype(np.float32), alpha=4.0)
    dora = DoRA(plain.up, plain.down, Tensor.of(np.ones((12, 1), np.float32)), plain.scaling)
    plan = prepare(base, (adapter({"model.q": plain, "model.v": dora}), 0.5))
    told = {change["tensor"]: change["deltas"][0] for change in plan.facts(0)["changes"]}
    assert (told["model.q.weight"]["scale"], told["model.q.weight"]["share"]) == (1.0, 1.0)
    assert (told["model.v.weight"]["scale"], told["model.v.weight"]["share"]) == (2.0, 0.5)
    text = plan_text(plan, 0)
    assert "lora r=2 scale 1\n" in text and "dora r=2 scale 2, of what it changes 0.5\n" in text
