"""OFT and BOFT of PEFT's versions: butterflies of several factors, old forms, series, and what no tensor says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from safetensors.torch import load_file, save_file  # noqa: E402
from tests.dialects.test_peft import llama  # noqa: E402
from tests.dialects.test_peft_methods import loads, oft, outputs, saved_base, trained  # noqa: E402

from upparam.bases.find import find_base  # noqa: E402
from upparam.dialects.base import ReadOptions  # noqa: E402
from upparam.dialects.peft_turns import adjusted  # noqa: E402
from upparam.errors import DeadAdapterError, RefusedError  # noqa: E402
from upparam.operations.convert import convert, write_adapter  # noqa: E402
from upparam.operations.identify import identify  # noqa: E402
from upparam.operations.merge import merge  # noqa: E402
from upparam.operations.opening import open_adapter  # noqa: E402
from upparam.operations.verify import verify  # noqa: E402

Q = "model.layers.{}.self_attn.q_proj"


def saved(folder: Path, tensors: dict[str, Any], config: dict[str, Any] | None) -> Path:
    folder.mkdir()
    save_file({f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def merged(base: Any, adapter: Path, tmp_path: Path) -> dict[str, Any]:
    saved_base(base, tmp_path / "base")
    merge(tmp_path / "base", adapter, tmp_path / "merged")
    found: dict[str, Any] = load_file(tmp_path / "merged/model.safetensors")
    return found


def weights(base: Any) -> dict[str, Any]:
    return {name: tensor.clone() for name, tensor in base.state_dict().items()}


def random(*shape: int, seed: int = 0) -> Any:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def cayley(data: Any) -> Any:
    """PEFT before 0.16: _cayley_batch."""
    skew = 0.5 * (data - data.transpose(1, 2))
    one = torch.eye(data.shape[1], dtype=data.dtype)
    return torch.linalg.solve(one + skew, one - skew, left=False)


@pytest.fixture
def butterfly(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT makes several factors only with its CUDA extension; here its block diagonal is made in torch instead."""
    from peft.tuners.boft import layer

    class Blocks:
        @staticmethod
        def apply(blocks: Any) -> Any:
            return torch.stack([torch.block_diag(*factor) for factor in blocks])

    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(layer, "FastBlockDiag", Blocks)


@pytest.mark.parametrize(("factors", "size"), [(2, 4), (3, 4), (4, 2), (2, 8)])
@pytest.mark.usefixtures("butterfly")
def test_butterflies_of_several_factors(factors: int, size: int, tmp_path: Path) -> None:
    config = peft.BOFTConfig(boft_block_size=size, boft_n_butterfly_factor=factors, target_modules=["q_proj"])
    torch.manual_seed(0)
    base = llama()
    state = weights(base)
    wrapped = peft.get_peft_model(base, config)
    with torch.no_grad():
        for number, parameter in enumerate(parameter for parameter in wrapped.parameters() if parameter.requires_grad):
            parameter.add_(random(*parameter.shape, seed=number))
    wrapped.save_pretrained(tmp_path / "theirs")
    theirs = wrapped.merge_and_unload().state_dict()
    clean = llama()
    clean.load_state_dict(state)
    ours = merged(clean, tmp_path / "theirs", tmp_path)
    assert not torch.equal(theirs[f"{Q.format(0)}.weight"], state[f"{Q.format(0)}.weight"])
    for name, tensor in ours.items():
        assert torch.allclose(tensor, theirs[name], rtol=0, atol=2e-6), name
    adapter = open_adapter(tmp_path / "theirs")
    adapter.config.clear()
    adapter.save(tmp_path / "ours")
    again = llama()
    again.load_state_dict(state)
    again = loads(again, tmp_path / "ours").merge_and_unload().state_dict()
    assert all(torch.equal(again[name], theirs[name]) for name in theirs)


def test_outputs_turned_as_peft_0_13_did(tmp_path: Path) -> None:
    """merge: W^T R with a block-diagonal R, that is R^T W."""
    torch.manual_seed(0)
    base = llama()
    blocks = {number: random(4, 8, 8, seed=number) for number in (0, 1)}
    config = {"peft_type": "OFT", "r": 4, "target_modules": ["q_proj"], "coft": False, "block_share": False}
    folder = saved(tmp_path / "theirs", {f"{Q.format(number)}.oft_r": tensor for number, tensor in blocks.items()}, config)
    adapter = open_adapter(folder)
    assert adapter.algorithms() == {"diag-oft": 2}
    ours = merged(base, folder, tmp_path)
    for number, tensor in blocks.items():
        weight = weights(base)[f"{Q.format(number)}.weight"].double()
        expected = torch.block_diag(*cayley(tensor.double())).T @ weight
        assert torch.allclose(ours[f"{Q.format(number)}.weight"].double(), expected, rtol=0, atol=1e-7)
    with pytest.raises(RefusedError, match="a Diag-OFT delta"):
        convert(folder, tmp_path / "ours", "peft")
    convert(folder, tmp_path / "copy", "triad")


def test_inputs_turned_as_peft_0_15_did_become_a_boft(tmp_path: Path) -> None:
    """merge: (R W^T)^T times oft_s for each row; today's PEFT cannot load the form, but a BOFT of one factor computes the same."""
    torch.manual_seed(0)
    base = llama()
    state = weights(base)
    blocks, gains = (
        {number: random(4, 8, 8, seed=number) for number in (0, 1)},
        {number: 1 + random(32, 1, seed=9 + number) for number in (0, 1)},
    )
    tensors = {f"{Q.format(number)}.oft_r": blocks[number] for number in blocks}
    tensors |= {f"{Q.format(number)}.oft_s": gains[number] for number in gains}
    config = {"peft_type": "OFT", "r": 0, "oft_block_size": 8, "target_modules": ["q_proj"], "coft": False, "block_share": False}
    folder = saved(tmp_path / "theirs", tensors, config)
    ours = merged(base, folder, tmp_path)
    for number in blocks:
        weight = state[f"{Q.format(number)}.weight"].double()
        expected = (torch.block_diag(*cayley(blocks[number].double())) @ weight.T).T * gains[number].double()
        assert torch.allclose(ours[f"{Q.format(number)}.weight"].double(), expected, rtol=0, atol=1e-7)
    convert(folder, tmp_path / "ours", "peft")
    assert json.loads((tmp_path / "ours/adapter_config.json").read_text())["peft_type"] == "BOFT"
    theirs = loads(base, tmp_path / "ours").merge_and_unload().state_dict()
    assert all(torch.allclose(ours[name], theirs[name], rtol=0, atol=2e-6) for name in ours)


@pytest.mark.parametrize("setting", ["coft", "block_share"])
def test_old_forms_that_no_algorithm_holds_are_refused(setting: str, tmp_path: Path) -> None:
    config = {"peft_type": "OFT", "r": 4, "target_modules": ["q_proj"], setting: True}
    folder = saved(tmp_path / "theirs", {f"{Q.format(0)}.oft_r": random(4, 8, 8)}, config)
    with pytest.raises(DeadAdapterError, match=r"constrained or shared OFT of PEFT before 0\.16"):
        open_adapter(folder)


@pytest.mark.parametrize("terms", [1, 2, 3, 4, 5, 7])
def test_the_series_of_peft_0_17(terms: int, tmp_path: Path) -> None:
    """I + 2Q + 2Q^2 + ... + 2Q^(terms - 1): the last term twice too, which 0.18 changed. Configs tell their version since then."""
    torch.manual_seed(0)
    base = llama()
    values = random(4, 28)
    config = {
        "peft_type": "OFT", "r": 0, "oft_block_size": 8, "target_modules": ["layers.0.self_attn.q_proj"], "use_cayley_neumann": True,
        "num_cayley_neumann_terms": terms, "coft": False, "block_share": False,
    }  # fmt: skip
    folder = saved(tmp_path / "theirs", {f"{Q.format(0)}.oft_R.weight": values}, config)
    skew = torch.zeros(4, 8, 8, dtype=torch.float64)
    rows, columns = torch.triu_indices(8, 8, 1)
    skew[:, rows, columns] = values.double()
    skew = skew - skew.transpose(1, 2)
    turn, power = torch.eye(8, dtype=torch.float64).repeat(4, 1, 1), skew
    for _ in range(1, terms):
        turn, power = turn + 2 * power, power @ skew
    weight = weights(base)[f"{Q.format(0)}.weight"].double()
    if terms == 1:
        with pytest.raises(RefusedError, match="identical to the base"):
            merged(base, folder, tmp_path)
        return
    ours = merged(base, folder, tmp_path)
    assert torch.allclose(ours[f"{Q.format(0)}.weight"].double(), weight @ torch.block_diag(*turn).T, rtol=0, atol=1e-7)
    convert(folder, tmp_path / "ours", "peft")
    assert json.loads((tmp_path / "ours/adapter_config.json").read_text()) == config
    adapter = open_adapter(folder)
    adapter.config.clear()
    if terms > 2:
        with pytest.raises(RefusedError, match=r"PEFT before 0\.18"):
            adapter.save(tmp_path / "new")
    else:
        adapter.save(tmp_path / "new")


def test_how_blocks_become_turns_is_asked_for(tmp_path: Path) -> None:
    base, _ = trained("oft exact", tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs/adapter_config.json").read_text())
    (tmp_path / "theirs/adapter_config.json").unlink()
    adapter = open_adapter(tmp_path / "theirs")
    assert adapter.algorithms() == {"oft": 4}
    saved_base(base(), tmp_path / "base")
    with pytest.raises(RefusedError, match=r"in no tensor and never guessed.*adapter_config.json.*use_cayley_neumann"):
        merge(tmp_path / "base", tmp_path / "theirs", tmp_path / "merged")
    with pytest.raises(RefusedError, match="in no tensor and never guessed"):
        convert(tmp_path / "theirs", tmp_path / "ours", "peft")
    verdict = verify(tmp_path / "theirs")
    assert not verdict.sound
    assert any("use_cayley_neumann" in finding.message + " ".join(finding.evidence) for finding in verdict.findings)
    told = {key: config[key] for key in ("peft_type", "oft_block_size", "use_cayley_neumann", "coft", "block_share")}
    (tmp_path / "theirs/adapter_config.json").write_text(json.dumps(told))
    merge(tmp_path / "base", tmp_path / "theirs", tmp_path / "merged")


def test_a_shared_block_is_as_wide_as_the_base_says(tmp_path: Path) -> None:
    base, wrapped = trained("oft shared", tmp_path / "theirs")
    adapter = open_adapter(tmp_path / "theirs")
    assert {delta.shape for delta in adapter.deltas.values()} == {(0, 0)}
    saved_base(base(), tmp_path / "base")
    adapter = open_adapter(tmp_path / "theirs", options=ReadOptions(base=find_base(str(tmp_path / "base"))))
    adapter.config.clear()
    write_adapter(adapter, tmp_path / "ours", "peft", read=ReadOptions(base=find_base(str(tmp_path / "base"))))
    assert torch.equal(outputs(loads(base(), tmp_path / "ours")), outputs(wrapped))


@pytest.mark.parametrize("inputs", [1, 7, 32, 48, 96, 768, 1152])
def test_sizes_are_adjusted_as_the_library_does(inputs: int) -> None:
    layer = peft.get_peft_model(llama(), oft(target_modules=["q_proj"])).base_model.model.model.layers[0].self_attn.q_proj
    for wanted in [*range(1, 200), 512, 700, 1000, 5000]:
        assert adjusted(inputs, wanted) == layer.adjust_oft_parameters(inputs, wanted), wanted


def test_modules_turned_in_different_ways_are_refused(tmp_path: Path) -> None:
    trained("oft exact", tmp_path / "one")
    trained("oft series", tmp_path / "two")
    one, two = open_adapter(tmp_path / "one"), open_adapter(tmp_path / "two")
    first = next(iter(one.deltas))
    one.deltas[first] = two.deltas[first]
    with pytest.raises(RefusedError, match="in one way"):
        one.save(tmp_path / "ours")


def test_identify_invents_no_rank(tmp_path: Path) -> None:
    for name in ("oft series", "boft", "ia3"):
        trained(name, tmp_path / name)
        (report,) = identify(tmp_path / name).adapters
        assert report.kind == "adapter" and report.ranks == {}
        assert report.parameters == sum(tensor.numel() for tensor in load_file(tmp_path / name / "adapter_model.safetensors").values())


def test_parameters_of_shared_projections_are_counted_once(tmp_path: Path) -> None:
    trained("vera widths", tmp_path / "a")
    (report,) = identify(tmp_path / "a").adapters
    assert report.parameters == sum(tensor.numel() for tensor in load_file(tmp_path / "a/adapter_model.safetensors").values())
    assert np.isfinite(report.confidence)
