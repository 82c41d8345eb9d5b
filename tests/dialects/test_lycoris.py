"""LyCORIS: networks made by the lycoris package itself, read whole, written again bit for bit, loaded back, merged as lycoris applies them."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lycoris import LycorisNetwork, create_lycoris, create_lycoris_from_weights
from lycoris.utils import merge as lycoris_merge
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tests.dialects.files import filled, read, same, tensor_file, written
from torch import nn

from upparam import dialects
from upparam.adapter import Adapter, Target
from upparam.algorithms.base import BAKED, ScaleRule, Scaling
from upparam.algorithms.full import Full
from upparam.algorithms.glora import GLoRA
from upparam.algorithms.ia3 import IA3
from upparam.algorithms.lora import LoRA
from upparam.algorithms.oft import DiagOFT
from upparam.bases import inventory
from upparam.cli import main
from upparam.dialects import lycoris_words
from upparam.dialects.base import ReadOptions
from upparam.errors import DeadAdapterError, MalformedError, RefusedError, UpparamError
from upparam.operations.convert import write_adapter
from upparam.operations.inspect import module_stats
from upparam.operations.merge import merge
from upparam.operations.opening import open_adapter
from upparam.operations.proof import prove_same, same_delta
from upparam.tensors import Tensor

SD = inventory.load("sd1.5")
ATTN = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
Q = f"lora_unet_{ATTN}"


class Net(nn.Module):
    """One layer of each kind that LyCORIS wraps."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(24, 32)
        self.conv = nn.Conv2d(8, 16, 3)
        self.point = nn.Conv2d(8, 16, 1)
        self.line = nn.Conv1d(8, 16, 3)
        self.layer_norm = nn.LayerNorm(24)
        self.group_norm = nn.GroupNorm(4, 8)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Every layer by itself, so that none hides what another does."""
        return self.fc(x), self.conv(y), self.point(y), self.line(y[..., 0]), self.layer_norm(x), self.group_norm(y)


CASES: dict[str, dict[str, Any]] = {
    "lora": {"algo": "lora"},
    "locon": {"algo": "locon", "use_tucker": True},
    "lora with a scalar": {"algo": "lora", "use_scalar": True},
    "dora by rows": {"algo": "lora", "dora_wd": True},
    "dora by columns": {"algo": "lora", "dora_wd": True, "wd_on_output": False},
    "dylora": {"algo": "dylora"},
    "loha": {"algo": "loha"},
    "loha with cores": {"algo": "loha", "use_tucker": True, "use_scalar": True},
    "doha": {"algo": "loha", "dora_wd": True},
    "lokr": {"algo": "lokr"},
    "lokr of halves": {"algo": "lokr", "linear_dim": 1, "decompose_both": True, "factor": 4, "use_tucker": True},
    "lokr of whole factors": {"algo": "lokr", "full_matrix": True},
    "dokr by columns": {"algo": "lokr", "dora_wd": True, "wd_on_output": False},
    "glora": {"algo": "glora"},
    "glora with a scalar": {"algo": "glora", "use_scalar": True},
    "ia3": {"algo": "ia3"},
    "diag-oft": {"algo": "diag-oft"},
    "diag-oft, rescaled and constrained": {"algo": "diag-oft", "rescaled": True, "constraint": 0.003},
    "boft": {"algo": "boft"},
    "boft, rescaled and constrained": {"algo": "boft", "rescaled": True, "constraint": 0.003},
    "full": {"algo": "full"},
    "norms": {"algo": "full", "train_norm": True},
    "bypass": {"algo": "lokr", "bypass_mode": True},
}
ALGORITHMS = {
    "locon": "lora", "dylora": "lora", "bypass": "lokr", "lokr of halves": "lokr", "boft": "butterfly-oft", "norms": "norm",
}  # fmt: skip


def network(case: str, net: nn.Module, seed: int = 0, **more: Any) -> LycorisNetwork:
    """A LyCORIS network over the model, applied, with random parameters."""
    torch.manual_seed(seed)
    made = create_lycoris(net, 1.0, **({"linear_dim": 4, "linear_alpha": 2.0} | CASES[case] | more))
    made.apply_to()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.6)
    return made.eval()


def saved(made: LycorisNetwork, path: Path, **metadata: str) -> dict[str, torch.Tensor]:
    """The network's file as `save_weights` makes it, and what is in it."""
    made.save_weights(str(path), None, metadata)
    return load_file(path)


@pytest.fixture(autouse=True)
def no_preset_left_behind() -> Iterator[None]:
    """LyCORIS keeps its presets in the class."""
    kept = dict(vars(LycorisNetwork))
    yield
    for name, value in kept.items():
        if name.isupper():
            setattr(LycorisNetwork, name, value)


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(5)
    return torch.randn(3, 24), torch.randn(2, 8, 6, 6)


def bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert (tensor.dtype, tensor.shape) == (other[name].dtype, other[name].shape) and torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("case", CASES)
def test_what_lycoris_saves_is_read_whole_and_written_again(case: str, tmp_path: Path) -> None:
    made = network(case, Net())
    tensors = saved(made, tmp_path / "in.safetensors", ss_network_module="lycoris.kohya", ss_network_args=json.dumps({"algo": "x"}))
    adapter = open_adapter(tmp_path / "in.safetensors")
    assert adapter.dialect == "lycoris" and not adapter.leftovers and not [f for f in adapter.findings if f.severity]
    assert ALGORITHMS.get(case, next(iter(adapter.algorithms()))) in adapter.algorithms()
    assert {target.module for target in adapter.deltas} == {f"lycoris_{name}" for name, _ in made_over(made)}
    write_adapter(adapter, tmp_path / "out.safetensors", "lycoris")
    bits(load_file(tmp_path / "out.safetensors"), tensors)
    assert open_adapter(tmp_path / "out.safetensors").metadata == adapter.metadata


def made_over(made: LycorisNetwork) -> list[tuple[str, nn.Module]]:
    """(module's name, LyCORIS' module) of every layer it wrapped."""
    return [(lora.lora_name.removeprefix("lycoris_"), lora) for lora in made.loras if not lora.not_supported]


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_does_the_same_in_lycoris(case: str, tmp_path: Path, inputs: tuple[torch.Tensor, torch.Tensor]) -> None:
    torch.manual_seed(1)
    net = Net()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    made = network(case, net, seed=2)
    saved(made, tmp_path / "in.safetensors")
    write_adapter(open_adapter(tmp_path / "in.safetensors"), tmp_path / "out.safetensors", "lycoris")
    again = Net()
    again.load_state_dict(state)
    other = create_lycoris(again, 1.0, **({"linear_dim": 4, "linear_alpha": 2.0} | CASES[case]))
    other.load_weights(str(tmp_path / "out.safetensors"))
    other.apply_to()
    if case == "dylora":
        return  # whose load_state_dict does nothing in LyCORIS
    with torch.no_grad():
        for want, got in zip(net(*inputs), again.eval()(*inputs), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block", [1, 2])
def test_a_dylora_of_blocks_was_trained_with_more_than_its_file_says(block: int, tmp_path: Path) -> None:
    """All of its blocks: alpha / their number; of the file LyCORIS and other readers take alpha / rank."""
    layer = nn.Linear(16, 24)
    made = network("dylora", nn.Sequential(layer), seed=4, block_size=block)
    saved(made, tmp_path / "a.safetensors")
    (delta,) = open_adapter(tmp_path / "a.safetensors").deltas.values()
    (module,) = made.loras
    down, up, scale = module.get_weight(4 - block)
    whole = (scale * up @ down).detach().numpy()
    assert isinstance(delta, LoRA)
    np.testing.assert_allclose(whole, block * delta.scale * (delta.up.read() @ delta.down.read()), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("case", CASES)
def test_a_merge_is_what_lycoris_applies(case: str, tmp_path: Path, inputs: tuple[torch.Tensor, torch.Tensor]) -> None:
    torch.manual_seed(3)
    net = Net()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.5)
    save_file({name: value.clone() for name, value in net.state_dict().items()}, tmp_path / "base.safetensors")
    before = net(*inputs)
    made = network(case, net, seed=4)
    saved(made, tmp_path / "lycoris.safetensors")
    merge(tmp_path / "base.safetensors", tmp_path / "lycoris.safetensors", tmp_path / "merged.safetensors")
    after = Net()
    after.load_state_dict(load_file(tmp_path / "merged.safetensors"))
    changed = {name for name, _ in made_over(made)}
    with torch.no_grad():
        for (name, _), old, want, got in zip(net.named_children(), before, net(*inputs), after(*inputs), strict=True):
            if case == "dylora":
                continue  # which draws a rank anew for every pass
            assert (name in changed) == (not torch.allclose(old, want, rtol=1e-3, atol=1e-3)), name
            assert (got - want).norm() <= 3e-6 * want.norm(), (name, (got - want).norm() / want.norm())


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("ia3", "dylora", "bypass") and "columns" not in case])
def test_a_merge_is_that_of_lycoris_merge_script(case: str, tmp_path: Path) -> None:
    """`lycoris.utils.merge`. It cannot build IA3, nor norms of columns; it applies the scale of LoHa and LoKr twice, so that is 1 here."""
    torch.manual_seed(6)
    net = Net()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    save_file(state, tmp_path / "base.safetensors")
    tensors = saved(network(case, net, seed=7, linear_alpha=CASES[case].get("linear_dim", 4)), tmp_path / "lycoris.safetensors")
    theirs = Net()
    theirs.load_state_dict(state)
    with redirect_stdout(io.StringIO()):
        lycoris_merge([], theirs, {name.replace("lycoris_", "lora_unet_", 1): value for name, value in tensors.items()})
    merge(tmp_path / "base.safetensors", tmp_path / "lycoris.safetensors", tmp_path / "merged.safetensors")
    for name, value in load_file(tmp_path / "merged.safetensors").items():
        want = theirs.state_dict()[name]
        assert (value - want).norm() <= 3e-6 * want.norm(), name


@pytest.mark.parametrize("case", ["lora", "loha with cores", "lokr of halves", "glora", "diag-oft", "boft", "norms"])
def test_lycoris_rebuilds_its_modules_from_what_is_written(case: str, tmp_path: Path) -> None:
    net = Net()
    saved(network(case, net), tmp_path / "in.safetensors")
    write_adapter(open_adapter(tmp_path / "in.safetensors"), tmp_path / "out.safetensors", "lycoris")
    made, _ = create_lycoris_from_weights(1.0, str(tmp_path / "out.safetensors"), Net())
    assert len(made.loras) == len(open_adapter(tmp_path / "out.safetensors").deltas) - 6 * (case == "norms")


@pytest.mark.parametrize("case", CASES)
def test_commands_say_what_such_adapters_are(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(8)
    net = Net()
    save_file({name: value.clone() for name, value in net.state_dict().items()}, tmp_path / "base.safetensors")
    path = tmp_path / "lycoris.safetensors"
    saved(network(case, net), path)
    for words in (
        ["identify", str(path)], ["inspect", str(path), "--json"], ["verify", str(path), "--base", str(tmp_path / "base.safetensors")],
        ["compare", str(path), str(path)], ["merge", str(tmp_path / "base.safetensors"), str(path), "--dry-run"],
    ):  # fmt: skip
        code = main(words)
        printed = capsys.readouterr()
        assert code == 0, (words, printed.err)
        if words[0] == "inspect":
            for module in json.loads(printed.out)["modules"]:
                dependent = module["algorithm"] in ("glora", "ia3", "diag-oft", "butterfly-oft", "dora", "doha", "dokr")
                assert (module["frobenius"] is None) == dependent, module
                unranked = module["algorithm"] in ("ia3", "diag-oft", "butterfly-oft", "full", "norm")
                assert (module["rank"] is None) == (unranked or {"w1", "w2"} <= module["shapes"].keys())


@pytest.mark.parametrize("case", CASES)
def test_a_triad_of_any_algorithm_comes_back(case: str, tmp_path: Path) -> None:
    saved(network(case, Net()), tmp_path / "in.safetensors")
    adapter = open_adapter(tmp_path / "in.safetensors")
    write_adapter(adapter, tmp_path / "triad", "triad")
    back = open_adapter(tmp_path / "triad")
    assert back.deltas.keys() == adapter.deltas.keys()
    assert all(same_delta(delta, back.deltas[target]) for target, delta in adapter.deltas.items())
    write_adapter(back, tmp_path / "out.safetensors", "lycoris")
    bits(load_file(tmp_path / "out.safetensors"), load_file(tmp_path / "in.safetensors"))


def test_tlora_is_read_and_said_to_be_more_than_its_factors(tmp_path: Path) -> None:
    CASES["tlora"] = {"algo": "tlora"}
    try:
        saved(network("tlora", Net()), tmp_path / "in.safetensors")
    finally:
        del CASES["tlora"]
    adapter = open_adapter(tmp_path / "in.safetensors")
    assert adapter.algorithms() == {"t-lora": 4} and not adapter.leftovers and "leading singular vectors" in adapter.conditions[0]
    write_adapter(adapter, tmp_path / "out.safetensors", "lycoris")
    bits(load_file(tmp_path / "out.safetensors"), load_file(tmp_path / "in.safetensors"))
    save_file(Net().state_dict(), tmp_path / "base.safetensors")
    for drop in ((), ("conditions",)):
        with pytest.raises(RefusedError, match=r"cannot be merged|no weight can hold"):
            merge(tmp_path / "base.safetensors", tmp_path / "in.safetensors", tmp_path / "merged.safetensors", drop=drop)


class Few(Net):
    """The layers PEFT's LoHa and LoKr know."""

    def __init__(self) -> None:
        super().__init__()
        del self.line, self.layer_norm, self.group_norm

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.fc(x), self.conv(y), self.point(y)


@pytest.mark.parametrize("case", ["lora", "dora by rows", "loha", "loha with cores", "lokr", "lokr of whole factors"])
def test_peft_computes_what_lycoris_does(case: str, tmp_path: Path, inputs: tuple[torch.Tensor, torch.Tensor]) -> None:
    torch.manual_seed(9)
    net, other = Few(), Few()
    other.load_state_dict(net.state_dict())
    save_file({name: value.clone() for name, value in net.state_dict().items()}, tmp_path / "base.safetensors")
    saved(network(case, net, use_scalar=False), tmp_path / "lycoris.safetensors")
    convert = [
        "convert",
        str(tmp_path / "lycoris.safetensors"),
        "--to",
        "peft",
        "-o",
        str(tmp_path / "peft"),
        "--base",
        str(tmp_path / "base.safetensors"),
    ]
    assert main(convert) == 0
    made = PeftModel.from_pretrained(other, tmp_path / "peft").eval()
    with torch.no_grad():
        for want, got in zip(net(*inputs), made(*inputs), strict=True):
            assert (got - want).norm() <= 3e-6 * want.norm()


PLAIN = {f"{Q}.lora_down.weight": [4, 320], f"{Q}.lora_up.weight": [320, 4], f"{Q}.alpha": []}
LOHA = {f"{Q}.hada_w1_a": [320, 4], f"{Q}.hada_w1_b": [4, 320], f"{Q}.hada_w2_a": [320, 4], f"{Q}.hada_w2_b": [4, 320], f"{Q}.alpha": []}


def best(shapes: dict[str, list[int]], **metadata: str) -> str:
    return dialects.matches(tensor_file(filled(shapes), metadata))[0].dialect


def test_the_border_to_kohya() -> None:
    assert best(PLAIN) == best(PLAIN, ss_network_module="networks.lora") == "kohya"
    assert best(PLAIN, ss_network_module="lycoris.kohya") == "lycoris"
    assert best(PLAIN | {f"{Q}.dora_scale": [320, 1]}) == best(LOHA) == "lycoris"
    assert best({name.replace("lora_unet_", "lycoris_"): shape for name, shape in PLAIN.items()}) == "lycoris"
    assert best({f"{Q}.weight": [320], f"{Q}.on_input": []}) == "lycoris"
    assert not [match for match in dialects.matches(tensor_file(filled({f"{Q}.weight": [320, 320]}))) if match.dialect == "lycoris"]


def test_onetrainers_own_names_stay_its_own() -> None:
    assert best({name.replace("lora_unet_", "lora_transformer_"): shape for name, shape in LOHA.items()}) == "onetrainer"


EVERY: dict[str, dict[str, list[int]]] = {
    "glora": {"a1.weight": [320, 4], "a2.weight": [4, 320], "b1.weight": [320, 4], "b2.weight": [4, 320], "alpha": []},
    "diag-oft": {"oft_blocks": [20, 16, 16], "rescale": [320, 1], "alpha": []},
    "butterfly-oft": {"oft_blocks": [3, 16, 20, 20], "alpha": []},
    "full": {"diff": [320, 320]},
}


@pytest.mark.parametrize("prefix", ["lora_unet_", "lycoris_"])
@pytest.mark.parametrize("algorithm", EVERY)
def test_modules_of_a_base_are_resolved_even_where_factors_do_not_tell_all_sizes(algorithm: str, prefix: str) -> None:
    numbers = {0: 320, 1: 640, 2: 1280}
    tensors: dict[str, Tensor] = {}
    for block, width in numbers.items():
        for module in ("attn1_to_q", "attn1_to_k", "attn2_to_out_0"):
            name = f"{prefix}down_blocks_{block}_attentions_0_transformer_blocks_0_{module}"
            shapes = {
                f"{name}.{word}": [width * size // 320 if size >= 320 else size for size in shape]
                for word, shape in EVERY[algorithm].items()
            }
            if algorithm == "diag-oft":
                shapes[f"{name}.oft_blocks"] = [width // 16, 16, 16]
            if algorithm == "butterfly-oft":
                shapes[f"{name}.oft_blocks"] = [3, 16, width // 16, width // 16]
            tensors |= filled(shapes)
    adapter = read("lycoris", tensors)
    assert adapter.layout == "reference" and adapter.base is not None and adapter.base.name == "sd1.5" and not adapter.leftovers
    assert adapter.algorithms() == {algorithm: 9}
    assert Target("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q") in adapter.deltas
    same(written("lycoris", adapter).tensors, tensors)


def test_norms_and_biases_of_a_base() -> None:
    norm, conv = "lora_unet_down_blocks_0_attentions_0_norm", "lora_unet_down_blocks_0_resnets_0_conv1"
    shapes = LOHA | {f"{norm}.w_norm": [320], f"{norm}.b_norm": [320], f"{conv}.diff": [320, 320, 3, 3], f"{conv}.diff_b": [320]}
    shapes |= {"lora_unet_conv_out.diff_b": [4]}
    tensors = filled(shapes)
    adapter = read("lycoris", tensors, base=SD)
    assert not adapter.leftovers and adapter.algorithms() == {"loha": 1, "norm": 2, "full": 3}
    assert Target("unet.conv_out", parameter="bias") in adapter.deltas
    same(written("lycoris", adapter).tensors, tensors)
    odd = read("lycoris", tensors | filled({f"{conv}.diff_b": [319]}), base=SD)
    assert f"{conv}.diff_b" in odd.leftovers and Target("unet.down_blocks.0.resnets.0.conv1") not in odd.deltas


OLD = {"a1.weight": [4, 320], "a2.weight": [320, 4], "b1.weight": [4, 320], "b2.weight": [640, 4], "alpha": []}
NEW = {"a1.weight": [320, 4], "a2.weight": [4, 320], "b1.weight": [640, 4], "b2.weight": [4, 320], "alpha": []}


@pytest.mark.parametrize("rows", [640, 320])
def test_glora_of_old_versions_holds_its_factors_the_other_way_round(rows: int, tmp_path: Path) -> None:
    """Before 3.0 W' = W + scale (W a2 a1 + b2 b1), since then W + scale (W a1 a2 + b1 b2); a square weight is read by the smaller rank."""
    name = "lycoris_layer"
    base = np.random.default_rng(1).standard_normal((rows, 320))
    for form, old in ((OLD, True), (NEW, False)):
        tensors = filled({f"{name}.{w}": [rows if n == 640 else n for n in s] for w, s in form.items()}, np.float64)
        (delta,) = (adapter := read("lycoris", tensors)).deltas.values()
        a1, a2, b1, b2 = (tensors[f"{name}.{role}.weight"].read() for role in ("a1", "a2", "b1", "b2"))
        change = base @ a2 @ a1 + b2 @ b1 if old else base @ a1 @ a2 + b1 @ b2
        merged = delta.load().merged(lambda start, stop: base[start:stop].copy(), 0, rows)
        np.testing.assert_allclose(merged, base + 2.0 * change, rtol=1e-12, atol=1e-12)
        same(written("lycoris", adapter).tensors, tensors)
        assert [finding.code for finding in adapter.findings] == (["glora-scaled-twice"] if old else [])


def test_turns_as_2_0_saved_them() -> None:
    tensors = filled({"lycoris_layer.oft_diag": [8, 4, 4]})
    adapter = read("lycoris", tensors)
    (delta,) = adapter.deltas.values()
    assert isinstance(delta, DiagOFT) and delta.made
    same(written("lycoris", adapter).tensors, tensors)
    with pytest.raises(RefusedError, match="would not apply a Diag-OFT delta"):
        written("comfyui", read("lycoris", filled({f"{Q}.oft_diag": [80, 4, 4]}), base=SD))


def test_rs_lora_that_alpha_does_not_hold_is_said() -> None:
    args = {"ss_network_args": json.dumps({"rs_lora": "True"}), "ss_network_alpha": "8.0", "ss_network_dim": "4"}

    def codes(tensors: dict[str, Tensor], metadata: dict[str, str] = args) -> list[str]:
        return [finding.code for finding in read("lycoris", tensors, metadata, base=SD).findings]

    assert codes(filled(LOHA)) == ["rs-lora-lost"]  # 3.0.0 and before stored the alpha that was asked for
    assert codes(filled(LOHA, alpha=16.0)) == []  # later versions store alpha * sqrt(rank)
    assert codes(filled(LOHA), args | {"ss_network_args": "{}"}) == codes(filled(LOHA), args | {"ss_network_args": "["}) == []
    assert codes(filled({f"{Q}.{word}": shape for word, shape in EVERY["glora"].items()})) == ["rs-lora-lost"]
    assert codes(filled({f"{Q}.lokr_w1": [8, 8], f"{Q}.lokr_w2": [40, 40], f"{Q}.alpha": []})) == ["rs-lora-lost"]


def test_conversion_to_comfyui_and_back_keeps_the_bits() -> None:
    for algorithm in ("glora", "butterfly-oft", "full"):
        tensors = filled({f"{Q}.{word}": shape for word, shape in EVERY[algorithm].items()}, np.float32, alpha=0.001)
        adapter = read("lycoris", tensors, base=SD)
        comfy = written("comfyui", adapter, base=SD)
        between = read("comfyui", comfy.tensors, base=SD)
        prove_same(adapter, between)
        same(written("lycoris", between, base=SD).tensors, tensors)


def test_constraints_mean_another_thing_to_comfyui() -> None:
    """LyCORIS limits the norm of the blocks to alpha * out, ComfyUI (comfy/weight_adapter/oft.py) to alpha."""
    tensors = filled({f"{Q}.oft_blocks": [20, 16, 16], f"{Q}.alpha": []}, np.float32, alpha=0.001)
    comfy = written("comfyui", read("lycoris", tensors, base=SD), base=SD).tensors
    (alpha,) = (tensor.scalar() for name, tensor in comfy.items() if name.endswith("alpha"))
    assert alpha == float(np.float32(0.001)) * 320
    same(written("lycoris", read("comfyui", comfy, base=SD), base=SD).tensors, tensors)


@pytest.mark.parametrize("words", [EVERY["diag-oft"], {"weight": [320], "on_input": []}])
def test_what_comfyui_would_not_apply_is_refused(words: dict[str, list[int]]) -> None:
    with pytest.raises(RefusedError) as caught:
        written("comfyui", read("lycoris", filled({f"{Q}.{word}": shape for word, shape in words.items()}, alpha=0.0), base=SD), base=SD)
    assert "row factors" in str(caught.value.found) or "IA3" in str(caught.value.found)


@pytest.mark.parametrize("words", [*EVERY.values(), {"weight": [320], "on_input": []}])
def test_what_peft_cannot_hold_is_refused(words: dict[str, list[int]]) -> None:
    adapter = read("lycoris", filled({f"{Q}.{word}": shape for word, shape in words.items()}, alpha=0.0), base=SD)
    with pytest.raises(RefusedError):
        written("peft", adapter, base=SD)


def test_other_dialects_become_lycoris_only_where_nothing_is_computed() -> None:
    def adapter(delta: Any) -> Adapter:
        return Adapter({Target("lycoris_layer"): delta}, "other", layout="kohya")

    values = {
        role: Tensor.of(np.ones(shape, np.float32)) for role, shape in (("a1", (6, 2)), ("a2", (2, 6)), ("b1", (5, 2)), ("b2", (2, 6)))
    }
    assert written("lycoris", adapter(GLoRA(**values))).tensors["lycoris_layer.alpha"].scalar() == 2.0
    assert written("lycoris", adapter(LoRA(values["b1"], values["a2"], BAKED))).tensors["lycoris_layer.alpha"].scalar() == 2.0
    turn = DiagOFT(Tensor.of(np.ones((2, 3, 3), np.float32)))
    assert written("lycoris", adapter(turn)).tensors["lycoris_layer.alpha"].scalar() == 0.0
    with pytest.raises(RefusedError) as caught:
        written("lycoris", adapter(IA3(Tensor.of(np.ones(5, np.float32)))))
    assert "takes arithmetic" in str(caught.value.found)
    with pytest.raises(RefusedError) as caught:
        written("lycoris", adapter(Full(Tensor.of(np.ones((5, 6), np.float32)), Scaling(ScaleRule.EXPLICIT, multiplier=2.0))))
    assert "no scale" in str(caught.value.found)
    norm = written("lycoris", Adapter({Target("lycoris_norm"): Full(Tensor.of(np.ones(5, np.float32)))}, "other", layout="kohya"))
    assert list(norm.tensors) == ["lycoris_norm.w_norm"]


def test_words_that_do_not_belong_together() -> None:
    with pytest.raises(DeadAdapterError):
        read("lycoris", filled({f"{Q}.hada_w1_a": [320, 4], f"{Q}.hada_w1_b": [4, 320]}))
    adapter = read("lycoris", filled(LOHA | {f"{Q}.diff": [320, 320], f"{Q}.lokr_t1": [4, 4]}), base=SD)
    assert set(adapter.leftovers) == {f"{Q}.diff", f"{Q}.lokr_t1"} and [f.code for f in adapter.findings] == ["unexplained"]
    for shapes in ({"oft_blocks": [4, 4]}, {"oft_blocks": []}, {"a1.weight": [3], "a2.weight": [3], "b1.weight": [3], "b2.weight": [3]}):
        with pytest.raises(MalformedError) as caught:
            read("lycoris", filled({f"{Q}.{word}": shape for word, shape in shapes.items()}))
        assert caught.value.tensor == Q


def test_a_lora_cut_from_a_flattened_kernel_gets_its_kernel_back(tmp_path: Path) -> None:
    """LoHa and LoKr hold a kernel behind the inputs; no reader knows a LoRA of that form."""
    conv = "lora_unet_down_blocks_0_resnets_0_conv1"
    shapes = {f"{conv}.hada_w1_a": [320, 4], f"{conv}.hada_w1_b": [4, 2880], f"{conv}.hada_w2_a": [320, 4], f"{conv}.hada_w2_b": [4, 2880]}
    adapter = read("lycoris", filled(shapes | LOHA, np.float32), base=SD)
    write_adapter(adapter, tmp_path / "in.safetensors", "lycoris", read=ReadOptions(base=SD))
    assert (
        main(
            [
                "resize",
                str(tmp_path / "in.safetensors"),
                "-o",
                str(tmp_path / "out.safetensors"),
                "--rank",
                "2",
                "--base",
                "sd1.5",
                "--quiet",
            ]
        )
        == 0
    )
    found = {name: tuple(value.shape) for name, value in load_file(tmp_path / "out.safetensors").items() if conv in name}
    assert found[f"{conv}.lora_down.weight"] == (2, 320, 3, 3) and found[f"{conv}.lora_up.weight"] == (320, 2, 1, 1)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(lycoris_words.WORDS), st.lists(st.integers(0, 4), max_size=4), min_size=1, max_size=8))
def test_any_words_in_any_shapes_are_an_adapter_or_one_error_of_ours(words: dict[str, list[int]]) -> None:
    tensors = filled({f"lycoris_layer.{word}": shape for word, shape in words.items()})
    with suppress(UpparamError):
        adapter = read("lycoris", tensors)
        again = written("lycoris", replace(adapter, leftovers={})).tensors
        assert again.keys() | adapter.leftovers.keys() == tensors.keys()
        for target, delta in adapter.deltas.items():
            module_stats(target, delta)
            shape = tuple(size or 4 for size in delta.shape)
            base = np.ones((shape[0], int(np.prod(shape[1:]))))
            delta.load().merged(lambda start, stop, base=base: base[start:stop].copy(), 0, len(base))
