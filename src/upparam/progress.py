"""How long work reports where it is. Operations call a Progress; the terminal shows a bar, machines and libraries stay silent."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called with bytes (or items) done and in all, and what is at hand. May raise KeyboardInterrupt to stop the work."""

    def __call__(self, done: int, total: int, what: str) -> None:
        """Report."""
        ...


def silent(done: int, total: int, what: str) -> None:
    """Say nothing."""
