"""A SQLite database whose sessions are away for a while: each request that needs them is refused at once."""

from __future__ import annotations

import sqlite3
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

from sqlalchemy.engine import make_url

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def sessions_away(sqlite_url: str) -> Iterator[None]:
    """Give the table of sessions another name meanwhile."""
    _run(sqlite_url, "ALTER TABLE mcp_session RENAME TO away")
    try:
        yield
    finally:
        _run(sqlite_url, "ALTER TABLE away RENAME TO mcp_session")


def _run(sqlite_url: str, statement: str) -> None:
    with closing(sqlite3.connect(str(make_url(sqlite_url).database), timeout=30)) as connection:
        connection.execute(statement)
