"""Language models under llama.cpp's names (`blk.0.attn_q`), with the rows its converter moves.

Source: ggml-org/llama.cpp gguf-py/gguf/tensor_mapping.py (names), convert_hf_to_gguf.py (LlamaModel.permute, FalconModel, BloomModel,
GPTNeoXModel). Llama and Mistral interleave the rotary halves of q and k; Falcon, BLOOM and GPT-NeoX regroup their fused qkv.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upparam.bases import inventory
from upparam.bases.base import Base
from upparam.bases.layouts.base import SAME, Component, LayoutMap, Order, Spot, Table, assemble, has

_LLAMA = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "self_attn.qkv_proj": "attn_qkv", "self_attn.dense": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate_up_proj": "ffn_up", "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
_GEMMA = _LLAMA | {
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip
_GPT2 = {
    "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "ln_2": "ffn_norm", "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}  # fmt: skip
_MOE = {"w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps"}
"""A mixture's experts, whose weights llama.cpp stacks: (experts, out, in), which is row upon row."""
_FUSED = {
    "self_attention.query_key_value": "attn_qkv", "self_attention.dense": "attn_output", "attention.query_key_value": "attn_qkv",
    "attention.dense": "attn_output", "mlp.dense_h_to_4h": "ffn_up", "mlp.dense_4h_to_h": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "ln_mlp": "attn_norm", "ln_attn": "attn_norm_2",
}  # fmt: skip


def gguf(base: Base) -> LayoutMap | None:
    """llama.cpp's names; None for what it does not run, and for a base whose kind or, where rows depend on it, number of heads is not known.

    A vision tower is another file there and has no names here.
    """
    config = config_of(base)
    if architecture(base) is None:
        return None
    for body in ("model.", "model.language_model."):
        if has(base, f"{body}layers.0.self_attn."):
            return _llama(base, body, config)
    for start, layers, lines, outer in (
        ("transformer.h.0.attn.c_attn", "transformer.h.{}.", _GPT2, {"transformer.wte": "token_embd", "transformer.wpe": "position_embd"}),
        ("transformer.h.0.self_attention.query_key_value", "transformer.h.{}.", _FUSED,
         {"transformer.word_embeddings": "token_embd", "transformer.word_embeddings_layernorm": "token_embd_norm"}),
        ("gpt_neox.layers.0.attention.query_key_value", "gpt_neox.layers.{}.", _FUSED, {"gpt_neox.embed_in": "token_embd"}),
    ):  # fmt: skip
        if has(base, start):
            ends = {
                "transformer.ln_f": "output_norm",
                "gpt_neox.final_layer_norm": "output_norm",
                "lm_head": "output",
                "embed_out": "output",
            }
            order = SAME if lines is _GPT2 else grouped(base, start)
            return None if order is None else _assemble(base, layers, lines, outer | ends, {"attn_qkv": order})
    return None


def _llama(base: Base, body: str, config: Mapping[str, Any]) -> LayoutMap | None:
    orders: dict[str, Order] = {}
    if architecture(base) == "llama":
        heads = config.get("num_attention_heads")
        groups = config.get("num_key_value_heads") or heads
        if not isinstance(heads, int) or not isinstance(groups, int):
            return None
        orders = {"attn_q": Order("rope", heads), "attn_k": Order("rope", groups)}
    gemma = has(base, f"{body}layers.0.pre_feedforward_layernorm")
    ends = {} if architecture(base) in ("gemma", "gemma2") else {"lm_head": "output"}  # whose head is the embedding
    ends |= {f"{body}embed_tokens": "token_embd", f"{body}norm": "output_norm", f"{body}final_layernorm": "output_norm"}
    return _assemble(base, f"{body}layers.{{}}.", (_GEMMA if gemma else _LLAMA) | _experts(base, body), ends, orders)


def _experts(base: Base, body: str) -> dict[str, str | Spot]:
    """Table lines for the experts of a mixture, by the part of their path below the layer; {} for a dense model."""
    start = f"{body}layers.0.block_sparse_moe.experts."
    count = len({module.path[len(start) :].split(".")[0] for module in base.modules if module.path.startswith(start)})
    if not count:
        return {}
    lines: dict[str, str | Spot] = {"block_sparse_moe.gate": "ffn_gate_inp"}
    for expert in range(count):
        lines |= {f"block_sparse_moe.experts.{expert}.{own}": Spot(foreign, expert) for own, foreign in _MOE.items()}
    return lines


_ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma": "gemma", "gemma2": "gemma2",
    "gemma3": "gemma3", "gemma3_text": "gemma3", "phi": "phi2", "phi3": "phi3", "gpt2": "gpt2", "falcon": "falcon", "bloom": "bloom",
    "gpt_neox": "gptneox",
}  # fmt: skip
"""transformers' model_type -> llama.cpp's `general.architecture`. Source: ggml-org/llama.cpp gguf-py/gguf/constants.py MODEL_ARCH_NAMES."""


def architecture(base: Base) -> str | None:
    """llama.cpp's name for the base's architecture; None for what it does not run or a base without a known config."""
    return _ARCHITECTURES.get(str(config_of(base).get("model_type")))


def config_of(base: Base) -> Mapping[str, Any]:
    """The base's config.json, or the shipped one of its inventory; {} where neither is known."""
    found: Mapping[str, Any] = base.config or inventory.data("_configs.json").get(base.name, {})
    return found


def grouped(base: Base, fused: str) -> Order | None:
    """How Falcon, BLOOM and GPT-NeoX group the rows of a fused qkv; None when the number of heads is not known.

    How many groups follows from the rows: of each group its query heads, one key head and one value head. (Falcon's config may state
    key heads that a model with one for all does not have.)
    """
    config, dense = config_of(base), base.by_path.get(f"{fused.rpartition('.')[0]}.dense")
    heads = config.get("num_attention_heads", config.get("n_head"))
    if type(heads) is not int or heads < 1 or dense is None or dense.shape[1] % heads:
        return None
    groups = (base.by_path[fused].shape[0] // (dense.shape[1] // heads) - heads) // 2
    # One group holds all q, then k, then v: as llama.cpp wants it already.
    return SAME if groups == 1 else Order("groups", groups, heads // groups) if groups > 1 else None


def _assemble(base: Base, layers: str, lines: Mapping[str, str | Spot], outer: Mapping[str, str], orders: Mapping[str, Order]) -> LayoutMap:
    table: dict[str, str | Spot] = {}
    for part, line in lines.items():
        spot = Spot(line, order=orders.get(line, SAME)) if isinstance(line, str) else line
        table[layers + part] = spot._replace(foreign=f"blk.{{}}.{spot.foreign}")
    return assemble("gguf", base, [Component("", Table(table | dict(outer)))])
