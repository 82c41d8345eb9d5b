"""A scan says of which places it knows nothing: folders below, folders behind links, folders that cannot be listed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from upparam.cli import main
from upparam.operations.scan import Verdict, places, scan


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder that holds only folders: one with weights, `.git`, and a link to the first."""
    for name in ("weights", ".git"):
        (tmp_path / "tree" / name).mkdir(parents=True)
        save_file({"a": np.zeros(2, np.float32)}, tmp_path / "tree" / name / "a.safetensors")
    (tmp_path / "tree" / "latest").symlink_to(tmp_path / "tree" / "weights")
    return tmp_path / "tree"


def test_a_folder_of_folders_is_not_passed_over_in_silence(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scan", str(tree)]) == 3
    said = capsys.readouterr().out
    assert f"{tree / 'weights'}: NOT LOOKED INTO (a folder below; --recursive looks into it)" in said
    assert "0 files: 3 folders not looked into" in said
    assert main(["scan", str(tree), "--json"]) == 3
    facts = json.loads(capsys.readouterr().out)
    assert [(Path(one["path"]).name, one["verdict"], one["findings"][0]["code"]) for one in facts] == [
        (name, "unknown", "not-looked-into") for name in (".git", "latest", "weights")
    ]


def test_files_beside_are_scanned_and_the_folder_is_told(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"a": np.zeros(2, np.float32)}, tree / "b.safetensors")
    assert main(["scan", str(tree)]) == 0
    assert "1 file: 1 clean data, 3 folders not looked into" in capsys.readouterr().out
    assert main(["scan", str(tree), "--strict"]) == 1


def test_recursion_scans_what_is_below_and_tells_of_links(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scan", str(tree), "-r"]) == 0
    said = capsys.readouterr().out
    assert "weights/a.safetensors: clean data" in said and "latest: NOT LOOKED INTO (a link to a folder" in said and ".git" not in said
    assert [getattr(place, "path", place) for place in places([tree], recursive=True)] == [
        tree / "latest",
        tree / "weights" / "a.safetensors",
    ]


@pytest.mark.skipif(os.name != "posix", reason="folders without permission are a matter of POSIX modes")
def test_a_folder_that_cannot_be_listed_is_no_empty_one(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.iterdir

    def refused(self: Path) -> object:
        # Root, as which many containers run tests, may list any folder.
        if self.name == "weights":
            raise PermissionError(13, "Permission denied", str(self))
        return real(self)

    monkeypatch.setattr(Path, "iterdir", refused)
    found = {report.path.name: report for report in scan([tree], recursive=True)}
    assert found["weights"].exit_code == 3 and found["weights"].verdict is Verdict.UNKNOWN
    assert "Permission denied" in found["weights"].findings[0].message


def test_an_empty_folder_holds_nothing_to_tell(tmp_path: Path) -> None:
    assert list(scan([tmp_path])) == [] and list(scan([tmp_path], recursive=True)) == []
