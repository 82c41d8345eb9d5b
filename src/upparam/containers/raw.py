"""Headerless tensors (`ndarray.tofile`): what the bytes may be, ranked, with how sure we are. Nothing in such a file says so itself.

The element type is told by how short a description of the bytes each type allows: the values of a trained factor are spread smoothly
around zero, so read as the right type they cost few bits, and read as a wrong one the exponents scatter or the mantissas repeat.
The shape is told by which matrices of this many elements exist in practice (the rank and the base's dimensions when they are given) and
by the covariance of the columns: those of a trained up factor vary together, and only the right row length lines them up.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log, log2
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from upparam.containers.base import LONE, TensorFile
from upparam.containers.writing import chunks
from upparam.dtypes import DTYPES, DType
from upparam.errors import MalformedError
from upparam.patterns import regex
from upparam.sources import Source
from upparam.tensors import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SAMPLE = 64 * 1024
"""Bytes looked at in each of a few places to tell the element type."""
_PLACES = 4
_WHOLE = 64 << 20
"""Bytes up to which the whole file is looked at to tell the row length."""
_SURE = 0.97
"""No reading of bytes that name nothing is surer than this."""
_NOISE = 7.8
"""Bits per byte from which the bytes look like no numbers."""
_TELLING = 256
"""Bytes from which a sample says what it is."""
_LEAST = 0.005
"""Readings less likely than this are not listed."""
_EVIDENT = 64
"""Elements the type's evidence counts for at most: neighbours are alike, so more of them prove little more."""
_MAX_RANK = 1024
_GAIN_ELEMENTS = 1 << 20
_GAIN_SURE = 20.0
"""Nats from which the columns' covariance counts in full."""
_GAIN_WEIGHT = 20.0
"""How strongly a shape that explains less covariance than the best is marked down: by e to this power times the share it lacks."""
_GAIN_ACROSS = 2.0
"""The same between the two ways a matrix may lie: outputs come in heads of different scale, which looks like long rows."""
_PRIOR = {"float32": 0.5, "float16": 0.25, "bfloat16": 0.15, "float64": 0.06, "int8": 0.04}
_MANTISSA = {"float64": 52, "float32": 23, "float16": 10, "bfloat16": 7}
_RANKS = {1: 0.3, 2: 0.5, 4: 1.0, 8: 1.0, 16: 1.0, 32: 1.0, 64: 1.0, 128: 1.0, 256: 0.3}
_RARE_RANKS = frozenset((3, 5, 6, 10, 12, 20, 24, 40, 48, 80, 96, 160, 192, 320, 384, 512, 1024))
_DIMS = frozenset(
    (
        128, 192, 256, 320, 384, 512, 576, 640, 768, 896, 960, 1024, 1152, 1280, 1408, 1536, 1600, 1664, 1792, 1920, 2048, 2304, 2432, 2560,
        2816, 3072, 3200, 3328, 3584, 3840, 4096, 4304, 4352, 4544, 4608, 4864, 5120, 5504, 5632, 6144, 6400, 6656, 6912, 7168, 8192, 8960,
        9216, 9728, 10240, 11008, 12288, 13696, 13824, 14336, 15360, 16384, 17408, 17920, 18944, 20480, 21504, 22016, 24576, 25600, 27648,
        28672, 29568, 32768, 53248,
    )
)  # fmt: skip
"""Widths of layers in common language, vision and diffusion models."""
_ENDINGS = frozenset(("bin", "raw", "tofile", "dat", "f32", "f16", "bf16"))
_SPLIT = regex(r"[a-z_0-9]+-param\.\d+")
"""How `split --format raw` names its files."""
_UP = regex(r"(?:^|[^a-z])(?:up|lora_?b|w_b)(?![a-z])", re.I)
_DOWN = regex(r"(?:^|[^a-z])(?:down|lora_?a|w_a)(?![a-z])", re.I)


@dataclass(frozen=True)
class RawGuess:
    """One reading of the bytes: dtype and shape, the probability we give it (0..1), and why."""

    dtype: DType
    shape: tuple[int, ...]
    confidence: float
    evidence: tuple[str, ...] = ()


def infer(source: Source, *, rank: int | None = None, dims: Sequence[int] = (), name: str = "") -> list[RawGuess]:
    """Readings of a headerless file as a factor, likeliest first; empty when no type and shape fits its size.

    `rank` is the adapter's rank if the sibling factor told it, `dims` the widths of the base's layers, `name` the file's name: one that
    says up means (out, rank), one that says down (rank, in). The confidences of the list add up to at most 0.97, and to less where no
    reading makes the bytes look like numbers at all.
    """
    types, meaningful = _types(source)
    found: list[RawGuess] = []
    for dtype, likely, why in types:
        shapes = _shapes(source, dtype, rank, dims, name)
        found += [RawGuess(dtype, shape, likely * share, (*why, *reasons)) for shape, share, reasons in shapes]
    total = sum(guess.confidence for guess in found)
    if not total:
        return []
    scaled = [RawGuess(g.dtype, g.shape, g.confidence / total * _SURE * meaningful, g.evidence) for g in found]
    return sorted((guess for guess in scaled if guess.confidence >= _LEAST), key=lambda guess: -guess.confidence)


def may_be_factor(name: str) -> bool:
    """True for a file name that says up or down and does not say it is something else (`up-param.bin`, `lora_down.tofile`, `up.0.raw`)."""
    stem, _, ending = name.rpartition(".")
    if ending.lower() not in _ENDINGS:
        return False
    return bool(_UP.search(stem)) is not bool(_DOWN.search(stem)) or _SPLIT.fullmatch(stem) is not None


def unread(source: Source, path: Path) -> TensorFile:
    """A headerless file as a tensor file: its bytes under the name of a lone tensor, until `as_tensor` gives them a dtype and a shape."""
    return TensorFile(path, "raw", {LONE: Tensor(DTYPES["uint8"], (source.size,), source)})


def write(stream: IO[bytes], tensor: Tensor) -> None:
    """The elements alone, in C order, little-endian."""
    for chunk in chunks(tensor):
        stream.write(chunk)


def as_tensor(source: Source, guess: RawGuess) -> Tensor:
    """The bytes read as `guess` says. Raises MalformedError when the source does not hold exactly as many."""
    tensor = Tensor(guess.dtype, guess.shape, source)
    if tensor.nbytes != source.size:
        raise MalformedError(
            "a headerless file of another size", file=source.name, expected=f"{tensor.nbytes} bytes for {guess.dtype} {guess.shape}",
            found=source.size,
        )  # fmt: skip
    return tensor


def _types(source: Source) -> tuple[list[tuple[DType, float, tuple[str, ...]]], float]:
    """(dtype, probability, evidence), likeliest first; and how sure it is that the bytes are numbers of any of these types (0..1)."""
    import numpy as np

    costs: dict[str, tuple[float, str]] = {}
    for kind in _PRIOR:
        size = DTYPES[kind].itemsize
        if source.size and source.size % size == 0:
            values = np.concatenate([np.frombuffer(part, DTYPES[kind].numpy) for part in _sample(source)])
            costs[kind] = _cost(kind, values)
    if not costs:
        return [], 0.0
    # Factors take 5 to 7 bits per byte when read rightly; what takes 8 is packed, encrypted or of another kind. A few bytes tell nothing.
    meaningful = min(1.0, max(0.05, (_NOISE - min(cost for cost, _ in costs.values())) / 0.35)) * min(1.0, source.size / _TELLING)
    weight = min(source.size, 4 * _EVIDENT) * log(2)
    scores = {kind: log(_PRIOR[kind]) - cost * weight for kind, (cost, _) in costs.items()}
    best = max(scores.values())
    shares = {kind: exp(score - best) for kind, score in scores.items()}
    total = sum(shares.values())
    ranked = sorted(shares, key=lambda kind: -shares[kind])
    told = {kind: (f"as {kind} the values take {costs[kind][0]:.2f} bits per byte, {costs[kind][1]}",) for kind in ranked}
    return [(DTYPES[kind], shares[kind] / total, told[kind]) for kind in ranked], meaningful


def _sample(source: Source) -> list[bytes]:
    """A few places of the source, each starting on 8 bytes and a whole number of the widest element long when the source is."""
    if source.size <= _SAMPLE * _PLACES:
        return [source.read(0, source.size)]
    step = (source.size - _SAMPLE) // (_PLACES - 1)
    return [source.read(part * step // 8 * 8, _SAMPLE) for part in range(_PLACES)]


def _cost(kind: str, values: NDArray[Any]) -> tuple[float, str]:
    """Bits per byte that the values take when they are spread around zero with one scale, and a description of them."""
    import numpy as np

    size = DTYPES[kind].itemsize
    with np.errstate(all="ignore"):
        wide = np.abs(values.astype(np.float64))
        finite = np.isfinite(wide)
        filled = wide[finite & (wide > 0)]
        zeros = int((wide == 0).sum())
        if not len(filled):
            return (0.0 if zeros == len(wide) else 8.0), f"{zeros} of {len(wide)} are zero, none is another number"
        # A wrong type scatters over hundreds of binades: the median keeps the scale that of the bulk.
        scale = float(np.median(filled)) * 1.4826
        spacing = _spacing(kind, values, filled)
        scaled = filled / scale
        # Cauchy-like tails (a Student's t of 3 degrees) pass outliers and mixed modules at a few bits each.
        density = 2 * 0.3675525969478613 / scale / (1 + scaled**2 / 3) ** 2
        share = max(len(filled) / len(wide), 0.5 / len(wide))
        noise = 2.0 ** (-8 * size)
        likely = 0.999 * share * density / 2 * spacing + 0.001 * noise
        bits = float(-np.log2(likely).sum())
        bits += zeros * -log2(0.999 * max(zeros, 0.5) / len(wide) + 0.001 * noise) + int((~finite).sum()) * (8 * size - log2(0.001))
        prior = 0.0 if 1e-8 < scale < 1e2 or kind == "int8" else 0.5
    low, high = float(filled.min()), float(filled.max())
    text = f"magnitudes {low:.2g} to {high:.2g}, median {scale / 1.4826:.2g}"
    return bits / (len(wide) * size) + prior, text if finite.all() else f"{text}, {int((~finite).sum())} not finite"


def _spacing(kind: str, values: NDArray[Any], filled: NDArray[Any]) -> Any:
    """Distance to the next value, at the precision the values use (a float32 copy of float16 values leaves its low bits zero)."""
    import numpy as np

    if kind == "int8":
        return np.ones_like(filled)
    bits = _MANTISSA[kind]
    raw = values.view(f"u{values.dtype.itemsize}")
    used = int(np.bitwise_or.reduce(raw)) & ((1 << bits) - 1)
    precision = bits - ((used & -used).bit_length() - 1 if used else bits)
    return np.exp2(np.floor(np.log2(filled)) - precision)


def _shapes(
    source: Source, dtype: DType, rank: int | None, dims: Sequence[int], name: str
) -> list[tuple[tuple[int, ...], float, tuple[str, ...]]]:
    """(shape, share, evidence) of the matrices with this many elements. The shares add up to less where only unusual shapes fit."""
    count = source.size // dtype.itemsize
    up, down = bool(_UP.search(name)), bool(_DOWN.search(name))
    tall = 0.95 if up and not down else 0.05 if down and not up else 0.5
    named = () if up == down else (f"the name says {'up: (out, rank)' if up else 'down: (rank, in)'}",)
    weights: dict[tuple[int, ...], float] = {}
    reasons: dict[tuple[int, ...], tuple[str, ...]] = {}
    for size in [rank] if rank else _divisors(count):
        width = count // size
        if count % size or (rank is None and width < size):
            continue
        usual, why = _width_weight(width, dims)
        usual *= 1.0 if rank else _RANKS.get(size, 0.1 if size in _RARE_RANKS else 0.01)
        known = f"rank {size} {'is given' if rank else 'is common' if size in _RANKS else 'divides the size'}"
        sides: dict[tuple[int, ...], float] = {(size, width): 1 - tall, (width, size): tall}
        weights |= {shape: usual * side for shape, side in sides.items() if shape not in weights}
        reasons |= dict.fromkeys(sides, (known, why, *named))
    values = _values(source, dtype) if len(weights) > 1 else None
    if values is not None:
        gains = {shape: _gain(values, shape) for shape in weights}
        best = max(gains.values())
        for shape, gain in gains.items() if best >= 1 else ():
            # Between shapes that lie the same way the covariance decides; it is a weaker witness of the way they lie, which a name tells.
            alike = max(gains[other] for other in gains if (other[0] < other[1]) == (shape[0] < shape[1]))
            weights[shape] *= exp(_GAIN_WEIGHT * min(1, alike / _GAIN_SURE) * (gain / alike - 1)) if alike else 1.0
            weights[shape] *= exp(_GAIN_ACROSS * min(1, best / _GAIN_SURE) * (alike / best - 1))
            reasons[shape] += (f"its {min(shape)} columns vary together, worth {gain:.0f} of at most {best:.0f} nats",)
    total = sum(weights.values())
    usual = min(1.0, max(weights.values(), default=0.0)) ** 0.25
    return [(shape, weight / total * usual, reasons[shape]) for shape, weight in weights.items()]


def _width_weight(width: int, dims: Sequence[int]) -> tuple[float, str]:
    """How often a factor is this long, and why we say so."""
    if width in dims:
        return 1.0, f"{width} is a width of the base"
    rarer = 0.05 if dims else 1.0
    if width in _DIMS:
        return 0.3 * rarer, f"{width} is a common width"
    if width % 64 == 0:
        return 0.02 * rarer, f"{width} is a multiple of 64"
    if width % 8 == 0:
        return 0.004 * rarer, f"{width} is a multiple of 8"
    return 0.001 * rarer, f"{width} is an unusual width"


def _divisors(count: int) -> list[int]:
    return [size for size in range(1, _MAX_RANK + 1) if count and count % size == 0]


def _values(source: Source, dtype: DType) -> NDArray[Any] | None:
    """All values as float64, or None where they are too many, not finite or all zero."""
    import numpy as np

    if source.size > _WHOLE:
        return None
    with np.errstate(all="ignore"):
        values = np.frombuffer(source.read(0, source.size), dtype.numpy).astype(np.float64)
    peak = np.abs(values).max(initial=0.0)
    return values / peak if 0 < peak < float("inf") else None


def _gain(values: NDArray[Any], shape: tuple[int, ...]) -> float:
    """Nats by which a Gaussian with correlated columns describes the matrix better than one of equal independent elements.

    The long side is the samples, the rank the variables; the number of free parameters is charged for as in the Bayesian information
    criterion. The factor that starts at zero learns columns that vary together, and only its own row length lines them up.
    """
    import numpy as np

    matrix = values.reshape(shape)
    matrix = matrix if shape[0] >= shape[1] else matrix.T
    count, size = len(matrix), min(shape)
    matrix = matrix[: max(2 * size, _GAIN_ELEMENTS // size)]
    if count < 2 * size:
        return 0.0
    count = len(matrix)
    gram = matrix.T @ matrix / count
    level = float(np.trace(gram)) / size
    if level <= 0:
        return 0.0
    logdet = float(np.linalg.slogdet(gram / level + 1e-9 * np.eye(size))[1])
    return max(0.0, -0.5 * count * logdet - 0.25 * (size * (size + 1) - 2) * log(count))
