"""BOFT: the weight turned by a product of block-diagonal turns of permuted rows (LyCORIS) or columns (PEFT): a butterfly."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, ClassVar

from upparam.algorithms.base import BAKED, Delta, DependentUpdate, RowReader, Scaling
from upparam.algorithms.oft import OutputTurn, cayley, limited, turned_rows
from upparam.errors import MalformedError
from upparam.tensors import Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


_TILE = 1 << 20
"""Elements of the weight that are turned at once."""


class ButterflyUpdate(DependentUpdate):
    """Turns (m, k, b, b) and a factor for each row in memory as float64. A stage mixes rows far apart, so the whole weight is turned once."""

    def __init__(self, turns: NDArray[np.float64], rescale: NDArray[np.float64] | None, shape: tuple[int, ...]) -> None:
        self.turns, self.rescale, self.shape, self.scale = turns, rescale, shape, 1.0
        self._lock = threading.Lock()
        self._whole: NDArray[np.float64] | None = None

    def merged(self, weight: RowReader, start: int, stop: int) -> NDArray[np.float64]:
        """Rows [start, stop) of W'."""
        with self._lock:
            if self._whole is None:
                whole = weight(0, self.shape[0])
                step = max(1, _TILE // len(whole))
                for first in range(0, whole.shape[1], step):
                    whole[:, first : first + step] = self._turned(whole[:, first : first + step])
                self._whole = whole
        rows: NDArray[np.float64] = self._whole[start:stop].copy()
        return rows

    def _turned(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        shape, size = rows.shape, self.turns.shape[2]
        for stage, turns in enumerate(self.turns):
            step = 2**stage * (size // 2)
            pairs = rows.reshape(-1, 2, step, shape[1]).swapaxes(1, 2)
            mixed = turns @ pairs.reshape(-1, size, shape[1])
            rows = mixed.reshape(-1, step, 2, shape[1]).swapaxes(1, 2).reshape(shape)
        return rows if self.rescale is None else rows * self.rescale[:, None]


@dataclass(frozen=True)
class ButterflyOFT(OutputTurn):
    """blocks (m, k, b, b), rescale (out, 1, ..): stage i turns rows that lie 2^i b / 2 apart by R = (I + Q) @ inverse(I - Q), Q = blocks - blocks^T.

    Q is scaled down where its norm over all stages exceeds `constraint` * out (0: no limit; the files store it as alpha).
    Source: KohakuBlueleaf/LyCORIS lycoris/functional/boft.py and modules/boft.py (which multiplies the constraint by out).
    """

    algorithm: ClassVar[str] = "butterfly-oft"
    blocks: Tensor
    rescale: Tensor | None = None
    constraint: float = 0.0
    scaling: Scaling = BAKED

    def __post_init__(self) -> None:
        shape = self.blocks.shape
        fits = len(shape) == 4 and all(shape) and shape[2] == shape[3] and shape[2] % 2 == 0 and shape[1] % 2 ** (shape[0] - 1) == 0
        expected = "blocks (m, k, b, b) with k a multiple of 2^(m - 1), rescale (k b, 1)"
        self.check(fits, "the stages of a butterfly", expected)

    def idle(self, zeros: Collection[str]) -> bool:
        """True when there are no turns; factors for rows change the weight by themselves."""
        return "blocks" in zeros and self.rescale is None

    def load(self) -> ButterflyUpdate:
        """The turns in memory as float64."""
        self.known_scale()
        blocks = self.blocks.doubles()
        skew = limited(blocks - blocks.swapaxes(-1, -2), self.constraint * self.shape[0])
        return ButterflyUpdate(cayley(-skew), None if self.rescale is None else self.rescale.doubles().reshape(-1), self.shape)


class InputButterflyUpdate(DependentUpdate):
    """Turns (m, k, b, b) of a row's elements and a factor for each row in memory as float64."""

    def __init__(self, turns: NDArray[np.float64], gain: NDArray[np.float64], shape: tuple[int, ...]) -> None:
        self.turns, self.gain, self.shape, self.scale = turns, gain, shape, 1.0

    def merged(self, weight: RowReader, start: int, stop: int) -> NDArray[np.float64]:
        """Rows [start, stop) of W'."""
        import numpy as np

        rows = weight(start, stop)
        size = self.turns.shape[2]
        for stage, turns in enumerate(self.turns):
            if len(self.turns) == 1:
                rows = turned_rows(rows, turns)
                continue
            # Within groups of 2^stage b elements, runs of b / 2: those at even places first, then those at odd ones.
            runs = np.arange(rows.shape[1]).reshape(-1, 2 ** (stage + 1), size // 2)
            order = np.concatenate([runs[:, 0::2], runs[:, 1::2]], axis=1).reshape(-1)
            spread = np.empty_like(rows)
            spread[:, order] = rows
            rows = turned_rows(spread, turns)[:, order]
        rows *= self.gain[start:stop, None]
        return rows


@dataclass(frozen=True)
class BOFT(Delta):
    """blocks (m, k, b, b) and gain (out, 1) [conv: (1, out)]: W' = diag(gain) @ W @ T^T, T the product of m stages of permuted block turns.

    A turn is (I - Q) @ inverse(I + Q) with Q = (block - block^T) / 2; a kernel counts as columns.
    Source: huggingface/peft src/peft/tuners/boft/layer.py get_delta_weight, cayley_batch, block_butterfly_perm.
    """

    algorithm: ClassVar[str] = "boft"
    additive: ClassVar[bool] = False
    blocks: Tensor
    gain: Tensor
    scaling: Scaling = BAKED

    def __post_init__(self) -> None:
        shape = self.blocks.shape
        stages = len(shape) == 4 and shape[2] == shape[3] and all(shape)
        if stages and shape[0] > 1:
            stages = shape[2] % 2 == 0 and shape[1] % 2 ** (shape[0] - 1) == 0
        if not stages or max(self.gain.shape, default=0) != self.gain.numel or not self.gain.numel:
            raise MalformedError(
                "not the stages of a butterfly and a factor for each row", expected="blocks (m, k, b, b) with k a multiple of 2^(m - 1), gain (out, 1)",
                found=f"blocks {shape}, gain {self.gain.shape}",
            )  # fmt: skip

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, k b)."""
        return (self.gain.numel, prod(self.blocks.shape[1:3]))

    @property
    def rank(self) -> None:
        """None."""
        return None

    def factors(self) -> Mapping[str, Tensor]:
        """`blocks` and `gain`."""
        return {"blocks": self.blocks, "gain": self.gain}

    def idle(self, zeros: Collection[str]) -> bool:
        """False: factors for rows change the weight by themselves."""
        return False

    def load(self) -> InputButterflyUpdate:
        """The turns in memory as float64."""
        self.known_scale()
        blocks = self.blocks.doubles()
        return InputButterflyUpdate(cayley((blocks - blocks.swapaxes(-1, -2)) / 2), self.gain.doubles().reshape(-1), self.shape)

    def cut_rows(self, start: int, stop: int) -> BOFT:
        """The delta of rows [start, stop) alone."""
        return self._with(self.gain.reshape((self.gain.numel,)).rows(start, stop))

    def join_rows(self, others: Sequence[BOFT]) -> BOFT | None:
        """The delta of the weight that stacks these; None where their inputs are turned differently."""
        from upparam.algorithms.slicing import same_tensor, stack

        parts = [self, *others]
        if not all(same_tensor(self.blocks, part.blocks) and part.gain.dtype == self.gain.dtype for part in others):
            return None
        return self._with(stack([part.gain.reshape((part.gain.numel,)) for part in parts]))

    def take_rows(self, rows: Sequence[int]) -> BOFT:
        """The delta of the weight whose row i is this one's row `rows[i]`."""
        from upparam.algorithms.slicing import take_rows

        return self._with(take_rows(self.gain.reshape((self.gain.numel,)), rows))

    def _with(self, gain: Tensor) -> BOFT:
        return replace(self, gain=gain.reshape((1, gain.numel) if self.gain.shape[0] == 1 else (gain.numel, 1)))
