"""IA3 against LyCORIS' and PEFT's own modules."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lycoris.modules.ia3 import IA3Module
from peft import IA3Config, get_peft_model
from tests.algorithms.checks import check_rows, close, merged, tensor
from tests.algorithms.layers import batch, layer, randomised
from torch import nn

from upparam.algorithms.base import fits_weight
from upparam.algorithms.ia3 import IA3
from upparam.algorithms.slicing import cut, join
from upparam.errors import MalformedError

torch.manual_seed(13)


@pytest.mark.parametrize("kind", ["linear", "conv", "conv1", "conv1d", "conv3d"])
@pytest.mark.parametrize("on_input", [False, True])
def test_is_what_lycoris_makes_of_a_weight(kind: str, on_input: bool) -> None:
    base = layer(kind)
    module = randomised(IA3Module("m", base, train_on_input=on_input))
    state = module.state_dict()
    assert set(state) == {"weight", "on_input"} and bool(state["on_input"]) is on_input
    delta = IA3(tensor(state["weight"]), on_input=on_input, from_one=True)
    close(merged(delta, base.weight), module.get_merged_weight()[0])
    check_rows(delta, base.weight, 3, 7)
    assert fits_weight(delta.shape, tuple(base.weight.shape)) and delta.rank is None
    x = batch(kind)
    changed = torch.from_numpy(merged(delta, base.weight))
    close(module(x), base(x) + module.op(x, changed - base.weight, None, **module.kw_dict), 1e-11)


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("on_input", [False, True])
def test_is_what_peft_makes_of_a_weight(kind: str, on_input: bool) -> None:
    model = nn.Sequential()
    model.add_module("m", layer(kind))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = IA3Config(target_modules=["m"], feedforward_modules=["m"] if on_input else [], init_ia3_weights=False)
    made = get_peft_model(model, config).double()
    (vector,) = (value for name, value in made.state_dict().items() if "ia3_l" in name)
    delta = IA3(tensor(vector), on_input=on_input)
    after = made.merge_and_unload().state_dict()
    close(merged(delta, before["m.weight"]), after["m.weight"])
    bias = before["m.bias"] if on_input else merged(IA3(tensor(vector), bias=True), before["m.bias"])
    close(bias, after["m.bias"])


def test_parts_of_outputs_are_cut_and_those_of_inputs_stay() -> None:
    rng = np.random.default_rng(3)
    base = rng.standard_normal((6, 4))
    outputs, inputs = IA3(tensor(rng.standard_normal((1, 6, 1, 1)))), IA3(tensor(rng.standard_normal(4)), on_input=True)
    for delta in (outputs, inputs):
        parts = [cut(delta, 0, 2), cut(delta, 2, 6)]
        close(merged(join(parts), base), merged(delta, base))
        close(merged(parts[1], base[2:]), merged(delta, base)[2:])


def test_zeros_change_nothing_where_they_are_added_to_one() -> None:
    assert IA3(tensor(np.zeros(3)), from_one=True).idle(("vector",)) and not IA3(tensor(np.zeros(3))).idle(("vector",))


def test_what_is_no_vector() -> None:
    for shape in ((2, 3), (2, 1, 2), ()):
        with pytest.raises(MalformedError, match="not a vector"):
            IA3(tensor(np.ones(shape)))
