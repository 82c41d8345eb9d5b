"""T-LoRA: up @ diag(values) @ down, of which the leading singular vectors of the base's own weight are taken away again."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import ClassVar

from upparam.algorithms.base import Delta, Scaling, Update
from upparam.errors import MalformedError, RefusedError
from upparam.tensors import Tensor

REASON = (
    "T-LoRA: the factors start as the leading singular vectors of the base's weight, the change is the difference to that start, and at "
    "early steps only some of the rank acts"
)


@dataclass(frozen=True)
class TLoRA(Delta):
    """up (out, r), values (1, r), down (r, in); of a convolution up and down have kernel axes of size 1.

    Source: KohakuBlueleaf/LyCORIS (4.1) lycoris/modules/tlora.py. Its files hold the trained factors alone.
    """

    algorithm: ClassVar[str] = "t-lora"
    additive: ClassVar[bool] = False
    up: Tensor
    values: Tensor
    down: Tensor
    scaling: Scaling = field(default_factory=Scaling)

    def __post_init__(self) -> None:
        up, down = self.up.shape, self.down.shape
        fits = (
            all((*up, *down))
            and len(up) >= 2
            and len(down) >= 2
            and up[1] == down[0] == self.values.numel
            and prod(up[2:]) == prod(down[2:]) == 1
        )
        if not fits:
            raise MalformedError(
                "the factors do not fit together", expected="up (out, r), values (1, r), down (r, in)",
                found=f"up {up}, values {self.values.shape}, down {down}",
            )  # fmt: skip

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in), and 0 for each axis of a kernel, which the factors do not tell."""
        return (self.up.shape[0], self.down.shape[1], *(0 for _ in self.down.shape[2:]))

    @property
    def rank(self) -> int:
        """The inner dimension of up and down."""
        return self.down.shape[0]

    def factors(self) -> Mapping[str, Tensor]:
        """`up`, `values`, `down`."""
        return {"up": self.up, "values": self.values, "down": self.down}

    def idle(self, zeros: Collection[str]) -> bool:
        """False: what is taken away of the base's weight is not zero."""
        return False

    def load(self) -> Update:
        """Raises RefusedError."""
        raise RefusedError("no weight can hold a T-LoRA", found=REASON)
