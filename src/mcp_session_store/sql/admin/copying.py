"""Copying sessions from one database to another: page by page along their keys, and as often as is wanted."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass, field
from datetime import timedelta
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa
from sqlalchemy.engine import URL

from mcp_session_store.errors import ConfigurationError, SchemaAhead
from mcp_session_store.records import EndReason
from mcp_session_store.settings import OPERATOR_TIMEOUT
from mcp_session_store.sql.admin.copied_rows import belonging_to_sessions, beyond, chunks, decoded, stored, streamed
from mcp_session_store.sql.admin.copied_values import copy_values
from mcp_session_store.sql.admin.reader import Reader
from mcp_session_store.sql.dialects.functions import MOMENT, StoreClock, driver_value
from mcp_session_store.sql.schema.tables import instances_table, logs_table, make_tables, sessions_table, values_table
from mcp_session_store.sql.schema.version import HEAD, read_revision
from mcp_session_store.sql.sessions.decoding import end_reason
from mcp_session_store.sql.sessions.removal import End, SessionRemoval
from mcp_session_store.sql.transaction import transaction

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from datetime import datetime
    from uuid import UUID

    from sqlalchemy.ext.asyncio import AsyncConnection

    from mcp_session_store.sql.database import Attempt

__all__ = ["CopyReport", "SessionCopy"]

PAGE: Final = 500
"""Sessions that are copied in one transaction."""
_RUNS_WITHIN: Final = timedelta(minutes=1)
"""Time within which an instance that runs has sent a heartbeat."""


class _Fate(Enum):
    """What becomes of a session of the source."""

    COPIED = "copied"
    UPDATED = "updated"
    UNCHANGED = "unchanged"
    NEWER = "newer"
    ENDED = "ended"
    UNREADABLE = "unreadable"


@dataclass(kw_only=True, slots=True)
class CopyReport:
    """What a copy did, or would do."""

    copied: int = 0
    """Sessions that were not there."""
    updated: int = 0
    """Sessions that were there, and had changed at the source since."""
    unchanged: int = 0
    newer: int = 0
    """Sessions that were used, or have ended, at the destination since, and were left as they are there."""
    ended: int = 0
    """Sessions that were there, and ended there because they have ended at the source."""
    unreadable: int = 0
    """Sessions with a row that cannot be read, which were not copied."""
    values: int = 0
    """Values that belong to no session, and were not there, or were stored at the source later."""
    namespaces: dict[str, int] = field(default_factory=dict)
    """Live sessions of the source, by namespace."""
    running: int = 0
    """Instances that ran on the source during the copy."""


@dataclass(slots=True)
class _Page:
    """A page of sessions of the source, as it was at one moment."""

    live: dict[UUID, dict[str, Any]]
    ended: dict[UUID, dict[str, Any]]
    size: int
    """Number of rows."""
    last: Any
    """Key of the last row, as the driver has it; `None` when there are no more."""
    fates: Counter[_Fate] = field(default_factory=Counter)


class SessionCopy:
    """Copies live sessions, with their journals and their state, from one database to another.

    A session is copied as it is, its times and digests included, with all that belongs to it in one transaction. What
    has ended at the source ends at the destination. A session that was used at the destination since, or that has ended
    there, stays as it is there, so that a copy can be made any number of times, and beside running servers. Values that
    belong to no session (`SqlKeyValue`) are copied, too, where they were not stored there later.

    Events are not copied, because calls end with their process. But each log's place is, so that sequences go on:
    a client that resumes gets what comes after its place, and where events are missing what it gets after a trim.

    Args:
        source: URL of the database with the sessions.
        destination: URL of the other database.
        namespace: Namespace of the sessions; all unless given.
        source_schema: Postgres: the schema of the tables at the source.
        destination_schema: Postgres: the schema of the tables at the destination.
        timeout: Seconds that a page may take.
        dry_run: Whether nothing is to be changed.

    Raises:
        ConfigurationError: An argument cannot work.
    """

    def __init__(
        self,
        source: str,
        destination: str,
        *,
        namespace: str | None = None,
        source_schema: str | None = None,
        destination_schema: str | None = None,
        timeout: float = OPERATOR_TIMEOUT,
        dry_run: bool = False,
    ) -> None:
        self._source = Reader(source, schema=source_schema, timeout=timeout)
        self._destination = Reader(destination, schema=destination_schema, timeout=timeout)
        if (self._source.database.given, source_schema) == (self._destination.database.given, destination_schema):
            raise ConfigurationError("the two databases are the same; name another one by --to")
        self._namespace = namespace
        self._dry_run = dry_run
        url = self._destination.database.given
        self._is_absent = isinstance(url, URL) and self._destination.database.dialect.is_absent(url)
        self._belonging = belonging_to_sessions(source_schema)
        if not dry_run:
            copied = [table(destination_schema) for table in (sessions_table, logs_table, values_table)]
            written = [*copied, *belonging_to_sessions(destination_schema)]
            self._destination.database.need(dict.fromkeys(written, "SELECT, INSERT, UPDATE, DELETE"))

    async def __aenter__(self) -> SessionCopy:
        await self._source.__aenter__()
        await self._destination.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            await self._destination.aclose()
        finally:
            await self._source.aclose()

    async def count(self) -> int:
        """Check both schemas, and return the number of sessions at the source, ended ones included.

        Raises:
            SchemaError: A schema does not fit; the message names the command to run.
        """
        sessions = sessions_table(self._source.database.schema)

        async def count(connection: AsyncConnection, now: datetime) -> int:  # noqa: ARG001
            await self._check(self._source, connection)
            statement = sa.select(sa.func.count()).select_from(sessions).where(*self._wanted(sessions))
            return (await connection.execute(statement)).scalar_one()

        async def check(connection: AsyncConnection, now: datetime) -> None:  # noqa: ARG001
            await self._check(self._destination, connection)

        found = await self._source.read(count)
        if not (self._dry_run and self._is_absent):
            await self._destination.read(check)
        return found

    async def run(self, advance: Callable[[int], None] = lambda _: None) -> CopyReport:
        """Copy, and return what was done.

        Args:
            advance: Is told how many sessions more were looked at.

        Raises:
            SchemaError: A schema does not fit; the message names the command to run.
            StoreUnavailable: A database cannot be reached. What was copied stays, and another copy goes on.
        """
        report = CopyReport()
        await self.count()
        after: Any = None
        while True:
            page = await self._source.read(functools.partial(self._copy_page, after=after))
            for fate, number in page.fates.items():
                setattr(report, fate.value, getattr(report, fate.value) + number)
            for values in page.live.values():
                name = values["namespace"]
                report.namespaces[name] = report.namespaces.get(name, 0) + 1
            report.ended += await self._end(page.ended)
            advance(page.size)
            if page.last is None:
                break
            after = page.last
        destination = None if self._dry_run and self._is_absent else self._destination
        report.values = await copy_values(self._source, destination, namespace=self._namespace, dry_run=self._dry_run)
        report.running = await self._source.read(self._running)
        return report

    async def _check(self, reader: Reader, connection: AsyncConnection) -> None:
        revision = await read_revision(connection, reader.database.schema)
        if revision != HEAD:
            raise SchemaAhead(
                f"the schema of {reader.database.shown_url} is at {revision}, and this version of mcp-session-store, "
                f"which knows {HEAD}, would not copy all of it; run: pip install --upgrade mcp-session-store"
            )

    def _wanted(self, sessions: sa.Table) -> Sequence[sa.ColumnElement[bool]]:
        return () if self._namespace is None else (sessions.c.namespace == self._namespace,)

    async def _copy_page(self, connection: AsyncConnection, now: datetime, *, after: Any) -> _Page:
        sessions = sessions_table(self._source.database.schema)
        key = sessions.c.key
        wanted = [*self._wanted(sessions), *(() if after is None else (beyond(key, after),))]
        statement = sa.select(*map(driver_value, sessions.c)).where(*wanted).order_by(key).limit(PAGE)
        rows = (await connection.execute(statement)).all()
        page = _Page({}, {}, len(rows), rows[-1][0] if len(rows) == PAGE else None)
        dialect = self._source.database.dialect
        for row in rows:
            values = decoded(dialect, sessions, row)
            if values is None:
                page.fates[_Fate.UNREADABLE] += 1
            elif values["ended_at"] is not None:
                page.ended[values["key"]] = values
            elif values["expires_at"] is None or now < values["expires_at"]:
                page.live[values["key"]] = values
        if page.live:
            page.fates += await self._write(connection, page.live)
        return page

    async def _write(self, source: AsyncConnection, live: dict[UUID, dict[str, Any]]) -> Counter[_Fate]:
        """Write a page of sessions, and what belongs to them, in one transaction."""
        if self._dry_run and self._is_absent:
            return Counter({_Fate.COPIED: len(live)})
        database = self._destination.database

        async def attempt(attempt: Attempt) -> Counter[_Fate]:
            connection = attempt.connection
            if self._dry_run:
                return Counter((await self._fates(connection, live)).values())
            async with transaction(connection, database.dialect):
                # Two copies at once would insert the same sessions.
                await connection.run_sync(database.dialect.lock_migrations)
                fates = await self._fates(connection, live)
                await self._write_sessions(connection, live, fates)
                written = [key for key, fate in fates.items() if fate is not _Fate.NEWER]
                for table in self._belonging:
                    await self._write_belonging(source, connection, table, written)
                await self._write_places(source, connection, written)
            return Counter(fates.values())

        async with database.lease(writes=not self._dry_run) as lease:
            return await lease.run(attempt)

    async def _fates(self, connection: AsyncConnection, live: Mapping[UUID, Mapping[str, Any]]) -> dict[UUID, _Fate]:
        """Return what becomes of each session, and lock the rows that are to be written."""
        sessions, dialect = sessions_table(self._destination.database.schema), self._destination.database.dialect
        statement = sa.select(*map(driver_value, sessions.c)).where(sessions.c.key.in_(list(live)))
        if not self._dry_run:
            statement = statement.order_by(sessions.c.key).with_for_update()
        there: dict[UUID, dict[str, Any] | None] = {}
        for row in await connection.execute(statement):
            key = dialect.key(row[0])
            assert key is not None
            there[key] = decoded(dialect, sessions, row)
        return {key: self._fate(values, there.get(key, {})) for key, values in live.items()}

    def _fate(self, values: Mapping[str, Any], there: Mapping[str, Any] | None) -> _Fate:
        if there is None:
            return _Fate.UPDATED  # It cannot be read there.
        if not there:
            return _Fate.COPIED
        ours = {name: stored(self._destination.database.dialect, value) for name, value in values.items()}
        marks = ("last_seen_at", "restores", "revision")
        if there["ended_at"] is not None or any(there[mark] > ours[mark] for mark in marks):
            return _Fate.NEWER
        same = all(there[name] == ours[name] for name in ours if name != "changed_at")
        return _Fate.UNCHANGED if same else _Fate.UPDATED

    async def _write_sessions(
        self, connection: AsyncConnection, live: Mapping[UUID, dict[str, Any]], fates: Mapping[UUID, _Fate]
    ) -> None:
        sessions = sessions_table(self._destination.database.schema)
        new = [values for key, values in live.items() if fates[key] is _Fate.COPIED]
        async for chunk in chunks(new):
            await connection.execute(sa.insert(sessions), chunk)
        changed = [values for key, values in live.items() if fates[key] is _Fate.UPDATED]
        if changed:
            now = (await connection.execute(sa.select(StoreClock()))).scalar_one()
            for values in changed:
                # Servers that run there learn of the change by its time.
                statement = sa.update(sessions).where(sessions.c.key == values["key"])
                await connection.execute(statement.values({**values, "changed_at": now}))

    async def _write_belonging(
        self, source: AsyncConnection, connection: AsyncConnection, table: sa.Table, keys: Sequence[UUID]
    ) -> None:
        """Replace the rows of a table that belong to sessions."""
        there = make_tables(self._destination.database.schema).tables[_full_name(self._destination, table)]
        await connection.execute(sa.delete(there).where(there.c.key.in_(keys)))
        statement = sa.select(*map(driver_value, table.c)).where(table.c.key.in_(keys))
        rows = streamed(source, statement, table, self._source.database.dialect)
        async for chunk in chunks(rows):
            await connection.execute(sa.insert(there), chunk)

    async def _write_places(self, source: AsyncConnection, connection: AsyncConnection, keys: Collection[UUID]) -> None:
        """Note up to which sequence each log has come, as after a trim of all its events."""
        here, there = logs_table(self._source.database.schema), logs_table(self._destination.database.schema)
        found = sa.select(here.c.key, here.c.namespace, here.c.sequence, here.c.total_bytes)
        logs = (await source.execute(found.where(here.c.key.in_(keys)))).all()
        if not logs:
            return
        known = sa.select(there.c.key, there.c.sequence, there.c.trimmed).where(there.c.key.in_(keys))
        at = {row.key: row for row in await connection.execute(known.order_by(there.c.key).with_for_update())}
        places = [
            {
                "key": log.key,
                "namespace": log.namespace,
                "sequence": log.sequence,
                "trimmed": log.sequence,
                "total_bytes": log.total_bytes,
                "trimmed_bytes": log.total_bytes,
            }
            for log in logs
        ]
        if new := [place for place in places if place["key"] not in at]:
            await connection.execute(sa.insert(there), new)
        for place in places:
            # A log with events of its own has gone on there.
            log_there = at.get(place["key"])
            if log_there is not None and log_there.trimmed == log_there.sequence < place["sequence"]:
                await connection.execute(sa.update(there).where(there.c.key == place["key"]).values(place))

    async def _end(self, ended: Mapping[UUID, Mapping[str, Any]]) -> int:
        """End the sessions that have ended at the source, but for those that only expired and were used since."""
        if not ended or (self._dry_run and self._is_absent):
            return 0
        database = self._destination.database
        sessions = sessions_table(database.schema)
        live = sa.select(sessions.c.key, driver_value(sessions.c.last_seen_at)).where(
            sessions.c.key.in_(list(ended)), sessions.c.ended_at.is_(None)
        )

        async def attempt(attempt: Attempt) -> int:
            ends: dict[str, list[End]] = {}
            for key, last_seen_at in await attempt.connection.execute(live):
                values = ended[key]
                reason = end_reason(values["end_reason"])
                (used_at,) = database.dialect.moments([last_seen_at])
                if reason is EndReason.EXPIRED and used_at > stored(database.dialect, values["last_seen_at"]):
                    continue
                ends.setdefault(values["namespace"], []).append(End(key, reason))
            if self._dry_run:
                return sum(map(len, ends.values()))
            number = 0
            for namespace, of_namespace in ends.items():
                removal = SessionRemoval(database.dialect, schema=database.schema, namespace=namespace)
                number += sum(await removal.end(attempt, of_namespace))
            return number

        async with database.lease(writes=not self._dry_run) as lease:
            return await lease.run(attempt)

    async def _running(self, connection: AsyncConnection, now: datetime) -> int:
        instances = instances_table(self._source.database.schema)
        beats = sa.literal(now - _RUNS_WITHIN, MOMENT) < instances.c.beat_at
        of_namespace = () if self._namespace is None else (instances.c.namespace == self._namespace,)
        statement = sa.select(sa.func.count()).select_from(instances).where(beats, *of_namespace)
        return (await connection.execute(statement)).scalar_one()


def _full_name(reader: Reader, table: sa.Table) -> str:
    schema = reader.database.schema
    return table.name if schema is None else f"{schema}.{table.name}"
