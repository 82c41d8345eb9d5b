"""Where there is one of a thing, its word is singular."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from upparam.operations.compare import compare
from upparam.report.comparison import comparison_text


def test_comparisons_of_one_module_or_weight(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, module in (("a", "lora_unet_x"), ("b", "lora_unet_y")):
        pair = {f"{module}.lora_down.weight": rng.standard_normal((2, 8)), f"{module}.lora_up.weight": rng.standard_normal((8, 2))}
        save_file({key: value.astype(np.float32) for key, value in pair.items()}, tmp_path / f"{name}.safetensors")
        weights = {"layers.0.q_proj.weight": rng.standard_normal((64, 64)), "layers.0.k_proj.weight": np.ones((64, 64))}
        save_file({key: value.astype(np.float32) for key, value in weights.items()}, tmp_path / f"model_{name}.safetensors")
    one, other = (tmp_path / f"{name}.safetensors" for name in "ab")
    assert "its one module" in compare(one, one).summary
    assert "1 module only in the first, 1 module only in the second" in compare(one, other).summary
    models = comparison_text(compare(tmp_path / "model_a.safetensors", tmp_path / "model_b.safetensors"))
    assert "1 weight bit-equal · 1 weight different" in models
