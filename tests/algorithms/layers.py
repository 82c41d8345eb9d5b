"""Layers in float64 whose weights LyCORIS' and PEFT's modules change in the tests of algorithms."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

LAYERS: Mapping[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(24, 32),
    "conv": lambda: nn.Conv2d(12, 16, 3),
    "conv1": lambda: nn.Conv2d(12, 16, 1),
    "conv1d": lambda: nn.Conv1d(12, 16, 3),
    "conv3d": lambda: nn.Conv3d(12, 16, (1, 2, 3)),
}
INPUTS: Mapping[str, tuple[int, ...]] = {
    "linear": (24,), "conv": (12, 5, 5), "conv1": (12, 5, 5), "conv1d": (12, 5), "conv3d": (12, 3, 4, 5),
}  # fmt: skip


def layer(kind: str) -> nn.Module:
    """One with random weights."""
    return LAYERS[kind]().double()


def batch(kind: str) -> torch.Tensor:
    """Two random inputs."""
    return torch.randn(2, *INPUTS[kind], dtype=torch.float64)


def randomised(module: nn.Module, size: float = 1.0) -> nn.Module:
    """The module in float64 with all its parameters drawn anew."""
    module = module.double()
    for value in module.parameters():
        nn.init.normal_(value, std=size)
    return module
