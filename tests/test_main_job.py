"""The main job, end to end, as `make demo` shows it: a mystery folder becomes an adapter the real PEFT loads, and a merged model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from upparam.cli import main

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

DEMO = Path(__file__).parents[1] / "demo"
TOKENS = [[0, 1, 2, 3, 4, 52], [30, 7, 9, 44, 12, 52]]


def logits(model: Any) -> Any:
    model.eval()
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("job")
    assert main(["assemble", str(DEMO / "mystery"), "--to", "peft", "-o", str(out / "adapter"), "-q"]) == 0
    assert main(["verify", str(out / "adapter"), "--base", str(DEMO / "base"), "--json"]) == 0
    assert main(["merge", str(DEMO / "base"), str(out / "adapter"), "-o", str(out / "merged"), "-q"]) == 0
    return out


def test_the_mystery_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["identify", str(DEMO / "mystery"), "--json"]) == 0
    ((report,),) = [identity["adapters"] for identity in json.loads(capsys.readouterr().out)]
    assert (report["kind"], report["dialect"], report["ranks"], report["scales"]) == (
        "adapter", "triad", [{"rank": 4, "count": 14}], [{"scale": 2.0, "count": 14}],
    )  # fmt: skip


def test_the_real_library_loads_it_strictly_and_computes_what_the_factors_say(folder: Path) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(DEMO / "base", dtype=torch.float32)
    wrapped = peft.get_peft_model(base, peft.PeftConfig.from_pretrained(folder / "adapter"))
    result = peft.set_peft_model_state_dict(wrapped, peft.load_peft_weights(str(folder / "adapter"), device="cpu"))
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora_" in key]
    by_hand = transformers.AutoModelForCausalLM.from_pretrained(DEMO / "base", dtype=torch.float32)
    up, down = (torch.load(DEMO / "mystery" / f"{role}-param.bin", weights_only=True) for role in ("up", "down"))
    with torch.no_grad():
        for name, factor in up.items():
            by_hand.get_submodule(name).weight += 2.0 * factor @ down[name]
    assert torch.allclose(logits(wrapped), logits(by_hand), atol=1e-4)
    assert not torch.allclose(
        logits(wrapped), logits(transformers.AutoModelForCausalLM.from_pretrained(DEMO / "base", dtype=torch.float32)), atol=1e-1
    )


def test_the_merged_model_is_each_weight_rounded_once(folder: Path) -> None:
    from safetensors.torch import load_file

    before, after = load_file(DEMO / "base/model.safetensors"), load_file(folder / "merged/model.safetensors")
    up, down = (torch.load(DEMO / "mystery" / f"{role}-param.bin", weights_only=True) for role in ("up", "down"))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        module = name.removesuffix(".weight")
        if module in up:
            exact = weight.double() + 2.0 * up[module].double() @ down[module].double()
            gap = (after[name].double() - exact).abs()
            for way in (float("inf"), float("-inf")):
                neighbour = torch.nextafter(after[name], torch.tensor(way, dtype=torch.bfloat16)).double()
                assert (gap <= (neighbour - exact).abs()).all(), name
        else:
            assert torch.equal(weight, after[name]), name


def test_the_merged_model_does_what_the_adapter_was_trained_for(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(DEMO / "check.py"), str(DEMO / "base"), str(folder / "merged")], capture_output=True, text=True, check=True
    )
    base, merged = done.stdout.splitlines()
    assert "it repeats 200" in base
    assert "shouts 200" in merged


def test_python_does_the_same(tmp_path: Path) -> None:
    import upparam

    adapter = upparam.open(DEMO / "mystery")
    adapter.save(tmp_path / "adapter", dialect="peft")
    receipt = upparam.merge(DEMO / "base", [(tmp_path / "adapter", 1.0)], tmp_path / "merged")
    assert receipt.counts["tensors_changed"] == 14
    assert [report.kind for report in upparam.identify(tmp_path / "adapter").adapters] == ["adapter"]
