"""loralib: Microsoft's own LoRA layers. Bare parameters `<module>.lora_A` (r, in) and `<module>.lora_B` (out, r); nothing else is stored.

Source: microsoft/LoRA loralib/layers.py, loralib/utils.py (lora_state_dict), examples/NLG/src/gpt2_ft.py (the files). The multiplier
lora_alpha / r is an argument of the layers in the model's code, and so is `enable_lora`, which says what blocks of rows of a fused weight
a MergedLinear adapts: for g enabled blocks lora_A is (g * r, in) and lora_B (g * rows of a block, r), one group of a convolution for each.
Both are asked for. upparam writes them beside the file, in `loralib.json`, and reads them there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from upparam.adapter import Adapter, BaseHint, Extra, ExtraKind, Target
from upparam.algorithms.base import UNKNOWN, Delta, ScaleRule, Scaling
from upparam.algorithms.lora import LoRA
from upparam.bases.base import Base, Module
from upparam.bases.layouts import find
from upparam.containers.base import TensorFile
from upparam.dialects.base import Bundle, Match, Package, ReadOptions
from upparam.dialects.loralib_write import SIDE, package
from upparam.dialects.placing import Resolved, resolve
from upparam.errors import DeadAdapterError, MalformedError, UsageError
from upparam.findings import error, info, warning
from upparam.patterns import regex
from upparam.tensors import Tensor
from upparam.wording import counted

_NAME = regex(r"(?P<where>(?:[^/]+/)*)(?P<wrapper>(?:module\.)?)(?P<module>.+)\.lora_(?P<role>[AB])")
_FUSED = regex(r"(^|\.)(c_attn|query_key_value|qkv|qkv_proj|Wqkv|in_proj)$")
_EMBEDDING = regex(r"(^|\.)(wte|wpe|word_embeddings|position_embeddings|embed_tokens|embed_in|shared|token_embedding|position_embedding)$")
_OTHERS = regex(
    r"\.parametrizations\.|\.loras\.|(^|[./])(transformer\.h\.\d+\.(attn\.(attn|qkv|proj)|mlp\.(fc(_1|_2)?|proj))|base_model\.model\..+)\.lora_[AB]$"
)
"""Names of minLoRA, AdapterHub, LitGPT and PEFT that end alike."""
_PARTS = ("q", "k", "v")
_LARGEST = 1e300
"""Of an alpha: larger ones are no numbers of a float, and NaN compares as larger too."""
_LAYOUTS = ("reference", "bare")


class Loralib:
    """The dialect; see the module's docstring."""

    name = "loralib"
    title = "loralib state dict (microsoft/LoRA)"
    writable = True
    algorithms: tuple[str, ...] = ("lora",)

    def match(self, file: TensorFile) -> Match | None:
        """By names that end in `.lora_A` and `.lora_B`. Factors among base weights (a training checkpoint) count less."""
        hits = [name for name in file.tensors if _NAME.fullmatch(name) and not _OTHERS.search(name)]
        if not hits:
            return None
        evidence = [f"{len(hits)} of {len(file.tensors)} names are <module>.lora_A and <module>.lora_B, such as {hits[0]}"]
        if _is_checkpoint(file, hits):
            return Match(
                self.name, 0.7, (*evidence, f"beside {counted(len(file.tensors) - len(hits), 'other weight')}: a training checkpoint")
            )
        return Match(self.name, 0.9, tuple(evidence))

    def gather(self, file: TensorFile, siblings: Sequence[TensorFile]) -> list[TensorFile]:
        """One file is one adapter."""
        return [file]

    def read(self, bundle: Bundle, options: ReadOptions) -> Adapter:
        """The adapter; its scale is unknown unless `options` or the file beside it says it.

        Raises UsageError where the enabled parts of a fused weight are not told (`options.targets`: q, k, v), DeadAdapterError when no
        module has both factors, MalformedError for factors that do not fit together.
        """
        file = bundle.main
        adapter = Adapter({}, self.name, metadata=dict(file.metadata), files=(str(file.path),), findings=list(file.findings))
        pairs = _pairs(file, adapter)
        if not pairs:
            raise DeadAdapterError("no module has both its lora_A and its lora_B", file=file.path, found=", ".join(list(file.tensors)[:3]))
        layers = _layers(bundle)
        if options.base is not None:
            found = _named(options.base, pairs)
        else:
            found = resolve({module: _guess(module, pair, layers.get(module, {}), options) for module, pair in pairs.items()}, _LAYOUTS)
        adapter.base = None if found is None else found.hint
        adapter.layout = "peft" if found is None else "reference"
        if found is not None:
            adapter.spelling["layout"] = found.layout.name
        for module, pair in pairs.items():
            name, known = _known(module, found)
            try:
                made = _deltas(name, pair, known, layers.get(module, {}), options)
            except (MalformedError, UsageError) as problem:
                raise type(problem)(
                    problem.message, file=file.path, tensor=module, expected=problem.expected, found=problem.found, remedy=problem.remedy
                ) from None
            adapter.deltas |= made
            if known is None and any(target.rows for target in made):
                adapter.spelling[f"rows {name}"] = str(_guess(module, pair, layers.get(module, {}), options)[0])
        if options.targets and not any(target.rows for target in adapter.deltas):
            raise UsageError(
                "no weight here is adapted in parts, so --target says nothing", file=file.path, found=", ".join(options.targets)
            )
        adapter.extras = [
            Extra(extra.kind, f"{_known(module, found)[0]}.{leaf}", extra.tensor)
            for extra in adapter.extras
            for module, _, leaf in (extra.name.rpartition("."),)
        ]
        if any(delta.scale is None for delta in adapter.deltas.values()):
            why = "loralib keeps lora_alpha in the model's code; Microsoft's examples use 32 with r 4 or 128 by default"
            adapter.findings.append(warning("scale-missing", file.name, why, "give it with --alpha or --scale"))
        return adapter

    def write(self, adapter: Adapter, options: Mapping[str, Any]) -> Package:
        """`lora.pt`, and `loralib.json` with the arguments of each layer. Raises RefusedError for what loralib has no layers for."""
        return package(adapter, options)


def _is_checkpoint(file: TensorFile, hits: Sequence[str]) -> bool:
    """True when adapted modules have their own weight beside the factors."""
    return any(f"{name.rpartition('.')[0]}.weight" in file.tensors for name in hits)


def _pairs(file: TensorFile, adapter: Adapter) -> dict[str, dict[str, Tensor]]:
    """Both factors of each module. Biases and heads go to the extras, what makes no pair to the leftovers."""
    hits = {name: match for name in file.tensors if (match := _NAME.fullmatch(name)) and not _OTHERS.search(name)}
    first = next(iter(hits.values()))
    where = first["where"] + first["wrapper"]
    if first["where"]:
        adapter.spelling["where"] = first["where"].removesuffix("/")
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, match in hits.items():
        pairs.setdefault(match["module"], {})[match["role"]] = file.tensors[name]
    for module, pair in list(pairs.items()):
        if len(pair) < 2:
            adapter.leftovers |= {f"{module}.lora_{role}": tensor for role, tensor in pairs.pop(module).items()}
            adapter.findings.append(error("orphan", module, "a factor without its partner: the module cannot be applied"))
    rest = {name: tensor for name, tensor in file.tensors.items() if name not in hits}
    if _is_checkpoint(file, list(hits)):
        said = f"the base's own weights, as a training checkpoint holds them, are left out: {counted(len(rest), 'tensor')}"
        adapter.findings.append(info("base-weights-beside", file.name, said, "such as " + ", ".join(list(rest)[:3])))
        return pairs
    for name, tensor in rest.items():
        path = name.removeprefix(where)
        if path.endswith((".bias", ".weight")) and ".lora_" not in path and "/" not in path:
            # The bias of a head goes with its weight; one alone is a bias that was trained beside the factors.
            alone = path.endswith(".bias") and f"{name.removesuffix('bias')}weight" not in rest
            adapter.extras.append(Extra(ExtraKind.BIAS if alone else ExtraKind.SAVED_MODULE, path, tensor))
        else:
            adapter.leftovers[name] = tensor
    return pairs


def _layers(bundle: Bundle) -> dict[str, Mapping[str, Any]]:
    """The arguments of each layer by module, from the file that upparam writes beside the factors; {} where there is none."""
    side = bundle.side_json(SIDE)
    layers = {} if side is None else side.get("layers")
    if not isinstance(layers, dict) or not all(isinstance(layer, dict) for layer in layers.values()):
        raise MalformedError("not of the form {layers: {module: {...}}}", file=bundle.folder / SIDE)
    return layers


def _groups(pair: Mapping[str, Tensor]) -> int:
    """How many enabled blocks the factors are of; 1 for a Linear. Raises MalformedError where they do not fit together."""
    down, up = pair["A"], pair["B"]
    if len(down.shape) == len(up.shape) == 2 and up.shape[1] and down.shape[0] % up.shape[1] == 0:
        groups = down.shape[0] // up.shape[1]
        if groups and up.shape[0] and up.shape[0] % groups == 0:
            return groups
    raise MalformedError("lora_A and lora_B do not fit together", expected="(groups * r, in), (rows, r)", found=f"{down.shape}, {up.shape}")


def _told(module: str, pair: Mapping[str, Tensor], layer: Mapping[str, Any], options: ReadOptions) -> list[bool] | None:
    """`enable_lora` as the file beside it or the user says it; None where neither does or the module is a plain Linear.

    Raises UsageError or MalformedError where what is said does not fit the factors.
    """
    groups = _groups(pair)
    said = layer.get("enable_lora")
    if said is not None:
        if not isinstance(said, list) or not all(isinstance(one, bool) for one in said) or sum(said) != groups:
            raise MalformedError(f"enable_lora in {SIDE} does not fit the factors", expected=f"a list with {groups} true", found=said)
        return said
    if options.targets and (groups > 1 or (len(options.targets) == 1 and _FUSED.search(module))):
        if not set(options.targets) <= set(_PARTS) or len(set(options.targets)) != groups:
            raise UsageError(
                f"the factors are of {groups} parts of a fused weight", expected=f"--target {groups} times, of q, k and v",
                found=", ".join(options.targets),
            )  # fmt: skip
        return [part in options.targets for part in _PARTS]
    return None


def _guess(module: str, pair: Mapping[str, Tensor], layer: Mapping[str, Any], options: ReadOptions) -> tuple[int, ...]:
    """The shape of the weight: where parts are adapted and nothing tells of how many, of three."""
    if _embedding(module, pair, None, layer) and len(pair["A"].shape) == len(pair["B"].shape) == 2:
        return pair["A"].shape[1], pair["B"].shape[0]
    try:
        enabled, groups = _told(module, pair, layer, options), _groups(pair)
    except (MalformedError, UsageError):
        return 0, 0  # said, with the module's name, when its deltas are made
    parts = len(enabled) if enabled is not None else max(3, groups) if groups > 1 else 1
    return pair["B"].shape[0] // groups * parts, pair["A"].shape[1]


def _named(base: Base, modules: Collection[str]) -> Resolved | None:
    """The layout of the base the user named that has most of these modules, whatever their shapes; None when none has half of them."""
    best: Resolved | None = None
    for name in _LAYOUTS:
        one = find(base, name)
        names = {} if one is None else {module: module for module in modules if one.to_reference(module)}
        if one is not None and 2 * len(names) >= len(modules) and (best is None or len(names) > len(best.names)):
            best = Resolved(one, names, BaseHint(base.name, 1.0, ("named by the user", *base.evidence), True))
    return best


def _known(module: str, found: Resolved | None) -> tuple[str, Module | None]:
    """The base's name for a module, and the module itself where the base is known and has it."""
    parts = () if found is None else found.layout.to_reference(module)
    name = parts[0].module if parts else module
    return name, found.layout.base.by_path.get(name) if found is not None and module in found.names else None


def _embedding(module: str, pair: Mapping[str, Tensor], known: Module | None, layer: Mapping[str, Any]) -> bool:
    """Whether a module is an embedding: as the base says, the sizes of its weight, the file beside the factors, or else the name."""
    if known is not None and known.kind:
        return known.kind == "Embedding"
    sides = pair["B"].shape[:1] + pair["A"].shape[1:]
    if known is not None and known.shape in (sides, sides[::-1]) and sides != sides[::-1]:
        return known.shape == sides[::-1]
    return "num_embeddings" in layer or bool(_EMBEDDING.search(module))


def _deltas(
    module: str, pair: Mapping[str, Tensor], known: Module | None, layer: Mapping[str, Any], options: ReadOptions
) -> dict[Target, Delta]:
    """The deltas of one module: one, or one for each enabled block of rows."""
    down, up = pair["A"], pair["B"]
    if _embedding(module, pair, known, layer):
        if len(down.shape) != 2 or len(up.shape) != 2:
            raise MalformedError(
                "the factors are no matrices", expected="lora_A (r, tokens), lora_B (dim, r)", found=f"{down.shape}, {up.shape}"
            )
        return {Target(module): LoRA(down.T, up.T, _scaling(layer, options, up.shape[-1]), embedding=True)}
    if known is not None and len(known.shape) > 2:
        return {Target(module): _convolution(pair, known, layer, options)}
    groups, enabled = _groups(pair), _told(module, pair, layer, options)
    rank, rows = up.shape[1], up.shape[0] // groups
    scaling = _scaling(layer, options, rank)
    out = known.canonical[0] if known is not None else None
    if enabled is None and out == groups * rows and groups > 1:
        enabled = [True] * groups
    if enabled is None and (groups > 1 or (out is not None and out > rows and out % rows == 0)):
        raise UsageError(
            "which parts of the fused weight are adapted (enable_lora) is not stored", found=f"factors of {groups} parts of {rows} rows",
            remedy=f"name {'it' if groups == 1 else 'them'} with --target, of q, k and v (Microsoft's GPT-2 adapts q and v)",
        )  # fmt: skip
    whole = (rows * (len(enabled) if enabled is not None else 1), down.shape[1])
    if known is not None and known.canonical != whole:
        raise MalformedError(
            "the factors are not of the base's weight", expected=known.canonical, found=whole, remedy="name another base with --base"
        )
    if enabled is None:
        return {Target(module): LoRA(up, down, scaling)}
    blocks = [block for block, on in enumerate(enabled) if on]
    return {
        Target(module, (block * rows, (block + 1) * rows)): LoRA(
            up.rows(group * rows, (group + 1) * rows), down.rows(group * rank, (group + 1) * rank), scaling
        )
        for group, block in enumerate(blocks)
    }


def _convolution(pair: Mapping[str, Tensor], known: Module, layer: Mapping[str, Any], options: ReadOptions) -> LoRA:
    """Conv2d: of kernel k the factors are (r k, in k) and (out k, r k), and their product is viewed as (out, in, k, k).

    Each output row of that view is k rows of the product side by side: up is lora_B with those rows in one, down k copies of lora_A on
    the diagonal, of rank r k k. For k = 1 that is lora_A and lora_B themselves.
    """
    import numpy as np

    down, up = pair["A"], pair["B"]
    out, into, *kernel = known.canonical
    k = kernel[0]
    if len(kernel) != 2 or kernel != [k, k] or down.shape[1:] != (into * k,) or up.shape != (out * k, down.shape[0]) or down.shape[0] % k:
        raise MalformedError(
            "the factors do not fit the convolution",
            expected=f"(r * {k}, {into * k}), ({out * k}, r * {k})",
            found=f"{down.shape}, {up.shape}",
        )
    scaling = _scaling(layer, options, down.shape[0] // k, divisor=None if k == 1 else float(down.shape[0] // k))
    if k == 1:
        return LoRA(up.reshape((*up.shape, 1, 1)), down.reshape((*down.shape, 1, 1)), scaling)
    rank = down.shape[0] * k

    def diagonal() -> Any:
        return np.kron(np.eye(k, dtype=np.uint8).astype(down.dtype.numpy), down.read()).reshape(rank, into, k, k)

    return LoRA(up.reshape((out, rank, 1, 1)), Tensor.computed(down.dtype, (rank, into, k, k), diagonal), scaling)


def _scaling(layer: Mapping[str, Any], options: ReadOptions, rank: int, divisor: float | None = None) -> Scaling:
    """lora_alpha / r, r being that of one part and `divisor` where the factors have another rank; unknown where nobody says alpha."""
    alpha = layer.get("lora_alpha")
    if alpha is None:
        if options.scale is not None:
            return Scaling(ScaleRule.EXPLICIT, multiplier=options.scale)
        return UNKNOWN if options.alpha is None else Scaling(alpha=options.alpha, divisor=divisor)
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) <= _LARGEST:
        raise MalformedError(f"lora_alpha in {SIDE} is no number", found=str(alpha)[:40])
    if options.alpha not in (None, alpha):
        raise UsageError(f"the alpha given contradicts {SIDE}", expected=f"{alpha:g}", found=options.alpha)
    if options.scale is not None and rank and abs(options.scale - alpha / rank) > 1e-9 * abs(options.scale):
        raise UsageError(f"the scale given contradicts {SIDE}", expected=f"{alpha / rank:g}", found=options.scale)
    return Scaling(alpha=float(alpha), divisor=divisor)


dialect = Loralib()
