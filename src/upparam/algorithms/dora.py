"""DoRA: weights decomposed into magnitude and direction. W' = m * (W + scale * dW) / ||W + scale * dW||, the norm per row or per column.

Sources: arXiv 2402.09353 section 4.1; huggingface/peft src/peft/tuners/lora/dora.py (per row); KohakuBlueleaf/LyCORIS
lycoris/functional/general.py `weight_decompose` (per row with wd_on_output, else per column, for LoCon, LoHa and LoKr alike). LyCORIS
adds the machine epsilon of its working dtype to each norm, so that a norm of zero gives zero; here a norm of zero gives zero as it is.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from upparam.algorithms.base import Delta, DependentUpdate, FactorChange, RowReader, Scaling, Update, tiles
from upparam.algorithms.loha import LoHa
from upparam.algorithms.lokr import LoKr
from upparam.algorithms.lora import LoRA
from upparam.errors import MalformedError
from upparam.tensors import Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class DecomposedUpdate(DependentUpdate):
    """The direction's factors and the magnitude (out,) or (in,) in memory as float64. Norms per column are made in one pass, when first needed."""

    def __init__(self, direction: Update, magnitude: NDArray[np.float64], per_row: bool) -> None:
        self.direction, self.magnitude, self.per_row = direction, magnitude, per_row
        self.shape, self.scale = direction.shape, direction.scale
        self._lock = threading.Lock()
        self._gain: NDArray[np.float64] | None = None

    def merged(self, weight: RowReader, start: int, stop: int) -> NDArray[np.float64]:
        """Rows [start, stop) of W'."""
        import numpy as np

        whole = self._sum(weight, start, stop)
        if self.per_row:
            whole *= _ratio(self.magnitude[start:stop], np.linalg.norm(whole, axis=1))[:, None]
            return whole
        with self._lock:
            if self._gain is None:
                self._gain = self._column_gain(weight)
        whole.reshape(len(whole), len(self._gain), -1)[...] *= self._gain[:, None]
        return whole

    def _sum(self, weight: RowReader, start: int, stop: int) -> NDArray[np.float64]:
        change = self.direction.rows(start, stop)
        change += weight(start, stop)
        return change

    def _column_gain(self, weight: RowReader) -> NDArray[np.float64]:
        """m / ||column||, a column being all that one input channel feeds: (in,)."""
        import numpy as np

        squares = np.zeros(len(self.magnitude))
        for start, stop in tiles(self.shape):
            whole = self._sum(weight, start, stop).reshape(stop - start, len(squares), -1)
            squares += np.einsum("oik,oik->i", whole, whole)
        return _ratio(self.magnitude, np.sqrt(squares))


def _ratio(magnitude: NDArray[np.float64], norm: NDArray[np.float64]) -> NDArray[np.float64]:
    import numpy as np

    return np.divide(magnitude, norm, out=np.zeros_like(norm), where=norm != 0)


class Decomposed(Delta):
    """What DoRA makes of another algorithm: its factors and a `magnitude`.

    magnitude (out, 1, ...) or (out,) holds the norms of rows, (1, in, 1, ...) those of columns. Subclasses are dataclasses that have
    every field of `plain` and `magnitude`.
    """

    additive: ClassVar[bool] = False
    plain: ClassVar[type[Delta]]
    magnitude: Tensor

    def __post_init__(self) -> None:
        shape, out, columns = self.magnitude.shape, self.shape[0], prod(self.shape[1:])
        if shape == (out,):
            object.__setattr__(self, "magnitude", self.magnitude.reshape((out, *(1 for _ in self.shape[1:]))))
        elif len(shape) < 2 or not (
            shape == (out, *(1 for _ in shape[1:])) or (shape[0] == 1 and prod(shape[2:]) == 1 and shape[1] and columns % shape[1] == 0)
        ):
            raise MalformedError("the magnitude is neither one for each row nor one for each column", expected=self.shape, found=shape)

    @property
    def direction(self) -> Delta:
        """The same change without the magnitude."""
        return self.plain(**{item.name: getattr(self, item.name) for item in fields(self.plain)})  # type: ignore[arg-type]

    @property
    def per_row(self) -> bool:
        """True when each row has a norm of its own, False when each column has."""
        return self.magnitude.shape[0] == self.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the direction."""
        return self.direction.shape

    @property
    def rank(self) -> int | None:
        """That of the direction."""
        return self.direction.rank

    @property
    def scale(self) -> float | None:
        """That of the direction."""
        return self.direction.scale

    def factors(self) -> Mapping[str, Tensor]:
        """Those of the direction, and `magnitude`."""
        return {**self.direction.factors(), "magnitude": self.magnitude}

    def load(self) -> DecomposedUpdate:
        """Factors in memory as float64."""
        return DecomposedUpdate(self.direction.load(), self.magnitude.doubles().reshape(-1), self.per_row)

    def idle(self, zeros: Collection[str]) -> bool:
        """False: a magnitude that is not the base's own norm changes the weight whatever the direction's factors are."""
        return False

    def with_direction(self, direction: Delta, magnitude: Tensor) -> Decomposed:
        """The same algorithm with another direction (of the class `plain`) and magnitude."""
        changed = {item.name: getattr(direction, item.name) for item in fields(self.plain)}  # type: ignore[arg-type]
        return replace(self, **changed, magnitude=magnitude)  # type: ignore[type-var]

    def on_factor(self, change: FactorChange) -> Decomposed:
        """The same magnitude, and a direction of which one factor is changed."""
        return self.with_direction(self.direction.on_factor(change), self.magnitude)

    def cut_rows(self, start: int, stop: int) -> Decomposed | None:
        """The delta of rows [start, stop) alone; None where norms run across them or the direction cannot be cut."""
        from upparam.algorithms.slicing import cut

        part = cut(self.direction, start, stop)
        return self.with_direction(part, self.magnitude.rows(start, stop)) if self.per_row and type(part) is self.plain else None

    def join_rows(self, others: Sequence[Decomposed]) -> Decomposed | None:
        """The delta of the weight that stacks these; None where norms run down the columns."""
        from upparam.algorithms.slicing import join, stack

        parts = [self, *others]
        if not all(part.per_row for part in parts):
            return None
        whole = join([part.direction for part in parts])
        return self.with_direction(whole, stack([part.magnitude for part in parts]))

    def unjoin_rows(self, spans: Sequence[tuple[int, int]], told: Any) -> list[Decomposed] | None:
        """The parts of these row spans with factors of their own (see `slicing.unjoin`); None where norms run across them."""
        from upparam.algorithms.slicing import unjoin

        parts = unjoin(self.direction, spans, told) if self.per_row else None
        if parts is None or any(part is None for part in parts):
            return None
        return [self.with_direction(part, self.magnitude.rows(*span)) for span, part in zip(spans, parts, strict=True) if part is not None]

    def take_rows(self, rows: Sequence[int]) -> Decomposed:
        """The delta of the weight whose row i is this one's row `rows[i]`."""
        from upparam.algorithms.slicing import reorder, take_rows

        magnitude = take_rows(self.magnitude, rows) if self.per_row else self.magnitude
        return self.with_direction(reorder(self.direction, rows), magnitude)


@dataclass(frozen=True)
class DoRA(Decomposed):
    """A LoRA (up, down, mid) and its magnitude."""

    algorithm: ClassVar[str] = "dora"
    plain: ClassVar[type[Delta]] = LoRA
    up: Tensor
    down: Tensor
    magnitude: Tensor
    scaling: Scaling = field(default_factory=Scaling)
    mid: Tensor | None = None
    embedding: bool = False


@dataclass(frozen=True)
class DoHa(Decomposed):
    """A LoHa and its magnitude (LyCORIS with dora_wd)."""

    algorithm: ClassVar[str] = "doha"
    plain: ClassVar[type[Delta]] = LoHa
    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    magnitude: Tensor
    t1: Tensor | None = None
    t2: Tensor | None = None
    scaling: Scaling = field(default_factory=Scaling)


@dataclass(frozen=True)
class DoKr(Decomposed):
    """A LoKr and its magnitude (LyCORIS with dora_wd)."""

    algorithm: ClassVar[str] = "dokr"
    plain: ClassVar[type[Delta]] = LoKr
    magnitude: Tensor
    w1: Tensor | None = None
    w1_a: Tensor | None = None
    w1_b: Tensor | None = None
    w2: Tensor | None = None
    w2_a: Tensor | None = None
    w2_b: Tensor | None = None
    t2: Tensor | None = None
    scaling: Scaling = field(default_factory=Scaling)
