"""The fast check of a safetensors header never accepts what the full reader refuses, and counts the same."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.hostile.asm import sft
from tests.hostile.corpus import hostile

from upparam.containers import safetensors
from upparam.errors import MalformedError
from upparam.operations.scan.fast import safetensors_tensors
from upparam.sources import MemorySource

GOOD = b'{"__metadata__":{"format":"pt","x":"a \\"b\\""},"a":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},"b.c":{"dtype":"U8","shape":[],"data_offsets":[8,9]},"e":{"dtype":"U8","shape":[0],"data_offsets":[9,9]}}'
PIECES = [
    b'"a"',
    b'"b"',
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"0",
    b"00",
    b"01",
    b"1",
    b"9",
    b"-1",
    b"1e0",
    b" ",
    b"\\u0041",
    b"\\",
    b'"',
    b"\xff",
    b"\n",
    b'"__metadata__":{},',
    b'"F16"',
    b"null",
    b",,",
    b'""',
    b"]}}",
    b'"a":{"dtype":"U8","shape":[1],"data_offsets":[9,10]},',
]


def both(data: bytes) -> tuple[int | None, int | None]:
    source = MemorySource(data)
    try:
        file = safetensors.read(source, Path("x"))
        slow = None if file.findings else len(file.tensors)
    except MalformedError:
        slow = None
    return (safetensors_tensors(source, Path("x")) if source.size >= 8 else None), slow


def test_canonical_files_take_the_fast_way():
    assert both(sft(GOOD, bytes(9))) == (3, 3)
    assert both(sft(GOOD + b"    ", bytes(9))) == (3, 3)
    shuffled = json.loads(GOOD)
    shuffled.pop("__metadata__")
    reordered = json.dumps(dict(sorted(shuffled.items(), reverse=True)), separators=(",", ":")).encode()
    assert both(sft(reordered, bytes(9))) == (3, 3)


@given(
    st.lists(st.tuples(st.integers(0, len(GOOD)), st.integers(0, 6), st.sampled_from(PIECES)), min_size=1, max_size=3), st.integers(7, 11)
)
@example([(1, 18, b"")], 9)
@settings(max_examples=3000, deadline=None)
def test_never_accepts_what_the_reader_refuses(edits, size):
    header = GOOD
    for at, cut, piece in edits:
        header = header[:at] + piece + header[at + cut :]
    fast, slow = both(sft(header, bytes(size)))
    assert fast is None or fast == slow


def test_hostile_headers_are_left_to_the_reader():
    for case in hostile("/nonexistent/canary"):
        if case.name.endswith(".safetensors") and len(case.data) >= 8:
            fast, slow = both(case.data)
            assert fast is None or fast == slow
