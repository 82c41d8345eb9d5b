"""Outputs whole or not at all, under any path, and bringing them to the disk while they are written."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from upparam.atomic import atomic_file, atomic_folder, reaching_disk, swap
from upparam.beside import _start, make
from upparam.errors import OutputExistsError, UnreadableError


def settled(before: int) -> bool:
    """True when the threads of the test are gone within a second."""
    end = time.monotonic() + 1
    while threading.active_count() > before and time.monotonic() < end:
        time.sleep(0.01)
    return threading.active_count() <= before


def test_it_begins_before_the_file_is_complete_and_ends_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = os.fsync
    monkeypatch.setattr("upparam.atomic.os.fsync", lambda descriptor: (sizes.append(os.fstat(descriptor).st_size), real(descriptor)))
    before, path = threading.active_count(), tmp_path / "x"
    with path.open("xb", buffering=0) as stream, reaching_disk(path):
        stream.write(b"a" * 10)
        time.sleep(0.2)
        stream.write(b"b" * 10)
    assert settled(before)
    assert sizes[0] == 10 and sizes[-1] == 20


def test_it_ends_where_the_writing_fails(tmp_path: Path) -> None:
    before, path = threading.active_count(), tmp_path / "x"
    with pytest.raises(ZeroDivisionError), path.open("xb"), reaching_disk(path):
        raise ZeroDivisionError
    assert settled(before)


def test_without_sync_it_starts_nothing(tmp_path: Path) -> None:
    before = threading.active_count()
    with reaching_disk(tmp_path / "absent", sync=False):
        assert threading.active_count() == before


def test_temporary_folders_are_gone_whether_or_not_it_worked(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "file") as path:
        path.write_bytes(b"x")
    with atomic_folder(tmp_path / "folder") as folder:
        (folder / "inside").mkdir()
        (folder / "inside" / "x").write_bytes(b"x")
    for atomic, name in ((atomic_file, "broken file"), (atomic_folder, "broken folder")):
        with pytest.raises(ZeroDivisionError), atomic(tmp_path / name) as place:
            (place if name.endswith("folder") else place.parent).joinpath("half").write_bytes(b"x")
            raise ZeroDivisionError
    with atomic_folder(tmp_path / "folder", force=True) as folder:
        (folder / "inside").mkdir()
        (folder / "inside" / "x").write_bytes(b"y")
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["file", "folder", "folder/inside", "folder/inside/x"]
    assert (tmp_path / "folder" / "inside" / "x").read_bytes() == b"y"


@pytest.fixture(params=["exchanged", "kept aside"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where two paths can be exchanged, and where not."""
    if request.param == "kept aside":
        monkeypatch.setattr("upparam.atomic._exchanged", lambda *_: False)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("way", ["../{0}", "../{0}/../{0}", "link", "."])
def test_a_folder_is_replaced_by_a_path_that_leads_through_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """`a/../a` leads nowhere while `a` is renamed: the folder and what it held were lost that way."""
    out = tmp_path / "a"
    out.mkdir()
    (out / "x").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.chdir(out)
    given = tmp_path / "link" / "a" if way == "link" else Path(way.format("a"))
    with atomic_folder(given, force=True) as folder:
        (folder / "x").write_bytes(b"new")
    assert (out / "x").read_bytes() == b"new" and sorted(path.name for path in tmp_path.iterdir()) == ["a", "link"]
    monkeypatch.chdir(out)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/x").write_bytes(b"newer")
    swap(Path(f"../../{tmp_path.name}/b"), Path("../a"))
    assert (out / "x").read_bytes() == b"newer" and sorted(path.name for path in tmp_path.iterdir()) == ["a", "link"]


@pytest.mark.parametrize("name", ["y" * 255, "é" * 127])
def test_names_as_long_as_the_file_system_allows(tmp_path: Path, name: str) -> None:
    with atomic_file(tmp_path / name) as path:
        path.write_bytes(b"x")
    assert (tmp_path / name).read_bytes() == b"x" and len(list(tmp_path.iterdir())) == 1
    with atomic_folder(tmp_path / name[::2] / "", force=True) as folder:
        (folder / "x").write_bytes(b"x")
    assert (tmp_path / name[::2] / "x").read_bytes() == b"x"


def test_a_file_takes_the_place_of_a_file_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process killed between two steps would leave neither: there is one step."""
    new, out = tmp_path / "new", tmp_path / "out"
    monkeypatch.setattr("upparam.atomic.make", lambda *_: pytest.fail("nothing needs to be kept aside"))
    for number in range(2):
        new.write_text(f"new {number}")
        swap(new, out)
        assert out.read_text() == f"new {number}" and not new.exists()
    new.write_text("over a link")
    (tmp_path / "folder").mkdir()
    link = tmp_path / "link"
    link.symlink_to("folder")
    swap(new, link)
    assert link.read_text() == "over a link" and (tmp_path / "folder").is_dir()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is no call of that kind, or it is not used")
def test_a_folder_takes_the_place_of_a_folder_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process killed between two renames would leave the old one under another name."""
    monkeypatch.setattr("upparam.atomic.make", lambda *_: pytest.fail("nothing needs to be kept aside"))
    new, out = tmp_path / "new", tmp_path / "out"
    out.write_text("a file")
    for number in range(2):
        new.mkdir()
        (new / "x").write_text(str(number))
        swap(new, out)
        assert (out / "x").read_text() == str(number) and not new.exists()
    new.write_text("a file")
    swap(new, out)
    assert out.read_text() == "a file" and list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("atomic", [atomic_file, atomic_folder])
def test_what_is_neither_file_nor_folder_is_not_replaced(
    tmp_path: Path, atomic: Callable[[Path, bool], AbstractContextManager[Path]]
) -> None:
    """root that wrote to /dev/null with --force had a folder of that name."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputExistsError, match="pipe: a device, pipe or socket"), atomic(tmp_path / "pipe", force=True):  # type: ignore[call-arg]
        pytest.fail("nothing may be written")
    assert (tmp_path / "pipe").is_fifo() and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("atomic", [atomic_file, atomic_folder])
def test_what_leads_to_an_open_file_is_not_replaced(tmp_path: Path, atomic: Callable[[Path, bool], AbstractContextManager[Path]]) -> None:
    """root that wrote to /dev/stdout (scan --sarif) had a file of that name."""
    out = tmp_path / "stdout"
    out.symlink_to("/proc/self/fd/1")
    with pytest.raises(OutputExistsError, match="stdout: a device, pipe or socket"), atomic(out, force=True):  # type: ignore[call-arg]
        pass
    assert out.is_symlink()


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder in which not even root may write")
@pytest.mark.parametrize("atomic", [atomic_file, atomic_folder])
def test_a_folder_that_takes_nothing_is_named(atomic: Callable[[Path], AbstractContextManager[Path]]) -> None:
    with pytest.raises(UnreadableError, match=r"^/proc: nothing can be written here"), atomic(Path("/proc/x")):
        pass


WRITING = """
import sys, time
from pathlib import Path
from upparam.atomic import atomic_file, atomic_folder
out = Path(sys.argv[2])
with {"file": atomic_file, "folder": atomic_folder}[sys.argv[1]](out) as place:
    (place if sys.argv[1] == "file" else place / "x").write_bytes(b"half")
    print("writing", flush=True)
    time.sleep(60)
"""


@contextmanager
def writing(kind: str, out: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that is writing to `out`; killed at the end."""
    with subprocess.Popen([sys.executable, "-c", WRITING, kind, str(out)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize(("kind", "atomic"), [("file", atomic_file), ("folder", atomic_folder)])
@pytest.mark.parametrize("name", ["out", "y" * 255])
def test_what_a_killed_process_left_is_removed_by_the_next(
    tmp_path: Path, kind: str, atomic: Callable[[Path], AbstractContextManager[Path]], name: str
) -> None:
    """That of the same output, not what a living process writes."""
    for other in (name, "other"):
        with writing(kind, tmp_path / other):
            pass
    with writing(kind, tmp_path / name):
        assert len(list(tmp_path.iterdir())) == 2  # the second run has taken away what the first left
        with atomic(tmp_path / name) as place:
            (place if kind == "file" else place / "x").write_bytes(b"whole")
        left = sorted(tmp_path.glob(".*.tmp"))
        assert len(left) == 2 and all(any(path.name in ("x", name, "other") for path in folder.iterdir()) for folder in left)
    with pytest.raises(OutputExistsError), atomic(tmp_path / name):
        pass
    (tmp_path / name).rename(tmp_path / "moved")
    with atomic(tmp_path / name):
        (own,) = (folder for folder in tmp_path.glob(".*.tmp") if not folder.name.startswith(".other."))
        assert not any(own.iterdir())
        (own / ("x" if kind == "folder" else name)).write_bytes(b"whole")
    assert [folder.name.split(".")[1] for folder in tmp_path.glob(".*.tmp")] == ["other"]


def test_only_folders_of_ended_processes_of_this_host_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, start = tmp_path / "out", _start(tmp_path / "out")
    elsewhere, kept = tmp_path / "elsewhere", tmp_path / f"{start}00000000.old"
    for folder in (elsewhere, kept, tmp_path / f"{start}0.tmp", tmp_path / f"{start}00000000.new", tmp_path / ".out.0000000000000000.tmp"):
        folder.mkdir()
        (folder / "held").write_bytes(b"x")
    (tmp_path / f"{start}11111111.tmp").symlink_to(elsewhere)
    (tmp_path / f"{start}22222222.tmp").write_bytes(b"no folder")
    before = sorted(tmp_path.rglob("*"))
    make(out, "tmp").release()
    assert len(sorted(tmp_path.rglob("*"))) == len(before) + 1
    with atomic_file(out) as path:  # the one just made belongs to nobody
        path.write_bytes(b"x")
    assert sorted(tmp_path.rglob("*")) == sorted([*before, out])
    with atomic_file(out, force=True) as path:
        path.write_bytes(b"y")
    assert not kept.exists(), "an earlier output that was to make way, and has"
    owner = make(out, "tmp")
    monkeypatch.setattr("upparam.beside.os.geteuid", lambda: os.getuid() + 1)
    owner.release()
    with atomic_file(out, force=True) as path:
        path.write_bytes(b"z")
    assert owner.folder.is_dir(), "another user's"
