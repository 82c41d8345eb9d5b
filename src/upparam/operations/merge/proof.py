"""Proof of a merge: sampled rows recomputed in float64 against what was written and read back; untouched tensors compared byte for byte."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from upparam.dtypes import DType
from upparam.errors import VerificationError
from upparam.operations.merge.loaded import Loaded, matrix_shape
from upparam.operations.merge.rounding import narrow, widen
from upparam.tensors import Tensor
from upparam.wording import counted

SAMPLE_ELEMENTS = 1 << 20
"""Elements recomputed in all (their float64 values are kept until the output is read back: 8 MiB)."""
ROWS_PER_TENSOR = 2
_FLOAT32_ERROR = 2.0**-18
"""The same for float32 sums, allowed where the check of near-ties was left out."""
_REFERENCE_ERROR = 2.0**-46
"""How far the float64 reference itself may be off, relative to the largest sum of its row (thousands of terms, cancellation)."""
COMPARED_BYTES = 16 << 10
_BATCH = 1 << 15
"""Elements that are checked at once."""


class Sample(NamedTuple):
    """A part of one row of a tensor (row, columns) and what it must be before rounding, in float64."""

    name: str
    row: int
    columns: slice
    true: NDArray[np.float64]


@dataclass
class Samples:
    """Rows of the result as float64 says they must be, gathered while the factors are in memory."""

    columns: int
    kept: list[Sample] = field(default_factory=list)
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
                true = loaded.reference(row, part).copy()  # not a view, which would keep the whole row
                with self._lock:
                    self.kept.append(Sample(loaded.work.name, row, part, true))


def check_samples(samples: Samples, written: Mapping[str, Tensor], exact: bool = True) -> str:
    """Compare every sample with what was written (without `exact`, within what float32 sums allow). Returns the proof; raises VerificationError naming the first wrong element."""
    total, wrong, largest, doubles, apart = 0, 0, 0.0, 0, 0.0
    for batch in _batches(samples, written):
        dtype = written[batch[0].name].dtype
        stored = np.concatenate([_row(written[sample.name], sample) for sample in batch])
        true = np.concatenate([sample.true for sample in batch])
        sizes = [sample.true.size for sample in batch]
        starts = np.cumsum([0, *sizes[:-1]])
        error, ulp = error_in_ulp(true, stored, dtype)
        sums = np.where(np.isfinite(true), np.abs(true), 0)  # a NaN or Inf of the base says nothing about its row
        reach = np.repeat(np.maximum.reduceat(sums, starts), sizes) / ulp
        excess = error - 0.5 - (_REFERENCE_ERROR if exact else _FLOAT32_ERROR) * reach
        worst = int(excess.argmax())
        if not excess[worst] <= 0:
            sample = batch[int(np.searchsorted(starts, worst, "right")) - 1]
            column = sample.columns.start + worst - int(starts[starts <= worst][-1])
            raise VerificationError(
                "a merged element is not the correctly rounded sum", tensor=f"{sample.name}[{sample.row}, {column}]",
                expected=f"{float(true[worst])!r}", found=f"{float(stored[worst])!r} ({error[worst]:.3g} ulp off)",
            )  # fmt: skip
        if dtype.name == "float64":  # sums in float64 round at each step, here and there
            doubles += error.size
            apart = max(apart, float(np.nan_to_num(error / reach, nan=0.0, posinf=0.0).max()))
            continue
        total += error.size
        wrong += int(np.count_nonzero(error > 0.5 + _REFERENCE_ERROR * reach))
        largest = max(largest, float(error.max()))
    said = [f"{wrong:,} wrongly rounded, largest error {largest:.3f} ulp"] if total or not doubles else []
    if doubles:
        said.append(f"{doubles:,} of float64 within {apart:.1e} of the largest of their row, as sums in float64 allow")
    head = f"{total + doubles:,} elements in {len(samples.kept)} sampled rows recomputed in float64 from the adapters and read back: "
    return head + ", ".join(said)


def _batches(samples: Samples, written: Mapping[str, Tensor]) -> Iterator[list[Sample]]:
    """Samples of one dtype together, some tens of thousands of elements at a time: fewer, longer vectors."""
    by_dtype: dict[DType, list[Sample]] = {}
    for sample in samples.kept:
        if not sample.true.size:
            continue
        batch = by_dtype.setdefault(written[sample.name].dtype, [])
        batch.append(sample)
        if sum(one.true.size for one in batch) >= _BATCH:
            yield by_dtype.pop(written[sample.name].dtype)
    yield from by_dtype.values()


def _row(tensor: Tensor, sample: Sample) -> NDArray[Any]:
    matrix = tensor.reshape(matrix_shape(tensor.shape))
    row: NDArray[Any] = matrix.rows(sample.row, sample.row + 1).read()[0, sample.columns]
    return row


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
    return (
        f"{counted(len(pairs), 'untouched tensor')} {'equals' if len(pairs) == 1 else 'equal'} the base in {counted(total, 'sampled byte')}"
    )


def check_converted(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> str:
    """Compare (source, written) of tensors that are added or in another dtype: rows at the beginning, the end and between. Raises VerificationError."""
    total = 0
    for name, (source, written) in pairs.items():
        rows, columns = matrix_shape(source.shape)
        count = max(1, COMPARED_BYTES // max(1, columns * source.dtype.itemsize))
        middle = random.Random(name).randrange(max(1, rows - count + 1))
        for start in {0, middle, max(0, rows - count)} if source.numel else ():
            first, second = (tensor.reshape((rows, columns)).rows(start, min(rows, start + count)).read() for tensor in (source, written))
            meant = first if source.dtype == written.dtype else narrow(widen(first), written.dtype)
            if meant.tobytes() != second.tobytes():
                raise VerificationError("a converted or added tensor reads back wrong", tensor=name, found=f"rows from {start}")
            total += first.size
    which = "is its" if len(pairs) == 1 else "are their"
    return f"{counted(len(pairs), 'converted or added tensor')} {which} source rounded once in {counted(total, 'sampled element')}"
