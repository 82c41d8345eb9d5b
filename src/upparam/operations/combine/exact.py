"""Sums that are exact but for one rounding: concatenation of factors, with each adapter as it is or projected off those before it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod, sqrt
from typing import TYPE_CHECKING, Any

from upparam.algorithms import called
from upparam.algorithms.base import BAKED, Delta, Scaling, Update
from upparam.algorithms.full import Full
from upparam.algorithms.lora import LoRA
from upparam.dtypes import DTYPES, DType
from upparam.errors import MalformedError, RefusedError
from upparam.operations.combine.beside import beside, widened
from upparam.operations.combine.pieces import Piece, Place
from upparam.operations.recast import stored
from upparam.operations.resize import OF_THE_DIFFERENCE
from upparam.tensors import Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from upparam.algorithms.lowrank import RankRule

    Pair = tuple[NDArray[np.float64], NDArray[np.float64]]


def concatenated(place: Place) -> Delta:
    """up = [up1 up2 ...], down stacked likewise: dW is the sum.

    Where the pieces have one effective scale and dtype every bit stays. Otherwise each piece's share of the scale goes into its up
    factor, in float32 (float64 where a factor is), one rounding each. Deltas of other algorithms take part through their low-rank form;
    where one has none but is stored as large as dW itself, the sum is a full difference. Raises RefusedError for those that have neither.
    """
    pieces = place.pieces
    loras = _loras(place)
    if len(loras) == len(pieces):
        return _concatenated(loras)
    forms = [_low_rank(piece) for piece in pieces]
    if None not in forms:
        # The factors are made again when they are written, not held.
        return _joined_pairs(place, [len(form[1]) for form in forms if form is not None])
    for piece, form in zip(pieces, forms, strict=True):
        delta = piece.delta
        if form is None and (not delta.additive or sum(factor.numel for factor in delta.factors().values()) < prod(delta.shape)):
            raise RefusedError(
                f"{called(delta.algorithm)} delta cannot be added to another by concatenation", file=piece.file, tensor=place.name,
                remedy="give the rank of the result (--rank), or make a LoRA of it with 'upparam resize'"
                if delta.additive
                else OF_THE_DIFFERENCE,
            )  # fmt: skip
    return _full(place)


def _loras(place: Place) -> list[tuple[LoRA, float]]:
    """Those of the pieces that are plain LoRAs, each with its weight times its scale."""
    return [(piece.delta, piece.strength()) for piece in place.pieces if type(piece.delta) is LoRA and piece.delta.mid is None]


def _as_stored(loras: Sequence[tuple[LoRA, float]]) -> bool:
    """True where factors side by side are the sum without a rounding: of one scale and dtype."""
    return len({scale for _, scale in loras}) == 1 and len({factor.dtype for delta, _ in loras for factor in (delta.up, delta.down)}) == 1


def _low_rank(piece: Piece) -> Pair | None:
    """(weight * scale * up, down) in float64; None where the delta has no such form."""
    if not piece.delta.additive:
        return None
    piece.strength()  # for its error, which names the file
    update = piece.delta.load()
    pair = update.low_rank()
    return None if pair is None else (pair[0] * (update.scale * piece.weight), pair[1])


def wide_enough(pieces: Sequence[Piece]) -> DType:
    """The dtype of computed factors: float32, or float64 where a factor is."""
    return _wide(factor.dtype for piece in pieces for factor in piece.delta.factors().values())


def _wide(dtypes: Iterable[DType]) -> DType:
    return DTYPES["float64" if DTYPES["float64"] in dtypes else "float32"]


def fitted(values: NDArray[Any], dtype: DType) -> NDArray[Any]:
    """Computed values rounded once to the dtype of the result. Raises RefusedError where a finite one does not fit."""
    return stored(values, dtype, remedy="give a smaller multiplier, or one adapter float64 factors first: 'upparam edit --dtype fp64'")


def _concatenated(loras: Sequence[tuple[LoRA, float]]) -> LoRA:
    first = loras[0][0]
    rank = sum(delta.rank for delta, _ in loras)
    as_stored = _as_stored(loras)
    dtypes = [factor.dtype for delta, _ in loras for factor in (delta.up, delta.down)]
    scale, dtype = (loras[0][1], dtypes[0]) if as_stored else (1.0, _wide(dtypes))
    shape = (first.up.shape[0], rank, *first.up.shape[2:])
    down = Tensor.stack([delta.down if as_stored else widened(delta.down, dtype) for delta, _ in loras])
    ups = [delta.up if len(delta.up.shape) == 2 else delta.up.reshape(delta.up.shape[:2]) for delta, _ in loras]
    own = None if as_stored else [scale for _, scale in loras]
    return LoRA(beside(ups, own, dtype).reshape(shape), down, Scaling(alpha=scale * rank), embedding=first.embedding)


def _joined_pairs(place: Place, ranks: Sequence[int]) -> LoRA:
    dtype, shape, rank = wide_enough(place.pieces), place.pieces[0].delta.shape, sum(ranks)

    def pairs() -> list[Pair]:
        return [form for piece in place.pieces if (form := _low_rank(piece)) is not None]

    return lora_of(
        shape, rank, Tensor.computed(dtype, (shape[0], rank), lambda: fitted(_beside(pairs()), dtype), "combined up"),
        Tensor.computed(dtype, (rank, prod(shape[1:])), lambda: fitted(_below(pairs()), dtype), "combined down"), _embedding(place),
    )  # fmt: skip


def _beside(pairs: Sequence[Pair]) -> NDArray[np.float64]:
    import numpy as np

    return np.concatenate([up for up, _ in pairs], axis=1)


def _below(pairs: Sequence[Pair]) -> NDArray[np.float64]:
    import numpy as np

    return np.concatenate([down for _, down in pairs])


def lora_of(shape: tuple[int, ...], rank: int, up: Tensor, down: Tensor, embedding: bool) -> LoRA:
    """A LoRA of scale 1 from up (out, rank) and down (rank, rest), the kernel's axes put where LoRA has them."""
    kernel = shape[2:]
    return LoRA(
        up.reshape((shape[0], rank, *(1 for _ in kernel))), down.reshape((rank, shape[1], *kernel)), Scaling(alpha=float(rank)),
        embedding=embedding,
    )  # fmt: skip


def _embedding(place: Place) -> bool:
    return any(getattr(piece.delta, "embedding", False) for piece in place.pieces)


def _full(place: Place) -> Full:
    """The sum as a full difference; of one class where all are (a norm's vector stays one)."""
    dtype, shape = wide_enough(place.pieces), place.pieces[0].delta.shape

    def make() -> NDArray[Any]:
        total: Any = sum(piece.weight * piece.delta.load().rows(0, shape[0]) for piece in place.pieces)
        return fitted(total.reshape(shape), dtype)

    classes = {type(piece.delta) for piece in place.pieces}
    kind = next(iter(classes)) if len(classes) == 1 else Full
    return (kind if issubclass(kind, Full) else Full)(Tensor.computed(dtype, shape, make, "combined difference"))


class _SumUpdate(Update):
    """Several updates added, each with its weight."""

    def __init__(self, parts: Sequence[tuple[Update, float]]) -> None:
        self.parts, self.shape, self.scale = parts, parts[0][0].shape, 1.0

    def rows(self, start: int, stop: int) -> NDArray[np.float64]:
        """Rows [start, stop) of the sum; zero where what is left of the terms is no more than their roundings."""
        import numpy as np

        total, sizes = np.zeros((stop - start, prod(self.shape[1:]))), np.zeros((stop - start, prod(self.shape[1:])))
        for update, weight in self.parts:
            rows = weight * update.rows(start, stop)
            total += rows
            sizes += np.abs(rows)
        total[np.abs(total) <= len(self.parts) * 2.0**-52 * sizes] = 0.0
        return total

    def low_rank(self) -> Pair | None:
        """The factors side by side; None where one update has none."""
        pairs = [(form, update.scale * weight) for update, weight in self.parts if (form := update.low_rank()) is not None]
        if len(pairs) < len(self.parts):
            return None
        return _beside([(up * scale, down) for (up, down), scale in pairs]), _below([pair for pair, _ in pairs])


@dataclass(frozen=True)
class Sum(Delta):
    """The weighted sum of deltas of any additive algorithms, not written but cut to a LoRA."""

    algorithm = "sum"
    pieces: tuple[Piece, ...]
    scaling: Scaling = BAKED

    @property
    def shape(self) -> tuple[int, ...]:
        """That of each."""
        return self.pieces[0].delta.shape

    @property
    def rank(self) -> int | None:
        """Theirs added, where all are plain LoRAs."""
        ranks = [piece.delta.rank for piece in self.pieces if type(piece.delta) is LoRA]
        return sum(ranks) if len(ranks) == len(self.pieces) else None

    @property
    def embedding(self) -> bool:
        """True when one of them is of an embedding."""
        return any(getattr(piece.delta, "embedding", False) for piece in self.pieces)

    def factors(self) -> Mapping[str, Tensor]:
        """Those of each, by its number."""
        return {f"{piece.number}.{role}": factor for piece in self.pieces for role, factor in piece.delta.factors().items()}

    def load(self) -> Update:
        """The factors of each in memory."""
        return _SumUpdate([(piece.delta.load(), piece.weight) for piece in self.pieces])


def to_cut(place: Place, rule: RankRule) -> Delta:
    """The sum in the form that cutting it takes: concatenated where that keeps all bits or no rank is to go, else a Sum, which rounds nothing.

    Raises RefusedError where one has no dW.
    """
    loras = _loras(place)
    if len(loras) == len(place.pieces):
        cap = rule.cap(prod(loras[0][0].shape[2:]) > 1)
        if _as_stored(loras) or (rule.lost is None and (cap is None or cap >= sum(delta.rank for delta, _ in loras))):
            return _concatenated(loras)
    for piece in place.pieces:
        piece.strength()
        if not piece.delta.additive:
            raise RefusedError(
                f"how {called(piece.delta.algorithm)} delta changes a weight depends on the weight: it cannot be added to another",
                file=piece.file, tensor=place.name, remedy=OF_THE_DIFFERENCE,
            )  # fmt: skip
    return Sum(place.pieces)


def orthogonal(place: Place) -> tuple[LoRA, list[float]]:
    """(the concatenation of the pieces, each projected off the spaces of those before it; the share of each one's ||dW|| that is left).

    dW_i' = (1 - P_i) dW_i (1 - R_i), with P_i and R_i the projections on the column space and the row space of all dW_j', j < i: what
    a later adapter reads from inputs that an earlier one reads, and writes to outputs that an earlier one writes, is taken out.
    So dW_j'^T dW_i' = 0 and dW_j' dW_i'^T = 0. The first stays as it is; the order matters. The formula is ours.
    """
    import numpy as np

    shape = place.pieces[0].delta.shape
    columns, rows = np.zeros((shape[0], 0)), np.zeros((prod(shape[1:]), 0))
    pairs: list[Pair] = []
    left: list[float] = []
    for piece in place.pieces:
        form = _low_rank(piece)
        if form is None:
            raise RefusedError(
                f"{called(piece.delta.algorithm)} delta has no factors to project", file=piece.file, tensor=place.name,
                remedy="make a LoRA of it with 'upparam resize'" if piece.delta.additive else OF_THE_DIFFERENCE,
            )  # fmt: skip
        up, down = form
        if not np.isfinite(up).all() or not np.isfinite(down).all():
            raise MalformedError("a factor holds values that are not finite", file=piece.file, tensor=place.name)
        before = _size(up, down)
        new_up, new_columns = _off(up, columns)
        new_down, new_rows = _off(down.T, rows)
        columns, rows = np.concatenate([columns, new_columns], axis=1), np.concatenate([rows, new_rows], axis=1)
        pairs.append((new_up, new_down.T))
        left.append(_size(new_up, new_down.T) / before if before else 1.0)
    dtype = wide_enough(place.pieces)
    made = [Tensor.of(fitted(array, dtype)) for array in (_beside(pairs), _below(pairs))]
    return lora_of(shape, made[0].shape[1], made[0], made[1], _embedding(place)), left


def _off(factor: NDArray[np.float64], basis: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(the columns of a factor without what lies in the span of an orthonormal basis, an orthonormal basis of what they then span)."""
    import numpy as np

    norm = float(np.linalg.norm(factor))
    rest = factor
    for _ in range(2):  # twice is enough: the second takes away what the first's rounding left
        rest = rest - basis @ (basis.T @ rest)
    left, sigma, _ = np.linalg.svd(rest, full_matrices=False)
    return rest, left[:, sigma > 1e-10 * norm]


def _size(up: NDArray[np.float64], down: NDArray[np.float64]) -> float:
    return sqrt(max(float(((up.T @ up) * (down @ down.T)).sum()), 0.0))
