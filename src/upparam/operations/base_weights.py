"""The base's weights under an adapter's targets, for changes that depend on them: rows in float64, as the adapter sees the weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from upparam.adapter import Adapter, Target
from upparam.algorithms.base import Delta
from upparam.operations.lowering import Weight

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from upparam.operations.merge.planned import Piece, Work


def weights_of(adapter: Adapter, deltas: Mapping[Target, Delta], path: Path) -> dict[Target, Weight]:
    """The weight each of these deltas changes. Left out are those whose rows lie in another order in this base's file.

    Raises what `upparam.operations.merge.plan.make_plan` raises: targets the base does not have, quantised weights.
    """
    from upparam.bases.header import base_from_path
    from upparam.checkpoint import Checkpoint
    from upparam.operations.merge.plan import make_plan
    from upparam.operations.merge.planned import Ingredient

    only = replace(adapter, deltas=dict(deltas), extras=[], leftovers={}, conditions=[])
    plan = make_plan(Checkpoint.open(path), [Ingredient(only, base=base_from_path(path))])

    by_delta = {id(piece.delta): (work, piece) for work in plan.works.values() for piece in work.pieces}
    found: dict[Target, Weight] = {}
    for target, delta in deltas.items():
        if id(delta) in by_delta:
            work, piece = by_delta[id(delta)]
            found[target] = _weight(work, plan.checkpoint.shapes[work.name], piece)
    return found


def _weight(work: Work, shape: tuple[int, ...], piece: Piece) -> Weight:
    from upparam.operations.merge.loaded import rows_of

    base = rows_of(work, work.tensor)
    first, last = piece.rows or (0, shape[1] if piece.transposed else shape[0])
    if not piece.transposed:
        return Weight((last - first, *shape[1:]), lambda start, stop: base(first + start, first + stop))

    @cache
    def whole() -> NDArray[np.float64]:
        rows: NDArray[np.float64] = base(0, base.count).T[first:last]
        return rows

    return Weight((last - first, shape[0]), lambda start, stop: whole()[start:stop].copy())
