"""What a readable tensor file is when it is no adapter: rules over names, shapes and structure, tried in order."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from upparam.containers.base import Opaque, TensorFile
from upparam.operations.kinds_other import Kind, other
from upparam.patterns import regex
from upparam.wording import counted


def classify(file: TensorFile) -> Kind:
    """The kind of a tensor file that no dialect claims."""
    for rule in RULES:
        kind = rule(file)
        if kind is not None:
            return kind
    if not file.tensors:
        return Kind("no-tensors", "readable, but it holds no tensors", (f"{file.container} without tensors",))
    return Kind("tensors", "named tensors of no kind upparam knows", (_names(file),), 0.5)


def _keys(file: TensorFile) -> set[str]:
    return {str(key) for key in file.structure} if isinstance(file.structure, dict) else set()


def _names(file: TensorFile, count: int = 3) -> str:
    shown = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in list(file.tensors.items())[:count])
    return f"{counted(len(file.tensors), 'tensor')} such as {shown}"


def _optimizer(file: TensorFile) -> Kind | None:
    if {"state", "param_groups"} <= _keys(file):
        return Kind("optimizer-state", "an optimizer's state, a training leftover; it holds no adapter", ("keys state and param_groups",))
    return None


def _scheduler(file: TensorFile) -> Kind | None:
    keys = _keys(file)
    if {"last_epoch", "_step_count"} <= keys:
        return Kind("scheduler-state", "a learning-rate scheduler's state, a training leftover", ("keys last_epoch and _step_count",))
    if {"scale", "growth_factor", "backoff_factor"} <= keys:
        return Kind("grad-scaler-state", "a gradient scaler's state, a training leftover", ("keys scale, growth_factor, backoff_factor",))
    return None


def _rng(file: TensorFile) -> Kind | None:
    keys = _keys(file)
    if "cpu" in keys and keys & {"python", "numpy", "cuda"}:
        return Kind("rng-state", "random generator states, a training leftover", (f"keys {', '.join(sorted(keys))}",))
    return None


def _training_args(file: TensorFile) -> Kind | None:
    root: Any = file.structure
    if isinstance(root, Opaque) and (
        "training_args" in root.qualname.lower() or "TrainingArguments" in root.qualname or "Config" in root.qualname
    ):
        return Kind(
            "training-args", "pickled training arguments, a training leftover; it holds no tensors", (f"an object of {root.qualname}",)
        )
    return None


def _textual_inversion(file: TensorFile) -> Kind | None:
    keys = _keys(file)
    if "string_to_param" in keys:
        return _embedding("a textual inversion embedding (AUTOMATIC1111 form)", "key string_to_param")
    names = set(file.tensors)
    if names and names <= {"clip_l", "clip_g", "t5xxl", "emb_params"}:
        return _embedding("a textual inversion embedding", f"tensors {', '.join(sorted(names))}")
    tokens = [name for name in names if re.fullmatch(r"<[^<>]+>", name)]
    if tokens and len(tokens) == len(names):
        return _embedding("a textual inversion embedding (diffusers form)", f"token {tokens[0]} {list(file.tensors[tokens[0]].shape)}")
    if "learned_embeds" in file.name and all(len(tensor.shape) <= 2 for tensor in file.tensors.values()):
        return _embedding("a textual inversion embedding", f"named {file.name}", _names(file), confidence=0.8)
    return None


def _embedding(message: str, *evidence: str, confidence: float = 1.0) -> Kind:
    why = "it is a new word for the text encoder, not a change of weights, so it cannot be merged or converted alone"
    remedy = "put it in the embeddings folder, or load it with load_textual_inversion"
    return Kind("textual-inversion", f"{message}; {why}", evidence, confidence, remedy)


_MODELS = (
    ("model.diffusion_model.", "a whole Stable Diffusion checkpoint in LDM/SGM naming"),
    ("double_blocks.0.img_attn.qkv.weight", "a whole Flux transformer in BFL naming"),
    ("first_stage_model.", "a VAE in LDM naming"),
    ("encoder.down_blocks.0.resnets.0.conv1.weight", "a VAE in diffusers naming"),
    ("down_blocks.0.resnets.0.conv1.weight", "a whole diffusion UNet in diffusers naming"),
    ("model.layers.0.self_attn.q_proj.weight", "a whole language model (Llama-like naming)"),
    ("layers.0.attention.wq.weight", "a whole language model (Meta's own naming)"),
    ("transformer.h.0.", "a whole language model (GPT-like naming)"),
    ("h.0.attn.c_attn.weight", "a whole language model (GPT-2 naming)"),
    ("gpt_neox.layers.0.", "a whole language model (GPT-NeoX naming)"),
    ("encoder.layer.0.attention.self.query.weight", "a whole encoder model (BERT-like naming)"),
    ("text_model.encoder.layers.0.", "a whole CLIP text encoder"),
    ("image_encoder.blocks.0.attn.qkv.weight", "a whole SAM model"),
    ("blk.0.", "a whole language model (GGUF naming)"),
    (".qweight", "a quantised model (GPTQ or AWQ)"),
)


_FACTORS = regex(r"(^|[./_])(lora|dora|loha|lokr|glora|hada|oft|boft|ia3|vera)[._](?!proj|layer)")


def _factors(file: TensorFile) -> Kind | None:
    hits = [name for name in file.tensors if _FACTORS.search(name)]
    if not hits:
        return None
    beside = "" if len(hits) == len(file.tensors) else f" beside {counted(len(file.tensors) - len(hits), 'other tensor')}"
    what = f"{counted(len(hits), 'tensor')} named like an adapter's factors{beside}, in no arrangement upparam knows"
    return Kind("tensors", what, (f"such as {hits[0]} {list(file.tensors[hits[0]].shape)}",), 0.5)


def _full_model(file: TensorFile) -> Kind | None:
    names = list(file.tensors)
    quantised = file.structure.get("quantised", {}) if isinstance(file.structure, dict) else {}
    everything = [*names, *quantised]
    for mark, message in _MODELS:
        hits = [name for name in everything if mark in name]
        if hits:
            evidence = (f"{counted(len(everything), 'tensor')}, among them {hits[0]}",) + (
                (f"{len(quantised)} of them quantised",) if quantised else ()
            )
            return Kind("full-model", message + "; it holds whole weights, not an adapter", evidence, 0.95)
    return None


def _state_dict(file: TensorFile) -> Kind | None:
    weights = [name for name in file.tensors if name.endswith((".weight", ".bias", ".running_mean", ".running_var", "/weight", "/bias"))]
    if len(weights) >= 2 and len(weights) >= 0.5 * len(file.tensors):
        parameters = sum(tensor.numel for tensor in file.tensors.values())
        return Kind("full-model", f"a model's own weights ({parameters:,} parameters); it holds no adapter factors", (_names(file),), 0.8)
    return None


def _torchscript(file: TensorFile) -> Kind | None:
    if any(finding.code == "torchscript" for finding in file.findings):
        return Kind("torchscript", "a TorchScript program with its weights, not an adapter")
    return None


RULES: tuple[Callable[[TensorFile], Kind | None], ...] = (
    _torchscript,
    _optimizer,
    _scheduler,
    _rng,
    _training_args,
    other,
    _textual_inversion,
    _factors,
    _full_model,
    _state_dict,
)
