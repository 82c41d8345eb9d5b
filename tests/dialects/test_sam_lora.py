"""Numbered q and v: against the writers' own order of saving (Sam_LoRA src/lora.py, SAMed, LoRA-ViT lora.py) and their forward passes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from tests.dialects.files import filled, read, same, tensor_file, written

from upparam import dialects
from upparam.adapter import Adapter, BaseHint, Extra, ExtraKind, Target
from upparam.algorithms.base import BAKED, ScaleRule, Scaling
from upparam.algorithms.lora import LoRA
from upparam.algorithms.slicing import join
from upparam.bases import inventory
from upparam.dialects.base import Bundle, ReadOptions
from upparam.errors import DeadAdapterError, MalformedError, RefusedError, UsageError
from upparam.operations.convert import convert
from upparam.operations.opening import open_adapter
from upparam.tensors import Tensor

SAM = {"sam-vit-b": (12, 768), "sam-vit-l": (24, 1024), "sam-vit-h": (32, 1280)}
DECODER = {  # module, (in, out), as SAMed's LoRA_Sam.__init__ goes through mask_decoder.transformer
    **{f"sa_{{}}_{2 * layer + part:03d}": (f"layers.{layer}.self_attn.{'qv'[part]}_proj", 256) for layer in (0, 1) for part in (0, 1)},
    **{f"cti_{{}}_{2 * layer + part:03d}": (f"layers.{layer}.cross_attn_token_to_image.{'qv'[part]}_proj", 128) for layer in (0, 1) for part in (0, 1)},
    **{f"cit_{{}}_{2 * layer + part:03d}": (f"layers.{layer}.cross_attn_image_to_token.{'qv'[part]}_proj", 128) for layer in (0, 1) for part in (0, 1)},
    "fati_q{}": ("final_attn_token_to_image.q_proj", 128), "fati_v{}": ("final_attn_token_to_image.v_proj", 128),
}  # fmt: skip


def encoder(blocks: int, dim: int, rank: int = 2) -> dict[str, list[int]]:
    """A_weights and B_weights hold q and v of each block in turn; save_lora_parameters numbers them."""
    return {
        name: shape
        for number in range(2 * blocks)
        for name, shape in ((f"w_a_{number:03d}", [rank, dim]), (f"w_b_{number:03d}", [dim, rank]))
    }


def decoder(rank: int = 2) -> dict[str, list[int]]:
    return {name.format(role): shape for name, (_, out) in DECODER.items() for role, shape in (("a", [rank, 256]), ("b", [out, rank]))}


SAVED = {"prompt_encoder.no_mask_embed.weight": [1, 256], "mask_decoder.iou_token.weight": [1, 256]}


@pytest.mark.parametrize("base", SAM)
def test_q_and_v_are_the_first_and_last_third(base: str) -> None:
    blocks, dim = SAM[base]
    tensors = filled(encoder(blocks, dim), np.float32)
    adapter = read("sam-lora", tensors, base=inventory.load(base))
    assert adapter.layout == "reference" and len(adapter.deltas) == 2 * blocks and not adapter.leftovers
    rng = np.random.default_rng(1)
    for block in (0, blocks - 1):
        x = rng.standard_normal((3, dim))
        qkv = np.zeros((3, 3 * dim))
        a, b = ([tensors[f"w_{role}_{number:03d}"].doubles() for number in (2 * block, 2 * block + 1)] for role in "ab")
        qkv[:, :dim] += x @ a[0].T @ b[0].T  # LoRA_qkv.forward
        qkv[:, -dim:] += x @ a[1].T @ b[1].T
        module = f"image_encoder.blocks.{block}.attn.qkv"
        changed = np.zeros((3, 3 * dim))
        for target, delta in adapter.deltas.items():
            if target.module == module:
                assert target.rows is not None
                changed[:, slice(*target.rows)] += x @ delta.load().rows(0, dim).T
        assert np.allclose(changed, qkv, rtol=1e-12, atol=1e-12)
    same(dict(written("sam-lora", adapter, base=inventory.load(base)).tensors), tensors)


def test_the_base_is_asked_for_where_sam_and_vit_look_alike() -> None:
    tensors = filled(encoder(12, 768))
    adapter = read("sam-lora", tensors)
    assert adapter.layout == "sam-lora" and "base-open" in {finding.code for finding in adapter.findings}
    assert adapter.base is not None and adapter.base.name == "sam-vit-b" and "vit-base-patch16-224" in adapter.base.lookalikes
    assert all(delta.scaling == BAKED for delta in adapter.deltas.values())
    same(dict(written("sam-lora", adapter).tensors), tensors)
    for dialect in ("peft", "kohya", "mlx", "diffusers", "cloneofsimo"):
        with pytest.raises(RefusedError, match="base"):
            written(dialect, adapter)
    vit = read("sam-lora", tensors, base=inventory.load("vit-base-patch16-224"))
    assert Target("vit.encoder.layer.11.attention.attention.value") in vit.deltas
    with pytest.raises(UsageError, match="no blocks"):
        read("sam-lora", tensors, base=inventory.load("gpt2"))
    with pytest.raises(UsageError, match="do not fit"):
        read("sam-lora", filled(encoder(12, 64)), base=inventory.load("sam-vit-b"))
    with pytest.raises(UsageError, match="multiply by nothing"):
        read("sam-lora", tensors, scale=2.0)


def test_samed_with_its_decoder() -> None:
    tensors = filled(encoder(12, 768) | decoder() | SAVED)
    adapter = read("sam-lora", tensors)
    assert adapter.base is not None and adapter.base.name == "sam-vit-b" and adapter.layout == "reference"
    for name, (module, out) in DECODER.items():
        delta = adapter.deltas[Target(f"mask_decoder.transformer.{module}")]
        assert delta.shape == (out, 256)
        assert (
            delta.factors()["down"].raw() == tensors[name.format("a")].raw()
            and delta.factors()["up"].raw() == tensors[name.format("b")].raw()
        )
    assert {(extra.kind, extra.name) for extra in adapter.extras} == {(ExtraKind.SAVED_MODULE, name) for name in SAVED}
    same(dict(written("sam-lora", adapter).tensors), tensors)
    adapter.dialect = "peft"
    content = written("sam-lora", adapter)
    assert content.container == "torch"  # SAMed reads with torch.load
    same(dict(content.tensors), tensors)
    del adapter.deltas[Target("mask_decoder.transformer.layers.1.self_attn.q_proj")]
    with pytest.raises(RefusedError, match="cannot be left out"):
        written("sam-lora", adapter)


def test_lora_vit_has_a_head_and_a_scale_of_its_own() -> None:
    tensors = filled(encoder(12, 768, rank=4) | {"fc_768in_10out": [10, 768]})
    adapter = read("sam-lora", tensors)
    assert adapter.base is not None and adapter.base.name.startswith("vit-base") and adapter.layout == "reference"
    assert list(adapter.deltas)[:2] == [Target(f"vit.encoder.layer.0.attention.attention.{part}") for part in ("query", "value")]
    assert [(extra.name, extra.tensor.shape) for extra in adapter.extras] == [("classifier.weight", (10, 768))]
    assert {delta.scale for delta in adapter.deltas.values()} == {None}
    assert [finding.code for finding in adapter.findings] == ["scale-missing"]
    same(dict(written("sam-lora", adapter).tensors), tensors)
    with pytest.raises(RefusedError, match="never guessed"):
        written("peft", adapter)
    assert {delta.scale for delta in read("sam-lora", tensors, alpha=11.0).deltas.values()} == {2.0}  # alpha // r
    told = read("sam-lora", tensors, scale=3.0)
    content = written("sam-lora", told)
    assert dict(content.metadata) == {"upparam.scale": "3"}
    again = read("sam-lora", content.tensors, content.metadata)
    assert {delta.scaling for delta in again.deltas.values()} == {Scaling(ScaleRule.EXPLICIT, multiplier=3.0)}
    with pytest.raises(MalformedError, match=r"upparam\.scale"):
        read("sam-lora", tensors, {"upparam.scale": "much"})
    half = read("sam-lora", tensors, scale=0.5)
    with pytest.raises(RefusedError, match="whole number"):
        written("sam-lora", half)


def test_some_blocks_only() -> None:
    tensors = filled(encoder(2, 768))
    base = inventory.load("sam-vit-b")
    adapter = read("sam-lora", tensors, base=base)
    assert adapter.layout == "sam-lora" and "blocks-open" in {finding.code for finding in adapter.findings}
    named = read("sam-lora", tensors, base=base, targets=("image_encoder.blocks.5", "image_encoder.blocks.11.attn.qkv"))
    assert {target.module for target in named.deltas} == {f"image_encoder.blocks.{block}.attn.qkv" for block in (5, 11)}
    with pytest.raises(UsageError, match="as many places"):
        read("sam-lora", tensors, base=base, targets=("image_encoder.blocks.5",))
    with pytest.raises(RefusedError, match="20 places are not changed"):
        written("sam-lora", named)


def test_orphans_and_strays() -> None:
    tensors = filled(encoder(12, 768) | SAVED | {"fati_qa": [2, 256], "stray": [3]})
    del tensors["w_b_005"]
    adapter = read("sam-lora", tensors, base=inventory.load("sam-vit-b"))
    assert set(adapter.leftovers) == {"w_a_005", "fati_qa", "stray"}
    assert [finding.code for finding in adapter.findings] == ["orphan", "orphan"]
    # The numbers after the gap still mean their own blocks.
    third = adapter.deltas[Target("image_encoder.blocks.3.attn.qkv", (0, 768))]
    assert third.factors()["up"].raw() == tensors["w_b_006"].raw()
    with pytest.raises(DeadAdapterError):
        read("sam-lora", filled({"w_a_000": [2, 768]}))
    with pytest.raises(MalformedError, match="do not fit"):
        read("sam-lora", filled({"w_a_000": [2, 768], "w_b_000": [768, 3]}))
    assert dialects.get("sam-lora").match(tensor_file(filled({"sa_a_000": [2, 2], "w_a": [2, 2]}))) is None


def whole(base: str) -> Adapter:
    """The encoder's deltas joined into one LoRA for each fused qkv, as dialects without slices hold them."""
    blocks, dim = SAM[base]
    tensors = filled(encoder(blocks, dim), np.float32)
    parts = read("sam-lora", tensors, base=inventory.load(base)).deltas
    deltas = {}
    for block in range(blocks):
        module = f"image_encoder.blocks.{block}.attn.qkv"
        deltas[Target(module)] = join([parts[Target(module, (0, dim))], dim, parts[Target(module, (2 * dim, 3 * dim))]])
    return Adapter(deltas, "test", base=BaseHint(base, 1.0, stated=True))


def test_a_joined_qkv_comes_apart_bit_for_bit() -> None:
    adapter = whole("sam-vit-b")
    assert adapter.ranks() == {4: 12}
    same(dict(written("sam-lora", adapter).tensors), filled(encoder(12, 768), np.float32))
    target = Target("image_encoder.blocks.0.attn.qkv")
    full = filled({"up": [2304, 2], "down": [2, 768]})
    adapter.deltas[target] = LoRA(full["up"], full["down"])
    with pytest.raises(RefusedError, match="k of a fused qkv"):
        written("sam-lora", adapter)


def test_what_has_no_number_is_refused() -> None:
    base = inventory.load("sam-vit-b")
    factors = filled({"up": [768, 2], "down": [2, 768], "bias": [768]})
    other = Target("image_encoder.blocks.0.attn.proj")
    adapter = whole("sam-vit-b")
    adapter.deltas[other] = LoRA(factors["up"], factors["down"], BAKED)
    with pytest.raises(RefusedError, match="without a number"):
        written("sam-lora", adapter)
    scaled = whole("sam-vit-b")
    scaled.deltas = {
        target: LoRA(delta.factors()["up"], delta.factors()["down"], Scaling(alpha=8.0)) for target, delta in scaled.deltas.items()
    }
    with pytest.raises(RefusedError, match="--bake-scale"):
        written("sam-lora", scaled)
    extra = Extra(ExtraKind.BIAS, "image_encoder.blocks.0.attn.proj.bias", factors["bias"])
    with pytest.raises(RefusedError, match="bias"):
        written("sam-lora", Adapter(dict(whole("sam-vit-b").deltas), "test", extras=[extra]), base=base)
    with pytest.raises(RefusedError, match="--base"):
        written("sam-lora", Adapter({other: LoRA(factors["up"], factors["down"])}, "test"))


def test_gathering_takes_one_file() -> None:
    member = dialects.get("sam-lora")
    file = tensor_file(filled(encoder(12, 768)))
    assert member.gather(file, [tensor_file({})]) == [file]
    torch = tensor_file(filled(encoder(12, 768)), name="lora.pth")
    torch.container = "torch zip"
    adapter = member.read(Bundle([torch], Path()), ReadOptions())
    (content,) = member.write(adapter, {}).files.values()
    assert content.container == "torch"  # type: ignore[union-attr]


def tensors_of(path: Path) -> Mapping[str, Tensor]:
    from upparam.containers import open_all

    (file,) = open_all(path)
    return file.tensors


@pytest.mark.parametrize("dialect", ["peft", "kohya", "sam-lora"])
def test_the_corpus_there_and_back(corpus: Path, tmp_path: Path, dialect: str) -> None:
    path = corpus / "sam-lora" / "lora_rank2.safetensors"
    options = ReadOptions(base=inventory.load("sam-vit-b"))
    assert len(open_adapter(path, options=options).deltas) == 24
    convert(path, tmp_path / "there", dialect, read=options)
    convert(tmp_path / "there", tmp_path / "back.safetensors", "sam-lora", read=options)
    same(tensors_of(tmp_path / "back.safetensors"), tensors_of(path))
    if dialect == "sam-lora":
        assert (tmp_path / "there").read_bytes() == path.read_bytes()
