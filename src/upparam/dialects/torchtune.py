"""torchtune: `adapter_model.pt` (until December 2024 `adapter_<epoch>.pt`), `layers.0.attn.q_proj.lora_a.weight` (r, in), `.lora_b.weight` (out, r).

Sources: meta-pytorch/torchtune torchtune/modules/peft/{lora,dora}.py (the scale alpha / rank), torchtune/models/convert_weights.py and the
converters of the model families (names, rows), torchtune/training/checkpointing/_checkpointer.py (the files), recipes/lora_finetune_*.py
(adapter_config.json: r, lora_alpha). Llama, Mistral and Gemma have the rotary halves of q and k interleaved there, Qwen and Phi not, and
nothing in the adapter says which it is: the base does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from upparam.adapter import Adapter, BaseHint, Target
from upparam.algorithms import called
from upparam.algorithms.base import Delta, Scaling
from upparam.algorithms.dora import DoRA
from upparam.algorithms.lora import LoRA
from upparam.bases import inventory
from upparam.bases.base import Base
from upparam.bases.layouts import LayoutMap, find
from upparam.bases.layouts.gguf import config_of
from upparam.bases.layouts.torchtune import WORDS
from upparam.bases.recognise import recognise
from upparam.bases.unfused import lies, unfused
from upparam.containers.base import TensorFile
from upparam.dialects.agreeing import agreed, named
from upparam.dialects.base import Bundle, Match, Package, ReadOptions
from upparam.dialects.placing import Resolved, to_targets
from upparam.dialects.scale_beside import scale_beside
from upparam.errors import DeadAdapterError, MalformedError, RefusedError, UsageError
from upparam.findings import error, warning
from upparam.patterns import regex
from upparam.tensors import Tensor

CONFIG = "adapter_config.json"
_NAME = regex(
    r"(?:.+/)?((?:decoder\.|encoders?\.(?:\w+\.)*)?(?:layers\.\d+\.(?:fusion_layer\.)?(?:attn|mlp)\.[\w.]+|output))"
    r"\.(lora_a\.weight|lora_b\.weight|magnitude)"
)
_PEFT = ("adapter_model.safetensors", "adapter_model.bin")
"""What torchtune saves for PEFT beside its own file."""
_TOLD = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
"""What a config.json beside the adapter tells of its base."""
_LAYER = regex(r"layers\.(\d+)\.(.+)")


class Torchtune:
    """The dialect; read only: torchtune itself starts a training from such files, and everything else takes PEFT's."""

    name = "torchtune"
    title = "torchtune adapter (adapter_model.pt)"
    writable = False
    algorithms: tuple[str, ...] = ("lora", "dora")

    def match(self, file: TensorFile) -> Match | None:
        """Names `layers.<n>.<module>.lora_a.weight` and `.lora_b.weight`."""
        hits = [name for name in file.tensors if _NAME.fullmatch(name)]
        if not any(name.endswith((".lora_a.weight", ".lora_b.weight")) and "layers." in name for name in hits):
            return None
        evidence = f"{len(hits)} of {len(file.tensors)} names are layers.<n>.<module>.lora_a.weight or .lora_b.weight, such as {hits[0]}"
        return Match(self.name, round(0.97 * len(hits) / len(file.tensors), 3), (evidence,))

    def gather(self, file: TensorFile, siblings: Sequence[TensorFile]) -> list[TensorFile]:
        """One file is one adapter; its config lies beside it."""
        return [file]

    def read(self, bundle: Bundle, options: ReadOptions) -> Adapter:
        """The adapter; names stay torchtune's where the base, on which the order of rows depends, is not certain.

        The scale is unknown where no config says it and `options` does not. Raises DeadAdapterError when no module has both factors,
        MalformedError where they do not fit together, UsageError where `options` contradict the config or name a base without these modules.
        """
        file = bundle.main
        config = bundle.side_json(CONFIG) or {}
        adapter = Adapter({}, self.name, metadata=dict(file.metadata), config=config, files=(str(file.path),), findings=list(file.findings))
        modules = _modules(file, adapter)
        if not modules:
            raise DeadAdapterError("no module has both its lora_a and its lora_b", file=file.path, found=", ".join(list(file.tensors)[:3]))
        # torchtune saves no config beside adapters of Phi and Llama 3.2 Vision, and none beside checkpoints in Meta's format.
        ranks = {factors["lora_a"].shape[0] for factors in modules.values() if factors["lora_a"].shape}
        scaling = scale_beside(adapter, file, CONFIG, adapter.config.get("lora_alpha"), adapter.config.get("r"), ranks, options)
        deltas: dict[str, Delta] = {}
        for module, factors in modules.items():
            try:
                deltas[module] = _delta(factors, scaling)
            except MalformedError as problem:
                problem.locate(file=file.path, tensor=module)
                raise
        found = _resolved(adapter, {name: delta.shape for name, delta in deltas.items()}, bundle, options)
        adapter.layout = self.name if found is None else "reference"
        for name, delta in deltas.items():
            if found is None:
                adapter.deltas[Target(name)] = delta
                continue
            for target, piece in to_targets(found.layout, name, delta).items():
                adapter.deltas[lies(found.layout.base, target.module)] = piece
        beside = next((name for name in _PEFT if (bundle.folder / name).is_file()), None)
        if found is not None and beside is not None and _spoilt(found.layout, deltas):
            said = "torchtune's converter to PEFT interleaves the rows of q and k where they are not, and leaves out their magnitudes: use this file"
            adapter.findings.append(warning("rows-misplaced", beside, said, f"{found.layout.base.name}, {_kinds(deltas)}"))
        return adapter

    def write(self, adapter: Adapter, options: Mapping[str, Any]) -> Package:
        """Always raises RefusedError."""
        raise RefusedError("upparam does not write torchtune's own files", remedy="convert to peft")


def _modules(file: TensorFile, adapter: Adapter) -> dict[str, dict[str, Tensor]]:
    """Module -> lora_a, lora_b and, of a DoRA, magnitude. What makes no pair goes to the leftovers."""
    found: dict[str, dict[str, Tensor]] = {}
    names: dict[str, list[str]] = {}
    for name, tensor in file.tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            adapter.leftovers[name] = tensor
        else:
            found.setdefault(match.group(1), {})[match.group(2).removesuffix(".weight")] = tensor
            names.setdefault(match.group(1), []).append(name)
    for module, factors in list(found.items()):
        if {"lora_a", "lora_b"} <= factors.keys():
            continue
        del found[module]
        adapter.leftovers |= {name: file.tensors[name] for name in names[module]}
        adapter.findings.append(error("orphan", module, "factors that make no delta", ", ".join(factors)))
    return found


def _spoilt(one: LayoutMap, deltas: Mapping[str, Delta]) -> bool:
    """True where tune_to_peft_adapter_weights gives another adapter than this one.

    It takes the rows of every q and k for interleaved, Qwen's too, and never moves a magnitude.
    """
    return any(
        one.to_reference(name)[0].order.plain or isinstance(delta, DoRA)
        for name, delta in deltas.items() if name.endswith((".attn.q_proj", ".attn.k_proj"))
    )  # fmt: skip


def _kinds(deltas: Mapping[str, Delta]) -> str:
    return ", ".join(dict.fromkeys(called(delta.algorithm) for delta in deltas.values()))


def _delta(factors: Mapping[str, Tensor], scaling: Scaling) -> Delta:
    """The delta of one module, rows as torchtune has them."""
    down, up, magnitude = factors["lora_a"], factors["lora_b"], factors.get("magnitude")
    if len(down.shape) != 2 or len(up.shape) != 2:
        raise MalformedError("the factors are no matrices", expected="lora_a (r, in), lora_b (out, r)", found=f"{down.shape}, {up.shape}")
    lora = LoRA(up, down, scaling)
    if magnitude is None:
        return lora
    if magnitude.shape != lora.shape[:1]:
        raise MalformedError("magnitude is not one norm for each row", expected=f"({lora.shape[0]},)", found=magnitude.shape)
    return DoRA(up, down, magnitude, scaling)


def _layout(base: Base) -> LayoutMap | None:
    return find(unfused(base), "torchtune")


def _resolved(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]], bundle: Bundle, options: ReadOptions) -> Resolved | None:
    """The base's layout, and the base named on the adapter; None, with a finding, where what is there does not tell enough.

    Told by the user, by the config.json that torchtune copies beside the adapter, by the name in adapter_config.json, else by names and
    shapes: torchtune adapts the same modules of every layer, so a base of another depth is not meant.
    """
    if options.base is not None:
        one = _layout(options.base)
        if one is None:
            kind = config_of(options.base).get("model_type")
            raise UsageError(
                "torchtune's names and its order of rows follow from the base's config", file=options.base.name,
                expected="a model that torchtune trains and upparam knows (llama, mistral, gemma, gemma2, qwen2, qwen3, phi3)",
                found=f"model_type {kind}" if kind else "no config.json with a model_type",
                remedy=None if kind else "give the folder that holds its weights and its config.json",
            )  # fmt: skip
        return named(adapter, shapes, options.base, one)
    config, stated = bundle.side_json("config.json") or {}, adapter.config.get("base_model_name_or_path")
    depth = 1 + max((int(match.group(1)) for name in shapes if (match := _LAYER.fullmatch(name))), default=-1)

    def meant(base: Base) -> LayoutMap | None:
        one, own = _layout(base), config_of(base)
        deeper = one is not None and one.to_reference(f"layers.{depth}.attn.output_proj")
        return None if deeper or any(config[key] != own[key] for key in _TOLD if config.get(key) and own.get(key)) else one

    hints = recognise({_translated(name): shape for name, shape in shapes.items()}, stated=stated if isinstance(stated, str) else None)
    return agreed(adapter, shapes, [*hints, *_fused()], meant, "no model that torchtune trains and upparam knows has all these modules")


def _fused() -> list[BaseHint]:
    """The bases that the recogniser does not find under these names, since their projections are fused."""
    names = [name for name, config in inventory.data("_configs.json").items() if config.get("model_type") == "phi3"]
    why = "as torchtune builds it, with its fused projections apart"
    return [BaseHint(name, 0.5, (why,), lookalikes=tuple(other for other in names if other != name)) for name in names]


def _translated(name: str) -> str:
    """transformers' name, for the recogniser."""
    match = _LAYER.fullmatch(name)
    if match is None:
        return {"output": "lm_head"}.get(name, name)
    return f"model.layers.{match.group(1)}.{WORDS.get(match.group(2), match.group(2))}"


dialect = Torchtune()
