"""The marks in the table of containers leave out no file that its container would take."""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.hostile.benign import benign
from tests.hostile.corpus import hostile

from upparam.containers import CONTAINERS, head_of, sniffed
from upparam.containers.base import Head
from upparam.sources import MemorySource


@cache
def cases() -> dict[str, bytes]:
    return {case.name: case.data for case in (*benign(), *hostile("/tmp/upparam-canary-that-must-not-exist"))}


def takers(head: Head) -> list[str]:
    """The containers whose own `sniff` takes the file, asked without their marks."""
    found = []
    for place in CONTAINERS:
        module, _, name = place.partition(":")
        container = importlib.import_module(module)
        container = getattr(container, name) if name else container
        if container.sniff(head):
            found.append(place)
    return found


def test_every_file_of_the_corpora_meets_the_mark_of_what_takes_it() -> None:
    taken: set[str] = set()
    for name, data in cases().items():
        head = head_of(MemorySource(data), Path(name))
        found = takers(head)
        assert all(CONTAINERS[place](head) for place in found), name
        assert (sniffed(head) is None) == (not found), name
        taken.update(found)
    assert len(taken) >= len(CONTAINERS) - 1, "the corpora have nearly all of them"


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_files_too(data: st.DataObject) -> None:
    whole = cases()[data.draw(st.sampled_from(sorted(cases())))][:2000]
    start = data.draw(st.binary(max_size=4))
    at = data.draw(st.integers(0, 600))
    head = head_of(MemorySource(whole[:at] + start + whole[at + len(start) :]), Path("x.bin"))
    assert all(CONTAINERS[place](head) for place in takers(head))


@pytest.mark.parametrize("data", [b"", b"{", b'{"peft_type": "LORA"}', b"version https://git-lfs"])
def test_text_is_no_container(data: bytes) -> None:
    assert sniffed(head_of(MemorySource(data), Path("adapter_config.json"))) is None
