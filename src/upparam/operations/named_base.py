"""Whether an adapter's targets are modules of the base that the user named, in their shapes."""

from __future__ import annotations

from typing import NamedTuple

from upparam.adapter import REPEATED, Adapter, Target
from upparam.bases.base import Base
from upparam.bases.header import VOCABULARY
from upparam.bases.versions import Older, within
from upparam.dialects.diffusers import COMPONENTS
from upparam.dialects.placing import alike
from upparam.errors import MismatchError
from upparam.findings import Finding, error, info
from upparam.wording import counted_of


class Misfit(NamedTuple):
    """A target that the base does not have, or has with another shape: `there` is the one it would have to have, None where there is no module."""

    target: Target
    shape: tuple[int, ...]
    there: tuple[int, ...] | None

    def expected(self, base: Base) -> str:
        """What the base asks for."""
        return f"a module of {base.name}" if self.there is None else f"{self.there}"

    def found(self) -> str:
        """What the adapter has."""
        return f"none of this name there, for a delta of {self.shape}" if self.there is None else f"{self.shape}"


def misfits(adapter: Adapter, base: Base) -> list[Misfit]:
    """The targets that do not fit.

    Vocabularies are resized, and where the output head is the embedding no file stores it; a component of a pipeline of which the base
    named holds nothing is none of its business. An adapter for repeated layers may have more of them.
    """
    if adapter.layout == "unnamed":
        return []
    repeated = any(REPEATED in reason for reason in adapter.conditions)
    inside = {module.path.partition(".")[0] for module in base.modules}
    older = Older({f"{module.path}.weight": module.canonical for module in base.modules})
    found = []
    for target, delta in adapter.deltas.items():
        known, component, rows = base.by_path.get(target.module), target.module.partition(".")[0], target.rows
        if known is None and (place := older(target.name)) is not None:
            known, rows = base.by_path[place.module], within(place, target.rows).rows
        vocabulary = VOCABULARY.search(target.module) is not None
        if known is None:
            if target.parameter == "weight" and not vocabulary and not repeated and (component not in COMPONENTS or component in inside):
                found.append(Misfit(target, delta.shape, None))
            continue
        out, *rest = known.canonical
        if target.parameter == "bias":
            rest = []
        elif target.parameter != "weight":
            continue
        there = (out if rows is None else rows[1] - rows[0], *rest)
        beyond = rows is not None and rows[1] > out
        if beyond or not (alike(delta.shape, there) or (vocabulary and delta.shape[1:] == there[1:])):
            found.append(Misfit(target, delta.shape, there))
    return found


def refuse_other(adapter: Adapter, base: Base) -> None:
    """Raise MismatchError, naming the first, where targets do not fit the base named."""
    found = misfits(adapter, base)
    if found:
        raise MismatchError(
            f"{counted_of(len(found), len(adapter.deltas), 'target', 'does', 'do')} not fit the base named", file=adapter.files[0] if adapter.files else None,
            tensor=str(found[0].target), expected=found[0].expected(base), found=found[0].found(),
            remedy="name the base it was made for with --base, or none where none is needed",
        )  # fmt: skip


def fit(adapter: Adapter, base: Base, subject: str) -> Finding:
    """What verify says of a base of which only names and shapes are known."""
    found = misfits(adapter, base)
    if not found:
        return info("fits", subject, f"every target and shape fits {base.name}", "by the names and shapes of its modules")
    first = found[0]
    return error(
        "does-not-fit", subject, f"{counted_of(len(found), len(adapter.deltas), 'target', 'does', 'do')} not fit {base.name}",
        f"{first.target}: expected {first.expected(base)}, found {first.found()}",
    )  # fmt: skip
