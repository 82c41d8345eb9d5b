"""The README says what happens: its session is what the commands print, its tables are the commands and exit codes there are."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from upparam.cli import COMMANDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def session() -> list[tuple[str, str]]:
    """(command, what it prints) of the README's session."""
    block = README.split("## A session", 1)[1].split("```", 2)[1]
    return [(command.strip(), printed.strip("\n")) for command, printed in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n?)*)", block, re.M)]


def test_the_session_is_what_the_commands_print(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "demo", tmp_path / "demo")
    (tmp_path / "demo-out").mkdir()
    for command, printed in session():
        words = command.split()
        argv = [sys.executable, "-m", "upparam", *words[1:]] if words[0] == "upparam" else [sys.executable, *words[1:]]
        done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert done.stdout.rstrip("\n") == printed, command


def test_every_command_is_in_the_table() -> None:
    told = set(re.findall(r"`(\w+)[ `]", README.split("## Commands", 1)[1].split("**Exit codes**", 1)[0]))
    assert set(COMMANDS) <= told


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_links_lead_somewhere(path: str) -> None:
    assert (ROOT / path).exists()
