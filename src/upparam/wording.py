"""Numbers in sentences: counts with their noun, and bounds that hold as they are printed."""

from __future__ import annotations


def counted(count: int, word: str, one: str = "", more: str = "") -> str:
    """`1 file`, `2,000 files`; with the verb for either, `1 file is`, `2,000 files are`."""
    said, verb = (word, one) if count == 1 else (f"{word}s", more)
    return f"{count:,} {said}" + (f" {verb}" if verb else "")


def counted_of(count: int, total: int, word: str, one: str, more: str) -> str:
    """`1 of 3 files is`, `2 of 3 files are`, `1 file is` where there are no others."""
    return counted(total, word, one, more) if count == total == 1 else f"{count:,} of {counted(total, word)} {one if count == 1 else more}"


def at_most(value: float, digits: int = 3) -> str:
    """`0.684 or less`: the last digit rounded up, so that it is true; `0` for what cannot be less, being none."""
    return f"{_rounded(value, digits, 'ROUND_CEILING')} or less" if value else "0"


def at_least(value: float, digits: int = 3) -> str:
    """`0.533 or more`: the last digit rounded down; `1` for the whole."""
    return f"{_rounded(value, digits, 'ROUND_FLOOR')} or more" if value != 1.0 else "1"


def _rounded(value: float, digits: int, way: str) -> str:
    from decimal import Context
    from math import isfinite

    nearest = f"{value:.{digits}g}"
    if not isfinite(value) or float(nearest) == value:
        return nearest
    return f"{float(Context(prec=digits, rounding=way).create_decimal_from_float(value)):.{digits}g}"
