"""The metadata that a file of one dialect may take over from that of another."""

from __future__ import annotations

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
