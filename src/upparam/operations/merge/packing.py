"""GGUF's Q8_0: blocks of 32 elements, each one float16 scale and 32 int8 codes. Decoded and encoded as the gguf library does it.

Source: ggml-org/llama.cpp gguf-py/gguf/quants.py (class Q8_0, np_roundf).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK, BLOCK_BYTES = 32, 34
PACKINGS = ("Q8_0",)
"""Block formats a merge can read and write."""


def decode(stored: NDArray[np.uint8]) -> NDArray[np.float64]:
    """(rows, bytes) -> (rows, elements): scale times code."""
    blocks = stored.reshape(len(stored), -1, BLOCK_BYTES)
    scales = np.ascontiguousarray(blocks[:, :, :2]).view(np.float16).astype(np.float64)
    codes = blocks[:, :, 2:].view(np.int8).astype(np.float64)
    result: NDArray[np.float64] = (codes * scales).reshape(len(stored), -1)
    return result


def encode(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    """(rows, elements) -> (rows, bytes): the scale is the block's largest magnitude / 127, codes are rounded half away from zero."""
    blocks = values.astype(np.float32).reshape(len(values), -1, BLOCK)
    scales = np.abs(blocks).max(axis=2, keepdims=True) / np.float32(127)
    with np.errstate(divide="ignore"):
        inverse = np.where(scales == 0, np.float32(0), np.float32(1) / scales)
    scaled = blocks * inverse
    magnitude = np.abs(scaled)
    whole = np.floor(magnitude)
    codes = np.sign(scaled) * (whole + np.floor(2 * (magnitude - whole)))
    parts: list[NDArray[Any]] = [scales.astype(np.float16).view(np.uint8), codes.astype(np.int8).view(np.uint8)]
    return np.concatenate(parts, axis=2).reshape(len(values), -1)
