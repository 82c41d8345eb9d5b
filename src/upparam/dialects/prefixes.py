"""Changes of prefix under which a file's module names are a base's: a component or a wrapper that a writer leaves out or puts in front."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from upparam.adapter import BaseHint
from upparam.algorithms.base import fits_weight
from upparam.bases import inventory
from upparam.bases.base import Base


@dataclass(frozen=True)
class Naming:
    """How a file's paths become the base's: `strip` off the front, `add` in its place. `kept` are paths that have no such front and stay."""

    strip: str = ""
    add: str = ""
    kept: tuple[str, ...] = ()

    def __call__(self, path: str) -> str:
        """The base's path."""
        return self.add + path[len(self.strip) :] if path.startswith(self.strip) else path

    def back(self, path: str) -> str:
        """The file's path."""
        return self.strip + path[len(self.add) :] if path.startswith(self.add) and path not in self.kept else path


def change(base: Base, shapes: Mapping[str, tuple[int, ...]], component: str = "") -> Naming | None:
    """The change of prefix under which most of these modules are the base's (of one component, where named), with their shapes.

    None when half of them are not.
    """
    if not shapes:
        return None
    inside = f"{component}." if component else ""
    probe = max(shapes, key=lambda path: path.count("."))
    options = [Naming(add=inside)]
    words = probe.split(".")
    for cut in range(max(1, min(4, len(words) - 1))):
        tail = ".".join(words[cut:])
        strip = probe[: len(probe) - len(tail)]
        ends = (path for path in base.by_path if path.startswith(inside) and (path == tail or path.endswith("." + tail)))
        options += [Naming(strip, path[: len(path) - len(tail)]) for path in ends]
    best, count = None, 0
    for option in dict.fromkeys(options):
        hits = sum(
            path.startswith(option.strip) and (found := base.by_path.get(option(path))) is not None and _fits(found.canonical, shape)
            for path, shape in shapes.items()
        )
        if hits > count:
            best, count = option, hits
    return best if count * 2 >= len(shapes) else None


def _fits(weight: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """A delta of a whole weight, or (for parts of a fused one) of rows up to some row."""
    return fits_weight(shape, weight) or (weight[1:] == shape[1:] and shape[0] <= weight[0])


def contested(hint: BaseHint | None, shapes: Mapping[str, Mapping[str, tuple[int, ...]]], namings: Mapping[str, Naming | None]) -> bool:
    """True when bases that fit just as well would give the modules other names (bert. or roberta. in front of the same layers)."""
    if hint is None or hint.stated or all(naming == Naming() for naming in namings.values()):
        return False
    others = [inventory.load(name) for other in hint.lookalikes if (name := inventory.resolve(other)) is not None]
    return any(change(other, own, component) not in (None, namings[component]) for other in others for component, own in shapes.items())
