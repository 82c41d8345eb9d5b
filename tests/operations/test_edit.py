"""edit: what was asked for is changed, everything else has its bits; readers load the result; a failure leaves the file as it was."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.operations.merging import adapter, lora, save
from tests.operations.test_combine import peft_folder

import upparam
from upparam.adapter import Adapter, Extra, ExtraKind, Target
from upparam.algorithms.base import ScaleRule, Scaling
from upparam.algorithms.dora import DoRA
from upparam.algorithms.full import Norm
from upparam.algorithms.loha import LoHa
from upparam.algorithms.lora import LoRA
from upparam.algorithms.slicing import cut, join
from upparam.cli import main
from upparam.containers import open_file
from upparam.dtypes import DTYPES
from upparam.errors import OutputExistsError, RefusedError, UsageError
from upparam.operations import edit as editing
from upparam.operations.edit import edit, metadata_of
from upparam.operations.edit.changes import Changes, changed
from upparam.operations.edit.moving import moved
from upparam.operations.opening import open_adapter
from upparam.operations.recast import recast
from upparam.progress import silent
from upparam.tensors import Tensor

STEM = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_"


def kohya_file(path: Path, dtype: Any = np.float16, **metadata: str) -> Path:
    rng = np.random.default_rng(0)
    tensors = {}
    for name in "qkv":
        tensors[f"{STEM}{name}.lora_up.weight"] = (rng.standard_normal((320, 4)) * 0.1).astype(dtype)
        tensors[f"{STEM}{name}.lora_down.weight"] = (rng.standard_normal((4, 320)) * 0.1).astype(dtype)
        tensors[f"{STEM}{name}.alpha"] = np.array(3.0, dtype)
    said = {"ss_network_dim": "4", "ss_network_alpha": "3.0", "sshs_model_hash": "x", "sshs_legacy_hash": "y", "ss_note": "unicode: ü"}
    return save(path, tensors, said | metadata)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def dense(delta: Any) -> np.ndarray:
    return delta.load().rows(0, delta.shape[0])


def test_metadata_and_nothing_else(tmp_path: Path) -> None:
    path = kohya_file(tmp_path / "a.safetensors")
    receipt = edit(path, tmp_path / "b.safetensors", metadata={"ss_output_name": "mine", "ss_note": None})
    before, after = open_file(path), open_file(tmp_path / "b.safetensors")
    assert {name: tensor.raw() for name, tensor in before.tensors.items()} == {name: tensor.raw() for name, tensor in after.tensors.items()}
    assert after.metadata["ss_output_name"] == "mine" and "ss_note" not in after.metadata
    assert after.metadata["ss_network_alpha"] == "3.0"
    assert receipt.counts["tensors_kept"] == 9 and "tensors_changed" not in receipt.counts
    assert any("sshs_model_hash" in proof for proof in receipt.proofs)
    facts = metadata_of(tmp_path / "b.safetensors")
    assert facts["metadata"] == dict(after.metadata) and facts["dialect"] == "kohya"


def test_kohya_hashes_are_those_of_the_new_tensors(tmp_path: Path) -> None:
    """sd-scripts' own rule: sha256 of everything behind the header of the file saved with the ss_ metadata alone."""
    import safetensors.torch
    import torch

    path = kohya_file(tmp_path / "a.safetensors")
    edit(path, tmp_path / "b.safetensors", dtype="bf16")
    found = safetensors.torch.load_file(tmp_path / "b.safetensors")
    assert found[f"{STEM}q.lora_up.weight"].dtype is torch.bfloat16
    metadata = open_file(tmp_path / "b.safetensors").metadata
    whole = safetensors.torch.save(found, {key: value for key, value in metadata.items() if key.startswith("ss_")})
    start = 8 + int.from_bytes(whole[:8], "little")
    assert metadata["sshs_model_hash"] == hashlib.sha256(whole[start:]).hexdigest()


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_a_new_dtype_rounds_once(tmp_path: Path, dtype: str) -> None:
    path = kohya_file(tmp_path / "a.safetensors", np.float32)
    receipt = edit(path, tmp_path / "b.safetensors", dtype=dtype)
    before, after = open_file(path).tensors, open_file(tmp_path / "b.safetensors").tensors
    kind = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16, "fp32": np.float32}[dtype]
    for name, tensor in before.items():
        if not name.endswith("alpha"):
            np.testing.assert_array_equal(after[name].read(), tensor.read().astype(kind))
    moved = float(receipt.counts["effect_moved"].split()[0])
    assert (moved == 0.0) if dtype == "fp32" else (0 < moved < {"fp16": 1e-3, "bf16": 8e-3}[dtype])
    assert all(delta.scale == 0.75 for delta in open_adapter(tmp_path / "b.safetensors").deltas.values())


def test_how_far_a_module_with_nan_moves_is_not_called_zero(tmp_path: Path) -> None:
    up = np.ones((320, 1), np.float32)
    up[0, 0] = np.nan
    path = save(tmp_path / "a.safetensors", {f"{STEM}q.lora_up.weight": up, f"{STEM}q.lora_down.weight": np.ones((1, 320), np.float32)})
    receipt = edit(path, tmp_path / "b.safetensors", dtype="bf16")
    assert receipt.counts["effect_moved"] == "not known for 1 of 1 modules"


def test_factors_that_vanish_in_the_new_dtype_are_said(tmp_path: Path) -> None:
    down = np.full((1, 320), 1e-3, np.float32)
    path = save(
        tmp_path / "a.safetensors", {f"{STEM}q.lora_up.weight": np.full((320, 1), 1e-9, np.float32), f"{STEM}q.lora_down.weight": down}
    )
    receipt = edit(path, tmp_path / "b.safetensors", dtype="fp16")
    (found,) = [finding for finding in receipt.findings if finding.code == "vanished"]
    assert found.evidence == ("up: 1 of its elements",) and receipt.counts["effect_moved"] == "1 or less"
    assert "vanished" not in {finding.code for finding in edit(path, tmp_path / "c.safetensors", dtype="bf16").findings}


def test_what_a_magnitude_moves_is_measured() -> None:
    rng = np.random.default_rng(0)
    factors = [Tensor.of(part) for part in (np.ones((20, 2), np.float32), np.ones((2, 16), np.float32))]
    magnitude = rng.uniform(1, 2, (20, 1)).astype(np.float32)
    whole = adapter({"m": DoRA(up=factors[0], down=factors[1], magnitude=Tensor.of(magnitude), scaling=Scaling(alpha=2.0))})
    result, before, _ = changed(whole, Changes(dtype="bf16"))
    text, _ = moved(before, result, None, silent)
    off = np.linalg.norm(magnitude - magnitude.astype(ml_dtypes.bfloat16).astype(np.float32)) / np.linalg.norm(magnitude)
    assert f"their magnitudes {off:.2g} or less" in text and off > 1e-4


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-30, 1e30), st.integers(1, 2**29 - 1))
def test_float64_to_bfloat16_is_one_rounding(value: float, beyond: int) -> None:
    """A cast through float32 would round twice: halfway cases with something small behind them go the wrong way."""
    low = np.float32(value).view(np.uint32) & np.uint32(0xFFFF0000)
    halfway = float((low | np.uint32(0x8000)).view(np.float32))
    exact = float((np.float64(halfway).view(np.uint64) | np.uint64(beyond)).view(np.float64))
    assert float(np.float32(exact)) == halfway or beyond >= 2**28
    found = recast(Tensor.of(np.array([exact])), DTYPES["bfloat16"]).read()[0]
    assert float(found) == float((low + np.uint32(0x10000)).view(np.float32))


def test_a_value_too_large_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    path = save(
        tmp_path / "a.safetensors",
        {f"{STEM}q.lora_up.weight": np.full((320, 1), 1e5, np.float32), f"{STEM}q.lora_down.weight": np.ones((1, 320), np.float32)},
    )
    held = digest(path)
    for target in ({"in_place": True}, {"out": tmp_path / "b.safetensors"}):
        with pytest.raises(RefusedError, match=r"q.lora_up.weight.*does not fit in float16"):
            edit(path, dtype="fp16", **target)  # type: ignore[arg-type]
    assert digest(path) == held and names(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize(
    ("changes", "scale"),
    [({"alpha": 8.0}, 2.0), ({"scale": 0.1}, 0.1), ({"alpha": 0.0}, 0.0), ({"scale": -1.0}, -1.0)],
)
def test_alpha_and_scale_change_the_effect_and_no_factor(tmp_path: Path, changes: dict[str, float], scale: float) -> None:
    path = kohya_file(tmp_path / "a.safetensors")
    receipt = edit(path, tmp_path / "b.safetensors", **changes)  # type: ignore[arg-type]
    found = open_adapter(tmp_path / "b.safetensors")
    assert all(delta.scale == pytest.approx(scale, rel=1e-7) for delta in found.deltas.values())
    assert receipt.counts["tensors_kept"] == 6 and receipt.counts["tensors_changed"] == 3
    assert found.metadata["ss_network_alpha"] == str(scale * 4)


@pytest.mark.parametrize("changes", [{"alpha": 8.0}, {"scale": 1.0}, {"scale": -0.3}, {"alpha": 0.1}])
@pytest.mark.parametrize("dtype", [None, "fp32"])
def test_the_effect_stays_where_that_is_asked_for(tmp_path: Path, changes: dict[str, float], dtype: str | None) -> None:
    path = kohya_file(tmp_path / "a.safetensors")
    edit(path, tmp_path / "b.safetensors", keep_scale=True, dtype=dtype, **changes)  # type: ignore[arg-type]
    before, after = open_adapter(path), open_adapter(tmp_path / "b.safetensors")
    for target, delta in before.deltas.items():
        new = after.deltas[target]
        assert new.alpha == pytest.approx(changes.get("alpha", 4 * changes.get("scale", 0)), rel=1e-7)
        gap = np.linalg.norm(dense(new) - dense(delta)) / np.linalg.norm(dense(delta))
        assert gap <= (2.0**-23 if dtype else 2.0**-11)
        assert new.factors()["down"].doubles().tolist() == delta.factors()["down"].doubles().tolist()


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(list(ScaleRule)), st.floats(0.01, 100), st.integers(1, 6), st.sampled_from([None, 5.0]), st.booleans())
def test_every_scale_rule_can_be_restated(rule: ScaleRule, number: float, rank: int, divisor: float | None, by_alpha: bool) -> None:
    if rule is ScaleRule.UNKNOWN:
        return
    rng = np.random.default_rng(rank)
    scaling = Scaling(
        rule, alpha=None if rule is ScaleRule.BAKED else number, multiplier=number if rule is ScaleRule.EXPLICIT else None, divisor=divisor
    )
    delta = LoRA(Tensor.of(rng.standard_normal((6, rank))), Tensor.of(rng.standard_normal((rank, 5))), scaling)
    wanted = {"alpha": 2.5} if by_alpha else {"scale": 0.4}
    plain = changed(adapter({"m": delta}), Changes(**wanted)).adapter.deltas[Target("m")]
    if not by_alpha:
        assert plain.scale == pytest.approx(0.4)
    kept = changed(adapter({"m": delta}), Changes(**wanted, keep_scale=True)).adapter.deltas[Target("m")]
    assert kept.scale == plain.scale
    np.testing.assert_allclose(dense(kept), dense(delta), rtol=1e-12)


def test_other_algorithms_can_be_restated_or_stay() -> None:
    rng = np.random.default_rng(0)
    parts = [Tensor.of(rng.standard_normal(shape)) for shape in ((6, 2), (2, 5), (6, 2), (2, 5))]
    loha = LoHa(*parts, scaling=Scaling(alpha=6.0))
    dora = DoRA(parts[0], parts[1], Tensor.of(np.abs(rng.standard_normal((6, 1)))), Scaling(alpha=6.0))
    norm = Norm(Tensor.of(rng.standard_normal(6)))
    found = changed(adapter({"a": loha, "b": dora, "c": norm}), Changes(scale=1.0, keep_scale=True))
    assert found.counts["restated"] == 2 and found.adapter.deltas[Target("c")] is norm
    weight = rng.standard_normal((6, 5))
    for name, delta in (("a", loha), ("b", dora)):
        new = found.adapter.deltas[Target(name)]
        assert new.scale == 1.0
        one, other = (each.load().merged(lambda start, stop: weight[start:stop], 0, 6) for each in (delta, new))
        np.testing.assert_allclose(one, other, rtol=1e-12)
    with pytest.raises(RefusedError, match="has a rank"):
        changed(adapter({"c": norm}), Changes(alpha=1.0))
    unknown = LoRA(parts[0], parts[1], Scaling(ScaleRule.UNKNOWN))
    assert changed(adapter({"m": unknown}), Changes(scale=0.5)).adapter.deltas[Target("m")].scale == 0.5
    with pytest.raises(RefusedError, match="never guessed"):
        changed(adapter({"m": unknown}), Changes(scale=0.5, keep_scale=True))


def test_parts_that_share_their_down_still_do() -> None:
    rng = np.random.default_rng(0)
    whole = lora(rng.standard_normal((12, 3)), rng.standard_normal((3, 8)), 2.0)
    parts = {Target("qkv", (at, at + 4)): cut(whole, at, at + 4) for at in (0, 4, 8)}
    found = changed(Adapter(parts, "test"), Changes(dtype="fp32", scale=1.0, keep_scale=True)).adapter
    joined = join(list(found.deltas.values()))
    assert joined.rank == 3
    np.testing.assert_allclose(dense(joined), dense(whole), rtol=1e-5, atol=1e-6)


def test_modules_out_and_renamed(tmp_path: Path) -> None:
    path = kohya_file(tmp_path / "a.safetensors")
    receipt = edit(path, tmp_path / "b.safetensors", remove=["*to_q"])
    assert (receipt.counts["removed"], receipt.counts["tensors_kept"], receipt.counts["tensors_gone"]) == (1, 6, 3)
    assert {target.module.rsplit(".", 1)[1] for target in open_adapter(tmp_path / "b.safetensors").deltas} == {"to_k", "to_v"}
    edit(path, tmp_path / "c.safetensors", keep=["*to_[qk]"], remove=["*to_k"])
    assert len(open_adapter(tmp_path / "c.safetensors").deltas) == 1
    receipt = edit(path, tmp_path / "d.safetensors", rename=[("*.attentions.0.*.attn1.*", "*.attentions.1.*.attn2.*")], remove=["*to_[kv]"])
    assert "renamed" in receipt.counts
    before, after = open_file(path).tensors, open_file(tmp_path / "d.safetensors").tensors
    new = STEM.replace("attentions_0", "attentions_1").replace("attn1", "attn2")
    for word in ("lora_up.weight", "lora_down.weight", "alpha"):
        assert after[f"{new}q.{word}"].raw() == before[f"{STEM}q.{word}"].raw()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"remove": ["nothing"]}, "no.* such name|such a name"),
        ({"keep": ["nothing"]}, "such a name"),
        ({"rename": [("nothing", "x")]}, "such a name"),
        ({"rename": [("m", "n")]}, "one name"),
        ({"rename": [("m", "*")]}, "more \\* than"),
        ({"rename": [("*", "x")]}, "one name"),
        ({"rename": [("m", "\udcff")]}, "UTF-8"),
        ({"metadata": {"key": "\udcff"}}, "UTF-8"),
        ({"metadata": {"\udcff": "value"}}, "UTF-8"),
        ({"metadata": {"absent": None}}, "no such key"),
        ({"dtype": "int8"}, "no dtype for factors"),
        ({"dtype": "float8_e8m0fnu"}, "no dtype for factors"),
        ({"alpha": 1.0, "scale": 1.0}, "give one"),
        ({"keep_scale": True}, "nothing changes the scale"),
        ({"alpha": float("nan")}, "finite"),
        ({"scale": 0.0, "keep_scale": True}, "of 0"),
    ],
)
def test_what_cannot_be_meant_is_said(changes: dict[str, Any], problem: str) -> None:
    one = adapter({"m": lora(np.ones((4, 1)), np.ones((1, 3))), "n": lora(np.ones((4, 1)), np.ones((1, 3)))})
    with pytest.raises(UsageError, match=problem):
        changed(one, Changes(**changes))


def test_removing_everything_is_refused() -> None:
    with pytest.raises(RefusedError, match="no module would be left"):
        changed(adapter({"m": lora(np.ones((4, 1)), np.ones((1, 3)))}), Changes(remove=["*"]))


def test_saved_tensors_are_removed_and_recast_too() -> None:
    extra = Extra(ExtraKind.SAVED_MODULE, "head.weight", Tensor.of(np.full(3, 0.1)))
    one = adapter({"m": lora(np.ones((4, 1)), np.ones((1, 3)))}, extras=[extra])
    assert not changed(one, Changes(remove=["head*"])).adapter.extras
    (new,) = changed(one, Changes(dtype="fp16")).adapter.extras
    assert new.tensor.dtype.name == "float16"


def test_in_place_replaces_the_file_at_once(tmp_path: Path) -> None:
    path = kohya_file(tmp_path / "a.safetensors")
    path.chmod(0o640)
    (tmp_path / "other").write_text("stays")
    edit(path, in_place=True, metadata={"ss_note": "new"})
    assert open_file(path).metadata["ss_note"] == "new" and path.stat().st_mode & 0o777 == 0o640
    assert names(tmp_path) == ["a.safetensors", "other"]


@pytest.mark.parametrize("hard", [False, True])
def test_in_place_of_a_file_with_two_names_says_which_one_stays(tmp_path: Path, hard: bool) -> None:
    """As in a download cache, whose files other models share."""
    path = kohya_file(tmp_path / "blob")
    held = digest(path)
    link = tmp_path / "a.safetensors"
    if hard:
        link.hardlink_to(path)
    else:
        link.symlink_to("blob")
    receipt = edit(link, in_place=True, metadata={"ss_note": "new"})
    assert [finding.code for finding in receipt.findings] == ["link-replaced"]
    assert digest(path) == held and not link.is_symlink() and open_file(link).metadata["ss_note"] == "new"
    assert not edit(link, in_place=True, metadata={"ss_note": "newer"}).findings


def test_a_star_of_the_old_name_that_the_new_one_lacks_is_left_out() -> None:
    one = adapter({"a.b.m": lora(np.ones((4, 1)), np.ones((1, 3))), "n": lora(np.ones((4, 1)), np.ones((1, 3)))})
    found = changed(one, Changes(rename=[("a.*.m", "c.m"), ("*", "*")])).adapter
    assert [target.module for target in found.deltas] == ["c.m", "n"]


def test_in_place_in_a_folder_leaves_the_neighbours(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "one", 1, 4, 8)
    (folder / "README.md").write_text("card")
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "optimizer.pt").write_bytes(b"x" * 100)
    (folder / "latest").symlink_to("checkpoint-1")
    before = {target: dense(delta) for target, delta in open_adapter(folder).deltas.items()}
    receipt = edit(folder, in_place=True, scale=1.0, keep_scale=True)
    assert len(receipt.outputs) == 2  # factors and config change together: the folder is replaced as one
    assert json.loads((folder / "adapter_config.json").read_text())["lora_alpha"] == 4
    assert (folder / "README.md").read_text() == "card" and (folder / "checkpoint-1" / "optimizer.pt").stat().st_size == 100
    assert (folder / "latest").readlink() == Path("checkpoint-1")
    for target, delta in open_adapter(folder).deltas.items():
        np.testing.assert_allclose(dense(delta), before[target], rtol=1e-6, atol=1e-7)
    held = digest(folder / "adapter_config.json")
    assert edit(folder, in_place=True, dtype="fp16").outputs == [str(folder / "adapter_model.safetensors")]
    assert digest(folder / "adapter_config.json") == held and names(tmp_path) == ["one"]
    with pytest.raises(RefusedError, match="change together"):
        edit(folder / "adapter_model.safetensors", in_place=True, scale=2.0, keep_scale=True)


def test_an_output_that_is_there_loses_nothing_else(tmp_path: Path) -> None:
    folder, out = peft_folder(tmp_path / "one", 1, 4, 8), peft_folder(tmp_path / "two", 2, 4, 8)
    with pytest.raises(OutputExistsError):
        edit(folder, out, dtype="fp16")
    (out / "README.md").write_text("card")
    with pytest.raises(OutputExistsError, match="no part of the output"):
        edit(folder, out, dtype="fp16", force=True)
    with pytest.raises(OutputExistsError, match="a folder stands"):
        edit(kohya_file(tmp_path / "a.safetensors"), out, dtype="bf16", force=True)
    assert names(out) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    (out / "README.md").unlink()
    edit(folder, out, dtype="fp16", force=True)
    assert open_adapter(out).dtypes() == {"float16": 4}


def test_a_failure_on_the_way_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = kohya_file(tmp_path / "a.safetensors")
    held = digest(path)

    def broken(*_: Any) -> None:
        raise RefusedError("stopped")

    monkeypatch.setattr(editing, "compare_files", broken)
    with pytest.raises(RefusedError, match="stopped"):
        edit(path, in_place=True, dtype="bf16")
    assert digest(path) == held and names(tmp_path) == ["a.safetensors"]


def test_metadata_a_dialect_does_not_hold_is_refused(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "one", 1, 4, 8)
    edit(folder, tmp_path / "two", metadata={"config.lora_dropout": "0.25", "config.base_model_name_or_path": "some/model", "note": "x"})
    config = json.loads((tmp_path / "two" / "adapter_config.json").read_text())
    assert (config["lora_dropout"], config["base_model_name_or_path"]) == (0.25, "some/model")
    with pytest.raises(RefusedError, match="follows from the tensors"):
        edit(folder, tmp_path / "three", metadata={"config.r": "7"})
    with pytest.raises(RefusedError, match="no config file"):
        edit(kohya_file(tmp_path / "k.safetensors"), tmp_path / "three", metadata={"config.r": "7"})
    assert names(tmp_path) == ["k.safetensors", "one", "two"]


def with_conv(path: Path) -> Path:
    """A LoCon: the rank and alpha that the metadata states are those of the linear modules."""
    rng = np.random.default_rng(1)
    conv = "lora_unet_down_blocks_0_resnets_0_conv1"
    tensors = {name: tensor.read() for name, tensor in open_file(kohya_file(path)).tensors.items()}
    tensors |= {
        f"{conv}.lora_up.weight": rng.standard_normal((320, 2, 1, 1)).astype(np.float16),
        f"{conv}.lora_down.weight": rng.standard_normal((2, 320, 3, 3)).astype(np.float16),
        f"{conv}.alpha": np.array(1.0, np.float16),
    }
    return save(path, tensors, {"ss_network_dim": "4", "ss_network_alpha": "3", "ss_network_args": '{"conv_dim": "2", "conv_alpha": "1"}'})


@pytest.mark.parametrize(
    ("changes", "dim", "alpha"),
    [
        ({"dtype": "fp32"}, "4", "3"),
        ({"remove": ["*to_q"]}, "4", "3"),
        ({"remove": ["*conv1"]}, "4", "3"),
        ({"remove": ["*attn1*"]}, "2", "1.0"),
        ({"alpha": 1.0}, "4", "1.0"),
        ({"scale": 1.0}, "4", "Dynamic"),
        ({"scale": 1.0, "keep_scale": True}, "4", "Dynamic"),
    ],
)
def test_what_a_locon_states_of_its_linear_modules_stays_while_it_is_so(
    tmp_path: Path, changes: dict[str, Any], dim: str, alpha: str
) -> None:
    edit(with_conv(tmp_path / "a.safetensors"), tmp_path / "b.safetensors", **changes)
    metadata = open_file(tmp_path / "b.safetensors").metadata
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == (dim, alpha)


@pytest.mark.parametrize("listed", [None, ["classifier", "score"]])
def test_the_words_for_saved_modules_stay_where_they_still_name_them(tmp_path: Path, listed: list[str] | None) -> None:
    """PEFT's own words: `pre_classifier` ends in one of them, and heads are saved for this task without being listed."""
    folder = peft_folder(tmp_path / "one", 1, 4, 8)
    path, where = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    head = "classifier" if listed is None else "pre_classifier"
    tensors = {name: tensor.read() for name, tensor in open_file(path).tensors.items()}
    save(path, tensors | {f"base_model.model.{head}.weight": np.ones((2, 3), np.float32)})
    config = json.loads(where.read_text()) | {"task_type": "SEQ_CLS", "modules_to_save": listed}
    where.write_text(json.dumps(config))
    edit(folder, tmp_path / "two", remove=["*layers.0*"])
    now = json.loads((tmp_path / "two" / "adapter_config.json").read_text())
    assert now["modules_to_save"] == listed
    assert {key for key in config if config[key] != now.get(key)} == {"target_modules"}


@pytest.mark.parametrize(
    "changes",
    [{"dtype": "bf16"}, {"scale": 1.0, "keep_scale": True}, {"alpha": 32.0}, {"remove": ["*layers.0*"]}, {"metadata": {"a": "b"}}],
)
def test_the_real_peft_loads_it(tmp_path: Path, changes: dict[str, Any]) -> None:
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from tests.operations.test_combine_methods import llama

    folder = peft_folder(tmp_path / "one", 1, 4, 8)
    edit(folder, tmp_path / "two", **changes)
    meant = open_adapter(tmp_path / "two")
    model = peft.PeftModel.from_pretrained(llama(), tmp_path / "two")
    layers = model.base_model.model.model.layers
    for number in range(2):
        target = Target(f"model.layers.{number}.self_attn.q_proj")
        module = layers[number].self_attn.q_proj
        assert (target in meant.deltas) is hasattr(module, "get_delta_weight")
        if target in meant.deltas:
            np.testing.assert_allclose(
                module.get_delta_weight("default").detach().float().numpy(), dense(meant.deltas[target]), rtol=1e-4, atol=1e-5
            )
    assert torch.isfinite(model(torch.arange(6)[None]).logits).all()


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = kohya_file(tmp_path / "a.safetensors"), tmp_path / "b.safetensors"
    assert main(["edit", str(path)]) == 0
    assert "ss_note = unicode: ü" in capsys.readouterr().out
    assert main(["edit", str(path), "--metadata", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metadata"]["ss_network_dim"] == "4"
    call = ["edit", str(path), "--set", "ss_output_name=a=b", "--unset", "ss_note", "--remove", "*to_v", "--bake", "--dtype", "fp32"]
    assert main([*call, "-o", str(out), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["counts"]["removed"] == 1 and facts["counts"]["restated"] == 2 and facts["counts"]["effect_moved"]
    assert open_file(out).metadata["ss_output_name"] == "a=b"
    assert all(delta.scale == 1.0 for delta in open_adapter(out).deltas.values())
    assert main(["edit", str(path), "-o", str(tmp_path / "c")]) == 2
    assert main(["edit", str(path), "--set", "nokey", "-o", str(tmp_path / "c")]) == 2
    assert main(["edit", str(path), "--metadata", "--alpha", "1", "-o", str(tmp_path / "c")]) == 2
    assert main([*call, "-o", str(out)]) == 2  # the output is there
    assert main([*call, "-o", str(out), "--force", "-q"]) == 0
    assert upparam.edit is edit
