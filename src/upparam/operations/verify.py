"""Verify: is this adapter complete, finite, trained, and does it fit its base? Every answer is a finding with its evidence."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import Any

from upparam.adapter import DROPPABLE, Adapter, without
from upparam.algorithms.base import ScaleRule
from upparam.dialects.base import ReadOptions
from upparam.dtypes import DTYPES
from upparam.errors import AmbiguousError, MismatchError, RefusedError
from upparam.findings import Finding, Severity, error, exit_code, info, warning
from upparam.operations.inspect import ModuleStats, inspect_modules
from upparam.operations.named_base import fit
from upparam.operations.opening import open_adapter
from upparam.progress import Progress, silent
from upparam.wording import counted, counted_of

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
    adapter = open_adapter(path, options=options, whole=False, readers=True)
    verdict = Verdict(Path(path), adapter.dialect, len(adapter.deltas))
    subject = Path(path).name
    verdict.findings += adapter.findings
    verdict.findings += _completeness(adapter, subject)
    verdict.findings += _scales(adapter, subject)
    stats = list(inspect_modules(adapter, progress=progress))
    verdict.findings += _numbers(stats, subject)
    if base is not None:
        verdict.findings += _fit(adapter, Path(path), Path(base), options, subject)
    elif options is not None and options.base is not None:
        verdict.findings.append(fit(adapter, options.base, subject))
    if verdict.sound:
        verdict.findings.append(
            info(
                "sound",
                subject,
                f"sound: {len(stats)} target{'s' * (len(stats) != 1)} complete and finite",
                f"{adapter.dialect}, every factor read",
            )
        )
    return verdict


def _completeness(adapter: Adapter, subject: str) -> list[Finding]:
    findings = []
    if not adapter.deltas:
        findings.append(error("no-deltas", subject, "no delta can be read from it: there is nothing to apply"))
    if adapter.leftovers:
        shown = ", ".join(list(adapter.leftovers)[:5])
        findings.append(
            error("leftovers", subject, f"{counted(len(adapter.leftovers), 'tensor')} that no rule of {adapter.dialect} explains", shown)
        )
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
                f"the effective scale of {counted(len(unknown), 'target')} is not stored; the adapter cannot be applied without it",
                str(unknown[0]),
            )
        )
    known = [(target, delta, delta.scale) for target, delta in adapter.deltas.items() if delta.scale is not None]
    for code, grade, fits, what in _SCALE_TESTS:
        found = [(target, delta, scale) for target, delta, scale in known if fits(scale)]
        if found:
            target, delta, _ = found[0]
            scales = listed(dict.fromkeys(scale for _, _, scale in found))
            findings.append(
                Finding(
                    code, grade, subject, f"the effective scale of {len(found)} of {len(adapter.deltas)} targets is {scales}: {what}",
                    (f"such as {target}: alpha {delta.alpha}, rank {delta.rank}",),
                )
            )  # fmt: skip
    absent = [target for target, delta in adapter.deltas.items() if delta.alpha is None and delta.scaling.rule is ScaleRule.ALPHA_OVER_RANK]
    if absent and not any(finding.code == "alpha-missing" for finding in adapter.findings):
        findings.append(
            info("alpha-missing", subject, f"{counted_of(len(absent), len(adapter.deltas), 'target', 'stores', 'store')} no alpha: {adapter.dialect}'s rule then is alpha = rank")
        )  # fmt: skip
    return findings


_SCALE_TESTS: tuple[tuple[str, Severity, Callable[[float], bool], str], ...] = (
    ("scale-not-finite", Severity.ERROR, lambda scale: not isfinite(scale), "nothing can be applied with it"),
    ("scale-zero", Severity.ERROR, lambda scale: scale == 0, "they change nothing"),
    (
        "scale-implausible", Severity.WARNING, lambda scale: isfinite(scale) and scale != 0 and not SCALE_LOW <= abs(scale) <= SCALE_HIGH,
        "outside what trainers write",
    ),
)  # fmt: skip
"""Code, severity, which scales it is about, and what is the matter with those."""


def _numbers(stats: list[ModuleStats], subject: str) -> list[Finding]:
    findings = []
    total = len(stats)
    spoilt = [module for module in stats if module.nonfinite]
    if spoilt:
        elements = sum(module.nonfinite for module in spoilt)
        share = f"{len(spoilt)} of {total} targets" if total > 1 else "1 target"
        said = f"{counted(elements, 'element')} of {share} {'is' if elements == 1 else 'are'} NaN or Inf"
        findings.append(error("not-finite", subject, said, _such(spoilt)))
    high = [module for module in stats if module.frobenius is not None and module.frobenius > NORM_HIGH]
    if high:
        most = max(high, key=lambda module: module.frobenius or 0.0)
        said = f"||dW|| of {len(high)} of {total} targets is far above what training gives"
        findings.append(warning("norm-implausible", subject, said, f"up to {most.frobenius:.3g}, {most.target}"))
    whole = [module for module in stats if any(not DTYPES[name].is_float for name in module.dtypes.values())]
    if whole:
        dtypes = listed(dict.fromkeys(name for module in whole for name in module.dtypes.values()))
        said = f"factors of {len(whole)} of {total} targets are integers: quantised, and what the numbers stand for is not stored"
        findings.append(error("integer-factors", subject, said, dtypes, _such(whole)))
    blank = [module for module in stats if module.dead and len(module.dead) == len(module.shapes) > 1]
    if blank:
        said = f"every factor of {len(blank)} of {total} targets is all zero, as no training leaves them: their data is lost"
        findings.append(
            error("blank", subject, said, _such(blank), "a download that reserved its space leaves such zeros; fetch the file again")
        )
    still = [module for module in stats if module.idle and module not in blank]
    if still and len(still) == total:
        first = f"{still[0].target}: {', '.join(still[0].dead)} all zero"
        findings.append(error("untrained", subject, "every target has an all-zero factor: applying it changes nothing", first))
    elif still:
        said = f"{counted_of(len(still), total, 'target', 'has', 'have')} an all-zero factor and {'changes' if len(still) == 1 else 'change'} nothing"
        findings.append(warning("partly-untrained", subject, said, _such(still)))
    return findings


def _such(modules: list[ModuleStats]) -> str:
    return f"such as {modules[0].target}"


def listed(values: Iterable[object]) -> str:
    """A few values, and how many there are."""
    shown = [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
    return ", ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "")


def _fit(adapter: Adapter, path: Path, base: Path, options: ReadOptions | None, subject: str) -> list[Finding]:
    """Whether a merge could place every target: decided from headers, by the merge's own plan."""
    from upparam.checkpoint import Checkpoint
    from upparam.operations.merge import open_ingredients
    from upparam.operations.merge.plan import make_plan

    checkpoint = Checkpoint.open(base)
    beside = {*DROPPABLE} - {"conditions", "bias"}
    try:
        ingredients = open_ingredients(checkpoint, path if options is None or options == ReadOptions() else adapter)
        plan = make_plan(checkpoint, [replace(one, adapter=without(one.adapter, beside)[0]) for one in ingredients])
    except (MismatchError, AmbiguousError) as problem:
        parts = (problem.tensor, problem.expected, problem.found)
        return [error("does-not-fit", subject, problem.message, *(part for part in parts if part))]
    except RefusedError as problem:
        return [error("cannot-be-applied", subject, problem.line())]
    return [info("fits", subject, f"every target and shape fits {base.name}", f"{len(plan.works)} of its weights would change")]
