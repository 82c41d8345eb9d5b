"""The command line as a stranger meets it: one clear line for each mistake, documented exit codes, the same facts as JSON."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from upparam.adapter import DROPPABLE
from upparam.cli import COMMANDS, main
from upparam.errors import UsageError
from upparam.operations.dtypes import FACTORS, FLOATS, listed, named_dtype

STEM = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def _help(command: str) -> str:
    """What `upparam COMMAND --help` says."""
    out = io.StringIO()
    with redirect_stdout(out), pytest.raises(SystemExit):
        main([command, "--help"])
    return out.getvalue()


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path / "lora.safetensors"
    save_file(
        {
            f"{STEM}.lora_up.weight": rng.standard_normal((320, 4)).astype(np.float16),
            f"{STEM}.lora_down.weight": rng.standard_normal((4, 320)).astype(np.float16),
            f"{STEM}.alpha": np.array(2, np.float16),
        },
        path,
    )
    return path


def failing(capsys: pytest.CaptureFixture[str], code: int, *argv: str) -> str:
    """The one line on stderr of a command that ends with this code; nothing on stdout, no traceback."""
    assert main(list(argv)) == code
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    assert err.startswith("upparam: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_the_exit_codes(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert "exit codes: 0 fine" in capsys.readouterr().out


@pytest.mark.parametrize("command", [name for name in COMMANDS if "--drop" in _help(name)])
def test_only_what_there_is_can_be_dropped(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(_help(command).split()).replace("- ", "-")
    assert all(kind in text for kind in DROPPABLE)
    with pytest.raises(SystemExit) as caught:
        main([command, "a", "b", "--drop", "nonsense"])
    assert caught.value.code == 2 and "invalid choice: 'nonsense'" in capsys.readouterr().err


@pytest.mark.parametrize(("command", "names"), [("merge", FLOATS), ("edit", FLOATS), ("extract", FACTORS)])
def test_help_lists_the_dtypes_that_are_taken(command: str, names: tuple[str, ...]) -> None:
    said = re.search(r"--dtype DTYPE .*?: ([a-z0-9_, ]+) --", " ".join(_help(command).split()))
    assert said is not None and said[1] == listed(names)
    assert [named_dtype(name, "this", names).name for name in listed(names).split(", ")] == list(names)
    with pytest.raises(UsageError, match="no dtype for this"):
        named_dtype("float8_e8m0fnu", "this", names)


def test_no_command_and_unknown_commands_are_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "identify" in capsys.readouterr().out
    for argv in (["frobnicate"], ["identify"], ["identify", "x", "--no-such-option"]):
        with pytest.raises(SystemExit) as caught:
            main(argv)
        assert caught.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("command", ["identify", "inspect", "verify"])
def test_a_path_that_is_not_there(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = failing(capsys, 3, command, str(tmp_path / "nowhere.bin"))
    assert "nowhere.bin" in line and "No such file" in line


@pytest.mark.parametrize("command", ["identify", "inspect", "verify"])
def test_a_fifo_is_refused_and_not_waited_for(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    assert "FIFO" in failing(capsys, 3, command, str(tmp_path / "pipe.safetensors"))


def test_errors_are_json_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "nowhere.bin"), "--json"]) == 3
    facts = json.loads(capsys.readouterr().out)
    assert facts["exit_code"] == 3 and facts["file"].endswith("nowhere.bin")


def test_identify_as_text_and_json(lora: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["identify", str(lora)]) == 0
    text = capsys.readouterr().out
    assert "kohya" in text and "rank 4" in text and "0.5" in text
    assert main(["identify", str(lora), "--json"]) == 0
    ((report,),) = [identity["adapters"] for identity in json.loads(capsys.readouterr().out)]
    assert report["dialect"] == "kohya"
    assert report["scales"] == [{"scale": 0.5, "count": 1}]


def test_folders_below_are_named_and_looked_into_when_asked(lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "many"
    for name in ("one", "two/deep", ".hidden"):
        (root / name).mkdir(parents=True)
        shutil.copy(lora, root / name / "lora.safetensors")
    (root / "empty").mkdir()
    assert main(["identify", str(root)]) == 0
    text = capsys.readouterr().out
    assert "3 folders below were not looked into" in text and "empty, one, two" in text
    assert main(["identify", "-r", str(root), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [identity["path"] for identity in found] == [str(root / "one"), str(root / "two/deep")]
    assert all(identity["adapters"][0]["kind"] == "adapter" for identity in found)


def test_convert_writes_once_and_overwrites_only_when_forced(lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    argv = ["convert", str(lora), "--to", "diffusers", "--base", "sd1.5", "-o", str(out)]
    assert main(argv) == 0
    assert "bit-identical" in capsys.readouterr().out
    before = {path.name: path.read_bytes() for path in out.iterdir()} if out.is_dir() else {out.name: out.read_bytes()}
    assert "--force" in failing(capsys, 2, *argv)
    assert main([*argv, "--force"]) == 0
    after = {path.name: path.read_bytes() for path in out.iterdir()} if out.is_dir() else {out.name: out.read_bytes()}
    assert before == after


def test_an_unknown_dialect_lists_what_there_is(lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = failing(capsys, 2, "convert", str(lora), "--to", "esperanto", "-o", str(tmp_path / "out"))
    assert "esperanto" in line and "kohya" in line
    assert not (tmp_path / "out").exists()


def test_leftovers_are_refused_until_named(lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.numpy import load_file

    save_file(load_file(lora) | {"a_stranger.tensor": np.zeros(3, np.float32)}, lora)
    argv = ["convert", str(lora), "--to", "diffusers", "--base", "sd1.5", "-o", str(tmp_path / "out")]
    line = failing(capsys, 4, *argv)
    assert "a_stranger.tensor" in line and "--drop leftovers" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora.safetensors"]
    assert main([*argv, "--drop", "leftovers"]) == 0


def test_a_truncated_file_is_said_and_what_is_whole_is_listed(lora: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora.write_bytes(lora.read_bytes()[:-100])
    assert main(["verify", str(lora)]) == 3
    assert "lora.safetensors" in capsys.readouterr().err


def test_an_empty_folder_and_a_text_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("nothing here\n")
    assert main(["identify", str(tmp_path)]) == 0
    assert "text" in capsys.readouterr().out
    failing(capsys, 3, "inspect", str(tmp_path))


def test_a_closed_pipe_ends_quietly(lora: Path) -> None:
    command = f"{sys.executable} -m upparam identify {lora} --json | head -c 1"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_the_same_facts_for_machines(lora: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(lora), "--json"]) == 0
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert facts["sound"] and facts["targets"] == 1
    assert main(["inspect", str(lora), "--json", "--hash"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["modules"][0]["scale"] == 0.5 and len(facts["hashes"][0]["sha256"]) == 64


def test_a_name_with_an_ending_is_a_file(lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["convert", str(lora), "--base", "sd1.5"]
    assert main([*argv, "--to", "diffusers", "-o", str(tmp_path / "x.safetensors")]) == 0
    assert (tmp_path / "x.safetensors").is_file() and "bit-identical" in capsys.readouterr().out
    assert main([*argv, "--to", "diffusers", "-o", str(tmp_path / "folder")]) == 0
    assert (tmp_path / "folder" / "pytorch_lora_weights.safetensors").read_bytes() == (tmp_path / "x.safetensors").read_bytes()


def several_alphas(path: Path) -> Path:
    """An adapter of SD 1.5 in kohya's names whose middle block has another alpha than the two modules before it."""
    rng, middle = np.random.default_rng(1), STEM.replace("down_blocks_0", "mid_block")
    save_file(
        {f"{module}.{word}": value for module, width, alpha in ((STEM, 320, 4), (STEM.replace("to_q", "to_k"), 320, 4), (middle, 1280, 8))
         for word, value in (
             ("lora_up.weight", rng.standard_normal((width, 4)).astype(np.float16)),
             ("lora_down.weight", rng.standard_normal((4, width)).astype(np.float16)), ("alpha", np.array(alpha, np.float16)),
         )}, path,
    )  # fmt: skip
    return path


@pytest.mark.parametrize(
    ("to", "severity", "begins"), [("comfyui", "info", "diffusers fails to load"), ("kohya", "warning", "diffusers takes another alpha")]
)
def test_what_diffusers_makes_of_a_file_is_by_the_way_where_the_file_is_for_comfyui(
    to: str, severity: str, begins: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = several_alphas(tmp_path / "a.safetensors")
    argv = ["convert", str(source), "--base", "sd1.5", "--to", to, "-o", str(tmp_path / "b.safetensors")]
    assert main([*argv, "--json"]) == 0
    (finding,) = json.loads(capsys.readouterr().out)["findings"]
    assert (finding["code"], finding["severity"]) == ("diffusers-differs", severity) and finding["message"].startswith(begins)
    assert main([*argv, "--force"]) == 0
    assert capsys.readouterr().out.startswith({"info": "note: ", "warning": "warning: "}[severity])


@pytest.mark.parametrize("to", ["kohya", "diffusers", "peft"])
def test_a_folder_with_other_things_in_it_is_never_replaced(
    lora: Path, tmp_path: Path, to: str, capsys: pytest.CaptureFixture[str]
) -> None:
    full = tmp_path / "my-loras"
    full.mkdir()
    (full / "precious.safetensors").write_bytes(lora.read_bytes())
    argv = ["convert", str(lora), "--base", "sd1.5", "--to", to, "-o", str(full)]
    assert "--force" in failing(capsys, 2, *argv)
    assert ("a folder stands" if to == "kohya" else "precious.safetensors") in failing(capsys, 2, *argv, "--force")
    assert (full / "precious.safetensors").read_bytes() == lora.read_bytes()


def test_an_edit_never_replaces_a_folder_of_other_things(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.operations.test_verify import peft

    adapter = peft(tmp_path / "adapter")
    full = tmp_path / "full"
    full.mkdir()
    (full / "precious.txt").write_text("mine")
    assert "precious.txt" in failing(capsys, 2, "edit", str(adapter), "--dtype", "bfloat16", "-o", str(full), "--force")
    assert (full / "precious.txt").read_text() == "mine"
