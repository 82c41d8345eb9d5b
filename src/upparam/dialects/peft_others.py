"""Methods of PEFT that upparam does not convert or merge: what each one is, and why not.

Source: huggingface/peft 0.21 src/peft/utils/peft_types.py, src/peft/tuners/*/{config,model,layer}.py (names of what is saved, and whether it
can be merged).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, NoReturn

from upparam.errors import NotAnAdapterError
from upparam.patterns import regex


class Other(NamedTuple):
    """A method: what it does in a few words, the word its tensors' names hold ('' where PEFT's own names tell nothing), and what to do."""

    what: str
    word: str
    remedy: str


_MERGE = "merge it with PEFT (merge_and_unload) and extract a LoRA from the result"
_USE = "use it with PEFT; no weight can hold what it does"
_INPUTS = "learns inputs, not changes of weights: it cannot be converted or merged"
_NEEDS_BASE = "what it changes depends on the base's weights"
_DRAWN = "its projections are drawn from a seed with torch's generator"

OTHERS: dict[str, Other] = {
    "PROMPT_TUNING": Other(f"prompt tuning {_INPUTS}", "", _USE),
    "MULTITASK_PROMPT_TUNING": Other(f"multitask prompt tuning {_INPUTS}", "", _USE),
    "P_TUNING": Other(f"p-tuning {_INPUTS}", "", _USE),
    "PREFIX_TUNING": Other(f"prefix tuning {_INPUTS}", "", _USE),
    "ADAPTION_PROMPT": Other(f"LLaMA-Adapter {_INPUTS}", "", _USE),
    "CPT": Other(f"context-aware prompt tuning {_INPUTS}", "", _USE),
    "CARTRIDGE": Other(f"a cartridge of keys and values {_INPUTS}", "", _USE),
    "ADAMSS": Other(f"AdaMSS trains subspaces of a singular value decomposition of each weight: {_NEEDS_BASE}", "adamss_", _MERGE),
    "BEFT": Other("BEFT adds trained biases to value projections and no factors", "beft_", _MERGE),
    "C3A": Other("C3A adds block-circulant matrices, which have no low rank", "c3a_", _MERGE),
    "DEFT": Other(f"DEFT takes a subspace out of each weight and puts another in: {_NEEDS_BASE}", "deft_", _MERGE),
    "DELORA": Other(f"DeLoRA scales each rank-one part to the base's column norms: {_NEEDS_BASE}", "delora_", _MERGE),
    "FOURIERFT": Other("FourierFT adds the inverse Fourier transform of a few coefficients at places drawn from a seed", "fourierft_", _MERGE),
    "FROD": Other(f"FRoD scales a joint decomposition of the base's weights: {_NEEDS_BASE}", "frod_", _MERGE),
    "GLORA": Other("PEFT's GLoRA, whose saved form is another than LyCORIS'", "glora_", _MERGE),
    "GRALORA": Other("GraLoRA has a pair of factors for each block of a weight", "gralora_", _MERGE),
    "HIRA": Other(f"HiRA multiplies each weight element by element with a low-rank matrix: {_NEEDS_BASE}", "hira_", _MERGE),
    "HRA": Other("HRA multiplies weights by Householder reflections", "hra_", _MERGE),
    "LILY": Other("Lily shares factors between layers through a router that depends on the input", "lily_", _USE),
    "LN_TUNING": Other("LN tuning trains whole normalisation layers and no factors", "ln_tuning_", _MERGE),
    "MISS": Other("MiSS adds one small block repeated over the inputs, or (bat) multiplies by it", "miss_", _MERGE),
    "BONE": Other("Bone, the old name of MiSS, adds one small block repeated over the inputs, or (bat) multiplies by it", "bone_", _MERGE),
    "OSF": Other(f"OSF trains the small singular values of each weight and their vectors: {_NEEDS_BASE}", "osf_", _MERGE),
    "PEANUT": Other(f"PEANuT makes its change from the weight by a small network: {_NEEDS_BASE}", "peanut_", _MERGE),
    "POLY": Other("Poly mixes several LoRAs by a router that depends on the task", "poly_", _USE),
    "PSOFT": Other(f"PSOFT turns the principal subspace of each weight: {_NEEDS_BASE}", "psoft_", _MERGE),
    "PVERA": Other(f"PVeRA draws its change anew at random; {_DRAWN}", "pvera_", _USE),
    "RANDLORA": Other(f"RandLoRA adds many scaled random pairs; {_DRAWN}", "randlora_", _MERGE),
    "ROAD": Other("RoAd turns and scales pairs of outputs, the bias with them", "road_", _MERGE),
    "SHADOW": Other("ShadowPEFT runs a small network beside the base, which depends on the input", "shadow_", _USE),
    "SHIRA": Other("SHiRA adds sparse values of full rank", "shira_", _MERGE),
    "SUPERTUNING": Other(f"Super-Tuning changes single elements that it picks by their size in the base: {_NEEDS_BASE}", "supertuning_", _MERGE),
    "TINYLORA": Other(f"TinyLoRA scales singular vectors of each weight: {_NEEDS_BASE}; {_DRAWN}", "tinylora_", _MERGE),
    "TRAINABLE_TOKENS": Other("rows of an embedding put in place of the base's, and no factors", "trainable_tokens_", _MERGE),
    "UNILORA": Other("Uni-LoRA spreads one trained vector over all factors at places drawn from a seed", "unilora_", _MERGE),
    "VBLORA": Other("VB-LoRA composes all factors from one bank of vectors", "vblora_", _MERGE),
    "WAVEFT": Other("WaveFT adds the inverse wavelet transform of a few coefficients at places drawn from a seed", "waveft_", _MERGE),
    "XLORA": Other("X-LoRA mixes several LoRAs by weights that depend on the input", "xlora_", "take one of the LoRAs it mixes by itself"),
}  # fmt: skip
"""peft_type -> what it is. BONE is that of PEFT before 0.18."""

_WORDS = regex(rf"(^|[./])({'|'.join(other.word for other in OTHERS.values() if other.word)})[A-Za-z_]+(\.|$)")
_BY_WORD = {other.word: kind for kind, other in OTHERS.items() if other.word}


def by_names(names: Iterable[str]) -> tuple[str, str] | None:
    """(peft_type, a name that tells it) of a file's tensors, or None. LoRA's trained tokens lie in a `token_adapter` and tell nothing."""
    for name in names:
        found = _WORDS.search(name)
        if found is not None and ".token_adapter." not in name:
            return _BY_WORD[found[2]], name
    return None


def refuse(kind: str, file: object, evidence: str) -> NoReturn:
    """Raise NotAnAdapterError for a method of this table, or of none that upparam knows."""
    other = OTHERS.get(kind)
    raise NotAnAdapterError(
        f"PEFT's {kind}: {other.what}" if other else f"upparam does not know PEFT's {kind}", file=file, found=evidence,
        remedy=other.remedy if other else _MERGE,
    )  # fmt: skip
