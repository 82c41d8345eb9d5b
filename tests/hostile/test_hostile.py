"""Every hostile file gets its verdict, in time, and no command answers with a traceback."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from upparam.operations.scan import scan_file

from .corpus import hostile

CASES = hostile("/tmp/upparam-canary-that-must-not-exist")


def test_the_corpus_is_large_enough():
    assert len(CASES) >= 150 and len({case.kind for case in CASES}) >= 40
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_verdict(case, tmp_path):
    begun = time.process_time()
    report = scan_file(case.write(tmp_path))
    taken = time.process_time() - begun
    assert report.verdict.value == case.verdict, report.facts()
    assert taken < 5


def test_benign_files_are_no_alarm(tmp_path):
    from .benign import benign

    cases = benign()
    assert len(cases) >= 40
    wrong = {case.name: scan_file(case.write(tmp_path)).facts() for case in cases}
    assert {
        name: facts["findings"]
        for name, facts in wrong.items()
        if facts["verdict"] != next(case.verdict for case in cases if case.name == name)
    } == {}


def test_real_leftovers_are_no_alarm(corpus):
    for path in corpus.rglob("*"):
        if path.suffix in (".bin", ".pt", ".pth", ".safetensors", ".npz"):
            report = scan_file(path)
            assert report.exit_code == 0, report.facts()


def write_models(folder: Path) -> None:
    """A sound base and an adapter for it, so that commands with two inputs get as far as they can."""
    shapes = {f"model.layers.0.self_attn.{name}_proj.weight": (8, 8) for name in "qv"}
    write_safetensors(folder / "base.safetensors", shapes)
    (folder / "peft").mkdir()
    parts = {
        f"base_model.model.{name.removesuffix('.weight')}.lora_{part}.weight": shape
        for name in shapes
        for part, shape in (("A", (2, 8)), ("B", (8, 2)))
    }
    write_safetensors(folder / "peft" / "adapter_model.safetensors", parts)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj", "v_proj"], "base_model_name_or_path": "x"}
    (folder / "peft" / "adapter_config.json").write_text(json.dumps(config))


def write_safetensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    chance = np.random.default_rng(1)
    save_file({name: chance.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}, path)


ATTACK = """
import sys, pickle, io
data = open(sys.argv[1], 'rb').read()
try:
    if data[:2] == b'PK':
        import zipfile
        archive = zipfile.ZipFile(io.BytesIO(data))
        data = archive.read(next(name for name in archive.namelist() if name.endswith('data.pkl')))
    class Loader(pickle.Unpickler):
        def persistent_load(self, name): return None
    stream = io.BytesIO(data)
    while True:
        Loader(stream).load()
except BaseException:
    pass
"""


@pytest.mark.parametrize("name", ["call-os.system.pkl", "stack-global-memo.pkl", "obj.pkl", "inst.pkl", "second-pickle.pkl", "no-stop.pkl", "nested-three-deep.pkl",
                                  "protocol-0.pkl", "bad-opcode-after.pkl", "renamed-model.safetensors", "list-of-map.pkl", "dropped.pkl", "marshal.pkl", "partial-called.pkl", "getattr-chain.pkl"])  # fmt: skip
def test_the_payloads_are_real(name, tmp_path):
    """Without this the corpus could be harmless by mistake: the plain unpickler does run these."""
    canary = tmp_path / "canary"
    case = next(case for case in hostile(str(canary)) if case.name == name)
    subprocess.run([sys.executable, "-c", ATTACK, case.write(tmp_path)], timeout=60, check=False, capture_output=True)
    assert canary.exists()


WATCH = Path(__file__).with_name("watch.py")


def test_nothing_is_executed_whatever_the_command(tmp_path):
    """The reading commands over all hostile files, every command over one file of each third kind (UPPARAM_WATCH=all: over all), in a process where unpickling, exec, imports, processes, sockets and writes are watched."""
    from .benign import benign

    folder, warm, canary = tmp_path / "files", tmp_path / "warm", tmp_path / "canary"
    folder.mkdir()
    warm.mkdir()
    for case in benign():
        case.write(warm)
    for suffix, pack in ((".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)):
        (warm / f"packed{suffix}").write_bytes(pack((warm / "lone.bin").read_bytes()))
    write_models(warm)
    (warm / "cut.pt").write_bytes((warm / "tied.bin").read_bytes()[:-500])
    kinds = {}
    for number, case in enumerate(hostile(str(canary))):
        first = case.kind not in kinds and kinds.setdefault(case.kind, len(kinds)) % 3 == 0
        place = folder / (f"all-{number}" if first or os.environ.get("UPPARAM_WATCH") == "all" else f"some-{number}")
        place.mkdir()
        case.write(place)
    done = subprocess.run([sys.executable, WATCH, folder, warm, canary], capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["files"] >= 400 and told["runs"] >= 3000
    assert told["canary"] is False and told["seen"] == [] and told["problems"] == []


def test_the_watch_sees():
    """Without this the watch could be blind: it must tell each of the ways it watches."""
    done = subprocess.run([sys.executable, WATCH, "--self-test"], capture_output=True, text=True, timeout=60, check=False)
    assert json.loads(done.stdout.splitlines()[-1]) == [], done.stderr[-2000:]


MEMORY = """
import json, pathlib, resource, sys
from upparam.operations.identify import identify
from upparam.operations.scan import scan_file
from upparam.errors import UpparamError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
worst = []
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    scan_file(path)
    try:
        identify(path)
    except UpparamError:
        pass
    worst.append((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, path.name))
print(json.dumps(max(worst)))
"""


def test_memory_stays_with_the_size_of_the_file(tmp_path):
    """No file of the corpus (the largest has 3 MiB) makes two readers take more than 256 MiB beyond what they start with."""
    for case in CASES:
        case.write(tmp_path)
    done = subprocess.run([sys.executable, "-c", MEMORY, tmp_path], capture_output=True, text=True, timeout=300, check=True)
    kilobytes, name = json.loads(done.stdout)
    assert kilobytes < 256 << 10, name
