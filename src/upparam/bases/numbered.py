"""Recognition where targets have numbers and no names: the shapes, in order, against the orders of `traversal`."""

from __future__ import annotations

from collections.abc import Sequence

from upparam.adapter import BaseHint
from upparam.bases import inventory
from upparam.bases.traversal import RULES

Shape = tuple[int, ...]

_FAMILIES = {
    "cloneofsimo-unet": ("sd",), "cloneofsimo-unet-late": ("sd",), "cloneofsimo-text": ("sd",), "qkv-slices": ("sam",), "split-qv": ("vit",),
}  # fmt: skip
"""Families each numbering rule has been used with."""


def recognise_shapes_only(shapes: Sequence[Shape], rule: str | None = None) -> list[BaseHint]:
    """The bases whose modules, in the order of a rule of `traversal.RULES` (every rule when None), have these delta shapes; best first.

    Shapes are (out, in, *kernel) by index. Fewer shapes than the base has are a partial adapter and lower the confidence; equal fits
    share it. The evidence of each hint names the rule that fits, in which an index can be looked up.
    """
    wanted = [tuple(shape) for shape in shapes]
    if not wanted:
        return []
    have = _shapes_of_bases()
    fits: list[tuple[str, str, int]] = []
    for number, (name, fact) in enumerate(inventory.known().items()):
        rules = [item for item in _FAMILIES if fact.family in _FAMILIES[item] and rule in (None, item)]
        if rules and _may_hold(have[number], set(wanted)):
            for rule_name in rules:
                order = [item.shape for item in RULES[rule_name](inventory.load(name))]
                if order[: len(wanted)] == wanted:
                    fits.append((name, rule_name, len(order)))
    whole = [fit for fit in fits if fit[2] == len(wanted)]
    return _share(whole or fits, len(wanted))


def _shapes_of_bases() -> list[set[Shape]]:
    """Every weight shape of each base, by position: enough to leave out most without loading them."""
    found: list[set[Shape]] = [set() for _ in inventory.names()]
    for entries in inventory.data("_shapes.json").values():
        for shape, _, _, bases in entries:
            for base in bases:
                found[base].add(tuple(shape))
    return found


def _may_hold(have: set[Shape], wanted: set[Shape]) -> bool:
    """True when each wanted shape is there, or one with as many columns and more rows (a slice of a fused weight)."""
    return all(shape in have or any(other[1:] == shape[1:] and other[0] > shape[0] for other in have) for shape in wanted)


def _share(fits: Sequence[tuple[str, str, int]], count: int) -> list[BaseHint]:
    known = inventory.known()
    rules: dict[str, tuple[str, int]] = {}
    for name, rule, total in fits:
        rules.setdefault(name, (rule, total))
    main = [name for name in rules if known[name].variant_of not in rules]
    hints = []
    for name in main:
        rule, total = rules[name]
        part = f"all {total}" if total == count else f"the first {count} of {total}"
        variants = [other for other in rules if known[other].variant_of == name]
        others = [other for other in main if other != name]
        sure = (0.95 if total == count else 0.5) / len(main)
        evidence = (f"{part} targets in the order '{rule}' have these shapes",)
        hints.append(BaseHint(name, round(sure, 3), evidence, lookalikes=(*others, *variants)))
    return hints
