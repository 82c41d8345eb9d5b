"""Factors of odd shapes under odd configs, from a seed: an adapter or an error of ours, never anything else."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from upparam.errors import UpparamError
from upparam.operations.convert import convert
from upparam.operations.identify import identify
from upparam.operations.merge import merge
from upparam.operations.verify import verify

WORDS = (
    "lora_E", "lora_A", "lora_B", "ranknum", "ia3_l", "vera_lambda_b", "vera_lambda_d", "oft_R.weight", "oft_embedding_R.weight", "oft_r", "oft_s",
    "boft_R", "boft_s", "lora_A.weight",
)  # fmt: skip
KEYS = (
    "init_r", "lora_alpha", "oft_block_size", "use_cayley_neumann", "num_cayley_neumann_terms", "coft", "eps", "block_share", "peft_version",
    "feedforward_modules", "rank_pattern", "projection_prng_key", "r", "target_modules", "bias",
)  # fmt: skip
ODD: tuple[Any, ...] = (
    0, 1, -1, 2, 8, 1e400, "x", None, True, False, [], ["q"], {}, {"a": [True]}, {"a.b.lora_E": [True, False]}, "0.18.0", "0.17", 3.5, ".*",
)  # fmt: skip


def tensors(draw: random.Random) -> dict[str, Any]:
    made = {}
    for module in draw.sample(["a.b", "c"], draw.randint(1, 2)):
        for word in draw.sample(WORDS, draw.randint(1, 4)):
            shape = [draw.choice([0, 1, 2, 3, 4, 8, 28]) for _ in range(draw.randint(0, 4))]
            values = np.random.default_rng(draw.randint(0, 99)).standard_normal(shape)
            made[f"base_model.model.{module}.{word}"] = np.asarray(values, draw.choice([np.float32, np.float16, np.int32]))
    if draw.random() < 0.4:
        made["base_model.vera_A"] = np.ones((draw.choice([2, 4]), draw.choice([4, 8])), np.float32)
        made["base_model.vera_B"] = np.ones((8, draw.choice([2, 4])), np.float32)
    return made


@pytest.mark.parametrize("seed", range(8))
def test_an_adapter_or_an_error_of_ours(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    base = {"a.b.weight": np.ones((8, 8), np.float32), "a.b.bias": np.ones(8, np.float32), "c.weight": np.ones((4, 8), np.float32)}
    save_file(base, tmp_path / "model.safetensors")
    for number in range(40):
        folder = tmp_path / str(number)
        folder.mkdir()
        save_file(tensors(draw), folder / "adapter_model.safetensors")
        if draw.random() < 0.8:
            config = {key: draw.choice(ODD) for key in draw.sample(KEYS, draw.randint(0, 10))}
            kind = draw.choice(["ADALORA", "IA3", "VERA", "OFT", "BOFT", "LORA", None])
            (folder / "adapter_config.json").write_text(json.dumps(config | ({"peft_type": kind} if kind else {})))
        for run in (
            lambda folder=folder: identify(folder), lambda folder=folder: verify(folder),
            lambda folder=folder: convert(folder, folder / "peft", "peft"), lambda folder=folder: convert(folder, folder / "triad", "triad"),
            lambda folder=folder: merge(tmp_path / "model.safetensors", folder, folder / "merged.safetensors", sync=False),
        ):  # fmt: skip
            try:
                run()
            except UpparamError as problem:
                assert problem.line()
