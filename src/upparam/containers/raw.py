"""Headerless tensors (`ndarray.tofile`): what the bytes may be, ranked, with how sure we are. Nothing in such a file says so itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from upparam.tensors import DType, Source, Tensor


@dataclass(frozen=True)
class RawGuess:
    """One reading of the bytes: dtype and shape, the probability we give it (0..1), and why."""

    dtype: DType
    shape: tuple[int, ...]
    confidence: float
    evidence: tuple[str, ...] = ()


def infer(source: Source, *, rank: int | None = None, dims: Sequence[int] = (), name: str = "") -> list[RawGuess]:
    """Readings of a headerless file, best first."""
    return []


def as_tensor(source: Source, guess: RawGuess) -> Tensor:
    """The bytes read as `guess` says. Raises MalformedError when they are not exactly as many."""
    tensor = Tensor(guess.dtype, guess.shape, source)
    tensor.check()
    return tensor
