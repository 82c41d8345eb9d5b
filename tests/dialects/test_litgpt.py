"""LitGPT's adapters against an independent statement of its layers (Lightning-AI/litgpt litgpt/lora.py: conv1d by groups, zero_pad, merge)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.dialects.test_torchtune import GROUPS, HEADS, INNER, LAYERS, RANK, WIDTH
from tests.dialects.test_torchtune import model as llama_like

from upparam.adapter import Adapter, Target
from upparam.bases import inventory
from upparam.bases.find import find_base
from upparam.bases.layouts import layout
from upparam.cli import main
from upparam.containers.base import TensorFile
from upparam.dialects import get, matches
from upparam.dialects.base import ReadOptions
from upparam.errors import DeadAdapterError, MalformedError, RefusedError, UsageError
from upparam.operations.opening import open_adapter
from upparam.tensors import Tensor

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.numpy")

SIZE = WIDTH // HEADS
ROWS = {"q": WIDTH, "k": GROUPS * SIZE, "v": GROUPS * SIZE}
WORDS = {"q": "lora_query", "k": "lora_key", "v": "lora_value"}
ALPHA = 6


def neox(folder: Path) -> Path:
    folder.mkdir(parents=True)
    weights = {"gpt_neox.embed_in.weight": (64, WIDTH), "embed_out.weight": (64, WIDTH)}
    for layer in range(LAYERS):
        start = f"gpt_neox.layers.{layer}."
        weights |= {
            f"{start}attention.query_key_value.weight": (3 * WIDTH, WIDTH), f"{start}attention.dense.weight": (WIDTH, WIDTH),
            f"{start}mlp.dense_h_to_4h.weight": (INNER, WIDTH), f"{start}mlp.dense_4h_to_h.weight": (WIDTH, INNER),
        }  # fmt: skip
    safetensors.save_file({name: np.zeros(shape, np.float32) for name, shape in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt_neox", "hidden_size": WIDTH, "num_attention_heads": HEADS}))
    return folder


def trained(parts: str, layer: str = "attn.qkv", rows: dict[str, int] = ROWS, others: bool = True) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(0)
    shapes = {layer: (len(parts) * RANK, WIDTH, sum(rows[part] for part in parts))} if parts else {}
    if others:
        shapes |= {
            "attn.proj": (RANK, WIDTH, WIDTH),
            "mlp.fc_1": (RANK, WIDTH, INNER),
            "mlp.fc_2": (RANK, WIDTH, INNER),
            "mlp.proj": (RANK, INNER, WIDTH),
        }
    found: dict[str, NDArray[Any]] = {}
    for number in range(LAYERS):
        for module, (tall, into, out) in shapes.items():
            found[f"transformer.h.{number}.{module}.lora_A"] = rng.standard_normal((tall, into)).astype(np.float32)
            found[f"transformer.h.{number}.{module}.lora_B"] = rng.standard_normal((out, RANK)).astype(np.float32)
    return found


def yaml(parts: str, **more: Any) -> str:
    said = {word: str(part in parts).lower() for part, word in WORDS.items()} | {key: str(value) for key, value in more.items()}
    lines = [
        "checkpoint_dir: checkpoints/x/tiny",
        "precision: null",
        "devices: 1",
        f"lora_r: {more.pop('lora_r', RANK)}",
        f"lora_alpha: {ALPHA}",
        "lora_dropout: 0.05",
    ]
    return "\n".join(
        [
            *lines,
            *(f"{key}: {value}" for key, value in said.items()),
            "data:",
            "  class_path: litgpt.data.Alpaca",
            "  init_args:",
            "    lora_r: 99",
            "",
        ]
    )


def saved(
    folder: Path, tensors: dict[str, NDArray[Any]], said: str | None = None, name: str = "lit_model.pth.lora", model: str | None = None
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"model": {key: torch.from_numpy(value) for key, value in tensors.items()}}, folder / name)
    if said is not None:
        (folder / "hyperparameters.yaml").write_text(said)
    if model is not None:
        (folder / "model_config.yaml").write_text(model)
    return folder / name


def merged(
    tensors: dict[str, NDArray[Any]], module: str, parts: str, old: bool, rows: dict[str, int] = ROWS, groups: int = GROUPS
) -> NDArray[Any]:
    """What LoRAQKVLinear adds to its weight, as q, k and v on top of each other (qkv_reassemble where they were interleaved)."""
    down, up = (tensors[f"{module}.lora_{role}"].astype(float) for role in "AB")
    blocks, start = [], 0
    for place, part in enumerate(parts):
        blocks.append(up[start : start + rows[part]] @ down[place * RANK : (place + 1) * RANK])
        start += rows[part]
    change, total = np.concatenate(blocks), sum(rows.values())
    per_group = (rows["q"] // SIZE) // groups + 2
    head = np.arange(total) // SIZE % per_group
    if old:
        kinds = np.where(head < per_group - 2, "q", np.where(head == per_group - 2, "k", "v"))
    else:
        kinds = np.repeat(list("qkv"), [rows[part] for part in "qkv"])
    whole = np.zeros((total, WIDTH))
    if len(parts) == 3:
        whole = change
    else:
        whole[np.concatenate([np.flatnonzero(kinds == part) for part in parts])] = change
    found: NDArray[Any] = ALPHA / RANK * np.concatenate([whole[kinds == part] for part in "qkv"])
    return found


def change(adapter: Adapter, module: str, shape: tuple[int, int]) -> NDArray[Any]:
    """dW of a module, slices put where they belong."""
    whole = np.zeros(shape)
    for target, delta in adapter.deltas.items():
        if target.module == module:
            start, stop = target.rows or (0, shape[0])
            whole[start:stop] += delta.load().rows(0, stop - start)
    return whole


@pytest.mark.parametrize("layer", ["attn.qkv", "attn.attn"])
@pytest.mark.parametrize("parts", ["qkv", "qv", "kv", "qk", "q", "v"])
@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_q_k_and_v_change_as_the_layer_changes_them(kind: str, parts: str, layer: str, tmp_path: Path) -> None:
    tensors = trained(parts, layer)
    adapter = open_adapter(
        saved(tmp_path / "a", tensors, yaml(parts)), options=ReadOptions(base=find_base(str(llama_like(tmp_path / "m", kind))))
    )
    assert adapter.layout == "reference" and not adapter.leftovers
    expected = merged(tensors, f"transformer.h.1.{layer}", parts, layer == "attn.attn")
    attention = "model.layers.1.self_attn"
    if kind == "phi3":
        found = change(adapter, f"{attention}.qkv_proj", (2 * WIDTH, WIDTH))
        both = change(adapter, "model.layers.1.mlp.gate_up_proj", (2 * INNER, WIDTH))
    else:
        found = np.concatenate([change(adapter, f"{attention}.{part}_proj", (ROWS[part], WIDTH)) for part in "qkv"])
        both = np.concatenate([change(adapter, f"model.layers.1.mlp.{word}_proj", (INNER, WIDTH)) for word in ("gate", "up")])
    assert np.abs(found - expected).max() < 1e-12
    plain = [
        tensors[f"transformer.h.1.mlp.{word}.lora_B"].astype(float) @ tensors[f"transformer.h.1.mlp.{word}.lora_A"]
        for word in ("fc_1", "fc_2")
    ]
    assert np.abs(both - 2 * np.concatenate(plain)).max() < 1e-12
    if layer == "attn.qkv" and kind == "llama":
        own = adapter.deltas[Target(f"{attention}.{parts[-1]}_proj")].factors()
        assert own["up"].read().tobytes() == tensors["transformer.h.1.attn.qkv.lora_B"][-ROWS[parts[-1]] :].tobytes()
        assert own["down"].read().tobytes() == tensors["transformer.h.1.attn.qkv.lora_A"][-RANK:].tobytes()


@pytest.mark.parametrize("layer", ["attn.qkv", "attn.attn"])
@pytest.mark.parametrize("parts", ["qkv", "qv"])
def test_of_gpt_neox_the_fused_rows_are_grouped_again(parts: str, layer: str, tmp_path: Path) -> None:
    rows = dict.fromkeys("qkv", WIDTH)
    tensors = trained(parts, layer, rows, others=False)
    adapter = open_adapter(saved(tmp_path / "a", tensors, yaml(parts)), options=ReadOptions(base=find_base(str(neox(tmp_path / "m")))))
    contiguous = merged(tensors, f"transformer.h.0.{layer}", parts, layer == "attn.attn", rows, HEADS)
    # transformers: for each head its q, its k and its v
    expected = contiguous.reshape(3, HEADS, SIZE, WIDTH).swapaxes(0, 1).reshape(3 * WIDTH, WIDTH)
    found = change(adapter, "gpt_neox.layers.0.attention.query_key_value", (3 * WIDTH, WIDTH))
    assert np.abs(found - expected).max() < 1e-12


def test_fewer_parts_of_an_interleaved_weight_need_to_be_dated(tmp_path: Path) -> None:
    base = find_base(str(llama_like(tmp_path / "m", "llama")))
    path = saved(tmp_path / "a", trained("kv", "attn.attn"), name="lit_model_lora_finetuned.pth")
    with pytest.raises(RefusedError, match="before February 2024"):
        open_adapter(path, options=ReadOptions(base=base))
    path = saved(tmp_path / "b", trained("qkv", "attn.attn"), name="lit_model_lora_finetuned.pth")
    assert open_adapter(path, options=ReadOptions(base=base)).layout == "reference"


def test_which_parts_are_adapted_is_never_guessed(tmp_path: Path) -> None:
    base = find_base(str(llama_like(tmp_path / "m", "llama")))
    path = saved(tmp_path / "a", trained("qv"))
    with pytest.raises(UsageError, match="not stored") as caught:
        open_adapter(path, options=ReadOptions(base=base))
    assert "--target" in str(caught.value.remedy)
    adapter = open_adapter(path, options=ReadOptions(base=base, targets=("q", "v")))
    assert Target("model.layers.0.self_attn.v_proj") in adapter.deltas and Target("model.layers.0.self_attn.k_proj") not in adapter.deltas
    with pytest.raises(UsageError, match="not of these parts"):
        open_adapter(path, options=ReadOptions(base=base, targets=("k", "v")))
    only = open_adapter(saved(tmp_path / "b", trained("q")), options=ReadOptions(base=base))
    assert Target("model.layers.0.self_attn.q_proj") in only.deltas
    with pytest.raises(MalformedError, match="other parts"):
        open_adapter(saved(tmp_path / "c", trained("qv"), yaml("kv")), options=ReadOptions(base=base))
    with pytest.raises(MalformedError, match="no sum"):
        open_adapter(saved(tmp_path / "d", trained("qv", rows={"q": 8, "v": 8})), options=ReadOptions(base=base))


def test_without_a_base_the_rows_follow_from_model_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = trained("qv")
    with pytest.raises(UsageError, match="follows from the base"):
        open_adapter(saved(tmp_path / "a", tensors, yaml("qv")))
    config = f"head_size: null\nhf_config:\n  name: tiny\n  org: nobody\nn_embd: {WIDTH}\nn_head: {HEADS}\nn_query_groups: {GROUPS}\nname: tiny\n"
    path = saved(tmp_path / "b", tensors, yaml("qv"), model=config)
    adapter = open_adapter(path)
    assert adapter.layout == "litgpt" and "base-open" in {finding.code for finding in adapter.findings}
    assert Target("transformer.h.0.attn.qkv", (0, 32)) in adapter.deltas and Target("transformer.h.0.attn.qkv", (48, 64)) in adapter.deltas
    assert main(["convert", str(path), "--to", "peft", "--out", str(tmp_path / "out")]) == 4
    assert "--base" in capsys.readouterr().err and not (tmp_path / "out").exists()
    only = open_adapter(saved(tmp_path / "c", trained(""), yaml("")))
    assert only.layout == "litgpt" and Target("transformer.h.0.mlp.fc_1") in only.deltas


@pytest.mark.parametrize("beside", ["hf_config", "checkpoint_dir"])
def test_the_base_is_the_one_named_beside_it(beside: str, tmp_path: Path) -> None:
    known = inventory.load("llama-3.2-1b").by_path
    q, v = (known[f"model.layers.0.self_attn.{part}_proj"].shape for part in "qv")
    tensors = {
        "transformer.h.0.attn.qkv.lora_A": np.ones((2 * RANK, q[1]), np.float16),
        "transformer.h.0.attn.qkv.lora_B": np.ones((q[0] + v[0], RANK), np.float16),
    }
    said = yaml("qv")
    model = None
    if beside == "hf_config":
        model = "hf_config:\n  name: Llama-3.2-1B\n  org: meta-llama\nname: Llama-3.2-1B\n"
    else:
        said = said.replace("checkpoints/x/tiny", "checkpoints/meta-llama/Llama-3.2-1B")
    adapter = open_adapter(saved(tmp_path, tensors, said, model=model))
    assert adapter.base is not None and adapter.base.name == "llama-3.2-1b" and adapter.base.stated
    assert list(adapter.deltas) == [Target("model.layers.0.self_attn.q_proj"), Target("model.layers.0.self_attn.v_proj")]


def test_alpha_is_the_hyperparameters_or_asked_for(tmp_path: Path) -> None:
    base = find_base(str(llama_like(tmp_path / "m", "llama")))
    path = saved(tmp_path / "a", trained("qkv"))
    adapter = open_adapter(path, options=ReadOptions(base=base))
    assert all(delta.scale is None for delta in adapter.deltas.values()) and "scale-missing" in {
        finding.code for finding in adapter.findings
    }
    assert {delta.scale for delta in open_adapter(path, options=ReadOptions(base=base, alpha=12.0)).deltas.values()} == {4.0}
    assert {delta.scale for delta in open_adapter(path, options=ReadOptions(base=base, scale=0.5)).deltas.values()} == {0.5}
    path = saved(tmp_path / "b", trained("qkv"), yaml("qkv"))
    assert {delta.scale for delta in open_adapter(path, options=ReadOptions(base=base)).deltas.values()} == {2.0}
    with pytest.raises(UsageError, match="contradicts"):
        open_adapter(path, options=ReadOptions(base=base, alpha=5.0))
    adapter = open_adapter(saved(tmp_path / "c", trained("qkv"), yaml("qkv", lora_r=8)), options=ReadOptions(base=base))
    assert any("another adapter" in finding.message for finding in adapter.findings)


def test_factors_in_a_whole_checkpoint_are_found_and_its_weights_left_out(tmp_path: Path) -> None:
    base = find_base(str(llama_like(tmp_path / "m", "llama")))
    tensors = trained("qkv") | {"lm_head.lora_A": np.ones((RANK, WIDTH), np.float32), "lm_head.lora_B": np.ones((64, RANK), np.float32)}
    weights = {
        "transformer.wte.weight": (64, WIDTH),
        "lm_head.linear.weight": (64, WIDTH),
        "transformer.h.0.attn.qkv.linear.weight": (64, WIDTH),
    }
    path = saved(
        tmp_path / "a", tensors | {name: np.zeros(shape, np.float32) for name, shape in weights.items()}, yaml("qkv"), "lit_model.pth"
    )
    adapter = open_adapter(path, options=ReadOptions(base=base))
    assert adapter.dialect == "litgpt" and not adapter.leftovers and Target("lm_head") in adapter.deltas
    assert "base-weights-beside" in {finding.code for finding in adapter.findings}


def test_what_does_not_fit_is_told(tmp_path: Path) -> None:
    base = find_base(str(llama_like(tmp_path / "m", "llama")))
    tensors = trained("qkv") | {"strange": np.zeros(2, np.float32)}
    del tensors["transformer.h.0.attn.proj.lora_A"]
    adapter = open_adapter(saved(tmp_path / "a", tensors, yaml("qkv")), options=ReadOptions(base=base))
    assert set(adapter.leftovers) == {"model/strange", "model/transformer.h.0.attn.proj.lora_B"}
    assert "orphan" in {finding.code for finding in adapter.findings}
    with pytest.raises(DeadAdapterError, match="no module has both"):
        open_adapter(saved(tmp_path / "b", {key: value for key, value in tensors.items() if key.endswith("lora_B")}))
    with pytest.raises(MalformedError, match="do not fit together"):
        wrong = tensors | {"transformer.h.0.attn.qkv.lora_A": np.zeros((RANK + 1, WIDTH), np.float32)}
        open_adapter(saved(tmp_path / "c", wrong, yaml("qkv")), options=ReadOptions(base=base))
    with pytest.raises(UsageError, match="no such tensor"):
        open_adapter(saved(tmp_path / "d", trained("qkv"), yaml("qkv")), options=ReadOptions(base=inventory.load("llama-3-8b")))
    with pytest.raises(UsageError, match="follow from the base"):
        open_adapter(saved(tmp_path / "e", trained("qkv"), yaml("qkv")), options=ReadOptions(base=inventory.load("gpt2")))


def test_loralib_does_not_take_its_names() -> None:
    names = ("model/transformer.h.0.attn.qkv.lora_A", "model/transformer.h.0.attn.qkv.lora_B", "model/transformer.wte.weight")
    file = TensorFile(Path("x"), "torch-zip", {name: Tensor.of(np.zeros((2, 2), np.float32)) for name in names})
    assert [match.dialect for match in matches(file)] == ["litgpt"]
    bare = TensorFile(
        Path("x"), "torch-zip", {name: Tensor.of(np.zeros((2, 2), np.float32)) for name in ("lm_head.lora_A", "lm_head.lora_B")}
    )
    assert get("litgpt").match(bare) is None


def test_it_is_only_read() -> None:
    with pytest.raises(RefusedError, match="does not write"):
        get("litgpt").write(Adapter({}, "litgpt"), {})


def test_the_layout_regroups_falcon_as_qkv_reassemble_does() -> None:
    part = layout(inventory.load("falcon-40b"), "litgpt").places["transformer.h.0.self_attention.query_key_value"].part
    blocks = np.arange(part.shape[0]).reshape(8, 18, -1)
    expected = np.concatenate([blocks[:, :16].reshape(-1), blocks[:, 16].reshape(-1), blocks[:, 17].reshape(-1)])
    assert (part.order.foreign_rows(part.shape[0]) == expected).all()
    assert layout(inventory.load("falcon-7b"), "litgpt").places["transformer.h.0.self_attention.query_key_value"].part.order.plain
