"""PEFT: a folder with `adapter_model.safetensors` (or `.bin`) and `adapter_config.json`.

Source: huggingface/peft src/peft/utils/save_and_load.py, src/peft/tuners/*. The module names are those of the model PEFT was given; a
pipeline's UNet or transformer is saved by itself, without its component's name. An adapter of several components is a folder with one
such folder for each (`unet/`, `text_encoder/`), and is read as one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from upparam.adapter import Adapter
from upparam.containers.base import TensorFile
from upparam.containers.side import read_json
from upparam.dialects import peft_config, peft_others, peft_shards
from upparam.dialects.base import Bundle, Match, Package, ReadOptions
from upparam.dialects.carried import carried
from upparam.dialects.peft_names import COMPONENTS, WRAPPER, Sorted, is_adalora, is_checkpoint, part_of, sort
from upparam.dialects.peft_projections import seeded
from upparam.errors import DeadAdapterError, MalformedError, NotAnAdapterError, Problem, RefusedError, UsageError
from upparam.patterns import regex

if TYPE_CHECKING:
    from upparam.dialects.peft_read import Member

# Every file is matched against this dialect, and few are of it: what reads and writes is imported when it does.

_BOTTLENECK = regex(r"\.adapters\.[^.]+\.adapter_(down|up)\.|\.adapter(_layer)?\.(down|up)(_proj|_sampler|_project)?\.")
"""Bottleneck adapters (adapter-hub/adapters src/adapters/methods/modeling.py): two projections with a non-linearity between them."""


class Peft:
    """The dialect; see the module's docstring."""

    name = "peft"
    title = "PEFT adapter (adapter_model + adapter_config.json)"
    writable = True

    @property
    def algorithms(self) -> tuple[str, ...]:
        """Those PEFT has a kind of adapter for, and whole changes of biases (those of up)."""
        from upparam.dialects.peft_kinds import PEFT_TYPES

        return (*PEFT_TYPES, "full")

    def match(self, file: TensorFile) -> Match | None:
        """By names: `base_model.model.<module>.lora_A.weight` and the like. Factors among base weights (a training checkpoint) count less."""
        bare = is_adalora(file.tensors)
        parts = {name: part for name in file.tensors if (part := part_of(name, bare)) is not None}
        if not parts:
            return self._other_kind(file)
        wrapped = sum(part.wrapped for part in parts.values())
        rest = [name for name in file.tensors if name not in parts]
        example = next(iter(parts))
        evidence = [f"{len(parts)} of {len(file.tensors)} names are <module>.<factor> as PEFT spells them, such as {example}"]
        if is_checkpoint(rest, parts.values()) and is_checkpoint(rest, parts.values(), peft_config.words(_config(file), "modules_to_save")):
            evidence.append(f"beside {len(rest)} of the base's own weights: a training checkpoint that holds an adapter")
            return Match(self.name, 0.9 if wrapped else 0.7, tuple(evidence))
        if wrapped == len(parts):
            evidence.append(f"all under {WRAPPER}")
            # One half alone may be a triad's file.
            halves = {part.role for part in parts.values()} >= {"lora_A", "lora_B"}
            return Match(self.name, 0.97, tuple(evidence), alone=halves and all(name.startswith(WRAPPER) for name in rest))
        if any(part.module.split(".", 1)[0] in ("diffusion_model", "lora_unet") for part in parts.values()):
            return None
        return Match(self.name, 0.95 if bare else 0.75, (*evidence, f"without {WRAPPER} in front"))

    def _other_kind(self, file: TensorFile) -> Match | None:
        """What PEFT saves beside low-rank adapters, so that `read` can say what it is."""
        if "prompt_embeddings" in file.tensors:
            return Match(self.name, 0.9, ("a tensor prompt_embeddings: virtual tokens, as PEFT saves them",))
        told = peft_others.by_names(file.tensors)
        if told is not None:
            return Match(self.name, 0.9, (f"names such as {told[1]}, as PEFT's {told[0]} has them",))
        bottleneck = next((name for name in file.tensors if _BOTTLENECK.search(name)), None)
        if bottleneck is not None:
            return Match(self.name, 0.6, (f"bottleneck adapter layers such as {bottleneck}",))
        if file.path.stem == "adapter_model":
            config = _config(file)
            if config is not None and isinstance(config.get("peft_type"), str):
                return Match(self.name, 0.7, (f"peft_type {config['peft_type']} in {peft_config.FILE} beside it",))
        return None

    def gather(self, file: TensorFile, siblings: Sequence[TensorFile]) -> list[TensorFile]:
        """One file is one adapter, or all parts of a sharded checkpoint are. Folders named for a pipeline's components are parts of one."""
        if file.path.parent.name not in COMPONENTS:
            return [file, *peft_shards.others(file, siblings)]
        others = {
            other.path.parent: other for other in siblings
            if other.path.parent.name in COMPONENTS and other.path.parent.parent == file.path.parent.parent and other.path.parent != file.path.parent
            and other.path.name == file.path.name and self.match(other) is not None
        }  # fmt: skip
        return [file, *others.values()]

    def read(self, bundle: Bundle, options: ReadOptions) -> Adapter:
        """The adapter; without a config one whose scale is unknown unless `options` says it.

        Raises DeadAdapterError where no module has both factors or the factors are empty, NotAnAdapterError for prompt tuning and the like, RefusedError for
        factors of a method upparam does not know.
        """
        from upparam.dialects.peft_read import explain, place, take_deltas, take_extras, take_slices

        members = [_member(file, bundle, options) for file in peft_shards.joined(bundle.files)]
        first = members[0]
        adapter = Adapter(
            {}, self.name, metadata=dict(first.file.metadata), config=dict(first.config or {}), files=tuple(str(file.path) for file in bundle.files),
            findings=[finding for member in members for finding in member.file.findings],
        )  # fmt: skip
        take_slices(adapter.metadata)
        found = [(member, take_deltas(adapter, member, options)) for member in members]
        if not any(deltas for _, deltas in found):
            _refuse_dead(first, adapter)
        if first.config is not None and first.config.get("fan_in_fan_out") is not None:
            adapter.transposed_base = True if first.config["fan_in_fan_out"] else None
        if first.names.adapter:
            adapter.spelling["adapter"] = first.names.adapter
        place(adapter, found, options)
        adapter.spelling["targets"] = str(len(adapter.deltas))
        for member in members:
            if member.component:
                adapter.spelling[f"config:{member.component}"] = json.dumps(member.config)
            take_extras(adapter, member)
            explain(adapter, member)
        return adapter

    def write(self, adapter: Adapter, options: Mapping[str, Any]) -> Package:
        """`adapter_model.safetensors` and a complete `adapter_config.json`, in one folder for each component where it changes several or the
        base is not known.

        Raises RefusedError for what PEFT has no place for.
        """
        from upparam.dialects.peft_write import by_component, outside, saved, whole
        from upparam.dialects.placing import base_of
        from upparam.dialects.refusing import refuse

        base = base_of(adapter, options)
        parts = by_component(adapter, whole(adapter, base), base)
        if not parts:
            raise RefusedError("PEFT saves no adapter without factors", file=adapter.files[0] if adapter.files else None)
        package = Package()
        problems: list[str | Problem] = [*outside(parts, adapter.extras)]
        for component, deltas in parts.items():
            made = saved(adapter, deltas, component, base, alone=len(parts) == 1)
            problems += made.problems
            # Where no base tells whose modules these are, the folder does.
            folder = f"{component}/" if component and (len(parts) > 1 or adapter.layout != "reference") else ""
            package.files |= {folder + name: content for name, content in made.files(carried(adapter, self.name, config=True)).items()}
        refuse(self.name, problems)
        if "" in parts and len(parts) > 1:
            raise RefusedError(
                "some targets are a pipeline's component's and some are not", tensor=str(next(iter(parts[""]))),
                found=", ".join(parts), remedy="name the base with --base",
            )  # fmt: skip
        return package


_HALVES = {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"}


def _refuse_dead(member: Member, adapter: Adapter) -> NoReturn:
    """Say why no module has a delta. Raises RefusedError for factors that upparam does not know, else DeadAdapterError."""
    from upparam.dialects.peft_kinds import METHODS

    why = next((finding for finding in adapter.findings if finding.code in ("projections-missing", "cannot-tell")), None)
    if why is not None and why.code == "projections-missing" and seeded(member.config):
        # Not dead: whoever names the base gets the projections.
        raise UsageError(why.message, file=member.file.path)
    if why is not None:
        raise DeadAdapterError(why.message, file=member.file.path, tensor=None if why.subject == member.file.name else why.subject)
    kind = str((member.config or {}).get("peft_type"))
    methods = [method for method in METHODS if kind in ("None", method.type)]
    known = {word for method in methods for word in method.roles | method.more}
    wanted = "both its lora_A and its lora_B"
    for module, roles in member.names.factors.items():
        if not roles.keys() <= _HALVES | known:
            raise RefusedError(
                "upparam does not know how these factors change a weight", file=member.file.path, tensor=module, found=", ".join(roles),
                remedy="merge the adapter with PEFT (merge_and_unload) and extract a LoRA from the result",
            )  # fmt: skip
        if not roles.keys() <= _HALVES:
            missing: list[list[str]] = [
                sorted(method.roles - roles.keys()) for method in methods if roles.keys() & (method.roles | method.more)
            ]
            least = min(missing, key=len, default=["partner"])
            wanted = f"its {' and '.join(least)}"
    raise DeadAdapterError(
        f"no module has {wanted}", file=member.file.path, found=", ".join(list(member.file.tensors)[:3]),
        remedy="look for the other factor where this file came from",
    )  # fmt: skip


def _config(file: TensorFile) -> dict[str, Any] | None:
    """The config beside a tensor file; None when there is none or it is no JSON object."""
    try:
        return read_json(file.path.parent / peft_config.FILE)
    except MalformedError:
        return None


def _config_of(file: TensorFile, folder: Path, adapter: str | None) -> dict[str, Any] | None:
    """The config of one adapter: of several in a file each but `default` has a folder of its own, where PEFT saves it."""
    shared = read_json(folder / peft_config.FILE)
    named = {part.adapter for name in file.tensors if (part := part_of(name)) is not None} if adapter is not None else set()
    if adapter is None or len(named) < 2 or Path(adapter).name != adapter:
        return shared
    return read_json(folder / adapter / peft_config.FILE) or (shared if adapter == "default" else None)


def _refuse_empty(file: TensorFile, names: Sorted) -> None:
    """Raise DeadAdapterError for a save that went wrong in one of the ways known: a file without tensors, or with factors of no elements."""
    if not file.tensors:
        raise DeadAdapterError(
            "the file holds no tensors: the adapter's weights were not saved", file=file.path,
            remedy="a training script that replaces the model's state_dict does this, or a save under DeepSpeed ZeRO-3; look for the factors in the "
            "run's checkpoint folders, or save again with save_pretrained",
        )  # fmt: skip
    factors = [tensor for roles in names.factors.values() for tensor in roles.values()]
    if factors and not any(tensor.numel for tensor in factors):
        raise DeadAdapterError(
            f"all {len(factors)} factors are empty (0 elements): DeepSpeed ZeRO-3 saved its placeholders", file=file.path,
            remedy="gather the weights with the checkpoint's zero_to_fp32.py, or save again with stage3_gather_16bit_weights_on_model_save",
        )  # fmt: skip


def _member(file: TensorFile, bundle: Bundle, options: ReadOptions) -> Member:
    from upparam.dialects.peft_kinds import KNOWN_TYPES
    from upparam.dialects.peft_read import Member

    own = file.path.parent
    component = own.name if own != bundle.folder and own.name in COMPONENTS else ""
    config = _config_of(file, own if component else bundle.folder, options.adapter)
    kind = (config or {}).get("peft_type")
    try:
        names = sort(
            file.tensors, peft_config.words(config, "modules_to_save"), None if config is None else config.get("bias") not in (None, "none"),
            options.adapter,
        )  # fmt: skip
    except UsageError as problem:
        problem.locate(file=file.path)
        raise
    told = peft_others.by_names(file.tensors) if kind is None else None
    if told is not None:
        peft_others.refuse(told[0], file.path, told[1])
    if "prompt_embeddings" in file.tensors and kind not in peft_others.OTHERS:
        peft_others.refuse("PROMPT_TUNING", file.path, "prompt_embeddings")
    if isinstance(kind, str) and kind not in KNOWN_TYPES:
        peft_others.refuse(kind, file.path, f"peft_type {kind}")
    if not names.factors and any(_BOTTLENECK.search(name) for name in file.tensors):
        raise NotAnAdapterError(
            "bottleneck adapters are layers with a non-linearity inside, not changes of weights: they cannot be converted or merged",
            file=file.path, found=next(name for name in file.tensors if _BOTTLENECK.search(name)),
        )  # fmt: skip
    _refuse_empty(file, names)
    return Member(file, config, names, component)


dialect = Peft()
