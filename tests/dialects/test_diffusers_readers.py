"""diffusers itself loads what we write, completely, and computes what merging by hand computes."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("peft")

from safetensors import safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from tests.dialects import pipelines  # noqa: E402

from upparam.dialects.base import ReadOptions  # noqa: E402
from upparam.dialects.carried import ADAPTER_CONFIG  # noqa: E402
from upparam.operations.convert import convert, write_adapter  # noqa: E402
from upparam.operations.opening import open_adapter  # noqa: E402


def everything(path: str) -> bool:
    """What adapters of SD train: attention, feed-forward, projections, convolutions of ResNets, and text layers."""
    return any(part in path for part in (".attn", ".ff", "self_attn", "mlp.fc", "proj_in", "proj_out", ".conv1", ".conv2", "samplers"))


def attention(path: str) -> bool:
    return any(path.endswith(part) for part in ("to_q", "to_k", "to_v", "to_out.0", "_proj"))


def flux_layers(path: str) -> bool:
    return ("blocks." in path and "norm_" not in path) or "self_attn" in path


CASES = [
    (pipelines.sd15, "diffusers", everything),
    (pipelines.sd15, "kohya", everything),
    (pipelines.sdxl, "diffusers", everything),
    (pipelines.sdxl, "kohya", everything),
    (pipelines.flux, "diffusers", flux_layers),
]


def loaded(pipe: Any, path: Path, caplog: pytest.LogCaptureFixture) -> list[Any]:
    """The pipeline's outputs after it has loaded a file, with no word about keys it did not use."""
    logging.getLogger("diffusers").propagate = True
    with caplog.at_level(logging.WARNING):
        if path.is_dir():
            pipe.load_lora_weights(str(path))
        else:
            pipe.load_lora_weights(str(path.parent), weight_name=path.name)
    spoken = [record.getMessage() for record in caplog.records if "No LoRA keys" not in record.getMessage()]
    assert not [message for message in spoken if "key" in message.lower()], spoken
    return pipelines.outputs(pipe)


def close(ours: list[Any], theirs: list[Any]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=2e-5), (one - other).abs().max()


@pytest.mark.parametrize(("build", "dialect", "wanted"), CASES)
@pytest.mark.parametrize("alpha", [None, 2.0, 8.0])
def test_loads_and_computes_the_same(
    build: Callable[[], Any], dialect: str, wanted: Any, alpha: float | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = build()
    base = pipelines.base_of(pipe)
    adapter = pipelines.seeded(base, wanted, alpha=alpha)
    before = pipelines.outputs(pipe)
    out = tmp_path / ("lora" if dialect == "diffusers" else "lora.safetensors")
    receipt = write_adapter(adapter, out, dialect, read=ReadOptions(base=base))
    assert any("bit-identical" in proof for proof in receipt.proofs)
    changed = build()
    pipelines.merged(changed, adapter)
    expected = pipelines.outputs(changed)
    assert all((one - other).abs().max() > 1e-3 for one, other in zip(before, expected, strict=True))
    close(loaded(pipe, out, caplog), expected)


def test_attention_processors_of_2023_still_load(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe = pipelines.sd15()
    base = pipelines.base_of(pipe)
    adapter = pipelines.seeded(base, lambda path: path.startswith("unet.") and ".attn" in path, alpha=None)
    write_adapter(adapter, tmp_path / "old", "diffusers-old", read=ReadOptions(base=base))
    changed = pipelines.sd15()
    pipelines.merged(changed, adapter)
    close(loaded(pipe, tmp_path / "old", caplog), pipelines.outputs(changed))


@pytest.mark.parametrize(("build", "wanted"), [(pipelines.sd15, everything), (pipelines.sdxl, everything)])
def test_kohya_to_diffusers_changes_no_output(
    build: Callable[[], Any], wanted: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = pipelines.base_of(build())
    adapter = pipelines.seeded(base, wanted, alpha=1.0)
    read = ReadOptions(base=base)
    write_adapter(adapter, tmp_path / "a.safetensors", "kohya", read=read)
    convert(tmp_path / "a.safetensors", tmp_path / "b", "diffusers", read=read)
    close(loaded(build(), tmp_path / "b", caplog), loaded(build(), tmp_path / "a.safetensors", caplog))


def test_ranks_and_alphas_that_differ_per_module(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe = pipelines.flux()
    base = pipelines.base_of(pipe)
    adapter = pipelines.seeded(base, lambda path: path.endswith(("to_q", "proj_out")) and "blocks" in path, rank=4, alpha=3.0)
    adapter.deltas |= pipelines.seeded(base, lambda path: path.endswith(("to_k", "net.2")), rank=8, alpha=16.0, seed=1).deltas
    adapter.deltas |= pipelines.seeded(base, lambda path: path == "transformer.proj_out", rank=2, alpha=1.0, seed=2).deltas
    write_adapter(adapter, tmp_path / "lora", "diffusers", read=ReadOptions(base=base))
    changed = pipelines.flux()
    pipelines.merged(changed, adapter)
    close(loaded(pipe, tmp_path / "lora", caplog), pipelines.outputs(changed))


@pytest.mark.parametrize(
    ("changed", "code"), [({"target_modules": ["to_q"]}, None), ({"r": 8}, "rank-differs"), ({"r": None}, "rank-missing")]
)
def test_a_header_that_does_not_go_with_the_factors(changed: dict[str, Any], code: str | None, tmp_path: Path) -> None:
    """What reading such a file says is what diffusers does: it takes the modules from the tensors, and all else from the header."""
    pipe = pipelines.sd15()
    base = pipelines.base_of(pipe)
    adapter = pipelines.seeded(base, lambda path: path.endswith(("to_q", "to_v")), alpha=2.0)
    write_adapter(adapter, tmp_path / "lora.safetensors", "diffusers", read=ReadOptions(base=base))
    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    config = json.loads(metadata[ADAPTER_CONFIG]) | {f"unet.{key}": value for key, value in changed.items()}
    save_file(tensors, tmp_path / "less.safetensors", {**metadata, ADAPTER_CONFIG: json.dumps(config)})
    said = {finding.code for finding in open_adapter(tmp_path / "less.safetensors").findings} & {
        "rank-differs",
        "rank-missing",
        "not-targeted",
    }
    assert said == ({code} if code else set())
    if code:
        with pytest.raises((RuntimeError, TypeError)):
            pipe.load_lora_weights(str(tmp_path), weight_name="less.safetensors")
    else:
        pipe.load_lora_weights(str(tmp_path), weight_name="less.safetensors")
        room = {name.split(".lora_")[0] for name, _ in pipe.unet.named_parameters() if ".lora_" in name}
        assert len(room) == sum("unet." in name and ".lora_A" in name for name in tensors)
