"""What scan says about a file."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from upparam.errors import EXIT_FINDINGS, EXIT_OK, EXIT_UNREADABLE
from upparam.findings import Finding, Severity


class Verdict(Enum):
    """The four answers, mildest first."""

    CLEAN = "clean data"
    """A known format, whole, from which loading builds data and nothing else."""
    UNKNOWN = "unknown"
    """No format upparam reads (text, pictures, 7z, encrypted data): nothing is promised about it."""
    MALFORMED = "malformed"
    """It breaks its format, or two loaders could read different things in it."""
    CODE = "carries code"
    """A loader that trusts it would import or run something the file chooses."""


CODE_FINDINGS = frozenset({"pickle-code", "torchscript", "keras-code"})
"""Codes of findings that mean a loader would run something."""

PASSED_OVER = "not-looked-into"
"""Code of the finding that stands for a folder of which nothing was scanned."""


@dataclass
class FileScan:
    """One file (or a folder that was passed over): its formats (outermost first), the evidence, and the verdict that follows from it.

    `uses` are the globals its pickles name, each with the member it lies in; `tensors` how many tensors can be read (and rescued).
    """

    path: Path
    size: int = 0
    formats: list[str] = field(default_factory=list)
    tensors: int = 0
    uses: list[dict[str, Any]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    unreadable: bool = False
    read: bool = False
    """True once some format upparam reads was found."""

    @property
    def verdict(self) -> Verdict:
        """Code outweighs damage, damage outweighs the rest."""
        codes = {finding.code for finding in self.findings}
        if codes & CODE_FINDINGS:
            return Verdict.CODE
        if not self.unreadable and any(finding.severity is Severity.ERROR for finding in self.findings):
            return Verdict.MALFORMED
        return Verdict.CLEAN if self.read and not self.unreadable else Verdict.UNKNOWN

    @property
    def exit_code(self) -> int:
        """1 for code and malformed files, 3 for what cannot be opened, else 0."""
        if self.verdict in (Verdict.CODE, Verdict.MALFORMED):
            return EXIT_FINDINGS
        return EXIT_UNREADABLE if self.unreadable else EXIT_OK

    @property
    def passed_over(self) -> bool:
        """True for a folder of which nothing was scanned."""
        return any(finding.code == PASSED_OVER for finding in self.findings)

    def facts(self) -> dict[str, Any]:
        """JSON-ready facts."""
        return {
            "path": str(self.path), "verdict": self.verdict.value, "formats": self.formats, "size": self.size, "tensors": self.tensors,
            "globals": self.uses, "findings": [finding.facts() for finding in self.findings],
        }  # fmt: skip
