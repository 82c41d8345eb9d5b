"""The optional compiled kernels. Absent when the package was installed without a compiler; everything then runs on numpy."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def compiled(name: str, interface: int) -> Any:
    """The compiled module of that name; None where it was not built, or left over from source that speaks another `interface`."""
    try:
        module = import_module(f"{__name__}.{name}")
    except ImportError:
        return None
    return module if getattr(module, "INTERFACE", 1) == interface else None
