"""PEFT's orthogonal methods: OFT in the three forms its versions saved, and BOFT.

| PEFT | factors | what they do |
|---|---|---|
| to 0.13 | oft_r (k, s, s) | turn the outputs: what LyCORIS calls Diag-OFT, with blocks of another sign and size |
| 0.14, 0.15 | oft_r (k, b, b), oft_s (out, 1) | turn the inputs and multiply the rows: a BOFT of one factor |
| 0.16 and later | oft_R.weight (k, b (b - 1) / 2) | turn the inputs, exactly or by a series, which 0.18 changed |

Sources: huggingface/peft v0.13.2, v0.15.2, v0.17.1 and later, src/peft/tuners/oft/{config,layer}.py (_cayley_batch, merge, check_kwargs,
adjust_oft_parameters); src/peft/tuners/boft/{config,layer}.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from upparam.algorithms import called
from upparam.algorithms.base import Delta
from upparam.algorithms.boft import BOFT
from upparam.algorithms.oft import OFT, DiagOFT
from upparam.bases.base import Base, Module
from upparam.dialects.peft_config import number
from upparam.dialects.peft_method import Given, Method, Written
from upparam.errors import RefusedError
from upparam.tensors import Tensor

SERIES_CHANGED = (0, 18)
"""The PEFT version from which the last term of OFT's series counts once; configs tell their version since then."""


def _read_oft(given: Given) -> Delta | str:
    config = given.config
    word = "oft_R" if "oft_R" in given.roles else "oft_embedding_R"
    skew = given.roles[word]
    embedding = word == "oft_embedding_R"
    if config is None or "oft_block_size" not in config:
        return OFT(skew, embedding=embedding, told=False)
    terms = number(config, "num_cayley_neumann_terms") if config.get("use_cayley_neumann") is True else None
    eps = number(config, "eps") if config.get("coft") is True else None
    doubled = terms is not None and terms > 2 and _version(config) < SERIES_CHANGED
    return OFT(skew, None if terms is None else int(terms), eps, config.get("block_share") is True, embedding, doubled)


def _version(config: Mapping[str, Any]) -> tuple[int, ...]:
    """The PEFT version a config says it was saved by; (0,) where it says none."""
    found = re.match(r"\d+(\.\d+)*", str(config.get("peft_version")))
    return tuple(int(word) for word in found[0].split(".")) if found else (0,)


def _read_old_oft(given: Given) -> Delta | str:
    """The forms before 0.16, as the algorithms they are. Limits and shared blocks have no place in those."""
    config, blocks, gain = given.config or {}, given.roles["oft_r"], given.roles.get("oft_s")
    if config.get("coft") is True or config.get("block_share") is True:
        return "a constrained or shared OFT of PEFT before 0.16, which today's PEFT does not load either"
    if len(blocks.shape) != 3 or blocks.shape[1] != blocks.shape[2]:
        return f"no blocks of an OFT of PEFT before 0.16: {blocks.shape}"
    if gain is not None:
        return BOFT(blocks.reshape((1, *blocks.shape)), gain)
    return DiagOFT(_halved(blocks))


def _halved(blocks: Tensor) -> Tensor:
    """-blocks / 2: R is the turn of Q = -(blocks - blocks^T) / 2 here, and of blocks - blocks^T there. Exact, but for the smallest numbers."""
    return Tensor.computed(blocks.dtype, blocks.shape, lambda: (blocks.read() * -0.5).astype(blocks.dtype.numpy), "halved blocks")


def _spell_oft(delta: OFT, known: Module | None) -> dict[str, Tensor]:
    _refuse_kind("oft", known, () if delta.embedding else ("Embedding",))
    return {f"{'oft_embedding_R' if delta.embedding else 'oft_R'}.weight": delta.skew}


def _refuse_kind(algorithm: str, known: Module | None, others: Iterable[str]) -> None:
    if known is not None and known.kind in ("Conv1D", *others):
        raise RefusedError(f"{called(algorithm)} of a {known.kind}")


def _settings_oft(written: Written) -> dict[str, Any]:
    found = [delta for delta in written.deltas.values() if isinstance(delta, OFT)]
    choices = {(delta.neumann, delta.doubled, delta.eps, delta.shared) for delta in found}
    if len(choices) > 1:
        raise RefusedError("PEFT makes the turns of all modules in one way")
    ((neumann, doubled, eps, shared),) = choices
    if doubled:
        raise RefusedError("a series whose last term counts twice is that of PEFT before 0.18, which later ones do not compute")
    made: dict[str, Any] = {
        "block_share": shared, "coft": eps is not None, "eps": 6e-5 if eps is None else eps, "init_weights": True, "module_dropout": 0.0,
        "num_cayley_neumann_terms": neumann or 5, "use_cayley_neumann": neumann is not None,
    }  # fmt: skip
    if neumann is not None:
        made["peft_version"] = ".".join(map(str, (*SERIES_CHANGED, 0)))
    return made | _blocks(written.deltas, written.base)


def _blocks(deltas: Mapping[str, Delta], base: Base | None) -> dict[str, int]:
    """r or oft_block_size with which PEFT makes blocks of these sizes. Raises RefusedError where neither does."""
    sizes: set[tuple[int, int]] = set()
    for module, delta in deltas.items():
        assert isinstance(delta, OFT)
        known = base.by_path.get(module) if base is not None else None
        inputs = delta.shape[1]
        if known is not None and not inputs:
            inputs = 1
            for side in known.canonical[1:]:
                inputs *= side
        sizes.add((inputs, delta.size))
    whole = {size for _, size in sizes}
    if len(whole) == 1:
        return {"oft_block_size": whole.pop(), "r": 0}
    if all(inputs for inputs, _ in sizes):
        for size in range(min(whole), max(whole) + 1):
            if all(adjusted(inputs, size) == own for inputs, own in sizes):
                return {"oft_block_size": size, "r": 0}
        counts = {inputs // own for inputs, own in sizes}
        for count in range(min(counts), max(counts) + 1):
            if all(inputs == own * adjusted(inputs, count) for inputs, own in sizes):
                return {"oft_block_size": 0, "r": count}
    raise RefusedError("PEFT would make OFT blocks of other sizes for these modules", found=", ".join(map(str, sorted(whole))))


def adjusted(inputs: int, wanted: int) -> int:
    """The block size (or count) PEFT takes instead of one that does not divide the inputs: the nearest that does, the lower of two."""
    if wanted >= inputs:
        return inputs
    higher = next(size for size in range(wanted, inputs + 1) if inputs % size == 0)
    lower = next(size for size in range(wanted, 0, -1) if inputs % size == 0)
    return lower if wanted - lower <= higher - wanted else higher


OFT_METHOD = Method(
    "OFT", ("oft",), frozenset(("oft_R",)), _read_oft, _spell_oft, _settings_oft, kept=("module_dropout",), biases="oft_only"
)
EMBEDDED_OFT_METHOD = Method("OFT", ("oft",), frozenset(("oft_embedding_R",)), _read_oft, _spell_oft, _settings_oft)
OLD_OFT_METHOD = Method("OFT", (), frozenset(("oft_r",)), _read_old_oft, _spell_oft, _settings_oft, more=frozenset(("oft_s",)))


def _read_boft(given: Given) -> Delta | str:
    return BOFT(given.roles["boft_R"], given.roles["boft_s"])


def _spell_boft(delta: BOFT, known: Module | None) -> dict[str, Tensor]:
    _refuse_kind("boft", known, ("Embedding",))
    count, flat = delta.gain.numel, delta.gain.shape[0] == 1
    if known is not None:
        flat = len(known.shape) > 2
    return {"boft_R": delta.blocks, "boft_s": delta.gain.reshape((1, count) if flat else (count, 1))}


def _settings_boft(written: Written) -> dict[str, Any]:
    shapes = {delta.blocks.shape for delta in written.deltas.values() if isinstance(delta, BOFT)}
    stages, counts, sizes = ({shape[axis] for shape in shapes} for axis in (0, 1, 2))
    if len(stages) > 1 or (len(counts) > 1 and len(sizes) > 1):
        raise RefusedError("PEFT has one number of factors, and one size or one number of blocks, for all modules", found=sorted(shapes))
    by_size = len(sizes) == 1
    return {
        "boft_block_num": 0 if by_size else counts.pop(), "boft_block_size": sizes.pop() if by_size else 0, "boft_dropout": 0.0,
        "boft_n_butterfly_factor": stages.pop(), "init_weights": True,
    }  # fmt: skip


BOFT_METHOD = Method(
    "BOFT", ("boft",), frozenset(("boft_R", "boft_s")), _read_boft, _spell_boft, _settings_boft, kept=("boft_dropout",), biases="boft_only"
)
