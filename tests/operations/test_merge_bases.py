"""Base forms: shards and index, diffusers folders, GGUF, torch files, other dtypes; what is carried along."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.operations.merging import NUMPY, adapter, load, lora, round_once, save

from upparam.containers import open_file
from upparam.errors import MismatchError, RefusedError, VerificationError
from upparam.operations.merge import merge, prepare
from upparam.operations.merge.blocks import parse
from upparam.operations.merge.journal import undo
from upparam.operations.merge.rounding import narrow
from upparam.operations.unmerge import unmerge

RNG = np.random.default_rng(11)


def normal(*shape: int, dtype: str = "float32") -> Any:
    return (RNG.standard_normal(shape) * 0.1).astype(NUMPY[dtype])


def rank2(out: int, inn: int) -> Any:
    return lora(normal(out, 2), normal(2, inn))


def true(weight: Any, delta: Any) -> Any:
    return weight.astype(np.float64) + delta.load().rows(0, delta.shape[0]).reshape(weight.shape)


def test_shards_index_side_files_and_metadata_are_carried(tmp_path: Path) -> None:
    base = tmp_path / "base"
    weights = {name: normal(6, 8, dtype="float16") for name in ("a.weight", "b.weight", "c.weight")}
    map_: dict[str, str] = {}
    for number, (name, value) in enumerate(weights.items(), 1):
        file = f"model-{number:05}-of-00003.safetensors"
        save(base / file, {name: value}, {"format": "pt", "who": "me", "modelspec.hash_sha256": "0xabc"})
        map_[name] = file
    index = json.dumps({"metadata": {"total_size": 288}, "weight_map": map_}, indent=3)
    (base / "model.safetensors.index.json").write_text(index)
    (base / "tokenizer.json").write_text("{}")
    (base / "config.json").write_text('{"model_type": "llama"}')
    (base / "sub").mkdir()
    (base / "sub" / "notes.txt").write_text("hello")
    delta = rank2(6, 8)
    receipt = merge(base, (adapter({"b": delta}), 0.5), tmp_path / "out")
    out = tmp_path / "out"
    assert (out / "model.safetensors.index.json").read_text() == index
    assert (out / "sub" / "notes.txt").read_text() == "hello" and (out / "tokenizer.json").exists()
    half = true(weights["b.weight"], delta) - 0.5 * delta.load().rows(0, 6)
    assert np.array_equal(load(out / map_["b.weight"])["b.weight"], half.astype(np.float16))
    assert np.array_equal(load(out / map_["a.weight"])["a.weight"], weights["a.weight"])
    metadata = open_file(out / map_["b.weight"]).metadata
    note = json.loads(metadata.pop("upparam.merge"))
    assert metadata == {"format": "pt", "who": "me"} and note["adapters"][0]["multiplier"] == 0.5
    assert [finding.code for finding in receipt.findings] == ["stale-metadata"]
    assert receipt.counts["tensors_changed"] == 1 and receipt.counts["elements_changed"] > 20
    assert "2 untouched tensors equal the base" in receipt.proofs[1]


def test_files_that_would_speak_of_other_weights_are_left_and_told(tmp_path: Path) -> None:
    """An adapter_config.json in a merged model makes transformers look for the adapter; other formats hold the weights as they were."""
    base = tmp_path / "base"
    save(base / "model.safetensors", {"a.weight": normal(6, 8)})
    save(base / "adapter_model.safetensors", {"x": normal(2)})
    others = ["adapter_config.json", "flax_model.msgpack", "onnx/model.onnx", "tf_model.h5"]
    for name in (*others, "config.json", "onnx/notes.txt"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text('{"model_type": "llama"}')
    receipt = merge(base, adapter({"a": rank2(6, 8)}), tmp_path / "out")
    assert sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")) == [
        "config.json", "model.safetensors", "onnx/notes.txt",
    ]  # fmt: skip
    (found,) = [finding for finding in receipt.findings if finding.code == "other-weights"]
    assert found.evidence == ("adapter_config.json", "adapter_model.safetensors", *others[1:]) and "5 files" in found.message


def test_the_note_says_what_was_merged_now_and_before(tmp_path: Path) -> None:
    save(tmp_path / "0.safetensors", {"a.weight": normal(6, 8), "b.weight": normal(6, 8)}, {"format": "pt"})
    item = adapter({"a": rank2(6, 8), "b": rank2(6, 8)})
    merge(tmp_path / "0.safetensors", (item, 0.5), tmp_path / "1.safetensors", skip=["b"])
    merge(tmp_path / "1.safetensors", item, tmp_path / "2.safetensors", block_weight=parse(["*=0.5"]))
    merge(tmp_path / "2.safetensors", item, tmp_path / "3.safetensors")
    metadata = open_file(tmp_path / "3.safetensors").metadata
    notes = [json.loads(metadata[key])["adapters"][0] for key in ("upparam.merge.1", "upparam.merge.2", "upparam.merge")]
    assert [(note["multiplier"], note["targets"], note.get("left_out"), note.get("block_weights")) for note in notes] == [
        (0.5, 1, 1, None), (1.0, 2, None, True), (1.0, 2, None, None),
    ]  # fmt: skip
    assert len(metadata) == 4


def test_a_wrong_bit_in_a_tensor_that_is_only_converted_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from upparam.operations.merge import stream

    base = save(tmp_path / "b.safetensors", {"a.weight": normal(6, 8), "n.weight": normal(8)})
    item = adapter({"a": rank2(6, 8)})
    assert (
        merge(base, item, tmp_path / "o.safetensors", dtype="bf16").proofs[1]
        == "1 converted or added tensor is its source rounded once in 8 sampled elements"
    )
    monkeypatch.setattr(stream, "narrow", lambda values, dtype: narrow(values * 1.01, dtype))
    with pytest.raises(VerificationError, match=r"n\.weight.*reads back wrong"):
        merge(base, item, tmp_path / "p.safetensors", dtype="bf16")
    assert not (tmp_path / "p.safetensors").exists()


def test_shards_in_subfolders_stay_there(tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    weights = {name: normal(6, 8) for name in ("a.weight", "b.weight")}
    map_ = {"a.weight": "parts/one.safetensors", "b.weight": "two.safetensors"}
    for name, file in map_.items():
        save(base / file, {name: weights[name]})
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 384}, "weight_map": map_}))
    delta = rank2(6, 8)
    merge(base, adapter({"a": delta}), out, dtype="fp64")
    assert json.loads((out / "model.safetensors.index.json").read_text()) == {"metadata": {"total_size": 768}, "weight_map": map_}
    assert np.array_equal(load(out / "parts/one.safetensors")["a.weight"], true(weights["a.weight"], delta))
    before = (base / "parts/one.safetensors").read_bytes()
    merge(base, adapter({"a": delta}), in_place=True)
    assert (base / "parts/one.safetensors").read_bytes() != before
    undo(base)
    assert (base / "parts/one.safetensors").read_bytes() == before


def test_a_folder_in_another_dtype_gets_a_true_index(tmp_path: Path) -> None:
    base = tmp_path / "base"
    weights = {"a.weight": normal(6, 8), "n.weight": normal(8), "ids": np.arange(4)}
    save(base / "model-00001-of-00001.safetensors", weights)
    map_ = dict.fromkeys(weights, "model-00001-of-00001.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 256}, "weight_map": map_}))
    (base / "config.json").write_text('{"model_type": "llama"}')
    delta = rank2(6, 8)
    merge(base, adapter({"a": delta}), tmp_path / "out", dtype="bf16")
    got = load(tmp_path / "out" / "model-00001-of-00001.safetensors")
    assert np.array_equal(got["a.weight"].astype(np.float32), round_once(true(weights["a.weight"], delta), "bfloat16").astype(np.float32))
    assert np.array_equal(
        got["n.weight"].astype(np.float32), round_once(weights["n.weight"].astype(np.float64), "bfloat16").astype(np.float32)
    )
    assert np.array_equal(got["ids"], weights["ids"])
    assert json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["metadata"]["total_size"] == 48 * 2 + 8 * 2 + 4 * 8


@pytest.mark.parametrize(("stated", "dtype", "said"), [
    ({"torch_dtype": "bfloat16"}, "fp32", ["config.json: bfloat16"]), ({"dtype": "float32"}, "fp32", []), ({"dtype": "torch.float16"}, None, []), ({}, "bf16", []),
])  # fmt: skip
def test_a_config_that_states_another_dtype_is_said(tmp_path: Path, stated: dict[str, str], dtype: str | None, said: list[str]) -> None:
    """transformers 5 would load the float32 asked for as the bfloat16 stated."""
    base = tmp_path / "base"
    save(base / "model.safetensors", {"a.weight": normal(6, 8)})
    (base / "config.json").write_text(json.dumps({"model_type": "llama", **stated}))
    receipt = merge(base, adapter({"a": rank2(6, 8)}), tmp_path / "out", dtype=dtype)
    assert [text for finding in receipt.findings if finding.code == "stated-dtype" for text in finding.evidence] == said


def test_diffusers_folder(tmp_path: Path) -> None:
    base = tmp_path / "pipe"
    unet, text = normal(6, 8, dtype="float16"), normal(4, 8, dtype="float16")
    save(base / "unet" / "diffusion_pytorch_model.safetensors", {"down.0.to_q.weight": unet})
    save(base / "text_encoder" / "model.safetensors", {"layers.0.q_proj.weight": text})
    (base / "unet" / "config.json").write_text("{}")
    (base / "model_index.json").write_text('{"unet": ["a", "b"], "text_encoder": ["a", "b"]}')
    one, other = rank2(6, 8), rank2(4, 8)
    merge(base, adapter({"unet.down.0.to_q": one, "text_encoder.layers.0.q_proj": other}), tmp_path / "out")
    got = load(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    assert np.array_equal(got["down.0.to_q.weight"], true(unet, one).astype(np.float16))
    got = load(tmp_path / "out" / "text_encoder" / "model.safetensors")
    assert np.array_equal(got["layers.0.q_proj.weight"], true(text, other).astype(np.float16))
    assert (tmp_path / "out" / "model_index.json").exists() and (tmp_path / "out" / "unet" / "config.json").exists()
    with pytest.raises(MismatchError, match="text_encoder"):
        prepare(base / "unet", adapter({"unet.down.0.to_q": one, "text_encoder.layers.0.q_proj": other}))
    prepare(base / "unet", adapter({"unet.down.0.to_q": one, "text_encoder.layers.0.q_proj": other}), skip=["text_encoder.*"])


def gguf_file(path: Path, arrays: dict[str, Any]) -> Path:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(str(path), "test")
    writer.add_string("general.name", "x")
    for name, array in arrays.items():
        if array.dtype == NUMPY["bfloat16"]:
            writer.add_tensor(
                name, array.view(np.uint8), raw_shape=(array.shape[0], array.shape[1] * 2), raw_dtype=gguf.GGMLQuantizationType.BF16
            )
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_keeps_every_other_byte(tmp_path: Path) -> None:
    weights = {"a.weight": normal(6, 8, dtype="float16"), "b.weight": normal(5, 32), "c.weight": normal(4, 32, dtype="bfloat16")}
    base = gguf_file(tmp_path / "b.gguf", weights)
    deltas = {"a": rank2(6, 8), "c": rank2(4, 32)}
    merge(base, adapter(deltas, transposed_base=False), tmp_path / "o.gguf")
    got = load(tmp_path / "o.gguf")
    assert np.array_equal(got["a.weight"], true(weights["a.weight"], deltas["a"]).astype(np.float16))
    assert np.array_equal(
        got["c.weight"].astype(np.float32), round_once(true(weights["c.weight"], deltas["c"]), "bfloat16").astype(np.float32)
    )
    old, new = base.read_bytes(), (tmp_path / "o.gguf").read_bytes()
    changed = {index for index in range(len(old)) if old[index] != new[index]}
    places = {name: open_file(base).tensors[f"{name}.weight"] for name in deltas}
    assert len(old) == len(new) and all(
        any(tensor.offset <= index < tensor.offset + tensor.nbytes for tensor in places.values()) for index in changed
    )
    merge(base, adapter(deltas, transposed_base=False), in_place=True)
    assert base.read_bytes() == new
    with pytest.raises(RefusedError, match="container of the base"):
        merge(tmp_path / "o.gguf", adapter(deltas), tmp_path / "o.safetensors")
    with pytest.raises(
        MismatchError, match=r"layers\.0\.mlp: not in the base under this name.*; merge into the safetensors model and convert"
    ):
        merge(base, adapter({"model.layers.0.mlp": rank2(4, 6)}), tmp_path / "p.gguf")


def test_torch_files_become_safetensors(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    base = tmp_path / "base"
    base.mkdir()
    weight, other = torch.randn(6, 8, dtype=torch.bfloat16), torch.randn(8, 5).T
    torch.save({"m.weight": weight, "n.weight": other}, base / "pytorch_model.bin")
    (base / "config.json").write_text('{"model_type": "llama"}')
    delta = rank2(6, 8)
    merge(base, adapter({"m": delta}), tmp_path / "out")
    got = load(tmp_path / "out" / "model.safetensors")
    expected = round_once(true(weight.float().numpy(), delta), "bfloat16")
    assert np.array_equal(got["m.weight"].astype(np.float32), expected.astype(np.float32))
    assert np.array_equal(got["n.weight"], other.numpy())
    with pytest.raises(RefusedError, match="written as safetensors"):
        merge(base / "pytorch_model.bin", adapter({"m": delta}), tmp_path / "out.bin")


def test_many_adapters_in_one_pass(tmp_path: Path) -> None:
    weight = normal(20, 30, dtype="bfloat16")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    base = save(tmp_path / "b.safetensors", {"m.weight": weight})
    deltas = [rank2(20, 30) for _ in range(10)]
    scales = [0.1 * number - 0.35 for number in range(10)]
    merge(base, [(adapter({"m": delta}), scale) for delta, scale in zip(deltas, scales, strict=True)], tmp_path / "o.safetensors")
    total = weight.astype(np.float64) + sum(scale * delta.load().rows(0, 20) for delta, scale in zip(deltas, scales, strict=True))
    got = load(tmp_path / "o.safetensors")["m.weight"]
    assert np.array_equal(got.astype(np.float32), round_once(total, "bfloat16").astype(np.float32))


@pytest.mark.parametrize(
    ("ending", "scale"),
    [
        ("scale_weight", np.array(0.02, np.float32)),
        ("weight_scale", np.linspace(0.01, 0.03, 60, dtype=np.float32)[:, None]),
        ("weight_scale", np.linspace(-0.01, 0.03, 6, dtype=np.float32)[:, None]),
        ("weight_scale_inv", np.array([[0.01, 0.02, 0.03], [0.02, 0.05, 0.01]], np.float32)),
    ],
)
def test_scaled_fp8_weights(tmp_path: Path, ending: str, scale: Any) -> None:
    """One number, one a row or some, one a block; all but the last through the kernel, in the units of what is stored."""
    stored = (RNG.standard_normal((60, 90)) * 30).astype(NUMPY["float8_e4m3fn"])
    base = save(tmp_path / "b.safetensors", {"m.weight": stored, f"m.{ending}": scale})
    delta = rank2(60, 90)
    receipt = merge(base, adapter({"m": delta}), tmp_path / "o.safetensors")
    factor = scale.astype(np.float64)
    if scale.size > 1:
        factor = np.repeat(np.repeat(factor, 60 // len(factor), axis=0), 90 // factor.shape[1], axis=1)
    expected = (stored.astype(np.float64) * factor + delta.load().rows(0, 60)) / factor
    got = load(tmp_path / "o.safetensors")
    assert np.array_equal(got["m.weight"].astype(np.float32), round_once(np.clip(expected, -448, 448), "float8_e4m3fn").astype(np.float32))
    assert np.array_equal(got[f"m.{ending}"], scale)
    assert bool(np.abs(expected).max() > 448) == any(finding.code == "overflow" for finding in receipt.findings)
    for dtype in ("bf16", "float8_e4m3fn"):
        with pytest.raises(RefusedError, match="keeps its dtype"):
            prepare(base, adapter({"m": delta}), dtype=dtype)


def test_scaled_fp8_weights_that_no_adapter_changes_keep_their_dtype_too(tmp_path: Path) -> None:
    """Converted by itself a weight would lose its scale, and the scale its precision."""
    stored = np.full((4, 6), 30, NUMPY["float8_e4m3fn"])
    base = save(
        tmp_path / "b.safetensors", {"m.weight": stored, "m.weight_scale": np.float32([0.0123]), "n.weight": np.ones((4, 6), np.float32)}
    )
    with pytest.raises(RefusedError, match="keeps its dtype"):
        merge(base, adapter({"n": rank2(4, 6)}), tmp_path / "o.safetensors", dtype="bf16")
    merge(base, adapter({"n": rank2(4, 6)}), tmp_path / "o.safetensors")
    assert load(tmp_path / "o.safetensors")["m.weight"].tobytes() == stored.tobytes()


def test_fp8_saturates_and_says_so(tmp_path: Path) -> None:
    base = save(tmp_path / "b.safetensors", {"m.weight": np.array([[400.0, 1.0]], NUMPY["float8_e4m3fn"])})
    receipt = merge(base, adapter({"m": lora(np.array([[1.0]]), np.array([[300.0, 0.5]]))}), tmp_path / "o.safetensors")
    assert load(tmp_path / "o.safetensors")["m.weight"].astype(np.float32).tolist() == [[448.0, 1.5]]
    assert [finding.code for finding in receipt.findings] == ["overflow"] and "largest it has" in receipt.findings[0].message


def test_fp16_overflow_is_a_finding(tmp_path: Path) -> None:
    base = save(tmp_path / "b.safetensors", {"m.weight": np.array([[60000.0, 1.0]], np.float16)})
    receipt = merge(base, adapter({"m": lora(np.array([[1.0]]), np.array([[9000.0, 0.5]]))}), tmp_path / "o.safetensors")
    assert np.isinf(load(tmp_path / "o.safetensors")["m.weight"][0, 0])
    assert [finding.code for finding in receipt.findings] == ["overflow"] and "1 element " in receipt.findings[0].message


def test_q8_0_is_requantised_as_the_gguf_library_does(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType.Q8_0
    packed = gguf.quants.quantize(normal(10, 64), kind)
    writer = gguf.GGUFWriter(str(tmp_path / "b.gguf"), "test")
    writer.add_tensor("m.weight", packed, raw_dtype=kind)
    writer.add_tensor(
        "n.weight", gguf.quants.quantize(normal(4, 64), gguf.GGMLQuantizationType.Q4_0), raw_dtype=gguf.GGMLQuantizationType.Q4_0
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    delta = rank2(10, 64)
    receipt = merge(tmp_path / "b.gguf", adapter({"m": delta}), tmp_path / "o.gguf")
    reader = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "o.gguf").tensors}
    expected = gguf.quants.dequantize(packed, kind).astype(np.float64) + delta.load().rows(0, 10)
    assert np.array_equal(reader["m.weight"].data, gguf.quants.quantize(expected.astype(np.float32), kind))
    assert receipt.counts["tensors_changed"] == 1 and receipt.counts["elements_changed"] > 500
    with pytest.raises(RefusedError, match="Q4_0"):
        merge(tmp_path / "b.gguf", adapter({"n": rank2(4, 64)}), tmp_path / "p.gguf")


def test_unmerged_blocks_are_off_by_half_a_step_of_both(tmp_path: Path) -> None:
    """A change that makes a block's step larger costs its small elements more than an ulp: unmerge promises no more than holds."""
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(str(tmp_path / "b.gguf"), "test")
    writer.add_tensor("m.weight", gguf.quants.quantize(normal(10, 64), kind), raw_dtype=kind)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        write()
    item = adapter({"m": lora(np.full((10, 1), 30, np.float32), normal(1, 64))})
    merge(tmp_path / "b.gguf", item, tmp_path / "m.gguf")
    receipt = unmerge(tmp_path / "m.gguf", item, tmp_path / "u.gguf")
    assert "about half a step of its block as merged and half a step of it as written now" in receipt.findings[-1].message
    packed = {name: open_file(tmp_path / f"{name}.gguf").structure["quantised"]["m.weight"] for name in "bmu"}
    raw = {name: (tmp_path / f"{name}.gguf").read_bytes()[place.offset : place.offset + place.nbytes] for name, place in packed.items()}
    blocks = {name: np.frombuffer(data, np.uint8).reshape(-1, 34) for name, data in raw.items()}
    steps = {name: data[:, :2].copy().view(np.float16).astype(np.float64) for name, data in blocks.items()}
    values = {name: steps[name] * data[:, 2:].view(np.int8) for name, data in blocks.items()}
    off = np.abs(values["u"] - values["b"])
    step = 0.5 + 127 * 2.0**-11  # the step itself is stored in float16
    assert (off <= (steps["m"] + steps["u"]) * step).all()
    assert off.max() > np.abs(values["b"]).max() * 2.0**-7
