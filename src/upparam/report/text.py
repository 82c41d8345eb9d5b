"""Facts as plain lines for a terminal."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from upparam.findings import Finding, Severity

if TYPE_CHECKING:
    from rich.console import Console

_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")
MARKS = {Severity.INFO: "note", Severity.WARNING: "warning", Severity.ERROR: "ERROR"}


def finding_lines(findings: Iterable[Finding]) -> list[str]:
    """One line a finding: severity, subject, message, confidence, and its evidence."""
    lines = []
    for finding in findings:
        sure = f" (confidence {finding.confidence:.0%})" if finding.confidence is not None else ""
        evidence = f" [{'; '.join(finding.evidence)}]" if finding.evidence else ""
        lines.append(one_line(f"{MARKS[finding.severity]}: {finding.subject}: {finding.message}{sure}{evidence}"))
    return lines


def escaped(text: str) -> str:
    """`text` with every character that could steer a terminal or turn its direction as \\uXXXX; line ends and tabs stay."""
    return text if text.isascii() and text.isprintable() else _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def one_line(text: str) -> str:
    """`text` escaped, on one line: a line end in a name must not make a line of its own."""
    return escaped(text).replace("\n", "\\n")


def paper() -> Console:
    """What tables are drawn on: the width of the terminal, no markup, no emoji, no colours, so that a name shows as it is."""
    from rich.console import Console

    tty = sys.stdout.isatty()
    return Console(
        file=io.StringIO(), force_terminal=tty, width=None if tty else 220, color_system=None, markup=False, emoji=False, highlight=False
    )


def listed(values: Iterable[object], most: int = 6) -> str:
    """Values as a short list; numbers without trailing zeros."""
    shown = [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
    return ", ".join(shown[:most]) + (f", ... ({len(shown)} values)" if len(shown) > most else "")
