"""Run by test_merge_crash: fork a merge, kill -9 it at a random moment, look at what is left. Prints how many kills hit which state."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
from tests.operations.merging import NUMPY, adapter, lora, save

from upparam.operations.merge import inplace, merge
from upparam.operations.merge.journal import Journal, journal_path, undo

ROWS, COLUMNS, LAYERS = 1500, 1024, 12


def make(folder: Path) -> None:
    rng = np.random.default_rng(5)
    pool = (rng.standard_normal((ROWS, COLUMNS)) * 0.05).astype(NUMPY["bfloat16"])
    for shard in range(2):
        names = range(shard * LAYERS // 2, (shard + 1) * LAYERS // 2)
        save(folder / f"model-{shard + 1:05}-of-00002.safetensors", {f"layers.{name}.q.weight": np.roll(pool, name) for name in names})
    (folder / "config.json").write_text('{"model_type": "llama"}')


def digest(folder: Path) -> str:
    digests = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        content = path.read_bytes()
        digests.update(content[8 + int.from_bytes(content[:8], "little") :])  # the header of a merge written elsewhere holds a note
    return digests.hexdigest()


def item() -> object:
    rng = np.random.default_rng(6)
    up, down = rng.standard_normal((ROWS, 8)).astype(np.float32) * 0.1, rng.standard_normal((8, COLUMNS)).astype(np.float32) * 0.1
    return adapter({f"layers.{layer}.q": lora(up, down) for layer in range(LAYERS)})


class Killer:
    """Forks, starts some work and kills it after a random time, up to `longest` seconds, which follows what the machine just took."""

    def __init__(self, longest: float) -> None:
        self.longest, self.chooser, self.killed = longest, random.Random(1), 0

    def __call__(self, work: object, longest: float | None = None) -> None:
        begun = time.monotonic()
        child = os.fork()
        if child == 0:
            work()  # type: ignore[operator]
            os._exit(0)
        time.sleep(self.chooser.uniform(0, longest or self.longest))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if longest is None and os.WIFSIGNALED(status):
            self.killed += 1
            self.longest *= 1.05
        elif longest is None:
            self.longest = 0.9 * min(self.longest, time.monotonic() - begun)


def main() -> None:
    root, kills = Path(sys.argv[1]), int(sys.argv[2])
    base, out, place = root / "base", root / "out", root / "place"
    make(base)
    old, change = digest(base), item()
    begun = time.monotonic()
    merge(base, change, root / "whole", threads=2)  # type: ignore[arg-type]
    kill = Killer(time.monotonic() - begun)
    new = digest(root / "whole")
    assert old != new
    counts = {"absent": 0, "whole": 0, "untouched": 0, "partial": 0, "complete": 0, "applied": 0, "undone": 0}
    for _ in range(kills):
        kill(lambda: merge(base, change, out, threads=2))  # type: ignore[arg-type]
        if out.exists():
            assert digest(out) == new and (out / "config.json").exists(), "half an output under the final name"
            counts["whole"] += 1
        else:
            counts["absent"] += 1
        assert digest(base) == old
        for left in root.glob(".out*"):
            shutil.rmtree(left)
        shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(base, place)
    for number in range(kills):
        inplace.REPLACED_SHARE = 2.0 if number % 2 else 0.4  # by ranges, by new files
        kill(lambda: merge(place, change, in_place=True, threads=2))  # type: ignore[arg-type]
        if not journal_path(place).exists():
            counts["untouched"] += 1
        else:
            state = Journal.read(place).state.decode().strip()
            counts[state] += 1
            if state == "applied":
                assert digest(place) == new
            if state in ("complete", "applied") and kill.chooser.random() < 0.5:
                kill(lambda: undo(place), 0.05)  # an undo that is killed too
            if journal_path(place).exists():
                undo(place)
        for _ in range(2 if number % 5 == 0 else 0):  # of a merge that went through, an undo that is killed
            if not journal_path(place).exists():
                merge(place, change, in_place=True, threads=2)  # type: ignore[arg-type]
            kill(lambda: undo(place), 0.05)
            counts["undone"] += 1
        if journal_path(place).exists():
            undo(place)
        assert digest(place) == old, "the old bytes are not back"
        assert {path.name for path in place.iterdir()} == {path.name for path in base.iterdir()}
    print(json.dumps({"killed": kill.killed, **counts}))


if __name__ == "__main__":
    main()
