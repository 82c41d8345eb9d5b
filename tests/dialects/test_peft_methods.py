"""AdaLoRA, IA3, VeRA, OFT and BOFT against the real library: read, written, given a new config, healed, merged, split."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402
from tests.dialects.test_peft import ConvNet, bert, gpt2, inputs, llama, output, repeatable  # noqa: E402
from tests.dialects.test_peft_kinds import same_tensors  # noqa: E402

from upparam.algorithms.base import Scaling  # noqa: E402
from upparam.bases.find import find_base  # noqa: E402
from upparam.cli import main  # noqa: E402
from upparam.dialects.base import ReadOptions  # noqa: E402
from upparam.errors import DeadAdapterError, MalformedError, MismatchError, RefusedError, UsageError  # noqa: E402
from upparam.operations.compare import compare  # noqa: E402
from upparam.operations.convert import convert  # noqa: E402
from upparam.operations.identify import identify  # noqa: E402
from upparam.operations.merge import merge  # noqa: E402
from upparam.operations.opening import open_adapter  # noqa: E402

WORDS = ("lora_", "ia3_l", "vera_", "oft_", "boft_")


def adalora(**settings: Any) -> Any:
    return peft.AdaLoraConfig(init_r=6, target_r=3, lora_alpha=5, total_step=10, **settings)


def oft(**settings: Any) -> Any:
    return peft.OFTConfig(**({"oft_block_size": 8} | settings))


def patterned(config: Any, paths: list[str], kept: list[int]) -> Any:
    """An AdaLoRA config as it is after training: of each module's six values those left, none of some."""
    config.rank_pattern = {f"{path}.lora_E": [index < count for index in range(6)] for path, count in zip(paths, kept, strict=True)}
    return config


Q = "model.layers.{}.self_attn.q_proj"
CASES: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "adalora": (llama, lambda: adalora(target_modules=["q_proj", "down_proj"])),
    "adalora pruned": (llama, lambda: patterned(adalora(target_modules=["q_proj"]), [Q.format(0), Q.format(1)], [4, 0])),
    "adalora alpha 0": (llama, lambda: peft.AdaLoraConfig(init_r=6, lora_alpha=0, total_step=10, target_modules=["q_proj"])),
    "adalora conv1d": (gpt2, lambda: adalora(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)),
    "adalora conv": (ConvNet, lambda: adalora(target_modules=["first", "second", "head"])),
    "ia3": (llama, lambda: peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "ia3 outputs": (bert, lambda: peft.IA3Config(target_modules=["key", "value"], feedforward_modules=[])),
    "ia3 bias": (bert, lambda: peft.IA3Config(target_modules=["key", "output.dense"], feedforward_modules=["output.dense"], task_type="SEQ_CLS")),
    "ia3 conv1d": (gpt2, lambda: peft.IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True)),
    "ia3 conv": (ConvNet, lambda: peft.IA3Config(target_modules=["first", "second", "head"], feedforward_modules=["second"])),
    "ia3 pattern": (llama, lambda: peft.IA3Config(target_modules=r".*(v_proj|down_proj)", feedforward_modules=r".*down_proj")),
    "vera": (llama, lambda: peft.VeraConfig(r=8, target_modules=["q_proj", "v_proj"])),
    "vera widths": (llama, lambda: peft.VeraConfig(r=8, target_modules=["q_proj", "down_proj", "up_proj"], projection_prng_key=7)),
    "vera conv1d": (gpt2, lambda: peft.VeraConfig(r=8, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)),
    "oft series": (llama, lambda: oft(target_modules=["q_proj", "down_proj"])),
    "oft exact": (llama, lambda: oft(target_modules=["q_proj", "down_proj"], use_cayley_neumann=False)),
    "oft three terms": (llama, lambda: oft(target_modules=["q_proj"], num_cayley_neumann_terms=3)),
    "oft limited": (llama, lambda: oft(target_modules=["q_proj"], coft=True, eps=0.01, use_cayley_neumann=False)),
    "oft shared": (llama, lambda: oft(target_modules=["q_proj"], block_share=True)),
    "oft count": (llama, lambda: oft(r=4, oft_block_size=0, target_modules=["q_proj", "down_proj"])),
    "oft nearest": (llama, lambda: oft(oft_block_size=13, target_modules=["q_proj", "down_proj"])),
    "oft conv": (ConvNet, lambda: oft(oft_block_size=3, target_modules=["first"])),
    "oft embedding": (bert, lambda: oft(target_modules=["word_embeddings", "query"])),
    "oft biases": (bert, lambda: oft(target_modules=["query"], bias="oft_only")),
    "boft": (llama, lambda: peft.BOFTConfig(boft_block_size=8, target_modules=["q_proj", "down_proj"])),
    "boft count": (llama, lambda: peft.BOFTConfig(boft_block_size=0, boft_block_num=4, target_modules=["q_proj", "down_proj"])),
    "boft conv": (ConvNet, lambda: peft.BOFTConfig(boft_block_size=1, target_modules=["first", "second", "head"])),
    "boft biases": (bert, lambda: peft.BOFTConfig(boft_block_size=4, target_modules=["query", "dense"], bias="all")),
}  # fmt: skip
WHOLE = ("adalora pruned",)
"""Cases whose real adapter must be saved and loaded before it is what the file says."""


def trained(name: str, folder: Path) -> tuple[Callable[[], Any], Any]:
    """A seeded adapter in `folder`, how to make its base again, and the adapted model."""
    build, make = CASES[name]
    base = repeatable(build)

    config = make()
    pattern = getattr(config, "rank_pattern", None)
    if name in WHOLE:
        config.rank_pattern = None
    wrapped = peft.get_peft_model(base(), config)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    if name in WHOLE:
        wrapped.peft_config["default"].rank_pattern = pattern
    wrapped.save_pretrained(folder)
    return base, loads(base(), folder) if name in WHOLE else wrapped


def loads(model: Any, folder: Path) -> Any:
    """The model with the adapter in `folder`; every factor is there and none is too many."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, peft.PeftConfig.from_pretrained(folder))
        result = peft.set_peft_model_state_dict(wrapped, peft.load_peft_weights(str(folder), device="cpu"))
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if any(word in key for word in WORDS) and "ranknum" not in key and ".vera_" not in key]
    return wrapped


def outputs(model: Any) -> Any:
    return output(model, inputs(model.base_model.model if hasattr(model, "base_model") and hasattr(model, "peft_config") else model))


@pytest.mark.parametrize("name", CASES)
def test_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    trained(name, tmp_path / "theirs")
    receipt = convert(tmp_path / "theirs", tmp_path / "ours", "peft")
    assert "bit-identical" in receipt.proofs[0]
    same_tensors(tmp_path / "theirs", tmp_path / "ours")
    old, new = (json.loads((tmp_path / folder / "adapter_config.json").read_text()) for folder in ("theirs", "ours"))
    assert old == new


@pytest.mark.parametrize("name", CASES)
def test_a_new_config_computes_the_same(name: str, tmp_path: Path) -> None:
    base, wrapped = trained(name, tmp_path / "theirs")
    adapter = open_adapter(tmp_path / "theirs")
    adapter.config.clear()
    adapter.config["fan_in_fan_out"] = "conv1d" in name
    adapter.save(tmp_path / "ours")
    same_tensors(tmp_path / "theirs", tmp_path / "ours")
    found, expected = outputs(loads(base(), tmp_path / "ours")), outputs(wrapped)
    assert torch.equal(found, expected)
    assert not torch.allclose(expected, outputs(base()), rtol=0, atol=1e-6), "the adapter of this test changes nothing"


def saved_base(model: Any, folder: Path) -> None:
    if isinstance(model, ConvNet):
        folder.mkdir()
        save_file(model.state_dict(), folder / "model.safetensors")
    else:
        model.save_pretrained(folder)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", CASES)
def test_merges_as_the_library_does(name: str, dtype: str, tmp_path: Path) -> None:
    base, _ = trained(name, tmp_path / "theirs")
    torch_dtype = getattr(torch, dtype)
    model = base().to(torch_dtype)
    saved_base(model, tmp_path / "base")
    merge(tmp_path / "base", tmp_path / "theirs", tmp_path / "merged")
    merged = load_file(tmp_path / "merged/model.safetensors")
    theirs = loads(model, tmp_path / "theirs").to(torch_dtype).merge_and_unload().state_dict()
    bound = 4e-6 if dtype == "float32" else 1e-12 if not name.startswith(("oft", "boft")) else 2e-7
    changed = 0
    for key, value in theirs.items():
        if key in merged:
            assert merged[key].dtype == torch_dtype
            gap = float((merged[key] - value).abs().max())
            assert gap <= bound * max(1.0, float(value.abs().max())), (key, gap)
            changed += not torch.equal(merged[key], load_file(tmp_path / "base/model.safetensors")[key])
    assert changed


def without_config(name: str, folder: Path) -> Path:
    trained(name, folder)
    (folder / "adapter_config.json").unlink()
    return folder


@pytest.mark.parametrize("name", ["ia3", "ia3 bias", "ia3 conv1d", "vera", "boft", "boft conv"])
def test_healed_without_a_config(name: str, tmp_path: Path) -> None:
    """Everything is in the tensors; only how the base stores its weights is said by the base."""
    base, wrapped = trained(name, tmp_path / "theirs")
    without_config(name, tmp_path / "theirs")
    saved_base(base(), tmp_path / "base")
    convert(tmp_path / "theirs", tmp_path / "ours", "peft", read=ReadOptions(base=find_base(str(tmp_path / "base"))))
    same_tensors(tmp_path / "theirs", tmp_path / "ours")
    assert torch.equal(outputs(loads(base(), tmp_path / "ours")), outputs(wrapped))


def test_adalora_without_a_config_asks_for_alpha_and_the_first_rank(tmp_path: Path) -> None:
    base, wrapped = trained("adalora", tmp_path / "theirs")
    folder = without_config("adalora", tmp_path / "theirs")
    assert {delta.scale for delta in open_adapter(folder).deltas.values()} == {None}
    assert {delta.scale for delta in open_adapter(folder, options=ReadOptions(alpha=5.0)).deltas.values()} == {None}
    with pytest.raises(RefusedError, match="--alpha or --scale"):
        convert(folder, tmp_path / "refused", "peft")
    convert(folder, tmp_path / "ours", "peft", read=ReadOptions(alpha=5.0, rank=6))
    assert torch.equal(outputs(loads(base(), tmp_path / "ours")), outputs(wrapped))
    config = json.loads((tmp_path / "ours/adapter_config.json").read_text())
    assert (config["init_r"], config["lora_alpha"], config["rank_pattern"]) == (6, 5, None)
    known = open_adapter(folder, options=ReadOptions(scale=0.25))
    assert {delta.scale for delta in known.deltas.values()} == {0.25}


def test_a_training_checkpoint_tells_the_first_rank(tmp_path: Path) -> None:
    _, wrapped = trained("adalora pruned", tmp_path / "theirs")
    state = {key: value.contiguous() for key, value in wrapped.state_dict().items() if "lora_" in key or "ranknum" in key}
    state = {key: value for key, value in state.items() if ".0." in key}
    (tmp_path / "raw").mkdir()
    save_file(state, tmp_path / "raw/adapter_model.safetensors")
    (delta,) = open_adapter(tmp_path / "raw", options=ReadOptions(alpha=5.0)).deltas.values()
    assert delta.rank == 4
    assert delta.scale == 5.0 / (6 + 1e-5)


def test_what_the_user_says_of_an_adalora_must_not_contradict_its_config(tmp_path: Path) -> None:
    trained("adalora", tmp_path / "theirs")
    assert open_adapter(tmp_path / "theirs", options=ReadOptions(alpha=5.0)).deltas
    for options in (ReadOptions(alpha=4.0), ReadOptions(scale=2.0)):
        with pytest.raises(UsageError, match="the config says another"):
            open_adapter(tmp_path / "theirs", options=options)


def test_more_values_than_training_began_with_are_malformed(tmp_path: Path) -> None:
    trained("adalora", tmp_path / "theirs")
    path = tmp_path / "theirs/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_r": 3}))
    with pytest.raises(MalformedError, match=r"lower rank than is left.*expected >= 6"):
        open_adapter(tmp_path / "theirs")


def test_modules_of_an_adalora_share_one_scale(tmp_path: Path) -> None:
    trained("adalora", tmp_path / "theirs")
    adapter = open_adapter(tmp_path / "theirs")
    first = next(iter(adapter.deltas))
    adapter.deltas[first] = replace(adapter.deltas[first], scaling=Scaling(alpha=1.0))  # type: ignore[type-var]
    with pytest.raises(RefusedError, match="one scale for all modules"):
        adapter.save(tmp_path / "ours")


def test_a_vera_without_its_projections_asks_for_the_base_and_is_dead_without_the_seed(tmp_path: Path) -> None:
    model = peft.get_peft_model(llama(), peft.VeraConfig(r=8, target_modules=["q_proj"], save_projection=False, projection_prng_key=11))
    model.save_pretrained(tmp_path / "theirs")
    with pytest.raises(UsageError, match=r"vera_A and vera_B are not in the file.*projection_prng_key 11.*--base"):
        open_adapter(tmp_path / "theirs")
    (found,) = identify(tmp_path / "theirs").adapters
    assert found.kind == "adapter"
    assert [finding.code for finding in found.findings if finding.severity] == ["needs-more"]
    with pytest.raises(UsageError, match=r"gpt2 is not that base, it has no .*q_proj"):
        open_adapter(tmp_path / "theirs", options=ReadOptions(base=find_base("gpt2")))
    (tmp_path / "theirs/adapter_config.json").unlink()
    with pytest.raises(DeadAdapterError, match=r"neither is the seed"):
        open_adapter(tmp_path / "theirs", options=ReadOptions(base=find_base("gpt2")))
    (found,) = identify(tmp_path / "theirs").adapters
    assert found.kind == "orphan-factor"


@pytest.mark.parametrize("seed", [0, 11, 2**33 + 5])
@pytest.mark.parametrize(("build", "targets"), [(llama, ["q_proj", "down_proj", "up_proj"]), (gpt2, ["c_attn", "c_fc"])])
def test_projections_that_were_not_saved_are_drawn_as_peft_draws_them(build: Any, targets: list[str], seed: int, tmp_path: Path) -> None:
    base = repeatable(build)

    config = peft.VeraConfig(r=8, target_modules=targets, save_projection=False, projection_prng_key=seed, fan_in_fan_out=build is gpt2)
    wrapped = peft.get_peft_model(base(), config)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)) * 0.2)
    wrapped.save_pretrained(tmp_path / "theirs")
    saved_base(base(), tmp_path / "base")
    options = ReadOptions(base=find_base(str(tmp_path / "base")))
    adapter = open_adapter(tmp_path / "theirs", options=options)
    assert "projections-drawn" in {finding.code for finding in adapter.findings}
    convert(tmp_path / "theirs", tmp_path / "ours", "peft", read=options)
    written = load_file(tmp_path / "ours/adapter_model.safetensors")
    for name, theirs in (("vera_A", wrapped.base_model.vera_A["default"]), ("vera_B", wrapped.base_model.vera_B["default"])):
        ours = written[f"base_model.{name}"]
        # Bit for bit where torch multiplies and adds in one step, else to the last bit of float32.
        assert ours.shape == theirs.shape and (ours - theirs).abs().max() <= 2**-23 * theirs.abs().max()
    merge(tmp_path / "base", tmp_path / "theirs", tmp_path / "merged")
    assert torch.allclose(
        output(type(base()).from_pretrained(tmp_path / "merged"), inputs(base())), output(wrapped, inputs(base())), atol=1e-6
    )
    again = peft.PeftModel.from_pretrained(base(), str(tmp_path / "ours"))
    assert again.peft_config["default"].save_projection is True
    assert torch.allclose(output(again, inputs(base())), output(wrapped, inputs(base())), atol=1e-6)


def test_widths_of_a_vera_are_the_bases(tmp_path: Path) -> None:
    """Of the shared projection a module uses as many columns as it has inputs, which no tensor of its own says."""
    base, _ = trained("vera widths", tmp_path / "theirs")
    adapter = open_adapter(tmp_path / "theirs")
    assert {delta.shape[1] for delta in adapter.deltas.values()} == {0}
    with pytest.raises(RefusedError, match="name the base with --base"):
        next(iter(adapter.deltas.values())).load()
    saved_base(base(), tmp_path / "base")
    known = open_adapter(tmp_path / "theirs", options=ReadOptions(base=find_base(str(tmp_path / "base"))))
    assert {target.module.rpartition(".")[2]: delta.shape for target, delta in known.deltas.items()} == {
        "q_proj": (32, 32), "down_proj": (32, 48), "up_proj": (48, 32),
    }  # fmt: skip


def test_a_base_with_more_inputs_than_the_projection_does_not_fit(tmp_path: Path) -> None:
    trained("vera", tmp_path / "theirs")
    wide = transformers.LlamaConfig(
        vocab_size=40, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8
    )
    transformers.LlamaForCausalLM(wide).save_pretrained(tmp_path / "base")
    with pytest.raises(MismatchError, match=r"q_proj: the factors do not fit together"):
        merge(tmp_path / "base", tmp_path / "theirs", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_vectors_of_convolutions_need_the_config(tmp_path: Path) -> None:
    folder = without_config("ia3 conv", tmp_path / "theirs")
    adapter = open_adapter(folder)
    assert {target.module for target in adapter.deltas} == {"head"}
    (message,) = {finding.message for finding in adapter.findings if finding.code == "cannot-tell"}
    assert "feedforward_modules" in message
    assert set(adapter.leftovers) == {"base_model.model.first.ia3_l", "base_model.model.second.ia3_l"}


def test_vectors_of_convolutions_are_told_by_the_sizes_of_the_base(tmp_path: Path) -> None:
    folder = without_config("ia3 conv", tmp_path / "theirs")
    with_config = tmp_path / "with"
    trained("ia3 conv", with_config)
    saved_base(ConvNet(), tmp_path / "base")
    base = find_base(str(tmp_path / "base"))
    told, known = (open_adapter(one, options=ReadOptions(base=base)) for one in (folder, with_config))
    sides = {found.path: found.canonical[:2] for found in base.modules}
    for target, delta in known.deltas.items():
        out, into = sides.get(target.module, (1, 0))
        if target in told.deltas:
            assert told.deltas[target].on_input == delta.on_input  # type: ignore[attr-defined]
        else:
            assert out == into
    assert len(told.deltas) > 1


def test_words_of_feedforward_modules_end_any_path(tmp_path: Path) -> None:
    """PEFT takes `dense` for `output.dense` and `xdense` too, so whole paths are written where an ending would mean too much."""
    config = peft.IA3Config(target_modules=["output.dense", "attention.output.dense"], feedforward_modules=["attention.output.dense"])
    wrapped = peft.get_peft_model(bert(), config)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    wrapped.save_pretrained(tmp_path / "theirs")
    adapter = open_adapter(tmp_path / "theirs")
    adapter.config.clear()
    adapter.save(tmp_path / "ours")
    new = peft.PeftConfig.from_pretrained(tmp_path / "ours")
    assert {module for module in new.target_modules if any(module.endswith(word) for word in new.feedforward_modules)} == {
        f"bert.encoder.layer.{layer}.attention.output.dense" for layer in (0, 1)
    }
    state = wrapped.base_model.model.bert.state_dict()
    model = bert()
    model.bert.load_state_dict({key.replace("base_layer.", ""): value for key, value in state.items() if "ia3_l" not in key})
    model.classifier.load_state_dict(wrapped.base_model.model.classifier.state_dict())
    assert torch.equal(outputs(loads(model, tmp_path / "ours")), outputs(wrapped))


@pytest.mark.parametrize("name", CASES)
def test_split_and_assembled_it_is_the_same_file(name: str, tmp_path: Path) -> None:
    trained(name, tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "apart", "triad")
    convert(tmp_path / "apart", tmp_path / "ours", "peft")
    same_tensors(tmp_path / "theirs", tmp_path / "ours")
    assert compare(tmp_path / "theirs", tmp_path / "ours").exit_code == 0


@pytest.mark.parametrize("command", ["identify", "inspect", "verify", "merge", "unmerge", "resize", "combine", "compare", "edit", "kohya", "diffusers", "comfyui"])  # fmt: skip
@pytest.mark.parametrize("name", ["adalora", "adalora pruned", "ia3 bias", "vera widths", "oft series", "oft embedding", "boft biases"])
def test_no_command_ends_in_a_traceback(name: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Done or refused in one line with a documented exit code."""
    base, _ = trained(name, tmp_path / "theirs")
    saved_base(base(), tmp_path / "base")
    theirs, out, model = (str(tmp_path / word) for word in ("theirs", "out", "base"))
    lines = {
        "merge": ["merge", model, theirs, "-o", out], "unmerge": ["unmerge", model, theirs, "-o", out], "compare": ["compare", theirs, theirs],
        "resize": ["resize", theirs, "--rank", "2", "-o", out], "combine": ["combine", f"{theirs}@1", f"{theirs}@0.5", "-o", out],
        "edit": ["edit", theirs, "--dtype", "bf16", "-o", out],
    }  # fmt: skip
    capsys.readouterr()
    code = main(
        lines.get(
            command, [command, theirs] if command in ("identify", "inspect", "verify") else ["convert", theirs, "--to", command, "-o", out]
        )
    )
    said = capsys.readouterr()
    assert code in ((0,) if command in ("identify", "inspect", "verify", "merge", "compare") else (0, 2, 4)), said.err
    if code:
        assert said.err.startswith("upparam: ") and len(said.err.splitlines()) == 1 and not (tmp_path / "out").exists()
    assert "nan" not in said.out.lower().replace("nan/inf", "").replace("nan or inf", "")


def test_a_config_that_would_not_load_is_said_and_made_anew(tmp_path: Path) -> None:
    """Its rank_pattern is lost, or feedforward_modules names the wrong modules: the tensors tell what is right."""
    base, wrapped = trained("adalora pruned", tmp_path / "theirs")
    path = tmp_path / "theirs/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rank_pattern": None}))
    adapter = open_adapter(tmp_path / "theirs")
    assert "2 modules have another rank than the config says" in next(f.message for f in adapter.findings if f.code == "rank-differs")
    adapter.save(tmp_path / "ours")
    assert torch.equal(outputs(loads(base(), tmp_path / "ours")), outputs(wrapped))
    base, wrapped = trained("ia3", tmp_path / "vectors")
    path = tmp_path / "vectors/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"feedforward_modules": ["v_proj"]}))
    convert(tmp_path / "vectors", tmp_path / "right", "peft")
    assert torch.equal(outputs(loads(base(), tmp_path / "right")), outputs(wrapped))


def test_resized_it_loads_as_a_lora(tmp_path: Path) -> None:
    base, wrapped = trained("adalora pruned", tmp_path / "theirs")
    assert main(["resize", str(tmp_path / "theirs"), "--rank", "4", "-o", str(tmp_path / "ours")]) == 0
    assert json.loads((tmp_path / "ours/adapter_config.json").read_text())["peft_type"] == "LORA"
    assert torch.allclose(outputs(loads(base(), tmp_path / "ours")), outputs(wrapped), atol=1e-5)
