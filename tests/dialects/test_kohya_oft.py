"""sd-scripts' OFT: names and formula as networks/oft.py and oft_flux.py have them, written back bit for bit, and what their loader would pass over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tests.matrix import specimens
from tests.matrix.specimens import module, specimen, values

from upparam.adapter import Adapter, Target
from upparam.algorithms.base import ScaleRule, Scaling
from upparam.algorithms.oft import DiagOFT
from upparam.bases import inventory
from upparam.dialects.base import ReadOptions
from upparam.errors import DeadAdapterError, RefusedError
from upparam.operations.convert import convert, write_adapter
from upparam.operations.identify import identify
from upparam.operations.opening import open_adapter
from upparam.operations.proof import same_delta

STEM = "oft_unet_down_blocks_0_attentions_0_transformer_blocks_0_"
PATH = "unet.down_blocks.0.attentions.0.transformer_blocks.0."
WORDS = {"attn1_to_q": "attn1.to_q", "attn1_to_k": "attn1.to_k", "attn2_to_out_0": "attn2.to_out.0"}


def tensors(alpha: float = 0.001, words: tuple[str, ...] = tuple(WORDS), size: float = 0.05) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    found: dict[str, Any] = {}
    for word in words:
        found[f"{STEM}{word}.oft_blocks"] = (rng.standard_normal((4, 80, 80)) * size).astype(np.float32)
        found[f"{STEM}{word}.alpha"] = np.array(alpha, np.float32)
    return found


def turned(blocks: Any, alpha: float, weight: Any) -> Any:
    """networks/oft.py OFTModule.get_weight and merge_to, in float64."""
    blocks, count, side = blocks.astype(np.float64), *blocks.shape[:2]
    skew = blocks - blocks.swapaxes(1, 2)
    norm = np.linalg.norm(skew)
    skew *= (min(norm, alpha * len(weight)) + 1e-8) / (norm + 1e-8)
    turns = (np.eye(side) + skew) @ np.linalg.inv(np.eye(side) - skew)
    return np.einsum("knm,knp->kmp", turns, weight.reshape(count, side, -1)).reshape(weight.shape)


@pytest.mark.parametrize("size", [0.05, 0.0001])
def test_what_the_file_does_is_what_sd_scripts_does(size: float, tmp_path: Path) -> None:
    held = tensors(size=size)
    save_file(held, tmp_path / "oft.safetensors")
    adapter = open_adapter(tmp_path / "oft.safetensors")
    assert (adapter.dialect, adapter.layout) == ("kohya-oft", "reference") and not adapter.leftovers
    (report,) = identify(tmp_path / "oft.safetensors").adapters
    assert report.algorithms == {"diag-oft": 3}
    weight = np.random.default_rng(1).standard_normal((320, 24))
    for word, path in WORDS.items():
        delta = adapter.deltas[Target(PATH + path)]
        found = delta.load().merged(lambda start, stop: weight[start:stop].copy(), 0, 320)
        np.testing.assert_allclose(found, turned(held[f"{STEM}{word}.oft_blocks"], float(np.float32(0.001)), weight), rtol=0, atol=1e-7)
        assert not np.allclose(found, weight, atol=1e-5)


@pytest.mark.parametrize("form", [np.array(0.001, np.float32), np.array([0.25], np.float16)])
def test_written_back_bit_for_bit(form: Any, tmp_path: Path) -> None:
    held = {name: form if name.endswith("alpha") else array for name, array in tensors().items()}
    save_file(held, tmp_path / "oft.safetensors", {"ss_network_module": "networks.oft", "x": "y"})
    convert(tmp_path / "oft.safetensors", tmp_path / "again.safetensors", "kohya-oft")
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == held.keys()
    assert all(
        again[name].dtype == array.dtype and again[name].shape == array.shape and (again[name] == array).all()
        for name, array in held.items()
    )


def test_to_lycoris_and_back(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "oft.safetensors")
    convert(tmp_path / "oft.safetensors", tmp_path / "lycoris.safetensors", "lycoris")
    convert(tmp_path / "lycoris.safetensors", tmp_path / "again.safetensors", "kohya-oft")
    one, other = open_adapter(tmp_path / "oft.safetensors"), open_adapter(tmp_path / "again.safetensors")
    assert one.deltas.keys() == other.deltas.keys()
    assert all(same_delta(delta, other.deltas[target]) for target, delta in one.deltas.items())
    assert open_adapter(tmp_path / "again.safetensors").metadata["ss_network_module"] == "networks.oft"


def test_parts_of_flux_have_turns_of_their_own(tmp_path: Path) -> None:
    adapter = specimen("sd-scripts' OFT", "flux.1-dev")
    read = ReadOptions(base=inventory.load("flux.1-dev"))
    write_adapter(adapter, tmp_path / "flux.safetensors", "kohya-oft", read=read)
    held = load_file(tmp_path / "flux.safetensors")
    assert {name for name in held if "img_attn_qkv" in name} == {
        "oft_unet_double_blocks_0_img_attn_qkv.alpha", *(f"oft_unet_double_blocks_0_img_attn_qkv.oft_blocks.{part}" for part in range(3)),
    }  # fmt: skip
    assert [held[f"oft_unet_single_blocks_1_linear1.oft_blocks.{part}"].shape for part in range(4)] == [(4, 768, 768)] * 3 + [
        (4, 3072, 3072)
    ]
    again = open_adapter(tmp_path / "flux.safetensors", options=read)
    assert all(same_delta(delta, again.deltas[target]) for target, delta in adapter.deltas.items())
    del held["oft_unet_double_blocks_0_img_attn_qkv.oft_blocks.1"]
    save_file(held, tmp_path / "torn.safetensors")
    torn = open_adapter(tmp_path / "torn.safetensors", options=read)
    assert len(torn.leftovers) == 2 and "unknown-module" in {finding.code for finding in torn.findings}


def test_alpha_is_the_first_one_and_no_other(tmp_path: Path) -> None:
    held = tensors()
    held[f"{STEM}attn2_to_out_0.alpha"] = np.array(0.5, np.float32)
    save_file(held, tmp_path / "mixed.safetensors")
    adapter = open_adapter(tmp_path / "mixed.safetensors")
    assert {delta.constraint for delta in adapter.deltas.values() if isinstance(delta, DiagOFT)} == {float(np.float32(0.001))}
    assert "alphas-differ" in {finding.code for finding in adapter.findings}
    save_file(tensors(alpha=0.0), tmp_path / "none.safetensors")
    with pytest.raises(DeadAdapterError, match="limits every turn to none"):
        open_adapter(tmp_path / "none.safetensors")
    save_file({name: array for name, array in tensors().items() if not name.endswith("alpha")}, tmp_path / "lost.safetensors")
    with pytest.raises(DeadAdapterError, match="no alpha"):
        open_adapter(tmp_path / "lost.safetensors")


def turn(path: str, blocks: int = 4, limit: float = 0.001, base: str = "sd1.5") -> dict[Target, Any]:
    out = module(base, path).canonical[0]
    return {
        Target(path): DiagOFT(
            values((blocks, out // blocks, out // blocks), path), constraint=limit, scaling=Scaling(ScaleRule.BAKED, limit)
        )
    }


def test_what_its_loader_would_not_take_is_refused(tmp_path: Path) -> None:
    q, k = PATH + "attn1.to_q", PATH + "attn1.to_k"

    def refused(deltas: dict[Target, Any], why: str, base: str = "sd1.5") -> None:
        adapter: Adapter = specimens.adapter(base, deltas)
        with pytest.raises(RefusedError, match=why):
            write_adapter(adapter, tmp_path / "x.safetensors", "kohya-oft", read=ReadOptions(base=inventory.load(base)))
        assert not (tmp_path / "x.safetensors").exists()

    refused(turn(q) | turn(k, blocks=8), "blocks 8 beside 4")
    refused(turn(q) | turn(k, limit=0.25), "limit 0.25 beside 0.001")
    refused(turn(q, limit=0.0), "without a limit")
    refused(turn(PATH + "ff.net.2") | turn("unet.down_blocks.0.resnets.0.conv1"), "pass over it")
    refused(turn("unet.down_blocks.0.attentions.0.proj_in"), "pass over it")
    refused(turn("text_encoder.text_model.encoder.layers.0.self_attn.q_proj"), "no module of the denoiser")
    refused(turn("transformer.transformer_blocks.0.attn.to_q", base="flux.1-dev"), "of which .*to_k is not turned", "flux.1-dev")
    refused(turn("model.layers.0.self_attn.q_proj", base="llama-3-8b"), "SDXL and FLUX alone", "llama-3-8b")
    refused(specimens.plain("sd1.5").deltas, "a LoRA delta")
