"""What people wire into CI: the pre-commit hook, the example workflow, and the files the documentation links."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import yaml

from .hostile.benign import benign
from .hostile.corpus import hostile

ROOT = Path(__file__).parents[1]


def hook() -> dict:
    (found,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    return found


def run(command: str, *files: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    program, *words = shlex.split(command)
    assert program == "upparam"
    return subprocess.run([sys.executable, "-m", "upparam", *words, *files], capture_output=True, text=True, check=False, cwd=cwd)


def test_the_hook_fails_for_code_and_is_silent_for_data(tmp_path):
    evil = next(case for case in hostile(str(tmp_path / "canary")) if case.name == "torch-with-code.bin").write(tmp_path)
    good = next(case for case in benign() if case.name == "tied.bin").write(tmp_path)
    silent = run(hook()["entry"], good, cwd=tmp_path)
    assert (silent.returncode, silent.stdout, silent.stderr) == (0, "", "")
    loud = run(hook()["entry"], good, evil, cwd=tmp_path)
    assert loud.returncode == 1 and "os.system" in loud.stdout and "tied.bin" not in loud.stdout


def test_the_hook_looks_at_the_files_people_keep_models_in():
    pattern = re.compile(hook()["files"])
    for name in ("adapter_model.bin", "a/b.safetensors", "x.pt", "optimizer.pth", "m.ckpt", "m.keras", "m.nemo", "m.tar.gz", "m.gguf"):
        assert pattern.search(name)
    assert not pattern.search("README.md") and not pattern.search("train.py")


def test_the_workflow_runs_what_exists(tmp_path):
    steps = yaml.safe_load((ROOT / "examples" / "github-action.yml").read_text())["jobs"]["scan"]["steps"]
    command = next(step["run"] for step in steps if step.get("run", "").startswith("upparam"))
    folder = tmp_path / "models"
    (folder / "below").mkdir(parents=True)
    next(case for case in hostile(str(tmp_path / "canary")) if case.name == "torch-with-code.bin").write(folder / "below")
    done = run(command, cwd=tmp_path)
    report = json.loads((tmp_path / "upparam.sarif").read_text())
    assert done.returncode == 1 and report["runs"][0]["results"][0]["ruleId"] == "pickle-code"


def test_linked_files_exist():
    for page in (ROOT / "docs" / "security.md", ROOT / "SECURITY.md", ROOT / "README.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)
