"""What a dialect says it holds is what its writing accepts, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.matrix import specimens
from tests.matrix.specimens import FEATURES, module, values

from upparam.adapter import Adapter, Target
from upparam.algorithms import ALGORITHMS
from upparam.algorithms.base import Delta, Scaling
from upparam.algorithms.dora import DoHa, DoKr
from upparam.algorithms.experts import ExpertLoRA
from upparam.algorithms.full import Full
from upparam.algorithms.tlora import TLoRA
from upparam.bases import inventory
from upparam.dialects import DIALECTS, get
from upparam.errors import RefusedError

WRITABLE = [name for name in DIALECTS if get(name).writable]


def decomposed(feature: str, kind: type[DoHa] | type[DoKr], base: str) -> Adapter:
    """The specimen of LoHa or LoKr with magnitudes of rows."""
    deltas: dict[Target, Delta] = {
        target: kind(magnitude=values((delta.shape[0], 1), f"{target}m"), scaling=delta.scaling, **delta.factors())
        for target, delta in FEATURES[feature][0](base).deltas.items()
    }
    return specimens.adapter(base, deltas)


def time_dependent() -> Adapter:
    target = specimens.targets("sd1.5")[0]
    out, into = module("sd1.5", target.module).canonical
    factors = [values(shape, f"{shape}") for shape in ((out, 4), (1, 4), (4, into))]
    return specimens.adapter("sd1.5", {target: TLoRA(*factors, scaling=Scaling(alpha=4.0))})


def with_bias() -> Adapter:
    """A LoRA and the difference of its bias: the only form in which diffusers has a difference."""
    target = Target("transformer.transformer_blocks.0.attn.to_q")
    lora = specimens.lora("flux.1-dev", target.module)
    return specimens.adapter("flux.1-dev", {target: lora, target._replace(parameter="bias"): Full(values(lora.shape[:1], "bias"))})


def whole() -> Adapter:
    path = "transformer.transformer_blocks.3.ff.net.0.proj"
    return specimens.adapter("flux.1-dev", {Target(path): Full(values(module("flux.1-dev", path).canonical, "diff"))})


def of_experts() -> Adapter:
    delta = ExpertLoRA(values((16, 8), "up"), values((8, 12), "down"), 4, Scaling(alpha=2.0))
    return Adapter({Target("model.layers.0.mlp.experts", parameter="gate_up_proj"): delta}, "specimen", layout="peft")


def adapters() -> Iterator[tuple[str | None, Adapter]]:
    """(base, adapter): between them every algorithm, on every kind of module some dialect asks for."""
    for build, bases in FEATURES.values():
        yield from ((base, build(base)) for base in bases)
    for base in ("sd1.5", "flux.1-dev"):
        yield from ((base, FEATURES[feature][0](base)) for feature in ("DoRA", "LoHa", "LoKr"))
        yield from ((base, decomposed(feature, kind, base)) for feature, kind in (("LoHa", DoHa), ("LoKr", DoKr)))
    yield from (("flux.1-dev", one) for one in (with_bias(), whole()))
    yield "sd1.5", time_dependent()
    yield None, of_experts()


ADAPTERS = list(adapters())


def test_every_algorithm_has_a_specimen() -> None:
    assert {delta.algorithm for _, adapter in ADAPTERS for delta in adapter.deltas.values()} == set(ALGORITHMS)


@pytest.mark.parametrize("name", WRITABLE)
def test_writing_accepts_what_the_dialect_says_it_holds(name: str) -> None:
    accepted: set[str] = set()
    for base, adapter in ADAPTERS:
        try:
            get(name).write(adapter, {} if base is None else {"base": inventory.load(base)})
        except RefusedError:
            continue
        accepted |= set(adapter.algorithms())
    assert accepted == set(get(name).algorithms)


def test_what_is_only_read_says_what_it_reads() -> None:
    assert all(set(get(name).algorithms) <= set(ALGORITHMS) and get(name).algorithms for name in DIALECTS)
