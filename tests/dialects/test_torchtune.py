"""torchtune's adapters against an independent statement of its converters (meta-pytorch/torchtune torchtune/models/convert_weights.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from upparam.adapter import Adapter, Target
from upparam.algorithms.dora import DoRA
from upparam.algorithms.lora import LoRA
from upparam.bases import inventory
from upparam.bases.find import find_base
from upparam.bases.layouts import layout
from upparam.bases.unfused import unfused
from upparam.cli import main
from upparam.containers.base import TensorFile
from upparam.dialects import get
from upparam.dialects.base import Bundle, ReadOptions
from upparam.dtypes import DTYPES
from upparam.errors import DeadAdapterError, MalformedError, RefusedError, UsageError
from upparam.operations.convert import convert
from upparam.operations.identify import identify
from upparam.operations.opening import open_adapter
from upparam.tensors import Tensor

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.numpy")

WIDTH, HEADS, GROUPS, INNER, RANK, LAYERS = 32, 4, 2, 48, 3, 2
SHAPES = {
    "attn.q_proj": (WIDTH, WIDTH), "attn.k_proj": (WIDTH // 2, WIDTH), "attn.v_proj": (WIDTH // 2, WIDTH), "attn.output_proj": (WIDTH, WIDTH),
    "mlp.w1": (INNER, WIDTH), "mlp.w2": (WIDTH, INNER), "mlp.w3": (INNER, WIDTH),
}  # fmt: skip
WORDS = {
    "attn.q_proj": "self_attn.q_proj", "attn.k_proj": "self_attn.k_proj", "attn.v_proj": "self_attn.v_proj", "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj", "mlp.w2": "mlp.down_proj", "mlp.w3": "mlp.up_proj",
}  # fmt: skip
CONFIG = {"r": RANK, "lora_alpha": 6, "target_modules": ["q_proj"], "peft_type": "LORA"}


def model(folder: Path, kind: str) -> Path:
    """A model of transformers with two layers: its config and weights."""
    folder.mkdir(parents=True)
    weights = {"model.embed_tokens.weight": (64, WIDTH), "model.norm.weight": (WIDTH,), "lm_head.weight": (64, WIDTH)}
    for layer in range(LAYERS):
        start = f"model.layers.{layer}."
        own = {f"{word}.weight": SHAPES[name] for name, word in WORDS.items()}
        if kind == "phi3":
            own = {
                "self_attn.qkv_proj.weight": (2 * WIDTH, WIDTH), "self_attn.o_proj.weight": (WIDTH, WIDTH),
                "mlp.gate_up_proj.weight": (2 * INNER, WIDTH), "mlp.down_proj.weight": (WIDTH, INNER),
            }  # fmt: skip
        weights |= {start + name: shape for name, shape in own.items()}
        weights |= {start + name: (WIDTH,) for name in ("input_layernorm.weight", "post_attention_layernorm.weight")}
    rng = np.random.default_rng(1)
    safetensors.save_file(
        {name: rng.standard_normal(shape).astype(np.float32) for name, shape in weights.items()}, folder / "model.safetensors"
    )
    config = {
        "model_type": kind,
        "hidden_size": WIDTH,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "num_hidden_layers": LAYERS,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def trained(dora: bool = False, shapes: dict[str, tuple[int, int]] | None = None) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(0)
    found: dict[str, NDArray[Any]] = {}
    for layer in range(LAYERS):
        for name, (out, into) in (shapes or SHAPES).items():
            module = f"layers.{layer}.{name}"
            found[f"{module}.lora_a.weight"] = rng.standard_normal((RANK, into)).astype(np.float32)
            found[f"{module}.lora_b.weight"] = rng.standard_normal((out, RANK)).astype(np.float32)
            if dora:
                found[f"{module}.magnitude"] = rng.uniform(0.5, 2, out).astype(np.float32)
    return found


def saved(folder: Path, tensors: dict[str, NDArray[Any]], config: dict[str, Any] | None = CONFIG, name: str = "adapter_model.pt") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({key: torch.from_numpy(value) for key, value in tensors.items()}, folder / name)
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder / name


def in_transformers_order(value: NDArray[Any], heads: int) -> NDArray[Any]:
    """The inverse of hf_to_tune's permutation: (heads, head_dim / 2, 2) to (heads, 2, head_dim / 2)."""
    rest = value.shape[1:]
    return value.reshape(heads, len(value) // heads // 2, 2, *rest).swapaxes(1, 2).reshape(len(value), *rest)


def opened(path: Path, **options: Any) -> Adapter:
    return open_adapter(path, options=ReadOptions(**options))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma", "qwen2", "qwen3"])
def test_rows_of_q_and_k_lie_as_the_family_has_them(kind: str, dora: bool, tmp_path: Path) -> None:
    tensors = trained(dora)
    adapter = opened(saved(tmp_path / "a", tensors), base=find_base(str(model(tmp_path / "m", kind))))
    assert adapter.layout == "reference" and len(adapter.deltas) == LAYERS * len(SHAPES)
    for name, word in WORDS.items():
        delta = adapter.deltas[Target(f"model.layers.1.{word}")]
        assert isinstance(delta, DoRA if dora else LoRA) and delta.scale == 2.0
        heads = {"attn.q_proj": HEADS, "attn.k_proj": GROUPS}.get(name) if kind in ("llama", "mistral", "gemma") else None
        for role, own in (("up", "lora_b.weight"), ("down", "lora_a.weight"), *([("magnitude", "magnitude")] if dora else [])):
            expected = tensors[f"layers.1.{name}.{own}"]
            if heads and role != "down":
                expected = in_transformers_order(expected, heads)
            assert delta.factors()[role].read().tobytes() == expected.tobytes(), (name, role)


def test_of_phi_the_fused_weights_are_changed_in_part(tmp_path: Path) -> None:
    tensors = trained()
    base = model(tmp_path / "m", "phi3")
    path = saved(tmp_path / "a", tensors, None)
    adapter = opened(path, base=find_base(str(base)), alpha=6.0)
    qkv, gate_up = "model.layers.0.self_attn.qkv_proj", "model.layers.0.mlp.gate_up_proj"
    for target, name in (
        (Target(qkv, (0, 32)), "attn.q_proj"), (Target(qkv, (32, 48)), "attn.k_proj"), (Target(qkv, (48, 64)), "attn.v_proj"),
        (Target(gate_up, (0, 48)), "mlp.w1"), (Target(gate_up, (48, 96)), "mlp.w3"), (Target("model.layers.0.self_attn.o_proj"), "attn.output_proj"),
    ):  # fmt: skip
        assert adapter.deltas[target].factors()["up"].read().tobytes() == tensors[f"layers.0.{name}.lora_b.weight"].tobytes()
    convert(path, tmp_path / "out", "peft", read=ReadOptions(base=find_base(str(base)), alpha=6.0))
    back = open_adapter(tmp_path / "out", options=ReadOptions(base=find_base(str(base))))
    assert {target: delta.scale for target, delta in back.deltas.items()} == dict.fromkeys(adapter.deltas, 2.0)
    written = safetensors.load_file(tmp_path / "out" / "adapter_model.safetensors")
    up, down = (written[f"base_model.model.{qkv}.lora_{role}.weight"].astype(float) for role in "BA")
    assert down.shape == (3 * RANK, WIDTH)
    parts = [
        tensors[f"layers.0.attn.{part}.lora_b.weight"].astype(float) @ tensors[f"layers.0.attn.{part}.lora_a.weight"]
        for part in ("q_proj", "k_proj", "v_proj")
    ]
    assert np.abs(up @ down - np.concatenate(parts)).max() < 1e-12


def test_without_a_base_no_order_is_guessed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path / "a", trained())
    adapter = opened(path)
    assert adapter.layout == "torchtune" and Target("layers.0.attn.q_proj") in adapter.deltas
    assert "base-open" in {finding.code for finding in adapter.findings}
    assert main(["convert", str(path), "--to", "peft", "--out", str(tmp_path / "out")]) == 4
    said = capsys.readouterr().err
    assert "--base" in said and "torchtune" in said and not (tmp_path / "out").exists()


def shapes_of(name: str, words: tuple[str, ...], layers: int) -> dict[str, Tensor]:
    """An adapter of rank 1 for every layer of a base, zeros."""
    by_path = unfused(inventory.load(name)).by_path
    zeros: dict[str, Tensor] = {}
    for layer in range(layers):
        for word in words:
            out, into = by_path[f"model.layers.{layer}.{WORDS[word]}"].shape
            for own, shape in (("lora_a", (1, into)), ("lora_b", (out, 1))):
                zeros[f"layers.{layer}.{word}.{own}.weight"] = Tensor.computed(
                    DTYPES["float16"],
                    shape,
                    lambda shape=shape: np.zeros(shape, np.float16),  # type: ignore[misc]
                )
    return zeros


def recognised(folder: Path, tensors: dict[str, Tensor], **options: Any) -> Adapter:
    return get("torchtune").read(Bundle([TensorFile(folder / "adapter_model.pt", "torch-zip", tensors)], folder), ReadOptions(**options))


ALL = tuple(WORDS)


@pytest.mark.parametrize(
    ("name", "layers"), [("llama-3-8b", 32), ("qwen2-7b", 28), ("gemma-2-2b", 26), ("phi-3-mini", 32), ("llama-3.2-3b", 28)]
)
def test_a_known_base_is_found_by_names_and_shapes(name: str, layers: int, tmp_path: Path) -> None:
    adapter = recognised(tmp_path, shapes_of(name, ALL, layers))
    assert adapter.layout == "reference" and adapter.base is not None
    assert name in (adapter.base.name, *adapter.base.lookalikes)
    assert {target.module for target in adapter.deltas} <= inventory.load(name).by_path.keys()


@pytest.mark.parametrize(
    ("name", "words", "other"), [("llama-2-7b", ALL, "qwen1.5-7b"), ("llama-2-13b", ("attn.q_proj", "attn.output_proj"), "phi-4")]
)
def test_bases_that_fit_alike_and_order_their_rows_otherwise_are_told_apart_by_what_lies_beside(
    name: str, words: tuple[str, ...], other: str, tmp_path: Path
) -> None:
    layers = 32 if name == "llama-2-7b" else 40
    tensors = shapes_of(name, words, layers)
    adapter = recognised(tmp_path, tensors)
    (finding,) = [finding for finding in adapter.findings if finding.code == "base-open"]
    assert adapter.layout == "torchtune" and name in finding.message and other in finding.message
    assert recognised(tmp_path, tensors, base=inventory.load(name)).layout == "reference"
    if other == "qwen1.5-7b":
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
        found = recognised(tmp_path, tensors)
        assert found.layout == "reference" and found.base is not None and found.base.name == other
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    found = recognised(tmp_path, tensors)
    assert found.layout == "reference" and found.base is not None and "llama" in found.base.name
    (tmp_path / "config.json").unlink()
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": inventory.known()[name].ids[0]}))
    assert recognised(tmp_path, tensors).layout == "reference"


def test_a_base_of_another_depth_is_not_meant(tmp_path: Path) -> None:
    assert recognised(tmp_path, shapes_of("llama-3-8b", ("attn.v_proj",), 20)).layout == "torchtune"


def test_alpha_is_the_configs_or_asked_for(tmp_path: Path) -> None:
    tensors = trained()
    base = find_base(str(model(tmp_path / "m", "llama")))
    bare = saved(tmp_path / "bare", tensors, None, "adapter_0.pt")
    adapter = opened(bare, base=base)
    assert all(delta.scale is None for delta in adapter.deltas.values())
    assert "scale-missing" in {finding.code for finding in adapter.findings}
    assert next(iter(opened(bare, base=base, alpha=12.0).deltas.values())).scale == 4.0
    assert next(iter(opened(bare, base=base, scale=0.5).deltas.values())).scale == 0.5
    with_config = saved(tmp_path / "full", tensors)
    with pytest.raises(UsageError, match="contradicts"):
        opened(with_config, base=base, alpha=5.0)
    other = saved(tmp_path / "other", tensors, CONFIG | {"r": 8})
    adapter = opened(other, base=base)
    assert all(delta.scale is None for delta in adapter.deltas.values())
    assert any("another adapter" in finding.message for finding in adapter.findings)


def test_a_base_that_torchtune_does_not_train_or_that_has_no_config_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a", trained())
    with pytest.raises(UsageError, match="follow from the base's config") as caught:
        opened(path, base=find_base(str(model(tmp_path / "m", "starcoder2"))))
    assert "starcoder2" in str(caught.value.found)
    (model(tmp_path / "n", "llama") / "config.json").unlink()
    with pytest.raises(UsageError, match="follow from") as caught:
        opened(path, base=find_base(str(tmp_path / "n")))
    assert caught.value.remedy
    with pytest.raises(UsageError, match="no such tensor"):
        opened(path, base=inventory.load("llama-3-8b"))


def test_parts_of_a_pair_and_strangers_are_told(tmp_path: Path) -> None:
    tensors = trained()
    del tensors["layers.0.attn.q_proj.lora_a.weight"]
    tensors["strange"] = np.zeros(2, np.float32)
    base = find_base(str(model(tmp_path / "m", "llama")))
    adapter = opened(saved(tmp_path / "a", tensors), base=base)
    assert set(adapter.leftovers) == {"strange", "layers.0.attn.q_proj.lora_b.weight"}
    assert "orphan" in {finding.code for finding in adapter.findings}
    with pytest.raises(DeadAdapterError, match="no module has both"):
        opened(saved(tmp_path / "b", {key: value for key, value in tensors.items() if "lora_b" in key}), base=base)
    wrong = trained(dora=True)
    wrong["layers.0.attn.q_proj.magnitude"] = np.ones(5, np.float32)
    with pytest.raises(MalformedError, match="one norm for each row"):
        opened(saved(tmp_path / "c", wrong), base=base)
    wrong = trained() | {"layers.0.attn.q_proj.lora_a.weight": np.zeros((RANK, 2, 2), np.float32)}
    with pytest.raises(MalformedError, match="no matrices"):
        opened(saved(tmp_path / "d", wrong), base=base)


def test_models_with_a_vision_tower_keep_torchtunes_names(tmp_path: Path) -> None:
    tensors = {f"decoder.{key}": value for key, value in trained().items()}
    adapter = opened(saved(tmp_path / "a", tensors))
    assert adapter.layout == "torchtune" and Target("decoder.layers.0.attn.q_proj") in adapter.deltas


@pytest.mark.parametrize(("kind", "dora", "spoilt"), [("llama", False, False), ("llama", True, True), ("qwen2", False, True)])
def test_where_the_peft_file_beside_it_is_another_adapter_it_is_said(kind: str, dora: bool, spoilt: bool, tmp_path: Path) -> None:
    """tune_to_peft_adapter_weights takes every q and k for interleaved and never moves a magnitude."""
    path = saved(tmp_path / "a", trained(dora))
    base = find_base(str(model(tmp_path / "m", kind)))
    assert "rows-misplaced" not in {finding.code for finding in opened(path, base=base).findings}
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"")
    assert ("rows-misplaced" in {finding.code for finding in opened(path, base=base).findings}) is spoilt


def test_a_peft_file_beside_it_is_not_called_its_double(tmp_path: Path) -> None:
    tensors = trained()
    saved(tmp_path, tensors)
    words = {name: f"base_model.model.model.layers.{{}}.{word}" for name, word in WORDS.items()}
    theirs = {}
    for key, value in tensors.items():
        _, layer, part, word, factor, _ = key.split(".")
        theirs[f"{words[f'{part}.{word}'].format(layer)}.lora_{factor[-1].upper()}.weight"] = value
    safetensors.save_file(theirs, tmp_path / "adapter_model.safetensors")
    (finding,) = identify(tmp_path).findings
    assert finding.code == "several-adapters" and "2 different adapters" in finding.message


def test_it_is_only_read(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="does not write") as caught:
        get("torchtune").write(Adapter({}, "torchtune"), {})
    assert caught.value.remedy == "convert to peft"


def test_names_of_other_libraries_are_not_taken() -> None:
    def match(*names: str) -> Any:
        return get("torchtune").match(
            TensorFile(Path("x"), "safetensors", {name: Tensor.of(np.zeros((2, 2), np.float32)) for name in names})
        )

    assert match("model.layers.0.self_attn.q_proj.lora_a", "model.layers.0.self_attn.q_proj.lora_b") is None
    assert match("blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b") is None
    assert match("layers.0.attn.q_proj.weight", "output.weight") is None
    assert match("layers.0.attn.q_proj.magnitude") is None


@pytest.mark.parametrize(
    ("name", "module", "heads"),
    [("llama-3-8b", "self_attn.q_proj", 32), ("gemma-2b", "self_attn.k_proj", 1), ("mistral-7b", "self_attn.k_proj", 8)],
)
def test_the_layout_orders_rows_as_hf_to_tune_does(name: str, module: str, heads: int) -> None:
    part = layout(inventory.load(name), "torchtune").places[f"model.layers.0.{module}"].part
    rows = np.arange(part.shape[0])
    assert (part.order.foreign_rows(len(rows)) == rows.reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)).all()
    assert (part.order.reference_rows(len(rows)) == in_transformers_order(rows, heads)).all()
