"""Kills, full disks and memory: what a merge leaves behind, and what it needs."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.operations.merging import adapter, lora, save

from upparam.errors import UnreadableError
from upparam.operations.merge import merge

ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), "OPENBLAS_NUM_THREADS": "1"}


def test_kill_9_at_any_moment(tmp_path: Path) -> None:
    """50 kills of a merge and 50 of an in-place merge: the old or the new model, never a mixture that undo cannot take back."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("kill_merges.py")), str(tmp_path), "50"],
        capture_output=True,
        text=True,
        env=ENV,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts["killed"] >= 50, counts
    assert counts["absent"] >= 5 and counts["absent"] + counts["whole"] == 50, counts


def test_a_full_disk_is_a_clear_error_and_leaves_nothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    base = save(tmp_path / "b.safetensors", {"q.weight": rng.standard_normal((600, 500)).astype(np.float32)})
    item = adapter({"q": lora(rng.standard_normal((600, 2)), rng.standard_normal((2, 500)))})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    import signal

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        for options in ({"out": tmp_path / "o.safetensors"}, {"in_place": True}):
            with pytest.raises(UnreadableError, match="could not be written"):
                merge(base, item, **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.iterdir()] == ["b.safetensors"]


def test_too_little_room_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil
    from types import SimpleNamespace

    base = save(tmp_path / "b.safetensors", {"q.weight": np.ones((60, 50), np.float32)})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UnreadableError, match="not enough room"):
        merge(base, adapter({"q": lora(np.ones((60, 1)), np.ones((1, 50)))}), tmp_path / "o.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["b.safetensors"]


MEMORY = """
import resource, sys
from pathlib import Path
import numpy as np
from tests.operations.merging import adapter, lora
from upparam.operations.merge import merge
base, layers = Path(sys.argv[1]), int(sys.argv[2])
rng = np.random.default_rng(0)
item = adapter({f"layers.{n}.q": lora(rng.standard_normal((1024, 4)), rng.standard_normal((4, 1024))) for n in range(layers)})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
merge(base, item, base.with_name("out.safetensors"), force=True, threads=2)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_grow_with_the_base(tmp_path: Path) -> None:
    grown = []
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for layers in (8, 96):
        weight = np.ones((1024, 1024), np.float16)
        base = save(tmp_path / "base.safetensors", {f"layers.{layer}.q.weight": weight for layer in range(layers)})
        done = subprocess.run([sys.executable, "-c", MEMORY, str(base), str(layers)], capture_output=True, text=True, env=ENV, check=False)
        assert done.returncode == 0, done.stderr
        grown.append(int(done.stdout) / 1024)
    assert grown[1] < grown[0] + 8, f"MiB above the start for 16 MB and 192 MB of weights: {grown}"
    assert grown[1] < 80
