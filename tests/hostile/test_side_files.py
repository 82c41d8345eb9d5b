"""JSON beside the weights is a stranger's too: whatever stands in it, a command ends with a documented code and one line."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from upparam.cli import main
from upparam.operations.scan import Verdict, scan, scan_file

from .test_hostile import write_models

BODIES = {
    "empty": b"", "no-json": b"{", "list": b"[]", "text": b'"x"', "number": b"7", "null": b"null", "deep": b"[" * 200_000, "deep-object": b'{"r":' * 50_000 + b"1" + b"}" * 50_000,
    "long-number": b'{"peft_type":"LORA","r":' + b"9" * 6000 + b"}", "infinite": b'{"peft_type":"LORA","r":Infinity,"lora_alpha":NaN}', "float": b'{"peft_type":"LORA","r":1e400}',
    "twice": b'{"peft_type":"LORA","r":2,"r":4}', "bom": b"\xef\xbb\xbf{}", "utf-16": '{"r":2}'.encode("utf-16"), "not-utf-8": b'{"peft_type":"\xff"}', "surrogate": b'{"peft_type":"LORA","base_model_name_or_path":"\\ud800"}',
    "kinds": b'{"peft_type":{"a":1},"r":[2],"target_modules":7,"lora_alpha":"x","rank_pattern":[1],"alpha_pattern":"y","use_rslora":"no","modules_to_save":{"a":{}}}',
    "negative": b'{"peft_type":"LORA","r":-1,"lora_alpha":-2,"target_modules":[null,{"a":1}]}', "bad-pattern": b'{"peft_type":"LORA","r":2,"target_modules":"(((((","rank_pattern":{"(":2}}',
    "slow-pattern": b'{"peft_type":"LORA","r":2,"lora_alpha":2,"target_modules":"(a+)+$","rank_pattern":{"([a-z_.0-9]+)*X":3}}', "path": b'{"peft_type":"LORA","r":2,"lora_alpha":2,"base_model_name_or_path":"../../../../etc/passwd"}',
    "nul": b'{"peft_type":"LORA\\u0000","r":2}', "huge-list": b'{"peft_type":"LORA","r":2,"target_modules":[' + b'"a",' * 200_000 + b'"b"]}', "unknown-kind": b'{"peft_type":"OS.SYSTEM"}',
}  # fmt: skip


def run(words: list[object], capsys: pytest.CaptureFixture[str]) -> None:
    code = main([str(word) for word in words])
    shown = capsys.readouterr()
    assert code in (0, 1, 2, 3, 4) and "Traceback" not in shown.out + shown.err
    assert shown.err.count("\n") <= 1


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", BODIES)
def test_an_adapter_config(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_models(tmp_path)
    peft, out = tmp_path / "peft", ["-o", tmp_path / "out", "--force"]
    (peft / "adapter_config.json").write_bytes(BODIES[name])
    for words in (["identify", peft], ["inspect", peft], ["verify", peft], ["scan", peft], ["assemble", peft, "--to", "peft", *out], ["convert", peft, "--to", "kohya", *out],
                  ["merge", tmp_path / "base.safetensors", peft, *out], ["edit", peft], ["compare", peft, peft], ["resize", peft, "--rank", "1", *out]):  # fmt: skip
        run(words, capsys)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", BODIES)
def test_the_index_and_config_of_a_model(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_models(tmp_path)
    for side in ("model.safetensors.index.json", "config.json", "model_index.json"):
        model = tmp_path / side.split(".")[0]
        model.mkdir()
        (model / "model-00001-of-00001.safetensors").write_bytes((tmp_path / "base.safetensors").read_bytes())
        (model / side).write_bytes(BODIES[name])
        out = ["-o", tmp_path / "out", "--force"]
        for words in (["identify", model], ["merge", model, tmp_path / "peft", *out], ["merge", model, tmp_path / "peft", "--in-place"], ["undo", model],
                      ["verify", tmp_path / "peft", "--base", model], ["extract", model, tmp_path / "base.safetensors", "--to", "peft", *out], ["bases", model]):  # fmt: skip
            run(words, capsys)


@pytest.mark.parametrize(
    "shard",
    [
        "../secret.safetensors",
        "/etc/passwd",
        "a/../../secret.safetensors",
        "x\0y",
        "x\0y/z",
        "up/secret.safetensors",
        "",
        ".",
        7,
        None,
        ["a"],
    ],
)
def test_an_index_names_no_file_outside_its_folder(shard: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_models(tmp_path)
    secret = tmp_path / "secret.safetensors"
    secret.write_bytes((tmp_path / "base.safetensors").read_bytes())
    model = tmp_path / "model"
    model.mkdir()
    (model / "up").symlink_to(tmp_path)
    names = [f"model.layers.0.self_attn.{name}_proj.weight" for name in "qv"]
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, shard)}))
    before = secret.read_bytes()
    for words in (["merge", model, tmp_path / "peft", "-o", tmp_path / "out"], ["merge", model, tmp_path / "peft", "--in-place"]):
        assert main([str(word) for word in words]) in (1, 2, 3, 4)
        capsys.readouterr()
    assert secret.read_bytes() == before and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", BODIES)
def test_metadata_inside_safetensors(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Kohya, diffusers, cloneofsimo, OneTrainer and upparam itself keep JSON in metadata values."""
    import numpy as np
    from safetensors.numpy import save_file

    text = BODIES[name].decode("utf-8", "replace")
    keys = ("ss_network_args", "ss_network_dim", "ss_network_alpha", "lora_adapter_metadata", "unet", "text_encoder", "upparam.parts", "upparam.slices", "modelspec.architecture", "config", "format")  # fmt: skip
    module = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    for number, stem in enumerate((module, "unet:0", "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q")):
        names = (
            (f"{stem}.lora_up.weight", f"{stem}.lora_down.weight")
            if number == 0
            else (f"{stem}:up", f"{stem}:down")
            if number == 1
            else (f"{stem}.lora_B.weight", f"{stem}.lora_A.weight")
        )
        path = tmp_path / f"{number}.safetensors"
        save_file({names[0]: np.ones((8, 2), np.float32), names[1]: np.ones((2, 8), np.float32)}, path, dict.fromkeys(keys, text))
        for words in (
            ["identify", path],
            ["inspect", path],
            ["verify", path],
            ["edit", path],
            ["convert", path, "--to", "diffusers", "-o", tmp_path / "out", "--force"],
        ):
            run(words, capsys)


def test_what_is_no_regular_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "fifo.pt")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(tmp_path / "socket.pt"))
    (tmp_path / "dangling.pt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop.pt").symlink_to(tmp_path / "loop.pt")
    (tmp_path / "to-fifo.pt").symlink_to(tmp_path / "fifo.pt")
    (tmp_path / "device.pt").symlink_to("/dev/zero")
    for path in sorted(tmp_path.iterdir()):
        report = scan_file(path)
        assert report.unreadable and report.exit_code == 3, path
        for command in ("scan", "identify", "inspect", "verify"):
            assert main([command, str(path)]) in (1, 3)
            assert "Traceback" not in capsys.readouterr().err
    listening.close()


def test_a_folder_that_contains_itself(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "again").symlink_to(tmp_path)
    (tmp_path / "below" / "a.bin").write_bytes(b"x")
    assert [(report.path.name, report.passed_over) for report in scan([tmp_path], recursive=True)] == [("a.bin", False), ("again", True)]


def test_no_permission_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "secret.pt"
    path.write_bytes(b"x")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    assert main(["scan", str(path)]) == 3 and "ermission" in capsys.readouterr().out


def test_sarif_of_odd_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are percent-encoded, so that no viewer takes part of one for another address."""
    from urllib.parse import unquote_to_bytes, urlsplit

    monkeypatch.chdir(tmp_path)
    names = ["a b.pkl", "http:x.pkl", "50%41#?.pkl", "\udcff.pkl", "\x1b[2J\n.pkl", "ä.pkl"]
    for name in names:
        (tmp_path / name).write_bytes(b"\x80\x02cos\nsystem\n(U\x04truetR.")
    assert main(["scan", str(tmp_path), "--sarif", "out.sarif", "--quiet"]) == 1
    results = json.loads((tmp_path / "out.sarif").read_text())["runs"][0]["results"]
    uris = [result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] for result in results]
    assert {os.fsdecode(unquote_to_bytes(uri)) for uri in uris} >= set(names)
    assert all(uri.isascii() and not urlsplit(uri).scheme and not urlsplit(uri).query and not urlsplit(uri).fragment for uri in uris)
    assert all(report.verdict is Verdict.CODE for report in scan([tmp_path / name for name in names]))
