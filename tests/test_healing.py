"""Adapters that PEFT does not find, as people reported them, each made by PEFT itself, assembled, and loaded by PEFT again.

The situations: lm-sys/FastChat #502, mymusise/ChatGLM-Tuning #198 (a checkpoint's pytorch_model.bin holds base and factors), LianjiaTech/BELLE
#370 and #385 (factors alone, or a whole state dict, and no config), datawhalechina/self-llm #175 and #421 (a whole model in shards, without
PEFT's wrapper), baichuan-inc/Baichuan2 #145 (DeepSpeed's own states), hiyouga/LlamaFactory #1912 (the folder of a run for one of its states).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from upparam.cli import main

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

TOKENS = [[1, 5, 9, 2, 7, 3]]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def base(kind: str = "LlamaForCausalLM") -> Any:
    torch.manual_seed(0)
    return getattr(transformers, kind)(transformers.LlamaConfig(**SIZES, vocab_size=64, pad_token_id=0)).eval()


def trained(kind: str = "LlamaForCausalLM", **config: Any) -> Any:
    """A model with a PEFT adapter of r 4, alpha 8, whose factors are not zero."""
    model = peft.get_peft_model(base(kind), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], **config)).eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def answer(model: Any) -> Any:
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits


def whole(model: Any, folder: Path) -> None:
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def of_old_peft(model: Any, folder: Path) -> None:
    """Before PEFT 0.3 there were no adapter names, before 0.6 no base layers."""
    torch.save(
        {name.replace(".default", "").replace(".base_layer", ""): value for name, value in model.state_dict().items()},
        folder / "pytorch_model.bin",
    )


def factors_alone(model: Any, folder: Path) -> None:
    torch.save(peft.get_peft_model_state_dict(model), folder / "pytorch_model.bin")


def unwrapped_shards(model: Any, folder: Path) -> None:
    from safetensors.torch import save_file

    tensors = {name.removeprefix("base_model.model."): value.clone() for name, value in model.state_dict().items()}
    names = sorted(tensors)
    parts = {f"model-0000{part + 1}-of-00002.safetensors": names[part * 13 : part * 13 + 13 if part == 0 else None] for part in (0, 1)}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def deepspeed(model: Any, folder: Path) -> None:
    torch.save({"module": model.state_dict(), "ds_version": "0.14.0", "global_steps": 10}, folder / "mp_rank_00_model_states.pt")
    torch.save({"optimizer_state_dict": {"zero_stage": 2}, "ds_version": "0.14.0"}, folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")


def with_arguments(model: Any, folder: Path) -> None:
    """A Trainer whose model is no PreTrainedModel: its state dict, and its arguments as a pickle of classes that nothing must build."""
    whole(model, folder)
    torch.save(transformers.TrainingArguments(output_dir=str(folder)), folder / "training_args.bin")


def consolidated(model: Any, folder: Path) -> None:
    torch.save({"model": model.state_dict()}, folder / "consolidated.00.pth")


SAVES: dict[str, Callable[[Any, Path], None]] = {
    "FastChat #502": whole, "ChatGLM-Tuning #198": of_old_peft, "BELLE #370": factors_alone, "BELLE #385": with_arguments, "self-llm #175": unwrapped_shards,
    "Baichuan2 #145": deepspeed, "consolidated": consolidated,
}  # fmt: skip


@pytest.mark.parametrize("case", SAVES)
def test_an_adapter_without_a_config(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tmp_path / "checkpoint-600", tmp_path / "out"
    folder.mkdir()
    model = trained(task_type="CAUSAL_LM")
    SAVES[case](model, folder)
    for name, content in (("trainer_state.json", '{"global_step": 600, "log_history": []}'), ("tokenizer_config.json", "{}")):
        (folder / name).write_text(content)
    torch.save({"state": {}, "param_groups": []}, folder / "optimizer.pt")
    assert main(["assemble", str(folder), "-o", str(out)]) == 4
    assert "never guessed; give it with --alpha" in capsys.readouterr().err and not out.exists()
    assert main(["assemble", str(folder), "--alpha", "8", "-o", str(out)]) == 0
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["modules_to_save"]) == ("LORA", 4, 8, None)
    again = peft.PeftModel.from_pretrained(base(), out).eval()
    assert torch.equal(answer(again), answer(model))
    assert not torch.allclose(answer(again), answer(base()), atol=1e-2)
    held = peft.load_peft_weights(str(out), device="cpu")
    assert held.keys() == peft.get_peft_model_state_dict(model).keys()


def test_a_model_that_saved_itself_with_its_factors(tmp_path: Path) -> None:
    """self-llm #421: transformers saves the inner model of a PEFT one, in shards, with the model's config and none of the adapter's."""

    def qwen() -> Any:
        torch.manual_seed(0)
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, vocab_size=64, head_dim=8, pad_token_id=0)).eval()

    model = peft.get_peft_model(
        qwen(), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    ).eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    folder, out = tmp_path / "checkpoint-100", tmp_path / "out"
    model.base_model.model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2 and not (folder / "adapter_config.json").exists()
    assert main(["assemble", str(folder), "-o", str(out), "-q"]) == 4
    assert main(["assemble", str(folder), "--alpha", "8", "-o", str(out), "-q"]) == 0
    assert torch.equal(answer(peft.PeftModel.from_pretrained(qwen(), out).eval()), answer(model))


def test_the_folder_of_a_run_names_its_states(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """LlamaFactory #1912: the run's folder, named where a checkpoint in it is meant; PEFT says that it cannot find adapter_config.json."""
    run = tmp_path / "Qwen-14B-Chat" / "lora" / "test1"
    model = trained(task_type="CAUSAL_LM")
    for step in (500, 1000):
        model.save_pretrained(run / f"checkpoint-{step}")
        torch.save({"state": {}, "param_groups": []}, run / f"checkpoint-{step}" / "optimizer.pt")
    (run / "trainer_log.jsonl").write_text("{}\n")
    torch.save(transformers.TrainingArguments(output_dir=str(run)), run / "training_args.bin")
    with pytest.raises(ValueError, match="adapter_config"):
        peft.PeftModel.from_pretrained(base(), str(run))
    for command in (["assemble", str(run), "-o", str(tmp_path / "out")], ["inspect", str(run)], ["verify", str(run)]):
        assert main(command) == 3
        said = capsys.readouterr().err
        assert "checkpoint-1000, checkpoint-500" in said and "checkpoint-1000 is the last" in said
    assert main(["assemble", str(run / "checkpoint-1000"), "-o", str(tmp_path / "out"), "-q"]) == 0
    assert torch.equal(answer(peft.PeftModel.from_pretrained(base(), tmp_path / "out").eval()), answer(model))


def test_ranks_that_differ_become_a_pattern(tmp_path: Path) -> None:
    model = trained(rank_pattern={"layers.1.self_attn.q_proj": 8})
    model.save_pretrained(tmp_path / "lost")
    (tmp_path / "lost" / "adapter_config.json").unlink()
    assert main(["assemble", str(tmp_path / "lost"), "--alpha", "8", "-o", str(tmp_path / "out"), "-q"]) == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == 4 and list(config["rank_pattern"].values()) == [8]
    assert torch.equal(answer(peft.PeftModel.from_pretrained(base(), tmp_path / "out").eval()), answer(model))


@pytest.mark.parametrize("full", [False, True])
def test_a_head_tells_the_task_and_is_saved(tmp_path: Path, full: bool) -> None:
    kind = "LlamaForSequenceClassification"
    model = trained(kind, task_type="SEQ_CLS")
    (tmp_path / "lost").mkdir()
    if full:
        whole(model, tmp_path / "lost")
    else:
        model.save_pretrained(tmp_path / "lost")
        (tmp_path / "lost" / "adapter_config.json").unlink()
    assert main(["assemble", str(tmp_path / "lost"), "--alpha", "8", "-o", str(tmp_path / "out"), "-q"]) == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
    assert torch.equal(answer(peft.PeftModel.from_pretrained(base(kind), tmp_path / "out").eval()), answer(model))


def test_a_merged_linear_without_its_config_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "base_model.model.transformer.layers.0.attention.query_key_value"
    torch.save(
        {f"{name}.lora_A.weight": torch.zeros(16, 32), f"{name}.lora_B.weight": torch.ones(64, 8, 1)}, tmp_path / "adapter_model.bin"
    )
    assert main(["verify", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "MergedLinear" in said and "enable_lora" in said
