"""Compare: are two adapters the same, and if not, what is one to the other; the same question for two models."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from upparam.adapter import Adapter
from upparam.checkpoint import Checkpoint
from upparam.dialects.base import ReadOptions
from upparam.errors import UnreadableError, UsageError
from upparam.operations.compare.adapters import compare_adapters
from upparam.operations.compare.models import ModelComparison, compare_models
from upparam.operations.compare.verdict import ACCEPTED, Comparison, Verdict
from upparam.operations.opening import candidates, open_adapter
from upparam.progress import Progress, silent


def compare(
    first: Adapter | Path | str,
    second: Adapter | Path | str,
    *,
    read: ReadOptions | None = None,
    accept: Collection[Verdict | str] = ACCEPTED,
    angles: bool = True,
    threads: int | None = None,
    progress: Progress = silent,
) -> Comparison | ModelComparison:
    """What `second` is to `first`: two adapters (files, folders or opened), or two models, a tuned one first and its base second.

    Paths that hold an adapter are adapters, other weights are models. `accept` are the verdicts under which the result's exit code is 0.
    Without `angles` the principal angles of adapters are left out, on which no verdict rests.
    `read` says what the files of the adapters do not; its alpha and scale are used for one whose scale is unknown. Nothing is written.

    Raises UsageError for an adapter against a model or an unknown verdict, RefusedError when names cannot be brought together, and what
    opening raises.
    """
    accepted = _verdicts(accept)
    one, other = _opened(first, read), _opened(second, read)
    names = tuple(_name(given) for given in (first, second))
    result: Comparison | ModelComparison
    if isinstance(one, Adapter) and isinstance(other, Adapter):
        result = compare_adapters(one, other, (names[0], names[1]), angles=angles, threads=threads, progress=progress)
    elif isinstance(one, Checkpoint) and isinstance(other, Checkpoint):
        result = compare_models(one, other, threads=threads, progress=progress)
    else:
        raise UsageError(
            "an adapter and a model cannot be compared", file=names[0], found="; ".join(f"{name}: {'an adapter' if isinstance(held, Adapter) else 'a model'}" for name, held in zip(names, (one, other), strict=True)),
            remedy="see whether it fits with 'upparam verify ADAPTER --base MODEL'",
        )  # fmt: skip
    result.accepted = accepted
    return result


def _verdicts(given: Collection[Verdict | str]) -> frozenset[Verdict]:
    try:
        return frozenset(Verdict(one) for one in given)
    except ValueError as problem:
        raise UsageError(f"no such verdict: {problem}", expected=", ".join(verdict.value for verdict in Verdict)) from None


def _name(given: Adapter | Path | str) -> str:
    if isinstance(given, Adapter):
        return given.files[0] if given.files else given.dialect
    return str(given)


def _opened(given: Adapter | Path | str, read: ReadOptions | None) -> Adapter | Checkpoint:
    if isinstance(given, Adapter):
        return given
    if not candidates(given):
        try:
            return Checkpoint.open(given)
        except UnreadableError:
            if Path(given).is_dir():
                open_adapter(given)  # says what lies there instead
            raise
    adapter = open_adapter(given, options=read and replace(read, alpha=None, scale=None))
    if read is not None and (read.alpha, read.scale) != (None, None) and any(delta.scale is None for delta in adapter.deltas.values()):
        adapter = open_adapter(given, options=read)
    return adapter
