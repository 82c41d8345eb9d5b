"""Adapters that are no change of weights, and those of libraries upparam does not convert: named, explained, refused.

What PEFT saves is made by PEFT; the names of the others are those their libraries' sources give (see `upparam.operations.kinds_other`).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from upparam.cli import main
from upparam.containers.base import TensorFile
from upparam.errors import NotAnAdapterError
from upparam.operations.identify import identify
from upparam.operations.kinds_other import SIGNS, other
from upparam.operations.opening import open_adapter
from upparam.tensors import Tensor

torch = pytest.importorskip("torch")

BERT = "bert.encoder.layer.0"
MEGATRON = "model.language_model.encoder.layers.0"
CASES: dict[str, tuple[str, Mapping[str, tuple[int, ...]]]] = {
    "LLaMA-Adapter": ("llama-adapter", {"adapter_query.weight": (10, 16), "layers.1.attention.gate": (1, 4, 1, 1)}),
    "LitGPT adapter": ("llama-adapter", {"transformer.h.2.attn.adapter_wte.weight": (10, 16), "transformer.h.2.attn.gating_factor": (1, 1, 4, 1)}),
    "P-tuning v2": ("prefix-tuning", {"transformer.prefix_encoder.embedding.weight": (128, 64)}),
    "AdapterHub prefix": ("prefix-tuning", {f"{BERT}.attention.self.prefix_tuning.prefix_tunings.x.wte.weight": (4, 8)}),
    "AdapterHub prompt": ("prompt-tuning", {"bert.prompt_tuning.prompt_tunings.x.prompt_embedding.weight": (4, 8)}),
    "AdapterHub bottleneck": (
        "bottleneck-adapter", {f"{BERT}.output.adapters.sst.adapter_down.0.weight": (4, 8), f"{BERT}.output.adapters.sst.adapter_up.weight": (8, 4)},
    ),
    "Houlsby": ("bottleneck-adapter", {f"{BERT}.output.adapter.down_project.weight": (4, 8), f"{BERT}.output.adapter.up_project.weight": (8, 4)}),
    "NeMo bottleneck": ("bottleneck-adapter", {f"{MEGATRON}.adapter_layer.adapter_1.linear_in.weight": (4, 8)}),
    "AdapterHub LoRA": (
        "adapterhub-lora", {f"{BERT}.attention.self.query.loras.sst.lora_A": (4, 8), f"{BERT}.attention.self.query.loras.sst.lora_B": (8, 4)},
    ),
    "NeMo LoRA": (
        "nemo-lora", {f"{MEGATRON}.self_attention.adapter_layer.lora_kqv_adapter.linear_in.weight": (4, 8),
                      f"{MEGATRON}.self_attention.adapter_layer.lora_kqv_adapter.linear_out.weight": (24, 4)},
    ),
    "NeMo 2 LoRA": ("nemo-lora", {"module.decoder.layers.0.self_attention.linear_qkv.adapter.linear_in.weight": (4, 8)}),
    "minLoRA": ("minlora", {"0.parametrizations.weight.0.lora_A": (4, 8), "0.parametrizations.weight.0.lora_B": (8, 4)}),
    "Control-LoRA": (
        "control-lora", {"lora_controlnet": (0,), "input_blocks.1.1.transformer_blocks.0.attn1.to_q.up": (8, 4),
                         "input_blocks.1.1.transformer_blocks.0.attn1.to_q.down": (4, 8), "input_hint_block.0.weight": (16, 3, 3, 3)},
    ),
    "ControlNet": ("controlnet", {"control_model.zero_convs.0.0.weight": (8, 8, 1, 1), "control_model.input_blocks.0.0.weight": (8, 4, 3, 3)}),
    "ControlNet of diffusers": ("controlnet", {"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3), "down_blocks.0.resnets.0.conv1.weight": (8, 8, 3, 3)}),
    "ControlNet of FLUX": ("controlnet", {"controlnet_blocks.0.weight": (8, 8), "transformer_blocks.0.attn.to_q.weight": (8, 8)}),
    "LLLite": ("controlnet-lllite", {"lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.down.0.weight": (4, 8)}),
    "T2I-Adapter": ("t2i-adapter", {"body.0.block1.weight": (8, 8, 3, 3), "conv_in.weight": (8, 192, 3, 3)}),
    "T2I-Adapter of diffusers": ("t2i-adapter", {"adapter.body.0.resnets.0.block1.weight": (8, 8, 3, 3)}),
    "IP-Adapter": ("ip-adapter", {"image_proj.proj.weight": (8, 4), "ip_adapter.1.to_k_ip.weight": (8, 8)}),
    "IP-Adapter FaceID": ("ip-adapter", {"ip_adapter.0.to_q_lora.down.weight": (4, 8), "ip_adapter.0.to_q_lora.up.weight": (8, 4), "ip_adapter.1.to_k_ip.weight": (8, 8)}),
    "IP-Adapter of XLabs": ("ip-adapter", {"double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight": (8, 8)}),
}  # fmt: skip
NOT_MERGED = ("not changes of weights", "not a change", "no change of a weight", "does not read", "would not do what it does")


def explained(path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """identify names it without an error and says why and what would help; the other commands end in one line and exit code 3."""
    identity = identify(path)
    assert not identity.adapters and identity.exit_code == 0
    (report,) = [report for report in identity.files if report.kind == kind]
    assert any(why in report.message for why in NOT_MERGED) and len(report.message.split("; ")) > 1
    (finding,) = [finding for finding in report.findings if finding.code == "kind"]
    assert finding.evidence
    with pytest.raises(NotAnAdapterError) as caught:
        open_adapter(path)
    assert caught.value.remedy and caught.value.found and caught.value.message in report.message
    out = path.with_name("out")
    assert main(["convert", str(path), "--to", "peft", "-o", str(out)]) == 3
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and not out.exists()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", ["safetensors", "torch"])
def test_each_is_named_explained_and_refused(case: str, form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kind, shapes = CASES[case]
    arrays = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    path = tmp_path / f"file.{form}"
    if form == "safetensors":
        save_file(arrays, path)
    else:
        torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, path)
    explained(path, kind, capsys)


def test_every_sign_is_shown() -> None:
    assert {sign.kind for sign in SIGNS} <= {kind for kind, _ in CASES.values()} | {"prompt-tuning"}


def test_nested_ip_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """tencent-ailab's own .bin files are two dicts."""
    path = tmp_path / "ip-adapter.bin"
    torch.save({"image_proj": {"proj.weight": torch.ones(4, 4)}, "ip_adapter": {"1.to_k_ip.weight": torch.ones(4, 4)}}, path)
    explained(path, "ip-adapter", capsys)


def test_hypernetworks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layers = {"linear.0.weight": torch.ones(8, 4), "linear.0.bias": torch.ones(8)}
    path = tmp_path / "anime.pt"
    torch.save({768: (layers, layers), 320: (layers, layers), "step": 5000, "name": "anime", "layer_structure": [1, 2, 1]}, path)
    explained(path, "hypernetwork", capsys)


def test_tensorrt_llm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "model.lora_weights.npy", np.ones((2, 512), np.float16))
    np.save(tmp_path / "model.lora_config.npy", np.array([[1, 0, 8], [1, 1, 8]], np.int32))
    for name in ("model.lora_weights.npy", "model.lora_config.npy"):
        explained(tmp_path / name, "tensorrt-llm-lora", capsys)


def test_textual_inversions(tmp_path: Path) -> None:
    for name, arrays in (
        ("cat.safetensors", {"<cat>": np.ones((1, 768), np.float32)}),
        ("style.safetensors", {"emb_params": np.ones((2, 768), np.float32)}),
    ):
        save_file(arrays, tmp_path / name)
        (report,) = identify(tmp_path / name).files
        assert report.kind == "textual-inversion" and "not a change of weights" in report.message and "embeddings folder" in report.message
        with pytest.raises(NotAnAdapterError, match="textual inversion"):
            open_adapter(tmp_path / name)


def test_onnx_runtime_adapters(tmp_path: Path) -> None:
    """microsoft/onnxruntime onnxruntime/lora/adapter_format/adapter_schema.fbs: a flatbuffer with the identifier TORT."""
    path = tmp_path / "adapter.onnx_adapter"
    path.write_bytes(struct.pack("<I4s", 24, b"TORT") + bytes(range(200)))
    (report,) = identify(path).files
    assert report.kind == "onnx-adapter" and "take the PEFT adapter" in report.message


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("prompt-tuning", "PromptTuningConfig"), ("prefix-tuning", "PrefixTuningConfig"), ("p-tuning", "PromptEncoderConfig"),
        ("prompt-tuning", "MultitaskPromptTuningConfig"), ("llama-adapter", "AdaptionPromptConfig"),
    ],
)  # fmt: skip
def test_what_peft_saves(kind: str, config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    more: dict[str, Any] = {"adapter_len": 4, "adapter_layers": 1} if "Adaption" in config else {"num_virtual_tokens": 4}
    more |= {"encoder_hidden_size": 8} if "Encoder" in config else {"num_tasks": 2} if "Multitask" in config else {}
    folder = tmp_path / "theirs"
    peft.get_peft_model(model, getattr(peft, config)(task_type="CAUSAL_LM", **more)).save_pretrained(folder)
    explained(folder, kind, capsys)
    (folder / "adapter_config.json").unlink()
    explained(folder / "adapter_model.safetensors", "llama-adapter" if kind == "llama-adapter" else "prompt-tuning", capsys)


def test_a_method_peft_has_and_upparam_does_not_is_no_error(tmp_path: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    peft.get_peft_model(model, peft.FourierFTConfig(n_frequency=10, target_modules=["q_proj"])).save_pretrained(tmp_path / "theirs")
    identity = identify(tmp_path / "theirs")
    (report,) = identity.adapters
    assert report.kind == "unsupported-adapter" and identity.exit_code == 0
    assert "FOURIERFT" in next(finding.message for finding in report.findings if finding.code == "unsupported")


@pytest.mark.parametrize(
    "names",
    [
        (
            "base_model.model.model.layers.0.adapter.down_proj.lora_A.weight",
            "base_model.model.model.layers.0.adapter.down_proj.lora_B.weight",
        ),
        ("controlnet_blocks.0.lora_A.weight", "controlnet_blocks.0.lora_B.weight"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight"),
        ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight",),
        ("transformer.h.0.attn.c_attn.lora_A", "transformer.h.0.attn.c_attn.lora_B"),
        ("model.layers.0.self_attn.q_proj.lora_a", "model.layers.0.self_attn.q_proj.lora_b"),
        ("blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b"),
        ("prompt.weight", "body.weight", "adapter.weight"),
    ],
)
def test_adapters_of_such_modules_are_still_adapters(names: tuple[str, ...]) -> None:
    assert other(TensorFile(Path("x"), "safetensors", {name: Tensor.of(np.ones((2, 2), np.float32)) for name in names})) is None


def test_nothing_of_the_corpus_is_taken_for_one(corpus: Path) -> None:
    from upparam.containers import open_all
    from upparam.errors import UpparamError

    seen = 0
    for path in sorted(corpus.rglob("*")):
        try:
            files = open_all(path) if path.is_file() else []
        except UpparamError:
            continue
        for file in files:
            seen += 1
            assert other(file) is None, path
    assert seen > 10
