"""Outputs that appear whole or not at all: written beside their final place, synced, renamed."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from upparam.beside import OLD, beside, make
from upparam.errors import OutputExistsError, UnreadableError


def refuse_existing(out: Path, force: bool) -> None:
    """Raise OutputExistsError if `out` is there and `force` is not set, or is no file or folder; UnreadableError if its parent folder is not there."""
    if not out.parent.is_dir():
        if os.path.lexists(out.parent):
            raise UnreadableError("the output cannot lie in what is no folder", file=out.parent, remedy="choose another place")
        raise UnreadableError("the folder to write into does not exist", file=out.parent, remedy="create it first")
    if _open_elsewhere(out) or (out.exists() and not (out.is_symlink() or out.is_file() or out.is_dir())):
        raise OutputExistsError("a device, pipe or socket stands there, which no output replaces", file=out, remedy="choose another name")
    if os.path.lexists(out) and not force:
        raise OutputExistsError("the output already exists", file=out, remedy="choose another name or give --force")


def _open_elsewhere(out: Path) -> bool:
    """True for the system's links to what a process has open, such as /dev/stdout: root would replace it for every program."""
    return out.is_symlink() and out.readlink().is_relative_to("/proc")


@contextmanager
def atomic_file(out: Path, *, force: bool = False, sync: bool = True) -> Iterator[Path]:
    """Yield a path of the same name in a temporary folder beside `out`; on success it is synced and renamed to `out`, on any error removed.

    Raises OutputExistsError before anything is written if `out` exists and `force` is not set. Without `sync` the rename does not wait
    for the disk: a kill still leaves nothing half-written, a power cut may.
    """
    refuse_existing(out, force)
    if out.is_dir():
        raise OutputExistsError("a folder stands where the file should go", file=out)
    out = _settled(out)
    with beside(out) as folder:
        temporary = folder / out.name
        yield temporary
        if sync:
            _sync(temporary)
        temporary.replace(out)
        if sync:
            _sync(out.parent)


@contextmanager
def atomic_folder(out: Path, *, force: bool = False, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary folder beside `out`; on success its files are synced and it is renamed to `out`, on any error removed.

    With `force` an existing `out` is replaced as a whole, and stays until the new one is complete; one that holds files which the new
    one does not have is not replaced (OutputExistsError): --force gives up an earlier output, nothing else. `sync` as for `atomic_file`.
    """
    refuse_existing(out, force)
    if out.is_file():
        raise OutputExistsError("a file stands where the folder should go", file=out, remedy="choose another name, or remove it first")
    given, out = out, _settled(out)
    with beside(out) as temporary:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        if sync:
            for path in (*sorted(temporary.rglob("*")), temporary):
                _sync(path)
        refuse_strangers(temporary, given)
        swap(temporary, out)
        if sync:
            _sync(out.parent)


_LISTED = 4
"""Files that a refusal lists."""


def refuse_strangers(new: Path, out: Path) -> None:
    """Raise OutputExistsError for files in `out` that `new` does not replace."""
    if not out.is_dir() or out.is_symlink():
        return
    own = {path.relative_to(new) for path in new.rglob("*")}
    strangers = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.relative_to(out) not in own)
    if strangers:
        shown = ", ".join(strangers[:_LISTED]) + (f", ... ({len(strangers)})" if len(strangers) > _LISTED else "")
        raise OutputExistsError(
            "the folder holds files that are no part of the output, and --force would lose them", file=out, found=shown,
            remedy="choose another folder, or move them away",
        )  # fmt: skip


@contextmanager
def reaching_disk(path: Path, sync: bool = True) -> Iterator[None]:
    """While a file is written inside, bring to the disk what is there of it, and go on in the background when it is complete.

    What waits for the disk at the end has less to wait for; nothing depends on the success of this.
    """
    if not sync:
        yield
        return
    complete = threading.Event()

    def bring() -> None:
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                while not complete.wait(_PAUSE):
                    os.fsync(descriptor)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    threading.Thread(target=bring, daemon=True).start()
    try:
        yield
    finally:
        complete.set()


_PAUSE = 0.02
"""Seconds between two rounds: small files are written within."""


def swap(new: Path, out: Path) -> None:
    """Rename `new` to `out`; what stood there is removed.

    At once: `out` is the old or the new at any moment. Only a folder in a place where two paths cannot be exchanged is kept aside until the
    new one is there.
    """
    new, out = _settled(new), _settled(out)
    if not os.path.lexists(out) or not (new.is_dir() or (out.is_dir() and not out.is_symlink())):
        new.replace(out)
        return
    import shutil

    if _exchanged(new, out):
        shutil.rmtree(new) if new.is_dir() and not new.is_symlink() else new.unlink()
        return
    old = make(out, OLD)
    try:
        out.rename(old.folder / out.name)
        try:
            new.rename(out)
        except OSError:
            (old.folder / out.name).rename(out)
            raise
        finally:
            if os.path.lexists(out):
                shutil.rmtree(old.folder)
    finally:
        old.release()


def _exchanged(one: Path, other: Path) -> bool:
    """Let two paths change places in one step; False where that cannot be done (it can on Linux, in most local file systems)."""
    import ctypes

    exchange = getattr(ctypes.CDLL(None), "renameat2", None)
    return exchange is not None and exchange(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # Linux' fcntl.h and fs.h


def _settled(path: Path) -> Path:
    """The same place by a path that leads through no link and no `..`: one such as `a/../a` would lead nowhere once `a` is renamed."""
    real = Path(os.path.realpath(path.parent)) / path.name
    return Path(os.path.realpath(path)) if path.name in ("", "..") else real


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
