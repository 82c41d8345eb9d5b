"""Verify: is this adapter complete, finite, trained, and does it fit its base? Every answer is a finding with its evidence."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from upparam.adapter import Adapter
from upparam.dialects.base import ReadOptions
from upparam.errors import AmbiguousError, MismatchError, RefusedError
from upparam.findings import Finding, error, exit_code, info, warning
from upparam.operations.inspect import ModuleStats, inspect_modules
from upparam.operations.opening import open_adapter
from upparam.progress import Progress, silent

SCALE_LOW, SCALE_HIGH = 1 / 64, 64.0
"""Effective scales outside this range are reported: trainers' defaults lie between 1/32 (alpha 1, rank 32) and 20 (old MLX)."""
NORM_HIGH = 1e3
"""||dW||_F above which a single module is called implausible."""


@dataclass
class Verdict:
    """What verify found. `sound` is True when no finding is an error."""

    path: Path
    dialect: str
    targets: int
    findings: list[Finding] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """1 when any finding is an error, else 0."""
        return exit_code(self.findings)

    @property
    def sound(self) -> bool:
        """No finding of error severity."""
        return self.exit_code == 0

    def facts(self) -> dict[str, Any]:
        """JSON-ready facts."""
        return {
            "path": str(self.path), "dialect": self.dialect, "targets": self.targets, "sound": self.sound,
            "findings": [finding.facts() for finding in self.findings],
        }  # fmt: skip


def verify(path: Path | str, *, base: Path | str | None = None, options: ReadOptions | None = None, progress: Progress = silent) -> Verdict:
    """Check the adapter at `path`, and against the base at `base` (a checkpoint path) when given.

    Every factor is read once. Raises what `open_adapter` raises when the files cannot be read as an adapter at all.
    """
    adapter = open_adapter(path, options=options)
    verdict = Verdict(Path(path), adapter.dialect, len(adapter.deltas))
    subject = Path(path).name
    verdict.findings += adapter.findings
    verdict.findings += _completeness(adapter, subject)
    verdict.findings += _scales(adapter, subject)
    stats = list(inspect_modules(adapter, progress=progress))
    verdict.findings += _numbers(stats, subject)
    if base is not None:
        verdict.findings += _fit(adapter, Path(path), Path(base), options, subject)
    if verdict.sound:
        verdict.findings.append(
            info("sound", subject, f"sound: {len(stats)} targets complete and finite", f"{adapter.dialect}, every factor read")
        )
    return verdict


def _completeness(adapter: Adapter, subject: str) -> list[Finding]:
    findings = []
    if not adapter.deltas:
        findings.append(error("no-deltas", subject, "no delta can be read from it: there is nothing to apply"))
    if adapter.leftovers:
        shown = ", ".join(list(adapter.leftovers)[:5])
        findings.append(error("leftovers", subject, f"{len(adapter.leftovers)} tensors that no rule of {adapter.dialect} explains", shown))
    dtypes = adapter.dtypes()
    if len(dtypes) > 1:
        findings.append(
            info("mixed-dtypes", subject, "factors of several dtypes", ", ".join(f"{count} {name}" for name, count in dtypes.items()))
        )
    return findings


def _scales(adapter: Adapter, subject: str) -> list[Finding]:
    findings = []
    unknown = [target for target, delta in adapter.deltas.items() if delta.scale is None]
    if unknown and not any(finding.code == "scale-unknown" for finding in adapter.findings):
        findings.append(
            error(
                "scale-unknown",
                subject,
                f"the effective scale of {len(unknown)} targets is not stored; the adapter cannot be applied without it",
                str(unknown[0]),
            )
        )
    for target, delta in adapter.deltas.items():
        scale = delta.scale
        if scale is None:
            continue
        if not isfinite(scale):
            findings.append(error("scale-not-finite", str(target), f"the effective scale is {scale}"))
        elif scale == 0:
            findings.append(
                error("scale-zero", str(target), "the effective scale is 0: this target changes nothing", f"alpha {delta.alpha}")
            )
        elif not SCALE_LOW <= abs(scale) <= SCALE_HIGH:
            findings.append(
                warning(
                    "scale-implausible",
                    str(target),
                    f"an effective scale of {scale:g} is outside what trainers write",
                    f"alpha {delta.alpha}, rank {delta.rank}",
                )
            )
    return findings


def _numbers(stats: list[ModuleStats], subject: str) -> list[Finding]:
    findings = []
    for module in stats:
        if module.nonfinite:
            findings.append(error("not-finite", module.target, f"{module.nonfinite} elements are NaN or Inf"))
        elif module.frobenius is not None and module.frobenius > NORM_HIGH:
            findings.append(warning("norm-implausible", module.target, f"||dW|| = {module.frobenius:.3g} is far above what training gives"))
    still = [module for module in stats if module.idle]
    if still and len(still) == len(stats):
        findings.append(
            error(
                "untrained",
                subject,
                "every target has an all-zero factor: applying it changes nothing",
                f"{still[0].target}: {', '.join(still[0].dead)} all zero",
            )
        )
    elif still:
        findings.append(
            warning(
                "partly-untrained",
                subject,
                f"{len(still)} of {len(stats)} targets have an all-zero factor and change nothing",
                f"such as {still[0].target}",
            )
        )
    return findings


def _fit(adapter: Adapter, path: Path, base: Path, options: ReadOptions | None, subject: str) -> list[Finding]:
    """Whether a merge could place every target: decided from headers, by the merge's own plan."""
    from upparam.checkpoint import Checkpoint
    from upparam.operations.merge import open_ingredients
    from upparam.operations.merge.plan import make_plan

    checkpoint = Checkpoint.open(base)
    extras = {extra.kind.value for extra in adapter.extras}
    try:
        ingredients = open_ingredients(checkpoint, path if options is None or options == ReadOptions() else adapter)
        plan = make_plan(checkpoint, ingredients, drop={"leftovers", *extras})
    except (MismatchError, AmbiguousError) as problem:
        parts = (problem.tensor, problem.expected, problem.found)
        return [error("does-not-fit", subject, problem.message, *(part for part in parts if part))]
    except RefusedError as problem:
        return [error("cannot-be-applied", subject, problem.line())]
    return [info("fits", subject, f"every target and shape fits {base.name}", f"{len(plan.works)} of its weights would change")]
