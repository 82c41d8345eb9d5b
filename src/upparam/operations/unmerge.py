"""Unmerge: take an adapter out of a model it was merged into, by merging its negative."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upparam.adapter import Adapter, without
from upparam.checkpoint import Checkpoint
from upparam.errors import RefusedError
from upparam.findings import info
from upparam.operations.merge import merge, open_ingredients
from upparam.operations.receipt import Receipt

if TYPE_CHECKING:
    from upparam.operations.merge import Scaled


def unmerge(merged: Path | str, adapters: Scaled | Sequence[Scaled], out: Path | str, **options: Any) -> Receipt:
    """Write `merged` without `adapters` to `out`: round(W - sum of multiplier * scale * dW). Options as for `merge`.

    What the merge's own rounding lost cannot be known: an element differs from the original base by at most one unit in the last
    place of the larger of the two values, or of a quantised block by about half a step of both. Raises RefusedError for what a subtraction cannot take back: deltas that are not additive
    (DoRA, IA3, OFT) and saved modules that replaced the base's weights.
    """
    negative: list[Scaled] = []
    checkpoint = Checkpoint.open(merged)
    for ingredient in open_ingredients(checkpoint, adapters):
        _refuse_lossy(without(ingredient.adapter, options.get("drop", ()))[0], ingredient.path)
        negative.append(ingredient.scaled(-1.0))
    receipt = merge(merged, negative, out, **options)
    receipt.operation = "unmerge"
    off = "one ulp of the larger of its value there and its merged value"
    if any(file.quantised for file in checkpoint.files):
        off += ", where it is quantised by about half a step of its block as merged and half a step of it as written now"
    said = f"bits that the merge rounded away are not restored: an element may be off the original base by {off}"
    said += ", and what the merge made infinite or cut off at the largest value stays so"
    receipt.findings.append(info("unmerge-rounding", str(out), said))
    return receipt


def _refuse_lossy(adapter: Adapter, path: Path | None) -> None:
    fixed = [f"{target} ({delta.algorithm})" for target, delta in adapter.deltas.items() if not delta.additive]
    replaced = [extra.name for extra in adapter.extras]
    if fixed or replaced:
        raise RefusedError(
            "the base's own weights cannot be recovered from the merged ones", file=path,
            found=", ".join([*fixed, *replaced][:5]), remedy="keep the base, or merge in place and use 'upparam undo'",
        )  # fmt: skip
