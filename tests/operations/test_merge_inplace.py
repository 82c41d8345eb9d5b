"""In place and back: only touched ranges change, undo restores every bit, and what cannot be done in place is refused untouched."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from tests.operations.merging import NUMPY, adapter, load, lora, ordered_distance, save

from upparam.adapter import Adapter
from upparam.containers import open_file
from upparam.errors import MalformedError, OutputExistsError, RefusedError, UnreadableError
from upparam.operations.merge import inplace, journal, merge, stream
from upparam.operations.merge.journal import Journal, journal_path, undo
from upparam.operations.unmerge import unmerge

RNG = np.random.default_rng(3)


def model(folder: Path) -> tuple[Path, Adapter]:
    folder.mkdir()
    names = [f"layers.{layer}.{part}" for layer in range(3) for part in ("q", "k", "v")]
    for shard in range(3):
        part = {
            f"{name}.weight": (RNG.standard_normal((40, 48)) * 0.05).astype(NUMPY["bfloat16"]) for name in names[shard * 3 : shard * 3 + 3]
        }
        save(folder / f"model-{shard + 1:05}-of-00003.safetensors", part)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    deltas = {
        name: lora(RNG.standard_normal((40, 4)).astype(np.float32) * 0.1, RNG.standard_normal((4, 48)).astype(np.float32) * 0.1)
        for name in names
        if not name.endswith("k")
    }
    return folder, adapter(deltas)


def only_layer(item: Adapter, layer: int) -> Adapter:
    return adapter({target: delta for target, delta in item.deltas.items() if target.module.startswith(f"layers.{layer}.")})


WAYS = {"ranges": 2.0, "new files": 0.0}
"""From which touched share on a file is written anew: never, always."""


@pytest.fixture(params=list(WAYS))
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(inplace, "REPLACED_SHARE", WAYS[request.param])
    return str(request.param)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_in_place_equals_elsewhere_and_undo_restores_every_bit(tmp_path: Path, way: str) -> None:
    base, item = model(tmp_path / "base")
    before = digests(base)
    merge(base, item, tmp_path / "out")
    receipt = merge(base, item, in_place=True)
    assert "0 wrongly rounded" in receipt.proofs[0] and receipt.counts["tensors_changed"] == 6
    kept = sum(path.stat().st_size for path in base.iterdir() if path.name.startswith("."))
    assert f"--discard {base}' frees {kept:,} bytes" in receipt.findings[-1].message
    for path in sorted(base.glob("*.safetensors")):
        here, there = load(path), load(tmp_path / "out" / path.name)
        assert all(np.array_equal(here[name].view(np.uint16), there[name].view(np.uint16)) for name in there)
    assert Journal.read(base).state == b"applied "
    with pytest.raises(OutputExistsError, match="undo journal"):
        merge(base, item, in_place=True)
    counts = undo(base).counts
    assert (counts["ranges_restored"], counts["files_restored"]) == ((6, 0) if way == "ranges" else (0, 3))
    assert counts["bytes"] == (6 * 40 * 48 * 2 if way == "ranges" else sum(path.stat().st_size for path in base.glob("*.safetensors")))
    assert digests(base) == before
    with pytest.raises(UnreadableError, match="no undo journal"):
        undo(base)


def test_a_hash_of_the_data_that_stays_in_place_is_said_to_be_of_the_old(tmp_path: Path) -> None:
    weight = np.ones((8, 6), np.float32)
    base = save(tmp_path / "b.safetensors", {"m.weight": weight}, {"sshs_model_hash": "abc"})
    item = adapter({"m": lora(np.ones((8, 1), np.float32), np.ones((1, 6), np.float32))})
    found = [finding for finding in merge(base, item, in_place=True).findings if finding.code == "stale-metadata"]
    assert [finding.severity.name for finding in found] == ["WARNING"] and found[0].evidence == ("sshs_model_hash",)
    assert open_file(base).metadata == {"sshs_model_hash": "abc"}


def test_only_files_that_mostly_change_are_written_anew(tmp_path: Path) -> None:
    base, item = model(tmp_path / "base")
    before = digests(base)
    first, *others = list(item.deltas)
    item.deltas = {first: item.deltas[first], **{target: item.deltas[target] for target in others if target.module.startswith("layers.1.")}}
    places = {path.name: path.stat().st_ino for path in base.glob("*.safetensors")}
    merge(base, item, in_place=True)
    now = {path.name: path.stat().st_ino for path in base.glob("*.safetensors")}
    assert [now[name] == places[name] for name in sorted(places)] == [True, False, True]
    counts = undo(base).counts
    assert (counts["ranges_restored"], counts["files_restored"]) == (1, 1)
    assert digests(base) == before


def test_new_files_keep_mode_and_other_names_keep_the_old_content(tmp_path: Path, way: str) -> None:
    """Whatever share of it changes, a file with other names is written anew."""
    base = save(tmp_path / "b.safetensors", {"m.weight": np.ones((8, 6), np.float32)})
    base.chmod(0o640)
    other = tmp_path / "other-name.safetensors"
    other.hardlink_to(base)
    old = base.read_bytes()
    merge(base, adapter({"m": lora(np.ones((8, 1)), np.ones((1, 6)))}), in_place=True)
    assert base.stat().st_mode & 0o777 == 0o640
    assert base.read_bytes() != old and other.read_bytes() == old
    undo(base)
    assert base.read_bytes() == old and sorted(path.name for path in tmp_path.iterdir()) == ["b.safetensors", "other-name.safetensors"]


def test_a_disk_without_room_for_new_files_gets_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil
    from types import SimpleNamespace

    base, item = model(tmp_path / "base")
    touched = 6 * 40 * 48 * 2
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=(1 << 20) + touched))
    merge(base, item, in_place=True)
    assert undo(base).counts["ranges_restored"] == 6


@pytest.mark.parametrize("letter", ["n", "é"])
def test_a_name_as_long_as_the_file_system_allows(tmp_path: Path, way: str, letter: str) -> None:
    """What lies beside it has a name of its own, also beside one that begins alike."""
    stem = letter * ((255 - len(".safetensors") - 1) // len(letter.encode()))
    weight = (RNG.standard_normal((40, 48)) * 0.05).astype(np.float32)
    item = adapter({"q": lora(np.ones((40, 4), np.float32), np.ones((4, 48), np.float32))})
    bases = [tmp_path / f"{stem}{number}.safetensors" for number in range(2)]
    for number, base in enumerate(bases):
        save(base, {"q.weight": weight + number})
    before = digests(tmp_path)
    for base in bases:
        merge(base, item, in_place=True)
    assert len({journal_path(base) for base in bases}) == 2 and all(journal_path(base).exists() for base in bases)
    for base in bases:
        undo(base)
    assert digests(tmp_path) == before


def test_the_same_file_under_another_name_of_the_base_is_not_merged_twice(tmp_path: Path, way: str) -> None:
    (tmp_path / "pipe").mkdir()
    base, item = model(tmp_path / "pipe" / "unet")
    first = base / "model-00001-of-00003.safetensors"
    part = only_layer(item, 0)
    before = digests(base)
    merge(first, part, in_place=True)
    for again in (base, base.parent):
        with pytest.raises(OutputExistsError, match=f"undo {first}'"):  # what it would keep has the name of what the first one keeps
            merge(again, item, in_place=True)
    undo(first)
    assert digests(base) == before
    merge(base.parent, part, in_place=True)
    with pytest.raises(OutputExistsError, match=f"undo {base.parent}'"):
        merge(first, part, in_place=True)
    merge(base / "model-00002-of-00003.safetensors", only_layer(item, 1), in_place=True)  # another file: its own matter
    undo(base / "model-00002-of-00003.safetensors")
    undo(base.parent)
    assert digests(base) == before


def test_undo_under_another_name_of_the_base(tmp_path: Path) -> None:
    (tmp_path / "pipe").mkdir()
    base, item = model(tmp_path / "pipe" / "unet")
    first = base / "model-00001-of-00003.safetensors"
    names = {
        f"layers.{layer}.{part}.weight": f"model-{layer + 1:05}-of-00003.safetensors" for layer in range(3) for part in ("q", "k", "v")
    }
    index = base / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    before = digests(base)
    merge(index, item, in_place=True)
    undo(index)  # the folder is what was merged
    assert digests(base) == before
    for one, merged, others in (
        (first, only_layer(item, 0), (base, base.parent)),
        (base, item, (first, base.parent)),
        (base.parent, item, (first, base)),
    ):
        merge(one, merged, in_place=True)
        for other in others:
            with pytest.raises(UnreadableError, match=f"no undo journal.*upparam undo {one}'"):
                undo(other)
        undo(one)
    with pytest.raises(UnreadableError) as raised:
        undo(base)
    assert raised.value.remedy is None


def test_old_weights_whose_journal_is_gone_are_not_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inplace, "REPLACED_SHARE", 0.0)
    base, item = model(tmp_path / "base")
    merge(base, item, in_place=True)
    journal_path(base).unlink()
    before = digests(base)
    with pytest.raises(OutputExistsError, match="its journal is gone"):
        merge(base, item, in_place=True)
    assert digests(base) == before


def test_discard_makes_it_final(tmp_path: Path, way: str) -> None:
    base, item = model(tmp_path / "base")
    merge(base, item, in_place=True)
    after = {name: digest for name, digest in digests(base).items() if not name.startswith(".")}
    undo(base, discard=True)
    assert digests(base) == after


def test_a_failure_half_way_puts_the_old_bytes_back(tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base, item = model(tmp_path / "base")
    before = digests(base)
    real, calls = stream.Change.run, []

    def fails(self: stream.Change, buffers: stream.Buffers) -> None:
        calls.append(self)
        if len(calls) == 4:
            raise RuntimeError("the power went out")
        real(self, buffers)

    monkeypatch.setattr(stream.Change, "run", fails)
    with pytest.raises(RuntimeError, match="power"):
        merge(base, item, in_place=True, threads=1)
    assert digests(base) == before


def test_a_failure_when_all_is_written_puts_the_old_files_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, item = model(tmp_path / "base")
    before = digests(base)
    monkeypatch.setattr(inplace, "REPLACED_SHARE", 0.0)

    def fails(*_: object) -> None:
        raise RuntimeError("the power went out")

    monkeypatch.setattr(inplace, "summary", fails)
    with pytest.raises(RuntimeError, match="power"):
        merge(base, item, in_place=True)
    assert digests(base) == before


def test_a_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    base, item = model(tmp_path / "base")
    before = digests(base)

    def fails(*_: object) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", fails)
    merge(base, item, in_place=True)
    undo(base)
    assert digests(base) == before


def test_a_damaged_or_unfinished_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inplace, "REPLACED_SHARE", WAYS["ranges"])
    base, item = model(tmp_path / "base")
    merge(base, item, in_place=True)
    path = journal_path(base)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(MalformedError, match="damaged"):
        undo(base)
    path.write_bytes(whole[:16] + b"complete" + whole[24:])
    with pytest.raises(RefusedError, match="interrupted"):
        undo(base, discard=True)
    merged = digests(base)
    path.write_bytes(whole[:16] + b"partial " + whole[24:])
    assert undo(base).counts["ranges_restored"] == 0
    del merged[path.name]
    assert digests(base) == merged


def test_what_cannot_be_done_in_place(tmp_path: Path) -> None:
    base, item = model(tmp_path / "base")
    before = digests(base)
    with pytest.raises(RefusedError, match="dtype cannot change"):
        merge(base, item, in_place=True, dtype="float16")
    shard = next(base.glob("*.safetensors"))
    real = tmp_path / "blob"
    shard.rename(real)
    shard.symlink_to(real)
    with pytest.raises(RefusedError, match="symbolic link"):
        merge(base, item, in_place=True)
    shard.unlink()
    real.rename(shard)
    assert digests(base) == before


def test_unmerge_comes_back_to_within_one_rounding(tmp_path: Path) -> None:
    base, item = model(tmp_path / "base")
    merge(base, (item, 0.7), tmp_path / "merged")
    unmerge(tmp_path / "merged", (item, 0.7), tmp_path / "back")
    for path in sorted(base.glob("*.safetensors")):
        original, merged, back = load(path), load(tmp_path / "merged" / path.name), load(tmp_path / "back" / path.name)
        for name in original:
            spacing = 2.0**-8 * np.maximum(np.abs(original[name].astype(np.float64)), np.abs(merged[name].astype(np.float64))) * 2
            assert (np.abs(back[name].astype(np.float64) - original[name].astype(np.float64)) <= spacing).all()
            assert (ordered_distance(back[name], original[name]) == 0).mean() > 0.8


def test_unmerge_refuses_what_subtraction_cannot_restore(tmp_path: Path) -> None:
    from upparam.adapter import Extra, ExtraKind
    from upparam.tensors import Tensor

    base, item = model(tmp_path / "base")
    item.extras.append(Extra(ExtraKind.SAVED_MODULE, "layers.0.k.weight", Tensor.of(np.zeros((40, 48), np.float32))))
    with pytest.raises(RefusedError, match=r"layers\.0\.k\.weight"):
        unmerge(base, item, tmp_path / "back")


def test_an_interrupted_undo_says_so_and_goes_on_when_run_again(tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base, item = model(tmp_path / "base")
    before = digests(base)
    merge(base, item, in_place=True)
    with monkeypatch.context() as patch:
        for name in ("run_tasks", "_put_back"):
            patch.setattr(journal, name, interrupt)
        with pytest.raises(UnreadableError, match=r"undo was interrupted.*again"):
            undo(base)
    undo(base)
    assert digests(base) == before


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt
