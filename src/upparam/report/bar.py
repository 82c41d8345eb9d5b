"""A progress bar on stderr: throughput and time left, from rich."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from upparam.containers.symbols import clean


class Bar:
    """A Progress over bytes, shown from the first report until everything is done."""

    def __init__(self) -> None:
        self._bar = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
            console=Console(file=getattr(sys.stderr, "stream", sys.stderr)), transient=True,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=None)

    def __call__(self, done: int, total: int, what: str) -> None:
        """Move the bar; it appears at the first call and goes away when done reaches total."""
        if not self._bar.live.is_started:
            self._bar.start()
        self._bar.update(self._task, completed=done, total=total, description=clean(what[-40:]))
        if done >= total:
            self._bar.stop()
