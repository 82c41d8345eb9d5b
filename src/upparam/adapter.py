"""The canonical form every dialect reads into and writes from: targets, deltas, extras, and what is left over."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, NamedTuple

from upparam.algorithms.base import Delta
from upparam.errors import RefusedError, UsageError
from upparam.findings import Finding, warning
from upparam.tensors import Tensor

FROM_BASE = "the initial factors were taken out of the base's weights"
"""Part of a condition that subtracting the initial adapter settles."""
REPEATED = "its layers are those of a model with repeated layers, not of the base"
"""Part of a condition under which there may be more layers than the base has."""


class Target(NamedTuple):
    """What a delta changes.

    `module` is a path in the base's reference layout (dots between segments; a multi-component base puts the component first:
    `unet.`, `text_encoder.`, `text_encoder_2.`, `transformer.`). While no base is known it is the path as the file gives it.
    `rows` is a half-open range of output rows of a fused weight (q, k or v inside a qkv), None for the whole; `parameter` is
    `weight` except for deltas of biases and bare parameters.
    """

    module: str
    rows: tuple[int, int] | None = None
    parameter: str = "weight"

    @property
    def name(self) -> str:
        """The name of the parameter, as tensors of a base bear it."""
        return f"{self.module}.{self.parameter}" if self.module else self.parameter

    def renamed(self, name: str) -> Target:
        """The same rows of the parameter of this name."""
        module, _, parameter = name.rpartition(".")
        return self._replace(module=module, parameter=parameter)

    def __str__(self) -> str:
        name = self.module if self.parameter == "weight" else f"{self.module}.{self.parameter}"
        return name if self.rows is None else f"{name}[{self.rows[0]}:{self.rows[1]}]"


class ExtraKind(str, Enum):
    """Why a tensor rides along with the deltas. The value names it in messages and for `--drop`."""

    SAVED_MODULE = "saved-module"
    """A whole weight or bias trained beside the adapter that replaces the base's (PEFT modules_to_save)."""
    BIAS = "bias"
    """A base bias trained in place; replaces the base's."""
    TEXTUAL_INVERSION = "textual-inversion"
    """A learned token embedding of shape (vectors, dim); `name` is the token, with `.clip_l` and the like where it has one per encoder."""
    TRAINING_AID = "training-aid"
    """What only training uses; nothing that is computed or merged depends on it."""
    OTHER = "other"


DROPPABLE = (*(kind.value for kind in ExtraKind), "leftovers", "conditions")
"""What `--drop` may name: kinds of extras (`bias` means changes of biases too), tensors that no rule explains, conditions."""


@dataclass(frozen=True)
class Extra:
    """A tensor that is no delta but belongs to the adapter. `name` is the base parameter's path (module.weight), or the token."""

    kind: ExtraKind
    name: str
    tensor: Tensor


@dataclass(frozen=True)
class BaseHint:
    """Which base an adapter is for: `name` of an inventory or a model id, how sure, and why. `stated` when the file itself says so."""

    name: str
    confidence: float
    evidence: tuple[str, ...] = ()
    stated: bool = False
    lookalikes: tuple[str, ...] = ()


@dataclass
class Adapter:
    """An adapter in canonical form. Lazy: factors are read when an operation needs them.

    `layout` names the naming the target modules use: `reference` once resolved against a base, else the dialect's own
    (for example `kohya` for underscored names that no inventory has resolved yet).
    `metadata` holds the container's string metadata verbatim; `config` a dialect's own side file verbatim (PEFT's adapter_config).
    `leftovers` are tensors that no rule consumed: an operation that would lose them refuses until the user names what to give up.
    """

    deltas: dict[Target, Delta]
    dialect: str
    """Whose spelling it is."""
    extras: list[Extra] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    base: BaseHint | None = None
    layout: str = "reference"
    transposed_base: bool | None = None
    """True when the base stores these weights as (in, out) (GPT-2's Conv1D), as the file says; None when it does not say."""
    spelling: dict[str, str] = field(default_factory=dict)
    """Free choices of the source's writer (prefix, layout, dtype of alpha, ...) that a rewrite in the same dialect repeats."""
    files: tuple[str, ...] = ()
    found_as: str | None = None
    """The dialect of the files themselves where that is another one: a triad remembers whose adapter was split."""
    leftovers: dict[str, Tensor] = field(default_factory=dict)
    conditions: list[str] = field(default_factory=list)
    """Why the deltas alone are not the whole change, one sentence each (an initialisation that took part of the base's weight, say).

    Only a rewrite in the same dialect carries them; other operations refuse until the user gives them up (`--drop conditions`).
    """
    findings: list[Finding] = field(default_factory=list)

    @property
    def written_as(self) -> str:
        """The dialect of its files: a split adapter is one, whoever's it was before."""
        return self.found_as or self.dialect

    def algorithms(self) -> dict[str, int]:
        """How many deltas each algorithm has, in order of first appearance."""
        return _count(delta.algorithm for delta in self.deltas.values())

    def ranks(self) -> dict[int, int]:
        """How many deltas have each rank (deltas without one are not counted), smallest rank first."""
        return dict(sorted(_count(delta.rank for delta in self.deltas.values() if delta.rank is not None).items()))

    def dtypes(self) -> dict[str, int]:
        """How many factors have each dtype."""
        return _count(factor.dtype.name for delta in self.deltas.values() for factor in delta.factors().values())

    def parameters(self) -> int:
        """How many numbers the factors hold, those that several deltas share counted once."""
        held: dict[tuple[int, int], int] = {}
        for delta in self.deltas.values():
            for factor in delta.factors().values():
                place = (id(factor.source), factor.offset)
                held[place] = max(held.get(place, 0), factor.numel)
        return sum(held.values())

    def tensors(self) -> Mapping[str, Tensor]:
        """Every tensor the adapter holds under a canonical name (`module.role`), leftovers included."""
        found = {f"{target}.{role}": factor for target, delta in self.deltas.items() for role, factor in delta.factors().items()}
        found |= {f"{extra.kind.value}:{extra.name}": extra.tensor for extra in self.extras}
        return found | {f"leftover:{name}": tensor for name, tensor in self.leftovers.items()}

    def hold_under(self, reason: str, subject: str, *evidence: str) -> None:
        """Note a condition under which the deltas hold, and say it of `subject`; each once."""
        if reason not in self.conditions:
            self.conditions.append(reason)
            self.findings.append(warning("condition", subject, reason, *evidence))

    def save(self, out: Any, dialect: str | None = None, **options: Any) -> Any:
        """Write the adapter to `out` in `dialect` (that of its files when None); see `upparam.operations.convert.write_adapter`."""
        from upparam.operations.convert import write_adapter

        return write_adapter(self, out, dialect or self.written_as, **options)


def without(adapter: Adapter, drop: Collection[str]) -> tuple[Adapter, list[Finding]]:
    """The adapter without what is named in `drop`, and a finding for each thing given up.

    Raises UsageError for a name not in DROPPABLE, RefusedError where there are only changes of biases and these are given up.
    """
    unknown = [name for name in drop if name not in DROPPABLE]
    if unknown:
        raise UsageError("there is no such kind to drop", expected=f"one of {', '.join(DROPPABLE)}", found=", ".join(unknown))
    biases = [target for target in adapter.deltas if target.parameter == "bias"] if ExtraKind.BIAS.value in drop else []
    if biases and len(biases) == len(adapter.deltas):
        raise RefusedError("nothing but changes of biases is here", file=adapter.files[0] if adapter.files else None, found="--drop bias")
    gone = [(str(target), "change of a bias") for target in biases]
    gone += [(extra.name, extra.kind.value) for extra in adapter.extras if extra.kind.value in drop]
    gone += [(name, "leftover") for name in adapter.leftovers if "leftovers" in drop]
    gone += [(reason, "condition") for reason in adapter.conditions if "conditions" in drop]
    less = replace(
        adapter,
        deltas={target: delta for target, delta in adapter.deltas.items() if target not in biases},
        extras=[extra for extra in adapter.extras if extra.kind.value not in drop],
        leftovers={} if "leftovers" in drop else adapter.leftovers,
        conditions=[] if "conditions" in drop else adapter.conditions,
    )
    return less, [warning("given-up", name, f"{kind} given up because --drop asked for it") for name, kind in gone]


def _count(values: Any) -> dict[Any, int]:
    counts: dict[Any, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return counts
