"""Merge: bake adapters into a base model, streaming, in constant memory, each element rounded once."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upparam.adapter import Adapter, without
from upparam.atomic import refuse_existing
from upparam.checkpoint import Checkpoint
from upparam.errors import DeadAdapterError, RefusedError, UsageError
from upparam.findings import Finding, info, warning
from upparam.operations.dtypes import named_dtype
from upparam.operations.receipt import Receipt
from upparam.operations.threads import default_threads
from upparam.progress import Progress, silent
from upparam.wording import counted

if TYPE_CHECKING:
    from typing import TypeAlias

    from upparam.operations.merge.planned import BlockWeight, Ingredient, Plan

    Scaled: TypeAlias = Adapter | str | Path | tuple[Adapter | str | Path, float] | Ingredient
    """An adapter (opened, or a path), alone or with a multiplier on top of its own scale."""


def merge(
    base: Path | str,
    adapters: Scaled | Sequence[Scaled],
    out: Path | str | None = None,
    *,
    in_place: bool = False,
    force: bool = False,
    verify: bool = True,
    exact: bool = True,
    sync: bool = True,
    dtype: str | None = None,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    drop: Collection[str] = (),
    block_weight: BlockWeight | None = None,
    initial: Path | str | None = None,
    threads: int | None = None,
    device: Any = "cpu",
    progress: Progress = silent,
) -> Receipt:
    """Write `base` with `adapters` merged in to `out`: every element is round(W + sum of multiplier * scale * dW), rounded once.

    `base` is a weight file or a model folder; `out` becomes the same kind, atomically. Side files, metadata, shards and index are
    carried. `dtype` ('float16', 'bf16', ...) converts all float weights; `only` and `skip` are globs over target module paths; `drop`
    names what may be left out (see `upparam.adapter.DROPPABLE`); `block_weight` gives each target another multiplier. `exact=False` leaves out the
    float64 check of near-ties (about 1 element in 10^5 is then off by one unit in the last place).
    `sync=False` does not wait until the disk has everything (see `upparam.atomic`). `device` is 'cpu', 'cuda' or 'cuda:N' (through torch,
    with the same bytes; see `on_device`), or a `torch.device`.

    With `in_place` and no `out` the base's own files are changed, with an undo journal beside them (see `inplace`).

    Raises MismatchError (before anything is written) when targets are missing or shapes differ, RefusedError when the result would
    equal the base or something would be lost, OutputExistsError, and VerificationError when what was written reads back wrong.
    """
    begun = time.monotonic()
    if (out is None) is not in_place:
        raise UsageError("nowhere to write, or two places", remedy="give an output, or ask for in place")
    if out is not None:
        refuse_existing(Path(out), force)
    where = None
    if device != "cpu":
        from upparam.operations.merge.on_device import open_device

        where = open_device(device)
    plan = prepare(base, adapters, dtype=dtype, only=only, skip=skip, drop=drop, block_weight=block_weight, initial=initial)
    plan.device = where
    threads = threads or default_threads()
    if out is None:
        from upparam.operations.merge.inplace import merge_in_place

        outcome = merge_in_place(plan, verify=verify, exact=exact, sync=sync, threads=threads, progress=progress)
    else:
        from upparam.operations.merge.write import write

        outcome = write(plan, Path(out), force=force, verify=verify, exact=exact, sync=sync, threads=threads, progress=progress)
    place = str(base if out is None else out)
    findings: list[Finding] = []
    if where is not None:
        total = sum(work.tensor.numel for work in plan.works.values())
        said = f"{where.elements:,} of {total:,} elements of changed tensors were computed on {where.name}, the others on the processor"
        findings.append(info("device", place, said))
    if not exact:
        findings.append(warning("not-exact", place, "near-ties were not checked: about 1 element in 100,000 may be off by one ulp"))
    return Receipt(
        "merge",
        [str(base), *(str(item.path or item.adapter.dialect) for item in plan.ingredients)],
        [place],
        {
            "adapters": len(plan.ingredients),
            "tensors_changed": outcome.tensors,
            "elements_changed": outcome.elements,
            "tensors_added": len(plan.added),
            "targets_skipped": len(plan.skipped),
            "bytes": outcome.bytes,
        },
        outcome.proofs,
        [*plan.findings, *findings, *outcome.findings],
        time.monotonic() - begun,
    )


def prepare(
    base: Path | str,
    adapters: Scaled | Sequence[Scaled],
    *,
    dtype: str | None = None,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    drop: Collection[str] = (),
    block_weight: BlockWeight | None = None,
    initial: Path | str | None = None,
) -> Plan:
    """The plan of a merge, nothing written. Raises what `merge` raises before its first byte."""
    from upparam.operations.merge.plan import make_plan

    wanted = None if dtype is None else named_dtype(dtype, "merged weights")
    checkpoint = Checkpoint.open(base)
    ingredients = []
    given_up: list[Finding] = []
    for ingredient in open_ingredients(checkpoint, adapters, block_weight, initial):
        adapter, gone = without(ingredient.adapter, drop)
        ingredient = replace(ingredient, adapter=adapter)
        given_up += gone
        if not isfinite(ingredient.multiplier):
            raise UsageError("the scale is no finite number", file=ingredient.path, found=ingredient.multiplier)
        _refuse_zero(ingredient)
        ingredients.append(ingredient)
    if not ingredients:
        raise UsageError("no adapter to merge")
    plan = make_plan(checkpoint, ingredients, dtype=wanted, only=only, skip=skip)
    plan.findings[:0] = given_up
    plan.findings += [finding for item in plan.ingredients for finding in item.adapter.findings if finding.severity]
    return plan


def open_ingredients(
    base: Checkpoint | Path | str,
    adapters: Scaled | Sequence[Scaled],
    block_weight: BlockWeight | None = None,
    initial: Path | str | None = None,
) -> list[Ingredient]:
    """The adapters opened against the base, each with its multiplier.

    `initial` is what the training of the only adapter began as: it is subtracted. Raises UsageError beside others.
    """
    items: list[Scaled] = list(adapters) if isinstance(adapters, Sequence) and not isinstance(adapters, (str, tuple)) else [adapters]
    checkpoint = base if isinstance(base, Checkpoint) else Checkpoint.open(base)
    if initial is not None and len(items) != 1:
        raise UsageError(
            "an initial adapter belongs to one adapter", found=f"{len(items)} adapters", remedy="convert each with --initial first"
        )
    return [_ingredient(item, checkpoint, block_weight, initial) for item in items]


def _ingredient(item: Scaled, checkpoint: Checkpoint, block_weight: BlockWeight | None, initial: Path | str | None) -> Ingredient:
    """The adapter is first opened by itself; only where its names are not simply the base's is the base recognised and asked."""
    from upparam.operations.initial import open_without, without_initial
    from upparam.operations.merge.matching import place
    from upparam.operations.merge.planned import Ingredient
    from upparam.operations.opening import open_adapter

    source, multiplier = item if isinstance(item, tuple) else (item, 1.0)
    if isinstance(source, Ingredient):
        return source
    if isinstance(source, Adapter):
        less = source if initial is None else without_initial(source, open_adapter(initial))
        return Ingredient(less, float(multiplier), None, block_weight)
    from upparam.bases.header import base_from_shapes
    from upparam.dialects.base import ReadOptions

    path = Path(source)
    try:
        adapter = open_without(path, initial)
        if adapter.deltas and not place(adapter.deltas, checkpoint.shapes, None)[1]:
            adapter.findings = [finding for finding in adapter.findings if finding.code not in _OF_NAMES]
            return Ingredient(adapter, float(multiplier), path, block_weight)
    except (UsageError, DeadAdapterError):
        pass  # names, or parts, that only the base can settle
    base = base_from_shapes(checkpoint.shapes, config=checkpoint.config, name=str(checkpoint.path))
    return Ingredient(open_without(path, initial, ReadOptions(base=base)), float(multiplier), path, block_weight, base)


_OF_NAMES = ("base-open", "base-unknown")
"""Findings that an adapter's names may not be those of its base: of no matter where the base has them all."""


def _refuse_zero(ingredient: Ingredient) -> None:
    """Raise RefusedError when nothing of the adapter can change anything: multiplier 0, or every delta zero (an untrained up)."""
    where = ingredient.path or (ingredient.adapter.files[0] if ingredient.adapter.files else None)
    if not ingredient.multiplier:
        raise RefusedError("this adapter would change nothing", file=where, found="scale 0", remedy="leave it out or give another scale")
    if ingredient.adapter.extras or not ingredient.adapter.deltas:
        return
    if all(_is_zero(delta) for delta in ingredient.adapter.deltas.values()):
        raise RefusedError(
            "this adapter would change nothing",
            file=where,
            found=f"{counted(len(ingredient.adapter.deltas), 'delta')}, all zero (an all-zero factor: never trained, or saved before training)",
            remedy="see 'upparam verify'",
        )


def _is_zero(delta: object) -> bool:
    """True when a low-rank delta has an all-zero factor. Other algorithms are judged by what the merge changes."""
    from upparam.algorithms.lora import LoRA

    if not isinstance(delta, LoRA):
        return False
    return delta.scale == 0 or any(not factor.read().any() for factor in delta.factors().values())
