"""upparam bases, as people and programs see it."""

from __future__ import annotations

import json

import pytest

from upparam.bases import inventory
from upparam.cli import main


def test_the_list_names_every_base(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bases"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in inventory.names())
    assert main(["bases", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [fact["name"] for fact in facts] == inventory.names()


def test_one_base_by_id_with_its_modules_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bases", "openai-community/gpt2", "--modules"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "gpt2: GPT-2 124M"
    assert any(line.split() == ["3", "transformer.h.0.attn.c_attn", "Conv1D", "768x2304", "+", "bias"] for line in lines)
    assert main(["bases", "gpt2", "--json", "--modules"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [module["path"] for module in facts["module_list"]] == [module.path for module in inventory.load("gpt2").modules]


def test_an_unknown_base_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bases", "no-such-base"]) == 2
    assert "no such base" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "meant"), [("llama3-8b", "llama-3-8b"), ("qwen", "qwen2-7b"), ("lama-3-8b", "llama-3-8b"), ("pixart", "pixart-sigma")]
)
def test_a_name_nearly_right_is_answered_with_what_was_meant(typed: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    from upparam.bases.find import near

    assert meant in near(typed)
    assert main(["bases", typed]) == 2
    assert f"'{typed}'" in (told := capsys.readouterr().err) and f"perhaps {near(typed)[0]}" in told


def test_modules_are_those_of_one_base(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bases", "--modules"]) == 2
    assert "upparam bases NAME --modules" in capsys.readouterr().err
