"""Why there is no adapter at a path: what lies there instead, as the error that says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from upparam.containers import file_source, head_of
from upparam.containers.base import TensorFile
from upparam.errors import NotAnAdapterError, UnreadableError, UpparamError
from upparam.operations.kinds import classify
from upparam.operations.kinds_other import other
from upparam.patterns import regex
from upparam.wording import counted

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz", ".npy", ".gguf")
"""How files are named in which people look for weights."""
_NAMED = 3
"""Names that are given as examples."""


def explain_nothing(path: Path, dialect: str | None, files: Sequence[TensorFile], problems: Mapping[Path, UpparamError]) -> NoReturn:
    """Raise what is the matter at a path at which no adapter was found. `files` are the tensor files there, `problems` those that are broken."""
    for problem in problems.values():
        raise problem
    _refuse_below(path)
    if dialect is None:
        _unread(path, {file.path for file in files})
    if not files:
        _no_tensors(path)
    file, known = next(((file, kind) for file in files if (kind := other(file)) is not None), (files[0], classify(files[0])))
    if known.name != "tensors" and dialect is None:
        remedy = known.remedy or "see 'upparam identify'"
        raise NotAnAdapterError(known.message, file=file.path, found="; ".join(known.evidence) or None, remedy=remedy)
    wanted = f" of dialect {dialect}" if dialect else ""
    shown = ", ".join(list(files[0].tensors)[:_NAMED])
    raise NotAnAdapterError(
        f"no low-rank adapter{wanted} here",
        file=path,
        found=f"{counted(len(files[0].tensors), 'tensor')} such as {shown}",
        remedy="see 'upparam identify'",
    )


_ADAPTER = regex(r"adapter_config\.json|(adapter_model|adapters|pytorch_lora_weights)\.\w+")
_STATE = regex(r"\D*?(\d+)")
"""How folders of a training's states are named: `checkpoint-500`, `epoch_3`, `0000500`."""


def _refuse_below(path: Path) -> None:
    """Raise for a folder whose adapters lie in folders of it, as a training leaves them: the run's name given where a state's is meant."""
    folders = [member for member in sorted(path.iterdir()) if member.is_dir()] if path.is_dir() else []
    holding = [folder.name for folder in folders if any(_ADAPTER.fullmatch(member.name) for member in folder.iterdir())]
    if not holding:
        return
    steps = {name: int(found[1]) for name in holding if (found := _STATE.fullmatch(name)) is not None}
    last = max(steps, key=lambda name: steps[name]) if len(steps) == len(holding) else None
    which = f"name it: {path / holding[0]}" if len(holding) == 1 else "name the one you mean" + (f"; {last} is the last" if last else "")
    shown = ", ".join(holding[:_NAMED]) + (f", ... ({len(holding)})" if len(holding) > _NAMED else "")
    raise NotAnAdapterError("no adapter lies in this folder itself, but in folders of it", file=path, found=shown, remedy=which)


def _unread(path: Path, read: set[Path]) -> None:
    """Raise for a file that is named like weights and holds none: a pointer, a web page, a broken link."""
    from upparam.containers import lookalikes

    members = sorted(path.iterdir()) if path.is_dir() else [path]
    for member in members:
        if member.is_symlink() and not member.exists():
            raise UnreadableError("a link to a file that is not there", file=member, found=str(member.readlink()), remedy="fetch it again")
        inside = member in read or any(member in file.parents for file in read)
        if not inside and member.is_file() and (member == path or member.suffix.lower() in WEIGHTS):
            look = lookalikes.recognise(head_of(file_source(member), member))
            raise NotAnAdapterError(
                f"no tensors can be read from it: {look.message}", file=member, found="; ".join(look.evidence) or look.kind
            )


def _no_tensors(path: Path) -> NoReturn:
    members = [member for member in sorted(path.iterdir()) if not member.name.startswith(".")]
    for folders, message, remedy in (
        (True, "no adapter lies in this folder itself", "name one of the folders in it"),
        (False, "no file here holds tensors", "see 'upparam identify'"),
    ):
        names = [member.name for member in members if member.is_dir() is folders]
        if names:
            shown = ", ".join(names[:_NAMED]) + (f", ... ({len(names)})" if len(names) > _NAMED else "")
            raise UnreadableError(message, file=path, found=shown, remedy=remedy)
    raise UnreadableError("an empty folder", file=path, remedy="name the file or folder that holds the adapter")
