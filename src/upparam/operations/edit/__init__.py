"""Edit: change one thing about an adapter, write it in its own dialect, and prove that the rest has the same bits under the same names."""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from upparam import dialects
from upparam.adapter import Adapter, without
from upparam.atomic import atomic_file, atomic_folder, refuse_existing, refuse_strangers, swap
from upparam.bases import inventory
from upparam.beside import beside
from upparam.dialects.base import Dialect, Package, ReadOptions
from upparam.dialects.refusing import BAKE, LOWER
from upparam.errors import DeadAdapterError, NotAnAdapterError, OutputExistsError, RefusedError, UpparamError, UsageError, VerificationError
from upparam.findings import Finding, info, warning
from upparam.operations.convert import write_adapter, write_file, write_package
from upparam.operations.edit.changes import CONFIG, Changes, changed, parsed
from upparam.operations.edit.files import Compared, compare_files, container_of, other_names, put_back
from upparam.operations.edit.moving import moved
from upparam.operations.edit.patching import UnpatchableError, patched
from upparam.operations.fitting import Arithmetic
from upparam.operations.late import Late
from upparam.operations.opening import open_adapter
from upparam.operations.proof import ModuleProof, proved, statements
from upparam.operations.receipt import Receipt
from upparam.progress import Progress, silent
from upparam.tensors import same_bits
from upparam.wording import counted


def edit(
    path: Path | str,
    out: Path | str | None = None,
    *,
    in_place: bool = False,
    metadata: Mapping[str, str | None] | None = None,
    remove: Sequence[str] = (),
    keep: Sequence[str] = (),
    rename: Sequence[tuple[str, str]] = (),
    dtype: str | None = None,
    alpha: float | None = None,
    scale: float | None = None,
    keep_scale: bool = False,
    read: ReadOptions | None = None,
    force: bool = False,
    verify: bool = True,
    drop: Collection[str] = (),
    threads: int | None = None,
    progress: Progress = silent,
) -> Receipt:
    """Write the adapter at `path` with changes to `out`, or with `in_place` where it is; see `Changes` for what can be changed.

    Everything that was not asked for keeps its bits and names. What is written is proved by reading it back before it takes its place,
    which it does by renaming. A new dtype, and a scale put into a factor, round each element once; the receipt says how far that moves dW.

    Raises UsageError where nothing is to change or it is not said where to write, what `changed` and writing raise, and RefusedError
    where the dialect does not hold metadata that is asked for, or where editing in place would change the files' names or containers.
    """
    begun = time.monotonic()
    changes = Changes(metadata or {}, remove, keep, rename, dtype, alpha, scale, keep_scale)
    if not changes.any:
        raise UsageError("nothing to change", remedy="see what there is with 'upparam edit ADAPTER' or 'upparam inspect ADAPTER'")
    if (out is None) is not in_place:
        raise UsageError("nowhere to write, or two places", remedy="give either an output or in-place")
    path = Path(path)
    place = path.absolute() if out is None else Path(out).absolute()
    refuse_existing(place, force or in_place)
    source = open_adapter(path, options=read)
    given, findings = without(source, drop)
    result, before, counts = changed(given, changes)
    for name in [name for name in given.leftovers if name not in result.leftovers]:
        findings.append(warning("given-up", name, "a tensor that no rule explains is taken out, as --remove asked"))
    if result.leftovers:
        findings.append(_carried(result))
    told_base = read
    if read is None and source.base is not None and source.base.name in inventory.known():
        # Fewer modules may no longer tell their base by themselves.
        told_base = ReadOptions(base=inventory.load(source.base.name))
    with beside(place) as folder:
        written = folder / place.name
        try:
            receipt, again = _written(source, result, changes, path, written, read, told_base, verify, drop, in_place)
        except (VerificationError, NotAnAdapterError, DeadAdapterError) as problem:
            raise _not_read(source, changes, path, problem) from problem
        told = _metadata(source, again, changes)
        compared = compare_files(source, written)
        dropped = {name for name in source.leftovers if name not in result.leftovers}
        _expected(changes, replace(compared, gone=[] if drop else [name for name in compared.gone if name not in dropped]))
        findings += _container(source, written)
        if changes.stored is not None or changes.keep_scale:
            counts["effect_moved"], lost = moved(before, result, threads, progress)
            findings += lost
        if in_place:
            linked = other_names(source)
            receipt.outputs = put_back(source, path, written)
            findings += [linked[file] for name in receipt.outputs if (file := Path(name).absolute()) in linked]
        else:
            receipt.outputs = [str(place / Path(name).relative_to(written)) if written.is_dir() else str(place) for name in receipt.outputs]
            _take_place(written, place)
    receipt.operation, receipt.inputs = "edit in place" if in_place else "edit", [str(path)]
    receipt.counts = counts | {"tensors_kept": compared.same} | compared.counts() | receipt.counts
    receipt.proofs += [*([told] if told else []), compared.proof()] if verify else []
    receipt.findings += findings
    receipt.seconds = time.monotonic() - begun
    return receipt


def _carried(adapter: Adapter) -> Finding:
    names = list(adapter.leftovers)
    return info(
        "carried",
        names[0],
        f"{len(names)} {'tensor that no rule explains was' if len(names) == 1 else 'tensors that no rule explains were'} carried bit for bit",
        *names[:_SHOWN],
    )


_SHOWN = 5


def _written(
    source: Adapter, result: Adapter, changes: Changes, path: Path, written: Path, read: ReadOptions | None, told: ReadOptions | None,
    verify: bool, drop: Collection[str], in_place: bool,
) -> tuple[Receipt, Adapter]:  # fmt: skip
    """Write the result into the source's own files, or where those do not allow it as the dialect writes; and read it back."""
    own = source.written_as
    member = dialects.get(own)
    options = {"drop": frozenset(drop), **({"base": told.base} if told is not None and told.base is not None else {})}
    root = path.absolute() if path.is_dir() else path.absolute().parent
    asked = written.with_suffix("") if in_place else written
    try:
        made = patched(source, result, changes, root, asked, lambda adapter: _package(member, adapter, options))
    except UnpatchableError as problem:
        if result.leftovers:
            raise RefusedError(
                "this edit cannot leave the unexplained tensors where they are", file=source.files[0] if source.files else None,
                tensor=next(iter(result.leftovers)), found=str(problem), remedy="give them up with --drop leftovers",
            ) from problem  # fmt: skip
        receipt = write_adapter(result, written, own, read=told, verify=verify, drop=drop, arithmetic=Arithmetic(offered=()))
        receipt.findings = [finding for finding in receipt.findings if finding.code != "given-up"]
        return receipt, open_adapter(written, dialect=own, options=ReadOptions(base=None if told is None else told.base))
    if made.package.folder:
        with atomic_folder(written) as temporary, Late() as late:
            size = write_package(made.package, temporary, True, late) + sum(
                _copied(file, temporary / name) for name, file in made.untouched.items()
            )
        outputs = [str(written / name) for name in (*made.untouched, *made.package.files)]
    else:
        with atomic_file(written) as temporary, Late() as late:
            (content,) = made.package.files.values() or [None]
            size = (
                write_file(content, temporary, True, late)
                if content is not None
                else _copied(next(iter(made.untouched.values())), temporary)
            )
        outputs = [str(written)]
    proofs, again = _read_back(result, written, [read, told])
    counts = {"targets": len(result.deltas), "extras": len(result.extras), "bytes": size}
    findings = [finding for finding in again.findings if finding.severity] + made.findings
    modules = [proof.facts() for proof in proofs] if verify else []
    return Receipt("edit", [], outputs, counts, statements(proofs, result) if verify else [], findings, modules=modules), again


def _not_read(source: Adapter, changes: Changes, path: Path, problem: UpparamError) -> UpparamError:
    """What to say where that which was asked for, written, is not read as what was meant: mostly there is no such thing in the dialect."""
    if changes.rename:
        message = "under the new names this is not read as the same adapter"
        remedy = "give names that the dialect and the base have; see 'upparam bases NAME'"
    elif changes.restates and isinstance(problem, VerificationError):
        message, remedy = f"{source.dialect} does not hold this multiplier", "put the multiplier into a factor with --bake"
    elif changes.remove or changes.keep:
        message, remedy = (
            f"what would be left is not read as an adapter of {source.dialect}",
            "keep more of it, or name its base with --base",
        )
    else:
        return problem
    return RefusedError(message, file=path, tensor=problem.tensor, found=problem.message, remedy=remedy)


def _package(member: Dialect, adapter: Adapter, options: Mapping[str, Any]) -> Package:
    """What the dialect writes. A refusal speaks of the options of `edit`."""
    try:
        return member.write(adapter, options)
    except RefusedError as problem:
        remedy: str | None = "this dialect says no multiplier but 1; put what there is into a factor with --bake"
        if BAKE not in (problem.remedy or ""):
            if LOWER not in (problem.remedy or ""):
                raise
            remedy = None  # another algorithm is no edit
        raise RefusedError(problem.message, file=problem.file, tensor=problem.tensor, found=problem.found, remedy=remedy) from problem


def _copied(file: Path, place: Path) -> int:
    """A file as it is; returns its size."""
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, place)
    return place.stat().st_size


def _read_back(result: Adapter, written: Path, ways: Sequence[ReadOptions | None]) -> tuple[list[ModuleProof], Adapter]:
    """What was written, read as the source was, else with what the source told of its base, else by whatever dialect knows it now.

    Proved to be the result, carried tensors and all. Raises the first problem.
    """
    problem: UpparamError | None = None
    for dialect, options in product((result.written_as, None), ways):
        try:
            again = open_adapter(written, dialect=dialect, options=options)
            strange = {
                name for name, tensor in again.leftovers.items() if name in result.leftovers and same_bits(tensor, result.leftovers[name])
            }
            if len(strange) < len(result.leftovers):
                lost = next(name for name in result.leftovers if name not in strange)
                raise VerificationError("a carried tensor reads back otherwise, or not at all", tensor=lost)
            rest = {name: tensor for name, tensor in again.leftovers.items() if name not in strange}
            return proved(result, replace(again, leftovers=rest)), again
        except (UsageError, VerificationError, NotAnAdapterError, DeadAdapterError) as found:
            problem = problem or found
    assert problem is not None
    raise problem


def _take_place(written: Path, place: Path) -> None:
    """Rename what was written to the output. Raises OutputExistsError where that would lose what is no part of it."""
    if written.is_file() and place.is_dir():
        raise OutputExistsError("a folder stands where the file should go", file=place)
    refuse_strangers(written, place)
    swap(written, place)


def metadata_of(path: Path | str, *, read: ReadOptions | None = None) -> dict[str, Any]:
    """What editing can change without touching a tensor: the dialect, its string metadata verbatim, and the config file beside it."""
    adapter = open_adapter(path, options=read)
    return {"dialect": adapter.dialect, "files": list(adapter.files), "metadata": dict(adapter.metadata), "config": dict(adapter.config)}


def _container(source: Adapter, written: Path) -> list[Finding]:
    """A warning where the adapter came in another container than its dialect writes."""
    olds = {kind for name in source.files if (kind := container_of(Path(name))) is not None}
    news = {kind for file in (written.rglob("*") if written.is_dir() else [written]) if (kind := container_of(file)) is not None}
    if olds and olds != news:
        return [warning("container", source.files[0], "written in another container than it came in", *sorted(olds), *sorted(news))]
    return []


def _metadata(source: Adapter, again: Adapter, changes: Changes) -> str:
    """What became of the metadata. Raises RefusedError where what was asked for did not come about."""
    for key, value in changes.metadata.items():
        place: Mapping[str, Any] = again.config if key.startswith(CONFIG) else again.metadata
        name = key.removeprefix(CONFIG)
        meant = None if value is None else parsed(value) if key.startswith(CONFIG) else value
        if place.get(name) != meant or (value is None and name in place):
            kinds = {kind for file in source.files if (kind := container_of(Path(file))) is not None}
            if place is again.metadata and not kinds & {"safetensors", "gguf"}:
                raise RefusedError(
                    "this container has no metadata", file=source.files[0] if source.files else None, tensor=key, found=", ".join(sorted(kinds)),
                    remedy="write it elsewhere as safetensors: -o NAME.safetensors, or 'upparam convert' for a folder",
                )  # fmt: skip
            raise RefusedError(
                f"{source.dialect} does not hold this: it has no place for it, or it follows from the tensors", file=source.files[0] if source.files else None,
                tensor=key, expected=repr(meant), found=repr(place.get(name)), remedy="change what it follows from (alpha, scale, dtype, modules)",
            )  # fmt: skip
    before, after = _flat(source), _flat(again)
    differing = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    followed = [key for key in differing if key not in changes.metadata]
    said = [f"metadata {key} {'set' if value is not None else 'taken out'}" for key, value in changes.metadata.items()]
    if followed:
        said.append(f"metadata that follows: {', '.join(followed)}")
    kept = sum(before[key] == after.get(key) for key in before)
    return "; ".join([*said, f"{kept} other metadata keys unchanged"]) if said or before else ""


def _flat(adapter: Adapter) -> dict[str, Any]:
    return {**adapter.metadata, **{f"{CONFIG}{key}": value for key, value in adapter.config.items()}}


def _expected(changes: Changes, compared: Compared) -> None:
    """Raise RefusedError when tensors changed that the changes do not explain: the dialect rewrote more than was asked for."""
    names = bool(changes.rename)
    wrong = [] if changes.remove or changes.keep or names else compared.gone
    wrong = wrong + ([] if names or changes.restates else compared.new)
    wrong = wrong + (compared.reshaped if changes.dtype is not None or changes.restates else compared.changed)
    if wrong:
        raise RefusedError(
            "writing this adapter again changes tensors that were to stay", tensor=wrong[0], found=counted(len(wrong), "tensor"),
            remedy="modules that share a tensor, such as q, k and v of a fused weight, go and stay together" if changes.remove or changes.keep
            else "bring it into its dialect's present form with 'upparam convert' first",
        )  # fmt: skip
