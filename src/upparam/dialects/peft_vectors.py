"""PEFT's methods that train vectors: IA3 multiplies inputs or outputs, VeRA scales random projections that all modules share.

Sources: huggingface/peft src/peft/tuners/ia3/{config,layer,model}.py (shapes of ia3_l, feedforward_modules), src/peft/tuners/vera/
{config,layer,model}.py (slices of the projections, save_projection). Both leave (in, out) weights to fan_in_fan_out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from upparam.algorithms.base import Delta
from upparam.algorithms.ia3 import IA3
from upparam.algorithms.slicing import same_tensor
from upparam.algorithms.vera import VeRA
from upparam.bases.base import Base, Module
from upparam.dialects.peft_config import matches
from upparam.dialects.peft_method import Given, Method, Written
from upparam.dialects.peft_projections import missing
from upparam.errors import RefusedError
from upparam.tensors import Tensor


def _read_ia3(given: Given) -> Delta | str:
    vector = given.roles["ia3_l"]
    on_input = _by_shape(vector)
    if on_input is None and given.config is not None:
        on_input = fed_forward(given.config.get("feedforward_modules"), given.module)
    if on_input is None and given.options.base is not None:
        on_input = _by_base(vector, given.module, given.options.base)
    if on_input is None:
        return (
            "whether it multiplies inputs or outputs is in the config alone (feedforward_modules), unless the base, named with --base, has as many "
            "of only one of them"
        )
    return IA3(vector, on_input, with_bias=not on_input)


def _by_shape(vector: Tensor) -> bool | None:
    """Whether a vector multiplies inputs, as PEFT shapes those of matrices: (1, in) or (out, 1). None where the shape does not tell."""
    shape = vector.shape
    if len(shape) != 2 or shape[0] == shape[1]:
        return None
    return shape[0] == 1


def _by_base(vector: Tensor, module: str, base: Base) -> bool | None:
    """Whether a vector multiplies inputs, where every module of that name in the base has as many of them, and not as many outputs."""
    sides = {found.canonical[:2] for path, found in base.by_path.items() if path == module or path.endswith(f".{module}")}
    told = {into == vector.numel for out, into in sides if (out == vector.numel) is not (into == vector.numel)}
    return told.pop() if len(told) == 1 and len(sides) == 1 else None


def fed_forward(listed: Any, module: str) -> bool:
    """Whether `feedforward_modules` means this module: a regular expression over its path, or endings of it, of words too."""
    if isinstance(listed, str):
        return matches(listed, module, whole=True)
    return isinstance(listed, Sequence) and any(isinstance(word, str) and module.endswith(word) for word in listed)


def _spell_ia3(delta: IA3, known: Module | None) -> dict[str, Tensor]:
    if delta.from_one:
        raise RefusedError("an IA3 that holds what is added to 1, where PEFT holds the sum: adding would round")
    if delta.bias or delta.with_bias is delta.on_input:
        raise RefusedError("an IA3 that leaves the module's bias alone")
    if known is not None and known.kind == "Embedding":
        raise RefusedError("an IA3 of an Embedding")
    count, kernel = delta.vector.numel, len(known.shape) - 2 if known is not None else len(delta.vector.shape) - 2
    if kernel > 0:
        return {"ia3_l": delta.vector.reshape((1, count, *(1,) * kernel))}
    return {"ia3_l": delta.vector.reshape((1, count) if delta.on_input else (count, 1))}


def _settings_ia3(written: Written) -> dict[str, Any]:
    """feedforward_modules must be some of target_modules, word for word, and PEFT takes each for an ending of any path."""
    inputs = {module for module, delta in written.deltas.items() if isinstance(delta, IA3) and delta.on_input}
    targets = written.targets
    if not isinstance(targets, str):
        for words in (targets, sorted(written.deltas)):
            meant = [word for word in words if any(module == word or module.endswith(f".{word}") for module in inputs)]
            if {module for module in written.deltas if fed_forward(meant, module)} == inputs:
                return {"feedforward_modules": meant, "init_ia3_weights": True, "target_modules": list(words)}
    return {"feedforward_modules": "|".join(sorted(map(_exactly, inputs))) or [], "init_ia3_weights": True, "target_modules": targets}


def _exactly(path: str) -> str:
    return path.replace(".", r"\.")


def _loads_ia3(config: Mapping[str, Any], module: str, delta: IA3) -> bool:
    return fed_forward(config.get("feedforward_modules"), module) is delta.on_input


IA3_METHOD = Method("IA3", ("ia3",), frozenset(("ia3_l",)), _read_ia3, _spell_ia3, _settings_ia3, loads=_loads_ia3)


def _read_vera(given: Given) -> Delta | str:
    up, down = given.shared.get("vera_B"), given.shared.get("vera_A")
    b, d = given.roles["vera_lambda_b"], given.roles["vera_lambda_d"]
    if up is None or down is None:
        return missing(given.config)
    if len(up.shape) == 2 and len(b.shape) == 1 and b.shape[0] < up.shape[0]:
        up = up.rows(0, b.shape[0])
    return VeRA(up, down, b, d)


def _spell_vera(delta: VeRA, known: Module | None) -> dict[str, Tensor]:
    if known is not None and known.kind not in ("", "Linear", "Conv1D"):
        raise RefusedError(f"a VeRA of a {known.kind}")
    return {"vera_lambda_b": delta.b, "vera_lambda_d": delta.d}


def _shared_vera(deltas: Mapping[str, Delta]) -> dict[str, Tensor]:
    """The projections that all deltas are parts of, as wide as the widest. Raises RefusedError where they are not parts of one."""
    veras = [delta for delta in deltas.values() if isinstance(delta, VeRA)]
    up = max((delta.up for delta in veras), key=lambda tensor: tensor.shape[0])
    down = max((delta.down for delta in veras), key=lambda tensor: tensor.shape[1])
    if all(delta.columns for delta in veras):
        down = _columns(down, max(delta.columns for delta in veras))
    for module, delta in deltas.items():
        assert isinstance(delta, VeRA)
        wide = min(down.shape[1], delta.down.shape[1])
        if not (
            delta.up.shape[1] == up.shape[1] and delta.up.dtype == up.dtype and delta.down.dtype == down.dtype
            and same_tensor(delta.up, up.rows(0, delta.up.shape[0])) and same_tensor(_columns(delta.down, wide), _columns(down, wide))
        ):  # fmt: skip
            raise RefusedError("PEFT has one pair of VeRA projections for all modules", found=f"others in {module}")
    return {"base_model.vera_A": down, "base_model.vera_B": up}


def _columns(tensor: Tensor, count: int) -> Tensor:
    return tensor if count == tensor.shape[1] else tensor.T.rows(0, count).T


def _settings_vera(written: Written) -> dict[str, Any]:
    rank = {delta.rank for delta in written.deltas.values()}.pop()
    return {
        "d_initial": 0.1, "init_weights": True, "projection_prng_key": 0, "r": rank, "save_projection": True, "vera_dropout": 0.0,
    }  # fmt: skip


def _loads_vera(config: Mapping[str, Any], module: str, delta: VeRA) -> bool:
    """Whether a config says of the file what it then holds: the projections."""
    return config.get("save_projection") is not False


VERA_METHOD = Method(
    "VERA", ("vera",), frozenset(("vera_lambda_b", "vera_lambda_d")), _read_vera, _spell_vera, _settings_vera, shared=_shared_vera, loads=_loads_vera,
    kept=("d_initial", "projection_prng_key", "vera_dropout"), biases="vera_only",
)  # fmt: skip
