"""Ranks made larger with zeros, for dialects that have one rank for all modules: dW and every stored number stay."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from upparam.adapter import Target
from upparam.algorithms.base import Delta
from upparam.algorithms.lora import LoRA
from upparam.operations.baking import as_alpha
from upparam.tensors import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Padded:
    """What became of one delta: its old and its new rank."""

    target: Target
    rank: int
    new: int

    def facts(self) -> dict[str, Any]:
        """JSON-ready facts."""
        return {"target": str(self.target), "change": "pad-rank", "rank": self.rank, "new_rank": self.new, "error": 0.0}


def pad(target: Target, delta: Delta, rank: int) -> tuple[LoRA, Padded]:
    """The LoRA with columns of zeros behind up (out, r) and rows of zeros behind down (r, in): the same dW, the same scale, rank `rank`."""
    assert isinstance(delta, LoRA)
    up, down = delta.up, delta.down
    wider = Tensor.computed(up.dtype, (up.shape[0], rank, *up.shape[2:]), lambda: _padded(up, rank, 1), up.source.name)
    longer = Tensor.computed(down.dtype, (rank, *down.shape[1:]), lambda: _padded(down, rank, 0), down.source.name)
    scaling = delta.scaling if delta.scaling.value(rank) == delta.scale else as_alpha(delta.known_scale(), rank)
    return replace(delta, up=wider, down=longer, scaling=scaling), Padded(target, delta.rank, rank)


def _padded(tensor: Tensor, rank: int, axis: int) -> NDArray[Any]:
    import numpy as np

    values = tensor.read()
    missing = [(0, 0)] * values.ndim
    missing[axis] = (0, rank - values.shape[axis])
    return np.pad(values, missing)


def paddable(delta: Delta, rank: int | None) -> bool:
    """True for a plain LoRA of a smaller rank."""
    return rank is not None and type(delta) is LoRA and delta.mid is None and delta.rank < rank
