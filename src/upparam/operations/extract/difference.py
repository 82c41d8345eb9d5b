"""The difference of two stored weights, and how much of it can be rounding."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, Any

from upparam.algorithms.base import tiles
from upparam.arrays import singles
from upparam.dtypes import DType
from upparam.errors import MalformedError, RefusedError
from upparam.tensors import Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PLAIN = frozenset(("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"))
"""Names of dtypes whose elements are the weights themselves."""
_TILE = 1 << 18
"""Elements subtracted at a time: a megabyte, which stays in the cache."""
_FIRST = 1 << 12
"""Elements compared before the rest is read."""
_SAMPLED = 512
"""Rows whose rounding is looked at."""
_SAFETY = 1.15
"""How far above the largest singular value expected of rounding noise a value must lie to count as signal."""


@dataclass(frozen=True)
class Difference:
    """tuned - base as float32 (out, rest), `total` = ||.||_F^2 in float64, and `floor`: the largest singular value that rounding can explain.

    `exact` when it is worth multiplying in float64: both are stored in 32 bits or more.
    """

    matrix: NDArray[np.float32]
    total: float
    floor: float
    exact: bool

    @property
    def norm(self) -> float:
        """||tuned - base||_F."""
        return sqrt(self.total)


def same_weights(tuned: Tensor, base: Tensor) -> bool:
    """True when one is the other, bit for bit or (floats) rounded to its dtype: nothing was trained. Reads tile by tile and stops at the first difference."""
    import numpy as np

    tuned, base = tuned.reshape(_flat(tuned)), base.reshape(_flat(tuned))
    floats = tuned.dtype.name in PLAIN and base.dtype.name in PLAIN
    narrow = tuned.dtype if tuned.dtype.itemsize <= base.dtype.itemsize else base.dtype
    rows = min(tuned.shape[0], max(1, _FIRST // max(1, tuned.shape[1])))
    for start, stop in [(0, rows), *tiles(tuned.shape)]:  # what differs mostly does so from the start
        one, other = tuned.rows(start, stop).read(), base.rows(start, stop).read()
        if one.dtype == other.dtype and np.array_equal(_bits(one), _bits(other)):
            continue
        with np.errstate(over="ignore", invalid="ignore"):
            if not floats or not np.array_equal(one.astype(narrow.numpy), other.astype(narrow.numpy)):
                return False
    return True


class Workspace(threading.local):
    """Each thread's memory for one difference at a time: fresh pages for every matrix would cost as much as the subtraction."""

    def __init__(self) -> None:
        import numpy as np

        self._buffer = np.empty(0, np.float32)

    def matrix(self, shape: tuple[int, int]) -> NDArray[np.float32]:
        """A float32 matrix of that shape, not initialised; the one given before is lost."""
        import numpy as np

        size = shape[0] * shape[1]
        if self._buffer.size < size:
            self._buffer = np.empty(size, np.float32)
        return self._buffer[:size].reshape(shape)


def square(part: NDArray[Any]) -> float:
    """The sum of squares, in float64."""
    import numpy as np

    wide = part.astype(np.float64)
    return float(np.vdot(wide, wide))


def difference(tuned: Tensor, base: Tensor, name: str, space: Workspace | None = None) -> Difference | None:
    """The difference as a matrix in `space`; None when there is none. Raises RefusedError for weights that are not plain floats, MalformedError when not finite.

    The noise is that of one rounding of each element to the coarser of the two dtypes: standard deviation ulp / sqrt(12). A random
    matrix of independent entries with these deviations has a largest singular value of about its largest row norm plus its largest
    column norm of deviations (Bandeira & van Handel 2016, "Sharp nonasymptotic bounds on the norm of random matrices").
    """
    import numpy as np

    if same_weights(tuned, base):
        return None
    for tensor in (tuned, base):
        if tensor.dtype.name not in PLAIN:
            raise RefusedError(
                "a weight that is quantised or not a float cannot be compared", tensor=name, found=tensor.dtype,
                remedy="extract from unquantised models, or leave it out with --skip",
            )  # fmt: skip
    shape = _flat(tuned)
    tuned, base = tuned.reshape(shape), base.reshape(shape)
    coarse = max((tuned.dtype, base.dtype), key=_epsilon)
    rows, columns = shape
    matrix = (space or Workspace()).matrix(shape)
    total = 0.0
    across = np.zeros(columns)
    largest_row = 0.0
    stride = max(1, rows // _SAMPLED)
    for start, stop in tiles(shape, _TILE):
        one, other = tuned.rows(start, stop).read(), base.rows(start, stop).read()
        part = matrix[start:stop]
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is told below, by name
            if one.dtype.itemsize == 8 or other.dtype.itemsize == 8:
                part[...] = one.astype(np.float64) - other.astype(np.float64)
                first = one.astype(np.float32)
            else:
                first = singles(one)
                np.subtract(first, singles(other), out=part)
            total += square(part)
        sample = first[(-start) % stride :: stride]
        if sample.size:
            variance = _variance(sample, coarse)
            across += variance.sum(axis=0) * stride
            largest_row = max(largest_row, float(variance.sum(axis=1).max()))
    if not np.isfinite(total):
        raise MalformedError("the weights or their difference are not finite", tensor=name)
    exact = min(tuned.dtype.itemsize, base.dtype.itemsize) >= 4
    # float32 products and the float32 difference itself add noise of their own.
    computed = sqrt(total) * (2e-8 if exact else 3e-7)
    floor = _SAFETY * (sqrt(largest_row) + sqrt(float(across.max(initial=0.0)))) + computed
    return Difference(matrix, total, floor, exact)


def _flat(tensor: Tensor) -> tuple[int, int]:
    rows = tensor.shape[0] if tensor.shape else 1
    return rows, tensor.numel // max(rows, 1)


def _bits(array: NDArray[Any]) -> NDArray[Any]:
    return array.view(f"u{array.dtype.itemsize}")


def _epsilon(dtype: DType) -> float:
    import ml_dtypes

    return float(ml_dtypes.finfo(dtype.numpy).eps)


def _variance(values: NDArray[np.float32], dtype: DType) -> NDArray[np.float32]:
    """Variance of the rounding of each value to `dtype`: ulp^2 / 12."""
    import ml_dtypes
    import numpy as np

    info = ml_dtypes.finfo(dtype.numpy)
    power = (values.view(np.uint32) & np.uint32(0x7F800000)).view(np.float32)  # 2^floor(log2 |value|)
    ulp = np.maximum(power, np.float32(max(float(info.smallest_normal), 1e-38))) * np.float32(info.eps)
    variance: NDArray[np.float32] = ulp * (ulp * np.float32(1 / 12))
    return variance
