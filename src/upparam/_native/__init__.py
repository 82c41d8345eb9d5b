"""The optional compiled kernels. Absent when the package was installed without a compiler; everything then runs on numpy."""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from typing import Any


def compiled(name: str, interface: int) -> Any:
    """The compiled module of that name; None where it was not built, or left over from source that speaks another `interface`."""
    try:
        module = import_module(f"{__name__}.{name}")
    except ImportError:
        return None
    return module if getattr(module, "INTERFACE", 1) == interface else None


@cache
def wanted(name: str, interface: int) -> Any:
    """The same, and None where compiled modules are to be left aside (UPPARAM_KERNEL=numpy when first asked)."""
    return None if os.environ.get("UPPARAM_KERNEL") == "numpy" else compiled(name, interface)
