"""A look at all that a server needs of its database, one thing after the other, without changing anything."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import asdict, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Final

import sqlalchemy as sa

from mcp_session_store.errors import SchemaError, SessionStoreError, StoreMisconfigured
from mcp_session_store.settings import InstanceSettings, checked_pool_size, checked_seconds
from mcp_session_store.sql.admin.events import EventDirectory
from mcp_session_store.sql.admin.reader import Reader
from mcp_session_store.sql.admin.rows import RowCheck
from mcp_session_store.sql.admin.session_list import SessionFilter, SessionList, SessionState, readable
from mcp_session_store.sql.database import DEFAULT_POOL_SIZE, Attempt
from mcp_session_store.sql.dialects import checkup_of
from mcp_session_store.sql.dialects.checkup import Finding, Verdict
from mcp_session_store.sql.dialects.dialect import FailureKind
from mcp_session_store.sql.dialects.functions import MOMENT
from mcp_session_store.sql.engine import checked_url, make_engine_without_pool, refuse_absent, shown_command, shown_url
from mcp_session_store.sql.failures import failure_kind
from mcp_session_store.sql.mailbox.instances import Instances
from mcp_session_store.sql.schema.tables import VERSION_TABLE, instances_table, make_tables, sessions_table
from mcp_session_store.sql.schema.version import HEAD, advice_on, check_revision, is_empty, read_revision
from mcp_session_store.store import DEFAULT_NAMESPACE

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
    from datetime import datetime

    from sqlalchemy.engine import URL
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    from mcp_session_store.sql.dialects.checkup import Checkup, Look

__all__ = ["Finding", "Verdict", "examine"]

LOOK_TIMEOUT: Final = 5.0
"""Seconds that one look takes at most."""
LOOKS_IN_ALL: Final = 6
"""How many times as long all looks together take at most."""
SWEPT_WITHIN: Final = timedelta(minutes=15)
"""Time after its expiry within which a session is swept, where a server sweeps, or a sweep runs often enough."""
INSTANCES: Final = 500
"""Number of instances that are looked at."""
OF_THE_SCHEMA: Final = ("sessions", "events", "rows", "instances")
"""Looks that need a schema that fits."""
_UNREACHED: Final = (
    "check the host and the port in the URL, and that the server runs and lets this host through; or give it more time "
    "with --timeout"
)
NAMED: Final = 5
"""Number of namespaces, or of rows, that a finding names."""


async def examine(
    url: str | URL,
    *,
    namespace: str = DEFAULT_NAMESPACE,
    schema: str | None = None,
    pool_size: int | None = None,
    timeout: float = LOOK_TIMEOUT,
) -> AsyncGenerator[Finding, None]:
    """Look at a database, and yield what is found as it is found. Nothing is changed; a role that only reads will do.

    Where there is no connection, the first finding says why, and what needs one is not looked at.

    Args:
        url: As for `SqlSessionStore`.
        namespace: The namespace of the sessions.
        schema: Postgres: the schema with the tables.
        pool_size: As for `SqlSessionStore`: what a server takes is compared with what the database gives.
        timeout: Seconds that each look takes at most; all together take six times as long at most.

    Raises:
        ConfigurationError: An argument cannot work; the message names it.
    """
    parsed, dialect = checked_url(url)
    timeout = checked_seconds("timeout", timeout)
    size = checked_pool_size(pool_size) or dialect.pool_size(parsed) or DEFAULT_POOL_SIZE
    checkup = checkup_of(dialect, parsed, pool_size=size)
    engine = make_engine_without_pool(
        checkup.read_only_url(), dialect, timeout=timeout, command_timeout=timeout, given=parsed
    )
    async with _Examination(parsed, engine, namespace=namespace, schema=schema, timeout=timeout) as examination:
        first = await examination.looked("connection", examination.look_at_connection)
        yield first
        yield _of_url(parsed, checkup, schema)
        for finding in checkup.before_connecting():
            yield finding
        fits = True
        for check, look in examination.looks(checkup).items():
            if first.verdict is not Verdict.OK:
                yield _not_looked_at(check, "there is no connection")
            elif not fits and check in OF_THE_SCHEMA:
                yield _not_looked_at(check, "the schema does not fit")
            else:
                finding = await examination.looked(check, look)
                fits = fits and not (check == "schema" and finding.verdict is Verdict.FAIL)
                yield finding


def _of_url(url: URL, checkup: Checkup, schema: str | None) -> Finding:
    options = checkup.options()
    parts = [shown_url(url), *(f"{option} {fate}" for option, fate in options.items())]
    if schema is not None:
        parts.append(f"schema {schema}")
    return Finding(
        check="url", found="; ".join(parts), values={"url": shown_url(url), "options": options, "schema": schema}
    )


def _not_looked_at(check: str, reason: str) -> Finding:
    return Finding(check=check, verdict=Verdict.SKIPPED, found=f"not looked at: {reason}")


def _failed(check: str, error: SessionStoreError, values: Mapping[str, object] | None = None) -> Finding:
    """Return the finding that an error stands for, whose text ends with a remedy as a rule."""
    found, _, remedy = str(error).partition("; ")
    return Finding(check=check, verdict=Verdict.FAIL, found=found, remedy=remedy or None, values=values or {})


class _Examination(Reader):
    """The looks at one database.

    Args:
        url: URL that was given.
        engine: Engine that keeps no connection, and changes nothing in a file.
        namespace: See `examine`.
        schema: See `examine`.
        timeout: See `examine`.
    """

    def __init__(self, url: URL, engine: AsyncEngine, *, namespace: str, schema: str | None, timeout: float) -> None:
        super().__init__(engine, namespace=namespace, schema=schema, timeout=timeout)
        self._url = url
        self._engine = engine
        self._schema = schema
        self._timeout = timeout
        self._deadline = time.monotonic() + LOOKS_IN_ALL * timeout

    async def looked(self, check: str, look: Look) -> Finding:
        """Look, within the time that is left, and return what was found, or why nothing was."""
        seconds = min(self._timeout, self._deadline - time.monotonic())
        try:
            async with asyncio.timeout(max(0.0, seconds)):
                return await look()
        except TimeoutError:
            within = f"within {max(0.0, seconds):.1f} s"
            refusal = self.database.connections.refusal(within=self._timeout)
            if refusal is None:
                error = SessionStoreError(f"there was no answer {within}")
            else:
                error = SessionStoreError(f"there was no connection {within}: {refusal}")
        except Exception as raised:
            translated = self.database.translate(raised)
            if not isinstance(translated, SessionStoreError):
                raise
            cause = raised.__cause__ if isinstance(raised.__cause__, Exception) else raised
            if failure_kind(cause, self.database.dialect) is FailureKind.WRONG_SCHEMA:
                return _failed(check, translated)
            error = translated
        if check != "connection":
            return _not_looked_at(check, "the schema does not fit" if isinstance(error, SchemaError) else str(error))
        finding = _failed(check, error)
        if finding.remedy is None and self.database.dialect.has_addresses:
            return replace(finding, remedy=_UNREACHED)
        return finding

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[AsyncConnection]:
        """Lend a connection, and drop it when it is given up: to close one whose other end is silent never ends."""
        connection = await self.database.connect()
        broken = True
        try:
            yield connection
            broken = False
        finally:
            await self.database.release(connection, broken=broken)

    def looks(self, checkup: Checkup) -> Mapping[str, Look]:
        """Return the looks that need a connection, by name and in their order."""
        changed = make_tables(self._schema).sorted_tables
        grants = checkup.look_at_grants(self.connected, changed, version_table=VERSION_TABLE)
        return {
            **checkup.looks(self.connected),
            "schema": self.look_at_schema,
            **({} if grants is None else {"grants": grants}),
            "sessions": self.look_at_sessions,
            "events": self.look_at_events,
            "rows": self.look_at_rows,
            "instances": self.look_at_instances,
        }

    def _advice(self, command: str) -> str:
        return shown_command(command, self._url, self._schema)

    async def look_at_connection(self) -> Finding:
        refuse_absent(self._url, self.database.dialect)
        begun = time.monotonic()
        async with self.connected() as connection:
            opened = time.monotonic()
            await connection.exec_driver_sql("SELECT 1")
            answered = time.monotonic()
            # SQLite reads no file before that.
            await is_empty(connection)
        found = f"opened in {_milliseconds(opened - begun)}, answers in {_milliseconds(answered - opened)}"
        return Finding(
            check="connection", found=found, values={"opened_in": opened - begun, "answers_in": answered - opened}
        )

    async def look_at_schema(self) -> Finding:
        async with self.connected() as connection:
            revision = await read_revision(connection, self._schema)
            values = {"revision": revision, "needed": HEAD}
            try:
                check_revision(revision, advice=await advice_on(connection, self._schema, revision), warn=False)
            except (SchemaError, StoreMisconfigured) as error:
                return _failed("schema", error, values)
        if revision == HEAD:
            return Finding(check="schema", found=f"at {revision}, which fits", values=values)
        return Finding(
            check="schema",
            verdict=Verdict.WARN,
            found=f"at {revision}, newer than the {HEAD} of this version, and fits",
            remedy="upgrade the package when you can",
            values=values,
        )

    async def look_at_sessions(self) -> Finding:
        table = sessions_table(self._schema)
        lists = SessionList(self.database.dialect, table, namespace=self._namespace)

        async def read(connection: AsyncConnection, now: datetime) -> Finding:
            conditions = [sa.and_(*lists.conditions(SessionFilter(state=state), now)) for state in SessionState]
            overdue = sa.and_(conditions[1], table.c.expires_at <= sa.literal(now - SWEPT_WITHIN, MOMENT))
            counts = [sa.func.count().filter(condition) for condition in (*conditions, overdue)]
            counted = sa.select(*counts).where(table.c.namespace == self._namespace)
            totals = list((await connection.execute(counted)).one())
            number = sa.func.count()
            elsewhere = (
                sa.select(table.c.namespace, number)
                .where(table.c.namespace != self._namespace)
                .group_by(table.c.namespace)
                .order_by(number.desc(), table.c.namespace)
                .limit(NAMED)
            )
            others = {readable(name): count for name, count in await connection.execute(elsewhere)}
            return self._counted(totals, others)

        return await self.read(read)

    def _counted(self, counts: Sequence[int], others: Mapping[str, int]) -> Finding:
        live, expired, ended, unswept = counts
        found = f"{live} live, {expired} expired and not swept, {ended} ended, in namespace {self._namespace!r}"
        verdict, remedy = Verdict.OK, None
        if others:
            found += "; others: " + ", ".join(f"{count} in {name!r}" for name, count in others.items())
        if unswept:
            verdict = Verdict.WARN
            found += f"; {unswept} expired more than {SWEPT_WITHIN // timedelta(minutes=1)} minutes ago"
            advice = shown_command("sweep", self._url, self._schema, namespace=self._namespace)
            remedy = f"let a server sweep (sweep_interval), or from cron, {advice}"
        elif others and not live + expired + ended:
            verdict, remedy = Verdict.WARN, "give the namespace of the server, if this is another: --namespace"
        values = {"live": live, "expired": expired, "ended": ended, "unswept": unswept, "other_namespaces": others}
        return Finding(check="sessions", verdict=verdict, found=found, remedy=remedy, values=values)

    async def look_at_events(self) -> Finding:
        directory = EventDirectory(self._engine, namespace=self._namespace, schema=self._schema, timeout=self._timeout)
        async with directory:
            statistics = await directory.statistics(top=1)
        found = (
            f"{statistics.events} of {statistics.sessions} sessions, {_size(statistics.bytes)}; "
            f"the tables take {_size(statistics.table_bytes + (statistics.index_bytes or 0))}"
        )
        if statistics.index_bytes is None:
            found = found.replace("the tables take", "the file takes")
        values = {name: value for name, value in asdict(statistics).items() if name not in ("instances", "as_of")}
        return Finding(check="events", found=found, values=values)

    async def look_at_rows(self) -> Finding:
        async with RowCheck(self._engine, schema=self._schema, timeout=self._timeout) as check:
            unreadable = await check.unreadable()
        values = {"unreadable": [asdict(row) for row in unreadable]}
        if not unreadable:
            return Finding(check="rows", found="all can be read", values=values)
        return Finding(
            check="rows",
            verdict=Verdict.WARN,
            found=f"{len(unreadable)} cannot be read, each of which is answered as an unknown session",
            remedy=f"to see which, and repair them, {self._advice('check --rows')}",
            values=values,
        )

    async def look_at_instances(self) -> Finding:
        table = instances_table(self._schema)
        latest = sa.select(table.c.name, table.c.instance, table.c.started_at).order_by(table.c.beat_at.desc())
        statements = Instances(self.database.dialect, schema=self._schema, namespace=self._namespace)
        dead_after = timedelta(seconds=InstanceSettings().instance_timeout)

        async def read(connection: AsyncConnection, now: datetime) -> Finding:  # noqa: ARG001
            rows = (await connection.execute(latest.limit(INSTANCES))).all()
            names = [row.name for row in rows]
            beats = await statements.last_beats(Attempt(connection, repeated=False), names) if names else {}
            listed = [
                {
                    "instance": readable(row.instance),
                    "started_at": row.started_at,
                    "beat_ago": beat.ago,
                    "alive": not beat.released and beat.ago <= dead_after,
                }
                for row in rows
                if (beat := beats.get(row.name)) is not None
            ]
            alive = sum(one["alive"] is True for one in listed)
            found = f"{alive} alive, {len(listed) - alive} dead"
            return Finding(check="instances", found=found, values={"instances": listed})

        return await self.read(read)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"


def _size(count: int) -> str:
    return f"{count} bytes" if count < 10_000 else f"{count / 1e6:.1f} MB"
