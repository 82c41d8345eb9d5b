"""Headerless factors: how often the guess is right on real factors, and that its confidence means what it says."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from upparam.containers import npy, raw, safetensors
from upparam.errors import MalformedError
from upparam.sources import FileSource, MemorySource
from upparam.tensors import Tensor

KINDS = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float64": np.float64}


def factors(corpus: Path) -> list[tuple[str, Tensor, bool]]:
    """(folder, matrix, is up) of every trained low-rank factor of the corpus that is stored as (out, rank) or (rank, in)."""
    found = []
    for path in [path for path in sorted(corpus.rglob("*.safetensors")) if path.stat().st_size > 1000]:
        for name, tensor in safetensors.read(FileSource(path), path).tensors.items():
            if len(tensor.shape) == 2 and min(tensor.shape) <= 64 < max(tensor.shape) and re.search(r"lora|:up|:down|w_[ab]_", name):
                found.append((path.parent.name, tensor, tensor.shape[0] > tensor.shape[1]))
    path = corpus / "mlx-npz" / "adapters.npz"
    for name, tensor in npy.archive.read(FileSource(path), path).tensors.items():
        found.append((path.parent.name, tensor.T, name.endswith("lora_b")))
    return found


def stored(tensor: Tensor, kind: str) -> MemorySource:
    return MemorySource(np.ascontiguousarray(tensor.read().astype(KINDS[kind])).tobytes(), "up-param.bin")


def belief(guesses: list[raw.RawGuess]) -> Counter[str]:
    """Summed confidence per dtype."""
    found: Counter[str] = Counter()
    for guess in guesses:
        found[guess.dtype.name] += guess.confidence
    return found


def test_the_dtype_of_every_real_factor(corpus: Path) -> None:
    # Every fifth of the corpus's 1,700 factors, in each type: none is told wrongly.
    tried = 0
    for _, tensor, up in factors(corpus)[::5]:
        for kind in KINDS:
            source = stored(tensor, kind)
            if not np.frombuffer(source.data, KINDS[kind]).astype(np.float64).any():
                continue
            beliefs = belief(raw.infer(source, rank=min(tensor.shape), name="up.bin" if up else "down.bin"))
            assert beliefs.most_common(1)[0][0] == kind, (tensor, kind, beliefs)
            assert beliefs[kind] > 0.9
            tried += 1
    assert tried > 1000


def test_the_shape_of_real_factors(corpus: Path) -> None:
    right: Counter[str] = Counter()
    calibration: dict[bool, list[float]] = {True: [], False: []}
    for folder, tensor, up in factors(corpus)[::7]:
        name = "up-param.bin" if up else "down-param.bin"
        source = stored(tensor, "float32")
        if not tensor.read().any():
            continue
        told = raw.infer(source, rank=min(tensor.shape), name=name)
        free = raw.infer(source, name=name)
        if folder != "mlx-npz":
            calibration[free[0].shape == tensor.shape].append(free[0].confidence)
        side = "up" if up else "down"
        right[f"{side} tried"] += 1
        right[f"{side} with the rank given"] += told[0].shape == tensor.shape
        right[f"{side} first"] += free[0].shape == tensor.shape
        right[f"{side} among three"] += any(guess.shape == tensor.shape for guess in free[:3])
    assert right["up with the rank given"] == right["up tried"] > 100 and right["down with the rank given"] == right["down tried"] > 100
    # Without the rank 95 of 124 ups and 85 of 122 downs come first: a down factor is nearly as random as it was initialised, and rank 1
    # (a third of these) has no columns that could vary together.
    assert right["up first"] >= 0.75 * right["up tried"] and right["up among three"] >= 0.95 * right["up tried"], right
    assert right["down first"] >= 0.69 * right["down tried"] and right["down among three"] >= 0.95 * right["down tried"], right
    sure = [hit for hit, values in calibration.items() for confidence in values if confidence >= 0.8]
    assert len(sure) > 50 and np.mean(sure) >= 0.95, "what is said with confidence is right"
    unsure = [(hit, confidence) for hit, values in calibration.items() for confidence in values if confidence < 0.55]
    assert len(unsure) > 50 and np.mean([hit for hit, _ in unsure]) > np.mean([confidence for _, confidence in unsure])


def normal(shape: tuple[int, ...], scale: float = 0.02) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape) * scale


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1e-6, 1e-4, 1e-2, 1.0, 30.0])
def test_dtype_across_magnitudes(kind: str, scale: float) -> None:
    if kind == "float16" and scale == 1e-6:
        pytest.skip("nearly all of it is below what float16 holds")
    source = MemorySource(normal((768, 8), scale).astype(KINDS[kind]).tobytes())
    assert belief(raw.infer(source, rank=8))[kind] > 0.9


def test_int8() -> None:
    values = (normal((768, 8), 1.0) * 30).clip(-127, 127).astype(np.int8)
    assert belief(raw.infer(MemorySource(values.tobytes()), rank=8))["int8"] > 0.9


@pytest.mark.parametrize("narrow", [np.float16, ml_dtypes.bfloat16])
def test_values_that_were_narrower_once(narrow: type) -> None:
    wide = normal((768, 8)).astype(narrow).astype(np.float32)
    assert belief(raw.infer(MemorySource(wide.tobytes()), rank=8))["float32"] > 0.9


def test_half_empty_and_poisoned_factors() -> None:
    values = normal((768, 8)).astype(np.float16)
    values[::2] = 0
    values[5] = np.nan
    values[7, 0] = np.inf
    guesses = raw.infer(MemorySource(values.tobytes()), rank=8)
    assert belief(guesses)["float16"] > 0.9 and "not finite" in guesses[0].evidence[0]


def test_zeros_say_nothing() -> None:
    guesses = raw.infer(MemorySource(bytes(768 * 8 * 4)), name="up-param.bin")
    assert guesses[0].confidence < 0.3 and {"float32", "float16"} <= set(belief(guesses))
    assert "are zero" in guesses[0].evidence[0]


@pytest.mark.parametrize("what", ["random", "text", "ramp"])
def test_what_is_no_numbers_is_told_with_no_confidence(what: str) -> None:
    data = {"random": np.random.default_rng(0).bytes(8192), "text": b"hello, this is a plain text. " * 300, "ramp": bytes(range(256)) * 32}[
        what
    ]
    assert sum(guess.confidence for guess in raw.infer(MemorySource(data))) < 0.2


def test_confidence_is_bounded_and_ranked() -> None:
    for rank in (None, 8):
        guesses = raw.infer(MemorySource(normal((4096, 8)).astype(np.float32).tobytes()), rank=rank, dims=[4096], name="x.bin")
        values = [guess.confidence for guess in guesses]
        assert values == sorted(values, reverse=True) and sum(values) <= 0.9701
        assert len({(guess.dtype.name, guess.shape) for guess in guesses}) == len(guesses)
    assert {guesses[0].shape, guesses[1].shape} == {(4096, 8), (8, 4096)} and guesses[0].confidence < 0.6, "no name: both ways stay open"


def test_names_dims_and_rank_are_evidence() -> None:
    source = MemorySource(normal((1536, 16)).astype(np.float32).tobytes())
    up = raw.infer(source, rank=16, name="up-param.bin")[0]
    down = raw.infer(source, rank=16, name="model.lora_A.bin")[0]
    assert up.shape == (1536, 16) and down.shape == (16, 1536) and up.confidence > 0.85
    assert any("name says up" in text for text in up.evidence) and any("rank 16 is given" in text for text in up.evidence)
    by_base = raw.infer(source, dims=[1536], name="up-param.bin")[0]
    assert by_base.shape == (1536, 16) and by_base.confidence > raw.infer(source, name="up-param.bin")[0].confidence
    assert not raw.infer(source, rank=7), "a rank that does not divide the size excludes every reading"


def test_a_learned_factor_shows_its_row_length() -> None:
    rng = np.random.default_rng(3)
    learned = rng.standard_normal((2048, 3)) @ rng.standard_normal((3, 12)) + 0.05 * rng.standard_normal((2048, 12))
    guess = raw.infer(MemorySource(learned.astype(np.float32).tobytes()), name="up-param.bin")[0]
    assert guess.shape == (2048, 12) and any("vary together" in text for text in guess.evidence)


def test_tiny_and_odd_sizes() -> None:
    assert raw.infer(MemorySource(b"")) == []
    rng = np.random.default_rng(0)
    for size in (1, 2, 3, 4, 5, 6, 7, 8, 9, 16):
        for _ in range(50):
            assert all(guess.confidence < 0.1 for guess in raw.infer(MemorySource(rng.bytes(size)))), "a few bytes tell nothing"
    assert (1, 1) in [guess.shape for guess in raw.infer(MemorySource(np.float32(16).tobytes()))]


def test_large_files_are_sampled(tmp_path: Path) -> None:
    path = tmp_path / "up-param.bin"
    path.write_bytes(normal((1 << 20,)).astype(np.float32).tobytes() * 20)
    read = []

    class Counting(FileSource):
        def read(self, offset: int, size: int) -> bytes:
            read.append(size)
            return super().read(offset, size)

    guess = raw.infer(Counting(path), rank=16, name="up-param.bin")[0]
    assert guess.dtype.name == "float32" and guess.shape == (20 << 16, 16) and sum(read) < 2_000_000


def test_as_tensor() -> None:
    array = normal((64, 4)).astype(np.float16)
    source = MemorySource(array.tobytes(), "up.bin")
    guess = next(guess for guess in raw.infer(source, rank=4, name="up.bin"))
    assert np.array_equal(raw.as_tensor(source, guess).read(), array)
    with pytest.raises(MalformedError, match="another size"):
        raw.as_tensor(MemorySource(bytes(10)), guess)
