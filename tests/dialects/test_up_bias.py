"""The bias of up (PEFT's `lora_bias`): held where it means the same, refused by name elsewhere, and what each real reader does with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("diffusers")

from safetensors.torch import load_file, save_file  # noqa: E402
from tests.dialects import pipelines  # noqa: E402
from tests.dialects.test_diffusers_readers import close, loaded  # noqa: E402
from tests.dialects.test_peft import llama, save, trained  # noqa: E402
from tests.matrix.specimens import specimen  # noqa: E402

from upparam.adapter import Target  # noqa: E402
from upparam.algorithms.base import Scaling  # noqa: E402
from upparam.algorithms.full import Full  # noqa: E402
from upparam.algorithms.slicing import join  # noqa: E402
from upparam.bases import inventory  # noqa: E402
from upparam.dialects.base import ReadOptions  # noqa: E402
from upparam.errors import MismatchError, RefusedError  # noqa: E402
from upparam.operations.combine import combine  # noqa: E402
from upparam.operations.convert import convert, write_adapter  # noqa: E402
from upparam.operations.edit import edit  # noqa: E402
from upparam.operations.fitting import Arithmetic  # noqa: E402
from upparam.operations.merge import merge  # noqa: E402
from upparam.operations.opening import open_adapter  # noqa: E402
from upparam.tensors import Tensor  # noqa: E402


def biased(pipe: Any) -> Any:
    """A PEFT adapter with biases of up on the pipeline's UNet, of scale 1.5."""
    torch.manual_seed(5)
    pipe.unet.add_adapter(peft.LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_out.0", "proj_in"], lora_bias=True))
    with torch.no_grad():
        for name, parameter in pipe.unet.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.2)
    return pipe


def test_diffusers_and_peft_hold_it_for_each_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe = biased(pipelines.sd15())
    expected = pipelines.outputs(pipe)
    state = peft.get_peft_model_state_dict(pipe.unet)
    config = pipe.unet.peft_config["default"].to_dict()
    type(pipe).save_lora_weights(str(tmp_path / "theirs"), unet_lora_layers=state, unet_lora_adapter_metadata=config)
    read = ReadOptions(base=pipelines.base_of(pipelines.sd15()))
    convert(tmp_path / "theirs", tmp_path / "peft", "peft", read=read)
    convert(tmp_path / "peft", tmp_path / "ours", "diffusers", read=read)
    files = [load_file(tmp_path / who / "pytorch_lora_weights.safetensors") for who in ("theirs", "ours")]
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    close(loaded(pipelines.sd15(), tmp_path / "ours", caplog), expected)


def test_diffusers_loads_it_into_text_encoders_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """There under PEFT's words, since those of before have none for it."""
    base = pipelines.base_of(pipelines.sd15())
    adapter = pipelines.seeded(base, lambda path: path.endswith(("self_attn.q_proj", "mlp.fc1", "attn1.to_out.0")))
    pipe = pipelines.sd15()
    pipelines.merged(pipe, adapter)
    modules = {
        pipelines.public(name, path): module for name, part in pipelines.components(pipe).items() for path, module in part.named_modules()
    }
    rng = np.random.default_rng(1)
    for target, delta in list(adapter.deltas.items()):
        bias = (rng.standard_normal(delta.shape[0]) * 0.2).astype(np.float32)
        adapter.deltas[target._replace(parameter="bias")] = Full(Tensor.of(bias), Scaling(alpha=2.0, divisor=4.0))
        modules[target.module].bias.data += 0.5 * torch.from_numpy(bias)
    write_adapter(adapter, tmp_path / "ours", "diffusers", read=ReadOptions(base=base))
    close(loaded(pipelines.sd15(), tmp_path / "ours", caplog), pipelines.outputs(pipe))


def test_one_module_without_it_is_named(tmp_path: Path) -> None:
    adapter = specimen("biases of up", "sd1.5")
    (first, _), *_ = [(target, delta) for target, delta in adapter.deltas.items() if target.parameter == "bias"]
    some = replace(adapter, deltas={target: delta for target, delta in adapter.deltas.items() if target != first})
    for dialect in ("peft", "diffusers"):
        with pytest.raises(RefusedError, match=rf"{first.module}: no delta of the bias.*every module or in none.*--drop bias"):
            write_adapter(some, tmp_path / "out", dialect)
        receipt = write_adapter(some, tmp_path / dialect, dialect, drop={"bias"})
        assert [finding.code for finding in receipt.findings] == ["given-up"] and receipt.counts["targets"] == 2


def test_another_scale_than_the_weights_is_baked_in(tmp_path: Path) -> None:
    adapter = specimen("biases of up", "sd1.5")
    bias = next(target for target in adapter.deltas if target.parameter == "bias")
    changed = replace(adapter, deltas={**adapter.deltas, bias: replace(adapter.deltas[bias], scaling=Scaling(alpha=1.0, divisor=1.0))})
    for dialect in ("peft", "diffusers"):
        with pytest.raises(RefusedError, match=r"bias with scale 1 beside one of the weight with scale 0.5.*--bake-scale"):
            write_adapter(changed, tmp_path / "out", dialect)
        write_adapter(changed, tmp_path / dialect, dialect, arithmetic=Arithmetic(bake_scale=True))
        again = open_adapter(tmp_path / dialect).deltas[bias]
        assert again.scale == 0.5
        np.testing.assert_array_equal(again.factors()["diff"].read(), 2 * adapter.deltas[bias].factors()["diff"].read())


def test_comfyui_holds_it_at_a_scale_of_one_where_the_base_has_a_bias(tmp_path: Path) -> None:
    adapter = specimen("biases of up", "sd1.5")
    with pytest.raises(RefusedError, match="--bake-scale"):
        write_adapter(adapter, tmp_path / "out.safetensors", "comfyui")
    write_adapter(adapter, tmp_path / "out.safetensors", "comfyui", arithmetic=Arithmetic(bake_scale=True))
    again = open_adapter(tmp_path / "out.safetensors")
    for target, delta in adapter.deltas.items():
        assert again.deltas[target].scale == (1.0 if target.parameter == "bias" else 0.5)
        np.testing.assert_array_equal(again.deltas[target].load().rows(0, 4) * 1.0, delta.load().rows(0, 4))
    module = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    weight, bias = (adapter.deltas[target] for target in list(adapter.deltas)[:2])
    lone = replace(adapter, deltas={Target(module): weight, Target(module, parameter="bias"): bias})
    with pytest.raises(RefusedError, match=rf"{module}.bias: a delta of a bias that the base does not have.*--drop bias"):
        write_adapter(lone, tmp_path / "lone.safetensors", "comfyui")


def test_lycoris_passes_it_over_and_so_it_is_refused(tmp_path: Path) -> None:
    lycoris = pytest.importorskip("lycoris")
    weights = {
        "lycoris_0.lora_up.weight": torch.ones(4, 2),
        "lycoris_0.lora_down.weight": torch.ones(2, 3),
        "lycoris_0.alpha": torch.tensor(2.0),
    }
    save_file({**weights, "lycoris_0.diff_b": torch.ones(4)}, tmp_path / "theirs.safetensors")
    model = torch.nn.Sequential(torch.nn.Linear(3, 4))
    before = model(torch.ones(1, 3))
    network, _ = lycoris.create_lycoris_from_weights(1.0, str(tmp_path / "theirs.safetensors"), model)
    network.apply_to()
    torch.testing.assert_close(model(torch.ones(1, 3)), before + 6)
    with pytest.raises(RefusedError, match=r"which LyCORIS would pass over.*--drop bias"):
        write_adapter(specimen("biases of up", "sd1.5"), tmp_path / "out.safetensors", "lycoris", arithmetic=Arithmetic(bake_scale=True))


def test_parts_of_a_fused_bias_with_other_scales_are_not_joined() -> None:
    parts = [Full(Tensor.of(np.ones(3, np.float32)), Scaling(alpha=alpha, divisor=4.0)) for alpha in (4.0, 8.0)]
    with pytest.raises(RefusedError, match="different scales"):
        join(parts)
    assert join([parts[1], parts[1]]).scale == 2.0


def test_alpha_is_that_of_the_bias_too(tmp_path: Path) -> None:
    trained("conv biases of up", tmp_path / "theirs")
    edit(tmp_path / "theirs", tmp_path / "ours", alpha=2.0)
    assert {delta.scale for delta in open_adapter(tmp_path / "ours").deltas.values()} == {0.5}


def test_a_base_without_the_bias_is_refused_and_the_remedy_works(tmp_path: Path) -> None:
    """PEFT, too, runs such an adapter and does not merge it."""
    model = llama()
    model.save_pretrained(tmp_path / "base")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True, init_lora_weights=False))
    wrapped.save_pretrained(tmp_path / "lora")
    with pytest.raises(RuntimeError, match="base layer has no bias"):
        wrapped.merge_and_unload()
    with pytest.raises(MismatchError, match=r"q_proj.bias: not in the base.*--drop bias"):
        merge(tmp_path / "base", [tmp_path / "lora"], tmp_path / "out")
    merge(tmp_path / "base", [tmp_path / "lora"], tmp_path / "out", drop={"bias"})


def test_combined_adapters_have_it_at_the_weights_scale(tmp_path: Path) -> None:
    """Their sum has scale 1, and of one alone that times its multiplier: what PEFT cannot say goes into the bias."""
    trained("conv biases of up", tmp_path / "one")
    combine([(tmp_path / "one", 0.5), (tmp_path / "one", 0.5)], tmp_path / "out")
    ours, theirs = (open_adapter(tmp_path / who).deltas for who in ("out", "one"))
    assert ours.keys() == theirs.keys()
    for target, delta in theirs.items():
        np.testing.assert_allclose(ours[target].load().rows(0, 5), delta.load().rows(0, 5), rtol=1e-5, atol=1e-7)


def test_one_that_fits_no_lora_is_left_over_and_said(tmp_path: Path) -> None:
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {f"{module}.lora_A.weight": torch.ones(4, 32), f"{module}.lora_B.weight": torch.ones(32, 4)}
    wrong = {f"{module}.lora_B.bias": torch.ones(5)}
    adapter = open_adapter(save(tmp_path / "wide", factors | wrong, {}))
    assert list(adapter.leftovers) == list(wrong) and "lora-bias" in {finding.code for finding in adapter.findings}
    dora = {f"{module}.lora_magnitude_vector": torch.ones(32), f"{module}.lora_B.bias": torch.ones(32)}
    adapter = open_adapter(save(tmp_path / "dora", factors | dora, {"use_dora": True}))
    assert list(adapter.leftovers) == [f"{module}.lora_B.bias"]


def test_it_is_cut_and_joined_with_a_fused_weight(tmp_path: Path) -> None:
    """q, k and v of FLUX are one weight in ComfyUI's names, and so are their biases."""
    adapter = specimen("biases of up", "flux.1-dev")
    read = ReadOptions(base=inventory.load("flux.1-dev"))
    write_adapter(adapter, tmp_path / "out.safetensors", "comfyui", read=read, arithmetic=Arithmetic(bake_scale=True))
    assert load_file(tmp_path / "out.safetensors")["diffusion_model.double_blocks.0.img_attn.qkv.diff_b"].shape == (9216,)
    convert(tmp_path / "out.safetensors", tmp_path / "back", "diffusers", read=read, arithmetic=Arithmetic(bake_scale=True))
    again = open_adapter(tmp_path / "back", options=read)
    for target, delta in adapter.deltas.items():
        np.testing.assert_array_equal(again.deltas[target].load().rows(0, 8), delta.load().rows(0, 8))
