"""LoHa against LyCORIS' and PEFT's own modules."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from lycoris.modules.loha import LohaModule
from peft import LoHaConfig
from peft.tuners.loha.layer import Conv2d, Linear
from tests.algorithms.checks import check_additive, check_rows, close, dense, tensor
from torch import nn

from upparam.algorithms.base import Scaling
from upparam.algorithms.loha import LoHa
from upparam.algorithms.slicing import cut, join, reorder
from upparam.errors import MalformedError

torch.manual_seed(3)


def layer(kind: str) -> nn.Module:
    made = {"linear": lambda: nn.Linear(10, 14), "conv": lambda: nn.Conv2d(6, 8, 3), "conv1": lambda: nn.Conv2d(6, 8, 1)}[kind]()
    return made.double()


def loha(state: dict[str, Any]) -> LoHa:
    names = {"w1_a": "hada_w1_a", "w1_b": "hada_w1_b", "w2_a": "hada_w2_a", "w2_b": "hada_w2_b", "t1": "hada_t1", "t2": "hada_t2"}
    factors = {role: tensor(state[name]) for role, name in names.items() if name in state}
    return LoHa(**factors, scaling=Scaling(alpha=float(state["alpha"])))


@pytest.mark.parametrize(("kind", "tucker"), [("linear", False), ("conv", False), ("conv", True), ("conv1", True)])
@pytest.mark.parametrize(("rank", "alpha"), [(2, 1.0), (5, 3.0)])
def test_is_what_lycoris_adds(kind: str, tucker: bool, rank: int, alpha: float) -> None:
    base = layer(kind)
    module = LohaModule("m", base, lora_dim=rank, alpha=alpha, use_tucker=tucker).double()
    for value in module.parameters():
        nn.init.normal_(value)
    delta = loha(module.state_dict())
    true = module.get_weight(base.weight.shape)
    check_additive(delta, true, 1e-7)  # LyCORIS keeps its scale in float32 when it multiplies by it
    check_rows(delta, base.weight, 3, 7)
    x = torch.randn(2, *([10] if kind == "linear" else [6, 5, 5]), dtype=torch.float64)
    close(module(x) - base(x), module.op(x, torch.from_numpy(dense(delta).reshape(true.shape)), None, **module.kw_dict), 1e-6)


@pytest.mark.parametrize(("kind", "effective"), [("linear", False), ("conv", True), ("conv", False), ("conv1", True)])
def test_is_what_peft_adds(kind: str, effective: bool) -> None:
    base = layer(kind)
    config = LoHaConfig(r=3, alpha=6, use_effective_conv2d=effective, init_weights=False)
    made = (Linear if kind == "linear" else Conv2d)(base, "default", config=config, r=3, alpha=6.0).double()
    state = {name.split(".")[0]: value for name, value in made.state_dict().items() if "hada" in name}
    check_additive(loha(state | {"alpha": 6.0}), made.get_delta_weight("default"))


def test_a_wide_product_has_no_low_rank_form_and_the_same_norm() -> None:
    rng = np.random.default_rng(1)
    up, down = (lambda: rng.standard_normal((40, 20))), (lambda: rng.standard_normal((20, 30)))
    arrays = [up(), down(), up(), down()]
    delta = LoHa(*(tensor(array) for array in arrays))
    assert delta.load().low_rank() is None
    check_additive(delta, (arrays[0] @ arrays[1]) * (arrays[2] @ arrays[3]))


@pytest.mark.parametrize("cores", [False, True])
def test_parts_join_and_rows_move(cores: bool) -> None:
    rng = np.random.default_rng(2)
    a, b = (lambda: rng.standard_normal((3, 12) if cores else (12, 3))), (lambda: rng.standard_normal((3, 7)))
    core = {name: tensor(rng.standard_normal((3, 3, 2, 2))) for name in ("t1", "t2")} if cores else {}
    delta = LoHa(tensor(a()), tensor(b()), tensor(a()), tensor(b()), **core, scaling=Scaling(alpha=2.0))
    parts = [cut(delta, 0, 5), cut(delta, 5, 12)]
    assert all(isinstance(part, LoHa) for part in parts)
    close(dense(join(parts)), dense(delta))
    order = rng.permutation(12)
    close(dense(reorder(delta, order)), dense(delta)[order])


def test_factors_that_do_not_fit() -> None:
    ones = {shape: tensor(np.ones(shape)) for shape in ((4, 2), (2, 5), (3, 5), (2, 6))}
    for shapes in (((4, 2), (3, 5), (4, 2), (2, 5)), ((4, 2), (2, 5), (4, 2), (2, 6))):
        with pytest.raises(MalformedError, match="do not fit"):
            LoHa(*(ones[shape] for shape in shapes))
    with pytest.raises(MalformedError, match="do not fit"):
        LoHa(ones[4, 2], ones[2, 5], ones[4, 2], ones[2, 5], t1=tensor(np.ones((2, 2, 3, 3))))
