"""Cutting, joining and rearranging deltas: exact, and refused where it could not be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from upparam.algorithms.base import BAKED, UNKNOWN, Delta, Scaling, Update
from upparam.algorithms.lora import LoRA
from upparam.algorithms.slicing import RowSlice, cut, join, reorder, same_tensor, stack, take_rows, unjoin
from upparam.errors import RefusedError
from upparam.tensors import Tensor, same_bits


def lora(out: int = 6, rank: int = 2, into: int = 5, seed: int = 0, alpha: float | None = None, dtype: Any = np.float32) -> LoRA:
    rng = np.random.default_rng(seed)
    up, down = rng.standard_normal((out, rank)).astype(dtype), rng.standard_normal((rank, into)).astype(dtype)
    return LoRA(Tensor.of(up), Tensor.of(down), Scaling(alpha=alpha))


def dense(delta: Delta) -> np.ndarray[Any, Any]:
    return delta.load().rows(0, delta.shape[0])


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(0, 99))
def test_cut_and_joined_again_is_the_very_same(sizes: list[int], seed: int) -> None:
    whole = lora(sum(sizes), seed=seed, alpha=3.0)
    bounds = np.cumsum([0, *sizes])
    pieces = [cut(whole, int(low), int(high)) for low, high in pairwise(bounds)]
    for (low, high), piece in zip(pairwise(bounds), pieces, strict=True):
        assert (dense(piece) == dense(whole)[low:high]).all()
    again = join(list(pieces))
    assert isinstance(again, LoRA) and again.scaling == whole.scaling
    assert again.up.source is whole.up.source and again.up.shape == whole.up.shape and again.up.is_contiguous
    assert same_bits(again.up, whole.up) and again.down is whole.down


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), min_size=2, max_size=4), st.booleans())
def test_parts_of_their_own_become_one_block_diagonal_lora(parts: list[tuple[int, int]], gap: bool) -> None:
    deltas: list[Delta | int] = [lora(out, rank, seed=number, alpha=0.5 * rank) for number, (out, rank) in enumerate(parts)]
    if gap:
        deltas.insert(1, 3)
    whole = join(deltas)
    expected = np.concatenate([np.zeros((part, 5)) if isinstance(part, int) else dense(part) for part in deltas])
    assert np.allclose(dense(whole), expected, rtol=0, atol=1e-12)
    assert whole.rank == sum(rank for _, rank in parts) and whole.scale == 0.5
    spans, told, row, column = [], [], 0, 0
    for part in deltas:
        rows = part if isinstance(part, int) else part.shape[0]
        spans.append((row, row + rows))
        row += rows
        if isinstance(part, int):
            told.append(None)
        else:
            told.append([column, column + (part.rank or 0), part.alpha])
            column += part.rank or 0
    apart = unjoin(whole, spans, told)
    assert apart is not None
    for piece, part in zip(apart, deltas, strict=True):
        if isinstance(part, int):
            assert piece is None
        else:
            assert piece is not None and piece.scaling == part.scaling
            assert all(same_bits(one, part.factors()[role]) for role, one in piece.factors().items())


def test_a_missing_part_is_rows_of_zeros() -> None:
    part = lora(4)
    whole = join([2, part, 1])
    assert whole.shape == (7, 5)
    assert (dense(whole)[2:6] == dense(part)).all() and not dense(whole)[[0, 1, 6]].any()
    assert whole.factors()["down"] is part.down


def test_what_cannot_be_joined_is_refused() -> None:
    with pytest.raises(RefusedError, match="different scales"):
        join([lora(alpha=1.0), lora(seed=1, alpha=2.0)])
    with pytest.raises(RefusedError, match="dtypes"):
        join([lora(), lora(seed=1, dtype=np.float16)])
    with pytest.raises(RefusedError, match="never guessed"):
        join([LoRA(lora().up, lora().down, UNKNOWN), lora(seed=1)])
    core = Tensor.of(np.zeros((2, 2, 1, 1), np.float32))
    conv = [
        LoRA(Tensor.of(np.ones((4, 2, 1, 1), np.float32)), Tensor.of(np.full((2, 3, 1, 1), value, np.float32)), mid=core)
        for value in (1, 2)
    ]
    with pytest.raises(RefusedError, match="Tucker"):
        join(list(conv))


def test_baked_parts_stay_baked() -> None:
    one, two = (LoRA(lora(seed=seed).up, lora(seed=seed).down, BAKED) for seed in (0, 1))
    assert join([one, two]).scaling == BAKED


@pytest.mark.parametrize(
    "told",
    [None, [], [[0, 2, None]], [[0, 2, None], "x"], [[0, 2, None], [2, 9, None]], [[0, 1, None], [2, 4, None]], [None, [2, 4, None]],
     [[0, 2, 1.0], [2, 4, None]], [[0.0, 2, None], [2, 4, None]], [[2, 0, None], [2, 4, None]]],
)  # fmt: skip
def test_a_false_account_of_parts_is_not_believed(told: Any) -> None:
    whole = join([lora(), lora(seed=1)])
    assert unjoin(whole, [(0, 6), (6, 12)], told) is None


@dataclass(frozen=True)
class Kron(Delta):
    """A delta whose factors cannot be cut by rows."""

    algorithm: ClassVar[str] = "kron"
    table: Tensor
    scaling: Scaling = field(default_factory=Scaling)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.table.shape

    @property
    def rank(self) -> None:
        return None

    def factors(self) -> Mapping[str, Tensor]:
        return {"table": self.table}

    def load(self) -> Update:
        table = self.table.read().astype(np.float64)

        class Whole(Update):
            shape = table.shape
            scale = 1.0

            def rows(self, start: int, stop: int) -> Any:
                return table[start:stop]

        return Whole()


def test_a_slice_of_what_cannot_be_cut_computes_and_joins_but_is_not_written_alone() -> None:
    whole = Kron(Tensor.of(np.arange(24.0).reshape(6, 4)))
    first, second = cut(whole, 0, 2), cut(whole, 2, 6)
    assert isinstance(first, RowSlice) and first.algorithm == "kron" and first.shape == (2, 4) and first.rank is None
    assert (dense(second) == np.arange(24.0).reshape(6, 4)[2:]).all()
    assert first.frobenius() == pytest.approx(float(np.linalg.norm(np.arange(8.0))))
    assert join([first, second]) is whole
    for parts in ([first], [second, first], [first, 4], [first, lora(4, into=4)]):
        if len(parts) == 1:
            assert join(list(parts)) is first
        else:
            with pytest.raises(RefusedError):
                join(list(parts))


@given(st.permutations(list(range(7))))
def test_rearranged_rows(order: list[int]) -> None:
    whole = lora(7)
    assert (dense(reorder(whole, order)) == dense(whole)[order]).all()
    back = np.argsort(order)
    assert same_bits(take_rows(take_rows(whole.up, order), back), whole.up)


def test_swapped_halves_are_views() -> None:
    table = lora(8).up
    swapped = take_rows(table, [4, 5, 6, 7, 0, 1, 2, 3])
    assert (swapped.read() == np.roll(table.read(), 4, axis=0)).all() and not swapped.source.name.startswith("computed")


def test_neighbouring_views_are_one_view_again() -> None:
    table = lora(8).up
    assert stack([table.rows(0, 3), table.rows(3, 8)]).source is table.source
    assert stack([table.rows(3, 8), table.rows(0, 3)]).source is not table.source
    assert same_tensor(table, table.rows(0, 8)) and not same_tensor(table.rows(0, 4), table.rows(4, 8))
