"""A conversion is refused, and leaves nothing behind, where what lies in the written file is not what was meant: one bit is enough."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.matrix.specimens import specimen
from tests.operations.merging import adapter, lora

from upparam.adapter import Adapter
from upparam.bases import inventory
from upparam.containers import open_all
from upparam.dialects.base import ReadOptions
from upparam.errors import UpparamError, VerificationError
from upparam.operations import convert
from upparam.operations.convert import write_adapter
from upparam.sources import FileSource

BASE = inventory.load("llama-3-8b")
DIALECTS = ("peft", "kohya", "mlx", "gguf-lora", "loralib", "triad")


def meant(alpha: float | None = 8.0) -> Adapter:
    """Two modules of Llama 3 8B in float32: queries and keys of the first block."""
    rng = np.random.default_rng(0)
    deltas = {
        f"model.layers.0.self_attn.{name}_proj": lora(
            rng.standard_normal((out, 4)).astype(np.float32), rng.standard_normal((4, 4096)).astype(np.float32), alpha=alpha
        )
        for name, out in (("q", 4096), ("k", 1024))
    }
    return adapter(deltas, base=None, layout="reference")


def places(path: Path) -> list[tuple[Path, int]]:
    """The first, a middle and the last byte of every tensor in the files at a path."""
    found = []
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if not file.is_file() or file.suffix in (".json", ".md"):
            continue
        spans = [(0, file.stat().st_size)]  # headerless
        for one in open_all(file):
            spans = []
            for tensor in one.tensors.values():
                source, start = tensor.source, tensor.offset
                while not isinstance(source, FileSource):
                    source, start = source.parent, start + source.start  # type: ignore[attr-defined]
                spans.append((source.start + start, tensor.nbytes))
        found += [(file, start + at) for start, size in spans for at in {0, size // 2, size - 1}]
    return found


def flipping(monkeypatch: pytest.MonkeyPatch, number: int) -> list[int]:
    """Flip the lowest bit of the place of that number in every file between its writing and its proof; returns how many places there are."""
    prove: Any = convert._prove
    counts: list[int] = []

    def flipped(*args: Any) -> Any:
        (written,) = (arg for arg in args if isinstance(arg, Path))
        found = places(written)
        counts.append(len(found))
        file, at = found[number % len(found)]
        with file.open("r+b") as stream:
            stream.seek(at)
            byte = stream.read(1)[0]
            stream.seek(at)
            stream.write(bytes([byte ^ 1]))
        return prove(*args)

    monkeypatch.setattr(convert, "_prove", flipped)
    return counts


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("number", range(0, 12))
def test_one_flipped_bit_of_any_tensor_is_found(dialect: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = flipping(monkeypatch, number)
    with pytest.raises(UpparamError) as caught:
        write_adapter(meant(), tmp_path / "out", dialect, read=ReadOptions(base=BASE))
    assert isinstance(caught.value, VerificationError), caught.value
    assert counts and counts[0] >= 12, "every factor's first, middle and last byte has its turn"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", range(0, 24, 5))
def test_one_flipped_bit_of_factors_compared_by_dw_is_found(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kohya holds q, k and v of SAM's fused layers in one pair of factors, which are others than the parts': their dW alone would hide a bit."""
    read = ReadOptions(base=inventory.load("sam-vit-b"))
    receipt = write_adapter(specimen("plain", "sam-vit-b"), tmp_path / "sound.safetensors", "kohya", read=read)
    assert any("equal in dW" in line for line in receipt.lines())
    flipping(monkeypatch, number)
    with pytest.raises(VerificationError):
        write_adapter(specimen("plain", "sam-vit-b"), tmp_path / "out.safetensors", "kohya", read=read)
    assert [path.name for path in tmp_path.iterdir()] == ["sound.safetensors"]


@pytest.mark.parametrize("container", ["torch", "npy", "raw"])
def test_one_flipped_bit_in_other_containers_is_found(container: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flipping(monkeypatch, 3)
    with pytest.raises(UpparamError):
        write_adapter(meant(), tmp_path / "out", "triad", read=ReadOptions(base=BASE), options={"format": container})
    assert list(tmp_path.iterdir()) == []


def test_without_the_proof_nothing_is_claimed(tmp_path: Path) -> None:
    receipt = write_adapter(meant(), tmp_path / "out", "peft", read=ReadOptions(base=BASE), verify=False)
    assert not any("re-opened" in line for line in receipt.lines())
