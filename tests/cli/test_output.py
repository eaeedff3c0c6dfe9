"""Tables: aligned in a pipe and on a terminal, whatever the cells hold."""

from __future__ import annotations

import os
import shutil
import sys
from typing import TYPE_CHECKING, Protocol

import pytest

from mcp_session_store.cli.output import Column, print_table, print_text

if TYPE_CHECKING:
    from collections.abc import Sequence

COLUMNS = (
    Column(title="KEY", width=6),
    Column(title="NAME", width=8, flexible=True, rank=1),
    Column(title="COUNT", width=7, right=True, rank=2),
)


class TableFunction(Protocol):
    """Type of the fixture `table`."""

    def __call__(self, rows: Sequence[Sequence[str]], *, terminal: int | None = None) -> list[str]: ...


@pytest.fixture
def table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> TableFunction:
    """Prints a table in a pipe, or on a terminal of some width, and returns its lines."""

    def print_and_read(rows: Sequence[Sequence[str]], *, terminal: int | None = None) -> list[str]:
        with monkeypatch.context() as patch:
            patch.setattr(sys.stdout, "isatty", lambda: terminal is not None)
            patch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((terminal or 0, 24)))
            print_table(COLUMNS, rows)
        return capsys.readouterr().out.replace("\x1b[1m", "").replace("\x1b[0m", "").splitlines()

    return print_and_read


def test_a_pipe_gets_all_of_each_cell_numbers_on_the_right_and_no_blanks_at_the_end(table: TableFunction) -> None:
    assert table([["a", "a long name of a client", "1"], ["key-that-is-long", "b", "12 345 678"], ["c", "", ""]]) == [
        "KEY               NAME                          COUNT",
        "a                 a long name of a client           1",
        "key-that-is-long  b                        12 345 678",
        "c",
    ]


def test_a_wide_character_takes_two_places_and_a_mark_that_combines_none(table: TableFunction) -> None:
    header, *lines = table(
        [["a", "日本語", "1"], ["b", "e\N{COMBINING ACUTE ACCENT}te\N{COMBINING ACUTE ACCENT}", "2"]]
    )
    assert header == f"{'KEY':6}  {'NAME':8}  {'COUNT':>7}"
    # Eight places for the name: six and two blanks, three and five.
    assert lines == [
        f"{'a':6}  日本語  {'1':>9}",
        f"{'b':6}  e\N{COMBINING ACUTE ACCENT}te\N{COMBINING ACUTE ACCENT}     {'2':>9}",
    ]
    assert table([["a", "日本語日本語", "1"]], terminal=25)[1] == f"{'a':6}  日本語… {'1':>9}"


@pytest.mark.parametrize(
    ("terminal", "line"),
    [
        (80, f"{'a':6}  {'a name that is long':40}  {'1':>7}"),
        (30, f"{'a':6}  {'a name that …':13}  {'1':>7}"),
        (25, f"{'a':6}  {'a name …':8}  {'1':>7}"),
        (24, f"{'a':6}  {'a name that is …':16}"),
        (10, "a"),
        (3, "a"),
    ],
)
def test_a_terminal_gets_the_columns_that_it_has_room_for(table: TableFunction, terminal: int, line: str) -> None:
    assert table([["a", "a name that is long", "1"]], terminal=terminal)[1] == line


def test_no_text_of_a_clients_controls_the_terminal(table: TableFunction, capsys: pytest.CaptureFixture[str]) -> None:
    (_, line) = table([["a", "\x1b[31mred\n\x9b2J", "1"]], terminal=80)
    assert "\x1b" not in line
    assert "\x9b" not in line
    assert "[31mred2J" in line
    print_text("a\x1b[31mb\u202ec", length=7)
    assert capsys.readouterr().out == "a[31mbc\n"
