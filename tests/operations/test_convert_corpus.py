"""Every real adapter goes to PEFT and to kohya with nothing left over, given its base; what no file says is asked for by the flag's name."""

from __future__ import annotations

from pathlib import Path

import pytest

from upparam.adapter import ExtraKind
from upparam.bases import inventory
from upparam.cli import main
from upparam.dialects.base import ReadOptions
from upparam.errors import RefusedError
from upparam.operations.convert import convert
from upparam.operations.opening import open_adapter
from upparam.operations.proof import prove_same

FILES: dict[str, tuple[str, int]] = {
    "cloneofsimo/lora_disney.safetensors": ("sd1.5", 192),
    "peft-bloom": ("bloom-560m", 48),
    "peft-distilbert-imdb": ("distilbert-base-uncased", 12),
    "peft-gpt2": ("gpt2", 12),
    "peft-gpt2-tigrinya": ("gpt2", 36),
    "peft-sd-unet": ("sd1.5", 64),
    "sam-lora/lora_rank2.safetensors": ("sam-vit-b", 24),
    "sd-vfph55/pytorch_lora_weights.safetensors": ("sd2", 128),
    "sd15-catundchat/pytorch_lora_weights.bin": ("sd1.5", 128),
    "sd15-catundchat/pytorch_lora_weights.safetensors": ("sd1.5", 128),
    "sd15-diffusers-old-bin/pytorch_lora_weights.bin": ("sd1.5", 128),
    "sd15-haseebae/pytorch_lora_weights.safetensors": ("sd1.5", 128),
    "sd15-justin/pytorch_lora_weights.safetensors": ("sd2", 128),
}
"""Adapter -> its base and how many targets it has."""
EXTRAS = {
    ("cloneofsimo/lora_disney.safetensors", "peft"): ("textual-inversion", 2),
    ("peft-distilbert-imdb", "kohya"): ("saved-module", 4),
    ("peft-gpt2", "kohya"): ("saved-module", 1),
}
"""What a dialect has no place for, and how many there are."""


def test_every_adapter_of_the_corpus_is_listed(corpus: Path) -> None:
    """But for the weights of an optimiser, a pointer, and the two that the files alone do not settle."""
    there = {path.parent.name for path in corpus.glob("*/*") if path.suffix in (".safetensors", ".bin", ".npz", ".pth")}
    assert there == {name.split("/")[0] for name in FILES} | {"lfs-pointer", "mlx-npz"}


@pytest.mark.parametrize("to", ["peft", "kohya"])
@pytest.mark.parametrize("name", FILES)
def test_every_adapter_goes_over_with_nothing_left(name: str, to: str, corpus: Path, tmp_path: Path) -> None:
    base, targets = FILES[name]
    read = ReadOptions(base=inventory.load(base))
    before = open_adapter(corpus / name, options=read)
    assert not before.leftovers and before.layout == "reference"
    assert len(before.deltas) == targets
    out = tmp_path / ("out.safetensors" if to == "kohya" else "out")
    drop, lost = EXTRAS.get((name, to), ("", 0))
    if lost:
        with pytest.raises(RefusedError, match=f"--drop {drop}"):
            convert(corpus / name, out, to, read=read)
        assert not out.exists()
    receipt = convert(corpus / name, out, to, read=read, drop=[drop] if drop else [])
    assert sum(finding.code == "given-up" for finding in receipt.findings) == lost
    after = open_adapter(out, options=read)
    assert not after.leftovers
    assert len(after.extras) == len(before.extras) - lost
    before.extras = [extra for extra in before.extras if extra.kind.value != drop]
    prove_same(before, after, tolerance=0.0)
    assert sum("proof" in fact for fact in receipt.modules) == len({target.module for target in before.deltas})


def test_tokens_ride_along_in_kohyas_bundles(corpus: Path, tmp_path: Path) -> None:
    source = corpus / "cloneofsimo/lora_disney.safetensors"
    convert(source, tmp_path / "out.safetensors", "kohya")
    tokens = [extra for extra in open_adapter(tmp_path / "out.safetensors").extras if extra.kind is ExtraKind.TEXTUAL_INVERSION]
    assert sorted(extra.name for extra in tokens) == ["<s1>", "<s2>"]
    convert(tmp_path / "out.safetensors", tmp_path / "back.safetensors", "cloneofsimo")
    prove_same(open_adapter(source), open_adapter(tmp_path / "back.safetensors"), tolerance=0.0)


def test_a_scale_that_no_file_says_is_asked_for(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for to in ("peft", "kohya"):
        out = tmp_path / ("folder" if to == "peft" else "file.safetensors")
        asked = [
            "convert",
            str(corpus / "mlx-npz/adapters.npz"),
            "--base",
            "mistral-7b",
            "--to",
            to,
            "-o",
            str(out),
        ]
        assert main(asked) == 4
        assert "--scale" in capsys.readouterr().err
        assert main([*asked, "--scale", "20"]) == 0
        after = open_adapter(out)
        assert {delta.scale for delta in after.deltas.values()} == {20.0}
        assert len(after.deltas) == 8


def test_a_base_that_is_not_its_own_is_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="32 of 128 targets do not fit the base named"):
        convert(
            corpus / "sd-vfph55/pytorch_lora_weights.safetensors", tmp_path / "out.safetensors", "kohya",
            read=ReadOptions(base=inventory.load("sd1.5")),
        )  # fmt: skip
