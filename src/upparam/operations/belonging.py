"""How the files of a folder belong together: which of several adapters to use, and what is missing."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upparam.containers.side import read_json
from upparam.errors import UpparamError
from upparam.findings import Finding, error, info, warning
from upparam.patterns import regex

if TYPE_CHECKING:
    from upparam.operations.identify import AdapterReport, FileReport, Identity

_NAMED = 4
"""Names that are given as examples."""
_STATE = regex(r"^(?P<before>.*?)[-_.]?(?:(?:step|epoch|iter|checkpoint|ckpt)[-_]?(?P<word>\d+)|(?P<bare>\d{6,}))(?P<after>\D*)$", re.I)
"""A number of steps or epochs in a file's name: kohya's `x-000004`, `x-step00000500`, ai-toolkit's `x_000000250`, MLX's `0000100_adapters`."""
_ENDING = regex(r"\.(safetensors|bin|pth?|ckpt|npz|npy|gguf)$", re.I)


def belonging(path: Path, identity: Identity) -> list[Finding]:
    """Findings about a folder as a whole."""
    if not path.is_dir():
        return []
    if not identity.files and not any(path.iterdir()):
        return [warning("empty-folder", path.name, "an empty folder")]
    return [*_several(path, identity.adapters), *_missing(path, identity)]


def _several(path: Path, reports: Sequence[AdapterReport]) -> list[Finding]:
    alive = [report for report in reports if report.kind == "adapter"]
    if len(reports) < 2 or not alive:
        return []
    kin: dict[Any, list[tuple[int | None, AdapterReport]]] = {}
    for report in alive:
        stem, number = _state(report.files[0].name)
        kin.setdefault((stem, report.dialect, report.modules, tuple(report.ranks), tuple(report.algorithms)), []).append((number, report))
    findings = [_one_of(path, members) for members in kin.values() if len(members) > 1]
    if len(kin) > 1:
        names = [members[0][1].files[0].name for members in kin.values()]
        findings.append(
            info("several-adapters", path.name, f"{len(kin)} different adapters lie here: {_some(names)}; name the one you mean")
        )
    return findings


def _state(name: str) -> tuple[str, int | None]:
    """A file's name without ending and number of steps, and that number; None for one without, which is the last."""
    stem = _ENDING.sub("", name)
    found = _STATE.match(stem)
    if found is None:
        return stem.lower(), None
    return f"{found['before']}{found['after'].lstrip('-_.')}".lower(), int(found["word"] or found["bare"])


def _one_of(path: Path, members: Sequence[tuple[int | None, AdapterReport]]) -> Finding:
    """Which of several files with an adapter of the same name and shape to use."""
    last = max(members, key=lambda item: (item[0] is None, item[0] or 0))[0]
    ranked = sorted((report for number, report in members if number == last), key=lambda report: report.files[0].suffix != ".safetensors")
    best = ranked[0].files[0].name
    if len(ranked) > 1:
        names = ", ".join(report.files[0].name for report in ranked)
        why = ["same modules, ranks and algorithm"] + ["safetensors cannot carry code"] * best.endswith(".safetensors")
        return warning(
            "several-adapters", path.name, f"{len(ranked)} files hold an adapter of the same shape: {names}; use {best}",
            *why, "'upparam compare' tells whether the weights agree", confidence=0.8,
        )  # fmt: skip
    names = _some([report.files[0].name for _, report in sorted(members, key=lambda item: (item[0] is None, item[0] or 0))])
    which = "no number: the end of the training" if last is None else "the highest number: the most steps"
    return info(
        "states", path.name, f"{len(members)} states of one training: {names}; use {best}, the last", which,
        confidence=0.8,
    )  # fmt: skip


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f", ... ({len(names)})" if len(names) > _NAMED else "")


def _missing(path: Path, identity: Identity) -> list[Finding]:
    """A config whose weights are not there, and an index whose shards are not."""
    findings = []
    for file in identity.files:
        if file.path.name.endswith(".index.json") and file.path.parent == path:
            findings += _shards(file.path)
    config = path / "adapter_config.json"
    if identity.adapters or not config.is_file():
        return findings
    told = _object(config)
    kind = told.get("peft_type")
    if not isinstance(kind, str) and "lora_parameters" not in told:
        return findings
    stem = "adapter_model" if isinstance(kind, str) else "adapters"
    instead = next((file for file in identity.files if file.path.name.startswith(f"{stem}.")), None)
    return [*findings, _config_alone(path, stem, instead)] if instead is None or instead.tensors == 0 else findings


def _config_alone(path: Path, stem: str, instead: FileReport | None) -> Finding:
    if instead is not None:
        return error(
            "weights-missing", path.name, f"dead: the config is here and the weights are not: {instead.path.name} is {instead.message}",
            "config adapter_config.json",
        )  # fmt: skip
    return error(
        "weights-missing", path.name, f"dead: the config is here and the weights are not: no {stem}.safetensors or {stem}.bin",
        f"look for {stem}.safetensors where this folder came from",
    )  # fmt: skip


def _shards(index: Path) -> list[Finding]:
    held = _object(index).get("weight_map")
    if not isinstance(held, dict):
        return []
    names = sorted(
        {name for name in held.values() if isinstance(name, str) and not Path(name).is_absolute() and ".." not in Path(name).parts}
    )
    lost = [name for name in names if not (index.parent / name).exists()]
    return (
        [error("shards-missing", index.name, f"{len(lost)} of the {len(names)} files it names are not here", _some(lost))] if lost else []
    )


def _object(path: Path) -> Mapping[str, Any]:
    try:
        return read_json(path) or {}
    except UpparamError:
        return {}


def named_otherwise(path: Path, container: str | None) -> list[Finding]:
    """A warning where a file's name says another container than its bytes: many loaders go by the name."""
    ending = path.suffix.lower()
    torch = (".bin", ".pt", ".pth", ".ckpt")
    if container == "safetensors" and ending in torch:
        return [
            warning(
                "name-differs",
                path.name,
                f"it is safetensors, named {ending}: loaders that go by the name will fail; rename it to .safetensors",
            )
        ]
    if container in ("torch-zip", "torch-legacy", "torch-tar", "pickle") and ending == ".safetensors":
        what = f"it is a pickle ({container}), named .safetensors: loaders will fail, and one that does not may run code in it"
        return [warning("name-differs", path.name, what, "'upparam convert' makes a real safetensors file")]
    return []


def broken_links(path: Path) -> list[Path]:
    """Links in a folder whose file is not there."""
    return [member for member in sorted(path.iterdir()) if member.is_symlink() and not member.exists()] if path.is_dir() else []
