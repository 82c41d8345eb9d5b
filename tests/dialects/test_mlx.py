"""MLX against an independent statement of mlx-lm's rules (ml-explore/mlx-lm mlx_lm/tuner/lora.py `fuse`, tuner/utils.py `load_adapters`)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from tests.dialects.files import filled, read, same, written

from upparam import dialects
from upparam.adapter import Adapter, BaseHint, Extra, ExtraKind, Target
from upparam.algorithms.base import UNKNOWN, ScaleRule, Scaling
from upparam.algorithms.lora import LoRA
from upparam.bases import inventory
from upparam.containers.npy import write_npz
from upparam.containers.safetensors import write
from upparam.dialects.base import NamedTensors, ReadOptions
from upparam.dialects.mlx import _FROM_HF, _TO_HF, _renamed
from upparam.errors import DeadAdapterError, MalformedError, RefusedError, UsageError
from upparam.operations.convert import convert
from upparam.operations.edit import edit
from upparam.operations.opening import open_adapter
from upparam.tensors import Tensor

PARAMETERS = {"rank": 4, "scale": 20.0, "dropout": 0.0, "keys": ["self_attn.q_proj", "mlp.down_proj"]}
CONFIG = {"fine_tune_type": "lora", "model": "mlx-community/Llama-3.2-1B-Instruct-4bit", "num_layers": 2, "lora_parameters": PARAMETERS}


def shapes_of(base: str, modules: list[str], rank: int = 4) -> dict[str, list[int]]:
    """lora_a (in, r) and lora_b (r, out) for reference modules whose names are mlx-lm's too."""
    found: dict[str, list[int]] = {}
    for name in modules:
        out, into = inventory.load(base).by_path[name].shape
        found |= {f"{name}.lora_a": [into, rank], f"{name}.lora_b": [rank, out]}
    return found


LLAMA = [f"model.layers.{layer}.{part}" for layer in (14, 15) for part in ("self_attn.q_proj", "mlp.down_proj")]


def folder(path: Path, tensors: Mapping[str, Tensor], config: Any = None, name: str = "adapters.safetensors") -> Path:
    path.mkdir()
    with (path / name).open("wb") as stream:
        write_npz(stream, tensors) if name.endswith("npz") else write(stream, tensors, {"format": "mlx"})
    if config is not None:
        (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def test_factors_mean_what_fuse_does_with_them(tmp_path: Path) -> None:
    tensors = filled(shapes_of("llama-3.2-1b", LLAMA), np.float32)
    adapter = open_adapter(folder(tmp_path / "a", tensors, CONFIG))
    assert adapter.dialect == "mlx" and adapter.layout == "reference" and not adapter.leftovers
    assert adapter.base is not None and adapter.base.stated and inventory.resolve(adapter.base.name) == "llama-3.2-1b"
    assert sorted(target.module for target in adapter.deltas) == sorted(LLAMA)
    for target, delta in adapter.deltas.items():
        a, b = tensors[f"{target.module}.lora_a"].read(), tensors[f"{target.module}.lora_b"].read()
        fused = (20.0 * b.T.astype(np.float64)) @ a.T.astype(np.float64)  # LoRALinear.fuse
        assert np.allclose(delta.load().rows(0, delta.shape[0]), fused, rtol=1e-12, atol=1e-14)
        assert delta.scaling == Scaling(ScaleRule.EXPLICIT, multiplier=20.0)
    package = dialects.get("mlx").write(adapter, {})
    content = package.files["adapters.safetensors"]
    assert isinstance(content, NamedTensors) and dict(content.metadata) == {"format": "mlx"}
    same(dict(content.tensors), tensors)
    assert json.loads(bytes(package.files["adapter_config.json"])) == CONFIG  # type: ignore[arg-type]


def loads(base: str, names: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """What `load_adapters` does: LoRA layers made from num_layers and keys, then every tensor must be one of theirs in name and shape."""
    model = {_renamed(module.path, _FROM_HF): module for module in inventory.load(base).modules if len(module.shape) == 2}
    depth = 1 + max(int(found.group(1)) for name in model if (found := re.search(r"(?:layers|h)\.(\d+)\.", name)))
    count, parameters = max(config["num_layers"], 0), config["lora_parameters"]
    first = depth - count if count else 0
    allowed: dict[str, tuple[int, ...]] = {}
    for name, module in model.items():
        layer = re.fullmatch(r".*?(?:layers|h)\.(\d+)\.(.+)", name)
        if name in parameters["keys"] or (layer and int(layer.group(1)) >= first and layer.group(2) in parameters["keys"]):
            out, into = module.shape if module.kind == "Embedding" else module.canonical
            a, b = (out, into) if module.kind == "Embedding" else (into, out)
            allowed |= {f"{name}.lora_a": (a, parameters["rank"]), f"{name}.lora_b": (parameters["rank"], b)}
    assert names and {name: allowed.get(name) for name in names} == {name: tensor.shape for name, tensor in names.items()}


@pytest.mark.parametrize(
    ("base", "modules"),
    [
        ("llama-3.2-1b", ["model.layers.3.self_attn.q_proj", "model.layers.9.mlp.up_proj", "model.embed_tokens"]),
        ("gpt2", ["transformer.h.11.attn.c_attn", "transformer.h.2.mlp.c_proj", "transformer.wte"]),
        ("pythia-70m", ["gpt_neox.layers.5.attention.query_key_value", "embed_out", "gpt_neox.embed_in"]),
        ("gemma-3-4b", ["model.language_model.layers.0.self_attn.k_proj"]),
        ("phi-3-mini", ["model.layers.1.self_attn.qkv_proj"]),
    ],
)
def test_what_is_written_is_what_load_adapters_makes_room_for(base: str, modules: list[str]) -> None:
    known = inventory.load(base)
    deltas: dict[Target, Any] = {}
    for name in modules:
        out, into = known.by_path[name].canonical
        factors = filled({"up": [out, 4], "down": [4, into]}, seed=len(name))
        deltas[Target(name)] = LoRA(factors["up"], factors["down"], Scaling(alpha=8.0), embedding=known.by_path[name].kind == "Embedding")
    package = dialects.get("mlx").write(Adapter(deltas, "test", base=BaseHint(base, 1.0, stated=True)), {})
    content, config = package.files["adapters.safetensors"], json.loads(bytes(package.files["adapter_config.json"]))  # type: ignore[arg-type]
    assert isinstance(content, NamedTensors) and config["lora_parameters"]["scale"] == 2.0 and config["fine_tune_type"] == "lora"
    loads(base, dict(content.tensors), config)
    again = read("mlx", content.tensors, scale=2.0, base=known)
    assert again.deltas.keys() == deltas.keys() and again.layout == "reference"
    for target, delta in deltas.items():
        assert again.deltas[target].factors()["up"].raw() == delta.up.raw() and again.deltas[target].scale == 2.0
        assert again.deltas[target].embedding is delta.embedding  # type: ignore[attr-defined]


DORA = {"model.layers.3.self_attn.q_proj": (2048, 2048), "model.layers.9.mlp.up_proj": (8192, 2048), "model.embed_tokens": (128256, 2048)}


def test_dora_is_read_as_mlx_fuses_it_and_written_back() -> None:
    """mlx_lm/tuner/dora.py: m / ||W + scale B A|| for each row, embeddings' too; all modules of an adapter or none."""
    shapes: dict[str, list[int]] = {}
    for name, (out, into) in DORA.items():
        sides = (out, into) if name.endswith("embed_tokens") else (into, out)
        shapes |= {f"{name}.lora_a": [sides[0], 2], f"{name}.lora_b": [2, sides[1]], f"{name}.m": [out]}
    tensors, known = filled(shapes), inventory.load("llama-3.2-1b")
    adapter = read("mlx", tensors, scale=4.0, base=known)
    assert adapter.algorithms() == {"dora": 3} and not adapter.leftovers
    weight = np.random.default_rng(0).standard_normal((40, 2048))
    for name in DORA:
        a, b, m = (tensors[f"{name}.{word}"].read().astype(np.float64) for word in ("lora_a", "lora_b", "m"))
        change = (4.0 * a[:40]) @ b if name.endswith("embed_tokens") else (4.0 * b.T[:40]) @ a.T
        fused = (m[:40] / np.linalg.norm(weight + change, axis=1))[:, None] * (weight + change)
        found = adapter.deltas[Target(name)].load().merged(lambda start, stop: weight[start:stop].copy(), 0, 40)
        assert np.allclose(found, fused, rtol=1e-12, atol=1e-14)
    package = dialects.get("mlx").write(adapter, {"base": known})
    content, config = package.files["adapters.safetensors"], json.loads(bytes(package.files["adapter_config.json"]))  # type: ignore[arg-type]
    assert isinstance(content, NamedTensors) and config["fine_tune_type"] == "dora"
    same(dict(content.tensors), tensors)
    loads("llama-3.2-1b", {name: tensor for name, tensor in content.tensors.items() if not name.endswith(".m")}, config)


def test_dora_between_peft_and_mlx(tmp_path: Path) -> None:
    from tests.matrix.specimens import dora

    from upparam.operations.convert import write_adapter
    from upparam.operations.proof import same_delta

    options, adapter = ReadOptions(base=inventory.load("llama-3-8b")), dora("llama-3-8b")
    write_adapter(adapter, tmp_path / "peft", "peft", read=options)
    convert(tmp_path / "peft", tmp_path / "mlx", "mlx", read=options)
    convert(tmp_path / "mlx", tmp_path / "again", "peft", read=options)
    again = open_adapter(tmp_path / "again", options=options)
    assert all(same_delta(delta, again.deltas[target]) for target, delta in adapter.deltas.items())
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["use_dora"] is True


def test_dora_of_some_modules_is_refused(tmp_path: Path) -> None:
    from tests.matrix.specimens import adapter as of
    from tests.matrix.specimens import dora, plain

    mixed = of("llama-3-8b", {**plain("llama-3-8b").deltas, **dict(list(dora("llama-3-8b").deltas.items())[:1])})
    with pytest.raises(RefusedError, match=r"a DoRA beside plain LoRAs.*one kind"):
        written("mlx", mixed)
    tensors = filled(
        {
            "model.layers.0.self_attn.q_proj.lora_a": [64, 2],
            "model.layers.0.self_attn.q_proj.lora_b": [2, 64],
            "model.layers.0.self_attn.q_proj.m": [63],
        }
    )
    with pytest.raises(MalformedError, match="one norm for each row"):
        read("mlx", tensors, scale=1.0)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen", "gemma", "phi", "gpt2", "neox"])
def test_names_go_there_and_back(family: str) -> None:
    for name, fact in inventory.known().items():
        if fact.family != family:
            continue
        paths = [module.path for module in inventory.load(name).modules]
        own = [_renamed(path, _FROM_HF) for path in paths]
        assert len(set(own)) == len(own) and [_renamed(path, _TO_HF) for path in own] == paths, name


def test_the_scale_is_asked_for_and_not_guessed(tmp_path: Path) -> None:
    tensors = filled(shapes_of("llama-3.2-1b", LLAMA))
    path = folder(tmp_path / "a", tensors, name="adapters.npz")
    adapter = open_adapter(path)
    assert all(delta.scaling == UNKNOWN for delta in adapter.deltas.values())
    assert "scale-missing" in {finding.code for finding in adapter.findings}
    for dialect in ("mlx", "peft", "kohya"):
        with pytest.raises(RefusedError, match="never guessed"):
            written(dialect, adapter, base=inventory.load("llama-3.2-1b"))
    assert {delta.scale for delta in open_adapter(path, options=ReadOptions(scale=10.0)).deltas.values()} == {10.0}
    assert {delta.scale for delta in open_adapter(path, options=ReadOptions(alpha=8.0)).deltas.values()} == {2.0}
    told = folder(tmp_path / "b", tensors, CONFIG)
    with pytest.raises(UsageError, match="contradicts"):
        open_adapter(told, options=ReadOptions(scale=10.0))
    assert {delta.scale for delta in open_adapter(told, options=ReadOptions(scale=20.0)).deltas.values()} == {20.0}


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"num_layers": 16, "lora_parameters": {"rank": 4, "scale": 10.0, "alpha": 16}}, 10.0),
        ({"lora_layers": 16, "lora_parameters": {"rank": 4, "scale": 10.0, "alpha": 4}}, 10.0),
        ({"lora_layers": 16, "lora_parameters": {"rank": 4, "scale": 10.0, "alpha": 16}}, None),
        ({"lora_layers": 16, "lora_parameters": {"rank": 4, "scale": 20.0}}, 20.0),
        ({"lora_layers": 16, "lora_parameters": {"rank": 4, "scale": "20"}}, None),
        ({"peft_type": "LORA"}, None),
    ],
)
def test_configs_of_every_year(tmp_path: Path, config: Any, scale: float | None) -> None:
    adapter = open_adapter(folder(tmp_path / "a", filled(shapes_of("llama-3.2-1b", LLAMA)), config))
    assert {delta.scale for delta in adapter.deltas.values()} == {scale}
    if scale is None and "lora_layers" in config and isinstance(config["lora_parameters"]["scale"], float):
        (finding,) = [finding for finding in adapter.findings if finding.code == "scale-missing"]
        assert "40 until June 2024 and by 10 since" in finding.message


def test_a_config_with_another_rank_is_said(tmp_path: Path) -> None:
    adapter = open_adapter(folder(tmp_path / "a", filled(shapes_of("llama-3.2-1b", LLAMA, rank=8)), CONFIG))
    assert "rank-differs" in {finding.code for finding in adapter.findings}
    config = json.loads(bytes(dialects.get("mlx").write(adapter, {}).files["adapter_config.json"]))  # type: ignore[arg-type]
    assert config["lora_parameters"] == {**PARAMETERS, "rank": 8}


@pytest.mark.parametrize(
    ("changed", "outside"),
    [
        ({"num_layers": 2}, 0),
        ({"num_layers": 16}, 0),
        ({"num_layers": -1}, 0),
        ({"num_layers": 1}, 2),
        ({"keys": ["self_attn.q_proj"]}, 2),
        ({"keys": ["self_attn.q_proj"], "num_layers": 1}, 3),
        ({"keys": LLAMA, "num_layers": 1}, 0),
    ],
)
def test_factors_for_which_the_config_makes_no_room_are_said(tmp_path: Path, changed: dict[str, Any], outside: int) -> None:
    config = {**CONFIG, "num_layers": changed.get("num_layers", 2)}
    config["lora_parameters"] = {**PARAMETERS, "keys": changed.get("keys", PARAMETERS["keys"])}
    tensors = filled(shapes_of("llama-3.2-1b", LLAMA))
    found = [finding for finding in open_adapter(folder(tmp_path / "a", tensors, config)).findings if finding.code == "not-targeted"]
    assert [finding.message.split(" of ")[0] for finding in found] == ([str(outside)] if outside else [])
    if outside:
        with pytest.raises(AssertionError):
            loads("llama-3.2-1b", tensors, config)
    else:
        loads("llama-3.2-1b", tensors, config)


def test_an_edited_adapter_has_room_for_its_modules(tmp_path: Path) -> None:
    tensors = filled(shapes_of("llama-3.2-1b", LLAMA))
    edit(
        folder(tmp_path / "a", tensors, CONFIG),
        tmp_path / "b",
        rename=[("model.layers.14.self_attn.q_proj", "model.layers.3.self_attn.o_proj")],
    )
    again = open_adapter(tmp_path / "b")
    assert "not-targeted" not in {finding.code for finding in again.findings}
    written = {name: Tensor.of(array) for name, array in load_file(tmp_path / "b" / "adapters.safetensors").items()}
    loads("llama-3.2-1b", written, json.loads((tmp_path / "b" / "adapter_config.json").read_text()))


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(
    "stack", ["model.layers.1.block_sparse_moe.switch_mlp", "model.layers.1.mlp.switch_mlp", "model.layers.1.mlp.experts"]
)
def test_stacked_experts(flat: bool, stack: str) -> None:
    experts, rank, into, out = 8, 2, 24, 40
    shapes = {f"{stack}.up_proj.lora_a": [experts, rank, into], f"{stack}.up_proj.lora_b": [experts, out, rank]}
    if flat:
        shapes[f"{stack}.up_proj.lora_a"] = [experts * rank, into]
    tensors = filled(shapes, np.float32)
    adapter = read("mlx", tensors, scale=3.0)
    assert len(adapter.deltas) == experts
    a, b = tensors[f"{stack}.up_proj.lora_a"].read().reshape(experts, -1, into), tensors[f"{stack}.up_proj.lora_b"].read()
    fused = (3.0 * b.astype(np.float64)) @ a  # LoRASwitchLinear.fuse
    for number, (target, delta) in enumerate(adapter.deltas.items()):
        assert f".experts.{number}." in target.module and target.module.endswith(".w3" if "block_sparse_moe" in stack else ".up_proj")
        assert np.allclose(delta.load().rows(0, out), fused[number], rtol=1e-12, atol=1e-15)
    same(dict(written("mlx", adapter).tensors), tensors)
    del adapter.deltas[next(iter(adapter.deltas))]
    with pytest.raises(RefusedError, match="only experts 1, 2"):
        written("mlx", adapter)


def test_experts_of_a_known_base() -> None:
    base = inventory.load("mixtral-8x7b")
    stack = "model.layers.31.block_sparse_moe.switch_mlp.gate_proj"
    tensors = filled({f"{stack}.lora_a": [8, 2, 4096], f"{stack}.lora_b": [8, 14336, 2]}, np.float32)
    adapter = read("mlx", tensors, scale=1.0, base=base)
    assert adapter.layout == "reference" and {target.module for target in adapter.deltas} <= set(base.by_path)
    for number in range(4, 8):
        del adapter.deltas[Target(f"model.layers.31.block_sparse_moe.experts.{number}.w1")]
    with pytest.raises(RefusedError, match="only experts 0, 1, 2, 3"):
        written("mlx", adapter, base=base)


def test_what_does_not_pair(tmp_path: Path) -> None:
    tensors = filled(shapes_of("llama-3.2-1b", LLAMA) | {"model.layers.3.self_attn.q_proj.lora_a": [2048, 4], "stray": [3]})
    adapter = read("mlx", tensors, scale=1.0)
    assert set(adapter.leftovers) == {"model.layers.3.self_attn.q_proj.lora_a", "stray"}
    assert "orphan" in {finding.code for finding in adapter.findings}
    with pytest.raises(DeadAdapterError):
        read("mlx", filled({"model.layers.3.self_attn.q_proj.lora_a": [2048, 4]}))
    for down, up in (([4, 6], [5, 4]), ([4, 2, 6], [4, 6, 3]), ([4], [4, 6])):
        with pytest.raises(MalformedError, match="do not fit"):
            read("mlx", filled({"model.layers.0.x.lora_a": down, "model.layers.0.x.lora_b": up}))


def test_what_mlx_has_no_place_for() -> None:
    def one(module: str = "model.layers.0.self_attn.q_proj", rank: int = 4, alpha: float = 4.0, kernel: tuple[int, ...] = ()) -> Any:
        factors = filled({"up": [64, rank, *(1 for _ in kernel)], "down": [rank, 64, *kernel]})
        return {Target(module): LoRA(factors["up"], factors["down"], Scaling(alpha=alpha))}

    other = "model.layers.1.self_attn.q_proj"
    for deltas, why in (
        (one("unet.mid_block.attentions.0.proj_in"), "not a module"),
        (one("model.vision_tower.x"), "not a module"),
        (one(kernel=(3, 3)), "convolution"),
        (one() | one(other, rank=8, alpha=8.0), "rank 4 beside 8.*--lowrank"),
        ({}, "without factors"),
        (one() | one(other, alpha=8.0), "--bake-scale"),
    ):
        with pytest.raises(RefusedError, match=why):
            written("mlx", Adapter(deltas, "test"))
    extra = Extra(ExtraKind.BIAS, "model.layers.0.self_attn.q_proj.bias", filled({"b": [64]})["b"])
    with pytest.raises(RefusedError, match="bias"):
        written("mlx", Adapter(one(), "test", extras=[extra]))
    with pytest.raises(RefusedError, match="--base"):
        written("mlx", Adapter(one(), "test", layout="kohya"))


def test_gguf_and_torchtune_names_are_not_taken() -> None:
    from tests.dialects.files import tensor_file

    member = dialects.get("mlx")
    for names in (["blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b"], ["layers.0.attn.q_proj.lora_a.weight"], ["x.m", "y.m"]):
        assert member.match(tensor_file(filled({name: [2, 2] for name in names}))) is None
    file = tensor_file({})
    assert member.gather(file, [tensor_file({})]) == [file]


@pytest.mark.parametrize("base", ["llama-3-8b", "mistral-7b"])
def test_the_corpus_there_and_back(corpus: Path, tmp_path: Path, base: str) -> None:
    path = corpus / "mlx-npz" / "adapters.npz"
    options = ReadOptions(base=inventory.load(base), scale=10.0)
    first = open_adapter(path, options=options)
    assert len(first.deltas) == 8 and not first.leftovers
    for dialect in ("peft", "kohya", "mlx"):
        between = tmp_path / (f"{dialect}.safetensors" if dialect == "kohya" else dialect)
        convert(path, between, dialect, read=options)
        convert(between, tmp_path / f"{dialect}-back", "mlx", read=ReadOptions(base=inventory.load(base)))
        back = open_adapter(tmp_path / f"{dialect}-back", options=ReadOptions(base=inventory.load(base)))
        same(dict(back.tensors()), dict(first.tensors()))
        assert {delta.scale for delta in back.deltas.values()} == {10.0}


@pytest.mark.parametrize(
    "module", ["transformer.h.0.self_attention.query_key_value", "transformer.h.0.attn.q_proj", "transformer.h.0.mlp.dense_h_to_4h"]
)
def test_bodies_called_transformer_that_mlx_lm_does_not_run_are_refused(module: str) -> None:
    """BLOOM, Falcon and GPT-J: named `model.h.0...` they would be read as GPT-NeoX, which they are not."""
    pair = filled({"up": [12, 4], "down": [4, 8]})
    with pytest.raises(RefusedError, match="not a module of a language model that mlx-lm runs"):
        dialects.get("mlx").write(
            Adapter({Target(module): LoRA(pair["up"], pair["down"], Scaling(ScaleRule.ALPHA_OVER_RANK, 4.0))}, "test"), {}
        )
