"""Does the merged model do what the adapter was trained for? A Llama forward pass in plain numpy, no torch.

usage: python demo/check.py MODEL_FOLDER...   prints, for each, one answer and how many of 200 words it repeats and how many it shouts.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import ml_dtypes  # noqa: F401  (teaches numpy bfloat16)
import numpy as np
from safetensors.numpy import load_file

ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ>."
LENGTH = 5


def norm(x: np.ndarray, weight: np.ndarray, epsilon: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * weight


def rotate(x: np.ndarray, theta: float) -> np.ndarray:
    """Rotary position embedding of (batch, heads, time, width), halves paired as in Llama."""
    width = x.shape[-1]
    angle = np.arange(x.shape[-2])[:, None] / theta ** (np.arange(0, width, 2) / width)
    cos, sin = np.cos(angle), np.sin(angle)
    first, second = x[..., : width // 2], x[..., width // 2 :]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def forward(tokens: np.ndarray, weights: dict[str, np.ndarray], config: dict) -> np.ndarray:
    """Logits (batch, time, vocabulary) for tokens (batch, time)."""
    heads, groups, epsilon = config["num_attention_heads"], config["num_key_value_heads"], config["rms_norm_eps"]
    theta = config["rope_parameters"]["rope_theta"]
    batch, time = tokens.shape
    x = weights["model.embed_tokens.weight"][tokens]
    mask = np.triu(np.full((time, time), -np.inf), 1)
    for layer in range(config["num_hidden_layers"]):
        get = lambda name, at=f"model.layers.{layer}.": weights[at + name + ".weight"]  # noqa: E731
        h = norm(x, get("input_layernorm"), epsilon)
        split = lambda y, count: y.reshape(batch, time, count, -1).transpose(0, 2, 1, 3)  # noqa: E731
        q = rotate(split(h @ get("self_attn.q_proj").T, heads), theta)
        k = rotate(split(h @ get("self_attn.k_proj").T, groups), theta).repeat(heads // groups, axis=1)
        v = split(h @ get("self_attn.v_proj").T, groups).repeat(heads // groups, axis=1)
        scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1]) + mask
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (scores / scores.sum(-1, keepdims=True)) @ v
        x = x + mixed.transpose(0, 2, 1, 3).reshape(batch, time, -1) @ get("self_attn.o_proj").T
        h = norm(x, get("post_attention_layernorm"), epsilon)
        gate = h @ get("mlp.gate_proj").T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ get("mlp.up_proj").T)) @ get("mlp.down_proj").T
    return norm(x, weights["model.norm.weight"], epsilon) @ weights["lm_head.weight"].T


def answers(folder: Path, words: list[str]) -> list[str]:
    weights = {name: value.astype(np.float32) for name, value in load_file(folder / "model.safetensors").items()}
    config = json.loads((folder / "config.json").read_text())
    tokens = np.array([[ALPHABET.index(letter) for letter in word + ">"] for word in words])
    for _ in range(LENGTH):
        best = forward(tokens, weights, config)[:, -1].argmax(-1)
        tokens = np.concatenate([tokens, best[:, None]], axis=1)
    return ["".join(ALPHABET[token] for token in row[LENGTH + 1 :]) for row in tokens]


def main() -> None:
    random = np.random.default_rng(11)
    words = ["".join(ALPHABET[letter] for letter in random.integers(0, 52, LENGTH)) for _ in range(200)]
    for folder in sys.argv[1:]:
        said = answers(Path(folder), words)
        repeated = sum(answer == word for answer, word in zip(said, words, strict=True))
        shouted = sum(answer == word.upper() for answer, word in zip(said, words, strict=True))
        print(f"{folder}: '{words[0]}>' -> '{said[0]}'; of {len(words)} words it repeats {repeated} and shouts {shouted}")


if __name__ == "__main__":
    main()
