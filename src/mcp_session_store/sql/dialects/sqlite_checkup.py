"""What can be looked at in a SQLite file without making, changing or locking anything."""

from __future__ import annotations

import os
import sqlite3
import stat
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import quote, unquote

import sqlalchemy as sa
from typing_extensions import override

from mcp_session_store.sql.dialects.checkup import Checkup, Finding, Verdict, driver_found
from mcp_session_store.sql.dialects.sqlite_failures import unusable_file

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sqlalchemy.engine import URL

    from mcp_session_store.sql.dialects.checkup import Connect, Look

__all__ = ["SqliteCheckup"]

_LOG: Final = "-wal"
_INDEX_OF_LOG: Final = "-shm"


class SqliteCheckup(Checkup):
    def __init__(self, url: URL) -> None:
        super().__init__(url)
        self._path = _path_of(url)

    @override
    def read_only_url(self) -> URL:
        query = {"uri": "true", "mode": "ro"}
        if not self._is_open():
            # SQLite would make the files of the log, and leave them behind.
            query["immutable"] = "1"
        return self.url.set(database=f"file:{quote(str(self._path))}", query=query)

    @override
    def options(self) -> Mapping[str, str]:
        return {f"{name}={value}": "for the driver" for name, value in self.url.query.items()}

    @override
    def before_connecting(self) -> Sequence[Finding]:
        return [driver_found("aiosqlite", SQLite=sqlite3.sqlite_version), self._file()]

    @override
    def looks(self, connect: Connect) -> Mapping[str, Look]:
        return {"journal": partial(self._journal, connect)}

    @override
    def look_at_grants(self, connect: Connect, tables: Sequence[sa.Table], *, version_table: str) -> None:
        return None

    def _beside(self, ending: str) -> Path:
        return self._path.with_name(self._path.name + ending)

    def _is_open(self) -> bool:
        """Return whether there is a log, which is removed when the last process closes the database."""
        # Not by `Path`, which raises for a folder that may not be entered.
        return os.path.exists(self._beside(_LOG)) and os.path.exists(self._beside(_INDEX_OF_LOG))

    def _file(self) -> Finding:
        # Never opened here: to close any descriptor of the file drops the locks that SQLite has of this process.
        path, folder = self._path, self._path.parent
        if (reason := unusable_file(self.url, writes=False)) is not None:
            found, _, remedy = reason.partition("; ")
            return Finding(check="file", verdict=Verdict.FAIL, found=found, remedy=remedy, values={"path": str(path)})
        writable = os.access(folder, os.W_OK | os.X_OK) and (not path.exists() or os.access(path, os.W_OK))
        values: dict[str, object] = {"path": str(path), "exists": path.exists(), "writable": writable}
        parts, remedies = [str(path)], []
        verdict = Verdict.OK
        if path.exists():
            mode = stat.S_IMODE(path.stat().st_mode)
            log = self._beside(_LOG)
            sizes = {"bytes": path.stat().st_size, "log_bytes": log.stat().st_size if log.exists() else 0}
            values |= {"mode": f"{mode:04o}", **sizes}
            parts += [f"mode {mode:04o}", f"{sizes['bytes']} bytes"]
            if log.exists():
                parts.append(f"write-ahead log {sizes['log_bytes']} bytes")
            if os.name == "posix" and mode & (stat.S_IRWXG | stat.S_IRWXO):
                verdict = Verdict.WARN
                parts.append("other users may read it")
                remedies.append(f"chmod 600 {path}*, unless they are meant to")
        else:
            parts.append("does not exist")
        if not writable:
            verdict = Verdict.FAIL
            parts.append("not writable")
            remedies.append(f"let this user write to the file and to its folder {folder}")
        return Finding(
            check="file", verdict=verdict, found=", ".join(parts), remedy="; ".join(remedies) or None, values=values
        )

    async def _journal(self, connect: Connect) -> Finding:
        if not self._is_open():
            return Finding(check="journal", found="no process has the file open", values={"mode": None})
        async with connect() as connection:
            mode = (await connection.execute(sa.text("PRAGMA journal_mode"))).scalar_one()
        if mode == "wal":
            return Finding(check="journal", found="write-ahead log", values={"mode": mode})
        return Finding(
            check="journal",
            verdict=Verdict.WARN,
            found=f"journal mode {mode}: readers and the writer wait for each other",
            remedy="a server turns the write-ahead log on; where it cannot, put the file on a local file system",
            values={"mode": mode},
        )


def _path_of(url: URL) -> Path:
    """Return the absolute path of the file that a URL names, as a path or as a URI of SQLite's."""
    database = url.database or ""
    if url.query.get("uri") == "true" and database.startswith("file:"):
        database = unquote(database.removeprefix("file:").removeprefix("//"))
    return Path(database).absolute()
