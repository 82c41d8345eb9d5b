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
from upparam.dialects.placing import Parts, to_targets
from upparam.dialects.words import alpha_tensor
from upparam.errors import MalformedError, RefusedError
from upparam.findings import Finding, error, warning
from upparam.tensors import DTYPES, Tensor

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


def built(file: TensorFile, module: str, group: words.Group) -> words.Built:
    """What a module's tensors come to. Raises MalformedError, naming file and module, where factors do not fit together."""
    try:
        return words.build(group)
    except MalformedError as problem:
        raise MalformedError(problem.message, file=file.path, tensor=module, expected=problem.expected, found=problem.found) from problem


def leave(adapter: Adapter, dialect: str, module: str, group: words.Group, built: words.Built) -> None:
    """Put what nothing explains among the leftovers, with a finding."""
    if not built.unexplained:
        return
    names = [group.names[role] for role in built.unexplained]
    adapter.leftovers |= {name: group.roles[role] for name, role in zip(names, built.unexplained, strict=True)}
    if "weight" in built.deltas:
        adapter.findings.append(error("unexplained", module, f"words that no form of {dialect} explains", *names))
    else:
        adapter.findings.append(error("orphan", module, "a factor without its partner: the module cannot be applied", *names))


def settle(adapter: Adapter, module: str, built: words.Built, group: words.Group, found: Spoken, told: Parts) -> None:
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


def out_of_order(module: str, problem: RefusedError) -> Finding:
    """What is said of a delta that cannot be turned from the order of the file's rows into the reference's."""
    return error("rows-in-another-order", module, f"{problem.message}, and here they lie in another order than in the reference names")


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


def alpha_of(spelling: Mapping[str, str], module: str, value: float, like: Tensor, *, exact: bool = False) -> Tensor:
    """Alpha in the form it had in the source, else in the factors' dtype, float32, or (where it must be `exact`) float64."""
    form = spelling.get(f"alpha {module}", spelling.get("alpha"))
    dtype, dims = (DTYPES[form.split()[0]], int(form.split()[1])) if form else (None, 0)
    return alpha_tensor(value, dtype, like.dtype, dims, exact=exact)
