"""Unmerge: take an adapter out of a model it was merged into, by merging its negative."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from math import isclose
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from upparam.adapter import Adapter, without
from upparam.checkpoint import Checkpoint
from upparam.errors import RefusedError
from upparam.findings import Finding, info, warning
from upparam.operations.merge import merge, open_ingredients
from upparam.operations.merge.write import NOTE_KEY
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
    if before := _noted(checkpoint):
        receipt.findings += _as_noted(before, _noted(Checkpoint.open(out), newest=True), str(merged))
    return receipt


class _Noted(NamedTuple):
    """What a note of a merge says of an adapter."""

    name: str
    sha256: str
    multiplier: float


def _noted(checkpoint: Checkpoint, newest: bool = False) -> list[_Noted]:
    """The adapters that the notes in a model's metadata name, or the newest of them; [] where there is none."""
    metadata = next((file.metadata for file in checkpoint.files if NOTE_KEY in file.metadata), {})
    found: list[_Noted] = []
    for key, text in metadata.items():
        if key == NOTE_KEY or (key.startswith(f"{NOTE_KEY}.") and not newest):
            with suppress(ValueError, TypeError, KeyError, RecursionError):
                adapters = [one for one in json.loads(text)["adapters"] if one["sha256"]]  # one built in memory has none
                found += [_Noted(str(one["name"]), str(one["sha256"]), float(one["multiplier"])) for one in adapters]
    return found


def _as_noted(before: list[_Noted], taken: list[_Noted], merged: str) -> list[Finding]:
    """Where the model says that what was taken out was not in it, or not with these multipliers."""
    findings = []
    for sha256 in dict.fromkeys(one.sha256 for one in taken):
        out = -sum(one.multiplier for one in taken if one.sha256 == sha256)
        there = [one.multiplier for one in before if one.sha256 == sha256]
        name = next(one.name for one in taken if one.sha256 == sha256)
        if not there:
            said = f"the model's own note of what was merged into it does not name {name}; its negative was merged"
            findings.append(warning("not-as-noted", merged, said, *dict.fromkeys(f"{one.name} x {one.multiplier:g}" for one in before)))
        elif not isclose(sum(there), out, rel_tol=1e-9):
            said = f"by the model's own note {name} was in it {sum(there):g} times, and {out:g} times it was taken out"
            findings.append(warning("not-as-noted", merged, said, f"{sum(there) - out:g} times it is in the result"))
    return findings


def _refuse_lossy(adapter: Adapter, path: Path | None) -> None:
    fixed = [f"{target} ({delta.algorithm})" for target, delta in adapter.deltas.items() if not delta.additive]
    replaced = [extra.name for extra in adapter.extras]
    if fixed or replaced:
        raise RefusedError(
            "the base's own weights cannot be recovered from the merged ones", file=path,
            found=", ".join([*fixed, *replaced][:5]), remedy="keep the base, or merge in place and use 'upparam undo'",
        )  # fmt: skip
