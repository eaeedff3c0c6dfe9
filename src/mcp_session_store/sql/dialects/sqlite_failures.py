"""What errors of SQLite mean, and what is to be done about those that stay."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote

from mcp_session_store.sql.dialects.dialect import FailureKind

if TYPE_CHECKING:
    from sqlalchemy.engine import URL

__all__ = ["code_of", "file_of", "is_busy", "is_uri", "kind_of_failure", "misconfiguration", "unusable_file"]

# "Result and Error Codes" of SQLite, without their extended bits.
_KINDS: Final = {
    18: FailureKind.INVALID_VALUE,  # SQLITE_TOOBIG
    19: FailureKind.INVALID_VALUE,  # SQLITE_CONSTRAINT
    20: FailureKind.INVALID_VALUE,  # SQLITE_MISMATCH
}
_BUSY: Final = frozenset({5, 6})  # SQLITE_BUSY, SQLITE_LOCKED
_IOERR: Final = 10
_CANTOPEN: Final = 14
_DENIED: Final = frozenset({3, 8, 23})  # SQLITE_PERM, SQLITE_READONLY, SQLITE_AUTH
_MOVED: Final = 8 | 4 << 8
"""SQLITE_READONLY_DBMOVED: the file was removed or replaced while it was open."""
_CLOSED: Final = frozenset({"Connection closed", "no active connection"})  # as aiosqlite says it
_DAMAGE: Final = {
    11: "the file is damaged; put a backup in its place, or rescue what can be read by the command .recover of sqlite3",
    26: "the file is no SQLite database; name another one, or move it away",
}


def code_of(error: BaseException | None) -> int | None:
    """Return SQLite's result code of an error, with its extended bits; `None` for an error that is not SQLite's."""
    code = getattr(error, "sqlite_errorcode", None)
    return code if isinstance(code, int) else None


def is_busy(error: BaseException | None) -> bool:
    """Return whether another connection has a lock on the file."""
    code = code_of(error)
    return code is not None and code & 0xFF in _BUSY


def kind_of_failure(error: BaseException) -> FailureKind | None:
    """Classify an error of the driver; `None` for any other."""
    if (code := code_of(error)) is None:
        return FailureKind.BROKEN if _is_closed(error) else None
    if kind := _KINDS.get(code & 0xFF):
        return kind
    # SQLITE_ERROR stands for everything that is wrong with a statement; only its text distinguishes the cases.
    missing = ("no such table", "no such column", "has no column")
    return FailureKind.WRONG_SCHEMA if any(text in str(error) for text in missing) else FailureKind.UNAVAILABLE


def misconfiguration(error: BaseException, url: URL) -> str | None:
    """Say what is wrong with the file, and what to do; `None` for an error that may pass."""
    code = code_of(error)
    if code is None or code == _MOVED:
        return None
    code &= 0xFF
    if code in (_CANTOPEN, _IOERR):
        # The first also when the process has too many files open, the second when the disk is full.
        return unusable_file(url)
    if code in _DENIED:
        return unusable_file(url) or f"the file cannot be written ({error}); give this process the right to write it"
    return _DAMAGE.get(code)


def is_uri(url: URL) -> bool:
    """Return whether the name of a database is a URI for SQLite, and not the name of a file that looks like one."""
    asked = str(url.query.get("uri", "")).strip().lower()
    return (url.database or "").startswith("file:") and asked in ("true", "yes", "on", "y", "t", "1")


def file_of(url: URL) -> Path | None:
    """Return the absolute path of a database's file; `None` for a database without one."""
    name = url.database or ""
    if is_uri(url):
        name = unquote(name.removeprefix("file:").partition("?")[0].partition("#")[0])
        if name.startswith("//"):
            name = f"/{name[2:].partition('/')[2]}"
    return Path(os.path.abspath(name)) if name and name != ":memory:" else None


def unusable_file(url: URL, *, writes: bool = True) -> str | None:
    """Say why this process cannot use the file, and what to do; `None` where that cannot be seen from outside.

    Args:
        url: URL of the database.
        writes: Whether it changes the file, or may make it.
    """
    if (named := file_of(url)) is None:
        return None
    # A link may point to what is not there.
    file = Path(os.path.realpath(named))
    folder = file.parent
    try:
        os.lstat(file)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except PermissionError:
        closed = next((parent for parent in reversed(file.parents) if not _is_allowed(parent, os.X_OK)), folder)
        return f"this process ({_user()}) may not enter the folder {str(closed)!r}; allow it, or name a file elsewhere"
    except OSError as error:
        return f"no file can have the path {str(file)!r} ({error.strerror}); correct it in the URL"
    if file.is_symlink():
        return f"{str(named)!r} is a link that leads nowhere; correct the path in the URL"
    if not folder.exists():
        return f"there is no folder {str(folder)!r}; make it, or correct the path in the URL"
    if not folder.is_dir():
        return f"{str(folder)!r} is no folder; correct the path in the URL"
    if url.query.get("mode") == "rw" and not file.exists():
        return f"there is no file {str(file)!r}, and with mode=rw none is made; correct the path, or remove mode=rw"
    if file.is_dir():
        return f"{str(file)!r} is a folder; name a file in it"
    if file.exists() and not file.is_file():
        return f"{str(file)!r} is a device, a pipe or a socket, which can hold no database; name a file"
    if writes and _is_read_only(folder):
        return f"the file system of {str(folder)!r} is read-only; name a file on one that can be written, as a volume"
    if file.exists() and not _is_allowed(file, os.R_OK | os.W_OK if writes else os.R_OK):
        return f"this process ({_user()}) may not read{' and write' if writes else ''} the file {str(file)!r}; allow it"
    if writes and not _is_allowed(folder, os.W_OK | os.X_OK):
        return (
            f"this process ({_user()}) may not write in the folder {str(folder)!r}, where SQLite keeps files beside "
            "the database; allow it, or name a file in another folder"
        )
    return None


def _is_read_only(folder: Path) -> bool:
    # Windows has no such call.
    return hasattr(os, "statvfs") and bool(os.statvfs(folder).f_flag & os.ST_RDONLY)


def _is_allowed(path: Path, mode: int) -> bool:
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


def _user() -> str:
    return f"user {os.geteuid()}" if hasattr(os, "geteuid") else "its user"


def _is_closed(error: BaseException) -> bool:
    import sqlite3  # imported here, because Python may be built without it

    # Without a code, `sqlite3` itself refuses to use the connection. aiosqlite refuses by a ValueError.
    return isinstance(error, sqlite3.ProgrammingError) or (isinstance(error, ValueError) and str(error) in _CLOSED)
