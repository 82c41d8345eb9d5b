"""A short fuzz with a fixed seed, and every input that ever failed. tools/fuzz.py runs the same targets for as long as one likes."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .mutate import mutated
from .targets import TARGETS, run, seeds

FINDINGS = sorted((Path(__file__).parent / "findings").iterdir())
EXECUTIONS, SLOW = 300, 1.0
"""Executions of each target here, and seconds of processor time no input of this size may take."""


def test_every_target_has_sound_seeds():
    for name in TARGETS:
        assert len(seeds(name)) >= 2, name


@pytest.mark.parametrize("name", TARGETS)
def test_short_fuzz(name):
    chance, pool = random.Random(7), seeds(name)
    for data in pool[:8]:
        run(name, data)
    for _ in range(EXECUTIONS if name not in ("names", "config") else EXECUTIONS // 5):
        data = mutated(chance.choice(pool), pool, chance)
        begun = time.process_time()
        run(name, data)
        assert time.process_time() - begun < SLOW, data


@pytest.mark.parametrize("path", FINDINGS, ids=lambda path: path.name)
def test_findings_stay_fixed(path):
    name = max((target for target in TARGETS if path.name.startswith(f"{target}-")), key=len)
    data = path.read_bytes()
    begun = time.process_time()
    run(name, data)
    assert time.process_time() - begun < SLOW


def test_the_fuzzer_finds_and_keeps_a_failure(tmp_path, monkeypatch):
    """Without this a fuzzer that never calls its target would look like one that finds nothing."""
    tool = Path(__file__).parents[2] / "tools" / "fuzz.py"
    command = [sys.executable, tool, "ggla", "--seconds", "2", "--own", "--findings", tmp_path / "found"]
    told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout)
    assert told["target"] == "ggla" and told["executions"] > 10 and told["findings"] == {}
    spec = importlib.util.spec_from_file_location("fuzz_tool", tool)
    fuzz = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fuzz)
    watch = fuzz.Watch("ggla", tmp_path / "found", 1)
    monkeypatch.setitem(watch.run.__globals__["TARGETS"], "ggla", lambda data: 1 // (len(data) % 7))
    for size in range(14):
        watch(bytes(size))
    (kept,) = (tmp_path / "found").iterdir()
    assert watch.executions == 14 and watch.kept == {next(iter(watch.kept)): 2} and kept.name.startswith("ggla-ZeroDivisionError")
