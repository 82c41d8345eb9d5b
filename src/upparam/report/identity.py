"""What identify found, as text: the answer first, then the evidence."""

from __future__ import annotations

from upparam.findings import Severity
from upparam.operations.identify import AdapterReport, FileReport, Identity
from upparam.report.text import finding_lines, listed, one_line

KINDS = {
    "adapter": "adapter",
    "orphan-factor": "orphan factor (dead adapter)",
    "dead-adapter": "dead adapter",
    "broken-adapter": "broken adapter",
    "unsupported-adapter": "adapter of a kind upparam does not read",
}

_SHOWN = 4
"""Files of one adapter that are named; of more the first and the last, and how many."""


def identity_text(identity: Identity) -> str:
    """The whole report of one path."""
    lines = [f"{identity.path}"]
    single = len(identity.files) == 1
    for report in identity.adapters:
        lines += ["  " + line for line in _adapter_lines(report)]
    plain = [file for file in identity.files if file.kind == "adapter-file" and len(file.findings) < 2]
    hidden = plain[_SHOWN:] if len(plain) > 2 * _SHOWN else []
    for file in identity.files:
        if file in hidden:
            continue
        if single and identity.adapters:
            lines += ["  " + line for line in finding_lines(finding for finding in file.findings if finding.code != "kind")]
        else:
            lines += ["  " + line for line in _file_lines(file)]
    if hidden:
        lines.append(f"  ... and {len(hidden)} more files with factors")
    lines += ["  " + line for line in finding_lines(identity.findings)]
    return "\n".join(map(one_line, lines))


def _adapter_lines(report: AdapterReport) -> list[str]:
    names = " + ".join(path.name for path in report.files)
    if len(report.files) > _SHOWN:
        names = f"{report.files[0].name} ... {report.files[-1].name} ({len(report.files)} files)"
    facts = [KINDS[report.kind], report.dialect]
    if report.algorithms:
        ranks = f" rank {listed(report.ranks)}" if report.ranks else ""
        facts.append(" + ".join(report.algorithms) + ranks)
        facts.append(f"{report.modules:,} modules, {report.parameters:,} parameters, {listed(report.dtypes)}")
        known = [scale for scale in report.scales if scale is not None]
        facts.append("scale unknown" if not known else "scale " + listed(known))
    if report.extras:
        facts.append("with " + ", ".join(f"{count} {kind}" for kind, count in report.extras.items()))
    head = f"{names}: {' · '.join(facts)}"
    return [head, *("  " + line for line in finding_lines(report.findings))]


def _file_lines(file: FileReport) -> list[str]:
    how = " in ".join([file.container or "", *reversed(file.wrapping)]).strip()
    head = f"{file.path.name}: {file.kind}" + (f" ({how}, {file.tensors} tensors)" if how else "") + f": {file.message}"
    shown = [finding for finding in file.findings if finding.code != "kind"]
    kinds = [finding for finding in file.findings if finding.code == "kind" and (finding.evidence or finding.severity > Severity.INFO)]
    evidence = [f"evidence: {'; '.join(finding.evidence)}" for finding in kinds if finding.evidence and file.kind != "adapter-file"]
    return [head, *("  " + line for line in [*evidence, *finding_lines(shown)])]
