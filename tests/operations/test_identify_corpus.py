"""Every file of the corpus is what its manifest says: dialect, base, rank; leftovers and pointers are told for what they are."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

import pytest

from upparam.operations.identify import Identity, identify


class Expected(NamedTuple):
    kind: str
    dialect: str | None = None
    rank: int | None = None
    base: str | None = None
    scale: float | None = None


ADAPTERS = {
    "sd15-diffusers-old-bin/pytorch_lora_weights.bin": Expected("adapter-file", "diffusers-old", 4, "sd1.5", 1.0),
    "sd15-justin/pytorch_lora_weights.safetensors": Expected("adapter-file", "diffusers", 4, "sd2", 1.0),
    "peft-distilbert-imdb/adapter_model.safetensors": Expected("adapter-file", "peft", 8, "distilbert-base", 2.0),
    "peft-gpt2/adapter_model.safetensors": Expected("adapter-file", "peft", 8, "gpt2", 1.0),
    "sd15-catundchat/pytorch_lora_weights.bin": Expected("adapter-file", "diffusers-old", 4, "sd1.5", 1.0),
    "sd15-catundchat/pytorch_lora_weights.safetensors": Expected("adapter-file", "diffusers-old", 4, "sd1.5", 1.0),
    "cloneofsimo/lora_disney.safetensors": Expected("adapter-file", "cloneofsimo", 1, "sd1.5", 1.0),
    "mlx-npz/adapters.npz": Expected("adapter-file", "mlx", 8, None, None),
    "sd-vfph55/pytorch_lora_weights.safetensors": Expected("adapter-file", "diffusers", 4, "sd2", 1.0),
    "peft-bloom/adapter_model.bin": Expected("adapter-file", "peft", 8, "bloom-560m", 2.0),
    "peft-sd-unet/adapter_model.safetensors": Expected("adapter-file", "peft", 8, "sd1.5", 4.0),
    "peft-gpt2-tigrinya/adapter_model.safetensors": Expected("adapter-file", "peft", 8, "gpt2", 4.0),
    "sam-lora/lora_rank2.safetensors": Expected("adapter-file", "sam-lora", 2, "sam-vit-b", 1.0),
    "sd15-haseebae/pytorch_lora_weights.safetensors": Expected("adapter-file", "diffusers-old", 4, "sd1.5", 1.0),
}
OTHERS = {
    "sd15-justin/weights.pth": "full-model",
    "peft-distilbert-imdb/rng_state.pth": "rng-state",
    "peft-distilbert-imdb/scheduler.pt": "scheduler-state",
    "peft-distilbert-imdb/training_args.bin": "training-args",
    "peft-gpt2-tigrinya/training_args.bin": "training-args",
    "lfs-pointer/adapter_model.safetensors": "git-lfs-pointer",
    **{f"{folder}/adapter_config.json": "json" for folder in
       ("peft-distilbert-imdb", "peft-gpt2", "peft-bloom", "lfs-pointer", "peft-sd-unet", "peft-gpt2-tigrinya")},
}  # fmt: skip


def test_the_table_names_every_file_of_the_corpus(corpus: Path) -> None:
    with (corpus / "manifest.tsv").open(newline="") as stream:
        rows = {row["file"]: row for row in csv.DictReader(stream, delimiter="\t")}
    assert set(rows) == set(ADAPTERS) | set(OTHERS)
    for name, expected in ADAPTERS.items():
        assert rows[name]["rank"] == str(expected.rank)


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter(corpus: Path, name: str) -> None:
    expected = ADAPTERS[name]
    found = identify(corpus / name)
    (file,) = found.files
    assert (file.kind, file.dialect) == (expected.kind, expected.dialect)
    (report,) = found.adapters
    assert report.kind == "adapter"
    assert report.ranks.keys() == {expected.rank}
    assert report.scales.keys() == {expected.scale}
    assert report.algorithms.keys() == {"lora"}
    assert report.confidence >= 0.9
    assert all(finding.evidence for finding in report.findings if finding.code in ("dialect", "base"))
    names = {hint.name for hint in report.bases}
    if expected.base is not None:
        assert any(expected.base in hint.name or expected.base in hint.lookalikes for hint in report.bases), names
        assert report.bases[0].confidence > 0.4
    assert "leftovers" not in {finding.code for finding in report.findings}
    assert found.exit_code == 0


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_adapter(corpus: Path, name: str) -> None:
    found = identify(corpus / name)
    assert found.adapters == []
    assert [file.kind for file in found.files] == [OTHERS[name]]


def test_a_folder_with_training_leftovers(corpus: Path) -> None:
    found = identify(corpus / "peft-distilbert-imdb")
    kinds = {file.path.name: file.kind for file in found.files}
    assert kinds["adapter_model.safetensors"] == "adapter-file"
    assert kinds["training_args.bin"] == "training-args"
    assert len(found.adapters) == 1
    assert found.adapters[0].extras == {"saved-module": 4}


def test_two_files_with_the_same_adapter(corpus: Path) -> None:
    found = identify(corpus / "sd15-catundchat")
    (finding,) = [finding for finding in found.findings if finding.code == "several-adapters"]
    assert "use pytorch_lora_weights.safetensors" in finding.message


def test_a_pointer_says_what_to_do(corpus: Path) -> None:
    found: Identity = identify(corpus / "lfs-pointer" / "adapter_model.safetensors")
    (finding,) = found.files[0].findings
    assert "git lfs pull" in " ".join([finding.message, *finding.evidence])


def test_an_unknown_scale_is_said_and_never_filled_in(corpus: Path) -> None:
    (report,) = identify(corpus / "mlx-npz").adapters
    assert "scale-unknown" in {finding.code for finding in report.findings}
