"""Modules spelled by words under names that a base explains: built, put under their targets, and what nothing explains kept aside.

Shared by the dialects that write a module's name and a word of `comfyui_words` after it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from upparam.adapter import Adapter, BaseHint, Extra, ExtraKind, Target
from upparam.algorithms.base import Delta
from upparam.bases.base import Base
from upparam.bases.layouts import LayoutMap
from upparam.containers.base import TensorFile
from upparam.dialects import comfyui_words as words
from upparam.dialects.placing import Parts, Shape, take_parts, to_targets
from upparam.dialects.refusing import out_of_order
from upparam.dialects.tokens import bundled
from upparam.errors import DeadAdapterError, MalformedError, RefusedError
from upparam.findings import error, warning
from upparam.tensors import Tensor

Named = tuple[LayoutMap, str]
"""A layout and its own name for a module."""


@dataclass(frozen=True)
class Spoken:
    """Names explained: for each the layout it is of and that layout's own name for it; and what is known about the base.

    `locate` does the same for a name that was not among those the base was found by, None where the base has none such.
    """

    base: Base
    hint: BaseHint
    names: Mapping[str, Named]
    locate: Callable[[str], Named | None]


def heard(
    file: TensorFile,
    dialect: str,
    groups: Mapping[str, words.Group],
    rest: Mapping[str, Tensor],
    resolve: Callable[[Mapping[str, Shape]], Spoken | None],
    unknown: str,
    near: Callable[[Mapping[str, Shape]], str | None] = lambda shapes: None,
) -> tuple[Adapter, Spoken | None]:
    """(the adapter, its names explained): of a file's words by module and the tensors beside them.

    Modules are in reference names where `resolve` finds a base for their weights' shapes. Where it finds none they keep the file's, in the
    layout called as the dialect, and a finding says `unknown`, with what `near` takes them for.
    Raises DeadAdapterError where no module has a delta, MalformedError where factors do not fit together.
    """
    extras, leftovers = bundled(rest)
    adapter = Adapter(
        {}, dialect, extras, metadata=dict(file.metadata), files=(str(file.path),), leftovers=leftovers, findings=list(file.findings),
        layout=dialect,
    )  # fmt: skip
    spelled = {module: _built(file, module, group) for module, group in groups.items()}
    for module, group in groups.items():
        _leave(adapter, dialect, module, group, spelled[module])
    if not any(one.deltas for one in spelled.values()):
        raise DeadAdapterError("no module has all the factors of a delta", file=file.path, found=", ".join(list(file.tensors)[:3]))
    shapes = {module: one.deltas["weight"].shape for module, one in spelled.items() if "weight" in one.deltas}
    found = resolve(shapes)
    if found is None:
        alike = near(shapes)
        adapter.findings.append(warning("base-unknown", file.name, unknown, *([alike] if alike else [])))
        for module, one in spelled.items():
            adapter.deltas |= {Target(module, parameter=parameter): delta for parameter, delta in one.deltas.items()}
            if one.saved is not None:
                adapter.extras.append(Extra(ExtraKind.SAVED_MODULE, f"{module}.weight", one.saved))
    else:
        adapter.base, adapter.layout = found.hint, "reference"
        told = take_parts(adapter.metadata)
        for module, one in spelled.items():
            _settle(adapter, module, one, groups[module], found, told)
    return adapter, found


def _built(file: TensorFile, module: str, group: words.Group) -> words.Built:
    """What a module's tensors come to. Raises MalformedError, naming file and module, where factors do not fit together."""
    try:
        return words.build(group)
    except MalformedError as problem:
        raise MalformedError(problem.message, file=file.path, tensor=module, expected=problem.expected, found=problem.found) from problem


def _leave(adapter: Adapter, dialect: str, module: str, group: words.Group, built: words.Built) -> None:
    """Put what nothing explains among the leftovers, with a finding."""
    if not built.unexplained:
        return
    names = [group.names[role] for role in built.unexplained]
    adapter.leftovers |= {name: group.roles[role] for name, role in zip(names, built.unexplained, strict=True)}
    if "weight" in built.deltas:
        adapter.findings.append(error("unexplained", module, f"words that no form of {dialect} explains", *names))
    else:
        adapter.findings.append(error("orphan", module, "a factor without its partner: the module cannot be applied", *names))


def _settle(adapter: Adapter, module: str, built: words.Built, group: words.Group, found: Spoken, told: Parts) -> None:
    """Put a module's deltas under their targets; what the base does not have, or has already been changed, goes to the leftovers."""
    if not built.deltas and built.saved is None:
        return
    known = found.names.get(module)
    if known is None and "weight" not in built.deltas:
        # A bias or a norm alone: its name was no part of what the base was recognised by.
        known = found.locate(module)
    try:
        targets = None if known is None else _targets(*known, built, told)
    except RefusedError as problem:
        adapter.leftovers |= {group.names[role]: tensor for role, tensor in group.roles.items()}
        adapter.findings.append(out_of_order(module, problem))
        return
    if targets is not None and known is not None and not targets.keys() & adapter.deltas.keys():
        adapter.deltas |= targets
        if built.saved is not None:
            adapter.extras.append(Extra(ExtraKind.SAVED_MODULE, f"{known[0].to_reference(known[1])[0].module}.weight", built.saved))
        return
    adapter.leftovers |= {group.names[role]: tensor for role, tensor in group.roles.items()}
    if targets is not None:
        adapter.findings.append(error("named-twice", module, "another name in the file means the same module"))
    else:
        adapter.findings.append(warning("unknown-module", module, f"{found.base.name} has no such module of this shape"))


def _targets(one: LayoutMap, foreign: str, built: words.Built, told: Parts) -> dict[Target, Delta] | None:
    """The reference targets a module's deltas change; None where a bias or a saved weight does not have the module's shape."""
    parts = one.to_reference(foreign)
    if built.saved is not None and (len(parts) > 1 or built.saved.shape != parts[0].shape or not parts[0].order.plain):
        return None
    found: dict[Target, Delta] = {}
    for parameter, delta in built.deltas.items():
        if parameter != "weight" and delta.shape != (one.rows(foreign),):
            return None
        found |= {target._replace(parameter=parameter): piece for target, piece in to_targets(one, foreign, delta, told).items()}
    return found
