"""The adapter's own files with an edit applied to them: every tensor, key and side file that the edit does not concern stays as it is.

The dialect writes the adapter twice, as it was and as it is to be, and only what differs between the two is carried over into the files. So
what the dialect would write otherwise than the file has it, and tensors that no rule explains, stay bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from upparam.adapter import Adapter
from upparam.algorithms.base import ScaleRule, Scaling
from upparam.containers import open_file
from upparam.containers.base import LONE, Opaque, TensorFile, leaves
from upparam.dialects.base import NamedTensors, Package
from upparam.dialects.carried import HASHES
from upparam.dialects.kohya_metadata import stamped
from upparam.errors import RefusedError, UpparamError, UsageError
from upparam.findings import Finding, Severity, warning
from upparam.operations.edit.changes import Changes, Each
from upparam.operations.recast import recast
from upparam.tensors import Tensor, same_bits
from upparam.wording import counted

CONTAINERS = {
    "safetensors": "safetensors",
    "npz": "npz",
    "gguf": "gguf",
    "torch-zip": "torch",
    "torch-legacy": "torch",
    "torch-tar": "torch",
}
"""Containers that can be written as they came, and what writes them: every torch file becomes a zip, as torch has written it since 1.6."""
_SHOWN = 5


class UnpatchableError(Exception):
    """The files cannot be patched, for this reason: the dialect has to write the adapter anew."""


@dataclass
class Patched:
    """What to write, and what to tell about it."""

    package: Package
    untouched: dict[str, Path]
    """Files that go into the package's folder as they are."""
    findings: list[Finding]


def patched(source: Adapter, result: Adapter, changes: Changes, root: Path, out: Path, write: Callable[[Adapter], Package]) -> Patched:
    """The files of `source`, which lie below `root`, as `result` has them. `out` names a file or folder; `.safetensors` asks for that container.

    `write` is the dialect's writing. Raises UnpatchableError where that does not explain the files well enough, and RefusedError where an
    unexplained tensor is no longer what it was without the module it belongs to, and for torch files that hold more than plain data.
    """
    files = _opened(source, root)
    said = {delta.scale for delta in result.deltas.values()}
    stand_in = Scaling(ScaleRule.EXPLICIT, multiplier=1.0 if 1.0 not in said else 3.0)  # another than the one to be stated
    try:
        before = write(_scaled(source, stand_in))
    except (RefusedError, UsageError) as problem:
        raise UnpatchableError(str(problem)) from problem
    after = write(_scaled(result, stand_in))
    pairs = _paired(before, after, files)
    sides = _sides(before, after, root, None not in said, changes.taken)
    single = not after.folder or (len(files) == 1 and not sides and _is_file(out, files))
    package, untouched = Package(folder=not single), {}
    findings: list[Finding] = []
    for relative, file in files.items():
        old, new = pairs[relative]
        kind = "safetensors" if single and out.suffix == ".safetensors" else CONTAINERS[file.container]
        tensors = _patched_tensors(source, result, file, old.tensors, new.tensors, changes)
        if not tensors:
            continue
        metadata = _patched_keys(file.metadata, old.metadata, new.metadata) | changes.strings
        metadata = {key: value for key, value in metadata.items() if value is not None}
        structure = None
        if file.structure is not None and CONTAINERS[file.container] == "torch":
            others = _others(file.structure)
            if kind == "torch":
                structure = _restructured(file, tensors)
            elif others:
                shown = counted(
                    len(others), "object", "of the torch file that is no tensor is", "of the torch file that are no tensors are"
                )
                findings.append(warning("no-tensors", file.name, f"{shown} not carried", *others[:_SHOWN]))
        if kind == "safetensors":
            metadata = stamped(tensors, metadata)
        code = [finding.message for finding in file.findings if finding.severity is Severity.ERROR]
        if code:  # written anew there is nothing of it any more
            findings.append(warning("left-behind", file.name, "what is more than data in this file is not carried", *code[:_SHOWN]))
        elif kind == CONTAINERS[file.container] and metadata == file.metadata and _same(tensors, file.tensors):
            untouched[relative] = file.path
            continue
        package.files[relative] = NamedTensors(tensors, metadata, kind, structure)
    package.files |= sides
    return Patched(package, untouched, findings)


def _is_file(out: Path, files: Mapping[str, TensorFile]) -> bool:
    """Whether the name of the output is that of a file like the adapter's."""
    return out.suffix != "" and out.suffix in (".safetensors", *(PurePosixPath(name).suffix for name in files))


def _opened(source: Adapter, root: Path) -> dict[str, TensorFile]:
    """The adapter's files by their names below `root`."""
    found: dict[str, TensorFile] = {}
    for path in map(Path, source.files):
        try:
            file = open_file(path)
            relative = path.absolute().relative_to(root.absolute()).as_posix()
        except (UpparamError, OSError, ValueError) as problem:
            raise UnpatchableError(f"{path.name} is not a file of its own") from problem
        if file.container == "gguf" and isinstance(file.structure, dict) and file.structure.get("quantised"):
            raise UnpatchableError("quantised tensors are not written")
        if file.container not in CONTAINERS:
            raise UnpatchableError(f"{file.container} files are written anew")
        found[relative] = file
    if not found:
        raise UnpatchableError("the adapter has no files")
    return found


def _same(tensors: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    return tensors.keys() == others.keys() and all(tensor is others[name] for name, tensor in tensors.items())


def _scaled(adapter: Adapter, stand_in: Scaling) -> Adapter:
    """The adapter with any scale where it is not known, and without hashes: what is written on both sides changes nothing."""
    each = Each()
    deltas = {
        target: delta if delta.scale is not None else each(delta, lambda whole: replace(whole, scaling=stand_in))
        for target, delta in adapter.deltas.items()
    }
    metadata = {key: value for key, value in adapter.metadata.items() if key not in HASHES}  # those of the file are made at the end
    return replace(adapter, deltas=deltas, leftovers={}, metadata=metadata)


def _named(package: Package) -> dict[str, NamedTensors]:
    return {name: content for name, content in package.files.items() if isinstance(content, NamedTensors)}


def _paired(before: Package, after: Package, files: Mapping[str, TensorFile]) -> dict[str, tuple[NamedTensors, NamedTensors]]:
    """For each file what the dialect would write there before and after."""
    old, new = _named(before), _named(after)
    if len(files) == 1 and len(old) == 1 and len(new) == 1:
        return {next(iter(files)): (next(iter(old.values())), next(iter(new.values())))}
    if set(old) != set(files) or not set(new) <= set(files):
        raise UnpatchableError("the dialect writes other files than there are")
    return {name: (old[name], new.get(name) or NamedTensors({})) for name in files}


def _equal(one: Tensor, other: Tensor) -> bool:
    """True for the same place of one file, and for the same bits."""
    if one is other or (one.source is other.source and one == other):
        return True
    return same_bits(one, other)


def _patched_tensors(
    source: Adapter, result: Adapter, file: TensorFile, before: Mapping[str, Tensor], after: Mapping[str, Tensor], changes: Changes
) -> dict[str, Tensor]:
    """The file's tensors with the difference of before and after applied, in the file's order, new ones behind."""
    prefix = _prefix(before, file.tensors)
    old, new = ({prefix + name: tensor for name, tensor in side.items()} for side in (before, after))
    added = {name: tensor for name, tensor in new.items() if name not in old}
    for name in old:
        if name in file.tensors or (name in new and _equal(old[name], new[name])):
            continue
        if name not in new or not changes.restates or all(delta.scale is not None for delta in source.deltas.values()):
            raise UnpatchableError(f"the file has no {name}, which the dialect would write")
        added[name] = new[name]  # what states a scale that the file did not say
    # unexplained tensors that are taken out by name, or given up; a dialect of several files calls them otherwise than the file does
    gone = {_place(tensor) for name, tensor in source.leftovers.items() if name not in result.leftovers}
    kept: dict[str, Tensor] = {}
    for name, tensor in file.tensors.items():
        if name not in old and _place(tensor) in gone:
            continue
        if name not in old:
            if name in new:
                raise UnpatchableError(f"the file has a {name} that is something else")
            kept[name] = tensor
        elif name in new:
            if _equal(old[name], new[name]):
                kept[name] = tensor
            elif _equal(tensor, old[name]):
                kept[name] = new[name]
            elif changes.stored is not None and not changes.restates:
                kept[name] = recast(tensor, changes.stored)
            else:
                raise UnpatchableError(f"the dialect writes {name} otherwise than the file has it")
    if len(kept) < len(file.tensors):
        kept = _without_orphans(source, file, kept, old, new)
    return kept | added


def _place(tensor: Tensor) -> tuple[object, ...]:
    """Where a tensor lies: the same for two readings of one file."""
    return tensor.source.name, getattr(tensor.source, "start", 0) + tensor.offset, tensor.shape, tensor.dtype


def _without_orphans(
    source: Adapter, file: TensorFile, kept: dict[str, Tensor], old: Mapping[str, Tensor], new: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What stays, less what the dialect explains but does not write and whose module is gone. Raises RefusedError for unexplained ones."""
    had = {above for name in old if name in file.tensors for above in _above(name)}
    has = {above for name in new for above in _above(name)}
    orphans = [name for name in kept if name not in old and any(above in had and above not in has for above in _above(name))]
    strange = {_place(tensor) for tensor in source.leftovers.values()}
    unexplained = [name for name in orphans if _place(kept[name]) in strange]
    if unexplained:
        raise RefusedError(
            "tensors that no rule explains belong to modules that are taken out or renamed", file=file.path, tensor=unexplained[0],
            found=", ".join(unexplained[:_SHOWN]) + (f" ... ({len(unexplained)})" if len(unexplained) > _SHOWN else ""),
            remedy="take them out by name with --remove, give up all that are unexplained with --drop leftovers, or leave these modules",
        )  # fmt: skip
    return {name: tensor for name, tensor in kept.items() if name not in orphans}


def _above(name: str) -> list[str]:
    """Every beginning of a name that ends where a part of it does, the whole left out."""
    return [name[:at] for at, letter in enumerate(name) if letter in "./"]


def _prefix(before: Mapping[str, Tensor], there: Mapping[str, Tensor]) -> str:
    """What stands before every name in the file: a nested dict's key, say."""
    first = next(iter(before), None)
    if first is None or first in there:
        return ""
    found = [name.removesuffix(first) for name in there if name.endswith(first)]
    return next((prefix for prefix in found if all(prefix + name in there for name in before)), "")


def _patched_keys(there: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping with the difference of before and after applied."""
    found = {key: value for key, value in there.items() if key in after or key not in before}
    return found | {key: value for key, value in after.items() if key not in before or before[key] != value}


def _sides(before: Package, after: Package, root: Path, known: bool, taken: Collection[str]) -> dict[str, NamedTensors | bytes]:
    """The side files there are, verbatim but for what the edit changes in them, and where every scale is `known` those that it adds."""
    found: dict[str, NamedTensors | bytes] = {}
    for name, new in after.files.items():
        if not isinstance(new, bytes):
            continue
        old, place = before.files.get(name), root / PurePosixPath(name)
        there = place.read_bytes() if place.is_file() else None
        if old == new:
            if there is not None:
                found[name] = there
        elif there is None or there == old:
            found |= {name: new} if there is not None or known else {}
        else:
            found[name] = _patched_json(name, there, old, new, taken)
    return found


def _patched_json(name: str, there: bytes, old: object, new: bytes, taken: Collection[str]) -> bytes:
    """A JSON file with the keys that the edit changes, less those that are `taken` out; a dialect that does not repeat a key takes none out.

    Raises UnpatchableError where a key that changes says something else than the dialect would.
    """
    try:
        config, before, after = (json.loads(text) for text in (there, old if isinstance(old, bytes) else b"", new))
    except ValueError as problem:
        raise UnpatchableError(f"{name} is written anew") from problem
    if not all(isinstance(side, dict) for side in (config, before, after)):
        raise UnpatchableError(f"{name} is written anew")
    for key in before:
        if before[key] != after.get(key) and key in config and config[key] != before[key] and after.get(key) != config[key]:
            raise UnpatchableError(f"{name} says another {key} than the dialect would")
    found = {key: after.get(key, value) if before.get(key) != after.get(key) else value for key, value in config.items()}
    found |= {key: value for key, value in after.items() if key not in config and before.get(key) != value and value not in _NOTHING}
    found = {key: value for key, value in found.items() if key not in taken}
    return (json.dumps(found, indent=2, ensure_ascii=False) + "\n").encode()


_NOTHING: tuple[Any, ...] = (None, False, {}, [])
"""What a config need not say."""


def _others(structure: Any) -> list[str]:
    """Where a torch file holds something else than tensors."""
    return [f"{path}: {type(leaf).__name__}" for path, leaf in leaves(structure, (str, int, float, bytes, type(None), Opaque))]


_GONE = object()


def _restructured(file: TensorFile, tensors: Mapping[str, Tensor]) -> Any:
    """What the torch file's pickle built, with these tensors for its own. Raises RefusedError where that is more than plain data."""
    strange = next(leaves(file.structure, Opaque), None)
    if strange is not None:
        raise RefusedError(
            "this torch file holds more than plain data, and nothing of that is rebuilt", file=file.path, tensor=strange[0],
            found=strange[1].qualname, remedy="write the tensors elsewhere as safetensors, with -o NAME.safetensors",
        )  # fmt: skip
    made = _rebuilt(file.structure, "", tensors)
    for name in tensors:
        if name in file.tensors:
            continue
        place, _, last = name.rpartition("/")
        inside = made
        for key in place.split("/") if place else ():
            inside = inside.get(key) if isinstance(inside, dict) else None
        if not isinstance(inside, dict):
            raise UnpatchableError(f"the torch file has no place for {name}")
        inside[last] = tensors[name]
    return made


def _rebuilt(value: Any, path: str, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return tensors.get(path or LONE, _GONE)
    if isinstance(value, dict):
        pairs = {key: _rebuilt(item, f"{path}/{key}" if path else str(key), tensors) for key, item in value.items()}
        return {key: item for key, item in pairs.items() if item is not _GONE}
    if isinstance(value, (list, tuple)):
        items = [_rebuilt(item, f"{path}/{index}" if path else str(index), tensors) for index, item in enumerate(value)]
        if any(item is _GONE for item in items):
            raise UnpatchableError("what is taken out is numbered, and the numbers behind it would change")
        return items if isinstance(value, list) else tuple(items)
    return value
