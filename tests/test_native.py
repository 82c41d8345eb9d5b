"""Compiled modules: each has its place in the build, and is there where one is."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

import upparam._native

NATIVE = Path(upparam._native.__file__).parent
ROOT = NATIVE.parents[2]
LISTED = """
import setuptools
from distutils.core import run_setup
for one in run_setup("setup.py", stop_after="init").ext_modules:
    print(one.name, *one.sources, *one.depends)
"""


@pytest.fixture(scope="module")
def sources() -> set[str]:
    if not (ROOT / "setup.py").is_file():
        pytest.skip("needs the source tree")
    return {path.stem for path in NATIVE.glob("*.c")}


def test_every_source_is_built_with_what_it_includes(sources: set[str]) -> None:
    pytest.importorskip("setuptools")
    told = subprocess.run([sys.executable, "-c", LISTED], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    listed = {name.removeprefix("upparam._native."): set(files) for name, *files in map(str.split, told.splitlines())}
    assert listed.keys() == sources
    for name, files in listed.items():
        assert files == {os.fspath(path.relative_to(ROOT)) for path in included(NATIVE / f"{name}.c")}


def included(path: Path) -> set[Path]:
    """A source and the files beside it that it includes, and they include."""
    names = (line.split('"')[1] for line in path.read_text().splitlines() if line.startswith('#include "'))
    return {path}.union(*(included(NATIVE / name) for name in names))


def test_where_one_is_built_all_are(sources: set[str]) -> None:
    """One that does not compile is left out of a build without a word, and everything works, only slower."""
    built = {name for name in sources if find_spec(f"upparam._native.{name}") is not None}
    if not built:
        pytest.skip("nothing is compiled here")
    assert built == sources and all(import_module(f"upparam._native.{name}") for name in built)
