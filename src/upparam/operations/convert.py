"""Convert: write an adapter in a dialect, read it back, and prove that it is the same adapter."""

from __future__ import annotations

import importlib
import time
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from upparam import dialects
from upparam.adapter import Adapter, without
from upparam.algorithms.lora import LoRA
from upparam.atomic import atomic_file, atomic_folder, reaching_disk, refuse_existing
from upparam.bases.base import Base
from upparam.containers import open_file
from upparam.containers.base import flatten
from upparam.dialects import by_diffusers
from upparam.dialects.base import NamedTensors, Package, ReadOptions
from upparam.dialects.placing import base_of
from upparam.errors import RefusedError, UsageError, VerificationError
from upparam.operations.fitting import Arithmetic, fitted
from upparam.operations.initial import open_without
from upparam.operations.late import Late
from upparam.operations.named_base import refuse_other
from upparam.operations.opening import open_adapter
from upparam.operations.proof import ModuleProof, proved, statements
from upparam.operations.receipt import Receipt
from upparam.tensors import same_bits
from upparam.wording import counted

WRITERS: dict[str, str] = {
    "safetensors": "upparam.containers.safetensors:write",
    "torch": "upparam.containers.torchfile.write:write",
    "npy": "upparam.containers.npy:write_npy",
    "npz": "upparam.containers.npy:write_npz",
    "raw": "upparam.containers.raw:write",
    "gguf": "upparam.containers.gguf:write",
}
"""Container to its writer. safetensors and gguf take (stream, tensors, metadata), npz (stream, tensors), npy and raw (stream, tensor),
torch (stream, structure)."""


def convert(
    path: Path | str,
    out: Path | str,
    to: str,
    *,
    read: ReadOptions | None = None,
    force: bool = False,
    verify: bool = True,
    sync: bool = True,
    drop: Collection[str] = (),
    options: Mapping[str, Any] | None = None,
    arithmetic: Arithmetic | None = None,
    initial: Path | str | None = None,
) -> Receipt:
    """Read the adapter at `path` and write it to `out` in dialect `to`. See `write_adapter` for what is raised.

    `initial` is the adapter that training began as, to be subtracted (see `upparam.operations.initial`).
    """
    refuse_existing(Path(out), force)
    adapter = open_without(path, initial, read)
    with ExitStack() as stack:
        if arithmetic is not None and arithmetic.lowrank is not None:
            from upparam.operations.spool import Spool

            arithmetic.keep = stack.enter_context(Spool(Path(out).absolute().parent)).keep
        receipt = write_adapter(
            adapter, out, to, read=read, force=force, verify=verify, sync=sync, drop=drop, options=options, arithmetic=arithmetic
        )  # fmt: skip
    receipt.inputs = [str(path)] if initial is None else [str(path), f"less {initial}"]
    return receipt


def write_adapter(
    adapter: Adapter,
    out: Path | str,
    dialect: str,
    *,
    read: ReadOptions | None = None,
    force: bool = False,
    verify: bool = True,
    sync: bool = True,
    drop: Collection[str] = (),
    options: Mapping[str, Any] | None = None,
    arithmetic: Arithmetic | None = None,
) -> Receipt:
    """Write `adapter` to `out` (a folder, or a file where the dialect is one file) and prove the result by reading it back.

    `drop` names what may be given up (see `upparam.adapter.DROPPABLE`). `read` holds
    what the user said when the adapter was read (base, targets); it is used again for the proof. `arithmetic` says what may be computed to make
    the adapter fit, and takes note of what was; without it nothing is. Raises OutputExistsError,
    RefusedError when something would be lost, VerificationError (and leaves nothing behind) when what was written reads back otherwise.
    """
    begun = time.monotonic()
    out = Path(out)
    member = dialects.get(dialect)
    if not member.writable:
        raise RefusedError(f"upparam reads {dialect} but does not write it", remedy="see 'upparam dialects'")
    adapter, dropped = without(adapter, drop)
    if adapter.leftovers:
        shown = ", ".join(list(adapter.leftovers)[:5]) + (" ..." if len(adapter.leftovers) > 5 else "")
        raise RefusedError(
            f"{counted(len(adapter.leftovers), 'tensor')} that no rule of {adapter.dialect} explains would be lost",
            file=adapter.files[0] if adapter.files else None,
            found=shown,
            remedy="give them up with --drop leftovers",
        )
    if adapter.layout == "unnamed" and not getattr(member, "verbatim", False):
        raise RefusedError(
            f"nothing says which module{'s' if len(adapter.deltas) > 1 else ''} of a base these factors change",
            file=adapter.files[0] if adapter.files else None, remedy="name them with --target, or give --base so that shapes and order tell",
        )  # fmt: skip
    unknown = [target for target, delta in adapter.deltas.items() if delta.scale is None]
    if unknown and not getattr(member, "verbatim", False):
        raise RefusedError(
            f"the effective scale of {len(unknown)} of {len(adapter.deltas)} targets is not stored in the files and is never guessed",
            file=adapter.files[0] if adapter.files else None, tensor=str(unknown[0]), remedy="give it with --alpha or --scale",
        )  # fmt: skip
    if adapter.conditions and dialect != adapter.dialect and not getattr(member, "verbatim", False):
        raise RefusedError(
            f"{dialect} cannot say under which conditions these deltas hold",
            file=adapter.files[0] if adapter.files else None, found="; ".join(adapter.conditions), remedy="give them up with --drop conditions",
        )  # fmt: skip
    given = {"base": read.base} if read is not None and read.base is not None else {}
    if read is not None and read.base is not None:
        refuse_other(adapter, read.base)
    adapter = _with_kernels(adapter, base_of(adapter, given))
    how = arithmetic or Arithmetic()
    adapter, package = fitted(adapter, member, {**given, **(options or {}), "drop": frozenset(drop)}, how)
    proofs: list[ModuleProof] = []
    if _as_file(package, out):
        package.folder = False
    _check_ending(package, out, dialect)
    if package.folder:
        with atomic_folder(out, force=force, sync=sync) as temporary, Late() as late:
            size = write_package(package, temporary, sync, late)
            if verify:
                proofs = _prove(adapter, package, temporary, dialect, read)
        outputs = [str(out / name) for name in package.files]
    else:
        if len(package.files) != 1:
            raise VerificationError("a single-file dialect made several files", found=", ".join(package.files))
        with atomic_file(out, force=force, sync=sync) as temporary, Late() as late:
            size = write_file(next(iter(package.files.values())), temporary, sync, late)
            if verify:
                proofs = _prove(adapter, package, temporary, dialect, read)
        outputs = [str(out)]
    counts = {"targets": len(adapter.deltas), "extras": len(adapter.extras), "bytes": size, **how.counts()}
    findings = [finding for finding in adapter.findings if finding.severity] + dropped
    for content in package.files.values():
        if isinstance(content, NamedTensors) and dialect in by_diffusers.JUDGED:
            findings += by_diffusers.remarks(dialect, base_of(adapter, given), content.tensors)
    title = f"{adapter.written_as} to {dialect}"
    told = statements(proofs, adapter) if verify else []
    modules = [proof.facts() for proof in proofs] + how.facts()
    return Receipt(title, list(adapter.files), outputs, counts, told, findings, time.monotonic() - begun, modules)


def _as_file(package: Package, out: Path) -> bool:
    """Whether a package of one file goes by the name of `out` itself, which has that file's ending."""
    return package.folder and len(package.files) == 1 and bool(out.suffix) and Path(next(iter(package.files))).suffix == out.suffix


_ENDINGS = {"safetensors": (".safetensors",), "gguf": (".gguf",), "npz": (".npz",), "torch": (".pt", ".bin", ".ckpt", ".pth")}
"""By the container that is written, what its file may be called: loaders go by the ending."""


def _check_ending(package: Package, out: Path, dialect: str) -> None:
    """Raise RefusedError where the name of the output says another container than it gets, or a file where a folder is written."""
    known = [ending for endings in _ENDINGS.values() for ending in endings]
    if out.suffix.lower() not in known:
        return
    if package.folder:
        raise RefusedError(
            f"{dialect} writes a folder of {len(package.files)} files", file=out, found=f"a name that ends in {out.suffix}",
            remedy=f"name a folder, such as {out.with_suffix('').name}",
        )  # fmt: skip
    content = next(iter(package.files.values()))
    if not isinstance(content, NamedTensors):
        return
    fitting = _ENDINGS.get(content.container, ())
    if fitting and out.suffix.lower() not in fitting:
        raise RefusedError(
            f"{dialect} writes {content.container}, and loaders go by the ending", file=out, expected=" or ".join(fitting), found=out.suffix,
            remedy=f"name it {out.with_suffix(fitting[0]).name}",
        )  # fmt: skip


def _with_kernels(adapter: Adapter, base: Base | None) -> Adapter:
    """The adapter with the kernels of its LoRAs as the base has them: one made of another algorithm may have flattened them (LoHa, LoKr)."""
    if base is None or adapter.layout != "reference":
        return adapter
    changed = {
        target: lora for target, delta in adapter.deltas.items()
        if type(delta) is LoRA and target.rows is None and target.parameter == "weight" and len(delta.shape) == 2
        and (known := base.by_path.get(target.module)) is not None and (lora := delta.with_kernel(known.canonical)) is not delta
    }  # fmt: skip
    return replace(adapter, deltas={**adapter.deltas, **changed}) if changed else adapter


def write_package(package: Package, folder: Path, sync: bool, late: Late) -> int:
    """Write every file of a package below `folder`; returns the bytes written."""
    total = 0
    for name, content in package.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        total += write_file(content, path, sync, late)
    return total


def write_file(content: NamedTensors | bytes, path: Path, sync: bool, late: Late) -> int:
    """Write one file of a package, which begins to reach the disk where `sync` will wait for that; returns its size.

    Metadata that only the bytes tell is in its place once `late` has ended.
    """
    if isinstance(content, bytes):
        path.write_bytes(content)
        return len(content)
    late.begin(path, content)
    module, function = WRITERS[content.container].split(":")
    writer = getattr(importlib.import_module(module), function)
    with path.open("xb") as stream, reaching_disk(path, sync):
        if content.container == "torch":
            writer(stream, content.structure if content.structure is not None else dict(content.tensors))
        elif content.container in ("npy", "raw"):
            (tensor,) = content.tensors.values()
            writer(stream, tensor)
        elif content.container == "npz":
            writer(stream, content.tensors)
        else:
            writer(stream, content.tensors, content.metadata)
    return path.stat().st_size


def _prove(adapter: Adapter, package: Package, written: Path, dialect: str, read: ReadOptions | None) -> list[ModuleProof]:
    try:
        again = open_adapter(written, dialect=dialect, options=None if read is None else replace(read, adapter=None))
    except UsageError:
        # What the user had to say of the input, the output says itself and in its own terms: the alpha of parts that were joined, say.
        again = open_adapter(written, dialect=dialect, options=ReadOptions(base=read.base if read is not None else None))
    proofs = proved(adapter, again)
    if any(proof.distance is not None for proof in proofs):
        # Other factors with the same dW were meant, so their distance would hide a few wrong bits: these factors have to be the very ones.
        for name, content in package.files.items():
            if isinstance(content, NamedTensors):
                _same_file(content, written / name if package.folder else written)
    return proofs


def _same_file(meant: NamedTensors, path: Path) -> None:
    """Raise VerificationError unless the file holds these tensors bit for bit."""
    ours = dict(meant.tensors) if meant.structure is None else flatten(meant.structure)
    if meant.container == "raw":
        same = path.read_bytes() == b"".join(tensor.raw() for tensor in ours.values())
    else:
        theirs = dict(open_file(path).tensors)
        if meant.container == "npy":
            theirs = dict(zip(ours, theirs.values(), strict=False))
        same = ours.keys() == theirs.keys() and all(same_bits(tensor, theirs[name]) for name, tensor in ours.items())
    if not same:
        raise VerificationError("the tensors read back are not those that were written", file=path.name)
