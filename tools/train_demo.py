"""Train the demo's base and adapter, and write demo/base and demo/mystery.

The base is a two-layer Llama of 64 features that learned to repeat a word ("aBc>aBc."). The adapter, a rank-4 LoRA on its linears,
was trained on it to shout: the same word in capitals ("aBc>ABC."). The adapter is saved as strangers find one: two pickled factor
dicts and a two-line config. Needs the test extra (torch, transformers, peft); run: python tools/train_demo.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ>."
LENGTH = 5
DEMO = Path(__file__).parents[1] / "demo"


def batch(size: int, shout: bool, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    words = torch.randint(0, 52, (size, LENGTH), generator=generator)
    answer = torch.where(words < 26, words + 26, words) if shout else words
    mark, stop = torch.full((size, 1), 52), torch.full((size, 1), 53)
    tokens = torch.cat([words, mark, answer, stop], dim=1)
    labels = tokens.clone()
    labels[:, : LENGTH + 1] = -100
    return tokens, labels


def train(model: torch.nn.Module, steps: int, rate: float, shout: bool, generator: torch.Generator) -> float:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    loss = torch.tensor(0.0)
    for _ in range(steps):
        tokens, labels = batch(128, shout, generator)
        loss = model(input_ids=tokens, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return float(loss.detach())


def main() -> None:
    torch.manual_seed(7)
    generator = torch.Generator().manual_seed(7)
    config = LlamaConfig(
        vocab_size=len(ALPHABET), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=32, bos_token_id=None, eos_token_id=53, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    print("base", train(model, 2500, 3e-3, False, generator))
    model = model.to(torch.bfloat16)
    shutil.rmtree(DEMO / "base", ignore_errors=True)
    model.save_pretrained(DEMO / "base")
    (DEMO / "base" / "generation_config.json").unlink(missing_ok=True)
    model = model.to(torch.float32)
    lora = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        task_type="CAUSAL_LM",
    )
    tuned = get_peft_model(model, lora)
    print("adapter", train(tuned, 1500, 1e-2, True, generator))
    factors = {name.removeprefix("base_model.model."): value.detach() for name, value in tuned.state_dict().items() if "lora_" in name}
    mystery = DEMO / "mystery"
    mystery.mkdir(exist_ok=True)
    for role, mark in (("up", ".lora_B.default.weight"), ("down", ".lora_A.default.weight")):
        torch.save(
            {name.removesuffix(mark): value for name, value in factors.items() if name.endswith(mark)}, mystery / f"{role}-param.bin"
        )
    (mystery / "config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}) + "\n")


if __name__ == "__main__":
    main()
