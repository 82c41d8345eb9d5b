"""Full differences: dW itself, stored dense. LyCORIS' `diff` and `diff_b`, and `w_norm`, `b_norm` for the vectors of norms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from upparam.algorithms.base import BAKED, Delta, Scaling, Update, refuse_empty
from upparam.errors import MalformedError
from upparam.tensors import Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class FullUpdate(Update):
    """The stored difference, of which rows are read as they are needed."""

    def __init__(self, diff: Tensor, scale: float) -> None:
        self.diff, self.shape, self.scale = diff, diff.shape, scale

    def rows(self, start: int, stop: int) -> NDArray[np.float64]:
        """Rows [start, stop) of scale * dW; those of a vector have one element each."""
        rows = self.diff.rows(start, stop).doubles().reshape(stop - start, -1)
        rows *= self.scale
        return rows


@dataclass(frozen=True)
class Full(Delta):
    """diff, of the weight's (or bias') own shape.

    Source: KohakuBlueleaf/LyCORIS lycoris/modules/full.py. No alpha takes part.
    """

    algorithm: ClassVar[str] = "full"
    linear: ClassVar[tuple[str, ...]] = ("diff",)
    diff: Tensor
    scaling: Scaling = BAKED

    def __post_init__(self) -> None:
        if not self.diff.shape:
            raise MalformedError("a difference of a weight has at least one axis", found=self.diff.shape)
        refuse_empty(self)

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the difference."""
        return self.diff.shape

    @property
    def rank(self) -> None:
        """None."""
        return None

    def factors(self) -> Mapping[str, Tensor]:
        """`diff`."""
        return {"diff": self.diff}

    def load(self) -> FullUpdate:
        """Ready to read rows."""
        return FullUpdate(self.diff, self.known_scale())

    def cut_rows(self, start: int, stop: int) -> Full:
        """The delta of rows [start, stop) alone."""
        return replace(self, diff=self.diff.rows(start, stop))

    def join_rows(self, others: Sequence[Full]) -> Full | None:
        """The delta of the weight that stacks these; None where their dtypes differ. Raises RefusedError where their scales do."""
        from upparam.algorithms.slicing import one_scale, stack

        if any((other.diff.dtype, other.diff.shape[1:]) != (self.diff.dtype, self.diff.shape[1:]) for other in others):
            return None
        one_scale((self, *others))
        return replace(self, diff=stack([part.diff for part in (self, *others)]))

    def take_rows(self, rows: Sequence[int]) -> Full:
        """The delta of the weight whose row i is this one's row `rows[i]`."""
        from upparam.algorithms.slicing import take_rows

        return replace(self, diff=take_rows(self.diff, rows))


@dataclass(frozen=True)
class Norm(Full):
    """The difference of a norm's weight or bias, a vector. Source: KohakuBlueleaf/LyCORIS lycoris/modules/norms.py."""

    algorithm: ClassVar[str] = "norm"
