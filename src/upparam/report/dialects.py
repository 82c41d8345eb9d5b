"""Dialects as facts and text: what each is called, whether it is written, and what it holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from upparam.algorithms import TITLES
from upparam.dialects.base import Dialect


def dialect_facts(member: Dialect) -> dict[str, Any]:
    """Name, title, whether it is read and written, and the algorithms it holds (none told by a plugin that does not say)."""
    return {
        "name": member.name, "title": member.title, "reads": True, "writes": member.writable,
        "algorithms": list(getattr(member, "algorithms", ())),
    }  # fmt: skip


def dialect_text(facts: Sequence[dict[str, Any]]) -> str:
    """Two lines a dialect: its name and title, and what it holds."""
    width = max(len(fact["name"]) for fact in facts)
    lines: list[str] = []
    for fact in facts:
        lines.append(f"{fact['name']:{width}}  {'reads, writes' if fact['writes'] else 'reads only   '}  {fact['title']}")
        held = ", ".join(TITLES.get(name, name) for name in fact["algorithms"])
        if held:
            lines.append(" " * (width + 2) + held)
    return "\n".join(lines)
