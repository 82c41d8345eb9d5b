"""AdaLoRA against PEFT's layers in float64: scale, pruned values, kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from tests.algorithms.checks import check_additive, tensor  # noqa: E402

from upparam.algorithms.adalora import MARGIN, AdaLoRA  # noqa: E402
from upparam.algorithms.base import ScaleRule, Scaling  # noqa: E402
from upparam.errors import MalformedError  # noqa: E402
from upparam.tensors import Tensor  # noqa: E402


def of_library(base: Any, alpha: float, rank: int = 5) -> tuple[AdaLoRA, Any]:
    """A layer of the library with random factors in float64, as our delta, and its dW."""
    model = torch.nn.Sequential(base)
    config = peft.AdaLoraConfig(init_r=rank, lora_alpha=alpha, total_step=10, target_modules=["0"])
    layer = peft.get_peft_model(model, config).base_model.model[0].double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for factors in (layer.lora_A, layer.lora_E, layer.lora_B):
            factors["default"].copy_(torch.randn(factors["default"].shape, generator=generator, dtype=torch.float64))
    scaling = Scaling(ScaleRule.ALPHA_OVER_RANK, alpha if alpha > 0 else rank, divisor=rank + MARGIN)
    delta = AdaLoRA(*(tensor(factors["default"]) for factors in (layer.lora_B, layer.lora_E, layer.lora_A)), scaling)
    return delta, layer.get_delta_weight("default")


@pytest.mark.parametrize("alpha", [8, 3, 0])
def test_dw_is_the_librarys(alpha: float) -> None:
    delta, true = of_library(torch.nn.Linear(7, 11), alpha)
    check_additive(delta, true, 1e-7 if alpha == 3 else 1e-12)


def test_kernels_lie_flat(alpha: float = 4) -> None:
    delta, true = of_library(torch.nn.Conv2d(3, 8, (3, 2)), alpha)
    assert delta.shape == (8, 18)
    check_additive(delta, true.reshape(8, 18))


def test_nothing_is_left_of_a_module_whose_values_were_all_pruned() -> None:
    delta = AdaLoRA(*(Tensor.of(np.ones(shape, np.float32)) for shape in ((6, 0), (0, 1), (0, 4))), Scaling(alpha=2.0, divisor=8.0))
    assert (delta.shape, delta.rank, delta.frobenius()) == ((6, 4), 0, 0.0)
    assert not delta.load().rows(0, 6).any()


@pytest.mark.parametrize(
    "shapes", [((6, 3), (2, 1), (2, 4)), ((6, 2), (3, 1), (2, 4)), ((6, 2), (2, 2), (2, 4)), ((6, 2, 1), (2, 1), (2, 4))]
)
def test_factors_that_do_not_fit_are_malformed(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(MalformedError, match="do not fit together"):
        AdaLoRA(*(Tensor.of(np.ones(shape, np.float32)) for shape in shapes))
