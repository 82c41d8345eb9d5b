"""LoRA on the stacked weights of a mixture's experts: for each expert its own up and down, all of one rank, stored as one pair."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import sqrt
from typing import TYPE_CHECKING, Any, ClassVar

from upparam.algorithms.base import Delta, Scaling, Update
from upparam.errors import MalformedError
from upparam.tensors import Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class ExpertUpdate(Update):
    """ups (experts, out, r) and downs (experts, r, in) in memory as float64; a row is one expert's whole weight."""

    def __init__(self, ups: NDArray[np.float64], downs: NDArray[np.float64], swapped: bool, scale: float) -> None:
        self.ups, self.downs, self.swapped, self.scale = ups, downs, swapped, scale
        out, into = ups.shape[1], downs.shape[2]
        self.shape = (len(ups), into, out) if swapped else (len(ups), out, into)

    def rows(self, start: int, stop: int) -> NDArray[np.float64]:
        """Experts [start, stop), each flattened."""
        weights: NDArray[np.float64] = self.ups[start:stop] @ self.downs[start:stop]
        weights *= self.scale
        return (weights.swapaxes(1, 2) if self.swapped else weights).reshape(len(weights), -1)


@dataclass(frozen=True)
class ExpertLoRA(Delta):
    """up (out, r * experts) with the expert index running fastest, down (experts * r, in) with it running slowest.

    dW[e] = up[:, e::experts] @ down[e * r : (e + 1) * r], for a weight stored as (experts, out, in), or (experts, in, out) when `swapped`.
    Source: huggingface/peft src/peft/tuners/lora/layer.py ParamWrapper.get_delta_weight.
    """

    algorithm: ClassVar[str] = "expert-lora"
    linear: ClassVar[tuple[str, ...]] = ("up",)
    up: Tensor
    down: Tensor
    experts: int
    scaling: Scaling = field(default_factory=Scaling)
    swapped: bool = False
    """Which of the two orders the base has is not in an adapter's file; see `other_way`."""

    def __post_init__(self) -> None:
        sizes = (self.up.shape[1:], self.down.shape[:1])
        if (
            len(self.up.shape) != 2
            or len(self.down.shape) != 2
            or sizes[0] != sizes[1]
            or self.experts < 1
            or self.down.shape[0] % self.experts
        ):
            raise MalformedError(
                "the factors do not fit this many experts", expected=f"up (out, r * {self.experts}) and down ({self.experts} * r, in)",
                found=f"up {self.up.shape}, down {self.down.shape}",
            )  # fmt: skip

    @property
    def shape(self) -> tuple[int, ...]:
        """(experts, out, in), or (experts, in, out) when swapped."""
        sides = (self.up.shape[0], self.down.shape[1])
        return (self.experts, *(reversed(sides) if self.swapped else sides))

    @property
    def rank(self) -> int:
        """That of each expert."""
        return self.down.shape[0] // self.experts

    def factors(self) -> Mapping[str, Tensor]:
        """`up` and `down`."""
        return {"up": self.up, "down": self.down}

    def other_way(self) -> ExpertLoRA:
        """The same for a weight whose last two axes are the other way round."""
        return replace(self, swapped=not self.swapped)

    def stacks(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(ups (experts, out, r), downs (experts, r, in)) in float64."""
        ups = self.up.doubles().reshape(self.up.shape[0], self.rank, self.experts).transpose(2, 0, 1)
        return ups, self.down.doubles().reshape(self.experts, self.rank, -1)

    def load(self) -> ExpertUpdate:
        """Factors in memory as float64."""
        return ExpertUpdate(*self.stacks(), self.swapped, self.known_scale())

    def frobenius(self) -> float:
        """||scale * dW||_F from the Gram matrices of each expert."""
        ups, downs = self.stacks()
        square: Any = ((ups.swapaxes(1, 2) @ ups) * (downs @ downs.swapaxes(1, 2))).sum()
        return abs(self.known_scale()) * sqrt(max(float(square), 0.0))
