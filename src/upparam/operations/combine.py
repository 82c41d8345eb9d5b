"""Combine: several adapters as one whose dW is the weighted sum of theirs, exactly by concatenation, or cut to a rank afterwards."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upparam.adapter import Adapter, Extra, Target
from upparam.algorithms.base import Delta, ScaleRule, Scaling
from upparam.algorithms.lora import LoRA
from upparam.atomic import refuse_existing
from upparam.dialects.base import ReadOptions
from upparam.errors import MismatchError, RefusedError, UsageError
from upparam.findings import Finding, info, warning
from upparam.operations.convert import write_adapter
from upparam.operations.opening import open_adapter
from upparam.operations.receipt import Receipt
from upparam.progress import Progress, silent
from upparam.tensors import DTYPES, Tensor, same_bits

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from upparam.algorithms.lowrank import RankRule

Weighted = tuple[Adapter, float]
"""An adapter and the multiplier on top of its own scale."""


def combine(
    items: Sequence[tuple[Path | str, float]],
    out: Path | str,
    *,
    to: str | None = None,
    rule: RankRule | None = None,
    read: ReadOptions | None = None,
    force: bool = False,
    verify: bool = True,
    drop: Collection[str] = (),
    threads: int | None = None,
    progress: Progress = silent,
) -> Receipt:
    """Write the weighted sum of adapters to `out` in dialect `to` (the first one's when None).

    Without `rule` ranks add and the sum is exact; with it each module is cut through the factors to the rank it chooses. Raises what
    `combined` raises, and what writing raises.
    """
    begun = time.monotonic()
    refuse_existing(Path(out), force)
    opened = [(open_adapter(path, options=read), multiplier) for path, multiplier in items]
    result = combined(opened)
    modules: list[dict[str, Any]] = []
    if rule is not None:
        from upparam.operations.resize import resized

        result, cuts = resized(result, rule, threads=threads, progress=progress)
        modules = [cut.facts() for cut in cuts]
    receipt = write_adapter(result, out, to or opened[0][0].dialect, read=read, force=force, verify=verify, drop=drop)
    receipt.operation = f"combine to {to or opened[0][0].dialect}"
    receipt.inputs = [f"{path}@{multiplier:g}" for path, multiplier in items]
    receipt.modules, receipt.seconds = modules, time.monotonic() - begun
    return receipt


def combined(items: Sequence[Weighted]) -> Adapter:
    """The adapter with dW = sum of multiplier * scale * dW over `items`, by concatenation: up = [up1 up2 ...], down stacked likewise.

    A module that one adapter alone changes keeps its factors bit for bit and carries the multiplier in its scale; so do modules whose
    pieces have one effective scale and dtype. Otherwise each piece's share of the scale goes into its up factor, in float32 (float64
    where a factor is): one rounding each.

    Raises UsageError for fewer than one adapter, RefusedError for unknown scales, for deltas without a low-rank form that would have to
    be added to others, and for adapters whose module names cannot be brought together; MismatchError naming both where shapes or saved
    tensors differ.
    """
    if not items:
        raise UsageError("nothing to combine")
    first = items[0][0]
    findings: list[Finding] = []
    layouts = {adapter.layout for adapter, _ in items}
    if len(layouts) > 1 or layouts & {"unnamed"}:
        raise RefusedError(
            "the adapters name their modules in different ways, and their base is not known", file=_file(first),
            found="; ".join(f"{_file(adapter)}: {adapter.layout}" for adapter, _ in items), remedy="name it with --base",
        )  # fmt: skip
    for adapter, _ in items:
        if adapter.conditions:
            raise RefusedError("the factors alone are not the change", file=_file(adapter), found="; ".join(adapter.conditions))
    names = {adapter.base.name for adapter, _ in items if adapter.base is not None}
    if len(names) > 1:
        findings.append(warning("bases-differ", _file(first), "the adapters seem to be for different bases", ", ".join(sorted(names))))
    pieces: dict[Target, list[tuple[Delta, float, str]]] = {}
    for adapter, multiplier in items:
        for target, delta in adapter.deltas.items():
            pieces.setdefault(target, []).append((delta, multiplier, _file(adapter)))
    _refuse_overlaps(pieces)
    deltas = {target: _sum(target, members) for target, members in pieces.items()}
    alone = sum(len(members) == 1 for members in pieces.values())
    findings.append(
        info(
            "combined",
            _file(first),
            f"{len(deltas)} targets, {alone} of them changed by one adapter alone",
            *(f"{_file(a)} x {m:g}" for a, m in items),
        )
    )
    leftovers = {f"{_file(adapter)}:{name}": tensor for adapter, _ in items for name, tensor in adapter.leftovers.items()}
    transposed = {adapter.transposed_base for adapter, _ in items} - {None}
    if len(transposed) > 1:
        raise MismatchError("some of these adapters are for weights stored (in, out) and some are not", file=_file(first))
    return replace(
        first, deltas=deltas, extras=_extras(items), metadata={"format": first.metadata["format"]} if "format" in first.metadata else {},
        config={key: value for key, value in first.config.items() if key in ("base_model_name_or_path", "task_type")}, leftovers=leftovers,
        files=tuple(name for adapter, _ in items for name in adapter.files), transposed_base=next(iter(transposed), None),
        findings=[*(finding for adapter, _ in items for finding in adapter.findings if finding.severity), *findings],
    )  # fmt: skip


def _file(adapter: Adapter) -> str:
    return adapter.files[0] if adapter.files else adapter.dialect


def _refuse_overlaps(pieces: dict[Target, list[tuple[Delta, float, str]]]) -> None:
    """Raise RefusedError where one adapter changes a whole weight and another only rows of it."""
    whole = {(target.module, target.parameter) for target in pieces if target.rows is None}
    for target, members in pieces.items():
        if target.rows is not None and (target.module, target.parameter) in whole:
            raise RefusedError(
                "one adapter changes rows of this weight and another all of it", tensor=str(target), file=members[0][2],
                remedy="convert both to one dialect first",
            )  # fmt: skip


def _sum(target: Target, members: list[tuple[Delta, float, str]]) -> Delta:
    shape, _, where = members[0][0].shape, None, members[0][2]
    for delta, _, file in members[1:]:
        if delta.shape != shape:
            raise MismatchError(
                "the adapters change weights of different shapes",
                tensor=str(target),
                expected=f"{shape} in {where}",
                found=f"{delta.shape} in {file}",
            )
    if len(members) == 1:
        delta, multiplier, file = members[0]
        return _scaled(target, delta, multiplier, file)
    loras: list[tuple[LoRA, float]] = []
    for delta, multiplier, file in members:
        if type(delta) is not LoRA or delta.mid is not None:
            raise RefusedError(
                f"a {'Tucker' if type(delta) is LoRA else delta.algorithm} delta cannot be added to another by concatenation", file=file,
                tensor=str(target), remedy="convert it to plain LoRA first",
            )  # fmt: skip
        loras.append((delta, _known(target, delta, file) * multiplier))
    return _concatenated(loras)


def _known(target: Target, delta: Delta, file: str) -> float:
    try:
        return delta.known_scale()
    except RefusedError as problem:
        raise RefusedError(problem.message, file=file, tensor=str(target), remedy=problem.remedy) from None


def _scaled(target: Target, delta: Delta, multiplier: float, file: str) -> Delta:
    """The same factors with the multiplier in the scale."""
    if multiplier == 1.0:
        return delta
    if not delta.additive:
        raise RefusedError(f"a {delta.algorithm} delta cannot be weakened by a multiplier", file=file, tensor=str(target))
    scaling = delta.scaling
    if scaling.rule in (ScaleRule.ALPHA_OVER_RANK, ScaleRule.ALPHA_OVER_SQRT_RANK) and scaling.alpha is not None:
        changed = replace(scaling, alpha=scaling.alpha * multiplier)
    elif delta.rank:
        changed = Scaling(alpha=_known(target, delta, file) * multiplier * delta.rank)
    else:
        changed = Scaling(ScaleRule.EXPLICIT, multiplier=_known(target, delta, file) * multiplier)
    return replace(delta, scaling=changed)  # type: ignore[type-var]


def _concatenated(loras: list[tuple[LoRA, float]]) -> LoRA:
    rank = sum(delta.rank for delta, _ in loras)
    scales = {scale for _, scale in loras}
    dtypes = {factor.dtype for delta, _ in loras for factor in (delta.up, delta.down)}
    embedding = loras[0][0].embedding
    if len(scales) == 1 and len(dtypes) == 1:
        (scale,), (dtype,) = scales, dtypes
    else:
        scale, dtype = 1.0, DTYPES["float64" if DTYPES["float64"] in dtypes else "float32"]
    out, down_rest = loras[0][0].up.shape, loras[0][0].down.shape[1:]

    def join_up() -> NDArray[Any]:
        import numpy as np

        parts = [delta.up.read() if len(scales) == 1 and len(dtypes) == 1 else delta.up.doubles() * own for delta, own in loras]
        return np.ascontiguousarray(np.concatenate(parts, axis=1)).astype(dtype.numpy)

    def join_down() -> NDArray[Any]:
        import numpy as np

        return np.concatenate([delta.down.read().astype(dtype.numpy) for delta, _ in loras], axis=0)

    return LoRA(
        Tensor.computed(dtype, (out[0], rank, *out[2:]), join_up, "combined up"), Tensor.computed(dtype, (rank, *down_rest), join_down, "combined down"),
        Scaling(alpha=scale * rank), embedding=embedding,
    )  # fmt: skip


def _extras(items: Sequence[Weighted]) -> list[Extra]:
    """Every adapter's extras; the same name twice must be the same bits."""
    found: dict[tuple[str, str], tuple[Extra, str]] = {}
    for adapter, _ in items:
        for extra in adapter.extras:
            there = found.get((extra.kind.value, extra.name))
            if there is None:
                found[extra.kind.value, extra.name] = (extra, _file(adapter))
            elif not same_bits(there[0].tensor, extra.tensor):
                raise MismatchError(
                    f"two adapters bring different {extra.kind.value}s of one name", tensor=extra.name, expected=f"that of {there[1]}",
                    found=f"another in {_file(adapter)}", remedy="take one out of its adapter first",
                )  # fmt: skip
    return [extra for extra, _ in found.values()]
