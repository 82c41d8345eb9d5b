"""LoKr against LyCORIS' and PEFT's own modules."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from lycoris.modules.lokr import LokrModule
from peft import LoKrConfig
from peft.tuners.lokr.layer import Conv2d, Linear
from tests.algorithms.checks import check_additive, check_rows, close, dense, tensor
from torch import nn

from upparam.algorithms.base import Scaling
from upparam.algorithms.lokr import LoKr
from upparam.algorithms.slicing import RowSlice, cut, join
from upparam.errors import MalformedError

torch.manual_seed(4)
ROLES = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")


def layer(kind: str) -> nn.Module:
    made = {"linear": lambda: nn.Linear(24, 32), "conv": lambda: nn.Conv2d(12, 16, 3), "conv1": lambda: nn.Conv2d(12, 16, 1)}[kind]()
    return made.double()


def lokr(state: dict[str, Any], scaling: Scaling) -> LoKr:
    return LoKr(**{role: tensor(state[f"lokr_{role}"]) for role in ROLES if f"lokr_{role}" in state}, scaling=scaling)


@pytest.mark.parametrize("kind", ["linear", "conv", "conv1"])
@pytest.mark.parametrize(
    "options",
    [
        {"lora_dim": 1, "decompose_both": True},
        {"lora_dim": 1, "alpha": 3.0},
        {"lora_dim": 2, "alpha": 1.0, "factor": 2},
        {"lora_dim": 2, "alpha": 1.0, "factor": 2, "use_tucker": True},
        {"lora_dim": 100, "alpha": 7.0},
        {"full_matrix": True, "alpha": 7.0, "factor": 4},
        {"lora_dim": 1, "factor": 4, "unbalanced_factorization": True, "decompose_both": True},
    ],
)
def test_is_what_lycoris_adds(kind: str, options: dict[str, Any]) -> None:
    base = layer(kind)
    module = LokrModule("m", base, **options).double()
    for value in module.parameters():
        nn.init.normal_(value)
    state = module.state_dict()
    delta = lokr(state, Scaling(alpha=float(state["alpha"])))
    true = module.get_weight(base.weight.shape)
    check_additive(delta, true)
    check_rows(delta, base.weight, 3, 7)
    x = torch.randn(2, *([24] if kind == "linear" else [12, 5, 5]), dtype=torch.float64)
    close(module(x) - base(x), module.op(x, torch.from_numpy(dense(delta).reshape(true.shape)), None, **module.kw_dict), 1e-6)


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("options", [{"decompose_both": True}, {"use_effective_conv2d": True}, {"decompose_factor": 2}, {"r": 50}])
def test_is_what_peft_adds(kind: str, options: dict[str, Any]) -> None:
    rank = options.get("r", 1)
    config = LoKrConfig(alpha=6, init_weights=False, **{"r": rank, **options})
    made = (Linear if kind == "linear" else Conv2d)(layer(kind), "default", config=config, r=rank, alpha=6.0).double()
    state = {name.split(".")[0]: value for name, value in made.state_dict().items() if "lokr" in name}
    delta = lokr(state, Scaling(alpha=6.0, divisor=float(rank)))
    assert delta.scale == 6.0 / rank
    check_additive(delta, made.get_delta_weight("default"))


def test_two_full_factors_have_no_rank_and_scale_one() -> None:
    delta = LoKr(w1=tensor(np.ones((2, 3))), w2=tensor(np.ones((4, 5))), scaling=Scaling(alpha=1e10))
    assert (delta.rank, delta.scale, delta.alpha) == (None, 1.0, 1e10)


def test_parts_of_whole_rows_of_w1() -> None:
    rng = np.random.default_rng(5)
    delta = LoKr(w1_a=tensor(rng.standard_normal((6, 2))), w1_b=tensor(rng.standard_normal((2, 3))), w2=tensor(rng.standard_normal((4, 5))))
    parts = [cut(delta, 0, 8), cut(delta, 8, 24)]
    assert all(isinstance(part, LoKr) for part in parts)
    close(dense(join(parts)), dense(delta))
    assert isinstance(cut(delta, 0, 6), RowSlice)
    assert join([cut(delta, 0, 6), cut(delta, 6, 24)]) is delta


def test_inner_product_of_other_sizes() -> None:
    rng = np.random.default_rng(6)
    one = LoKr(w1=tensor(rng.standard_normal((6, 6))), w2=tensor(rng.standard_normal((4, 4))))
    same = LoKr(w1=tensor(rng.standard_normal((6, 6))), w2=tensor(rng.standard_normal((4, 4))))
    other = LoKr(w1=tensor(rng.standard_normal((3, 3))), w2=tensor(rng.standard_normal((8, 8))))
    assert np.isclose(one.inner(same), (dense(one) * dense(same)).sum(), rtol=1e-12)
    assert np.isclose(one.inner(other), (dense(one) * dense(other)).sum(), rtol=1e-12)


def test_factors_that_do_not_fit() -> None:
    w1, w2 = tensor(np.ones((2, 3))), tensor(np.ones((4, 5)))
    a, b = tensor(np.ones((4, 2))), tensor(np.ones((2, 5)))
    for factors in (
        {"w1": w1},
        {"w2": w2},
        {"w1": w1, "w2_a": a},
        {"w1": w1, "w2": w2, "w2_a": a, "w2_b": b},
        {"w1_a": a, "w1_b": tensor(np.ones((3, 2))), "w2": w2},
    ):
        with pytest.raises(MalformedError, match="do not fit"):
            LoKr(**factors)
    with pytest.raises(MalformedError, match="do not fit"):
        LoKr(w1_a=a, w1_b=b, w2_a=tensor(np.ones((4, 3))), w2_b=tensor(np.ones((3, 3))))
