"""Factors multiplied or in another dtype: computed when read, every element rounded once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from upparam.errors import RefusedError
from upparam.tensors import DType, Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray


def multiplied(tensor: Tensor, factor: float, dtype: DType | None = None) -> Tensor:
    """Every element times `factor`, in `dtype` (its own when None). Raises RefusedError, when read, where a finite value does not fit."""
    wanted = dtype or tensor.dtype

    def make() -> NDArray[Any]:
        import numpy as np

        from upparam.operations.merge.rounding import NO_INFINITY, largest, narrow

        values = tensor.doubles()
        values *= factor
        size = np.abs(values[np.isfinite(values)]).max(initial=0.0)
        stored = narrow(values, wanted)
        if size > largest(wanted) and (wanted.name in NO_INFINITY or not np.isfinite(narrow(np.array([size]), wanted)).all()):
            raise RefusedError(
                f"a value does not fit in {wanted}", file=tensor.source.name, found=f"{size:.3g}", remedy="choose a wider dtype"
            )
        return stored

    return Tensor.computed(wanted, tensor.shape, make, tensor.source.name)


def recast(tensor: Tensor, dtype: DType) -> Tensor:
    """The same values in another float dtype; integers and tensors already of that dtype stay as they are."""
    return multiplied(tensor, 1.0, dtype) if tensor.dtype.is_float and tensor.dtype != dtype else tensor
