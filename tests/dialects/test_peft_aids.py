"""VeLoRA and MonteCLoRA: PEFT saves what it trains with beside plain factors; it is carried, and said to change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from peft.tuners.lora.config import MontecloraConfig, VeloraConfig  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from upparam.algorithms.lowrank import RankRule  # noqa: E402
from upparam.errors import RefusedError  # noqa: E402
from upparam.operations.convert import convert  # noqa: E402
from upparam.operations.merge import merge  # noqa: E402
from upparam.operations.resize import resize  # noqa: E402
from upparam.operations.verify import verify  # noqa: E402

TOKENS = torch.arange(1, 9)[None]


def model(path: Path) -> Any:
    return transformers.LlamaForCausalLM.from_pretrained(path)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def logits(network: Any) -> Any:
    with torch.no_grad():
        return network.eval()(TOKENS).logits


@pytest.mark.parametrize(
    "more",
    [
        {"velora_config": VeloraConfig(num_groups=4, init_type="random")},
        {"monteclora_config": MontecloraConfig(num_samples=3, buffer_size=2)},
    ],
    ids=["velora", "monteclora"],
)
def test_what_training_uses_is_carried_and_changes_nothing(more: dict[str, Any], base: Path, tmp_path: Path) -> None:
    tuned = peft.get_peft_model(model(base), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], **more))
    for name, value in tuned.named_parameters():
        if "lora_B" in name:
            value.data = torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1
    expected = logits(tuned)
    assert (expected - logits(model(base))).abs().max() > 1e-3
    tuned.save_pretrained(tmp_path / "a")
    verdict = verify(tmp_path / "a")
    assert verdict.sound and "training-aids" in [finding.code for finding in verdict.findings]

    convert(tmp_path / "a", tmp_path / "b", "peft")
    ours, theirs = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in "ba")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(model(base), tmp_path / "b")), expected)

    receipt = merge(base, tmp_path / "a", tmp_path / "merged")
    (said,) = [finding for finding in receipt.findings if finding.code == "training-aids"]
    assert said.message.endswith("that only training uses: the merge does not depend on them")
    assert torch.allclose(logits(model(tmp_path / "merged")), expected, atol=1e-5)

    if "monteclora_config" in more:
        with pytest.raises(RefusedError, match="made for rank 4, where the factors have 2"):
            resize(tmp_path / "a", tmp_path / "c", RankRule(2))
    resize(tmp_path / "a", tmp_path / "c", RankRule(2), drop=["training-aid"])
    peft.PeftModel.from_pretrained(model(base), tmp_path / "c")
