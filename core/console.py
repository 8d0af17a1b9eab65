"""What people see in the terminal; everything goes to stderr so that stdout stays for results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


@cache
def get_console() -> Console:
    """The process's one console, on stderr (rich is imported on first use: `--help` must be quick)."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def say(message: str) -> None:
    """Print one line."""
    get_console().print(message, markup=False, soft_wrap=True)


def warn(message: str) -> None:
    """Print one line marked as a warning."""
    get_console().print(f"warning: {message}", style="yellow", markup=False, soft_wrap=True)


def error(message: str) -> None:
    """Print one line marked as an error."""
    get_console().print(f"error: {message}", style="bold red", markup=False, soft_wrap=True)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """A rich table; the first column is left-aligned, the others right-aligned."""
    from rich.table import Table
    from rich.text import Text

    made = Table(title=title, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        made.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        made.add_row(*(Text(str(cell)) for cell in row))
    return made


def show_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table."""
    get_console().print(table(title, columns, rows))
