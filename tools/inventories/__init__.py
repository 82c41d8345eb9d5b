"""Which bases upparam ships an inventory of, written as config values of the public models; `make_inventories.py` turns them into data.

One module per field (text, vision, diffusion). An `Entry` names a base, the ids people know it by, the values its public config.json
holds, and how to list its modules. Models are built on torch's meta device: no weights, no network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Row(NamedTuple):
    """One module that holds a weight: path, class, weight shape as stored, and whether it has a bias too."""

    path: str
    kind: str
    shape: tuple[int, ...]
    bias: bool


@dataclass(frozen=True)
class Entry:
    """One base: `config` holds what its config.json says (used to match a user's config), `ids` model ids and other names."""

    name: str
    family: str
    title: str
    rows: Callable[[], list[Row]]
    config: dict[str, Any] = field(default_factory=dict)
    ids: tuple[str, ...] = ()
    variant_of: str | None = None
    """A base with the same layers, but for a few input or output channels."""


def trace(model: Any, prefix: str = "") -> list[Row]:
    """The weighted modules of a torch module in named_modules() order; a subclass of torch's Linear, Embedding or Conv goes by its name."""
    import torch
    from torch import nn

    plain = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)

    rows = []
    for path, module in model.named_modules(remove_duplicate=False):
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor):
            has_bias = isinstance(getattr(module, "bias", None), torch.Tensor)
            kind = next((cls for cls in plain if isinstance(module, cls)), type(module)).__name__
            rows.append(Row(prefix + path, kind, tuple(weight.shape), has_bias))
    return rows


def on_meta(build: Callable[[], Any]) -> Any:
    """What `build` returns, built without allocating weights."""
    import torch

    with torch.device("meta"), torch.no_grad():
        return build()


def linear(path: str, out: int, into: int, bias: bool = True) -> Row:
    """A Linear's row."""
    return Row(path, "Linear", (out, into), bias)


def norm(path: str, size: int, kind: str = "LayerNorm", bias: bool = True) -> Row:
    """A norm's row."""
    return Row(path, kind, (size,), bias)


def prefixed(prefix: str, rows: Iterable[Row]) -> list[Row]:
    """The rows with `prefix` before each path."""
    return [row._replace(path=prefix + row.path) for row in rows]


def entries() -> list[Entry]:
    """Every base, in the order `upparam bases` lists them."""
    from inventories import diffusion, text, vision

    return [*diffusion.ENTRIES, *text.ENTRIES, *vision.ENTRIES]
