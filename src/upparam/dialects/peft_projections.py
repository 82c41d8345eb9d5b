"""VeRA's projections where a file leaves them out: drawn again, as PEFT does, from the seed in its config and the sizes of the base.

Sources: huggingface/peft src/peft/tuners/vera/model.py (_kaiming_init, _find_dim, _init_vera_A_vera_B); pytorch's generator on the CPU, a
Mersenne twister of which each float32 takes 24 bits (aten/src/ATen/core/TransformationHelper.h uniform_real).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from math import sqrt
from typing import TYPE_CHECKING, Any

from upparam.bases.base import Base
from upparam.dialects.peft_config import number
from upparam.dialects.prefixes import change
from upparam.dtypes import DTYPES
from upparam.tensors import Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_LARGEST = 1 << 30
"""Numbers of one adapter's projections above which nothing is drawn: no base has such sizes."""


def seeded(config: Mapping[str, Any] | None) -> bool:
    """True where the config holds the seed of the projections, so that with the base they can be drawn."""
    return config is not None and number(config, "projection_prng_key") is not None


def missing(config: Mapping[str, Any] | None) -> str:
    """Why a VeRA without its projections cannot be applied, and what helps."""
    key = None if config is None else number(config, "projection_prng_key")
    if key is None:
        return (
            "the projections vera_A and vera_B are not in the file (save_projection was false), and neither is the seed from which PEFT draws them "
            "(projection_prng_key in its adapter_config.json); without both the adapter is dead"
        )
    return (
        "the projections vera_A and vera_B are not in the file (save_projection was false): PEFT draws them from "
        f"projection_prng_key {key:g} and the sizes of the base; name the base with --base and upparam draws the same"
    )


def drawn(config: Mapping[str, Any] | None, outs: Mapping[str, int], base: Base | None, component: str) -> dict[str, Tensor] | str:
    """vera_A (r, in) and vera_B (out, r) in float32 for modules with these outputs, in and out being the largest in the base; else why not."""
    key, rank = (None, None) if config is None else (number(config, "projection_prng_key"), number(config, "r"))
    if key is None or not rank or rank < 1 or base is None:
        return missing(config)
    naming = change(base, {module: (out, 0) for module, out in outs.items()}, component)
    known = [None if naming is None else base.by_path.get(naming(module)) for module in outs]
    shapes = [module.canonical for module in known if module is not None]
    if len(shapes) < len(outs):
        lost = next(module for module, found in zip(outs, known, strict=True) if found is None)
        return f"{missing(config)}; {base.name} is not that base, it has no {lost}"
    out, into = max(shape[0] for shape in shapes), max(shape[1] for shape in shapes)
    if (out + into) * int(rank) > _LARGEST:
        return f"{missing(config)}; projections of rank {rank:g} are too large to be drawn"
    both = _Drawn(int(key), int(rank), into, out)
    kind = DTYPES["float32"]
    return {
        "vera_A": Tensor.computed(kind, (both.rank, into), lambda: both.pair[0].copy(), "drawn from projection_prng_key"),
        "vera_B": Tensor.computed(kind, (out, both.rank), lambda: both.pair[1].copy(), "drawn from projection_prng_key"),
    }


class _Drawn:
    """The two projections of one adapter, drawn when first read: A first, then B from where A ended."""

    def __init__(self, seed: int, rank: int, into: int, out: int) -> None:
        self.seed, self.rank, self.into, self.out = seed, rank, into, out

    @cached_property
    def pair(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(A (r, in), B (out, r))."""
        import numpy as np

        count = self.rank * self.into
        draws = np.random.RandomState(self.seed & 0xFFFFFFFF).randint(0, 1 << 32, count + self.out * self.rank, dtype=np.uint32)
        first = _uniform(draws[:count], sqrt(6.0 / self.into)).reshape(self.rank, self.into)
        return first, _uniform(draws[count:], sqrt(6.0 / self.rank)).reshape(self.out, self.rank)


def _uniform(draws: NDArray[np.uint32], bound: float) -> NDArray[np.float32]:
    """Numbers in [-bound, bound): the low 24 bits as a fraction, times the width, plus the lower bound, rounded once."""
    import numpy as np

    low = np.float32(-bound)
    width = np.float32(np.float32(bound) - low)
    fraction = (draws & np.uint32(0xFFFFFF)).astype(np.float64) * 2.0**-24
    found: NDArray[np.float32] = (fraction * np.float64(width) + np.float64(low)).astype(np.float32)
    return found
