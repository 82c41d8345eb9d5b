"""Two checkpoints side by side: which tensor of one is which of the other, and which module of the base both mean.

Each is located by itself, so a fine-tune in the authors' single file pairs with a base in diffusers' folders.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from upparam.adapter import Target
from upparam.algorithms.slicing import take_rows
from upparam.bases.base import Base, Module
from upparam.bases.header import base_from_shapes
from upparam.bases.layouts import Order, available, layout
from upparam.checkpoint import Checkpoint
from upparam.errors import MismatchError, RefusedError
from upparam.operations.merge.matching import by_component, renaming
from upparam.patterns import regex
from upparam.tensors import Tensor

_PARAMETERS = ("weight", "bias")


_EMBEDDING = regex(r"(.*\.)?(embed_tokens|embed_positions|embed_in|wte|wpe|shared|(word|token|position|token_type)_embeddings?)")
"""Modules that look rows up, in the models of transformers; asked only where no inventory knows the class."""


_SCALES = ("scale_weight", "weight_scale", "weight_scale_inv", "weight.absmax", "SCB", "qzeros")
"""What lies beside a weight that is not its own value: fp8 scales (see `upparam.operations.merge.plan`), bitsandbytes, GPTQ."""


class Lying(NamedTuple):
    """Where a parameter of a reference module lies in a checkpoint: the tensor's name, its rows (None: all), their order, and whether
    the first two axes are swapped."""

    tensor: str
    rows: tuple[int, int] | None
    order: Order
    transposed: bool


@dataclass(frozen=True)
class Located:
    """A checkpoint's tensors under the reference names of its base: (module, parameter) -> where it lies."""

    checkpoint: Checkpoint
    base: Base
    places: Mapping[tuple[str, str], Lying]

    def tensor(self, key: tuple[str, str]) -> Tensor:
        """The parameter as the reference has it but for the transposition: a view. Raises RefusedError for a quantised or scaled weight."""
        place = self.places[key]
        file, tensor = self.checkpoint.tensors[place.tensor]
        scales = [place.tensor.removesuffix("weight") + ending for ending in _SCALES] if place.tensor.endswith(".weight") else []
        if place.tensor in {file.qualified(name) for name in file.quantised} or any(name in self.checkpoint.tensors for name in scales):
            raise RefusedError(
                "a quantised weight cannot be compared", file=file.path, tensor=place.tensor,
                remedy="extract from unquantised models, or leave it out with --skip",
            )  # fmt: skip
        if place.rows is not None:
            tensor = tensor.rows(*place.rows)
        return tensor if place.order.plain else take_rows(tensor, place.order.reference_rows(tensor.shape[0]))


class Pair(NamedTuple):
    """One parameter of one module in both checkpoints, in `tensor` of the tuned one (several share it where a weight is fused).

    `shape` is the weight's as (out, in, *kernel); with `transposed` the stored ones are (in, out).
    """

    target: Target
    tensor: str
    kind: str
    shape: tuple[int, ...]
    tuned: Tensor
    base: Tensor
    transposed: bool


@dataclass(frozen=True)
class Pairing:
    """Both checkpoints matched. `unnamed` are pairs of equal names that are no module of the base, `only_tuned` and `only_base` names that
    one has alone, `apart` how many modules were found in the tuned one and in the base alone, `unfit` pairs as they are stored that cannot be subtracted: quantised, or of other shapes.
    """

    base: Base
    pairs: tuple[Pair, ...]
    unnamed: Mapping[str, tuple[Tensor, Tensor]]
    only_tuned: tuple[str, ...]
    only_base: tuple[str, ...]
    unfit: Mapping[str, tuple[Tensor, Tensor]]
    apart: tuple[int, int]

    @property
    def partly(self) -> list[str]:
        """Parameters of modules that one of them has alone, in components (or first segments of the path) of which they have others in common."""
        common = {pair.target.module.partition(".")[0] for pair in self.pairs}
        alone = (*self.only_tuned[: self.apart[0]], *self.only_base[: self.apart[1]])
        return [name for name in alone if name.partition(".")[0] in common]


def locate(checkpoint: Checkpoint) -> Located:
    """A checkpoint under the names of the base that it is of."""
    return _under(checkpoint, base_from_shapes(checkpoint.shapes, config=checkpoint.config, name=str(checkpoint.path)))


def _under(checkpoint: Checkpoint, base: Base) -> Located:
    """The naming that finds most of the base's modules in the checkpoint."""
    shapes = checkpoint.shapes
    best: dict[tuple[str, str], Lying] = {}
    for name in ("reference", *available(base)[1:]):
        found = _lying(base, name, shapes)
        if len(found) > len(best):
            best = found
        if sum(parameter == "weight" for _, parameter in best) == len(base.modules):
            break
    return Located(checkpoint, base, best)


def _both(tuned: Checkpoint, base: Checkpoint) -> tuple[Located, Located]:
    """Both located, each by itself, or where that gives them no module in common, one of them by a naming of what the other holds."""
    one, other = locate(tuned), locate(base)
    if one.places.keys() & other.places.keys():
        return one, other
    candidates = [(one, _under(base, one.base)), (_under(tuned, other.base), other)]
    best = max(candidates, key=lambda found: len(found[0].places.keys() & found[1].places.keys()))
    return best if best[0].places.keys() & best[1].places.keys() else (one, other)


def _lying(base: Base, name: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[tuple[str, str], Lying]:
    one = layout(base, name)
    wanted: dict[Target, tuple[tuple[str, str], Lying]] = {}
    for module in base.modules:
        place = one.to_foreign(module.path)
        if place is None:
            continue
        part = place.part
        transposed = part.transposed or (name == "reference" and module.swapped)
        for parameter in _PARAMETERS:
            owner, _, leaf = one.tensor_name(place.foreign, parameter).rpartition(".")
            lying = Lying("", part.span, part.order, transposed and parameter == "weight")
            wanted[Target(owner, part.span, leaf)] = (module.path, parameter), lying
    found: dict[tuple[str, str], Lying] = {}
    for component, targets in by_component(wanted).items():
        weights = [target for target in targets if wanted[target][0][1] == "weight"]
        change = renaming(weights, shapes, component)
        for target in targets:
            path = change(target.module)
            tensor = target.parameter if not path else f"{path}.{target.parameter}"
            key, lying = wanted[target]
            if path is not None and tensor in shapes and (lying.rows is None or lying.rows[1] <= shapes[tensor][0]):
                found[key] = lying._replace(tensor=tensor)
    return found


def pair(tuned: Checkpoint, base: Checkpoint, chosen: Callable[[str], bool], *, strict: bool = True) -> Pairing:
    """Match two checkpoints of one model, those modules only whose path is `chosen`.

    Raises MismatchError when they share no module and when a weight has another shape in one of them, RefusedError for quantised weights;
    such weights are `unfit` instead when not `strict`.
    """
    one, other = _both(tuned, base)
    pairs = []
    unfit: dict[str, tuple[Tensor, Tensor]] = {}
    for key in one.places:
        if key in other.places and chosen(key[0]):
            mine, theirs = one.places[key], other.places[key]
            try:
                pairs.append(_pair(key, other.base.by_path[key[0]], mine, one.tensor(key), other.tensor(key), theirs.transposed))
            except (MismatchError, RefusedError):
                if strict:
                    raise
                unfit[mine.tensor] = (tuned.tensors[mine.tensor][1], base.tensors[theirs.tensor][1])
    named = {place.tensor for place in one.places.values()}
    theirs_named = {place.tensor for place in other.places.values()}
    rest = [name for name in tuned.tensors if name not in named and chosen(name)]
    common = {name: (tuned.tensors[name][1], base.tensors[name][1]) for name in rest if name in base.tensors and name not in theirs_named}
    if not one.places.keys() & other.places.keys() and (strict or not common):
        raise MismatchError(
            "the two models have no module in common", file=tuned.path,
            expected=f"names of {other.base.name}", found=f"names of {one.base.name}", remedy="give the model it was trained from",
        )  # fmt: skip
    missing = [".".join(key) for key in one.places if key not in other.places and chosen(key[0])]
    lacking = [".".join(key) for key in other.places if key not in one.places and chosen(key[0])]
    return Pairing(
        other.base, tuple(pairs), common, (*missing, *(name for name in rest if name not in common)),
        (*lacking, *(name for name in base.tensors if name not in theirs_named and name not in common)), unfit,
        (len(missing), len(lacking)),
    )  # fmt: skip


def _pair(key: tuple[str, str], module: Module, place: Lying, mine: Tensor, theirs: Tensor, other_transposed: bool) -> Pair:
    path, parameter = key
    shape = mine.shape
    if place.transposed:
        shape = (shape[1], shape[0], *shape[2:])
    if parameter == "weight" and prod(module.shape) == prod(shape):
        shape = module.canonical  # a 1x1 convolution where the file has a Linear, or the other way round
    if place.transposed != other_transposed and len(theirs.shape) == 2:
        theirs = theirs.T
    if theirs.shape != mine.shape and theirs.numel == mine.numel and theirs.shape[:1] == mine.shape[:1]:
        theirs = theirs.reshape(mine.shape)
    if theirs.shape != mine.shape:
        raise MismatchError(
            "a weight has another shape in the other model", tensor=".".join(key), expected=theirs.shape, found=mine.shape,
            remedy="leave it out with --skip",
        )  # fmt: skip
    return Pair(Target(path, None, parameter), place.tensor, _kind(module), shape, mine, theirs, place.transposed)


def _kind(module: Module) -> str:
    """The module's class; 'Embedding' by name where only a header is known."""
    return module.kind or ("Embedding" if _EMBEDDING.fullmatch(module.path) else "")
