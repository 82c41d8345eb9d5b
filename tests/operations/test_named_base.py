"""A base that the user names and that is another one is noticed on the way to every dialect, also those that need none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.matrix.specimens import specimen

from upparam.adapter import Adapter, Target
from upparam.algorithms.lora import LoRA
from upparam.bases import inventory
from upparam.bases.base import Base, Module
from upparam.cli import main
from upparam.dialects.base import ReadOptions
from upparam.errors import MismatchError
from upparam.operations.convert import convert, write_adapter
from upparam.operations.opening import open_adapter
from upparam.tensors import Tensor

PATHS = [f"model.layers.{block}.self_attn.{name}_proj" for block in range(2) for name in "qv"]


def llama(width: int = 32, blocks: int = 2, **more: tuple[int, ...]) -> Base:
    modules = [Module(path, "Linear", (width, width)) for path in PATHS[: 2 * blocks]]
    return Base(f"llama-{width}", (*modules, *(Module(path.replace("__", "."), "Linear", shape) for path, shape in more.items())))


def lora(out: int = 32, into: int = 32) -> LoRA:
    rng = np.random.default_rng(out)
    return LoRA(Tensor.of(rng.standard_normal((out, 4)).astype(np.float32)), Tensor.of(rng.standard_normal((4, into)).astype(np.float32)))


def adapter(**more: LoRA) -> Adapter:
    deltas = {Target(path): lora() for path in PATHS} | {Target(path.replace("__", ".")): delta for path, delta in more.items()}
    return Adapter(deltas, "test")


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Path]:
    for dialect in ("peft", "mlx", "triad"):
        write_adapter(adapter(), tmp_path / dialect, dialect)
    convert(tmp_path / "peft", tmp_path / "split", "triad")
    return {name: tmp_path / name for name in ("peft", "mlx", "triad", "split")}


@pytest.mark.parametrize("to", ["peft", "mlx", "triad", "loralib", "kohya"])
@pytest.mark.parametrize("source", ["peft", "mlx", "split"])
def test_another_base_is_refused_and_the_right_one_is_not(source: str, to: str, sources: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / ("out.safetensors" if to == "kohya" else "out")
    for base, expected, found in (
        (llama(64), "(64, 64)", "(32, 32)"),
        (llama(blocks=1), "a module of llama-32", "none of this name there"),
        (inventory.load("sd1.5"), "a module of sd1.5", "none of this name there"),
    ):
        with pytest.raises(MismatchError, match="targets do not fit the base named") as caught:
            convert(sources[source], out, to, read=ReadOptions(base=base))
        assert caught.value.tensor == (PATHS[2] if "llama-32" in expected else PATHS[0])
        assert caught.value.expected == expected and found in str(caught.value.found)
        assert not out.exists()
    convert(sources[source], out, to, read=ReadOptions(base=llama()))
    assert set(open_adapter(out, options=ReadOptions(base=llama())).deltas) == {Target(path) for path in PATHS}


def test_resized_vocabularies_tied_heads_and_other_components_say_nothing_of_a_base(tmp_path: Path) -> None:
    grown = adapter(lm_head=lora(50), model__embed_tokens=lora(50))
    write_adapter(grown, tmp_path / "tied", "peft", read=ReadOptions(base=llama(model__embed_tokens=(40, 32))))
    parts = specimen("text encoder", "sd1.5")
    unet = inventory.load("sd1.5")
    unet = replace(unet, modules=tuple(module for module in unet.modules if module.path.startswith("unet.")))
    write_adapter(parts, tmp_path / "parts", "peft", read=ReadOptions(base=unet))
    with pytest.raises(MismatchError, match=r"embed_tokens.*expected \(40, 64\), found \(50, 32\)"):
        write_adapter(
            adapter(model__embed_tokens=lora(50)), tmp_path / "wide", "peft", read=ReadOptions(base=llama(model__embed_tokens=(40, 64)))
        )


def test_verify_says_so_of_a_base_known_by_name(sources: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def told(path: Path) -> dict[str, Any]:
        main(["verify", str(path), "--base", "sd1.5", "--json"])
        return {finding["code"]: finding["message"] for finding in json.loads(capsys.readouterr().out)["findings"]}

    assert told(sources["peft"])["does-not-fit"] == "4 of 4 targets do not fit sd1.5"
    write_adapter(specimen("plain", "sd1.5"), tmp_path / "sd", "peft")
    assert told(tmp_path / "sd")["fits"] == "every target and shape fits sd1.5"


def test_names_split_before_a_base_was_named_are_translated_once_it_is(tmp_path: Path) -> None:
    """Those of PEFT, with what its wrapper left out in front, come back as they were."""
    base = Base("wide", tuple(Module(f"text.{path}", "Linear", (32, 32)) for path in PATHS))
    write_adapter(adapter(), tmp_path / "theirs", "peft")
    convert(tmp_path / "theirs", tmp_path / "split", "triad")
    read = ReadOptions(base=base)
    named = open_adapter(tmp_path / "split", options=read)
    assert named.layout == "reference" and set(named.deltas) == {Target(f"text.{path}") for path in PATHS}
    convert(tmp_path / "split", tmp_path / "ours", "peft", read=read)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
