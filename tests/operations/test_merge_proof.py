"""The proof of a merge: what is rightly rounded passes, one element that is not is named, wherever it lies."""

from __future__ import annotations

import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tests.operations.merging import adapter, lora, save

import upparam
from upparam.dtypes import DTYPES
from upparam.errors import VerificationError
from upparam.operations.merge import merge, proof
from upparam.operations.merge.proof import Sample, Samples, check_samples
from upparam.operations.merge.rounding import narrow
from upparam.tensors import Tensor

NAMES = ("bfloat16", "float16", "float32")


def made(rng: np.random.Generator, dtypes: list[str], columns: int) -> tuple[Samples, dict[str, np.ndarray]]:
    """Samples of as many tensors (6, columns) as dtypes, two rows of each, and the tensors as they are to be stored."""
    samples, stored = Samples(columns), {}
    for number, dtype in enumerate(dtypes):
        true = rng.standard_normal((6, columns))
        stored[f"t{number}"] = narrow(true, DTYPES[dtype])
        for row in (1, 4):
            first = int(rng.integers(0, columns))
            samples.kept.append(Sample(f"t{number}", row, slice(first, columns), true[row, first:]))
    return samples, stored


def checked(samples: Samples, stored: dict[str, np.ndarray], exact: bool = True) -> str:
    return check_samples(samples, {name: Tensor.of(array) for name, array in stored.items()}, exact)


@settings(deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.sampled_from(NAMES), min_size=1, max_size=5),
    st.integers(1, 40),
    st.sampled_from([1, 50, 1 << 15]),
)
def test_one_wrong_element_is_named(seed: int, dtypes: list[str], columns: int, batch: int) -> None:
    rng = np.random.default_rng(seed)
    samples, stored = made(rng, dtypes, columns)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proof, "_BATCH", batch)
        elements = sum(sample.true.size for sample in samples.kept)
        assert checked(samples, stored).startswith(f"{elements:,} elements in {2 * len(dtypes)} sampled rows")
        sample = samples.kept[int(rng.integers(0, len(samples.kept)))]
        column = int(rng.integers(sample.columns.start, columns))
        bits = stored[sample.name].view(np.uint32 if stored[sample.name].dtype == np.float32 else np.uint16)
        bits[sample.row, column] ^= 1  # a neighbour in its dtype
        with pytest.raises(VerificationError) as raised:
            checked(samples, stored)
    assert raised.value.tensor == f"{sample.name}[{sample.row}, {column}]"


def test_what_lies_outside_the_samples_is_not_looked_at() -> None:
    samples, stored = made(np.random.default_rng(0), ["bfloat16"], 8)
    stored["t0"][0] = 0
    checked(samples, stored)


def test_nan_for_a_number_is_wrong_and_nan_for_nan_right() -> None:
    true = np.array([1.0, np.nan, 3.0])
    samples = Samples(3, [Sample("t", 0, slice(0, 3), true)])
    checked(samples, {"t": true.astype(ml_dtypes.bfloat16)[None]})
    with pytest.raises(VerificationError):
        checked(samples, {"t": np.array([[np.nan, np.nan, 3.0]], ml_dtypes.bfloat16)})


def test_rows_without_elements() -> None:
    samples = Samples(0, [Sample("t", 0, slice(0, 0), np.empty(0))])
    assert checked(samples, {"t": np.empty((1, 0), np.float16)}).startswith("0 elements")


def test_float32_sums_are_allowed_their_error_only_where_the_check_was_left_out() -> None:
    true = np.array([1.0, 1.0 + 2.0**-8 + 2.0**-30])  # just above the middle of two bfloat16
    samples, stored = Samples(2, [Sample("t", 0, slice(0, 2), true)]), {"t": np.array([[1.0, 1.0]], ml_dtypes.bfloat16)}
    checked(samples, stored, exact=False)
    with pytest.raises(VerificationError):
        checked(samples, stored)


@pytest.mark.parametrize("hole", [np.nan, np.inf])
def test_a_base_with_holes_merges_and_keeps_them(tmp_path: Path, hole: float) -> None:
    rng = np.random.default_rng(0)
    name = "model.layers.0.self_attn.q_proj"
    weight = rng.standard_normal((4, 8)).astype(np.float16)
    weight[:, 3] = hole
    save_file({f"{name}.weight": weight}, tmp_path / "base.safetensors")
    up, down = rng.standard_normal((4, 2), np.float32), rng.standard_normal((2, 8), np.float32)
    lora = tmp_path / "lora"
    lora.mkdir()
    save_file(
        {f"base_model.model.{name}.lora_B.weight": up, f"base_model.model.{name}.lora_A.weight": down}, lora / "adapter_model.safetensors"
    )
    (lora / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}')
    upparam.merge(tmp_path / "base.safetensors", lora, tmp_path / "out.safetensors")
    merged = load_file(tmp_path / "out.safetensors")[f"{name}.weight"]
    true = narrow(weight.astype(np.float64) + up.astype(np.float64) @ down.astype(np.float64), DTYPES["float16"])
    np.testing.assert_array_equal(merged, true)
    np.testing.assert_array_equal(merged[:, 3], weight[:, 3])


def test_float64_is_not_said_to_be_rounded_once(tmp_path: Path) -> None:
    """Sums in float64 round at each step: elements near 0 are many units in the last place off, and the proof says what holds."""
    rng = np.random.default_rng(0)
    base = save(
        tmp_path / "b.safetensors",
        {"m.weight": rng.standard_normal((40, 64)), "n.weight": rng.standard_normal((40, 64)).astype(np.float32)},
    )
    factors = {name: lora(rng.standard_normal((40, 8)), rng.standard_normal((8, 64))) for name in "mn"}
    said = merge(base, adapter(factors), tmp_path / "o.safetensors").proofs[0]
    found = re.fullmatch(
        r"256 elements in 4 .* back: 0 wrongly rounded, largest error (0\.\d+) ulp, 128 of float64 within (\S+) of the largest of their row, as sums in float64 allow",
        said,
    )
    assert found is not None and float(found[1]) <= 0.5 and 0 < float(found[2]) < 2.0**-46
    said = merge(base, adapter({"m": factors["m"]}), tmp_path / "p.safetensors").proofs[0]
    assert "wrongly" not in said and "ulp" not in said and "128 of float64 within" in said
