"""IA3: rows or columns of the weight multiplied, W' = diag(l) @ W for outputs, W @ diag(l) for inputs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from upparam.algorithms.base import BAKED, Delta, DependentUpdate, RowReader, Scaling
from upparam.errors import MalformedError
from upparam.tensors import Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class ScaledUpdate(DependentUpdate):
    """l, (out,) or (in,), in memory as float64."""

    def __init__(self, gain: NDArray[np.float64], on_input: bool, shape: tuple[int, ...]) -> None:
        self.gain, self.on_input, self.shape, self.scale = gain, on_input, shape, 1.0

    def merged(self, weight: RowReader, start: int, stop: int) -> NDArray[np.float64]:
        """Rows [start, stop) of W'."""
        rows = weight(start, stop)
        if self.on_input:
            rows.reshape(stop - start, len(self.gain), -1)[...] *= self.gain[:, None]
        else:
            rows *= self.gain[start:stop, None]
        return rows


@dataclass(frozen=True)
class IA3(Delta):
    """vector, of any shape with one axis that is not 1: a number for each output, or with `on_input` for each input channel.

    The numbers are l itself (huggingface/peft src/peft/tuners/ia3/layer.py), or with `from_one` what is added to 1 (KohakuBlueleaf/LyCORIS
    lycoris/modules/ia3.py). PEFT multiplies outputs with the module's bias in them, LyCORIS without: `with_bias` says so of a weight's delta,
    `bias` marks the delta of the bias itself.
    """

    algorithm: ClassVar[str] = "ia3"
    additive: ClassVar[bool] = False
    vector: Tensor
    on_input: bool = False
    from_one: bool = False
    with_bias: bool = False
    bias: bool = False
    scaling: Scaling = BAKED

    def __post_init__(self) -> None:
        bias = self.bias or self.with_bias
        if max(self.vector.shape, default=0) != self.vector.numel or not self.vector.numel or (bias and self.on_input):
            raise MalformedError("not a vector of outputs or inputs", found=self.vector.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, 0), (0, in), or (out,) of a bias; zeros are sizes that the vector does not tell."""
        if self.bias:
            return (self.vector.numel,)
        kernel = (0,) * (len(self.vector.shape) - 2)
        return (0, self.vector.numel, *kernel) if self.on_input else (self.vector.numel, 0, *kernel)

    @property
    def rank(self) -> None:
        """None."""
        return None

    def factors(self) -> Mapping[str, Tensor]:
        """`vector`."""
        return {"vector": self.vector}

    def idle(self, zeros: Collection[str]) -> bool:
        """True when 1 + 0 multiplies everything."""
        return self.from_one and bool(zeros)

    def beside(self) -> Mapping[str, Delta]:
        """The same numbers for the module's bias."""
        return {"bias": replace(self, with_bias=False, bias=True)} if self.with_bias else {}

    def load(self) -> ScaledUpdate:
        """The vector in memory as float64."""
        self.known_scale()
        return ScaledUpdate(self.vector.doubles().reshape(-1) + (1.0 if self.from_one else 0.0), self.on_input, self.shape)

    def cut_rows(self, start: int, stop: int) -> IA3:
        """The delta of rows [start, stop) alone: of inputs it is the same."""
        return self if self.on_input else replace(self, vector=self._along(self._flat.rows(start, stop)))

    def join_rows(self, others: Sequence[IA3]) -> IA3 | None:
        """The delta of the weight that stacks these; None where their inputs are multiplied by different numbers."""
        from upparam.algorithms.slicing import same_tensor, stack

        for other in others:
            if replace(other, vector=self.vector) != self or other.vector.dtype != self.vector.dtype:
                return None
            if self.on_input and not same_tensor(self.vector, other.vector):
                return None
        return self if self.on_input else replace(self, vector=self._along(stack([part._flat for part in (self, *others)])))

    def take_rows(self, rows: Sequence[int]) -> IA3:
        """The delta of the weight whose row i is this one's row `rows[i]`."""
        from upparam.algorithms.slicing import take_rows

        return self if self.on_input else replace(self, vector=self._along(take_rows(self._flat, rows)))

    @property
    def _flat(self) -> Tensor:
        return self.vector.reshape((self.vector.numel,))

    def _along(self, flat: Tensor) -> Tensor:
        """A vector of other length in the shape of this one."""
        shape = self.vector.shape
        axis = next((index for index, size in enumerate(shape) if size != 1), 0)
        return flat.reshape((*shape[:axis], flat.numel, *shape[axis + 1 :]))
