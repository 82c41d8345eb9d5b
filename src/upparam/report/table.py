"""A table that keeps every fact at any width: what is the same in every row is said once, and long names get a line of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Column(NamedTuple):
    """A heading, and whether its values are numbers, which stand to the right."""

    name: str
    number: bool = True


def table(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int | None = None) -> list[str]:
    """The lines of a table: one line a row where it fits `width` (None: any), else without the columns that never change (said above it).

    Where that is still too wide, the first column stands alone and the rest follows below it, each value by its heading.
    """
    lines = _plain(columns, rows)
    if width is None or not rows or _longest(lines) <= width:
        return lines
    same = [index for index in range(1, len(columns)) if len(rows) > 1 and len({row[index] for row in rows}) == 1]
    said = ", ".join(f"{columns[index].name} {rows[0][index]}" for index in same)
    kept = [index for index in range(len(columns)) if index not in same]
    columns, rows = [columns[index] for index in kept], [[row[index] for index in kept] for row in rows]
    above = [f"in every row: {said}"] if said else []
    lines = _plain(columns, rows)
    if _longest(lines) <= width:
        return above + lines
    below = _plain(columns[1:], [row[1:] for row in rows])
    if len(columns) > 1 and _longest(below) + 2 <= width:
        named = [part for row, numbers in zip(rows, below[1:], strict=True) for part in (row[0], "  " + numbers)]
        return [*above, columns[0].name, "  " + below[0], *named]
    return above + [part for row in rows for part in _pairs(columns, row, width)]


def _plain(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [
        max(len(column.name), *(len(row[index]) for row in rows)) if rows else len(column.name) for index, column in enumerate(columns)
    ]
    lines = []
    for row in [[column.name for column in columns], *rows]:
        cells = [cell.rjust(size) if column.number else cell.ljust(size) for cell, size, column in zip(row, widths, columns, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines


def _pairs(columns: Sequence[Column], row: Sequence[str], width: int) -> list[str]:
    """The first value alone, then headings with their values, as many to a line as fit."""
    lines, line = [row[0]], " "
    for column, value in zip(columns[1:], row[1:], strict=True):
        pair = f"{column.name} {value}".strip()
        if len(line) + 2 + len(pair) > width and line.strip():
            lines.append(line)
            line = " "
        line += f"  {pair}" if line.strip() else f" {pair}"
    return [*lines, line]


def _longest(lines: Sequence[str]) -> int:
    return max(len(line) for line in lines)
