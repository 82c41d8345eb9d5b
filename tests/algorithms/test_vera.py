"""VeRA against PEFT's layers in float64: slices of the shared projections, rows, parts of a fused weight."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from tests.algorithms.checks import check_additive, check_rows, close, dense, tensor  # noqa: E402

from upparam.algorithms.slicing import join  # noqa: E402
from upparam.algorithms.vera import VeRA  # noqa: E402
from upparam.errors import MalformedError, RefusedError  # noqa: E402
from upparam.tensors import Tensor  # noqa: E402


def of_library() -> list[tuple[VeRA, Any]]:
    """Two layers of the library that share projections, as our deltas, and their dW."""
    model = torch.nn.Sequential(torch.nn.Linear(7, 11), torch.nn.Linear(11, 5))
    wrapped = peft.get_peft_model(model, peft.VeraConfig(r=4, target_modules=["0", "1"])).double()
    generator = torch.Generator().manual_seed(0)
    found = []
    for layer in wrapped.base_model.model:
        with torch.no_grad():
            for vectors in (layer.vera_lambda_b, layer.vera_lambda_d):
                vectors["default"].copy_(torch.randn(vectors["default"].shape, generator=generator, dtype=torch.float64))
        up, down = tensor(layer.vera_B["default"]), tensor(layer.vera_A["default"])
        b, d = tensor(layer.vera_lambda_b["default"]), tensor(layer.vera_lambda_d["default"])
        found.append((VeRA(up.rows(0, b.shape[0]), down, b, d), layer.get_delta_weight("default")))
    return found


@pytest.mark.parametrize("index", [0, 1])
def test_dw_is_the_librarys(index: int) -> None:
    delta, true = of_library()[index]
    assert delta.shape == (len(true), 0) and delta.rank == 4
    known = delta.for_weight(tuple(true.shape))
    assert known.shape == tuple(true.shape)
    check_additive(known, true)
    check_rows(known, np.ones(tuple(true.shape)), 1, 4)


def test_its_width_is_never_guessed() -> None:
    delta, _ = of_library()[0]
    with pytest.raises(RefusedError, match="told by its weight alone"):
        delta.load()
    with pytest.raises(MalformedError, match="do not fit together"):
        delta.for_weight((11, 12))


def test_parts_of_a_fused_weight_join_where_they_share_what_inputs_meet() -> None:
    one, _ = of_library()[0]
    one = one.for_weight((11, 7))
    top, rest = one.cut_rows(0, 4), one.cut_rows(4, 11)
    joined = join([top, rest])
    close(dense(joined), dense(one))
    other = VeRA(rest.up, rest.down, rest.b, Tensor.of(np.ones(4)), rest.columns)
    with pytest.raises(RefusedError, match="cannot be joined"):
        join([top, other])
