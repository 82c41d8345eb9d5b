"""Facts as plain lines for a terminal."""

from __future__ import annotations

from collections.abc import Iterable

from upparam.findings import Finding, Severity

MARKS = {Severity.INFO: "note", Severity.WARNING: "warning", Severity.ERROR: "ERROR"}


def finding_lines(findings: Iterable[Finding]) -> list[str]:
    """One line a finding: severity, subject, message, confidence, and its evidence."""
    lines = []
    for finding in findings:
        sure = f" (confidence {finding.confidence:.0%})" if finding.confidence is not None else ""
        evidence = f" [{'; '.join(finding.evidence)}]" if finding.evidence else ""
        lines.append(f"{MARKS[finding.severity]}: {finding.subject}: {finding.message}{sure}{evidence}")
    return lines


def listed(values: Iterable[object], most: int = 6) -> str:
    """Values as a short list; numbers without trailing zeros."""
    shown = [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
    return ", ".join(shown[:most]) + (f", ... ({len(shown)} values)" if len(shown) > most else "")
