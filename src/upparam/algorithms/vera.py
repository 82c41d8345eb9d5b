"""VeRA: dW = diag(b) @ up @ diag(d) @ down with random up and down that all modules share and vectors b, d that are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import TYPE_CHECKING, ClassVar

from upparam.algorithms.base import BAKED, Delta, Scaling
from upparam.algorithms.lora import LowRankUpdate
from upparam.errors import MalformedError, RefusedError
from upparam.tensors import Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class VeRA(Delta):
    """up (out, r) and down (r, at least in), shared with the other modules; b (out,), d (r,). `columns` is in: the first so many of down's.

    Source: huggingface/peft src/peft/tuners/vera/layer.py: of the shared vera_B the first `out` rows, of vera_A the first `in` columns. How
    many columns those are only the weight tells (`for_weight`); until then `columns` is 0. A file without the projections
    (save_projection false) says only from which seed another library made them; then there is no VeRA.
    """

    algorithm: ClassVar[str] = "vera"
    linear: ClassVar[tuple[str, ...]] = ("b",)
    up: Tensor
    down: Tensor
    b: Tensor
    d: Tensor
    columns: int = 0
    scaling: Scaling = BAKED

    def __post_init__(self) -> None:
        up, down = self.up.shape, self.down.shape
        matched = len(up) == len(down) == 2 and up[1] == down[0] and self.columns <= down[1]
        if not matched or self.b.shape != up[:1] or self.d.shape != down[:1]:
            raise MalformedError(
                "the factors do not fit together", expected="up (out, r), down (r, at least in), b (out,), d (r,)",
                found=f"up {up}, down {down}, b {self.b.shape}, d {self.d.shape}",
            )  # fmt: skip

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in), in being 0 while it is not known."""
        return (self.up.shape[0], self.columns)

    @property
    def rank(self) -> int:
        """The inner dimension of the projections."""
        return self.down.shape[0]

    def factors(self) -> Mapping[str, Tensor]:
        """`up`, `down`, `b`, `d`."""
        return {"up": self.up, "down": self.down, "b": self.b, "d": self.d}

    def matrices(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(diag(b) @ up, diag(d) @ down) in float64. Raises RefusedError while `columns` is not known."""
        if not self.columns:
            raise RefusedError(
                "how many columns of the shared projection this module uses is told by its weight alone",
                expected=f"at most {self.down.shape[1]}", remedy="name the base with --base",
            )  # fmt: skip
        down = self.down.doubles()[:, : self.columns]
        return self.b.doubles()[:, None] * self.up.doubles(), self.d.doubles()[:, None] * down

    def for_weight(self, shape: tuple[int, ...]) -> VeRA:
        """The delta of a weight with shape[1] inputs. Raises MalformedError where the projection has fewer."""
        if len(shape) != 2 or shape[1] == self.columns:
            return self
        return replace(self, columns=shape[1])

    def load(self) -> LowRankUpdate:
        """Factors in memory as float64."""
        return LowRankUpdate(*self.matrices(), self.shape, self.known_scale())

    def frobenius(self) -> float:
        """||dW||_F from the Gram matrices."""
        up, down = self.matrices()
        return abs(self.known_scale()) * sqrt(max(float(((up.T @ up) * (down @ down.T)).sum()), 0.0))

    def cut_rows(self, start: int, stop: int) -> VeRA:
        """The delta of rows [start, stop) alone."""
        return replace(self, up=self.up.rows(start, stop), b=self.b.rows(start, stop))

    def join_rows(self, others: Sequence[VeRA]) -> VeRA | None:
        """The delta of the weight that stacks these; None where they differ in d or down."""
        from upparam.algorithms.slicing import same_tensor, stack

        if not all(same_tensor(self.down, other.down) and same_tensor(self.d, other.d) for other in others):
            return None
        parts = [self, *others]
        if len({(part.up.dtype, part.b.dtype) for part in parts}) > 1:
            return None
        return replace(self, up=stack([part.up for part in parts]), b=stack([part.b for part in parts]))
