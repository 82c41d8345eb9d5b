"""DoRA against LyCORIS' and PEFT's own modules."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from peft import LoraConfig, get_peft_model
from tests.algorithms.checks import check_rows, close, merged, tensor
from torch import nn

from upparam.algorithms.base import Scaling
from upparam.algorithms.dora import DoHa, DoKr, DoRA
from upparam.algorithms.lora import LoRA
from upparam.algorithms.slicing import RowSlice, cut, join, reorder
from upparam.errors import MalformedError, RefusedError
from upparam.tensors import Tensor

torch.manual_seed(5)
KINDS: dict[str, Any] = {"dora": LoConModule, "doha": LohaModule, "dokr": LokrModule}


def layer(kind: str) -> nn.Module:
    made = {"linear": lambda: nn.Linear(12, 16), "square": lambda: nn.Linear(12, 12), "conv": lambda: nn.Conv2d(6, 8, 3)}[kind]()
    return made.double()


def built(algorithm: str, state: dict[str, Any]) -> DoRA | DoHa | DoKr:
    scaling, magnitude = Scaling(alpha=float(state["alpha"])), tensor(state["dora_scale"])
    if algorithm == "dora":
        mid = tensor(state["lora_mid.weight"]) if "lora_mid.weight" in state else None
        return DoRA(tensor(state["lora_up.weight"]), tensor(state["lora_down.weight"]), magnitude, scaling=scaling, mid=mid)
    roles = {name.split("_", 1)[1]: tensor(value) for name, value in state.items() if name.startswith(("hada_", "lokr_"))}
    return (DoHa if algorithm == "doha" else DoKr)(**roles, magnitude=magnitude, scaling=scaling)


def lycoris(algorithm: str, base: nn.Module, **options: Any) -> Any:
    """Their module with random values; the weight it gives is the base's plus what its forward adds (see the notes on their scale)."""
    module = KINDS[algorithm]("m", base, lora_dim=2, alpha=2.0, weight_decompose=True, **options).double()
    with torch.no_grad():
        for value in module.parameters():
            nn.init.normal_(value, std=0.3)
        module.dora_scale.abs_().add_(0.5)
    return module


@pytest.mark.parametrize("algorithm", KINDS)
@pytest.mark.parametrize("kind", ["linear", "square", "conv"])
@pytest.mark.parametrize("wd_on_out", [True, False])
@pytest.mark.parametrize("tucker", [True, False])
def test_is_what_lycoris_makes(algorithm: str, kind: str, wd_on_out: bool, tucker: bool) -> None:
    base = layer(kind)
    module = lycoris(algorithm, base, wd_on_out=wd_on_out, use_tucker=tucker)
    delta = built(algorithm, module.state_dict())
    assert delta.algorithm == algorithm and not delta.additive and delta.per_row == wd_on_out
    true = module.get_merged_weight(shape=base.weight.shape)[0]
    close(merged(delta, base.weight), true, 1e-12)
    if wd_on_out and algorithm != "dokr":
        check_rows(delta, base.weight, 3, 7)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_is_what_peft_makes(kind: str) -> None:
    model = nn.Sequential(layer(kind))
    before = model[0].weight.detach().clone()
    wrapped = get_peft_model(model, LoraConfig(r=3, lora_alpha=5, target_modules=["0"], use_dora=True, init_lora_weights=False)).double()
    factors = {}
    with torch.no_grad():
        for name, value in wrapped.named_parameters():
            if "magnitude" in name:
                value.mul_(1.5).add_(0.1)
            factors |= {part: value.detach().clone() for part in ("lora_A", "lora_B", "magnitude") if part in name}
    magnitude = Tensor.of(factors["magnitude"].numpy().reshape(-1))
    delta = DoRA(tensor(factors["lora_B"]), tensor(factors["lora_A"]), magnitude, scaling=Scaling(alpha=5.0))
    true = wrapped.merge_and_unload()[0].weight
    close(merged(delta, before), true, 1e-12)


def parts(rng: Any, out: int, magnitude: tuple[int, ...]) -> DoRA:
    return DoRA(
        tensor(rng.standard_normal((out, 2))), tensor(rng.standard_normal((2, 6))), tensor(rng.random(magnitude) + 0.5), Scaling(alpha=1.0)
    )


def test_rows_are_cut_joined_and_moved() -> None:
    rng = np.random.default_rng(1)
    delta, weight = parts(rng, 12, (12,)), rng.standard_normal((12, 6))
    assert delta.magnitude.shape == (12, 1)
    pieces = [cut(delta, 0, 5), cut(delta, 5, 12)]
    assert all(isinstance(piece, DoRA) for piece in pieces)
    close(merged(join(pieces), weight), merged(delta, weight))
    assert join(pieces).rank == 2
    other = parts(rng, 4, (4, 1))
    both = join([delta, other])
    more = rng.standard_normal((4, 6))
    assert both.rank == 4
    close(merged(both, np.vstack([weight, more])), np.vstack([merged(delta, weight), merged(other, more)]))
    order = rng.permutation(12)
    close(merged(reorder(delta, order), weight[order]), merged(delta, weight)[order])


def test_norms_down_the_columns_hold_the_rows_together() -> None:
    rng = np.random.default_rng(2)
    delta, weight = parts(rng, 12, (1, 6)), rng.standard_normal((12, 6))
    piece = cut(delta, 0, 5)
    assert isinstance(piece, RowSlice)
    with pytest.raises(RefusedError, match="over a fused weight"):
        piece.load()
    assert join([piece, cut(delta, 5, 12)]) is delta
    with pytest.raises(RefusedError, match="cannot be joined"):
        join([delta, delta])
    order = rng.permutation(12)
    close(merged(reorder(delta, order), weight[order]), merged(delta, weight)[order])


def test_a_norm_of_zero_gives_zero() -> None:
    weight = np.zeros((3, 4))
    for magnitude in ((3,), (1, 4)):
        delta = DoRA(tensor(np.zeros((3, 2))), tensor(np.zeros((2, 4))), tensor(np.ones(magnitude)))
        assert not merged(delta, weight).any()


def test_what_depends_on_the_base_is_refused() -> None:
    delta = parts(np.random.default_rng(3), 4, (4,))
    for call in (delta.frobenius, lambda: delta.inner(delta), lambda: delta.load().rows(0, 1)):
        with pytest.raises(RefusedError, match="depends on the weight"):
            call()


def test_direction_and_factors() -> None:
    delta = parts(np.random.default_rng(4), 4, (4,))
    assert type(delta.direction) is LoRA and list(delta.factors()) == ["up", "down", "magnitude"]
    assert (delta.rank, delta.scale, delta.alpha, delta.shape) == (2, 0.5, 1.0, (4, 6))
    with pytest.raises(MalformedError, match="neither one for each row"):
        parts(np.random.default_rng(4), 4, (5, 1))
