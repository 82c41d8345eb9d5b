"""What an operation did and how it was proved: one line for people, the same facts for machines."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from upparam.findings import Finding


@dataclass
class Receipt:
    """The outcome of an operation that wrote something.

    `counts` are the numbers that matter (tensors, bytes, elements changed, ...), `proofs` the checks done on what was written and
    read back, each a full statement; `outputs` the paths written; `modules` facts about each module, for machines only.
    """

    operation: str
    inputs: list[str]
    outputs: list[str]
    counts: dict[str, Any] = field(default_factory=dict)
    proofs: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    seconds: float | None = None
    modules: list[dict[str, Any]] = field(default_factory=list)

    def lines(self) -> list[str]:
        """What was done on the first line, then a line for each proof."""
        counts = ", ".join(_counted(name, value) for name, value in self.counts.items())
        outputs = (
            " ".join(self.outputs) if len(self.outputs) <= 4 else f"{self.outputs[0]} ... {self.outputs[-1]} ({len(self.outputs)} files)"
        )
        return [f"{self.operation}: {outputs} ({counts})", *(f"  - {proof}" for proof in self.proofs or ["not verified"])]

    def line(self) -> str:
        """The receipt on one line."""
        head, *proofs = self.lines()
        return f"{head} - " + "; ".join(proof.removeprefix("  - ") for proof in proofs)

    def facts(self) -> dict[str, Any]:
        """The receipt as JSON-ready facts."""
        facts: dict[str, Any] = {
            "operation": self.operation,
            "inputs": self.inputs,
            "outputs": self.outputs,
            "counts": self.counts,
            "proofs": self.proofs,
        }
        if self.seconds is not None:
            facts["seconds"] = round(self.seconds, 3)
        if self.modules:
            facts["modules"] = self.modules
        return facts | {"findings": [finding.facts() for finding in self.findings]}


_NUMBERS = frozenset(("seed",))
"""Whole numbers that count nothing."""


def _counted(name: str, value: object) -> str:
    """`14 tensors changed`, `1 tensor changed`; values that are no counts after their name."""
    first, *rest = name.split("_")
    if not isinstance(value, int) or name in _NUMBERS:
        return f"{' '.join([first, *rest])} {value}"
    return " ".join([f"{value:,}", first.removesuffix("s") if value == 1 else first, *rest])
