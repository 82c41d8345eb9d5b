"""Proof of a merge: sampled rows recomputed in float64 against what was written and read back; untouched tensors compared byte for byte."""

from __future__ import annotations

import random
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upparam.errors import VerificationError
from upparam.operations.merge.loaded import Loaded, matrix_shape
from upparam.operations.merge.rounding import widen
from upparam.tensors import DType, Tensor

SAMPLE_ELEMENTS = 1 << 22
"""Elements recomputed in all (their float64 values are kept until the output is read back: 32 MiB)."""
ROWS_PER_TENSOR = 2
_FLOAT32_ERROR = 2.0**-18
"""The same for float32 sums, allowed where the check of near-ties was left out."""
_REFERENCE_ERROR = 2.0**-46
"""How far the float64 reference itself may be off, relative to the largest sum of its row (thousands of terms, cancellation)."""
COMPARED_BYTES = 16 << 10


@dataclass
class Samples:
    """Rows of the result as float64 says they must be, gathered while the factors are in memory."""

    columns: int
    kept: list[tuple[str, int, slice, NDArray[np.float64]]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @staticmethod
    def for_works(count: int) -> Samples:
        """Samples sized so that `count` tensors stay within SAMPLE_ELEMENTS."""
        return Samples(max(64, min(4096, SAMPLE_ELEMENTS // max(1, ROWS_PER_TENSOR * count))))

    def observe(self, loaded: Loaded, start: int, stop: int) -> None:
        """Keep the reference of some rows in [start, stop): chosen by the tensor's name, the same in every run."""
        rows, columns = matrix_shape(loaded.work.tensor.shape)
        chooser = random.Random(f"{loaded.work.name}:{rows}x{columns}")
        for _ in range(ROWS_PER_TENSOR):
            row = chooser.randrange(rows) if rows else 0
            first = chooser.randrange(max(1, columns - self.columns + 1))
            if start <= row < stop:
                part = slice(first, min(columns, first + self.columns))
                true = loaded.reference(row, part)
                with self._lock:
                    self.kept.append((loaded.work.name, row, part, true))


def check_samples(samples: Samples, written: Mapping[str, Tensor], exact: bool = True) -> str:
    """Compare every sample with what was written (without `exact`, within what float32 sums allow). Returns the proof; raises VerificationError naming the first wrong element."""
    total, wrong, largest = 0, 0, 0.0
    for name, row, part, true in samples.kept:
        tensor = written[name]
        matrix = tensor.reshape(matrix_shape(tensor.shape))
        stored = matrix.rows(row, row + 1).read()[0, part]
        error, ulp = error_in_ulp(true, stored, tensor.dtype)
        reach = np.abs(true).max(initial=0.0) / ulp
        excess = error - 0.5 - (_REFERENCE_ERROR if exact else _FLOAT32_ERROR) * reach
        worst = int(excess.argmax()) if error.size else 0
        if error.size and not excess[worst] <= 0:
            raise VerificationError(
                "a merged element is not the correctly rounded sum", tensor=f"{name}[{row}, {part.start + worst}]",
                expected=f"{true[worst]!r}", found=f"{float(stored[worst])!r} ({error[worst]:.3g} ulp off)",
            )  # fmt: skip
        total += error.size
        wrong += int(np.count_nonzero(error > 0.5 + _REFERENCE_ERROR * reach))
        largest = max(largest, float(error.max(initial=0.0)))
    return (
        f"{total:,} elements in {len(samples.kept)} sampled rows recomputed in float64 from the adapters and read back: "
        f"{wrong:,} wrongly rounded, largest error {largest:.3f} ulp"
    )


def error_in_ulp(true: NDArray[np.float64], stored: NDArray[Any], dtype: DType) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """|stored - true| in units in the last place of `dtype` at `true` (0 where both overflow the same way), and that unit."""
    import ml_dtypes

    if not dtype.is_float:  # the bytes of a quantised weight must be equal
        return np.abs(stored.astype(np.float64) - true), np.ones_like(true)
    info = ml_dtypes.finfo(dtype.numpy)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        exponent = np.frexp(np.abs(true))[1] - 1
        ulp = np.ldexp(1.0, np.maximum(exponent, info.minexp) - info.nmant)
        found = widen(stored)
        error = np.abs(found - true) / ulp
        beyond = np.abs(true) >= float(info.max) * (1 + 2.0 ** -(info.nmant + 2))
    agree = beyond & (~np.isfinite(found) | (np.abs(found) == float(info.max)))
    error[agree] = 0.0
    both_nan = np.isnan(true) & np.isnan(found)
    error[both_nan] = 0.0
    return np.nan_to_num(error, nan=np.inf), ulp


def check_untouched(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> str:
    """Compare (base, written) tensors in pieces: the beginning, the end and one place between. Raises VerificationError."""
    total = 0
    for name, (base, written) in pairs.items():
        size = base.nbytes
        if not (base.is_contiguous and hasattr(base.source, "fileno")):
            if base.raw() != written.raw():
                raise VerificationError("an untouched tensor changed", tensor=name)
            total += size
            continue
        middle = random.Random(name).randrange(max(1, size - COMPARED_BYTES + 1))
        for at in {0, middle, max(0, size - COMPARED_BYTES)}:
            length = min(COMPARED_BYTES, size - at)
            if base.source.read(base.offset + at, length) != written.source.read(written.offset + at, length):
                raise VerificationError("an untouched tensor changed", tensor=name, found=f"bytes {at}..{at + length}")
            total += length
    return f"{len(pairs):,} untouched tensors equal the base in {total:,} sampled bytes"
