"""The triad's files: which factor a file or key is by its name, and the factors a bundle of files holds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from upparam.containers.base import LONE, TensorFile
from upparam.dialects.triad_pairs import Half, paired, role_of
from upparam.errors import AmbiguousError
from upparam.patterns import regex
from upparam.tensors import Tensor

_ROLES = {
    "up": "up", "down": "down", "mid": "mid", "alpha": "alpha", "magnitude": "magnitude", "extras": "extras",
    "loraup": "up", "loradown": "down", "loramid": "mid", "loraa": "down", "lorab": "up", "wa": "down", "wb": "up",
}  # fmt: skip
_NOISE = frozenset(("param", "params", "weight", "weights", "lora", "factor", "matrix"))
_ENDINGS = regex(r"(\.(bin|pt|pth|npy|npz|raw|tofile|dat|safetensors|f32|f16|bf16|json))+$", re.I)


_PARAM = regex(r"([a-z]\w*)-param(?:\.(\d+))?(?=\.|$)")
"""How `split` names a file of factors that are neither up nor down: `w1_a-param.bin`, `magnitude-param.0003.raw`."""


class Label(NamedTuple):
    """What a name says: the factor's role, a number (`up-param.3`), the words left over, and whether it is spelled as `up-param` is."""

    role: str
    number: int | None
    rest: tuple[str, ...]
    param: bool


def label(name: str) -> Label | None:
    """The label of a file name or key such as `up-param.bin`, `lora_unet_up.pt`, `lora_A.npy`, `down_3.npy`; None when it names no factor."""
    words = [word for word in re.split(r"[^A-Za-z0-9]+", _ENDINGS.sub("", name.rsplit("/", 1)[-1]).lower()) if word]
    role: str | None = None
    number: int | None = None
    rest: list[str] = []
    for index, word in enumerate(words):
        split = re.fullmatch(r"(up|down|mid)(\d+)", word)
        if split is not None:
            word, number = split[1], int(split[2])
        if word in ("a", "b") and (len(words) == 1 or (index and words[index - 1] in ("lora", "w"))):
            role = "down" if word == "a" else "up"
        elif word in _ROLES:
            role = _ROLES[word]
        elif word.isdigit():
            number = int(word)
        elif word not in _NOISE and not (word == "w" and index + 1 < len(words) and words[index + 1] in ("a", "b")):
            rest.append(word)
    if role is None:
        other = _PARAM.match(name)
        return None if other is None else Label(other[1], None if other[2] is None else int(other[2]), (), True)
    return Label(role, number, tuple(rest), "param" in words or "params" in words)


_COMPONENTS = {
    ("unet",): "unet", ("transformer",): "transformer", ("te",): "text_encoder", ("te1",): "text_encoder", ("text", "encoder"): "text_encoder",
    ("te2",): "text_encoder_2", ("te3",): "text_encoder_3",
}  # fmt: skip


def component(told: Label) -> tuple[str, tuple[str, ...]]:
    """(the pipeline's component that a name speaks of, '' for none; its other words): `lora_te_up.pt` is of the text encoder."""
    for words, own in _COMPONENTS.items():
        for at in range(len(told.rest) - len(words) + 1):
            if told.rest[at : at + len(words)] == words:
                return own, told.rest[:at] + told.rest[at + len(words) :]
    return "", told.rest


def components(files: Sequence[TensorFile]) -> dict[str, list[TensorFile]]:
    """The files by the component their names speak of, in order."""
    found: dict[str, list[TensorFile]] = {}
    for file in files:
        told = label(file.name)
        found.setdefault(component(told)[0] if told is not None else "", []).append(file)
    return found


def whole(files: Sequence[TensorFile]) -> bool:
    """True when both factors are here, by the names of the files or of their keys."""
    roles = {told.role for file in files for told in (label(file.name), *keyed(file).values()) if told is not None}
    return {"up", "down"} <= roles or any(paired(file) for file in files)


@dataclass
class Found:
    """The factors of a bundle: `factors` by module key (None for the only module of a file that names none) and role; other values by name.

    `unscaled` when they are called A and B: whoever writes those keeps the multiplier in code.
    """

    factors: dict[str | int | None, dict[str, Tensor]] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    extras: dict[str, Tensor] = field(default_factory=dict)
    headerless: dict[tuple[str | int | None, str], TensorFile] = field(default_factory=dict)
    unscaled: bool = False


def keyed(file: TensorFile) -> dict[str, Label]:
    """Top-level keys of a file that name a factor (`"up-param.bin"`), with what they say; {} when none does."""
    tops = _tops(file)
    found = {top: told for top in tops if "param" in top.lower() and (told := label(top)) is not None and told.param}
    return found if found and any(told.role in ("up", "down") for told in found.values()) else {}


def _tops(file: TensorFile) -> list[str]:
    if isinstance(file.structure, dict):
        return [str(key) for key in file.structure]
    return list(dict.fromkeys(name.split("/", 1)[0] for name in file.tensors))


_WORDED = regex(r"[./](?P<word>lora_[ABab]|lora_(?:up|down)|lora\.(?:up|down)|up|down)(?:\.default)?(?:\.weight)?$")


def half(names: Iterable[str]) -> str | None:
    """up or down where every name ends in another dialect's word for that factor (`<module>.lora_B.weight`); None otherwise."""
    found = {None if (match := _WORDED.search(name)) is None else role_of(match["word"]) for name in names}
    return found.pop() if len(found) == 1 else None


def unworded(found: Found) -> Found:
    """Factors by their modules, where files hold each half under another dialect's names: those have a word for the factor behind it.

    Raises AmbiguousError where two names then mean the same factor.
    """
    factors: dict[str | int | None, dict[str, Tensor]] = {}
    named: dict[tuple[str | int | None, str], str | int | None] = {}
    for whole, roles in found.factors.items():
        key = whole
        match = _WORDED.search(key) if isinstance(key, str) else None
        if isinstance(key, str) and match is not None and set(roles) == {role_of(match["word"])}:
            key = key[: match.start()].removeprefix("base_model.model.")
        for role, tensor in roles.items():
            other = named.setdefault((key, role), whole)
            if other != whole:
                raise AmbiguousError(
                    "two names mean the same factor", tensor=str(whole), found=other, remedy="take out the one that is not meant"
                )
            factors.setdefault(key, {})[role] = tensor
    return replace(found, factors=factors)


def collect(files: Sequence[TensorFile]) -> Found:
    """Every factor in these files. A key's own role comes before that of its file's name, unless the keys of all files say the same one."""
    found = Found()
    misnamed = _named_alike(files)
    for file in files:
        named = label(file.name)
        keys = {key: named if misnamed and named is not None else told for key, told in keyed(file).items()}
        halves = {} if keys else paired(file)
        found.unscaled |= any(half.word.lower().endswith(("a", "b")) and half.role != "alpha" for half in halves.values())
        for name, tensor in file.tensors.items():
            if halves:
                _put(found, halves.get(name), name, tensor)
                continue
            top = next((key for key in keys if name == key or name.startswith(key + "/")), None)
            told = keys[top] if top is not None else named
            if told is None:
                found.extras[name] = tensor
                continue
            inner = name[len(top) + 1 :] if top is not None else name
            key = _key(inner, told.number, file.structure)
            if told.role == "extras":
                found.extras[inner] = tensor
            else:
                found.factors.setdefault(key, {})[told.role] = tensor
                if file.container == "raw":
                    found.headerless[key, told.role] = file
        found.values |= _scalars(file.structure, keys)
    return found


def _put(found: Found, half: Half | None, name: str, tensor: Tensor) -> None:
    if half is None:
        found.extras[name] = tensor
    elif half.role == "alpha" and half.module is None:
        found.values["alpha"] = tensor.scalar()
    else:
        found.factors.setdefault(half.module, {})[half.role] = tensor


def _named_alike(files: Sequence[TensorFile]) -> bool:
    """True for an up and a down file, by their names, whose keys both say up-param (or both down-param): a writer used one key for both."""
    if len(files) != 2 or {told.role for file in files if (told := label(file.name))} != {"up", "down"}:
        return False
    said = [{told.role for told in keyed(file).values()} & {"up", "down"} for file in files]
    return said[0] == said[1] and len(said[0]) == 1


def _key(inner: str, number: int | None, structure: Any) -> str | int | None:
    """A module's name, its number in a list or among numbered files, or None where nothing tells."""
    if inner in ("", LONE):
        return number
    if inner.isdigit() and not isinstance(structure, dict):
        return int(inner)
    return int(inner) if inner.isdigit() else inner


def _scalars(structure: Any, keys: Iterable[str]) -> dict[str, Any]:
    """Numbers and strings beside the factors of a seed archive: alpha, rank, and those of a `config` dict."""
    if not isinstance(structure, dict):
        return {}
    found: dict[str, Any] = {}
    for key, value in structure.items():
        if str(key) in keys:
            continue
        if isinstance(value, (int, float, str)) and not isinstance(value, bool):
            found[str(key)] = value
        elif isinstance(value, Mapping) and "config" in str(key).lower():
            found |= {str(name): inner for name, inner in value.items() if isinstance(inner, (int, float, str, list))}
    return found
