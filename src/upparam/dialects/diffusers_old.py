"""diffusers-old: attention processors of early 2023. `[unet.]<path>.attn1.processor.to_q_lora.down.weight`, scale 1.

Source: huggingface/diffusers v0.12 to v0.20 src/diffusers/models/attention_processor.py (LoRAAttnProcessor), read today by
utils/state_dict_utils.py (UNET_TO_DIFFUSERS, DIFFUSERS_OLD_TO_PEFT). `to_out_lora` means `to_out.0`; in text encoders `to_q_lora` means
`q_proj`. Only attention modules have a name here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from upparam.adapter import Adapter
from upparam.algorithms.base import Delta
from upparam.algorithms.lora import LoRA
from upparam.containers.base import TensorFile
from upparam.dialects.base import Bundle, Match, NamedTensors, Package, ReadOptions
from upparam.dialects.carried import carried
from upparam.dialects.diffusers import COMPONENTS, reference_deltas, settle, unloadable, with_component
from upparam.dialects.refusing import other_scale, refuse
from upparam.errors import MalformedError, Problem
from upparam.findings import error
from upparam.patterns import regex
from upparam.tensors import Tensor

_NAME = regex(r"(?P<path>.+)\.(?P<part>to_q|to_k|to_v|to_out|add_k_proj|add_v_proj)_lora\.(?P<role>up|down)\.weight")
_UNET = {"to_out": "to_out.0"}
_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_UNET_BACK = {"to_out.0": "to_out"}
_TEXT_BACK = {module: part for part, module in _TEXT.items()}
_PARTS = ("to_q", "to_k", "to_v", "to_out", "add_k_proj", "add_v_proj")


class DiffusersOld:
    """The dialect."""

    name = "diffusers-old"
    title = "diffusers before 0.21 (attention processors)"
    writable = True
    algorithms: tuple[str, ...] = ("lora",)

    def match(self, file: TensorFile) -> Match | None:
        """The share of names that are an attention path and `<part>_lora.<up|down>.weight`."""
        hits = [found for name in file.tensors if (found := _NAME.fullmatch(name))]
        if not hits:
            return None
        prefixed = sum(1 for found in hits if found["path"].split(".", 1)[0] in COMPONENTS)
        where = "without a component" if not prefixed else f"{prefixed} with their component in front"
        return Match(
            self.name,
            round(0.97 * len(hits) / len(file.tensors), 3),
            (f"{len(hits)} of {len(file.tensors)} names are <attention>.processor.to_<q|k|v|out>_lora.<up|down>.weight, {where}",),
        )

    def gather(self, file: TensorFile, siblings: Sequence[TensorFile]) -> list[TensorFile]:
        """One file is one adapter."""
        return [file]

    def read(self, bundle: Bundle, options: ReadOptions) -> Adapter:
        """The adapter, scale 1 throughout."""
        file = bundle.main
        adapter = Adapter({}, self.name, metadata=dict(file.metadata), files=(str(file.path),), findings=list(file.findings))
        factors: dict[str, dict[str, tuple[str, Tensor]]] = {}
        for name, tensor in file.tensors.items():
            found = _NAME.fullmatch(name)
            if found is None:
                adapter.leftovers[name] = tensor
                continue
            given = found["path"].removesuffix(".processor")
            component, path = with_component(given)
            part = (_TEXT if component.startswith("text_encoder") else _UNET).get(found["part"], found["part"])
            roles = factors.setdefault(f"{path}.{part}", {})
            if found["role"] in roles:
                adapter.leftovers[name] = tensor
                adapter.findings.append(error("named-twice", name, "another name in the file means the same factor"))
                continue
            roles[found["role"]] = (name, tensor)
            if path != given:
                adapter.spelling["bare"] = f"{component}."
        deltas: dict[str, Delta] = {}
        for module, roles in factors.items():
            if len(roles) < 2:
                adapter.leftovers |= dict(roles.values())
                adapter.findings.append(error("orphan", module, "a factor without its partner: the module cannot be applied", *roles))
                continue
            try:
                deltas[module] = LoRA(roles["up"][1], roles["down"][1])
            except MalformedError as problem:
                problem.locate(file=file.path, tensor=module)
                raise
        settle(adapter, deltas, file, options)
        return adapter

    def write(self, adapter: Adapter, options: Mapping[str, Any]) -> Package:
        """A folder with `pytorch_lora_weights.safetensors`. Raises RefusedError for modules outside attention and scales other than 1."""
        problems: list[str | Problem] = [f"{extra.kind.value} {extra.name}" for extra in adapter.extras]
        bare = adapter.spelling.get("bare", "") if adapter.dialect == self.name else ""
        tensors: dict[str, Tensor] = {}
        for target, delta in reference_deltas(adapter, options, self.name).items():
            name = _old_name(target.module)
            problem = unloadable(target, delta) or (None if name else "not an attention projection")
            if problem is not None or name is None:
                problems.append(f"{target}: {problem}")
                continue
            if delta.known_scale() != 1.0:
                problems.append(other_scale(str(target), delta))
                continue
            assert isinstance(delta, LoRA)
            name = name.removeprefix(bare)
            tensors[f"{name}.down.weight"], tensors[f"{name}.up.weight"] = delta.down, delta.up
        refuse(self.name, problems)
        return Package({"pytorch_lora_weights.safetensors": NamedTensors(tensors, {"format": "pt", **carried(adapter, self.name)})})


def _old_name(module: str) -> str | None:
    """The name without `.down.weight`; None for a module that is no attention projection."""
    back = _TEXT_BACK if module.startswith("text_encoder") else _UNET_BACK
    for tail in (*back, *_PARTS):
        path = module.removesuffix("." + tail)
        if path != module and re.search(r"(^|\.)(attn\d*|self_attn)$", path):
            part = back.get(tail, tail)
            processor = "" if module.startswith("text_encoder") else ".processor"
            return f"{path}{processor}.{part}_lora" if part in _PARTS else None
    return None


dialect = DiffusersOld()
