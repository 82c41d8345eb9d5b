"""What reaches the terminal: nothing a file can use against it, nothing lost at 80 columns, JSON that every parser takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from upparam.findings import warning
from upparam.report.table import Column, table
from upparam.report.text import finding_lines, fitted

STEM = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_"


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    tensors = {}
    for name, alpha in (("q", 2.0), ("k", 3.0)):
        tensors[f"{STEM}{name}.lora_up.weight"] = random.standard_normal((320, 4)).astype(np.float16)
        tensors[f"{STEM}{name}.lora_down.weight"] = random.standard_normal((4, 320)).astype(np.float16)
        tensors[f"{STEM}{name}.alpha"] = np.array(alpha, np.float16)
    path = tmp_path / "lora.safetensors"
    save_file(tensors, path, metadata={"ss_note": "one\x1b[31m\ntwo\u202e"})
    return path


def on_terminal(*argv: object, columns: int = 80, **environment: str) -> str:
    """What a command prints when stdout is a terminal of so many columns."""
    import pty

    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "upparam", *map(str, argv)], stdout=child, stderr=subprocess.DEVNULL, close_fds=True,
        env={**os.environ, "COLUMNS": str(columns), "TERM": "xterm", **environment},
    )  # fmt: skip
    os.close(child)
    seen = b""
    while True:
        try:
            part = os.read(parent, 1 << 16)
        except OSError:
            break
        if not part:
            break
        seen += part
    os.close(parent)
    assert process.wait() == 0
    return seen.decode().replace("\r\n", "\n")


def test_without_a_terminal_lines_are_whole_and_plain(lora: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "upparam", "inspect", str(lora)], capture_output=True, text=True, check=True)
    assert "\x1b" not in done.stdout and "\\u001b[31m\\ntwo\\u202e" in done.stdout
    (row,) = [text for text in done.stdout.splitlines() if "attn1.to_q" in text]
    assert all(word in row for word in ("lora", "0.5", "up 320x4 down 4x320", "float16"))


@pytest.mark.parametrize("columns", [80, 120, 50])
def test_at_any_width_every_module_is_named_and_every_number_there(lora: Path, columns: int) -> None:
    shown = on_terminal("inspect", lora, columns=columns, NO_COLOR="1")
    for name in ("q", "k"):
        assert f"attn1.to_{name}" in shown
    assert "0.5" in shown and "0.75" in shown and "…" not in shown
    assert max(len(text) for text in shown.splitlines() if "lora.safetensors" not in text) <= max(columns, 90)


def test_on_a_terminal_long_lines_hang_and_marks_are_coloured(lora: Path) -> None:
    shown = on_terminal("identify", lora)
    assert "\x1b[2mnote:\x1b[0m" in shown
    plain = on_terminal("identify", lora, NO_COLOR="1")
    first, *rest = plain.splitlines()  # the path itself is never cut, however deep the folder
    assert "\x1b" not in plain and first == str(lora) and max(map(len, rest)) <= 80


def test_a_name_in_no_encoding(lora: Path) -> None:
    path = os.fsencode(str(lora.parent)) + b"/l\xf6ra\xff.safetensors"
    try:
        lora.rename(os.fsdecode(path))
    except OSError:
        pytest.skip("this filesystem takes no such names")
    for argv in (["identify", path], ["identify", path, "--json"], ["verify", path]):
        done = subprocess.run([sys.executable.encode(), b"-m", b"upparam", *map(os.fsencode, argv)], capture_output=True)
        assert done.returncode == 0 and done.stderr == b""
        done.stdout.decode()


def test_json_is_strict(lora: Path) -> None:
    from upparam.cli.common import as_json

    assert json.loads(as_json({"a": [float("nan"), float("inf"), -float("inf"), 1.5]})) == {"a": ["NaN", "Infinity", "-Infinity", 1.5]}


def test_a_table_says_once_what_is_the_same_in_every_row() -> None:
    columns = [Column("target", False), Column("algorithm", False), Column("norm")]
    rows = [("a" * 20, "lora", "1.5"), ("b" * 20, "lora", "2.25")]
    assert table(columns, rows) == ["target                algorithm  norm", f"{'a' * 20}  lora        1.5", f"{'b' * 20}  lora       2.25"]
    assert table(columns, rows, 30) == [
        "in every row: algorithm lora",
        "target                norm",
        f"{'a' * 20}   1.5",
        f"{'b' * 20}  2.25",
    ]
    assert table(columns, rows, 20)[1:] == ["target", "  norm", "a" * 20, "   1.5", "b" * 20, "  2.25"]


def test_nothing_is_wrapped_or_coloured_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    text = "note: " + "word " * 60
    assert fitted(text) == text


def test_what_is_said_alike_of_many_is_one_line() -> None:
    def alike(count: int) -> list[str]:
        return finding_lines([warning("given-up", f"norm{number}", "bias given up") for number in range(count)])

    assert alike(3) == [f"warning: norm{number}: bias given up" for number in range(3)]
    assert alike(1200) == ["warning: norm0, norm1 and 1,198 more: bias given up"]
    mixed = [
        warning("a", "one", "told", "why"),
        *(warning("b", f"norm{number}", "kept", "so") for number in range(4)),
        warning("a", "two", "told", "how"),
    ]
    assert finding_lines(mixed) == ["warning: one: told [why]", "warning: norm0, norm1 and 2 more: kept [so]", "warning: two: told [how]"]
