"""What a refusal advises can be done: an option it names is one of the command that was run, or of the whole command it is quoted in."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from upparam.cli import COMMANDS, main
from upparam.cli.offering import findings_in_its_options, in_its_options
from upparam.findings import warning

LOHA = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
Q = "model.layers.0.self_attn.q_proj"


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def options(command: str) -> set[str]:
    parser = argparse.ArgumentParser(add_help=False)
    importlib.import_module(f"upparam.cli.{command}").add_arguments(parser)
    return {option for action in parser._actions for option in action.option_strings}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    save_file(
        {f"{LOHA}.hada_w{n}_{part}": ones(*((640, 4) if part == "a" else (4, 640))) for n in (1, 2) for part in "ab"} | {f"{LOHA}.alpha": np.array(2, np.float32)},
        tmp_path / "loha.safetensors",
    )  # fmt: skip
    save_file({f"{Q}.lora_A": ones(4, 64), f"{Q}.lora_B": ones(64, 4)}, tmp_path / "unscaled.safetensors")
    (tmp_path / "two").mkdir()
    names = {
        f"base_model.model.{Q}.lora_{part}.{name}.weight": (4, 64) if part == "A" else (64, 4) for name in ("one", "two") for part in "AB"
    }
    save_file({name: ones(*shape) for name, shape in names.items()}, tmp_path / "two" / "adapter_model.safetensors")
    (tmp_path / "two" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]})
    )
    (tmp_path / "nameless").mkdir()
    np.save(tmp_path / "nameless" / "up-param.npy", ones(4096, 4))
    np.save(tmp_path / "nameless" / "down-param.npy", ones(4, 4096))
    return tmp_path


WAYS = {
    "combine": "combine {0} -o out", "resize": "resize {0} --rank 2 -o out", "edit": "edit {0} --dtype fp16 -o out",
    "convert": "convert {0} --to kohya -o out", "split": "split {0} -o out", "compare": "compare {0} loha.safetensors",
    "merge": "merge unscaled.safetensors {0} -o out", "verify": "verify {0}", "assemble": "assemble {0} -o out",
}  # fmt: skip


@pytest.mark.parametrize("command", WAYS)
@pytest.mark.parametrize("given", ["loha.safetensors@1e39", "unscaled.safetensors", "two", "nameless"])
def test_every_option_named_is_one_of_the_command(
    files: Path, command: str, given: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(files)
    given = given if command in ("combine", "merge") else given.split("@")[0]
    main([*shlex.split(WAYS[command].format(given)), "--json"])
    remedy = json.loads(capsys.readouterr().out).get("remedy", "")
    for whole in re.findall(r"'upparam ([a-z]+)([^']*)'", remedy):
        assert whole[0] in COMMANDS and set(re.findall(r"--[a-z-]+", whole[1])) <= options(whole[0]), remedy
    free = re.sub(r"'upparam [^']*'", "", remedy)
    named, lacking = set(re.findall(r"--[a-z-]+", free)), set(re.findall(r"--[a-z-]+", free.partition("has no such")[2]))
    elsewhere = {option for quoted in re.findall(r"'upparam [^']*'", remedy) for option in re.findall(r"--[a-z-]+", quoted)}
    assert named - lacking - elsewhere <= options(command), remedy
    assert lacking <= options("convert") and (not lacking or "'upparam convert'" in remedy), remedy


def test_what_takes_options_of_convert_is_left_to_it_and_works(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(files)
    assert main(["combine", "loha.safetensors@1e39", "--base", "sd1.5", "-o", "out.safetensors"]) == 4
    said = capsys.readouterr().err
    (holding,) = re.findall(r"choose another dialect: (.*) hold", said)
    (then,) = re.findall(r"'upparam (convert[^']*)' then makes lycoris of that", said)
    assert "--lowrank auto" in then and "triad" in holding
    for dialect in re.findall(r"[a-z-]+", holding.replace(" and ", " ")):
        assert main(["combine", "loha.safetensors@1e39", "--to", dialect, "--base", "sd1.5", "-o", f"{dialect}", "-q"]) == 0
        assert main([*then.split(), dialect, "-o", f"{dialect}.safetensors", "-q"]) == 0


@pytest.mark.parametrize(
    ("command", "said", "meant"),
    [
        ("convert", "give it with --alpha or --scale", "give it with --alpha or --scale"),
        ("resize", "give it with --alpha or --scale", "give it with --scale"),
        ("assemble", "give it with --alpha or --scale", "give it with --alpha or --scale"),
        ("combine", "give the rank of the result (--rank)", "give the rank of the result (--rank)"),
        ("combine", "name it with --base", "name it with --base"),
        ("resize", "name them with --target, or give --base",
         "name them with --target, or give --base (to 'upparam convert', and resize what that writes: resize has no such --target)"),
        ("combine", "choose one with --adapter NAME ('upparam convert --adapter NAME')", "choose one with --adapter NAME ('upparam convert --adapter NAME')"),
        ("resize", "give the rank of the factors with --rank, or --base for its widths",
         "give the rank of the factors with --rank, or --base for its widths (to 'upparam convert', and resize what that writes: resize has no such --rank)"),
        ("assemble", "give the rank of the factors with --rank, or --base for its widths", "give the rank of the factors with --rank, or --base for its widths"),
        ("edit", "choose another dialect: peft holds it as it is", "bring it into another dialect with 'upparam convert': peft holds it as it is"),
        ("resize", "choose another dialect: peft holds it as it is", "choose another dialect: peft holds it as it is"),
    ],
)  # fmt: skip
def test_examples(command: str, said: str, meant: str) -> None:
    assert in_its_options(said, command) == meant


def test_what_findings_advise_is_in_the_options_of_the_command_too(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = warning("scale-missing", "a.pt", "no alpha is stored", "give it with --alpha or --scale")
    assert findings_in_its_options([told], "convert") == [told]
    assert findings_in_its_options([told], "resize")[0].evidence == ("give it with --scale",)
    monkeypatch.chdir(files)
    assert main(["resize", "nameless", "--rank", "2", "--scale", "1", "-o", "out", "--json"]) == 0
    said = [" ".join(one["evidence"]) for one in json.loads(capsys.readouterr().out)["findings"] if "evidence" in one]
    assert any("resize has no such --target" in one for one in said)
