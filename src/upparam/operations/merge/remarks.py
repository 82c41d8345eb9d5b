"""What is worth a warning about a plan that can be carried out."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from upparam.findings import Finding, warning

if TYPE_CHECKING:
    from upparam.operations.merge.plan import Plan


def idle_globs(plan: Plan, only: Sequence[str], skip: Sequence[str]) -> list[Finding]:
    """A warning for `--only` and `--skip` globs that match no part of any adapter: a slip of the pen merges what was to be left out."""
    adapters = [ingredient.adapter for ingredient in plan.ingredients]
    names = [target.module for adapter in adapters for target in adapter.deltas]
    names += [extra.name.rpartition(".")[0] for adapter in adapters for extra in adapter.extras]
    idle = [glob for glob in (*only, *skip) if not any(fnmatchcase(name, glob) for name in names)]
    return [warning("idle-glob", glob, "--only and --skip name target modules, and this glob matches none") for glob in idle]


def order_matters(plan: Plan) -> list[Finding]:
    """A warning where one adapter's change of a weight depends on what another one made of it."""
    mixed = [
        work.name
        for work in plan.works.values()
        if len({piece.ingredient for piece in work.pieces}) > 1 and any(not piece.delta.additive for piece in work.pieces)
    ]
    if not mixed:
        return []
    said = f"{len(mixed)} tensors get a change that depends on the weight itself (DoRA, IA3, OFT ...) beside another adapter's: the order given matters"
    return [warning("order-matters", mixed[0], said, *mixed[:5])]
