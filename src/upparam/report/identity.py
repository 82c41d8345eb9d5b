"""What identify found, as text: the answer first, then the evidence."""

from __future__ import annotations

from pathlib import Path

from upparam.findings import Finding, Severity
from upparam.operations.identify import MISFIT, AdapterReport, FileReport, Identity
from upparam.report.text import finding_lines, listed, one_line
from upparam.wording import counted

KINDS = {
    "adapter": "adapter",
    "orphan-factor": "orphan factor (dead adapter)",
    "dead-adapter": "dead adapter",
    "broken-adapter": "broken adapter",
    "unsupported-adapter": "adapter of a kind upparam does not read",
}

_SHOWN = 4
"""Files of one adapter that are named; of more the first and the last, and how many."""
_IN_FULL = 3
"""Adapters of a folder whose evidence is shown; where there are more, each has one line."""
_BESIDE = 8
"""Files without tensors that are named in one line."""


def identity_text(identity: Identity) -> str:
    """The whole report of one path."""
    lines = [f"{identity.path}"]
    containers = {file.path: " in ".join([file.container or "", *reversed(file.wrapping)]) for file in identity.files}
    full = len(identity.adapters) <= _IN_FULL
    for report in identity.adapters:
        lines += ["  " + text for text in _adapter_lines(report, containers, full)]
    if not full:
        lines.append("  (name one of the files to see the evidence)")
    told = {finding for report in identity.adapters for finding in report.findings}
    beside: list[FileReport] = []
    for file in identity.files:
        if file.kind == "adapter-file":
            lines += ["  " + text for text in finding_lines(_news(file, told))]
        elif _harmless(file):
            beside.append(file)
        else:
            lines += ["  " + text for text in _file_lines(file, told)]
    if beside:
        kinds = [f"{file.path.name} ({file.message.split(':')[0].split(',')[0]})" for file in beside]
        lines.append(
            f"  beside: {', '.join(kinds[:_BESIDE])}" + (f", ... ({len(kinds)} files without tensors)" if len(kinds) > _BESIDE else "")
        )
    lines += ["  " + text for text in finding_lines(identity.findings, identity.path.name)]
    return "\n".join(one_line(text) for text in lines)


def _adapter_lines(report: AdapterReport, containers: dict[Path, str], full: bool) -> list[str]:
    files = sorted(path.name for path in report.files)
    names = " + ".join(files) if len(files) <= _SHOWN else f"{files[0]} ... {files[-1]} ({len(files)} files)"
    inside = listed(dict.fromkeys(containers[path] for path in report.files if containers.get(path)))
    facts = [KINDS[report.kind], report.dialect + (f" ({inside})" if inside else "")]
    if report.algorithms:
        ranks = f" rank {listed(report.ranks)}" if report.ranks else ""
        facts.append(" + ".join(report.algorithms) + ranks)
        facts.append(f"{counted(report.modules, 'module')}, {counted(report.parameters, 'parameter')}, {listed(report.dtypes)}")
        known = [scale for scale in report.scales if scale is not None]
        facts.append("scale unknown" if not known else "scale " + listed(known))
        facts += _base(report)
    if report.extras:
        facts.append("with " + ", ".join(counted(count, kind) for kind, count in report.extras.items()))
    head = f"{names}: {' · '.join(facts)}"
    subject = report.files[0].name if len(report.files) == 1 else report.files[0].parent.name
    shown = report.findings if full else [finding for finding in report.findings if finding.severity > Severity.INFO]
    return [head, *("  " + text for text in finding_lines(shown, subject))]


def _base(report: AdapterReport) -> list[str]:
    """The base in two words, as sure as we are."""
    if not report.bases:
        return []
    hint = report.bases[0]
    if hint.confidence >= MISFIT:
        return [f"base {hint.name}"]
    return [] if hint.stated else [f"base perhaps {hint.name} ({hint.confidence:.0%})"]


def _news(file: FileReport, told: set[Finding]) -> list[Finding]:
    """What is to be said of a file beyond its kind, and has not been said of its adapter."""
    return [finding for finding in file.findings if finding.code != "kind" and finding not in told]


def _harmless(file: FileReport) -> bool:
    return file.container is None and all(finding.severity is Severity.INFO for finding in file.findings) and file.kind != "unknown"


def _file_lines(file: FileReport, told: set[Finding]) -> list[str]:
    inside = " in ".join([file.container or "", *reversed(file.wrapping)]).strip()
    held = f" ({inside}, {counted(file.tensors, 'tensor')})" if inside else ""
    evidence = [text for finding in file.findings if finding.code == "kind" for text in finding.evidence]
    why = f" [{'; '.join(evidence)}]" if evidence else ""
    return [
        f"{file.path.name}: {file.kind}{held}: {file.message}{why}",
        *("  " + text for text in finding_lines(_news(file, told), file.path.name)),
    ]
