"""The dtypes that `--dtype` may name: one list for help, for what is taken, and for what a refusal says."""

from __future__ import annotations

from collections.abc import Sequence

from upparam.dtypes import DTYPES, DType
from upparam.errors import UsageError

FLOATS = ("float32", "float16", "bfloat16", "float64", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
"""Dtypes that signed values can be rounded into. (float8_e8m0fnu holds powers of two alone, and no zero.)"""
FACTORS = FLOATS[:3]
"""Those that libraries load factors in."""
_SHORT = {
    "fp32": "float32", "f32": "float32", "fp16": "float16", "f16": "float16", "half": "float16", "bf16": "bfloat16", "fp64": "float64", "f64": "float64",
}  # fmt: skip


def listed(among: Sequence[str] = FLOATS) -> str:
    """The names as help and refusals give them, the short one where there is one."""
    short = {wide: name for name, wide in reversed(_SHORT.items())}
    return ", ".join(short.get(name, name) for name in among)


def named_dtype(name: str, what: str, among: Sequence[str] = FLOATS) -> DType:
    """The dtype of that name, long or short. Raises UsageError, which says for `what` it is none, for one that is not `among` these."""
    wide = _SHORT.get(name, name)
    if wide not in among:
        raise UsageError(f"no dtype for {what}", expected=f"one of {listed(among)}", found=name)
    return DTYPES[wide]
