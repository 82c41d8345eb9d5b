"""LitGPT (and lit-gpt before it): `lit_model.pth.lora`, `transformer.h.0.attn.qkv.lora_A` (n * r, in), `.lora_B` (rows, r).

Sources: Lightning-AI/litgpt litgpt/lora.py (factors, the scale alpha / r), litgpt/finetune/lora.py (the files), litgpt/scripts/merge_lora.py
(hyperparameters.yaml, model_config.yaml), litgpt/scripts/convert_lit_checkpoint.py (names). Rank and alpha are in hyperparameters.yaml, as is
which of q, k and v are adapted; model_config.yaml names the base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from upparam.adapter import Adapter, BaseHint, Target
from upparam.algorithms.base import Delta, Scaling
from upparam.algorithms.lora import LoRA
from upparam.algorithms.slicing import reorder
from upparam.bases import inventory
from upparam.bases.base import Base
from upparam.bases.layouts import LayoutMap, find
from upparam.bases.recognise import recognise
from upparam.bases.unfused import lies, unfused
from upparam.containers.base import TensorFile
from upparam.dialects import litgpt_qkv
from upparam.dialects.agreeing import agreed, named
from upparam.dialects.base import Bundle, Match, Package, ReadOptions
from upparam.dialects.litgpt_qkv import PARTS, Heads
from upparam.dialects.placing import Resolved, to_targets
from upparam.dialects.scale_beside import scale_beside
from upparam.errors import DeadAdapterError, MalformedError, RefusedError, UpparamError, UsageError
from upparam.findings import error, info
from upparam.patterns import regex
from upparam.tensors import Tensor
from upparam.wording import counted

PARAMETERS, MODEL = "hyperparameters.yaml", "model_config.yaml"
_NAME = regex(
    r"(?:.+/)?(transformer\.h\.\d+\.(?:attn\.(?:attn|qkv|proj)|mlp\.(?:fc(?:_[12])?|proj|gate|experts\.\d+\.(?:fc_[12]|proj)))|lm_head)\.lora_([AB])"
)
_LAYER = regex(r"transformer\.h\.(\d+)\.(.+)")
_WORDS = {"attn.proj": "self_attn.o_proj", "mlp.fc_1": "mlp.gate_proj", "mlp.fc_2": "mlp.up_proj", "mlp.proj": "mlp.down_proj"}
_QKV = (".attn.qkv", ".attn.attn")


class LitGPT:
    """The dialect; read only: LitGPT merges such files, and everything else takes PEFT's."""

    name = "litgpt"
    title = "LitGPT adapter (lit_model.pth.lora)"
    writable = False
    algorithms: tuple[str, ...] = ("lora",)

    def match(self, file: TensorFile) -> Match | None:
        """Names `transformer.h.<n>.attn.qkv.lora_A` and the like. Factors among base weights (a whole `lit_model.pth`) count less."""
        hits = [name for name in file.tensors if _NAME.fullmatch(name)]
        if not any(".h." in name for name in hits):
            return None
        evidence = f"{len(hits)} of {len(file.tensors)} names are transformer.h.<n>.<module>.lora_A or .lora_B, such as {hits[0]}"
        if len(hits) < len(file.tensors):
            return Match(self.name, 0.95, (evidence, f"beside {counted(len(file.tensors) - len(hits), 'other tensor')}"))
        return Match(self.name, 0.97, (evidence,))

    def gather(self, file: TensorFile, siblings: Sequence[TensorFile]) -> list[TensorFile]:
        """One file is one adapter; what it was trained with lies beside it."""
        return [file]

    def read(self, bundle: Bundle, options: ReadOptions) -> Adapter:
        """The adapter; names stay LitGPT's where the base is not certain. The scale is unknown where neither file nor user says it.

        Raises DeadAdapterError when no module has both factors, MalformedError for factors that do not fit together, UsageError where the
        rows of q, k and v follow from a base that is not known, or which of them are adapted is not stored (`options.targets`: q, k, v),
        and RefusedError for files of which only the version that made them could tell what they change.
        """
        file = bundle.main
        said = bundle.side_yaml(PARAMETERS) or {}
        adapter = Adapter(
            {}, self.name, metadata=dict(file.metadata), config=dict(said), files=(str(file.path),), findings=list(file.findings)
        )
        pairs = _pairs(file, adapter)
        if not pairs:
            raise DeadAdapterError("no module has both its lora_A and its lora_B", file=file.path, found=", ".join(list(file.tensors)[:3]))
        ranks = {pair["B"].shape[-1] for pair in pairs.values() if pair["B"].shape}
        scaling = scale_beside(adapter, file, PARAMETERS, said.get("lora_alpha"), said.get("lora_r"), ranks, options)
        model = bundle.side_yaml(MODEL) or {}
        told = litgpt_qkv.heads_of(model)
        found = _resolved(adapter, pairs, told, _stated(said, model), options)
        adapter.layout = self.name if found is None else "reference"
        dated = bool(said) or file.name == "lit_model.pth.lora"
        for module, pair in pairs.items():
            try:
                if module.endswith(_QKV):
                    own = module.removesuffix(".attn") + ".qkv" if module.endswith(".attn.attn") else module
                    heads = told if found is None else litgpt_qkv.heads_in(found.layout.base, found.layout, own)
                    made = _qkv(own, _parts(pair, heads, said, options, scaling, module, dated), heads, found)
                else:
                    made = _plain(module, pair, scaling, found)
            except UpparamError as problem:
                if problem.file is None:
                    problem.locate(file=file.path, tensor=module)
                raise
            adapter.deltas |= made
        return adapter

    def write(self, adapter: Adapter, options: Mapping[str, Any]) -> Package:
        """Always raises RefusedError."""
        raise RefusedError("upparam does not write LitGPT's files", remedy="convert to peft")


def _pairs(file: TensorFile, adapter: Adapter) -> dict[str, dict[str, Tensor]]:
    """Both factors of each module. The base's own weights beside them are left out, what makes no pair goes to the leftovers."""
    pairs: dict[str, dict[str, Tensor]] = {}
    names: dict[str, list[str]] = {}
    rest: dict[str, Tensor] = {}
    for name, tensor in file.tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            rest[name] = tensor
        else:
            pairs.setdefault(match.group(1), {})[match.group(2)] = tensor
            names.setdefault(match.group(1), []).append(name)
    for module, pair in list(pairs.items()):
        if len(pair) < 2:
            del pairs[module]
            adapter.leftovers |= {name: file.tensors[name] for name in names[module]}
            adapter.findings.append(error("orphan", module, "a factor without its partner: the module cannot be applied"))
    weights = [name for name in rest if name.endswith((".linear.weight", ".linear.bias"))]
    if weights and pairs:
        own = {name for name in rest if name.rpartition("/")[2].startswith(("transformer.", "lm_head."))}
        message = f"the base's own weights, as a training checkpoint holds them, are left out: {counted(len(own), 'tensor')}"
        adapter.findings.append(info("base-weights-beside", file.name, message, f"such as {weights[0]}"))
        rest = {name: tensor for name, tensor in rest.items() if name not in own}
    adapter.leftovers |= rest
    return pairs


def _stated(said: Mapping[str, Any], model: Mapping[str, Any]) -> tuple[str, str] | None:
    """(an inventory's name, the file that names it): by hf_config in model_config.yaml, else by the folder the training began from."""
    hub = model.get("hf_config")
    words = [f"{hub.get('org')}/{hub.get('name')}"] if isinstance(hub, dict) else []
    words += [model["name"]] if isinstance(model.get("name"), str) else []
    for file, names in ((MODEL, words), (PARAMETERS, ["/".join(str(said.get("checkpoint_dir", "")).rsplit("/", 2)[-2:])])):
        own = next((own for name in names if (own := inventory.resolve(name)) is not None), None)
        if own is not None:
            return own, file
    return None


def _layout(base: Base) -> LayoutMap | None:
    return find(unfused(base), "litgpt")


def _resolved(
    adapter: Adapter, pairs: Mapping[str, Mapping[str, Tensor]], told: Heads | None, stated: tuple[str, str] | None, options: ReadOptions
) -> Resolved | None:
    """The base's layout, and the base named on the adapter; None, with a finding, where what is there does not tell enough."""
    rows = None if told is None else sum(told.rows.values())
    shapes: dict[str, tuple[int, ...]] = {}
    for module, pair in pairs.items():
        fused = module.endswith(_QKV)
        name = module.removesuffix(".attn") + ".qkv" if module.endswith(".attn.attn") else module
        shapes[name] = ((rows or 0) if fused else pair["B"].shape[0], pair["A"].shape[-1])
    if options.base is not None:
        one = _layout(options.base)
        if one is None:
            raise UsageError(
                "LitGPT's names and its order of rows follow from the base", file=options.base.name,
                expected="a model that LitGPT runs and upparam has names for", found="other modules, or no config.json with the number of heads",
            )  # fmt: skip
        return named(adapter, shapes, options.base, one)

    def meant(base: Base) -> LayoutMap | None:
        one = _layout(base)
        for module, pair in pairs.items() if one is not None else ():
            if one is not None and module.endswith(_QKV):
                heads = litgpt_qkv.heads_in(base, one, module.rpartition(".")[0] + ".qkv")
                if heads is None or (told is not None and heads != told) or not litgpt_qkv.possible(pair, heads):
                    return None
        return one

    hints = [] if stated is None else [BaseHint(stated[0], 1.0, (f"{stated[1]} names it",), stated=True)]
    known = {_translated(name): shape for name, shape in shapes.items() if not name.endswith(_QKV)}
    if told is not None:
        known |= {
            f"model.layers.{match.group(1)}.self_attn.{part}_proj": (told.rows[part], shape[1])
            for name, shape in shapes.items() if name.endswith(_QKV) and (match := _LAYER.fullmatch(name)) for part in PARTS
        }  # fmt: skip
    hints += recognise(known) if known else []
    return agreed(adapter, shapes, hints, meant, "no model that LitGPT runs and upparam knows is named beside it or has all these modules")


def _translated(name: str) -> str:
    """transformers' name in most models, for the recogniser."""
    match = _LAYER.fullmatch(name)
    return name if match is None else f"model.layers.{match.group(1)}.{_WORDS.get(match.group(2), match.group(2))}"


def _plain(module: str, pair: Mapping[str, Tensor], scaling: Scaling, found: Resolved | None) -> dict[Target, Delta]:
    down, up = pair["A"], pair["B"]
    if len(down.shape) != 2 or len(up.shape) != 2:
        raise MalformedError("the factors are no matrices", expected="lora_A (r, in), lora_B (out, r)", found=f"{down.shape}, {up.shape}")
    delta = LoRA(up, down, scaling)
    if found is None:
        return {Target(module): delta}
    return {lies(found.layout.base, target.module): piece for target, piece in to_targets(found.layout, module, delta).items()}


def _parts(
    pair: Mapping[str, Tensor],
    heads: Heads | None,
    said: Mapping[str, Any],
    options: ReadOptions,
    scaling: Scaling,
    module: str,
    dated: bool,
) -> dict[str, LoRA]:
    """The deltas of q, k and v. Raises UsageError where their rows are not known."""
    if heads is None:
        raise UsageError(
            "how many rows q, k and v have follows from the base, which is not known",
            remedy=f"name it with --base, or put {MODEL} beside the file",
        )
    parts = litgpt_qkv.adapted(pair, heads, said, options.targets)
    return litgpt_qkv.deltas(pair, heads, parts, scaling, module.endswith(".attn.attn"), dated)


def _qkv(module: str, made: Mapping[str, LoRA], heads: Heads | None, found: Resolved | None) -> dict[Target, Delta]:
    """The deltas of q, k and v under the modules they are of: a slice where the base has them in one, joined where it mixes their rows."""
    rows = {} if heads is None else heads.rows
    starts = {"q": 0, "k": rows.get("q", 0), "v": rows.get("q", 0) + rows.get("k", 0)}
    spans = {part: (start, start + rows[part]) for part, start in starts.items() if part in rows}
    if found is None:
        return {Target(module, spans[part]): delta for part, delta in made.items()}
    modules = found.layout.to_reference(module)
    if len(modules) == len(PARTS):
        base = found.layout.base
        return {lies(base, modules[PARTS.index(part)].module): delta for part, delta in made.items()}
    (whole,) = modules
    if whole.order.plain:
        return {Target(whole.module, spans[part]): delta for part, delta in made.items()}
    joined = litgpt_qkv.stacked([made.get(part, rows[part]) for part in PARTS])
    return {Target(whole.module): reorder(joined, whole.order.reference_rows(sum(rows.values())))}


dialect = LitGPT()
