"""An adapter minus the adapter it began as: what training changed, where the beginning was taken out of the base's own weights.

PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA start from factors up0 @ down0 that they subtract from the base, so W' = W - scale * up0 @ down0 +
scale * up @ down. The change to the base as it is published is the LoRA up' = [up, -up0], down' = [down; down0] of twice the rank, exactly:
every stored number stays, but for the sign of up0. Source: huggingface/peft src/peft/tuners/lora/model.py subtract_mutated_init,
src/peft/peft_model.py save_pretrained (path_initial_model_for_weight_conversion).
"""

from __future__ import annotations

from dataclasses import replace
from math import isclose, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upparam.adapter import FROM_BASE, Adapter, Target
from upparam.algorithms import called
from upparam.algorithms.base import Delta, ScaleRule, Scaling
from upparam.algorithms.lora import LoRA
from upparam.dialects.base import ReadOptions
from upparam.errors import MismatchError, RefusedError
from upparam.findings import info
from upparam.operations.opening import open_adapter
from upparam.tensors import Tensor
from upparam.wording import counted

if TYPE_CHECKING:
    from numpy.typing import NDArray


def open_without(path: Path | str, initial: Path | str | None, options: ReadOptions | None = None) -> Adapter:
    """The adapter at `path`, less the one at `initial` where there is one."""
    adapter = open_adapter(path, options=options)
    return (
        adapter
        if initial is None
        else without_initial(adapter, open_adapter(initial, options=None if options is None else replace(options, adapter=None)))
    )


def without_initial(adapter: Adapter, initial: Adapter) -> Adapter:
    """The plain LoRA that changes the base as `adapter` does where its training began as `initial`.

    Raises MismatchError naming the first module that only one of them changes, or in another shape, dtype or scale; RefusedError for deltas
    other than LoRAs and for unknown scales. Saved modules and biases are the adapter's own.
    """
    where = initial.files[0] if initial.files else initial.dialect
    only = next(iter(adapter.deltas.keys() ^ initial.deltas.keys()), None)
    if only is not None:
        raise MismatchError(
            "the initial adapter changes other modules", file=where, tensor=str(only), expected=f"{len(adapter.deltas)} modules of the adapter",
            found=f"{len(initial.deltas)}",
        )  # fmt: skip
    deltas: dict[Target, Delta] = {
        target: _difference(target, delta, initial.deltas[target], where) for target, delta in adapter.deltas.items()
    }
    kept = [reason for reason in adapter.conditions if FROM_BASE not in reason]
    findings = [finding for finding in adapter.findings if finding.code != "condition" or finding.message in kept]
    said = info(
        "initial-subtracted", where, f"the difference to the initial adapter, of the ranks of both, in {counted(len(deltas), 'module')}"
    )
    return replace(adapter, deltas=deltas, conditions=kept, findings=[*findings, said])


def _difference(target: Target, delta: Delta, begun: Delta, where: str) -> LoRA:
    if type(delta) is not LoRA or type(begun) is not LoRA or delta.mid is not None or begun.mid is not None:
        raise RefusedError(
            f"the difference of {called(delta.algorithm)} delta to {called(begun.algorithm)} is no concatenation of factors", file=where, tensor=str(target)
        )  # fmt: skip
    for word, mine, theirs in (
        ("shape", delta.shape, begun.shape), ("dtype", (delta.up.dtype, delta.down.dtype), (begun.up.dtype, begun.down.dtype)),
    ):  # fmt: skip
        if mine != theirs:
            raise MismatchError(f"the initial adapter is of another {word}", file=where, tensor=str(target), expected=mine, found=theirs)
    scale, other = delta.known_scale(), begun.known_scale()
    if not isclose(scale, other, rel_tol=1e-12):
        raise MismatchError(
            "the initial adapter has another scale", file=where, tensor=str(target), expected=f"{scale:g}", found=f"{other:g}"
        )
    shape = (delta.up.shape[0], delta.rank + begun.rank, *delta.up.shape[2:])
    up, up0 = delta.up, begun.up

    def beside() -> NDArray[Any]:
        import numpy as np

        return np.concatenate([up.read(), -up0.read()], axis=1)

    whole = Tensor.computed(up.dtype, shape, beside, "difference to the initial up")
    return LoRA(
        whole, Tensor.stack([delta.down, begun.down]), _widened(delta.scaling, delta.rank, shape[1], scale), embedding=delta.embedding
    )


def _widened(scaling: Scaling, rank: int, whole: int, scale: float) -> Scaling:
    """The scaling that gives the same multiplier with a larger rank: by the same rule and another alpha where that is the rule."""
    if scaling.divisor is None and scaling.alpha is not None:
        if scaling.rule is ScaleRule.ALPHA_OVER_RANK:
            return replace(scaling, alpha=scaling.alpha * whole / rank)
        if scaling.rule is ScaleRule.ALPHA_OVER_SQRT_RANK:
            return replace(scaling, alpha=scaling.alpha * sqrt(whole / rank))
    return Scaling(ScaleRule.EXPLICIT, multiplier=scale)
