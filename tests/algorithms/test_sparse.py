"""A LoRA with a sparse remainder, against the dense sum, and as LyCORIS' extraction script writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tests.algorithms.checks import array, check_additive, tensor

from upparam.adapter import Target
from upparam.algorithms.base import Scaling
from upparam.algorithms.lora import LoRA
from upparam.algorithms.lowrank import RankRule
from upparam.algorithms.sparse import SparseLoRA
from upparam.errors import MalformedError, RefusedError
from upparam.operations.convert import convert
from upparam.operations.fitting import Arithmetic
from upparam.operations.opening import open_adapter

STEM = "lora_unet_down_blocks_0_resnets_0_conv1"
PATH = "unet.down_blocks.0.resnets.0.conv1"


def extracted(change: Any, rank: int, sparsity: float = 0.95, dtype: Any = np.float16) -> dict[str, Any]:
    """lycoris/utils extract_conv, make_sparse and extract_diff (use_bias): the best LoRA, and the largest of what it leaves."""
    flat = change.reshape(len(change), -1)
    up, sizes, down = np.linalg.svd(flat, full_matrices=False)
    up, down = up[:, :rank] * sizes[:rank], down[:rank]
    rest = flat - up @ down
    rest = np.where(abs(rest) < np.quantile(abs(rest), sparsity), 0.0, rest)
    places = np.nonzero(rest)
    ones = [1] * (change.ndim - 2)
    return {
        "lora_down.weight": down.reshape(rank, *change.shape[1:]).astype(dtype), "lora_up.weight": up.reshape(len(up), rank, *ones).astype(dtype),
        "alpha": np.array([rank], np.float16), "bias_indices": np.stack(places).astype(np.int16), "bias_values": rest[places].astype(dtype),
        "bias_size": np.array(rest.shape, np.int16),
    }  # fmt: skip


@pytest.mark.parametrize("kernel", [(), (3, 3)])
@pytest.mark.parametrize("alpha", [None, 1.5])
def test_the_dense_sum(kernel: tuple[int, ...], alpha: float | None) -> None:
    rng = np.random.default_rng(0)
    held = extracted(rng.standard_normal((9, 7, *kernel)), 3, dtype=np.float64)
    shuffled = rng.permutation(held["bias_values"].size)
    delta = SparseLoRA(
        tensor(held["lora_up.weight"]), tensor(held["lora_down.weight"]), tensor(held["bias_indices"][:, shuffled]),
        tensor(held["bias_values"][shuffled]), tensor(held["bias_size"]), Scaling(alpha=alpha),
    )  # fmt: skip
    rest = np.zeros((9, 7 * int(np.prod(kernel, dtype=int))))
    rest[tuple(held["bias_indices"].astype(int))] = held["bias_values"]
    low = held["lora_up.weight"].reshape(9, 3) @ held["lora_down.weight"].reshape(3, -1)
    check_additive(delta, (low + rest).reshape(9, 7, *kernel) * (1.0 if alpha is None else 0.5))


@pytest.fixture
def file(tmp_path: Path) -> tuple[Path, Any]:
    change = np.random.default_rng(1).standard_normal((320, 320, 3, 3)) * 0.01
    save_file({f"{STEM}.{word}": value for word, value in extracted(change, 8).items()}, tmp_path / "locon.safetensors")
    return tmp_path / "locon.safetensors", change


def test_what_the_script_wrote_is_read_and_written_back(file: tuple[Path, Any], tmp_path: Path) -> None:
    path, change = file
    adapter = open_adapter(path)
    delta = adapter.deltas[Target(PATH)]
    assert (adapter.dialect, type(delta), adapter.leftovers) == ("lycoris", SparseLoRA, {})
    found = delta.load().rows(0, 320)
    plain = LoRA(delta.up, delta.down, delta.scaling).load().rows(0, 320)  # type: ignore[attr-defined]
    wanted = change.reshape(320, -1)
    # The remainder is there: a twentieth of the elements, which are the largest that the low rank leaves out.
    assert np.linalg.norm(found - wanted) < 0.9 * np.linalg.norm(plain - wanted)
    convert(path, tmp_path / "again.safetensors", "lycoris")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_others_take_it_as_plain_lora(file: tuple[Path, Any], tmp_path: Path) -> None:
    path, _ = file
    with pytest.raises(RefusedError, match=r"a LoRA \+ sparse remainder delta.*--lowrank"):
        convert(path, tmp_path / "no.safetensors", "kohya")
    receipt = convert(path, tmp_path / "kohya.safetensors", "kohya", arithmetic=Arithmetic(lowrank=RankRule(32, conv_rank=32)))
    (fact,) = [fact for fact in receipt.modules if "change" in fact]
    one, other = (open_adapter(out).deltas[Target(PATH)].load().rows(0, 320) for out in (path, tmp_path / "kohya.safetensors"))
    assert np.linalg.norm(one - other) / np.linalg.norm(one) == pytest.approx(fact["error"], rel=1e-6)


def test_with_a_tucker_core_it_is_of_another_difference(file: tuple[Path, Any], tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    held = load_file(file[0])
    held[f"{STEM}.lora_mid.weight"] = np.zeros((8, 8, 3, 3), np.float16)
    held[f"{STEM}.lora_down.weight"] = np.zeros((8, 320, 1, 1), np.float16)
    save_file(held, tmp_path / "tucker.safetensors")
    adapter = open_adapter(tmp_path / "tucker.safetensors")
    assert type(adapter.deltas[Target(PATH)]) is LoRA and len(adapter.leftovers) == 3
    assert "unexplained" in {finding.code for finding in adapter.findings}


@pytest.mark.parametrize(("word", "value", "why"), [
    ("bias_size", np.array([320, 320], np.int16), "another size"),
    ("bias_indices", np.full((2, 5), -1, np.int16), "outside"),
    ("bias_values", np.zeros(4, np.float16), "do not fit together"),
])  # fmt: skip
def test_a_remainder_that_does_not_fit_is_malformed(word: str, value: Any, why: str) -> None:
    held = {
        "lora_up.weight": np.ones((320, 2)), "lora_down.weight": np.ones((2, 2880)), "bias_indices": np.zeros((2, 5), np.int16),
        "bias_values": np.ones(5), "bias_size": np.array([320, 2880], np.int16), word: value,
    }  # fmt: skip
    with pytest.raises(MalformedError, match=why):
        SparseLoRA(*(tensor(array(held[name])) if held[name].dtype.kind == "f" else tensor(held[name]) for name in held)).load()
