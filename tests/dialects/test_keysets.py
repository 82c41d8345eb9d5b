"""Real key sets: adapters as people meet them, named and shaped so. Read with nothing left over, and there and back through other dialects.

`keysets.json` holds the first blocks of each, so that every machine runs these tests; the whole sets are read where the corpus is. They are
facts (names and shapes) recorded in the tests of invoke-ai/InvokeAI. Two kinds of them have shapes that no model has: see `IMPOSSIBLE`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from tests.dialects.files import read, same, tensor_file, written

from upparam import dialects
from upparam.adapter import Adapter
from upparam.bases import inventory
from upparam.dtypes import DTYPES
from upparam.errors import RefusedError
from upparam.operations.identify import identify
from upparam.operations.proof import same_delta
from upparam.tensors import Tensor, same_bits

TRIMMED = json.loads((Path(__file__).parent / "keysets.json").read_text())


class Case(NamedTuple):
    """What a key set is, and which dialects hold it. `base` is what the whole set tells by itself; `named` what its first blocks need."""

    dialect: str
    base: str | None = None
    named: str | None = None
    holds: tuple[str, ...] = ("diffusers", "comfyui", "onetrainer", "kohya")
    refused: tuple[tuple[str, str], ...] = ()


_PER_INPUT = "a DoRA with a norm for each input"
CASES = {
    "flux_control_lora": Case(
        "comfyui", "flux.1-control-dev", holds=("diffusers", "comfyui"), refused=(("kohya", "saved-module"), ("onetrainer", "saved-module"))
    ),
    "flux_dora_onetrainer": Case("onetrainer", "flux.1-dev", holds=("comfyui", "onetrainer"), refused=(("diffusers", _PER_INPUT),)),
    "flux_lora_diffusers_base_model": Case("peft", "flux.1-dev"),
    "flux_lora_diffusers": Case("diffusers", "flux.1-dev"),
    "flux_lora_kohya": Case("kohya", "flux.1-dev"),
    "flux_lora_xlabs": Case("xlabs", "flux.1-dev", holds=("diffusers", "comfyui", "onetrainer", "kohya", "xlabs")),
    "krea2_lora_kohya": Case("kohya", "krea-2"),
    "qwen_image_lora_diffusers": Case("diffusers", None, "qwen-image"),
}
IMPOSSIBLE = {"flux_lokr_bfl": "comfyui", "anima_lora_kohya": "kohya", "anima_lora_kohya_with_te": "kohya", "anima_lora_peft": "comfyui"}
"""LoKr factors whose product has 1024 rows where FLUX has 3072 or 9216; Anima's keys of cross-attention with 2048 inputs where it has 1024.

Nothing may be made of them that a model of those names could not load: they are read under their own names, and refused elsewhere.
"""


class Pattern:
    """Bytes of a tensor of any size out of one block of normal numbers, begun at a place of its own."""

    block = (np.random.default_rng(0).standard_normal(1 << 18) * 0.05).astype(np.float16).tobytes()

    def __init__(self, size: int, start: int, name: str) -> None:
        self.size, self.start, self.name = size, 2 * start % len(self.block), name

    def read(self, offset: int, size: int) -> bytes:
        at = (self.start + offset) % len(self.block)
        return (self.block * ((at + size) // len(self.block) + 1))[at : at + size]


def filled(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """A key set with values in half precision, made when they are read; scalars are alphas of 8."""
    half = DTYPES["float16"]
    return {
        name: Tensor(half, tuple(shape), Pattern(2 * int(np.prod(shape)), 7919 * number, name))
        if shape
        else Tensor.of(np.array(8, np.float16))
        for number, (name, shape) in enumerate(shapes.items())
    }


@cache
def whole(corpus: Path, name: str) -> dict[str, Tensor]:
    shapes = json.loads((corpus / "keysets" / f"{name}_format.json").read_text())
    assert TRIMMED[name].items() <= shapes.items()
    return filled(shapes)


def same_adapter(one: Adapter, other: Adapter) -> None:
    assert not other.leftovers
    assert set(one.deltas) == set(other.deltas), sorted(map(str, set(one.deltas) ^ set(other.deltas)))[:4]
    assert [str(target) for target, delta in one.deltas.items() if not same_delta(delta, other.deltas[target])] == []
    extras = {(extra.kind, extra.name): extra.tensor for extra in other.extras}
    assert {(extra.kind, extra.name) for extra in one.extras} == set(extras)
    assert all(same_bits(extra.tensor, extras[extra.kind, extra.name]) for extra in one.extras)


def there_and_back(case: Case, tensors: dict[str, Tensor], **options: Any) -> None:
    """Through every dialect that holds it, and back into the file it was."""
    if case.dialect == "peft":
        options["alpha"] = 4.0
    adapter = read(case.dialect, tensors, **options)
    known = {"base": inventory.load(options["base"].name)} if "base" in options else {}
    if case.dialect != "peft":
        same(written(case.dialect, adapter, **known).tensors, tensors)
    for other in case.holds:
        content = written(other, adapter, **known)
        between = read(other, content.tensors, content.metadata, **known)
        same_adapter(adapter, between)
        again = written(case.dialect, between, **known)
        if case.dialect == "peft":
            assert {name: tensor.shape for name, tensor in again.tensors.items()} == {
                name: tensor.shape for name, tensor in tensors.items()
            }
        else:
            if case.named is None:  # whose kohya words under diffusers' names are a choice that no other dialect tells
                same(_without_alpha(again.tensors), _without_alpha(tensors))
            same_adapter(adapter, read(case.dialect, again.tensors, again.metadata, **known))
    for other, why in case.refused:
        with pytest.raises(RefusedError) as caught:
            written(other, adapter, **known)
        assert why in f"{caught.value.message} {caught.value.found}"


def _without_alpha(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers keeps alphas in its header; which dtype a rewritten one has is the writer's choice."""
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(".alpha")}


@pytest.mark.parametrize("name", CASES)
def test_first_blocks_there_and_back(name: str) -> None:
    case, tensors = CASES[name], filled(TRIMMED[name])
    assert dialects.matches(tensor_file(tensors))[0].dialect == case.dialect
    base = inventory.load(case.named or case.base or "")
    adapter = read(case.dialect, tensors, base=base)
    assert not adapter.leftovers and adapter.layout == "reference"
    there_and_back(case, tensors, base=base)


@pytest.mark.parametrize("name", CASES)
def test_whole_sets_are_read_with_nothing_left_over_and_tell_their_base(name: str, corpus: Path) -> None:
    case, tensors = CASES[name], whole(corpus, name)
    (match, *_) = dialects.matches(tensor_file(tensors))
    assert match.dialect == case.dialect and match.confidence > 0.6
    adapter = read(case.dialect, tensors)
    assert not adapter.leftovers and adapter.layout == "reference" and adapter.base is not None
    if case.base is not None:
        assert adapter.base.name == case.base
    else:
        assert case.named == adapter.base.name or case.named in adapter.base.lookalikes


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.base is not None])
def test_whole_sets_go_there_and_back_without_a_base_named(name: str, corpus: Path) -> None:
    there_and_back(CASES[name], whole(corpus, name))


def test_a_set_that_several_bases_fit_asks_for_one(corpus: Path) -> None:
    tensors = whole(corpus, "qwen_image_lora_diffusers")
    with pytest.raises(RefusedError, match="fit this adapter alike") as caught:
        written("comfyui", read("diffusers", tensors))
    assert caught.value.remedy == "name it with --base"
    there_and_back(CASES["qwen_image_lora_diffusers"], tensors, base=inventory.load("qwen-image"))


@pytest.mark.parametrize(("name", "dialect"), IMPOSSIBLE.items())
def test_shapes_that_no_model_has_stay_under_their_own_names(name: str, dialect: str) -> None:
    tensors = filled(TRIMMED[name])
    assert dialects.matches(tensor_file(tensors))[0].dialect == dialect
    adapter = read(dialect, tensors)
    assert not adapter.leftovers and adapter.base is None and adapter.layout == dialect
    same(written(dialect, adapter).tensors, tensors)
    with pytest.raises(RefusedError) as caught:
        written("diffusers", adapter)
    assert caught.value.remedy == "name it with --base"


def test_the_lokr_set_with_shapes_of_flux() -> None:
    """The same names with factors whose products are FLUX's weights."""
    sizes = {"img_attn.proj": 96, "img_attn.qkv": 288, "img_mlp.0": 384, "img_mlp.2": 96, "linear1": 672, "linear2": 96}
    inputs = {"img_mlp.2": 384, "linear2": 480}
    shapes: dict[str, list[int]] = {}
    for name, shape in TRIMMED["flux_lokr_bfl"].items():
        module, word = name.rsplit(".", 1)
        part = next(part for part in sizes if module.endswith(part))
        shapes[name] = shape if not shape else [32, 32] if word == "lokr_w1" else [sizes[part], inputs.get(part, 96)]
    tensors = filled(shapes)
    adapter = read("comfyui", tensors)
    assert adapter.base is not None and adapter.base.name == "flux.1-dev" and not adapter.leftovers
    assert adapter.algorithms() == {"lokr": len(adapter.deltas)} and all(delta.scale == 1.0 for delta in adapter.deltas.values())
    same(written("comfyui", adapter).tensors, tensors)


@pytest.mark.parametrize(
    ("name", "bases"), [("anima_lora_kohya", {"anima", "cosmos-predict2-2b"}), ("anima_lora_kohya_with_te", {"anima"})]
)
def test_the_anima_sets_with_shapes_of_anima(name: str, bases: set[str]) -> None:
    """The same names with the sizes of library/anima_models.py and of Qwen3 0.6B: told apart from dots, and there and back."""
    shapes = {key: list(shape) for key, shape in TRIMMED[name].items()}
    sizes = {
        "cross_attn_k_proj": (2048, 1024), "cross_attn_v_proj": (2048, 1024), "adaln_modulation_cross_attn_1": (256, 2048),
        "te_layers_0_self_attn_q_proj": (2048, 1024), "te_layers_0_self_attn_o_proj": (1024, 2048), "te_layers_0_mlp_gate_proj": (3072, 1024),
        "te_layers_0_mlp_up_proj": (3072, 1024), "te_layers_0_mlp_down_proj": (1024, 3072),
    }  # fmt: skip
    for key, shape in shapes.items():
        size = next((size for part, size in sizes.items() if f"{part}." in key), None)
        if size is not None and shape:
            shapes[key] = [size[0], 8] if "lora_up" in key else [8, size[1]]
    tensors = filled(shapes)
    adapter = read("kohya", tensors)
    assert not adapter.leftovers and adapter.base is not None and {adapter.base.name, *adapter.base.lookalikes} == bases
    same(written("kohya", adapter).tensors, tensors)
    content = written("comfyui", adapter)
    prefixes = {key.split("0.")[0] for key in content.tensors}
    # The prefixes of kohya-ss/sd-scripts networks/convert_anima_lora_to_comfy.py.
    assert prefixes <= {"diffusion_model.blocks.", "text_encoders.qwen3_06b.transformer.model.layers."}
    again = read("comfyui", content.tensors, content.metadata)
    same_adapter(adapter, again)
    same(written("kohya", again).tensors, tensors)
    if "with_te" in name:
        with pytest.raises(RefusedError) as caught:
            written("diffusers", adapter)
        assert "a language model as text encoder" in str(caught.value.found)
    else:
        same_adapter(adapter, read("diffusers", written("diffusers", adapter).tensors, written("diffusers", adapter).metadata))


@pytest.mark.parametrize("name", [*CASES, *IMPOSSIBLE])
def test_identify_names_dialect_and_base(name: str, tmp_path: Path) -> None:
    from upparam.containers.safetensors import write

    with (tmp_path / "lora.safetensors").open("xb") as stream:
        write(stream, filled({key: shape for key, shape in TRIMMED[name].items() if np.prod(shape) < 2_000_000}), {})
    (report,) = identify(tmp_path / "lora.safetensors").adapters
    assert report.kind == "adapter" and report.dialect == (CASES[name].dialect if name in CASES else IMPOSSIBLE[name])
    if name in CASES:
        wanted = CASES[name].base or CASES[name].named or ""
        (hint,) = report.bases
        assert wanted == hint.name or wanted in hint.lookalikes or wanted.startswith(hint.name.rsplit("-", 1)[0]), hint
    else:
        assert not report.bases
