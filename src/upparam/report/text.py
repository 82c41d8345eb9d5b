"""Facts as plain lines for a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

from upparam.findings import Finding, Severity
from upparam.patterns import regex

MARKS = {Severity.INFO: "note", Severity.WARNING: "warning", Severity.ERROR: "ERROR"}
_UNSAFE = regex("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")
_COLOURS = {"ERROR:": "1;31", "warning:": "33", "note:": "2"}
_ONE_BY_ONE = 3
"""Findings in the same words that have a line each; more share one."""
_NARROWEST = 40
"""Columns below which nothing is wrapped: no person reads there."""


def finding_lines(findings: Iterable[Finding], within: str = "") -> list[str]:
    """One line a finding: severity, subject, message, confidence, and its evidence. The subject is left out where it is `within`.

    What is said in the same words of many subjects is one line.
    """
    alike: dict[tuple[object, ...], list[Finding]] = {}
    for finding in findings:
        alike.setdefault((finding.severity, finding.message, finding.confidence, finding.evidence), []).append(finding)
    lines = []
    for group in alike.values():
        few = len(group) <= _ONE_BY_ONE
        for finding in group if few else group[:1]:
            about = "" if finding.subject == within else f"{finding.subject}: "
            about = about if few else f"{finding.subject}, {group[1].subject} and {len(group) - 2:,} more: "
            sure = f" (confidence {finding.confidence:.0%})" if finding.confidence is not None else ""
            evidence = f" [{'; '.join(finding.evidence)}]" if finding.evidence else ""
            lines.append(one_line(f"{MARKS[finding.severity]}: {about}{finding.message}{sure}{evidence}"))
    return lines


def listed(values: Iterable[object], most: int = 6) -> str:
    """Values as a short list; numbers without trailing zeros."""
    shown = [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
    return ", ".join(shown[:most]) + (f", ... ({len(shown)} values)" if len(shown) > most else "")


def escaped(text: str) -> str:
    """`text` with every character that could steer a terminal or turn its direction as \\uXXXX; line ends and tabs stay."""
    return text if text.isascii() and text.isprintable() else _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def one_line(text: str) -> str:
    """`text` escaped, on one line: a line end in a name must not make a line of its own."""
    return escaped(text).replace("\n", "\\n")


def terminal_width() -> int | None:
    """Columns of the terminal that stdout is; None where it is a file or a pipe, and lines are as long as they are."""
    try:
        if not sys.stdout.isatty():
            return None
        told = os.environ.get("COLUMNS", "")
        width = int(told) if told.isdecimal() else os.get_terminal_size(sys.stdout.fileno()).columns
    except (OSError, ValueError):
        return 80
    return width if width >= _NARROWEST else None


def fitted(text: str) -> str:
    """A report as wide as the terminal, its long lines wrapped under their indent; as it is where there is no terminal."""
    width = terminal_width()
    return text if width is None else "\n".join(part for whole in text.split("\n") for part in _wrapped(whole, width))


def _wrapped(text: str, width: int) -> list[str]:
    if len(text) <= width:
        return [text]
    import textwrap

    indent = text[: len(text) - len(text.lstrip(" "))]
    return textwrap.wrap(
        text, width, subsequent_indent=indent + "    ", break_long_words=False, break_on_hyphens=False, drop_whitespace=True
    ) or [text]


def coloured(text: str) -> str:
    """Lines that begin with a mark with that mark in its colour."""
    return "\n".join(map(_coloured, text.split("\n")))


def _coloured(text: str) -> str:
    stripped = text.lstrip(" ")
    for mark, colour in _COLOURS.items():
        if stripped.startswith(mark):
            at = len(text) - len(stripped)
            return f"{text[:at]}\x1b[{colour}m{mark}\x1b[0m{text[at + len(mark) :]}"
    return text
