"""The free choices a source made, kept in `Adapter.spelling` so that the same file can be written again.

A key alone is what most modules chose; the key followed by a module is what that one chose instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from upparam.dialects.words import alpha_tensor
from upparam.dtypes import DTYPES, DType
from upparam.tensors import Tensor

Aliases = Sequence[tuple[str, str]]
"""(prefix a file may use, prefix the layout uses) of module names."""


def remember(spelling: dict[str, str], key: str, module: str, value: str) -> None:
    """Keep a module's choice: the first is taken for that of all, those that differ from it are kept by name."""
    if spelling.setdefault(key, value) != value:
        spelling[f"{key} {module}"] = value


def chosen(spelling: Mapping[str, str], key: str, module: str) -> str | None:
    """What the module chose; None where nothing was kept."""
    return spelling.get(f"{key} {module}", spelling.get(key))


def form_of(tensor: Tensor) -> str:
    """The form of a tensor of one number, `float32 0`: its dtype and number of dimensions."""
    return f"{tensor.dtype} {len(tensor.shape)}"


def form(text: str) -> tuple[DType, int]:
    """(dtype, number of dimensions) that `form_of` gave."""
    dtype, dims = text.split()
    return DTYPES[dtype], int(dims)


def alpha_of(spelling: Mapping[str, str], module: str, value: float, like: DType, *, exact: bool = False) -> Tensor:
    """Alpha in the form it had in the source, else in a dtype that holds it (see `words.alpha_tensor`)."""
    kept = chosen(spelling, "alpha", module)
    dtype, dims = form(kept) if kept else (None, 0)
    return alpha_tensor(value, dtype, like, dims, exact=exact)


def note_prefixes(spelling: dict[str, str], names: Iterable[tuple[str, str]], aliases: Aliases) -> None:
    """Remember which aliases stand before the file's names; `names` are pairs of (the file's, the layout's)."""
    for given, own in names:
        for alias, prefix in aliases:
            if given != own and given.startswith(alias) and own == prefix + given[len(alias) :]:
                spelling[f"prefix {prefix}"] = alias


def respelled(name: str, spelling: Mapping[str, str]) -> str:
    """A layout's name of a module with the prefix the source had."""
    for key, alias in spelling.items():
        prefix = key.removeprefix("prefix ")
        if prefix != key and name.startswith(prefix):
            return alias + name[len(prefix) :]
    return name
