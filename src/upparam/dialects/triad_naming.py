"""Which modules a triad's pairs of factors change: by the files' own names, the user's, the config's, or the base's order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

from upparam.adapter import Adapter, BaseHint, Target
from upparam.algorithms.lora import LoRA
from upparam.bases import inventory
from upparam.bases.base import Base, Module
from upparam.bases.recognise import recognise
from upparam.dialects.base import Bundle, ReadOptions
from upparam.dialects.placing import alike
from upparam.dialects.prefixes import change, contested
from upparam.errors import AmbiguousError, MismatchError, UsageError
from upparam.findings import info, warning
from upparam.wording import counted

_LISTED = 8
"""Choices that a refusal lists."""
_KINDS = 14
"""Kinds of modules of which every choice is tried; of more, choices of up to three."""


def name_modules(
    adapter: Adapter, pairs: Mapping[str | int | None, LoRA], config: Mapping[str, Any], bundle: Bundle, options: ReadOptions
) -> None:
    """Put each pair under its module: by the files' own names, the user's, the config's, or the base's order."""
    named = {key: delta for key, delta in pairs.items() if isinstance(key, str)}
    if len(named) == len(pairs) and not options.targets:
        _by_names(adapter, named, options)
        return
    ordered = [
        pairs[key] for key in sorted(pairs, key=lambda key: (not isinstance(key, int), key if isinstance(key, int) else 0, str(key)))
    ]
    targets = options.targets
    listed = config.get("modules") or config.get("target_modules")
    if targets is None and isinstance(listed, list) and len(listed) == len(ordered) and all(isinstance(name, str) for name in listed):
        targets = tuple(listed)
    if targets is not None:
        if len(targets) != len(ordered):
            raise UsageError(
                "as many names as modules are needed", file=bundle.main.path, expected=f"{len(ordered)} --target", found=f"{len(targets)}"
            )
        _by_names(adapter, dict(zip(targets, ordered, strict=True)), options)
        return
    if options.base is not None:
        _by_order(adapter, ordered, options.base, bundle)
        return
    adapter.layout = "unnamed"
    for number, delta in enumerate(ordered):
        adapter.deltas[Target(f"module-{number}")] = delta
    adapter.findings.append(
        warning(
            "modules-unnamed", bundle.folder.name or bundle.main.name, f"the files do not say which module{'s' if len(ordered) > 1 else ''} they change",
            "name them with --target, or give --base so that shapes and order tell", *[f"dW is {delta.shape}" for delta in ordered[:3]],
        )
    )  # fmt: skip


def name_parts(
    adapter: Adapter,
    parts: Mapping[str, Mapping[str | int | None, LoRA]],
    config: Mapping[str, Any],
    bundles: Mapping[str, Bundle],
    options: ReadOptions,
) -> None:
    """Put the pairs of several components of a pipeline under their modules, each below its component, and say that they are taken as one.

    A `--target` belongs to the component it begins with. Raises UsageError for one that begins with none of them.
    """
    first = next(iter(bundles.values()))
    if options.targets is None and all(isinstance(key, str) for pairs in parts.values() for key in pairs):
        named = {_below(component, str(key)): delta for component, pairs in parts.items() for key, delta in pairs.items()}
        _by_names(adapter, named, options)
    else:
        lost = [name for name in options.targets or () if not name.startswith(tuple(f"{component}." for component in parts))]
        if lost:
            raise UsageError(
                "a module of none of the components here", file=first.main.path, expected=" or ".join(f"{component}.<module>" for component in parts),
                found=lost[0],
            )  # fmt: skip
        for component, pairs in parts.items():
            own = Adapter({}, adapter.dialect)
            targets = None if options.targets is None else tuple(name for name in options.targets if name.startswith(f"{component}."))
            base = None if options.base is None else replace(options.base, modules=_inside(options.base, component))
            name_modules(own, pairs, config, bundles[component], replace(options, targets=targets, base=base))
            adapter.deltas |= {target._replace(module=_below(component, target.module)): delta for target, delta in own.deltas.items()}
            adapter.findings += own.findings
            adapter.base, adapter.layout = own.base, own.layout if adapter.layout != "unnamed" else "unnamed"
    explained = adapter.layout == "reference"
    adapter.findings.append(
        info(
            "parts", first.folder.name or first.main.name, f"files of {' and '.join(bundles)} are taken as parts of one adapter",
            "their names differ in the component alone, and both factors of each are here",
            *(["one base has the modules of all of them"] if explained else []), confidence=0.97 if explained else 0.85,
        )
    )  # fmt: skip


def _below(component: str, name: str) -> str:
    return name if name.startswith(f"{component}.") else f"{component}.{name}"


def _inside(base: Base, component: str) -> tuple[Module, ...]:
    return tuple(module for module in base.modules if module.path.startswith(f"{component}."))


def _by_names(adapter: Adapter, named: Mapping[str, LoRA], options: ReadOptions) -> None:
    """Modules by name; the base is the user's, or recognised, and tells what a name leaves out in front (`unet.`).

    Raises MismatchError when the user's base has no such module.
    """
    shapes = {name: delta.shape for name, delta in named.items()}
    base = options.base
    if base is not None:
        adapter.base = BaseHint(base.name, 1.0, ("named by the user", *base.evidence), True)
    else:
        hints = recognise(shapes)
        adapter.base = hints[0] if hints else None
        known = inventory.resolve(adapter.base.name) if adapter.base is not None else None
        base = inventory.load(known) if known is not None else None
    naming = None if base is None else change(base, shapes)
    if naming is not None and not contested(adapter.base, {"": shapes}, {"": naming}):
        named = {naming(name): delta for name, delta in named.items()}
    wrong = []
    for name, delta in named.items():
        module = base.by_path.get(name) if base is not None else None
        if module is None or not alike(module.canonical, delta.shape):
            wrong.append(f"{name}: dW {delta.shape}, {'the base has ' + str(module.canonical) if module else 'not in the base'}")
        adapter.deltas[Target(name)] = delta
    if wrong and options.base is not None:
        raise MismatchError(
            f"{counted(len(wrong), 'module', 'does', 'do')} not fit the base", file=options.base.name, tensor=wrong[0].split(":")[0], found="; ".join(wrong[:5]),
            remedy="check --base and --target",
        )  # fmt: skip
    adapter.layout = "reference" if base is not None and not wrong else "triad"


def _by_order(adapter: Adapter, ordered: Sequence[LoRA], base: Base, bundle: Bundle) -> None:
    """Modules by the base's order: the one choice of module kinds whose shapes, in order, are those of the pairs.

    Raises AmbiguousError listing candidates where several fit, MismatchError where none does.
    """
    shapes = [delta.shape for delta in ordered]
    fitting = [module for module in base.modules if any(alike(module.canonical, shape) for shape in shapes)]
    choices = _choices(fitting, shapes)
    if not choices:
        raise MismatchError(
            "no modules of the base have these shapes in this order", file=bundle.main.path, expected=f"modules of {base.name}",
            found=f"{counted(len(shapes), 'pair')}, dW {', '.join(str(shape) for shape in shapes[:4])}", remedy="name them with --target",
        )  # fmt: skip
    if len(choices) > 1:
        shown = "; ".join(f"{choice[0].path} ... {choice[-1].path}" if len(choice) > 1 else choice[0].path for choice in choices[:_LISTED])
        raise AmbiguousError(
            f"{len(choices)} choices of modules of {base.name} fit the shapes" if len(shapes) > 1 else f"{len(choices)} modules of {base.name} have this shape",
            file=bundle.main.path, found=shown + ("; ..." if len(choices) > _LISTED else ""), remedy="name them with --target",
        )  # fmt: skip
    adapter.base = BaseHint(base.name, 1.0, ("named by the user", *base.evidence), True)
    adapter.deltas = {Target(module.path): delta for module, delta in zip(choices[0], ordered, strict=True)}
    kinds = sorted({module.path.rsplit(".", 1)[-1] for module in choices[0]})
    adapter.findings.append(
        info(
            "named-by-order",
            bundle.main.name,
            f"modules named by the order of {base.name}",
            f"the only choice that fits: {', '.join(kinds)}",
        )
    )


def _choices(fitting: Sequence[Module], shapes: Sequence[tuple[int, ...]]) -> list[list[Module]]:
    """Every choice of module kinds (last words of paths) whose modules, in order, have these shapes; for one pair every module."""
    if len(shapes) == 1:
        return [[module] for module in fitting]
    kinds = sorted({_kind(module) for module in fitting})
    found = []
    most = len(kinds) if len(kinds) <= _KINDS else 3
    for count in range(1, most + 1):
        for chosen in combinations(kinds, count):
            members = [module for module in fitting if _kind(module) in chosen]
            if len(members) == len(shapes) and all(alike(module.canonical, shape) for module, shape in zip(members, shapes, strict=True)):
                found.append(members)
    return found


def _kind(module: Module) -> str:
    words = [word for word in module.path.split(".") if not word.isdigit()]
    return ".".join(words[-2:])
