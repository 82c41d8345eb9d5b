"""The round-trip matrix: for every pair of dialects, A -> B -> A gives identical factors, or a refusal says what B cannot hold.

The whole table is computed once; `docs/matrix.md` is made from it. Run with UPPARAM_MATRIX=write to write that file anew; otherwise the test
fails where the file no longer says what is true.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from tests.matrix.page import PAGE, Cell, account, recorded, refusals, rendered
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

WRITABLE = [name for name in DIALECTS if get(name).writable]
WRITE = os.environ.get("UPPARAM_MATRIX") == "write"
CASES = [(feature, base) for feature, (_, bases) in FEATURES.items() for base in bases]


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
    if not WRITE:
        accounts, reasons = known()
        assert account(cells) == accounts.get((one, other)), "docs/matrix.md says otherwise; run with UPPARAM_MATRIX=write if this is meant"
        assert refusals(cells, one == other) <= reasons.get(other, set())


@cache
def known() -> tuple[dict[tuple[str, str], str], dict[str, set[tuple[str, str]]]]:
    """What docs/matrix.md says."""
    return recorded()


@pytest.fixture(scope="module", autouse=True)
def whole_page() -> Iterator[None]:
    """After the last cell: write the page where that is asked for, else compare the whole of it, where one process has seen every cell."""
    yield
    if len(RESULTS) < len(WRITABLE) ** 2:
        return
    if WRITE:
        PAGE.write_text(rendered(RESULTS, WRITABLE))
    else:
        assert PAGE.read_text() == rendered(RESULTS, WRITABLE), "run the matrix with UPPARAM_MATRIX=write"
