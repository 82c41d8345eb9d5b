"""What a refusal of convert tells people to add, added: the files that lack something only they know."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from upparam.cli import main

Q = "model.layers.0.self_attn.q_proj"
VALUES = {"--alpha": "8", "--target": Q, "--base": "llama-3-8b"}
"""What the person at the keyboard knows."""


def peft(folder: Path, **config: object) -> Path:
    folder.mkdir()
    names = {f"base_model.model.{Q}.lora_A.weight": (4, 4096), f"base_model.model.{Q}.lora_B.weight": (4096, 4)}
    save_file({name: np.ones(shape, np.float32) for name, shape in names.items()}, folder / "adapter_model.safetensors")
    if config:
        told = {
            "peft_type": "LORA",
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj"],
            "base_model_name_or_path": "meta-llama/Meta-Llama-3-8B",
        }
        (folder / "adapter_config.json").write_text(json.dumps(told | config))
    return folder


def bare(folder: Path) -> Path:
    return peft(folder)


def mutated(folder: Path) -> Path:
    return peft(folder, init_lora_weights="pissa")


def nameless(folder: Path) -> Path:
    folder.mkdir()
    np.save(folder / "up-param.npy", np.ones((4096, 4), np.float32))
    np.save(folder / "down-param.npy", np.ones((4, 4096), np.float32))
    return folder


def stray(folder: Path) -> Path:
    path = peft(folder, inference_mode=True)
    from safetensors.numpy import load_file

    save_file(load_file(path / "adapter_model.safetensors") | {"stray": np.ones(3, np.float32)}, path / "adapter_model.safetensors")
    return path


def of_no_known_base(folder: Path) -> Path:
    return peft(folder, base_model_name_or_path=None)


@pytest.mark.parametrize("to", ["kohya", "lycoris", "mlx", "gguf-lora", "loralib", "peft"])
@pytest.mark.parametrize("make", [bare, mutated, nameless, stray, of_no_known_base])
def test_what_is_told_is_enough(make: object, to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make(tmp_path / "in")  # type: ignore[operator]
    given: list[str] = []
    for _ in range(4):
        code = main(["convert", str(path), "--to", to, "-o", str(tmp_path / "out"), "-q", *given])
        if code == 0:
            break
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert code in (2, 4), said
        named = re.findall(r"--drop [a-z-]+|--[a-z]+", said.rsplit(";", 1)[-1])
        new = next((option for option in named if option not in " ".join(given)), None)
        assert new is not None, said
        given += new.split() if " " in new else [new, VALUES[new]]
    assert code == 0
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "out"), "--base", "llama-3-8b"]) in (0, 1)


@pytest.mark.parametrize("dialect", ["kohya", "lycoris", "comfyui", "onetrainer", "xlabs"])
def test_a_base_that_was_named_and_is_another_is_said_to_be_so(dialect: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not that no base is known, with the advice to name one."""
    factors = {
        f"base_model.model.model.layers.{n}.self_attn.q_proj.lora_{word}.weight": np.ones((4, 4), np.float32)
        for n in (0, 1)
        for word in "AB"
    }
    (tmp_path / "a").mkdir()
    save_file(factors, tmp_path / "a" / "adapter_model.safetensors")
    (tmp_path / "a" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]})
    )
    command = ["convert", str(tmp_path / "a"), "--to", dialect, "-o", str(tmp_path / "out")]
    assert main(command) == 4 and "is not known" in capsys.readouterr().err
    assert main([*command, "--base", "sd1.5"]) == 4
    told = capsys.readouterr().err
    assert "2 of 2 targets do not fit the base named" in told and "sd1.5" in told and "is not known" not in told


@pytest.mark.parametrize(
    ("dialect", "name", "instead"),
    [("kohya", "lora.pt", "lora.safetensors"), ("lycoris", "lora.ckpt", "lora.safetensors"), ("peft", "lora.safetensors", "lora"),
     ("gguf-lora", "lora.safetensors", "lora.gguf")],
)  # fmt: skip
def test_the_ending_says_what_is_in_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dialect: str, name: str, instead: str
) -> None:
    """Loaders go by it: a name that promises another container is refused with one that does not."""
    source = peft(tmp_path / "peft", lora_alpha=8)
    words = ["convert", str(source), "--to", dialect, "--base", "llama-3-8b", "-q", "-o"]
    assert main([*words, str(tmp_path / name)]) == 4
    assert re.search(rf"such as {instead}$|name it {instead}$", capsys.readouterr().err.strip())
    assert not (tmp_path / name).exists()
    assert main([*words, str(tmp_path / instead)]) == 0
