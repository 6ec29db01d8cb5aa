"""Progress of a compile on stderr: one line per stage with its seconds, a bar where bytes are
known.

Called by the pipeline; `Progress(quiet)` for tests and sweeps without a terminal draws no bars.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
from rich.progress import Progress as Bar


class Progress:
    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, size: int | None = None) -> Iterator[Callable[[int], None]]:
        """Yields what to call with the number of bytes done."""
        start = time.perf_counter()
        if size is None or not self.console.is_terminal:
            yield lambda done: None
        else:
            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
            with Bar(*columns, TransferSpeedColumn(), console=self.console, transient=True) as bar:
                task = bar.add_task(name, total=size)
                yield lambda done: bar.advance(task, done)
        self.seconds[name] = time.perf_counter() - start
        self.console.print(f"{name:<14} {self.seconds[name]:6.2f} s", markup=False)

    def show(self, text: str) -> None:
        self.console.print(text, markup=False)
