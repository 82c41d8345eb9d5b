"""Which delta a module's factors make, by the words PEFT gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from math import prod
from typing import Any

from upparam.adapter import Target
from upparam.algorithms import called
from upparam.algorithms.base import Delta
from upparam.algorithms.dora import DoRA
from upparam.algorithms.experts import ExpertLoRA
from upparam.algorithms.loha import LoHa
from upparam.algorithms.lokr import LoKr
from upparam.algorithms.lora import LoRA
from upparam.algorithms.slicing import RowSlice
from upparam.bases.base import Module
from upparam.dialects import peft_adalora, peft_config, peft_turns, peft_vectors
from upparam.dialects.base import ReadOptions
from upparam.dialects.peft_magnitude import decomposed, magnitude_of
from upparam.dialects.peft_method import Given, Method
from upparam.dialects.peft_names import Sorted
from upparam.errors import MalformedError, RefusedError, UsageError
from upparam.tensors import Tensor

METHODS: tuple[Method, ...] = (
    peft_adalora.METHOD, peft_vectors.IA3_METHOD, peft_vectors.VERA_METHOD, peft_turns.OFT_METHOD, peft_turns.EMBEDDED_OFT_METHOD,
    peft_turns.OLD_OFT_METHOD, peft_turns.BOFT_METHOD,
)  # fmt: skip
"""Methods beside LoRA, LoHa and LoKr; the first of several that hold an algorithm writes it."""
PEFT_TYPES = {"lora": "LORA", "dora": "LORA", "expert-lora": "LORA", "loha": "LOHA", "lokr": "LOKR"} | {
    algorithm: method.type for method in METHODS for algorithm in method.algorithms
}  # fmt: skip
"""Algorithm -> PEFT's word for the kind of adapter."""
KNOWN_TYPES = frozenset(PEFT_TYPES.values())
"""Values of peft_type that upparam reads."""
ALPHA_WORD = {"LORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha"}
"""What the config calls alpha."""
_LYCORIS: dict[str, type[LoHa] | type[LoKr]] = {"hada_": LoHa, "lokr_": LoKr}


def method_of(delta: Delta) -> Method | None:
    """How PEFT writes a delta of an algorithm beside LoRA, LoHa and LoKr; None for those."""
    return next((method for method in METHODS if delta.algorithm in method.algorithms), None)


def deltas_of(
    module: str, roles: Mapping[str, Tensor], config: Mapping[str, Any] | None, options: ReadOptions, names: Sorted
) -> dict[Target, Delta] | str:
    """The deltas of one module; {}, or a sentence why, where the factors make none."""
    said = (config or {}).get("peft_type")
    for method in METHODS:
        if said in (None, method.type) and method.roles <= roles.keys() <= method.roles | method.more:
            found = method.read(Given(module, roles, config, options, names.shared))
            return found if isinstance(found, str) else {Target(module): found}
    if said not in (None, "LORA", "LOHA", "LOKR"):
        return {}
    plain = roles.keys() - {"magnitude"}
    if plain == {"lora_embedding_A", "lora_embedding_B"}:
        down, up = roles["lora_embedding_B"].T, roles["lora_embedding_A"].T
        lora = LoRA(up, down, peft_config.scaling_of(config, module, down.shape[0], options), embedding=True)
        return {Target(module): decomposed(lora, roles.get("magnitude"))}
    if plain == {"lora_A", "lora_B"} and not peft_config.of_parameters(config, module):
        up, down = roles["lora_B"], roles["lora_A"]
        enabled = (config or {}).get("enable_lora")
        if isinstance(enabled, list) and up.shape[1] != down.shape[0]:
            return _merged_linear(module, up, down, enabled, config, options)
        if len(up.shape) == 3 and up.shape[2] == 1 and up.shape[1] < down.shape[0] and down.shape[0] % up.shape[1] == 0:
            parts = down.shape[0] // up.shape[1]
            raise UsageError(
                f"a MergedLinear of PEFT before 0.3: {parts} parts of a fused weight are adapted, and which ones only its config says", file=peft_config.FILE,
                tensor=module, expected="enable_lora", found=f"lora_A {down.shape}, lora_B {up.shape}",
                remedy='put an adapter_config.json with enable_lora beside it ("enable_lora": [true, false, true] is q and v), with peft_type, r and lora_alpha',
            )  # fmt: skip
        if (config or {}).get("use_bdlora") and up.shape[1:2] != down.shape[:1]:
            raise RefusedError(
                "BD-LoRA: one of the factors is block-diagonal and stored as its blocks, which upparam does not unfold", file=peft_config.FILE, tensor=module,
                found=f"lora_A {down.shape}, lora_B {up.shape}", remedy="merge the adapter with PEFT (merge_and_unload) and extract a LoRA from the result",
            )  # fmt: skip
        if len(up.shape) == len(down.shape) > 2 and 0 < up.shape[1] < down.shape[0] and down.shape[0] % up.shape[1] == 0:
            groups = down.shape[0] // up.shape[1]
            return f"a LoRA of a convolution with {groups} groups, which is no product of two matrices: PEFT runs it and does not merge it"
        lora = LoRA(up, down, peft_config.scaling_of(config, module, down.shape[0], options))
        return {Target(module): decomposed(lora, roles.get("magnitude"))}
    for prefix, algorithm in _LYCORIS.items():
        if all(role.startswith(prefix) for role in roles):
            return _lycoris(module, {role.removeprefix(prefix): tensor for role, tensor in roles.items()}, algorithm, config, options)
    return {}


def _lycoris(
    module: str, factors: Mapping[str, Tensor], algorithm: type[LoHa] | type[LoKr], config: Mapping[str, Any] | None, options: ReadOptions
) -> dict[Target, Delta]:
    """A LoHa or LoKr; {} where a factor is missing. PEFT divides alpha by its configured r whatever the factors' rank."""
    expected = {item.name for item in fields(algorithm)} - {"scaling"}
    if not factors.keys() <= expected:
        return {}
    try:
        bare: LoHa | LoKr = algorithm(**factors)  # type: ignore[arg-type]
    except (MalformedError, TypeError):
        if _complete(factors):
            raise
        return {}
    return {Target(module): replace(bare, scaling=peft_config.scaling_of(config, module, bare.rank or 0, options))}


def _complete(factors: Mapping[str, Tensor]) -> bool:
    """Whether every pair (w1 or w1_a with w1_b, the same for w2) is there, so that an error is one of shapes."""
    return all(half in factors or {f"{half}_a", f"{half}_b"} <= factors.keys() for half in ("w1", "w2"))


def _merged_linear(
    module: str, up: Tensor, down: Tensor, enabled: Sequence[Any], config: Mapping[str, Any] | None, options: ReadOptions
) -> dict[Target, Delta]:
    """PEFT before 0.3 adapted parts of a fused weight: of len(enabled) equal blocks of rows each enabled one has its own up and down.

    Source: huggingface/peft v0.2.0 src/peft/tuners/lora.py MergedLinear (zero_pad, conv1d with groups).
    """
    groups = sum(value is True for value in enabled)
    if not groups or down.shape[0] % groups or up.shape[0] % groups or up.shape[1] * groups != down.shape[0]:
        raise MalformedError(
            "the factors do not fit enable_lora", expected=f"{groups} groups of equal rank", found=f"lora_A {down.shape}, lora_B {up.shape}"
        )
    rank, rows = down.shape[0] // groups, up.shape[0] // groups
    up = up.reshape(up.shape[:2])
    found: dict[Target, Delta] = {}
    for group, block in enumerate(index for index, value in enumerate(enabled) if value is True):
        scaling = peft_config.scaling_of(config, module, rank, options)
        piece = LoRA(up.rows(group * rows, (group + 1) * rows), down.rows(group * rank, (group + 1) * rank), scaling)
        found[Target(module, (block * rows, (block + 1) * rows))] = piece
    return found


def spelled(target: Target, delta: Delta, known: Module | None = None) -> dict[str, Tensor]:
    """A delta's factors by PEFT's words, in the form the base's module has where that is known: an embedding, a convolution, a matrix.

    Raises RefusedError for what PEFT has no words for.
    """
    if isinstance(delta, ExpertLoRA) or (target.parameter not in ("weight", "bias") and type(delta) is LoRA and len(delta.shape) == 2):
        return {"lora_A.weight": delta.down, "lora_B.weight": delta.up}
    if target.parameter != "weight":
        raise RefusedError(f"a delta of the {target.parameter}")
    method = method_of(delta)
    if method is not None and not isinstance(delta, RowSlice):
        return method.spell(delta, known)
    if isinstance(delta, (LoHa, LoKr)):
        if known is not None and known.kind in ("Conv1D", "Embedding"):
            raise RefusedError(f"{called(delta.algorithm)} of a {known.kind}")
        prefix = "hada_" if isinstance(delta, LoHa) else "lokr_"
        return {f"{prefix}{role}": factor for role, factor in delta.factors().items()}
    if not isinstance(delta, (LoRA, DoRA)):
        raise RefusedError(f"{called(delta.algorithm)} delta")
    if delta.mid is not None:
        raise RefusedError("a Tucker core")
    if delta.embedding or (known is not None and known.kind == "Embedding"):
        return {"lora_embedding_A": delta.up.T, "lora_embedding_B": delta.down.T} | magnitude_of(delta, embedding=True)
    up, down = delta.up, delta.down
    if known is not None and prod(known.shape[2:]) == prod(down.shape[2:]) == 1:
        ones = (1,) * (len(known.shape) - 2)
        up, down = up.reshape((*up.shape[:2], *ones)), down.reshape((*down.shape[:2], *ones))
    return {"lora_A.weight": down, "lora_B.weight": up} | magnitude_of(delta, kernel=len(down.shape) - 2)
