"""Output of the commands: tables that fit the terminal, plain text in a pipe, JSON for programs."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from mcp_session_store.records import display_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rich.console import RenderableType

    from mcp_session_store.sql.admin.sessions import StoredSession

__all__ = [
    "Column",
    "ago",
    "cell",
    "number",
    "plural",
    "print_json",
    "print_table",
    "progress",
    "session_as_json",
    "size",
    "span",
    "stdout",
]

_GAP: Final = 2
_WIDE: Final = 100_000
_WIDEST_TEXT: Final = 40


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """Column of a table."""

    title: str
    width: int
    """Characters that the column needs."""
    flexible: bool = False
    """Whether the column takes more room on a wide terminal; its cells are cut to the room that it has."""
    rank: int = 0
    """Order in which columns are left out on a narrow terminal, the highest first."""
    right: bool = False


def stdout() -> Console:
    """Return the console of the standard output: as wide as the terminal, or else as wide as it takes."""
    if hasattr(sys.stdout, "reconfigure"):
        # A client's name must not fail because the terminal's encoding lacks a character of it.
        sys.stdout.reconfigure(errors="backslashreplace")
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, emoji=False, width=_WIDE)
    return console


def cell(text: str, *, length: int = 500) -> Text:
    """Return the cell for a text that a client may have chosen: without control characters, and markup as text."""
    return Text(display_text(text, length=length))


def print_table(
    console: Console, columns: Sequence[Column], rows: Sequence[Sequence[RenderableType]], *, header: bool = True
) -> None:
    """Print rows with a cell for each column; on a terminal, only the columns that there is room for."""
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), show_header=header, header_style="bold")
    shown = list(columns)
    share = 0
    if console.is_terminal:
        while len(shown) > 1 and _room(console, shown) < 0:
            shown.remove(max(shown, key=lambda column: column.rank))
        share = max(0, _room(console, shown)) // max(1, sum(column.flexible for column in shown))
    for column in shown:
        wide = min(column.width + share, max(column.width, _WIDEST_TEXT)) if column.flexible else column.width
        table.add_column(
            column.title,
            justify="right" if column.right else "left",
            # Fixed, so that the columns of all pages stand below each other.
            min_width=wide if console.width >= column.width else None,
            max_width=wide if console.is_terminal else None,
            no_wrap=True,
            overflow="ellipsis" if column.flexible else "fold",
        )
    positions = [columns.index(column) for column in shown]
    for row in rows:
        table.add_row(*(row[position] for position in positions))
    if console.is_terminal:
        console.print(table)
        return
    with console.capture() as capture:
        console.print(table)
    click.echo("\n".join(line.rstrip() for line in capture.get().removesuffix("\n").split("\n")))


def _room(console: Console, columns: Sequence[Column]) -> int:
    return console.width - sum(column.width for column in columns) - _GAP * (len(columns) - 1)


@contextlib.contextmanager
def progress(description: str, *, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show a bar while work goes on, if messages go to a terminal. Yields a function that moves the bar on.

    Args:
        description: The work.
        total: How far it will go; `None`: unknown.
    """
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(description, total=total)
        yield lambda count: bar.advance(task, count)


def print_json(value: Any, *, indent: int | None = 2) -> None:
    """Print a JSON document, in ASCII alone, so that no text of a client reaches the terminal's controls."""
    click.echo(json.dumps(value, default=_plain, indent=indent))


def _plain(value: object) -> object:
    match value:
        case datetime():
            return value.isoformat()
        case timedelta():
            return value.total_seconds()
        case UUID():
            return str(value)
        case bytes():
            return value.hex()
    raise TypeError(f"{type(value).__name__} has no JSON")


def session_as_json(session: StoredSession) -> dict[str, Any]:
    """Return a session by the names of its fields."""
    return asdict(session)


_UNITS: Final[Sequence[tuple[float, str]]] = ((2 * 86_400, "d"), (3600, "h"), (60, "min"), (0, "s"))
_SECONDS: Final = {"d": 86_400, "h": 3600, "min": 60, "s": 1}


def span(length: timedelta) -> str:
    """Return a length of time in its largest unit: 3 min."""
    seconds = abs(length.total_seconds())
    unit = next(unit for least, unit in _UNITS if seconds >= least)
    return f"{int(seconds // _SECONDS[unit])} {unit}"


def ago(moment: datetime | None, now: datetime) -> str:
    """Return a moment as seen from another: 3 min ago, in 5 h; `never` for `None`."""
    if moment is None:
        return "never"
    return f"in {span(moment - now)}" if moment > now else f"{span(now - moment)} ago"


def number(count: int) -> str:
    """Return a number with its thousands apart."""
    return f"{count:,}".replace(",", " ")


def plural(word: str, count: int) -> str:
    """Return a word as it stands after a number."""
    return word if count == 1 else f"{word}s"


def size(count: float) -> str:
    """Return a number of bytes in its largest unit: 3.2 MB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
