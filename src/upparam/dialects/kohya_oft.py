"""sd-scripts' own OFT: turns of the denoiser's outputs, `oft_unet_<module>.oft_blocks` and one `alpha`, which limits them and is no scale.

Sources: kohya-ss/sd-scripts networks/oft.py (SD 1, 2 and SDXL) and networks/oft_flux.py (FLUX: `oft_blocks.0`, `.1`, ... for the parts of fused
weights). Q = B - B^T, no longer than alpha times the outputs; W' = R^T W by blocks, R = (I + Q) (I - Q)^-1: LyCORIS' Diag-OFT without row factors.
The loader takes the number of blocks and alpha from the first names it finds, builds the modules it would train, and passes over all others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from upparam.adapter import Adapter, Target
from upparam.algorithms import called
from upparam.algorithms.base import Delta, ScaleRule, Scaling
from upparam.algorithms.oft import DiagOFT
from upparam.bases.layouts import LayoutMap
from upparam.containers.base import TensorFile
from upparam.dialects import kohya_metadata
from upparam.dialects.base import Bundle, Match, NamedTensors, Package, ReadOptions
from upparam.dialects.carried import HASHES, carried
from upparam.dialects.placing import base_of, layout_for, note_layout, resolve, to_targets
from upparam.dialects.refusing import refuse
from upparam.dialects.spelling import form_of
from upparam.dialects.words import alpha_tensor
from upparam.dtypes import DTYPES
from upparam.errors import DeadAdapterError, MalformedError, Problem
from upparam.findings import warning
from upparam.patterns import regex
from upparam.tensors import Tensor

_NAME = regex(r"(oft_unet_\w+)\.(?:oft_blocks(?:\.(\d))?|alpha)")
_OURS, _THEIRS = "lora_unet_", "oft_unet_"
_LAYOUTS = ("kohya", "kohya-diffusers", "kohya-original")
_FAMILIES = {"sd": "networks.oft", "flux": "networks.oft_flux"}
"""Families of bases that have such a network, and its module."""
_ATTENTION = regex(r".*_attn[12]_to_(q|k|v|out_0)|.*_(img|txt)_attn_(qkv|proj)")
_TRANSFORMER = regex(r".*_(transformer_blocks_\d+_\w+|proj_in|proj_out)|.*(double|single)_blocks_\d+_\w+")
_WHOLE = regex(r".*(_ff_|_mlp).*")
"""A name by which the loader knows that more than attention was trained."""


class KohyaOFT:
    """The dialect."""

    name = "kohya-oft"
    title = "sd-scripts OFT (networks.oft)"
    writable = True
    algorithms: tuple[str, ...] = ("diag-oft",)

    def match(self, file: TensorFile) -> Match | None:
        """The share of names that are `oft_unet_<module>.oft_blocks` or `.alpha`."""
        hits = [name for name in file.tensors if _NAME.fullmatch(name)]
        if not any(".oft_blocks" in name for name in hits):
            return None
        evidence = [f"{len(hits)} of {len(file.tensors)} names are oft_unet_<module>.oft_blocks or .alpha"]
        return Match(self.name, round(0.98 * len(hits) / len(file.tensors), 3), tuple(evidence))

    def gather(self, file: TensorFile, siblings: Sequence[TensorFile]) -> list[TensorFile]:
        """One file is one adapter."""
        return [file]

    def read(self, bundle: Bundle, options: ReadOptions) -> Adapter:
        """The adapter. Raises DeadAdapterError where there is no alpha, or one of 0, which lets nothing turn."""
        file = bundle.main
        adapter = Adapter(
            {}, self.name, metadata=dict(file.metadata), files=(str(file.path),), findings=list(file.findings), layout="kohya"
        )
        blocks, alphas = _grouped(file, adapter)
        limit = _limit(alphas, file, adapter)
        deltas = {module: [_turn(file, module, part, limit) for part in parts] for module, parts in blocks.items()}
        shapes = {_OURS + module[len(_THEIRS) :]: (sum(delta.shape[0] for delta in parts), 0) for module, parts in deltas.items()}
        stated = kohya_metadata.stated_base(file.metadata)
        found = resolve(shapes, _LAYOUTS, options.base, stated=stated, underscored=True)
        if found is not None:
            adapter.base, adapter.layout = found.hint, "reference"
            note_layout(adapter.spelling, found.layout)
        for module, parts in deltas.items():
            foreign = None if found is None else found.names.get(_OURS + module[len(_THEIRS) :])
            placed = None if found is None or foreign is None else _placed(found.layout, foreign, parts)
            if placed is not None:
                adapter.deltas |= placed
            elif found is None and len(parts) == 1:
                adapter.deltas[Target(module)] = parts[0]
            else:
                adapter.leftovers |= {name: tensor for name, tensor in file.tensors.items() if name.startswith(f"{module}.oft_blocks")}
                why = (
                    "which parts of a fused weight these blocks turn follows from the base"
                    if found is None
                    else f"{found.layout.base.name} has no such module"
                )
                adapter.findings.append(warning("unknown-module", module, why))
        return adapter

    def write(self, adapter: Adapter, options: Mapping[str, Any]) -> Package:
        """One safetensors file. Raises RefusedError for all but turns of the denoiser's outputs under one limit, in as many blocks each."""
        problems: list[str | Problem] = [f"{extra.kind.value} {extra.name}" for extra in adapter.extras]
        problems += [f"{target}: {why}" for target, delta in adapter.deltas.items() if (why := _unfit(target, delta)) is not None]
        base = base_of(adapter, options)
        if base is not None and base.family not in _FAMILIES:
            problems.append(f"{base.name}: sd-scripts trains OFT of SD 1, 2, SDXL and FLUX alone")
        refuse(self.name, problems)
        deltas = {target: delta for target, delta in adapter.deltas.items() if isinstance(delta, DiagOFT)}
        refuse(self.name, _several(deltas, "blocks", {target: delta.blocks.shape[0] for target, delta in deltas.items()}))
        refuse(self.name, _several(deltas, "limit", {target: delta.constraint for target, delta in deltas.items()}))
        named = self._named(adapter, options, deltas)
        fused = base is not None and base.family == "flux"
        tensors: dict[str, Tensor] = {}
        for module, parts in named.items():
            for number, delta in enumerate(parts):
                tensors[f"{module}.oft_blocks{f'.{number}' if fused else ''}"] = delta.blocks
            tensors[f"{module}.alpha"] = _alpha(adapter, parts[0])
        metadata, late = kohya_metadata.stamped_later(tensors, _metadata(adapter, base.family if base is not None else "", deltas))
        return Package({"lora.safetensors": NamedTensors(tensors, metadata, late=late)}, folder=False)

    def _named(self, adapter: Adapter, options: Mapping[str, Any], deltas: Mapping[Target, DiagOFT]) -> dict[str, list[DiagOFT]]:
        """The turns by the file's names, those of a fused weight's parts in order. Raises RefusedError for what the loader would pass over."""
        if adapter.layout == "kohya":
            return {target.module: [delta] for target, delta in deltas.items()}
        spelled = adapter.spelling.get("layout") if adapter.dialect == self.name else None
        one = layout_for(adapter, options, spelled or "kohya")
        problems: list[str | Problem] = []
        found: dict[str, list[DiagOFT]] = {}
        for target in deltas:
            place = one.to_foreign(target.module)
            if place is None or not place.foreign.startswith(_OURS) or target.rows is not None or not place.part.order.plain:
                problems.append(f"{target}: no module of the denoiser that sd-scripts turns")
                continue
            parts = one.to_reference(place.foreign)
            missing = next((part.module for part in parts if Target(part.module) not in deltas), None)
            if missing is not None:
                problems.append(f"{target}: a part of a fused weight of which {missing} is not turned")
                continue
            found[_THEIRS + place.foreign[len(_OURS) :]] = [deltas[Target(part.module)] for part in parts]
        passed = _TRANSFORMER if any(_WHOLE.fullmatch(module) for module in found) else _ATTENTION
        problems += [
            f"{module}: the loader builds no such module, and would pass over it" for module in found if not passed.fullmatch(module)
        ]
        refuse(self.name, problems)
        return found


def _grouped(file: TensorFile, adapter: Adapter) -> tuple[dict[str, list[Tensor]], dict[str, Tensor]]:
    """(blocks of each module in order, alphas); what else there is goes to the leftovers."""
    numbered: dict[str, dict[int, Tensor]] = {}
    alphas: dict[str, Tensor] = {}
    for name, tensor in file.tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            adapter.leftovers[name] = tensor
        elif name.endswith(".alpha"):
            alphas[match[1]] = tensor
        else:
            numbered.setdefault(match[1], {})[int(match[2] or 0)] = tensor
    return {module: [parts[number] for number in sorted(parts)] for module, parts in numbered.items()}, alphas


def _limit(alphas: Mapping[str, Tensor], file: TensorFile, adapter: Adapter) -> float:
    """The first alpha, which the loader takes for all modules."""
    if not alphas:
        raise DeadAdapterError("no alpha: how far the blocks may turn is in no tensor, and sd-scripts loads no such file", file=file.path)
    values = {module: tensor.scalar() for module, tensor in alphas.items()}
    first = next(iter(values.values()))
    other = next((module for module, value in values.items() if value != first), None)
    if not first > 0:
        raise DeadAdapterError(
            "alpha is 0: it limits every turn to none, and the adapter changes nothing", file=file.path, found=f"{first:g}"
        )
    if other is not None:
        adapter.findings.append(
            warning("alphas-differ", file.name, f"sd-scripts takes the first alpha, {first:g}, for all modules", f"{other} has {values[other]:g}")
        )  # fmt: skip
    kinds = {form_of(tensor) for tensor in alphas.values()}
    if len(kinds) == 1:
        adapter.spelling["alpha"] = kinds.pop()
    return first


def _turn(file: TensorFile, module: str, blocks: Tensor, limit: float) -> DiagOFT:
    try:
        return DiagOFT(blocks, constraint=limit, scaling=Scaling(ScaleRule.BAKED, limit))
    except MalformedError as problem:
        raise MalformedError(problem.message, file=file.path, tensor=module, expected=problem.expected, found=problem.found) from None


def _placed(one: LayoutMap, foreign: str, turns: Sequence[DiagOFT]) -> dict[Target, Delta] | None:
    """The turns under the reference targets, one for each part of a fused weight; None where they are not its parts."""
    parts = one.to_reference(foreign)
    if len(turns) == 1:
        return to_targets(one, foreign, turns[0])
    if [delta.shape[0] for delta in turns] != [part.shape[0] for part in parts]:
        return None
    return {Target(part.module): delta for part, delta in zip(parts, turns, strict=True)}


def _unfit(target: Target, delta: Delta) -> str | None:
    if type(delta) is not DiagOFT or target.parameter != "weight":
        return f"{called(delta.algorithm)} delta" + ("" if target.parameter == "weight" else f" of the {target.parameter}")
    if delta.made or delta.rescale is not None:
        return "turns that come with factors for rows"
    return None if delta.constraint else "turns without a limit, where sd-scripts has one"


def _several(deltas: Mapping[Target, DiagOFT], what: str, values: Mapping[Target, float]) -> list[str]:
    """Targets whose value is another than most have."""
    common = Counter(values.values()).most_common(1)[0][0] if values else None
    return [
        f"{target}: {what} {values[target]:g} beside {common:g}, and the loader takes the first for all"
        for target in deltas
        if values[target] != common
    ]


def _alpha(adapter: Adapter, delta: DiagOFT) -> Tensor:
    form = adapter.spelling.get("alpha") if adapter.dialect == KohyaOFT.name else None
    dtype, dims = (DTYPES[form.split()[0]], int(form.split()[1])) if form else (None, 0)
    return alpha_tensor(delta.constraint, dtype, delta.blocks.dtype, dims, exact=True)


def _metadata(adapter: Adapter, family: str, deltas: Mapping[Target, DiagOFT]) -> dict[str, str]:
    """What the adapter brought; of one from elsewhere also what sd-scripts says of its network."""
    if adapter.dialect == KohyaOFT.name or not deltas:
        return adapter.metadata
    first = next(iter(deltas.values()))
    own = {
        "ss_network_module": _FAMILIES.get(family, "networks.oft"),
        "ss_network_dim": str(first.blocks.shape[0]),
        "ss_network_alpha": f"{first.constraint:g}",
    }
    return {**carried(adapter, KohyaOFT.name), **own, HASHES[0]: ""}


dialect = KohyaOFT()
