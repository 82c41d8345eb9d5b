"""A scan's verdicts as lines for a terminal. Names from files are escaped, so that no file can write to the terminal as it likes."""

from __future__ import annotations

from upparam.containers.symbols import clean
from upparam.findings import Finding, Severity
from upparam.operations.scan.verdict import FileScan
from upparam.report.text import finding_lines
from upparam.wording import counted


def scan_lines(report: FileScan, quiet: bool = False) -> list[str]:
    """The verdict, then one line for each finding that matters. Quiet: nothing for files without trouble."""
    if quiet and not report.exit_code:
        return []
    if report.passed_over:
        return [f"{clean(str(report.path), 1000)}: NOT LOOKED INTO ({report.findings[0].message})"]
    what = "cannot be opened" if report.unreadable else report.verdict.value.upper() if report.exit_code else report.verdict.value
    held = f", {counted(report.tensors, 'tensor')}" if report.tensors else ""
    formats = f" ({' in '.join(reversed(report.formats))}{held})" if report.formats else ""
    shown: list[Finding] = [finding for finding in report.findings if finding.severity > Severity.INFO]
    if not report.read and not shown and report.findings:
        formats = f" ({report.findings[0].message})"
    return [f"{clean(str(report.path), 1000)}: {what}{formats}", *("  " + clean(line, 2000) for line in finding_lines(shown))]
