"""Writing the merged model: headers laid out as the base's, data streamed, side files and index carried, the result proved."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from upparam._version import __version__
from upparam.atomic import atomic_file, atomic_folder
from upparam.checkpoint import INDEX_SUFFIX, Checkpoint, CheckpointFile, checkpoint_file
from upparam.containers import open_file
from upparam.containers.safetensors import header_bytes, layout_order
from upparam.containers.writing import make_room, write_at
from upparam.dtypes import DType
from upparam.errors import RefusedError, UnreadableError, VerificationError
from upparam.findings import Finding, info, warning
from upparam.operations.merge.planned import Plan, Work
from upparam.operations.merge.proof import Samples, check_converted, check_samples, check_untouched
from upparam.operations.merge.rounding import NO_INFINITY
from upparam.operations.merge.stream import (
    TASK_BYTES,
    Change,
    Convert,
    Copy,
    Flusher,
    Shared,
    Task,
    chunks_of,
    run_tasks,
)
from upparam.progress import Progress
from upparam.sources import FileSource
from upparam.tensors import Tensor
from upparam.wording import counted

NOTE_KEY = "upparam.merge"
"""The metadata key under which a merged file says what was merged."""
_STALE = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
"""Metadata that states a hash of the data and would be false afterwards."""


@dataclass
class OutFile:
    """One file to write: where, the tensors in order with the dtype they get, and the header's metadata."""

    source: CheckpointFile
    relative: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    added: dict[str, Tensor] = field(default_factory=dict)

    @property
    def verbatim(self) -> bool:
        """True for a file that is copied as it is but for the bytes of changed tensors (GGUF)."""
        return self.source.container == "gguf"

    def header(self, note: str) -> bytes:
        """The safetensors header with the note of what was merged; nothing for a verbatim file, whose header is copied."""
        return b"" if self.verbatim else header_bytes(self.tensors, {**self.metadata, NOTE_KEY: note})

    def size(self, header: int) -> int:
        """Bytes of the whole file."""
        if self.verbatim:
            return self.source.path.stat().st_size
        return header + sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass
class Outcome:
    """What writing found: changed elements, overflows, bytes, proofs and findings."""

    elements: int = 0
    tensors: int = 0
    bytes: int = 0
    proofs: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)


def out_name(relative: str) -> str:
    """The name of a written weight file: torch files become safetensors, transformers' pytorch_model becomes model."""
    path = Path(relative)
    if path.suffix in (".safetensors", ".gguf"):
        return relative
    name = path.name
    if name.startswith("pytorch_model"):
        name = name.removeprefix("pytorch_")
    return path.with_name(name).with_suffix(".safetensors").as_posix()


def lay_out(plan: Plan) -> list[OutFile]:
    """The files to write. A safetensors base keeps its order of tensors; anything else gets safetensors' own."""
    files = []
    for file in plan.checkpoint.files:
        tensors = {name: _described(tensor, plan.out_dtype(tensor)) for name, tensor in file.tensors.items()}
        if file.container in ("safetensors", "gguf"):
            tensors = dict(sorted(tensors.items(), key=lambda item: file.tensors[item[0]].offset))
        else:
            tensors = layout_order(tensors)
        metadata = {key: value for key, value in file.metadata.items() if key not in _STALE}
        metadata.setdefault("format", "pt")
        if NOTE_KEY in metadata:  # what was merged before stays, numbered
            metadata[f"{NOTE_KEY}.{1 + sum(key.startswith(f'{NOTE_KEY}.') for key in metadata)}"] = metadata.pop(NOTE_KEY)
        files.append(OutFile(file, out_name(file.relative), tensors, metadata))
    if any(file.verbatim for file in files):
        _check_verbatim(plan)
    for name, tensor in plan.added.items():
        last = next(one for one in reversed(files) if one.source.holds(name))
        own = name.removeprefix(last.source.qualified(""))
        last.added[own] = tensor
        last.tensors[own] = _described(tensor, plan.out_dtype(tensor))
    return files


def _check_verbatim(plan: Plan) -> None:
    base = plan.checkpoint.path
    if plan.dtype is not None or plan.added:
        raise RefusedError(
            "a GGUF file keeps its tensors and their types", file=base, remedy="merge into the safetensors model and convert that"
        )
    swapped = next((work.name for work in plan.works.values() if work.tensor.big_endian), None)
    if swapped is not None:
        raise RefusedError("big-endian weights are not written", file=base, tensor=swapped)


def _described(tensor: Tensor, dtype: DType) -> Tensor:
    return tensor if tensor.dtype == dtype else replace(tensor, dtype=dtype)


def note(plan: Plan, hashes: Mapping[int, str]) -> str:
    """What was merged, as JSON of fixed length once the adapters are known."""
    adapters = [
        {
            "name": item.path.name if item.path else None,
            "sha256": hashes.get(index),
            "dialect": item.adapter.dialect,
            "multiplier": item.multiplier,
            "targets": plan.taken[index],
        }
        | ({"left_out": left} if (left := len(item.adapter.deltas) - plan.taken[index]) else {})
        | ({"block_weights": True} if item.block_weight is not None else {})
        for index, item in enumerate(plan.ingredients)
    ]
    return json.dumps({"upparam": __version__, "adapters": adapters}, separators=(",", ":"))


def output_bytes(plan: Plan) -> int:
    """Bytes of the weight files that `write` makes of the plan, headers and all. Raises RefusedError for what `lay_out` refuses."""
    from upparam.operations.merge.hashing import Hashes

    blank = note(plan, Hashes(plan).blank())
    return sum(file.size(len(file.header(blank))) for file in lay_out(plan))


def write(plan: Plan, out: Path, *, force: bool, verify: bool, exact: bool, sync: bool, threads: int, progress: Progress) -> Outcome:
    """Write the planned merge to `out` (a folder when the base is one). Nothing appears under that name unless everything succeeded.

    Raises RefusedError when the result would equal the base or the disk lacks room, VerificationError when what was written is wrong.
    """
    files = lay_out(plan)
    if not plan.checkpoint.is_folder and out.suffix in (".ckpt", ".bin", ".pt", ".pth"):
        raise RefusedError(
            "merged weights are written as safetensors",
            file=out,
            found=out.suffix,
            remedy=f"name it {out.with_suffix('.safetensors').name}",
        )
    if not plan.checkpoint.is_folder and (out.suffix == ".gguf") is not files[0].verbatim:
        raise RefusedError(
            "the output has the container of the base",
            file=out,
            expected=".gguf" if files[0].verbatim else ".safetensors",
            found=out.suffix,
        )
    size = output_bytes(plan) + sum(side.path.stat().st_size for side in plan.checkpoint.side_files)
    _check_room(size, out)
    try:
        if plan.checkpoint.is_folder:
            with atomic_folder(out, force=force, sync=sync) as folder:
                places = [folder / file.relative for file in files]
                outcome = _write_files(plan, files, places, verify=verify, exact=exact, sync=sync, threads=threads, progress=progress)
                _carry(plan.checkpoint, files, folder)
        else:
            with atomic_file(out, force=force, sync=sync) as path:
                outcome = _write_files(plan, files, [path], verify=verify, exact=exact, sync=sync, threads=threads, progress=progress)
    except OSError as problem:
        if problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UnreadableError(
                f"the output could not be written: {problem.strerror}; nothing was left behind", file=out,
                expected=f"room for {size:,} bytes", remedy="free some space or write elsewhere",
            ) from problem  # fmt: skip
        raise
    outcome.findings += stale(plan)
    return outcome


def _check_room(size: int, out: Path) -> None:
    free = shutil.disk_usage(out.parent).free
    if free < size:
        raise UnreadableError(
            "not enough room for the output", file=out.parent, expected=f"{size:,} bytes", found=f"{free:,} free",
            remedy="free some space or write elsewhere; --in-place needs only room for what changes",
        )  # fmt: skip


def _write_files(
    plan: Plan, files: list[OutFile], places: list[Path], *, verify: bool, exact: bool, sync: bool, threads: int, progress: Progress
) -> Outcome:
    from upparam.operations.merge.hashing import Hashes

    hashes = Hashes(plan)
    samples = Samples.for_works(len(plan.works)) if verify else None
    shares: list[Shared] = []
    tasks: list[Task] = list(hashes.tasks())
    descriptors: list[int] = []
    blank = note(plan, hashes.blank())
    try:
        for file, place in zip(files, places, strict=True):
            place.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(place, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
            descriptors.append(fd)
            start = len(file.header(blank))
            make_room(fd, file.size(start))
            if file.verbatim:
                works = [work for work in plan.works.values() if work.file is file.source]
                tasks += tasks_with_changes(file.source.path, works, fd, shares, samples, exact)
            else:
                tasks += _tasks(plan, file, fd, start, shares, samples, exact)
        widest = max((max(1, _columns(work)) for work in plan.works.values()), default=1)
        from upparam.operations.merge.kernel import TILE_ELEMENTS

        with Flusher(descriptors if sync else ()):
            run_tasks(tasks, threads, max(TILE_ELEMENTS, widest), progress, plan.device)
        text = note(plan, hashes.found)
        for file, fd in zip(files, descriptors, strict=True):
            write_at(fd, memoryview(file.header(text)), 0)
    finally:
        for fd in descriptors:
            os.close(fd)
    outcome = summary(plan, shares)
    outcome.findings += _converted_overflows([task for task in tasks if isinstance(task, Convert) and task.overflow])
    outcome.bytes = sum(place.stat().st_size for place in places)
    if samples is not None:
        outcome.proofs = _prove(plan, files, places, samples, exact)
    return outcome


def _columns(work: Work) -> int:
    from upparam.operations.merge.loaded import matrix_shape

    return matrix_shape(work.tensor.shape)[1]


def _tasks(plan: Plan, file: OutFile, fd: int, start: int, shares: list[Shared], samples: Samples | None, exact: bool) -> list[Task]:
    """Everything one output file needs, in offset order; neighbouring untouched tensors become one copy."""
    tasks: list[Task] = []
    at = start
    for name, tensor in file.tensors.items():
        qualified = file.source.qualified(name)
        work = plan.works.get(qualified)
        base = file.added.get(name) or file.source.tensors[name]
        if work is not None:
            append_changes(tasks, work, fd, at, shares, samples, exact)
        elif tensor.dtype == base.dtype and base.is_contiguous and not base.big_endian and isinstance(base.source, FileSource):
            append_copy(tasks, base.source, base.offset, fd, at, base.nbytes)
        elif tensor.nbytes:
            tasks.append(Convert(qualified, base, tensor.dtype, fd, at, tensor.nbytes))
        at += tensor.nbytes
    return tasks


def tasks_with_changes(path: Path, works: list[Work], fd: int, shares: list[Shared], samples: Samples | None, exact: bool) -> list[Task]:
    """A file that stays as it is, every byte at its place, but for the tensors that change."""
    tasks: list[Task] = []
    source, at = FileSource(path), 0
    for start, work in sorted(((place(work.tensor), work) for work in works), key=lambda item: item[0]):
        append_copy(tasks, source, at, fd, at, start - at)
        append_changes(tasks, work, fd, start, shares, samples, exact)
        at = start + work.tensor.nbytes
    append_copy(tasks, source, at, fd, at, source.size - at)
    return tasks


def place(tensor: Tensor) -> int:
    """Where in its file a tensor's bytes begin."""
    assert isinstance(tensor.source, FileSource)
    return tensor.source.start + tensor.offset


def append_changes(
    tasks: list[Task], work: Work, fd: int, offset: int, shares: list[Shared], samples: Samples | None, exact: bool
) -> None:  # fmt: skip
    """Add the tasks that write one changed tensor to `offset`, and the share they count in."""
    chunks = chunks_of(work)
    shared = Shared(work, len(chunks))
    shares.append(shared)
    tasks += [Change(shared, low, high, fd, offset, exact, samples.observe if samples else None) for low, high in chunks]


def append_copy(tasks: list[Task], source: FileSource, start: int, fd: int, offset: int, size: int) -> None:
    """Add a copy of bytes to the tasks, as part of the last one where both ranges follow on, in tasks of at most TASK_BYTES."""
    last = tasks[-1] if tasks else None
    while size:
        if (
            isinstance(last, Copy) and last.fd == fd and last.source is source and last.size < TASK_BYTES
            and last.start + last.size == start and last.offset + last.size == offset
        ):  # fmt: skip
            more = min(size, TASK_BYTES - last.size)
            last.size += more
        else:
            more = min(size, TASK_BYTES)
            last = Copy(source, start, fd, offset, more)
            tasks.append(last)
        start, offset, size = start + more, offset + more, size - more


def summary(plan: Plan, shares: list[Shared]) -> Outcome:
    """What the tasks counted, as an outcome. Raises RefusedError when no element changed."""
    outcome = Outcome(elements=sum(shared.elements for shared in shares), tensors=sum(1 for shared in shares if shared.elements))
    if not outcome.elements and not plan.added:
        raise RefusedError(
            "the merged model would be identical to the base", file=plan.checkpoint.path,
            found=f"{counted(len(shares), 'tensor', 'was', 'were')} computed and no element changed",
            remedy=("the changes cancel each other or" if len(plan.ingredients) > 1 else "the adapter's changes")
            + " vanish in rounding at this scale and dtype; check the scale, or merge with --dtype float32",
        )  # fmt: skip
    still = [shared.work.name for shared in shares if not shared.elements]
    if still:
        outcome.findings.append(
            info(
                "unchanged-by-merge",
                still[0],
                f"{counted(len(still), 'targeted tensor')} came out with every element as in the base",
                *still[:5],
            )
        )
    for shared in shares:
        if shared.infinite:
            outcome.findings.append(
                warning("overflow", shared.work.name, f"{counted(shared.infinite, 'element')} too large for {_became(shared.work.dtype)}")
            )
    return outcome


def _became(dtype: DType) -> str:
    return f"{dtype} and became " + ("the largest it has" if dtype.name in NO_INFINITY else "infinite")


def _converted_overflows(tasks: list[Convert]) -> list[Finding]:
    """What `--dtype` cost the tensors to which nothing is added."""
    if not tasks:
        return []
    elements = sum(task.overflow for task in tasks)
    said = f"{counted(elements, 'element')} of {counted(len(tasks), 'tensor')} only converted, too large for {_became(tasks[0].dtype)}"
    return [warning("overflow", tasks[0].name, said, *(task.name for task in tasks[:5]))]


def _prove(plan: Plan, files: list[OutFile], places: list[Path], samples: Samples, exact: bool) -> list[str]:
    written: dict[str, Tensor] = {}
    untouched: dict[str, tuple[Tensor, Tensor]] = {}
    others: dict[str, tuple[Tensor, Tensor]] = {}
    for file, place in zip(files, places, strict=True):
        again = checkpoint_file(open_file(place), file.relative, file.source.component)
        for name, tensor in file.tensors.items():
            found = again.tensors.get(name)
            if found is None or (found.dtype, found.shape) != (tensor.dtype, tensor.shape):
                raise VerificationError("a tensor reads back otherwise than it was written", file=place, tensor=name)
            qualified = file.source.qualified(name)
            written[qualified] = found
            if qualified not in plan.works:
                source = file.added.get(name) or file.source.tensors[name]
                same = name not in file.added and found.dtype == source.dtype
                (untouched if same else others)[qualified] = (source, found)
    proofs = [check_samples(samples, written, exact)]
    if untouched:
        proofs.append(check_untouched(untouched))
    if others:
        proofs.append(check_converted(others))
    return proofs


def _carry(checkpoint: Checkpoint, files: list[OutFile], folder: Path) -> None:
    """Side files as they are; an index is written anew where names of files, tensors or sizes changed."""
    for side in checkpoint.side_files:
        place = folder / side.relative
        place.parent.mkdir(parents=True, exist_ok=True)
        if side.relative.endswith(INDEX_SUFFIX):
            _write_index(side.path, side.relative, files, folder)
        else:
            shutil.copyfile(side.path, place)


def _write_index(path: Path, relative: str, files: list[OutFile], folder: Path) -> None:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    parent = Path(relative).parent
    named = {(parent / shard).as_posix() for shard in content["weight_map"].values()}
    mine = [file for file in files if file.source.relative in named]
    if not mine:
        return  # the index of another set of files (torch shards beside safetensors) that is not carried
    weight_map = {name: Path(file.relative).relative_to(parent).as_posix() for file in mine for name in file.tensors}
    size = sum(tensor.nbytes for file in mine for tensor in file.tensors.values())
    metadata = content.get("metadata")
    if content["weight_map"] != weight_map or (isinstance(metadata, dict) and metadata.get("total_size", size) != size):
        content["weight_map"] = weight_map
        content["metadata"] = {**(metadata if isinstance(metadata, dict) else {}), "total_size": size}
        text = json.dumps(content, indent=2) + "\n"
    else:
        text = path.read_text(encoding="utf-8")
    stem = relative.removesuffix(INDEX_SUFFIX)
    (folder / (out_name(stem) + INDEX_SUFFIX)).write_text(text, encoding="utf-8")


def stale(plan: Plan, *, kept: bool = False) -> list[Finding]:
    """What is to be said of metadata that states a hash of the data: that it was left out, or that it is `kept` by a merge in place."""
    changed = {work.file.relative for work in plan.works.values()}
    files = [file for file in plan.checkpoint.files if not kept or file.relative in changed]
    keys = sorted({key for file in files for key in file.metadata if key in _STALE})
    if not keys:
        return []
    if kept:
        said = "metadata that states a hash of the data stays in place, and is of the data as it was; a merge with -o leaves it out"
        return [warning("stale-metadata", plan.checkpoint.path.name, said, *keys)]
    return [info("stale-metadata", plan.checkpoint.path.name, "metadata that stated a hash of the base's data was left out", *keys)]
