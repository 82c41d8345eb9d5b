"""GLoRA against LyCORIS' own module."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from lycoris.modules.glora import GLoRAModule
from tests.algorithms.checks import check_rows, close, merged, tensor
from tests.algorithms.layers import batch, layer, randomised

from upparam.algorithms.base import Scaling
from upparam.algorithms.glora import GLoRA
from upparam.algorithms.slicing import cut, join, reorder
from upparam.errors import MalformedError, RefusedError

torch.manual_seed(12)
ROLES = ("a1", "a2", "b1", "b2", "bm")


def glora(state: dict[str, Any]) -> GLoRA:
    factors = {role: tensor(state[f"{role}.weight"]) for role in ROLES if f"{role}.weight" in state}
    return GLoRA(**factors, scaling=Scaling(alpha=float(state["alpha"])))


@pytest.mark.parametrize("kind", ["linear", "conv", "conv1", "conv1d", "conv3d"])
@pytest.mark.parametrize("options", [{"lora_dim": 4, "alpha": 4}, {"lora_dim": 3, "alpha": 1}, {"lora_dim": 2, "use_scalar": True}])
def test_is_what_lycoris_makes_of_a_weight(kind: str, options: dict[str, Any]) -> None:
    base = layer(kind)
    module = randomised(GLoRAModule("m", base, **options))
    delta = glora(module.state_dict())
    weight = module.get_merged_weight()[0]
    close(merged(delta, base.weight), weight)
    check_rows(delta, base.weight, 3, 7)
    x = batch(kind)
    close(module(x) - base(x), module.op(x, torch.from_numpy(merged(delta, base.weight)) - base.weight, None, **module.kw_dict), 1e-11)
    assert (delta.shape, delta.rank, delta.additive) == (tuple(base.weight.shape), options["lora_dim"], False)


def test_a_tucker_core_of_b() -> None:
    """LyCORIS reads one (`bm`) but no version writes it; the function it calls for it is the reference."""
    from lycoris.functional import tucker_weight_from_conv

    base = layer("conv").weight
    a1, a2, b1, b2, bm = (torch.randn(*shape, dtype=torch.float64) for shape in ((12, 3), (3, 12), (16, 3), (3, 12, 1, 1), (3, 3, 3, 3)))
    delta = GLoRA(tensor(a1), tensor(a2), tensor(b1[:, :, None, None]), tensor(b2), tensor(bm), Scaling(alpha=6.0))
    change = tucker_weight_from_conv(b1, b2, bm) + torch.einsum("oi...,ij->oj...", base, a1 @ a2)
    close(merged(delta, base), base + 2.0 * change)


def test_it_has_no_change_of_its_own() -> None:
    delta = glora(randomised(GLoRAModule("m", layer("linear"))).state_dict())
    with pytest.raises(RefusedError, match="depends on the weight"):
        delta.load().rows(0, 1)
    assert not delta.idle(("a2",)) and not delta.idle(("b2",)) and delta.idle(("a2", "b2"))


def test_parts_and_orders() -> None:
    base = layer("linear").weight
    delta = glora(randomised(GLoRAModule("m", layer("linear"))).state_dict())
    close(merged(join([cut(delta, 0, 5), cut(delta, 5, 32)]), base), merged(delta, base))
    order = [*range(16, 32), *range(16)]
    close(merged(reorder(delta, order), base[order]), merged(delta, base)[order])


def test_factors_that_do_not_fit() -> None:
    good = {"a1": (5, 2), "a2": (2, 5), "b1": (7, 2), "b2": (2, 5)}
    GLoRA(**{role: tensor(np.ones(shape)) for role, shape in good.items()})
    for role, shape in (("a1", (5, 3)), ("a2", (5, 2)), ("b1", (7, 3)), ("b2", (2, 6)), ("b2", (3, 5)), ("a1", (5,))):
        with pytest.raises(MalformedError, match="do not fit"):
            GLoRA(**{name: tensor(np.ones(size)) for name, size in (good | {role: shape}).items()})
