"""Reading PEFT: from a saved model's tensors and config to deltas under the base's names, extras, and what is worth saying."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from upparam.adapter import Adapter, BaseHint, Extra, ExtraKind, Target
from upparam.algorithms.base import Delta
from upparam.algorithms.slicing import unjoin
from upparam.bases import inventory
from upparam.bases.base import Base
from upparam.bases.recognise import recognise
from upparam.containers.base import TensorFile
from upparam.dialects import peft_config
from upparam.dialects.base import ReadOptions
from upparam.dialects.peft_kinds import deltas_of
from upparam.dialects.peft_names import TOKENS, WRAPPER, Sorted
from upparam.dialects.placing import alike
from upparam.errors import MalformedError
from upparam.findings import error, info, warning

SLICES_KEY = "upparam.slices"
"""Metadata that says which rows and ranks of a module's factors were deltas of their own: {module: [[row, row, rank, rank, alpha], ...]}."""
Slices = dict[str, list[list[float | None]]]


@dataclass(frozen=True)
class Member:
    """One saved model: its file, its config (None when it is missing) and its names, and the pipeline's component it is ('' when alone)."""

    file: TensorFile
    config: Mapping[str, Any] | None
    names: Sorted
    component: str = ""

    def path(self, module: str) -> str:
        """A module's path with the component in front."""
        return f"{self.component}.{module}" if self.component else module

    def original(self, module: str, role: str) -> str:
        """About the name a factor had in the file."""
        return f"{WRAPPER if self.names.wrapped else ''}{module}.{role}"


def take_deltas(adapter: Adapter, member: Member, options: ReadOptions) -> dict[Target, Delta]:
    """Deltas by the path PEFT gives their module. Factors that make none go to the leftovers with a finding."""
    found: dict[Target, Delta] = {}
    for module, roles in member.names.factors.items():
        try:
            made = deltas_of(module, roles, member.config, options, member.names)
        except MalformedError as problem:
            raise MalformedError(
                problem.message, file=member.file.path, tensor=module, expected=problem.expected, found=problem.found, remedy=problem.remedy
            ) from None
        if made:
            found |= {target._replace(module=member.path(target.module)): delta for target, delta in made.items()}
        else:
            adapter.leftovers |= {member.original(module, role): tensor for role, tensor in roles.items()}
            adapter.findings.append(error("orphan", module, "factors that make no delta", ", ".join(roles)))
    for name, tensor in member.names.unknown.items():
        adapter.leftovers[name] = tensor
    return found


@dataclass(frozen=True)
class Naming:
    """How PEFT's paths become the base's: `strip` off the front, `add` in its place."""

    strip: str = ""
    add: str = ""

    def __call__(self, path: str) -> str:
        """The base's path."""
        return self.add + path.removeprefix(self.strip)


def place(adapter: Adapter, deltas: Mapping[Target, Delta], told: Slices, config: Mapping[str, Any], options: ReadOptions) -> None:
    """Name the base and put each delta under its reference target; names that no base explains stay as they are."""
    shapes: dict[str, tuple[int, ...]] = {}
    for target, delta in deltas.items():
        if target.parameter == "weight":
            high = max(target.rows[1] if target.rows else delta.shape[0], shapes.get(target.module, (0,))[0])
            shapes[target.module] = (high, *delta.shape[1:])
    stated = config.get("base_model_name_or_path")
    base, naming = _find_base(adapter, shapes, stated if isinstance(stated, str) and stated else None, options.base)
    adapter.layout = "peft" if naming is None else "reference"
    if naming is not None and (naming.strip or naming.add):
        adapter.spelling |= {"strip": naming.strip, "add": naming.add}
    rename = naming or Naming()
    for target, delta in deltas.items():
        path = rename(target.module)
        if naming is not None and base is not None and target.parameter == "weight":
            known = base.by_path.get(path)
            if known is None or (target.rows is None and not alike(known.canonical, delta.shape)):
                there = [f"there it is {known.canonical}"] if known else []
                adapter.findings.append(
                    warning("unknown-module", path, f"{base.name} has no such module of this shape", f"{delta.shape}", *there)
                )
        for rows, piece in _apart(delta, told.get(target.module)):
            adapter.deltas[target._replace(module=path, rows=rows or target.rows)] = piece


def _find_base(
    adapter: Adapter, shapes: Mapping[str, tuple[int, ...]], stated: str | None, base: Base | None
) -> tuple[Base | None, Naming | None]:
    """The base, named on the adapter, and how its names follow from these; (.., None) where they do not."""
    if base is not None:
        adapter.base = BaseHint(base.name, 1.0, ("named by the user", *base.evidence), True)
    else:
        hints = recognise(shapes, stated=stated) if shapes else []
        adapter.base = hints[0] if hints else (BaseHint(stated, 0.9, ("base_model_name_or_path",), True) if stated else None)
        name = inventory.resolve(adapter.base.name) if adapter.base is not None else None
        base = None if name is None else inventory.load(name)
    return base, None if base is None or not shapes else _naming(base, shapes)


def _naming(base: Base, shapes: Mapping[str, tuple[int, ...]]) -> Naming | None:
    """The change of prefix under which most of these modules are the base's, with their shapes; None when half of them are not."""
    probe = max(shapes, key=lambda path: path.count("."))
    options = [Naming()]
    words = probe.split(".")
    for cut in range(min(4, len(words) - 1)):
        tail = ".".join(words[cut:])
        strip = probe[: len(probe) - len(tail)]
        options += [Naming(strip, path[: len(path) - len(tail)]) for path in base.by_path if path == tail or path.endswith("." + tail)]
    best, count = None, 0
    for option in dict.fromkeys(options):
        hits = sum(
            path.startswith(option.strip) and (found := base.by_path.get(option(path))) is not None and _fits(found.canonical, shape)
            for path, shape in shapes.items()
        )
        if hits > count:
            best, count = option, hits
    return best if count * 2 >= len(shapes) else None


def _fits(weight: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """A delta of a whole weight, or (for parts of a fused one) of rows up to some row."""
    return alike(weight, shape) or (weight[1:] == shape[1:] and shape[0] <= weight[0])


def take_extras(adapter: Adapter, member: Member) -> None:
    """Tensors that are no factors: saved modules, biases and trained token rows, under the base's names."""
    naming = Naming(adapter.spelling.get("strip", ""), adapter.spelling.get("add", ""))
    for kind, tensors in (
        (ExtraKind.SAVED_MODULE, member.names.saved), (ExtraKind.BIAS, member.names.biases_saved), (ExtraKind.OTHER, member.names.tokens),
    ):  # fmt: skip
        adapter.extras += [Extra(kind, naming(member.path(path)), tensor) for path, tensor in tensors.items()]


def explain(adapter: Adapter, member: Member) -> None:
    """Findings about what was missing or beside the adapter, and the conditions under which its deltas hold."""
    subject, config, names = member.file.name, member.config, member.names
    if config is None:
        scale = "unknown" if any(delta.scale is None for delta in adapter.deltas.values()) else "as given"
        adapter.findings.append(
            warning(
                "config-missing", subject, f"no {peft_config.FILE} beside it: everything but the scale follows from the tensors (scale {scale})",
                "converting to peft writes a new one; give --alpha (trainers often use 16 or 32, but only the trainer knows)",
            )
        )  # fmt: skip
    if names.base:
        adapter.findings.append(
            info(
                "base-weights-beside", subject, f"a training checkpoint: {len(names.base)} tensors are the base's own weights and are left out",
                "such as " + ", ".join(names.base[:3]),
            )
        )  # fmt: skip
    if names.tokens:
        adapter.findings.append(
            info("trained-tokens", subject, "rows of an embedding that PEFT puts in place of the base's", *(name.removesuffix(TOKENS) for name in names.tokens))
        )  # fmt: skip
    if config is None:
        return
    if config.get("enable_lora") is not None:
        adapter.findings.append(
            warning("old-form", subject, "a MergedLinear adapter of PEFT before 0.3, which today's PEFT does not load", "enable_lora in the config")
        )  # fmt: skip
    for reason in peft_config.conditions(config):
        if reason not in adapter.conditions:
            adapter.conditions.append(reason)
            adapter.findings.append(warning("condition", subject, reason))
    _check_ranks(adapter, member)


def _check_ranks(adapter: Adapter, member: Member) -> None:
    config = member.config or {}
    wrong = []
    for module, roles in member.names.factors.items():
        down = roles.get("lora_A", roles.get("lora_embedding_A"))
        r = peft_config.patterned(config.get("rank_pattern"), module, peft_config.number(config, "r"))
        if (
            down is None
            or r is None
            or config.get("enable_lora")
            or config.get("target_parameters")
            or config.get("peft_type") == "ADALORA"
        ):
            continue
        if down.shape[0] != r:
            wrong.append(f"{module}: {down.shape[0]}, config {r:g}")
    if wrong:
        adapter.findings.append(
            warning("rank-differs", member.file.name, f"{len(wrong)} modules have another rank than the config says; PEFT will not load them", wrong[0])
        )  # fmt: skip


def take_slices(metadata: dict[str, str]) -> Slices:
    """The note about slices in a file's metadata, removed from it; {} when there is none of that form."""
    try:
        value = json.loads(metadata.pop(SLICES_KEY, "{}"))
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _apart(delta: Delta, told: Any) -> Sequence[tuple[tuple[int, int] | None, Delta]]:
    """(rows, delta) of the slices a note tells of; [(None, delta)] where there is no note or the factors do not bear it out."""
    whole: list[tuple[tuple[int, int] | None, Delta]] = [(None, delta)]
    if not isinstance(told, list) or not told:
        return whole
    if not all(isinstance(piece, list) and len(piece) == 5 and all(type(value) is int for value in piece[:4]) for piece in told):
        return whole
    spans: list[tuple[int, int]] = []
    notes: list[list[float | None] | None] = []
    at = 0
    for low, high, first, last, alpha in sorted(told, key=lambda piece: piece[:4]):
        if not at <= low < high <= delta.shape[0]:
            return whole
        if low > at:
            spans.append((at, low))
            notes.append(None)
        spans.append((low, high))
        notes.append([first, last, alpha])
        at = high
    if at < delta.shape[0]:
        spans.append((at, delta.shape[0]))
        notes.append(None)
    pieces = unjoin(delta, spans, notes)
    if pieces is None:
        return whole
    return [(span, piece) for span, piece in zip(spans, pieces, strict=True) if piece is not None]
