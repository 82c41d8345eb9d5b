"""GGUF adapters: llama.cpp's LoRA. `blk.0.attn_q.weight.lora_a` (r, in) and `.lora_b` (out, r), one alpha for all in the header.

Sources: ggml-org/llama.cpp convert_lora_to_gguf.py (writer), src/llama-adapter.cpp and llama-adapter.h (reader and its scale),
src/llama-graph.cpp build_inp_embd (embeddings). Names and the order of rows are those of llama.cpp's own conversion of the base
(`upparam.bases.layouts.gguf`): of Llama and Mistral the rows of lora_b of q and k are interleaved, lora_a stays as it is.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from upparam.adapter import Adapter, Extra, ExtraKind, Target
from upparam.algorithms import called
from upparam.algorithms.base import Delta, Scaling
from upparam.algorithms.lora import LoRA
from upparam.algorithms.slicing import stack
from upparam.bases import inventory
from upparam.bases.layouts import LayoutMap
from upparam.bases.layouts.gguf import architecture
from upparam.containers import file_source
from upparam.containers.base import TensorFile
from upparam.containers.gguf import QuantisedTensor, dequantised
from upparam.dialects.base import Bundle, Match, NamedTensors, Package, ReadOptions
from upparam.dialects.gguf_base import ARCHITECTURE, check_config, resolved
from upparam.dialects.placing import base_of, layout_for, to_foreign, to_targets
from upparam.dialects.refusing import other_scale, refuse
from upparam.dialects.words import alpha_for
from upparam.errors import DeadAdapterError, MalformedError, RefusedError, UsageError
from upparam.findings import error, info, warning
from upparam.patterns import regex
from upparam.tensors import Tensor
from upparam.wording import counted

ALPHA = "adapter.lora.alpha"
_INVOCATION = "adapter.alora.invocation_tokens"
_NAME = regex(r"(.+)\.weight\.(lora_[ab])")
_NORM = regex(r"(.+_norm)\.weight")
_EMBEDDING = "token_embd"
_EXPERTS = regex(r"blk\.\d+\.ffn_(gate|down|up)_exps")
_FILE_TYPES = {"float32": 0, "float16": 1, "bfloat16": 32}
"""Factor dtype -> `general.file_type` (gguf-py/gguf/constants.py LlamaFileType)."""


class GgufLora:
    """The dialect."""

    name = "gguf-lora"
    title = "GGUF adapter (llama.cpp)"
    writable = True
    algorithms: tuple[str, ...] = ("lora",)

    def match(self, file: TensorFile) -> Match | None:
        """A GGUF file that says it is a LoRA, or whose tensors are named `<tensor>.lora_a` and `.lora_b`."""
        if file.container != "gguf":
            return None
        hits = sum(1 for name in _all_names(file) if _NAME.fullmatch(name))
        if file.metadata.get("adapter.type") == "lora":
            return Match(self.name, 1.0, ("adapter.type is lora", f"{hits} of {len(_all_names(file))} names end in .lora_a or .lora_b"))
        return Match(self.name, 0.8, (f"{hits} names end in .weight.lora_a or .lora_b",)) if hits else None

    def gather(self, file: TensorFile, siblings: Sequence[TensorFile]) -> list[TensorFile]:
        """One file is one adapter."""
        return [file]

    def read(self, bundle: Bundle, options: ReadOptions) -> Adapter:
        """The adapter; names stay llama.cpp's where the base, on which the order of rows depends, is not certain.

        Raises DeadAdapterError when no tensor has both factors, RefusedError for factors quantised to other types than Q8_0.
        """
        file = bundle.main
        adapter = Adapter({}, self.name, metadata=dict(file.metadata), files=(str(file.path),), findings=list(file.findings))
        pairs, norms = _sorted(file, adapter)
        scaling = _scaling(adapter, file, options)
        deltas: dict[str, Delta] = {}
        experts: dict[str, list[LoRA]] = {}
        for name, pair in pairs.items():
            try:
                if len(pair["lora_b"].shape) == 3:
                    experts[name] = _experts(pair, scaling)
                else:
                    deltas[name] = _delta(name, pair, scaling)
            except MalformedError as problem:
                raise MalformedError(problem.message, file=file.path, tensor=name, expected=problem.expected, found=problem.found) from None
        if not deltas and not experts:
            raise DeadAdapterError(
                "no tensor has both its lora_a and its lora_b", file=file.path, found=", ".join(list(_all_names(file))[:3])
            )
        _place(adapter, deltas, experts, norms, options)
        if _INVOCATION in file.metadata:
            reason = "it is active only behind its invocation tokens (activated LoRA)"
            adapter.hold_under(reason, file.name, f"{_INVOCATION} {file.metadata[_INVOCATION][:60]}")
        return adapter

    def write(self, adapter: Adapter, options: Mapping[str, Any]) -> Package:
        """One GGUF file. Raises RefusedError for extras, several alphas, and modules or bases that llama.cpp does not have."""
        own = adapter.dialect == self.name
        problems = [f"{extra.kind.value} {extra.name}" for extra in adapter.extras if not (own and _is_norm(extra))]
        problems += [
            f"{target}: {problem}" for target, delta in adapter.deltas.items() if (problem := _unloadable(target, delta)) is not None
        ]
        refuse(self.name, problems)
        if not adapter.deltas:
            raise RefusedError("llama.cpp loads no adapter without factors", file=adapter.files[0] if adapter.files else None)
        if own and adapter.layout == "gguf":
            weights, norms = _by_weight(adapter), {}
            arch = adapter.metadata.get(ARCHITECTURE)
        else:
            base = base_of(adapter, options)
            if base is not None:
                check_config(base)
            one = layout_for(adapter, options, "gguf")
            weights, norms = _placed(adapter, one), _norms(adapter, one)
            arch = architecture(one.base)
        if arch is None:
            raise RefusedError("llama.cpp's name for the base's architecture is not known", remedy="name the base with --base")
        metadata = _metadata(adapter, arch, _alpha(weights))
        tensors = {name: tensor for weight, members in weights.items() for name, tensor in _factors(weight, members).items()}
        return Package({"adapter.gguf": NamedTensors(tensors | norms, metadata, container="gguf")}, folder=False)


def _all_names(file: TensorFile) -> Sequence[str]:
    return [*file.tensors, *_quantised(file)]


def _quantised(file: TensorFile) -> Mapping[str, QuantisedTensor]:
    found: Mapping[str, QuantisedTensor] = file.structure.get("quantised", {}) if isinstance(file.structure, dict) else {}
    return found


def _sorted(file: TensorFile, adapter: Adapter) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """(factors by tensor name without `.weight`, norms). What makes no pair goes to the leftovers."""
    tensors = dict(file.tensors) | _plain(file, adapter)
    pairs: dict[str, dict[str, Tensor]] = {}
    norms: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if (match := _NAME.fullmatch(name)) is not None:
            pairs.setdefault(match.group(1), {})[match.group(2)] = tensor
        elif (match := _NORM.fullmatch(name)) is not None:
            norms[match.group(1)] = tensor
        else:
            adapter.leftovers[name] = tensor
    for name, pair in list(pairs.items()):
        if len(pair) < 2:
            adapter.leftovers |= {f"{name}.weight.{role}": tensor for role, tensor in pairs.pop(name).items()}
            adapter.findings.append(error("orphan", name, "a factor without its partner: llama.cpp does not load the file"))
    return pairs, norms


def _plain(file: TensorFile, adapter: Adapter) -> dict[str, Tensor]:
    """Q8_0 factors as the float32 numbers they stand for."""
    quantised = _quantised(file)
    if not quantised:
        return {}
    source = next((tensor.source for tensor in file.tensors.values()), None)
    if source is None:
        if file.wrapping:
            raise RefusedError("quantised factors inside an archive cannot be read", file=file.path, remedy="unpack it first")
        source = file_source(file.path)
    found: dict[str, Tensor] = {}
    for name, tensor in quantised.items():
        values = dequantised(source, tensor)
        if values is None:
            raise RefusedError(
                "factors quantised to this type cannot be read", file=file.path, tensor=name, expected="Q8_0 or plain numbers", found=tensor.type,
                remedy="convert the adapter again with --outtype f32",
            )  # fmt: skip
        found[name] = values
    adapter.findings.append(
        info(
            "dequantised",
            file.name,
            f"{counted(len(found), 'Q8_0 factor', 'is', 'are')} read as the float32 values {'it stands' if len(found) == 1 else 'they stand'} for",
        )
    )
    return found


def _scaling(adapter: Adapter, file: TensorFile, options: ReadOptions) -> Scaling:
    """alpha / rank of each pair; a missing alpha and one of 0 mean a multiplier of 1 to llama.cpp."""
    text = file.metadata.get(ALPHA)
    if text is None:
        return Scaling()
    try:
        alpha = float(text)
    except ValueError:
        raise MalformedError(f"metadata {ALPHA} is no number", file=file.path, found=text[:40]) from None
    if options.alpha is not None and options.alpha != alpha:
        raise UsageError(
            "the alpha given contradicts the adapter's own", file=file.path, expected=f"{alpha:g} ({ALPHA})", found=options.alpha
        )
    if alpha == 0:
        adapter.findings.append(warning("alpha-zero", file.name, f"{ALPHA} is 0, which llama.cpp takes as a multiplier of 1"))
        return Scaling()
    return Scaling(alpha=alpha)


def _delta(name: str, pair: Mapping[str, Tensor], scaling: Scaling) -> LoRA:
    """The LoRA of one weight. Of an embedding lora_a is (tokens, r) and lora_b (dim, r): the rows of lora_a are looked up by token."""
    down, up = pair["lora_a"], pair["lora_b"]
    if name == _EMBEDDING:
        return LoRA(down, up.T, scaling, embedding=True)
    return LoRA(up, down, scaling)


def _experts(pair: Mapping[str, Tensor], scaling: Scaling) -> list[LoRA]:
    """One LoRA for each expert of lora_a (experts, r, in) and lora_b (experts, out, r)."""
    down, up = pair["lora_a"], pair["lora_b"]
    if len(down.shape) != 3 or not up.shape[0] or (down.shape[0], down.shape[1]) != (up.shape[0], up.shape[2]):
        raise MalformedError(
            "lora_a and lora_b do not fit together", expected="(experts, r, in), (experts, out, r)", found=f"{down.shape}, {up.shape}"
        )
    return [
        LoRA(up.rows(number, number + 1).reshape(up.shape[1:]), down.rows(number, number + 1).reshape(down.shape[1:]), scaling)
        for number in range(up.shape[0])
    ]


def _place(
    adapter: Adapter, deltas: Mapping[str, Delta], experts: Mapping[str, Sequence[LoRA]], norms: Mapping[str, Tensor], options: ReadOptions
) -> None:
    """Name the base and put each delta under its reference targets, rows in the reference's order."""
    shapes = {name: delta.shape for name, delta in deltas.items()}
    shapes |= {name: (sum(piece.shape[0] for piece in pieces), pieces[0].shape[1]) for name, pieces in experts.items() if pieces}
    found = resolved(adapter, shapes, options)
    adapter.layout = "gguf" if found is None else "reference"
    one = None if found is None else found.layout
    for name, delta in deltas.items():
        if one is None:
            adapter.deltas[Target(name)] = delta
        else:
            adapter.deltas |= to_targets(one, name, delta)
    for name, pieces in experts.items():
        parts = one.to_reference(name) if one is not None else ()
        for number, piece in enumerate(pieces):
            adapter.deltas[Target(parts[number].module if parts else f"{name}.{number}")] = piece
    for name, tensor in norms.items():
        module = None if one is None or not one.to_reference(name) else one.to_reference(name)[0].module
        if module is None or adapter.metadata.get(ARCHITECTURE, "").startswith("gemma"):
            # llama.cpp adds 1 to Gemma's norms; without the base it is not certain which module is meant.
            adapter.leftovers[f"{name}.weight"] = tensor
        else:
            adapter.extras.append(Extra(ExtraKind.SAVED_MODULE, f"{module}.weight", tensor))
    if norms:
        adapter.findings.append(
            info("norms", next(iter(norms)), f"{counted(len(norms), 'norm', 'is', 'are')} in the file, which llama.cpp leaves out")
        )


def _is_norm(extra: Extra) -> bool:
    return extra.kind is ExtraKind.SAVED_MODULE and len(extra.tensor.shape) == 1 and extra.name.endswith(".weight")


def _unloadable(target: Target, delta: Delta) -> str | None:
    if target.parameter != "weight":
        return f"a delta of the {target.parameter}"
    if type(delta) is not LoRA:
        return f"{called(delta.algorithm)} delta"
    if delta.mid is not None:
        return "a Tucker core"
    if len(delta.shape) != 2:
        return "a convolution"
    dtypes = {delta.up.dtype.name, delta.down.dtype.name}
    return None if dtypes <= _FILE_TYPES.keys() else f"factors of {', '.join(sorted(dtypes))}, which llama.cpp does not compute with"


def _alpha(weights: Mapping[str, Sequence[Delta]]) -> float | None:
    """The one alpha that gives every delta its scale as alpha / rank; None where all are 1 with ranks of their own.

    Raises RefusedError where there is none, and where a scale is unknown.
    """
    deltas = [(weight, delta) for weight, members in weights.items() for delta in members]
    wanted = []
    for _, delta in deltas:
        alpha = alpha_for(delta)
        wanted.append(float(delta.rank or 1) if alpha is None else alpha)
    low, high = min(wanted), max(wanted)
    if low == high == 0:
        refuse("gguf-lora", ["a scale of 0, which llama.cpp takes as 1"])
    if high - low <= 1e-12 * abs(high):
        return low
    if any(delta.known_scale() != 1.0 for _, delta in deltas):
        common, _ = Counter(wanted).most_common(1)[0]
        others = [(*one, alpha) for one, alpha in zip(deltas, wanted, strict=True) if alpha != common]
        refuse(
            "gguf-lora",
            [
                other_scale(weight, delta, common / (delta.rank or 1), f"alpha {alpha:g} beside {common:g}, and the header has one for all")
                for weight, delta, alpha in others
            ],
        )
    return None


def _placed(adapter: Adapter, one: LayoutMap) -> dict[str, list[Delta]]:
    """The deltas by llama.cpp's name of their weight, rows in its order; of stacked experts one delta for each."""
    experts: dict[str, dict[int, Delta]] = {}
    others: dict[Target, Delta] = {}
    for target, delta in adapter.deltas.items():
        place = one.to_foreign(target.module)
        if place is not None and _EXPERTS.fullmatch(place.foreign) and target.rows is None:
            number = [part.module for part in one.to_reference(place.foreign)].index(target.module)
            experts.setdefault(place.foreign, {})[number] = delta
        else:
            others[target] = delta
    found = {name: [delta] for name, delta in to_foreign(one, others).items()}
    for name, members in experts.items():
        if len(members) != len(one.to_reference(name)):
            listed = ", ".join(map(str, sorted(members)))
            refuse("gguf-lora", [f"{name}: only experts {listed}; llama.cpp stacks all of them in one tensor"])
        found[name] = [members[number] for number in range(len(members))]
    return found


def _by_weight(adapter: Adapter) -> dict[str, list[Delta]]:
    """The deltas of an adapter that kept llama.cpp's names, by the name of their weight."""
    found: dict[str, list[Delta]] = {}
    for target, delta in adapter.deltas.items():
        name, _, number = target.module.rpartition(".")
        found.setdefault(name if number.isdigit() and _EXPERTS.fullmatch(name) else target.module, []).append(delta)
    return found


def _norms(adapter: Adapter, one: LayoutMap) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for extra in adapter.extras:
        place = one.to_foreign(extra.name.removesuffix(".weight"))
        if place is None:
            raise RefusedError(f"{extra.kind.value} has no name in the {one.name} layout of {one.base.name}", tensor=extra.name)
        found[f"{place.foreign}.weight"] = extra.tensor
    return found


def _factors(weight: str, members: Sequence[Delta]) -> dict[str, Tensor]:
    """The two factors of a weight; those of experts stacked."""
    up, down = [delta.factors()["up"] for delta in members], [delta.factors()["down"] for delta in members]
    if _EXPERTS.fullmatch(weight):
        if len({(one.shape, one.dtype, other.shape, other.dtype) for one, other in zip(up, down, strict=True)}) > 1:
            refuse("gguf-lora", [f"{weight}: experts of several ranks or dtypes; llama.cpp stacks them in one tensor"])
        a, b = (stack(tensors).reshape((len(tensors), *tensors[0].shape)) for tensors in (down, up))
    elif weight == _EMBEDDING:
        a, b = up[0], down[0].T
    else:
        a, b = down[0], up[0]
    return {f"{weight}.weight.lora_a": a, f"{weight}.weight.lora_b": b}


def _metadata(adapter: Adapter, arch: str, alpha: float | None) -> dict[str, str]:
    """The header: what llama.cpp checks, the base where it is stated, and what the adapter brought along."""
    brought = {key: value for key, value in adapter.metadata.items() if key not in (ALPHA, "format", "general.alignment")}
    dtypes = adapter.dtypes()
    kind = _FILE_TYPES[max(dtypes, key=lambda name: dtypes[name])] if dtypes else 0
    found = {
        ARCHITECTURE: arch,
        "general.type": "adapter",
        "adapter.type": "lora",
        "general.file_type": str(kind),
        "general.quantization_version": "2",
    }
    if adapter.base is not None and adapter.base.stated and adapter.dialect != GgufLora.name:
        known = inventory.known().get(inventory.resolve(adapter.base.name) or "")
        if known is not None and known.ids and "/" in known.ids[0]:
            owner, _, name = known.ids[0].partition("/")
            found |= {
                "general.base_model.count": "1", "general.base_model.0.name": name, "general.base_model.0.organization": owner,
                "general.base_model.0.repo_url": f"https://huggingface.co/{known.ids[0]}",
            }  # fmt: skip
    found |= {
        key: value for key, value in brought.items() if key not in ("general.file_type", ARCHITECTURE, "general.type", "adapter.type")
    }
    return found | ({} if alpha is None else {ALPHA: json.dumps(alpha)})


dialect = GgufLora()
