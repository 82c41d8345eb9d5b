"""What is printed of a number is true of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upparam.operations.receipt import Receipt
from upparam.wording import at_least, at_most, counted, counted_of


@given(st.floats(1e-300, 1e300), st.integers(1, 6))
def test_bounds_hold_as_printed(value: float, digits: int) -> None:
    most, least = (float(text.split()[0]) for text in (at_most(value, digits), at_least(value, digits)))
    assert least <= value <= most
    assert abs(most - value) <= 10.0 ** (1 - digits) * value and abs(value - least) <= 10.0 ** (1 - digits) * value


@pytest.mark.parametrize(
    ("said", "meant"),
    [(at_most(0.68341), "0.684 or less"), (at_most(0.0), "0"), (at_most(1.0, 2), "1 or less"), (at_least(0.99999, 4), "0.9999 or more"),
     (at_least(1.0), "1"), (at_most(float("inf")), "inf or less"), (at_most(2.5e-9), "2.5e-09 or less"), (counted(1, "file"), "1 file"),
     (counted(2000, "file"), "2,000 files"), (counted(0, "file"), "0 files"), (counted(1, "file", "is", "are"), "1 file is"), (counted(0, "file", "is", "are"), "0 files are"),
     (counted_of(1, 1, "file", "is", "are"), "1 file is"), (counted_of(1, 3, "file", "is", "are"), "1 of 3 files is"),
     (counted_of(3, 3, "file", "is", "are"), "3 of 3 files are")],
)  # fmt: skip
def test_examples(said: str, meant: str) -> None:
    assert said == meant


def test_a_receipt_counts_what_is_counted() -> None:
    counts = {"tensors_changed": 1, "targets": 2000, "seed": 0, "density": "0.5"}
    assert Receipt("merge", [], ["out"], counts).lines()[0] == "merge: out (1 tensor changed, 2,000 targets, seed 0, density 0.5)"
