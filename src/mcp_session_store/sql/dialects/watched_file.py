"""The file of a SQLite database: made for its owner alone, and watched, because it may be deleted while it is open.

SQLite goes on reading and writing a file that has no name any more, and all that is stored there ends with the process.
Files are looked at by name and never opened here, because to close any descriptor of theirs drops SQLite's locks.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias
from urllib.parse import parse_qsl, urlencode

import sqlalchemy as sa

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, MutableMapping

__all__ = ["FileReplaced", "OpenFile", "WatchedFile", "check_file_behind", "file_behind", "make_file"]

logger = logging.getLogger(__name__)

_Identity: TypeAlias = tuple[int, int]

OWNER_ONLY: Final = 0o600
_KEY: Final = "mcp_session_store_file"
"""Key of the open file in what SQLAlchemy keeps about a connection."""


class FileReplaced(ConnectionError):
    """A connection's file, or one beside it, is no longer the one of that name; another connection may work."""


class FileLost(OSError):
    """There is no file to connect to, where there was one before."""


class OpenFile:
    """A file that connections of this process have open, with those that SQLite keeps beside it.

    Args:
        watched: What watches it.
        main: Identity of the file.
        beside: Paths of the files beside it that must not vanish while it is open.
    """

    def __init__(self, watched: WatchedFile, main: _Identity, beside: tuple[str, ...]) -> None:
        self._watched = watched
        # Texts, because each statement looks at the files, and a `Path` is made a text again for each look.
        self._name = str(watched.file)
        self.main = main
        self._beside: dict[str, _Identity | None] = dict.fromkeys(beside)
        self.connections = 0
        self.gone = False
        """Whether it, or one beside it, was found to be another one than that of its name."""
        self.saved = False
        """Whether all that was committed is in the file itself, so that those beside it hold nothing more."""

    def check(self) -> None:
        """Check that the files are those of their names.

        Raises:
            FileReplaced: One is not.
        """
        if self.gone or self._is_gone():
            if not self.gone:
                self.gone = True
                self._watched.note_loss()
            raise FileReplaced(self._watched.loss)

    def _is_gone(self) -> bool:
        if _identity(self._name) != self.main:
            return True
        for path, known in self._beside.items():
            if (found := _identity(path)) != known:
                if known is not None:
                    return True
                self._beside[path] = found  # SQLite makes it when it is first needed
        return False

    def forget_beside(self) -> None:
        """Expect other files beside it, because SQLite removes them with the last connection."""
        self._beside = dict.fromkeys(self._beside)

    def leave(self, connection: sqlite3.Connection) -> None:
        """Bring what was committed into the file itself, wherever that is now, and remove what stands beside its name.

        A write-ahead log that stays would be taken for that of the next file of the name. Where another process has
        done so, and has begun anew, nothing is left to do.
        """
        if not self.gone:
            return
        with self._watched.lock:
            if self.saved:
                return
            if not self._beside:
                self.saved = True
                return
            logs = [path for path in self._beside if path.endswith("-wal")]
            if any((found := _identity(path)) is not None and found != self._beside[path] for path in logs):
                self.saved = True
                return
            with contextlib.suppress(Exception):
                busy = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
                if busy:
                    return  # others read in it; another connection tries again
                for path, known in self._beside.items():
                    if known is not None and _identity(path) == known:
                        os.unlink(path)
                self.saved = True

    def leftover(self) -> str | None:
        """Return the write-ahead log that stands beside the name, and holds what is in no other file."""
        if not self.saved:
            for path, known in self._beside.items():
                if known is not None and path.endswith("-wal") and _identity(path) == known and _size(path):
                    return path
        return None


class WatchedFile:
    """The file of a database, by its name.

    Args:
        file: Absolute path.
    """

    def __init__(self, file: Path) -> None:
        self.file: Final = file
        self.on_replaced: Callable[[], None] = lambda: None
        """Called when another file, or the same one again, is opened under the name."""
        self.lock: Final = threading.Lock()
        """Lock around `OpenFile.leave`, which runs in the threads of connections."""
        self.was_lost = False
        """Whether it was deleted or replaced since it was first opened."""
        self.is_lost = False
        """Whether it is now: what is open is no longer the file of the name, and nothing else was opened."""
        self._open: OpenFile | None = None

    @property
    def loss(self) -> str:
        """What has happened, and what to do."""
        return (
            f"the file {str(self.file)!r}, or its -wal or -shm, was deleted or replaced while it was open; put it or a "
            "backup of it back, or make a new one by the command upgrade"
        )

    def note_loss(self) -> None:
        """Note that the file is lost. Calls fail with the reason, which whatever waits for the store logs."""
        self.was_lost = self.is_lost = True

    def forget(self) -> None:
        """Begin anew, because all connections are closed."""
        self._open = None
        self.was_lost = self.is_lost = False

    def attach(self, engine: sa.Engine, *, watches: bool) -> None:
        """Make the file when an engine of ours first connects, where its URL allows that.

        Args:
            engine: The engine.
            watches: Whether its connections are watched from then on, and make no file again.
        """

        @sa.event.listens_for(engine, "do_connect")
        def connecting(_dialect: Any, _record: Any, arguments: list[Any], options: dict[str, Any]) -> None:
            name, makes = without_making(arguments[0])
            if watches:
                self.before_connect(makes=makes)
            elif makes:
                make_file(self.file)
            arguments[0], options["uri"] = name, True

        if not watches:
            return

        @sa.event.listens_for(engine, "connect")
        def connected(connection: Any, record: Any) -> None:
            try:
                record.info[_KEY] = self.opened(watches_beside=True)
            except BaseException:
                # SQLAlchemy before 2.1 does not close a connection whose set-up failed.
                connection.close()
                raise

        @sa.event.listens_for(engine, "close")
        def closing(_connection: Any, record: Any) -> None:
            if (open_file := record.info.pop(_KEY, None)) is not None:
                open_file.connections -= 1

    def before_connect(self, *, makes: bool) -> None:
        """Make the file at first; later find it there.

        Args:
            makes: Whether it is made at first, if it is not there.

        Raises:
            FileLost: It is not there, or may not be opened.
        """
        found = _identity(self.file)
        if self._open is None:
            if found is None and makes:
                make_file(self.file)
            return
        # One without a byte is what a copy begins with, and SQLite would take it for a new database.
        if found is None or (found != self._open.main and not _size(self.file)):
            self.note_loss()
            raise FileLost(self.loss)
        if found != self._open.main and (log := self._open.leftover()) is not None:
            raise FileLost(
                f"the file {str(self.file)!r} was replaced while it was open, and {log!r} belongs to the one "
                "before; stop all processes, remove that one, and start them again"
            )
        if self._open.gone and not self._open.saved and self._open.connections:
            raise FileLost(self.loss)

    def opened(self, *, watches_beside: bool) -> OpenFile:
        """Note that a connection was opened, and return what it has open.

        Args:
            watches_beside: Whether the files beside it are watched, which are removed with the last connection.

        Raises:
            FileLost: The file is gone already.
        """
        found = _identity(self.file)
        if found is None:
            raise FileLost(self.loss)
        known = self._open
        if known is None or known.gone or known.main != found:
            if known is not None:
                self.note_loss()
                self.is_lost = False
                self.on_replaced()
                logger.warning(
                    "the file %r, or its -wal or -shm, was deleted or replaced while it was open; what stands there "
                    "now is used from now on",
                    str(self.file),
                )
            real = os.path.realpath(self.file)
            beside = (f"{real}-wal", f"{real}-shm") if watches_beside else ()
            self._open = known = OpenFile(self, found, beside)
        elif not known.connections:
            # SQLite removes those beside it with the last connection.
            known.forget_beside()
        known.connections += 1
        return known


def file_behind(info: MutableMapping[Any, Any], watched: WatchedFile) -> OpenFile:
    """Return what a connection has open, by what SQLAlchemy keeps about it.

    A connection of an engine that was given is watched from its first use on.
    """
    if (found := info.get(_KEY)) is None:
        found = info[_KEY] = watched.opened(watches_beside=False)
    assert isinstance(found, OpenFile)
    return found


def check_file_behind(info: MutableMapping[Any, Any]) -> None:
    """Check that a connection's file is still the one of its name, if it is watched.

    Raises:
        FileReplaced: It is not.
    """
    if (found := info.get(_KEY)) is not None:
        found.check()


def make_file(file: Path) -> None:
    """Make an empty file for its owner alone, unless it is there; SQLite gives those beside it the same permissions."""
    # An error is left to SQLite, which meets it, too, and whose errors are known. A link may stand there already, and
    # what it points to not yet.
    with contextlib.suppress(OSError):
        descriptor = os.open(
            os.path.realpath(file), os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), OWNER_ONLY
        )
        try:
            # A mask may take from the owner, too.
            if hasattr(os, "fchmod"):
                os.fchmod(descriptor, OWNER_ONLY)
        finally:
            os.close(descriptor)


def without_making(name: str) -> tuple[str, bool]:
    """Return a database's name as a URI with which SQLite makes no file, because it would make it for all to read.

    Returns:
        The URI, and whether SQLite would make the file by the name as it was.
    """
    if not name.startswith("file:"):
        return f"{Path(os.path.abspath(name)).as_uri()}?mode=rw", True
    path, _, query = name.partition("?")
    options = dict(parse_qsl(query))
    makes = options.get("mode", "rwc") == "rwc"
    if makes:
        options["mode"] = "rw"
    return f"{path}?{urlencode(options, safe='/')}", makes


def _identity(path: Path | str) -> _Identity | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _size(path: Path | str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0
