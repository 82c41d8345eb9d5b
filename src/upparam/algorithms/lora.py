"""LoRA and LoCon: dW = up @ down, with an optional Tucker core between them (LyCORIS' `lora_mid`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod, sqrt
from typing import TYPE_CHECKING, Any, ClassVar

from upparam.algorithms.base import Delta, Scaling, Update, refuse_empty
from upparam.algorithms.gram import gram
from upparam.errors import MalformedError
from upparam.tensors import Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class LowRankUpdate(Update):
    """up (out, r) and down (r, prod(rest)) in memory, in float64 or as float32 that holds them; what is computed is computed in float64."""

    def __init__(self, up: NDArray[Any], down: NDArray[Any], shape: tuple[int, ...], scale: float) -> None:
        self._given, self.shape, self.scale = (up, down), shape, scale

    @cached_property
    def _doubles(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        up, down = self._given
        return up.astype("f8", copy=False), down.astype("f8", copy=False)

    def rows(self, start: int, stop: int) -> NDArray[np.float64]:
        """Rows [start, stop) of scale * up @ down."""
        up, down = self._doubles
        rows: NDArray[np.float64] = up[start:stop] @ down
        rows *= self.scale
        return rows

    def low_rank(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(up, down)."""
        return self._doubles

    def floats(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """(up, down) as given."""
        return self._given


@dataclass(frozen=True)
class LoRA(Delta):
    """up (out, r) [conv: (out, r, 1, ..)], down (r, in, *kernel), and for LoCon with a Tucker core mid (r, r, *kernel) and down (r, in, 1, ..).

    Source of the formula: arXiv 2106.09685 section 4.1; the Tucker form is LyCORIS' `rebuild_tucker`.
    """

    algorithm: ClassVar[str] = "lora"
    linear: ClassVar[tuple[str, ...]] = ("up",)
    up: Tensor
    down: Tensor
    scaling: Scaling = field(default_factory=Scaling)
    mid: Tensor | None = None
    embedding: bool = False
    """The weight is an embedding table (num_embeddings, dim); some dialects name and orient its factors differently."""

    def __post_init__(self) -> None:
        if len(self.up.shape) < 2 or len(self.down.shape) < 2 or self.up.shape[1] != self.down.shape[0] or prod(self.up.shape[2:]) != 1:
            raise MalformedError(
                "up and down do not fit together",
                expected="up (out, r) and down (r, in)",
                found=f"up {self.up.shape}, down {self.down.shape}",
            )
        rank = self.rank
        if self.mid is not None and (self.mid.shape[:2] != (rank, rank) or prod(self.down.shape[2:]) != 1):
            raise MalformedError(
                "mid does not fit between up and down",
                expected=f"mid ({rank}, {rank}, ...)",
                found=f"mid {self.mid.shape}, down {self.down.shape}",
            )
        refuse_empty(self)

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in, *kernel)."""
        kernel = self.mid.shape[2:] if self.mid is not None else self.down.shape[2:]
        return (self.up.shape[0], self.down.shape[1], *kernel)

    @property
    def rank(self) -> int:
        """The inner dimension of up and down."""
        return self.down.shape[0]

    def with_kernel(self, weight: tuple[int, ...]) -> LoRA:
        """The same for a weight of this shape: a kernel that is flattened behind `in` gets its axes back."""
        kernel = weight[2:]
        if len(self.shape) != 2 or prod(kernel) == 1 or self.shape != (weight[0], prod(weight[1:])):
            return self
        up, down = self.up.reshape((*self.up.shape, *(1 for _ in kernel))), self.down.reshape((self.rank, *weight[1:]))
        return replace(self, up=up, down=down)

    def factors(self) -> Mapping[str, Tensor]:
        """`up`, `down` and, if there is one, `mid`."""
        return {"up": self.up, "down": self.down} | ({"mid": self.mid} if self.mid is not None else {})

    def matrices(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(up (out, r), down (r, prod(rest))) in float64, mid contracted into down; up @ down = dW before the scale."""
        import numpy as np

        up = self.up.doubles().reshape(self.up.shape[0], self.rank)
        down = self.down.doubles().reshape(self.rank, -1)
        if self.mid is not None:
            # dW[o, i, k] = sum_pq up[o, p] mid[p, q, k] down[q, i]
            mid = self.mid.doubles().reshape(self.rank, self.rank, -1)
            down = np.einsum("pqk,qi->pik", mid, down).reshape(self.rank, -1)
        return up, down

    def load(self) -> LowRankUpdate:
        """Factors in memory: as they are stored, or as the float32 or float64 that holds them."""
        if self.mid is None:
            up, down = self.up.floats().reshape(self.up.shape[0], self.rank), self.down.floats().reshape(self.rank, -1)
        else:
            up, down = self.matrices()
        return LowRankUpdate(up, down, self.shape, self.known_scale())

    def stored(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """`matrices`, in the dtypes the factors are stored in where there is no mid."""
        if self.mid is not None:
            return self.matrices()
        return self.up.read().reshape(-1, self.rank), self.down.read().reshape(self.rank, -1)

    def frobenius(self) -> float:
        """||scale * up @ down||_F from the two r x r Gram matrices: sqrt(sum(up'up * down down'))."""
        up, down = self.stored()
        square = float((gram(up.T) * gram(down)).sum())
        return abs(self.known_scale()) * sqrt(max(square, 0.0))
