"""PEFT: a folder with `adapter_model.safetensors` (or `.bin`) and `adapter_config.json`.

Source: huggingface/peft src/peft/utils/save_and_load.py, src/peft/tuners/lora/*.py. The module names are those of the model PEFT was
given; a pipeline's UNet or transformer is saved by itself, without its component's name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from upparam.adapter import Adapter, BaseHint, Extra, ExtraKind, Target
from upparam.algorithms.base import Delta
from upparam.algorithms.lora import LoRA
from upparam.algorithms.slicing import unjoin
from upparam.bases import inventory
from upparam.bases.base import Base
from upparam.bases.layouts import layout
from upparam.bases.recognise import recognise
from upparam.containers.base import TensorFile
from upparam.dialects import peft_config
from upparam.dialects.base import Bundle, Match, NamedTensors, Package, ReadOptions
from upparam.dialects.peft_names import WRAPPER, Sorted, is_checkpoint, part_of, sort
from upparam.dialects.placing import alike, base_of, to_foreign
from upparam.errors import DeadAdapterError, MalformedError, NotAnAdapterError, RefusedError
from upparam.findings import error, info, warning
from upparam.tensors import Tensor

WEIGHTS = "adapter_model.safetensors"
REFUSED_TYPES = {
    "PROMPT_TUNING": "prompt tuning", "MULTITASK_PROMPT_TUNING": "multitask prompt tuning", "P_TUNING": "p-tuning", "PREFIX_TUNING": "prefix tuning",
    "ADAPTION_PROMPT": "LLaMA-Adapter prompts", "CPT": "context-aware prompt tuning", "TRAINABLE_TOKENS": "trainable tokens",
}  # fmt: skip
"""peft types that change no weight: virtual tokens and the like."""
_COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "prior")


class Peft:
    """The dialect; see the module's docstring."""

    name = "peft"
    title = "PEFT adapter (adapter_model + adapter_config.json)"
    writable = True

    def match(self, file: TensorFile) -> Match | None:
        """By names: `base_model.model.<module>.lora_A.weight` and the like. Factors among base weights (a training checkpoint) count less."""
        parts = {name: part for name in file.tensors if (part := part_of(name)) is not None}
        if not parts:
            return None
        wrapped = sum(part.wrapped for part in parts.values())
        rest = [name for name in file.tensors if name not in parts]
        example = next(iter(parts))
        evidence = [f"{len(parts)} of {len(file.tensors)} names are <module>.<factor> as PEFT spells them, such as {example}"]
        if is_checkpoint(rest, [part.module for part in parts.values()]):
            evidence.append(f"beside {len(rest)} of the base's own weights: a training checkpoint that holds an adapter")
            return Match(self.name, 0.9 if wrapped else 0.7, tuple(evidence))
        if wrapped == len(parts):
            evidence.append(f"all under {WRAPPER}")
            return Match(self.name, 0.97, tuple(evidence))
        if any(part.module.split(".", 1)[0] in ("diffusion_model", "lora_unet") for part in parts.values()):
            return None
        return Match(self.name, 0.75, (*evidence, f"without {WRAPPER} in front"))

    def gather(self, file: TensorFile, siblings: Sequence[TensorFile]) -> list[TensorFile]:
        """One file is one adapter; its config lies beside it."""
        return [file]

    def read(self, bundle: Bundle, options: ReadOptions) -> Adapter:
        """The adapter; without a config one whose scale is unknown unless `options` says it.

        Raises DeadAdapterError where no module has both factors, NotAnAdapterError for prompt tuning and the like.
        """
        file = bundle.main
        config = bundle.side_json(peft_config.FILE)
        _refuse_prompts(file, config)
        metadata = dict(file.metadata)
        told = _take_slices(metadata)
        adapter = Adapter({}, self.name, metadata=metadata, config=config or {}, files=(str(file.path),), findings=list(file.findings))
        if config is not None and config.get("fan_in_fan_out") is not None:
            adapter.transposed_base = True if config["fan_in_fan_out"] else None
        names = sort(file.tensors)
        _note_spelling(adapter, names)
        deltas = _deltas(adapter, names, config, options, file)
        if not deltas:
            raise DeadAdapterError(
                "no module has both its lora_A and its lora_B", file=file.path, found=", ".join(list(file.tensors)[:3]),
                remedy="look for the other factor where this file came from",
            )  # fmt: skip
        _place(adapter, deltas, told, config, options)
        _extras(adapter, names, config)
        _explain(adapter, names, config, file)
        return adapter

    def write(self, adapter: Adapter, options: Mapping[str, Any]) -> Package:
        """`adapter_model.safetensors` and a complete `adapter_config.json`. Raises RefusedError for what PEFT has no place for."""
        base = base_of(adapter, options)
        deltas = _whole(adapter, base)
        component, renamed = _without_component(deltas)
        saved, biases, problems = peft_config.extras_by_kind(adapter)
        tensors: dict[str, Tensor] = {}
        names: dict[str, Delta] = {}
        for target, delta in deltas.items():
            module = renamed[target]
            try:
                tensors |= {f"{WRAPPER}{module}.{word}": tensor for word, tensor in _spelled(target, delta).items()}
                delta.known_scale()
            except RefusedError as problem:
                problems.append(f"{target}: {problem.message}")
                continue
            names[module] = delta
        if problems:
            raise RefusedError(
                f"{len(problems)} things that {self.name} cannot hold", tensor=problems[0].split(": ")[0],
                found="; ".join(problems[:8]) + (" ..." if len(problems) > 8 else ""), remedy=_remedy(problems),
            )  # fmt: skip
        for extra in adapter.extras:
            tensors[f"{WRAPPER}{_bare(extra.name, component)}"] = extra.tensor
        saved = [_bare(name, component) for name in saved]
        biases = [_bare(name, component) for name in biases]
        config = adapter.config
        if not peft_config.still_true(config, names, saved, adapter.transposed_base):
            config = peft_config.made(adapter, names, saved, biases, _of_component(base, component))
        metadata = {"format": "pt", **adapter.metadata}
        if slices := _slices(adapter, deltas, renamed):
            metadata[SLICES_KEY] = json.dumps(slices, separators=(",", ":"))
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        return Package({WEIGHTS: NamedTensors(tensors, metadata), peft_config.FILE: text.encode()})


def _refuse_prompts(file: TensorFile, config: Mapping[str, Any] | None) -> None:
    kind = (config or {}).get("peft_type")
    if kind in REFUSED_TYPES:
        raise NotAnAdapterError(
            f"{REFUSED_TYPES[kind]} learns inputs, not changes of weights: it cannot be converted or merged",
            file=file.path,
            found=f"peft_type {kind}",
        )


def _note_spelling(adapter: Adapter, names: Sorted) -> None:
    if names.adapter:
        adapter.spelling["adapter"] = names.adapter


def _deltas(
    adapter: Adapter, names: Sorted, config: Mapping[str, Any] | None, options: ReadOptions, file: TensorFile
) -> dict[Target, Delta]:
    """Deltas by the path PEFT gives their module. Factors that make none go to the leftovers with a finding."""
    found: dict[Target, Delta] = {}
    for module, roles in names.factors.items():
        try:
            made = _delta(module, roles, config, options)
        except MalformedError as problem:
            raise MalformedError(
                problem.message, file=file.path, tensor=module, expected=problem.expected, found=problem.found, remedy=problem.remedy
            ) from None
        if made:
            found |= made
        else:
            adapter.leftovers |= {_original(module, role, names): tensor for role, tensor in roles.items()}
            adapter.findings.append(error("orphan", module, "factors that make no delta", ", ".join(roles)))
    for module, bias in names.biases.items():
        adapter.leftovers[f"{module}.lora_B.bias"] = bias
        adapter.findings.append(warning("lora-bias", module, "a bias of lora_B, which upparam does not carry"))
    for word, tensor in names.shared.items():
        adapter.leftovers[word] = tensor
    return found


def _original(module: str, role: str, names: Sorted) -> str:
    return f"{WRAPPER if names.wrapped else ''}{module}.{role}"


def _delta(module: str, roles: Mapping[str, Tensor], config: Mapping[str, Any] | None, options: ReadOptions) -> dict[Target, Delta]:
    """The deltas of one module; {} where the factors make none that is known."""
    if roles.keys() == {"lora_embedding_A", "lora_embedding_B"}:
        down, up = roles["lora_embedding_B"].T, roles["lora_embedding_A"].T
        scaling = peft_config.scaling_of(config, module, down.shape[0], options)
        return {Target(module): LoRA(up, down, scaling, embedding=True)}
    if roles.keys() == {"lora_A", "lora_B"}:
        up, down = roles["lora_B"], roles["lora_A"]
        enabled = (config or {}).get("enable_lora")
        if isinstance(enabled, list) and up.shape[1] != down.shape[0]:
            return _merged_linear(module, up, down, enabled, config, options)
        return {Target(module): LoRA(up, down, peft_config.scaling_of(config, module, down.shape[0], options))}
    return {}


def _merged_linear(
    module: str, up: Tensor, down: Tensor, enabled: Sequence[Any], config: Mapping[str, Any] | None, options: ReadOptions
) -> dict[Target, Delta]:
    """PEFT before 0.3 adapted parts of a fused weight: of len(enabled) equal blocks of rows each enabled one has its own up and down.

    Source: huggingface/peft v0.2.0 src/peft/tuners/lora.py MergedLinear (zero_pad, conv1d with groups).
    """
    groups = sum(value is True for value in enabled)
    if not groups or down.shape[0] % groups or up.shape[0] % groups or up.shape[1] * groups != down.shape[0]:
        raise MalformedError(
            "the factors do not fit enable_lora", expected=f"{groups} groups of equal rank", found=f"lora_A {down.shape}, lora_B {up.shape}"
        )
    rank, rows = down.shape[0] // groups, up.shape[0] // groups
    found: dict[Target, Delta] = {}
    for group, block in enumerate(index for index, value in enumerate(enabled) if value is True):
        scaling = peft_config.scaling_of(config, module, rank, options)
        piece = LoRA(up.rows(group * rows, (group + 1) * rows), down.rows(group * rank, (group + 1) * rank), scaling)
        found[Target(module, (block * rows, (block + 1) * rows))] = piece
    return found


@dataclass(frozen=True)
class _Naming:
    """How PEFT's paths become the base's: `strip` off the front, `add` in its place."""

    strip: str = ""
    add: str = ""

    def __call__(self, path: str) -> str:
        return self.add + path.removeprefix(self.strip)


def _place(adapter: Adapter, deltas: Mapping[Target, Delta], told: Slices, config: Mapping[str, Any] | None, options: ReadOptions) -> None:
    """Name the base and put each delta under its reference target; names that no base explains stay as they are."""
    shapes: dict[str, tuple[int, ...]] = {}
    for target, delta in deltas.items():
        high = max(target.rows[1] if target.rows else delta.shape[0], shapes.get(target.module, (0,))[0])
        shapes[target.module] = (high, *delta.shape[1:])
    stated = (config or {}).get("base_model_name_or_path")
    stated = stated if isinstance(stated, str) and stated else None
    naming: _Naming | None = None
    base: Base | None = options.base
    if base is not None:
        adapter.base = BaseHint(base.name, 1.0, ("named by the user", *base.evidence), True)
        naming = _naming(base, shapes)
    else:
        hints = recognise(shapes, stated=stated)
        adapter.base = hints[0] if hints else (BaseHint(stated, 0.9, ("base_model_name_or_path",), True) if stated else None)
        name = inventory.resolve(adapter.base.name) if adapter.base is not None else None
        if name is not None:
            base = inventory.load(name)
            naming = _naming(base, shapes)
    adapter.layout = "peft" if naming is None else "reference"
    if naming is not None and (naming.strip or naming.add):
        adapter.spelling |= {"strip": naming.strip, "add": naming.add}
    for target, delta in deltas.items():
        if naming is None or base is None:
            for rows, piece in _apart(delta, told.get(target.module)):
                adapter.deltas[Target(target.module, rows or target.rows)] = piece
            continue
        path = naming(target.module)
        known = base.by_path.get(path)
        if known is None or (target.rows is None and not alike(known.canonical, delta.shape)):
            adapter.findings.append(
                warning(
                    "unknown-module",
                    path,
                    f"{base.name} has no such module of this shape",
                    f"{delta.shape}",
                    *([f"there it is {known.canonical}"] if known else []),
                )
            )
        for rows, piece in _apart(delta, told.get(target.module)):
            adapter.deltas[Target(path, rows or target.rows)] = piece


def _naming(base: Base, shapes: Mapping[str, tuple[int, ...]]) -> _Naming | None:
    """The change of prefix under which most of these modules are the base's, with their shapes; None when half of them are not."""
    probe = max(shapes, key=lambda path: path.count("."))
    options = [_Naming()]
    words = probe.split(".")
    for cut in range(min(4, len(words) - 1)):
        tail = ".".join(words[cut:])
        strip = probe[: len(probe) - len(tail)]
        options += [_Naming(strip, path[: len(path) - len(tail)]) for path in base.by_path if path == tail or path.endswith("." + tail)]
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


def _extras(adapter: Adapter, names: Sorted, config: Mapping[str, Any] | None) -> None:
    """Tensors that are no factors: saved modules and biases, under the base's names."""
    naming = _Naming(adapter.spelling.get("strip", ""), adapter.spelling.get("add", ""))
    bias = (config or {}).get("bias")
    targets = {target.module for target in adapter.deltas}
    listed = tuple((config or {}).get("modules_to_save") or ())
    for path, tensor in names.saved.items():
        renamed = naming(path)
        module, _, parameter = renamed.rpartition(".")
        is_bias = parameter == "bias" and not any(module.endswith(word) for word in listed)
        if is_bias and (bias in ("all", "lora_only") or (config is None and module in targets)):
            adapter.extras.append(Extra(ExtraKind.BIAS, renamed, tensor))
        else:
            adapter.extras.append(Extra(ExtraKind.SAVED_MODULE, renamed, tensor))


def _explain(adapter: Adapter, names: Sorted, config: Mapping[str, Any] | None, file: TensorFile) -> None:
    """Findings about what was missing or beside the adapter."""
    subject = file.name
    if config is None:
        scale = "unknown" if any(delta.scale is None for delta in adapter.deltas.values()) else "as given"
        adapter.findings.append(
            warning(
                "config-missing", subject, f"no {peft_config.FILE} beside it: everything but the scale follows from the tensors (scale {scale})",
                "converting to peft writes a new one; give --alpha (trainers often use 16 or 32, but only the trainer knows)",
            )
        )  # fmt: skip
    elif (config.get("enable_lora")) is not None:
        adapter.findings.append(
            warning(
                "old-form",
                subject,
                "a MergedLinear adapter of PEFT before 0.3, which today's PEFT does not load",
                "enable_lora in the config",
            )
        )
    if names.base:
        adapter.findings.append(
            info(
                "base-weights-beside", subject, f"a training checkpoint: {len(names.base)} tensors are the base's own weights and are left out",
                f"such as {names.base[0]}",
            )
        )  # fmt: skip
    if config is not None:
        _check_ranks(adapter, config, subject)


def _check_ranks(adapter: Adapter, config: Mapping[str, Any], subject: str) -> None:
    strip, add = adapter.spelling.get("strip", ""), adapter.spelling.get("add", "")
    wrong = []
    for target, delta in adapter.deltas.items():
        path = strip + target.module.removeprefix(add)
        r = peft_config.patterned(config.get("rank_pattern"), path, peft_config.number(config, "r"))
        if target.rows is None and r is not None and delta.rank is not None and r != delta.rank and delta.algorithm in ("lora", "dora"):
            wrong.append(f"{path}: {delta.rank}, config {r:g}")
    if wrong:
        adapter.findings.append(
            warning(
                "rank-differs", subject, f"{len(wrong)} modules have another rank than the config says; PEFT will not load them", wrong[0]
            )
        )


def _whole(adapter: Adapter, base: Base | None) -> dict[Target, Delta]:
    """The adapter's deltas on whole modules: slices of a fused weight joined."""
    if adapter.layout not in ("reference", "peft", "diffusers"):
        raise RefusedError(
            "peft needs the module names of the base, and the base is not known",
            file=adapter.files[0] if adapter.files else None, found=f"names in layout {adapter.layout}", remedy="name it with --base",
        )  # fmt: skip
    if not any(target.rows for target in adapter.deltas):
        return dict(adapter.deltas)
    if base is None:
        raise RefusedError(
            "parts of fused weights are joined by the base's shapes, and the base is not known",
            file=adapter.files[0] if adapter.files else None, tensor=str(next(iter(adapter.deltas))), remedy="name it with --base",
        )  # fmt: skip
    return {Target(module): delta for module, delta in to_foreign(layout(base, "reference"), adapter.deltas).items()}


SLICES_KEY = "upparam.slices"
"""Metadata that says which rows and ranks of a module's factors were deltas of their own: {module: [[row, row, rank, rank, alpha], ...]}."""
Slices = dict[str, list[list[float | None]]]


def _slices(adapter: Adapter, whole: Mapping[Target, Delta], names: Mapping[Target, str]) -> Slices:
    """How the joined modules were made, so that reading gives the slices back bit for bit."""
    found: Slices = {}
    for target, delta in adapter.deltas.items():
        if target.rows is not None and type(delta) is LoRA:
            found.setdefault(names[Target(target.module)], []).append([*target.rows, 0, delta.rank, delta.alpha])
    for target, delta in whole.items():
        pieces = found.get(names[target], [])
        if pieces and delta.rank == sum(int(piece[3] or 0) for piece in pieces) and len(pieces) > 1:
            at = 0
            for piece in sorted(pieces, key=lambda piece: piece[0] or 0):
                piece[2:4] = [at, at + int(piece[3] or 0)]
                at = int(piece[3] or 0)
    return found


def _take_slices(metadata: dict[str, str]) -> Slices:
    """The note of `_slices` in a file's metadata, removed from it; {} when there is none of that form."""
    try:
        value = json.loads(metadata.pop(SLICES_KEY, "{}"))
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _apart(delta: Delta, told: Any) -> list[tuple[tuple[int, int] | None, Delta]]:
    """(rows, delta) of the slices a note tells of; [(None, delta)] where there is no note or the factors do not bear it out."""
    whole: list[tuple[tuple[int, int] | None, Delta]] = [(None, delta)]
    if not isinstance(told, list) or not told:
        return whole
    if not all(isinstance(piece, list) and len(piece) == 5 and all(type(value) is int for value in piece[:4]) for piece in told):
        return whole
    spans: list[tuple[int, int]] = []
    notes: list[list[float | None] | None] = []
    at = 0
    for low, high, first, last, alpha in sorted(told):
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


def _without_component(deltas: Mapping[Target, Delta]) -> tuple[str, dict[Target, str]]:
    """(the one component of a pipeline these targets are in, or '', PEFT's name of each target's module).

    Raises RefusedError for several components: PEFT saves one model a folder.
    """
    heads = {target.module.split(".", 1)[0] for target in deltas}
    components = sorted(head for head in heads if head in _COMPONENTS and head != "transformer")
    if "transformer" in heads and any(".transformer_blocks." in t.module or t.module.startswith("transformer.blocks.") for t in deltas):
        components.append("transformer")
    if len(components) > 1 or (components and len(heads) > 1):
        raise RefusedError(
            "PEFT saves one model a folder, and this adapter changes several",
            found=", ".join(sorted(heads)),
            remedy="leave all but one out first",
        )
    component = components[0] if components else ""
    return component, {target: _bare(target.module, component) for target in deltas}


def _bare(path: str, component: str) -> str:
    return path.removeprefix(f"{component}.") if component else path


def _of_component(base: Base | None, component: str) -> Base | None:
    """The base's modules of one component, under their own names."""
    if base is None or not component:
        return base
    prefix = f"{component}."
    modules = tuple(module._replace(path=module.path[len(prefix) :]) for module in base.modules if module.path.startswith(prefix))
    return replace(base, modules=modules)


def _spelled(target: Target, delta: Delta) -> dict[str, Tensor]:
    """A delta's factors by PEFT's words."""
    if target.parameter != "weight":
        raise RefusedError(f"a delta of the {target.parameter}")
    if type(delta) is not LoRA:
        raise RefusedError(f"a {delta.algorithm} delta")
    if delta.mid is not None:
        raise RefusedError("a Tucker core")
    if delta.embedding:
        return {"lora_embedding_A": delta.up.T, "lora_embedding_B": delta.down.T}
    return {"lora_A.weight": delta.down, "lora_B.weight": delta.up}


def _remedy(problems: Sequence[str]) -> str:
    kinds = [kind.value for kind in ExtraKind if any(problem.startswith(f"{kind.value} ") for problem in problems)]
    if kinds:
        return "give up extras with " + " ".join(f"--drop {kind}" for kind in kinds)
    if any("scale" in problem for problem in problems):
        return "give the scale with --alpha or --scale"
    return "convert to a dialect that holds them ('upparam dialects')"


dialect = Peft()
