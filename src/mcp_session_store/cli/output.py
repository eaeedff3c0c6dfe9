"""Output of the commands: tables that fit the terminal, plain text in a pipe, JSON for programs."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import sys
import unicodedata
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

import click

from mcp_session_store.records import display_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from mcp_session_store.sql.admin.sessions import StoredSession

__all__ = [
    "Column",
    "ago",
    "bar",
    "number",
    "plural",
    "print_json",
    "print_table",
    "print_text",
    "progress",
    "session_as_json",
    "size",
    "span",
]

_GAP: Final = 2
_LONGEST_CELL: Final = 500
_WIDEST_TEXT: Final = 40
_LONGEST_BAR: Final = 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """Column of a table."""

    title: str
    width: int
    """Places on a line that the column takes at least, so that the columns of all pages stand below each other."""
    flexible: bool = False
    """Whether a terminal may cut the cells, to as much room as there is; a wide one gives the column more."""
    rank: int = 0
    """Order in which columns are left out on a narrow terminal, the highest first."""
    right: bool = False


def print_text(text: str, *, length: int) -> None:
    """Print a line that may hold a text of a client's, without control characters.

    Args:
        text: The line.
        length: Number of characters to keep.
    """
    _take_all_characters()
    click.echo(display_text(text, length=length))


def print_table(columns: Sequence[Column], rows: Sequence[Sequence[str]], *, header: bool = True) -> None:
    """Print rows with a cell for each column, without control characters.

    A pipe gets all of each cell. A terminal gets the columns that it has room for, and flexible ones cut.
    """
    _take_all_characters()
    cells = [[display_text(text, length=_LONGEST_CELL) for text in row] for row in rows]
    # What each takes at least, which on a terminal is all that a flexible one is sure of.
    widths = [max(column.width, len(column.title)) for column in columns]
    room = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for position, column in enumerate(columns):
        if room is None or not column.flexible:
            widths[position] = max([widths[position], *(_places(row[position]) for row in cells)])
    shown = list(range(len(columns)))
    if room is not None:
        while len(shown) > 1 and room < _length(widths, shown):
            shown.remove(max(shown, key=lambda position: columns[position].rank))
        flexible = [position for position in shown if columns[position].flexible]
        share = max(0, room - _length(widths, shown)) // max(1, len(flexible))
        for position in flexible:
            widths[position] = min(widths[position] + share, max(widths[position], _WIDEST_TEXT))
    if header:
        titles = [column.title for column in columns]
        click.secho(_line(columns, widths, shown, titles), bold=True)
    for row in cells:
        click.echo(_line(columns, widths, shown, row))


def _length(widths: Sequence[int], shown: Sequence[int]) -> int:
    return sum(widths[position] for position in shown) + _GAP * (len(shown) - 1)


def _line(columns: Sequence[Column], widths: Sequence[int], shown: Sequence[int], cells: Sequence[str]) -> str:
    aligned = []
    for position in shown:
        text = _cut(cells[position], widths[position])
        padding = " " * (widths[position] - _places(text))
        aligned.append(padding + text if columns[position].right else text + padding)
    return (" " * _GAP).join(aligned).rstrip()


def _cut(text: str, width: int) -> str:
    if _places(text) <= width:
        return text
    places = itertools.accumulate(map(_places, text))
    return text[: sum(place < width for place in places)] + "…"


def _places(text: str) -> int:
    """Return the number of places that a text takes on a line of a terminal.

    Wide characters (Unicode Standard Annex #11) take two, and marks that combine with the one before take none.
    """
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.category(c) in ("Mn", "Me") else 2 if unicodedata.east_asian_width(c) in ("W", "F") else 1
        for c in text
    )


def _take_all_characters() -> None:
    """Let no text of a client's fail because the encoding of the standard output lacks a character of it."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def bar(part: int, whole: int) -> str:
    """Return a line as long as a number is large beside the largest one."""
    return "#" * -(-_LONGEST_BAR * part // max(1, whole))


@contextlib.contextmanager
def progress(description: str, *, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show a bar while work goes on, if messages go to a terminal and there is work. Yields what moves the bar on.

    Args:
        description: The work.
        total: How far it will go; `None`: unknown.
    """
    if total == 0 or not sys.stderr.isatty():
        yield lambda _: None
        return
    endless = itertools.count() if total is None else None
    with click.progressbar(
        endless, length=total, label=description, width=_LONGEST_BAR, show_pos=True, file=sys.stderr
    ) as shown:
        yield shown.update


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
