"""Locked files beside a SQLite database: one for each running instance, released by the death of its process.

The files of the database itself are left alone, because closing any descriptor of theirs drops SQLite's locks. These
locks are record locks (`lockf`): unlike those of `flock` no child keeps them after its parent has died. But a process
loses them when it closes any descriptor of the file, so it never opens the files of its own instances again.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import socket
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from typing_extensions import override

from mcp_session_store.sql.dialects.dialect import Dialect, LocksSeen
from mcp_session_store.sql.dialects.private_names import call_in_thread
from mcp_session_store.sql.dialects.sqlite_failures import file_of
from mcp_session_store.sql.dialects.watched_file import WatchedFile, check_file_behind

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Collection, Iterator
    from contextlib import AbstractContextManager

    from sqlalchemy.engine import URL
    from sqlalchemy.ext.asyncio import AsyncConnection

    from mcp_session_store.sql.dialects.watched_file import OpenFile

__all__ = ["STALE_AFTER", "FileLocks", "lock_folder"]

logger = logging.getLogger(__name__)

STALE_AFTER: Final = 86_400.0
"""Seconds after the last heartbeat of its instance after which a file that nothing locks is removed."""
ATTEMPTS: Final = 10
"""Number of times that a file is made, while others that stop remove it or its folder."""

_FOLDER: Final = "-instances"
"""What the name of the folder adds to that of the database's file."""
_CAN_LOCK: Final = hasattr(os, "lockf")
_OPEN: Final = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)

_here: Final[dict[Path, int]] = {}
"""Files that a process has locked, with its process id: a child has a copy of this table, and none of the locks."""


def lock_folder(database: str) -> Path:
    """Return the folder of the locked files, by the path of a database's file."""
    return Path(os.path.realpath(database) + _FOLDER)


class FileLocks(Dialect):
    """A dialect whose database is a file, which is watched, and beside which instances lock files of their own."""

    @override
    def file(self, url: URL) -> WatchedFile | None:
        file = file_of(url)
        # Another file system than that of the operating system has files of its own.
        return None if file is None or "vfs" in url.query else WatchedFile(file)

    @override
    def check_file(self, connection: AsyncConnection) -> None:
        pooled: Any = connection.sync_connection
        check_file_behind(pooled.info)

    @override
    async def leave_file(self, connection: AsyncConnection, file: OpenFile) -> None:
        await call_in_thread(_driver_of(connection), lambda driver, left: left.leave(driver), file)

    @override
    async def lock_of_process(self, connection: AsyncConnection, name: str) -> AbstractContextManager[bool]:
        return _locked_file(await call_in_thread(_driver_of(connection), _path_of, None), name)

    @override
    async def locks_seen(self, connection: AsyncConnection, names: Collection[str]) -> LocksSeen:
        # In the connection's thread, because files are opened.
        return await call_in_thread(_driver_of(connection), _locks_seen, names)


def _driver_of(connection: AsyncConnection) -> Any:
    pooled: Any = connection.sync_connection
    return pooled.connection.driver_connection


def _path_of(connection: sqlite3.Connection, _: None = None) -> str:
    return next(str(path) for _, name, path in connection.execute("PRAGMA database_list") if name == "main")


@contextlib.contextmanager
def _locked_file(database: str, name: str) -> Iterator[bool]:
    """Keep the file of an instance locked while the context lasts.

    Args:
        database: Path of the database's file.
        name: Unique part of the instance's id.

    Returns:
        Whether it is locked. On Windows, and where this process may not write, it is not.
    """
    path = lock_folder(database) / name
    if not _CAN_LOCK or not _is_file_name(name) or path in _here:
        yield False
        return
    # First of all, because a look of another thread of this process would release the lock.
    _here[path] = os.getpid()
    descriptor: int | None = None
    try:
        try:
            descriptor = _take(path)
            _remove_stale(path.parent)
        except OSError as error:
            logger.info("%s cannot be locked, and a death of this process is noticed later: %s", path, error)
        yield descriptor is not None
    finally:
        if descriptor is not None:
            # While it is locked, so that no other file of that name is removed.
            _remove(path)
            os.close(descriptor)
            with contextlib.suppress(OSError):
                path.parent.rmdir()  # if it was the last one
        del _here[path]


def _locks_seen(connection: sqlite3.Connection, names: Collection[str]) -> LocksSeen:
    """Return which instances have locked their files, as this process sees it.

    Of a file that is not there, or may not be read, nothing is said: its instance may see another folder.
    """
    folder, locked = lock_folder(_path_of(connection)), {}
    for name in names:
        if _CAN_LOCK and _is_file_name(name) and (is_locked := _is_locked(folder / name)) is not None:
            locked[name] = is_locked
    return LocksSeen(_epoch(), locked)


@functools.cache
def _epoch() -> str:
    """Return a name of the running kernel: locks end with it, and are seen by its processes only."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()


def _is_file_name(name: str) -> bool:
    return name.isascii() and name.isalnum()


def _is_locked(path: Path) -> bool | None:
    try:
        if _here.get(path) == os.getpid():
            os.utime(path)  # as old as the last heartbeat
            return True
        descriptor = os.open(path, os.O_RDONLY | _OPEN)
    except OSError:
        return None
    try:
        os.lockf(descriptor, os.F_TEST, 0)
    except (BlockingIOError, PermissionError):
        return True
    except OSError:
        return None  # a file system without locks
    finally:
        os.close(descriptor)
    return False


def _take(path: Path) -> int:
    """Make a file and lock it; return its descriptor, which holds the lock.

    The file has the permissions of the database's, as those have that SQLite makes beside it, and so has the folder.
    """
    permissions = stat.S_IMODE(os.stat(str(path.parent).removesuffix(_FOLDER)).st_mode) & 0o666
    for attempt in range(ATTEMPTS):
        try:
            with contextlib.suppress(FileExistsError):
                path.parent.mkdir(0o700)
                path.parent.chmod(permissions | (permissions & 0o444) >> 2)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | _OPEN, 0o600)
            os.fchmod(descriptor, permissions)
        except FileNotFoundError:
            if attempt == ATTEMPTS - 1:
                raise
            continue
        try:
            os.lockf(descriptor, os.F_TLOCK, 0)
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except FileNotFoundError:
            pass  # removed as stale before it was locked
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    raise FileNotFoundError(f"{path} is removed again and again")


def _remove_stale(folder: Path) -> None:
    """Remove the files of instances that died long ago."""
    for path in folder.iterdir():
        if _here.get(path) != os.getpid() and _is_file_name(path.name):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime < STALE_AFTER:
                    continue
                descriptor = os.open(path, os.O_RDWR | _OPEN)
                try:
                    os.lockf(descriptor, os.F_TLOCK, 0)
                    _remove(path)
                finally:
                    os.close(descriptor)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
