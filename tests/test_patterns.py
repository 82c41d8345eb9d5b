"""Regular expressions that wait: they do what re's own do, and are compiled at the first use only."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from upparam.patterns import regex


def test_they_do_what_compiled_ones_do() -> None:
    one = regex(r"(?P<name>[a-z]+)(\d+)", re.IGNORECASE)
    real = re.compile(r"(?P<name>[a-z]+)(\d+)", re.IGNORECASE)
    for text in ("Ab12", "12", "x ab1 c2"):
        assert [m.groups() for m in one.finditer(text)] == [m.groups() for m in real.finditer(text)]
        assert (one.search(text) is None) == (real.search(text) is None)
        assert one.sub("#", text) == real.sub("#", text)
    assert one.fullmatch("ab1")["name"] == "ab" and one.pattern == real.pattern and one.groups == 2  # type: ignore[index]
    assert regex(rb"\x00+").match(b"\x00\x00x").end() == 2  # type: ignore[union-attr]


def test_a_wrong_one_is_told_when_used() -> None:
    broken = regex("(")
    with pytest.raises(re.error):
        broken.match("x")


def test_importing_what_identify_passes_compiles_none() -> None:
    code = """
import re
compiled = []
inner = re._compiler.compile
re._compiler.compile = lambda *args, **more: compiled.append(args[0]) or inner(*args, **more)
import argparse, dataclasses, json, pathlib, string, textwrap
before = len(compiled)
import upparam.dialects, upparam.operations.opening
import upparam.dialects.peft, upparam.dialects.kohya, upparam.dialects.diffusers, upparam.dialects.mlx
print(compiled[before:])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if "AttributeError" in done.stderr:
        pytest.skip("this Python keeps its compiler elsewhere")
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
