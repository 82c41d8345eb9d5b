"""Language models under torchtune's names (`layers.0.attn.q_proj`), with the rows its converters move.

Source: meta-pytorch/torchtune torchtune/models/convert_weights.py, torchtune/models/{gemma2,qwen2,qwen3,phi3}/_convert_weights.py. Llama,
Mistral and Gemma lie there as in Meta's files, the rotary halves of q and k interleaved; Qwen and Phi lie as in transformers.
"""

from __future__ import annotations

from upparam.bases.base import Base
from upparam.bases.layouts.base import SAME, Component, LayoutMap, Order, Spot, Table, assemble
from upparam.bases.layouts.gguf import config_of

_ATTENTION = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "o_proj": "output_proj"}
_MLP = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_NORMS = {
    "input_layernorm": "sa_norm",
    "post_attention_layernorm": "mlp_norm",
    "self_attn.q_norm": "attn.q_norm",
    "self_attn.k_norm": "attn.k_norm",
}
_GEMMA2 = {
    "input_layernorm": "sa_norm", "post_attention_layernorm": "sa_scale", "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_scale",
}  # fmt: skip
_INTERLEAVED = ("llama", "mistral", "gemma", "gemma2")
_PLAIN = ("qwen2", "qwen3", "phi3")
"""transformers' model_type of what torchtune trains and upparam has names for."""

WORDS = {f"attn.{own}": f"self_attn.{word}" for word, own in _ATTENTION.items()} | {
    f"mlp.{own}": f"mlp.{word}" for word, own in _MLP.items()
}
"""torchtune's word for a projection, below its layer -> transformers'."""


def torchtune(base: Base) -> LayoutMap | None:
    """torchtune's names; None for what it does not train, and where the kind of model or the number of heads is not known.

    Fused projections have no name there: give an `unfused` base.
    """
    kind = config_of(base).get("model_type")
    if kind not in _INTERLEAVED + _PLAIN or "model.layers.0.self_attn.q_proj" not in base.by_path:
        return None
    orders = {} if kind in _PLAIN else _interleaved(base)
    if orders is None:
        return None
    layer = "model.layers.{}."
    lines: dict[str, str | Spot] = {
        f"{layer}{word}": Spot(f"layers.{{}}.{own}", order=orders.get(own, SAME)) for own, word in WORDS.items()
    }
    lines |= {
        f"{layer}{word}": Spot(f"layers.{{}}.{own}", weight=".scale") for word, own in (_GEMMA2 if kind == "gemma2" else _NORMS).items()
    }
    lines |= {
        "model.embed_tokens": "tok_embeddings", "lm_head": "output",
        "model.norm": Spot("norm.rms_norm" if kind == "gemma2" else "norm", weight=".scale"),
    }  # fmt: skip
    return assemble("torchtune", base, [Component("", Table(lines))])


def _interleaved(base: Base) -> dict[str, Order] | None:
    config = config_of(base)
    heads = config.get("num_attention_heads")
    groups = config.get("num_key_value_heads") or heads
    if not isinstance(heads, int) or not isinstance(groups, int):
        return None
    return {"attn.q_proj": Order("rope", heads), "attn.k_proj": Order("rope", groups)}
