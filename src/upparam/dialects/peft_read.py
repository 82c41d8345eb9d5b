"""Reading PEFT: from a saved model's tensors and config to deltas under the base's names, extras, and what is worth saying."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from upparam.adapter import Adapter, BaseHint, Extra, ExtraKind, Target
from upparam.algorithms.base import Delta, fits_weight
from upparam.algorithms.oft import OFT
from upparam.algorithms.slicing import unjoin
from upparam.bases import inventory
from upparam.bases.base import Base
from upparam.bases.recognise import recognise
from upparam.containers.base import TensorFile
from upparam.dialects import peft_config, up_bias
from upparam.dialects.base import ReadOptions
from upparam.dialects.peft_check import contradictions, magnitudes_missing
from upparam.dialects.peft_experts import parameter_deltas
from upparam.dialects.peft_kinds import deltas_of
from upparam.dialects.peft_names import TOKENS, WRAPPER, Sorted
from upparam.dialects.peft_projections import drawn
from upparam.dialects.placing import alike
from upparam.dialects.prefixes import Naming, change, contested
from upparam.errors import MalformedError
from upparam.findings import Finding, error, info, warning
from upparam.tensors import Tensor
from upparam.wording import counted

SLICES_KEY = "upparam.slices"
"""Metadata that says which rows and ranks of a module's factors were deltas of their own: {module: [[row, row, rank, rank, alpha], ...]}."""
Slices = dict[str, list[list[float | None]]]
_VERA_ROLES = {"vera_lambda_b", "vera_lambda_d"}


@dataclass(frozen=True)
class Member:
    """One saved model: its file, its config (None when it is missing) and its names, and the pipeline's component it is ('' when alone)."""

    file: TensorFile
    config: Mapping[str, Any] | None
    names: Sorted
    component: str = ""

    def original(self, module: str, role: str) -> str:
        """About the name a factor had in the file."""
        return f"{WRAPPER if self.names.wrapped else ''}{module}.{role}"


def take_deltas(adapter: Adapter, member: Member, options: ReadOptions) -> dict[Target, Delta]:
    """Deltas by the path PEFT gives their module. Factors that make none go to the leftovers with a finding."""
    found, taken = parameter_deltas(member.names.factors, member.config, options)
    names = _with_projections(adapter, member, options)
    for module, roles in member.names.factors.items():
        if module in taken:
            continue
        try:
            made = deltas_of(module, roles, member.config, options, names)
        except MalformedError as problem:
            raise MalformedError(
                problem.message, file=member.file.path, tensor=module, expected=problem.expected, found=problem.found, remedy=problem.remedy
            ) from None
        if not isinstance(made, str) and made:
            found |= made
            continue
        adapter.leftovers |= {member.original(module, role): tensor for role, tensor in roles.items()}
        told = isinstance(made, str)
        adapter.findings.append(error("cannot-tell", module, str(made), ", ".join(roles)) if told else _why_none(member, module, roles))
    for module, bias in member.names.biases.items():
        beside = up_bias.change_of(found.get(Target(module)), bias)
        if beside is not None:
            found[Target(module, parameter="bias")] = beside
            continue
        adapter.leftovers[member.original(module, up_bias.WORD)] = bias
        adapter.findings.append(
            error("lora-bias", module, "a bias of lora_B beside no plain LoRA of as many outputs, where PEFT has none", f"{bias.shape}")
        )
    if not any(delta.algorithm == "vera" for delta in found.values()):
        adapter.leftovers |= member.names.shared
    adapter.leftovers |= member.names.unknown
    return found


def _with_projections(adapter: Adapter, member: Member, options: ReadOptions) -> Sorted:
    """The member's names; of a VeRA saved without its projections with those that PEFT would draw, where the base is known."""
    outs = {module: roles["vera_lambda_b"].shape[0] for module, roles in member.names.factors.items() if roles.keys() == _VERA_ROLES}
    if not outs or member.names.shared:
        return member.names
    stated = (member.config or {}).get("base_model_name_or_path")
    known = inventory.resolve(stated) if isinstance(stated, str) and options.base is None else None
    found = drawn(member.config, outs, options.base if known is None else inventory.load(known), member.component)
    if isinstance(found, str):
        adapter.findings.append(error("projections-missing", member.file.name, found))
        return member.names
    adapter.findings.append(
        info(
            "projections-drawn", member.file.name, "vera_A and vera_B are not in the file (save_projection was false) and are drawn as PEFT does",
            f"projection_prng_key {(member.config or {}).get('projection_prng_key')}", *(f"{name} {tensor.shape}" for name, tensor in found.items()),
            "PyTorch does not promise the same numbers in every version; those up to 2.x are these",
        )
    )  # fmt: skip
    return replace(member.names, shared=found)


def _why_none(member: Member, module: str, roles: Mapping[str, Tensor]) -> Finding:
    if peft_config.of_parameters(member.config, module):
        listed = ", ".join(peft_config.words(member.config, "target_parameters"))
        return error("parameter-unknown", module, "factors of a bare parameter, and of which one the file does not say", f"one of {listed}")
    return error("orphan", module, "factors that make no delta", ", ".join(roles))


def naming_of(adapter: Adapter, component: str = "") -> Naming | None:
    """How an adapter read from PEFT was named there; None for one from elsewhere or of no known base."""
    said = adapter.spelling.get(f"names:{component}")
    if not said or adapter.dialect != "peft":
        return None
    strip, add, *kept = json.loads(said)
    return Naming(strip, add, tuple(kept))


def place(adapter: Adapter, found: Sequence[tuple[Member, Mapping[Target, Delta]]], options: ReadOptions) -> None:
    """Name the base and put each delta under its reference target; names that no base explains stay as they are."""
    shapes = {member.component: _shapes(deltas) for member, deltas in found}
    base = _find_base(adapter, shapes, found[0][0].config or {}, options.base)
    namings = {component: None if base is None else change(base, own, component) for component, own in shapes.items()}
    resolved = base is not None and all(namings.values()) and not contested(adapter.base, shapes, namings)
    adapter.layout = "reference" if resolved else "peft"
    for member, deltas in found:
        naming = namings[member.component] if resolved else None
        if naming is not None:
            names = member.names
            paths = (*(target.module for target in deltas), *names.saved, *names.biases_saved, *names.tokens)
            kept = [path for path in paths if not path.startswith(naming.strip)]
            adapter.spelling[f"names:{member.component}"] = json.dumps([naming.strip, naming.add, *kept])
        rename = naming or Naming(add=f"{member.component}." if member.component else "")
        told = take_slices(dict(member.file.metadata))
        for target, delta in deltas.items():
            path = rename(target.module)
            if resolved and base is not None and target.parameter == "weight":
                known = base.by_path.get(path)
                if known is not None and target.rows is None and fits_weight(delta.shape, known.canonical):
                    delta = delta.for_weight(known.canonical)
                if known is None or (target.rows is None and not alike(known.canonical, delta.shape)):
                    there = [f"there it is {known.canonical}"] if known else []
                    adapter.findings.append(
                        warning("unknown-module", path, f"{base.name} has no such module of this shape", f"{delta.shape}", *there)
                    )
            for rows, piece in _apart(delta, told.get(target.module)):
                adapter.deltas[target._replace(module=path, rows=rows or target.rows)] = piece


def _shapes(deltas: Mapping[Target, Delta]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for target, delta in deltas.items():
        if target.parameter == "weight":
            high = max(target.rows[1] if target.rows else delta.shape[0], shapes.get(target.module, (0,))[0])
            shapes[target.module] = (high, *delta.shape[1:])
    return shapes


def _find_base(
    adapter: Adapter, shapes: Mapping[str, Mapping[str, tuple[int, ...]]], config: Mapping[str, Any], base: Base | None
) -> Base | None:
    """The base, named on the adapter: what the user says, else what the names, shapes and the config tell."""
    if base is not None:
        adapter.base = BaseHint(base.name, 1.0, ("named by the user", *base.evidence), True)
        return base
    stated = config.get("base_model_name_or_path")
    stated = stated if isinstance(stated, str) and stated else None
    everything = {f"{component}.{path}" if component else path: shape for component, own in shapes.items() for path, shape in own.items()}
    hints = recognise(everything, stated=stated) if everything else []
    adapter.base = hints[0] if hints else (BaseHint(stated, 0.9, ("base_model_name_or_path",), True) if stated else None)
    name = inventory.resolve(adapter.base.name) if adapter.base is not None else None
    return None if name is None else inventory.load(name)


def take_extras(adapter: Adapter, member: Member) -> None:
    """Tensors that are no factors: saved modules, biases and trained token rows, under the base's names."""
    naming = naming_of(adapter, member.component) or Naming(add=f"{member.component}." if member.component else "")
    for kind, tensors in (
        (ExtraKind.SAVED_MODULE, member.names.saved), (ExtraKind.BIAS, member.names.biases_saved), (ExtraKind.OTHER, member.names.tokens),
        (ExtraKind.TRAINING_AID, member.names.aids),
    ):  # fmt: skip
        adapter.extras += [Extra(kind, naming(path), tensor) for path, tensor in tensors.items()]


def explain(adapter: Adapter, member: Member) -> None:
    """Findings about what was missing or beside the adapter, and the conditions under which its deltas hold."""
    subject, config, names = member.file.name, member.config, member.names
    if names.others:
        adapter.findings.append(
            info(
                "other-adapters",
                subject,
                f"the file also holds the adapter{'s' if len(names.others) > 1 else ''} {', '.join(names.others)}",
            )
        )
    if config is None:
        unknown = any(delta.scale is None for delta in adapter.deltas.values())
        adapter.findings.append(
            warning(
                "config-missing", subject,
                f"no {peft_config.FILE} beside it: everything but the scale follows from the tensors (scale {'unknown' if unknown else 'as given'})",
                *(["'upparam assemble' writes a new one; give --alpha (often 16 or 32, but only who trained it knows)"] if unknown else []),
            )
        )  # fmt: skip
    untold = [target for target, delta in adapter.deltas.items() if isinstance(delta, OFT) and not delta.told]
    if untold:
        adapter.findings.append(
            error(
                "turns-unknown", subject, f"how the blocks of {counted(len(untold), 'target')} become turns is in no tensor",
                'say it in an adapter_config.json beside it, such as {"peft_type": "OFT", "oft_block_size": 32, "use_cayley_neumann": true, '
                '"num_cayley_neumann_terms": 5, "peft_version": "0.18.0", "coft": false, "block_share": false}',
            )
        )  # fmt: skip
    if names.base:
        adapter.findings.append(
            info(
                "base-weights-beside", subject, f"the base's own weights, as a training checkpoint holds them, are left out: {counted(len(names.base), 'tensor')}",
                "such as " + ", ".join(names.base[:3]),
            )
        )  # fmt: skip
    twice = next((name for name in member.file.tensors if name.startswith(WRAPPER * 2)), None)
    if twice is not None:
        adapter.findings.append(
            error("wrapped-twice", subject, f"names begin with {WRAPPER} twice: PEFT loads none of them", twice, "'upparam convert --to peft' writes the right names")
        )  # fmt: skip
    if names.tokens:
        adapter.findings.append(
            info("trained-tokens", subject, "rows of an embedding that PEFT puts in place of the base's", *(name.removesuffix(TOKENS) for name in names.tokens))
        )  # fmt: skip
    if names.aids:
        adapter.findings.append(
            info("training-aids", subject, f"{counted(len(names.aids), 'tensor')} with which PEFT trains on (VeLoRA, MonteCLoRA): nothing that it computes or merges depends on them", next(iter(names.aids)))
        )  # fmt: skip
    if config is None:
        return
    if config.get("enable_lora") is not None:
        adapter.findings.append(
            warning("old-form", subject, "a MergedLinear adapter of PEFT before 0.3, which today's PEFT does not load", "enable_lora in the config")
        )  # fmt: skip
    for reason in (*peft_config.conditions(config), *magnitudes_missing(config, names.factors)):
        adapter.hold_under(reason, subject)
    adapter.findings += contradictions(subject, config, names.factors)


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
