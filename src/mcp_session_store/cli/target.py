"""The database and the namespace that a command is about."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from mcp_session_store.cli.options import namespace_option, option, schema_option, url_option
from mcp_session_store.settings import DEFAULT_TIMEOUT, OPERATOR_TIMEOUT
from mcp_session_store.store import DEFAULT_NAMESPACE

if TYPE_CHECKING:
    from collections.abc import Callable

    from mcp_session_store.retention import EventPolicy, RetentionPolicy
    from mcp_session_store.sql import SqlEventLog, SqlMailbox, SqlSessionStore, SqlStateStore
    from mcp_session_store.sql.admin.events import EventDirectory
    from mcp_session_store.sql.admin.namespaces import NamespaceDirectory
    from mcp_session_store.sql.admin.partitions import EventPartitions
    from mcp_session_store.sql.admin.rows import RowCheck
    from mcp_session_store.sql.admin.sessions import SessionDirectory

__all__ = ["Target", "target_options", "tables_options", "timeout_option"]

timeout_option = option(
    "--timeout",
    metavar="SECONDS",
    default=OPERATOR_TIMEOUT,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="How long one query of the database may take.",
)


@dataclass(frozen=True, kw_only=True)
class Target:
    """Database and namespace that a command is about, and what a command opens there."""

    url: str = field(repr=False)
    schema: str | None
    namespace: str
    timeout: float

    def directory(self) -> SessionDirectory:
        """Return what reads the sessions."""
        from mcp_session_store.sql.admin.sessions import SessionDirectory

        self._refuse_absent()
        return SessionDirectory(self.url, namespace=self.namespace, schema=self.schema, timeout=self.timeout)

    def event_directory(self) -> EventDirectory:
        """Return what reads the events."""
        from mcp_session_store.sql.admin.events import EventDirectory

        self._refuse_absent()
        return EventDirectory(self.url, namespace=self.namespace, schema=self.schema, timeout=self.timeout)

    def event_partitions(self) -> EventPartitions:
        """Return what partitions the table of events, which all namespaces share."""
        from mcp_session_store.sql.admin.partitions import EventPartitions

        return EventPartitions(self.url, schema=self.schema, timeout=self.timeout)

    def namespaces(self) -> NamespaceDirectory:
        """Return what reads the namespaces of the database."""
        from mcp_session_store.sql.admin.namespaces import NamespaceDirectory

        self._refuse_absent()
        return NamespaceDirectory(self.url, schema=self.schema, timeout=self.timeout)

    def row_check(self) -> RowCheck:
        """Return what finds rows that cannot be read, in all namespaces."""
        from mcp_session_store.sql.admin.rows import RowCheck

        self._refuse_absent()
        return RowCheck(self.url, schema=self.schema, timeout=self.timeout)

    def store(self, retention: RetentionPolicy | None = None) -> SqlSessionStore:
        """Return what changes the sessions.

        Its calls take no longer than those of a server, whatever --timeout says, because servers look back for changes
        only as far as such a call can take.
        """
        from mcp_session_store.sql import SqlSessionStore

        self._refuse_absent()
        return SqlSessionStore(
            self.url,
            namespace=self.namespace,
            schema=self.schema,
            timeout=min(self.timeout, DEFAULT_TIMEOUT),
            retention=retention,
        )

    def event_log(self, store: SqlSessionStore, policy: EventPolicy) -> SqlEventLog:
        """Return what changes the events of a store's sessions."""
        from mcp_session_store.sql import SqlEventLog

        return SqlEventLog(store, policy=policy)

    def mailbox(self, store: SqlSessionStore | None = None) -> SqlMailbox:
        """Return the mailbox of the namespace, on the connections of a store where one is given."""
        from mcp_session_store.sql import SqlMailbox

        if store is not None:
            return SqlMailbox(store)
        self._refuse_absent()
        return SqlMailbox(self.url, namespace=self.namespace, schema=self.schema, timeout=self.timeout)

    def state_store(self, store: SqlSessionStore) -> SqlStateStore:
        """Return what changes the state of a store's sessions."""
        from mcp_session_store.sql import SqlStateStore

        return SqlStateStore(store)

    def _refuse_absent(self) -> None:
        """Refuse a SQLite file that does not exist: a name that was mistyped must not make one."""
        from mcp_session_store.sql.engine import checked_url, refuse_absent

        refuse_absent(*checked_url(self.url))

    def is_absent(self) -> bool:
        """Return whether there is no database, and a connection would create one."""
        from mcp_session_store.sql.engine import checked_url

        url, dialect = checked_url(self.url)
        return dialect.is_absent(url)

    def advice(self, command: str) -> str:
        """Return the advice to run a command of this package there."""
        from mcp_session_store.sql.engine import checked_url, shown_command

        return shown_command(command, checked_url(self.url)[0], self.schema, namespace=self.namespace)


def target_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options for the database and the namespace; the command gets a `Target` as its first argument."""

    @url_option
    @schema_option
    @namespace_option
    @timeout_option
    @functools.wraps(command)
    def with_target(*, url: str, schema: str | None, namespace: str, timeout: float, **others: Any) -> None:
        command(Target(url=url, schema=schema, namespace=namespace, timeout=timeout), **others)

    return with_target


def tables_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options for the database alone, for a command about tables, which all namespaces share."""

    @url_option
    @schema_option
    @timeout_option
    @functools.wraps(command)
    def with_target(*, url: str, schema: str | None, timeout: float, **others: Any) -> None:
        command(Target(url=url, schema=schema, namespace=DEFAULT_NAMESPACE, timeout=timeout), **others)

    return with_target
