"""What a dialect is: how names and side files become an adapter, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from upparam.adapter import Adapter
from upparam.bases.base import Base
from upparam.containers.base import TensorFile
from upparam.containers.side import read_json, read_yaml
from upparam.tensors import Tensor


@dataclass
class Bundle:
    """The files that make up one adapter candidate.

    `files` are the tensor files, the one that was recognised first; `folder` is where they lie; side files are read on demand.
    """

    files: list[TensorFile]
    folder: Path

    @property
    def main(self) -> TensorFile:
        """The file that was recognised."""
        return self.files[0]

    def side_json(self, filename: str) -> dict[str, Any] | None:
        """A JSON object lying beside the tensors, or None. Raises MalformedError if it is there and is not a JSON object."""
        return read_json(self.folder / filename)

    def side_yaml(self, filename: str) -> dict[str, Any] | None:
        """The plain lines of a YAML file lying beside the tensors (see `read_yaml`), or None. Raises MalformedError if it is no text."""
        return read_yaml(self.folder / filename)


@dataclass(frozen=True)
class Match:
    """How well a file fits a dialect: `confidence` 0..1 (1: only this dialect writes such names) and the facts it rests on.

    `alone` when every name bears a mark of this dialect that no other has: then none after it in the table is asked.
    """

    dialect: str
    confidence: float
    evidence: tuple[str, ...]
    alone: bool = False


@dataclass(frozen=True)
class ReadOptions:
    """What only the user can know. Fields are None when not given; a dialect uses those that mean something to it.

    `adapter` chooses by name among several adapters in one file; `targets` names modules for factors that carry no names; `alpha`, `scale` and `rank` fill in what the files do not say (a value in
    the files that contradicts one of these is an error, except that an explicit `--alpha` may override an assumed one).
    """

    base: Base | None = None
    targets: tuple[str, ...] | None = None
    alpha: float | None = None
    scale: float | None = None
    rank: int | None = None
    adapter: str | None = None


@dataclass
class Package:
    """What a dialect writes: files by relative name, each either named tensors with metadata or bytes (a config)."""

    files: dict[str, NamedTensors | bytes] = field(default_factory=dict)
    folder: bool = True
    """False when the dialect is a single file: `--out` then names that file, not a folder."""


@dataclass(frozen=True)
class NamedTensors:
    """Tensors under the names a file gives them, its string metadata, and the container to write (a name of CONTAINERS)."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    container: str = "safetensors"
    structure: Any = None
    """For torch files: the nested value to pickle (Tensors at its leaves); None means the flat dict of `tensors`."""
    late: Callable[[], Mapping[str, str]] | None = None
    """For safetensors: makes metadata that only the bytes tell (their hash), on a thread of its own while they are written and proved.
    `metadata` holds texts of the same length in its place."""


class Dialect(Protocol):
    """One ecosystem's way of naming an adapter. Members are listed in `upparam.dialects.DIALECTS`."""

    name: str
    title: str
    writable: bool

    @property
    def algorithms(self) -> tuple[str, ...]:
        """The algorithms of which it holds deltas, by their names in `upparam.algorithms`: to read them, and where `writable` to write them."""
        ...

    def match(self, file: TensorFile) -> Match | None:
        """Evidence that this one file speaks the dialect (key grammar first, file name last); None when it does not."""
        ...

    def gather(self, file: TensorFile, siblings: Sequence[TensorFile]) -> list[TensorFile]:
        """The files of the same folder that belong to one adapter with `file`, `file` first."""
        ...

    def read(self, bundle: Bundle, options: ReadOptions) -> Adapter:
        """The canonical adapter. Tensors that no rule explains go to `leftovers`, never away."""
        ...

    def write(self, adapter: Adapter, options: Mapping[str, Any]) -> Package:
        """The adapter in this dialect. Raises RefusedError listing every tensor or feature the dialect cannot hold."""
        ...
