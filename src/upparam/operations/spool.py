"""Results too large to hold: arrays written to a nameless file beside the output, and read from there as lazy tensors."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upparam.dtypes import dtype_of
from upparam.errors import MalformedError, UnreadableError
from upparam.tensors import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

Keep = Callable[["NDArray[Any]"], Tensor]
"""Where an operation puts the arrays it computes: `Tensor.of` holds them in memory, a spool's `keep` on disk."""


class Spool:
    """A nameless temporary file that grows by arrays; safe to share between threads. A Source: tensors made by `keep` read from it.

    It lies in `folder` (the output's, so that the space is where the output will be and not in memory) and is gone when closed, or
    with the process. Raises UnreadableError where the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.name = "results not yet written"
        self.size = 0
        self._lock = threading.Lock()
        try:
            self._file = tempfile.TemporaryFile(dir=folder, prefix=".upparam.")  # noqa: SIM115 - closed by close()
        except OSError as problem:
            raise UnreadableError(problem.strerror or str(problem), file=folder) from problem

    def keep(self, array: NDArray[Any]) -> Tensor:
        """Write the array and return the tensor that reads it."""
        import numpy as np

        array = np.ascontiguousarray(array).reshape(array.shape)
        data = array.reshape(-1).view(np.uint8).data if array.size else memoryview(b"")
        with self._lock:
            offset = self.size
            self.size += len(data)
        at = offset
        while len(data):
            count = os.pwrite(self._file.fileno(), data, at)
            data, at = data[count:], at + count
        return Tensor(dtype_of(array), tuple(array.shape), self, offset)

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset`."""
        buffer = bytearray(size)
        self.readinto(offset, memoryview(buffer))
        return bytes(buffer)

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`."""
        at = offset
        while buffer:
            count = os.preadv(self._file.fileno(), [buffer], at)
            if not count:
                raise MalformedError("a result was not kept whole", expected=f"{len(buffer)} bytes more at {at}", found=0)
            buffer, at = buffer[count:], at + count

    def close(self) -> None:
        """Give the space back; tensors made by `keep` can no longer be read."""
        self._file.close()

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()
