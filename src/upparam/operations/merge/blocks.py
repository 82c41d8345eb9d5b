"""Block weights: another multiplier for each part of a diffusion model, as LoRA Block Weight and supermerger users write them.

A vector has one number for each block id: 12 or 20 numbers for SDXL, 17 or 26 for SD 1 and 2, 61 for Flux. Ids that a short vector
leaves out weigh 0. Source of ids, their order and the presets: hako-mikan/sd-webui-lora-block-weight scripts/lora_block_weight.py
(BLOCKID12 ... BLOCKIDFLUX, DEF_WEIGHT_PRESET, to26, get_flux_blocks). Modules outside every block keep weight 1, as there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import isfinite

from upparam.adapter import Target
from upparam.errors import UsageError
from upparam.patterns import regex

_IN, _OUT = [f"IN{number:02}" for number in range(12)], [f"OUT{number:02}" for number in range(12)]
IDS_26 = ["BASE", *_IN, "M00", *_OUT]
IDS_20 = ["BASE", *_IN[:9], "M00", *_OUT[:9]]
IDS_17 = ["BASE", "IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "M00", *_OUT[3:]]
IDS_12 = ["BASE", "IN04", "IN05", "IN07", "IN08", "M00", *_OUT[:6]]
IDS_FLUX = ["CLIP", "T5", "IN", *(f"D{number:02}" for number in range(19)), *(f"S{number:02}" for number in range(38)), "OUT"]
IDS: dict[int, list[str]] = {len(ids): ids for ids in (IDS_12, IDS_17, IDS_20, IDS_26, IDS_FLUX)}
"""Block ids by the length of the vector that names a weight for each."""

PRESETS: dict[str, list[float]] = {
    "NONE": [0.0] * 17,
    "ALL": [1.0] * 17,
    "INS": [1.0] * 4 + [0.0] * 13,
    "IND": [1.0] + [0.0] * 3 + [1.0] * 3 + [0.0] * 10,
    "INALL": [1.0] * 7 + [0.0] * 10,
    "MIDD": [1.0] + [0.0] * 3 + [1.0] * 8 + [0.0] * 5,
    "OUTD": [1.0] + [0.0] * 7 + [1.0] * 4 + [0.0] * 5,
    "OUTS": [1.0] + [0.0] * 11 + [1.0] * 5,
    "OUTALL": [1.0] + [0.0] * 7 + [1.0] * 9,
    "ALL0.5": [0.5] * 17,
    "FLUXALL": [1.0] * 61,
}

_RULES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (regex(pattern), block)
    for pattern, block in (
        (r"(^|\.)(single_transformer_blocks|single_blocks)\.(?P<n>\d+)\.", "S{n}"),
        (r"^transformer\.transformer_blocks\.(?P<n>\d+)\.|(^|\.)double_blocks\.(?P<m>\d+)\.", "D{n}"),
        (
            r"^transformer\.(x_embedder|context_embedder|time_text_embed)(\.|$)|(^|\.)(img_in|txt_in|time_in|vector_in|guidance_in)(\.|$)",
            "IN",
        ),
        (r"^transformer\.(norm_out|proj_out)(\.|$)|(^|\.)final_layer\.", "OUT"),
        (r"(^|\.)input_blocks\.(?P<n>\d+)\.", "IN{n}"),
        (r"(^|\.)output_blocks\.(?P<n>\d+)\.", "OUT{n}"),
        (r"(^|\.)(mid_block|middle_block)\.", "M00"),
        (r"(^|\.)conv_in$", "IN00"),
    )
)
_DOWN = regex(r"(^|\.)down_blocks\.(\d+)\.(resnets|attentions|downsamplers)\.(\d+)\.")
_UP = regex(r"(^|\.)up_blocks\.(\d+)\.(resnets|attentions|upsamplers)\.(\d+)\.")


def block_of(module: str, flux: bool = False) -> str | None:
    """The block id of a module path (reference or LDM names); None outside every block.

    Diffusers' down block b, layer i is the LDM input block 3b + i + 1 and its downsampler 3b + 3; up block b, layer i the output block
    3b + i and its upsampler belongs to 3b + 2.
    """
    if module.startswith(("text_encoder", "cond_stage_model.", "conditioner.embedders.")):
        return ("T5" if module.startswith("text_encoder_2") else "CLIP") if flux else "BASE"
    if found := _DOWN.search(module):
        block, layer = int(found[2]), 2 if found[3] == "downsamplers" else int(found[4])
        return f"IN{3 * block + layer + 1:02}"
    if found := _UP.search(module):
        block, layer = int(found[2]), 2 if found[3] == "upsamplers" else int(found[4])
        return f"OUT{3 * block + layer:02}"
    for pattern, block_id in _RULES:
        if found := pattern.search(module):
            groups = found.groupdict()
            number = groups.get("n") or groups.get("m")
            return block_id.format(n=f"{int(number):02}") if number is not None else block_id
    return None


@dataclass(frozen=True)
class Weights:
    """The weight of each block id and of each glob over module paths; globs win, the first that matches."""

    blocks: Mapping[str, float]
    globs: Mapping[str, float]
    flux: bool

    def __call__(self, target: Target) -> float:
        """The multiplier of a target: 1 for what lies in no block that is named."""
        found = self._found(target)
        return 1.0 if found is None else found

    def names(self, target: Target) -> bool:
        """True when a glob or a block says something of the target, 1 included."""
        return self._found(target) is not None

    def _found(self, target: Target) -> float | None:
        for glob, value in self.globs.items():
            if fnmatchcase(target.module, glob):
                return value
        return self.blocks.get(block_of(target.module, self.flux) or "")


def parse(texts: Sequence[str]) -> Weights:
    """The multiplier of each target that these arguments ask for.

    Each is a preset's name (`INALL`), a vector of 12, 17, 20, 26 or 61 numbers (`1,0,0.5,...`), a block or range of blocks
    (`IN05-OUT05=0.3`), or a glob over module paths (`*.attn*=0.5`); globs win over blocks, later arguments over earlier ones. Raises
    UsageError for anything else.
    """
    blocks: dict[str, float] = {}
    globs: dict[str, float] = {}
    flux = False
    for text in texts:
        key, equals, value = text.rpartition("=")
        if equals:
            number = _number(value, text)
            ids = _range(key)
            if ids:
                blocks |= dict.fromkeys(ids, number)
            else:
                globs = {key: number, **{glob: weight for glob, weight in globs.items() if glob != key}}
            continue
        vector = PRESETS.get(text) or [_number(part, text) for part in text.split(",")]
        if len(vector) not in IDS:
            raise UsageError("a block weight vector of no known length", expected=f"{', '.join(map(str, IDS))} numbers", found=len(vector))
        flux = len(vector) == len(IDS_FLUX)
        blocks = dict.fromkeys(IDS_FLUX if flux else IDS_26, 0.0) | dict(zip(IDS[len(vector)], vector, strict=True))
    flux = flux or any(block in ("CLIP", "T5") or re.fullmatch(r"[DS]\d\d", block) for block in blocks)
    return Weights(blocks, globs, flux)


def _range(key: str) -> list[str]:
    """The ids that `IN05`, `IN05-OUT05` or `IN04 IN05` name; empty when it names none."""
    for ids in (IDS_26, IDS_FLUX):
        found: list[str] = []
        for word in key.split():
            first, dash, last = word.partition("-")
            if first not in ids or (dash and last not in ids):
                break
            low, high = sorted((ids.index(first), ids.index(last if dash else first)))
            found += ids[low : high + 1]
        else:
            if found:
                return found
    return []


def _number(text: str, whole: str) -> float:
    try:
        if isfinite(number := float(text)):
            return number
        raise ValueError
    except ValueError:
        raise UsageError(
            "not a block weight", expected=f"a preset ({', '.join(PRESETS)}), a vector of numbers, BLOCK=NUMBER or GLOB=NUMBER", found=whole
        ) from None
