"""Names from files and paths reach the terminal escaped, on one line, whatever its encoding."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from upparam.cli import main
from upparam.cli.screen import Screen
from upparam.report.text import escaped, one_line

from ..hostile.asm import sft

NASTY = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e\nall.safetensors: clean data\r[/b][red]:bomb:"
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]")


def adapter(name: str, folder: Path) -> Path:
    """A PEFT adapter whose module, base and metadata are called `name`."""
    folder.mkdir(exist_ok=True)
    entries, at = {"__metadata__": {name: name}}, 0
    for part, shape in (("B", [4, 2]), ("A", [2, 4])):
        size = 4 * shape[0] * shape[1]
        entries[f"base_model.model.{name}.lora_{part}.weight"] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    (folder / "adapter_model.safetensors").write_bytes(sft(json.dumps(entries).encode(), bytes(at - 4) + b"\0\0\x80\x3f"))
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [name], "base_model_name_or_path": name}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(params=[NASTY, NASTY.replace("\n", "").replace("\r", "")], ids=["lines", "line"])
def nasty(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    return adapter(request.param, tmp_path / ("x\udcff" + NASTY.replace("/", "|")))


COMMANDS = [
    ["scan"], ["identify"], ["inspect"], ["inspect", "--hash"], ["verify"], ["convert", "--to", "peft", "-o", "OUT"], ["resize", "--rank", "1", "-o", "OUT"],
    ["split", "-o", "OUT"], ["assemble", "--to", "peft", "-o", "OUT"], ["compare", "SAME"], ["combine", "SAME", "-o", "OUT"],
    ["edit"],
]  # fmt: skip


@pytest.mark.parametrize("json_wanted", [False, True])
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_no_name_steers_the_terminal(command, json_wanted, nasty, tmp_path, capsys):
    words = [{"OUT": str(tmp_path / "out"), "SAME": str(nasty)}.get(word, word) for word in command]
    assert main([words[0], str(nasty), *words[1:], *(["--json"] if json_wanted else [])]) in (0, 1, 2, 3, 4)
    shown = capsys.readouterr()
    assert not UNSAFE.search(shown.out + shown.err)
    assert shown.out or shown.err
    lines = (shown.out + shown.err).splitlines()
    assert not any(line.lstrip().startswith("all.safetensors") for line in lines)
    if json_wanted and shown.out:
        json.loads(shown.out)


def test_what_is_missing_is_said_on_one_clean_line(tmp_path, capsys):
    for command in ("scan", "identify", "inspect", "verify"):
        assert main([command, str(tmp_path / NASTY.replace("/", "|"))]) == 3
        shown = capsys.readouterr().err
        assert shown.count("\n") == 1 and not UNSAFE.search(shown)


def test_markup_and_emoji_in_names_are_only_text(tmp_path, capsys):
    assert main(["inspect", str(adapter("a[/b][red]:bomb:", tmp_path / "x"))]) == 0
    assert "[/b][red]:bomb:" in capsys.readouterr().out


def test_any_encoding_of_the_terminal_will_do(nasty):
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    for more in ([], ["--json"]):
        done = subprocess.run(
            [sys.executable, "-m", "upparam", "identify", os.fsencode(nasty), *more], capture_output=True, env=environment, check=False
        )
        assert done.returncode in (0, 1) and b"Traceback" not in done.stderr and done.stdout.isascii()
        if more:
            assert json.loads(done.stdout)[0]["path"] == str(nasty)


def test_escapes_are_what_json_reads():
    text = "ä\x1b\u202e\x9b plain\n"
    assert escaped(text) == "ä\\u001b\\u202e\\u009b plain\n" and one_line("a\nb") == "a\\nb"
    assert json.loads(f'"{escaped(text.strip())}"') == text.strip()


def test_the_stream_behind_is_kept():
    class Narrow:
        encoding, parts = "ascii", []

        def write(self, text):
            text.encode("ascii")
            self.parts.append(text)

    stream = Narrow()
    Screen(stream).write("ä\U0001f600\n")
    assert "".join(stream.parts) == "\\u00e4\\ud83d\\ude00\n" and Screen(stream).encoding == "ascii"
