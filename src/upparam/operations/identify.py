"""Identify: what a file or folder is, how its files belong together, and the evidence for every claim."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upparam import dialects
from upparam.adapter import Adapter, BaseHint
from upparam.algorithms.base import ScaleRule
from upparam.containers import file_source, head_of
from upparam.containers.base import TensorFile
from upparam.dialects.base import ReadOptions
from upparam.errors import (
    AmbiguousError,
    DeadAdapterError,
    MalformedError,
    NotAnAdapterError,
    RefusedError,
    UnreadableError,
    UpparamError,
    UsageError,
)
from upparam.findings import Finding, error, exit_code, info, warning
from upparam.operations.belonging import belonging, broken_links, named_otherwise
from upparam.operations.explaining import WEIGHTS
from upparam.operations.kinds import classify
from upparam.operations.kinds_other import other
from upparam.operations.opening import Candidate, Siblings, group, tensor_files
from upparam.wording import counted

if TYPE_CHECKING:
    from upparam.containers.lookalikes import LookAlike

MISFIT = 0.5
"""A stated base of which we are less sure than this does not fit."""


@dataclass
class FileReport:
    """What one file is by itself."""

    path: Path
    kind: str
    message: str
    container: str | None = None
    dialect: str | None = None
    tensors: int = 0
    size: int = 0
    wrapping: tuple[str, ...] = ()
    findings: list[Finding] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        """JSON-ready facts."""
        return {
            "path": str(self.path), "kind": self.kind, "message": self.message, "container": self.container, "dialect": self.dialect,
            "tensors": self.tensors, "size": self.size, "wrapping": list(self.wrapping), "findings": [finding.facts() for finding in self.findings],
        }  # fmt: skip


@dataclass
class AdapterReport:
    """What files together are; counts map a value to how many deltas have it.

    `kind` is `adapter`, `orphan-factor`, `dead-adapter`, `unsupported-adapter` (of a method upparam does not know) or `broken-adapter`.
    """

    files: list[Path]
    kind: str
    dialect: str
    confidence: float
    algorithms: dict[str, int] = field(default_factory=dict)
    ranks: dict[int, int] = field(default_factory=dict)
    alphas: dict[float | None, int] = field(default_factory=dict)
    scales: dict[float | None, int] = field(default_factory=dict)
    dtypes: dict[str, int] = field(default_factory=dict)
    modules: int = 0
    parameters: int = 0
    extras: dict[str, int] = field(default_factory=dict)
    bases: list[BaseHint] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        """JSON-ready facts."""
        return {
            "files": [str(path) for path in self.files], "kind": self.kind, "dialect": self.dialect, "confidence": round(self.confidence, 3),
            "algorithms": self.algorithms, "ranks": _pairs(self.ranks, "rank"), "alphas": _pairs(self.alphas, "alpha"),
            "scales": _pairs(self.scales, "scale"), "dtypes": self.dtypes, "modules": self.modules, "parameters": self.parameters,
            "extras": self.extras,
            "bases": [
                {"name": hint.name, "confidence": round(hint.confidence, 3), "stated": hint.stated, "evidence": list(hint.evidence), "lookalikes": list(hint.lookalikes)}
                for hint in self.bases
            ],
            "findings": [finding.facts() for finding in self.findings],
        }  # fmt: skip


@dataclass
class Identity:
    """Everything known about one path."""

    path: Path
    files: list[FileReport]
    adapters: list[AdapterReport]
    findings: list[Finding] = field(default_factory=list)

    def all_findings(self) -> list[Finding]:
        """Findings of the path, its adapters and its files."""
        return [*self.findings, *(f for a in self.adapters for f in a.findings), *(f for file in self.files for f in file.findings)]

    @property
    def exit_code(self) -> int:
        """1 when any finding is an error, else 0."""
        return exit_code(self.all_findings())

    def facts(self) -> dict[str, Any]:
        """JSON-ready facts."""
        return {
            "path": str(self.path),
            "adapters": [report.facts() for report in self.adapters],
            "files": [report.facts() for report in self.files],
            "findings": [finding.facts() for finding in self.findings],
        }


def identify(path: Path | str, *, below: bool = True) -> Identity:
    """What `path` is: a file (its folder is consulted for partners), or a folder. Raises UnreadableError only when the path cannot be opened.

    Nothing in the files is executed; tensor data is not read. `below`: say which folders below a folder were not looked into.
    """
    path = Path(path)
    if path.is_dir():
        members = sorted(member for member in path.iterdir() if member.is_file() and not member.name.startswith("."))
        files, problems = tensor_files(path)
        found = group(files, path, files)
    else:
        file_source(path)
        members, problems, files = [path], {}, []
        try:
            files, problems = tensor_files(path)
        except UpparamError as problem:
            problems = {path: problem}
        found = group(files, path.parent, Siblings(path, files))
    found = [candidate for candidate in found if other(candidate.bundle.main) is None]
    adapters = [_adapter_report(candidate) for candidate in found]
    reports = _file_reports(members, files, problems, found) + [_broken_link(link) for link in broken_links(path)]
    identity = Identity(path, reports, adapters)
    identity.findings += belonging(path, identity)
    if below and path.is_dir():
        identity.findings += _below(path)
    return identity


def _broken_link(path: Path) -> FileReport:
    message = "a link to a file that is not there; fetch it again"
    return FileReport(path, "broken-link", message, findings=[warning("kind", path.name, message, str(path.readlink()))])


def _below(path: Path) -> list[Finding]:
    below = [member.name for member in sorted(path.iterdir()) if member.is_dir() and not member.name.startswith(".")]
    if not below:
        return []
    shown = ", ".join(below[:5]) + (" ..." if len(below) > 5 else "")
    many = f"{len(below)} folders below were" if len(below) > 1 else "1 folder below was"
    return [info("folders-below", path.name, f"{many} not looked into; --recursive does", shown)]


def folders_below(path: Path | str) -> list[Path]:
    """`path` itself, and if it is a folder every folder below it that holds files, hidden ones and links to folders left out."""
    path = Path(path)
    if not path.is_dir():
        return [path]
    found = []
    for folder, below, files in os.walk(path):
        below[:] = sorted(name for name in below if not name.startswith("."))
        if any(not name.startswith(".") for name in files):
            found.append(Path(folder))
    return found or [path]


def _file_reports(
    members: list[Path], files: list[TensorFile], problems: dict[Path, UpparamError], found: list[Candidate]
) -> list[FileReport]:
    spoken = {file.path: candidate for candidate in found for file in candidate.bundle.files}
    reports = []
    for member in members:
        inside = [file for file in files if file.path == member or member in file.path.parents]
        if member in problems:
            reports.append(_problem_report(member, problems[member]))
        for file in inside:
            candidate = spoken.get(file.path)
            if candidate is not None:
                kind, message, evidence, sure = (
                    "adapter-file",
                    f"tensors of a {candidate.match.dialect} adapter",
                    candidate.match.evidence,
                    candidate.match.confidence,
                )
            else:
                known = classify(file)
                kind, message, evidence, sure = known.name, known.sentence, known.evidence, known.confidence
            claims = [info("kind", file.name, message, *evidence, confidence=None if sure == 1 else sure)]
            reports.append(
                FileReport(
                    file.path, kind, message, file.container, candidate.match.dialect if candidate else None, len(file.tensors),
                    member.stat().st_size, file.wrapping, [*claims, *named_otherwise(file.path, file.container), *file.findings],
                )
            )  # fmt: skip
        if not inside and member not in problems:
            reports.append(_lookalike_report(member))
    return reports


def _problem_report(path: Path, problem: UpparamError) -> FileReport:
    if not isinstance(problem, MalformedError):
        return FileReport(
            path, "unreadable", problem.message, size=path.stat().st_size, findings=[error("unreadable", path.name, problem.line())]
        )
    look = _look(path)
    kind = look.kind if look is not None and look.kind not in ("unknown", "text") else "malformed"
    message = look.message if kind != "malformed" and look is not None else problem.message
    return FileReport(path, kind, message, size=path.stat().st_size, findings=[error("unreadable", path.name, problem.line())])


def _look(path: Path) -> LookAlike | None:
    from upparam.containers.lookalikes import recognise

    try:
        return recognise(head_of(file_source(path), path))
    except UnreadableError:
        return None


_BESIDE = {"json", "text", "png", "jpeg", "gif", "webp", "pdf", "audio", "video", "tokenizer"}
"""Kinds of files that lie beside adapters; only one named as weights are is worth a warning."""


def _lookalike_report(path: Path) -> FileReport:
    look = _look(path)
    if look is None:
        return FileReport(path, "unreadable", "it cannot be opened", findings=[error("unreadable", path.name, "it cannot be opened")])
    harmless = look.kind in _BESIDE and path.suffix.lower() not in WEIGHTS
    grade = info if harmless or look.kind == "unknown" else warning
    return FileReport(
        path, look.kind, look.message, size=path.stat().st_size, findings=[grade("kind", path.name, look.message, *look.evidence)]
    )


def _adapter_report(candidate: Candidate) -> AdapterReport:
    match, bundle = candidate.match, candidate.bundle
    subject = bundle.main.name if len(bundle.files) == 1 else bundle.folder.name
    report = AdapterReport([file.path for file in bundle.files], "adapter", match.dialect, match.confidence)
    member = dialects.get(match.dialect)
    report.findings.append(
        info("dialect", subject, f"{member.title}", *match.evidence, confidence=None if match.confidence == 1 else match.confidence)
    )
    try:
        adapter = member.read(bundle, ReadOptions())
    except DeadAdapterError as problem:
        report.kind = (
            "orphan-factor" if len(bundle.files) == 1 and any(tensor.numel for tensor in bundle.main.tensors.values()) else "dead-adapter"
        )
        report.findings.append(error("dead-adapter", subject, f"dead: {problem.message}", *(part for part in (problem.remedy,) if part)))
        return report
    except (UsageError, RefusedError) as problem:
        code = "ambiguous" if isinstance(problem, AmbiguousError) else "needs-more"
        report.findings.append(warning(code, subject, problem.line()))
        return report
    except NotAnAdapterError as problem:
        report.kind = "unsupported-adapter"
        report.findings.append(warning("unsupported", subject, problem.line()))
        return report
    except UpparamError as problem:
        report.kind = "broken-adapter"
        report.findings.append(error("broken-adapter", subject, problem.line()))
        return report
    describe(report, adapter, subject)
    return report


def describe(report: AdapterReport, adapter: Adapter, subject: str) -> None:
    """Fill a report with what the canonical adapter says."""
    deltas = adapter.deltas.values()
    report.algorithms, report.ranks, report.dtypes = adapter.algorithms(), adapter.ranks(), adapter.dtypes()
    report.alphas = _tally(delta.alpha for delta in deltas)
    report.scales = _tally(delta.scale for delta in deltas)
    report.modules = len({target.module for target in adapter.deltas})
    report.parameters = adapter.parameters()
    report.extras = _tally(extra.kind.value for extra in adapter.extras)
    report.bases = [adapter.base] if adapter.base is not None else []
    rules = _tally(delta.scaling.rule.value for delta in deltas)
    if None in report.scales:
        report.findings.append(
            warning(
                "scale-unknown",
                subject,
                "the files do not say the effective scale",
                f"{report.scales[None]} of {len(adapter.deltas)} deltas",
                *rules,
            )
        )
    else:
        absent = any(delta.alpha is None and delta.scaling.rule is ScaleRule.ALPHA_OVER_RANK for delta in deltas)
        said = "alpha absent: the rule then is alpha = rank" if absent else f"rule {', '.join(rules)}"
        report.findings.append(
            info("scale", subject, f"effective scale {', '.join(f'{scale:g}' for scale in report.scales if scale is not None)}", said)
        )
    for hint in report.bases:
        others = (f"look-alikes: {', '.join(hint.lookalikes)}",) if hint.lookalikes else ()
        said = f"base {hint.name} ({'stated by the file' if hint.stated else 'inferred'})"
        if hint.stated and hint.confidence < MISFIT:
            said = f"the file says its base is {hint.name}, and that can hardly be true"
        grade = warning if hint.stated and hint.confidence < MISFIT else info
        report.findings.append(grade("base", subject, said, *hint.evidence, *others, confidence=hint.confidence))
    report.findings += adapter.findings
    if adapter.leftovers:
        shown = ", ".join(list(adapter.leftovers)[:3])
        report.findings.append(
            warning("leftovers", subject, f"{counted(len(adapter.leftovers), 'tensor')} that no rule of the dialect explains", shown)
        )


def _tally(values: Iterable[Any]) -> dict[Any, int]:
    counts: dict[Any, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return counts


def _pairs(counts: dict[Any, int], name: str) -> list[dict[str, Any]]:
    return [{name: value, "count": count} for value, count in counts.items()]
