"""docs/json.md says every key there is, and no other."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tests.operations.test_verify import peft

from upparam.cli import main

DOC = (Path(__file__).parents[2] / "docs" / "json.md").read_text()


def section(name: str) -> set[str]:
    """Every word in backticks of one section of the document."""
    return set(re.findall(r"`([\w-]+)`", DOC.split(f"## {name}\n", 1)[1].split("\n## ", 1)[0]))


def told(capsys: pytest.CaptureFixture[str], *argv: object) -> Any:
    main([*map(str, argv), "--json"])
    return json.loads(capsys.readouterr().out)


def test_identify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (identity,) = told(capsys, "identify", peft(tmp_path / "a"))
    words = section("identify")
    for part in (identity, identity["adapters"][0], identity["files"][0]):
        assert part.keys() <= words
    assert {"path", "adapters", "files", "findings"} == identity.keys()


def test_inspect_and_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = peft(tmp_path / "a")
    facts = told(capsys, "inspect", adapter, "--hash")
    words = section("inspect")
    for part in (facts, facts["modules"][0], facts["totals"], facts["hashes"][0]):
        assert part.keys() <= words
    facts = told(capsys, "verify", adapter)
    assert facts.keys() == section("verify")
    assert all(finding.keys() <= section("What comes back") for finding in facts["findings"])


def test_receipts_and_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter, words = peft(tmp_path / "a"), section("What comes back")
    for argv in (("convert", adapter, "--to", "peft", "-o", tmp_path / "x"), ("resize", adapter, "--rank", "1", "-o", tmp_path / "y")):
        assert told(capsys, *argv).keys() <= words
    assert told(capsys, "convert", adapter, "--to", "peft", "-o", tmp_path / "x").keys() <= words
    assert told(capsys, "scan", adapter)[0].keys() <= section("scan")


def test_one_path_that_cannot_be_opened_does_not_end_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = peft(tmp_path / "a")
    missing = tmp_path / "missing"
    assert main(["identify", str(missing), str(adapter)]) == 3
    out, err = capsys.readouterr()
    assert "rank 4" in out and err.count("\n") == 1 and "missing" in err
    first, second = told(capsys, "identify", missing, adapter)
    assert first["error"]["exit_code"] == 3 and first["path"] == str(missing)
    assert second["adapters"][0]["kind"] == "adapter"


@pytest.mark.parametrize("words", [["merge", "base"], ["merge", "b", "a", "--threads", "x"], ["merge", "b", "a", "-o", "c", "--in-place"]])
def test_a_command_line_that_is_refused_is_json_too(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--json"]) == 2
    told = json.loads(capsys.readouterr().out)
    assert told["error"] == "UsageError" and told["exit_code"] == 2 and "argument" in told["message"]
    with pytest.raises(SystemExit):
        main(words)
    assert told["message"] in capsys.readouterr().err


def test_what_the_system_refuses_is_json_too(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr("upparam.operations.merge.merge", refuse)
    assert main(["merge", "b", "a", "-o", "c", "--json"]) == 3
    assert json.loads(capsys.readouterr().out) == {
        "error": "UnreadableError", "exit_code": 3, "message": "Permission denied", "file": str(tmp_path)
    }  # fmt: skip
    assert main(["merge", "b", "a", "-o", "c"]) == 3
    assert capsys.readouterr().err == f"upparam: {tmp_path}: Permission denied\n"
