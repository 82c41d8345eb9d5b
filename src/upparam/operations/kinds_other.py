"""Adapters that are no change of weights, and those of libraries upparam does not convert: what they are, why, and what would help.

A table of names as their libraries save them. Sources: huggingface/peft src/peft/utils/save_and_load.py and tuners/adaption_prompt;
adapter-hub/adapters src/adapters/methods/*.py; ZrrSkywalker/LLaMA-Adapter; Lightning-AI/litgpt litgpt/{adapter,adapter_v2}.py;
NVIDIA/NeMo nemo/collections/nlp/modules/common/megatron/adapters;
NVIDIA/TensorRT-LLM examples/hf_lora_convert.py; lllyasviel/ControlNet cldm/cldm.py; Stability-AI's Control-LoRA files as
comfyanonymous/ComfyUI comfy/controlnet.py reads them; kohya-ss/sd-scripts networks/control_net_lllite.py; TencentARC/T2I-Adapter;
tencent-ailab/IP-Adapter ip_adapter/ip_adapter.py; AUTOMATIC1111/stable-diffusion-webui modules/hypernetworks/hypernetwork.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from upparam.containers.base import TensorFile
from upparam.containers.side import read_json
from upparam.errors import UpparamError
from upparam.patterns import regex


@dataclass(frozen=True)
class Kind:
    """What a file is: a stable `name`, a sentence, the facts it rests on, how sure we are, and what a person may do with it."""

    name: str
    message: str
    evidence: tuple[str, ...] = ()
    confidence: float = 1.0
    remedy: str = ""

    @property
    def sentence(self) -> str:
        """The message with the remedy."""
        return f"{self.message}; {self.remedy}" if self.remedy else self.message


@dataclass(frozen=True)
class Sign:
    """A kind and the tensor names that give it away; `lora` when names of LoRA factors are looked at too.

    `words`: every such name holds one of them, which is quickly seen.
    """

    kind: str
    words: tuple[str, ...]
    names: str
    message: str
    remedy: str
    lora: bool = False


_INPUTS = "it learns inputs, not changes of weights, so nothing can be merged or converted"
_NETWORK = "it is a network beside the base, not a change of the base's weights, so it cannot be merged or converted"
_TRAIN = "use it with the library that made it; only training on its outputs makes a LoRA of it"
_EXTRACT = "merge it there and give 'upparam extract' the result"

SIGNS = (
    Sign("llama-adapter", ("adaption_", "adapter_", "gating_factor"),
         r"\.adaption_(prompt|gate)$|(^|\.)adapter_query\.weight$|\.(adapter_wte\.weight|gating_factor)$",
         f"LLaMA-Adapter: prompts that attention reads through a gate; {_INPUTS}", _TRAIN),
    Sign("prefix-tuning", ("prefix_",),
         r"(^|\.)prefix_encoder\.|\.prefix_tunings\.", f"prefix tuning: keys and values put before every layer's own; {_INPUTS}", _TRAIN),
    Sign("prompt-tuning", ("prompt",),
         r"(^|[./])prompt_embeddings$|(^|\.)prompt_tunings?\.|(^|\.)soft_prompt\.", f"virtual tokens (prompt, prefix or p-tuning); {_INPUTS}",
         _TRAIN),
    Sign("bottleneck-adapter", ("adapter",),
         r"\.adapters\.[^.]+\.adapter_(down|up)\.|\.adapter(_layer)?\.(down|up)(_proj|_sampler|_project)?\.(weight|bias)$|\.adapter_layer\.adapter_\d+\.linear_(in|out)\.",
         "bottleneck adapters (Houlsby, Pfeiffer, AdapterHub): layers between the base's, with a non-linearity inside, which no change of a weight "
         "computes, so they cannot be merged or converted", _TRAIN),
    Sign("adapterhub-lora", (".loras.",),
         r"\.loras\.[^.]+\.lora_[AB]$", "a LoRA of the adapters library (AdapterHub), which upparam does not read",
         "merge it there (merge_adapter) and give 'upparam extract' the result", lora=True),
    Sign("nemo-lora", (".linear_in.", ".linear_out."),
         r"\.adapter_layer\.lora_\w+_adapter\.linear_(in|out)\.weight$|\.(linear_\w+|in_proj|out_proj)\.adapter\.linear_(in|out)\.weight$",
         "a NeMo (Megatron) LoRA, which upparam does not read: its fused weights lie in Megatron's order",
         "merge it with NeMo (merge_lora), convert the model to Hugging Face and give 'upparam extract' the result", lora=True),
    Sign("minlora", (".parametrizations.",),
         r"\.parametrizations\.weight\.\d+\.lora_[AB]$", "a minLoRA adapter (torch parametrizations), which upparam does not read", _EXTRACT,
         lora=True),
    Sign("control-lora", ("lora_controlnet",),
         r"^lora_controlnet$",
         "a Control-LoRA: a ControlNet stored as low-rank differences from the base's own weights. It is run beside the base, so merging it would "
         "not do what it does", "load it as a ControlNet", lora=True),
    Sign("controlnet", ("control_model.", "zero_convs.", "input_hint_block.", "controlnet_"),
         r"^(control_model\.|zero_convs\.|input_hint_block\.|controlnet_(cond_embedding|down_blocks|mid_block|blocks|single_blocks|x_embedder)\.)",
         f"a ControlNet; {_NETWORK}", "load it as a ControlNet"),
    Sign("controlnet-lllite", ("lllite_",),
         r"^lllite_", f"a ControlNet-LLLite: small networks conditioned on a picture; {_NETWORK}", "load it as a ControlNet-LLLite"),
    Sign("t2i-adapter", ("body.",),
         r"^(adapter\.)?body\.\d+\.(block[12]|in_conv|resnets)\b", f"a T2I-Adapter; {_NETWORK}", "load it as a T2I-Adapter"),
    Sign("ip-adapter", ("ip_adapter", "_ip.", "image_proj"),
         r"(^|[./])(ip_adapter|ip_adapter_\w+|to_[kv]_ip)[./]|^image_proj[./]",
         f"an IP-Adapter: it adds attention to a picture's embedding; {_NETWORK}",
         "load it as an IP-Adapter (of a FaceID one the LoRA is also published as a file of its own)"),
)  # fmt: skip
"""In the order they are looked for."""

_LEARNED = {
    "PROMPT_TUNING": ("prompt-tuning", "prompt tuning: embeddings of virtual tokens"),
    "MULTITASK_PROMPT_TUNING": ("prompt-tuning", "multitask prompt tuning: embeddings of virtual tokens"),
    "CPT": ("prompt-tuning", "context-aware prompt tuning: embeddings of virtual tokens"),
    "P_TUNING": ("p-tuning", "p-tuning: embeddings of virtual tokens that an encoder made"),
    "PREFIX_TUNING": ("prefix-tuning", "prefix tuning: keys and values put before every layer's own"),
    "CARTRIDGE": ("prefix-tuning", "a cartridge: keys and values put before every layer's own"),
}
"""peft_type -> what it is."""
_FACTOR = regex(r"lora|hada_|lokr_|loha")
_LAYER_SIZES = {320, 640, 768, 1024, 1280, 2048}


def other(file: TensorFile) -> Kind | None:
    """The kind of a file that only looks like an adapter upparam could convert; None for everything else. Reads names, no data."""
    text = "\n".join(file.tensors)
    for sign in SIGNS:
        if not any(word in text for word in sign.words):
            continue
        pattern = re.compile(sign.names)
        own = [name for name in file.tensors if pattern.search(name) and (sign.lora or not _FACTOR.search(name))]
        if own:
            evidence = (f"{len(own)} of {len(file.tensors)} tensors are named like {own[0]}",)
            return _said_by_peft(file, evidence) or Kind(sign.kind, sign.message, evidence, 0.95, sign.remedy)
    return _tensorrt(file) or _hypernetwork(file)


def _said_by_peft(file: TensorFile, evidence: tuple[str, ...]) -> Kind | None:
    """What the PEFT config beside learned inputs calls them."""
    try:
        config: Mapping[str, Any] = (
            read_json(file.path.parent / "adapter_config.json") if "prompt_embeddings" in file.tensors else None
        ) or {}
    except UpparamError:
        return None
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in _LEARNED:
        return None
    name, what = _LEARNED[kind]
    return Kind(name, f"{what}; {_INPUTS}", (*evidence, f"peft_type {kind} in adapter_config.json"), 1.0, _TRAIN)


def _tensorrt(file: TensorFile) -> Kind | None:
    """hf_lora_convert.py writes model.lora_weights.npy, all factors in one array, and model.lora_config.npy, a row for each module."""
    if not re.fullmatch(r"(.*\.)?lora_(weights|config)\.(npy|bin)", file.name) or len(file.tensors) != 1:
        return None
    (tensor,) = file.tensors.values()
    return Kind(
        "tensorrt-llm-lora", "a LoRA packed for TensorRT-LLM, every factor in one array, which upparam does not read",
        (f"named {file.name}", f"one array {list(tensor.shape)}"), 0.9, "take the PEFT or NeMo adapter it was converted from",
    )  # fmt: skip


def _hypernetwork(file: TensorFile) -> Kind | None:
    """A dict whose keys are widths of the cross-attention's context, each with a pair of small networks."""
    keys = set(file.structure) if isinstance(file.structure, dict) else set()
    sizes = sorted(key for key in keys if isinstance(key, int) and key in _LAYER_SIZES)
    if not sizes or not all(isinstance(file.structure[size], (list, tuple)) for size in sizes):
        return None
    return Kind(
        "hypernetwork", f"a hypernetwork (AUTOMATIC1111): networks that change the keys and values of cross-attention; {_NETWORK}",
        (f"networks for widths {', '.join(map(str, sizes))}",), 0.95, "load it as a hypernetwork",
    )  # fmt: skip
