"""From names and shapes to the base an adapter is for: hints with a confidence, the facts that decided, and look-alikes named.

Nothing here loads an inventory: `data/_shapes.json` says for every module path, with numbers as '#', which shapes which bases have there
and how many; `data/_original.json` the same for the names that a denoiser's authors use (layout `original`). An adapter's targets are
grouped the same way and looked up, so a thousand targets cost as much as thirty.

Confidence is shared by bases that fit equally well. It is not a measured frequency but follows fixed rules: how many kinds of module
agree, whether every layer of the base is covered, whether names had to be completed, and how many bases are left.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

from upparam.adapter import BaseHint
from upparam.algorithms.base import fits_weight
from upparam.bases import inventory
from upparam.patterns import regex

Shape = tuple[int, ...]

_NUMBER = regex(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)")
_UNDERSCORED_NUMBER = regex(r"(?<=_)\d+(?=_|$)|^\d+(?=_|$)")
_VOCABULARY = regex(r"(^|[._])(lm_head|embed_tokens|wte|word_embeddings|embed_in|embed_out|shared|decoder)$")
_PARTIAL = 0.03
"""Weight of a base of which only some layers are covered, against one that is covered whole."""
_ENOUGH = 0.6
"""Share of the targets that must fit before a base is named at all."""
_LISTED = 12
"""Hints given at most."""


class Entry(NamedTuple):
    """One shape at one path pattern: how many modules have it, the largest number in each place, and which bases."""

    shape: Shape
    modules: int
    largest: tuple[int, ...]
    bases: frozenset[int]


@dataclass
class Group:
    """Targets of one path pattern and shape: how many, the largest number in each place, the first numbers (layers) seen."""

    template: str
    shape: Shape
    count: int = 0
    largest: list[int] = field(default_factory=list)
    layers: set[int] = field(default_factory=set)
    component: str | None = None


@dataclass
class Fit:
    """How one base answers to an adapter."""

    base: int
    matched: dict[int, str] = field(default_factory=dict)
    """Group number -> the base's path pattern it fits."""
    exact: int = 0
    wrong: dict[int, str] = field(default_factory=dict)
    resized: dict[int, float] = field(default_factory=dict)
    """Group number of a vocabulary of another size -> how alike the sizes are, 0 to 1."""
    agreement: float = 0.0
    coverage: float = 0.0
    weight: float = 0.0


class Entries(dict[str, list[Entry]]):
    """Entries by path pattern, each made of what the files say when first asked for: an adapter asks for a few of the thousands."""

    def __init__(self, told: Mapping[str, list[Any]], underscored: bool) -> None:
        super().__init__()
        self.told, self.underscored = told, underscored

    def __missing__(self, template: str) -> list[Entry]:
        self[template] = found = [
            Entry(tuple(shape), count, _places(template, largest) if self.underscored else tuple(largest), frozenset(bases))
            for shape, count, largest, bases in self.told[template]
        ]
        return found


class Index(NamedTuple):
    """The shape index: entries by path pattern, and path patterns by how they end."""

    entries: Entries
    by_tail: dict[str, list[tuple[str, str]]]
    names: list[str]
    original: frozenset[str]
    """Path patterns that are the authors' names of some base."""


@cache
def _index(underscored: bool) -> Index:
    told: dict[str, list[Any]] = inventory.data("_shapes.json")
    original = inventory.data("_original.json")
    for template, facts in original.items():
        told.setdefault(template, []).extend(facts)
    by_tail: dict[str, list[tuple[str, str]]] = {}
    for template in told:
        form = _UNDERSCORED_NUMBER.sub("#", template.replace(".", "_")) if underscored else template
        by_tail.setdefault(_tail(form, underscored), []).append((form, template))
    return Index(Entries(told, underscored), by_tail, inventory.names(), frozenset(original))


def _places(template: str, largest: Sequence[int]) -> tuple[int, ...]:
    """The largest number in each place of the underscored pattern, where a name's own number (`linear_1`) takes a place too."""
    numbers = iter(largest)
    return tuple(next(numbers) if word == "#" else int(word) for word in re.findall(r"(?:(?<=[._])|^)(#|\d+)(?=[._]|$)", template))


def _tail(form: str, underscored: bool) -> str:
    """How a pattern ends, enough to find the few it may be the end of."""
    if not underscored:
        return form.rsplit(".", 1)[-1]
    last = form.rsplit("_", 1)[-1]
    return "_".join(form.rsplit("_", 2)[-2:]) if last in ("#", "proj") else last


def recognise(shapes: Mapping[str, Shape], *, stated: str | None = None) -> list[BaseHint]:
    """The bases that targets of these module paths and delta shapes (out, in, *kernel) fit, best first; empty when none does.

    Paths are the base's reference names as far as the file gives them: a component (`unet.`) or wrapper (`transformer.`) in front may be
    missing or added; a denoiser may go by its authors' names (`diffusion_model.double_blocks.0.img_attn.qkv`). `stated` is the base that
    the file itself names; it is listed first as stated, with what the shapes say about it.
    """

    def parts(name: str) -> tuple[str | None, str]:
        return None, _WRAPPER.sub("", name).replace("language_model.model.", "model.language_model.")

    return _recognise(_groups(shapes, _NUMBER, parts), False, stated)


_WRAPPER = regex(r"^(base_model\.model\.)?((model\.)?diffusion_model\.)?")
"""What PEFT and ComfyUI put in front of a module path. (transformers 4.52 turned `language_model.model.` round.)"""
_COMPONENT = regex(r"^(?:lora_(unet|transformer|prior_unet|te|te1|te2|te3|text_encoder|text_encoder_2)|(lycoris))_")
_COMPONENTS = {
    "unet": ("unet.", "transformer."), "transformer": ("transformer.",), "prior_unet": ("unet.",), "te": ("text_encoder.",),
    "te1": ("text_encoder.",), "te2": ("text_encoder_2.",), "te3": ("text_encoder_3.", "text_encoder_2.", "text_encoder."), "text_encoder": ("text_encoder.",),
    "text_encoder_2": ("text_encoder_2.",), "lycoris": ("unet.", "transformer.", "text_encoder.", ""),
}  # fmt: skip


def recognise_underscored(names: Mapping[str, Shape], *, stated: str | None = None) -> list[BaseHint]:
    """The same for names whose segments are joined by underscores, as sd-scripts writes them, with or without its `lora_unet_` (or LyCORIS'
    `lycoris_`, which stands before any component) in front:

    diffusers' names (`down_blocks_0_attentions_0_...`) or the authors' (`input_blocks_4_1_...`, `double_blocks_0_img_attn_qkv`).
    """

    def parts(name: str) -> tuple[str | None, str]:
        found = _COMPONENT.match(name)
        rest = name[found.end() :] if found else name
        return (found.group(1) or found.group(2) if found else None), rest

    return _recognise(_groups(names, _UNDERSCORED_NUMBER, parts), True, stated)


def _groups(shapes: Mapping[str, Shape], number: re.Pattern[str], parts: Callable[[str], tuple[str | None, str]]) -> list[Group]:
    found: dict[tuple[str | None, str, Shape], Group] = {}
    for name, shape in shapes.items():
        component, path = parts(name)
        template = number.sub("#", path)
        key = (component, template, tuple(shape))
        group = found.get(key)
        numbers = [int(word) for word in number.findall(path)]
        if group is None:
            found[key] = group = Group(template, tuple(shape), 0, numbers, set(), component)
        group.count += 1
        group.layers.update(numbers[:1])
        group.largest = [max(pair) for pair in zip(group.largest, numbers, strict=True)]
    return list(found.values())


def _recognise(groups: Sequence[Group], underscored: bool, stated: str | None) -> list[BaseHint]:
    index = _index(underscored)
    fits = _fits(groups, index, underscored)
    for fit in fits:
        _weigh(fit, groups, index)
    sound = [fit for fit in fits if not fit.wrong and fit.agreement >= _ENOUGH]
    if any(fit.agreement == 1.0 for fit in sound):
        for fit in sound:
            fit.weight *= 1.0 if fit.agreement == 1.0 else _LACKING
    shaped = _hints(sound, groups, index) if sound else _poor(fits, groups, index)
    return _with_stated(stated, shaped, {index.names[fit.base]: fit for fit in fits}, groups) if stated else shaped


def _related(form: str, group: Group, index: Index, underscored: bool) -> list[tuple[str, bool]]:
    """The base path patterns a target pattern may mean, and whether it is the very same."""
    joint = "_" if underscored else "."
    allowed = _COMPONENTS.get(group.component or "")
    found = []
    for candidate, template in index.by_tail.get(_tail(form, underscored), ()):
        if allowed is not None:
            prefix = next((word for word in allowed if template.startswith(word)), None)
            if prefix is None:
                continue
            candidate = candidate[len(prefix) :]
        if candidate == form:
            found.append((template, True))
        elif candidate.endswith(joint + form) or (form.endswith(joint + candidate) and joint in candidate):
            found.append((template, False))
    return found


def _fits(groups: Sequence[Group], index: Index, underscored: bool) -> list[Fit]:
    fits: dict[int, Fit] = {}
    for number, group in enumerate(groups):
        for template, exact in _related(group.template, group, index, underscored):
            for entry in index.entries[template]:
                same = _same(group, entry, template, counted=not underscored)
                for base in entry.bases:
                    fit = fits.get(base)
                    if fit is None:
                        fit = fits[base] = Fit(base)
                    if same and number not in fit.matched:
                        fit.matched[number] = template
                        fit.exact += group.count if exact else 0
                    elif not same:
                        fit.wrong.setdefault(number, template)
                        if entry.shape[1:] == group.shape[1:] and _VOCABULARY.search(template):
                            sizes = sorted((group.shape[0], entry.shape[0]))
                            fit.resized[number] = max(fit.resized.get(number, 0.0), sizes[0] / sizes[1])
    for fit in fits.values():
        fit.resized = {number: alike for number, alike in fit.resized.items() if number not in fit.matched}
        fit.wrong = {number: template for number, template in fit.wrong.items() if number not in fit.matched and number not in fit.resized}
    return list(fits.values())


_LACKING = 0.05
"""What is left of a fit that lacks some of the targets where another base has them all."""
_FUSED = regex(r"(qkv|query_key_value|c_attn|qkv_proj|gate_up_proj)$")


def _same(group: Group, entry: Entry, template: str, *, counted: bool) -> bool:
    """True when the targets can be modules of this entry. Underscored patterns may join two of ours (`wi_0`, `wi_1`): not `counted`."""
    if group.shape != entry.shape and not _excused(group.shape, entry.shape, template):
        return False
    places = zip(reversed(group.largest), reversed(entry.largest), strict=False)
    return (group.count <= entry.modules or not counted) and all(have <= most for have, most in places)


def _excused(shape: Shape, theirs: Shape, template: str) -> bool:
    """Embedding deltas may come transposed, those of a convolution without its kernel or with a flat one, those of a fused weight as some rows.

    Sizes of 0 are not told by the delta (see `upparam.algorithms.base.fits_weight`).
    """
    if fits_weight(shape, theirs):
        return True
    if shape == theirs[::-1] and _VOCABULARY.search(template):
        return True
    return shape[1:] == theirs[1:] and shape[0] < theirs[0] and bool(_FUSED.search(template))


def _weigh(fit: Fit, groups: Sequence[Group], index: Index) -> None:
    total = sum(group.count for group in groups)
    matched = sum(groups[number].count for number in fit.matched)
    whole = sum(entry.modules for template in set(fit.matched.values()) for entry in index.entries[template] if fit.base in entry.bases)
    fit.agreement = matched / total if total else 0.0
    fit.coverage = min(1.0, matched / whole) if whole else 0.0
    named = 0.8 + 0.2 * fit.exact / matched if matched else 0.0
    fit.weight = fit.agreement**12 * named * (1.0 if fit.coverage == 1.0 else _PARTIAL * (0.5 + fit.coverage))
    for alike in fit.resized.values():
        fit.weight *= 0.5 if alike > 0.98 else 0.05


def _quality(fit: Fit) -> float:
    """How far one fit alone can be trusted: several kinds of module agreeing, and every layer covered."""
    kinds = len(fit.matched)
    partial = 1.0 if fit.coverage == 1.0 else 0.6 if kinds < 3 else 0.75 if kinds < 9 else 0.9
    return {1: 0.85, 2: 0.93}.get(kinds, 0.98) * fit.agreement * partial


def _hints(fits: Sequence[Fit], groups: Sequence[Group], index: Index) -> list[BaseHint]:
    known = inventory.known()
    by_name = {index.names[fit.base]: fit for fit in fits}
    best = max(fit.weight for fit in fits)
    main: list[tuple[str, Fit]] = []
    variants: dict[str, list[str]] = {}
    for name, fit in by_name.items():
        parent = known[name].variant_of
        if parent in by_name and by_name[parent].weight >= fit.weight:
            variants.setdefault(parent, []).append(name)
        else:
            main.append((name, fit))
    main.sort(key=lambda pair: (-pair[1].weight, pair[1].base))
    total = sum(fit.weight for _, fit in main)
    hints: list[BaseHint] = []
    for name, fit in main[:_LISTED]:
        if fit.weight < 0.02 * best:
            break
        alike = [other for other, its in main if other != name and its.weight >= 0.5 * fit.weight]
        evidence = [_agreement(fit, groups), *_dimensions(fit, groups)]
        if index.original & set(fit.matched.values()):
            evidence.append("named as its authors do")
        if not hints:
            evidence += [*_coverage(fit, groups, index), *_excluded(fit, groups, index, set(by_name)), *_open(fit, alike, index)]
        evidence += [
            f"{other}, which differs from {name} in a few inputs or outputs only, fits as well" for other in variants.get(name, ())
        ]
        sure = _quality(fit) * fit.weight / total
        hints.append(BaseHint(name, round(sure, 3), tuple(evidence), lookalikes=(*alike, *variants.get(name, ()))))
    return hints


def _agreement(fit: Fit, groups: Sequence[Group]) -> str:
    total = sum(group.count for group in groups)
    matched = sum(groups[number].count for number in fit.matched)
    text = f"all {total} targets fit in name and shape" if matched == total else f"{matched} of {total} targets fit in name and shape"
    return text + (" (with a vocabulary of another size)" if fit.resized else "")


_DIMENSIONS = (
    (regex(r"(^|[._])(q_proj|query|q)$"), 1, "hidden"),
    (regex(r"(^|[._])(k_proj|v_proj)$"), 0, "kv width"),
    (regex(r"(^|[._])(gate_proj|up_proj|fc1|dense_h_to_4h)$"), 0, "ffn"),
    (regex(r"(^|[._])attn2[._](to_k|to_v)$"), 1, "cross-attention keys read"),
)


def _dimensions(fit: Fit, groups: Sequence[Group]) -> list[str]:
    found: dict[str, set[int]] = {}
    for number in fit.matched:
        group = groups[number]
        for pattern, axis, word in _DIMENSIONS:
            if pattern.search(group.template) and len(group.shape) == 2 and group.shape[axis]:
                found.setdefault(word, set()).add(group.shape[axis])
    single = [f"{word} {next(iter(sizes))}" for word, sizes in found.items() if len(sizes) == 1]
    return [", ".join(single)] if single else []


def _coverage(fit: Fit, groups: Sequence[Group], index: Index) -> list[str]:
    """Whether the adapter covers the base's layers, and which where it does not."""
    mine = [groups[number] for number in fit.matched]
    layers = sorted(set().union(*(group.layers for group in mine)))
    entries = [entry for template in fit.matched.values() for entry in index.entries[template] if fit.base in entry.bases]
    single = all(len(group.largest) == 1 for group in mine) and all(len(entry.largest) == 1 for entry in entries)
    total = max((entry.largest[-1] + 1 for entry in entries if entry.largest), default=0)
    if fit.coverage == 1.0:
        return [f"all {total} layers" if single and total > 1 else "every such module of the base is covered"]
    what = f"layers {_ranges(layers)} of {total}" if single else f"{fit.coverage:.0%} of such modules"
    return [f"a partial adapter ({what}), so bases with other layers stay possible"]


def _ranges(numbers: Sequence[int]) -> str:
    """Sorted numbers as '0-3, 7'."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in spans[:6]) + (", ..." if len(spans) > 6 else "")


def _excluded(fit: Fit, groups: Sequence[Group], index: Index, fitting: set[str]) -> list[str]:
    """The module whose shape rules out most of the base's relatives, and what they have there."""
    known = inventory.known()
    family = known[index.names[fit.base]].family
    best: tuple[int, str] = (0, "")
    for number, template in fit.matched.items():
        shape = groups[number].shape
        if 0 in shape:
            continue
        theirs: dict[str, list[Shape]] = {}
        for entry in index.entries[template]:
            for name in map(index.names.__getitem__, entry.bases):
                if known[name].family == family and known[name].variant_of is None and name not in fitting:
                    theirs.setdefault(name, []).append(entry.shape)
        if len(theirs) <= best[0]:
            continue
        others = {name: theirs[name][0] for name in index.names if shape not in theirs.get(name, [shape])}
        if any(len(its) != len(shape) for its in others.values()):
            others = {name: its for name, its in others.items() if not any(fits_weight(shape, other) for other in theirs[name])}
        if len(others) > best[0]:
            shown = ", ".join(f"{_by(other)} in {name}" for name, other in list(others.items())[:3])
            best = (len(others), f"{_short(template)} is {_by(shape)}, not {shown}")
    return [best[1]] if best[0] else []


def _open(fit: Fit, alike: Sequence[str], index: Index) -> list[str]:
    """What would tell equally fitting bases apart: modules that differ and that the adapter leaves alone."""
    if not alike:
        return []
    if len(alike) > 6:
        families = sorted({inventory.known()[name].family for name in (*alike, index.names[fit.base])})
        return [f"{len(alike) + 1} bases of {'family' if len(families) == 1 else 'families'} {', '.join(families)} fit as well"]
    near = {template.split(".")[0] for template in fit.matched.values()}
    found = []
    for name in alike:
        apart = _apart(index, fit.base, index.names.index(name))
        apart.sort(key=lambda pair: (pair[0].split(".")[0] not in near, pair[1]))
        shown = " or ".join(dict.fromkeys(_short(template) for template, _ in apart[:2]))
        found.append(f"{name} fits as well; " + (f"{shown} would tell" if apart else "it has the same modules and shapes"))
    return found


def _apart(index: Index, one: int, two: int) -> list[tuple[str, bool]]:
    """The path patterns at which two bases differ, and whether only in how many modules they have there."""
    found = []
    for template in index.entries.told:
        entries = index.entries[template]
        first = {(entry.shape, entry.modules) for entry in entries if one in entry.bases}
        second = {(entry.shape, entry.modules) for entry in entries if two in entry.bases}
        if first != second:
            found.append((template, {shape for shape, _ in first} == {shape for shape, _ in second}))
    return found


def _poor(fits: Sequence[Fit], groups: Sequence[Group], index: Index) -> list[BaseHint]:
    """Bases whose names fit while some shapes do not: kin at best, and said so."""
    hints: list[BaseHint] = []
    total = sum(group.count for group in groups)
    for fit in sorted(fits, key=lambda fit: -fit.agreement)[:3]:
        if fit.agreement >= _ENOUGH and inventory.known()[index.names[fit.base]].variant_of is None:
            number, template = next(iter(fit.wrong.items()))
            theirs = next(entry.shape for entry in index.entries[template] if fit.base in entry.bases)
            wrong = sum(groups[number].count for number in fit.wrong)
            evidence = (
                _agreement(fit, groups),
                f"{wrong} of {total} do not: {_short(template)} is {_by(groups[number].shape)}, there {_by(theirs)} or fewer of them",
            )
            hints.append(BaseHint(index.names[fit.base], round(0.3 * fit.agreement, 3), evidence))
    return hints


def _with_stated(stated: str, shaped: list[BaseHint], fits: Mapping[str, Fit], groups: Sequence[Group]) -> list[BaseHint]:
    """The stated base first, with what the shapes say about it."""
    says = f"the file names {stated}"
    name = inventory.resolve(stated)
    if name is None:
        like = f"an unknown name; its modules are those of {shaped[0].name}" if shaped else "an unknown name"
        sure = 0.9 if shaped and shaped[0].confidence >= 0.3 else 0.6
        return [BaseHint(stated, sure, (says, like), True, tuple(hint.name for hint in shaped[:1])), *shaped]
    fit = fits.get(name)
    rest = [hint for hint in shaped if hint.name != name]
    mine = next((hint for hint in shaped if hint.name == name), None)
    if not groups or (fit is None and not shaped):
        return [BaseHint(name, 0.7, (says, "its targets cannot be checked: nothing upparam knows has such names"), True), *rest]
    if fit is not None and not fit.wrong and fit.agreement >= _ENOUGH:
        evidence = mine.evidence if mine else (_agreement(fit, groups),)
        sure = 0.99 if fit.agreement == 1.0 else 0.9 * fit.agreement
        scaled = [BaseHint(hint.name, round(min(hint.confidence, 1 - sure), 3), hint.evidence, False, hint.lookalikes) for hint in rest]
        return [BaseHint(name, round(sure, 3), (says, *evidence), True, mine.lookalikes if mine else ()), *scaled]
    against = f"but its targets do not fit it{f', they fit {shaped[0].name}' if shaped else ''}"
    doubted = BaseHint(name, 0.1, (says, against), True, tuple(hint.name for hint in rest[:1]))
    return [*rest, doubted] if rest and rest[0].confidence > 0.1 else [doubted, *rest]


def _by(shape: Shape) -> str:
    return "x".join(map(str, shape))


def _short(template: str) -> str:
    words = [word for word in re.split(r"[.]", template) if word != "#"]
    return ".".join(words[-2:])
