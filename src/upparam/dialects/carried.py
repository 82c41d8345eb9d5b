"""The metadata that a file may take over: from one of another dialect, or from several that are combined."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

from upparam.adapter import Adapter

ADAPTER_CONFIG = "lora_adapter_metadata"
"""Under this diffusers keeps PEFT's config. Beside stored alphas it scales a second time, or makes diffusers refuse the file."""
HASHES = ("sshs_model_hash", "sshs_legacy_hash")
"""Hashes of a kohya file's bytes."""
MODEL_HASH = "modelspec.hash_sha256"
"""Stability's hash of the tensors, which goes by their order and is not made anew."""


def carried(adapter: Adapter, dialect: str, *, config: bool = False) -> dict[str, str]:
    """The adapter's metadata for a file of `dialect`: all of it where that is its own, else without what holds of the other file alone.

    `config` says that the dialect has no alphas of its own beside which diffusers' config would count twice.
    """
    if adapter.dialect == dialect:
        return dict(adapter.metadata)
    return {key: value for key, value in adapter.metadata.items() if key not in (*HASHES, MODEL_HASH) and (config or key != ADAPTER_CONFIG)}


_OF_THE_BASE = (
    "ss_base_model_version", "ss_v2", "ss_sd_model_name", "ss_sd_model_hash", "ss_new_sd_model_hash", "ss_vae_name", "ss_vae_hash",
    "ss_new_vae_hash", "ss_clip_skip", "ss_zero_terminal_snr", "ss_resolution", "ss_network_module", "modelspec.sai_model_spec",
    "modelspec.architecture", "modelspec.implementation", "modelspec.resolution", "modelspec.prediction_type", "modelspec.encoder_layer",
    "modelspec.title", "modelspec.author", "modelspec.license", "modelspec.trigger_phrase",
)  # fmt: skip
"""What a file says of the model it is for and of its use: true of several adapters together where all say the same."""
_MADE_ANEW = ("ss_network_dim", "ss_network_alpha", *HASHES)
"""What the writer says of any adapter whose metadata has the key, from its own deltas and bytes."""
_SPEC, _TITLE, _MERGED = "modelspec.sai_model_spec", "modelspec.title", "modelspec.merged_from"


def agreed(adapters: Sequence[Adapter]) -> tuple[dict[str, str], list[str]]:
    """(the metadata of a combination, the keys left out): what all adapters say alike of their base, and what is made anew from the result.

    Facts of one training (steps, rates, data, dates, names) are not those of several, even where they are the same. The sources' titles
    are told as Stability's specification has it (`modelspec.merged_from`), where all follow it.
    """
    every = [adapter.metadata for adapter in adapters]
    first = every[0]
    kept = {key: first[key] for key in _OF_THE_BASE if key in first and all(other.get(key) == first[key] for other in every)}
    if "format" in first:
        kept["format"] = first["format"]
    kept |= {key: "" if key in HASHES else first[key] for key in _MADE_ANEW if all(key in other for other in every)}
    if _SPEC in kept:
        titles = [adapter.metadata.get(_TITLE, "") for adapter in adapters]
        told = len(set(titles)) == len(titles) and all(titles)
        kept[_MERGED] = ", ".join(titles if told else (PurePath(adapter.files[0]).stem if adapter.files else "?" for adapter in adapters))
        kept.setdefault(_TITLE, "LoRA")
    return kept, sorted({key for other in every for key in other if key not in kept})
