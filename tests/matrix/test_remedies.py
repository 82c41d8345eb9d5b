"""Refusals from outside: where one names options, these options lead to a file; where none would, the dialects it names hold the adapter."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tests.matrix.specimens import FEATURES, MODULES, module, specimen

from upparam.algorithms.lowrank import RankRule
from upparam.bases import inventory
from upparam.dialects import DIALECTS, get
from upparam.dialects.base import ReadOptions
from upparam.errors import RefusedError
from upparam.operations.convert import write_adapter
from upparam.operations.fitting import Arithmetic

WRITABLE = [name for name in DIALECTS if get(name).writable]
CASES = [(feature, base) for feature, (_, bases) in FEATURES.items() for base in bases]


def heavy(feature: str, base: str, dialect: str) -> bool:
    """Whether to spare this machine the base's weights: all that need them are lowered in the same way, so that for most one dialect is enough."""
    return base != "sd1.5" or (dialect != "kohya" and feature != "DoRA")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("remedies")


@cache
def weights(where: Path, base: str) -> Path:
    """Weights of the modules that the specimens change."""
    path = where / f"{base}.safetensors"
    rng = np.random.default_rng(1)
    tensors = {f"{name}.weight": rng.standard_normal(module(base, name).canonical, dtype=np.float32) * 0.02 for name in MODULES[base]}
    save_file({name: values.astype(np.float16) for name, values in tensors.items()}, path)
    return path


class Allowed:
    """What the remedies so far have told to allow."""

    def __init__(self) -> None:
        self.options: dict[str, None] = {}

    def take(self, remedy: str) -> bool:
        """True when the remedy names an option not yet given."""
        named = dict.fromkeys(re.findall(r"--drop [a-z-]+|--[a-z-]+", remedy))
        new = [option for option in named if option not in self.options]
        self.options |= named
        return bool(new)

    def drop(self) -> set[str]:
        return {option.removeprefix("--drop ") for option in self.options if option.startswith("--drop ")}


def write(feature: str, base: str, dialect: str, out: Path, allowed: Allowed, where: Path) -> None:
    rank = RankRule(2) if "--lowrank" in allowed.options else None
    path = weights(where, base) if "--base" in allowed.options else None
    how = Arithmetic("--bake-scale" in allowed.options, rank, path, threads=2)
    read = ReadOptions(base=inventory.load(base))
    write_adapter(specimen(feature, base), out, dialect, read=read, sync=False, drop=allowed.drop(), arithmetic=how)


@pytest.mark.parametrize("dialect", WRITABLE)
def test_what_a_refusal_names_helps(dialect: str, folder: Path) -> None:
    for feature, base in CASES:
        out = folder / f"{feature}-{base}-{dialect}"
        allowed = Allowed()
        try:
            write(feature, base, dialect, out, allowed, folder)
        except RefusedError as problem:
            remedy = problem.remedy or ""
            if others := re.match(r"choose another dialect: (.+) holds? it as it is$", remedy):
                assert all(one.cure is None for one in problem.problems)
                for other in re.split(", | and ", others[1]):
                    get(other).write(specimen(feature, base), {"base": inventory.load(base)})
                continue
            assert allowed.take(remedy), f"{feature} on {base}: {problem.line()}"
            if "--base" not in allowed.options or not heavy(feature, base, dialect):
                write(feature, base, dialect, out, allowed, folder)
