"""A dialect of another package, as CONTRIBUTING says to write one, found through its entry point by the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

TOY = '''
"""toy: <module>@up and <module>@down, scale 1."""

from upparam.adapter import Adapter, Target
from upparam.algorithms.base import ScaleRule, Scaling
from upparam.algorithms.lora import LoRA
from upparam.dialects.base import Match, NamedTensors, Package
from upparam.errors import RefusedError


class Toy:
    name, title, writable, algorithms = "toy", "Toy (module@factor)", True, ("lora",)

    def match(self, file):
        hits = [name for name in file.tensors if name.endswith(("@up", "@down"))]
        return Match(self.name, 0.95, (f"{len(hits)} of {len(file.tensors)} names end in @up or @down",)) if hits else None

    def gather(self, file, siblings):
        return [file]

    def read(self, bundle, options):
        tensors = dict(bundle.main.tensors)
        adapter = Adapter({}, self.name, files=(str(bundle.main.path),))
        for name in [name for name in tensors if name.endswith("@up")]:
            module = name.removesuffix("@up")
            if f"{module}@down" in tensors:
                pair = tensors.pop(name), tensors.pop(f"{module}@down")
                adapter.deltas[Target(module)] = LoRA(*pair, Scaling(ScaleRule.BAKED))
        adapter.leftovers = tensors
        return adapter

    def write(self, adapter, options):
        tensors = {}
        for target, delta in adapter.deltas.items():
            if type(delta) is not LoRA or delta.known_scale() != 1 or target.rows:
                raise RefusedError("toy holds plain LoRA of scale 1", tensor=str(target))
            tensors |= {f"{target}@up": delta.up, f"{target}@down": delta.down}
        return Package({"toy.safetensors": NamedTensors(tensors)}, folder=False)


dialect = Toy()
'''


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder that holds the package and what pip would write beside it."""
    folder = tmp_path / "site"
    info = folder / "toy_dialect-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "toy_dialect.py").write_text(TOY)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-dialect\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[upparam.dialects]\ntoy = toy_dialect:dialect\n")
    return folder


def run(site: Path, *argv: object) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-m", "upparam", *map(str, argv)], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )


def test_a_dialect_of_another_package(site: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    module = "model.layers.0.self_attn.q_proj"
    tensors = {
        f"{module}@up": rng.standard_normal((16, 4)).astype(np.float32),
        f"{module}@down": rng.standard_normal((4, 8)).astype(np.float32),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    assert any(line.startswith("toy ") and "reads, writes" in line for line in run(site, "dialects").stdout.splitlines())
    (identity,) = json.loads(run(site, "identify", tmp_path / "x.safetensors", "--json").stdout)
    assert [(report["kind"], report["dialect"], report["modules"]) for report in identity["adapters"]] == [("adapter", "toy", 1)]
    for to, out in (("peft", "peft"), ("toy", "back.safetensors")):
        done = run(site, "convert", tmp_path / ("x.safetensors" if to == "peft" else "peft"), "--to", to, "-o", tmp_path / out)
        assert done.returncode == 0 and "bit-identical" in done.stdout, done.stderr
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == tensors.keys() and all(np.array_equal(back[name], tensors[name]) for name in tensors)
    refused = run(site, "convert", tmp_path / "x.safetensors", "--to", "esperanto", "-o", tmp_path / "out")
    assert refused.returncode == 2 and "toy" in refused.stderr
