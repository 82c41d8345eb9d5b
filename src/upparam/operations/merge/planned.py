"""The plan of a merge as data: what is merged, which base tensors change by what, and what that costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from upparam.adapter import Adapter, Target
from upparam.algorithms.base import Delta
from upparam.bases.base import Base
from upparam.checkpoint import Checkpoint, CheckpointFile
from upparam.dtypes import DType
from upparam.findings import Finding
from upparam.operations.merge.kernel import Device
from upparam.operations.merge.rounding import MERGEABLE
from upparam.tensors import Tensor

BlockWeight = Callable[[Target], float]
"""An extra multiplier for each target (block weights); 0 leaves the target out."""


@dataclass(frozen=True)
class Ingredient:
    """An adapter to merge, the user's multiplier on top of its own scale, and where it came from."""

    adapter: Adapter
    multiplier: float = 1.0
    path: Path | None = None
    block_weight: BlockWeight | None = None
    base: Base | None = None
    """What the base was recognised as; needed only where its names are not the adapter's."""

    def scaled(self, factor: float) -> Ingredient:
        """The same adapter with another multiplier on top."""
        return replace(self, multiplier=self.multiplier * factor)


@dataclass(frozen=True)
class Piece:
    """One delta on one base tensor. `rows` is a range of output rows, None for all; `transposed` when the base stores (in, out)."""

    delta: Delta
    target: Target
    multiplier: float
    transposed: bool
    ingredient: int

    @property
    def rows(self) -> tuple[int, int] | None:
        """The output rows it changes, None for all."""
        return self.target.rows

    @property
    def scale(self) -> float:
        """What dW is taken times, the user's multiplier included; a delta that has no dW of its own keeps its scale."""
        return self.delta.known_scale() * (self.multiplier if self.delta.additive else 1.0)

    @property
    def share(self) -> float:
        """What W' - W of a delta that has no dW of its own (a DoRA) is taken times; 1 for others."""
        return 1.0 if self.delta.additive else self.multiplier


@dataclass
class Work:
    """One base tensor that changes: by pieces, or by being replaced whole. `dtype` is what is written."""

    name: str
    file: CheckpointFile
    tensor: Tensor
    dtype: DType
    pieces: list[Piece] = field(default_factory=list)
    replacement: Tensor | None = None
    scale: Tensor | None = None
    """What the stored values of a scaled fp8 weight are multiplied by; it stays as it is."""
    packing: str | None = None
    """The block format of a quantised weight (GGUF); `tensor` is then its bytes."""


@dataclass
class Plan:
    """Everything decided before the first byte is written. `works` by tensor name in the whole checkpoint, in file order."""

    checkpoint: Checkpoint
    ingredients: list[Ingredient]
    works: dict[str, Work]
    added: dict[str, Tensor]
    dtype: DType | None
    findings: list[Finding]
    skipped: list[str]
    taken: dict[int, int] = field(default_factory=dict)
    """How many targets of each ingredient, by its index, are not left out."""
    device: Device | None = None
    """Where tiles are computed; None for the processor."""

    def out_dtype(self, tensor: Tensor) -> DType:
        """The dtype a tensor of the base, or an added one, is written in: its own, or the one asked for when it is a float."""
        return tensor.dtype if self.dtype is None or tensor.dtype.name not in MERGEABLE else self.dtype

    @property
    def touched_bytes(self) -> int:
        """Bytes of the base tensors that change."""
        return sum(work.tensor.nbytes for work in self.works.values())

    def memory_bytes(self, threads: int = 2) -> int:
        """About how much memory the merge takes: the interpreter with numpy, and for each thread its buffers and one tensor's factors."""
        largest = max(
            (sum(factor.numel for piece in work.pieces for factor in piece.delta.factors().values()) for work in self.works.values()),
            default=0,
        )
        return (48 << 20) + threads * ((10 << 20) + largest * 20)

    def facts(self, size: int) -> dict[str, Any]:
        """The plan as JSON-ready facts, for `--dry-run`. `size` is that of the output (see `write.output_bytes`)."""
        return {
            "base": str(self.checkpoint.path),
            "adapters": [{"path": str(item.path), "multiplier": item.multiplier} for item in self.ingredients],
            "tensors": len(self.checkpoint.tensors),
            "tensors_touched": len(self.works),
            "tensors_added": len(self.added),
            "bytes_touched": self.touched_bytes,
            "bytes_written": size,
            "estimated_memory_bytes": self.memory_bytes(),
            "estimated_seconds": round(seconds(size), 2),
            "skipped": self.skipped,
            "changes": [
                {
                    "tensor": work.name,
                    "dtype": work.dtype.name,
                    "shape": list(work.tensor.shape),
                    "replaced": work.replacement is not None,
                    "deltas": [
                        {
                            "target": str(piece.target),
                            "algorithm": piece.delta.algorithm,
                            "rank": piece.delta.rank,
                            "scale": piece.scale,
                            "share": piece.share,
                            "transposed": piece.transposed,
                        }
                        for piece in work.pieces
                    ],
                }
                for work in self.works.values()
            ],
            "findings": [finding.facts() for finding in self.findings],
        }


def seconds(size: int) -> float:
    """About how long it takes to write an output of `size` bytes on a machine whose files copy at 1.5 GB/s."""
    return 0.3 + size / 1.5e9
