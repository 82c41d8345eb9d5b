"""A LoRA with the largest elements of what it leaves out: dW = up @ down + S, S sparse. LyCORIS' extraction script writes it (`--use_sparse_bias`)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, ClassVar

from upparam.algorithms.base import Delta, Scaling, Update
from upparam.algorithms.lora import LoRA
from upparam.errors import MalformedError
from upparam.tensors import Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class SparseUpdate(Update):
    """The LoRA, and the remainder's rows (n,) in ascending order, columns (n,) and values (n,) in memory."""

    def __init__(self, lora: Update, rows: NDArray[np.int64], columns: NDArray[np.int64], values: NDArray[np.float64]) -> None:
        self.lora, self.at, self.columns, self.values = lora, rows, columns, values
        self.shape, self.scale = lora.shape, lora.scale

    def rows(self, start: int, stop: int) -> NDArray[np.float64]:
        """Rows [start, stop) of scale * (up @ down + S)."""
        import numpy as np

        found = self.lora.rows(start, stop)
        low, high = np.searchsorted(self.at, (start, stop))
        np.add.at(found, (self.at[low:high] - start, self.columns[low:high]), self.scale * self.values[low:high])
        return found


@dataclass(frozen=True)
class SparseLoRA(Delta):
    """up (out, r, ..) and down (r, in, *kernel); S (out, prod(rest)) as indices (2, n), values (n,) and its size (2,).

    Source: KohakuBlueleaf/LyCORIS lycoris/utils/__init__.py extract_diff; alpha is the rank there, so that the scale is 1.
    """

    algorithm: ClassVar[str] = "sparse-lora"
    up: Tensor
    down: Tensor
    indices: Tensor
    values: Tensor
    size: Tensor
    scaling: Scaling = field(default_factory=Scaling)

    def __post_init__(self) -> None:
        count = self.values.numel
        if self.indices.shape != (2, count) or self.values.shape != (count,) or self.size.shape != (2,) or self.indices.dtype.is_float:
            raise MalformedError(
                "the remainder's parts do not fit together", expected="indices (2, n) of whole numbers, values (n,), size (2,)",
                found=f"indices {self.indices.dtype} {self.indices.shape}, values {self.values.shape}, size {self.size.shape}",
            )  # fmt: skip
        if not all(self.lora.shape):
            raise MalformedError("up and down do not fit together", found=f"up {self.up.shape}, down {self.down.shape}")

    @property
    def lora(self) -> LoRA:
        """The low-rank part."""
        return LoRA(self.up, self.down, self.scaling)

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in, *kernel)."""
        return self.lora.shape

    @property
    def rank(self) -> int:
        """That of the low-rank part."""
        return self.down.shape[0]

    def factors(self) -> Mapping[str, Tensor]:
        """`up`, `down`, `indices`, `values`, `size`."""
        return {"up": self.up, "down": self.down, "indices": self.indices, "values": self.values, "size": self.size}

    def idle(self, zeros: Collection[str]) -> bool:
        """True when both the low-rank part and the remainder are zero."""
        return "values" in zeros and bool({"up", "down"} & set(zeros))

    def load(self) -> SparseUpdate:
        """The parts in memory. Raises MalformedError where the remainder is of another size, or an index lies outside it."""
        import numpy as np

        wide = (self.shape[0], prod(self.shape[1:]))
        size = tuple(int(side) for side in self.size.doubles())
        rows, columns = self.indices.doubles().astype(np.int64)
        if size != wide:
            raise MalformedError("the remainder is of another size than the weight", expected=wide, found=size)
        if rows.size and not (rows.min() >= 0 <= columns.min() and rows.max() < wide[0] and columns.max() < wide[1]):
            raise MalformedError(
                "an element of the remainder lies outside the weight", expected=wide, found=f"({rows.max()}, {columns.max()})"
            )
        order = np.argsort(rows, kind="stable")
        return SparseUpdate(self.lora.load(), rows[order], columns[order], self.values.doubles()[order])
