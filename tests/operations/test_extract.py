"""Extract against the full SVD, against the adapter that was merged, and through the real diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.operations.merging import NUMPY, adapter, load, lora, save

from upparam.adapter import Adapter, ExtraKind, Target
from upparam.algorithms.lora import LoRA
from upparam.algorithms.lowrank import RankRule
from upparam.checkpoint import Checkpoint
from upparam.cli import main
from upparam.errors import MalformedError, MismatchError, RefusedError, UsageError
from upparam.operations.extract import extract, extracted
from upparam.operations.extract.difference import difference, same_weights
from upparam.operations.merge import merge
from upparam.operations.opening import open_adapter
from upparam.tensors import Tensor

WEIGHTS = {"layers.0.q_proj": (256, 256), "layers.0.up_proj": (640, 256), "layers.1.q_proj": (256, 256), "layers.1.down_proj": (256, 640)}


def base_file(path: Path, dtype: str = "float32", seed: int = 0, **more: Any) -> Path:
    random = np.random.default_rng(seed)
    arrays = {f"{name}.weight": (random.standard_normal(shape) * 0.03).astype(NUMPY[dtype]) for name, shape in WEIGHTS.items()}
    arrays["layers.0.norm.weight"] = np.ones(256, NUMPY[dtype])
    arrays["layers.0.q_proj.bias"] = np.zeros(256, NUMPY[dtype])
    return save(path, arrays | more)


def trained(rank: int, names: Any = tuple(WEIGHTS), amplitude: float = 3e-3, seed: int = 1) -> Adapter:
    """An adapter as training leaves it: singular values falling by a factor of ten."""
    random = np.random.default_rng(seed)
    fall = np.logspace(0, -1, rank)
    deltas = {}
    for name in names:
        rows, columns = WEIGHTS[name]
        up = random.standard_normal((rows, rank)) * fall * amplitude / np.sqrt(rank)
        deltas[name] = lora(up.astype(np.float32), random.standard_normal((rank, columns)).astype(np.float32))
    return adapter(deltas)


def dense(delta: Any) -> np.ndarray:
    return delta.load().rows(0, delta.shape[0])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("rank", [4, 8, 16, 32, 64])
def test_extract_after_merge_finds_the_rank(tmp_path: Path, dtype: str, rank: int) -> None:
    base = base_file(tmp_path / "base.safetensors", dtype)
    meant = trained(rank, list(WEIGHTS)[:3])
    merge(base, meant, tmp_path / "merged.safetensors")
    result = extracted(Checkpoint.open(tmp_path / "merged.safetensors"), Checkpoint.open(base), auto=True)
    assert result.unchanged == 3 and not result.below and not result.adapter.extras
    assert {target.module: delta.rank for target, delta in result.adapter.deltas.items()} == dict.fromkeys(list(WEIGHTS)[:3], rank)
    for module in result.modules:
        delta = meant.deltas[Target(module.target)]
        assert module.smallest > module.floor > module.next
        # What rounding added is what is missing, and what is kept is nearer to the truth than the stored difference.
        gap = float(np.linalg.norm(dense(delta) - dense(result.adapter.deltas[Target(module.target)])))
        noise = module.error * module.norm
        assert gap <= (2e-6 if dtype == "float32" else 1.0) * module.norm
        assert gap <= 1.01 * max(noise, 1e-6 * module.norm)
        stored = load(tmp_path / "merged.safetensors")[f"{module.target}.weight"].astype(np.float64)
        true = stored - load(base)[f"{module.target}.weight"].astype(np.float64)
        new = result.adapter.deltas[Target(module.target)]
        assert module.error == pytest.approx(float(np.linalg.norm(true - dense(new))) / module.norm, rel=1e-3, abs=1e-7)


def test_error_of_a_full_fine_tune_is_the_optimum(tmp_path: Path) -> None:
    base = base_file(tmp_path / "base.safetensors")
    random = np.random.default_rng(3)
    weights = load(base)
    spread = {}
    for name, shape in WEIGHTS.items():
        left, _ = np.linalg.qr(random.standard_normal((shape[0], 200)))
        right, _ = np.linalg.qr(random.standard_normal((shape[1], 200)))
        spread[name] = (left * np.arange(1, 201) ** -0.5) @ right.T * 0.05
        weights[f"{name}.weight"] = (weights[f"{name}.weight"] + spread[name]).astype(np.float32)
    tuned = save(tmp_path / "tuned.safetensors", weights)
    result = extracted(Checkpoint.open(tuned), Checkpoint.open(base), RankRule(12))
    for module in result.modules:
        best = float(np.linalg.norm(np.arange(13, 201) ** -0.5)) * 0.05
        assert best <= module.error * module.norm * 1.0001
        assert module.error * module.norm <= 1.005 * best
        assert module.optimum * module.norm <= best * 1.0001
        assert module.error <= 1.01 * module.optimum
    by_error = extracted(Checkpoint.open(tuned), Checkpoint.open(base), RankRule(error=0.5))
    for module in by_error.modules:
        values = np.arange(1, 201) ** -0.5
        assert module.rank == RankRule(error=0.5).choose(values)
        assert module.error <= 0.5
    with pytest.raises(RefusedError, match="no low rank"):
        extracted(Checkpoint.open(tuned), Checkpoint.open(base), auto=True)
    capped = extracted(Checkpoint.open(tuned), Checkpoint.open(base), RankRule(12), auto=True)
    assert {module.rank for module in capped.modules} == {12}


def test_norms_biases_and_strangers_are_extras(tmp_path: Path) -> None:
    base = base_file(tmp_path / "base.safetensors", buffer=np.arange(4.0, dtype=np.float32), decay=np.array(0.5, np.float32))
    weights = load(base)
    weights["layers.0.norm.weight"] = weights["layers.0.norm.weight"] + np.float32(0.1)
    weights["layers.0.q_proj.bias"] = weights["layers.0.q_proj.bias"] - np.float32(0.2)
    weights["buffer"] = weights["buffer"] * np.float32(2)
    weights["only_here"] = np.zeros(3, np.float32)
    tuned = save(tmp_path / "tuned.safetensors", weights)
    result = extracted(Checkpoint.open(tuned), Checkpoint.open(base), RankRule(4))
    assert not result.adapter.deltas
    kinds = {extra.name: (extra.kind, extra.tensor.read()) for extra in result.adapter.extras}
    assert {name: kind for name, (kind, _) in kinds.items()} == {
        "layers.0.norm.weight": ExtraKind.SAVED_MODULE, "layers.0.q_proj.bias": ExtraKind.BIAS, "buffer": ExtraKind.OTHER,
    }  # fmt: skip
    for name, (_, value) in kinds.items():
        assert np.array_equal(value, weights[name])
    assert any(finding.code == "only-in-one" and "only_here" in finding.evidence[0] for finding in result.adapter.findings)
    skipped = extracted(Checkpoint.open(tuned), Checkpoint.open(base), RankRule(4), skip=["*norm", "buffer"])
    assert [extra.name for extra in skipped.adapter.extras] == ["layers.0.q_proj.bias"]
    again = tmp_path / "again.safetensors"
    merge(base, Adapter({}, "test", skipped.adapter.extras), again)
    assert np.array_equal(load(again)["layers.0.q_proj.bias"], weights["layers.0.q_proj.bias"])


def test_a_model_saved_in_another_dtype_is_unchanged(tmp_path: Path) -> None:
    base = base_file(tmp_path / "base.safetensors", "float32")
    half = save(tmp_path / "half.safetensors", {name: value.astype(np.float16) for name, value in load(base).items()})
    with pytest.raises(RefusedError, match="nothing to extract"):
        extracted(Checkpoint.open(half), Checkpoint.open(base), RankRule(4))
    meant = trained(8, list(WEIGHTS)[:2])
    merge(base, meant, tmp_path / "merged.safetensors", dtype="float16")
    result = extracted(Checkpoint.open(tmp_path / "merged.safetensors"), Checkpoint.open(base), auto=True)
    assert {target.module: delta.rank for target, delta in result.adapter.deltas.items()} == dict.fromkeys(list(WEIGHTS)[:2], 8)


def test_what_rounding_has_swallowed_is_said(tmp_path: Path) -> None:
    """A difference far below one unit in the last place of bfloat16 leaves stray flips: nothing to extract, and it says why."""
    base = base_file(tmp_path / "base.safetensors", "bfloat16")
    merge(base, trained(4, ["layers.0.up_proj"], amplitude=2e-5), tmp_path / "merged.safetensors")
    with pytest.raises(RefusedError, match="within rounding noise"):
        extracted(Checkpoint.open(tmp_path / "merged.safetensors"), Checkpoint.open(base), auto=True)
    both = trained(4, ["layers.0.up_proj"], amplitude=2e-5)
    both.deltas |= trained(4, ["layers.1.down_proj"]).deltas
    merge(base, both, tmp_path / "both.safetensors")
    result = extracted(Checkpoint.open(tmp_path / "both.safetensors"), Checkpoint.open(base), auto=True)
    assert result.below == ["layers.0.up_proj"]
    assert [finding.code for finding in result.adapter.findings] == ["below-noise"]


def test_threads_do_not_matter_and_the_seed_does(tmp_path: Path) -> None:
    base = base_file(tmp_path / "base.safetensors", "float16")
    merge(base, trained(40), tmp_path / "merged.safetensors")
    merged = Checkpoint.open(tmp_path / "merged.safetensors")

    def factors(**options: Any) -> dict[str, bytes]:
        found = extracted(merged, Checkpoint.open(base), RankRule(8), dtype="float32", **options).adapter
        return {f"{target}.{role}": factor.raw() for target, delta in found.deltas.items() for role, factor in delta.factors().items()}

    assert factors(threads=1) == factors(threads=3) == factors(seed=0)
    assert factors(seed=0) != factors(seed=1)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    base = base_file(tmp_path / "base.safetensors")
    other = save(tmp_path / "other.safetensors", {"something.weight": np.ones((3, 3), np.float32)})
    with pytest.raises(MismatchError):
        extracted(Checkpoint.open(other), Checkpoint.open(base), RankRule(1))
    grown = save(tmp_path / "grown.safetensors", load(base) | {"layers.0.q_proj.weight": np.ones((300, 256), np.float32)})
    with pytest.raises(MismatchError) as caught:
        extracted(Checkpoint.open(grown), Checkpoint.open(base), RankRule(1))
    assert caught.value.tensor == "layers.0.q_proj.weight"
    broken = load(base)
    broken["layers.1.q_proj.weight"][3, 4] = np.nan
    with pytest.raises(MalformedError) as seen:
        extracted(Checkpoint.open(save(tmp_path / "nan.safetensors", broken)), Checkpoint.open(base), RankRule(1))
    assert seen.value.tensor == "layers.1.q_proj"
    for rule in (None, RankRule(conv_rank=4)):
        with pytest.raises(UsageError):
            extracted(Checkpoint.open(base), Checkpoint.open(base), rule)
    scaled = load(base) | {
        "layers.1.q_proj.weight": np.zeros((256, 256), NUMPY["float8_e4m3fn"]),
        "layers.1.q_proj.scale_weight": np.float32([2]),
    }
    with pytest.raises(RefusedError, match="quantised"):
        extracted(Checkpoint.open(save(tmp_path / "scaled.safetensors", scaled)), Checkpoint.open(base), RankRule(1))
    whole = load(base) | {"layers.1.q_proj.weight": np.zeros((256, 256), np.int8)}
    with pytest.raises(RefusedError, match="not a float"):
        extracted(Checkpoint.open(save(tmp_path / "int8.safetensors", whole)), Checkpoint.open(base), RankRule(1))


def test_conv1d_comes_out_transposed(tmp_path: Path) -> None:
    """GPT-2 stores (in, out): the adapter's factors are those of the weight as (out, in), of square ones too."""
    random = np.random.default_rng(0)
    names = ("h.0.attn.c_attn", "h.0.attn.c_proj", "h.0.mlp.c_fc", "h.0.mlp.c_proj")
    shapes = ((128, 384), (128, 128), (128, 512), (512, 128))
    arrays = {f"{name}.weight": random.standard_normal(shape).astype(np.float32) * 0.02 for name, shape in zip(names, shapes, strict=True)}
    base = save(tmp_path / "base" / "model.safetensors", arrays)
    (tmp_path / "base" / "config.json").write_text('{"model_type": "gpt2"}')
    deltas = {
        name: lora(random.standard_normal((shape[1], 4)) * 1e-3, random.standard_normal((4, shape[0])))
        for name, shape in zip(names, shapes, strict=True)
    }
    merge(base.parent, adapter(deltas), tmp_path / "merged")
    result = extracted(Checkpoint.open(tmp_path / "merged"), Checkpoint.open(base.parent), auto=True)
    assert result.adapter.transposed_base is True
    for target, delta in result.adapter.deltas.items():
        meant = deltas[target.module]
        assert (delta.rank, delta.shape) == (4, meant.shape)
        np.testing.assert_allclose(dense(delta), dense(meant), atol=1e-6)


def test_differences_and_noise() -> None:
    random = np.random.default_rng(0)
    weight = random.standard_normal((300, 400)).astype(np.float32) * np.float32(0.05)
    for dtype in ("float16", "bfloat16"):
        stored = Tensor.of(weight.astype(NUMPY[dtype]))
        assert same_weights(stored, Tensor.of(weight)) and same_weights(Tensor.of(weight), stored)
        assert difference(stored, Tensor.of(weight), "x") is None
        # The rounding itself, taken as a difference, has no singular value above the floor.
        moved = Tensor.of((weight * 1.0001).astype(np.float32))
        gap = difference(moved, stored, "x")
        assert gap is not None and not gap.exact
        rounding = weight.astype(np.float64) - weight.astype(NUMPY[dtype]).astype(np.float64)
        largest = float(np.linalg.svd(rounding, compute_uv=False)[0])
        assert largest < gap.floor < 2.5 * largest


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Adapter]:
    """A tiny SD pipeline on disk as diffusers saves it, and one with an adapter over attention and convolutions merged by torch."""
    from tests.dialects.pipelines import base_of, merged, sd15, seeded

    folder = tmp_path_factory.mktemp("pipelines")
    pipe = sd15()
    pipe.unet.save_pretrained(folder / "base" / "unet")
    unet = base_of(pipe)
    adapter = seeded(unet, lambda path: path.startswith("unet.") and (".attn1." in path or ".conv1" in path), rank=3)
    merged(pipe, adapter)
    pipe.unet.save_pretrained(folder / "tuned" / "unet")
    return folder / "base", folder / "tuned", adapter


def test_diffusers_loads_what_was_extracted(
    pipelines: tuple[Path, Path, Adapter], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from diffusers import UNet2DConditionModel
    from tests.dialects.pipelines import outputs, sd15

    base, tuned, meant = pipelines
    out = tmp_path / "extracted"
    assert main(["extract", str(tuned), str(base), "--to", "diffusers", "--auto", "-o", str(out), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["counts"]["extracted"] == len(meant.deltas) and facts["counts"]["ranks"] == "3"
    found = open_adapter(out)
    assert set(found.deltas) == set(meant.deltas)
    for target, delta in found.deltas.items():
        assert isinstance(delta, LoRA) and delta.shape == meant.deltas[target].shape
        np.testing.assert_allclose(dense(delta), dense(meant.deltas[target]), atol=2e-6)
    pipe = sd15()
    pipe.load_lora_weights(str(out))
    wanted = UNet2DConditionModel.from_pretrained(tuned / "unet")
    pipe_tuned = sd15()
    pipe_tuned.unet = wanted
    assert torch.allclose(outputs(pipe)[0], outputs(pipe_tuned)[0], atol=1e-5)


def test_only_and_conv_rank(pipelines: tuple[Path, Path, Adapter], tmp_path: Path) -> None:
    base, tuned, _ = pipelines
    receipt = extract(tuned, base, tmp_path / "out", "diffusers", RankRule(2, conv_rank=1), only=["*conv1*", "*to_q"])
    ranks = {module["target"]: module["rank"] for module in receipt.modules}
    assert ranks and all(rank == (1 if "conv1" in target else 2) for target, rank in ranks.items())
    assert any("conv1" in target for target in ranks) and any("to_q" in target for target in ranks)
    with pytest.raises(RefusedError):
        extract(tuned, base, tmp_path / "none", "diffusers", RankRule(2), only=["nothing"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def sparse(path: Path, shapes: dict[str, tuple[int, ...]], filled: dict[str, np.ndarray]) -> Path:
    """A float16 checkpoint of full size that takes no room: every tensor zero but those given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header: dict[str, Any] = {}
    at = 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [at, at := at + 2 * int(np.prod(shape))]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + at)
        for name, value in filled.items():
            assert value.shape == shapes[name]
            stream.seek(8 + len(text) + header[name]["data_offsets"][0])
            stream.write(value.astype(np.float16).tobytes())
    return path


@pytest.mark.parametrize("saved_by", ["transformers 4", "transformers 5"])
def test_authors_single_file_against_diffusers_folders(tmp_path: Path, saved_by: str) -> None:
    """A fine-tune in Stability's layout (what EveryDream2 writes) and a base in diffusers' folders: paired by the modules both mean.

    transformers 5 saves CLIP's text model without `text_model.` in its names.
    """
    from upparam.bases import inventory
    from upparam.bases.layouts import layout

    def there(path: str) -> str:
        return path.removeprefix("text_model.") if saved_by == "transformers 5" else path

    known = inventory.load("sd1.5")
    ldm = layout(known, "ldm")
    single = {ldm.tensor_name(foreign): parts[0].shape for foreign, parts in ldm.foreign.items()}
    folders = {component: {} for component in ("unet", "text_encoder")}
    for module in known.modules:
        component, _, path = module.path.partition(".")
        folders[component][f"{there(path)}.weight"] = module.shape
    random = np.random.default_rng(0)
    wanted = {
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q": (1280, 1280),
        "unet.mid_block.attentions.0.proj_in": (1280, 1280, 1, 1),
        "unet.mid_block.resnets.0.conv1": (1280, 1280, 3, 3),
        "text_encoder.text_model.encoder.layers.3.mlp.fc1": (3072, 768),
    }
    changed, before = {}, {"unet": {}, "text_encoder": {}}
    for module, shape in wanted.items():
        weight = random.standard_normal(shape) * 0.02
        rows, rest = shape[0], int(np.prod(shape[1:]))
        delta = random.standard_normal((rows, 4)) @ random.standard_normal((4, rest)) * 2e-3
        component, _, path = module.partition(".")
        before[component][f"{there(path)}.weight"] = weight
        place = ldm.to_foreign(module)
        assert place is not None
        stored = weight.astype(np.float16).astype(np.float64)
        changed[ldm.tensor_name(place.foreign)] = (stored + delta.reshape(shape)).reshape(single[ldm.tensor_name(place.foreign)])
    tuned = sparse(tmp_path / "tuned.safetensors", single, changed)
    for component, shapes in folders.items():
        sparse(tmp_path / "base" / component / "model.safetensors", shapes, before[component])
    receipt = extract(tuned, tmp_path / "base", tmp_path / "kohya.safetensors", "kohya", auto=True, only=list(wanted))
    assert receipt.counts["extracted"] == 4
    found = open_adapter(tmp_path / "kohya.safetensors")
    assert {target.module: (delta.rank, delta.shape) for target, delta in found.deltas.items()} == {
        module: (4, shape) for module, shape in wanted.items()
    }


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_peft_loads_what_was_extracted(tmp_path: Path, kind: str) -> None:
    """A model that peft merged and transformers saved gives back an adapter with which peft makes the same model again."""
    import peft
    import torch
    import transformers

    torch.manual_seed(0)
    if kind == "llama":
        config = transformers.LlamaConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=120,
        )  # fmt: skip
        model: Any = transformers.LlamaForCausalLM(config)
        options: dict[str, Any] = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
    else:
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=120, n_positions=32))
        options = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    model.save_pretrained(tmp_path / "base")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=5, lora_alpha=10, **options))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    tuned = wrapped.merge_and_unload()
    tuned.save_pretrained(tmp_path / "tuned")
    receipt = extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", "peft", auto=True)
    assert receipt.counts["ranks"] == "5"
    loaded = peft.PeftModel.from_pretrained(type(model).from_pretrained(tmp_path / "base"), str(tmp_path / "out"))
    tokens = torch.arange(1, 20)[None]
    tuned.eval()
    with torch.no_grad():
        assert torch.allclose(loaded(tokens).logits, tuned(tokens).logits, atol=2e-5)


@pytest.mark.parametrize("trained_as", ["fused", "apart"])
def test_fused_projections(tmp_path: Path, trained_as: str) -> None:
    """OpenCLIP stacks q, k and v in one weight. Where one LoRA was trained on it, the parts share its down; else each part has its own rank."""
    from upparam.bases import inventory
    from upparam.bases.layouts import layout

    known = inventory.load("sdxl")
    sgm = layout(known, "sgm")
    shapes = {sgm.tensor_name(foreign): (sgm.rows(foreign), *parts[0].shape[1:]) for foreign, parts in sgm.foreign.items()}
    module = "text_encoder_2.text_model.encoder.layers.3.self_attn."
    place = sgm.to_foreign(f"{module}q_proj")
    assert place is not None
    name = sgm.tensor_name(place.foreign)
    random = np.random.default_rng(0)
    weight = (random.standard_normal(shapes[name]) * 0.02).astype(np.float16).astype(np.float64)
    delta = np.zeros_like(weight)
    if trained_as == "fused":
        delta = random.standard_normal((3840, 4)) @ random.standard_normal((4, 1280)) * 2e-3
    else:
        for part, rank in ((0, 3), (2, 5)):
            delta[part * 1280 : (part + 1) * 1280] = random.standard_normal((1280, rank)) @ random.standard_normal((rank, 1280)) * 2e-3
    base = sparse(tmp_path / "base.safetensors", shapes, {name: weight})
    tuned = sparse(tmp_path / "tuned.safetensors", shapes, {name: weight + delta})
    result = extracted(Checkpoint.open(tuned), Checkpoint.open(base), auto=True, only=[f"{module}*"])
    ranks = {target.module.removeprefix(module): delta.rank for target, delta in result.adapter.deltas.items()}
    downs = {delta.factors()["down"].raw() for delta in result.adapter.deltas.values()}
    if trained_as == "fused":
        assert ranks == {"q_proj": 4, "k_proj": 4, "v_proj": 4} and len(downs) == 1
    else:
        assert ranks == {"q_proj": 3, "v_proj": 5} and len(downs) == 2
    for number, part in enumerate(("q_proj", "k_proj", "v_proj")):
        if part in ranks:
            found = result.adapter.deltas[Target(module + part)]
            rows = slice(number * 1280, (number + 1) * 1280)
            stored = (weight + delta)[rows].astype(np.float16).astype(np.float64) - weight[rows]
            gap = float(np.linalg.norm(stored - dense(found)))
            facts = next(facts for facts in result.modules if facts.target == module + part)
            assert facts.error == pytest.approx(gap / np.linalg.norm(stored), rel=1e-3)
            assert facts.error < 0.1


@pytest.mark.parametrize("tied", [False, True])
def test_a_whole_fine_tune_goes_through_peft(tmp_path: Path, tied: bool) -> None:
    """Every matrix, the embedding and the norms changed: peft makes the tuned model of base and adapter. A tied head is warned of."""
    import peft
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=120, tie_word_embeddings=tied,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "base")
    for weight in model.parameters():
        weight.data += (
            torch.randn_like(weight) * 0.1 if weight.dim() == 1 else torch.randn(len(weight), 3) @ torch.randn(3, weight.shape[1]) * 0.02
        )
    model.save_pretrained(tmp_path / "tuned")
    receipt = extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", "peft", auto=True)
    assert receipt.counts["ranks"] == "3" and receipt.counts["extras"] == 5
    assert [finding.code for finding in receipt.findings] == (["tied-weight"] if tied else [])
    fresh = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    merge(tmp_path / "base", tmp_path / "out", tmp_path / "merged")
    whole = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    tokens = torch.arange(1, 20)[None]
    with torch.no_grad():
        assert torch.allclose(whole(tokens).logits, model(tokens).logits, atol=1e-5)
        if not tied:
            loaded = peft.PeftModel.from_pretrained(fresh, str(tmp_path / "out"))
            assert torch.allclose(loaded(tokens).logits, model(tokens).logits, atol=1e-5)


def test_torch_checkpoint_against_safetensors(tmp_path: Path) -> None:
    """A fine-tune saved as a .ckpt with a training state around it, half the precision of the base it came from."""
    import torch

    base = base_file(tmp_path / "base.safetensors")
    meant = trained(6, list(WEIGHTS)[:2])
    weights = load(base)
    for target, delta in meant.deltas.items():
        weights[f"{target.module}.weight"] = weights[f"{target.module}.weight"] + dense(delta)
    state = {name: torch.from_numpy(value.astype(np.float16)) for name, value in weights.items()}
    torch.save({"state_dict": state, "epoch": 3, "global_step": 100}, tmp_path / "tuned.ckpt")
    result = extracted(Checkpoint.open(tmp_path / "tuned.ckpt"), Checkpoint.open(base), auto=True)
    assert {target.module: delta.rank for target, delta in result.adapter.deltas.items()} == dict.fromkeys(list(WEIGHTS)[:2], 6)
    assert set(result.adapter.dtypes()) == {"float16"}


def test_a_pair_of_ldm_checkpoints_becomes_what_diffusers_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two .ckpt files as EveryDream2 saves them, and a base in folders, from the command line; the real diffusers reads what comes out."""
    import torch
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    from upparam.bases import inventory
    from upparam.bases.layouts import layout

    known = inventory.load("sd1.5")
    ldm = layout(known, "ldm")
    # of full size on paper: every weight is one zero, told to be large
    state = {ldm.tensor_name(foreign): torch.zeros(1, dtype=torch.float16).expand(parts[0].shape) for foreign, parts in ldm.foreign.items()}
    generator = torch.Generator().manual_seed(0)
    wanted = ("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v", "text_encoder.text_model.encoder.layers.5.self_attn.q_proj")
    base, tuned, deltas = dict(state), dict(state), {}
    for module in wanted:
        place = ldm.to_foreign(module)
        assert place is not None
        name = ldm.tensor_name(place.foreign)
        base[name] = (torch.randn(state[name].shape, generator=generator) * 0.02).half()
        change = torch.randn(len(base[name]), 3, generator=generator) @ torch.randn(3, base[name].shape[1], generator=generator) * 2e-3
        tuned[name] = (base[name].float() + change).half()
        deltas[module] = tuned[name].float() - base[name].float()
    more = {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None], "betas": torch.ones(3)}
    torch.save({"state_dict": base | more}, tmp_path / "base.ckpt")
    torch.save({"state_dict": tuned | more, "epoch": 4, "global_step": 1234}, tmp_path / "tuned.ckpt")
    call = ["extract", str(tmp_path / "tuned.ckpt"), str(tmp_path / "base.ckpt"), "--to", "diffusers", "--auto", "--json"]
    only = [word for module in wanted for word in ("--only", module)]
    assert main([*call, *only, "-o", str(tmp_path / "out")]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["counts"]["extracted"] == 2 and facts["counts"]["ranks"] == "3"
    found = StableDiffusionLoraLoaderMixin.lora_state_dict(tmp_path / "out")
    found = found[0] if isinstance(found, tuple) else found
    assert len(found) == 4
    for module, delta in deltas.items():
        down, up = (found[name].float() for name in sorted(found) if name.startswith(module))  # lora_A and lora_B, or down and up
        assert float((up @ down - delta).norm() / delta.norm()) < 2e-2


def test_modules_that_do_not_find_each_other_are_said(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    shared = {f"model.layers.{number}.self_attn.q_proj.weight": random.standard_normal((64, 64)).astype(np.float32) for number in range(8)}
    mine, theirs = ({f"{name}.weight": np.ones((64, 64), np.float32)} for name in ("model.layers.0.mlp.gate_proj", "model.layers.0.gate"))
    base = save(tmp_path / "base.safetensors", shared | theirs)
    changed = {name: weight + np.outer(weight[0], weight[1]).astype(np.float32) for name, weight in shared.items()}
    tuned = save(tmp_path / "tuned.safetensors", changed | mine)
    found = extracted(Checkpoint.open(tuned), Checkpoint.open(base), RankRule(rank=1)).adapter.findings
    assert [finding.code for finding in found if finding.severity] == ["not-paired"]


def test_a_weight_that_one_model_lacks_is_said(tmp_path: Path) -> None:
    """What is not compared is not in the adapter; a whole component that one leaves out (a VAE, say) is no such thing."""
    random = np.random.default_rng(0)
    names = [f"model.layers.{number}.self_attn.q_proj" for number in range(8)]
    base = {f"{name}.weight": random.standard_normal((64, 64)).astype(np.float32) for name in names}
    tuned = {name: weight + np.outer(weight[0], weight[1]).astype(np.float32) for name, weight in base.items()}
    del tuned["model.layers.3.self_attn.q_proj.weight"]
    paths = (
        save(tmp_path / "tuned.safetensors", tuned),
        save(tmp_path / "base.safetensors", base | {"lm_head.weight": np.ones((90, 64), np.float32)}),
    )
    for one, other in (paths, paths[::-1]):
        found = extracted(Checkpoint.open(one), Checkpoint.open(other), RankRule(rank=1)).adapter.findings
        (said,) = [finding for finding in found if finding.severity]
        assert said.code == "partly-missing" and said.evidence == ("model.layers.3.self_attn.q_proj.weight",)
    less = extracted(Checkpoint.open(paths[0]), Checkpoint.open(paths[1]), RankRule(rank=1), skip=["model.layers.3.*"]).adapter.findings
    assert not [finding for finding in less if finding.severity]


@pytest.mark.filterwarnings("error")
def test_infinity_in_both_models_is_told_once_and_by_name(tmp_path: Path) -> None:
    """Infinity less infinity is NaN: the error says where, and numpy warns nobody besides."""
    weight = np.zeros((256, 256), np.float32)
    weight[3, 3] = np.inf
    base = base_file(tmp_path / "base.safetensors", **{"layers.0.q_proj.weight": weight})
    tuned = base_file(tmp_path / "tuned.safetensors", seed=1, **{"layers.0.q_proj.weight": weight + np.float32(1)})
    with pytest.raises(MalformedError, match=r"layers\.0\.q_proj.*not finite"):
        extract(tuned, base, tmp_path / "out", "peft", RankRule(rank=2))
