"""Which base an adapter of a language model is for where its names do not tell it, and the rows of q, k or a fused qkv hang on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from upparam.adapter import Adapter, BaseHint
from upparam.bases import inventory
from upparam.bases.base import Base
from upparam.bases.layouts import LayoutMap
from upparam.dialects.placing import Resolved, alike
from upparam.errors import UsageError
from upparam.findings import warning

Shapes = Mapping[str, tuple[int, ...]]
"""Those of the changed weights, by the file's names."""


def named(adapter: Adapter, shapes: Shapes, base: Base, one: LayoutMap) -> Resolved:
    """The layout of the base the user named, and that base on the adapter. Raises UsageError where it lacks one of these names or shapes."""
    strange = _unexplained(one, shapes)
    if strange is not None:
        raise UsageError(
            f"{base.name} has no such tensor", file=adapter.files[0], tensor=strange, found=f"a delta of shape {shapes[strange]}",
            expected=f"one of {one.rows(strange)} rows" if one.to_reference(strange) else None, remedy="name another base with --base",
        )  # fmt: skip
    adapter.base = BaseHint(base.name, 1.0, ("named by the user", *base.evidence), True)
    return Resolved(one, {name: name for name in shapes}, adapter.base)


def agreed(
    adapter: Adapter, shapes: Shapes, hints: Iterable[BaseHint], layout_of: Callable[[Base], LayoutMap | None], nothing: str
) -> Resolved | None:
    """The best hint whose base has every name in its shape, where every base that fits alike has the same rows under the same names.

    None where none fits (a finding then says `nothing`) or where they differ. `layout_of` gives the naming, None for bases that cannot be meant.
    """
    hints, subject = list(hints), adapter.files[0].rpartition("/")[2]
    fits: dict[str, LayoutMap] = {}
    for name in dict.fromkeys(name for hint in hints for name in (hint.name, *hint.lookalikes)):
        own = inventory.resolve(name)
        one = None if own is None else layout_of(inventory.load(own))
        if one is not None and _unexplained(one, shapes) is None:
            fits[name] = one
    hint = next((hint for hint in hints if hint.name in fits), None)
    if hint is None:
        adapter.base = next((hint for hint in hints if hint.stated), None)
        adapter.findings.append(warning("base-open", subject, nothing, "name the base with --base"))
        return None
    adapter.base = replace(hint, lookalikes=tuple(name for name in hint.lookalikes if name in fits and name != hint.name))
    chosen = fits[hint.name]
    others = [] if hint.stated else [name for name, other in fits.items() if any(_differs(chosen, other, foreign) for foreign in shapes)]
    if others:
        said = f"{hint.name} and {', '.join(others)} fit alike and order the rows of q and k differently"
        adapter.findings.append(warning("base-open", subject, said, "name the base with --base"))
        return None
    return Resolved(chosen, {name: name for name in shapes}, adapter.base)


def _unexplained(one: LayoutMap, shapes: Shapes) -> str | None:
    """The first name that the layout does not have in that shape."""
    for foreign, shape in shapes.items():
        parts = one.to_reference(foreign)
        if not parts or not alike(shape, (one.rows(foreign), *parts[0].shape[1:])):
            return foreign
    return None


def _differs(one: LayoutMap, other: LayoutMap, foreign: str) -> bool:
    return [(part.module, part.span, part.order) for part in one.to_reference(foreign)] != [
        (part.module, part.span, part.order) for part in other.to_reference(foreign)
    ]
