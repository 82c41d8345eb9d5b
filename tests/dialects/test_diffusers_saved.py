"""Adapters that diffusers itself saves, with PEFT's config in their header, are read whole and stay what they are in other dialects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

from tests.dialects import pipelines  # noqa: E402
from tests.dialects.test_diffusers_readers import close, loaded  # noqa: E402

from upparam.bases.find import find_base  # noqa: E402
from upparam.dialects.base import ReadOptions  # noqa: E402
from upparam.operations.convert import convert  # noqa: E402
from upparam.operations.merge import merge  # noqa: E402
from upparam.operations.opening import open_adapter  # noqa: E402
from upparam.operations.verify import verify  # noqa: E402

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj"]


def randomised(part: Any, seed: int) -> None:
    """Random factors, and magnitudes other than the base's norms, in every layer."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in part.named_parameters():
        if "magnitude" in name:
            value.data = value.data * (1 + 0.2 * torch.rand(value.shape, generator=generator))
        elif "lora_" in name:
            value.data = torch.randn(value.shape, generator=generator) * 0.08


def saved(pipe: Any, path: Path, text: bool, **config: Any) -> list[Any]:
    """Save an adapter over the denoiser (and the text encoders) with diffusers; what the pipeline computes with it."""
    more = {}
    for number, (component, part) in enumerate(pipelines.components(pipe).items()):
        if component.startswith("text_encoder"):
            if not text:
                continue
            part.add_adapter(peft.LoraConfig(r=2, lora_alpha=3, target_modules=TEXT))
        else:
            part.add_adapter(peft.LoraConfig(**config))
        randomised(part, number)
        more[f"{component}_lora_layers"] = peft.get_peft_model_state_dict(part)
        more[f"{component}_lora_adapter_metadata"] = part.peft_config["default"].to_dict()
    pipe.save_lora_weights(path, **more)
    return pipelines.outputs(pipe)


def from_folder(pipe: Any, path: Path) -> Any:
    """The pipeline with the weights of a folder."""
    for component, part in pipelines.components(pipe).items():
        setattr(pipe, component, type(part).from_pretrained(path / component))
    return pipe


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "np") as file:
        return dict(file.metadata())


def test_kohyas_file_has_no_second_scale_in_its_header(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """diffusers refuses a file with alphas and a config, or applies both."""
    expected = saved(pipelines.sd15(), tmp_path / "a", True, r=4, lora_alpha=2, target_modules=ATTENTION)
    base = pipelines.base_of(pipelines.sd15())
    convert(tmp_path / "a", tmp_path / "b.safetensors", "kohya", read=ReadOptions(base=base))
    assert "lora_adapter_metadata" not in metadata(tmp_path / "b.safetensors")
    close(loaded(pipelines.sd15(), tmp_path / "b.safetensors", caplog), expected)


@pytest.mark.parametrize("dialect", ["diffusers", "peft"])
def test_hashes_of_kohyas_bytes_stay_behind(dialect: str, tmp_path: Path) -> None:
    saved(pipelines.sd15(), tmp_path / "a", False, r=4, lora_alpha=2, target_modules=ATTENTION)
    options = ReadOptions(base=pipelines.base_of(pipelines.sd15()))
    convert(tmp_path / "a", tmp_path / "b.safetensors", "kohya", read=options)
    assert "sshs_model_hash" in metadata(tmp_path / "b.safetensors")
    convert(tmp_path / "b.safetensors", tmp_path / "c", dialect, read=options)
    found = metadata(next((tmp_path / "c").glob("*.safetensors")))
    assert found["ss_network_dim"] == "4" and not [key for key in found if key.startswith("sshs_")]


def test_text_encoders_as_transformers_5_names_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Modules without `text_model.` are CLIP's, in adapters and in pipelines; the same file is written again."""
    pipe = pipelines.sdxl()
    pipe.save_pretrained(tmp_path / "base")
    expected = saved(pipe, tmp_path / "a", True, r=4, lora_alpha=4, target_modules=ATTENTION)
    source = tmp_path / "a" / "pytorch_lora_weights.safetensors"
    with safe_open(source, "np") as file:
        names = set(file.keys())
    assert "text_encoder.encoder.layers.0.self_attn.q_proj.lora_A.weight" in names
    adapter = open_adapter(source)
    assert {target.module.split(".")[1] for target in adapter.deltas if target.module.startswith("text_")} == {"text_model"}

    options = ReadOptions(base=find_base(str(tmp_path / "base")))
    assert not [finding for finding in verify(tmp_path / "a", options=options).findings if finding.severity]
    convert(tmp_path / "a", tmp_path / "k.safetensors", "kohya", read=options)
    with safe_open(tmp_path / "k.safetensors", "np") as file:
        assert {f"lora_te{n}_text_model_encoder_layers_1_self_attn_q_proj.lora_up.weight" for n in "12"} <= set(file.keys())
    close(loaded(pipelines.sdxl(), tmp_path / "k.safetensors", caplog), expected)

    convert(tmp_path / "a", tmp_path / "d", "diffusers", read=options)
    with safe_open(tmp_path / "d" / source.name, "np") as file:
        assert set(file.keys()) == names
    merge(tmp_path / "base", source, tmp_path / "merged")
    close(pipelines.outputs(from_folder(pipelines.sdxl(), tmp_path / "merged")), expected)


def test_magnitudes_of_convolutions(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """PEFT keeps them as (1, out, 1, 1), which of a square convolution is no norm for each input."""
    pipe = pipelines.sd15()
    pipe.save_pretrained(tmp_path / "base")
    expected = saved(pipe, tmp_path / "a", False, r=4, lora_alpha=2, target_modules=["conv1", "conv2", "conv_shortcut"], use_dora=True)
    options = ReadOptions(base=find_base(str(tmp_path / "base")))
    convert(tmp_path / "a", tmp_path / "c.safetensors", "comfyui", read=options)
    convert(tmp_path / "c.safetensors", tmp_path / "d", "diffusers", read=options)
    close(loaded(pipelines.sd15(), tmp_path / "d", caplog), expected)
    merge(tmp_path / "base", tmp_path / "a", tmp_path / "merged")
    close(pipelines.outputs(from_folder(pipelines.sd15(), tmp_path / "merged")), expected)
