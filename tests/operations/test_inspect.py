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
from upparam.dtypes import DTYPES
from upparam.errors import UsageError
from upparam.operations.inspect import file_hashes, inspect_file, module_stats, norms, singular_values


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 12), st.integers(0, 999))
def test_singular_values_are_those_of_the_product(out: int, into: int, rank: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    up, down = rng.standard_normal((out, rank)), rng.standard_normal((rank, into))
    full = np.linalg.svd(up @ down, compute_uv=False)
    found = singular_values(up, down)
    np.testing.assert_allclose(found[: len(full)], full[: len(found)], atol=1e-12 * full[0])


@pytest.mark.parametrize("size", [1.0, 1e-30, 1e30, 1e-158, 1e-170, 1e170])
@pytest.mark.parametrize("kind", ["random", "a rank twice", "ranks of zeros", "one rank", "nearly nothing left"])
def test_norms_are_those_of_the_product(kind: str, size: float) -> None:
    """Also where Gram matrices would lose them: singular, cancelling, too large or too small to be squared."""
    rng = np.random.default_rng(4)
    up, down = rng.standard_normal((40, 6)), rng.standard_normal((6, 30))
    if kind == "a rank twice":
        up[:, 3], down[3] = up[:, 2], down[2]
    elif kind == "ranks of zeros":
        up[:, 3:] = 0
    elif kind == "one rank":
        up, down = up[:, :1], down[:1]
    elif kind == "nearly nothing left":  # two that differ in the eighth digit, one taken from the other
        up, down = np.concatenate([up, -up], axis=1), np.concatenate([down, down * (1 + 1e-8 * rng.standard_normal(down.shape))])
    values = np.linalg.svd(up @ down if kind != "nearly nothing left" else up[:, :6] @ (down[:6] - down[6:]), compute_uv=False)
    frobenius, spectral = norms(up * size, down)
    exact = 1e-7 if kind == "nearly nothing left" else 1e-12
    assert frobenius / size == pytest.approx(np.sqrt((values**2).sum()), rel=exact)
    assert spectral / size == pytest.approx(values[0], rel=exact)
    assert norms(up * 0, down) == (0.0, 0.0)


@pytest.mark.parametrize("name", ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_zeros_and_what_is_not_finite_are_counted_in_every_dtype(name: str) -> None:
    dtype = DTYPES[name].numpy
    up = np.full((4, 6), 0.5).astype(dtype)
    up[0, :3], up[1, 2] = np.array([0.0, -0.0, 2.0**-9]).astype(dtype), np.nan
    expected = 1
    if name != "float8_e4m3fn":  # which has no infinity
        up[2, :2] = np.array([np.inf, -np.inf]).astype(dtype)
        expected = 3
    stats = module_stats(Target("m"), lora(up, np.ones((6, 3), np.float32).astype(dtype)))
    assert stats.nonfinite == expected and stats.zeros == pytest.approx(2 / 42)


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


def test_the_hash_the_trainer_stored(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {f"{stem}.lora_up.weight": np.ones((320, 4), np.float16), f"{stem}.lora_down.weight": np.ones((4, 320), np.float16)}
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    (hashes,) = inspect_file(path, hashes=True).hashes
    for stored, code in ((hashes.autov3, "hash-agrees"), ("00" * 32, "hash-differs")):
        save_file(tensors, path, metadata={"sshs_model_hash": str(stored)})
        found = inspect_file(path, hashes=True)
        assert [finding.code for finding in found.adapter.findings if finding.code.startswith("hash-")] == [code]
        assert found.hashes[0].autov3 == hashes.autov3 and found.hashes[0].sha256 != hashes.sha256


def test_a_member_of_an_archive_is_hashed_as_the_file_it_is(tmp_path: Path) -> None:
    import zipfile

    from safetensors.numpy import save

    data = save(
        {
            "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": np.ones((1280, 2), np.float32),
            "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": np.ones((2, 1280), np.float32),
        }
    )
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a/x.safetensors", data)
    (hashes,) = inspect_file(tmp_path / "x.zip", hashes=True).hashes
    start = 8 + int.from_bytes(data[:8], "little")
    assert (hashes.sha256, hashes.autov3) == (hashlib.sha256(data).hexdigest(), hashlib.sha256(data[start:]).hexdigest())


def test_totals_are_of_the_modules_shown(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    tensors = {}
    for layer in range(3):
        tensors[f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_A.weight"] = np.ones((layer + 1, 8), np.float32)
        tensors[f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_B.weight"] = np.ones((8, layer + 1), np.float32)
    tensors["base_model.model.model.layers.2.self_attn.q_proj.lora_B.weight"][0, 0] = np.nan
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    totals = inspect_file(tmp_path, "*.[12].*").facts()["totals"]
    assert (totals["targets"], totals["parameters"], totals["ranks"]) == (2, 80, [{"rank": 2, "count": 1}, {"rank": 3, "count": 1}])
    assert totals["frobenius_of"] == 1 and totals["nonfinite"] == 1
