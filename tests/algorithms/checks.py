"""What the tests of algorithms share: random factors, and the checks that hold for every delta."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from upparam.algorithms.base import Delta
from upparam.algorithms.slicing import cut
from upparam.tensors import Tensor

Array = NDArray[Any]


def array(value: Any) -> Array:
    """A torch tensor or numpy array as a numpy array."""
    return np.asarray(value.detach().numpy() if hasattr(value, "detach") else value)


def tensor(value: Any) -> Tensor:
    """A torch tensor or numpy array as a Tensor."""
    return Tensor.of(array(value))


def close(found: Any, true: Any, tolerance: float = 1e-12) -> None:
    """Relative distance in the Frobenius norm."""
    true = array(true).astype(np.float64)
    gap = np.linalg.norm(array(found).reshape(true.shape) - true)
    assert gap <= tolerance * np.linalg.norm(true), gap / np.linalg.norm(true)


def dense(delta: Delta) -> Array:
    """scale * dW, from ranges of rows that are no divisors of the whole."""
    update, out = delta.load(), delta.shape[0]
    step = max(1, out // 3)
    return np.vstack([update.rows(start, min(start + step, out)) for start in range(0, out, step)])


def merged(delta: Delta, weight: Any) -> Array:
    """W' from ranges of rows that are no divisors of the whole, the last range first."""
    base = array(weight).astype(np.float64)
    flat = base.reshape(len(base), -1)
    step = max(1, len(base) // 3)
    update = delta.load()
    parts = {
        start: update.merged(lambda a, b: flat[a:b].copy(), start, min(start + step, len(base)))
        for start in range(0, len(base), step)[::-1]
    }
    return np.vstack([parts[start] for start in sorted(parts)]).reshape(base.shape)


def check_additive(delta: Delta, true: Any, tolerance: float = 1e-12) -> None:
    """Rows, low-rank form, norm and inner product against a dense dW with the scale in it."""
    true = array(true).astype(np.float64)
    flat = true.reshape(len(true), -1)
    assert delta.additive and delta.shape[0] == len(true) and int(np.prod(delta.shape)) == true.size
    close(dense(delta), flat, tolerance)
    form = delta.load().low_rank()
    if form is not None:
        close(delta.known_scale() * form[0] @ form[1], flat, tolerance)
    assert np.isclose(delta.frobenius(), np.linalg.norm(flat), rtol=max(tolerance, 1e-9))
    assert np.isclose(delta.inner(delta), np.linalg.norm(flat) ** 2, rtol=max(tolerance, 1e-9))
    close(merged(delta, np.ones_like(true)), 1.0 + true, tolerance)


def check_rows(delta: Delta, weight: Any, start: int, stop: int, tolerance: float = 1e-12) -> None:
    """A cut of the delta changes those rows of the weight as the whole does."""
    base = array(weight).astype(np.float64)
    part = cut(delta, start, stop)
    close(merged(part, base[start:stop]), merged(delta, base)[start:stop], tolerance)
