"""Factors multiplied or in another dtype: computed when read, every element rounded once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from upparam.dtypes import DType
from upparam.errors import RefusedError
from upparam.tensors import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray


def stored(values: NDArray[Any], dtype: DType, *, file: str | None = None, remedy: str = "choose a wider dtype") -> NDArray[Any]:
    """Computed values (float64 or float32) rounded once into `dtype`, same shape. What is not finite stays so.

    Raises RefusedError where a finite value does not fit.
    """
    import numpy as np

    from upparam.operations.merge.rounding import NO_INFINITY, largest, narrow

    size = largest_finite(values)
    if size > largest(dtype) and (dtype.name in NO_INFINITY or not np.isfinite(narrow(np.array([size]), dtype)).all()):
        raise RefusedError(f"a value does not fit in {dtype}", file=file, found=f"{size:.3g}", remedy=remedy)
    return narrow(values, dtype)


def largest_finite(values: NDArray[Any]) -> float:
    """The largest size of a finite value; 0.0 where there is none."""
    import numpy as np

    size = max(float(np.fmax.reduce(values, axis=None, initial=0.0)), -float(np.fmin.reduce(values, axis=None, initial=0.0)))
    return size if np.isfinite(size) else float(np.abs(values[np.isfinite(values)]).max(initial=0.0))


def multiplied(tensor: Tensor, factor: float, dtype: DType | None = None) -> Tensor:
    """Every element times `factor`, in `dtype` (its own when None). Raises RefusedError, when read, where a finite value does not fit."""
    wanted = dtype or tensor.dtype

    def make() -> NDArray[Any]:
        if factor == 1.0 and tensor.dtype.is_float and tensor.dtype.itemsize <= 4:
            return stored(tensor.floats(), wanted, file=tensor.source.name)
        values = tensor.doubles()
        values *= factor
        return stored(values, wanted, file=tensor.source.name)

    return Tensor.computed(wanted, tensor.shape, make, tensor.source.name)


def recast(tensor: Tensor, dtype: DType) -> Tensor:
    """The same values in another float dtype; integers and tensors already of that dtype stay as they are."""
    return multiplied(tensor, 1.0, dtype) if tensor.dtype.is_float and tensor.dtype != dtype else tensor
