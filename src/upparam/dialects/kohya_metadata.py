"""The metadata sd-scripts writes beside its tensors: `ss_*` training facts, `sshs_*` hashes, Stability's `modelspec.*`.

Sources: kohya-ss/sd-scripts library/train_util.py (precalculate_safetensors_hashes, build_minimum_network_metadata),
library/sai_model_spec.py (determine_architecture, determine_implementation, determine_resolution).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from upparam.adapter import Adapter
from upparam.algorithms.lora import LoRA
from upparam.bases import inventory
from upparam.bases.base import Base
from upparam.containers.safetensors import header_bytes, layout_order
from upparam.containers.writing import chunks
from upparam.dialects.carried import HASHES, MODEL_HASH, carried
from upparam.findings import Finding, warning
from upparam.tensors import Tensor

_LEGACY_START, _LEGACY_SIZE = 0x100000, 0x10000
"""The old hash covers these bytes of the file and no others."""


class Model(NamedTuple):
    """What sd-scripts calls a base: `ss_base_model_version`, modelspec architecture, implementation and resolution."""

    version: str
    architecture: str
    implementation: str
    resolution: str


_STABILITY = "https://github.com/Stability-AI/generative-models"
_FLUX = "https://github.com/black-forest-labs/flux"
_MODELS: Mapping[str, Model] = {
    "sd1.5": Model("sd_v1", "stable-diffusion-v1", "diffusers", "512x512"),
    "sd2": Model("sd_v2", "stable-diffusion-v2-512", "diffusers", "512x512"),
    "sdxl": Model("sdxl_base_v1-0", "stable-diffusion-xl-v1-base", _STABILITY, "1024x1024"),
    "sd3-medium": Model("sd3m", "stable-diffusion-3-medium", "diffusers", "1024x1024"),
    "sd3.5-medium": Model("sd3.5-medium", "stable-diffusion-3-5-medium", "diffusers", "1024x1024"),
    "sd3.5-large": Model("sd3.5-large", "stable-diffusion-3-5-large", "diffusers", "1024x1024"),
    "flux.1-dev": Model("flux1", "flux-1-dev", _FLUX, "1024x1024"),
    "flux.1-schnell": Model("flux1", "flux-1-schnell", _FLUX, "1024x1024"),
    "chroma": Model("chroma", "chroma", "https://huggingface.co/lodestones/Chroma", "1024x1024"),
    "lumina2": Model("lumina2", "lumina-2", "https://github.com/Alpha-VLLM/Lumina-Image-2.0", "1024x1024"),
}
STATED = ("ss_base_model_version", "modelspec.architecture")
"""Metadata keys in which a file names its base, surest first."""


def stated_base(metadata: Mapping[str, str]) -> str | None:
    """The base a file's metadata names, as an inventory's name; None when it names none that is known."""
    version = metadata.get("ss_base_model_version")
    architecture = metadata.get("modelspec.architecture", "").split("/")[0]
    for name, model in _MODELS.items():
        if architecture == model.architecture:
            return name
    # `sd_v2_v` is SD2 trained for v-prediction; flux1 does not tell dev from schnell.
    return next((name for name, model in _MODELS.items() if version is not None and version.removesuffix("_v") == model.version), None)


def written(adapter: Adapter, base: Base | None, module: str) -> dict[str, str]:
    """The metadata to write: what the adapter brought, completed with what is known; the hashes of an adapter from elsewhere are still empty.

    A kohya file without training metadata is left without: nothing was lost that must be filled in.
    """
    if adapter.dialect in ("kohya", "lycoris"):
        return dict(adapter.metadata)
    found = {**_filled(adapter, base, module), **carried(adapter, "kohya"), HASHES[0]: ""}
    # Other dialects carry what the trainer said of ranks past whatever changes them.
    return found | {key: value for key, value in _dimensions(adapter).items() if not _same_number(found[key], value)}


def stamped(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata with its hashes, where it has them, computed anew."""
    metadata = dict(metadata)
    if HASHES[0] in metadata:
        metadata |= zip(HASHES, hashes(tensors, metadata), strict=True)
    return metadata


def stamped_later(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[dict[str, str], Callable[[], dict[str, str]] | None]:
    """The same for tensors that are still to be written: the metadata with noughts for hashes, and what computes these (None without any)."""
    if HASHES[0] not in metadata:
        return dict(metadata), None
    noughts = dict(metadata) | dict(zip(HASHES, ("0" * 64, "0" * 8), strict=True))
    return noughts, lambda: dict(zip(HASHES, hashes(tensors, metadata), strict=True))


def restated(adapter: Adapter, before: Adapter | None = None) -> dict[str, str]:
    """The adapter's metadata with the rank and alpha it states as the deltas now have them; what it does not state is not added.

    'Dynamic' where they differ, as kohya-ss/sd-scripts networks/resize_lora.py writes. But a network with ranks of their own for
    convolutions states that of the rest: what was so in `before`, the adapter before it was changed, and still is so of some module, stays
    where no module has another number than before. A hash of tensors that are others now is left out.
    """
    now = {key: value for key, value in _dimensions(adapter).items() if key in adapter.metadata}
    if before is not None:
        now = {
            key: value
            for key, value in now.items()
            if not _still_stated(adapter.metadata[key], _NUMBERS[key](before), _NUMBERS[key](adapter))
        }
    return {key: value for key, value in adapter.metadata.items() if key != MODEL_HASH} | now


def contradictions(adapter: Adapter, name: str) -> list[Finding]:
    """Where the metadata of the file `name` states a rank that no LoRA in it has, or a base of another family than its modules'."""
    found = []
    stated, ranks = adapter.metadata.get("ss_network_dim", ""), {delta.rank for delta in adapter.deltas.values() if type(delta) is LoRA}
    # With split_qkv sd-scripts trains the parts of a fused weight and saves them side by side: ranks add.
    split = "split_qkv" in adapter.metadata.get("ss_network_args", "")
    if ranks and stated.isdecimal() and int(stated) not in ranks and not split:
        shown = ", ".join(map(str, sorted(rank for rank in ranks if rank is not None)))
        found.append(
            warning("metadata-differs", name, "the metadata states a rank that no module has", f"ss_network_dim {stated}, ranks {shown}")
        )
    said, hint = stated_base(adapter.metadata), adapter.base
    fits = None if hint is None else inventory.resolve(hint.name)
    if said is not None and hint is not None and fits is not None and said not in hint.lookalikes and _root(said) != _root(fits):
        keys = ", ".join(f"{key} {adapter.metadata[key]}" for key in STATED if key in adapter.metadata)
        found.append(warning("metadata-differs", name, f"the metadata names {said}, and the modules are those of {fits}", keys))
    return found


def _root(base: str) -> str:
    return inventory.known()[base].variant_of or base


def _same_number(one: str, other: str) -> bool:
    try:
        return float(one) == float(other)
    except ValueError:
        return one == other


def _alphas(adapter: Adapter) -> set[float | None]:
    return {delta.alpha for delta in adapter.deltas.values()}


_NUMBERS: Mapping[str, Callable[[Adapter], Collection[float | None]]] = {"ss_network_dim": Adapter.ranks, "ss_network_alpha": _alphas}
"""What each of the keys is of: a number of every module."""


def _dimensions(adapter: Adapter) -> dict[str, str]:
    found = {key: of(adapter) for key, of in _NUMBERS.items()}
    return {key: str(next(iter(one))) if len(one) == 1 and None not in one else "Dynamic" for key, one in found.items()}


def _still_stated(text: str, before: Collection[float | None], now: Collection[float | None]) -> bool:
    return set(now) <= set(before) and any(one is not None and _same_number(text, str(one)) for one in now)


def _filled(adapter: Adapter, base: Base | None, module: str) -> dict[str, str]:
    found = {"ss_network_module": module, **_dimensions(adapter)}
    model = _MODELS.get(base.name) if base is not None else None
    if model is None:
        return found
    return found | {
        "ss_base_model_version": model.version,
        "ss_v2": str(base is not None and base.name == "sd2"),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{model.architecture}/lora",
        "modelspec.implementation": model.implementation,
        "modelspec.title": "LoRA",
        "modelspec.resolution": model.resolution,
    }


def hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[str, str]:
    """(sshs_model_hash, sshs_legacy_hash): sha256 of the tensor data, and eight digits of that of 64 KiB from 1 MiB into the file.

    The file that is meant holds the `ss_` part of the metadata alone, as sd-scripts hashes before adding the rest.
    """
    import hashlib

    kept = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    ordered = layout_order(tensors)
    model, legacy = hashlib.sha256(), hashlib.sha256()
    header = header_bytes(ordered, kept)
    # safetensors writes an empty __metadata__ that our own header leaves out.
    at = len(header) if kept else len(_with_empty_metadata(header))
    start = b"" if at <= _LEGACY_START else (header if kept else _with_empty_metadata(header))[_LEGACY_START : _LEGACY_START + _LEGACY_SIZE]
    legacy.update(start)
    for name, tensor in ordered.items():
        for chunk in chunks(tensor, name):
            model.update(chunk)
            low, high = max(_LEGACY_START - at, 0), _LEGACY_START + _LEGACY_SIZE - at
            if high > 0:
                legacy.update(chunk[low:high])
            at += len(chunk)
    return model.hexdigest(), legacy.hexdigest()[:8]


def _with_empty_metadata(header: bytes) -> bytes:
    text = header[8:].rstrip(b" ")
    text = b'{"__metadata__":{}' + (b"," if len(text) > 2 else b"") + text[1:]
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
