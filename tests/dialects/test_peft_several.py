"""Several adapters, and several names for one tensor, in one file: none is chosen in silence, one can be named, and nothing is lost."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402
from tests.dialects.test_peft import TOKENS, llama, loaded_strictly, output, repeatable, save  # noqa: E402

from upparam.cli import main  # noqa: E402
from upparam.dialects.base import ReadOptions  # noqa: E402
from upparam.errors import AmbiguousError, MalformedError, SeveralAdaptersError, UsageError  # noqa: E402
from upparam.operations.convert import convert  # noqa: E402
from upparam.operations.opening import open_adapter  # noqa: E402

Q = "base_model.model.model.layers.0.self_attn.q_proj"
FACTORS = {f"{Q}.lora_A.weight": torch.ones(4, 32), f"{Q}.lora_B.weight": torch.ones(32, 4)}
HEAD = "base_model.model.lm_head.weight"


def several(folder: Path) -> tuple[Any, Any]:
    """What a training run with two adapters leaves: one state dict, and where PEFT saves each, configs. How to make the base, and the model."""
    again = repeatable(llama)
    model = peft.get_peft_model(
        again(),
        peft.LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules=["q_proj", "v_proj"],
            use_dora=True,
            modules_to_save=["lm_head"],
            trainable_token_indices={"embed_tokens": [2]},
        ),
    )
    model.add_adapter(
        "other", peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"], trainable_token_indices={"embed_tokens": [1, 5]})
    )  # fmt: skip
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(word in name for word in ("lora_", "modules_to_save", "trainable_tokens_delta")):
                parameter.copy_(torch.rand(parameter.shape) * 0.3 + 0.1)
    model.save_pretrained(folder / "saved")
    run = folder / "run"
    (run / "other").mkdir(parents=True)
    for part in ("", "other"):
        (run / part / "adapter_config.json").write_text((folder / "saved" / part / "adapter_config.json").read_text())
    torch.save(model.state_dict(), run / "pytorch_model.bin")
    return again, model


def test_each_can_be_chosen_with_its_own_config(tmp_path: Path) -> None:
    again, model = several(tmp_path)
    for name, part in (("default", ""), ("other", "other")):
        convert(tmp_path / "run", tmp_path / name, "peft", read=ReadOptions(adapter=name))
        theirs, ours = (load_file(where / "adapter_model.safetensors") for where in (tmp_path / "saved" / part, tmp_path / name))
        assert theirs.keys() == ours.keys() and all(torch.equal(theirs[key], ours[key]) for key in theirs)
        configs = [json.loads((where / "adapter_config.json").read_text()) for where in (tmp_path / "saved" / part, tmp_path / name)]
        assert configs[0] == configs[1]
        model.set_adapter(name)
        assert torch.equal(output(loaded_strictly(again(), tmp_path / name), TOKENS), output(model, TOKENS))


def test_one_whose_config_is_not_there_has_no_scale(tmp_path: Path) -> None:
    """The config beside the file is that of `default`."""
    several(tmp_path)
    (tmp_path / "run/other/adapter_config.json").unlink()
    adapter = open_adapter(tmp_path / "run", options=ReadOptions(adapter="other"))
    assert {delta.scale for delta in adapter.deltas.values()} == {None}
    assert "config-missing" in {finding.code for finding in adapter.findings}
    assert {delta.scale for delta in open_adapter(tmp_path / "run", options=ReadOptions(adapter="default")).deltas.values()} == {1.5}


def test_they_are_listed_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    several(tmp_path)
    run = str(tmp_path / "run")
    assert main(["inspect", run, "--json"]) == 0
    found = {one["name"]: one for one in json.loads(capsys.readouterr().out)["adapters"]}
    assert {name: (one["targets"], one["ranks"][0]["rank"], one["algorithms"], one["scales"]) for name, one in found.items()} == {
        "default": (4, 4, {"dora": 4}, [1.5]), "other": (4, 2, {"lora": 4}, [3.0]),
    }  # fmt: skip
    assert main(["inspect", run]) == 0
    assert re.search(
        r"2 adapters in one file; --adapter NAME shows one\n  default: dora, rank 4.*\n  other: lora, rank 2", capsys.readouterr().out
    )
    assert main(["inspect", run, "--adapter", "other"]) == 0
    assert "the file also holds the adapter default" in capsys.readouterr().out
    assert main(["verify", run]) == 2 and "default, other" in capsys.readouterr().err
    assert main(["verify", run, "--adapter", "default"]) == 0


def test_a_name_that_is_not_there_is_refused(tmp_path: Path) -> None:
    several(tmp_path)
    with pytest.raises(UsageError, match="expected third, found default, other"):
        open_adapter(tmp_path / "run", options=ReadOptions(adapter="third"))
    folder = save(tmp_path / "one", FACTORS, {})
    with pytest.raises(UsageError, match=r"found one adapter without a name.*leave --adapter away"):
        open_adapter(folder, options=ReadOptions(adapter="default"))
    named = {name.replace(".weight", ".own.weight"): tensor.clone() for name, tensor in FACTORS.items()}
    folder = save(tmp_path / "named", named, {})
    assert open_adapter(folder, options=ReadOptions(adapter="own")).deltas
    with pytest.raises(UsageError, match="name it with --adapter own"):
        open_adapter(folder, options=ReadOptions(adapter="other"))


def test_factors_without_a_name_beside_named_ones_are_not_lost(tmp_path: Path) -> None:
    named = {name.replace(".weight", f".{which}.weight"): tensor.clone() for name, tensor in FACTORS.items() for which in ("one", "two")}
    with pytest.raises(SeveralAdaptersError):
        open_adapter(save(tmp_path / "a", named | FACTORS, {}))
    with pytest.raises(AmbiguousError, match="two names mean the same tensor"):
        open_adapter(tmp_path / "a", options=ReadOptions(adapter="one"))


FIRST = f"{Q}.lora_A.weight"
TWICE = {
    "of blocks": (FIRST, FIRST.replace("layers.0.", "layers.0._fsdp_wrapped_module.")),
    "of checkpoints": (FIRST, FIRST.replace("self_attn.", "self_attn._checkpoint_wrapped_module.")),
    "of DDP": (FIRST, f"module.{FIRST}"),
    "of torch.compile": (FIRST, f"_orig_mod.{FIRST}"),
    "of PEFT": (FIRST, FIRST.removeprefix("base_model.model.")),
    "an adapter's name": (FIRST, FIRST.replace(".weight", ".default.weight")),
    "a bias of up": (f"{Q}.lora_B.bias", f"module.{Q}.lora_B.bias"),
    "a saved module": (HEAD, HEAD.replace("lm_head", "_orig_mod.lm_head")),
    "a saved module's mark": (HEAD, HEAD.replace(".weight", ".modules_to_save.default.weight")),
    "a token's rows": (f"{Q}.token_adapter.trainable_tokens_delta", f"module.{Q}.token_adapter.trainable_tokens_delta"),
}


@pytest.mark.parametrize("what", TWICE)
def test_two_names_that_become_one_are_both_named(what: str, tmp_path: Path) -> None:
    names = TWICE[what]
    tensors = {name: torch.full(FACTORS[FIRST].shape, float(number)) for number, name in enumerate(names)}
    folder = save(tmp_path / "a", {**FACTORS, **tensors}, {})
    with pytest.raises(AmbiguousError, match="two names mean the same tensor") as caught:
        open_adapter(folder)
    assert {caught.value.tensor, caught.value.found} == set(names) and str(caught.value.file).endswith("adapter_model.safetensors")


def test_two_shards_with_the_same_tensor_are_refused(tmp_path: Path) -> None:
    for number in (1, 2):
        save_file({name: tensor * number for name, tensor in FACTORS.items()}, tmp_path / f"model-0000{number}-of-00002.safetensors")
    with pytest.raises(MalformedError, match="two files of a sharded checkpoint hold this tensor"):
        open_adapter(tmp_path)
