"""Members that other packages add through entry points."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest

from upparam import containers, dialects
from upparam.containers import open_all
from upparam.containers.base import Head, TensorFile
from upparam.sources import Source
from upparam.tensors import Tensor


class Shouted:
    """A container of one byte tensor after the mark SHOUT."""

    name = "shouted"
    title = "Shouted"

    def sniff(self, head: Head) -> bool:
        return head.data.startswith(b"SHOUT")

    def read(self, source: Source, path: Path) -> TensorFile:
        data = np.frombuffer(source.read(5, source.size - 5), np.uint8)
        return TensorFile(path, self.name, {"loud": Tensor.of(data)})


shouted = Shouted()


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    point = EntryPoint("shouted", f"{__name__}:shouted", "upparam.containers")
    monkeypatch.setattr(containers, "installed", lambda group: [point] if group == "upparam.containers" else [])
    containers.plugins.cache_clear()
    yield
    containers.plugins.cache_clear()


def test_a_plugin_reads_what_none_of_ours_knows(tmp_path: Path, installed: None) -> None:
    path = tmp_path / "x.loud"
    path.write_bytes(b"SHOUT\x01\x02\x03")
    (file,) = open_all(path)
    assert file.container == "shouted"
    assert file.tensors["loud"].read().tolist() == [1, 2, 3]
    assert dialects.matches(file) == []


def test_a_plugin_never_takes_a_file_of_ours(tmp_path: Path, installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Shouted, "sniff", lambda self, head: True)
    path = tmp_path / "x.npy"
    np.save(path, np.arange(3))
    assert open_all(path)[0].container == "npy"


def group_of(toy: Path) -> str:
    """What a fresh process finds in a group when `toy` is the first entry of its path."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); from upparam.plugins import installed; print([p.name for p in installed('upparam.containers')])"
    return subprocess.run([sys.executable, "-c", code, str(toy)], capture_output=True, text=True, check=True).stdout.strip()


TOLD = "[console_scripts]\nx = y:z\n[upparam.containers]\nshouted = somewhere:shouted\n"


@pytest.mark.parametrize("place", ["toy-1.0.dist-info", "toy.egg-info", "Toy-1.0.DIST-INFO"])
def test_plugins_are_found_where_installers_leave_them(tmp_path: Path, place: str) -> None:
    (tmp_path / place).mkdir()
    (tmp_path / place / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    assert group_of(tmp_path) == "[]"
    (tmp_path / place / "entry_points.txt").write_text(TOLD)
    assert group_of(tmp_path) == "['shouted']"


@pytest.mark.parametrize(("folder", "facts"), [("toy-1.0.dist-info", "METADATA"), ("EGG-INFO", "PKG-INFO")])
def test_plugins_are_found_in_zips_and_eggs(tmp_path: Path, folder: str, facts: str) -> None:
    egg = tmp_path / "toy-1.0-py3.11.egg"
    with zipfile.ZipFile(egg, "w") as archive:
        archive.writestr(f"{folder}/{facts}", "Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
        archive.writestr(f"{folder}/entry_points.txt", TOLD)
    assert group_of(egg) == "['shouted']"
    unpacked = tmp_path / "unpacked" / egg.name
    zipfile.ZipFile(egg).extractall(unpacked)
    assert group_of(unpacked) == "['shouted']"


def test_plugins_of_other_finders_are_found(tmp_path: Path) -> None:
    code = """
import importlib.metadata, sys
from pathlib import Path
class Finder:
    @staticmethod
    def find_spec(*_): return None
    @staticmethod
    def find_distributions(context): return [importlib.metadata.PathDistribution(Path(sys.argv[1]))]
sys.meta_path.append(Finder)
from upparam.plugins import installed
print([point.name for point in installed("upparam.containers")])
"""
    (tmp_path / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (tmp_path / "entry_points.txt").write_text(TOLD)
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['shouted']"
