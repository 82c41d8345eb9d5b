"""Resize: an adapter of smaller rank, each module cut to its best approximation through the factors; dW is never formed."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from upparam.adapter import Adapter, Target, without
from upparam.algorithms import called
from upparam.algorithms.base import Delta, ScaleRule, Scaling, Update, tiles
from upparam.algorithms.experts import ExpertLoRA
from upparam.algorithms.lora import LoRA
from upparam.algorithms.lowrank import RankRule
from upparam.algorithms.slicing import stack
from upparam.arrays import doubles
from upparam.atomic import refuse_existing
from upparam.dialects import restated
from upparam.dialects.refusing import SCALE
from upparam.dtypes import DType
from upparam.errors import RefusedError, UpparamError
from upparam.findings import Finding, warning
from upparam.operations.convert import write_adapter
from upparam.operations.fitting import Arithmetic
from upparam.operations.opening import open_adapter
from upparam.operations.recast import stored
from upparam.operations.receipt import Receipt
from upparam.operations.spool import Keep, Spool
from upparam.operations.threads import in_threads
from upparam.progress import Progress, silent
from upparam.tensors import JoinedSource, Tensor
from upparam.wording import at_least, at_most

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from upparam.dialects.base import ReadOptions

AlphaRule = Literal["scale", "keep", "rank"]
"""What becomes of alpha when the rank changes from r to k; the adapter's effect is the same under each.

`scale` keeps the effective multiplier, so that alpha becomes alpha k / r and the factors hold the same up @ down; `keep` keeps the number
alpha and `rank` sets it to k, the factors taking over what the multiplier loses or gains. A multiplier that is not made from alpha stays.
"""


OF_THE_DIFFERENCE = "merge it into its base and make a LoRA of the difference with 'upparam extract'"
"""What to do with a delta whose change depends on the weight."""
_WIDE = 256
"""Inner rank of another algorithm's low-rank form (the product of two ranks for LoHa) above which products with its rows are cheaper."""


@dataclass(frozen=True)
class Cut:
    """What resizing did to one module (or to the parts of a fused weight that share their down factor).

    `energy` is the share of ||dW||^2 kept, `error` = ||dW - dW'|| / ||dW|| with dW' as stored, rounding included, `optimum` the smallest
    error any factors of that rank (in that form) can have before rounding; None where it is not computed. `norm` is ||dW||, 0.0 also for
    factors that cancel each other; None where it is not computed.
    """

    targets: tuple[str, ...]
    algorithm: str
    rank: int | None
    new_rank: int | None
    energy: float
    error: float
    optimum: float | None
    norm: float | None = None

    def facts(self) -> dict[str, Any]:
        """JSON-ready facts."""
        return asdict(self) | {"targets": list(self.targets)}


def resize(
    adapter: Adapter | Path | str,
    out: Path | str,
    rule: RankRule,
    *,
    to: str | None = None,
    alpha: AlphaRule = "scale",
    read: ReadOptions | None = None,
    force: bool = False,
    verify: bool = True,
    drop: Collection[str] = (),
    threads: int | None = None,
    progress: Progress = silent,
) -> Receipt:
    """Write `adapter` resized by `rule` to `out`, in dialect `to` (that of its files when None). Memory is bounded by the largest module.

    A multiplier that the dialect cannot say goes into a factor.

    Raises what `resized` and `upparam.operations.convert.write_adapter` raise.
    """
    begun = time.monotonic()
    out = Path(out)
    refuse_existing(out, force)
    source, given_up = without(adapter if isinstance(adapter, Adapter) else open_adapter(adapter, options=read), drop)
    with Spool(out.absolute().parent) as spool:
        result, cuts = resized(source, rule, alpha=alpha, keep=spool.keep, threads=threads, progress=progress)
        baked = Arithmetic(bake_scale=True, offered=(SCALE,))
        receipt = write_adapter(result, out, to or source.written_as, read=read, force=force, verify=verify, drop=drop, arithmetic=baked)
    receipt.operation = "resize"
    receipt.findings += given_up
    if not isinstance(adapter, Adapter):
        receipt.inputs = [str(adapter)]
    receipt.counts = {**_summary(cuts), **receipt.counts}
    receipt.modules = [cut.facts() for cut in cuts]
    receipt.seconds = time.monotonic() - begun
    return receipt


def resized(
    adapter: Adapter,
    rule: RankRule,
    *,
    alpha: AlphaRule = "scale",
    keep: Keep = Tensor.of,
    threads: int | None = None,
    progress: Progress = silent,
) -> tuple[Adapter, list[Cut]]:
    """The adapter with every delta cut to the rank that `rule` chooses for it, and what that did to each.

    A LoRA stays one (with its Tucker core, kernel, dtypes and embedding mark); one whose rank is small enough already keeps its bits.
    Parts of a fused weight that share their down factor are cut as one and go on sharing it. Other additive algorithms become LoRAs.
    Deltas without a rank (DoRA, IA3, OFT, norms and biases) stay as they are, with a warning. `keep` takes the new arrays.

    Raises RefusedError when the effective scale is not known, when nothing can be resized, and when a result does not fit its dtype.
    """
    if adapter.conditions:
        raise RefusedError(
            "the factors alone are not the change, so cutting them would not be its best approximation",
            file=_file(adapter), found="; ".join(adapter.conditions), remedy="resize them all the same with --drop conditions",
        )  # fmt: skip
    jobs, findings = _jobs(adapter)
    if not jobs:
        raise RefusedError(
            "no delta here can be resized: none has a rank to change through its factors alone",
            file=_file(adapter),
            found=", ".join(adapter.algorithms()) or "no deltas",
            remedy=OF_THE_DIFFERENCE if any(not delta.additive for delta in adapter.deltas.values()) else None,
        )
    deltas = dict(adapter.deltas)
    cuts: list[Cut] = []

    def work(job: Job) -> tuple[Delta, Cut]:
        try:
            return cut_job(job, rule, alpha, keep)
        except UpparamError as problem:
            problem.locate(file=_file(adapter), tensor=str(job.targets[0]))
            raise

    for job, (delta, cut) in zip(jobs, in_threads(work, jobs, [job.size for job in jobs], threads, progress), strict=True):
        cuts.append(cut)
        deltas.update(job.parts(delta))
    findings += nothing_left(_file(adapter), [cut.norm for cut in cuts], "they change nothing")
    result = replace(adapter, deltas=deltas, findings=[*adapter.findings, *findings])
    return restated(result), cuts


class Job(NamedTuple):
    """One delta to cut, and the targets it stands for: several when it is stacked from parts that share their down factor."""

    targets: tuple[Target, ...]
    delta: Delta
    rows: tuple[int, ...]
    dtype: DType | None = None
    """Of the factors of the resized delta; None for that of the old ones."""

    @property
    def size(self) -> int:
        """Elements of the factors."""
        return sum(factor.numel for factor in self.delta.factors().values())

    def parts(self, delta: Delta) -> dict[Target, Delta]:
        """The resized delta as each target's own."""
        if len(self.targets) == 1:
            return {self.targets[0]: delta}
        assert isinstance(delta, LoRA)
        found: dict[Target, Delta] = {}
        at = 0
        for target, rows in zip(self.targets, self.rows, strict=True):
            found[target] = replace(delta, up=delta.up.rows(at, at + rows))
            at += rows
        return found


def jobs_of(adapter: Adapter) -> list[Job]:
    """Every delta as a job, those of parts that share their factors joined into one."""
    groups: dict[object, list[Target]] = {}
    for target, delta in adapter.deltas.items():
        groups.setdefault(_shared(delta) if type(delta) is LoRA else target, []).append(target)
    return [job for targets in groups.values() for job in _joined(targets, adapter)]


def cuttable(delta: Delta) -> bool:
    """True for a delta with a dW that has a rank to change."""
    return type(delta) is LoRA or (delta.additive and len(delta.shape) > 1 and not isinstance(delta, ExpertLoRA))


def _jobs(adapter: Adapter) -> tuple[list[Job], list[Finding]]:
    """The deltas that have a rank, parts that share factors joined, and a warning for each that stays as it is."""
    jobs = jobs_of(adapter)
    fixed = [job for job in jobs if not cuttable(job.delta)]
    findings = [
        warning("not-resized", str(job.targets[0]), f"{called(job.delta.algorithm)} delta {_uncut(job.delta)} and stays as it is")
        for job in fixed
    ]
    return [job for job in jobs if cuttable(job.delta)], findings


def _uncut(delta: Delta) -> str:
    """Why a delta that is not `cuttable` is not cut."""
    if not delta.rank:
        return "has no rank to change"
    return "is of many experts, which are not cut one by one," if delta.additive else "changes a weight by more than its factors"


def _joined(targets: Sequence[Target], adapter: Adapter) -> list[Job]:
    """One job for targets whose ups are neighbouring rows of one stored factor; one for each where they only share their down."""
    alone = [Job((target,), adapter.deltas[target], (adapter.deltas[target].shape[0],)) for target in targets]
    parts = sorted(
        ((target, delta) for target in targets if isinstance(delta := adapter.deltas[target], LoRA)), key=lambda part: part[1].up.offset
    )
    if len(parts) < 2:
        return alone
    whole = stack([delta.up for _, delta in parts])
    if isinstance(whole.source, JoinedSource):
        return alone
    return [Job(tuple(target for target, _ in parts), replace(parts[0][1], up=whole), tuple(delta.shape[0] for _, delta in parts))]


def _shared(delta: LoRA) -> object:
    """What parts cut from one fused delta have in common: the very same view of down and mid, the same scale."""
    views = [
        (id(tensor.source), tensor.offset, tensor.shape, tensor.strides, tensor.dtype)
        for tensor in (delta.down, delta.mid)
        if tensor is not None
    ]
    return (*views, delta.scaling, delta.embedding, delta.up.dtype)


def cut_job(job: Job, rule: RankRule, alpha: AlphaRule, keep: Keep) -> tuple[Delta, Cut]:
    """The job's delta cut to the rank that `rule` chooses, and what that did; see `resized` for the rest."""
    names = tuple(str(target) for target in job.targets)
    delta = job.delta
    scale = delta.known_scale()
    conv = prod(delta.shape[2:]) > 1
    if type(delta) is LoRA and delta.mid is not None:
        return _resize_tucker(delta, names, rule, alpha, keep)
    from upparam.algorithms.lowrank import truncate

    update = delta.load()
    pair = update.low_rank()
    if pair is None or (type(delta) is not LoRA and pair[0].shape[1] > _WIDE):
        return _project(job, update, names, rule, alpha, keep)
    up, down = pair
    dtypes = _dtypes(job)
    found, rank = truncate(up, down, rule, conv=conv, resolution=max(_epsilon(dtype) for dtype in dtypes))
    if type(delta) is LoRA and rank >= delta.rank:
        return delta, Cut(names, delta.algorithm, delta.rank, delta.rank, 1.0, 0.0, 0.0, found.norm * abs(scale))
    scaling, factor = rescaled(_as_lora(delta, scale, rank), scale, rank, alpha)
    norm = found.norm
    if norm == 0.0:
        new_up, new_down = up[:, :rank] * 0.0, down[:rank].copy()
    else:
        new_up, new_down = found.factors(rank)
    if factor != 1.0:
        new_up *= sqrt(abs(factor)) * (-1.0 if factor < 0 else 1.0)
        new_down *= sqrt(abs(factor))
    stored_up, stored_down = _stored(new_up, dtypes[0]), _stored(new_down, dtypes[1])
    result = _lora(delta, stored_up, stored_down, scaling, keep)
    if norm == 0.0 or scale == 0.0:  # dW is zero, whatever the factors are
        return result, Cut(names, delta.algorithm, delta.rank, rank, 1.0, 0.0, 0.0, 0.0)
    error = found.gap(doubles(stored_up), doubles(stored_down), 1 / factor) / norm
    optimum = found.tail(rank) / norm
    return result, Cut(names, delta.algorithm, delta.rank, rank, 1.0 - optimum**2, error, optimum, norm * abs(scale))


def _resize_tucker(delta: LoRA, names: tuple[str, ...], rule: RankRule, alpha: AlphaRule, keep: Keep) -> tuple[Delta, Cut]:
    import numpy as np

    from upparam.algorithms.lowrank import difference, tucker_truncate

    assert delta.mid is not None
    old, kernel = delta.rank, delta.mid.shape[2:]
    cap = rule.cap(conv=True)
    if rule.lost is None and (cap is None or cap >= old):
        return delta, Cut(names, delta.algorithm, old, old, 1.0, 0.0, 0.0)
    up = delta.up.doubles().reshape(-1, old)
    mid = delta.mid.doubles().reshape(old, old, -1)
    down = delta.down.doubles().reshape(old, -1)
    new_up, new_mid, new_down, lost = tucker_truncate(up, mid, down, rule)
    rank = new_up.shape[1]
    if rank >= old:
        return delta, Cut(names, delta.algorithm, old, old, 1.0, 0.0, 0.0)
    scaling, factor = rescaled(delta.scaling, delta.known_scale(), rank, alpha)
    share = abs(factor) ** (1 / 3)
    stored_up = _stored(new_up * (share if factor >= 0 else -share), delta.up.dtype)
    stored_mid, stored_down = _stored(new_mid * share, delta.mid.dtype), _stored(new_down * share, delta.down.dtype)
    whole = np.einsum("pqx,qi->pix", mid, down).reshape(old, -1)
    cut = np.einsum("pqx,qi->pix", stored_mid.astype(np.float64), stored_down.astype(np.float64)).reshape(rank, -1)
    norm = sqrt(max(float(((up.T @ up) * (whole @ whole.T)).sum()), 0.0)) if delta.known_scale() else 0.0
    error = difference(up, whole, stored_up.astype(np.float64), cut / factor) / norm if norm else 0.0
    result = LoRA(
        keep(stored_up.reshape(-1, rank, *delta.up.shape[2:])), keep(stored_down.reshape(rank, -1, *delta.down.shape[2:])),
        scaling, keep(stored_mid.reshape(rank, rank, *kernel)), delta.embedding,
    )  # fmt: skip
    return result, Cut(names, delta.algorithm, old, rank, 1.0 - lost if norm else 1.0, error, None, norm * abs(delta.known_scale()))


def _as_lora(delta: Delta, scale: float, rank: int) -> Scaling:
    """What is stored about the multiplier, as a LoRA of this rank that has no rule yet would say it: alpha as it is, where there is one."""
    return delta.scaling if type(delta) is LoRA else Scaling(alpha=scale * rank if delta.alpha is None else delta.alpha)


def nothing_left(file: str | None, norms: Sequence[float | None], why: str) -> list[Finding]:
    """A warning of modules whose dW is zero, given their norms (None: not known)."""
    zero = sum(norm == 0.0 for norm in norms)
    return [warning("nothing-left", file or "", f"dW is zero in {zero} of {len(norms)} modules: {why}")] if zero else []


def rescaled(scaling: Scaling, scale: float, rank: int, rule: AlphaRule) -> tuple[Scaling, float]:
    """(what to store about the multiplier for factors of this rank, what up @ down must be multiplied by so that the effect stays)."""
    if scaling.rule not in (ScaleRule.ALPHA_OVER_RANK, ScaleRule.ALPHA_OVER_SQRT_RANK) or scaling.alpha is None:
        return scaling, 1.0
    divisor = sqrt(rank) if scaling.rule is ScaleRule.ALPHA_OVER_SQRT_RANK else rank
    number = {"scale": scale * divisor, "keep": scaling.alpha, "rank": float(rank)}[rule]
    new = Scaling(scaling.rule, number)
    if rule == "scale" or scale == 0.0:
        return Scaling(scaling.rule, scale * divisor), 1.0
    return new, scale / (number / divisor)


def _project(job: Job, update: Update, names: tuple[str, ...], rule: RankRule, alpha: AlphaRule, keep: Keep) -> tuple[Delta, Cut]:
    """A LoRA from the leading singular vectors of a dW that only gives its rows: products with tiles of it, as many as `rule` wants."""
    from upparam.algorithms.krylov import Rows, leading, optimum

    delta, conv = job.delta, prod(job.delta.shape[2:]) > 1
    matrix = Rows((delta.shape[0], prod(delta.shape[1:])), update.rows)
    total = matrix.total()
    cap = rule.cap(conv)
    found = leading(matrix, total, lambda sigma: rule.choose(sigma, conv, total), start=24 if cap is None else cap + 8)
    rank = len(found.sigma)
    up, down = found.factors()
    # The rows carry the scale; what the new alpha gives the factors need not hold.
    scaling, factor = rescaled(_as_lora(delta, update.scale, rank), update.scale, rank, alpha)
    multiplier = update.scale / factor
    up, down = (up / multiplier, down) if multiplier else (up, down)
    dtype = _dtypes(job)[0]
    stored_up, stored_down = _stored(up, dtype), _stored(down, dtype)
    lost = 0.0
    for start, stop in tiles(matrix.shape):
        rest = update.rows(start, stop) - multiplier * (doubles(stored_up[start:stop]) @ doubles(stored_down))
        lost += float((rest * rest).sum())
    norm = sqrt(total)
    best = optimum(total, found) / norm if norm else 0.0
    result = _lora(delta, stored_up, stored_down, scaling, keep)
    return result, Cut(names, delta.algorithm, delta.rank, rank, 1.0 - best**2, sqrt(lost) / norm if norm else 0.0, best, norm)


def _lora(delta: Delta, up: NDArray[Any], down: NDArray[Any], scaling: Scaling, keep: Keep) -> LoRA:
    rank, kernel = up.shape[1], delta.shape[2:]
    return LoRA(
        keep(up.reshape(delta.shape[0], rank, *(1 for _ in kernel))), keep(down.reshape(rank, delta.shape[1], *kernel)), scaling,
        embedding=bool(getattr(delta, "embedding", False)),
    )  # fmt: skip


def _dtypes(job: Job) -> tuple[DType, DType]:
    """The dtypes of the new up and down: as the job says, the old ones', or those of the first factor of another algorithm."""
    if job.dtype is None and isinstance(job.delta, LoRA):
        return job.delta.up.dtype, job.delta.down.dtype
    first = job.dtype or next(iter(job.delta.factors().values())).dtype
    return first, first


def _epsilon(dtype: DType) -> float:
    """Half the distance from 1 to the next number: the largest relative rounding error."""
    import ml_dtypes

    return float(ml_dtypes.finfo(dtype.numpy).eps) / 2


def _stored(values: NDArray[np.float64], dtype: DType) -> NDArray[Any]:
    return stored(values, dtype, remedy="give the adapter a wider dtype first: 'upparam edit --dtype'")


def _summary(cuts: Sequence[Cut]) -> dict[str, Any]:
    changed = [cut for cut in cuts if cut.new_rank != cut.rank]
    counts: dict[str, Any] = {"resized": len(changed), "kept": len(cuts) - len(changed)}
    if changed:
        counts["ranks"] = f"{_range(cut.rank for cut in changed)} to {_range(cut.new_rank for cut in changed)}"
        counts["energy_kept"] = at_least(min(cut.energy for cut in changed), 4)
        counts["error"] = at_most(max(cut.error for cut in changed))
    return counts


def _range(ranks: Iterable[int | None]) -> str:
    known = sorted({rank for rank in ranks if rank is not None})
    if not known:
        return "none"
    return str(known[0]) if len(known) == 1 else f"{known[0]}-{known[-1]}"


def _file(adapter: Adapter) -> str | None:
    return adapter.files[0] if adapter.files else None
