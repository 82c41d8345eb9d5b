"""The proof that follows every conversion: it passes what is the same and stops what is not, however small the difference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.operations.merging import adapter, lora

from upparam.adapter import Extra, ExtraKind, Target
from upparam.algorithms.base import UNKNOWN
from upparam.algorithms.lora import LoRA
from upparam.errors import VerificationError
from upparam.operations.proof import distance, prove_same
from upparam.tensors import Tensor


def factors(seed: int = 0, out: int = 12, into: int = 10, rank: int = 3) -> tuple[NDArray[Any], NDArray[Any]]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((out, rank)).astype(np.float32), rng.standard_normal((rank, into)).astype(np.float32)


def test_the_same_bits_and_scale_pass() -> None:
    one = adapter({"m": lora(*factors(), alpha=6.0)})
    assert "1 of 1 modules bit-identical" in prove_same(one, adapter({"m": lora(*factors(), alpha=6.0)}))[0]


def test_one_flipped_bit_of_a_factor_is_found() -> None:
    up, down = factors()
    other = up.copy()
    other.view(np.uint32)[5, 1] ^= 1 << 20
    with pytest.raises(VerificationError, match="dW read back differs"):
        prove_same(adapter({"m": lora(up, down)}), adapter({"m": lora(other, down)}))


def test_another_scale_is_found() -> None:
    with pytest.raises(VerificationError, match="dW read back differs"):
        prove_same(adapter({"m": lora(*factors(), alpha=6.0)}), adapter({"m": lora(*factors(), alpha=6.001)}))


@pytest.mark.parametrize("names", [("m",), ("m", "n", "o")])
def test_missing_and_added_targets_are_found(names: tuple[str, ...]) -> None:
    with pytest.raises(VerificationError, match="targets read back differ"):
        prove_same(adapter({"m": lora(*factors()), "n": lora(*factors(1))}), adapter({name: lora(*factors()) for name in names}))


def test_leftovers_of_what_was_written_are_found() -> None:
    one = adapter({"m": lora(*factors())})
    with pytest.raises(VerificationError, match="unexplained"):
        prove_same(one, adapter({"m": lora(*factors())}, leftovers={"x": Tensor.of(np.zeros(1))}))


def test_extras_are_compared_bit_for_bit() -> None:
    def having(value: float) -> Any:
        extra = Extra(ExtraKind.SAVED_MODULE, "head.weight", Tensor.of(np.full((2, 2), value, np.float32)))
        return adapter({"m": lora(*factors())}, extras=[extra])

    assert "1 extra bit-identical" in prove_same(having(1.0), having(1.0))
    for other in (having(np.nextafter(np.float32(1), np.float32(2))), adapter({"m": lora(*factors())})):
        with pytest.raises(VerificationError, match="saved-module"):
            prove_same(having(1.0), other)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 11), st.integers(0, 99))
def test_a_whole_module_equals_its_row_slices(cut: int, seed: int) -> None:
    up, down = factors(seed)
    whole = adapter({"m": lora(up, down, alpha=6.0)})
    parts = adapter(
        {Target("m", (0, cut)): lora(up[:cut].copy(), down, alpha=6.0), Target("m", (cut, 12)): lora(up[cut:].copy(), down, alpha=6.0)}
    )
    assert "equal in dW" in prove_same(whole, parts)[0]
    assert distance(whole.deltas, parts.deltas) == 0.0


def test_the_distance_is_that_of_the_materialised_dw() -> None:
    (up, down), (up2, down2) = factors(0), factors(1)
    dense = [2.0 * (u.astype(np.float64) @ d.astype(np.float64)) for u, d in ((up, down), (up2, down2))]
    found = distance(adapter({"m": lora(up, down, alpha=6.0)}).deltas, adapter({"m": lora(up2, down2, alpha=6.0)}).deltas)
    assert found == pytest.approx(np.linalg.norm(dense[0] - dense[1]) / np.linalg.norm(dense[0]), rel=1e-12)


def test_unknown_scales_pass_only_as_the_same_bits() -> None:
    up, down = factors()
    one = adapter({"m": LoRA(Tensor.of(up), Tensor.of(down), UNKNOWN)})
    assert prove_same(one, adapter({"m": LoRA(Tensor.of(up), Tensor.of(down), UNKNOWN)}))
    with pytest.raises(VerificationError):
        prove_same(one, adapter({"m": lora(up, down)}))
