"""A match that is `alone` ends the asking: no dialect after it in the table would have taken the file from it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.dialects.files import filled, tensor_file
from tests.matrix.specimens import FEATURES, specimen

from upparam import dialects
from upparam.bases import inventory
from upparam.containers import open_all
from upparam.containers.base import TensorFile
from upparam.dialects.base import NamedTensors
from upparam.errors import RefusedError, UpparamError

KEYSETS = json.loads((Path(__file__).parent / "keysets.json").read_text())


def skipped(file: TensorFile) -> tuple[bool, list[str]]:
    """Whether a match was alone, and the dialects that were not asked and would have been as sure of the file as the best that was."""
    found = dialects.matches(file)
    asked = {match.dialect for match in found}
    surest = max((match.confidence for match in found), default=0.0)
    every = [match for name in dialects.DIALECTS if (match := dialects.get(name).match(file)) is not None]
    return any(match.alone for match in found), sorted(
        match.dialect for match in every if match.dialect not in asked and match.confidence >= surest
    )


def written_files() -> Iterator[tuple[str, TensorFile]]:
    """Every feature of the round-trip matrix, as every dialect that holds it writes it."""
    for feature, (_, bases) in FEATURES.items():
        for base in bases:
            for dialect in dialects.DIALECTS:
                member = dialects.get(dialect)
                try:
                    package = member.write(specimen(feature, base), {"base": inventory.load(base)}) if member.writable else None
                except RefusedError:
                    continue
                for name, content in package.files.items() if package is not None else ():
                    if isinstance(content, NamedTensors):
                        file = tensor_file(content.tensors, content.metadata, name)
                        file.container = content.container
                        yield f"{feature} {base} {dialect} {name}", file


def test_what_dialects_write() -> None:
    cut = dict.fromkeys(dialects.DIALECTS, 0)
    for case, file in written_files():
        alone, missed = skipped(file)
        assert not missed, case
        cut[case.split()[-2]] += alone
    assert all(cut[name] for name in ("peft", "kohya", "diffusers")), cut


@pytest.mark.parametrize("name", sorted(KEYSETS))
def test_key_sets(name: str) -> None:
    assert not skipped(tensor_file(filled(KEYSETS[name])))[1]


@pytest.mark.parametrize("half", ["up", "down"])
@pytest.mark.parametrize("prefix", ["lora_unet_", "unet."])
def test_one_half_alone_may_be_a_triads(prefix: str, half: str) -> None:
    names = {f"{prefix}down_blocks_{block}_to_q.lora_{half}.weight": [320, 4] for block in range(4)}
    names = names if prefix == "lora_unet_" else {name.replace("_to_q", ".attn.to_q"): shape for name, shape in names.items()}
    found = dialects.matches(tensor_file(filled(names), name=f"lora_{half}.safetensors"))
    assert not any(match.alone for match in found) and found[0].dialect == "triad"


def test_real_files(corpus: Path) -> None:
    for path in sorted(corpus.rglob("*")):
        if path.suffix in (".safetensors", ".bin", ".pt", ".npz", ".gguf"):
            try:
                files = open_all(path)
            except UpparamError:
                continue
            for file in files:
                assert not skipped(file)[1], path
