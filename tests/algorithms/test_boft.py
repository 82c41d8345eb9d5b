"""BOFT against LyCORIS' butterfly of outputs and PEFT's of inputs, both computed in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from lycoris.modules.boft import ButterflyOFTModule
from peft import BOFTConfig, get_peft_model
from tests.algorithms.checks import check_rows, close, merged, tensor
from tests.algorithms.layers import batch, layer, randomised
from torch import nn

from upparam.algorithms.base import fits_weight
from upparam.algorithms.boft import BOFT, ButterflyOFT
from upparam.algorithms.slicing import RowSlice, cut
from upparam.errors import MalformedError

torch.manual_seed(15)


@pytest.fixture
def float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """LyCORIS inverts in float32, whatever the dtype of the blocks; here it is made to stay in float64."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", ["linear", "conv", "conv1", "conv1d", "conv3d"])
@pytest.mark.parametrize("options", [{}, {"rescaled": True}, {"constraint": 1e-2}, {"lora_dim": 8, "rescaled": True}])
def test_is_what_lycoris_makes_of_a_weight(kind: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("upparam.algorithms.boft._TILE", 100)  # so that a weight is turned in several pieces
    base = layer(kind)
    module = randomised(ButterflyOFTModule("m", base, **options))
    state = module.state_dict()
    rescale = tensor(state["rescale"]) if "rescale" in state else None
    delta = ButterflyOFT(tensor(state["oft_blocks"]), rescale, float(state["alpha"]))
    assert len(delta.blocks.shape) == 4 and delta.blocks.shape[0] > 1
    close(merged(delta, base.weight), module.get_merged_weight()[0], 1e-7 if "constraint" in options else 1e-12)
    assert fits_weight(delta.shape, tuple(base.weight.shape)) and delta.rank is None
    assert isinstance(cut(delta, 0, 4), RowSlice)
    x = batch(kind)
    changed = torch.from_numpy(merged(delta, base.weight))
    close(module(x), base(x) + module.op(x, changed - base.weight, None, **module.kw_dict), 1e-7)


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize(
    "options", [{"boft_block_size": 4, "boft_n_butterfly_factor": 1}, {"boft_block_size": 4, "boft_n_butterfly_factor": 2}]
)
def test_is_what_peft_makes_of_a_weight(kind: str, options: dict[str, Any]) -> None:
    base = {"linear": nn.Linear(16, 32), "conv": nn.Conv2d(16, 8, 3)}[kind].double()
    model = nn.Sequential()
    model.add_module("m", base)
    before = base.weight.detach().clone()
    made = get_peft_model(model, BOFTConfig(target_modules=["m"], init_weights=False, **options)).double()
    blocks = next(value for name, value in made.state_dict().items() if "boft_R" in name)
    gain = next(value for name, value in made.state_dict().items() if "boft_s" in name)
    nn.init.normal_(blocks, std=0.3)
    nn.init.normal_(gain, mean=1.0, std=0.1)
    delta = BOFT(tensor(blocks.clone()), tensor(gain.clone()))
    close(merged(delta, before), made.merge_and_unload().state_dict()["m.weight"], 1e-6)
    check_rows(delta, before, 1, 6)


def test_what_is_no_butterfly() -> None:
    for shape in ((1, 2, 3, 3), (2, 3, 4, 4), (2, 2, 4), (0, 2, 4, 4)):
        with pytest.raises(MalformedError, match="stages of a butterfly"):
            ButterflyOFT(tensor(np.ones(shape)))
    with pytest.raises(MalformedError, match="factor for each row"):
        ButterflyOFT(tensor(np.ones((2, 2, 4, 4))), tensor(np.ones((7, 1))))
    with pytest.raises(MalformedError, match="stages of a butterfly"):
        BOFT(tensor(np.ones((2, 3, 4, 4))), tensor(np.ones((5, 1))))


def test_no_turn_leaves_the_weight() -> None:
    delta = ButterflyOFT(tensor(np.zeros((2, 2, 4, 4))))
    base = np.arange(24.0).reshape(8, 3)
    close(merged(delta, base), base)
    assert delta.idle(("blocks",)) and not ButterflyOFT(delta.blocks, tensor(np.ones((8, 1)))).idle(("blocks",))
