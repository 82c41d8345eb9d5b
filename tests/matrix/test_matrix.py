"""The round-trip matrix: for every pair of dialects, A -> B -> A gives identical factors, or a refusal says what B cannot hold.

The whole table is computed once; `docs/matrix.md` is made from it. Run with UPPARAM_MATRIX=write to write that file anew; otherwise the test
fails where the file no longer says what is true.
"""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from tests.matrix.specimens import FEATURES, specimen

from upparam.adapter import Adapter
from upparam.bases import inventory
from upparam.dialects import DIALECTS, get
from upparam.dialects.base import ReadOptions
from upparam.errors import RefusedError
from upparam.operations.convert import write_adapter
from upparam.operations.opening import open_adapter
from upparam.operations.proof import prove_same, same_delta
from upparam.tensors import same_bits

PAGE = Path(__file__).parents[2] / "docs" / "matrix.md"
WRITABLE = [name for name in DIALECTS if get(name).writable]
CASES = [(feature, base) for feature, (_, bases) in FEATURES.items() for base in bases]


class Cell(NamedTuple):
    """What became of one specimen on one way: `identical`, `joined` (equal in dW), `refused` (with the reason), or `absent`: A cannot hold it."""

    outcome: str
    reason: str = ""


def options(base: str, adapter: Adapter) -> ReadOptions:
    """What a user would say on reading: the base, and for dialects whose files hold no scale, the scale."""
    return ReadOptions(base=inventory.load(base))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("matrix")


def write_and_read(adapter: Adapter, out: Path, dialect: str, base: str) -> Adapter:
    read = options(base, adapter)
    write_adapter(adapter, out, dialect, read=read)
    return open_adapter(out, dialect=dialect, options=read)


def stem(name: str) -> str:
    return name.replace(" ", "-").replace(".", "-")


@cache
def start(where: Path, feature: str, base: str, dialect: str) -> Adapter | str:
    """The specimen as A's own file tells it, or why A cannot hold it."""
    out = where / f"{stem(feature)}-{stem(base)}-{dialect}"
    try:
        return write_and_read(specimen(feature, base), out, dialect, base)
    except RefusedError as problem:
        return cause(problem)


def cause(problem: RefusedError) -> str:
    """Why, in few words: the first thing found, without the module it was found in."""
    first = (problem.found or "").split("; ")[0]
    return first.split(": ", 1)[1] if ": " in first else re.sub(r"^\d+ ", "", problem.message)


def way(where: Path, feature: str, base: str, one: str, other: str) -> Cell:
    begun = start(where, feature, base, one)
    if isinstance(begun, str):
        return Cell("absent", begun)
    out = where / f"{stem(feature)}-{stem(base)}-{one}-{other}"
    try:
        between = write_and_read(begun, out, other, base)
    except RefusedError as problem:
        return Cell("refused", cause(problem))
    back = write_and_read(between, out.with_name(out.name + "-back"), one, base)
    if any(target.rows for target in begun.deltas) and not any(target.rows for target in back.deltas):
        prove_same(begun, back)
        return Cell("joined", "slices of a fused weight come back as one delta of the whole weight, equal in dW")
    identical(begun, back)
    return Cell("identical")


def identical(one: Adapter, other: Adapter) -> None:
    """Every target with the same factor bits and scale, every extra with the same bits, nothing left over."""
    assert not other.leftovers
    assert set(one.deltas) == set(other.deltas)
    for target, delta in one.deltas.items():
        assert same_delta(delta, other.deltas[target]), str(target)
    extras = {(extra.kind, extra.name): extra.tensor for extra in other.extras}
    assert {(extra.kind, extra.name) for extra in one.extras} == set(extras)
    assert all(same_bits(extra.tensor, extras[extra.kind, extra.name]) for extra in one.extras)


RESULTS: dict[tuple[str, str], dict[tuple[str, str], Cell]] = {}


@pytest.mark.parametrize("other", WRITABLE)
@pytest.mark.parametrize("one", WRITABLE)
def test_there_and_back(one: str, other: str, folder: Path) -> None:
    cells = {(feature, base): way(folder, feature, base, one, other) for feature, base in CASES}
    if one == other:
        assert all(cell.outcome != "refused" for cell in cells.values()), "a dialect refuses what it has itself written"
        assert any(cell.outcome == "identical" for cell in cells.values()), "a dialect that can hold none of the specimens"
    RESULTS[one, other] = cells
    expected = recorded().get((one, other))
    found = summary(cells)
    if os.environ.get("UPPARAM_MATRIX") != "write":
        assert found == expected, f"docs/matrix.md says {expected!r}; run the matrix with UPPARAM_MATRIX=write if this is meant"


def summary(cells: dict[tuple[str, str], Cell]) -> str:
    """The cell of the table: how many of A's specimens came back identical, and which features B refuses."""
    held = {case: cell for case, cell in cells.items() if cell.outcome != "absent"}
    refused = list(dict.fromkeys(feature for (feature, _), cell in held.items() if cell.outcome == "refused"))
    good = sum(cell.outcome == "identical" for cell in held.values())
    joined = list(dict.fromkeys(feature for (feature, _), cell in held.items() if cell.outcome == "joined"))
    notes = [f"not {', '.join(refused)}"] * bool(refused) + [f"joined {', '.join(joined)}"] * bool(joined)
    return " ".join([f"{good}/{len(held)}", *notes])


@cache
def recorded() -> dict[tuple[str, str], str]:
    """The cells that docs/matrix.md holds."""
    if not PAGE.is_file():
        return {}
    rows = [line.strip("|").split("|") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    (header, *body) = [[cell.strip() for cell in row] for row in rows if len(row) > 2][: len(WRITABLE) + 1]
    return {(row[0], column): cell for row in body for column, cell in zip(header[1:], row[1:], strict=True)}


@pytest.fixture(scope="module", autouse=True)
def page(folder: Path) -> object:
    yield
    if os.environ.get("UPPARAM_MATRIX") == "write" and len(RESULTS) == len(WRITABLE) ** 2:
        PAGE.write_text(rendered())


def rendered() -> str:
    """docs/matrix.md."""
    lines = [
        "# Round trips", "",
        "Made by `UPPARAM_MATRIX=write python -m pytest tests/matrix -p no:xdist`; every test run checks that it is still true.", "",
        f"Row A, column B: of the {len(CASES)} specimens (a feature on a base) those that A can hold at all, and of these how many go A -> B -> A with "
        "identical factors, scales and extras. `joined` come back equal in dW, but as one delta of the fused weight they were slices of. For the "
        "rest the conversion is refused with exit code 4 and the reason, listed below; nothing is written.", "",
        "| A \\ B | " + " | ".join(WRITABLE) + " |", "|" + "---|" * (len(WRITABLE) + 1),
    ]  # fmt: skip
    for one in WRITABLE:
        lines.append(f"| {one} | " + " | ".join(summary(RESULTS[one, other]) for other in WRITABLE) + " |")
    lines += ["", "## What each dialect refuses", ""]
    for dialect in WRITABLE:
        reasons: dict[str, list[str]] = {}
        for (_, other), cells in RESULTS.items():
            for (feature, base), cell in cells.items():
                if other == dialect and cell.outcome == "refused":
                    where = f"{feature} ({base})"
                    if where not in reasons.setdefault(cell.reason, []):
                        reasons[cell.reason].append(where)
        lines += [f"### {dialect}", ""]
        lines += [f"- {', '.join(where)}: {reason}" for reason, where in reasons.items()] or ["Nothing."]
        lines.append("")
    return "\n".join(lines)
