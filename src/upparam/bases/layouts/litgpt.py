"""Language models under LitGPT's names (`transformer.h.0.attn.qkv`), which stack all rows of q, then k, then v.

Source: Lightning-AI/litgpt litgpt/scripts/convert_hf_checkpoint.py (weight maps, qkv_reassemble). q, k and v keep their rows; a weight
that transformers has fused group by group (GPT-NeoX, Falcon) is regrouped.
"""

from __future__ import annotations

from upparam.bases.base import Base
from upparam.bases.layouts.base import Component, LayoutMap, Spot, Table, assemble, has, stacked
from upparam.bases.layouts.gguf import config_of, grouped

_LAYER = "transformer.h.{}."
_MLP = {"gate_proj": "fc_1", "up_proj": "fc_2", "down_proj": "proj"}
_EXPERT = {"w1": "fc_1", "w3": "fc_2", "w2": "proj"}
_NORMS = {
    "input_layernorm": "norm_1",
    "post_attention_layernorm": "norm_2",
    "self_attn.q_norm": "attn.norm_q",
    "self_attn.k_norm": "attn.norm_k",
}
_GEMMA2 = _NORMS | {
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "norm_2", "post_feedforward_layernorm": "post_mlp_norm",
}  # fmt: skip
_FUSED = {
    "attention.dense": "attn.proj", "self_attention.dense": "attn.proj", "mlp.dense_h_to_4h": "mlp.fc", "mlp.dense_4h_to_h": "mlp.proj",
    "input_layernorm": "norm_1", "ln_attn": "norm_1", "post_attention_layernorm": "norm_2", "ln_mlp": "norm_2",
}  # fmt: skip
_ENDS = {
    "embed_tokens": "transformer.wte", "norm": "transformer.ln_f", "final_layernorm": "transformer.ln_f", "embed_in": "transformer.wte",
    "final_layer_norm": "transformer.ln_f", "word_embeddings": "transformer.wte", "ln_f": "transformer.ln_f",
}  # fmt: skip


def litgpt(base: Base) -> LayoutMap | None:
    """LitGPT's names; None for what it does not run, and for a fused qkv of which the number of heads is not known.

    A qkv that transformers stacks too, and gate_up, have one name for several there or the reverse: give an `unfused` base.
    """
    if "model.layers.0.self_attn.q_proj" in base.by_path:
        return _apart(base)
    kind = config_of(base).get("model_type")
    neox, falcon = "gpt_neox.layers.0.attention.query_key_value", "transformer.h.0.self_attention.query_key_value"
    fused = neox if kind == "gpt_neox" else falcon
    if kind not in ("gpt_neox", "falcon") or fused not in base.by_path:
        return None
    order = grouped(base, fused)
    if order is None:
        return None
    body, layer, qkv = ("gpt_neox.", "layers.{}.", "attention") if fused == neox else ("transformer.", "h.{}.", "self_attention")
    lines: dict[str, str | Spot] = {f"{body}{layer}{word}": _LAYER + own for word, own in _FUSED.items()}
    lines[f"{body}{layer}{qkv}.query_key_value"] = Spot(_LAYER + "attn.qkv", order=order)
    lines |= {f"{body}{word}": own for word, own in _ENDS.items()}
    return assemble("litgpt", base, [Component("", Table(lines | {"embed_out": "lm_head", "lm_head": "lm_head"}))])


def _apart(base: Base) -> LayoutMap:
    """Of models with q, k and v apart."""
    layer = "model.layers.{}."
    norms = _GEMMA2 if has(base, "model.layers.0.pre_feedforward_layernorm") else _NORMS
    lines: dict[str, str | Spot] = {f"{layer}{word}": _LAYER + own for word, own in norms.items()}
    lines |= stacked(_LAYER + "attn.qkv", [f"{layer}self_attn.{part}_proj" for part in "qkv"])
    lines |= {f"{layer}self_attn.{word}": _LAYER + "attn.proj" for word in ("o_proj", "dense")}
    lines |= {f"{layer}mlp.{word}": f"{_LAYER}mlp.{own}" for word, own in (_MLP | {"fc1": "fc", "fc2": "proj"}).items()}
    lines |= {f"{layer}block_sparse_moe.experts.{{}}.{word}": f"{_LAYER}mlp.experts.{{}}.{own}" for word, own in _EXPERT.items()}
    lines[f"{layer}block_sparse_moe.gate"] = _LAYER + "mlp.gate"
    lines |= {f"model.{word}": own for word, own in _ENDS.items()}
    return assemble("litgpt", base, [Component("", Table(lines | {"lm_head": "lm_head"}))])
