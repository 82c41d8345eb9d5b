"""cloneofsimo: numbers through the base's walk, tokens, the older list files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.dialects.files import filled, read, same, tensor_file, written

from upparam import dialects
from upparam.adapter import Adapter, ExtraKind, Target
from upparam.algorithms.base import BAKED, Scaling
from upparam.algorithms.lora import LoRA
from upparam.bases import inventory
from upparam.bases.traversal import RULES
from upparam.containers.base import TensorFile
from upparam.dialects.base import Bundle, NamedTensors, ReadOptions
from upparam.errors import DeadAdapterError, MalformedError, RefusedError
from upparam.operations.opening import open_adapter
from upparam.tensors import Tensor

UNET, TEXT = ("CrossAttention", "Attention", "GEGLU"), ("CLIPAttention",)


def numbered(base: str, component: str, classes: tuple[str, ...], rule: str, rank: int = 4) -> tuple[dict[str, list[int]], dict[str, str]]:
    """(shapes by name, metadata) as save_safeloras_with_embeds writes them."""
    order: Any = RULES[rule]
    shapes: dict[str, list[int]] = {}
    metadata = {component: json.dumps(list(classes))}
    for number, item in enumerate(order(inventory.load(base), classes)):
        out, into, *kernel = item.shape
        shapes |= {f"{component}:{number}:up": [out, rank, *(1 for _ in kernel)], f"{component}:{number}:down": [rank, into, *kernel]}
        metadata[f"{component}:{number}:rank"] = str(rank)
    return shapes, metadata


@pytest.mark.parametrize("base", ["sd1.5", "sd2"])
@pytest.mark.parametrize(
    "classes", [UNET, ("CrossAttention", "Attention"), ("ResnetBlock2D", *UNET)], ids=["default", "attention", "extended"]
)
@pytest.mark.parametrize("rule", ["cloneofsimo-unet", "cloneofsimo-unet-late"])
def test_numbers_become_modules_and_numbers_again(base: str, classes: tuple[str, ...], rule: str) -> None:
    shapes, metadata = numbered(base, "unet", classes, rule)
    text, said = numbered(base, "text_encoder", TEXT, "cloneofsimo-text")
    tensors, metadata = filled(shapes | text), metadata | said | {"comment": "kept"}
    adapter = read("cloneofsimo", tensors, metadata)
    assert adapter.layout == "reference" and adapter.base is not None and adapter.base.name == base and not adapter.leftovers
    assert {target.module for target in adapter.deltas} <= set(inventory.load(base).by_path)
    assert all(delta.scaling == BAKED for delta in adapter.deltas.values())
    out = written("cloneofsimo", adapter)
    same(dict(out.tensors), tensors)
    assert dict(out.metadata) == metadata


def test_a_file_of_another_base_keeps_its_numbers() -> None:
    shapes, metadata = numbered("sdxl", "unet", UNET, "cloneofsimo-unet")
    tensors = filled(shapes)
    adapter = read("cloneofsimo", tensors, metadata)
    assert adapter.layout == "cloneofsimo" and adapter.base is None and Target("unet:0") in adapter.deltas
    same(dict(written("cloneofsimo", adapter).tensors), tensors)
    with pytest.raises(RefusedError, match="base"):
        written("kohya", adapter)
    named = read("cloneofsimo", tensors, metadata, base=inventory.load("sdxl"))
    assert named.layout == "reference" and named.base is not None and named.base.stated


def test_orphans_gaps_and_nothing() -> None:
    shapes, metadata = numbered("sd1.5", "unet", UNET, "cloneofsimo-unet")
    tensors = filled(shapes)
    del tensors["unet:3:up"]
    adapter = read("cloneofsimo", tensors | filled({"stray": [3]}), metadata)
    assert set(adapter.leftovers) == {"unet:3:down", "stray"} and [finding.code for finding in adapter.findings] == ["orphan"]
    with pytest.raises(RefusedError, match="cannot be left out"):
        written("cloneofsimo", adapter)
    with pytest.raises(DeadAdapterError):
        read("cloneofsimo", filled({"unet:0:up": [320, 4]}), metadata)


@pytest.mark.parametrize("said", ["not json", '"GEGLU"', "[1]"])
def test_broken_class_lists_are_said(said: str) -> None:
    with pytest.raises(MalformedError, match="metadata unet"):
        read("cloneofsimo", filled({"unet:0:up": [320, 4], "unet:0:down": [4, 320]}), {"unet": said})


def test_what_has_no_number_is_refused() -> None:
    factors = filled({"up": [1280, 4], "down": [4, 1280]})

    def one(module: str, scaling: Scaling = BAKED) -> Adapter:
        return Adapter({Target(module): LoRA(factors["up"], factors["down"], scaling)}, "test")

    base = inventory.load("sd2")
    for adapter, why in (
        (one("unet.mid_block.attentions.0.proj_in"), "outside every walk"),
        (one("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"), "cannot be left out"),
        (one("vae.x"), "component"),
        (one("unet.x", Scaling(alpha=2.0)), "--bake-scale"),
    ):
        with pytest.raises(RefusedError, match=why):
            written("cloneofsimo", adapter, base=base)
    with pytest.raises(RefusedError, match="--base"):
        written("cloneofsimo", one("unet.x"))


def listed(shapes: dict[str, list[int]], component: str, name: str) -> TensorFile:
    """A torch list file as the torch container gives it: a list, and its items by number."""
    tensors = filled(shapes)
    values = [tensors[f"{component}:{number}:{role}"] for number in range(len(shapes) // 2) for role in ("up", "down")]
    return TensorFile(Path(name), "torch", {str(number): value for number, value in enumerate(values)}, structure=values)


def test_list_files_with_their_text_encoder_and_tokens_beside_them() -> None:
    unet = listed(numbered("sd1.5", "unet", UNET, "cloneofsimo-unet")[0], "unet", "dog.pt")
    text = listed(numbered("sd1.5", "text_encoder", TEXT, "cloneofsimo-text")[0], "text_encoder", "dog.text_encoder.pt")
    token = filled({"<s1>": [768]})
    tokens = TensorFile(Path("dog.ti.pt"), "torch", token, structure=dict(token))
    other = TensorFile(Path("cat.pt"), "torch", {})
    member = dialects.get("cloneofsimo")
    match = member.match(unet)
    assert match is not None and "list of" in match.evidence[0]
    files = member.gather(unet, [text, other, tokens])
    assert [file.name for file in files] == ["dog.pt", "dog.text_encoder.pt", "dog.ti.pt"]
    adapter = member.read(Bundle(files, Path()), ReadOptions())
    assert adapter.base is not None and adapter.base.name == "sd1.5" and len(adapter.deltas) == 192 and not adapter.leftovers
    assert [(extra.kind, extra.name, extra.tensor.shape) for extra in adapter.extras] == [(ExtraKind.TEXTUAL_INVERSION, "<s1>", (1, 768))]
    package = member.write(adapter, {})
    assert set(package.files) == {"dog.pt", "dog.text_encoder.pt", "dog.ti.pt"} and package.folder
    for file in (unet, text):
        content = package.files[file.name]
        assert isinstance(content, NamedTensors) and content.container == "torch"
        same(dict(enumerate(content.structure)), dict(enumerate(file.structure)))  # type: ignore[arg-type]


@pytest.mark.parametrize("values", [[], ["x"], [Tensor], [1, 2]])
def test_other_lists_are_not_taken(values: list[Any]) -> None:
    assert dialects.get("cloneofsimo").match(TensorFile(Path("x.pt"), "torch", {}, structure=values)) is None


def test_matrices_that_do_not_pair_are_not_taken() -> None:
    tensors = filled({"0": [4, 8], "1": [4, 8]})
    assert dialects.get("cloneofsimo").match(TensorFile(Path("x.pt"), "torch", tensors, structure=list(tensors.values()))) is None


def test_disney(corpus: Path, tmp_path: Path) -> None:
    path = corpus / "cloneofsimo" / "lora_disney.safetensors"
    adapter = open_adapter(path)
    assert (adapter.dialect, len(adapter.deltas), adapter.ranks()) == ("cloneofsimo", 192, {1: 192})
    assert adapter.base is not None and adapter.base.name == "sd1.5" and not adapter.leftovers
    assert [extra.name for extra in adapter.extras] == ["<s1>", "<s2>"]
    match = dialects.get("cloneofsimo").match(tensor_file(dict(adapter.tensors()), {}))
    assert match is None
    adapter.save(tmp_path / "k.safetensors", "kohya")
    kohya = open_adapter(tmp_path / "k.safetensors")
    assert [extra.name for extra in kohya.extras] == ["<s1>", "<s2>"] and kohya.deltas.keys() == adapter.deltas.keys()
    kohya.save(tmp_path / "c.safetensors", "cloneofsimo")
    again = open_adapter(tmp_path / "c.safetensors")
    same(dict(again.tensors()), dict(adapter.tensors()))
