"""What a combination's metadata says: what its adapters agree on and is true of it, and nothing of one training."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from upparam.operations.combine import combine

NAME = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
SAME = {
    "ss_base_model_version": "sd_v1", "ss_v2": "False", "ss_resolution": "(512, 512)", "ss_network_module": "networks.lora",
    "ss_network_dim": "4", "ss_network_alpha": "4", "ss_steps": "100", "ss_learning_rate": "0.0001", "sshs_model_hash": "0" * 64,
    "sshs_legacy_hash": "0" * 8, "modelspec.sai_model_spec": "1.0.1", "modelspec.architecture": "stable-diffusion-v1/lora",
}  # fmt: skip


def saved(path: Path, metadata: dict[str, str], rank: int = 4) -> Path:
    rng = np.random.default_rng(rank)
    save_file(
        {f"{NAME}.lora_down.weight": rng.standard_normal((rank, 1280)).astype(np.float32),
         f"{NAME}.lora_up.weight": rng.standard_normal((1280, rank)).astype(np.float32),
         f"{NAME}.alpha": np.array(4.0, np.float32)}, path, metadata,
    )  # fmt: skip
    return path


def header(path: Path) -> dict[str, str]:
    with safe_open(path, "np") as file:
        return dict(file.metadata())


def test_what_agrees_is_kept_and_what_follows_from_the_result_is_made_anew(tmp_path: Path) -> None:
    one = saved(tmp_path / "one.safetensors", SAME | {"ss_clip_skip": "1", "ss_output_name": "one", "modelspec.title": "Ink"})
    two = saved(tmp_path / "two.safetensors", SAME | {"ss_clip_skip": "2", "ss_output_name": "two", "modelspec.title": "Ash"}, rank=2)
    receipt = combine([(one, 1.0), (two, 1.0)], tmp_path / "both.safetensors")
    found = header(tmp_path / "both.safetensors")
    kept = ("ss_base_model_version", "ss_v2", "ss_resolution", "ss_network_module", "modelspec.sai_model_spec", "modelspec.architecture")
    assert {key: found[key] for key in kept} == {key: SAME[key] for key in kept}
    assert not found.keys() & {"ss_steps", "ss_learning_rate", "ss_clip_skip", "ss_output_name"}
    assert found["ss_network_dim"] == "6"
    assert found["modelspec.merged_from"] == "Ink, Ash"
    data = (tmp_path / "both.safetensors").read_bytes()
    assert found["sshs_model_hash"] == hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    (said,) = [finding for finding in receipt.findings if finding.code == "metadata"]
    assert "ss_v2" in said.evidence[0]
    assert "ss_steps" in said.evidence[1]


def test_what_one_alone_says_is_not_said_of_both(tmp_path: Path) -> None:
    one = saved(tmp_path / "one.safetensors", SAME)
    two = saved(tmp_path / "two.safetensors", {"ss_v2": "False"})
    combine([(one, 1.0), (two, 0.5)], tmp_path / "both.safetensors")
    assert header(tmp_path / "both.safetensors") == {"ss_v2": "False"}


def test_the_container_s_own_note_stays(tmp_path: Path) -> None:
    one, two = saved(tmp_path / "one.safetensors", {"format": "pt"}), saved(tmp_path / "two.safetensors", {"format": "pt"})
    receipt = combine([(one, 1.0), (two, 1.0)], tmp_path / "both.safetensors")
    assert header(tmp_path / "both.safetensors") == {"format": "pt"}
    assert not [finding for finding in receipt.findings if finding.code == "metadata"]
