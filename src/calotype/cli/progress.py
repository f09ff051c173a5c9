"""Progress on stderr, for a person who waits: nothing at all when stderr is not a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Show(Protocol):
    """show(stage): what happens now. show(stage, done, total): and how far it is."""

    def __call__(self, stage: str, done: int = 0, total: int | None = None) -> None: ...


def _silent(stage: str, done: int = 0, total: int | None = None) -> None:
    pass


@contextmanager
def progress(*, quiet: bool) -> Iterator[Show]:
    """Yields the function that shows a stage; what it drew is wiped when the block ends, however it ends."""
    if quiet or not sys.stderr.isatty():
        yield _silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(24), TimeElapsedColumn())
    # Four redraws a second: the processor is for the picture.
    with Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=4) as bar:
        task = bar.add_task("", total=None)

        def show(stage: str, done: int = 0, total: int | None = None) -> None:
            bar.update(task, description=stage, completed=done, total=total)

        yield show
