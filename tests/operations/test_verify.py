"""verify: sound adapters pass; each thing that can be wrong with one has its own finding, and the exit code says it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.operations.merging import save

from upparam.errors import DeadAdapterError, UpparamError
from upparam.operations.verify import verify

STEM = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"


def peft(folder: Path, layers: int = 2, rank: int = 4, change: dict[str, NDArray[Any]] | None = None, **config: Any) -> Path:
    rng = np.random.default_rng(1)
    tensors = {}
    for layer in range(layers):
        tensors[STEM.format(layer, "A")] = (rng.standard_normal((rank, 16)) * 0.1).astype(np.float32)
        tensors[STEM.format(layer, "B")] = (rng.standard_normal((24, rank)) * 0.1).astype(np.float32)
    save(folder / "adapter_model.safetensors", tensors | (change or {}))
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["q_proj"]} | config
    (folder / "adapter_config.json").write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))
    return folder


def codes(path: Path, **more: Any) -> dict[str, str]:
    return {finding.code: finding.severity.name.lower() for finding in verify(path, **more).findings}


def test_a_sound_adapter(tmp_path: Path) -> None:
    verdict = verify(peft(tmp_path / "a"))
    assert verdict.sound and verdict.exit_code == 0 and verdict.targets == 2
    assert "sound" in {finding.code for finding in verdict.findings}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_finite(tmp_path: Path, value: float) -> None:
    up = np.ones((24, 4), np.float32)
    up[3, 1] = value
    found = codes(peft(tmp_path / "a", change={STEM.format(1, "B"): up}))
    assert found["not-finite"] == "error" and "sound" not in found


def test_untrained(tmp_path: Path) -> None:
    zero = np.zeros((24, 4), np.float32)
    assert codes(peft(tmp_path / "all", change={STEM.format(layer, "B"): zero for layer in range(2)}))["untrained"] == "error"
    assert codes(peft(tmp_path / "one", change={STEM.format(1, "B"): zero}))["partly-untrained"] == "warning"


def test_scales(tmp_path: Path) -> None:
    assert codes(peft(tmp_path / "zero", lora_alpha=0))["scale-zero"] == "error"
    assert codes(peft(tmp_path / "high", lora_alpha=4000))["scale-implausible"] == "warning"


def test_an_unknown_scale_is_an_error_until_it_is_given(tmp_path: Path) -> None:
    from upparam.dialects.base import ReadOptions

    folder = peft(tmp_path / "a")
    (folder / "adapter_config.json").unlink()
    assert not verify(folder).sound
    assert verify(folder, options=ReadOptions(alpha=8.0)).sound


def test_an_implausible_norm(tmp_path: Path) -> None:
    huge = np.full((24, 4), 1e4, np.float32)
    assert codes(peft(tmp_path / "a", change={STEM.format(0, "B"): huge}))["norm-implausible"] == "warning"


def test_a_missing_partner_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    save(folder / "adapter_model.safetensors", {STEM.format(0, "A"): np.ones((4, 16), np.float32)})
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}))
    with pytest.raises(DeadAdapterError, match="lora_B"):
        verify(folder)


def test_against_a_base(tmp_path: Path) -> None:
    folder = peft(tmp_path / "a")
    good = {f"model.layers.{layer}.self_attn.q_proj.weight": np.ones((24, 16), np.float32) for layer in range(2)}
    assert codes(folder, base=save(tmp_path / "good.safetensors", good))["fits"] == "info"
    other = {name: np.ones((24, 17), np.float32) for name in good}
    assert codes(folder, base=save(tmp_path / "other.safetensors", other))["does-not-fit"] == "error"
    few = dict(list(good.items())[:1])
    assert codes(folder, base=save(tmp_path / "few.safetensors", few))["does-not-fit"] == "error"


def test_every_adapter_of_the_corpus_that_says_its_scale_is_sound(corpus: Path) -> None:
    for folder in ("peft-gpt2", "peft-distilbert-imdb", "peft-bloom", "peft-sd-unet", "sd15-haseebae", "sd-vfph55", "cloneofsimo"):
        verdict = verify(corpus / folder)
        assert verdict.sound, (folder, [finding.message for finding in verdict.findings])


def test_a_truncated_file_is_malformed(tmp_path: Path) -> None:
    folder = peft(tmp_path / "a")
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UpparamError) as caught:
        verify(folder)
    assert caught.value.exit_code == 3


def test_what_many_targets_share_is_said_once(tmp_path: Path) -> None:
    many = peft(tmp_path / "zero", layers=20, lora_alpha=0)
    (finding,) = [finding for finding in verify(many).findings if finding.code == "scale-zero"]
    assert "20 of 20 targets" in finding.message


def test_lost_data_is_not_called_untrained(tmp_path: Path) -> None:
    blank = {STEM.format(1, "A"): np.zeros((4, 16), np.float32), STEM.format(1, "B"): np.zeros((24, 4), np.float32)}
    found = codes(peft(tmp_path / "a", change=blank))
    assert found["blank"] == "error" and "partly-untrained" not in found


def test_integer_factors_are_not_sound(tmp_path: Path) -> None:
    whole = {STEM.format(layer, half): np.ones(shape, np.int8) for layer in range(2) for half, shape in (("A", (4, 16)), ("B", (24, 4)))}
    assert codes(peft(tmp_path / "a", change=whole))["integer-factors"] == "error"


def test_names_wrapped_twice_and_ranks_that_differ_are_errors(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    save(
        tmp_path / "a" / "adapter_model.safetensors",
        {"base_model.model." + STEM.format(0, half): rng.random(shape) for half, shape in (("A", (4, 16)), ("B", (24, 4)))},
    )
    (tmp_path / "a" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj"]})
    )
    found = codes(tmp_path / "a")
    assert found["wrapped-twice"] == "error" and found["rank-differs"] == "error"
