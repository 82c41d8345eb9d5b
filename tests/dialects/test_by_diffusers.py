"""What we foresee of diffusers' loader is what it does: names, products and scales of whole adapters of the true sizes, and of tiny pipelines."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")

from safetensors.torch import load_file, save_file  # noqa: E402
from tests.dialects import pipelines  # noqa: E402
from tests.dialects.test_diffusers_readers import close, everything, loaded  # noqa: E402

from upparam.adapter import Adapter, Target  # noqa: E402
from upparam.algorithms.dora import DoRA  # noqa: E402
from upparam.algorithms.lora import LoRA  # noqa: E402
from upparam.bases import inventory  # noqa: E402
from upparam.bases.base import Base  # noqa: E402
from upparam.dialects.base import ReadOptions  # noqa: E402
from upparam.findings import Severity  # noqa: E402
from upparam.operations.convert import convert, write_adapter  # noqa: E402
from upparam.operations.inspect import inspect_file  # noqa: E402
from upparam.operations.opening import open_adapter  # noqa: E402
from upparam.operations.receipt import Receipt  # noqa: E402
from upparam.operations.verify import verify  # noqa: E402
from upparam.tensors import Tensor  # noqa: E402


def whole(base: Base, wanted: Callable[[str], bool], alpha: float | None) -> Adapter:
    """A LoRA of rank 2 over the Linears of the denoiser."""
    return pipelines.seeded(
        Base(base.name, tuple(module for module in base.modules if len(module.shape) == 2)),
        lambda path: path.startswith(("unet.", "transformer.")) and wanted(path), rank=2, alpha=alpha,
    )  # fmt: skip


def inner(path: str) -> bool:
    """Attention and feed-forward of the blocks."""
    return any(part.isdecimal() for part in path.split(".")) and not any(
        part in path for part in ("norm", "mod", "embed", "time", "distilled")
    )


def products(pipeline: str, path: Path) -> tuple[dict[str, Any], list[str]]:
    """(module -> rows of what diffusers makes of up @ down, other names) as its pipeline's loader passes them on to the model."""
    more = {"unet_config": SimpleNamespace(layers_per_block=2)} if "XL" in pipeline else {}
    found = getattr(diffusers, pipeline).lora_state_dict(str(path.parent), weight_name=path.name, use_safetensors=True, **more)
    state, alphas = found if isinstance(found, tuple) else (found, None)
    if any(name.startswith("unet.") for name in state):
        from diffusers.utils import convert_unet_state_dict_to_peft

        state = {f"unet.{name}": value for name, value in convert_unet_state_dict_to_peft(
            {name.removeprefix("unet."): value for name, value in state.items()}
        ).items()}  # fmt: skip
    downs = {name.removesuffix(".lora_A.weight"): value for name, value in state.items() if name.endswith(".lora_A.weight")}
    others = [name for name in state if not name.startswith(("unet.", "transformer.")) or ".lora_" not in name]
    made = {module: (state[f"{module}.lora_B.weight"].numpy(), down.numpy()) for module, down in downs.items()}
    if alphas:
        (alpha,) = set(alphas.values())
        made = {module: (up * (alpha / up.shape[1]), down) for module, (up, down) in made.items()}
    return made, others


def same(adapter: Adapter, made: dict[str, Any]) -> None:
    """Every module has the product of the adapter's factors in some rows; what else there is, is nought."""
    for target, delta in adapter.deltas.items():
        assert isinstance(delta, LoRA) and delta.scale is not None
        up, down = made.pop(target.module)
        rows = np.linspace(0, len(up) - 1, 5).astype(int)
        ours = delta.scale * (delta.up.doubles()[rows] @ delta.down.doubles())
        assert np.allclose(up[rows].astype(float) @ down, ours, rtol=1e-4, atol=1e-7), str(target)
    assert [module for module, (up, _) in made.items() if up.any()] == []


@pytest.mark.parametrize(
    ("base", "pipeline", "dialect", "alpha"),
    [
        ("sd1.5", "StableDiffusionPipeline", "kohya", 1.0), ("sd2", "StableDiffusionPipeline", "kohya", 1.0),
        ("sdxl", "StableDiffusionXLPipeline", "kohya", 1.0), ("flux.1-dev", "FluxPipeline", "kohya", 1.0),
        ("flux.1-dev", "FluxPipeline", "comfyui", 1.0), ("flux.1-schnell", "FluxPipeline", "comfyui", 2.0),
        ("flux.2-dev", "Flux2Pipeline", "kohya", 1.0), ("flux.2-dev", "Flux2Pipeline", "comfyui", 2.0),
        ("chroma", "ChromaPipeline", "kohya", 1.0), ("chroma", "ChromaPipeline", "comfyui", 1.0),
        ("wan2.1-t2v-1.3b", "WanPipeline", "kohya", 1.0), ("wan2.1-t2v-1.3b", "WanPipeline", "comfyui", 1.0),
        ("qwen-image", "QwenImagePipeline", "kohya", 1.0), ("qwen-image", "QwenImagePipeline", "comfyui", 1.0),
        ("z-image", "ZImagePipeline", "kohya", 1.0), ("z-image", "ZImagePipeline", "comfyui", 1.0),
        ("ltx-video", "LTXPipeline", "comfyui", 2.0),
    ],
)  # fmt: skip
def test_blocks_of_true_size_are_read_whole(base: str, pipeline: str, dialect: str, alpha: float, tmp_path: Path) -> None:
    known = inventory.load(base)
    adapter = whole(known, inner, alpha)
    assert len(adapter.deltas) > 100
    receipt = write_adapter(adapter, tmp_path / "a.safetensors", dialect, read=ReadOptions(base=known), verify=False)
    assert foreseen(receipt) == []
    made, others = products(pipeline, tmp_path / "a.safetensors")
    assert others == []
    same(adapter, made)


def foreseen(receipt: Receipt) -> list[str]:
    return [finding.message for finding in receipt.findings if finding.code == "diffusers-differs"]


@pytest.mark.parametrize(
    ("base", "pipeline", "dialect", "alpha", "count"),
    [
        ("flux.1-dev", "FluxPipeline", "kohya", 1.0, 10), ("flux.1-dev", "FluxPipeline", "comfyui", 1.0, 10),
        ("flux.2-dev", "Flux2Pipeline", "kohya", 1.0, 6), ("z-image", "ZImagePipeline", "kohya", 1.0, 3),
        ("z-image", "ZImagePipeline", "comfyui", 1.0, 3), ("ltx-video", "LTXPipeline", "comfyui", 2.0, 4),
    ],
)  # fmt: skip
def test_modules_outside_the_blocks_that_it_passes_over(
    base: str, pipeline: str, dialect: str, alpha: float, count: int, tmp_path: Path
) -> None:
    known = inventory.load(base)
    adapter = whole(known, lambda path: not path.rsplit(".", 1)[-1].startswith("norm_"), alpha)
    receipt = write_adapter(adapter, tmp_path / "a.safetensors", dialect, read=ReadOptions(base=known), verify=False)
    made, _ = products(pipeline, tmp_path / "a.safetensors")
    assert len({target.module for target in adapter.deltas} - set(made)) == count
    (message,) = foreseen(receipt)
    assert message.startswith(f"diffusers passes over {count} modules outside the blocks")
    write_adapter(adapter, tmp_path / "b", "diffusers", read=ReadOptions(base=known), verify=False)
    state = getattr(diffusers, pipeline).lora_state_dict(str(tmp_path / "b"), use_safetensors=True)
    assert len([name for name in state if name.endswith("lora_A.weight")]) == len(adapter.deltas)


def everywhere(path: str) -> bool:
    return True


def attention(path: str) -> bool:
    return inner(path) and "attn" in path


@pytest.mark.parametrize(
    ("base", "pipeline", "dialect", "alpha", "wanted", "begins"),
    [
        ("sd1.5", "StableDiffusionPipeline", "comfyui", 2.0, inner, "changes nothing"),
        ("sd1.5", "StableDiffusionPipeline", "comfyui", 1.0, inner, "fails"),
        ("sd3-medium", "StableDiffusion3Pipeline", "kohya", 1.0, inner, "changes nothing"),
        ("sd3-medium", "StableDiffusion3Pipeline", "comfyui", 1.0, inner, "fails"),
        ("lumina2", "Lumina2Pipeline", "kohya", 1.0, inner, "changes nothing"),
        ("lumina2", "Lumina2Pipeline", "comfyui", 2.0, inner, "fails"), ("lumina2", "Lumina2Pipeline", "comfyui", 2.0, everywhere, "fails"),
        ("ltx-video", "LTXPipeline", "kohya", 1.0, inner, "changes nothing"),
        ("krea-2", "Krea2Pipeline", "kohya", 1.0, inner, "changes nothing"), ("krea-2", "Krea2Pipeline", "comfyui", 1.0, inner, "fails"),
        ("auraflow", "AuraFlowPipeline", "kohya", 1.0, inner, "changes nothing"),
        ("cogvideox-2b", "CogVideoXPipeline", "kohya", 1.0, inner, "changes nothing"),
        ("sana-1.6b", "SanaPipeline", "kohya", 1.0, inner, "changes nothing"),
        ("mochi-1", "MochiPipeline", "kohya", 1.0, inner, "changes nothing"),
        ("hidream-i1", "HiDreamImagePipeline", "kohya", 1.0, inner, "changes nothing"),
        ("hunyuan-video", "HunyuanVideoPipeline", "kohya", 1.0, inner, "fails"),
        ("hunyuan-video", "HunyuanVideoPipeline", "comfyui", 1.0, inner, "fails"),
        ("hunyuan-video", "HunyuanVideoPipeline", "comfyui", 2.0, lambda path: "ff" in path, "changes nothing"),
        ("flux.2-dev", "Flux2Pipeline", "comfyui", 1.0, inner, "fails"), ("chroma", "ChromaPipeline", "kohya", 1.0, everywhere, "fails"),
        ("wan2.1-t2v-1.3b", "WanPipeline", "kohya", None, inner, "fails"), ("wan2.1-t2v-1.3b", "WanPipeline", "kohya", 1.0, attention, "fails"),
        ("wan2.1-t2v-1.3b", "WanPipeline", "kohya", 1.0, everywhere, "fails"),
        ("wan2.1-t2v-1.3b", "WanPipeline", "comfyui", 1.0, everywhere, "fails"),
    ],
)  # fmt: skip
def test_files_that_it_does_not_read(
    base: str, pipeline: str, dialect: str, alpha: float | None, wanted: Callable[[str], bool], begins: str, tmp_path: Path
) -> None:
    """Where a whole file changes nothing or is refused, the receipt says which, and what it names instead is read whole."""
    known = inventory.load(base)
    adapter = whole(known, wanted, alpha)
    receipt = write_adapter(adapter, tmp_path / "a.safetensors", dialect, read=ReadOptions(base=known), verify=False)
    (message,) = foreseen(receipt)
    assert {finding.severity for finding in receipt.findings} == {Severity.INFO if dialect == "comfyui" else Severity.WARNING}
    assert message.startswith(f"diffusers {begins} ") and message.endswith("; for diffusers convert --to diffusers")
    try:
        made, others = products(pipeline, tmp_path / "a.safetensors")
        assert all("lora" in name for name in others), "Invalid LoRA checkpoint"
        assert not made.keys() & {target.module for target in adapter.deltas}
    except (ValueError, KeyError, IndexError, RuntimeError, AssertionError):
        assert begins == "fails"
    else:
        assert begins == "changes nothing"
    assert foreseen(convert(tmp_path / "a.safetensors", tmp_path / "b", "diffusers", read=ReadOptions(base=known), verify=False)) == []
    state = getattr(diffusers, pipeline).lora_state_dict(str(tmp_path / "b"), use_safetensors=True)
    names = state[0] if isinstance(state, tuple) else state
    assert len([name for name in names if name.endswith(("lora_A.weight", "lora.down.weight"))]) == len(adapter.deltas)


@pytest.mark.parametrize(("base", "pipeline"), [("flux.2-dev", "Flux2Pipeline"), ("hunyuan-video", "HunyuanVideoPipeline")])
def test_halves_of_a_down_that_it_swaps(base: str, pipeline: str, tmp_path: Path) -> None:
    known = inventory.load(base)
    adapter = whole(
        known, lambda path: path == "transformer.norm_out.linear" or path.startswith("transformer.transformer_blocks.0.attn.to_"), 2.0
    )
    (message,) = foreseen(write_adapter(adapter, tmp_path / "a.safetensors", "comfyui", read=ReadOptions(base=known), verify=False))
    assert message.startswith("diffusers makes another change of this module")
    made, _ = products(pipeline, tmp_path / "a.safetensors")
    ours = adapter.deltas.pop(Target("transformer.norm_out.linear"))
    assert isinstance(ours, LoRA)
    up, down = made.pop("transformer.norm_out.linear")
    assert not np.allclose(up[:3] @ down, ours.up.read()[:3] @ ours.down.read())
    same(adapter, made)


@pytest.mark.parametrize(
    ("base", "pipeline", "block"),
    [
        ("flux.1-dev", "FluxPipeline", "transformer.transformer_blocks.0.attn"), ("chroma", "ChromaPipeline", "transformer.transformer_blocks.0.attn"),
        ("sd3-medium", "StableDiffusion3Pipeline", "transformer.transformer_blocks.0.attn"), ("z-image", "ZImagePipeline", "transformer.layers.0.attention"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("beside", [True, False])
def test_parts_of_fused_weights_under_its_own_names(base: str, pipeline: str, block: str, beside: bool, tmp_path: Path) -> None:
    """q, k and v whose scales differ stay apart in a file for ComfyUI, under diffusers' names."""
    known = inventory.load(base)
    ends = ("to_q", "to_k", "to_v", *(["to_out.0"] if beside else []))
    adapter = whole(known, lambda path: path.startswith(f"{block}.") and path.endswith(ends), 2.0)
    adapter.deltas |= whole(known, lambda path: path == f"{block}.to_k", 1.0).deltas
    (message,) = foreseen(write_adapter(adapter, tmp_path / "a.safetensors", "comfyui", read=ReadOptions(base=known), verify=False))
    assert message.startswith("diffusers does not read all of this file: 3 modules are under its own names")
    made, others = products(pipeline, tmp_path / "a.safetensors")
    with pytest.raises((AssertionError, KeyError)):
        assert base != "sd3-medium" or all("lora" in name for name in others), "Invalid LoRA checkpoint"
        same(adapter, made)
    again = convert(tmp_path / "a.safetensors", tmp_path / "b", "diffusers", read=ReadOptions(base=known), verify=False)
    if beside:
        assert foreseen(again) == []
        assert set(products(pipeline, tmp_path / "b/pytorch_lora_weights.safetensors")[0]) == {target.module for target in adapter.deltas}
    else:  # which is a file in diffusers' names
        assert "takes no alpha" in foreseen(again)[0]


@pytest.mark.parametrize(
    ("base", "pipeline"),
    [
        ("sd1.5", "StableDiffusionPipeline"), ("sd3-medium", "StableDiffusion3Pipeline"), ("flux.1-dev", "FluxPipeline"), ("flux.2-dev", "Flux2Pipeline"),
        ("wan2.1-t2v-1.3b", "WanPipeline"), ("qwen-image", "QwenImagePipeline"), ("z-image", "ZImagePipeline"), ("lumina2", "Lumina2Pipeline"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("words", ["lora_A lora_B", "lora_down lora_up"])
def test_alphas_beside_its_own_names(base: str, pipeline: str, words: str, tmp_path: Path) -> None:
    """No pipeline takes them, in whatever words; by way of PEFT they get into the header, where it does."""
    known, (down, up) = inventory.load(base), words.split()
    adapter = whole(known, inner, 1.0)
    adapter.deltas = dict(list(adapter.deltas.items())[:2])
    tensors = {}
    for target, delta in adapter.deltas.items():
        assert isinstance(delta, LoRA)
        factors = {f"{down}.weight": delta.down.read(), f"{up}.weight": delta.up.read(), "alpha": np.array(1.0, np.float32)}
        tensors |= {f"{target.module}.{word}": torch.from_numpy(value) for word, value in factors.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    made, others = products(pipeline, tmp_path / "a.safetensors")
    with pytest.raises((AssertionError, KeyError)):
        assert base.startswith("flux.1") or all("lora" in name for name in others), "Invalid LoRA checkpoint"
        same(adapter, made)
    read = ReadOptions(base=known)
    (said,) = [finding for finding in verify(tmp_path / "a.safetensors", options=read).findings if finding.code == "diffusers-differs"]
    assert said.message.startswith("diffusers takes no alpha stored beside factors under its own names, as of 2 modules here")
    assert foreseen(convert(tmp_path / "a.safetensors", tmp_path / "again", "diffusers", read=read)) == [said.message]
    convert(tmp_path / "a.safetensors", tmp_path / "p", "peft", read=read)
    assert foreseen(convert(tmp_path / "p", tmp_path / "b", "diffusers", read=read)) == []
    state = getattr(diffusers, pipeline).lora_state_dict(str(tmp_path / "b"), use_safetensors=True, return_lora_metadata=True)
    assert state[-1]["unet.lora_alpha" if base == "sd1.5" else "transformer.lora_alpha"] == 1.0


def test_a_token_refiner_that_it_takes_apart(tmp_path: Path) -> None:
    known = inventory.load("hunyuan-video")
    adapter = whole(known, lambda path: "refiner_blocks.0.attn.to_" in path or path.endswith("blocks.0.attn.to_k"), 2.0)
    (message,) = foreseen(write_adapter(adapter, tmp_path / "a.safetensors", "comfyui", read=ReadOptions(base=known), verify=False))
    assert message.startswith("diffusers fails to load this file: it cuts the down of the token refiner's fused projection in three")
    made, _ = products("HunyuanVideoPipeline", tmp_path / "a.safetensors")
    up, down = made["transformer.context_embedder.token_refiner.refiner_blocks.0.attn.to_q"]
    assert up.shape[1] != down.shape[0]


@pytest.mark.parametrize(
    ("base", "pipeline"), [("flux.2-dev", "Flux2Pipeline"), ("krea-2", "Krea2Pipeline"), ("hunyuan-video", "HunyuanVideoPipeline")]
)
def test_kohyas_alphas_that_equal_the_rank_are_left_out_where_it_fails_over_any(base: str, pipeline: str, tmp_path: Path) -> None:
    """From kohya, where every module has an alpha; the file is read whole, and kohya's is the same again."""
    known, read = inventory.load(base), ReadOptions(base=inventory.load(base))
    adapter = whole(known, inner, 2.0)
    write_adapter(adapter, tmp_path / "k.safetensors", "kohya", read=read, verify=False)
    assert foreseen(convert(tmp_path / "k.safetensors", tmp_path / "c.safetensors", "comfyui", read=read)) == []
    made, others = products(pipeline, tmp_path / "c.safetensors")
    assert others == []
    same(adapter, made)
    convert(tmp_path / "c.safetensors", tmp_path / "k2.safetensors", "kohya", read=read)
    first, again = (open_adapter(tmp_path / name, options=read).deltas for name in ("k.safetensors", "k2.safetensors"))
    assert {target: delta.scale for target, delta in first.items()} == {target: delta.scale for target, delta in again.items()}


def test_alphas_that_ltx_ignores(tmp_path: Path) -> None:
    known = inventory.load("ltx-video")
    adapter = whole(known, inner, 1.0)
    (message,) = foreseen(write_adapter(adapter, tmp_path / "a.safetensors", "comfyui", read=ReadOptions(base=known), verify=False))
    assert message.startswith(f"diffusers takes another alpha than the file's for {len(adapter.deltas)} modules")
    made, _ = products("LTXPipeline", tmp_path / "a.safetensors")
    for target, delta in adapter.deltas.items():
        assert isinstance(delta, LoRA)
        up, down = made[target.module]
        assert np.array_equal(up[:3] @ down, delta.up.read()[:3] @ delta.down.read())


def several(base: Base) -> Adapter:
    """Ranks and alphas by kind of module, as rank_pattern and alpha_pattern give them."""
    adapter = pipelines.seeded(base, lambda path: everything(path) and path.endswith(("to_q", "fc1", "conv1", "k_proj")), alpha=3.0)
    more = (("to_k", "fc2", "q_proj", "net.2"), 8, 16.0), (("out_proj", "v_proj", "proj_in"), 2, 1.0)
    for ends, rank, alpha in more:
        wanted: Callable[[str], bool] = lambda path, ends=ends: everything(path) and path.endswith(ends)  # type: ignore[misc]  # noqa: E731
        adapter.deltas |= pipelines.seeded(base, wanted, rank=rank, alpha=alpha, seed=rank).deltas
    return adapter


@pytest.mark.parametrize("build", [pipelines.sd15, pipelines.sdxl])
def test_alphas_by_module_under_kohyas_names(build: Callable[[], Any], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The modules whose scale we say it takes wrongly are those it gives another scale, no more and no less; --to diffusers cures it."""
    base = replace(pipelines.base_of(build()), family="sd")
    adapter = several(base)
    read = ReadOptions(base=base)
    receipt = write_adapter(adapter, tmp_path / "a.safetensors", "kohya", read=read)
    pipe = build()
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    pipe.load_lora_weights(str(tmp_path), weight_name="a.safetensors")
    other = sum(scale != adapter.deltas[Target(module)].scale for module, scale in scales(pipe).items())
    assert other > 10
    (message,) = foreseen(receipt)
    assert message.startswith(f"diffusers takes another alpha than the file's for {other} modules")
    assert open_adapter(tmp_path / "a.safetensors", options=read).deltas.keys() == adapter.deltas.keys()
    cured = convert(tmp_path / "a.safetensors", tmp_path / "b", "diffusers", read=read)
    assert foreseen(cured) == []
    changed = build()
    pipelines.merged(changed, adapter)
    close(loaded(build(), tmp_path / "b", caplog), pipelines.outputs(changed))


def scales(pipe: Any) -> dict[str, float]:
    """Module -> the scale that the pipeline loaded."""
    found = {}
    for component, part in pipelines.components(pipe).items():
        for path, module in part.named_modules():
            if scaling := getattr(module, "scaling", None):
                (found[pipelines.public(component, path)],) = scaling.values()
    return found


@pytest.mark.parametrize("build", [pipelines.sd15, pipelines.sdxl])
def test_alphas_that_differ_or_are_absent_in_a_file_that_others_wrote(build: Callable[[], Any], tmp_path: Path) -> None:
    """Reading says it too: of equally common alphas diffusers takes the first in the file, also for modules that store none."""
    base = replace(pipelines.base_of(build()), family="sd")
    write_adapter(several(base), tmp_path / "a.safetensors", "kohya", read=(read := ReadOptions(base=base)))
    tensors = load_file(tmp_path / "a.safetensors")
    kept = {
        name: torch.tensor(float(1 + number % 2)) if name.endswith(".alpha") else tensor for number, (name, tensor) in enumerate(tensors.items())
        if not name.endswith(("fc1.alpha", "attn1_to_q.alpha"))
    }  # fmt: skip
    laid_backwards(kept, tmp_path / "b.safetensors")
    pipe = build()
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    pipe.load_lora_weights(str(tmp_path), weight_name="b.safetensors")
    theirs, ours = scales(pipe), open_adapter(tmp_path / "b.safetensors", options=read).deltas
    other = sum(scale != ours[Target(module)].scale for module, scale in theirs.items())
    verdict, inspection = verify(tmp_path / "b.safetensors", options=read), inspect_file(tmp_path / "b.safetensors", options=read)
    for findings in (verdict.findings, inspection.adapter.findings):
        (said,) = [finding for finding in findings if finding.code == "diffusers-differs"]
        assert said.severity is Severity.WARNING and verdict.sound
        assert said.message.startswith(f"diffusers takes another alpha than the file's for {other} modules")
    kept["lora_unet_conv_in.lora_mid.weight"] = torch.zeros(1)
    laid_backwards(kept, tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match="not been correctly renamed"):
        pipe.load_lora_weights(str(tmp_path), weight_name="c.safetensors")
    assert not [finding for finding in verify(tmp_path / "c.safetensors", options=read).findings if finding.code == "diffusers-differs"]


def laid_backwards(tensors: Mapping[str, Any], path: Path) -> None:
    """A safetensors file whose header names the tensors in their order and whose data lies the other way round."""
    header, data = {}, b""
    for name, tensor in reversed(tensors.items()):
        raw = tensor.float().numpy().tobytes()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps({name: header[name] for name in tensors}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def decomposed(adapter: Adapter) -> Adapter:
    """The adapter as DoRA, with magnitudes that no weight has."""
    changed = dict(adapter.deltas)
    for target, delta in adapter.deltas.items():
        assert isinstance(delta, LoRA)
        changed[target] = DoRA(delta.up, delta.down, Tensor.of(np.full((delta.up.shape[0], 1), 3, np.float32)), delta.scaling)
    return replace(adapter, deltas=changed)


def test_magnitudes_that_it_leaves_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A DoRA in LyCORIS' names is a plain LoRA to diffusers; --to diffusers keeps it."""
    base = replace(pipelines.base_of(pipelines.sd15()), family="sd")
    plain = pipelines.seeded(base, lambda path: "attn1.to_" in path)
    adapter, read = decomposed(plain), ReadOptions(base=base)
    (message,) = foreseen(write_adapter(adapter, tmp_path / "a.safetensors", "lycoris", read=read))
    assert message.startswith(f"diffusers leaves out the magnitudes of {len(adapter.deltas)} modules")
    assert message in [finding.message for finding in verify(tmp_path / "a.safetensors", options=read).findings]
    changed = pipelines.sd15()
    pipelines.merged(changed, plain)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    close(loaded(pipelines.sd15(), tmp_path / "a.safetensors", caplog), pipelines.outputs(changed))
    assert foreseen(convert(tmp_path / "a.safetensors", tmp_path / "b", "diffusers", read=read)) == []
    ours = loaded(pipelines.sd15(), tmp_path / "b", caplog)
    assert any((one - other).abs().max() > 0.01 for one, other in zip(ours, pipelines.outputs(changed), strict=True))


@pytest.mark.parametrize(
    ("base", "pipeline", "ends", "begins"),
    [
        ("sd1.5", "StableDiffusionPipeline", ("mid_block.attentions.0.transformer_blocks.0.attn1.to_q",), "changes nothing with this file"),
        ("qwen-image", "QwenImagePipeline", ("blocks.0.attn.to_q", "blocks.0.attn.to_k"), "leaves out the magnitudes of 2 modules"),
    ],
)
def test_magnitudes_are_left_out_before_names_are_looked_at(
    base: str, pipeline: str, ends: tuple[str, ...], begins: str, tmp_path: Path
) -> None:
    known = inventory.load(base)
    plain = whole(known, lambda path: path.endswith(ends), 2.0)
    (message,) = foreseen(
        write_adapter(decomposed(plain), tmp_path / "a.safetensors", "comfyui", read=ReadOptions(base=known), verify=False)
    )
    assert message.startswith(f"diffusers {begins}")
    made, others = products(pipeline, tmp_path / "a.safetensors")
    if "nothing" in begins:
        assert made and not made.keys() & {target.module for target in plain.deltas}
    else:
        assert others == []
        same(plain, made)


def test_one_alpha_for_all_is_no_matter(tmp_path: Path) -> None:
    base = replace(pipelines.base_of(pipelines.sd15()), family="sd")
    adapter = pipelines.seeded(base, everything, alpha=3.0)
    assert foreseen(write_adapter(adapter, tmp_path / "a.safetensors", "kohya", read=ReadOptions(base=base))) == []
