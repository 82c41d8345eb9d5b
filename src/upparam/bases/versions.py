"""Modules that transformers names otherwise in memory than the checkpoints on disk do.

Adapters carry the names in memory, and version 5 changed many: PEFT trains `model.visual.blocks.0`, the checkpoint of the same model holds
`visual.blocks.0`. transformers renames when it loads and renames back when it saves, so files keep the older names. Some weights it also takes apart: the rows of one on disk are
two or three modules in memory.

Source: huggingface/transformers 5.23 src/transformers/conversion_mapping.py; of what it says, what renames a weight that an adapter can change.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, cached_property

from upparam.adapter import Target

Rules = tuple[tuple[str, str | tuple[str, ...]], ...]
"""Patterns searched for in the older name of a parameter, and what stands there in the newer; each is applied to what the one before made.

Several names are those of as many equal parts of its rows, first rows first.
"""

_ATTENTION: Rules = (
    (r"attention\.(?:attention|self)\.query\.", "attention.q_proj."),
    (r"attention\.(?:attention|self)\.key\.", "attention.k_proj."),
    (r"attention\.(?:attention|self)\.value\.", "attention.v_proj."),
    (r"attention\.output\.dense\.", "attention.o_proj."),
)
_QKV = (".self_attn.q_proj.", ".self_attn.k_proj.", ".self_attn.v_proj.")
_NORMS: Rules = (
    (r"\.norm1\.", ".post_attention_layernorm."),
    (r"\.norm2\.", ".post_mlp_layernorm."),
    (r"(^|\.)emb_ln\.", r"\1embeddings.LayerNorm."),
)
_MLP: Rules = ((r"\.intermediate\.dense\.", ".mlp.fc1."), (r"\.output\.dense\.", ".mlp.fc2."))

FAMILIES: dict[tuple[str, ...], Rules] = {
    (
        "llava", "llava_next", "llava_next_video", "llava_onevision", "vipllava", "video_llava", "paligemma", "gemma3", "mistral3", "internvl", "mllama",
        "aya_vision", "aria", "got_ocr2", "fuyu", "emu3", "qwen2_audio", "voxtral", "audioflamingo3",
    ): (
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^language_model\.model\.", "language_model."),
        (r"^text_model\.lm_head\.", "lm_head."),
        (r"^text_model\.model\.", "text_model."),
        (r"^(vision_tower|image_tower|video_tower)\.vision_model\.", r"\1."),
        (
            r"^(language_model|text_model|vision_tower|image_tower|video_tower|audio_tower|vision_model|multi_modal_projector|vision_embed_tokens)\.",
            r"model.\1.",
        ),
    ),
    ("qwen2_vl", "qwen2_5_vl"): ((r"^visual\.", "model.visual."), (r"^model\.(?!language_model\.|visual\.)", "model.language_model.")),
    ("vit", "deit", "beit", "audio-spectrogram-transformer", "vit_mae", "vit_msn", "vivit", "ijepa"): (
        (r"encoder\.layer\.", "layers."), *_ATTENTION, *_MLP,
    ),
    ("dinov2", "dinov2_with_registers"): (
        *_ATTENTION, (r"\.mlp\.weights_in\.", (".mlp.gate_proj.", ".mlp.up_proj.")), (r"\.mlp\.weights_out\.", ".mlp.down_proj."),
    ),
    ("swin",): (*_ATTENTION, *_MLP),
    ("segformer",): (
        (r"encoder\.block\.(\d+)\.", r"stages.\1.blocks."),
        (r"attention\.self\.sr\.", "attention.sequence_reduction.sequence_reduction."),
        *_ATTENTION,
        (r"\.mlp\.dense([12])\.", r".mlp.fc\1."),
    ),
    ("detr",): (
        (r"backbone\.conv_encoder\.", "backbone."), (r"(_attn)\.out_proj\.", r"\1.o_proj."), (r"(layers\.\d+)\.fc([12])\.", r"\1.mlp.fc\2."),
    ),
    ("mixtral",): ((r"\.block_sparse_moe\.", ".mlp."),),
    ("phimoe",): ((r"\.block_sparse_moe\.", ".mlp."), (r"\.gate\.weight$", ".router.weight")),
    ("nomic_bert",): (
        (r"encoder\.layers\.", "layers."), (r"\.attn\.Wqkv\.", _QKV), (r"\.attn\.out_proj\.", ".self_attn.o_proj."), (r"\.fc11\.", ".up_proj."),
        (r"\.fc12\.", ".gate_proj."), (r"\.fc2\.", ".down_proj."), *_NORMS,
    ),
    ("jina_embeddings_v3",): (
        (r"encoder\.layers\.", "layers."), (r"\.mixer\.Wqkv\.", _QKV), (r"\.mixer\.out_proj\.", ".self_attn.o_proj."), *_NORMS,
    ),
    ("gte",): (
        (r"^new\.", ""), (r"encoder\.layer\.", "layers."), (r"\.attention\.qkv_proj\.", _QKV), (r"\.attention\.o_proj\.", ".self_attn.o_proj."),
        (r"\.mlp\.up_gate_proj\.", (".mlp.up_proj.", ".mlp.gate_proj.")), (r"\.attn_ln\.", ".post_attention_layernorm."),
        (r"\.mlp_ln\.", ".post_mlp_layernorm."), (r"lm_head\.norm\.", "lm_head.layer_norm."),
    ),
    ("gpt_neox",): ((r"^embed_out\.", "lm_head."),),
}  # fmt: skip
"""model_type of the config -> how the names changed."""


def rules_of(model_type: object) -> Rules:
    """How the names of a model with this `model_type` in its config changed; () where they did not."""
    return next((rules for types, rules in FAMILIES.items() if model_type in types), ())


def newer(name: str, rules: Rules) -> Sequence[str]:
    """What a parameter of this name is called under the rules, of several parts each; a newer name stays."""
    names = [name]
    for pattern, instead in rules:
        words = (instead,) if isinstance(instead, str) else instead
        found = _compiled(pattern)
        names = [made for one in names for made in ([found.sub(word, one) for word in words] if found.search(one) else [one])]
    return names


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.MULTILINE)  # so that one search through many names, a line each, tells whether one of them matches


def parts(name: str, shape: Sequence[int], rules: Rules) -> dict[str, Target]:
    """Newer name -> what of the parameter of this name and shape it is. One whose rows cannot be shared out keeps its name."""
    names = newer(name, rules)
    if len(names) > 1 and (not shape or shape[0] % len(names)):
        names = [name]
    place = Target("").renamed(name)
    if len(names) == 1:
        return {names[0]: place}
    rows = shape[0] // len(names)
    return {new: place._replace(rows=(number * rows, (number + 1) * rows)) for number, new in enumerate(names)}


def renamed(shapes: Mapping[str, Sequence[int]]) -> Iterator[tuple[Rules, dict[str, Target]]]:
    """The rules of each family that change some of these parameters' names, and newer name -> what of which parameter it is, for all of them.

    Rules that make two names one are left out: the parameters are not of these models.
    """
    names = "\n".join(shapes)
    for rules in FAMILIES.values():
        if not any(_compiled(pattern).search(names) for pattern, _ in rules):
            continue
        found = [parts(name, shape, rules) for name, shape in shapes.items()]
        older = {new: place for one in found for new, place in one.items()}
        if len(older) == sum(map(len, found)) and any(new != place.name for new, place in older.items()):
            yield rules, older


def within(place: Target, rows: tuple[int, int] | None) -> Target:
    """These rows, counted from the first of `place`, of the same parameter."""
    if rows is None or place.rows is None:
        return place if rows is None else place._replace(rows=rows)
    return place._replace(rows=(place.rows[0] + rows[0], place.rows[0] + rows[1]))


class Older:
    """What a model with these parameters calls those that transformers calls otherwise since version 5."""

    def __init__(self, shapes: Mapping[str, Sequence[int]]) -> None:
        self._shapes = shapes

    @cached_property
    def _families(self) -> list[tuple[Rules, dict[str, Target]]]:
        return list(renamed(self._shapes))

    def __call__(self, name: str) -> Target | None:
        """The model's own name of the parameter, with the rows where it is a part of one there; None where there is none or several could be meant."""
        found = {older[names[0]] for rules, older in self._families if len(names := newer(name, rules)) == 1 and names[0] in older}
        return found.pop() if len(found) == 1 else None
