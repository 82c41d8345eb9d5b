"""upparam dialects, as people and programs see it."""

from __future__ import annotations

import json

import pytest

from upparam.algorithms import TITLES
from upparam.cli import main
from upparam.dialects import DIALECTS, get


def test_every_dialect_with_what_it_holds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dialects"]) == 0
    text = capsys.readouterr().out
    assert main(["dialects", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [fact["name"] for fact in facts][: len(DIALECTS)] == list(DIALECTS)
    for fact in facts[: len(DIALECTS)]:
        assert fact["algorithms"] == list(get(fact["name"]).algorithms)
        assert fact["title"] in text and ", ".join(TITLES[name] for name in fact["algorithms"]) in text
