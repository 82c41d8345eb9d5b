"""Tiles of a merge on a GPU, through torch: the same bytes as on the processor.

Torch is imported here and nowhere else, and only when a device is asked for. The factors of a weight are uploaded once, the weight tile by
tile. Sums are float64 throughout, which leaves about one element in 10^7 open; those come back and are decided on the host in the fixed
order of every other route (see `in_float64`). A cast from float64 to a 16-bit type would round twice in torch, as it goes through float32:
`_narrow` rounds to odd first.

Every thread of the merge has a lane of its own, a stream and page-locked memory: while the tile of one thread is on the device, others
read and write files.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from upparam.dtypes import DType
from upparam.errors import UnreadableError, UsageError
from upparam.operations.merge.factors import LowRank
from upparam.operations.merge.in_float64 import overflows, settled

TILE_ELEMENTS = 1 << 22
"""Elements of a tile: enough work to hide what a launch costs, and about 0.3 GB on the device for each thread."""


def open_device(name: Any) -> OnDevice | None:
    """The device of that name: None for `cpu`, which is the kernel here; `cuda` or `cuda:N`. A `torch.device` is taken as it is.

    Raises UsageError for any other name, and where torch or the device is missing.
    """
    if name == "cpu":
        return None
    if isinstance(name, str) and name != "cuda" and not (name.startswith("cuda:") and name[5:].isdecimal()):
        raise UsageError("no such device", expected="cpu, cuda or cuda:N", found=name)
    try:
        import torch
    except ImportError as problem:
        raise UsageError(
            "torch is needed to merge on a device and cannot be imported",
            found=problem,
            remedy="install upparam[torch], or use --device cpu",
        ) from None
    if isinstance(name, str):
        if not torch.cuda.is_available():
            why = "torch was built without CUDA" if torch.version.cuda is None and torch.version.hip is None else "torch sees no GPU"
            raise UsageError("there is no CUDA device", found=why, remedy="use --device cpu")
        count, index = torch.cuda.device_count(), int(name[5:] or 0)
        if index >= count:
            raise UsageError("there is no such CUDA device", expected=f"cuda:0 to cuda:{count - 1}", found=name)
        name = torch.device("cuda", index)
    return OnDevice(name)


class _Factors(NamedTuple):
    """up (rows, R) and down (R, columns) on the device in float64, and what a sum of each row may be off."""

    up: Any
    down: Any
    bound: Any
    """(rows, 1)."""


class OnDevice:
    """A torch device that tiles are computed on; `elements` counts those that were."""

    def __init__(self, device: Any) -> None:
        """`device`: a `torch.device` that has float64."""
        import torch

        self.torch = torch
        self.device = device
        self.is_cuda = device.type == "cuda"
        self.name = f"{device} ({torch.cuda.get_device_name(device)})" if self.is_cuda else str(device)
        self.elements = 0
        self._lock = threading.Lock()

    def lane(self, widest: int) -> _Lane:
        """A new lane for the thread that asks, for rows of up to `widest` elements."""
        with self.failing():
            return _Lane(self, widest)

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Raise UnreadableError for what torch says when the device has not the memory, or fails."""
        try:
            yield
        except RuntimeError as problem:
            said = (str(problem).splitlines() or [""])[0]
            if isinstance(problem, self.torch.cuda.OutOfMemoryError) or "out of memory" in said:
                message, remedy = f"{self.name} has not enough free memory", "use fewer --threads, or --device cpu"
            else:
                message, remedy = f"{self.name} failed", "use --device cpu"
            raise UnreadableError(message, found=said, remedy=remedy) from problem

    def count(self, elements: int) -> None:
        """Note that so many elements were computed here."""
        with self._lock:
            self.elements += elements

    def factors(self, factors: LowRank) -> _Factors:
        """The factors on the device, uploaded once."""
        return factors.kept(f"on {self.device}", lambda: self._upload(factors))

    def _upload(self, factors: LowRank) -> _Factors:
        # R products in whatever order, each rounded at most R + 1 times, with a unit of 2^-53 (as in `in_float64`)
        reach = factors.row_norm[:, None] * ((factors.rank + 2) * 2.0**-52 * factors.widest) + 1e-300 * (factors.rank + 1)
        parts = _Factors(*(self.torch.from_numpy(part).to(self.device) for part in (factors.up64, factors.down64, reach)))
        if self.is_cuda:
            self.torch.cuda.current_stream(self.device).synchronize()  # lanes with other streams use them too
        return parts


class _Lane:
    """One thread's stream and page-locked memory."""

    def __init__(self, owner: OnDevice, widest: int) -> None:
        self._owner = owner
        torch = owner.torch
        self.elements = TILE_ELEMENTS
        self._stream = torch.cuda.Stream(owner.device) if owner.is_cuda else None
        self.raw = torch.empty(8 * max(widest, TILE_ELEMENTS), dtype=torch.uint8, pin_memory=owner.is_cuda).numpy()

    def _streaming(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else self._owner.torch.cuda.stream(self._stream)

    def add_low_rank(self, stored: NDArray[Any], dtype: DType, factors: LowRank, start: int) -> tuple[int, int]:
        """Change `stored` (rows, columns), C-contiguous, in place: round(W + up @ down). See `kernel.add_low_rank`.

        Raises UnreadableError where the device has not the memory, or fails.
        """
        with self._owner.failing(), self._streaming():
            return self._add(stored, dtype, factors, start)

    def _add(self, stored: NDArray[Any], dtype: DType, factors: LowRank, start: int) -> tuple[int, int]:
        torch, parts = self._owner.torch, self._owner.factors(factors)
        rows = slice(start, start + len(stored))
        codes = torch.from_numpy(stored.view(np.int32 if dtype.itemsize == 4 else np.int16))
        before = codes.to(self._owner.device, non_blocking=True)
        weight = before.view(getattr(torch, dtype.name))
        true = weight.to(torch.float64)
        true.addmm_(parts.up[rows], parts.down)
        reach = true.abs().mul_(2.0**-51).add_(parts.bound[rows])  # with the rounding of the last sum
        finite = weight.isfinite()
        uncertain = (self._narrow(true - reach, dtype) != self._narrow(true + reach, dtype)).logical_and_(finite)
        after = torch.where(true.isnan(), before, self._narrow(true, dtype))  # a NaN of the base stays bit for bit as it was
        places = uncertain.view(-1).nonzero().view(-1)
        certain = uncertain.logical_not_()
        infinite = after.view(weight.dtype).isfinite().logical_not_().logical_and_(finite)
        counts = torch.stack([(after != before).logical_and_(certain).sum(), infinite.logical_and_(certain).sum()])
        doubtful: NDArray[np.intp] = places.cpu().numpy()
        olds = before.view(-1)[places].cpu().numpy().view(dtype.numpy)
        codes.copy_(after, non_blocking=True)
        changed, over = counts.tolist()
        if self._stream is not None:
            self._stream.synchronize()
        if doubtful.size:
            news = settled(olds, dtype, factors, start, doubtful, stored.shape[1])
            stored.reshape(-1)[doubtful] = news
            changed += int(np.count_nonzero(news.view(f"u{dtype.itemsize}") != olds.view(f"u{dtype.itemsize}")))
            over += overflows(news, olds)
        self._owner.count(stored.size)
        return int(changed), int(over)

    def _narrow(self, values: Any, dtype: DType) -> Any:
        """The codes of float64 values rounded once into a dtype. To 16 bits by way of float32 rounded to odd (see `rounding.round_to_odd`)."""
        torch = self._owner.torch
        nearest = values.to(torch.float32)
        bits = nearest.view(torch.int32)
        if dtype.itemsize == 4:
            return bits
        back = nearest.to(torch.float64)
        inexact = (back != values).logical_and_(nearest.isfinite())
        bits -= (back.abs_() > values.abs()).logical_and_(inexact).to(torch.int32)  # toward zero
        bits |= inexact.to(torch.int32)
        return nearest.to(getattr(torch, dtype.name)).view(torch.int16)
