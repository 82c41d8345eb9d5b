"""diffusers itself as the judge of the newer image models: its converters give our tensors, its loader loads our files and computes the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("peft")

from diffusers.loaders import lora_conversion_utils as converters  # noqa: E402
from tests.dialects import pipelines  # noqa: E402
from tests.dialects.files import filled, read, written  # noqa: E402
from tests.dialects.test_diffusers_readers import close, loaded  # noqa: E402

from upparam.adapter import Adapter, BaseHint, Extra, ExtraKind, Target  # noqa: E402
from upparam.algorithms.base import Scaling  # noqa: E402
from upparam.algorithms.dora import DoRA  # noqa: E402
from upparam.algorithms.full import Full  # noqa: E402
from upparam.algorithms.lora import LoRA  # noqa: E402
from upparam.bases import inventory  # noqa: E402
from upparam.bases.layouts import layout  # noqa: E402
from upparam.dialects.base import ReadOptions  # noqa: E402
from upparam.operations.convert import convert, write_adapter  # noqa: E402
from upparam.tensors import Tensor  # noqa: E402


def theirs(convert_keys: Callable[[dict[str, Any]], dict[str, Any]], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return convert_keys({name: torch.from_numpy(tensor.read()) for name, tensor in tensors.items()})


def equal(ours: Mapping[str, Tensor], others: Mapping[str, Any]) -> None:
    assert set(ours) == set(others), sorted(set(ours) ^ set(others))[:6]
    assert [name for name, tensor in ours.items() if not np.array_equal(tensor.read(), others[name].numpy())] == []


@pytest.mark.parametrize(
    ("base", "converter", "without"),
    [
        ("anima", "_convert_non_diffusers_anima_lora_to_diffusers", ()),
        ("krea-2", "_convert_non_diffusers_krea2_lora_to_diffusers", ()),
        ("qwen-image", "_convert_non_diffusers_qwen_lora_to_diffusers", ()),
        ("wan2.1-t2v-1.3b", "_convert_non_diffusers_wan_lora_to_diffusers", ()),
        ("wan2.1-i2v-14b", "_convert_non_diffusers_wan_lora_to_diffusers", ()),
        ("lumina2", "_convert_non_diffusers_lumina2_lora_to_diffusers", ()),
        ("flux.2-dev", "_convert_non_diffusers_flux2_lora_to_diffusers", ()),
        ("ltx-video", "_convert_non_diffusers_ltxv_lora_to_diffusers", ()),
        ("z-image", "_convert_non_diffusers_z_image_lora_to_diffusers", ()),
        # This converter cuts both factors of the refiner's fused projection into three.
        ("hunyuan-video", "_convert_hunyuan_video_lora_to_diffusers", ("refiner",)),
    ],
)
def test_comfyui_names_become_what_diffusers_makes_of_them(base: str, converter: str, without: tuple[str, ...]) -> None:
    """Every Linear of every block, so that each name and each cut of a fused weight is compared."""
    one = layout(inventory.load(base), "comfyui")
    shapes: dict[str, list[int]] = {}
    # Z-Image's fused projections are cut in this spelling only.
    down, up = ("lora.down", "lora.up") if base == "z-image" else ("lora_A", "lora_B")
    for foreign, parts in one.foreign.items():
        inner = any(word in foreign for word in ("blocks.", "layers.", "refiner."))
        if foreign.startswith("diffusion_model.") and inner and len(parts[0].shape) == 2 and not any(word in foreign for word in without):
            shapes |= {f"{foreign}.{down}.weight": [1, parts[0].shape[1]], f"{foreign}.{up}.weight": [one.rows(foreign), 1]}
    tensors = filled(shapes)
    ours = written("diffusers", read("comfyui", tensors, base=inventory.load(base))).tensors
    equal(ours, theirs(getattr(converters, converter), tensors))


def test_fused_projections_of_z_image_in_another_spelling() -> None:
    """Where theirs and ours disagree: no module of its model is called qkv, and its loader drops the two tensors with a warning."""
    name = "diffusion_model.layers.0.attention.qkv"
    tensors = filled({f"{name}.lora_A.weight": [1, 3840], f"{name}.lora_B.weight": [11520, 1]})
    found = theirs(converters._convert_non_diffusers_z_image_lora_to_diffusers, tensors)
    assert set(found) == {f"transformer.layers.0.attention.qkv.lora_{half}.weight" for half in "AB"}
    ours = written("diffusers", read("comfyui", tensors, base=inventory.load("z-image"))).tensors
    assert set(ours) == {f"transformer.layers.0.attention.to_{part}.lora_{half}.weight" for half in "AB" for part in "qkv"}


def control() -> dict[str, list[int]]:
    """A control adapter of FLUX as black-forest-labs publish it, of rank 2."""
    linear = {
        "img_in": (3072, 128), "txt_in": (3072, 4096), "time_in.in_layer": (3072, 256), "time_in.out_layer": (3072, 3072),
        "vector_in.in_layer": (3072, 768), "vector_in.out_layer": (3072, 3072), "guidance_in.in_layer": (3072, 256),
        "guidance_in.out_layer": (3072, 3072), "final_layer.linear": (64, 3072), "final_layer.adaLN_modulation.1": (6144, 3072),
    }  # fmt: skip
    norms = []
    for block in range(19):
        for side in ("img", "txt"):
            start = f"double_blocks.{block}.{side}_"
            linear |= {f"{start}attn.qkv": (9216, 3072), f"{start}attn.proj": (3072, 3072), f"{start}mod.lin": (18432, 3072)}
            linear |= {f"{start}mlp.0": (12288, 3072), f"{start}mlp.2": (3072, 12288)}
            norms += [f"{start}attn.norm.query_norm.scale", f"{start}attn.norm.key_norm.scale"]
    for block in range(38):
        start = f"single_blocks.{block}."
        linear |= {f"{start}linear1": (21504, 3072), f"{start}linear2": (3072, 15360), f"{start}modulation.lin": (9216, 3072)}
        norms += [f"{start}norm.query_norm.scale", f"{start}norm.key_norm.scale"]
    shapes: dict[str, list[int]] = {name: [128] for name in norms}
    for name, (out, into) in linear.items():
        shapes |= {f"{name}.lora_A.weight": [2, into], f"{name}.lora_B.weight": [out, 2], f"{name}.lora_B.bias": [out]}
    return shapes


def test_control_adapters_become_what_diffusers_makes_of_them() -> None:
    """All but one tensor: theirs swaps the halves of the final modulation's down, too, whose rows are the rank and not the output.

    The product of the two is then another one; what comes of the authors' file is ours.
    """
    tensors = filled(control())
    ours = dict(written("diffusers", read("comfyui", tensors)).tensors)
    found = theirs(converters._convert_bfl_flux_control_lora_to_diffusers, tensors)
    odd = "transformer.norm_out.linear.lora_A.weight"
    down, up = (
        tensors["final_layer.adaLN_modulation.1.lora_A.weight"].read(),
        tensors["final_layer.adaLN_modulation.1.lora_B.weight"].read(),
    )
    assert np.array_equal(found.pop(odd).numpy(), np.roll(down, 1, axis=0))
    product = ours["transformer.norm_out.linear.lora_B.weight"].doubles() @ ours.pop(odd).doubles()
    assert np.allclose(product, np.roll(up.astype(float) @ down.astype(float), 3072, axis=0))
    equal(ours, found)


def test_onetrainers_names_become_what_diffusers_makes_of_them() -> None:
    """It multiplies alpha / rank into the factors, we keep them and say alpha in the header: the products are the same."""
    modules = {
        "lora_transformer_transformer_blocks_0_attn_to_q": (3072, 3072), "lora_transformer_transformer_blocks_0_attn_add_k_proj": (3072, 3072),
        "lora_transformer_single_transformer_blocks_3_attn_to_v": (3072, 3072), "lora_te1_text_model_encoder_layers_0_mlp_fc1": (3072, 768),
    }  # fmt: skip
    shapes: dict[str, list[int]] = {}
    for name, (out, into) in modules.items():
        shapes |= {f"{name}.lora_down.weight": [2, into], f"{name}.lora_up.weight": [out, 2], f"{name}.alpha": []}
    tensors = filled(shapes, dtype=np.float32, alpha=1.0)
    adapter = read("onetrainer", tensors, base=inventory.load("flux.1-dev"))
    found = theirs(converters._convert_kohya_flux_lora_to_diffusers, tensors)
    assert {name.rsplit(".lora_", 1)[0] for name in found} == {target.module for target in adapter.deltas}
    for target, delta in adapter.deltas.items():
        assert isinstance(delta, LoRA) and delta.scale == 0.5
        product = found[f"{target.module}.lora_B.weight"].numpy() @ found[f"{target.module}.lora_A.weight"].numpy()
        assert np.allclose(product, 0.5 * (delta.up.read() @ delta.down.read()), rtol=1e-5, atol=1e-7), str(target)


def test_other_modules_of_onetrainer_lose_their_names_in_diffusers_converter() -> None:
    """Where theirs and ours disagree: whatever is not attention is named like its block, one overwriting the other."""
    shapes: dict[str, list[int]] = {}
    for name, out in (("proj_mlp", 12288), ("norm_linear", 9216)):
        module = f"lora_transformer_single_transformer_blocks_3_{name}"
        shapes |= {f"{module}.lora_down.weight": [2, 3072], f"{module}.lora_up.weight": [out, 2], f"{module}.alpha": []}
    tensors = filled(shapes)
    found = theirs(converters._convert_kohya_flux_lora_to_diffusers, tensors)
    assert set(found) == {f"transformer.single_transformer_blocks.3.lora_{half}.weight" for half in "AB"}
    adapter = read("onetrainer", tensors, base=inventory.load("flux.1-dev"))
    assert {target.module.split(".3.")[1] for target in adapter.deltas} == {"proj_mlp", "norm.linear"}


def attention(path: str) -> bool:
    """What XLabs trains."""
    return ".attn.to_" in path or ".attn.add_" in path or (path.endswith("proj_out") and "single" in path)


def blocks(path: str) -> bool:
    return "blocks." in path and "norm_" not in path and path.startswith("transformer.")


@pytest.mark.parametrize(
    ("dialect", "wanted", "alpha"),
    [
        ("comfyui", lambda path: path.startswith("transformer.") and ".norm_q" not in path and ".norm_k" not in path, 2.0),
        ("xlabs", attention, None), ("onetrainer", blocks, 8.0),
    ],
)  # fmt: skip
def test_converted_files_load_and_compute_the_same(
    dialect: str, wanted: Callable[[str], bool], alpha: float | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = pipelines.flux()
    base = pipelines.base_of(pipe)
    adapter = pipelines.seeded(base, wanted, alpha=alpha)
    if dialect == "xlabs":
        # q, k and v of one block share their down, as in a file of x-flux.
        adapter = shared_downs(adapter)
    options = ReadOptions(base=base)
    write_adapter(adapter, tmp_path / "a.safetensors", dialect, read=options)
    receipt = convert(tmp_path / "a.safetensors", tmp_path / "b", "diffusers", read=options)
    assert any("bit-identical" in proof for proof in receipt.proofs)
    changed = pipelines.flux()
    pipelines.merged(changed, adapter)
    close(loaded(pipe, tmp_path / "b", caplog), pipelines.outputs(changed))


def shared_downs(adapter: Adapter) -> Adapter:
    first: dict[str, LoRA] = {}
    for target, delta in list(adapter.deltas.items()):
        assert isinstance(delta, LoRA)
        block, _, name = target.module.rpartition(".attn.")
        if name in ("to_q", "to_k", "to_v") or name.startswith("add_"):
            kind = f"{block} {name.startswith('add_')}"
            adapter.deltas[target] = LoRA(delta.up, first.setdefault(kind, delta).down, delta.scaling)
    return adapter


def test_biases_and_norms_of_control_adapters_load(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe = pipelines.flux()
    base = pipelines.base_of(pipe)
    adapter = pipelines.seeded(base, blocks, alpha=None)
    rng = np.random.default_rng(3)
    for target in list(adapter.deltas):
        bias = Tensor.of(rng.standard_normal(adapter.deltas[target].shape[0]).astype(np.float32) * np.float32(0.1))
        adapter.deltas[Target(target.module, parameter="bias")] = Full(bias)
    for block in range(2):
        name = f"transformer.transformer_blocks.{block}.attn.norm_q.weight"
        adapter.extras.append(Extra(ExtraKind.SAVED_MODULE, name, Tensor.of(rng.standard_normal(16).astype(np.float32))))
    changed = pipelines.flux()
    pipelines.merged(changed, Adapter({target: delta for target, delta in adapter.deltas.items() if target.parameter == "weight"}, "test"))
    modules = dict(changed.transformer.named_modules())
    with torch.no_grad():
        for target, delta in adapter.deltas.items():
            if target.parameter == "bias":
                modules[target.module.removeprefix("transformer.")].bias += torch.from_numpy(delta.factors()["diff"].read())
        for extra in adapter.extras:
            modules[extra.name.removeprefix("transformer.").removesuffix(".weight")].weight.copy_(torch.from_numpy(extra.tensor.read()))
    write_adapter(adapter, tmp_path / "lora", "diffusers", read=ReadOptions(base=base))
    close(loaded(pipe, tmp_path / "lora", caplog), pipelines.outputs(changed))


@pytest.mark.parametrize("alpha", [None, 2.0])
def test_dora_loads_and_computes_the_same(alpha: float | None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe = pipelines.flux()
    base = pipelines.base_of(pipe)
    plain = pipelines.seeded(base, blocks, alpha=alpha)
    weights = {f"transformer.{path}": module for path, module in pipe.transformer.named_modules()}
    adapter = Adapter({}, "test", base=BaseHint(base.name, 1.0))
    changed = pipelines.flux()
    modules = {f"transformer.{path}": module for path, module in changed.transformer.named_modules()}
    for number, (target, delta) in enumerate(plain.deltas.items()):
        assert isinstance(delta, LoRA) and delta.scale is not None
        weight = weights[target.module].weight.detach().double()
        norms = weight.norm(dim=1) * (1 + 0.2 * torch.sin(torch.arange(len(weight)) + number))
        magnitude = norms.float().numpy()
        adapter.deltas[target] = DoRA(delta.up, delta.down, Tensor.of(magnitude), Scaling(alpha=alpha))
        whole = weight + delta.scale * torch.from_numpy(delta.up.doubles() @ delta.down.doubles())
        modules[target.module].weight.data = (whole * (torch.from_numpy(magnitude).double() / whole.norm(dim=1))[:, None]).float()
    write_adapter(adapter, tmp_path / "lora", "diffusers", read=ReadOptions(base=base))
    close(loaded(pipe, tmp_path / "lora", caplog), pipelines.outputs(changed))
