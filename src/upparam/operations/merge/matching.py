"""Which base tensor an adapter's target means: names that differ by a prefix, weights stored transposed, weights that are not there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from upparam.adapter import Target
from upparam.algorithms.base import Delta
from upparam.algorithms.slicing import RowSlice, join, reorder
from upparam.bases import versions
from upparam.bases.base import Base
from upparam.bases.layouts import LayoutMap, available, layout
from upparam.errors import AmbiguousError
from upparam.patterns import regex

COMPONENTS = ("unet", "text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "prior", "decoder")
"""First segments that name a component of a pipeline rather than a module of one network."""
_PREFIXES = ("base_model.model.", "model.", "transformer.", "base_model.", "module.", "diffusion_model.", "language_model.", "text_model.")
"""Prefixes that wrappers and versions add to or take from the names of the same modules (transformers 5 drops CLIP's `text_model.`)."""
_CONV1D_LEAF = regex(r"(.*\.)?(c_attn|c_proj|c_fc|q_attn)")
"""Modules that are Conv1D, with an (in, out) weight, in the models of transformers that use it."""
_CONV1D_MODELS = frozenset(("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "jukebox", "clvp"))
"""model_type values of transformers whose layers use Conv1D."""


@dataclass(frozen=True)
class Renaming:
    """Take `strip` off the front of a target's module path, put `add` there."""

    strip: str
    add: str

    def __call__(self, module: str) -> str | None:
        """The base's name of the module; None when the path does not start with `strip`."""
        return self.add + module[len(self.strip) :] if module.startswith(self.strip) else None


def renaming(targets: Sequence[Target], names: Mapping[str, tuple[int, ...]], component: str) -> Renaming:
    """The one change of prefix under which most targets are base tensors, the identity preferred.

    `names` are the base's tensors. Raises AmbiguousError when two prefixes fit equally well and lead to different tensors.
    """
    identity = Renaming("", "")
    best, count = [identity], _hits(identity, targets, names)
    if count == len(targets):
        return identity
    for option in _options(targets, names, component):
        hits = _hits(option, targets, names)
        if hits > count:
            best, count = [option], hits
        elif hits == count and hits and option not in best:
            best.append(option)
    if len(best) > 1 and identity not in best:
        places = {tuple(sorted(_found(option, targets, names))) for option in best}
        if len(places) > 1:
            raise AmbiguousError(
                "the adapter's module names fit several parts of the base",
                tensor=str(targets[0]),
                found=", ".join(str(option(targets[0].module)) for option in best),
                remedy="name the component of the base (its sub-folder or file) as the base",
            )
    return best[0]


def _hits(option: Renaming, targets: Sequence[Target], names: Mapping[str, tuple[int, ...]]) -> int:
    return len(_found(option, targets, names))


def _found(option: Renaming, targets: Sequence[Target], names: Mapping[str, tuple[int, ...]]) -> list[str]:
    paths = [(option(target.module), target.parameter) for target in targets]
    return [name for path, parameter in paths if path is not None and (name := f"{path}.{parameter}") in names]


def _options(targets: Sequence[Target], names: Mapping[str, tuple[int, ...]], component: str) -> Iterable[Renaming]:
    """Renamings that make the longest-named target a base tensor: known prefixes off, any prefix of the base on."""
    probe = max(targets, key=lambda target: target.module.count("."))
    strips = [""]
    if component:
        strips.append(f"{component}.")
    for strip in list(strips):
        rest = probe.module[len(strip) :]
        while prefix := next((prefix for prefix in _PREFIXES if rest.startswith(prefix)), None):
            strip += prefix
            rest = rest[len(prefix) :]
            strips.append(strip)
    seen: set[Renaming] = set()
    for strip in strips:
        wanted = f"{probe.module[len(strip) :]}.{probe.parameter}"
        for name in names:
            if name == wanted or name.endswith("." + wanted):
                option = Renaming(strip, name[: len(name) - len(wanted)])
                if option not in seen and not re.search(r"\d", option.add.replace("text_encoder_", "")):
                    seen.add(option)
                    yield option


class Spot(NamedTuple):
    """Where a delta goes in the base's own naming: the base's module and parameter with the rows it changes, and the delta as it lies there.

    `targets` are the adapter's own targets it stands for; `transposed` when the layout says the weight is stored as (in, out).
    """

    place: Target
    delta: Delta
    targets: tuple[Target, ...]
    transposed: bool | None = None

    @property
    def name(self) -> str:
        """The base tensor's name."""
        return self.place.name


def place(deltas: Mapping[Target, Delta], shapes: Mapping[str, tuple[int, ...]], base: Base | None) -> tuple[list[Spot], list[Target]]:
    """Where each delta goes, and the targets that have no place: by the adapter's own names, else by the layout or the renames that find most.

    `shapes` are the base's tensors; `base` what it was recognised as, under reference names (None: only prefixes are tried).
    """
    found, missing = _placed([Spot(target, delta, (target,)) for target, delta in deltas.items()], shapes)
    if missing and base is not None:
        for name in available(base)[1:]:
            spots, unnamed = through_layout(layout(base, name), deltas)
            if spots:
                spots, lost = _placed(spots, shapes)
                lost = [*unnamed, *lost]
                if len(lost) < len(missing):
                    found, missing = spots, lost
    if missing:
        for rules, older in versions.renamed(shapes):
            named = {target: versions.newer(target.name, rules) for target in deltas}
            spots = [
                Spot(target.renamed(named[target][0]), delta, (target,)) for target, delta in deltas.items() if len(named[target]) == 1
            ]
            spots, lost = _placed(spots, {name: _shape(place, shapes) for name, place in older.items()})
            lost += [target for target, names in named.items() if len(names) > 1]
            if len(lost) < len(missing):
                found, missing = [spot._replace(place=versions.within(older[spot.name], spot.place.rows)) for spot in spots], lost
    return found, missing


def _shape(place: Target, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    shape = shapes[place.name]
    return shape if place.rows is None else (place.rows[1] - place.rows[0], *shape[1:])


def _placed(spots: Sequence[Spot], shapes: Mapping[str, tuple[int, ...]]) -> tuple[list[Spot], list[Target]]:
    found: list[Spot] = []
    missing: list[Target] = []
    by_place = {spot.place: spot for spot in spots}
    for component, places in by_component(by_place).items():
        change = renaming(places, shapes, component)
        for target in places:
            path = change(target.module)
            spot = by_place[target]
            moved = None if path is None else spot._replace(place=target._replace(module=path))
            if moved is not None and moved.name in shapes:
                found.append(moved)
            else:
                missing += spot.targets
    return found, missing


def through_layout(one: LayoutMap, deltas: Mapping[Target, Delta]) -> tuple[list[Spot], list[Target]]:
    """Deltas of reference modules where this layout puts them, and the targets it has no name for.

    Parts of a stacked weight become row ranges of it. Pieces of one delta that cannot be applied apart are joined again.
    """
    spots: list[Spot] = []
    missing: list[Target] = []
    cut: dict[str, list[Spot]] = {}
    for target, delta in deltas.items():
        there = one.to_foreign(target.module)
        if there is None:
            missing.append(target)
            continue
        part = there.part
        if not part.order.plain:
            delta = reorder(delta, part.order.foreign_rows(delta.shape[0]))
        rows = target.rows
        if part.span is not None:
            start = part.span[0] + (rows[0] if rows else 0)
            rows = (start, start + delta.shape[0])
        module, _, parameter = one.tensor_name(there.foreign, target.parameter).rpartition(".")
        spot = Spot(Target(module, rows, parameter), delta, (target,), part.transposed)
        if isinstance(delta, RowSlice) and not delta.additive:
            cut.setdefault(there.foreign, []).append(spot)
        else:
            spots.append(spot)
    for pieces in cut.values():
        pieces.sort(key=lambda spot: spot.place.rows or (0, 0))
        whole = join([spot.delta for spot in pieces])
        first = pieces[0]
        spots.append(
            Spot(first.place._replace(rows=None), whole, tuple(target for spot in pieces for target in spot.targets), first.transposed)
        )
    return spots, missing


def by_component(targets: Iterable[Target]) -> dict[str, list[Target]]:
    """Targets grouped by pipeline component ('' for those of a lone network)."""
    groups: dict[str, list[Target]] = {}
    for target in targets:
        first = target.module.partition(".")[0]
        groups.setdefault(first if first in COMPONENTS else "", []).append(target)
    return groups


def conv1d_evidence(shapes: Mapping[str, tuple[int, ...]], model_type: str | None) -> str | None:
    """Why the base's c_attn, c_proj and c_fc weights are stored as (in, out); None when nothing says so."""
    for name, shape in shapes.items():
        if len(shape) != 2 or not name.endswith((".c_attn.weight", ".c_fc.weight")):
            continue
        factor = 3 if name.endswith(".c_attn.weight") else 4
        if shape[1] in (factor * shape[0], 2 * shape[0]) and shape[1] > shape[0]:
            return f"{name} is {shape}"
        return None
    return f"the base's model_type is {model_type}" if model_type in _CONV1D_MODELS else None


def is_conv1d_name(module: str) -> bool:
    """True for a module that is Conv1D in the models that use it."""
    return _CONV1D_LEAF.fullmatch(module) is not None
