"""A delta as the product that comparing works on: its factors as they are stored, or as its algorithm makes them, and how exact they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from upparam.algorithms.base import Delta, Update
from upparam.algorithms.lora import LoRA
from upparam.algorithms.relation import Form, Precision
from upparam.arrays import scratch
from upparam.dtypes import DTYPES, DType
from upparam.tensors import Tensor, lies_as_wanted

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_FLOAT32 = Precision(2.0**-24, 2.0**-150)


def stored_form(delta: Delta, side: int) -> Form | None:
    """A plain LoRA with its factors as they are stored, in memory that the thread uses again for its next delta of this side.

    None for others, and where float32 would round them.
    """
    if (
        type(delta) is not LoRA
        or delta.mid is not None
        or any(factor.dtype.itemsize > 4 or not factor.dtype.is_float for factor in (delta.up, delta.down))
    ):
        return None
    up, down = _read(delta.up, f"up {side}").reshape(-1, delta.rank), _read(delta.down, f"down {side}").reshape(delta.rank, -1)
    return Form(up, down, delta.known_scale(), precision(delta, (up, down)))


def _read(tensor: Tensor, place: str) -> NDArray[Any]:
    """The elements, in memory that lasts until the thread next reads to this place."""
    import numpy as np

    if not lies_as_wanted(tensor):
        return tensor.read()
    tensor.check()
    data = scratch(tensor.nbytes, place)
    tensor.source.readinto(tensor.offset, data)  # type: ignore[attr-defined]
    values: NDArray[Any] = np.ndarray(tensor.shape, tensor.dtype.numpy, data)
    return values


def form_of(delta: Delta, update: Update) -> Form | None:
    """A loaded delta through its low-rank form; None where it has none."""
    found = update.low_rank()
    return None if found is None else Form(*found, update.scale, precision(delta, found if type(delta) is LoRA else ()))


def precision(delta: Delta, values: tuple[NDArray[Any], ...] = ()) -> Precision:
    """The coarsest precision of its factors; of `values`, factors as they are stored, also one narrower than their dtype.

    A float32 file made from a 16-bit one is no more exact than that.
    """
    precisions = [unit(factor.dtype) for factor in delta.factors().values()] or [_FLOAT32]
    coarsest = max(precisions)
    if values and coarsest.unit <= _FLOAT32.unit:
        for name, zeros in (("bfloat16", 45), ("float16", 42)):
            if all(_ends_in_zeros(array, zeros) for array in values):
                return unit(DTYPES[name])
    return coarsest


def _ends_in_zeros(values: NDArray[np.float64], count: int) -> bool:
    """True when the last `count` of the 52 bits of every fraction are zero (of float32's 23, where the values are float32)."""
    import numpy as np

    kind, count = (np.uint64, count) if values.dtype == np.float64 else (np.uint32, count - 29)
    bits = np.ascontiguousarray(values).reshape(-1).view(kind)
    mask = kind((1 << count) - 1)
    return not any(np.bitwise_or.reduce(part) & mask for part in (bits[:64], bits) if part.size)


def unit(dtype: DType) -> Precision:
    """The precision of a dtype; of one finer than float32, float32's, in which tools compute."""
    if not dtype.is_float:
        return _FLOAT32
    import ml_dtypes

    info = ml_dtypes.finfo(dtype.numpy)
    return max(Precision(float(info.eps) / 2, float(info.smallest_subnormal) / 2), _FLOAT32)
