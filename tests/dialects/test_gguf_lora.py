"""GGUF adapters against the real gguf library and an independent statement of llama.cpp's rules.

Rules: ggml-org/llama.cpp convert_lora_to_gguf.py (LoraTorchTensor, get_base_tensor_name), convert_hf_to_gguf.py (LlamaModel.permute,
FalconModel, BloomModel, GPTNeoXModel modify_tensors), src/llama-adapter.cpp (llama_adapter_lora_init_impl), src/llama-adapter.h (get_scale).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from tests.dialects.files import filled

gguf = pytest.importorskip("gguf")

from upparam import dialects  # noqa: E402
from upparam.adapter import Adapter, BaseHint, Extra, ExtraKind, Target  # noqa: E402
from upparam.algorithms.base import UNKNOWN, ScaleRule, Scaling  # noqa: E402
from upparam.algorithms.lora import LoRA  # noqa: E402
from upparam.bases import inventory  # noqa: E402
from upparam.bases.find import find_base  # noqa: E402
from upparam.cli import main  # noqa: E402
from upparam.containers.safetensors import write  # noqa: E402
from upparam.dialects.base import ReadOptions  # noqa: E402
from upparam.errors import DeadAdapterError, MalformedError, RefusedError, UsageError  # noqa: E402
from upparam.operations.convert import convert, write_adapter  # noqa: E402
from upparam.operations.opening import open_adapter  # noqa: E402

Array = Any
Rows = Callable[[Array], Array]


def rope(heads: int) -> Rows:
    """LlamaModel.permute."""
    return lambda w: w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def groups(count: int, per_group: int = 1) -> Rows:
    """FalconModel, and with one query head for each key BloomModel and GPTNeoXModel."""

    def rows(w: Array) -> Array:
        blocks = w.reshape(count, per_group + 2, -1, w.shape[1])
        return np.concatenate([part.reshape(-1, w.shape[1]) for part in (blocks[:, :-2], blocks[:, -2], blocks[:, -1])])

    return rows


def same(w: Array) -> Array:
    return w


L, T, X = "model.layers.3.", "transformer.h.1.", "gpt_neox.layers.2."
CASES: dict[str, tuple[str, dict[str, tuple[str, Rows]]]] = {
    "llama-3-8b": ("llama", {
        f"{L}self_attn.q_proj": ("blk.3.attn_q", rope(32)), f"{L}self_attn.k_proj": ("blk.3.attn_k", rope(8)),
        f"{L}self_attn.v_proj": ("blk.3.attn_v", same), f"{L}self_attn.o_proj": ("blk.3.attn_output", same),
        f"{L}mlp.gate_proj": ("blk.3.ffn_gate", same), f"{L}mlp.up_proj": ("blk.3.ffn_up", same), f"{L}mlp.down_proj": ("blk.3.ffn_down", same),
        "lm_head": ("output", same),
    }),
    "mistral-7b": ("llama", {f"{L}self_attn.k_proj": ("blk.3.attn_k", rope(8)), f"{L}mlp.up_proj": ("blk.3.ffn_up", same)}),
    "qwen3-0.6b": ("qwen3", {f"{L}self_attn.q_proj": ("blk.3.attn_q", same), f"{L}self_attn.k_proj": ("blk.3.attn_k", same)}),
    "gemma-2-2b": ("gemma2", {f"{L}self_attn.q_proj": ("blk.3.attn_q", same), f"{L}mlp.down_proj": ("blk.3.ffn_down", same)}),
    "phi-3-mini": ("phi3", {f"{L}self_attn.qkv_proj": ("blk.3.attn_qkv", same), f"{L}mlp.gate_up_proj": ("blk.3.ffn_up", same)}),
    "gpt2": ("gpt2", {f"{T}attn.c_attn": ("blk.1.attn_qkv", same), f"{T}mlp.c_proj": ("blk.1.ffn_down", same)}),
    "falcon-40b": ("falcon", {f"{T}self_attention.query_key_value": ("blk.1.attn_qkv", groups(8, 16))}),
    "falcon-7b": ("falcon", {f"{T}self_attention.query_key_value": ("blk.1.attn_qkv", same)}),
    "bloom-560m": ("bloom", {f"{T}self_attention.query_key_value": ("blk.1.attn_qkv", groups(16)), f"{T}mlp.dense_h_to_4h": ("blk.1.ffn_up", same)}),
    "pythia-70m": ("gptneox", {f"{X}attention.query_key_value": ("blk.2.attn_qkv", groups(8)), f"{X}attention.dense": ("blk.2.attn_output", same)}),
}  # fmt: skip
"""Base -> llama.cpp's architecture, and of some modules llama.cpp's name and what its converter does to the rows."""


def peft(path: Path, base: str, modules: list[str], dtype: Any = np.float32, rank: int = 4, alpha: float = 6.0, **config: Any) -> Path:
    """A PEFT adapter, put together by hand."""
    known = inventory.load(base)
    shapes: dict[str, list[int]] = {}
    for name in modules:
        out, into = known.by_path[name].canonical
        shapes |= {f"base_model.model.{name}.lora_A.weight": [rank, into], f"base_model.model.{name}.lora_B.weight": [out, rank]}
    path.mkdir()
    with (path / "adapter_model.safetensors").open("wb") as stream:
        write(stream, filled(shapes, dtype), {"format": "pt"})
    said = {
        "peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": sorted({name.rpartition(".")[2] for name in modules}),
        "base_model_name_or_path": inventory.known()[base].ids[0], "bias": "none", "fan_in_fan_out": base == "gpt2",
    }  # fmt: skip
    (path / "adapter_config.json").write_text(json.dumps(said | config))
    return path


def arrays(path: Path) -> dict[str, Array]:
    """The tensors of a GGUF file as the real library reads them."""
    return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}


def facts(path: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items() if not key.startswith("GGUF.")}


def loads(path: Path, base: str, arch: str) -> None:
    """What llama_adapter_lora_init_impl demands before it takes a file."""
    said = gguf.GGUFReader(path).fields
    assert said["general.type"].contents() == "adapter" and said["adapter.type"].contents() == "lora"
    assert said["general.architecture"].contents() == arch
    assert "adapter.lora.alpha" not in said or said["adapter.lora.alpha"].types == [gguf.GGUFValueType.FLOAT32]
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(number, 128)
    shapes: dict[str, tuple[int, ...]] = {}
    for module in inventory.load(base).modules:
        for own in (module.path, module.path.removeprefix("transformer.")):
            name = names.get_name(own + ".weight", try_suffixes=(".weight",))
            if name is not None:
                shapes[name] = module.canonical[::-1]  # ne: fastest axis first
    pairs: dict[str, dict[str, tuple[int, ...]]] = {}
    for tensor in gguf.GGUFReader(path).tensors:
        assert tensor.name.endswith((".lora_a", ".lora_b")), tensor.name
        pairs.setdefault(tensor.name[:-7], {})[tensor.name[-1]] = tuple(int(size) for size in tensor.shape)
    for name, pair in pairs.items():
        a, b, model = pair["a"], pair["b"], shapes[name]
        if name == "token_embd.weight":
            assert (model[0], model[1]) == (b[1], a[1])
        else:
            assert (model[0], model[1]) == (a[0], b[1]) and a[1] == b[0]


@pytest.mark.parametrize("base", CASES)
def test_peft_there_and_back(base: str, tmp_path: Path) -> None:
    arch, modules = CASES[base]
    source = peft(tmp_path / "peft", base, list(modules))
    receipt = convert(source, tmp_path / "a.gguf", "gguf-lora")
    assert receipt.proofs == [f"re-opened: {len(modules)} of {len(modules)} modules bit-identical in factors and equal in scale"]
    loads(tmp_path / "a.gguf", base, arch)
    first = open_adapter(source)
    expected = {}
    for module, (name, rows) in modules.items():
        factors = first.deltas[Target(module)].factors()
        expected |= {f"{name}.weight.lora_a": factors["down"].read(), f"{name}.weight.lora_b": rows(factors["up"].read())}
    found = arrays(tmp_path / "a.gguf")
    assert found.keys() == expected.keys()
    assert all(found[name].dtype == array.dtype and found[name].tobytes() == array.tobytes() for name, array in expected.items())
    assert facts(tmp_path / "a.gguf") == {
        "general.architecture": arch, "general.type": "adapter", "adapter.type": "lora", "general.file_type": 0, "general.quantization_version": 2,
        "general.base_model.count": 1, "general.base_model.0.organization": inventory.known()[base].ids[0].split("/")[0],
        "general.base_model.0.name": inventory.known()[base].ids[0].split("/")[1],
        "general.base_model.0.repo_url": f"https://huggingface.co/{inventory.known()[base].ids[0]}", "adapter.lora.alpha": 6.0,
    }  # fmt: skip
    # Back: the base is the one the header names, every bit and the config's numbers return.
    convert(tmp_path / "a.gguf", tmp_path / "back", "peft")
    back = open_adapter(tmp_path / "back")
    assert back.deltas.keys() == first.deltas.keys() and (back.config["r"], back.config["lora_alpha"]) == (4, 6)
    for target, delta in first.deltas.items():
        again = back.deltas[target]
        assert again.scale == delta.scale == 1.5
        assert all(factor.raw() == again.factors()[role].raw() for role, factor in delta.factors().items())


def test_the_change_is_that_of_the_permuted_weight(tmp_path: Path) -> None:
    """llama.cpp computes with permute(W); alpha / rank * lora_b @ lora_a must be permute(dW)."""
    module = "model.layers.0.self_attn.k_proj"
    source = peft(tmp_path / "peft", "tinyllama-1.1b", [module])
    convert(source, tmp_path / "a.gguf", "gguf-lora")
    delta = open_adapter(source).deltas[Target(module)]
    trained = delta.load().rows(0, delta.shape[0])
    found = arrays(tmp_path / "a.gguf")
    a, b = (found[f"blk.0.attn_k.weight.lora_{word}"].astype(np.float64) for word in "ab")
    scale = facts(tmp_path / "a.gguf")["adapter.lora.alpha"] / b.shape[1]  # rank is lora_b's ne[0]
    assert np.allclose(scale * b @ a, rope(4)(trained), rtol=1e-12, atol=1e-15)
    assert not np.allclose(scale * b @ a, trained, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "kind", "file_type"),
    [(np.float32, "F32", 0), (np.float16, "F16", 1), (ml_dtypes.bfloat16, "BF16", 32)],
)
def test_dtypes_stay(dtype: Any, kind: str, file_type: int, tmp_path: Path) -> None:
    source = peft(tmp_path / "peft", "llama-3.2-1b", ["model.layers.0.self_attn.q_proj"], dtype)
    convert(source, tmp_path / "a.gguf", "gguf-lora")
    (a, b) = gguf.GGUFReader(tmp_path / "a.gguf").tensors
    assert {a.tensor_type.name, b.tensor_type.name} == {kind} and facts(tmp_path / "a.gguf")["general.file_type"] == file_type
    factors = open_adapter(source).deltas[Target("model.layers.0.self_attn.q_proj")].factors()
    assert np.array(a.data).tobytes() == factors["down"].raw()
    assert np.array(b.data).tobytes() == rope(32)(factors["up"].read()).tobytes()


def by_hand(path: Path, tensors: Mapping[str, Any], arch: str | None = "llama", alpha: float | None = 16.0, keys: Any = None) -> Path:
    """An adapter by the real library's writer; a value may be an array or (quantised array, type)."""
    writer = gguf.GGUFWriter(path, arch or "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    if alpha is not None:
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    if keys:
        keys(writer)
    for name, value in tensors.items():
        array, kind = value if isinstance(value, tuple) else (value, None)
        writer.add_tensor(name, array.copy(), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pair(name: str, out: int, into: int, rank: int = 8, seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {
        f"{name}.weight.lora_a": rng.standard_normal((rank, into)).astype(np.float32),
        f"{name}.weight.lora_b": rng.standard_normal((out, rank)).astype(np.float32),
    }


LLAMA3 = {**pair("blk.0.attn_q", 4096, 4096), **pair("blk.31.ffn_down", 4096, 14336, rank=4, seed=1)}


def test_a_file_by_the_library_is_read(tmp_path: Path) -> None:
    def keys(writer: Any) -> None:
        writer.add_string("general.base_model.0.repo_url", "https://huggingface.co/meta-llama/Meta-Llama-3-8B")

    adapter = open_adapter(by_hand(tmp_path / "a.gguf", LLAMA3, keys=keys))
    assert adapter.dialect == "gguf-lora" and adapter.layout == "reference" and not adapter.leftovers
    assert adapter.base is not None and adapter.base.stated and inventory.resolve(adapter.base.name) == "llama-3-8b"
    assert {str(target): delta.scale for target, delta in adapter.deltas.items()} == {
        "model.layers.0.self_attn.q_proj": 2.0, "model.layers.31.mlp.down_proj": 4.0,
    }  # fmt: skip
    for target, name, heads in (
        ("model.layers.0.self_attn.q_proj", "blk.0.attn_q", 32),
        ("model.layers.31.mlp.down_proj", "blk.31.ffn_down", 0),
    ):
        factors = adapter.deltas[Target(target)].factors()
        assert factors["down"].read().tobytes() == LLAMA3[f"{name}.weight.lora_a"].tobytes()
        up = factors["up"].read()
        assert (rope(heads)(up) if heads else up).tobytes() == LLAMA3[f"{name}.weight.lora_b"].tobytes()
    # And written again: the same tensors under the same keys.
    write_adapter(adapter, tmp_path / "b.gguf", "gguf-lora")
    assert facts(tmp_path / "a.gguf").items() <= facts(tmp_path / "b.gguf").items()
    again = arrays(tmp_path / "b.gguf")
    assert again.keys() == LLAMA3.keys() and all(again[name].tobytes() == array.tobytes() for name, array in LLAMA3.items())


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (0.0, 1.0), (4.0, 0.5)])
def test_alpha_as_llama_cpp_takes_it(alpha: float | None, scale: float, tmp_path: Path) -> None:
    adapter = open_adapter(by_hand(tmp_path / "a.gguf", pair("blk.0.attn_v", 1024, 4096), alpha=alpha))
    assert [delta.scale for delta in adapter.deltas.values()] == [scale]
    assert ("alpha-zero" in {finding.code for finding in adapter.findings}) == (alpha == 0.0)
    if alpha:
        with pytest.raises(UsageError, match="contradicts"):
            open_adapter(tmp_path / "a.gguf", options=ReadOptions(alpha=5.0))


def test_embeddings_are_looked_up_by_row(tmp_path: Path) -> None:
    """PEFT's embedding A (r, tokens), B (dim, r); the converter writes lora_a = A transposed, lora_b = B."""
    tokens, dim = inventory.load("tinyllama-1.1b").by_path["model.embed_tokens"].shape
    source = tmp_path / "peft"
    tensors = filled(
        {
            "base_model.model.model.embed_tokens.lora_embedding_A": [4, tokens],
            "base_model.model.model.embed_tokens.lora_embedding_B": [dim, 4],
        }
    )
    source.mkdir()
    with (source / "adapter_model.safetensors").open("wb") as stream:
        write(stream, tensors, {"format": "pt"})
    (source / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["embed_tokens"], "base_model_name_or_path": "TinyLlama/TinyLlama-1.1B-Chat-v1.0"})
    )  # fmt: skip
    convert(source, tmp_path / "a.gguf", "gguf-lora")
    loads(tmp_path / "a.gguf", "tinyllama-1.1b", "llama")
    a, b = (tensor.read() for tensor in tensors.values())
    found = arrays(tmp_path / "a.gguf")
    assert np.array_equal(found["token_embd.weight.lora_a"], a.T) and np.array_equal(found["token_embd.weight.lora_b"], b)
    convert(tmp_path / "a.gguf", tmp_path / "back", "peft")
    (before,), (after,) = (open_adapter(path).deltas.values() for path in (source, tmp_path / "back"))
    assert isinstance(after, LoRA) and after.embedding
    assert all(factor.raw() == after.factors()[role].raw() for role, factor in before.factors().items())


def test_experts_are_stacked(tmp_path: Path) -> None:
    base = inventory.load("mixtral-8x7b")
    modules = [f"model.layers.2.block_sparse_moe.experts.{number}.w1" for number in range(8)]
    deltas: dict[Target, Any] = {}
    for number, module in enumerate([*modules, "model.layers.2.block_sparse_moe.gate", "model.layers.2.self_attn.q_proj"]):
        out, into = base.by_path[module].canonical
        factors = filled({"up": [out, 2], "down": [2, into]}, seed=number)
        deltas[Target(module)] = LoRA(factors["up"], factors["down"], Scaling(alpha=4.0))
    adapter = Adapter(deltas, "test", base=BaseHint("mixtral-8x7b", 1.0, stated=True))
    write_adapter(adapter, tmp_path / "a.gguf", "gguf-lora")
    found = arrays(tmp_path / "a.gguf")
    assert found["blk.2.ffn_gate_exps.weight.lora_a"].shape == (8, 2, 4096) and found["blk.2.ffn_gate_exps.weight.lora_b"].shape == (
        8,
        14336,
        2,
    )
    for number, module in enumerate(modules):
        assert found["blk.2.ffn_gate_exps.weight.lora_b"][number].tobytes() == deltas[Target(module)].up.raw()
    again = open_adapter(tmp_path / "a.gguf")
    assert again.deltas.keys() == deltas.keys()
    assert all(delta.factors()["down"].raw() == deltas[target].down.raw() for target, delta in again.deltas.items())
    del deltas[Target(modules[3])]
    with pytest.raises(RefusedError, match="only experts 0, 1, 2, 4"):
        write_adapter(adapter, tmp_path / "b.gguf", "gguf-lora")
    factors = filled({"up": [14336, 3], "down": [3, 4096]})
    deltas[Target(modules[3])] = LoRA(factors["up"], factors["down"], Scaling(alpha=4.0))
    with pytest.raises(RefusedError, match="several ranks"):
        write_adapter(adapter, tmp_path / "b.gguf", "gguf-lora")


def test_quantised_factors_are_the_numbers_they_stand_for(tmp_path: Path) -> None:
    q8 = gguf.GGMLQuantizationType.Q8_0
    tensors = pair("blk.0.ffn_down", 4096, 14336, rank=32)
    packed = {name: (gguf.quants.quantize(array, q8), q8) for name, array in tensors.items()}
    adapter = open_adapter(by_hand(tmp_path / "a.gguf", packed))
    factors = adapter.deltas[Target("model.layers.0.mlp.down_proj")].factors()
    for role, name in (("down", "blk.0.ffn_down.weight.lora_a"), ("up", "blk.0.ffn_down.weight.lora_b")):
        assert np.array_equal(factors[role].read(), gguf.quants.dequantize(packed[name][0], q8))
    assert "dequantised" in {finding.code for finding in adapter.findings}
    q4 = gguf.GGMLQuantizationType.Q4_0
    with pytest.raises(RefusedError, match=r"Q4_0.*outtype f32"):
        open_adapter(by_hand(tmp_path / "b.gguf", {name: (gguf.quants.quantize(array, q4), q4) for name, array in tensors.items()}))


def test_rows_are_never_guessed(tmp_path: Path) -> None:
    """pythia-1b and pythia-1.4b have a fused qkv of one shape and 8 and 16 heads: from two layers nobody can tell which."""
    tensors = pair("blk.0.attn_qkv", 6144, 2048)
    adapter = open_adapter(by_hand(tmp_path / "a.gguf", tensors, "gptneox"))
    assert adapter.layout == "gguf" and list(adapter.deltas) == [Target("blk.0.attn_qkv")]
    assert "base-open" in {finding.code for finding in adapter.findings}
    with pytest.raises(RefusedError, match="--base"):
        convert(tmp_path / "a.gguf", tmp_path / "peft", "peft")
    write_adapter(adapter, tmp_path / "b.gguf", "gguf-lora")
    assert {name: array.tobytes() for name, array in arrays(tmp_path / "b.gguf").items()} == {
        name: array.tobytes() for name, array in tensors.items()
    }
    for base, heads in (("pythia-1b", 8), ("pythia-1.4b", 16)):
        read = ReadOptions(base=inventory.load(base))
        convert(tmp_path / "a.gguf", tmp_path / base, "peft", read=read)
        (delta,) = open_adapter(tmp_path / base).deltas.values()
        assert groups(heads)(delta.factors()["up"].read()).tobytes() == tensors["blk.0.attn_qkv.weight.lora_b"].tobytes()


def test_a_base_that_does_not_fit_is_said(tmp_path: Path) -> None:
    path = by_hand(tmp_path / "a.gguf", LLAMA3)
    with pytest.raises(UsageError, match=r"another architecture.*expected llama, found qwen2"):
        open_adapter(path, options=ReadOptions(base=inventory.load("qwen2-7b")))
    with pytest.raises(UsageError, match=r"blk.0.attn_q': llama-2-70b has no such tensor.*8192 rows"):
        open_adapter(path, options=ReadOptions(base=inventory.load("llama-2-70b")))
    with pytest.raises(UsageError, match="has no gguf names"):
        open_adapter(path, options=ReadOptions(base=inventory.load("sd1.5")))


def test_a_model_of_its_own_size(tmp_path: Path) -> None:
    """No inventory has it: heads come from the config.json beside the weights. The adapter is PEFT's own."""
    torch, peft_library, transformers = (pytest.importorskip(name) for name in ("torch", "peft", "transformers"))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=3, vocab_size=64, tie_word_embeddings=False
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    trained = peft_library.get_peft_model(model, peft_library.LoraConfig(r=4, lora_alpha=12, target_modules="all-linear"))
    for name, parameter in trained.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    trained.save_pretrained(tmp_path / "peft")
    base = ("--base", str(tmp_path / "base"))
    assert main(["convert", str(tmp_path / "peft"), "--to", "gguf-lora", "-o", str(tmp_path / "a.gguf"), *base]) == 0
    assert main(["convert", str(tmp_path / "a.gguf"), "--to", "peft", "-o", str(tmp_path / "back"), *base]) == 0
    weights = {name: tensor.numpy() for name, tensor in peft_library.load_peft_weights(str(tmp_path / "peft")).items()}
    found = arrays(tmp_path / "a.gguf")
    assert len(found) == len(weights) == 28 and facts(tmp_path / "a.gguf")["adapter.lora.alpha"] == 12.0
    for layer in range(2):
        for word, name, rows in (("q", "attn_q", rope(6)), ("k", "attn_k", rope(3)), ("v", "attn_v", same), ("o", "attn_output", same)):
            stem = f"base_model.model.model.layers.{layer}.self_attn.{word}_proj"
            assert np.array_equal(found[f"blk.{layer}.{name}.weight.lora_b"], rows(weights[f"{stem}.lora_B.weight"]))
            assert np.array_equal(found[f"blk.{layer}.{name}.weight.lora_a"], weights[f"{stem}.lora_A.weight"])
    back = {name: tensor.numpy() for name, tensor in peft_library.load_peft_weights(str(tmp_path / "back")).items()}
    assert back.keys() == weights.keys() and all(np.array_equal(back[name], array) for name, array in weights.items())
    # Without the config nobody knows how the rows lie.
    (tmp_path / "base" / "config.json").unlink()
    for source, dialect in (("peft", "gguf-lora"), ("a.gguf", "peft")):
        with pytest.raises(UsageError, match=r"order of rows.*config\.json"):
            convert(tmp_path / source, tmp_path / "x", dialect, read=ReadOptions(base=find_base(str(tmp_path / "base"))))


def test_what_llama_cpp_has_no_place_for(tmp_path: Path) -> None:
    def one(
        module: str = "model.layers.0.mlp.up_proj", rank: int = 4, scaling: Any = None, kernel: tuple[int, ...] = ()
    ) -> dict[Target, Any]:
        out, into = (14336, 4096) if "up_proj" in module else (4096, 14336)
        factors = filled({"up": [out, rank, *(1 for _ in kernel)], "down": [rank, into, *kernel]})
        return {Target(module): LoRA(factors["up"], factors["down"], scaling or Scaling(alpha=8.0))}

    def refused(deltas: dict[Target, Any], why: str, extras: list[Extra] | None = None) -> None:
        adapter = Adapter(deltas, "test", extras=extras or [], base=BaseHint("llama-3-8b", 1.0, stated=True))
        with pytest.raises(RefusedError, match=why):
            write_adapter(adapter, tmp_path / "x.gguf", "gguf-lora")
        assert not (tmp_path / "x.gguf").exists()

    other = "model.layers.1.mlp.down_proj"
    refused(one() | one(other, scaling=Scaling(alpha=2.0)), "alpha 2 beside 8")
    refused(one(scaling=Scaling(alpha=0.0)), "scale of 0")
    refused(one(scaling=UNKNOWN), "never guessed")
    refused({}, "without factors")
    refused(one(kernel=(3, 3)), "convolution")
    refused(one("model.layers.0.nothing"), "no name in the gguf layout")
    refused(one(), "bias", [Extra(ExtraKind.BIAS, "model.layers.0.mlp.up_proj.bias", filled({"b": [14336]})["b"])])
    factors = filled({"up": [14336, 4], "down": [4, 4096]}, np.float64)
    refused({Target("model.layers.0.mlp.up_proj"): LoRA(factors["up"], factors["down"])}, "float64")
    # Ranks that differ are no obstacle where one alpha says every scale, nor where every scale is 1.
    for deltas in (
        one() | one(other, rank=2),
        one(scaling=Scaling(ScaleRule.BAKED)) | one(other, rank=2, scaling=Scaling(ScaleRule.BAKED)),
        one(scaling=Scaling(ScaleRule.ALPHA_OVER_SQRT_RANK, alpha=8.0)),
    ):
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.gguf"
        write_adapter(Adapter(deltas, "test", base=BaseHint("llama-3-8b", 1.0, stated=True)), out, "gguf-lora")
        assert {str(t): d.scale for t, d in open_adapter(out).deltas.items()} == {str(t): pytest.approx(d.scale) for t, d in deltas.items()}


def test_metadata_of_other_dialects_stays_text(tmp_path: Path) -> None:
    factors = filled({"up": [4096, 4], "down": [4, 14336]})
    adapter = Adapter(
        {Target("model.layers.0.mlp.down_proj"): LoRA(factors["up"], factors["down"])}, "test",
        metadata={"format": "pt", "ss_tag_frequency": '{"a": {"b": 1}}', "ss_rank": "8", "note": "[1, null]"}, base=BaseHint("llama-3-8b", 1.0, stated=True),
    )  # fmt: skip
    write_adapter(adapter, tmp_path / "a.gguf", "gguf-lora")
    said = facts(tmp_path / "a.gguf")
    assert (said["ss_tag_frequency"], said["ss_rank"], said["note"]) == ('{"a": {"b": 1}}', "8", "[1, null]") and "format" not in said


def test_norms_and_invocation_tokens(tmp_path: Path) -> None:
    norm = np.random.default_rng(3).standard_normal(4096).astype(np.float32)

    def keys(writer: Any) -> None:
        writer.add_key_value("adapter.alora.invocation_tokens", [1, 2, 70000], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32)

    path = by_hand(tmp_path / "a.gguf", LLAMA3 | {"blk.0.attn_norm.weight": norm}, keys=keys)
    adapter = open_adapter(path)
    (extra,) = adapter.extras
    assert extra.name == "model.layers.0.input_layernorm.weight" and np.array_equal(extra.tensor.read(), norm)
    assert adapter.conditions and "invocation" in adapter.conditions[0]
    with pytest.raises(RefusedError, match="--drop conditions"):
        convert(path, tmp_path / "peft", "peft")
    convert(path, tmp_path / "b.gguf", "gguf-lora")
    assert np.array_equal(arrays(tmp_path / "b.gguf")["blk.0.attn_norm.weight"], norm)
    field = gguf.GGUFReader(tmp_path / "b.gguf").fields["adapter.alora.invocation_tokens"]
    assert field.contents() == [1, 2, 70000] and field.types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32]


def test_bad_files_end_in_one_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = pair("blk.0.attn_v", 1024, 4096).items()
    wrong = {a[0]: a[1], b[0]: b[1][:, :3]}
    stacked = {a[0]: np.zeros((2, 4, 8), np.float32), b[0]: np.zeros((3, 8, 4), np.float32)}
    none = {a[0]: np.zeros((0, 4, 8), np.float32), b[0]: np.zeros((0, 8, 4), np.float32)}
    for number, (tensors, kind, match) in enumerate((
        ({a[0]: a[1]}, DeadAdapterError, "both its lora_a and its lora_b"), (wrong, MalformedError, r"attn_v.*do not fit"),
        (stacked, MalformedError, r"attn_v.*do not fit"), (none, MalformedError, r"attn_v.*do not fit"), ({"output_norm.weight": np.zeros(4, np.float32)}, DeadAdapterError, "both"),
    )):  # fmt: skip
        path = by_hand(tmp_path / f"{number}.gguf", tensors)
        with pytest.raises(kind, match=match):
            open_adapter(path)
        assert main(["convert", str(path), "--to", "peft", "-o", str(tmp_path / "out")]) == 3
        out, err = capsys.readouterr()
        assert out == "" and err.startswith(f"upparam: {path}") and err.count("\n") == 1
    path = by_hand(
        tmp_path / "bad-alpha.gguf", dict([a, b]), alpha=None, keys=lambda writer: writer.add_string("adapter.lora.alpha", "much")
    )
    with pytest.raises(MalformedError, match="no number"):
        open_adapter(path)
    orphan = open_adapter(by_hand(tmp_path / "orphan.gguf", LLAMA3 | dict([a]) | {"stray": np.zeros(3, np.float32)}))
    assert set(orphan.leftovers) == {"blk.0.attn_v.weight.lora_a", "stray"} and "orphan" in {finding.code for finding in orphan.findings}


def test_whole_models_are_not_adapters(tmp_path: Path) -> None:
    from upparam.containers import open_file

    member = dialects.get("gguf-lora")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert member.match(open_file(tmp_path / "m.gguf")) is None


@pytest.mark.parametrize(("name", "drop"), [("peft-gpt2", ("--drop", "saved-module")), ("peft-bloom", ()), ("peft-gpt2-tigrinya", ())])
def test_the_corpus_there_and_back(
    corpus: Path, tmp_path: Path, name: str, drop: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    source = corpus / name
    assert main(["convert", str(source), "--to", "gguf-lora", "-o", str(tmp_path / "a.gguf"), *drop]) == 0
    assert main(["convert", str(tmp_path / "a.gguf"), "--to", "peft", "-o", str(tmp_path / "back")]) == 0
    assert "re-opened" in capsys.readouterr().out
    before, after = open_adapter(source), open_adapter(tmp_path / "back")
    loads(tmp_path / "a.gguf", "bloom-560m" if "bloom" in name else "gpt2", "bloom" if "bloom" in name else "gpt2")
    if "bloom" not in name:
        assert before.deltas.keys() == after.deltas.keys()
        for target, delta in before.deltas.items():
            assert all(factor.raw() == after.deltas[target].factors()[role].raw() for role, factor in delta.factors().items())
        return
    # MergedLinear adapted blocks 0 and 2 of three equal blocks of rows; llama.cpp regroups the rows by head, so the blocks are one delta there.
    found = arrays(tmp_path / "a.gguf")
    scale = facts(tmp_path / "a.gguf")["adapter.lora.alpha"] / 16
    for layer in (0, 23):
        module = f"transformer.h.{layer}.self_attention.query_key_value"
        trained = np.zeros((3072, 1024))
        for target, delta in before.deltas.items():
            if target.module == module and target.rows:
                trained[slice(*target.rows)] = delta.load().rows(0, 1024)
        a, b = (found[f"blk.{layer}.attn_qkv.weight.lora_{word}"].astype(np.float64) for word in "ab")
        assert np.allclose(scale * b @ a, groups(16)(trained), rtol=1e-12, atol=1e-15) and trained.any()
