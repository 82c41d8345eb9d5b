"""Textual inversions that travel in the file of an adapter: `bundle_emb.<token>.string_to_param.*`."""

from __future__ import annotations

from collections.abc import Mapping

from upparam.adapter import Extra, ExtraKind
from upparam.tensors import Tensor

_PARAMETER = ".string_to_param.*"
_ENCODERS = (".clip_l", ".clip_g", ".t5", ".t5_out", ".clip_l_out", ".clip_g_out")


def bundled(tensors: Mapping[str, Tensor]) -> tuple[list[Extra], dict[str, Tensor]]:
    """(tokens bundled with the adapter, the rest).

    `bundle_emb.<token>.string_to_param.*` is read by AUTOMATIC1111/stable-diffusion-webui extensions-builtin/Lora/networks.py;
    `bundle_emb.<token>.clip_l` and the like is Nerogar/OneTrainer's form for several encoders.
    """
    extras: list[Extra] = []
    rest: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        token = name.removeprefix("bundle_emb.")
        if token == name or not (token.endswith(_PARAMETER) or token.endswith(_ENCODERS)):
            rest[name] = tensor
        else:
            extras.append(Extra(ExtraKind.TEXTUAL_INVERSION, token.removesuffix(_PARAMETER), tensor))
    return extras, rest


def bundle_name(token: str) -> str:
    """The tensor's name of a bundled token."""
    return f"bundle_emb.{token}" if token.endswith(_ENCODERS) else f"bundle_emb.{token}{_PARAMETER}"
