"""Metadata that only the bytes of a file tell: made beside its writing and its proof, and put into its place when both are done."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from upparam.dialects.base import NamedTensors

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor


class Late:
    """The files whose metadata is still being made. Left without an error, each has it, and its header has been read again."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._begun: list[tuple[Path, NamedTensors, Future[Mapping[str, str]]]] = []

    def begin(self, path: Path, content: NamedTensors) -> None:
        """Begin with what `content`, which will lie at `path`, has to be told late, if anything."""
        if content.late is None:
            return
        from concurrent.futures import ThreadPoolExecutor

        self._pool = self._pool or ThreadPoolExecutor(1)
        self._begun.append((path, content, self._pool.submit(content.late)))

    def __enter__(self) -> Late:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._pool is None:
            return
        from upparam.containers.safetensors import restate

        self._pool.shutdown(wait=kind is None, cancel_futures=True)
        for path, content, told in self._begun if kind is None else ():
            restate(path, content.tensors, {**content.metadata, **told.result()})
