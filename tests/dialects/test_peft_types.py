"""Every value of the installed library's PeftType is read or named and refused with a reason; none is ever taken for a LoRA."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from safetensors.torch import load_file, save_file  # noqa: E402
from tests.dialects.test_peft import llama  # noqa: E402

from upparam.dialects.peft_kinds import KNOWN_TYPES  # noqa: E402
from upparam.dialects.peft_others import OTHERS  # noqa: E402
from upparam.errors import NotAnAdapterError  # noqa: E402
from upparam.operations.identify import identify  # noqa: E402
from upparam.operations.opening import open_adapter  # noqa: E402

TYPES = sorted(kind.value for kind in peft.PeftType)
PLAIN = {"target_modules": ["q_proj"]}
MADE: dict[str, dict[str, Any]] = {
    "BEFT": {"target_modules": ["v_proj"]}, "C3A": PLAIN | {"block_size": 8}, "DEFT": PLAIN, "DELORA": PLAIN, "FOURIERFT": PLAIN | {"n_frequency": 5},
    "GLORA": PLAIN, "GRALORA": PLAIN | {"r": 8, "gralora_k": 2}, "HIRA": PLAIN, "HRA": PLAIN, "LILY": PLAIN,
    "LN_TUNING": {"target_modules": ["input_layernorm"]}, "MISS": PLAIN | {"r": 4}, "OSF": PLAIN, "PEANUT": PLAIN, "PSOFT": PLAIN | {"r": 4},
    "PVERA": PLAIN | {"r": 4}, "RANDLORA": PLAIN | {"r": 4}, "ROAD": PLAIN | {"group_size": 4}, "SHIRA": PLAIN | {"r": 4},
    "TINYLORA": PLAIN | {"r": 2}, "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [1, 2]},
    "VBLORA": PLAIN | {"num_vectors": 8, "vector_length": 16, "topk": 2}, "WAVEFT": PLAIN | {"n_frequency": 5},
}  # fmt: skip
"""Methods whose real files are made here, by the settings that make one of a tiny model."""


def test_every_type_has_a_statement() -> None:
    assert set(TYPES) <= KNOWN_TYPES | OTHERS.keys()
    assert not KNOWN_TYPES & OTHERS.keys()


@pytest.mark.parametrize("kind", sorted(OTHERS))
def test_a_type_is_refused_by_its_config_whatever_its_tensors_are_called(kind: str, tmp_path: Path) -> None:
    """Even factors of plain LoRA names are not read as LoRA where the config says that they are something else."""
    tensors = {f"base_model.model.a.b.lora_{half}.weight": torch.ones(4, 4) for half in "AB"}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind, "r": 4, "lora_alpha": 4}))
    with pytest.raises(NotAnAdapterError, match=f"PEFT's {kind}: {OTHERS[kind].what[:12]}") as refused:
        open_adapter(tmp_path)
    assert refused.value.remedy


def test_a_type_of_the_future_is_refused(tmp_path: Path) -> None:
    save_file({f"base_model.model.a.b.lora_{half}.weight": torch.ones(4, 4) for half in "AB"}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "NEXTLORA", "r": 4, "lora_alpha": 4}))
    with pytest.raises(NotAnAdapterError, match="does not know PEFT's NEXTLORA"):
        open_adapter(tmp_path)


@pytest.mark.parametrize("kind", sorted(MADE))
def test_real_files_are_named_with_and_without_their_config(kind: str, tmp_path: Path) -> None:
    config = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)](**MADE[kind])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(llama(), config).save_pretrained(tmp_path)
    with pytest.raises(NotAnAdapterError, match=f"PEFT's {kind}: "):
        open_adapter(tmp_path)
    report = identify(tmp_path)
    assert [adapter.kind for adapter in report.adapters] == ["unsupported-adapter"], load_file(
        tmp_path / "adapter_model.safetensors"
    ).keys()
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(NotAnAdapterError, match=f"PEFT's {kind}: "):
        open_adapter(tmp_path)
