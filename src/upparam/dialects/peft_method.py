"""What a method of PEFT beside LoRA, LoHa and LoKr is to the dialect: which factors a module has, and what its config says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from upparam.algorithms.base import Delta
from upparam.bases.base import Base, Module
from upparam.dialects.base import ReadOptions
from upparam.tensors import Tensor


class Given(NamedTuple):
    """One module's factors by role, and what else of its file says something about them; `config` is None where there is none."""

    module: str
    roles: Mapping[str, Tensor]
    config: Mapping[str, Any] | None
    options: ReadOptions
    shared: Mapping[str, Tensor]


class Written(NamedTuple):
    """What a config is made for: the deltas by PEFT's module names, the words that target them, the old config, the base as PEFT names it."""

    deltas: Mapping[str, Delta]
    targets: Sequence[str] | str
    old: Mapping[str, Any]
    base: Base | None


def _nothing_shared(deltas: Mapping[str, Delta]) -> dict[str, Tensor]:
    return {}


def _as_it_reads(config: Mapping[str, Any], module: str, delta: Any) -> bool:
    return True


@dataclass(frozen=True)
class Method:
    """A method of PEFT.

    `type` is its peft_type, `algorithms` are those it holds, `roles` the factors a module has (and `more` those it may have). `read` gives
    the delta, or a sentence saying why there is none; `spell` gives the factors' words and raises RefusedError for what PEFT has no words
    for; `settings` gives the config's own part and raises RefusedError where none describes these deltas; `shared` gives tensors of the
    whole adapter under their full names; `loads` tells whether PEFT would make factors of these shapes by a config. `kept` are keys of an old config that no tensor tells; `biases` is the word for "biases of the
    adapter's own modules were trained", '' where the method has no such setting; `transposes` whether its config has fan_in_fan_out.
    """

    type: str
    algorithms: tuple[str, ...]
    roles: frozenset[str]
    read: Callable[[Given], Delta | str]
    spell: Callable[[Any, Module | None], dict[str, Tensor]]
    settings: Callable[[Written], dict[str, Any]]
    more: frozenset[str] = frozenset()
    shared: Callable[[Mapping[str, Delta]], dict[str, Tensor]] = _nothing_shared
    loads: Callable[[Mapping[str, Any], str, Any], bool] = _as_it_reads
    kept: tuple[str, ...] = ()
    biases: str = ""
    transposes: bool = True
