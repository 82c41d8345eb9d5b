"""Members that other packages add through entry points."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest

from upparam import containers, dialects
from upparam.containers import open_all
from upparam.containers.base import Head, TensorFile
from upparam.tensors import Source, Tensor


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
