"""Extract: the adapter that turns one model into another, from the difference of their weights, with the achieved error computed."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from upparam.adapter import Adapter, BaseHint, Extra, ExtraKind, without
from upparam.algorithms.lowrank import RankRule
from upparam.algorithms.slicing import cut
from upparam.atomic import refuse_existing
from upparam.bases import versions
from upparam.bases.base import Base
from upparam.checkpoint import Checkpoint
from upparam.dialects import get
from upparam.dialects.base import ReadOptions
from upparam.errors import RefusedError, UpparamError, UsageError
from upparam.findings import Finding, info, warning
from upparam.operations.convert import write_adapter
from upparam.operations.dtypes import FACTORS, named_dtype
from upparam.operations.extract.difference import same_weights
from upparam.operations.extract.module import Extracted, Maker
from upparam.operations.extract.pairing import Pair, Pairing, pair
from upparam.operations.fitting import Arithmetic
from upparam.operations.merge.misfits import ties_head
from upparam.operations.merge.plan import wanted
from upparam.operations.receipt import Receipt
from upparam.operations.spool import Keep, Spool
from upparam.operations.threads import in_threads
from upparam.progress import Progress, silent
from upparam.tensors import Tensor
from upparam.wording import at_most, counted


@dataclass(frozen=True)
class Extraction:
    """The adapter, the base both models are of, and what was done to each module that differs. `below` are differences within the rounding noise."""

    adapter: Adapter
    base: Base
    modules: list[Extracted]
    below: list[str]
    unchanged: int


def extract(
    tuned: Path | str,
    base: Path | str,
    out: Path | str,
    to: str,
    rule: RankRule | None = None,
    *,
    auto: bool = False,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    dtype: str | None = None,
    seed: int = 0,
    force: bool = False,
    verify: bool = True,
    drop: Collection[str] = (),
    threads: int | None = None,
    progress: Progress = silent,
) -> Receipt:
    """Write the adapter that turns the model at `base` into the one at `tuned` to `out`, in dialect `to`.

    Raises what `extracted` and `upparam.operations.convert.write_adapter` raise: a dialect that cannot hold changed norms and biases
    refuses them until they are given up by name in `drop` (`saved-module`, `bias`, `other`).
    """
    begun = time.monotonic()
    out = Path(out)
    refuse_existing(out, force)
    before = Checkpoint.open(base)
    with Spool(out.absolute().parent) as spool:
        result = extracted(
            Checkpoint.open(tuned), before, rule, auto=auto, only=only, skip=skip, dtype=dtype, seed=seed,
            keep=spool.keep, threads=threads, progress=progress,
        )  # fmt: skip
        # The base's own names would not be found again in those that its modules have in memory.
        moved = _name_as_in_memory(result.adapter, before) if to == "peft" else []
        read = None if moved else ReadOptions(base=result.base)
        try:
            receipt = write_adapter(
                result.adapter, out, to, read=read, force=force, verify=verify, drop=drop, arithmetic=Arithmetic(offered=())
            )  # fmt: skip
        except RefusedError as problem:
            raise _less_would_do(problem, result, to, drop) from None
    receipt.operation = "extract"
    receipt.findings += moved
    receipt.inputs = [str(tuned), str(base)]
    receipt.counts = {**_summary(result), **receipt.counts}
    receipt.modules = [module.facts() for module in result.modules]
    receipt.seconds = time.monotonic() - begun
    return receipt


def _less_would_do(problem: RefusedError, result: Extraction, to: str, drop: Collection[str]) -> RefusedError:
    """The refusal, with the modules to leave out where a rehearsal shows that the dialect holds the rest, at most less its extras."""
    targets = {target for one in problem.problems for target in one.targets}
    rest = {target: delta for target, delta in result.adapter.deltas.items() if target not in targets}
    if not targets or not rest:
        return problem
    kinds = [kind.value for kind in ExtraKind if any(one.subject.startswith(f"{kind.value} ") for one in problem.problems)]
    less, _ = without(replace(result.adapter, deltas=rest), [*drop, *kinds])
    try:
        get(to).write(less, {"base": result.base, "drop": frozenset([*drop, *kinds])})
    except UpparamError:
        return problem
    modules = list(dict.fromkeys(str(target.module) for target in result.adapter.deltas if target in targets))
    words = (
        [f"--skip {module}" for module in modules[:_SKIPPED]] + ["..."] * (len(modules) > _SKIPPED) + [f"--drop {kind}" for kind in kinds]
    )
    remedy = f"leave out what it cannot hold with {' '.join(words)}"
    return RefusedError(
        problem.message, file=problem.file, tensor=problem.tensor, expected=problem.expected, found=problem.found,
        remedy=f"{remedy}, or {problem.remedy}" if problem.remedy else remedy, problems=problem.problems,
    )  # fmt: skip


_SKIPPED = 3
"""How many modules a refusal names for --skip."""


def extracted(
    tuned: Checkpoint,
    base: Checkpoint,
    rule: RankRule | None = None,
    *,
    auto: bool = False,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    dtype: str | None = None,
    seed: int = 0,
    keep: Keep = Tensor.of,
    threads: int | None = None,
    progress: Progress = silent,
) -> Extraction:
    """The difference of two models of one base as an adapter: a LoRA for each changed matrix or convolution, extras for what else changed.

    `rule` says how many singular values to keep; `auto` keeps those above what rounding to the stored dtypes can explain, `rule` then
    being a further limit. `only` and `skip` are globs over module paths. Factors get `dtype`, or that of the tuned weight (float32 where
    it has none of float32, float16, bfloat16). Scale is 1. The result depends on `seed` and not on the number of threads.

    Raises UsageError without a rule, MismatchError where the models do not fit, RefusedError when they are equal, when a weight is
    quantised, and with `auto` when a difference has no low rank.
    """
    if not auto and (rule is None or (rule.rank is None and rule.lost is None)):
        raise UsageError("no rank rule", expected="a rank, energy, error, fro or auto")
    wide = None if dtype is None else named_dtype(dtype, "extracted factors", FACTORS)
    pairing = pair(tuned, base, lambda name: wanted(name, only, skip))
    maker = Maker(rule, auto, wide, seed, keep)
    groups: dict[tuple[str, str], list[Pair]] = {}
    for job in pairing.pairs:
        groups.setdefault((job.tensor, job.target.parameter), []).append(job)
    jobs = list(groups.values())
    sizes = [sum(job.tuned.nbytes for job in group) for group in jobs]
    adapter = Adapter(
        {}, "extracted", base=BaseHint(pairing.base.name, 1.0, pairing.base.evidence, True), files=(str(tuned.path),),
        transposed_base=True if any(job.transposed for job in pairing.pairs) else None,
    )  # fmt: skip
    result = Extraction(adapter, pairing.base, [], [], 0)
    unchanged = 0
    full: list[str] = []
    made_of = (
        zip(group, made, strict=True) for group, made in zip(jobs, in_threads(maker.group, jobs, sizes, threads, progress), strict=True)
    )
    for job, made in chain.from_iterable(made_of):
        if isinstance(made, Extra):
            adapter.extras.append(made)
        elif isinstance(made, tuple):
            delta, module = made
            adapter.deltas[job.target] = delta
            result.modules.append(module)
        elif made == "below":
            result.below.append(str(job.target))
        elif made == "full":
            full.append(str(job.target))
        else:
            unchanged += 1
    if full:
        raise RefusedError(
            f"{counted(len(full), 'difference', 'has', 'have')} no low rank: more values lie above the rounding noise than an adapter is worth", file=tuned.path,
            tensor=full[0], found=_listed(full), remedy="give --rank, --energy or --error as a limit, or leave them out with --skip",
        )  # fmt: skip
    _whole_modules(adapter)
    _leftover(adapter, pairing)
    adapter.findings += _findings(result, pairing, tuned, base)
    if not adapter.deltas and not adapter.extras:
        raise RefusedError(
            "there is nothing to extract", file=tuned.path,
            found=f"{counted(len(result.below), 'difference')} within rounding noise" if result.below else f"{counted(unchanged, 'weight', 'is', 'are')} equal",
            remedy="see what the models are with 'upparam identify'",
        )  # fmt: skip
    return Extraction(adapter, pairing.base, result.modules, result.below, unchanged)


def _name_as_in_memory(adapter: Adapter, base: Checkpoint) -> list[Finding]:
    """Take the names that PEFT meets in the model, where transformers loads the base's tensors under others, and say so.

    PEFT leaves out in silence what it does not find.
    """
    rules = versions.rules_of((base.config or {}).get("model_type"))
    deltas, adapter.deltas = adapter.deltas, {}
    moved: list[tuple[str, str]] = []
    for target, delta in deltas.items():
        for name, place in versions.parts(target.name, delta.shape, rules).items():
            new = target.renamed(name)
            adapter.deltas[new] = delta if place.rows is None else cut(delta, *place.rows)
            moved += [(str(place), new.module)] if new != target else []
    adapter.extras = [
        replace(extra, name=name, tensor=extra.tensor if place.rows is None else extra.tensor.rows(*place.rows))
        for extra in adapter.extras for name, place in versions.parts(extra.name, extra.tensor.shape, rules).items()
    ]  # fmt: skip
    if not moved:
        return []
    said = f"{counted(len(moved), 'module')} named as PEFT finds them in a model that transformers 5 has loaded, not as the base's files do"
    return [info("names-in-memory", moved[0][1], said, " is ".join(reversed(moved[0])))]


def _whole_modules(adapter: Adapter) -> None:
    """A bias whose weight is saved whole (a norm's) belongs to that saved module: it is none that was trained beside factors."""
    saved = {extra.name.rpartition(".")[0] for extra in adapter.extras if extra.kind is ExtraKind.SAVED_MODULE}
    adapter.extras = [
        replace(extra, kind=ExtraKind.SAVED_MODULE) if extra.kind is ExtraKind.BIAS and extra.name.rpartition(".")[0] in saved else extra
        for extra in adapter.extras
    ]


def _leftover(adapter: Adapter, pairing: Pairing) -> None:
    """Tensors of both models that are no module of the base (a VAE, buffers) and differ: extras that no adapter holds."""
    for name, (mine, theirs) in pairing.unnamed.items():
        if mine.shape != theirs.shape or not same_weights(mine, theirs):
            adapter.extras.append(Extra(ExtraKind.OTHER, name, mine))


def _findings(result: Extraction, pairing: Pairing, tuned: Checkpoint, base: Checkpoint) -> list[Finding]:
    found: list[Finding] = [*tuned.findings, *base.findings]
    if result.below:
        found.append(
            warning(
                "below-noise", str(tuned.path), f"{counted(len(result.below), 'weight', 'differs', 'differ')} by no more than rounding to the dtype can explain", _listed(result.below)
            )
        )  # fmt: skip
    head = any(name.endswith("lm_head.weight") for name in base.tensors)
    for target in result.adapter.deltas:
        shared = target.module.endswith(("embed_tokens", "wte", "word_embeddings")) and not target.module.startswith("text_encoder")
        if shared and not head and (ties_head(base) or base.config is None):
            found.append(
                warning(
                    "tied-weight", str(target),
                    "the base ties its output head to this embedding: merged, the delta changes both, as training did; applied unmerged, the lookup alone",
                    "no lm_head.weight",
                )
            )  # fmt: skip
    if all(pairing.apart):
        found.append(
            warning(
                "not-paired", str(tuned.path), f"{counted(pairing.apart[0], 'module')} here and {pairing.apart[1]} of the base have other names in the other model: "
                "they were not compared", _listed(pairing.only_tuned), _listed(pairing.only_base),
            )
        )  # fmt: skip
    elif pairing.partly:
        found.append(
            warning(
                "partly-missing", str(tuned.path), counted(len(pairing.partly), "weight", "of what both models have is", "of what both models have are") + " in one of them alone: not compared",
                _listed(pairing.partly),
            )
        )  # fmt: skip
    for names, checkpoint in ((pairing.only_tuned, tuned), (pairing.only_base, base)):
        if names:
            found.append(info("only-in-one", str(checkpoint.path), f"{counted(len(names), 'tensor')} in this model alone", _listed(names)))
    return found


def _summary(result: Extraction) -> dict[str, Any]:
    counts: dict[str, Any] = {"extracted": len(result.modules), "unchanged": result.unchanged}
    if result.below:
        counts["within_rounding_noise"] = len(result.below)
    if result.modules:
        ranks = sorted({module.rank for module in result.modules})
        worst = max(result.modules, key=lambda module: module.error)
        counts["ranks"] = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
        counts["error"] = at_most(worst.error)
        ratios = [module.error / module.optimum for module in result.modules if module.optimum > 1e-3]
        if ratios:
            counts["over_the_optimum"] = f"{max(ratios):.4f}x or less"
    return counts


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
