"""How far a command is: bars in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import typer
from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.progress import TaskID

LINES_PER_PHASE = 10


class OnBar(Protocol):
    """Called as work goes on."""

    def __call__(self, name: str, done: int, total: int | None, *, label: str | None = None) -> None:
        """Show that `done` of `total` are done in the phase `name`; `label` is shown in place of the name."""
        ...


@contextmanager
def progress_bars(*, quiet: bool) -> Iterator[OnBar | None]:
    """Yield an `OnBar`, or None if `quiet`.

    Where standard error is a terminal, every phase has a bar with the time left. Elsewhere (a file, a log) a phase
    writes a line when it begins, at every tenth of it, and when it ends.
    """
    console = Console(stderr=True)
    if quiet:
        yield None
        return
    if not console.is_terminal:
        yield _Lines()
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    text = TextColumn("{task.description:>25}")
    columns = (text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def show(name: str, done: int, total: int | None, *, label: str | None = None) -> None:
            text = escape(label or name)
            if name not in tasks:
                tasks[name] = bars.add_task(text, total=total)
            bars.update(tasks[name], completed=done, total=total, description=text)

        yield show


class _Lines:
    """Writes ``label: 50% (2 of 4), 12 s`` to standard error."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._tenths: dict[str, int] = {}

    def __call__(self, name: str, done: int, total: int | None, *, label: str | None = None) -> None:
        tenth = LINES_PER_PHASE * done // total if total else 0
        if tenth <= self._tenths.get(name, -1):
            return
        self._tenths[name] = tenth
        share = f"{100 * done // total}% ({done} of {total})" if total else f"{done}"
        typer.echo(f"{label or name}: {share}, {time.monotonic() - self._started:.0f} s", err=True)
