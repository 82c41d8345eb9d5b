"""Element types of tensors. numpy is imported only where a numpy dtype is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from upparam.errors import MalformedError

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class DType:
    """An element type: its name here (numpy's and ml_dtypes' spelling), bytes per element and safetensors' code for it."""

    name: str
    itemsize: int
    code: str

    @property
    def is_float(self) -> bool:
        """True for real floating-point types of any width."""
        return "float" in self.name

    @property
    def numpy(self) -> np.dtype[Any]:
        """The numpy dtype (little-endian); ml_dtypes supplies bfloat16 and the fp8 family."""
        return _numpy_dtype(self.name)

    def __str__(self) -> str:
        return self.name


_TABLE = (
    ("float64", 8, "F64"), ("float32", 4, "F32"), ("float16", 2, "F16"), ("bfloat16", 2, "BF16"),
    ("float8_e4m3fn", 1, "F8_E4M3"), ("float8_e5m2", 1, "F8_E5M2"), ("float8_e8m0fnu", 1, "F8_E8M0"),
    ("float8_e4m3fnuz", 1, "F8_E4M3FNUZ"), ("float8_e5m2fnuz", 1, "F8_E5M2FNUZ"),
    ("int64", 8, "I64"), ("int32", 4, "I32"), ("int16", 2, "I16"), ("int8", 1, "I8"),
    ("uint64", 8, "U64"), ("uint32", 4, "U32"), ("uint16", 2, "U16"), ("uint8", 1, "U8"),
    ("bool", 1, "BOOL"), ("complex64", 8, "C64"), ("complex128", 16, "C128"),
)  # fmt: skip
DTYPES: dict[str, DType] = {name: DType(name, itemsize, code) for name, itemsize, code in _TABLE}
STRUCT_CODES = {
    "float64": "d", "float32": "f", "float16": "e", "int64": "q", "int32": "i", "int16": "h", "int8": "b",
    "uint64": "Q", "uint32": "I", "uint16": "H", "uint8": "B", "bool": "?",
}  # fmt: skip
"""How the struct module calls them, where it knows them."""
BY_CODE: dict[str, DType] = {dtype.code: dtype for dtype in DTYPES.values()}
"""By safetensors' code."""


@cache
def _numpy_dtype(name: str) -> np.dtype[Any]:
    import numpy as np

    if name == "bfloat16" or name.startswith("float8"):
        import ml_dtypes

        found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
        return found
    return np.dtype(name)


def dtype_of(array: np.ndarray[Any, Any] | np.dtype[Any]) -> DType:
    """The DType of a numpy array or dtype. Raises MalformedError for one that no adapter file can hold (object, str, ...)."""
    name = str(getattr(array, "dtype", array))
    try:
        return DTYPES[name]
    except KeyError:
        raise MalformedError("an array of this dtype is not tensor data", found=name) from None
