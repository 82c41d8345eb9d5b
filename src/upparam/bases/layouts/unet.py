"""The Stable Diffusion UNet under the names of the original files (`input_blocks.4.1...`), computed from the blocks a base has.

Source: huggingface/diffusers src/diffusers/loaders/single_file_utils.py (convert_ldm_unet_checkpoint), CompVis/stable-diffusion
ldm/modules/diffusionmodules/openaimodel.py.
"""

from __future__ import annotations

from upparam.bases.base import Base
from upparam.bases.layouts.base import Naming, Spot
from upparam.patterns import regex

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_WHOLE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "class_embedding.linear_1": "label_emb.0.0",
    "class_embedding.linear_2": "label_emb.0.2",
    "class_embedding": "label_emb",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_PIECE = regex(r"((?:down_blocks|up_blocks)\.\d+|mid_block)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")


def ldm_unet(base: Base, component: str = "unet.") -> Naming:
    """The naming of this base's UNet."""
    blocks = _positions(base, component)

    def name(path: str) -> Spot | None:
        if path in _WHOLE:
            return Spot(_WHOLE[path])
        piece = _PIECE.fullmatch(path)
        if piece is None:
            return None
        block, kind, index, rest = piece.groups()
        place = blocks.get((block, kind, int(index)))
        if place is None:
            return None
        if kind == "resnets":
            rest = _RESNET.get(rest, rest)
        elif kind == "downsamplers":
            rest = "op"
        return Spot(f"{place}.{rest}")

    return name


def _positions(base: Base, component: str) -> dict[tuple[str, str, int], str]:
    """(block, kind, index) -> the original block it is, by counting the resnets of each block as the original files do."""
    pieces = {piece.groups()[:3] for module in base.modules if (piece := _PIECE.fullmatch(module.path[len(component) :]))}
    found = {(block, kind, int(index)) for block, kind, index in pieces}

    def depth(side: str) -> int:
        return len({block for block, _, _ in found if block.startswith(side)})

    def layers(block: str) -> int:
        return sum(1 for name, kind, _ in found if (name, kind) == (block, "resnets"))

    places: dict[tuple[str, str, int], str] = {
        ("mid_block", "resnets", 0): "middle_block.0",
        ("mid_block", "attentions", 0): "middle_block.1",
        ("mid_block", "resnets", 1): "middle_block.2",
    }
    at = 1
    for number in range(depth("down_blocks")):
        block = f"down_blocks.{number}"
        for index in range(layers(block)):
            places[block, "resnets", index] = f"input_blocks.{at}.0"
            places[block, "attentions", index] = f"input_blocks.{at}.1"
            at += 1
        if (block, "downsamplers", 0) in found:
            places[block, "downsamplers", 0] = f"input_blocks.{at}.0"
            at += 1
    at = 0
    for number in range(depth("up_blocks")):
        block = f"up_blocks.{number}"
        for index in range(layers(block)):
            places[block, "resnets", index] = f"output_blocks.{at}.0"
            places[block, "attentions", index] = f"output_blocks.{at}.1"
            at += 1
        after = 2 if (block, "attentions", 0) in found else 1
        places[block, "upsamplers", 0] = f"output_blocks.{at - 1}.{after}"
    return places
