"""What the commands print: tables, progress bars, errors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from rich.progress import Progress


def stdout() -> Console:
    """Where results go."""
    return Console()


def stderr() -> Console:
    """Where errors and progress go."""
    return Console(stderr=True)


def fail(message: str, code: int = 2) -> int:
    """Prints an error as one line and returns the exit code."""
    line = " ".join(message.split("\n"))
    stderr().print(f"error: {line}", style="red", markup=False, highlight=False, soft_wrap=True)
    return code


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Prints a title and a table; floats with four digits after the point."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    rows = [list(row) for row in rows]
    table = Table(box=SIMPLE_HEAD)
    for index, name in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[index], int | float) for row in rows)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    say(title)  # Not as the table's own, which would wrap it to the width of the columns.
    stdout().print(table)


def _cell(value: Any) -> str:
    from rich.markup import escape

    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if type(value) is int else escape(str(value))


def say(text: str) -> None:
    """Prints text as it is: a model's words may hold anything, markup and control codes too."""
    print(text)


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A progress bar with the time left; it vanishes when the work is done.

    Where errors do not go to a terminal there is none.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    console = stderr()
    shown = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with shown as progress:
        yield progress
