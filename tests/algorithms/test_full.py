"""Full differences and those of norms against LyCORIS' own modules."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lycoris.modules.full import FullModule
from lycoris.modules.norms import NormModule
from tests.algorithms.checks import check_additive, check_rows, close, dense, merged, tensor
from tests.algorithms.layers import layer, randomised
from torch import nn

from upparam.algorithms.full import Full, Norm
from upparam.algorithms.slicing import cut, join, reorder
from upparam.errors import MalformedError

torch.manual_seed(11)


@pytest.mark.parametrize("kind", ["linear", "conv", "conv1d", "conv3d"])
def test_is_what_lycoris_adds(kind: str) -> None:
    base = layer(kind)
    module = randomised(FullModule("m", base))
    diff, diff_b = module.get_diff_weight()
    delta = Full(tensor(diff))
    check_additive(delta, diff)
    check_rows(delta, base.weight, 3, 7)
    weight, bias = module.get_merged_weight()
    close(merged(delta, base.weight), weight)
    close(merged(Full(tensor(diff_b)), base.bias), bias)


@pytest.mark.parametrize("base", [nn.LayerNorm(24), nn.GroupNorm(4, 24)])
def test_is_what_lycoris_adds_to_norms(base: nn.Module) -> None:
    base = randomised(base)
    module = randomised(NormModule("m", base))
    weight, bias = module.get_merged_weight()
    close(merged(Norm(tensor(module.w_norm)), base.weight), weight)
    close(merged(Norm(tensor(module.b_norm)), base.bias), bias)
    assert Norm(tensor(module.w_norm)).rank is None


def test_parts_and_orders() -> None:
    rng = np.random.default_rng(2)
    delta = Full(tensor(rng.standard_normal((6, 4))))
    close(dense(join([cut(delta, 0, 2), cut(delta, 2, 6)])), dense(delta))
    close(dense(reorder(delta, [3, 4, 5, 0, 1, 2])), dense(delta)[[3, 4, 5, 0, 1, 2]])


def test_a_scalar_is_no_difference() -> None:
    with pytest.raises(MalformedError, match="at least one axis"):
        Full(tensor(np.array(1.0)))
