"""Modules that transformers names otherwise in memory than the checkpoints on disk do.

Adapters carry the names in memory, and version 5 changed many: PEFT trains `model.visual.blocks.0`, the checkpoint of the same model holds
`visual.blocks.0`. transformers renames when it loads and renames back when it saves, so files keep the older names.

Source: huggingface/transformers 5.23 src/transformers/conversion_mapping.py; of what it says, what renames a weight that an adapter can change.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import cached_property

from upparam.patterns import regex

Rules = tuple[tuple[str, str], ...]
"""Patterns searched for in the older name of a parameter, and what stands there in the newer; each is applied to what the one before made."""

_ATTENTION: Rules = (
    (r"attention\.(?:attention|self)\.query\.", "attention.q_proj."),
    (r"attention\.(?:attention|self)\.key\.", "attention.k_proj."),
    (r"attention\.(?:attention|self)\.value\.", "attention.v_proj."),
    (r"attention\.output\.dense\.", "attention.o_proj."),
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
    ("dinov2", "dinov2_with_registers"): (*_ATTENTION, (r"\.mlp\.weights_out\.", ".mlp.down_proj.")),
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
    ("gpt_neox",): ((r"^embed_out\.", "lm_head."),),
}  # fmt: skip
"""model_type of the config -> how the names changed."""


def rules_of(model_type: object) -> Rules:
    """How the names of a model with this `model_type` in its config changed; () where they did not."""
    return next((rules for types, rules in FAMILIES.items() if model_type in types), ())


def newer(name: str, rules: Rules) -> str:
    """What a parameter of this name is called under the rules; a newer name stays."""
    for pattern, instead in rules:
        name = regex(pattern).sub(instead, name)
    return name


def renamed(names: Collection[str]) -> Iterator[tuple[Rules, dict[str, str]]]:
    """The rules of each family that change some of these parameters' names, and newer name -> the one given, for all of them.

    Rules that make two names one are left out: the parameters are not of these models.
    """
    for rules in FAMILIES.values():
        older = {newer(name, rules): name for name in names}
        if len(older) == len(names) and any(new != old for new, old in older.items()):
            yield rules, older


class Older:
    """What a model with these parameters calls those that transformers calls otherwise since version 5."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names

    @cached_property
    def _families(self) -> list[tuple[Rules, dict[str, str]]]:
        return list(renamed(self._names))

    def __call__(self, name: str) -> str | None:
        """The model's own name of the parameter; None where there is none or several could be meant."""
        found = {older[new] for rules, older in self._families if (new := newer(name, rules)) in older}
        return found.pop() if len(found) == 1 else None
