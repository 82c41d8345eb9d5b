"""The plain part of YAML that training frameworks write beside their tensors."""

from __future__ import annotations

from pathlib import Path

import pytest

from upparam.containers.side import read_yaml
from upparam.errors import MalformedError


def test_plain_lines_and_one_level_of_mappings_are_read(tmp_path: Path) -> None:
    text = (
        "# comment\na: 1\nb: -2.5\nc: true\nd: null\ne: bf16-true\nf: 'x: y'\ng: \"\"\nempty:\nlist:\n- 1\n- k: 2\n"
        "inner:\n  name: tiny\n  deep:\n    a: 9\n  org: 'o'\nlast: 1e-05\n"
    )
    (tmp_path / "x.yaml").write_text(text)
    assert read_yaml(tmp_path / "x.yaml") == {
        "a": 1, "b": -2.5, "c": True, "d": None, "e": "bf16-true", "f": "x: y", "g": "", "empty": None, "list": None,
        "inner": {"name": "tiny", "deep": None, "org": "o"}, "last": 1e-05,
    }  # fmt: skip


def test_no_file_is_none_and_bytes_are_no_text(tmp_path: Path) -> None:
    assert read_yaml(tmp_path / "x.yaml") is None
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00a: 1")
    with pytest.raises(MalformedError, match="not text"):
        read_yaml(tmp_path / "x.yaml")
