"""Proof that two adapters are the same: bit for bit where possible, else by the distance of dW measured through the factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import chain
from math import isclose, sqrt
from typing import Any, NamedTuple

from upparam.adapter import Adapter, Extra, Target
from upparam.algorithms.base import Delta, Update, tiles
from upparam.carrying import same_each
from upparam.errors import VerificationError
from upparam.operations.threads import in_threads
from upparam.progress import silent
from upparam.tensors import Tensor, same_bits
from upparam.wording import counted

TOLERANCE = 1e-6
"""Relative Frobenius distance of dW above which a re-expressed delta does not count as the same: a few float32 roundings of a factor."""


class ModuleProof(NamedTuple):
    """What was found about one module: `distance` is ||dW - dW'|| / ||dW||, None where factors and scale are the same."""

    module: str
    distance: float | None

    def facts(self) -> dict[str, Any]:
        """JSON-ready facts."""
        same = {"proof": "bit-identical"} if self.distance is None else {"proof": "equal in dW", "distance": self.distance}
        return {"module": self.module, **same}


def prove_same(meant: Adapter, found: Adapter, tolerance: float = TOLERANCE) -> list[str]:
    """Statements of what was checked; see `proved`."""
    return statements(proved(meant, found, tolerance), meant)


def statements(proofs: Sequence[ModuleProof], meant: Adapter) -> list[str]:
    """What was proved, for people."""
    told = []
    gaps = [proof.distance for proof in proofs if proof.distance is not None]
    if len(gaps) < len(proofs):
        told.append(f"re-opened: {len(proofs) - len(gaps)} of {len(proofs)} modules bit-identical in factors and equal in scale")
    if gaps:
        told.append(f"re-opened: {counted(len(gaps), 'module')} equal in dW (largest relative distance {max(gaps):.2g})")
    if meant.extras:
        told.append(f"{counted(len(meant.extras), 'extra')} bit-identical")
    return told


def proved(meant: Adapter, found: Adapter, tolerance: float = TOLERANCE) -> list[ModuleProof]:
    """What was found about each module. Raises VerificationError naming the first target that differs.

    A target passes when every factor has the same bits and the effective scale is equal, or when ||dW - dW'|| <= tolerance * ||dW||.
    Targets of one module that one side holds whole and the other in row slices are compared as whole modules.
    """
    if found.leftovers:
        raise VerificationError(
            f"{counted(len(found.leftovers), 'written tensor', 'reads', 'read')} back as unexplained", tensor=next(iter(found.leftovers))
        )
    proofs: list[ModuleProof] = []
    ours, theirs = _by_module(meant), _by_module(found)
    if set(ours) != set(theirs):
        missing = sorted(set(ours) ^ set(theirs))
        raise VerificationError(
            "the targets read back differ",
            expected=counted(len(ours), "module"),
            found=f"{len(theirs)}, other ones" if len(theirs) == len(ours) else f"{len(theirs)}",
            tensor=".".join(missing[0]),
        )

    def gaps_of(batch: list[tuple[str, str]]) -> list[float | None]:
        """For each module None for the same bits, else the distance."""
        pairs = [_factor_pairs(ours[module], theirs[module]) for module in batch]
        same = same_each([pair for found in pairs for pair in found or ()])
        gaps: list[float | None] = []
        at = 0
        for module, found in zip(batch, pairs, strict=True):
            stop = at + len(found or ())
            equal = found is not None and all(same[at:stop])
            gaps.append(None if equal else distance(ours[module], theirs[module]))
            at = stop
        return gaps

    batches = _batches(ours)
    gaps = in_threads(gaps_of, batches, [len(batch) for batch in batches], None, silent)
    for module, gap in zip(ours, chain.from_iterable(gaps), strict=True):
        if gap is None:
            proofs.append(ModuleProof(_name(module), None))
            continue
        if not gap <= tolerance:
            raise VerificationError(
                "dW read back differs", tensor=".".join(module), expected=f"relative distance <= {tolerance:g}", found=f"{gap:.3g}"
            )
        proofs.append(ModuleProof(_name(module), gap))
    _same_extras(meant.extras, found.extras)
    return proofs


_BATCH = 4 << 20
"""Bytes of factors that a thread takes at a time: handing over a module costs as much as comparing a small one."""


def _batches(modules: Mapping[tuple[str, str], Mapping[Target, Delta]]) -> list[list[tuple[str, str]]]:
    """The modules in order, in groups of about as many bytes of factors."""
    found: list[list[tuple[str, str]]] = [[]]
    held = 0
    for module, pieces in modules.items():
        if held > _BATCH:
            found.append([])
            held = 0
        found[-1].append(module)
        held += sum(factor.nbytes for delta in pieces.values() for factor in delta.factors().values())
    return found


def _name(module: tuple[str, str]) -> str:
    path, parameter = module
    return path if parameter == "weight" else f"{path}.{parameter}"


def same_delta(one: Delta, other: Delta) -> bool:
    """Same algorithm, same factor bits by role, same effective scale (or both unknown), and all else that decides what happens to a weight."""
    pairs = _pairs(one, other)
    return pairs is not None and all(same_bits(*pair) for pair in pairs)


def _factor_pairs(pieces: Mapping[Target, Delta], others: Mapping[Target, Delta]) -> list[tuple[Tensor, Tensor]] | None:
    """The factors of one module on both sides, of which the bits decide whether it is the same; None where it is not whatever they are."""
    if pieces.keys() != others.keys():
        return None
    found = [_pairs(delta, others[target]) for target, delta in pieces.items()]
    return None if None in found else [pair for pairs in found for pair in pairs or ()]


def _pairs(one: Delta, other: Delta) -> list[tuple[Tensor, Tensor]] | None:
    """The factors of both by role; None where the deltas differ in anything else that decides what happens to a weight."""
    if one.algorithm != other.algorithm or one.shape != other.shape or not _same_choices(one, other):
        return None
    mine, theirs = one.factors(), other.factors()
    if mine.keys() != theirs.keys():
        return None
    if one.scale is None or other.scale is None:
        if one.scale is not other.scale:
            return None
    elif not isclose(one.scale, other.scale, rel_tol=1e-12):
        return None
    return [(factor, theirs[role]) for role, factor in mine.items()]


def _same_choices(one: Delta, other: Delta) -> bool:
    """True when deltas whose change depends on the weight agree in what is neither factor nor scale (a constraint, the axis of a vector)."""
    if one.additive or type(one) is not type(other):
        return one.additive == other.additive
    mine, theirs = (
        {item.name: value for item in fields(delta) if isinstance(value := getattr(delta, item.name), (bool, int, float))}  # type: ignore[arg-type]
        for delta in (one, other)
    )
    return mine.keys() == theirs.keys() and all(isclose(value, theirs[name], rel_tol=1e-12) for name, value in mine.items())


def distance(pieces: dict[Target, Delta], others: dict[Target, Delta]) -> float:
    """||dW - dW'||_F / ||dW||_F over one module's targets, each a map of row slices; tile by tile in float64.

    Algorithms without a dW of their own (not additive) cannot be compared so: infinity unless they are the same.
    """
    if not all(delta.additive for delta in (*pieces.values(), *others.values())):
        return float("inf")
    if any(delta.scale is None for delta in (*pieces.values(), *others.values())):
        return float("inf")
    high = max(_stop(target, delta) for target, delta in (*pieces.items(), *others.items()))
    rest = next(iter(pieces.values())).shape[1:]
    mine, theirs = _loaded(pieces), _loaded(others)
    total = gap = 0.0
    for start, stop in tiles((high, *rest)):
        one, other = _rows(mine, start, stop), _rows(theirs, start, stop)
        if one.shape != other.shape:
            return float("inf")
        total += float((one * one).sum())
        gap += float(((one - other) ** 2).sum())
    if total == 0.0:
        return 0.0 if gap == 0.0 else float("inf")
    return sqrt(gap / total)


def _by_module(adapter: Adapter) -> dict[tuple[str, str], dict[Target, Delta]]:
    found: dict[tuple[str, str], dict[Target, Delta]] = {}
    for target, delta in adapter.deltas.items():
        found.setdefault((target.module, target.parameter), {})[target] = delta
    return found


def _stop(target: Target, delta: Delta) -> int:
    return target.rows[1] if target.rows else delta.shape[0]


def _loaded(pieces: dict[Target, Delta]) -> list[tuple[int, int, Update]]:
    return [(target.rows[0] if target.rows else 0, _stop(target, delta), delta.load()) for target, delta in pieces.items()]


def _rows(loaded: list[tuple[int, int, Update]], start: int, stop: int):  # type: ignore[no-untyped-def]
    import numpy as np

    width = next(update.rows(0, 1).shape[1] for _, _, update in loaded)
    rows = np.zeros((stop - start, width))
    for low, high, update in loaded:
        first, last = max(start, low), min(stop, high)
        if first < last:
            rows[first - start : last - start] += update.rows(first - low, last - low)
    return rows


def _same_extras(meant: list[Extra], found: list[Extra]) -> None:
    theirs = {(extra.kind, extra.name): extra.tensor for extra in found}
    for extra in meant:
        tensor = theirs.get((extra.kind, extra.name))
        if tensor is None or not same_bits(extra.tensor, tensor):
            raise VerificationError(f"the {extra.kind.value} read back differs or is missing", tensor=extra.name)
