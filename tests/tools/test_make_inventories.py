"""Shipped inventories cannot drift: some are built anew from their classes, and every derived file is recomputed from them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upparam.bases import inventory
from upparam.bases.base import Module

ROOT = Path(__file__).parents[2]
if not (ROOT / "tools" / "make_inventories.py").is_file():
    pytest.skip("not a checkout: tools/ is not here", allow_module_level=True)
sys.path.insert(0, str(ROOT / "tools"))

import make_inventories as tool  # noqa: E402
from inventories import Row, entries  # noqa: E402

ENTRIES = {entry.name: entry for entry in entries()}


def test_the_same_bases_are_shipped_in_the_same_order() -> None:
    assert inventory.names() == list(ENTRIES)
    for name, fact in inventory.known().items():
        entry = ENTRIES[name]
        assert fact[:3] == (entry.family, entry.title, entry.ids) and fact.variant_of == entry.variant_of


@pytest.mark.parametrize(
    "name",
    [
        "sd1.5", "sdxl-refiner", "flux.1-schnell", "sd3.5-medium", "z-image", "gpt2", "llama-3.2-1b", "gemma-3-1b", "phi-3-mini", "falcon-7b",
        "bloom-560m", "roberta-base", "distilbert-base-uncased", "albert-base-v2", "deberta-v3-xsmall", "t5-small", "opt-350m",
        "mixtral-8x7b", "pythia-70m", "whisper-tiny", "clip-vit-base-patch32", "vit-base-patch16-224", "dinov2-giant", "sam-vit-b",
    ],
)  # fmt: skip
def test_an_inventory_built_anew_is_the_shipped_one(name: str) -> None:
    pytest.importorskip("diffusers" if ENTRIES[name].config.get("_class_name") else "transformers")
    assert tool.expanded(ENTRIES[name]) == list(inventory.load(name).modules)


def test_the_recognisers_files_follow_from_the_inventories() -> None:
    bases = {name: inventory.load(name) for name in inventory.names()}
    shapes = {name: [(module.path, module.canonical) for module in base.modules] for name, base in bases.items()}
    assert json.loads(json.dumps(tool.fingerprints(shapes))) == inventory.data("_shapes.json")
    by_authors = {name: tool.originals(base) for name, base in bases.items()}
    assert json.loads(json.dumps(tool.fingerprints(by_authors))) == inventory.data("_original.json")


def test_configs_and_document_are_current() -> None:
    configs = {entry.name: entry.config for entry in ENTRIES.values() if entry.config}
    assert json.loads(json.dumps(configs)) == inventory.data("_configs.json")
    size = sum(path.stat().st_size for path in inventory.DATA.iterdir())
    bases = {name: list(inventory.load(name).modules) for name in ENTRIES}
    assert (ROOT / "docs" / "bases.md").read_text() == tool.document(list(ENTRIES.values()), bases, size)


segments = st.sampled_from(["layers", "attn", "q", "0", "1", "2", "10", "net"])
rows = st.lists(
    st.builds(
        Row,
        st.lists(segments, min_size=1, max_size=5).map(".".join),
        st.sampled_from(["Linear", "LayerNorm"]),
        st.sampled_from([(4,), (4, 8), (8, 4, 1, 1)]),
        st.booleans(),
    ),
    unique_by=lambda row: row.path,
    max_size=40,
)


@given(rows)
def test_a_program_stands_for_exactly_its_rows(found: list[Row]) -> None:
    program: list[Any] = json.loads(json.dumps(tool.pack(found)))
    assert list(inventory.expand(program)) == [Module(*row) for row in found]


def test_repeated_layers_become_one_block() -> None:
    found = [Row(f"layers.{index}.q", "Linear", (4, 4), False) for index in range(50)]
    assert tool.pack(found) == [["layers.", 0, 50, [["q", "Linear", [4, 4]]]]]
