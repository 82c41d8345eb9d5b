"""A base model on disk as a stream of lazy tensors: one file, a sharded folder, or a folder of components.

Opening reads headers and indexes only. Which files make up the model follows what the loaders of transformers and diffusers do:
an index wins over loose shards, safetensors over torch files, the plain name over variants such as `fp16`; weight files that are
not part of the model so chosen are listed in `unread`, never silently mixed in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from upparam.containers import open_file
from upparam.containers.base import TensorFile
from upparam.containers.side import read_json
from upparam.dtypes import DTYPES
from upparam.errors import AmbiguousError, MalformedError, UnreadableError
from upparam.findings import Finding
from upparam.patterns import regex
from upparam.sources import FileSource
from upparam.tensors import Tensor

INDEX_SUFFIX = ".index.json"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".gguf")
"""File name endings that hold weights, the one preferred by loaders first."""
_OTHER_SUFFIXES = (".h5", ".msgpack", ".ot", ".onnx", ".onnx_data", ".tflite")
"""Those of weights that no merge reads: TensorFlow, Flax, Rust, ONNX, TFLite."""
_PLAIN_NAMES = ("model", "diffusion_pytorch_model", "pytorch_model")
"""Stems that transformers and diffusers load without being told."""
_SHARD = regex(r"(?P<stem>.+)-(?P<part>\d+)-of-(?P<count>\d+)(?P<suffix>\.[a-z]+)")
_NOT_WEIGHTS = regex(
    r"(adapter_model|training_args|optimizer|scheduler|scaler|rng_state|random_states|trainer_state|"
    r"(.*[._-])?lora([._-].*)?|learned_embeds.*)(_\d+)?\.[a-z]+"
)
"""Tensor files that lie beside a model and are no part of it: adapters and what training leaves behind."""

_WRAPPERS = ("state_dict", "model_state_dict", "module", "model")
"""Keys under which training frameworks save a model's tensors beside optimizer states and counters (PyTorch Lightning, DeepSpeed, torchtune)."""


@dataclass(frozen=True)
class CheckpointFile:
    """One weight file. `relative` is its path below the checkpoint (its own name for a single file), `component` its sub-folder or ''.

    `tensors` and `metadata` are as the file gives them, in file order; of a training state only the model's own (see `_WRAPPERS`).
    """

    path: Path
    relative: str
    component: str
    container: str
    tensors: Mapping[str, Tensor] = field(repr=False)
    metadata: Mapping[str, str] = field(repr=False)
    data_start: int | None = None
    quantised: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """Tensors in a block format that is no plain dtype (GGUF): name -> its type, shape and place (`containers.gguf.QuantisedTensor`).

    In `tensors` they are their bytes, uint8 (rows, bytes of a row)."""

    def qualified(self, name: str) -> str:
        """The tensor's name in the whole checkpoint: the component, a dot, and its name in the file."""
        return f"{self.component}.{name}" if self.component else name

    def holds(self, name: str) -> bool:
        """True when a tensor of this name in the whole checkpoint would belong to the file's component."""
        return not self.component or name.startswith(f"{self.component}.")


class SideFile(NamedTuple):
    """A file that belongs to the model and holds no weights (config, tokenizer, index, ...), and its path below the checkpoint."""

    path: Path
    relative: str


@dataclass(frozen=True)
class Checkpoint:
    """A base model on disk. `configs` maps each component ('' for the model itself) to its config.json."""

    path: Path
    files: tuple[CheckpointFile, ...]
    side_files: tuple[SideFile, ...] = ()
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    """Weight files (and an adapter's config) in the folder that are no part of the model as loaders choose it, as paths below the folder."""
    findings: tuple[Finding, ...] = ()

    @property
    def is_folder(self) -> bool:
        """True when the checkpoint is a folder rather than one file."""
        return self.path.is_dir()

    @property
    def config(self) -> Mapping[str, Any] | None:
        """The model's own config.json; None when there is none (a checkpoint of components has one for each, see `configs`)."""
        return self.configs.get("")

    @cached_property
    def tensors(self) -> Mapping[str, tuple[CheckpointFile, Tensor]]:
        """Every tensor by its name in the whole checkpoint, with the file that holds it."""
        return {file.qualified(name): (file, tensor) for file in self.files for name, tensor in file.tensors.items()}

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's shape by its name in the whole checkpoint; of a quantised tensor, that of what it stands for."""
        shapes = {name: tensor.shape for name, (_, tensor) in self.tensors.items()}
        return shapes | {file.qualified(name): item.shape for file in self.files for name, item in file.quantised.items()}

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for file in self.files for tensor in file.tensors.values())

    @staticmethod
    def open(path: Path | str) -> Checkpoint:
        """The checkpoint at `path`: a weight file, an index file, a model folder, or a folder of component folders (diffusers).

        Raises UnreadableError when there are no weights, AmbiguousError when several models lie in one folder, MalformedError when
        an index and its shards disagree or two files hold a tensor of the same name.
        """
        path = Path(path)
        if path.name.endswith(INDEX_SUFFIX):
            return _open_folder(path.parent, path)
        if path.is_dir():
            return _open_folder(path, None)
        file = open_file(path)
        config = read_json(path.parent / "config.json")
        return Checkpoint(
            path, (checkpoint_file(file, path.name, ""),), (), {} if config is None else {"": config}, (), tuple(file.findings)
        )


def checkpoint_file(file: TensorFile, relative: str, component: str) -> CheckpointFile:
    """A tensor file as part of a checkpoint."""
    tensors = _unwrapped(file.tensors)
    quantised = file.structure.get("quantised", {}) if file.container == "gguf" and isinstance(file.structure, dict) else {}
    source = FileSource(file.path) if quantised else None
    for name, item in quantised.items():
        rows = prod(item.shape[:-1])
        tensors[name] = Tensor(DTYPES["uint8"], (rows, item.nbytes // max(1, rows)), source, item.offset)  # type: ignore[arg-type]
    return CheckpointFile(file.path, relative, component, file.container, tensors, file.metadata, file.data_start, quantised)


def _unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's tensors of a saved training state, without the key they lie under; all of them where there is no such key."""
    for wrapper in _WRAPPERS:
        inside = {name[len(wrapper) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(f"{wrapper}/")}
        inside = {name: tensor for name, tensor in inside.items() if "/" not in name}
        if inside:
            return inside
    return dict(tensors)


def _open_folder(folder: Path, index: Path | None) -> Checkpoint:
    chosen: dict[str, list[Path]] = {}
    own, indexes = _choose(folder, index)
    components = {} if index is not None else _components(folder)
    if own and not (components and (folder / "model_index.json").is_file()):
        chosen[""] = own
    else:
        for name, (paths, index_files) in components.items():
            chosen[name] = paths
            indexes += index_files
    if not chosen:
        raise UnreadableError(
            "no model weights lie in this folder",
            file=folder,
            expected="*" + ", *".join(WEIGHT_SUFFIXES),
            remedy="name the weight file, or the folder that holds it",
        )
    files: list[CheckpointFile] = []
    findings: list[Finding] = []
    for component, paths in chosen.items():
        for path in paths:
            file = open_file(path)
            files.append(checkpoint_file(file, path.relative_to(folder).as_posix(), component))
            findings += file.findings
    _check_unique(files)
    for index_file in indexes:
        _check_index(index_file, files)
    taken = {file.path for file in files}
    others = [path for path in _walk(folder) if path not in taken]
    unread = tuple(path.relative_to(folder).as_posix() for path in others if _is_another_model(path))
    sides = tuple(SideFile(path, path.relative_to(folder).as_posix()) for path in others if not _is_another_model(path))
    configs = {}
    for component in chosen:
        config = read_json(folder / component / "config.json")
        if config is not None:
            configs[component] = config
    return Checkpoint(folder, tuple(files), sides, configs, unread, tuple(findings))


def _walk(folder: Path, above: tuple[Path, ...] = ()) -> Iterable[Path]:
    """Files below a folder, hidden ones (.git, .cache) left out, and links to a folder one is in."""
    above = (*above, folder.resolve())
    for member in sorted(folder.iterdir()):
        if member.name.startswith("."):
            continue
        if member.is_dir():
            if not (member.is_symlink() and member.resolve() in above):
                yield from _walk(member, above)
        elif member.is_file():
            yield member


def _is_weight_like(path: Path) -> bool:
    return path.suffix in WEIGHT_SUFFIXES


def _is_another_model(path: Path) -> bool:
    """True for a file that says what weights are, and would not be true of others: weights in any format, or an adapter's config."""
    return _is_weight_like(path) or path.suffix in _OTHER_SUFFIXES or path.name == "adapter_config.json"


def _is_weights(path: Path) -> bool:
    return _is_weight_like(path) and not _NOT_WEIGHTS.fullmatch(path.name)


def _components(folder: Path) -> dict[str, tuple[list[Path], list[Path]]]:
    """Sub-folders that hold weights: those model_index.json names, or every one when there is no such file."""
    listed = read_json(folder / "model_index.json")
    found = {}
    for member in sorted(folder.iterdir()):
        if member.is_dir() and not member.name.startswith(".") and (listed is None or member.name in listed):
            paths, indexes = _choose(member, None)
            if paths:
                found[member.name] = (paths, indexes)
    return found


def _choose(folder: Path, index: Path | None) -> tuple[list[Path], list[Path]]:
    """The weight files that make up the model of one folder, in order, and the index they follow if there is one."""
    if index is not None:
        return _indexed(index), [index]
    weights = sorted(path for path in folder.iterdir() if path.is_file() and _is_weights(path))
    groups: dict[str, list[Path]] = {}
    for path in weights:
        shard = _SHARD.fullmatch(path.name)
        groups.setdefault(f"{shard['stem']}{shard['suffix']}" if shard else path.name, []).append(path)
    indexes = {path.name.removesuffix(INDEX_SUFFIX): path for path in sorted(folder.glob(f"*{INDEX_SUFFIX}")) if path.is_file()}
    ranked = sorted({*groups, *indexes}, key=_preference)
    if not ranked:
        return [], []
    best = ranked[0]
    if best in indexes and not (best in groups and len(groups[best]) == 1 and not _SHARD.fullmatch(groups[best][0].name)):
        return _indexed(indexes[best]), [indexes[best]]
    rivals = [name for name in ranked if name in groups and _preference(name)[:3] == _preference(best)[:3]]
    if len(rivals) > 1:
        return _disjoint(folder, [path for name in rivals for path in groups[name]]), []
    _check_complete(groups[best])
    return groups[best], []


def _indexed(index: Path) -> list[Path]:
    shards = sorted(set(_weight_map(index).values()))
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise UnreadableError(
            "shards that the index names are missing", file=index, found=", ".join(missing[:5]), remedy="fetch them, then run again"
        )
    return [index.parent / shard for shard in shards]


def _preference(name: str) -> tuple[int, int, int, str]:
    """Sort key of a weight file's name: container first, then names that loaders know, then plain before variant."""
    stem, dot, suffix = name.rpartition(".")
    base, _, variant = stem.partition(".")
    order = WEIGHT_SUFFIXES.index(dot + suffix) if dot + suffix in WEIGHT_SUFFIXES else len(WEIGHT_SUFFIXES)
    return order, 0 if base in _PLAIN_NAMES else 1, 1 if variant else 0, name


def _disjoint(folder: Path, paths: list[Path]) -> list[Path]:
    """Several files without an index are one model when no tensor name occurs twice; otherwise the user must choose."""
    seen: dict[str, Path] = {}
    for path in paths:
        for name in open_file(path).tensors:
            if name in seen:
                raise AmbiguousError(
                    "several models lie in this folder",
                    file=folder,
                    tensor=name,
                    found=", ".join(member.name for member in paths),
                    remedy="name the weight file you mean",
                )
            seen[name] = path
    return paths


def _check_complete(paths: list[Path]) -> None:
    shards = [shard for path in paths if (shard := _SHARD.fullmatch(path.name))]
    if not shards:
        return
    count = int(shards[0]["count"])
    absent = sorted(set(range(1, count + 1)) - {int(shard["part"]) for shard in shards})
    if len(absent) == 1 and absent[0] == count and any(int(shard["part"]) == 0 for shard in shards):
        return  # numbered from 0
    if absent:
        raise UnreadableError(
            "shards are missing",
            file=paths[0].parent,
            expected=f"{count} files like {paths[0].name}",
            found=f"{len(paths)}; numbers {', '.join(map(str, absent[:5]))} are not here",
            remedy="fetch them, then run again",
        )


def _weight_map(index: Path) -> dict[str, str]:
    content = read_json(index)
    weights = None if content is None else content.get("weight_map")
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights.values()):
        raise MalformedError("the index has no weight_map from names to files", file=index)
    shards = {shard: Path(shard) for shard in set(weights.values())}
    for shard, path in shards.items():
        if "\0" in shard or path.is_absolute() or ".." in path.parts or not _inside(index.parent, path):
            raise MalformedError("the index points outside its folder", file=index, found=shard)
    spelled = {shard: path.as_posix() for shard, path in shards.items()}
    return {name: spelled[shard] for name, shard in weights.items()}


def _inside(folder: Path, path: Path) -> bool:
    """True when the sub-folder a path names lies in `folder`, links followed. A shard may be a link itself, as in the cache of huggingface_hub."""
    return len(path.parts) == 1 or (folder / path).parent.resolve().is_relative_to(folder.resolve())


def _check_index(index: Path, files: list[CheckpointFile]) -> None:
    """Raise MalformedError unless every tensor the index names is in the shard it names."""
    named, held = _weight_map(index), {file.path: file.tensors for file in files}
    shards = {shard: held[index.parent / shard] for shard in set(named.values())}
    for name, shard in named.items():
        if name not in shards[shard]:
            raise MalformedError(
                "the index names a tensor that its shard does not hold", file=index, tensor=name, expected=f"in {shard}",
                remedy="the index belongs to other shards; fetch the model again",
            )  # fmt: skip


def _check_unique(files: list[CheckpointFile]) -> None:
    seen: dict[str, CheckpointFile] = {}
    for file in files:
        for name in file.tensors:
            qualified = file.qualified(name)
            if qualified in seen:
                raise MalformedError(
                    "two files of the model hold a tensor of this name",
                    file=file.path,
                    tensor=name,
                    found=f"also in {seen[qualified].relative}",
                )
            seen[qualified] = file
