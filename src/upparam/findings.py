"""Findings: every statement upparam makes about a file, with its evidence and, where it is inferred, how sure we are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from upparam.errors import EXIT_FINDINGS, EXIT_OK


class Severity(IntEnum):
    """How much a finding matters. ERROR makes the exit code 1."""

    INFO = 0
    WARNING = 1
    ERROR = 2


@dataclass(frozen=True)
class Finding:
    """One statement about `subject` (a file, a tensor, a module).

    `code` is a stable kebab-case name for machines; `message` one sentence for people; `evidence` the facts it rests on;
    `confidence` is None where the statement was read directly, else the probability we give an inference (0..1).
    """

    code: str
    severity: Severity
    subject: str
    message: str
    evidence: tuple[str, ...] = ()
    confidence: float | None = None

    def facts(self) -> dict[str, object]:
        """The finding as JSON-ready facts."""
        facts: dict[str, object] = {
            "code": self.code,
            "severity": self.severity.name.lower(),
            "subject": self.subject,
            "message": self.message,
        }
        if self.evidence:
            facts["evidence"] = list(self.evidence)
        if self.confidence is not None:
            facts["confidence"] = round(self.confidence, 3)
        return facts

    @staticmethod
    def from_facts(facts: Mapping[str, Any]) -> Finding:
        """The finding that `facts` told of."""
        severity = Severity[facts["severity"].upper()]
        return Finding(
            facts["code"], severity, facts["subject"], facts["message"], tuple(facts.get("evidence", ())), facts.get("confidence")
        )


def info(code: str, subject: str, message: str, *evidence: str, confidence: float | None = None) -> Finding:
    """An INFO finding."""
    return Finding(code, Severity.INFO, subject, message, evidence, confidence)


def warning(code: str, subject: str, message: str, *evidence: str, confidence: float | None = None) -> Finding:
    """A WARNING finding."""
    return Finding(code, Severity.WARNING, subject, message, evidence, confidence)


def error(code: str, subject: str, message: str, *evidence: str, confidence: float | None = None) -> Finding:
    """An ERROR finding."""
    return Finding(code, Severity.ERROR, subject, message, evidence, confidence)


def exit_code(findings: Iterable[Finding]) -> int:
    """0, or 1 if any finding is an ERROR."""
    return EXIT_FINDINGS if any(finding.severity is Severity.ERROR for finding in findings) else EXIT_OK
