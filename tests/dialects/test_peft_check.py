"""Where a config and the tensors beside it disagree, what is said is what PEFT does."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402
from tests.dialects.test_peft import TOKENS, llama, output, repeatable  # noqa: E402
from tests.dialects.test_peft_forms import adapted  # noqa: E402

from upparam.errors import RefusedError  # noqa: E402
from upparam.operations.convert import convert  # noqa: E402
from upparam.operations.opening import open_adapter  # noqa: E402
from upparam.operations.verify import verify  # noqa: E402


def saved(folder: Path, settings: dict[str, Any], **training: Any) -> Path:
    """An adapter that PEFT saved, and its config changed afterwards: keys set to Ellipsis are taken out."""
    adapted(BASE(), folder, target_modules=["q_proj", "v_proj"], **training)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    return folder


BASE = repeatable(llama)


def in_peft(folder: Path) -> Any:
    """What the library computes with the adapter; raises what it raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return output(peft.PeftModel.from_pretrained(BASE(), folder), TOKENS)


def codes(folder: Path) -> set[str]:
    return {finding.code for finding in verify(folder).findings}


def test_targets_that_leave_factors_out(tmp_path: Path) -> None:
    whole, less = saved(tmp_path / "whole", {}), saved(tmp_path / "less", {"target_modules": ["q_proj"]})
    only = saved(tmp_path / "only", {"target_modules": ["q_proj"]})
    kept = {name: tensor for name, tensor in load_file(only / "adapter_model.safetensors").items() if "q_proj" in name}
    save_file(kept, only / "adapter_model.safetensors")
    assert torch.equal(in_peft(less), in_peft(only)) and not torch.equal(in_peft(less), in_peft(whole))
    assert "not-targeted" in codes(less) and not verify(less).sound
    for sound in (whole, only):
        assert "not-targeted" not in codes(sound) and verify(sound).sound
    for pattern in (r".*\.(q|v)_proj", "all-linear", ["self_attn.q_proj", "v_proj"]):
        assert "not-targeted" not in codes(saved(tmp_path / "said", {"target_modules": pattern})), pattern


@pytest.mark.parametrize(("settings", "code"), [({"r": None}, "rank-missing"), ({"r": ...}, "rank-missing"), ({"r": 8}, "rank-differs")])
def test_ranks_with_which_the_library_loads_nothing(tmp_path: Path, settings: dict[str, Any], code: str) -> None:
    folder = saved(tmp_path / "adapter", settings)
    with pytest.raises((TypeError, RuntimeError)):
        in_peft(folder)
    assert code in codes(folder) and not verify(folder).sound


def test_an_absent_alpha_is_what_the_library_takes(tmp_path: Path) -> None:
    silent, eight = saved(tmp_path / "silent", {"lora_alpha": ...}), saved(tmp_path / "eight", {"lora_alpha": 8})
    assert torch.equal(in_peft(silent), in_peft(eight))
    assert "alpha-missing" in codes(silent) and "alpha-missing" not in codes(eight)


def test_a_dora_without_magnitudes_is_no_plain_lora(tmp_path: Path) -> None:
    plain, started = saved(tmp_path / "plain", {}), saved(tmp_path / "started", {"use_dora": True})
    assert not torch.allclose(in_peft(plain), in_peft(started), atol=1e-4)
    (reason,) = open_adapter(started).conditions
    assert "modules have no magnitude" in reason
    assert not open_adapter(plain).conditions
    with pytest.raises(RefusedError, match="no plain LoRA"):
        convert(started, tmp_path / "out.safetensors", "kohya")


def test_magnitudes_the_config_does_not_own_are_left_out_by_the_library(tmp_path: Path) -> None:
    dora, denied = saved(tmp_path / "dora", {}, use_dora=True), saved(tmp_path / "denied", {"use_dora": False}, use_dora=True)
    bare = saved(tmp_path / "bare", {"use_dora": False}, use_dora=True)
    kept = {name: tensor for name, tensor in load_file(bare / "adapter_model.safetensors").items() if "magnitude" not in name}
    save_file(kept, bare / "adapter_model.safetensors")
    assert torch.equal(in_peft(denied), in_peft(bare)) and not torch.equal(in_peft(denied), in_peft(dora))
    assert "magnitudes-unused" in codes(denied) and "magnitudes-unused" not in codes(dora)
