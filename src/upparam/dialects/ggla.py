"""ggla: llama.cpp's LoRA files of 2023, before GGUF adapters: `layers.0.attention.wq.weight.loraA` and `.loraB`, later
`blk.0.attn_q.weight.loraA`; rank and alpha in the header.

Source: ggerganov/llama.cpp convert-lora-to-ggml.py (removed in 2024). The converter took PEFT's factors as they were, loraA transposed to
(in, r), and gave them Meta's or its own names. It did not interleave the rows of q and k, although the base it was added to had them
interleaved: what the old program computed from these files is not what was trained. upparam reads what was trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from upparam.adapter import Adapter, Target
from upparam.algorithms.base import Delta, Scaling
from upparam.algorithms.lora import LoRA
from upparam.containers.base import TensorFile
from upparam.dialects.base import Bundle, Match, Package, ReadOptions
from upparam.dialects.placing import resolve
from upparam.errors import DeadAdapterError, MalformedError, RefusedError, UsageError
from upparam.findings import error, warning
from upparam.patterns import regex
from upparam.tensors import Tensor

_NAME = regex(r"(?:layers|blk)\.(\d+)\.([a-z_]+(?:\.w[1-3a-z])?)\.weight\.lora([AB])")
_WORDS = {
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_down": "mlp.down_proj", "ffn_up": "mlp.up_proj",
}  # fmt: skip


class Ggla:
    """The dialect; read only, since nothing reads it any more."""

    name = "ggla"
    title = "llama.cpp LoRA before GGUF (ggla)"
    writable = False
    algorithms: tuple[str, ...] = ("lora",)

    def match(self, file: TensorFile) -> Match | None:
        """The container itself."""
        return Match(self.name, 1.0, ("the ggla magic number",)) if file.container == "ggla" else None

    def gather(self, file: TensorFile, siblings: Sequence[TensorFile]) -> list[TensorFile]:
        """One file is one adapter."""
        return [file]

    def read(self, bundle: Bundle, options: ReadOptions) -> Adapter:
        """The adapter under transformers' names. Raises DeadAdapterError when no weight has both factors."""
        file = bundle.main
        adapter = Adapter({}, self.name, files=(str(file.path),), findings=list(file.findings))
        alpha, rank = float(file.metadata["lora_alpha"]), float(file.metadata["lora_r"])
        if options.alpha not in (None, alpha):
            raise UsageError("the alpha given contradicts the header's", file=file.path, expected=f"{alpha:g}", found=options.alpha)
        deltas: dict[str, Delta] = {}
        for module, pair in _pairs(file, adapter).items():
            try:
                deltas[module] = LoRA(pair["B"], pair["A"].T, Scaling(alpha=alpha, divisor=rank))
            except MalformedError as problem:
                raise MalformedError(problem.message, file=file.path, tensor=module, found=problem.found) from None
        if not deltas:
            raise DeadAdapterError("no weight has both its loraA and its loraB", file=file.path, found=", ".join(list(file.tensors)[:3]))
        found = resolve({module: delta.shape for module, delta in deltas.items()}, ("reference",), options.base)
        adapter.base = None if found is None else found.hint
        adapter.layout = "peft" if found is None else "reference"
        adapter.deltas = {Target(module): delta for module, delta in deltas.items()}
        if any(module.endswith(("q_proj", "k_proj")) for module in deltas):
            said = "the rows of q and k lie as in PEFT; the llama.cpp of its time added them to rows in another order"
            adapter.findings.append(
                warning("rows-misapplied", file.name, said, "convert-lora-to-ggml.py does not permute, convert.py does")
            )
        return adapter

    def write(self, adapter: Adapter, options: Mapping[str, Any]) -> Package:
        """Always raises RefusedError."""
        raise RefusedError("no program reads ggla any more", remedy="convert to gguf-lora")


def _pairs(file: TensorFile, adapter: Adapter) -> dict[str, dict[str, Tensor]]:
    """Both factors of each module by transformers' name. What makes no pair goes to the leftovers."""
    names: dict[str, dict[str, str]] = {}
    for name, tensor in file.tensors.items():
        match = _NAME.fullmatch(name)
        if match is None or match.group(2) not in _WORDS:
            adapter.leftovers[name] = tensor
        else:
            names.setdefault(f"model.layers.{match.group(1)}.{_WORDS[match.group(2)]}", {})[match.group(3)] = name
    for module, own in names.items():
        if len(own) < 2:
            adapter.leftovers |= {name: file.tensors[name] for name in own.values()}
            adapter.findings.append(error("orphan", module, "a factor without its partner: the module cannot be applied"))
    return {module: {role: file.tensors[name] for role, name in own.items()} for module, own in names.items() if len(own) == 2}


dialect = Ggla()
