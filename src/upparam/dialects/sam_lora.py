"""Sam_LoRA, SAMed and LoRA-ViT: numbers instead of names. `w_a_000` and `w_b_000` are q of the first block, `w_a_001` and `w_b_001` its v.

Sources: MathieuNlp/Sam_LoRA src/lora.py; hitachinsk/SAMed sam_lora_image_encoder.py and sam_lora_image_encoder_mask_decoder.py;
JamesQFreeman/LoRA-ViT lora.py. The `a` factor is (r, in), `b` is (out, r); q and v are the first and the last third of the rows of a block's
fused `qkv`. SAMed adds the trained prompt encoder and mask decoder, or factors for the decoder's attentions (`sa_`, `cti_`, `cit_`, `fati_`);
LoRA-ViT adds the classifier as `fc_768in_10out` and multiplies by alpha // rank, which it does not store.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from upparam.adapter import Adapter, BaseHint, Extra, ExtraKind, Target
from upparam.algorithms import called
from upparam.algorithms.base import BAKED, UNKNOWN, Delta, ScaleRule, Scaling
from upparam.algorithms.lora import LoRA
from upparam.algorithms.slicing import cut
from upparam.bases import inventory
from upparam.bases.base import Base
from upparam.bases.numbered import recognise_shapes_only
from upparam.bases.traversal import Indexed, qkv_slices, split_qv
from upparam.containers.base import TensorFile
from upparam.dialects.base import Bundle, Match, NamedTensors, Package, ReadOptions
from upparam.dialects.placing import base_of
from upparam.dialects.refusing import other_scale, refuse
from upparam.errors import DeadAdapterError, MalformedError, RefusedError, UsageError
from upparam.findings import error, info, warning
from upparam.patterns import regex
from upparam.tensors import Tensor
from upparam.wording import counted

SCALE_KEY = "upparam.scale"
"""Metadata in which upparam notes the multiplier of a LoRA-ViT adapter, which the format itself leaves to the reader's arguments."""
_NUMBERED = regex(r"(w|sa|cti|cit)_([ab])_(\d{3,})")
_FINAL = regex(r"fati_([qv])([ab])")
_HEAD = regex(r"fc_\d+in_\d+out")
_SAVED = regex(r"(prompt_encoder|mask_decoder)\.")
_CLASSIFIER = "classifier.weight"
_DECODER = {"sa": "self_attn", "cti": "cross_attn_token_to_image", "cit": "cross_attn_image_to_token"}
_DECODER_LAYERS = 2


class Slot(NamedTuple):
    """A place for one pair of factors: the file's names for them, and the rows of which module they change."""

    down: str
    up: str
    target: Target
    shape: tuple[int, ...]


class SamLora:
    """The dialect."""

    name = "sam-lora"
    title = "Sam_LoRA, SAMed, LoRA-ViT (numbered q and v)"
    writable = True
    algorithms: tuple[str, ...] = ("lora",)

    def match(self, file: TensorFile) -> Match | None:
        """Names `w_a_<number>` and `w_b_<number>`, with what the writers save beside them."""
        hits = [name for name in file.tensors if _NUMBERED.fullmatch(name)]
        if not any(name.startswith("w_") for name in hits):
            return None
        beside = [name for name in file.tensors if _FINAL.fullmatch(name) or _HEAD.fullmatch(name) or _SAVED.match(name)]
        evidence = [f"{len(hits)} of {len(file.tensors)} names are w_a_<number> and w_b_<number>"]
        if beside:
            evidence.append(f"{counted(len(beside), 'tensor')} saved beside them, such as {beside[0]}")
        return Match(self.name, round(0.97 * (len(hits) + len(beside)) / len(file.tensors), 3), tuple(evidence))

    def gather(self, file: TensorFile, siblings: Sequence[TensorFile]) -> list[TensorFile]:
        """One file is one adapter."""
        return [file]

    def read(self, bundle: Bundle, options: ReadOptions) -> Adapter:
        """The adapter; numbers become modules where the base is known. Raises DeadAdapterError when no number has both factors."""
        file = bundle.main
        adapter = Adapter({}, self.name, metadata=dict(file.metadata), files=(str(file.path),), findings=list(file.findings))
        if file.container.startswith("torch"):
            adapter.spelling["container"] = "torch"
        pairs = _pairs(file, adapter)
        kind = _kind(file, options.base)
        deltas = {name: _lora(file, name, pair, _scaling(adapter, file, kind, pair, options)) for name, pair in pairs.items()}
        if not deltas:
            raise DeadAdapterError("no number has both its a and its b factor", file=file.path, found=", ".join(list(file.tensors)[:3]))
        slots = _explain(adapter, deltas, kind, file, options)
        adapter.layout = self.name if slots is None else "reference"
        for name, delta in deltas.items():
            adapter.deltas[Target(name) if slots is None else slots[name].target] = delta
        return adapter

    def write(self, adapter: Adapter, options: Mapping[str, Any]) -> Package:
        """One file. Raises RefusedError for modules that have no number, numbers left out, and scales the reader cannot be told."""
        problems = [f"{extra.kind.value} {extra.name}" for extra in adapter.extras if not _holds(extra)]
        problems += [
            f"{target}: {called(delta.algorithm)} delta it has no form for"
            for target, delta in adapter.deltas.items()
            if type(delta) is not LoRA or delta.mid is not None or len(delta.shape) != 2 or target.parameter != "weight"
        ]
        refuse(self.name, problems)
        tensors: dict[str, Tensor] = {}
        if adapter.layout == self.name:
            found = {target.module: delta for target, delta in adapter.deltas.items()}
            named = {slot.down: (slot, found[slot.down]) for slot in map(_unplaced, found)}
        else:
            named = _placed(adapter, base_of(adapter, options))
        tensors |= {slot.down: delta.factors()["down"] for slot, delta in named.values()}
        tensors |= {slot.up: delta.factors()["up"] for slot, delta in named.values()}
        vit = any(extra.name == _CLASSIFIER for extra in adapter.extras) or _is_vit(base_of(adapter, options))
        metadata = _scale_metadata(adapter, vit)
        for extra in adapter.extras:
            out, into = (*extra.tensor.shape, 0, 0)[:2]
            tensors[f"fc_{into}in_{out}out" if extra.name == _CLASSIFIER else extra.name] = extra.tensor
        spelled = adapter.spelling.get("container") if adapter.dialect == self.name else None
        samed = any(not name.startswith(("w_", "fc_")) for name in tensors)
        if spelled == "torch" or (samed and adapter.dialect != self.name):
            return Package({"lora.pth": NamedTensors(tensors, container="torch")}, folder=False)
        return Package({"lora.safetensors": NamedTensors(tensors, metadata)}, folder=False)


def _pairs(file: TensorFile, adapter: Adapter) -> dict[str, dict[str, Tensor]]:
    """The factors by the name of their a; what is saved beside them to the extras, the rest to the leftovers."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in file.tensors.items():
        if (match := _NUMBERED.fullmatch(name)) is not None:
            found.setdefault(f"{match.group(1)}_a_{match.group(3)}", {})["down" if match.group(2) == "a" else "up"] = tensor
        elif (match := _FINAL.fullmatch(name)) is not None:
            found.setdefault(f"fati_{match.group(1)}a", {})["down" if match.group(2) == "a" else "up"] = tensor
        elif _HEAD.fullmatch(name) and len(tensor.shape) == 2 and name == f"fc_{tensor.shape[1]}in_{tensor.shape[0]}out":
            adapter.extras.append(Extra(ExtraKind.SAVED_MODULE, _CLASSIFIER, tensor))
        elif _SAVED.match(name):
            adapter.extras.append(Extra(ExtraKind.SAVED_MODULE, name, tensor))
        else:
            adapter.leftovers[name] = tensor
    for name, pair in list(found.items()):
        if len(pair) < 2:
            slot = _unplaced(name)
            adapter.leftovers |= {slot.down if role == "down" else slot.up: tensor for role, tensor in found.pop(name).items()}
            adapter.findings.append(error("orphan", name, "a factor without its partner: the module cannot be applied"))
    return dict(sorted(found.items()))


def _kind(file: TensorFile, base: Base | None) -> str:
    """`sam`, `vit`, or '' where neither the base nor what lies beside the factors tells."""
    if base is not None:
        return "vit" if _is_vit(base) else "sam"
    if any(_SAVED.match(name) or _FINAL.fullmatch(name) or name.startswith(("sa_", "cti_", "cit_")) for name in file.tensors):
        return "sam"
    return "vit" if any(_HEAD.fullmatch(name) for name in file.tensors) else ""


def _is_vit(base: Base | None) -> bool:
    return base is not None and bool(split_qv(base))


def _scaling(adapter: Adapter, file: TensorFile, kind: str, pair: Mapping[str, Tensor], options: ReadOptions) -> Scaling:
    """1 for Segment Anything. LoRA-ViT has multiplied by alpha // rank since March 2024 and by 1 before that and before it saved its head."""
    head = any(_HEAD.fullmatch(name) for name in file.tensors)
    if SCALE_KEY in file.metadata:
        try:
            return Scaling(ScaleRule.EXPLICIT, multiplier=float(file.metadata[SCALE_KEY]))
        except ValueError as problem:
            raise MalformedError(f"metadata {SCALE_KEY} is no number: {problem}", file=file.path) from None
    if kind != "vit" or not head:
        if options.scale not in (None, 1.0):
            raise UsageError("the writers of this file multiply by nothing", file=file.path, expected="scale 1", found=options.scale)
        return BAKED
    if options.scale is not None:
        return Scaling(ScaleRule.EXPLICIT, multiplier=options.scale)
    if options.alpha is not None:
        return Scaling(ScaleRule.EXPLICIT, multiplier=float(options.alpha // pair["down"].shape[0]))
    if not any(finding.code == "scale-missing" for finding in adapter.findings):
        why = "LoRA-ViT multiplies by alpha // rank (until March 2024 by 1) and does not store alpha"
        adapter.findings.append(warning("scale-missing", file.name, why, "give it with --alpha or --scale"))
    return UNKNOWN


def _lora(file: TensorFile, name: str, pair: Mapping[str, Tensor], scaling: Scaling) -> LoRA:
    try:
        return LoRA(pair["up"], pair["down"], scaling)
    except MalformedError as problem:
        raise MalformedError(problem.message, file=file.path, tensor=name, expected=problem.expected, found=problem.found) from None


def _unplaced(name: str) -> Slot:
    """The names of a pair that no base explains, by the name of its a."""
    up = name[:-1] + "b" if name.startswith("fati_") else name.replace("_a_", "_b_")
    return Slot(name, up, Target(name), ())


def _walk(base: Base) -> list[Indexed]:
    return qkv_slices(base) or split_qv(base)


def _slots(base: Base, blocks: Sequence[str] | None = None) -> Iterator[Slot]:
    """Every place the dialect has in a base, in the order of the numbers; only those in `blocks` (modules) of the encoder when given."""
    number = 0
    for item in _walk(base):
        if blocks is None or any(item.module == block or item.module.startswith(block + ".") for block in blocks):
            yield Slot(f"w_a_{number:03d}", f"w_b_{number:03d}", Target(item.module, item.rows), item.shape)
            number += 1
    for word, attention in _DECODER.items():
        for number in range(2 * _DECODER_LAYERS):
            module = f"mask_decoder.transformer.layers.{number // 2}.{attention}.{'qv'[number % 2]}_proj"
            if module in base.by_path:
                yield Slot(f"{word}_a_{number:03d}", f"{word}_b_{number:03d}", Target(module), base.by_path[module].shape)
    for part in "qv":
        module = f"mask_decoder.transformer.final_attn_token_to_image.{part}_proj"
        if module in base.by_path:
            yield Slot(f"fati_{part}a", f"fati_{part}b", Target(module), base.by_path[module].shape)


def _explain(adapter: Adapter, deltas: Mapping[str, LoRA], kind: str, file: TensorFile, options: ReadOptions) -> dict[str, Slot] | None:
    """The place of each pair in the base, noted in the adapter; None where the base, or which blocks are meant, is not certain."""
    numbers = [int(name[4:]) for name in file.tensors if re.fullmatch(r"w_[ab]_\d+", name)]
    count = 1 + max(numbers)
    base = options.base
    if base is not None:
        adapter.base = BaseHint(base.name, 1.0, ("named by the user", *base.evidence), True)
        if not _walk(base):
            raise UsageError("the base has no blocks that this dialect numbers", file=file.path, expected="SAM or ViT", found=base.name)
    else:
        adapter.base = _recognised(deltas, count, kind)
        if adapter.base is None or not kind:
            if adapter.base is not None:
                said = "Sam_LoRA's files and those of LoRA-ViT before April 2023 look alike"
                adapter.findings.append(info("base-open", file.name, said, "name the base with --base"))
            return None
        base = inventory.load(adapter.base.name)
    slots = {slot.down: slot for slot in _slots(base, options.targets)}
    places = sum(1 for name in slots if name.startswith("w_"))
    if places != count:
        message = f"{count} numbers for {places} places in {base.name}: which blocks were trained is not in the file"
        if options.targets:
            raise UsageError("the targets given do not make as many places as the file has numbers", expected=count, found=places)
        adapter.findings.append(warning("blocks-open", file.name, message, "name each block's module with --target, in order"))
        return None
    wrong = [name for name, delta in deltas.items() if name not in slots or slots[name].shape != delta.shape]
    if wrong:
        shape = slots[wrong[0]].shape if wrong[0] in slots else "no such place"
        if options.base is not None:
            raise UsageError(
                "the factors do not fit the base", file=file.path, tensor=wrong[0], expected=shape, found=deltas[wrong[0]].shape
            )
        return None
    return slots


def _recognised(deltas: Mapping[str, LoRA], count: int, kind: str) -> BaseHint | None:
    """The base whose blocks have these shapes: Segment Anything first where only the shapes speak."""
    shapes = [delta.shape for name, delta in deltas.items() if name.startswith("w_")]
    if len(shapes) != count:
        return None
    hints = {rule: recognise_shapes_only(shapes, rule) for rule in ("qkv-slices", "split-qv")}
    sam, vit = hints["qkv-slices"], hints["split-qv"]
    chosen = (sam or vit) if not kind else sam if kind == "sam" else vit
    if not chosen:
        return None
    others = [] if kind else [hint.name for hint in vit if hint is not chosen[0]]
    hint = chosen[0]
    sure = hint.confidence * (0.9 if others else 1.0)
    return BaseHint(hint.name, round(sure, 3), hint.evidence, lookalikes=(*hint.lookalikes, *others))


def _holds(extra: Extra) -> bool:
    return extra.kind is ExtraKind.SAVED_MODULE and (
        bool(_SAVED.match(extra.name)) or (extra.name == _CLASSIFIER and len(extra.tensor.shape) == 2)
    )


def _scale_metadata(adapter: Adapter, vit: bool) -> dict[str, str]:
    """The metadata to write. Raises RefusedError where the reader multiplies by another number than the deltas' scale."""
    metadata = {key: value for key, value in adapter.metadata.items() if key != SCALE_KEY}
    scales = {delta.scale for delta in adapter.deltas.values()}
    if scales <= {1.0} and not vit:
        return metadata
    scale = next(iter(scales))
    if scale is None and len(scales) == 1 and adapter.dialect == SamLora.name:
        return metadata
    if not vit or len(scales) > 1 or scale is None or scale < 0 or scale != int(scale):
        shown = ", ".join("unknown" if value is None else f"{value:g}" for value in list(scales)[:4])
        wanted = "one whole number (alpha // rank)" if vit else "1"
        if None in scales:
            raise RefusedError("the scale of these factors is not known", expected=wanted, found=shown, remedy="give it with --scale")
        why = f"the reader multiplies every module by the same, {wanted}"
        refuse(SamLora.name, [
            other_scale(str(target), delta, why=f"a scale of {delta.scale:g}; {why}") for target, delta in adapter.deltas.items() if delta.scale != 1.0
        ])  # fmt: skip
    return {**metadata, SCALE_KEY: f"{scale:g}"}


def _placed(adapter: Adapter, base: Base | None) -> dict[str, tuple[Slot, Delta]]:
    """Every slot with its delta. Raises RefusedError for modules without a number and for numbers that would be left out."""
    if base is None or not _walk(base) or adapter.layout != "reference":
        known = base is not None and adapter.layout == "reference"
        raise RefusedError(
            f"numbers follow from the blocks of a SAM or a ViT, and {base.name if base is not None and known else 'the base'} is not "
            f"{'one' if known else 'known to be one'}",
            file=adapter.files[0] if adapter.files else None, remedy=None if known else "name it with --base",
        )  # fmt: skip
    left = _cut_wholes(adapter.deltas, base)
    found: dict[str, tuple[Slot, Delta]] = {}
    missing: dict[str, list[Slot]] = {}
    for slot in _slots(base):
        if slot.target in left:
            found[slot.down] = (slot, left.pop(slot.target))
        else:
            missing.setdefault("w" if slot.down.startswith("w_") else "decoder", []).append(slot)
    if left:
        raise RefusedError(
            f"{counted(len(left), 'target')} without a number in this dialect: it holds q and v of every block", tensor=str(next(iter(left))),
            found=", ".join(str(target) for target in list(left)[:5]) + (" ..." if len(left) > 5 else ""),
        )  # fmt: skip
    decoder = any(not name.startswith("w_") for name in found)
    gaps = missing.get("w", []) + (missing.get("decoder", []) if decoder else [])
    if gaps:
        raise RefusedError(
            f"{counted(len(gaps), 'place', 'is', 'are')} not changed, and a number cannot be left out", tensor=str(gaps[0].target),
            found=", ".join(str(slot.target) for slot in gaps[:5]) + (" ..." if len(gaps) > 5 else ""),
        )  # fmt: skip
    return found


def _cut_wholes(deltas: Mapping[Target, Delta], base: Base) -> dict[Target, Delta]:
    """Deltas of a whole fused qkv cut into q and v where the rows of k are zero."""
    wanted: dict[str, list[tuple[int, int]]] = {}
    for item in _walk(base):
        if item.rows is not None:
            wanted.setdefault(item.module, []).append(item.rows)
    found: dict[Target, Delta] = {}
    for target, delta in deltas.items():
        rows = wanted.get(target.module)
        if target.rows is not None or rows is None or not isinstance(delta, LoRA):
            found[target] = delta
            continue
        (_, low), (high, _) = rows
        if delta.up.rows(low, high).read().any():
            raise RefusedError("k of a fused qkv is changed too, which this dialect has no place for", tensor=str(target))
        found |= {Target(target.module, span): _compact(cut(delta, *span)) for span in rows}
    return found


def _compact(delta: Delta) -> Delta:
    """The same dW without the columns of zeros that joining q and v into one LoRA gave each; all of them where nothing is left."""
    if not isinstance(delta, LoRA):
        return delta
    columns = delta.up.read().any(axis=0).nonzero()[0]
    if not len(columns) or len(columns) == delta.rank:
        return delta
    low, high = int(columns[0]), int(columns[-1]) + 1
    scale = delta.known_scale()
    scaling = BAKED if scale == 1.0 else Scaling(ScaleRule.EXPLICIT, multiplier=scale)
    return LoRA(delta.up.columns(low, high), delta.down.rows(low, high), scaling)


dialect = SamLora()
