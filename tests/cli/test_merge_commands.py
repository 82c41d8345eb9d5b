"""The merge commands as a user runs them: what is printed, what is written, how they exit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.operations.merging import load, save

from upparam.cli import main

RNG = np.random.default_rng(4)


@pytest.fixture
def model(tmp_path: Path) -> tuple[Path, Path]:
    names = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj")
    base = tmp_path / "base"
    save(base / "model.safetensors", {f"{name}.weight": RNG.standard_normal((12, 16)).astype(np.float16) for name in names})
    (base / "config.json").write_text('{"model_type": "llama"}')
    adapter = tmp_path / "adapter"
    factors = {}
    for name in names:
        factors[f"base_model.model.{name}.lora_A.weight"] = RNG.standard_normal((2, 16)).astype(np.float32)
        factors[f"base_model.model.{name}.lora_B.weight"] = RNG.standard_normal((12, 2)).astype(np.float32)
    save(adapter / "adapter_model.safetensors", factors)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "fan_in_fan_out": False, "bias": "none"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return base, adapter


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_merge_writes_and_prints_a_receipt(model: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = model
    code, out, _ = run(capsys, "merge", base, f"{adapter}@0.5", "-o", tmp_path / "out")
    assert code == 0 and "2 tensors changed" in out and "0 wrongly rounded" in out
    code, out, _ = run(capsys, "merge", base, adapter, "-o", tmp_path / "out2", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["counts"]["tensors_changed"] == 2 and facts["operation"] == "merge"
    name = "model.layers.0.self_attn.q_proj.weight"
    weight, half, whole = (
        load(folder / "model.safetensors")[name].astype(np.float64) for folder in (base, tmp_path / "out", tmp_path / "out2")
    )
    factors = load(adapter / "adapter_model.safetensors")
    delta = (
        2.0
        * factors[f"base_model.model.{name[:-6]}lora_B.weight"].astype(np.float64)
        @ factors[f"base_model.model.{name[:-6]}lora_A.weight"]
    )
    assert np.array_equal(whole, (weight + delta).astype(np.float16)) and np.array_equal(half, (weight + 0.5 * delta).astype(np.float16))


def test_dry_run_shows_the_plan_and_writes_nothing(model: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = model
    before = sorted(tmp_path.rglob("*"))
    code, out, _ = run(capsys, "merge", base, adapter, "--dry-run", "--skip", "*.v_proj", "--block-weights", "*q_proj=0.25")
    assert code == 0 and "scale 0.5" in out and "left out: 1 target" in out and "would change 1 tensor " in out
    code, out, _ = run(capsys, "merge", base, adapter, "--dry-run", "--json")
    assert code == 0 and json.loads(out)["tensors_touched"] == 2
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("more", [[], ["--dtype", "fp32"], ["--only", "*.q_proj"]])
def test_dry_run_says_how_many_bytes_a_run_writes(
    model: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    base, adapter = model
    code, out, _ = run(capsys, "merge", base, f"{adapter}@0.123", adapter, *more, "--dry-run", "--json")
    said = json.loads(out)["bytes_written"]
    assert code == 0 and f"write {said:,} bytes" in run(capsys, "merge", base, f"{adapter}@0.123", adapter, *more, "--dry-run")[1]
    code, out, _ = run(capsys, "merge", base, f"{adapter}@0.123", adapter, *more, "-o", tmp_path / "o", "--json")
    assert code == 0 and json.loads(out)["counts"]["bytes"] == said == (tmp_path / "o/model.safetensors").stat().st_size


def test_dry_run_says_what_is_found_in_the_adapters_too(
    model: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, _ = model
    factors = {"lora_up.weight": RNG.standard_normal((12, 2)), "lora_down.weight": RNG.standard_normal((2, 16))}
    tensors = {f"lycoris_model_layers_0_self_attn_q_proj.{role}": array.astype(np.float32) for role, array in factors.items()}
    adapter = save(tmp_path / "a.safetensors", tensors, {"ss_network_dim": "64", "ss_network_module": "networks.lora"})
    code, out, _ = run(capsys, "merge", base, adapter, "--dry-run", "--json")
    planned = json.loads(out)["findings"]
    assert code == 0 and any("ss_network_dim" in str(finding) for finding in planned)
    code, out, _ = run(capsys, "merge", base, adapter, "-o", tmp_path / "o", "--json")
    assert code == 0 and json.loads(out)["findings"] == planned


def test_names_that_are_the_bases_are_not_said_to_be_unknown(
    model: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    factors = {"lora_B.weight": RNG.standard_normal((12, 2)), "lora_A.weight": RNG.standard_normal((2, 16))}
    own = "diffusion_model.blocks.0.mixer"
    adapter = save(tmp_path / "a.safetensors", {f"{own}.{role}": array.astype(np.float32) for role, array in factors.items()})
    base = save(tmp_path / "b.safetensors", {f"model.{own}.weight": RNG.standard_normal((12, 16)).astype(np.float16)})
    assert "base-unknown" in run(capsys, "inspect", adapter, "--json")[1]
    code, out, _ = run(capsys, "merge", base, adapter, "-o", tmp_path / "o.safetensors", "--json")
    assert code == 0 and json.loads(out)["findings"] == []


def test_what_is_taken_out_otherwise_than_it_was_merged_is_said(
    model: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the note in the model: how often the adapter is in it, all merges and unmerges counted; a model without one says nothing."""
    base, adapter = model
    other = tmp_path / "other"
    other.mkdir()
    (other / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    factors = load(adapter / "adapter_model.safetensors")
    save(other / "adapter_model.safetensors", {name: factor + 1 for name, factor in factors.items()})

    def said(merged: Path, words: str, out: str) -> list[str]:
        code, printed, _ = run(capsys, "unmerge", merged, words, "-o", tmp_path / out, "--json")
        assert code == 0
        return [found["message"] for found in json.loads(printed)["findings"] if found["code"] == "not-as-noted"]

    assert run(capsys, "merge", base, f"{adapter}@0.7", "-o", tmp_path / "once")[0] == 0
    assert run(capsys, "merge", tmp_path / "once", f"{adapter}@0.2", f"{other}@1", "-o", tmp_path / "twice")[0] == 0
    assert said(base, str(adapter), "a") == said(tmp_path / "once", f"{adapter}@0.7", "b") == []
    assert said(tmp_path / "twice", f"{adapter}@0.9", "c") == said(tmp_path / "twice", str(other), "d") == []
    assert said(tmp_path / "d", f"{adapter}@0.9", "e") == []
    assert said(tmp_path / "once", str(adapter), "f") == [
        "by the model's own note adapter was in it 0.7 times, and 1 times it was taken out"
    ]
    assert said(tmp_path / "once", str(other), "g") == [
        "the model's own note of what was merged into it does not name other; its negative was merged"
    ]
    assert said(tmp_path / "d", str(other), "h") == ["by the model's own note other was in it 0 times, and 1 times it was taken out"]


def test_in_place_undo_and_unmerge(model: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = model
    before = (base / "model.safetensors").read_bytes()
    code, out, _ = run(capsys, "merge", base, adapter, "--in-place")
    assert code == 0 and "upparam undo" in out and (base / "model.safetensors").read_bytes() != before
    code, out, _ = run(capsys, "unmerge", base, adapter, "-o", tmp_path / "back")
    assert code == 0 and "unmerge" in out
    code, out, _ = run(capsys, "undo", base)
    assert code == 0 and (base / "model.safetensors").read_bytes() == before
    assert run(capsys, "undo", base)[0] == 3


def test_refusals_and_exit_codes(model: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = model
    cases = (
        (2, "nowhere to write", ("merge", base, adapter)),
        (2, "already exists", ("merge", base, adapter, "-o", base)),
        (4, "scale 0", ("merge", base, f"{adapter}@0", "-o", tmp_path / "o")),
        (4, "would change nothing", ("merge", base, adapter, "-o", tmp_path / "o", "--only", "nothing.*")),
        (2, "no dtype", ("merge", base, adapter, "-o", tmp_path / "o", "--dtype", "int4")),
        *(
            (2, "what follows '@' is no scale", ("merge", base, f"{adapter}@{scale}", "-o", tmp_path / "o"))
            for scale in ("", "1,5", "1_0", "half")
        ),
        (3, "No such file", ("merge", base, f"{adapter}x@1,5", "-o", tmp_path / "o")),
        (2, "a file stands where the folder should go", ("merge", base, adapter, "-o", base / "config.json", "--force")),
        (3, "cannot lie in what is no folder", ("merge", base, adapter, "-o", base / "config.json/o")),
        (3, "No such file", ("merge", base, "@2", "-o", tmp_path / "o")),
        (3, "No such file", ("merge", tmp_path / "absent", adapter, "-o", tmp_path / "o")),
        (2, "not a block weight", ("merge", base, adapter, "-o", tmp_path / "o", "--block-weights", "sideways")),
    )
    for code, message, words in cases:
        found, _, errors = run(capsys, *words)
        assert (found, message in errors, errors.count("\n")) == (code, True, 1), errors
    assert not (tmp_path / "o").exists() and (base / "config.json").is_file()


@pytest.mark.parametrize("count", ["0", "-1", "x", "1.5", ""])
@pytest.mark.parametrize("command", ["merge", "convert"])
def test_threads_are_a_number(command: str, count: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "a", "b", "-o", "c", "--threads", count])
    assert f"{count!r} is no whole number of at least 1" in capsys.readouterr().err


STOPPED = """
import os, signal, sys
from upparam import beside
from upparam.cli import main
from upparam.operations.merge import stream
signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
real, numbers = stream.Change.run, [signal.Signals[sys.argv.pop(1)]]
def run(self, buffers):
    real(self, buffers)
    if numbers:
        os.kill(os.getpid(), numbers.pop())
stream.Change.run = run
tidy = beside._remove
def remove(folder):
    if twice:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    tidy(folder)
beside._remove = remove
twice = sys.argv.pop() == "twice"
sys.exit(main())
"""


@pytest.mark.parametrize(
    ("signal", "code", "times"),
    [("SIGINT", 130, "once"), ("SIGTERM", 143, "once"), ("SIGHUP", 0, "once"), ("SIGINT", 130, "twice"), ("SIGTERM", 143, "twice")],
)
def test_a_command_that_is_stopped_leaves_nothing_behind(
    model: tuple[Path, Path], tmp_path: Path, signal: str, code: int, times: str
) -> None:
    """Also when it is told to stop again while it cleans up."""
    base, adapter = model
    before = sorted(tmp_path.rglob("*"))
    told = ["merge", str(base), str(adapter), "-o", str(tmp_path / "out"), "-q", "--threads", "1"]
    words = [sys.executable, "-c", STOPPED, signal, *told, times]
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    assert ended.returncode == code, ended.stderr
    if code:
        again = "upparam: what was half-written is being removed; this takes a moment\n" * (2 if times == "twice" else 0)
        assert ended.stderr == again + "upparam: interrupted; nothing was left half-written\n" and sorted(tmp_path.rglob("*")) == before


def test_an_interrupt_before_the_work_begins_is_no_traceback(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("upparam.cli.importlib.import_module", interrupted)
    assert main(["merge", "a", "b"]) == 130
    assert capsys.readouterr().err == "upparam: interrupted; nothing was left half-written\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("words", "streams", "code", "said"),
    [
        ("merge {base} {adapter} -o {out}", ">&-", 0, ""),
        ("merge {base} {adapter} -o {out}", "<&- >&- 2>&-", 0, ""),
        ("merge {base} {adapter} -o {out}", "| true", 0, ""),
        (
            "merge {base} {adapter} -o {out}",
            "> /dev/full",
            3,
            "upparam: what was to be said could not be written: No space left on device\n",
        ),
        ("merge {base} {adapter}@0 -o {out}", "2>&-", 4, ""),
        ("merge {base} {adapter}@0 -o {out}", "2> /dev/full", 4, ""),
        ("merge {base} {adapter}@0 -o {out} --json", "> /dev/full 2> /dev/full", 4, ""),
        ("verify {adapter} --base {adapter}", "| true", 3, "upparam: "),
    ],
)
def test_streams_that_are_closed_or_full(
    model: tuple[Path, Path], tmp_path: Path, words: str, streams: str, code: int, said: str, unbuffered: str
) -> None:
    """The work is done, the exit code says how it went, and no traceback is seen."""
    base, adapter = model
    told = words.format(base=base, adapter=adapter, out=tmp_path / "out")
    script = f"set -o pipefail; {sys.executable} -m upparam {told} {streams}"
    ended = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=False, env={**os.environ, "PYTHONUNBUFFERED": unbuffered}
    )
    assert (ended.returncode, ended.stdout) == (code, "") and ended.stderr.startswith(said) and "Traceback" not in ended.stderr
    assert (tmp_path / "out/model.safetensors").exists() is (code in (0, 3) and "verify" not in words)
