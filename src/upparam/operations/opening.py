"""From a path to adapters: which files belong together, which dialect they speak, and the canonical form."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from upparam import dialects
from upparam.adapter import Adapter
from upparam.containers import file_source, head_of, open_all
from upparam.containers.base import TensorFile
from upparam.dialects.base import Bundle, Match, ReadOptions
from upparam.errors import AmbiguousError, DeadAdapterError, UpparamError, UsageError
from upparam.operations.explaining import explain_nothing
from upparam.operations.kinds_other import other


@dataclass
class Candidate:
    """Files that together look like one adapter, and the dialects they may speak, best first."""

    bundle: Bundle
    matches: list[Match]

    @property
    def match(self) -> Match:
        """The best match."""
        return self.matches[0]


COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "prior")
"""Folders in which a pipeline's components lie; an adapter of several is saved as one folder for each."""


def tensor_files(path: Path) -> tuple[list[TensorFile], dict[Path, UpparamError]]:
    """The tensor files at a path, and the files that could not be read, with why.

    A folder is not searched below its own level, except that one without files of its own stands for its components' folders.
    """
    if not path.is_dir():
        return open_all(path) or _headerless(path), {}
    found: list[TensorFile] = []
    problems: dict[Path, UpparamError] = {}
    members = sorted(path.iterdir())
    if not any(member.is_file() for member in members):
        members = [file for member in members if member.name in COMPONENTS and member.is_dir() for file in sorted(member.iterdir())]
    for member in members:
        if member.is_file() and not member.name.startswith("."):
            try:
                found += open_all(member) or _headerless(member)
            except UpparamError as problem:
                problems[member] = problem
    return found, problems


def _headerless(path: Path) -> list[TensorFile]:
    """A file that nothing recognises but that is named like a factor, offered as bytes whose dtype and shape are still to be told."""
    from upparam.containers import raw

    if not raw.may_be_factor(path.name):
        return []
    from upparam.containers import lookalikes

    source = file_source(path)
    if not source.size or lookalikes.recognise(head_of(source, path)).kind != "unknown":
        return []
    return [raw.unread(source, path)]


class Siblings(Sequence[TensorFile]):
    """The other tensor files in a file's folder, read only when a dialect looks for partners."""

    def __init__(self, path: Path, own: Sequence[TensorFile]) -> None:
        self._path, self._own = path, own

    @cached_property
    def _found(self) -> list[TensorFile]:
        neighbours, _ = tensor_files(self._path.parent)
        return [*self._own, *(file for file in neighbours if file.path != self._path and self._path not in file.path.parents)]

    def __len__(self) -> int:
        return len(self._found)

    def __getitem__(self, index: Any) -> Any:
        return self._found[index]


class Unclaimed(Sequence[TensorFile]):
    """`files` without one file and without those that other candidates hold; looked at only when iterated."""

    def __init__(self, files: Sequence[TensorFile], but: Collection[Path]) -> None:
        self._files, self._but = files, but

    @cached_property
    def _left(self) -> list[TensorFile]:
        return [file for file in self._files if file.path not in self._but]

    def __len__(self) -> int:
        return len(self._left)

    def __getitem__(self, index: Any) -> Any:
        return self._left[index]


def candidates(path: Path | str, dialect: str | None = None) -> list[Candidate]:
    """Every adapter candidate at a path, in file order. A file's siblings in its folder are looked at as possible partners.

    Only those of one dialect where one is named.
    """
    path = Path(path)
    files, _ = tensor_files(path)
    siblings: Sequence[TensorFile] = files if path.is_dir() else Siblings(path, files)
    return group(files, path if path.is_dir() else path.parent, siblings, dialect)


def group(files: Sequence[TensorFile], folder: Path, siblings: Sequence[TensorFile], dialect: str | None = None) -> list[Candidate]:
    """Gather files into candidates: each file's best dialect (or the one named) says which of its siblings belong to it."""
    found: list[Candidate] = []
    taken: set[Path] = set()
    for file in files:
        if file.path in taken:
            continue
        matched = dialects.matches(file) if dialect is None else [match for match in (dialects.get(dialect).match(file),) if match]
        if matched:
            members = dialects.get(matched[0].dialect).gather(file, Unclaimed(siblings, taken | {file.path}))
            taken.update(member.path for member in members)
            found.append(Candidate(Bundle(members, _folder_of(file, folder)), matched))
    return found


def _folder_of(file: TensorFile, folder: Path) -> Path:
    """Where a file's side files lie: inside its archive, if it is in one (packed alone, as by gzip, it is in none)."""
    if not file.wrapping:
        return folder
    inside = file.path.parent.parent if file.wrapping[-1] in ("gz", "bz2", "xz") else file.path.parent
    return inside.parent if inside.name in COMPONENTS else inside


_SHOWN = 6
"""Files that a refusal lists."""


def open_adapter(
    path: Path | str, *, dialect: str | None = None, options: ReadOptions | None = None, whole: bool = True, readers: bool = False
) -> Adapter:
    """The adapter at `path`, a file or a folder, in canonical form; factors are read when needed.

    Without `whole` an adapter of which some files are missing is opened too, with what is there and a finding. With `readers` the findings say
    what a program that reads such files makes otherwise of this one.

    Raises NotAnAdapterError when there is none, AmbiguousError when there are several, DeadAdapterError when a part is missing,
    and what the containers raise for files that break their format.
    """
    path = Path(path)
    found = [candidate for candidate in candidates(path, dialect) if other(candidate.bundle.main) is None]
    if not found:
        explain_nothing(path, dialect, *tensor_files(path))
    if len(found) > 1:
        shown = [f"{candidate.bundle.main.name} ({candidate.match.dialect})" for candidate in found[:_SHOWN]]
        rest = [f"... ({len(found)} of them)"] if len(found) > _SHOWN else []
        raise AmbiguousError(
            "several adapters lie here",
            file=path,
            found="; ".join(shown + rest),
            remedy="name the file you mean; 'upparam identify' compares them",
        )
    name = dialect or found[0].match.dialect
    options = options or ReadOptions()
    adapter = dialects.get(name).read(found[0].bundle, options)
    if options.adapter is not None and adapter.spelling.get("adapter") != options.adapter:
        own = adapter.spelling.get("adapter")
        raise UsageError(
            "no adapter of this name is here", file=path, expected=options.adapter, found=own or "one adapter without a name",
            remedy=f"name it with --adapter {own}" if own else "leave --adapter away",
        )  # fmt: skip
    if readers:
        from upparam.dialects import by_diffusers
        from upparam.dialects.placing import base_of

        given = {} if options.base is None else {"base": options.base}
        adapter.findings += by_diffusers.on_reading(adapter.dialect, base_of(adapter, given), found[0].bundle.main)
    lost = next((finding for finding in adapter.findings if finding.code == "shards-missing"), None) if whole else None
    if lost is not None:
        raise DeadAdapterError(
            "a part of the adapter is missing", file=path, found=f"{lost.message}: {'; '.join(lost.evidence)}",
            remedy="bring the other files here; 'upparam verify' says what is there",
        )  # fmt: skip
    return adapter
