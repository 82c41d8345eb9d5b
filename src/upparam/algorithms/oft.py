"""OFT: the weight turned by orthogonal blocks along its outputs (LyCORIS' Diag-OFT) or its inputs (PEFT's OFT), made from skew matrices."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isqrt, sqrt
from typing import TYPE_CHECKING, ClassVar

from upparam.algorithms.base import BAKED, Delta, DependentUpdate, RowReader, Scaling
from upparam.errors import MalformedError, RefusedError
from upparam.tensors import Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def cayley(skew: NDArray[np.float64]) -> NDArray[np.float64]:
    """(I - Q) @ inverse(I + Q) of skew matrices Q (..., b, b): orthogonal."""
    import numpy as np

    one = np.eye(skew.shape[-1])
    # X (I + Q) = I - Q, transposed: (I - Q) X^T = I + Q
    found: NDArray[np.float64] = np.linalg.solve(one - skew, one + skew).swapaxes(-1, -2)
    return found


def limited(skew: NDArray[np.float64], constraint: float) -> NDArray[np.float64]:
    """All blocks scaled down together to the norm `constraint` where theirs is larger; 0 means no limit."""
    import numpy as np

    norm = float(np.linalg.norm(skew)) + 1e-8
    return skew * (constraint / norm) if 0 < constraint < norm else skew


class OutputTurnUpdate(DependentUpdate):
    """Blocks (k, s, s) that multiply rows from the left, and a factor for each row, in memory as float64."""

    def __init__(self, blocks: NDArray[np.float64], rescale: NDArray[np.float64] | None, shape: tuple[int, ...]) -> None:
        self.blocks, self.rescale, self.shape, self.scale = blocks, rescale, shape, 1.0

    def merged(self, weight: RowReader, start: int, stop: int) -> NDArray[np.float64]:
        """Rows [start, stop) of W'; the base's rows are read by whole blocks."""
        size = self.blocks.shape[1]
        low, high = start // size, -(-stop // size)
        rows = weight(low * size, high * size)
        turned = (self.blocks[low:high] @ rows.reshape(high - low, size, -1)).reshape(rows.shape)[start - low * size : stop - low * size]
        if self.rescale is not None:
            turned *= self.rescale[start:stop, None]
        return turned


class OutputTurn(Delta):
    """What LyCORIS' turns of the outputs share: blocks (.., k, s, s) that cover the rows, and perhaps a factor for each row."""

    additive: ClassVar[bool] = False
    blocks: Tensor
    rescale: Tensor | None

    def check(self, fits: bool, what: str, expected: str) -> None:
        """Raise MalformedError unless the blocks fit and `rescale` is one factor for each row."""
        if not fits or (self.rescale is not None and self.rescale.shape[:1] != (self.rescale.numel,)):
            raise MalformedError(
                f"not {what} and a factor for each row", expected=expected,
                found=f"blocks {self.blocks.shape}, rescale {None if self.rescale is None else self.rescale.shape}",
            )  # fmt: skip
        if self.rescale is not None and self.rescale.numel != self.shape[0]:
            raise MalformedError("rescale has not one factor for each row", expected=self.shape[0], found=self.rescale.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """(k s, 0): the factors do not tell the inputs."""
        kernel = () if self.rescale is None else (0,) * (len(self.rescale.shape) - 2)
        return (self.blocks.shape[-3] * self.blocks.shape[-2], 0, *kernel)

    @property
    def rank(self) -> None:
        """None."""
        return None

    def factors(self) -> Mapping[str, Tensor]:
        """`blocks` and, if there is one, `rescale`."""
        return {"blocks": self.blocks} | ({"rescale": self.rescale} if self.rescale is not None else {})


@dataclass(frozen=True)
class DiagOFT(OutputTurn):
    """blocks (k, s, s), rescale (out, 1, ..): W' = rescale * R^T @ W, block by block, R = (I + Q) @ inverse(I - Q), Q = blocks - blocks^T.

    Q is scaled down where its norm over all blocks exceeds `constraint` * out (0: no limit; the files store it as alpha).
    With `made` the blocks are R itself, row factors included, as LyCORIS 2.0 saved it.
    Source: KohakuBlueleaf/LyCORIS lycoris/functional/diag_oft.py and modules/diag_oft.py (which multiplies the constraint by out).
    """

    algorithm: ClassVar[str] = "diag-oft"
    blocks: Tensor
    rescale: Tensor | None = None
    constraint: float = 0.0
    made: bool = False
    scaling: Scaling = BAKED

    def __post_init__(self) -> None:
        shape = self.blocks.shape
        fits = len(shape) == 3 and shape[1] == shape[2] and self.blocks.numel > 0
        self.check(fits, "square blocks", "blocks (k, s, s), rescale (k * s, 1)")

    def idle(self, zeros: Collection[str]) -> bool:
        """True when there are no turns; factors for rows change the weight by themselves."""
        return "blocks" in zeros and self.rescale is None and not self.made

    def load(self) -> OutputTurnUpdate:
        """The turns in memory as float64."""
        self.known_scale()
        blocks = self.blocks.doubles()
        if self.made:
            return OutputTurnUpdate(blocks.swapaxes(1, 2), None, self.shape)
        skew = limited(blocks - blocks.swapaxes(1, 2), self.constraint * self.shape[0])
        # R = cayley(-Q), and the transpose of a turn is the turn of -Q
        return OutputTurnUpdate(cayley(skew), None if self.rescale is None else self.rescale.doubles().reshape(-1), self.shape)

    def cut_rows(self, start: int, stop: int) -> DiagOFT | None:
        """The delta of rows [start, stop) alone; None where they are no whole blocks, or a constraint ties all blocks together."""
        size = self.blocks.shape[1]
        if start % size or stop % size or self.constraint:
            return None
        rescale = None if self.rescale is None else self.rescale.rows(start, stop)
        return replace(self, blocks=self.blocks.rows(start // size, stop // size), rescale=rescale)

    def take_rows(self, rows: Sequence[int]) -> DiagOFT | None:
        """The delta of the weight whose row i is this one's row `rows[i]`; None where that tears blocks apart."""
        from upparam.algorithms.slicing import take_rows, whole_blocks

        blocks = whole_blocks(rows, self.blocks.shape[1])
        if blocks is None:
            return None
        rescale = None if self.rescale is None else take_rows(self.rescale, rows)
        return replace(self, blocks=take_rows(self.blocks, blocks), rescale=rescale)

    def join_rows(self, others: Sequence[DiagOFT]) -> DiagOFT | None:
        """The delta of the weight that stacks these; None where their blocks differ in size or a constraint would tie them together."""
        from upparam.algorithms.slicing import stack

        parts = [self, *others]
        rescales = [part.rescale for part in parts if part.rescale is not None]
        if any(part.constraint for part in parts) or len(rescales) not in (0, len(parts)):
            return None
        if (
            len({(part.blocks.shape[1], part.blocks.dtype) for part in parts}) > 1
            or len({(one.dtype, one.shape[1:]) for one in rescales}) > 1
        ):
            return None
        return replace(self, blocks=stack([part.blocks for part in parts]), rescale=stack(rescales) if rescales else None)


class InputTurnUpdate(DependentUpdate):
    """Turns (k, b, b) in memory as float64: each row's blocks of b elements are multiplied by their transposes. One turn may serve all."""

    def __init__(self, turns: NDArray[np.float64], shape: tuple[int, ...]) -> None:
        self.turns, self.shape, self.scale = turns, shape, 1.0

    def merged(self, weight: RowReader, start: int, stop: int) -> NDArray[np.float64]:
        """Rows [start, stop) of W'."""
        return turned_rows(weight(start, stop), self.turns)


def turned_rows(rows: NDArray[np.float64], turns: NDArray[np.float64]) -> NDArray[np.float64]:
    """rows @ T^T with the block-diagonal T of turns (k, b, b); k = 1 repeats the one."""
    import numpy as np

    size = turns.shape[1]
    if rows.shape[1] % size or (len(turns) > 1 and rows.shape[1] != len(turns) * size):
        raise MalformedError("the blocks do not cover the weight's columns", expected=f"{len(turns)} blocks of {size}", found=rows.shape)
    blocks = rows.reshape(len(rows), -1, size).swapaxes(0, 1)
    return np.ascontiguousarray((blocks @ turns.swapaxes(1, 2)).swapaxes(0, 1)).reshape(rows.shape)


@dataclass(frozen=True)
class OFT(Delta):
    """skew (k, b (b - 1) / 2), the rows of each skew matrix above its diagonal: W' = W @ T^T, T block-diagonal with T_i = (I - Q_i) @ inverse(I + Q_i).

    `neumann` is the number of terms of a series in Q that stands for the turn, as PEFT counts them (see `_series`), None for the turn itself;
    `doubled` when the series is that of PEFT 0.16 and 0.17, whose last term counts twice as all others do; `eps` the radius of constrained OFT; `shared` when the one block is used for all. A kernel counts as columns. An embedding's
    outputs are turned instead, W' = W @ T (`embedding`). Not `told`: nothing says which of these it is.
    Source: huggingface/peft (0.16 and later) src/peft/tuners/oft/layer.py OFTRotationModule.
    """

    algorithm: ClassVar[str] = "oft"
    additive: ClassVar[bool] = False
    skew: Tensor
    neumann: int | None = None
    eps: float | None = None
    shared: bool = False
    embedding: bool = False
    doubled: bool = False
    told: bool = True
    scaling: Scaling = BAKED

    def __post_init__(self) -> None:
        shape = self.skew.shape
        if len(shape) != 2 or self.size * (self.size - 1) // 2 != shape[1] or not shape[0] or (self.shared and shape[0] != 1):
            raise MalformedError("not the upper halves of square blocks", expected="(k, b (b - 1) / 2)", found=shape)

    @property
    def size(self) -> int:
        """b, the side of a block."""
        return (1 + isqrt(1 + 8 * self.skew.shape[1])) // 2

    @property
    def shape(self) -> tuple[int, ...]:
        """(0, k b), or (0, 0) when one block is shared: the factors do not tell the rows."""
        return (0, 0 if self.shared else self.skew.shape[0] * self.size)

    @property
    def rank(self) -> None:
        """None."""
        return None

    def factors(self) -> Mapping[str, Tensor]:
        """`skew`."""
        return {"skew": self.skew}

    def known_scale(self) -> float:
        """1. Raises RefusedError where it is not known how blocks become turns."""
        if not self.told:
            raise RefusedError(
                "how these blocks become turns (exactly or by a series, with or without a limit) is in no tensor and never guessed",
                remedy="write it into an adapter_config.json beside the file: peft_type, use_cayley_neumann, num_cayley_neumann_terms, coft, eps",
            )  # fmt: skip
        return 1.0

    def load(self) -> InputTurnUpdate:
        """The turns in memory as float64."""
        import numpy as np

        self.known_scale()
        skew = np.zeros((self.skew.shape[0], self.size, self.size))
        rows, columns = np.triu_indices(self.size, 1)
        skew[:, rows, columns] = self.skew.doubles()
        skew -= skew.swapaxes(1, 2)
        if self.eps is not None:
            radius = self.eps / sqrt(len(skew))
            norms = np.linalg.norm(skew, axis=(1, 2))
            skew *= np.where(norms <= radius, 1.0, radius / np.maximum(norms, 1e-300))[:, None, None]
        if self.embedding:
            skew = -skew  # the turn of -Q is the transpose of that of Q
        turns = cayley(skew) if self.neumann is None else _series(skew, self.neumann, self.doubled)
        return InputTurnUpdate(turns, self.shape)

    def cut_rows(self, start: int, stop: int) -> OFT:
        """The same: every row is turned alike."""
        return self

    def take_rows(self, rows: Sequence[int]) -> OFT:
        """The same: every row is turned alike."""
        return self

    def join_rows(self, others: Sequence[OFT]) -> OFT | None:
        """The delta of the weight that stacks these; None where they differ."""
        from upparam.algorithms.slicing import same_tensor

        return self if all(replace(other, skew=self.skew) == self and same_tensor(self.skew, other.skew) for other in others) else None


def _series(skew: NDArray[np.float64], terms: int, doubled: bool) -> NDArray[np.float64]:
    """I + 2Q + 2Q^2 + ... + 2Q^(terms - 2) + Q^(terms - 1) as PEFT sums it: of 3 terms it still adds 2Q^2 + Q^3.

    `doubled`: I + 2Q + ... + 2Q^(terms - 1).
    """
    import numpy as np

    total: NDArray[np.float64] = np.broadcast_to(np.eye(skew.shape[1]), skew.shape).copy()
    if terms < 2:
        return total
    total += 2.0 * skew
    if terms > 2:
        power = skew @ skew
        total += 2.0 * power
        for _ in range(3, terms if doubled else terms - 1):
            power = power @ skew
            total += 2.0 * power
        if not doubled:
            total += power @ skew
    return total
