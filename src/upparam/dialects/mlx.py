"""MLX: `adapters.safetensors` (before April 2024 `adapters.npz`) and `adapter_config.json`, as mlx-lm's trainer saves them.

Sources: ml-explore/mlx-lm mlx_lm/tuner/lora.py and dora.py (orientation of the factors, `fuse`), tuner/utils.py (load_adapters), models/*.py
(module names). Factors stand the other way round than elsewhere: `lora_a` (in, r), `lora_b` (r, out); those of a mixture's stacked experts
are (experts, r, in) and (experts, out, r). The config stores the multiplier itself as `scale`; there is no alpha.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from upparam.adapter import Adapter, Target
from upparam.algorithms import called
from upparam.algorithms.base import UNKNOWN, Delta, ScaleRule, Scaling
from upparam.algorithms.dora import DoRA
from upparam.algorithms.lora import LoRA
from upparam.algorithms.slicing import stack
from upparam.bases.base import Base
from upparam.containers.base import TensorFile
from upparam.dialects import mlx_config
from upparam.dialects.base import Bundle, Match, NamedTensors, Package, ReadOptions
from upparam.dialects.diffusers import reference_deltas
from upparam.dialects.placing import base_of, resolve
from upparam.dialects.refusing import LOWER, other_rank, other_scale, refuse
from upparam.errors import DeadAdapterError, MalformedError, Problem, RefusedError, UsageError
from upparam.findings import error, warning
from upparam.patterns import regex
from upparam.tensors import Tensor

CONFIG = "adapter_config.json"
WEIGHTS = "adapters.safetensors"
_NAME = regex(r"(.+)(?<!\.weight)\.(lora_a|lora_b|m)")
_EMBEDDING = regex(r"(^|\.)(embed_tokens|embed_in|wte|wpe|word_embeddings|tok_embeddings)$")
_EXPERT = regex(r"(.+)\.experts\.(\d+)\.(\w+)")

_TO_HF = (
    (r"language_model\.model\.", "model.language_model."), (r"language_model\.lm_head$", "lm_head"), (r"model\.h\.(\d+)\.(attn\.|ln_|mlp\.c_)", r"transformer.h.\1.\2"),
    (r"model\.(wte|wpe|ln_f)$", r"transformer.\1"), (r"model\.h\.", "gpt_neox.layers."), (r"model\.embed_out$", "embed_out"),
    (r"model\.(embed_in|final_layer_norm)$", r"gpt_neox.\1"),
)  # fmt: skip
_FROM_HF = (
    (r"model\.language_model\.", "language_model.model."), (r"transformer\.(?=h\.\d+\.(attn\.c_|ln_|mlp\.c_)|wte$|wpe$|ln_f$)", "model."), (r"gpt_neox\.layers\.", "model.h."),
    (r"gpt_neox\.", "model."), (r"embed_out$", "model.embed_out"),
)  # fmt: skip
"""Where mlx-lm's models name their modules otherwise than transformers': GPT-2, GPT-NeoX, models with a vision tower."""
_MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_OWN = regex(r"(language_model\.)?(model\.(layers|h)\.|model\.[\w]+$|lm_head$)")
"""What a module of mlx-lm's language models is called."""


class Mlx:
    """The dialect."""

    name = "mlx"
    title = "MLX (mlx-lm adapters)"
    writable = True
    algorithms: tuple[str, ...] = ("lora", "dora")

    def match(self, file: TensorFile) -> Match | None:
        """Names `<module>.lora_a` and `<module>.lora_b`, without `.weight` before or after."""
        hits = [name for name in file.tensors if _NAME.fullmatch(name)]
        if not any(name.endswith((".lora_a", ".lora_b")) for name in hits):
            return None
        evidence = [f"{len(hits)} of {len(file.tensors)} names are <module>.lora_a or .lora_b, such as {hits[0]}"]
        return Match(self.name, round(0.97 * len(hits) / len(file.tensors), 3), tuple(evidence))

    def gather(self, file: TensorFile, siblings: Sequence[TensorFile]) -> list[TensorFile]:
        """One file is one adapter; its config lies beside it."""
        return [file]

    def read(self, bundle: Bundle, options: ReadOptions) -> Adapter:
        """The adapter; its scale is unknown where no config says it and `options` does not.

        Raises DeadAdapterError when no module has both factors, MalformedError where they do not fit together.
        """
        file = bundle.main
        config = bundle.side_json(CONFIG) or {}
        adapter = Adapter({}, self.name, metadata=dict(file.metadata), config=config, files=(str(file.path),), findings=list(file.findings))
        modules = _modules(file, adapter)
        scaling = _scaling(adapter, file, options)
        deltas: dict[str, Delta] = {}
        for module, factors in modules.items():
            try:
                deltas |= _deltas(adapter, module, factors, scaling)
            except MalformedError as problem:
                raise MalformedError(
                    problem.message, file=file.path, tensor=module, expected=problem.expected, found=problem.found
                ) from None
        if not deltas:
            raise DeadAdapterError("no module has both its lora_a and its lora_b", file=file.path, found=", ".join(list(file.tensors)[:3]))
        _place(adapter, deltas, options)
        mlx_config.note_layers(adapter, modules)
        adapter.findings += mlx_config.contradictions(adapter, list(modules))
        return adapter

    def write(self, adapter: Adapter, options: Mapping[str, Any]) -> Package:
        """`adapters.safetensors` and `adapter_config.json`. Raises RefusedError for what mlx-lm's `load_adapters` has no place for:

        extras, convolutions, several ranks or scales (the config has one of each), modules of no language model.
        """
        if not adapter.deltas:
            raise RefusedError("mlx-lm loads no adapter without factors", file=adapter.files[0] if adapter.files else None)
        whole = adapter.layout == "peft" and not any(target.rows for target in adapter.deltas)
        deltas = adapter.deltas if whole else reference_deltas(adapter, options, self.name)
        problems = [f"{extra.kind.value} {extra.name}" for extra in adapter.extras]
        problems += [f"{target}: {problem}" for target, delta in deltas.items() if (problem := _unloadable(target, delta)) is not None]
        refuse(self.name, problems)
        refuse(self.name, _mixed(deltas))
        named = {_renamed(target.module, _FROM_HF): delta for target, delta in deltas.items() if isinstance(delta, (LoRA, DoRA))}
        scale, rank = _scale(named), _rank(named)
        base = base_of(adapter, options)
        tensors = _tensors(adapter, named, base)
        modules = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
        # Look-alikes may be deeper than the base that was inferred: its depth is taken only where it is certain.
        certain = "base" in options or (adapter.base is not None and (adapter.base.stated or not adapter.base.lookalikes))
        config = mlx_config.whole(adapter, list(modules), rank, scale, base if certain else None)
        config["fine_tune_type"] = "dora" if any(isinstance(delta, DoRA) for delta in named.values()) else "lora"
        metadata = dict(adapter.metadata) if adapter.dialect == self.name else {**adapter.metadata, "format": "mlx"}
        text = json.dumps(config, indent=4, ensure_ascii=False) + "\n"
        return Package({WEIGHTS: NamedTensors(tensors, metadata), CONFIG: text.encode()})


def _modules(file: TensorFile, adapter: Adapter) -> dict[str, dict[str, Tensor]]:
    """Module -> lora_a and lora_b. What makes no pair goes to the leftovers."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in file.tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            adapter.leftovers[name] = tensor
        else:
            found.setdefault(match.group(1), {})[match.group(2)] = tensor
    for module, factors in list(found.items()):
        if {"lora_a", "lora_b"} <= factors.keys():
            continue
        adapter.leftovers |= {f"{module}.{role}": tensor for role, tensor in found.pop(module).items()}
        if factors.keys() != {"m"}:
            adapter.findings.append(error("orphan", module, "factors that make no delta", ", ".join(factors)))
    return found


def _scaling(adapter: Adapter, file: TensorFile, options: ReadOptions) -> Scaling:
    """What is known about the one multiplier of all modules; UNKNOWN, with a finding, where nothing says it."""
    stored, why = _stored_scale(adapter.config)
    if stored is not None:
        if options.scale is not None and options.scale != stored:
            raise UsageError(
                "the scale given contradicts the adapter's own", file=file.path, expected=f"{stored:g} ({CONFIG})", found=options.scale
            )
        return Scaling(ScaleRule.EXPLICIT, multiplier=stored)
    if options.scale is not None:
        return Scaling(ScaleRule.EXPLICIT, multiplier=options.scale)
    if options.alpha is not None:
        return Scaling(ScaleRule.ALPHA_OVER_RANK, options.alpha)
    adapter.findings.append(warning("scale-missing", file.name, f"the multiplier is not known: {why}", "give it with --scale"))
    return UNKNOWN


def _stored_scale(config: Mapping[str, Any]) -> tuple[float | None, str]:
    """(the config's multiplier, or None and why it is not known).

    From January to June 2024 mlx-lm multiplied by scale * alpha / rank; a config from then names its layers `lora_layers`, which lasted
    until September. A config from in between with an alpha in it may mean either.
    """
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict):
        return None, f"no {CONFIG} with lora_parameters beside it; mlx-lm's default has been 20 and 10, mlx-examples' 2"
    scale, alpha, rank = (parameters.get(key) for key in ("scale", "alpha", "rank"))
    if not isinstance(scale, (int, float)) or isinstance(scale, bool):
        return None, f"lora_parameters in {CONFIG} has no scale"
    if not isinstance(alpha, (int, float)) or alpha == rank or "num_layers" in config:
        return float(scale), ""
    old = f"{scale * alpha / rank:g}" if isinstance(rank, (int, float)) and rank else "scale * alpha / rank"
    return None, f"{CONFIG} has scale {scale:g} and alpha {alpha:g}: mlx-lm multiplied by {old} until June 2024 and by {scale:g} since"


def _deltas(adapter: Adapter, module: str, factors: Mapping[str, Tensor], scaling: Scaling) -> dict[str, Delta]:
    """The deltas of one module by transformers' names; one for each expert where they are stacked."""
    down, up, magnitude = factors["lora_a"], factors["lora_b"], factors.get("m")
    if len(up.shape) == 3 and magnitude is None:
        return _experts(adapter, module, down, up, scaling)
    if len(down.shape) != 2 or len(up.shape) != 2 or down.shape[1] != up.shape[0]:
        raise MalformedError(
            "lora_a and lora_b do not fit together", expected="lora_a (in, r), lora_b (r, out)", found=f"{down.shape}, {up.shape}"
        )
    name = _renamed(module, _TO_HF)
    embedding = _EMBEDDING.search(name) is not None
    lora = LoRA(down, up, scaling, embedding=True) if embedding else LoRA(up.T, down.T, scaling)
    if magnitude is None:
        return {name: lora}
    if magnitude.shape != lora.shape[:1]:
        raise MalformedError("m is not one norm for each row", expected=f"({lora.shape[0]},)", found=magnitude.shape)
    return {name: DoRA(lora.up, lora.down, magnitude, scaling, embedding=embedding)}


def _experts(adapter: Adapter, module: str, down: Tensor, up: Tensor, scaling: Scaling) -> dict[str, Delta]:
    """One LoRA for each expert, views of the stacked factors. Until October 2025 lora_a was (experts * r, in)."""
    experts, out, rank = up.shape
    flat = len(down.shape) == 2
    if flat and experts and down.shape[0] == experts * rank:
        down = down.reshape((experts, rank, down.shape[1]))
        adapter.spelling["experts"] = "flat"
    if len(down.shape) != 3 or down.shape[:2] != (experts, rank):
        raise MalformedError(
            "lora_a and lora_b do not fit together", expected=f"lora_a ({experts}, {rank}, in) for lora_b {up.shape}", found=down.shape
        )
    found: dict[str, Delta] = {}
    for number in range(experts):
        piece = LoRA(
            up.rows(number, number + 1).reshape((out, rank)), down.rows(number, number + 1).reshape((rank, down.shape[2])), scaling
        )
        found[_expert_name(module, number)] = piece
    if not module.rpartition(".")[0].endswith(".switch_mlp"):
        adapter.spelling["stack"] = "experts"
    return found


def _expert_name(module: str, number: int) -> str:
    parent, _, leaf = _renamed(module, _TO_HF).rpartition(".")
    if parent.endswith(".block_sparse_moe.switch_mlp"):
        leaf = _MIXTRAL.get(leaf, leaf)
    return f"{parent.removesuffix('.switch_mlp').removesuffix('.experts')}.experts.{number}.{leaf}"


def _stack_name(parent: str, leaf: str, spelling: Mapping[str, str]) -> str:
    """The module in which mlx-lm stacks `<parent>.experts.<n>.<leaf>`."""
    if parent.endswith(".block_sparse_moe"):
        leaf = {word: own for own, word in _MIXTRAL.items()}.get(leaf, leaf)
    return f"{parent}.{spelling.get('stack', 'switch_mlp')}.{leaf}"


def _renamed(name: str, rules: Sequence[tuple[str, str]]) -> str:
    """The name after the first rule that applies to its beginning."""
    for pattern, replacement in rules:
        changed, count = re.subn(f"^{pattern}", replacement, name)
        if count:
            return changed
    return name


def _place(adapter: Adapter, deltas: Mapping[str, Delta], options: ReadOptions) -> None:
    """Name the base. Names are transformers' own whether or not an inventory knows them."""
    stated = adapter.config.get("model")
    shapes = {name: delta.shape for name, delta in deltas.items()}
    found = resolve(shapes, ("reference",), options.base, stated=stated if isinstance(stated, str) and stated else None)
    adapter.base = None if found is None else found.hint
    adapter.layout = "peft" if found is None else "reference"
    for name, delta in deltas.items():
        adapter.deltas[Target(name if found is None else found.names.get(name, name))] = delta
        if found is not None and name not in found.names:
            adapter.findings.append(
                warning("unknown-module", name, f"{found.layout.base.name} has no such module of this shape", f"{delta.shape}")
            )


def _unloadable(target: Target, delta: Delta) -> str | None:
    if target.parameter != "weight":
        return f"a delta of the {target.parameter}"
    if not isinstance(delta, (LoRA, DoRA)):
        return f"{called(delta.algorithm)} delta"
    if isinstance(delta, DoRA) and (not delta.per_row or _EXPERT.fullmatch(target.module)):
        return "a DoRA with a norm for each column" if not delta.per_row else "a DoRA of a mixture's expert"
    if delta.mid is not None:
        return "a Tucker core"
    if len(delta.shape) != 2:
        return "a convolution"
    return None if _OWN.match(_renamed(target.module, _FROM_HF)) else "not a module of a language model that mlx-lm runs"


def _mixed(deltas: Mapping[Target, Delta]) -> list[Problem]:
    """DoRAs beside plain LoRAs: mlx-lm makes all modules of one kind."""
    decomposed = [target for target, delta in deltas.items() if isinstance(delta, DoRA)]
    if len(decomposed) in (0, len(deltas)):
        return []
    return [
        Problem(str(target), "a DoRA beside plain LoRAs, and mlx-lm makes all modules of one kind", (target,), LOWER)
        for target in decomposed
    ]


def _scale(deltas: Mapping[str, LoRA | DoRA]) -> float:
    """The multiplier all deltas share. Raises RefusedError where they differ: the config has one for all."""
    counts = Counter(delta.known_scale() for delta in deltas.values())
    common, _ = counts.most_common(1)[0]
    why = f"beside {common:g}, and the config has one for all"
    refuse("mlx", [
        other_scale(_renamed(name, _TO_HF), delta, common, f"scale {delta.scale:g} {why}") for name, delta in deltas.items() if delta.scale != common
    ])  # fmt: skip
    return common


def _rank(deltas: Mapping[str, LoRA | DoRA]) -> int:
    """The rank all deltas share. Raises RefusedError where they differ."""
    ranks = {name: delta.down.shape[0] for name, delta in deltas.items()}
    largest = max(ranks.values())
    refuse("mlx", [other_rank(_renamed(name, _TO_HF), rank, largest) for name, rank in ranks.items() if rank != largest])
    return largest


def _tensors(adapter: Adapter, deltas: Mapping[str, LoRA | DoRA], base: Base | None) -> dict[str, Tensor]:
    """Everything under mlx-lm's names, experts stacked."""
    found: dict[str, Tensor] = {}
    stacks: dict[str, dict[int, LoRA | DoRA]] = {}
    spelling = adapter.spelling if adapter.dialect == "mlx" else {}
    for name, delta in deltas.items():
        match = _EXPERT.fullmatch(name)
        if match is not None:
            stacks.setdefault(_stack_name(match.group(1), match.group(3), spelling), {})[int(match.group(2))] = delta
        elif delta.embedding:
            found[f"{name}.lora_a"], found[f"{name}.lora_b"] = delta.up, delta.down
        else:
            found[f"{name}.lora_a"], found[f"{name}.lora_b"] = delta.down.T, delta.up.T
        if isinstance(delta, DoRA):
            found[f"{name}.m"] = delta.magnitude.reshape((delta.shape[0],))
    for name, members in stacks.items():
        if sorted(members) != list(range(len(members))) or len(members) != _expert_count(base, name, len(members)):
            refuse("mlx", [f"{name}: only experts {', '.join(map(str, sorted(members)))}; mlx-lm stacks all of them in one tensor"])
        ordered = [members[number] for number in range(len(members))]
        down = stack([delta.down for delta in ordered])
        if spelling.get("experts") != "flat":
            down = down.reshape((len(ordered), *ordered[0].down.shape))
        found[f"{name}.lora_a"] = down
        found[f"{name}.lora_b"] = stack([delta.up for delta in ordered]).reshape((len(ordered), *ordered[0].up.shape))
    return found


def _expert_count(base: Base | None, name: str, default: int) -> int:
    """How many experts the base stacks in a module; `default` where the base does not say."""
    if base is None:
        return default
    parent, _, _ = name.rpartition(".")
    prefix = re.escape(_renamed(parent, _TO_HF).rpartition(".")[0])
    numbers = {match.group(1) for module in base.modules if (match := re.match(rf"{prefix}\.experts\.(\d+)\.", module.path))}
    return len(numbers) or default


dialect = Mlx()
