"""Task arithmetic as PEFT's `add_weighted_adapter` does it: on the factors, or on dW; with values pruned, and signs elected.

Sources: huggingface/peft src/peft/tuners/lora/model.py (_generalized_task_arithmetic_weighted_adapter,
_svd_generalized_task_arithmetic_weighted_adapter) and src/peft/utils/merge_utils.py; TIES is arXiv 2306.01708, DARE arXiv 2311.03099.
On the factors the result depends on how each dW is split into up and down, and products of one adapter's up with another's down take part:
that is PEFT's definition. On dW it does not depend on the split.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from math import prod, sqrt
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from upparam.algorithms import called
from upparam.algorithms.base import tiles
from upparam.algorithms.full import Full
from upparam.algorithms.lora import LoRA
from upparam.dtypes import DTYPES
from upparam.errors import MalformedError, MismatchError, RefusedError
from upparam.operations.combine.exact import fitted, lora_of, wide_enough
from upparam.operations.combine.pieces import Piece, Place
from upparam.operations.resize import OF_THE_DIFFERENCE
from upparam.tensors import Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[Any]
    Task = Callable[[], Array]
    """Makes one adapter's array anew, so that no more than one is held."""


class Arithmetic(NamedTuple):
    """How arrays are added: what is pruned from each before (`size`: all but the largest, `chance`: at random, the rest divided by
    `density`), and whether a sign is elected for each element, values of the other sign then being left out and the rest averaged."""

    prune: Literal["size", "chance"] | None
    elect: bool
    density: float
    seed: int


def on_factors(place: Place, how: Arithmetic) -> LoRA:
    """up = sum of sqrt(|w|) up_i, down = sum of sign(w) sqrt(|w|) down_i with w = weight * scale, each pruned and elected by itself.

    Raises MismatchError where ranks differ, RefusedError for deltas that are no plain LoRAs.
    """
    deltas: list[tuple[Piece, LoRA]] = []
    for piece in place.pieces:
        if type(piece.delta) is not LoRA or piece.delta.mid is not None:
            raise RefusedError(
                f"this method adds the factors of plain LoRAs, and {called(piece.delta.algorithm)} delta has others", file=piece.file,
                tensor=place.name,
                remedy="use a method that works on dW (svd, ties_svd, ...)" if piece.delta.additive else OF_THE_DIFFERENCE,
            )  # fmt: skip
        deltas.append((piece, piece.delta))
    rank = deltas[0][1].rank
    for piece, delta in deltas:
        if delta.rank != rank:
            raise MismatchError(
                "this method adds factors of one rank", tensor=place.name, expected=f"rank {rank} as in {deltas[0][0].file}",
                found=f"{delta.rank} in {piece.file}", remedy="use a method that works on dW (svd, ties_svd, ...), or 'upparam resize' one first",
            )  # fmt: skip
    strengths = [piece.strength() for piece, _ in deltas]
    shape = deltas[0][1].shape
    shares = [sqrt(abs(strength)) for strength in strengths]
    signed = [-share if strength < 0 else share for share, strength in zip(shares, strengths, strict=True)]
    tasks = [(piece, delta.up.doubles, delta.down.doubles) for piece, delta in deltas]
    up = _added([(_seed(how, place, piece, 0), read, share) for (piece, read, _), share in zip(tasks, shares, strict=True)], how)
    down = _added([(_seed(how, place, piece, 1), read, share) for (piece, _, read), share in zip(tasks, signed, strict=True)], how)
    dtype = wide_enough(place.pieces)
    made = [Tensor.of(fitted(array.reshape(size), dtype)) for array, size in ((up, (shape[0], rank)), (down, (rank, -1)))]
    return lora_of(shape, rank, made[0], made[1], deltas[0][1].embedding)


def on_weights(place: Place, how: Arithmetic) -> Full:
    """The dW of each adapter, formed in float32, pruned, elected and added with the weights: a full difference, to be cut to a rank.

    What the terms leave below their own rounding is none: of adapters that cancel each other nothing is left, and no dust.
    At most six arrays of the weight's size are held. Raises RefusedError for deltas without a dW.
    """
    import numpy as np

    shape = place.pieces[0].delta.shape
    tasks = []
    for piece in place.pieces:
        piece.strength()
        if not piece.delta.additive:
            raise RefusedError(
                f"how {called(piece.delta.algorithm)} delta changes a weight depends on the weight: it cannot be added to another",
                file=piece.file, tensor=place.name, remedy=OF_THE_DIFFERENCE,
            )  # fmt: skip
        tasks.append((_seed(how, place, piece, 2), _dense(piece), piece.weight))
    with np.errstate(over="ignore", invalid="ignore"):
        total = _added(tasks, how, (len(tasks) + 2) * 2.0**-24).reshape(shape)
    if not np.isfinite(total).all():
        raise RefusedError("the weighted sum does not fit in float32", tensor=place.name, remedy="give a smaller multiplier")
    return Full(Tensor.of(total))


def _dense(piece: Piece) -> Task:
    def make() -> Array:
        import numpy as np

        delta = piece.delta
        update = delta.load()
        matrix = np.empty((delta.shape[0], prod(delta.shape[1:])), np.float32)
        for start, stop in tiles(delta.shape):
            matrix[start:stop] = fitted(update.rows(start, stop), DTYPES["float32"])
        return matrix

    return make


_HELD = 32 << 20
"""Bytes of pruned arrays that are kept between the election and the sum, instead of being made a second time."""


def _seed(how: Arithmetic, place: Place, piece: Piece, role: int) -> tuple[int, ...]:
    return (how.seed, zlib.crc32(place.name.encode()), piece.number, role)


def _added(tasks: Sequence[tuple[tuple[int, ...], Task, float]], how: Arithmetic, dust: float = 0.0) -> Array:
    """sum of w_i p_i for the pruned arrays p_i; with an election, over those whose sign is that of sum of p_i (>= 0 counts as positive),
    divided by how many these are. Sums of less than `dust` times those of the sizes of their terms are made 0."""
    import numpy as np

    sizes: Any = None
    if not how.elect:
        total: Any = None
        for seed, make, weight in tasks:
            part = _pruned(make(), how, seed)
            part *= weight
            sizes = _sized(sizes, part, dust)
            total = part if total is None else total + part
        return _dusted(total, sizes, dust)
    first = _pruned(tasks[0][1](), how, tasks[0][0])
    held = [first] if len(tasks) * first.nbytes <= _HELD else None
    votes = first.copy()
    for seed, make, _ in tasks[1:]:
        part = _pruned(make(), how, seed)
        votes += part
        if held is not None:
            held.append(part)
    negative = votes < 0
    total, count = np.zeros_like(votes), np.zeros(votes.shape, np.int16)
    again = (_pruned(make(), how, seed) for seed, make, _ in tasks) if held is None else held
    for part, (_, _, weight) in zip(again, tasks, strict=True):
        chosen = ((part > 0) ^ negative) & (part != 0)
        count += chosen
        part *= weight
        part *= chosen
        sizes = _sized(sizes, part, dust)
        total += part
    total = _dusted(total, sizes, dust)
    total /= np.maximum(count, 1)
    return total  # type: ignore[no-any-return]


def _sized(sizes: Any, part: Array, dust: float) -> Any:
    """The sum of the sizes of terms so far, where it is wanted."""
    import numpy as np

    if not dust:
        return None
    if sizes is None:
        return np.abs(part)
    sizes += np.abs(part)
    return sizes


def _dusted(total: Array, sizes: Any, dust: float) -> Array:
    """The sum, 0 where it is less than what rounding of its terms may leave."""
    import numpy as np

    if sizes is not None:
        sizes *= dust
        total[np.abs(total) < sizes] = 0
    return total


def _pruned(values: Array, how: Arithmetic, seed: tuple[int, ...]) -> Array:
    import numpy as np

    if not np.isfinite(values).all():
        raise MalformedError("a factor holds values that are not finite")
    if how.density >= 1.0 or how.prune is None:
        return values
    if how.prune == "chance":
        values *= np.random.default_rng(seed).random(values.shape, np.float32) < how.density
        values /= how.density
        return values
    keep = largest(values, int(how.density * values.size))
    values *= keep
    return values


def largest(values: Array, count: int) -> NDArray[np.bool_]:
    """Which `count` values are the largest by size, the first of equal ones; same shape as `values`."""
    import numpy as np

    sizes = np.abs(values).reshape(-1)
    if not count:
        return np.zeros(values.shape, bool)
    edge = _edge(sizes, count)
    keep: NDArray[np.bool_] = sizes > edge
    missing = count - int(np.count_nonzero(keep))
    keep[np.flatnonzero(sizes == edge)[:missing]] = True
    return keep.reshape(values.shape)


_SAMPLE = 1024
"""Values looked at to find between which bounds one that parts all of them lies."""


def _edge(sizes: Array, count: int) -> Any:
    """The `count`-th largest of sizes: between two bounds taken from a sample, of all where it turns out not to lie there."""
    import numpy as np

    total = sizes.size
    if total >= 4 * _SAMPLE:
        sample = np.sort(sizes[:: total // _SAMPLE | 1])  # an odd step meets every column of a factor
        # Three standard deviations of where the value may lie in the sample.
        place, slack = round((1 - count / total) * len(sample)), 3 * round(sqrt(len(sample)) / 2)
        low = sample[place - slack] if place >= slack else sizes.dtype.type(0)
        high = sample[place + slack] if place + slack < len(sample) else sizes.dtype.type(np.inf)
        inside = sizes[(sizes >= low) & (sizes <= high)]
        last = int(np.count_nonzero(sizes > high)) + inside.size - count
        if 0 <= last < inside.size:
            return np.partition(inside, last)[last]
    return np.partition(sizes, total - count)[total - count]
