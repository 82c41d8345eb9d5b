"""Metadata that only the bytes of a file tell: it is in the file that appears, and without it no file appears."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.operations.merging import adapter, lora

from upparam.containers import open_file
from upparam.dialects import kohya_metadata
from upparam.dialects.base import NamedTensors
from upparam.errors import MalformedError
from upparam.operations.convert import write_adapter, write_file
from upparam.operations.late import Late
from upparam.tensors import Tensor

NAME = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize("width", [8, 6 << 18], ids=["small", "two threads"])
@pytest.mark.parametrize("verify", [True, False])
def test_the_hashes_of_a_kohya_file_are_those_of_its_tensors(tmp_path: Path, width: int, verify: bool) -> None:
    random = np.random.default_rng(width)
    up, down = random.standard_normal((4, 2)).astype(np.float32), random.standard_normal((2, width)).astype(np.float32)
    one = adapter({NAME: lora(up, down, alpha=1.0)})
    one.layout = "kohya"
    write_adapter(one, tmp_path / "out.safetensors", "kohya", verify=verify)
    file = open_file(tmp_path / "out.safetensors")
    told = kohya_metadata.hashes(file.tensors, file.metadata)
    assert tuple(file.metadata[key] for key in kohya_metadata.HASHES) == told and "0" * 64 not in told


def test_without_it_nothing_is_finished(tmp_path: Path) -> None:
    def fails() -> dict[str, str]:
        raise MalformedError("no digest")

    content = NamedTensors({"w": Tensor.of(np.zeros(3))}, {"digest": "000"}, late=fails)
    with pytest.raises(MalformedError, match="no digest"), Late() as late:
        write_file(content, tmp_path / "out", False, late)


def test_what_fails_meanwhile_is_what_is_told(tmp_path: Path) -> None:
    content = NamedTensors({"w": Tensor.of(np.zeros(3))}, {"digest": "000"}, late=lambda: {"digest": "much too long"})
    with pytest.raises(KeyError), Late() as late:
        write_file(content, tmp_path / "out", False, late)
        raise KeyError
