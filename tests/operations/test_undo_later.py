"""undo writes over nothing that changed after the merge, unless asked to; and believes no journal about files outside its base."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.operations.merging import adapter, load, lora, save
from tests.operations.test_merge_inplace import WAYS, digests, model, way

from upparam.cli import main
from upparam.containers import open_file
from upparam.errors import MalformedError, RefusedError, UnreadableError
from upparam.operations.merge import inplace, journal, merge, stream
from upparam.operations.merge.journal import COMPLETE, MAGIC, Journal, journal_path, old_path, undo

assert way  # the fixture
SHARD = "model-00002-of-00003.safetensors"


def write_at(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as stream:
        stream.seek(offset)
        stream.write(data)


def keeping_time(path: Path, change: Callable[[], object]) -> None:
    before = path.stat()
    change()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def an_untouched_tensor(shard: Path) -> None:
    tensor = next(tensor for name, tensor in open_file(shard).tensors.items() if ".k." in name)
    write_at(shard, tensor.offset, b"\1\2\3\4")


def a_touched_one_and_the_time_put_back(shard: Path) -> None:
    tensor = next(tensor for name, tensor in open_file(shard).tensors.items() if ".q." in name)
    keeping_time(shard, lambda: write_at(shard, tensor.offset + 7, b"\xff"))


def another_file_in_its_place(shard: Path) -> None:
    save(shard.with_name("new"), {"layers.0.q.weight": np.zeros((3, 3), np.float32)}).replace(shard)


def longer(shard: Path) -> None:
    keeping_time(shard, lambda: write_at(shard, shard.stat().st_size, b"tail"))


CHANGES = {
    an_untouched_tensor: "written or copied since",
    a_touched_one_and_the_time_put_back: "holds other bytes where the merge wrote",
    another_file_in_its_place: "bytes long and was",
    longer: "bytes long and was",
}


@pytest.mark.parametrize("change", CHANGES)
def test_later_changes_are_not_written_over(tmp_path: Path, way: str, change: Callable[[Path], None]) -> None:
    base, item = model(tmp_path / "base")
    before = digests(base)
    merge(base, item, in_place=True)
    change(base / SHARD)
    changed = digests(base)
    with pytest.raises(RefusedError, match=rf"changed after the merge.*{SHARD}.*{CHANGES[change]}.*--force.*--discard"):
        undo(base)
    assert digests(base) == changed, "refusing changed something"
    if change in (another_file_in_its_place, longer) and way == "ranges":
        return  # forced, the old ranges would go into a file that has no such ranges
    receipt = undo(base, force=True)
    assert [finding.code for finding in receipt.findings] == ["changed-later"]
    after = digests(base)
    if change is an_untouched_tensor and way == "ranges":  # what the merge did not touch is not restored either
        assert after.pop(SHARD) not in (before.pop(SHARD), changed[SHARD])
    assert after == before


def test_later_changes_can_be_kept(tmp_path: Path, way: str) -> None:
    base, item = model(tmp_path / "base")
    merge(base, item, in_place=True)
    an_untouched_tensor(base / SHARD)
    changed = {name: digest for name, digest in digests(base).items() if not name.startswith(".")}
    undo(base, discard=True)
    assert digests(base) == changed


def test_a_model_that_moved_with_its_times_is_as_it_was_left(tmp_path: Path, way: str) -> None:
    base, item = model(tmp_path / "base")
    before = digests(base)
    merge(base, item, in_place=True)
    (base / "config.json").touch()  # not a file of the merge
    (base / SHARD).chmod(0o600)
    moved, copied = tmp_path / "moved", tmp_path / "copied"
    shutil.copytree(base, moved)  # as cp -a does
    shutil.copytree(base, copied, copy_function=shutil.copyfile)
    assert not undo(moved).findings and digests(moved) == before
    with pytest.raises(RefusedError, match="all bytes looked at are as the merge left them"):
        undo(copied)
    undo(copied, force=True)
    assert digests(copied) == before


def test_a_single_file(tmp_path: Path, way: str, capsys: pytest.CaptureFixture[str]) -> None:
    base = save(tmp_path / "b.safetensors", {"m.weight": np.ones((8, 6), np.float32), "n.weight": np.ones((8, 6), np.float32)})
    item = adapter({"m": lora(np.ones((8, 1)), np.ones((1, 6)))})
    old = base.read_bytes()
    for _ in range(2):
        merge(base, item, in_place=True)
        undo(base)
        assert base.read_bytes() == old
    merge(base, item, in_place=True)
    a = load(base)
    save(base, a | {"m.weight": a["m.weight"] * 2})  # another tool that writes the same file anew
    assert main(["undo", str(base)]) == 4
    assert "--force" in capsys.readouterr().err
    assert main(["undo", str(base), "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["findings"][0]["code"] == "changed-later"
    assert load(base)["m.weight"].tolist() == np.ones((8, 6)).tolist()


def test_many_tensors_are_sampled_and_no_more_than_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "PLACES", 5)
    monkeypatch.setattr(journal, "SAMPLE", 16)
    base, item = model(tmp_path / "base")
    merge(base, item, in_place=True)
    left = Journal.read(base).left
    assert len(left) == 3 and all(0 < len(found.places) <= 5 for found in left.values())
    undo(base)


def test_an_undo_that_is_cut_short_goes_on(tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it restored itself is no later change."""
    base, item = model(tmp_path / "base")
    before = digests(base)
    merge(base, item, in_place=True)
    place, name = (stream.Copy, "run") if way == "ranges" else (journal, "_put_back")
    real, calls = getattr(place, name), []

    def fails(*args: object) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("the power went out")
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, fails)
        with pytest.raises(RuntimeError, match="power"):
            undo(base)
    assert digests(base) != before
    assert Journal.read(base).state == COMPLETE
    with pytest.raises(RefusedError, match="interrupted"):
        undo(base, discard=True)
    undo(base)
    assert digests(base) == before


def test_an_old_file_that_is_gone_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inplace, "REPLACED_SHARE", WAYS["new files"])
    base, item = model(tmp_path / "base")
    merge(base, item, in_place=True)
    old_path(base / SHARD).unlink()
    merged = digests(base)
    with pytest.raises(UnreadableError, match="undo needs is gone"):
        undo(base)
    assert digests(base) == merged
    undo(base, discard=True)


def test_a_file_of_ranges_that_is_gone_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inplace, "REPLACED_SHARE", WAYS["ranges"])
    base, item = model(tmp_path / "base")
    merge(base, item, in_place=True)
    (base / SHARD).rename(tmp_path / "kept")
    with pytest.raises(UnreadableError, match=f"{SHARD}.*gone"):
        undo(base)
    (tmp_path / "kept").rename(base / SHARD)
    undo(base)


def test_a_journal_of_an_earlier_version_says_nothing_of_what_was_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inplace, "REPLACED_SHARE", WAYS["ranges"])
    base, item = model(tmp_path / "base")
    before = digests(base)
    merge(base, item, in_place=True)
    path = journal_path(base)
    whole = path.read_bytes()
    *_, (_, _, size, at) = Journal.read(base).ranges
    path.write_bytes(whole[: at + size])
    assert not Journal.read(base).left
    undo(base)
    assert digests(base) == before


def planted(path: Path, head: dict[str, object], rest: bytes = b"", state: bytes = COMPLETE) -> None:
    text = json.dumps(head).encode()
    path.write_bytes(MAGIC + state + len(text).to_bytes(8, "little") + text + rest)


@pytest.mark.parametrize("name", ["../victim", "/victim", "..", "", "sub/../../victim", "link"])
@pytest.mark.parametrize("kind", ["ranges", "replaced", "sizes"])
def test_a_planted_journal_reaches_nothing_outside(tmp_path: Path, name: str, kind: str) -> None:
    """A hidden journal in a downloaded folder must not make undo write where it likes."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    base = tmp_path / "base"
    base.mkdir()
    (base / "link").symlink_to(victim)
    name = str(victim) if name == "/victim" else name
    head: dict[str, object] = {"ranges": [], "replaced": [], "sizes": {}}
    head[kind] = {"ranges": [[name, 0, 4]], "replaced": [name], "sizes": {name: 8}}[kind]
    planted(journal_path(base), head, b"evil" if kind == "ranges" else b"")
    with pytest.raises(MalformedError, match="damaged"):
        undo(base)
    file = save(tmp_path / "f.safetensors", {"a": np.ones(3, np.float32)})
    head[kind] = {"ranges": [["victim", 0, 4]], "replaced": ["victim"], "sizes": {"victim": 8}}[kind]
    planted(journal_path(file), head, b"evil" if kind == "ranges" else b"")
    with pytest.raises(MalformedError, match="damaged"):
        undo(file)
    assert victim.read_bytes() == b"precious"


@pytest.mark.parametrize(
    "left",
    [
        [],
        {"f": 1},
        {"f": [1, 2, "x"]},
        {"f": [1, 2, "x", [-1]]},
        {"f": [1, 2, "x", [1e400]]},
        {"f": [10**30, 2, "x", []]},
        {"../f": [1, 2, "x", []]},
    ],
)
def test_a_damaged_end_is_said(tmp_path: Path, left: object) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "f").write_bytes(b"12345678")
    planted(journal_path(base), {"ranges": [["f", 0, 4]]}, b"abcd" + json.dumps(left).encode(), b"applied ")
    with pytest.raises(MalformedError, match="damaged"):
        undo(base)
    planted(journal_path(base), {"ranges": [["f", -1, 4]]}, b"abcd")
    with pytest.raises(MalformedError, match="damaged"):
        undo(base)
    assert (base / "f").read_bytes() == b"12345678"
