"""Merges into diffusers folders equal what diffusers' own `fuse_lora` makes of the same pipeline, to within one rounding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.operations.merging import load

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("peft")

from tests.dialects import pipelines  # noqa: E402
from tests.dialects.test_diffusers_readers import everything, flux_layers  # noqa: E402

from upparam.dialects.base import ReadOptions  # noqa: E402
from upparam.operations.convert import write_adapter  # noqa: E402
from upparam.operations.merge import merge  # noqa: E402

NAMES = {"unet": "diffusion_pytorch_model", "transformer": "diffusion_pytorch_model", "text_encoder": "model", "text_encoder_2": "model"}


@pytest.mark.parametrize(("build", "wanted"), [(pipelines.sd15, everything), (pipelines.sdxl, everything), (pipelines.flux, flux_layers)])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_equal_to_fuse_lora(build: Callable[[], Any], wanted: Any, dtype: str, tmp_path: Path) -> None:
    pipe = build()
    for part in pipelines.components(pipe).values():
        part.to(getattr(torch, dtype))
    pipe.save_pretrained(tmp_path / "base")
    base = pipelines.base_of(pipe)
    adapter = pipelines.seeded(
        base, wanted, alpha=2.0, dtype=np.float16
    )  # factors fp16 holds: diffusers casts them to the pipeline's dtype
    write_adapter(adapter, tmp_path / "lora", "diffusers", read=ReadOptions(base=base))
    merge(tmp_path / "base", tmp_path / "lora", tmp_path / "ours")

    pipe.load_lora_weights(str(tmp_path / "lora"))
    pipe.fuse_lora(components=list(pipelines.components(pipe)))
    pipe.unload_lora_weights()
    changed = 0
    for component, part in pipelines.components(pipe).items():
        ours = load(tmp_path / "ours" / component / f"{NAMES[component]}.safetensors")
        before = load(tmp_path / "base" / component / f"{NAMES[component]}.safetensors")
        theirs = part.state_dict()
        for name, value in ours.items():
            # fuse_lora rounds the change and the sum, each in the stored dtype; ours is rounded once
            fused, one, old = (array.astype(np.float64) for array in (theirs[name].numpy(), value, before[name]))
            unit = 2.0**-11 if dtype == "float16" else 2.0**-23
            assert (
                np.abs(fused - one) <= unit * (2 * np.abs(one) + 2 * np.abs(one - old)) + (6e-8 if dtype == "float16" else 4e-9)
            ).all(), name
            changed += not np.array_equal(value, before[name])
    assert changed == len(adapter.deltas)
