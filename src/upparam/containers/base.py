"""What a container is: bytes in, named lazy tensors out; and the shape of what reading gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from upparam.errors import LimitError
from upparam.findings import Finding
from upparam.sources import Source
from upparam.tensors import Tensor

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
    """Tensors of a nested structure by path: top-level string keys as they are, deeper ones joined with '/', a lone tensor as LONE.

    Tensors among the arguments of Opaque objects are found too, by argument number. Raises LimitError when shared parts would make
    the names many times more than the tensors.
    """
    return dict(leaves(structure, Tensor))


def leaves(structure: Any, kind: type | tuple[type, ...]) -> Iterator[tuple[str, Any]]:
    """(path, leaf) for every leaf of a type in a nested structure, in order. Works for any depth and for shared parts in linear time."""
    counts = _counts(structure, kind)
    limit = _SHARED + 16 * len(counts)
    if counts.get(id(structure), 0) > limit:
        raise LimitError("shared parts multiply the tensors of the file beyond reason", expected=f"<= {limit}", found="more")
    stack: list[tuple[str, Any]] = [("", structure)]
    while stack:
        path, value = stack.pop()
        if isinstance(value, kind):
            yield path or LONE, value
        elif counts.get(id(value)):
            stack.extend(reversed([(f"{path}/{key}" if path else _text(key), item) for key, item in _inside(value)]))


_SHARED = 100_000


def _inside(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [(_text(key), item) for key, item in value.items()]
    if isinstance(value, Opaque):
        return [(str(index), item) for index, item in enumerate(value.args)]
    if isinstance(value, (list, tuple)):
        return [(str(index), item) for index, item in enumerate(value)]
    return []


def _text(key: Any) -> str:
    text = str(key)
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def _counts(structure: Any, kind: type | tuple[type, ...]) -> dict[int, int]:
    """How many leaves lie under each container, by its id; each container is looked at once."""
    counts: dict[int, int] = {}
    stack: list[tuple[Any, bool]] = [(structure, False)]
    while stack:
        value, ready = stack.pop()
        if not isinstance(value, (dict, list, tuple, Opaque)) or (not ready and id(value) in counts):
            continue
        inside = value.values() if isinstance(value, dict) else value.args if isinstance(value, Opaque) else value
        if ready:
            total = sum(1 if isinstance(item, kind) else counts.get(id(item), 0) for item in inside)
            counts[id(value)] = min(total, 1 << 62)
        else:
            counts[id(value)] = 0
            stack.append((value, True))
            stack.extend((item, False) for item in inside if isinstance(item, (dict, list, tuple, Opaque)) and not isinstance(item, kind))
    return counts
