"""What is worth a warning about a plan that can be carried out."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from itertools import combinations
from typing import TYPE_CHECKING

from upparam.algorithms.dora import Decomposed
from upparam.algorithms.ia3 import IA3
from upparam.findings import Finding, info, warning
from upparam.operations.merge.blocks import Weights
from upparam.operations.merge.misfits import EMBEDDINGS, HEADS, ties_head
from upparam.wording import counted

if TYPE_CHECKING:
    from upparam.operations.merge.planned import Piece, Plan, Work


def other_weights(plan: Plan) -> list[Finding]:
    """What lies in the folder and holds weights that this merge does not change."""
    unread = plan.checkpoint.unread
    if not unread:
        return []
    said = f"no part of the model as loaders choose it, neither changed nor carried along: {counted(len(unread), 'file')} of weights or adapters"
    return [info("other-weights", unread[0], said, *unread[:5])]


def idle_blocks(plan: Plan) -> list[Finding]:
    """A warning for each adapter of which no module lies in a block that `--block-weights` names."""
    said = "the block weights weigh nothing: no module lies in a block they name, and all are merged at their full scale"
    return [
        warning("block-weights", str(one.path or one.adapter.dialect), said)
        for one in plan.ingredients
        if isinstance(one.block_weight, Weights) and one.adapter.deltas and not any(map(one.block_weight.names, one.adapter.deltas))
    ]


def idle_globs(plan: Plan, only: Sequence[str], skip: Sequence[str]) -> list[Finding]:
    """A warning for globs of `--only`, `--skip` and `--block-weights` that match no part of any adapter: a slip of the pen merges what was to be left out."""
    adapters = [ingredient.adapter for ingredient in plan.ingredients]
    names = [target.module for adapter in adapters for target in adapter.deltas]
    names += [extra.name.rpartition(".")[0] for adapter in adapters for extra in adapter.extras]
    weights = [ingredient.block_weight for ingredient in plan.ingredients]
    weighed = dict.fromkeys(glob for weight in weights if isinstance(weight, Weights) for glob in weight.globs)
    idle = [glob for glob in (*only, *skip, *weighed) if not any(fnmatchcase(name, glob) for name in names)]
    return [warning("idle-glob", glob, "a glob over target modules, and it matches none") for glob in idle]


def stated_dtypes(plan: Plan) -> list[Finding]:
    """A warning where configs that are carried along state another dtype than the one asked for: transformers 5 loads weights in the dtype stated."""
    if plan.dtype is None or not plan.checkpoint.is_folder:
        return []
    stated = {
        f"{component}/config.json".lstrip("/"): str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
        for component, config in plan.checkpoint.configs.items()
    }
    other = [f"{name}: {dtype}" for name, dtype in stated.items() if dtype not in ("", plan.dtype.name)]
    if not other:
        return []
    said = f"the config states another dtype and is carried as it is; loaders that follow it undo --dtype: state {plan.dtype} there, or load with that dtype"
    return [warning("stated-dtype", other[0].partition(":")[0], said, *other)]


def tied_apart(plan: Plan) -> list[Finding]:
    """A warning where the base's config ties its output head to its embedding, both are stored, and one of them changes."""
    if not ties_head(plan.checkpoint):
        return []
    heads, embeddings = ([name for name in plan.checkpoint.tensors if name.endswith(ends)] for ends in (HEADS, EMBEDDINGS))
    changed = [name for name in (*embeddings, *heads) if name in plan.works]
    if not (heads and embeddings and changed):
        return []
    said = (
        "the base's config ties its output head to its embedding and both are stored: each gets only what the adapters have for it. Of the result "
        "transformers 4 takes the embedding for both, transformers 5 each as it is; PEFT's merge changes both"
    )
    return [warning("tied-weight", changed[0], said, *heads, *embeddings)]


def order_matters(plan: Plan) -> list[Finding]:
    """Warnings where one adapter's change of a weight depends on what another one made of it, and where PEFT would compute another weight."""
    met = {name: pairs for name, work in plan.works.items() if (pairs := [pair for pair in combinations(work.pieces, 2) if _meet(*pair)])}
    if not met:
        return []
    first = next(iter(met))
    said = (
        f"a change that depends on the weight itself (DoRA, IA3, OFT ...) beside another adapter's, in {counted(len(met), 'tensor')}: the order given "
        "matters, each changes what those before it left"
    )
    found = [warning("order-matters", first, said, *list(met)[:5])]
    later = [name for name, pairs in met.items() if any(isinstance(after.delta, Decomposed) for _, after in pairs)]
    if later:
        said = (
            f"a DoRA after another adapter's change, which its norm includes, in {counted(len(later), 'tensor')}; PEFT takes the norm without that, "
            "so its merge of the same adapters differs, unless the DoRA comes first"
        )
        found.append(warning("norm-of-changed", later[0], said, *later[:5]))
    return found


def replaced_and_changed(plan: Plan) -> list[Finding]:
    """A warning where one adapter brings a weight whole and another one changes it."""
    found = [name for name, work in plan.works.items() if any(not _brings(plan, piece, work) for piece in work.pieces)]
    if not found:
        return []
    said = f"brought whole by one adapter and changed by another, in {counted(len(found), 'tensor')}: the change is added to what is brought, in whatever order they are given"
    return [warning("replaced-and-changed", found[0], said, *found[:5])]


def _brings(plan: Plan, piece: Piece, work: Work) -> bool:
    """True where nothing replaces the weight that a piece changes, or the piece's own adapter does."""
    extras = plan.ingredients[piece.ingredient].adapter.extras
    return work.replacement is None or any(extra.tensor is work.replacement for extra in extras)


def _meet(one: Piece, other: Piece) -> bool:
    """True when two adapters change the same rows and the result depends on the order. Factors of IA3 commute."""
    if one.ingredient == other.ingredient or (one.delta.additive and other.delta.additive):
        return False
    if isinstance(one.delta, IA3) and isinstance(other.delta, IA3):
        return False
    return one.rows is None or other.rows is None or (one.rows[0] < other.rows[1] and other.rows[0] < one.rows[1])
