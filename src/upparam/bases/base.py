"""What a base model is to us: its modules, in order, with their weight shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from upparam.patterns import regex

_BARE_CLIP = regex(r"^text_encoder(_[23])?\.(?=embeddings\.(token|position)_embedding$|encoder\.layers\.\d|final_layer_norm$)")


def with_text_model(path: str) -> str:
    """A module's path under the name inventories have in CLIP's text model; transformers 5 leaves out `text_model.` in front."""
    return _BARE_CLIP.sub(lambda found: f"{found[0]}text_model.", path)


class Module(NamedTuple):
    """One module of a base that holds a weight: reference path, class ('' when only a header is known), weight shape as stored, bias or not."""

    path: str
    kind: str
    shape: tuple[int, ...]
    bias: bool = False

    @property
    def swapped(self) -> bool:
        """Whether the weight is stored with its first two axes the other way round: a Conv1D (GPT-2), a transposed convolution."""
        return self.kind == "Conv1D" or self.kind.startswith("ConvTranspose")

    @property
    def canonical(self) -> tuple[int, ...]:
        """The weight shape as (out, in, *kernel)."""
        return (self.shape[1], self.shape[0], *self.shape[2:]) if self.swapped else self.shape


@dataclass(frozen=True)
class Base:
    """A base model as data: modules in traversal order. From a shipped inventory or from the header of the user's own file.

    `shape` of a Conv1D weight (GPT-2) is (in, out) as stored, `kind` then is 'Conv1D'. `config` is the config.json beside a user's own
    weights that are of no shipped inventory.
    """

    name: str
    modules: tuple[Module, ...]
    family: str = ""
    evidence: tuple[str, ...] = field(default=(), compare=False)
    config: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @cached_property
    def by_path(self) -> Mapping[str, Module]:
        """Modules by reference path."""
        return {module.path: module for module in self.modules}
