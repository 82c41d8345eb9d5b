"""OFT against LyCORIS' Diag-OFT, which turns outputs, and PEFT's, which turns inputs; both computed in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from lycoris.modules.diag_oft import DiagOFTModule
from peft import OFTConfig, get_peft_model
from tests.algorithms.checks import check_rows, close, merged, tensor
from tests.algorithms.layers import batch, layer, randomised
from torch import nn

from upparam.algorithms.base import BAKED, fits_weight
from upparam.algorithms.oft import OFT, DiagOFT
from upparam.algorithms.slicing import RowSlice, cut, join
from upparam.errors import MalformedError, RefusedError

torch.manual_seed(14)


@pytest.fixture
def float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """LyCORIS inverts in float32, whatever the dtype of the blocks; here it is made to stay in float64."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def diag(state: dict[str, Any]) -> DiagOFT:
    rescale = tensor(state["rescale"]) if "rescale" in state else None
    return DiagOFT(tensor(state["oft_blocks"]), rescale, float(state["alpha"]))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", ["linear", "conv", "conv1", "conv1d", "conv3d"])
@pytest.mark.parametrize("options", [{}, {"rescaled": True}, {"constraint": 1e-2}, {"constraint": 1e3, "rescaled": True}, {"lora_dim": 2}])
def test_is_what_lycoris_makes_of_a_weight(kind: str, options: dict[str, Any]) -> None:
    base = layer(kind)
    module = randomised(DiagOFTModule("m", base, **options))
    delta = diag(module.state_dict())
    close(merged(delta, base.weight), module.get_merged_weight()[0], 1e-7 if "constraint" in options else 1e-12)
    assert fits_weight(delta.shape, tuple(base.weight.shape)) and delta.rank is None
    x = batch(kind)
    changed = torch.from_numpy(merged(delta, base.weight))
    close(module(x), base(x) + module.op(x, changed - base.weight, None, **module.kw_dict), 1e-7)
    check_rows(delta, base.weight, 4, 12) if not isinstance(cut(delta, 4, 12), RowSlice) else None


@pytest.mark.usefixtures("float64")
def test_turns_as_lycoris_2_saved_them() -> None:
    """`oft_diag` held R, row factors within: W' is R^T @ W block by block (lycoris/modules/diag_oft.py at 2.0)."""
    base = layer("linear").weight
    turns = torch.randn(8, 4, 4, dtype=torch.float64)
    true = torch.einsum("knm,kni->kmi", turns, base.view(8, 4, 24)).reshape(32, 24)
    delta = DiagOFT(tensor(turns), made=True)
    close(merged(delta, base), true)
    check_rows(delta, base, 8, 20)


def test_the_constraint_is_the_norm_of_all_blocks_over_out() -> None:
    blocks = tensor(torch.randn(8, 4, 4, dtype=torch.float64))
    update = DiagOFT(blocks, constraint=0.01).load()
    turns = update.blocks
    skew = np.linalg.solve(np.eye(4) + turns, np.eye(4) - turns)  # Cayley's transform is its own inverse
    assert np.isclose(np.linalg.norm(skew), 0.01 * 32, rtol=1e-6)


def test_parts_are_whole_blocks_and_a_constraint_ties_them_together() -> None:
    base = layer("linear").weight
    blocks, rescale = tensor(torch.randn(8, 4, 4, dtype=torch.float64)), tensor(torch.randn(32, 1, dtype=torch.float64))
    delta = DiagOFT(blocks, rescale)
    close(merged(join([cut(delta, 0, 8), cut(delta, 8, 32)]), base), merged(delta, base))
    assert isinstance(cut(delta, 0, 6), RowSlice) and isinstance(cut(DiagOFT(blocks, constraint=1.0), 0, 8), RowSlice)
    with pytest.raises(RefusedError, match="fused weight"):
        cut(delta, 0, 6).load()


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize(
    "options", [{}, {"block_share": True}, {"coft": True, "eps": 0.1}, {"use_cayley_neumann": True, "num_cayley_neumann_terms": 5}]
)
def test_is_what_peft_makes_of_a_weight(kind: str, options: dict[str, Any]) -> None:
    model = nn.Sequential()
    model.add_module("m", layer(kind))
    before = model.state_dict()["m.weight"].clone()
    size = 6
    config = OFTConfig(r=0, oft_block_size=size, target_modules=["m"], init_weights=False, **({"use_cayley_neumann": False} | options))
    made = get_peft_model(model, config).double()
    (vector,) = (value for name, value in made.state_dict().items() if "oft_R" in name)
    nn.init.normal_(vector, std=0.05)
    delta = OFT(
        tensor(vector.clone()), options["num_cayley_neumann_terms"] if options.get("use_cayley_neumann") else None,
        options.get("eps") if options.get("coft") else None, bool(options.get("block_share")),
    )  # fmt: skip
    close(merged(delta, before), made.merge_and_unload().state_dict()["m.weight"], 1e-6)
    assert fits_weight(delta.shape, tuple(before.shape)) or kind == "conv"


def test_what_is_no_set_of_blocks() -> None:
    for shape in ((2, 3, 4), (4, 4), (2, 3)):
        with pytest.raises(MalformedError):
            DiagOFT(tensor(np.ones(shape)))
    with pytest.raises(MalformedError, match="factor for each row"):
        DiagOFT(tensor(np.ones((2, 3, 3))), tensor(np.ones((5, 1))))
    with pytest.raises(MalformedError, match="upper halves"):
        OFT(tensor(np.ones((2, 4))))


def test_no_turn_leaves_the_weight() -> None:
    assert DiagOFT(tensor(np.zeros((2, 3, 3)))).idle(("blocks",))
    assert not DiagOFT(tensor(np.zeros((2, 3, 3))), tensor(np.ones((6, 1)))).idle(("blocks",))
    base = np.arange(24.0).reshape(6, 4)
    close(merged(DiagOFT(tensor(np.zeros((2, 3, 3))), scaling=BAKED), base), base)
