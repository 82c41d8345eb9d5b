"""Scan results as SARIF 2.1.0, the format code-scanning services read. Source: OASIS sarif-v2.1.0 specification."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from upparam._version import __version__
from upparam.findings import Finding, Severity
from upparam.operations.scan.verdict import FileScan

LEVELS = {Severity.INFO: "note", Severity.WARNING: "warning", Severity.ERROR: "error"}


def sarif(reports: Iterable[FileScan]) -> dict[str, Any]:
    """One run with a result for every warning and error; paths are relative to the working folder where they lie below it."""
    results: list[dict[str, Any]] = []
    rules: dict[str, dict[str, Any]] = {}
    for report in reports:
        for finding in report.findings:
            if finding.severity is Severity.INFO:
                continue
            rules.setdefault(finding.code, {"id": finding.code, "defaultConfiguration": {"level": LEVELS[finding.severity]}})
            results.append(_result(report, finding))
    driver = {
        "name": "upparam scan", "version": __version__, "informationUri": "https://github.com/upparam/upparam", "rules": list(rules.values()),
    }  # fmt: skip
    return {
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [{"tool": {"driver": driver}, "results": results}],
    }


def _result(report: FileScan, finding: Finding) -> dict[str, Any]:
    evidence = f" [{'; '.join(finding.evidence)}]" if finding.evidence else ""
    region = {"byteOffset": offset} if (offset := _offset(finding)) is not None else None
    location: dict[str, Any] = {"artifactLocation": {"uri": _uri(report.path)}}
    if region:
        location["region"] = region | {"byteLength": 1}
    return {
        "ruleId": finding.code, "level": LEVELS[finding.severity], "message": {"text": f"{finding.subject}: {finding.message}{evidence}"},
        "locations": [{"physicalLocation": location}], "properties": {"verdict": report.verdict.value},
    }  # fmt: skip


def _offset(finding: Finding) -> int | None:
    word = finding.evidence[0].split() if finding.evidence else []
    return int(word[1]) if len(word) > 1 and word[0] == "byte" and word[1].isdigit() else None


def _uri(path: Path) -> str:
    from urllib.parse import quote

    absolute = path.absolute()
    try:
        return quote(absolute.relative_to(Path.cwd()).as_posix().encode("utf-8", "surrogateescape"))
    except ValueError:
        return "file://" + quote(absolute.as_posix().encode("utf-8", "surrogateescape"))
