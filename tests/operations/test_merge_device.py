"""`--device`: the route through torch gives the bytes of every other route; without torch or a GPU it says so.

The route runs on torch's own processor device everywhere, and on a GPU where there is one.
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from tests.operations.merging import NUMPY, TileCase, adapter, load, lora, round_once, save, tile_cases

from upparam.adapter import Target
from upparam.algorithms.base import Scaling
from upparam.algorithms.dora import DoRA
from upparam.algorithms.loha import LoHa
from upparam.algorithms.lora import LoRA
from upparam.cli import main
from upparam.dtypes import DTYPES
from upparam.errors import UnreadableError, UsageError
from upparam.operations.merge import merge, on_device
from upparam.operations.merge.factors import LowRank
from upparam.operations.merge.journal import undo
from upparam.operations.merge.kernel import ON_DEVICE, Scratch, add_low_rank, routes
from upparam.operations.merge.rounding import narrow
from upparam.operations.unmerge import unmerge
from upparam.tensors import Tensor

torch = pytest.importorskip("torch")
CUDA = pytest.param(
    "cuda",
    marks=pytest.mark.skipif(
        not torch.cuda.is_available(), reason="no CUDA device here, so the route is tried on torch's processor device only"
    ),
)
DEVICES = pytest.mark.parametrize("device", ["cpu", CUDA])


def lane(device: str, widest: int = 1) -> Any:
    return on_device.OnDevice(torch.device(device)).lane(widest)


@DEVICES
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_float64_is_rounded_once(device: str, dtype: str) -> None:
    """Every midpoint between neighbours, and points a hair to either side that float32 cannot tell apart."""
    kind = NUMPY[dtype]
    rng = np.random.default_rng(1)
    codes = np.arange(65536, dtype=np.uint16) if dtype != "float32" else rng.integers(0, 2**32, 65536).astype(np.uint32)
    with np.errstate(invalid="ignore"):
        exact = codes.view(kind).astype(np.float64)
    exact = np.sort(np.unique(exact[np.isfinite(exact)]))
    middle = (exact[1:] + exact[:-1]) / 2
    values = np.concatenate(
        [exact, middle, middle * (1 + 2.0**-45), middle * (1 - 2.0**-45), [1e300, -1e300, np.inf, -np.inf, 1e-320, -1e-320]]
    )
    got = lane(device)._narrow(torch.from_numpy(values).to(device), DTYPES[dtype]).cpu().numpy()
    assert np.array_equal(got.view(kind).view(got.dtype), narrow(values, DTYPES[dtype]).view(got.dtype))
    if dtype != "float32":  # why there is a rule for it at all
        cast = torch.from_numpy(values).to(device).to(getattr(torch, dtype)).view(torch.int16).cpu().numpy()
        assert (cast != got).any()


@DEVICES
@settings(max_examples=150, deadline=None)
@given(case=tile_cases(ON_DEVICE))
def test_tiles_equal_every_other_route(device: str, case: TileCase) -> None:
    dtype, weight, up, down, start = case
    results = {}
    for name, scratch in {
        "device": Scratch(1, lane=lane(device)),
        **{name: Scratch(weight.size, route) for name, route in routes().items()},
    }.items():
        tile = weight.copy()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            counts = add_low_rank(tile, DTYPES[dtype], LowRank(up, down), start, scratch)
        results[name] = (tile.tobytes(), counts)
    assert len(set(results.values())) == 1, {name: counts for name, (_, counts) in results.items()}


@DEVICES
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_ties_and_cancellations(device: str, dtype: str) -> None:
    """Sums exactly between two neighbours, a hair beside, exactly zero, zero but for the order, and too large: as the exact sum has it."""
    step = {"bfloat16": 2.0**-7, "float16": 2.0**-10, "float32": 2.0**-23}[dtype]
    weight = np.array([[1.0, 1.0 + step, 1.0, 1.0, -3.0, 0.0, -0.0, 1.0]], NUMPY[dtype])
    down = np.array([[step / 2, step / 2, step / 2 + 2.0**-45, step / 2 - 2.0**-45, 3.0, 0.0, 0.0, 1e39]])
    tile = weight.copy()
    counts = add_low_rank(tile, DTYPES[dtype], LowRank(np.ones((1, 1)), down), 0, Scratch(1, lane=lane(device)))
    assert tile[0, :7].astype(np.float64).tolist() == [1.0, 1.0 + 2 * step, 1.0 + step, 1.0, 0.0, 0.0, 0.0]
    assert not np.signbit(tile[0, 4:7].astype(np.float64)).any() and np.isinf(tile[0, 7].astype(np.float64))
    assert counts == (5, 1)
    thirds = LowRank(np.array([[1.0, 1.0, -1.0]]), np.array([[1 / 3], [2 / 3], [1.0]]))
    found = {}
    for name, scratch in {"device": Scratch(1, lane=lane(device)), **{name: Scratch(1, route) for name, route in routes().items()}}.items():
        tile = np.zeros((1, 1), NUMPY[dtype])
        add_low_rank(tile, DTYPES[dtype], thirds, 0, scratch)
        found[name] = tile.tobytes()
    assert len(set(found.values())) == 1, found


@DEVICES
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("rank", [1, 16, 128, 320])
def test_whole_merges_have_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, dtype: str, rank: int) -> None:
    """LoRA of a matrix, of rows of one, of a convolution; DoRA, LoHa; tiles that end in the middle of what a delta changes."""
    monkeypatch.setattr(on_device, "TILE_ELEMENTS", 3000)
    rng = np.random.default_rng(rank)

    def normal(*shape: int) -> Any:
        return (rng.standard_normal(shape) * 0.1).astype(np.float32)

    weights = {name: (rng.standard_normal((330, 340)) * 0.05).astype(NUMPY[dtype]) for name in ("m", "fused", "dora", "loha", "still")}
    weights["m"][3, :7] = [np.inf, -np.inf, np.nan, 0.0, -0.0, 1e-7, -1e-40]
    weights["conv"] = (rng.standard_normal((64, 40, 3, 3)) * 0.05).astype(NUMPY[dtype])
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    base = save(tmp_path / "base.safetensors", {f"{name}.weight": weight for name, weight in weights.items()})
    few = min(rank, 64)
    item = adapter(
        {
            "m": lora(normal(330, rank), normal(rank, 340), alpha=rank / 3),
            Target("fused", (110, 220)): lora(normal(110, rank), normal(rank, 340)),
            "conv": LoRA(Tensor.of(normal(64, few, 1, 1)), Tensor.of(normal(few, 40, 3, 3)), Scaling(alpha=1.0)),
            "dora": DoRA(Tensor.of(normal(330, few)), Tensor.of(normal(few, 340)), Tensor.of(np.abs(normal(330, 1)) + 1), Scaling()),
            "loha": LoHa(*(Tensor.of(normal(*shape)) for shape in ((330, few), (few, 340), (330, few), (few, 340))), scaling=Scaling()),
        }
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merge(base, (item, 0.7), tmp_path / "here.safetensors")
        receipt = merge(base, (item, 0.7), tmp_path / "there.safetensors", device=torch.device(device))
    here, there = load(tmp_path / "here.safetensors"), load(tmp_path / "there.safetensors")
    assert all(here[name].tobytes() == there[name].tobytes() for name in here) and here.keys() == there.keys()
    (said,) = [finding.message for finding in receipt.findings if finding.code == "device"]
    # the rows that the fused delta leaves alone are not computed at all; a LoHa of small ranks is a sum of low rank too
    assert (
        f"{330 * 340 + 110 * 340 + 64 * 360 + (330 * 340 if few == 1 else few == 16 and 330 * 340):,} of {4 * 330 * 340 + 64 * 360:,}"
        in said
    )
    assert "0 wrongly rounded" in receipt.proofs[0]


@DEVICES
def test_a_million_elements_none_wrong(tmp_path: Path, device: str) -> None:
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((1000, 1037)) * 0.05).astype(NUMPY["bfloat16"])
    up, down = (rng.standard_normal((1000, 128)) * 0.05).astype(np.float32), rng.standard_normal((128, 1037)).astype(np.float32)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    base = save(tmp_path / "base.safetensors", {"m.weight": weight})
    merge(base, adapter({"m": lora(up, down, alpha=64.0)}), tmp_path / "out.safetensors", device=torch.device(device))
    true = weight.astype(np.float64) + 0.5 * (up.astype(np.float64) @ down.astype(np.float64))
    assert load(tmp_path / "out.safetensors")["m.weight"].tobytes() == round_once(true, "bfloat16").tobytes()


@DEVICES
@pytest.mark.parametrize("to", [None, "fp16", "fp32"])
def test_what_is_not_computed_there_is_computed_here(tmp_path: Path, device: str, to: str | None) -> None:
    """fp8 weights, and weights that get another dtype, beside those that go to the device."""
    rng = np.random.default_rng(5)
    kinds = {"a": "float8_e4m3fn", "b": "float8_e5m2", "c": "bfloat16"}
    arrays = {f"{name}.weight": (rng.standard_normal((70, 90)) * 0.05).astype(NUMPY[kind]) for name, kind in kinds.items()}
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    base = save(tmp_path / "base.safetensors", arrays)
    item = adapter({name: lora(rng.standard_normal((70, 4)) * 0.05, rng.standard_normal((4, 90))) for name in kinds})
    merge(base, item, tmp_path / "here.safetensors", dtype=to)
    receipt = merge(base, item, tmp_path / "there.safetensors", dtype=to, device=torch.device(device))
    assert (tmp_path / "here.safetensors").read_bytes() == (tmp_path / "there.safetensors").read_bytes()
    (said,) = [finding.message for finding in receipt.findings if finding.code == "device"]
    assert f"{70 * 90 if to is None else 0:,} of {3 * 70 * 90:,}" in said


@DEVICES
def test_in_place_undo_and_unmerge(tmp_path: Path, device: str) -> None:
    rng = np.random.default_rng(2)
    arrays = {f"{name}.weight": (rng.standard_normal((48, 40)) * 0.05).astype(NUMPY["float16"]) for name in "abcd"}
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    base = save(tmp_path / "base.safetensors", arrays)
    item = adapter({"a": lora(rng.standard_normal((48, 4)) * 0.1, rng.standard_normal((4, 40)))})
    old = base.read_bytes()
    merge(base, item, tmp_path / "out.safetensors")
    merge(base, item, in_place=True, device=torch.device(device))
    assert all(
        one.tobytes() == other.tobytes()
        for one, other in zip(load(base).values(), load(tmp_path / "out.safetensors").values(), strict=True)
    )
    unmerge(base, item, tmp_path / "back.safetensors", device=torch.device(device))
    assert np.abs(load(tmp_path / "back.safetensors")["a.weight"].astype(float) - arrays["a.weight"].astype(float)).max() < 1e-3
    undo(base)
    assert base.read_bytes() == old


@pytest.mark.parametrize("place", ["_upload", "lane"])
@pytest.mark.parametrize(
    ("problem", "said"),
    [
        (
            torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB\nmore"),
            r"not enough free memory.*2\.00 MiB\).*--threads",
        ),
        (RuntimeError("CUDA error: out of memory"), "not enough free memory"),
        (
            RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with ..."),
            r"cpu failed.*illegal memory.*--device cpu",
        ),
    ],
)
def test_a_device_that_fails_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, problem: Exception, said: str
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    base = save(tmp_path / "base.safetensors", {"a.weight": np.ones((8, 8), np.float16)})
    before = base.read_bytes()

    def fails(*_: Any) -> Any:
        raise problem

    monkeypatch.setattr(*((on_device.OnDevice, "_upload") if place == "_upload" else (on_device, "_Lane")), fails)
    for where in ({"out": tmp_path / "out.safetensors"}, {"in_place": True}):
        with pytest.raises(UnreadableError, match=said):
            merge(base, adapter({"a": lora(np.ones((8, 1)), np.ones((1, 8)))}), device=torch.device("cpu"), **where)  # type: ignore[arg-type]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.safetensors", "config.json"] and base.read_bytes() == before


@pytest.mark.parametrize("name", ["gpu", "mps", "cuda:", "cuda:x", "cuda:-1", "", "cuda:0:1"])
def test_other_devices_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="no such device"):
        on_device.open_device(name)


def test_without_a_gpu_it_says_so_before_anything_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["merge", str(tmp_path / "no"), str(tmp_path / "no"), "-o", str(tmp_path / "out")]
    assert main([*call, "--device", "gpu"]) == 2 and "expected cpu, cuda or cuda:N" in capsys.readouterr().err
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert main([*call, "--device", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert main([*call, "--device", "cuda:0", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"] == "UsageError"
    assert not list(tmp_path.iterdir())


def test_without_torch_it_says_so(tmp_path: Path) -> None:
    code = "import sys; sys.modules['torch'] = None\nfrom upparam.cli import main\nsys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "merge", "a", "b", "-o", str(tmp_path / "o"), "--device", "cuda"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "torch is needed" in done.stderr and "upparam[torch]" in done.stderr
    assert "Traceback" not in done.stderr


def test_torch_is_imported_only_when_a_device_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    base = save(tmp_path / "base.safetensors", {"a.weight": np.ones((8, 8), np.float16)})
    stem = "base_model.model.a"
    folder = tmp_path / "adapter"
    save(
        folder / "adapter_model.safetensors",
        {f"{stem}.lora_A.weight": np.ones((1, 8), np.float32), f"{stem}.lora_B.weight": np.ones((8, 1), np.float32)},
    )
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["a"]}))
    code = "import sys\nfrom upparam.cli import main\nassert main(sys.argv[1:]) == 0\nassert 'torch' not in sys.modules"
    subprocess.run(
        [sys.executable, "-c", code, "merge", str(base), str(folder), "-o", str(tmp_path / "o.safetensors"), "--device", "cpu"], check=True
    )
