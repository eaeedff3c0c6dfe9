"""The contract of a check-up: what can be looked at in a kind of database without changing anything."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypeAlias

from mcp_session_store.installed import installed_version

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    import sqlalchemy as sa
    from sqlalchemy.engine import URL
    from sqlalchemy.ext.asyncio import AsyncConnection

__all__ = ["Checkup", "Connect", "Finding", "Look", "Verdict", "driver_found"]


class Verdict(StrEnum):
    """Verdict on what was found."""

    OK = "ok"
    WARN = "warn"
    """It works, and may not be what was meant."""
    FAIL = "fail"
    """Sessions cannot be served so."""
    SKIPPED = "skipped"
    """It was not looked at, or could not be."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What was found by one look. No text of it holds a secret."""

    check: str
    """Name of what was looked at."""
    verdict: Verdict = Verdict.OK
    found: str
    """What is there, in one line."""
    remedy: str | None = None
    """What to do about it; `None` where there is nothing to do."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """The same for programs, by names that stay."""


Connect: TypeAlias = "Callable[[], AbstractAsyncContextManager[AsyncConnection]]"
"""Function that opens a connection in autocommit."""
Look: TypeAlias = "Callable[[], Awaitable[Finding]]"


class Checkup(ABC):
    """What can be looked at in one kind of database.

    Args:
        url: Checked URL of the database.
    """

    def __init__(self, url: URL) -> None:
        self.url = url

    @abstractmethod
    def read_only_url(self) -> URL:
        """Return the URL by which the database can be read; where it is a file, that is neither made nor changed."""

    @abstractmethod
    def options(self) -> Mapping[str, str]:
        """Return the options of the URL, and what becomes of each."""

    @abstractmethod
    def before_connecting(self) -> Sequence[Finding]:
        """Return what can be seen without a connection: the driver, the file."""

    @abstractmethod
    def looks(self, connect: Connect) -> Mapping[str, Look]:
        """Return the looks at the database as a whole, by the names of what they look at, in their order."""

    @abstractmethod
    def look_at_grants(self, connect: Connect, tables: Sequence[sa.Table], *, version_table: str) -> Look | None:
        """Return the look at the privileges on tables; `None` where a database knows none.

        Args:
            connect: Opens a connection.
            tables: Tables that a server reads and changes.
            version_table: Name of the table beside them that a server only reads.
        """


def driver_found(driver: str, **versions: str | None) -> Finding:
    """Return what was found of a driver: its version, SQLAlchemy's, and those that are given."""
    versions |= {name: installed_version(name) for name in (driver, "sqlalchemy")}
    found = ", ".join(f"{name} {version or '(version unknown)'}" for name, version in versions.items())
    return Finding(check="driver", found=found, values=versions)
