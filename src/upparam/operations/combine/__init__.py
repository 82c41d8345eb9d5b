"""Combine: several adapters as one. By default its dW is the weighted sum of theirs, but for one rounding; other methods are told apart in METHODS."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from upparam.adapter import Adapter, ExtraKind, without
from upparam.algorithms.base import Delta
from upparam.algorithms.lora import LoRA
from upparam.atomic import refuse_existing
from upparam.dialects import restated
from upparam.dialects.base import ReadOptions
from upparam.dialects.carried import agreed
from upparam.dialects.placing import OWN_NAMES
from upparam.errors import MismatchError, RefusedError, UpparamError, UsageError
from upparam.findings import Finding, info, warning
from upparam.operations import fitting
from upparam.operations.combine.exact import Sum, concatenated, orthogonal, to_cut, wide_enough
from upparam.operations.combine.pieces import Piece, Place, Weighted, extras, file_of, places, scaled
from upparam.operations.combine.sparse import Arithmetic, on_factors, on_weights
from upparam.operations.convert import write_adapter
from upparam.operations.opening import open_adapter
from upparam.operations.receipt import Receipt
from upparam.operations.resize import cut_job, cuttable, nothing_left
from upparam.operations.spool import Keep, Spool
from upparam.operations.threads import in_threads
from upparam.progress import Progress, silent
from upparam.tensors import Tensor
from upparam.wording import at_least, at_most, counted

if TYPE_CHECKING:
    from upparam.algorithms.lowrank import RankRule
    from upparam.operations.merge.planned import BlockWeight


@dataclass(frozen=True)
class Method:
    """One way to combine. `form`: what is added, factors or dW. `cut`: the result has no rank of its own and is cut to one, by default the
    largest of the adapters'. `alone`: a module that one adapter alone changes keeps its factors bit for bit."""

    does: str
    form: Literal["factors", "dW"]
    prune: Literal["size", "chance"] | None = None
    elect: bool = False
    cut: bool = False
    alone: bool = True


METHODS: dict[str, Method] = {
    "concat": Method(
        "factors side by side; ranks add, dW is the weighted sum (up rounded once, to float32, where scales or dtypes differ)", "factors"
    ),
    "orthogonal": Method(
        "concat, each adapter projected off the column and row spaces of those before it: dW_i' = (1 - P) dW_i (1 - R)", "factors"
    ),
    "linear": Method("sum of sqrt(w) up times sum of sqrt(w) down, as PEFT's; one rank only, cross terms take part", "factors"),
    "ties": Method("linear on factors pruned to their largest values, with an elected sign", "factors", "size", True, alone=False),
    "dare_linear": Method("linear on factors pruned at random and rescaled", "factors", "chance", alone=False),
    "dare_ties": Method("ties on factors pruned at random and rescaled", "factors", "chance", True, alone=False),
    "magnitude_prune": Method("linear on factors pruned to their largest values", "factors", "size", alone=False),
    "svd": Method("the weighted sum of dW, cut to a rank", "dW", cut=True),
    "ties_svd": Method("ties on dW, cut to a rank", "dW", "size", True, cut=True, alone=False),
    "dare_linear_svd": Method("dare_linear on dW, cut to a rank", "dW", "chance", cut=True, alone=False),
    "dare_ties_svd": Method("dare_ties on dW, cut to a rank", "dW", "chance", True, cut=True, alone=False),
    "magnitude_prune_svd": Method("magnitude_prune on dW, cut to a rank", "dW", "size", cut=True, alone=False),
}
"""By name, as PEFT's `add_weighted_adapter` calls them where it has them."""
ALIASES = {"cat": "concat", "dare": "dare_linear"}


@dataclass(frozen=True)
class Combination:
    """The adapter, and facts about each module that was computed and not only put together."""

    adapter: Adapter
    method: str
    modules: list[dict[str, Any]]


def combine(
    items: Sequence[tuple[Adapter | Path | str, float]],
    out: Path | str,
    *,
    method: str = "concat",
    to: str | None = None,
    rule: RankRule | None = None,
    density: float | None = None,
    seed: int = 0,
    block_weight: BlockWeight | None = None,
    read: ReadOptions | None = None,
    force: bool = False,
    verify: bool = True,
    drop: Collection[str] = (),
    threads: int | None = None,
    progress: Progress = silent,
) -> Receipt:
    """Write the combination of adapters, each with a multiplier, to `out` in dialect `to` (that of the first one's files when None).

    With `rule` each module is cut through the factors to the rank it chooses. A multiplier that the dialect cannot say goes into a factor. Memory is bounded by the largest module. Raises what
    `combined` raises, and what opening and writing raise.
    """
    begun = time.monotonic()
    out = Path(out)
    refuse_existing(out, force)
    opened = [(_opened(given, read, drop), multiplier) for given, multiplier in items]
    with Spool(out.absolute().parent) as spool:
        result = combined(
            opened, method=method, rule=rule, density=density, seed=seed, block_weight=block_weight, keep=spool.keep, threads=threads,
            progress=progress,
        )  # fmt: skip
        baked = fitting.Arithmetic(bake_scale=True, offered=())
        receipt = write_adapter(
            result.adapter, out, to or opened[0][0].written_as, read=read, force=force, verify=verify, drop=drop, arithmetic=baked
        )  # fmt: skip
    told = ("metadata", "block-weights")  # of what is no warning, and so in no receipt yet
    receipt.findings += [finding for finding in result.adapter.findings if finding.code in told and not finding.severity]
    receipt.operation = f"combine ({result.method}) to {to or opened[0][0].written_as}"
    receipt.inputs = [f"{given if not isinstance(given, Adapter) else file_of(given)}@{multiplier:g}" for given, multiplier in items]
    chosen = METHODS[result.method]
    receipt.counts = {"form": chosen.form, **_parameters(chosen, density, seed), **_summary(result.modules), **receipt.counts}
    receipt.modules, receipt.seconds = result.modules, time.monotonic() - begun
    return receipt


def combined(
    items: Sequence[Weighted],
    *,
    method: str = "concat",
    rule: RankRule | None = None,
    density: float | None = None,
    seed: int = 0,
    block_weight: BlockWeight | None = None,
    keep: Keep = Tensor.of,
    threads: int | None = None,
    progress: Progress = silent,
) -> Combination:
    """One adapter made of several by a method of METHODS.

    A module that one adapter alone changes keeps its factors bit for bit and carries the multiplier in its scale, unless the method
    prunes. `rule` cuts every module to the rank it chooses; `density` is the share of values a pruning method keeps, `seed` that of
    random pruning (another random generator than torch's: PEFT's draws cannot be repeated). `block_weight` multiplies each target's
    weight; 0 leaves it out. The result does not depend on the number of threads. `keep` takes the arrays that are computed.

    Raises UsageError for no adapter, a multiplier that is not finite, an unknown method, or a density that is missing, means nothing or is not used; RefusedError for
    unknown scales, for deltas that a method cannot add, and for adapters whose module names cannot be brought together; MismatchError
    naming both where shapes or saved tensors (or, for methods that add factors, ranks) differ.
    """
    method = ALIASES.get(method, method)
    if method not in METHODS:
        raise UsageError("no such method", expected=", ".join(METHODS), found=method)
    chosen = METHODS[method]
    _check(items, chosen, method, density)
    findings = _agreeing(items)
    items, told = _whole(items)
    findings += told
    found = places(items, block_weight)
    if not found or not any(multiplier for _, multiplier in items):
        said = "every multiplier is 0" if found else "every module's block weight is 0"
        raise RefusedError(f"nothing is left to combine: {said}", file=file_of(items[0][0]))
    if chosen.cut and rule is None:
        rule = _largest_rank(found)
    how = Arithmetic(chosen.prune, chosen.elect, 1.0 if density is None else density, seed)
    work = _worker(chosen, method, how, rule, keep)
    deltas = {}
    modules: list[dict[str, Any]] = []
    # LoRAs that are only put side by side cost nothing before they are written.
    lazy = method == "concat" and rule is None and all(type(piece.delta) is LoRA for place in found for piece in place.pieces)
    made = map(work, found) if lazy else in_threads(work, found, [place.size for place in found], threads, progress)
    for place, (delta, facts) in zip(found, made, strict=True):
        deltas.update(place.job.parts(delta))
        if facts:
            modules.append(facts)
    first = items[0][0]
    alone = sum(len(place.pieces) == 1 for place in found)
    weights = [f"{file_of(adapter)} x {multiplier:g}" for adapter, multiplier in items]
    findings.append(
        info(
            "combined", file_of(first), f"{method}: {counted(len(found), 'module')}, {alone} of them changed by one adapter alone", *weights
        )
    )
    if rule is not None:
        cancelled = "the adapters cancel each other there, or change nothing by themselves"
        findings += nothing_left(file_of(first), [facts["norm"] for facts in modules if "norm" in facts], cancelled)
    if block_weight is not None:
        findings += _weighted(items, block_weight)
    leftovers = {f"{file_of(adapter)}:{name}": tensor for adapter, _ in items for name, tensor in adapter.leftovers.items()}
    metadata, left_out = agreed([adapter for adapter, _ in items])
    if metadata.keys() - {"format"} or left_out:
        said = "metadata that all adapters share and that is true of the result is kept or made anew"
        findings.append(info("metadata", file_of(first), said, f"kept {_listed(metadata)}", f"left out {_listed(left_out)}"))
    adapter = replace(
        first, deltas=deltas, extras=extras(items), spelling=_spelling(items), metadata=metadata,
        config={key: value for key, value in first.config.items() if key in ("base_model_name_or_path", "task_type")}, leftovers=leftovers,
        files=tuple(name for adapter, _ in items for name in adapter.files), findings=findings,
        transposed_base=next((adapter.transposed_base for adapter, _ in items if adapter.transposed_base is not None), None),
    )  # fmt: skip
    return Combination(restated(adapter), method, modules)


def _listed(keys: Collection[str]) -> str:
    shown = ", ".join(list(keys)[:12]) or "none"
    return shown if len(keys) <= 12 else f"{shown} and {len(keys) - 12} more"


def _spelling(items: Sequence[Weighted]) -> dict[str, str]:
    """The first one's, which speaks of its own names: whether they are those of every module is not known where the others' are of another base."""
    first = items[0][0].spelling
    alike = len({adapter.spelling.get(OWN_NAMES) for adapter, _ in items}) == 1
    return first if alike else {key: value for key, value in first.items() if key != OWN_NAMES}


def _opened(given: Adapter | Path | str, read: ReadOptions | None, drop: Collection[str]) -> Adapter:
    less, given_up = without(given if isinstance(given, Adapter) else open_adapter(given, options=read), drop)
    return replace(less, findings=[*less.findings, *given_up])


def _check(items: Sequence[Weighted], chosen: Method, method: str, density: float | None) -> None:
    if not items:
        raise UsageError("nothing to combine")
    for _, multiplier in items:
        if not isfinite(multiplier):
            raise UsageError("a multiplier must be a finite number", found=multiplier)
    if chosen.prune is None and density is not None:
        raise UsageError(f"{method} prunes nothing, so that a density means nothing", found=density)
    if chosen.prune is not None and (density is None or not 0.0 < density <= 1.0):
        raise UsageError(
            f"{method} needs the share of values to keep", expected="a density above 0 and up to 1", found="none" if density is None else density
        )  # fmt: skip


def _agreeing(items: Sequence[Weighted]) -> list[Finding]:
    """Findings of the adapters and about their bases. Raises RefusedError where names mean different things, MismatchError where weights lie otherwise."""
    first = items[0][0]
    layouts = {adapter.layout for adapter, _ in items}
    if len(layouts) > 1 or layouts & {"unnamed"}:
        raise RefusedError(
            "the adapters name their modules in different ways, and their base is not known", file=file_of(first),
            found="; ".join(f"{file_of(adapter)}: {adapter.layout}" for adapter, _ in items), remedy="name it with --base",
        )  # fmt: skip
    for adapter, _ in items:
        if adapter.conditions:
            raise RefusedError(
                "the factors alone are not the change", file=file_of(adapter), found="; ".join(adapter.conditions),
                remedy="combine them all the same with --drop conditions",
            )  # fmt: skip
    if len({adapter.transposed_base for adapter, _ in items} - {None}) > 1:
        raise MismatchError("some of these adapters are for weights stored (in, out) and some are not", file=file_of(first))
    findings = [finding for adapter, _ in items for finding in adapter.findings if finding.severity]
    names = {adapter.base.name for adapter, _ in items if adapter.base is not None}
    if len(names) > 1:
        findings.append(warning("bases-differ", file_of(first), "the adapters seem to be for different bases", ", ".join(sorted(names))))
    return findings


_WHOLE = (ExtraKind.SAVED_MODULE, ExtraKind.BIAS)
"""Extras that take the place of the base's own tensor."""


def _whole(items: Sequence[Weighted]) -> tuple[list[Weighted], list[Finding]]:
    """The adapters without saved tensors where the multiplier is 0, and warnings of those that a multiplier does not weaken."""
    result: list[Weighted] = []
    findings = []
    for adapter, multiplier in items:
        whole = [extra for extra in adapter.extras if extra.kind in _WHOLE]
        if whole and not multiplier:
            adapter = replace(adapter, extras=[extra for extra in adapter.extras if extra.kind not in _WHOLE])
            findings.append(
                warning(
                    "left-out",
                    file_of(adapter),
                    f"{counted(len(whole), 'saved tensor', 'of an adapter with multiplier 0 is', 'of an adapter with multiplier 0 are')} left out",
                )
            )
        elif whole and multiplier != 1.0:
            said = f"{counted(len(whole), 'saved tensor', 'replaces', 'replace')} the base's whole, whatever the multiplier"
            findings.append(warning("whole-replacement", file_of(adapter), said, f"multiplier {multiplier:g}"))
        result.append((adapter, multiplier))
    return result, findings


def _largest_rank(found: Sequence[Place]) -> RankRule:
    """PEFT's default for methods that cut: the largest rank of the adapters."""
    from upparam.algorithms.lowrank import RankRule

    ranks = [piece.delta.rank for place in found for piece in place.pieces if piece.delta.rank is not None]
    if not ranks:
        raise UsageError("no rank rule", expected="a rank, energy, error or fro", remedy="none of these adapters has a rank to take over")
    return RankRule(max(ranks))


Made = tuple[Delta, dict[str, Any]]
"""A delta, and facts about it where it was computed."""


def _worker(chosen: Method, method: str, how: Arithmetic, rule: RankRule | None, keep: Keep) -> Callable[[Place], Made]:
    def work(place: Place) -> Made:
        try:
            delta, facts = _join(place, chosen, method, how, rule, keep)
            if rule is None or not cuttable(delta):
                return delta, facts
            dtype = wide_enough(place.pieces) if isinstance(delta, Sum) else None
            delta, cut = cut_job(place.job._replace(delta=delta, dtype=dtype), rule, "scale", keep)
            return delta, facts | cut.facts()
        except UpparamError as problem:
            problem.locate(file=problem.file or _at_fault(place).file, tensor=place.name)
            raise

    return work


def _at_fault(place: Place) -> Piece:
    """Whose delta stands in the way where nothing says so: the first with values that are not finite, else the first."""
    import numpy as np

    broken = (piece for piece in place.pieces if not all(np.isfinite(factor.doubles()).all() for factor in piece.delta.factors().values()))
    return next(broken, place.pieces[0])


def _join(place: Place, chosen: Method, method: str, how: Arithmetic, rule: RankRule | None, keep: Keep) -> Made:
    if len(place.pieces) == 1 and chosen.alone:
        return scaled(place.pieces[0]), {}
    if method == "concat":
        return (concatenated(place) if rule is None else to_cut(place, rule)), {}
    if method == "orthogonal":
        delta, left = orthogonal(place)
        shares = {str(piece.number): round(share, 6) for piece, share in zip(place.pieces, left, strict=True)}
        return (_kept(delta, keep) if rule is None else delta), {"targets": [str(target) for target in place.job.targets], "left": shares}
    if chosen.form == "factors":
        delta = on_factors(place, how)
        return (_kept(delta, keep) if rule is None else delta), {}
    assert rule is not None
    return (to_cut(place, rule) if chosen.prune is None else on_weights(place, how)), {}


def _kept(delta: Delta, keep: Keep) -> Delta:
    return replace(delta, **{role: keep(factor.read()) for role, factor in delta.factors().items()})  # type: ignore[type-var]


def _weighted(items: Sequence[Weighted], block_weight: BlockWeight) -> list[Finding]:
    """What the block weights did, and a warning where they did nothing."""
    targets = {target for adapter, _ in items for target in adapter.deltas}
    weights = {target: block_weight(target) for target in targets}
    if all(weight == 1.0 for weight in weights.values()):
        unresolved = "" if items[0][0].layout == "reference" else "; the modules have no names of a known base: name it with --base"
        return [warning("block-weights", file_of(items[0][0]), f"the block weights leave every module as it is{unresolved}")]
    gone = sum(weight == 0.0 for weight in weights.values())
    changed = sum(weight not in (0.0, 1.0) for weight in weights.values())
    return [info("block-weights", file_of(items[0][0]), f"{counted(changed, 'target')} with a block weight of their own, {gone} left out")]


def _parameters(chosen: Method, density: float | None, seed: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if chosen.prune is not None:
        found["density"] = f"{density:g}"
    if chosen.prune == "chance":
        found["seed"] = seed
    return found


def _summary(modules: Sequence[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    cuts = [module for module in modules if "new_rank" in module]
    if cuts:
        ranks = sorted({module["new_rank"] for module in cuts})
        found["ranks"] = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
        found["error_of_the_cut"] = at_most(max(module["error"] for module in cuts))
    left = [share for module in modules for share in module.get("left", {}).values()]
    if left:
        found["left_of_dW"] = at_least(min(left))
    return found
