"""The files before and after an edit: which tensors are the same, and how the new files take the old ones' place."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from upparam.adapter import Adapter
from upparam.atomic import swap
from upparam.containers import open_file
from upparam.containers.base import TensorFile
from upparam.errors import RefusedError, UpparamError
from upparam.findings import Finding, warning
from upparam.tensors import Tensor, same_bits
from upparam.wording import counted


@dataclass
class Compared:
    """Tensors of the files before and after, by name."""

    same: int = 0
    changed: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)
    """Those of the changed that have another shape."""

    def counts(self) -> dict[str, Any]:
        """For the receipt."""
        found = {"tensors_changed": len(self.changed), "tensors_gone": len(self.gone), "tensors_new": len(self.new)}
        return {name: number for name, number in found.items() if number}

    def proof(self) -> str:
        """A statement of what is the same."""
        rest = [f"{len(names)} {word}" for names, word in ((self.changed, "changed"), (self.gone, "gone"), (self.new, "new")) if names]
        return f"file against file: {counted(self.same, 'tensor')} with the same bits under the same name" + (
            f", {', '.join(rest)}" if rest else ""
        )


def compare_files(source: Adapter, written: Path) -> Compared:
    """The tensors of the adapter's files against those written, bit by bit."""
    before = _tensors(Path(name) for name in source.files)
    after = _tensors(sorted(path for path in written.rglob("*") if path.is_file()) if written.is_dir() else [written])
    result = Compared(new=[name for name in after if name not in before], gone=[name for name in before if name not in after])
    for name, tensor in before.items():
        if name not in after:
            continue
        if same_bits(tensor, after[name]):
            result.same += 1
        else:
            result.changed.append(name)
            result.reshaped += [name] if tensor.shape != after[name].shape else []
    return result


def _tensors(paths: Iterable[Path]) -> dict[str, Tensor]:
    """Every tensor by name, by its folder and name where several files hold some."""
    found: dict[str, Tensor] = {}
    files = [(path.absolute(), opened) for path in paths if (opened := _opened(path))]
    root = os.path.commonpath([path.parent for path, _ in files]) if files else ""
    for path, tensors in files:
        prefix = f"{path.relative_to(root).as_posix()}:" if len(files) > 1 else ""
        found |= {prefix + name: tensor for name, tensor in tensors.items()}
    return found


def _opened(path: Path) -> dict[str, Tensor]:
    file = _file(path)
    return {} if file is None else dict(file.tensors)


def container_of(path: Path) -> str | None:
    """The container of a tensor file; None for anything else."""
    file = _file(path)
    return None if file is None else file.container


def _file(path: Path) -> TensorFile | None:
    try:
        return open_file(path)
    except (UpparamError, OSError):
        return None  # a config beside the tensors, or a member of an archive


def other_names(source: Adapter) -> dict[Path, Finding]:
    """By file of the adapter that is a link or has other names, a warning of what editing in place does to these."""
    found: dict[Path, Finding] = {}
    for file in [path.absolute() for name in source.files if (path := Path(name)).is_file()]:
        if file.is_symlink():
            said = "this was a link: a file of its own took its place, and the one it led to stays as it was"
            found[file] = warning("link-replaced", str(file), said, os.readlink(file))  # noqa: PTH115 - as written, not resolved
        elif (count := file.stat().st_nlink) > 1:
            said = "this file had other names (hard links), under which the old one stays"
            found[file] = warning("link-replaced", str(file), said, f"{count - 1} other names")
    return found


def put_back(source: Adapter, path: Path, written: Path) -> list[str]:
    """Let what was written take the place of the adapter's own files; returns their paths.

    A single file is replaced by renaming. A folder is replaced as a whole by one in which every file that is not the adapter's is the
    very same (hard-linked where the disk can). Raises RefusedError where names or containers would change, where a file was inside an archive,
    and where a lone file's partner would have to change with it.
    """
    files = [Path(name) for name in source.files]
    lost = next((file for file in files if not file.is_file()), None)
    if lost is not None:
        raise RefusedError("what lies inside an archive cannot be edited in place", file=lost, remedy="write it elsewhere with -o")
    if written.is_file():
        _same_container(files[0], written)
        return [_replaced(files[0], written)]
    made = [file for file in sorted(written.rglob("*")) if file.is_file()]
    if len(made) == 1 and len(files) == 1:
        _same_container(files[0], made[0])
        return [_replaced(files[0], made[0])]
    root = path.absolute() if path.is_dir() else path.absolute().parent
    names = {file.absolute().relative_to(root) for file in files}
    new = {file.relative_to(written) for file in made}
    held = {name for name in new if _opened(written / name)}
    if names != held:
        raise RefusedError(
            "the files would have other names", file=root, expected=", ".join(sorted(map(str, names))), found=", ".join(sorted(map(str, held))),
            remedy="write it elsewhere with -o",
        )  # fmt: skip
    for name in names:
        _same_container(root / name, written / name)
    differing = [name for name in sorted(new) if not (root / name).is_file() or (root / name).read_bytes() != (written / name).read_bytes()]
    if len(differing) <= 1:
        return [_replaced(root / name, written / name) for name in differing]
    if not path.is_dir():
        raise RefusedError(
            "two files change together, and they can only be replaced at once with their folder", file=path,
            found=", ".join(map(str, differing)), remedy="name the folder, or write it elsewhere with -o",
        )  # fmt: skip
    _carry(root, written, new)
    swap(written, root)
    return [str(root / name) for name in sorted(new)]


def _same_container(old: Path, new: Path) -> None:
    one, other = container_of(old), container_of(new)
    if one != other and not (one and other and one.startswith("torch-") and other.startswith("torch-")):
        raise RefusedError(
            "the file would become another container", file=old, expected=one, found=other, remedy="write it elsewhere with -o"
        )


def _replaced(old: Path, new: Path) -> str:
    if old.exists():
        shutil.copymode(old, new)
    os.replace(new, old)  # noqa: PTH105 - of a name that may be a link's target
    return str(old)


def _carry(root: Path, written: Path, new: Iterable[Path]) -> None:
    """Everything else in the folder, into the new one."""
    shutil.copymode(root, written)
    own = set(new)
    for file in sorted(root.rglob("*")):
        name = file.relative_to(root)
        target = written / name
        if name in own:
            shutil.copymode(file, target)
        elif file.is_symlink():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(os.readlink(file))  # noqa: PTH115 - as written, not resolved
        elif file.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            _linked(file, target)


def _linked(file: Path, target: Path) -> None:
    try:
        target.hardlink_to(file)
    except OSError:
        shutil.copy2(file, target)
