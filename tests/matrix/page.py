"""docs/matrix.md: made from the results of every cell, and read back so that a test can say where it is no longer true."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).parents[2] / "docs" / "matrix.md"

Case = tuple[str, str]
"""(feature, base)."""


class Cell(NamedTuple):
    """What became of one specimen on one way: `identical`, `joined` (equal in dW), `refused` (with the reason), or `absent`: A cannot hold it."""

    outcome: str
    reason: str = ""


Cells = Mapping[Case, Cell]
Results = Mapping[tuple[str, str], Cells]


def count(cells: Cells) -> str:
    """How many of A's specimens came back identical, of how many A holds at all."""
    held = [cell for cell in cells.values() if cell.outcome != "absent"]
    return f"{sum(cell.outcome == 'identical' for cell in held)}/{len(held)}"


def account(cells: Cells) -> str:
    """The count, and which features did not come back as they were."""
    told = [
        f"{word} {', '.join(dict.fromkeys(feature for (feature, _), cell in cells.items() if cell.outcome == outcome))}"
        for outcome, word in (("joined", "joined:"), ("refused", "refused:"))
        if any(cell.outcome == outcome for cell in cells.values())
    ]
    return "; ".join([count(cells), *told])


def refusals(cells: Cells, own: bool) -> set[tuple[str, str]]:
    """(reason, specimen) of what B refuses on this way. `own`: B is A, so that these are the specimens it cannot hold at all."""
    outcome = "absent" if own else "refused"
    return {(cell.reason, f"{feature} ({base})") for (feature, base), cell in cells.items() if cell.outcome == outcome}


def rendered(results: Results, names: Sequence[str]) -> str:
    """The whole page."""
    cases = list(results[names[0], names[0]])
    lines = [
        "# Round trips", "",
        "Made by `UPPARAM_MATRIX=write python -m pytest tests/matrix -p no:xdist`; every test run checks that it is still true.", "",
        f"{len(cases)} specimens, each one feature on one base, are written in every dialect A that can hold them, converted to every dialect B and "
        "back, and compared. What B cannot hold is refused with exit code 4 and the reason; nothing is written.", "",
        "- [What each dialect holds](#what-each-dialect-holds)", "- [From A to B and back](#from-a-to-b-and-back)",
        "- [Row by row](#row-by-row)", "- [Why](#why)", "",
        "## What each dialect holds", "",
        "`2 of 5`: on two of the five bases that the feature is shown on. [Why](#why) says what stands against the others.", "",
        "| feature | " + " | ".join(names) + " |", "|---|" + ":-:|" * len(names),
    ]  # fmt: skip
    for feature in dict.fromkeys(feature for feature, _ in cases):
        lines.append(f"| {feature} | " + " | ".join(_held(results[name, name], feature) for name in names) + " |")
    lines += [
        "", "## From A to B and back", "",
        "Row A, column B: of the specimens that A holds, how many come back with identical factors, scales and extras.", "",
        "| A \\ B | " + " | ".join(names) + " |", "|---|" + ":-:|" * len(names),
    ]  # fmt: skip
    lines += [f"| {one} | " + " | ".join(count(results[one, other]) for other in names) + " |" for one in names]
    lines += [
        "", "## Row by row", "",
        "`joined` came back equal in dW, but as one delta of the fused weight that they were slices of; `refused` are the features that B cannot "
        "hold on at least one of the bases.",
    ]  # fmt: skip
    for one in names:
        lines += ["", f"### From {one}", ""]
        alike: dict[str, list[str]] = {}
        for other in names:
            alike.setdefault(account(results[one, other]), []).append(other)
        lines += [f"- {', '.join(others)}: {text}" for text, others in alike.items()]
    lines += ["", "## Why"]
    for name in names:
        lines += ["", f"### Into {name}", "", *_reasons(results, names, name)]
    return "\n".join(lines) + "\n"


def _held(cells: Cells, feature: str) -> str:
    """Of one feature, on all bases, some, or none."""
    found = [cell.outcome != "absent" for (name, _), cell in cells.items() if name == feature]
    return "yes" if all(found) else f"{sum(found)} of {len(found)}" if any(found) else "-"


def _reasons(results: Results, names: Sequence[str], name: str) -> list[str]:
    """Every reason for which something is refused, with the specimens it is given for, by feature."""
    found: dict[str, dict[str, dict[str, None]]] = {}
    for one in names:
        for (feature, base), cell in results[one, name].items():
            if cell.outcome == ("absent" if one == name else "refused"):
                found.setdefault(cell.reason, {}).setdefault(feature, {})[base] = None
    lines = []
    for reason, features in sorted(found.items()):
        shown = ", ".join(f"{feature} ({', '.join(bases)})" for feature, bases in features.items())
        lines.append(f"- {reason}: {shown}")
    return lines or ["Nothing is refused."]


def recorded() -> tuple[dict[tuple[str, str], str], dict[str, set[tuple[str, str]]]]:
    """(account of each cell, what is refused by each dialect and why), as the page has them."""
    accounts: dict[tuple[str, str], str] = {}
    refused: dict[str, set[tuple[str, str]]] = {}
    section = ""
    for line in PAGE.read_text().splitlines() if PAGE.is_file() else []:
        if line.startswith("#"):
            section = line.lstrip("# ")
        elif line.startswith("- ") and section.startswith("From ") and section != "From A to B and back":
            others, _, text = line[2:].partition(": ")
            accounts |= {(section.removeprefix("From "), other): text for other in others.split(", ")}
        elif line.startswith("- ") and section.startswith("Into "):
            reason, _, shown = line[2:].rpartition(": ")
            refused.setdefault(section.removeprefix("Into "), set()).update((reason, case) for case in _cases(shown))
    return accounts, refused


def _cases(shown: str) -> list[str]:
    found = []
    for part in shown.removesuffix(")").split("), "):
        feature, _, bases = part.partition(" (")
        found += [f"{feature} ({base})" for base in bases.split(", ")]
    return found
