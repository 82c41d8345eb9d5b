"""XLabs: attention processors of FLUX.1, `double_blocks.0.processor.qkv_lora1.down.weight`. No alpha; every scale is 1.

Sources: XLabs-AI/x-flux src/flux/modules/layers.py (DoubleStreamBlockLoraProcessor), src/flux/xflux_pipeline.py (update_model_with_lora: one
rank for all, a processor loads strictly), train_flux_lora_deepspeed.py; bytedance/USO names its adapters so, too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from upparam.adapter import Adapter, BaseHint, Target
from upparam.algorithms import called
from upparam.algorithms.lora import LoRA
from upparam.bases import inventory
from upparam.bases.base import Base
from upparam.bases.layouts import LayoutMap, find
from upparam.containers.base import TensorFile
from upparam.dialects.base import Bundle, Match, NamedTensors, Package, ReadOptions
from upparam.dialects.carried import carried
from upparam.dialects.placing import PARTS_KEY, Parts, alike, layout_for, take_parts, to_foreign, to_targets, untranslated
from upparam.dialects.refusing import other_rank, other_scale, refuse
from upparam.errors import DeadAdapterError, MalformedError, Problem
from upparam.findings import error, warning
from upparam.patterns import regex
from upparam.tensors import Tensor

_NAME = regex(r"(diffusion_model\.)?((?:double|single)_blocks\.\d+\.processor\.(?:qkv|proj)_lora[12]?)\.(down|up)\.weight")
_FLUX = "flux.1-dev"
_ALIKE = ("flux.1-schnell", "flux.1-fill-dev", "flux.1-control-dev")
"""Variants of FLUX.1 whose attention has the same shapes."""
_PROCESSORS = {"double_blocks": ("qkv_lora1", "proj_lora1", "qkv_lora2", "proj_lora2"), "single_blocks": ("qkv_lora", "proj_lora")}


class XLabs:
    """The dialect."""

    name = "xlabs"
    title = "XLabs (x-flux attention processors)"
    writable = True
    algorithms: tuple[str, ...] = ("lora",)

    def match(self, file: TensorFile) -> Match | None:
        """The share of names that are a FLUX block, `processor` and one of its LoRAs."""
        hits = sum(1 for name in file.tensors if _NAME.fullmatch(name))
        if not hits:
            return None
        evidence = f"{hits} of {len(file.tensors)} names are <block>.processor.<qkv|proj>_lora<1|2>.<down|up>.weight"
        return Match(self.name, round(0.99 * hits / len(file.tensors), 3), (evidence,))

    def gather(self, file: TensorFile, siblings: Sequence[TensorFile]) -> list[TensorFile]:
        """One file is one adapter."""
        return [file]

    def read(self, bundle: Bundle, options: ReadOptions) -> Adapter:
        """The adapter; modules in reference names where FLUX.1 has them in these shapes, else as the file names them (layout 'xlabs')."""
        file = bundle.main
        adapter = Adapter(
            {}, self.name, metadata=dict(file.metadata), files=(str(file.path),), findings=list(file.findings), layout="xlabs"
        )
        deltas = _deltas(file, adapter)
        if not deltas:
            raise DeadAdapterError("no module has both its up and its down factor", file=file.path, found=", ".join(list(file.tensors)[:3]))
        one = _layout(options.base, deltas)
        if one is None:
            adapter.findings.append(
                warning("base-unknown", file.name, "these are not the shapes of FLUX.1's attention; name the base with --base")
            )
            adapter.deltas |= {Target(module): delta for module, delta in deltas.items()}
            return adapter
        stated = options.base is not None
        evidence = ("named by the user", *one.base.evidence) if stated else ("only FLUX.1 goes by these names, and all shapes are its",)
        adapter.base = BaseHint(one.base.name, 1.0 if stated else 0.48, evidence, stated, () if stated else _ALIKE)
        adapter.layout = "reference"
        told = take_parts(adapter.metadata)
        for module, delta in deltas.items():
            if _fits(one, module, delta):
                adapter.deltas |= to_targets(one, module, delta, told)
            else:
                prefix = adapter.spelling.get("prefix", "")
                adapter.leftovers |= {f"{prefix}{module}.down.weight": delta.down, f"{prefix}{module}.up.weight": delta.up}
                adapter.findings.append(
                    warning("unknown-module", module, f"{one.base.name} has no such module of this shape", f"{delta.shape}")
                )
        return adapter

    def write(self, adapter: Adapter, options: Mapping[str, Any]) -> Package:
        """One safetensors file. Raises RefusedError for all but attention, for scales other than 1, and for what x-flux would not load."""
        told: Parts = {}
        named = {target.module: delta for target, delta in adapter.deltas.items()}
        if adapter.layout == "reference":
            named = to_foreign(layout_for(adapter, options, "xlabs"), adapter.deltas, told)
        elif adapter.layout != "xlabs":
            raise untranslated(adapter, options, self.name)
        problems: list[str | Problem] = [f"{extra.kind.value} {extra.name}" for extra in adapter.extras]
        problems += [f"{target}: a delta of the {target.parameter}" for target in adapter.deltas if target.parameter != "weight"]
        prefix = adapter.spelling.get("prefix", "") if adapter.dialect == self.name else ""
        tensors: dict[str, Tensor] = {}
        for module, delta in named.items():
            if type(delta) is not LoRA or delta.mid is not None:
                problems.append(f"{module}: {called(delta.algorithm)} delta{' with a Tucker core' if type(delta) is LoRA else ''}")
            elif delta.known_scale() != 1.0:
                problems.append(
                    other_scale(module, delta, why=f"a scale of {delta.scale:g}, where the files hold no alpha and the scale is 1")
                )
            else:
                tensors |= {f"{prefix}{module}.down.weight": delta.down, f"{prefix}{module}.up.weight": delta.up}
        if adapter.dialect != self.name:
            problems += _unloadable(named)
        refuse(self.name, problems)
        metadata = carried(adapter, self.name)
        if told:
            metadata[PARTS_KEY] = json.dumps(told, separators=(",", ":"))
        return Package({"lora.safetensors": NamedTensors(tensors, metadata)}, folder=False)


def _deltas(file: TensorFile, adapter: Adapter) -> dict[str, LoRA]:
    """Deltas by module; what pairs with nothing goes to the leftovers."""
    factors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in file.tensors.items():
        found = _NAME.fullmatch(name)
        if found is None or adapter.spelling.setdefault("prefix", found.group(1) or "") != (found.group(1) or ""):
            adapter.leftovers[name] = tensor
        else:
            factors.setdefault(found.group(2), {})[found.group(3)] = tensor
    deltas: dict[str, LoRA] = {}
    for module, pair in factors.items():
        if len(pair) == 2:
            try:
                deltas[module] = LoRA(pair["up"], pair["down"])
            except MalformedError as problem:
                problem.locate(file=file.path, tensor=module)
                raise
        else:
            adapter.leftovers |= {f"{adapter.spelling['prefix']}{module}.{role}.weight": tensor for role, tensor in pair.items()}
            adapter.findings.append(error("orphan", module, "a factor without its partner: the module cannot be applied", *pair))
    return deltas


def _layout(base: Base | None, deltas: Mapping[str, LoRA]) -> LayoutMap | None:
    """The naming of the user's base, or of FLUX.1 where every module fits it."""
    if base is not None:
        return find(base, "xlabs")
    one = find(inventory.load(_FLUX), "xlabs")
    return one if one is not None and all(_fits(one, module, delta) for module, delta in deltas.items()) else None


def _fits(one: LayoutMap, module: str, delta: LoRA) -> bool:
    parts = one.to_reference(module)
    return bool(parts) and alike(delta.shape, (one.rows(module), *parts[0].shape[1:]))


def _unloadable(named: Mapping[str, Any]) -> list[str | Problem]:
    """What x-flux's loader would stumble over: it builds whole processors, all of one rank."""
    largest = max((delta.rank for delta in named.values() if delta.rank is not None), default=0)
    found: list[str | Problem] = [
        other_rank(module, delta.rank, largest) for module, delta in named.items() if type(delta) is LoRA and delta.rank != largest
    ]
    for block in dict.fromkeys(module.split(".processor.")[0] for module in named):
        missing = [part for part in _PROCESSORS[block.split(".")[0]] if f"{block}.processor.{part}" not in named]
        if missing:
            found.append(f"{block}.processor.{missing[0]}: not changed, and x-flux loads whole processors")
    return found


dialect = XLabs()
