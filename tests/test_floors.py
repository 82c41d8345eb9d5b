"""The floors of docs/architecture.md: imports point downward only, wherever they stand in a file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import upparam

ROOT = Path(upparam.__file__).parent
FLOORS = [
    {
        "arrays",
        "dtypes",
        "ways",
        "sources",
        "tensors",
        "carrying",
        "findings",
        "wording",
        "errors",
        "limits",
        "atomic",
        "beside",
        "progress",
        "patterns",
        "plugins",
        "_version",
        "_native",
    },
    {"containers"},
    {"algorithms"},
    {"adapter", "checkpoint"},
    {"bases"},
    {"dialects"},
    {"operations"},
    {"report"},
    {"cli"},
]
"""Lowest first, as in docs/architecture.md."""
UPWARD = {("adapter", "operations")}
"""What points upward on purpose: `Adapter.save`."""
TORCH = {"on_device.py"}
"""Where torch may be imported, inside functions: merging on a device."""


def floor(name: str) -> int:
    return next(index for index, members in enumerate(FLOORS) if name in members)


def imports() -> Iterator[tuple[str, str, str]]:
    """(file, its package or module below upparam, the one it imports), type-checking imports left out."""
    for path in sorted(ROOT.rglob("*.py")):
        own = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if own in ("__init__", "__main__"):
            continue
        tree = ast.parse(path.read_text())
        typing = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            if id(node) in typing:
                continue
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "upparam":
                words = node.module.split(".")
                names = [words[1]] if len(words) > 1 else [alias.name for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name.split(".")[1] for alias in node.names if alias.name.startswith("upparam.")]
            else:
                continue
            yield from ((str(path.relative_to(ROOT)), own, name) for name in names)


def test_every_module_has_a_floor() -> None:
    names = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in ROOT.rglob("*.py")} - {"__init__", "__main__"}
    assert names <= set().union(*FLOORS)


def test_imports_point_downward() -> None:
    upward = {(own, other, file) for file, own, other in imports() if floor(other) > floor(own)}
    assert not {(own, other, file) for own, other, file in upward if (own, other) not in UPWARD}
    assert {(own, other) for own, other, _ in upward} == UPWARD, "an exception that is no longer needed"


@pytest.mark.parametrize("name", ["torch", "pickle", "eval", "exec"])
def test_what_does_not_occur_in_the_source(name: str) -> None:
    for path in ROOT.rglob("*.py"):
        if name == "torch" and path.name in TORCH:
            assert not any(isinstance(node, ast.Import) and node.names[0].name == name for node in ast.parse(path.read_text()).body)
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                words = (
                    [alias.name.split(".")[0] for alias in node.names]
                    if isinstance(node, ast.Import)
                    else [(node.module or "").split(".")[0]]
                )
                assert name not in words, path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != name, path
