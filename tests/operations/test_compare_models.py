"""compare on models: what a merge, a cast, rounding and training leave behind, told apart; numbers against numpy in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.operations.merging import NUMPY, load, save
from tests.operations.test_combine import peft_folder
from tests.operations.test_extract import WEIGHTS, base_file, trained

from upparam.cli import main
from upparam.errors import MismatchError, UsageError
from upparam.operations.compare import compare
from upparam.operations.compare.models import ModelComparison
from upparam.operations.compare.verdict import Verdict
from upparam.operations.merge import merge


def models(one: Path, other: Path) -> ModelComparison:
    found = compare(one, other)
    assert isinstance(found, ModelComparison)
    return found


def test_the_same_model_and_the_same_after_a_cast(tmp_path: Path) -> None:
    base = base_file(tmp_path / "base.safetensors")
    assert models(base, base_file(tmp_path / "again.safetensors")).verdict is Verdict.BITS
    for dtype in ("float16", "bfloat16"):
        narrow = save(tmp_path / f"{dtype}.safetensors", {name: array.astype(NUMPY[dtype]) for name, array in load(base).items()})
        for one, other in ((base, narrow), (narrow, base)):
            found = models(one, other)
            assert found.verdict is Verdict.EQUAL and found.counts() == {"rounded": len(found.weights)} and found.exit_code == 0


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("rank", [4, 16, 64])
def test_a_merged_adapter_leaves_its_rank(tmp_path: Path, dtype: str, rank: int) -> None:
    base = base_file(tmp_path / "base.safetensors", dtype)
    names = list(WEIGHTS)[:3]
    merge(base, trained(rank, names), tmp_path / "merged.safetensors")
    found = models(tmp_path / "merged.safetensors", base)
    assert found.verdict is Verdict.LOW_RANK and f"rank {rank} above" in found.summary
    before, after = load(base), load(tmp_path / "merged.safetensors")
    by_name = {weight.name.removesuffix(".weight"): weight for weight in found.weights}
    for name in names:
        weight = by_name[name]
        one, other = (arrays[f"{name}.weight"].astype(np.float64) for arrays in (after, before))
        assert weight.rank == rank
        assert weight.changed == int((after[f"{name}.weight"] != before[f"{name}.weight"]).sum())
        assert weight.norm == pytest.approx(np.linalg.norm(one - other), rel=1e-5)
        assert weight.relative == pytest.approx(np.linalg.norm(one - other) / np.linalg.norm(other), rel=1e-5)
        sigma = np.linalg.svd(one - other, compute_uv=False)
        assert weight.largest == pytest.approx(sigma[0], rel=1e-3)
        assert weight.floor is not None and sigma[rank - 1] > weight.floor > (sigma[rank] if dtype != "float32" else 0.0)
    assert by_name["layers.1.down_proj"].alike.value == "bit-equal"


def test_another_rounding_is_not_training(tmp_path: Path) -> None:
    """Two copies rounded from values a fraction of a unit apart: thousands of elements differ, by nothing that rounding does not explain."""
    exact = {name: array.astype(np.float64) for name, array in load(base_file(tmp_path / "x.safetensors")).items()}
    rng = np.random.default_rng(0)
    nearest, other = {}, {}
    for name, array in exact.items():
        nearest[name] = array.astype(np.float16)
        other[name] = (array + 0.06 * np.spacing(np.abs(nearest[name])).astype(np.float64) * rng.standard_normal(array.shape)).astype(
            np.float16
        )
    found = models(save(tmp_path / "other.safetensors", other), save(tmp_path / "nearest.safetensors", nearest))
    assert found.verdict is Verdict.NOISE, found.summary
    assert all((weight.changed or 0) > 1000 for weight in found.weights if len(weight.shape) > 1)


def test_full_training_is_no_low_rank(tmp_path: Path) -> None:
    base = base_file(tmp_path / "base.safetensors")
    rng = np.random.default_rng(1)
    moved = {name: array + (1e-3 * rng.standard_normal(array.shape)).astype(np.float32) for name, array in load(base).items()}
    found = models(save(tmp_path / "tuned.safetensors", moved), base)
    assert found.verdict is Verdict.CHANGED and found.exit_code == 1
    matrices = [weight for weight in found.weights if len(weight.shape) > 1]
    assert len(matrices) == 4 and all(weight.rank is None or weight.rank > 200 for weight in matrices)
    assert found.relative == pytest.approx(
        np.sqrt(sum(float(((moved[n] - a) ** 2).sum()) for n, a in load(base).items()))
        / np.sqrt(sum(float((a.astype(np.float64) ** 2).sum()) for a in load(base).values())), rel=1e-3,
    )  # fmt: skip


def test_other_shapes_and_names_are_said(tmp_path: Path) -> None:
    base = base_file(tmp_path / "base.safetensors")
    arrays = load(base)
    grown = arrays | {"layers.0.q_proj.weight": np.zeros((300, 256), np.float32), "new.weight": np.ones((3, 3), np.float32)}
    found = models(save(tmp_path / "grown.safetensors", grown), base)
    assert found.verdict is Verdict.UNDECIDED
    assert "1 cannot be subtracted" in found.summary and "1 tensor only in the first" in found.summary
    with pytest.raises(MismatchError):
        compare(save(tmp_path / "other.safetensors", {"a.weight": np.ones((2, 2), np.float32)}), base)


def test_numbers_that_are_not_finite_stay_where_they_are(tmp_path: Path) -> None:
    base = base_file(tmp_path / "base.safetensors")
    arrays = load(base)
    arrays["layers.0.q_proj.weight"][3, 3] = np.inf
    found = models(save(tmp_path / "broken.safetensors", arrays), base)
    assert found.verdict is Verdict.UNDECIDED
    assert any("finite" in weight.reason for weight in found.weights)


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "one", 1, 4, 8)
    with pytest.raises(UsageError, match="adapter and a model"):
        compare(folder, base_file(tmp_path / "base.safetensors"))


def test_memory_is_bounded_by_a_weight_and_threads_do_not_matter(tmp_path: Path) -> None:
    base = base_file(tmp_path / "base.safetensors", "bfloat16")
    merge(base, trained(8), tmp_path / "merged.safetensors")
    one, two = (compare(tmp_path / "merged.safetensors", base, threads=threads).facts() for threads in (1, 3))
    assert one == two


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = base_file(tmp_path / "base.safetensors", "bfloat16")
    merge(base, trained(8), tmp_path / "merged.safetensors")
    call = ["compare", str(tmp_path / "merged.safetensors"), str(base)]
    assert main([*call, "--json"]) == 1
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert facts["kind"] == "models" and facts["verdict"] == "low-rank-change"
    assert main([*call, "--accept", "low-rank-change"]) == 0
    assert "rank 8 above the rounding noise" in capsys.readouterr().out
