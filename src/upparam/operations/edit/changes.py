"""What editing does to an adapter in memory: modules out or renamed, factors in another dtype, the multiplier said otherwise, metadata."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from math import isfinite, sqrt
from typing import Any, NamedTuple

from upparam.adapter import Adapter, Extra, Target
from upparam.algorithms.base import Delta, ScaleRule, Scaling
from upparam.dialects import restated
from upparam.dtypes import DType
from upparam.errors import RefusedError, UsageError
from upparam.operations.dtypes import named_dtype
from upparam.operations.recast import multiplied, recast
from upparam.tensors import Tensor
from upparam.wording import counted

CONFIG = "config."
"""Before a metadata key: the adapter's own config file (PEFT's adapter_config.json), its value as JSON."""


@dataclass(frozen=True)
class Changes:
    """What to change; nothing by default.

    `metadata` maps keys to new values, None to take a key out; keys that begin with CONFIG mean the config. `remove` and `keep` are
    globs over targets and names of saved tensors (`remove` also over tensors that no rule explains; `keep` leaves those), `rename` pairs of globs of which each `*` stands for the same text in both. `dtype`
    is that of the factors and saved float tensors. `alpha` and `scale` say the multiplier anew; with `keep_scale` a factor takes over what
    it loses or gains, so that the effect stays.
    """

    metadata: Mapping[str, str | None] = field(default_factory=dict)
    remove: Sequence[str] = ()
    keep: Sequence[str] = ()
    rename: Sequence[tuple[str, str]] = ()
    dtype: str | None = None
    alpha: float | None = None
    scale: float | None = None
    keep_scale: bool = False

    def __post_init__(self) -> None:
        if self.alpha is not None and self.scale is not None:
            raise UsageError("alpha and scale say the same thing; give one")
        for name, value in (("alpha", self.alpha), ("scale", self.scale)):
            if value is not None and not isfinite(value):
                raise UsageError(f"{name} must be a finite number", found=value)
            if value == 0.0 and self.keep_scale:
                raise UsageError(f"no factor can make up for a {name} of 0")
        if self.keep_scale and self.alpha is None and self.scale is None:
            raise UsageError("nothing changes the scale that is to be kept", remedy="give --alpha or --scale, or --bake for a scale of 1")
        if self.dtype is not None:
            _ = self.stored
        for text in (*self.metadata, *self.metadata.values(), *(new for _, new in self.rename)):
            if text is not None and not _is_unicode(text):
                raise UsageError("names and metadata are UTF-8, and this is not", found=ascii(text))

    @property
    def stored(self) -> DType | None:
        """The dtype asked for. Raises UsageError for one that holds no factors."""
        return None if self.dtype is None else named_dtype(self.dtype, "factors")

    @property
    def strings(self) -> dict[str, str | None]:
        """The metadata to change in the tensor files themselves."""
        return {key: value for key, value in self.metadata.items() if not key.startswith(CONFIG)}

    @property
    def taken(self) -> set[str]:
        """The keys of the config to take out."""
        return {key.removeprefix(CONFIG) for key, value in self.metadata.items() if key.startswith(CONFIG) and value is None}

    @property
    def any(self) -> bool:
        """True when something is to be changed."""
        return bool(self.metadata or self.remove or self.keep or self.rename or self.dtype) or self.restates

    @property
    def restates(self) -> bool:
        """True when the multiplier is said anew."""
        return self.alpha is not None or self.scale is not None


def _is_unicode(text: str) -> bool:
    """False for text with bytes of a command line in it that are no UTF-8, or with half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class Changed(NamedTuple):
    """The adapter with the changes; the same modules, under their new names, with deltas as they were; how many things each change touched."""

    adapter: Adapter
    before: Adapter
    counts: dict[str, Any]


def changed(adapter: Adapter, changes: Changes) -> Changed:
    """The adapter with the changes. Lazy: factors are made when they are written.

    Raises UsageError for globs that match nothing or give two modules one name, RefusedError where nothing would be left, where a
    multiplier is unknown, and where no delta has one.
    """
    counts: dict[str, Any] = {}
    source = adapter
    adapter = _without(adapter, changes, counts)
    adapter = before = _renamed(adapter, changes.rename, counts)
    if changes.restates:
        adapter = _restated(adapter, changes, counts)
    if changes.stored is not None:
        adapter = _recast(adapter, changes.stored, counts)
    if counts:
        adapter = restated(adapter, source)
    return Changed(_noted(adapter, changes.metadata, counts), before, counts)


def _without(adapter: Adapter, changes: Changes, counts: dict[str, Any]) -> Adapter:
    if not changes.remove and not changes.keep:
        return adapter
    names = [*map(str, adapter.deltas), *(extra.name for extra in adapter.extras), *adapter.leftovers]
    for glob in (*changes.remove, *changes.keep):
        if not any(fnmatchcase(name, glob) for name in names):
            raise UsageError("nothing here has such a name", file=_file(adapter), expected=glob, found=f"names such as {names[0]}")

    def stays(name: str) -> bool:
        kept = not changes.keep or any(fnmatchcase(name, glob) for glob in changes.keep)
        return kept and not any(fnmatchcase(name, glob) for glob in changes.remove)

    deltas = {target: delta for target, delta in adapter.deltas.items() if stays(str(target))}
    extras = [extra for extra in adapter.extras if stays(extra.name)]
    if not deltas:
        raise RefusedError("no module would be left", file=_file(adapter), found=f"{counted(len(adapter.deltas), 'module')}, all taken out")
    leftovers = {name: tensor for name, tensor in adapter.leftovers.items() if not any(fnmatchcase(name, glob) for glob in changes.remove)}
    counts["removed"] = len(names) - len(deltas) - len(extras) - len(leftovers)
    return replace(adapter, deltas=deltas, extras=extras, leftovers=leftovers)


def _renamed(adapter: Adapter, pairs: Sequence[tuple[str, str]], counts: dict[str, Any]) -> Adapter:
    if not pairs:
        return adapter
    rules = [(_pattern(old), new, old) for old, new in pairs]
    used: set[str] = set()

    def named(name: str) -> str:
        for pattern, new, old in rules:
            found = pattern.fullmatch(name)
            if found:
                used.add(old)
                pieces = new.split("*")
                if len(pieces) - 1 > len(found.groups()):
                    raise UsageError("the new name has more * than the old one", expected=old, found=new)
                return "".join(part + group for part, group in zip(pieces, [*found.groups()[: len(pieces) - 1], ""], strict=True))
        return name

    deltas: dict[Target, Delta] = {}
    for target, delta in adapter.deltas.items():
        new = target._replace(module=named(target.module))
        if new in deltas:
            raise UsageError("two modules would have one name", file=_file(adapter), tensor=str(new))
        deltas[new] = delta
    extras = [replace(extra, name=named(extra.name)) for extra in adapter.extras]
    for _, _, old in rules:
        if old not in used:
            raise UsageError("nothing here has such a name", file=_file(adapter), expected=old, found=f"names such as {next(iter(deltas))}")
    counts["renamed"] = sum(one != other for one, other in zip(adapter.deltas, deltas, strict=True))
    counts["renamed"] += sum(one.name != other.name for one, other in zip(adapter.extras, extras, strict=True))
    return replace(adapter, deltas=deltas, extras=extras)


def _pattern(glob: str) -> re.Pattern[str]:
    """`*` any text, each a group; `?` one character; the rest as it stands."""
    parts = {"*": "(.*)", "?": "."}
    return re.compile("".join(parts.get(letter) or re.escape(letter) for letter in glob))


def _restated(adapter: Adapter, changes: Changes, counts: dict[str, Any]) -> Adapter:
    restating = Each()
    deltas: dict[Target, Delta] = {}
    number = 0
    for target, delta in adapter.deltas.items():
        if not delta.rank and delta.scaling.divisor is None:
            deltas[target] = delta
            continue
        try:
            deltas[target] = restating(delta, lambda whole: _said(whole, changes))
        except RefusedError as problem:
            raise RefusedError(problem.message, file=_file(adapter), tensor=str(target), remedy=problem.remedy) from None
        number += 1
    if not number:
        raise RefusedError("no delta here has a rank, and alpha and scale mean nothing without one", file=_file(adapter))
    counts["restated"] = number
    return replace(adapter, deltas=deltas)


def _said(delta: Delta, changes: Changes) -> Delta:
    """The delta with alpha or scale as asked for; with `keep_scale` a factor takes over the rest, in the dtype asked for or its own."""
    old, rank, scaling = delta.scaling, delta.rank, delta.scaling
    ruled = old.rule in (ScaleRule.ALPHA_OVER_RANK, ScaleRule.ALPHA_OVER_SQRT_RANK)
    if changes.alpha is not None:
        scaling = replace(old, alpha=changes.alpha) if ruled else Scaling(alpha=changes.alpha)
    elif changes.scale is not None and old.rule is ScaleRule.EXPLICIT:
        scaling = replace(old, multiplier=changes.scale)
    elif changes.scale is not None:
        divisor = (old.divisor if ruled and old.divisor is not None else rank) or 1
        scaling = replace(
            old if ruled else Scaling(), alpha=changes.scale * (sqrt(divisor) if old.rule is ScaleRule.ALPHA_OVER_SQRT_RANK else divisor)
        )
    new: Delta = replace(delta, scaling=scaling)  # type: ignore[type-var]
    if not changes.keep_scale:
        return new
    factor = delta.known_scale() / new.known_scale()
    return new if factor == 1.0 else new.on_factor(lambda tensor: multiplied(tensor, factor, changes.stored))


def _recast(adapter: Adapter, dtype: DType, counts: dict[str, Any]) -> Adapter:
    casting, views = Each(), {}
    number = 0

    def cast(tensor: Tensor) -> Tensor:
        nonlocal number
        key = (id(tensor.source), tensor.offset, tensor.shape, tensor.strides, tensor.dtype)
        if key not in views:  # parts of a fused weight share their down factor, and go on doing so
            views[key] = recast(tensor, dtype)
            number += views[key] is not tensor
        return views[key]

    def whole(delta: Delta) -> Delta:
        roles = {role: cast(tensor) for role, tensor in delta.factors().items()}
        return replace(delta, **roles)  # type: ignore[type-var]

    deltas = {target: casting(delta, whole) for target, delta in adapter.deltas.items()}
    extras = [Extra(extra.kind, extra.name, cast(extra.tensor)) for extra in adapter.extras]
    counts["recast"] = number
    return replace(adapter, deltas=deltas, extras=extras)


class Each:
    """Changes deltas; parts of one whole that cannot be cut get the very same changed whole, so that they can be joined again."""

    def __init__(self) -> None:
        self._wholes: dict[int, Delta] = {}

    def __call__(self, delta: Delta, change: Any) -> Delta:
        """`change` of the delta, or of the whole that it is a part of."""
        whole: Delta | None = getattr(delta, "whole", None)
        if whole is None:
            made: Delta = change(delta)
            return made
        if id(whole) not in self._wholes:
            self._wholes[id(whole)] = change(whole)
        return replace(delta, whole=self._wholes[id(whole)])  # type: ignore[type-var]


def _noted(adapter: Adapter, wanted: Mapping[str, str | None], counts: dict[str, Any]) -> Adapter:
    if not wanted:
        return adapter
    metadata, config = dict(adapter.metadata), dict(adapter.config)
    for key, value in wanted.items():
        place: dict[str, Any] = config if key.startswith(CONFIG) else metadata
        name = key.removeprefix(CONFIG)
        if place is config and not adapter.config:
            raise RefusedError("this adapter has no config file", file=_file(adapter), found=key)
        if value is None and name not in place:
            raise UsageError("there is no such key to take out", file=_file(adapter), expected=key, found=_some(place))
        if value is None:
            del place[name]
        else:
            place[name] = parsed(value) if place is config else value
    counts["metadata"] = len(wanted)
    return replace(adapter, metadata=metadata, config=config)


def parsed(text: str) -> Any:
    """A config's value: JSON where it is JSON, else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _some(keys: Collection[str]) -> str:
    return ", ".join(list(keys)[:6]) + (" ..." if len(keys) > 6 else "") or "none"


def _file(adapter: Adapter) -> str | None:
    return adapter.files[0] if adapter.files else None
