"""Bars of what is at work, with the time left; drawn in a terminal only."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.progress import TaskID


class OnBar(Protocol):
    """Called as work goes on."""

    def __call__(self, name: str, done: int, total: int | None, *, label: str | None = None) -> None:
        """Show `done` of `total` in the bar `name`, a new one at its first call; `label` stands before it."""
        ...


@contextmanager
def progress_bars(*, quiet: bool) -> Iterator[OnBar | None]:
    """Yield an `OnBar`, or None where nothing is to be drawn: if `quiet`, or if standard error is no terminal."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield None
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:>25}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def show(name: str, done: int, total: int | None, *, label: str | None = None) -> None:
            text = escape(label or name)
            if name not in tasks:
                tasks[name] = bars.add_task(text, total=total)
            bars.update(tasks[name], completed=done, total=total, description=text)

        yield show
