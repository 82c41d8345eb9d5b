"""The magnitude of DoRA as PEFT stores it: (out,), for convolutions (1, out, 1, ...), for embeddings (dim,).

Source: huggingface/peft src/peft/tuners/lora/dora.py (get_weight_norm of each layer).
"""

from __future__ import annotations

from math import prod

from upparam.algorithms.dora import DoRA
from upparam.algorithms.lora import LoRA
from upparam.errors import MalformedError, RefusedError
from upparam.tensors import Tensor


def decomposed(lora: LoRA, magnitude: Tensor | None) -> LoRA | DoRA:
    """A LoRA with its magnitude, where it has one. Raises MalformedError when that is not one number for each output (embeddings: input)."""
    if magnitude is None:
        return lora
    along = lora.shape[1] if lora.embedding else lora.shape[0]
    if prod(magnitude.shape) != along:
        raise MalformedError("the magnitude does not fit the factors", expected=f"{along} values", found=f"{magnitude.shape}")
    form = (1, along) if lora.embedding else (along, *(1 for _ in lora.shape[1:]))
    return DoRA(lora.up, lora.down, magnitude.reshape(form), lora.scaling, embedding=lora.embedding)


def magnitude_of(delta: LoRA | DoRA, *, embedding: bool = False, kernel: int = 0) -> dict[str, Tensor]:
    """The magnitude by its name, for a kernel of so many axes; {} for a plain LoRA. Raises RefusedError for norms along the other axis."""
    if isinstance(delta, LoRA):
        return {}
    if delta.per_row == embedding:
        raise RefusedError("a DoRA with a norm for each " + ("row" if delta.per_row else "column"))
    count = prod(delta.magnitude.shape)
    return {"lora_magnitude_vector": delta.magnitude.reshape((1, count, *(1,) * kernel) if kernel else (count,))}
