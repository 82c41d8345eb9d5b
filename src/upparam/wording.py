"""Numbers in sentences: counts with their noun, and bounds that hold as they are printed."""

from __future__ import annotations


def counted(count: int, word: str) -> str:
    """`1 file`, `2,000 files`."""
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"


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
