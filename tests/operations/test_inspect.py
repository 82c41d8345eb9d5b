"""inspect: the numbers equal those of the materialised dW, and hashes those other tools print."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.operations.merging import lora

from upparam.adapter import Target
from upparam.errors import UsageError
from upparam.operations.inspect import file_hashes, inspect_file, module_stats, singular_values


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 12), st.integers(0, 999))
def test_singular_values_are_those_of_the_product(out: int, into: int, rank: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    up, down = rng.standard_normal((out, rank)), rng.standard_normal((rank, into))
    full = np.linalg.svd(up @ down, compute_uv=False)
    found = singular_values(up, down)
    np.testing.assert_allclose(found[: len(full)], full[: len(found)], atol=1e-12 * full[0])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_stats_of_a_module(dtype: Any) -> None:
    rng = np.random.default_rng(3)
    up, down = rng.standard_normal((24, 4)).astype(dtype), rng.standard_normal((4, 16)).astype(dtype)
    up[0] = 0
    stats = module_stats(Target("m"), lora(up, down, alpha=8.0))
    dense: NDArray[np.float64] = 2.0 * (up.astype(np.float64) @ down.astype(np.float64))
    values = np.linalg.svd(dense, compute_uv=False)
    assert stats.frobenius == pytest.approx(np.linalg.norm(dense), rel=1e-12)
    assert stats.spectral == pytest.approx(values[0], rel=1e-12)
    assert stats.stable_rank == pytest.approx((values**2).sum() / values[0] ** 2, rel=1e-12)
    assert stats.zeros == pytest.approx(4 / (24 * 4 + 4 * 16))
    assert (stats.rank, stats.alpha, stats.scale, stats.dead, stats.nonfinite) == (4, 8.0, 2.0, (), 0)


def test_not_finite_elements_are_counted_and_norms_left_out() -> None:
    up = np.ones((4, 2), np.float32)
    up[1, 1], up[2, 0] = np.nan, np.inf
    stats = module_stats(Target("m"), lora(up, np.zeros((2, 3), np.float32)))
    assert (stats.nonfinite, stats.frobenius, stats.spectral, stats.dead) == (2, None, None, ("down",))


def test_hashes_are_those_of_the_bytes(corpus: Path) -> None:
    path = corpus / "sd-vfph55" / "pytorch_lora_weights.safetensors"
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    found = file_hashes(path, start)
    assert found.sha256 == hashlib.sha256(data).hexdigest()
    assert found.autov3 == hashlib.sha256(data[start:]).hexdigest()
    assert found.legacy == hashlib.sha256(data[0x100000 : 0x100000 + 0x10000]).hexdigest()[:8]


def test_hashes_of_a_short_file_and_of_one_without_header(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.zeros(3))
    found = file_hashes(path, None)
    assert found.autov3 is None
    assert found.legacy == hashlib.sha256(b"").hexdigest()[:8]


def test_a_glob_chooses_modules_and_one_that_matches_none_is_said(corpus: Path) -> None:
    path = corpus / "peft-gpt2"
    found = inspect_file(path, "*h.3.*")
    assert [module.target for module in found.modules] == ["transformer.h.3.attn.c_attn"]
    with pytest.raises(UsageError, match="no target matches"):
        inspect_file(path, "*nowhere*")


def test_metadata_and_config_are_verbatim(corpus: Path) -> None:
    import json

    folder = corpus / "peft-gpt2"
    facts = inspect_file(folder, hashes=True).facts()
    assert facts["config"] == json.loads((folder / "adapter_config.json").read_text())
    assert facts["hashes"][0]["sha256"] == hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert facts["totals"]["targets"] == 12
    assert facts["totals"]["frobenius"] == pytest.approx(sum(module["frobenius"] ** 2 for module in facts["modules"]) ** 0.5)
