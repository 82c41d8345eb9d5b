"""What a container is: bytes in, named lazy tensors out; and the shape of what reading gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from upparam.findings import Finding
from upparam.tensors import Source, Tensor

LONE = "."
"""The name of the only tensor of a file that names none (npy, headerless, a pickle of one tensor)."""


@dataclass
class TensorFile:
    """A file read as far as names, dtypes and shapes; tensor data is read on demand.

    `structure` is what a pickle built: nested dicts, lists and scalars whose leaves are Tensors or Opaque objects (None for other
    containers); `tensors` is the same flattened, nested keys joined with '/'. `wrapping` names outer archives, outermost first.
    """

    path: Path
    container: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    structure: Any = None
    wrapping: tuple[str, ...] = ()
    findings: list[Finding] = field(default_factory=list)
    data_start: int | None = None
    """Where tensor data begins (safetensors: after the header), for hashes over the data alone."""

    @property
    def name(self) -> str:
        """The file's own name."""
        return self.path.name


@dataclass(frozen=True)
class Head:
    """What sniffing may look at: the first bytes, the size and the name of a source, and more bytes on demand."""

    data: bytes
    size: int
    name: str
    source: Source


@dataclass(frozen=True)
class Opaque:
    """Something in a pickle that is no tensor, number, string or plain collection: kept as a name, never built.

    `qualname` is the global it would have called or looked up ('module.name'); `args` what it would have got, as descriptors.
    """

    qualname: str
    args: tuple[Any, ...] = ()


class Container(Protocol):
    """One way bytes hold tensors. Members are listed in `upparam.containers.CONTAINERS`, most specific first."""

    name: str
    title: str

    def sniff(self, head: Head) -> bool:
        """True when the bytes look like this container (magic numbers, not file extensions)."""
        ...

    def read(self, source: Source, path: Path) -> TensorFile:
        """Read names, dtypes, shapes. Raises MalformedError where the bytes break the format, LimitError past a documented limit."""
        ...


Opener = Callable[[Source, Path], TensorFile]


def flatten(structure: Any) -> dict[str, Tensor]:
    """Tensors of a nested structure by path: top-level string keys as they are, deeper ones joined with '/', a lone tensor as LONE."""
    found: dict[str, Tensor] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, Tensor):
            found[path or LONE] = value
        elif isinstance(value, dict):
            for key, item in value.items():
                walk(item, f"{path}/{key}" if path else str(key))
        elif isinstance(value, (list, tuple)):
            for index, item in enumerate(value):
                walk(item, f"{path}/{index}" if path else str(index))

    walk(structure, "")
    return found
