"""loralib against torch modules that follow microsoft/LoRA loralib/layers.py: shapes of the parameters, how they merge, what is stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.dialects.files import filled, tensor_file

from upparam import dialects
from upparam.adapter import Adapter, BaseHint, Extra, ExtraKind, Target
from upparam.algorithms.base import UNKNOWN, ScaleRule, Scaling
from upparam.algorithms.lora import LoRA
from upparam.bases import inventory
from upparam.cli import main
from upparam.dialects.base import ReadOptions
from upparam.errors import DeadAdapterError, MalformedError, RefusedError, UsageError
from upparam.operations.convert import convert, write_adapter
from upparam.operations.identify import identify
from upparam.operations.opening import open_adapter
from upparam.tensors import Tensor

torch = pytest.importorskip("torch")
nn, F = torch.nn, torch.nn.functional


class Layer(nn.Module):  # type: ignore[misc,name-defined]
    """A frozen weight with `lora_A` and `lora_B` beside it. `delta` is what `train(False)` adds to the weight."""

    def __init__(self, weight: tuple[int, ...], a: tuple[int, int], b: tuple[int, int], scaling: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(weight), requires_grad=False)
        self.lora_A = nn.Parameter(torch.randn(a) * 0.1)
        self.lora_B = nn.Parameter(torch.randn(b) * 0.1)
        self.scaling = scaling

    def delta(self) -> Any:
        return (self.lora_B.double() @ self.lora_A.double()) * self.scaling


class Linear(Layer):
    def __init__(self, into: int, out: int, r: int, alpha: float) -> None:
        super().__init__((out, into), (r, into), (out, r), alpha / r)


class Embedding(Layer):
    def __init__(self, count: int, dim: int, r: int, alpha: float) -> None:
        super().__init__((count, dim), (r, count), (dim, r), alpha / r)

    def delta(self) -> Any:
        return super().delta().T


class MergedLinear(Layer):
    def __init__(self, into: int, out: int, r: int, alpha: float, enable_lora: list[bool]) -> None:
        self.enable, count = enable_lora, sum(enable_lora)
        super().__init__((out, into), (r * count, into), (out // len(enable_lora) * count, r), alpha / r)

    def delta(self) -> Any:
        """merge_AB: a convolution over lora_A with one group for each enabled block, the rows of the others zero."""
        found = F.conv1d(self.lora_A.double().unsqueeze(0), self.lora_B.double().unsqueeze(-1), groups=sum(self.enable)).squeeze(0)
        whole = torch.zeros(self.weight.shape, dtype=torch.double)
        mask = torch.tensor(self.enable).repeat_interleave(self.weight.shape[0] // len(self.enable))
        whole[mask] = found * self.scaling
        return whole


class Conv2d(Layer):
    def __init__(self, into: int, out: int, k: int, r: int, alpha: float) -> None:
        super().__init__((out, into, k, k), (r * k, into * k), (out * k, r * k), alpha / r)

    def delta(self) -> Any:
        return super().delta().view(self.weight.shape)


def model(layers: dict[str, Layer]) -> Any:
    """A model with these layers at these paths."""
    root = nn.Module()
    for path, layer in layers.items():
        at = root
        *steps, last = path.split(".")
        for step in steps:
            if step not in dict(at.named_children()):
                at.add_module(step, nn.Module())
            at = getattr(at, step)
        at.add_module(last, layer)
    return root


def lora_state_dict(root: Any) -> dict[str, Any]:
    return {name: tensor for name, tensor in root.state_dict().items() if "lora_" in name}


H = "transformer.h.{}.attn.c_attn"


def gpt2(enable: list[bool], r: int = 4, alpha: float = 32.0, layers: int = 2) -> dict[str, Layer]:
    torch.manual_seed(0)
    return {H.format(layer): MergedLinear(768, 2304, r, alpha, enable) for layer in range(layers)}


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def computes(adapter: Adapter, layers: dict[str, Layer]) -> None:
    """Every layer's dW, and nothing else."""
    for path, layer in layers.items():
        found = np.zeros(layer.weight.shape)
        flat = found.reshape(found.shape[0], -1)
        for target, delta in adapter.deltas.items():
            if target.module == path:
                rows = slice(*target.rows) if target.rows else slice(None)
                flat[rows] = delta.load().rows(0, delta.shape[0])
        assert np.allclose(found, layer.delta().detach().numpy(), rtol=1e-12, atol=1e-15), path
    assert {target.module for target in adapter.deltas} == set(layers)


@pytest.mark.parametrize(
    ("enable", "targets"),
    [
        ([True, False, True], ("q", "v")),
        ([True, True, False], ("q", "k")),
        ([False, True, True], ("v", "k")),
        ([False, False, True], ("v",)),
    ],
)
def test_merged_linear_computes_what_its_convolution_does(enable: list[bool], targets: tuple[str, ...], tmp_path: Path) -> None:
    layers = gpt2(enable)
    path = saved(tmp_path / "model.pt", {"model_state_dict": lora_state_dict(model(layers))})
    adapter = open_adapter(path, options=ReadOptions(alpha=32.0, targets=targets))
    assert adapter.dialect == "loralib" and adapter.layout == "reference" and not adapter.leftovers
    assert adapter.base is not None and "gpt2" in (adapter.base.name, *adapter.base.lookalikes)
    assert [target.rows for target in adapter.deltas][: sum(enable)] == [(768 * i, 768 * i + 768) for i in range(3) if enable[i]]
    assert {delta.scale for delta in adapter.deltas.values()} == {8.0} and adapter.ranks() == {4: 2 * sum(enable)}
    computes(adapter, layers)


def test_all_parts_need_no_telling(tmp_path: Path) -> None:
    layers = gpt2([True] * 3)
    adapter = open_adapter(
        saved(tmp_path / "m.pt", lora_state_dict(model(layers))), options=ReadOptions(scale=8.0, base=inventory.load("gpt2"))
    )
    computes(adapter, layers)


def test_linear_embedding_and_convolutions(tmp_path: Path) -> None:
    torch.manual_seed(1)
    roberta = {
        "roberta.encoder.layer.0.attention.self.query": Linear(768, 768, 8, 16.0), "roberta.encoder.layer.11.output.dense": Linear(3072, 768, 8, 16.0),
        "roberta.embeddings.word_embeddings": Embedding(50265, 768, 8, 16.0),
    }  # fmt: skip
    adapter = open_adapter(saved(tmp_path / "a.pt", lora_state_dict(model(roberta))), options=ReadOptions(alpha=16.0))
    assert adapter.base is not None and inventory.resolve(adapter.base.name) == "roberta-base" and adapter.layout == "reference"
    delta = adapter.deltas[Target("roberta.embeddings.word_embeddings")]
    assert isinstance(delta, LoRA) and delta.embedding
    computes(adapter, roberta)
    base = inventory.load("sd1.5")
    names = ("unet.down_blocks.0.resnets.0.conv1", "unet.down_blocks.0.attentions.0.proj_in", "unet.down_blocks.0.downsamplers.0.conv")
    unet: dict[str, Layer] = {}
    for name in names:
        out, into, k, _ = base.by_path[name].shape
        unet[name] = Conv2d(into, out, k, 2, 3.0)
    adapter = open_adapter(saved(tmp_path / "b.pt", lora_state_dict(model(unet))), options=ReadOptions(alpha=3.0, base=base))
    assert {delta.scale for delta in adapter.deltas.values()} == {1.5} and adapter.deltas[Target(names[0])].rank == 2 * 3 * 3
    computes(adapter, unet)
    # And what other readers get of it is the same change.
    convert(tmp_path / "b.pt", tmp_path / "kohya.safetensors", "kohya", read=ReadOptions(alpha=3.0, base=base))
    computes(open_adapter(tmp_path / "kohya.safetensors", options=ReadOptions(base=base)), unet)


def test_neither_scale_nor_parts_are_guessed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    linear = saved(tmp_path / "linear.pt", lora_state_dict(model({"bert.encoder.layer.0.attention.self.query": Linear(768, 768, 8, 16.0)})))
    adapter = open_adapter(linear)
    assert [delta.scaling for delta in adapter.deltas.values()] == [UNKNOWN] and "scale-missing" in {f.code for f in adapter.findings}
    for dialect in ("peft", "loralib", "kohya"):
        with pytest.raises(RefusedError, match="scale"):
            write_adapter(adapter, tmp_path / "out", dialect)
    merged = saved(tmp_path / "merged.pt", lora_state_dict(model(gpt2([True, False, True]))))
    with pytest.raises(UsageError, match=r"c_attn'.*enable_lora.*2 parts of 768 rows.*--target"):
        open_adapter(merged, options=ReadOptions(alpha=32.0))
    single = saved(tmp_path / "single.pt", lora_state_dict(model(gpt2([False, False, True]))))
    with pytest.raises(UsageError, match=r"enable_lora.*1 parts of 768 rows"):
        open_adapter(single, options=ReadOptions(alpha=32.0, base=inventory.load("gpt2")))
    for path, targets, why in (
        (merged, ("q",), "2 parts"), (merged, ("q", "k", "v"), "2 parts"), (merged, ("q", "x"), "of q, k and v"), (linear, ("q",), "adapted in parts"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=why):
            open_adapter(path, options=ReadOptions(alpha=32.0, targets=targets))
    assert main(["convert", str(merged), "--to", "peft", "-o", str(tmp_path / "peft")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "--target" in err
    (report,) = identify(merged).adapters
    assert report.dialect == "loralib" and "needs-more" in {finding.code for finding in report.findings}
    assert (
        main(["convert", str(merged), "--to", "peft", "-o", str(tmp_path / "peft"), "--alpha", "32", "--target", "q", "--target", "v"]) == 0
    )
    assert "re-opened" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["transformer.h.{}.attn.c_attn", "h.{}.attn.c_attn"])
def test_through_peft_and_back_into_the_layers(name: str, tmp_path: Path) -> None:
    """What is written loads into modules built with the arguments in loralib.json, and every bit is there again."""
    layers = {name.format(layer): module for layer, module in enumerate(gpt2([True, False, True], layers=3).values())}
    state = lora_state_dict(model(layers))
    path = saved(tmp_path / "m.pt", {"model_state_dict": state})
    read = ReadOptions(alpha=32.0, targets=("q", "v"))
    convert(path, tmp_path / "peft", "peft", read=read)
    convert(tmp_path / "peft", tmp_path / "back", "loralib")
    convert(path, tmp_path / "again", "loralib", read=read)
    assert torch.load(tmp_path / "again" / "lora.pt", weights_only=True).keys() == {"model_state_dict"}
    for folder, names in (("back", H), ("again", name)):
        arguments = json.loads((tmp_path / folder / "loralib.json").read_text())["layers"]
        assert arguments == {names.format(layer): {"r": 4, "lora_alpha": 32, "enable_lora": [True, False, True]} for layer in range(3)}
        fresh = model(
            {path: MergedLinear(768, 2304, layer["r"], layer["lora_alpha"], layer["enable_lora"]) for path, layer in arguments.items()}
        )
        content = torch.load(tmp_path / folder / "lora.pt", weights_only=True)
        content = content.get("model_state_dict", content)
        missing, unexpected = fresh.load_state_dict(content, strict=False)
        assert not unexpected and all(key.endswith(".weight") for key in missing)
        assert [tensor.numpy().tobytes() for tensor in lora_state_dict(fresh).values()] == [t.numpy().tobytes() for t in state.values()]
        computes(open_adapter(tmp_path / folder), {H.format(layer): module for layer, module in enumerate(layers.values())})


def test_what_lies_beside_is_believed_and_checked(tmp_path: Path) -> None:
    base = inventory.load("gpt2")
    layers = gpt2([True, False, True])
    write_adapter(
        open_adapter(saved(tmp_path / "m.pt", lora_state_dict(model(layers))), options=ReadOptions(alpha=32.0, targets=("q", "v"))), tmp_path / "a", "loralib"
    )  # fmt: skip
    computes(open_adapter(tmp_path / "a"), layers)
    for options, why in ((ReadOptions(alpha=16.0), "alpha given contradicts"), (ReadOptions(scale=2.0), "scale given contradicts")):
        with pytest.raises(UsageError, match=why):
            open_adapter(tmp_path / "a", options=options)
    computes(open_adapter(tmp_path / "a", options=ReadOptions(alpha=32.0, scale=8.0, base=base)), layers)
    side = tmp_path / "a" / "loralib.json"
    whole = json.loads(side.read_text())
    for change, why in (
        ({"lora_alpha": "32"}, "no number"), ({"lora_alpha": float("nan")}, "no number"), ({"lora_alpha": 10**400}, "no number"), ({"lora_alpha": True}, "no number"), ({"enable_lora": [True, False]}, "does not fit"),
        ({"enable_lora": "qv"}, "does not fit"), ({"enable_lora": [True, True, False, False]}, "not of the base's weight"),
    ):  # fmt: skip
        side.write_text(json.dumps({"layers": {name: layer | change for name, layer in whole["layers"].items()}}))
        with pytest.raises(MalformedError, match=why):
            open_adapter(tmp_path / "a", options=ReadOptions(base=base))
    for content in ("[]", '{"layers": []}', '{"layers": {"x": 1}}', "{}"):
        side.write_text(content)
        with pytest.raises(MalformedError, match=r"loralib\.json"):
            open_adapter(tmp_path / "a")


def test_parts_of_a_base_nobody_knows_are_written_again(tmp_path: Path) -> None:
    torch.manual_seed(2)
    layers: dict[str, Layer] = {"encoder.0.qkv_proj": MergedLinear(6, 12, 2, 4.0, [True, False, True])}
    options = ReadOptions(alpha=4.0, targets=("q", "v"))
    first = open_adapter(saved(tmp_path / "m.pt", lora_state_dict(model(layers))), options=options)
    computes(first, layers)
    write_adapter(first, tmp_path / "a", "loralib", read=options)
    again = open_adapter(tmp_path / "a")
    computes(again, layers)
    write_adapter(again, tmp_path / "b", "loralib")
    assert (tmp_path / "a" / "loralib.json").read_bytes() == (tmp_path / "b" / "loralib.json").read_bytes()


def test_biases_heads_and_training_checkpoints(tmp_path: Path) -> None:
    path = "roberta.encoder.layer.0.attention.self.query"
    root = model({path: Linear(768, 768, 8, 16.0)})
    state = lora_state_dict(root)
    more = {f"{path}.bias": torch.randn(768), "classifier.out_proj.weight": torch.randn(2, 768), "classifier.out_proj.bias": torch.randn(2)}
    options = ReadOptions(alpha=16.0, base=inventory.load("roberta-base"))
    adapter = open_adapter(saved(tmp_path / "a.bin", state | more), options=options)
    assert [(extra.kind, extra.name) for extra in adapter.extras] == [
        (ExtraKind.BIAS, f"{path}.bias"), (ExtraKind.SAVED_MODULE, "classifier.out_proj.weight"), (ExtraKind.SAVED_MODULE, "classifier.out_proj.bias"),
    ]  # fmt: skip
    write_adapter(adapter, tmp_path / "b", "loralib", read=options)
    content = torch.load(tmp_path / "b" / "lora.pt", weights_only=True)
    assert content.keys() == {**state, **more}.keys() and all(torch.equal(content[name], tensor) for name, tensor in (state | more).items())
    # All the model's weights beside the factors: they are the base's.
    whole = open_adapter(saved(tmp_path / "c.bin", root.state_dict() | {"roberta.pooler.dense.weight": torch.zeros(3, 3)}), options=options)
    assert not whole.extras and not whole.leftovers and "base-weights-beside" in {finding.code for finding in whole.findings}


def test_what_does_not_pair(tmp_path: Path) -> None:
    options = ReadOptions(alpha=4.0)
    good = {"encoder.x.lora_A": torch.zeros(4, 6), "encoder.x.lora_B": torch.zeros(5, 4)}
    with pytest.raises(DeadAdapterError, match="both its lora_A and its lora_B"):
        open_adapter(saved(tmp_path / "lone.pt", {"encoder.x.lora_A": torch.zeros(4, 6)}), options=options)
    adapter = open_adapter(
        saved(tmp_path / "b.pt", good | {"encoder.y.lora_B": torch.zeros(5, 4), "lora_ind": torch.zeros(3)}), options=options
    )
    assert set(adapter.leftovers) == {"encoder.y.lora_B", "lora_ind"} and "orphan" in {finding.code for finding in adapter.findings}
    for down, up in (((4, 6), (5, 3)), ((4, 6), (5, 2)), ((4, 6), (5, 8)), ((4,), (5, 4)), ((4, 6), (5, 0)), ((4, 6), (0, 4)), ((), ())):
        path = saved(tmp_path / "c.pt", {"encoder.x.lora_A": torch.zeros(down), "encoder.x.lora_B": torch.zeros(up)})
        with pytest.raises(MalformedError, match=r"encoder\.x.*do not fit"):
            open_adapter(path, options=options)
    with pytest.raises(MalformedError, match=r"wte.*no matrices"):
        open_adapter(saved(tmp_path / "e.pt", {"wte.lora_A": torch.zeros(()), "wte.lora_B": torch.zeros(())}), options=options)
    conv = saved(tmp_path / "d.pt", {"unet.conv_in.lora_A": torch.zeros(6, 11), "unet.conv_in.lora_B": torch.zeros(960, 6)})
    with pytest.raises(MalformedError, match="do not fit the convolution"):
        open_adapter(conv, options=ReadOptions(alpha=4.0, base=inventory.load("sd1.5"), targets=None))


def test_what_loralib_has_no_layers_for(tmp_path: Path) -> None:
    base = BaseHint("gpt2", 1.0, stated=True)

    def lora(rows: tuple[int, int] | None = None, rank: int = 4, alpha: float = 8.0, module: str = H.format(0)) -> dict[Target, Any]:
        factors = filled({"up": [rows[1] - rows[0] if rows else 2304, rank], "down": [rank, 768]})
        return {Target(module, rows): LoRA(factors["up"], factors["down"], Scaling(alpha=alpha))}

    def refused(deltas: dict[Target, Any], why: str, **more: Any) -> None:
        with pytest.raises(RefusedError, match=why):
            write_adapter(Adapter(deltas, "test", **{"base": base, **more}), tmp_path / "x", "loralib")

    q, v = (0, 768), (1536, 2304)
    refused(lora(q) | lora((768, 1000)), "not equal blocks")
    refused(lora(q) | lora(v, rank=2, alpha=4.0), r"\[1536:2304\]: rank 2 beside 4.*--lowrank")
    refused(lora(q) | lora(v, alpha=4.0), r"\[1536:2304\]: scale 1 beside 2.*--bake-scale")
    refused(lora((5, 773)), "not equal blocks")
    refused(lora(q), "--base", base=None)
    refused(lora(), "textual-inversion", extras=[Extra(ExtraKind.TEXTUAL_INVERSION, "<s>", filled({"t": [1, 768]})["t"])])
    refused(lora(), "--base", layout="kohya")
    refused({}, "without factors")
    with pytest.raises(MalformedError, match="not a finite number"):
        write_adapter(Adapter(lora(alpha=float("inf")), "test", base=base), tmp_path / "x", "loralib")
    factors = filled({"up": [320, 2, 1, 1], "down": [2, 4, 3, 3]})
    refused({Target("unet.conv_in"): LoRA(factors["up"], factors["down"])}, "a convolution")
    # rsLoRA has no layer of its own; its multiplier is written as the alpha that gives it.
    factors = filled({"up": [2304, 4], "down": [4, 768]})
    adapter = Adapter(
        {Target(H.format(0)): LoRA(factors["up"], factors["down"], Scaling(ScaleRule.ALPHA_OVER_SQRT_RANK, 8.0))}, "test", base=base
    )
    write_adapter(adapter, tmp_path / "rs", "loralib")
    assert json.loads((tmp_path / "rs" / "loralib.json").read_text())["layers"][H.format(0)] == {"r": 4, "lora_alpha": 16}


@pytest.mark.parametrize(
    "names",
    [
        ("transformer.h.0.attn.qkv.lora_A", "transformer.h.0.attn.qkv.lora_B"),
        ("transformer.h.0.attn.attn.lora_A", "transformer.h.0.mlp.fc_1.lora_B"),
        ("base_model.model.h.0.attn.c_attn.lora_A",),
        ("bert.encoder.layer.0.attention.self.query.loras.x.lora_A",),
        ("encoder.0.parametrizations.weight.0.lora_A", "encoder.0.parametrizations.weight.0.lora_B"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", "model.layers.0.self_attn.q_proj.lora_B.weight"),
    ],
)
def test_names_of_others_are_not_taken(names: tuple[str, ...]) -> None:
    assert dialects.get("loralib").match(tensor_file(filled({name: [2, 2] for name in names}))) is None


def test_heads_with_a_bias_and_embeddings_of_peft_come_over_with_and_without_a_base(tmp_path: Path) -> None:
    """A head of weight and bias is one saved module; an embedding is told by its sizes in a base that names no classes, or by the file beside."""
    peft = pytest.importorskip("peft")
    safetensors = pytest.importorskip("safetensors.torch")
    root = nn.ModuleDict({"tokens": nn.Embedding(12, 8), "query": nn.Linear(8, 8), "classifier": nn.Linear(8, 3)})
    safetensors.save_file(root.state_dict(), tmp_path / "base.safetensors")
    settings = {"target_modules": ["tokens", "query"], "r": 2, "lora_alpha": 6}
    wrapped = peft.get_peft_model(root, peft.LoraConfig(**settings, modules_to_save=["classifier"]))
    torch.manual_seed(0)
    for parameter in wrapped.parameters():
        parameter.data.copy_(torch.randn(parameter.shape))
    wrapped.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    theirs = safetensors.load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    for base in ([], ["--base", str(tmp_path / "base.safetensors")]):
        there, back = tmp_path / f"there{len(base)}", tmp_path / f"back{len(base)}"
        assert main(["convert", str(tmp_path / "theirs"), "--to", "loralib", "-o", str(there), *base]) == 0
        assert main(["convert", str(there), "--to", "peft", "-o", str(back), *base]) == 0
        ours = safetensors.load_file(back / "adapter_model.safetensors")
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_saved_parameter_that_is_neither_weight_nor_bias_is_refused(tmp_path: Path) -> None:
    delta = LoRA(Tensor.of(np.ones((8, 2), np.float32)), Tensor.of(np.ones((2, 8), np.float32)), Scaling(alpha=2.0))
    extra = Extra(ExtraKind.SAVED_MODULE, "head.gamma", Tensor.of(np.ones(3, np.float32)))
    with pytest.raises(RefusedError, match=r"saved-module head\.gamma"):
        write_adapter(Adapter({Target("query"): delta}, "triad", layout="peft", extras=[extra]), tmp_path / "out", "loralib")
