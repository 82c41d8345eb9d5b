"""Parts of an adapter that do not fit the base: what is the matter with each, and what to do about it where that is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from upparam.adapter import Target
from upparam.bases.header import VOCABULARY
from upparam.checkpoint import Checkpoint
from upparam.errors import MismatchError
from upparam.patterns import regex

_EXPERTS = regex(r"(?P<layer>.*\.\d+\.)[\w.]*experts(\.|$)")
"""The layer of a module of stacked experts."""
_SHOWN = 8
HEADS = ("lm_head.weight", "embed_out.weight")
"""How names of output heads end."""
EMBEDDINGS = (".embed_tokens.weight", ".wte.weight", ".word_embeddings.weight", ".embed_in.weight")
"""How names of the input embeddings end that output heads are tied to."""


class Misfit(NamedTuple):
    """A part that does not fit, and the cure where it is another than another base."""

    said: str
    cure: str | None = None


def refuse(misfits: Sequence[Misfit], checkpoint: Checkpoint) -> None:
    """Raise MismatchError that tells all of them, if there are any."""
    if not misfits:
        return
    count = len(misfits)
    shown = "; ".join(misfit.said for misfit in misfits[:_SHOWN]) + (f"; and {count - _SHOWN} more" if count > _SHOWN else "")
    cures = list(dict.fromkeys(misfit.cure for misfit in misfits if misfit.cure))
    if any(misfit.cure is None for misfit in misfits):
        cures.append("for the rest choose the base it was made for" if cures else "choose the base it was made for")
    raise MismatchError(
        f"{count} parts of the adapter do not fit the base" if count > 1 else "1 part of the adapter does not fit the base",
        file=checkpoint.path, found=shown, remedy="; ".join(cures) + "; or leave these out with --skip",
    )  # fmt: skip


def not_there(checkpoint: Checkpoint, target: Target, bias_alone: bool = False) -> Misfit:
    """A target that the base does not have; `bias_alone` for a bias whose module it has."""
    if target.module.rpartition(".")[2] in ("lm_head", "embed_out") and ties_head(checkpoint):
        return Misfit(
            f"{target}: the base ties its output head to the input embedding and stores one weight for both",
            "give the base a head of its own first (a copy of the embedding as lm_head.weight, and tie_word_embeddings false in its config)",
        )
    if single := _single_expert(checkpoint, target):
        return Misfit(
            f"{target}: the base stores every expert by itself ({single}), the adapter changes them stacked in one tensor",
            "the base has to hold its experts stacked: load it with transformers 5 and save it with "
            "save_pretrained(FOLDER, save_original_format=False)",
        )
    if not bias_alone and any(file.container == "gguf" for file in checkpoint.files):
        return Misfit(
            f"{target}: not in the base under this name, and upparam does not know the model whose llama.cpp names would tell where it is",
            "merge into the safetensors model and convert the result with llama.cpp",
        )
    return Misfit(f"{target}: not in the base", "give up changes of biases with --drop bias" if bias_alone else None)


def _single_expert(checkpoint: Checkpoint, target: Target) -> str | None:
    """A weight of one expert of the layer whose stacked experts are meant (transformers 5 stacks what files hold one by one)."""
    found = None if target.parameter == "weight" else _EXPERTS.match(f"{target.module}.")
    if found is None:
        return None
    single = regex(r"(.*\.)?" + found["layer"].replace(".", r"\.") + r"[\w.]*experts\.\d+\..+")
    return next((name for name in checkpoint.tensors if single.fullmatch(name)), None)


def other_shape(name: str, shape: tuple[int, ...], there: str, other: tuple[int, ...], said: str) -> Misfit:
    """A part `name` of another shape than the base's tensor `there`, which has `other`: as `said`, unless only the vocabulary has another size."""
    if len(shape) == len(other) == 2 and shape[1:] == other[1:] and VOCABULARY.search(there.removesuffix(".weight")):
        more, than = shape[0], other[0]
        return Misfit(
            f"{name}: {more:,} tokens, the base's {there} has {than:,}: a vocabulary of another size, as resizing it for training makes",
            f"give the base as many tokens first, as training did (transformers: resize_token_embeddings({more}), then save_pretrained)",
        )
    return Misfit(said)


def ties_head(checkpoint: Checkpoint) -> bool:
    """True when the base's config says that its output head is its input embedding."""
    config = checkpoint.config or {}
    text = config.get("text_config")
    return bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings") if isinstance(text, dict) else False))
