"""AdaLoRA: dW = up @ diag(values) @ down, a truncated singular value decomposition that is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import sqrt
from typing import TYPE_CHECKING, ClassVar

from upparam.algorithms.base import Delta, Scaling
from upparam.algorithms.lora import LowRankUpdate
from upparam.errors import MalformedError
from upparam.tensors import Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MARGIN = 1e-5
"""What PEFT adds to the rank before it divides alpha by it."""


@dataclass(frozen=True)
class AdaLoRA(Delta):
    """up (out, r), values (r, 1), down (r, in), the latter with a kernel flattened behind `in`.

    Source: huggingface/peft src/peft/tuners/adalora/layer.py; its scale is alpha / (r + 1e-5), which `Scaling.divisor` states.
    """

    algorithm: ClassVar[str] = "adalora"
    linear: ClassVar[tuple[str, ...]] = ("values",)
    up: Tensor
    values: Tensor
    down: Tensor
    scaling: Scaling = field(default_factory=Scaling)

    def __post_init__(self) -> None:
        up, down = self.up.shape, self.down.shape
        if len(up) != 2 or len(down) != 2 or up[1] != down[0] or self.values.shape not in ((down[0], 1), (down[0],)):
            raise MalformedError(
                "the factors do not fit together", expected="up (out, r), values (r, 1), down (r, in)",
                found=f"up {up}, values {self.values.shape}, down {down}",
            )  # fmt: skip

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)."""
        return (self.up.shape[0], self.down.shape[1])

    @property
    def rank(self) -> int:
        """How many singular values there are, those set to zero included."""
        return self.down.shape[0]

    def factors(self) -> Mapping[str, Tensor]:
        """`up`, `values`, `down`."""
        return {"up": self.up, "values": self.values, "down": self.down}

    def matrices(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(up (out, r), diag(values) @ down (r, in)) in float64; of rank 1 and zero where no singular value is left."""
        import numpy as np

        if not self.rank:
            return np.zeros((self.shape[0], 1)), np.zeros((1, self.shape[1]))
        return self.up.doubles(), self.values.doubles().reshape(-1, 1) * self.down.doubles()

    def load(self) -> LowRankUpdate:
        """Factors in memory as float64."""
        return LowRankUpdate(*self.matrices(), self.shape, self.known_scale())

    def frobenius(self) -> float:
        """||scale * dW||_F from the Gram matrices."""
        up, down = self.matrices()
        return abs(self.known_scale()) * sqrt(max(float(((up.T @ up) * (down @ down.T)).sum()), 0.0))
