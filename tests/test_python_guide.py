"""docs/python.md does what it says: its examples run, one after the other, on the demo's files."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

import upparam

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "python.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", GUIDE, re.M | re.S)


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "demo", tmp_path / "demo")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for example in EXAMPLES:
        exec(compile(example, "docs/python.md", "exec"), names)
    same = [(tmp_path / "merged" / name).read_bytes() for name in ("model.safetensors", "config.json")]
    upparam.merge("demo/base", [("adapter", 0.8)], "again")
    assert same == [(tmp_path / "again" / name).read_bytes() for name in ("model.safetensors", "config.json")]


def test_every_public_function_is_shown() -> None:
    shown = set(re.findall(r"upparam\.(\w+)", GUIDE))
    assert {name for name in upparam.__all__ if not name.startswith("__")} - {"Adapter", "Target"} <= shown
