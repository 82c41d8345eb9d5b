"""Temporary folders beside an output, and what a killed process left of them.

A folder `.NAME.<host><random>.tmp` (`.old` for an output that makes way) is locked (flock) by the process it belongs to, and the system takes
the lock away when that process ends, however it ends. So one of this host that can be locked belongs to nobody, and the next run with the same output
removes it. One of another host stays: over a network file system a lock may say nothing about the processes there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from upparam.errors import UnreadableError

TMP, OLD = "tmp", "old"
_NAME_BYTES = 200
"""Bytes of a name that are taken over into one beside it: file systems allow 255 in all."""
_RANDOM = 8
"""Hexadecimal digits that make a name one's own."""


class Beside(NamedTuple):
    """A folder, and what holds its lock."""

    folder: Path
    lock: int

    def release(self) -> None:
        """Give up the lock; what is in the folder is anyone's from now on."""
        os.close(self.lock)


@contextmanager
def beside(out: Path) -> Iterator[Path]:
    """A new folder beside `out`, for this user alone, of a name that nobody has; gone with all that is still in it at the end.

    What killed processes left of the same output goes first. Raises UnreadableError where nothing can be written there.
    """
    made = make(out, TMP)
    try:
        yield made.folder
    finally:
        _remove(made.folder)
        made.release()


def make(out: Path, ending: str) -> Beside:
    """A new folder beside `out` that stays, locked; see `beside`."""
    _clear(out)
    while True:
        folder = out.parent / f"{_start(out)}{os.urandom(_RANDOM // 2).hex()}.{ending}"
        try:
            folder.mkdir(0o700)
        except OSError as problem:
            raise UnreadableError(f"nothing can be written here: {problem.strerror}", file=out.parent) from problem
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue  # taken for one that a killed process left, before it was locked
        if _locked(lock) is not False and _same(folder, lock):
            return Beside(folder, lock)
        os.close(lock)


def _start(out: Path) -> str:
    """What the names of the folders beside `out` begin with, on this host."""
    from zlib import crc32

    name = os.fsencode(out.name)[:_NAME_BYTES].decode("utf-8", "ignore")
    return f".{name}.{crc32(os.fsencode(os.uname().nodename)):08x}"


def _locked(descriptor: int) -> bool | None:
    """True when it is locked now, False when another process holds the lock, None where there are no locks."""
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _same(folder: Path, descriptor: int) -> bool:
    """True where the name still stands for what is open."""
    try:
        return os.path.samestat(folder.lstat(), os.fstat(descriptor))
    except OSError:
        return False


def _clear(out: Path) -> None:
    """Remove the folders of ended processes beside `out`. An earlier output that was kept aside goes only where there is a later one."""
    start = _start(out)
    with suppress(OSError):  # a folder that cannot be listed may be written to all the same
        with os.scandir(out.parent) as entries:
            names = [entry.name for entry in entries if entry.name.startswith(start)]
        for name in names:
            digits, _, ending = name[len(start) :].partition(".")
            if len(digits) == _RANDOM and (ending == TMP or (ending == OLD and os.path.lexists(out))):
                _remove_ended(out.parent / name)


def _remove_ended(folder: Path) -> None:
    """Remove one folder, unless its process lives, it is another user's, or it is a link or no folder."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        if os.fstat(descriptor).st_uid == os.geteuid() and _locked(descriptor) and _same(folder, descriptor):
            _remove(folder)
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    """Remove a folder of ours if it is there; empty, as most are by then, without the machinery for more."""
    try:
        folder.rmdir()
    except FileNotFoundError:
        return
    except OSError:
        import shutil

        shutil.rmtree(folder, ignore_errors=True)
