"""What can be looked at in a Postgres database, by any role that may connect."""

from __future__ import annotations

import asyncio
import time
import uuid
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa
from typing_extensions import override

from mcp_session_store.sql.dialects.channel import NotificationChannel
from mcp_session_store.sql.dialects.checkup import Checkup, Finding, Verdict, driver_found
from mcp_session_store.sql.dialects.postgres_options import BEHIND_PGBOUNCER, explained_options
from mcp_session_store.sql.dialects.privileges import TABLES_NAMED, barred_from_upgrade

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sqlalchemy.engine import URL
    from sqlalchemy.ext.asyncio import AsyncConnection

    from mcp_session_store.sql.dialects.barred import Barred
    from mcp_session_store.sql.dialects.checkup import Connect, Look

__all__ = ["PostgresCheckup"]

PROBE_TIMEOUT: Final = 3.0
"""Seconds within which a notification must arrive."""
CLOCK_TOLERANCE: Final = timedelta(seconds=10)
"""Difference between the clocks of this host and the database that is worth a word."""
LISTENING: Final = 1
"""Connections of a process beside its pool: one that listens."""

_PROBE: Final = NotificationChannel("mcp_session_probe")
"""Channel of its own, so that no server hears of it."""
_PRIVILEGES: Final = ("SELECT", "INSERT", "UPDATE", "DELETE")

_SERVER: Final = sa.text(
    "SELECT current_setting('server_version') AS version, pg_is_in_recovery() AS standby,"
    " current_setting('transaction_read_only') = 'on' AS read_only, current_setting('server_encoding') AS encoding,"
    " current_user AS role, current_schema() AS schema"
)
_CONNECTIONS: Final = sa.text(
    "SELECT current_setting('max_connections')::int AS max,"
    " current_setting('superuser_reserved_connections')::int"
    " + coalesce(current_setting('reserved_connections', true), '0')::int AS reserved,"
    " (SELECT sum(numbackends) FROM pg_stat_database)::int AS in_use,"
    " (SELECT rolconnlimit FROM pg_roles WHERE rolname = current_user) AS of_role,"
    " (SELECT count(*) FROM pg_stat_activity WHERE usename = current_user)::int AS in_use_by_role,"
    " (SELECT datconnlimit FROM pg_database WHERE datname = current_database()) AS of_database,"
    " (SELECT numbackends FROM pg_stat_database WHERE datname = current_database())::int AS in_use_of_database"
)
# The tables that an unqualified name stands for, where no schema is given.
_TABLES: Final = sa.text(
    "SELECT c.relname AS name, pg_get_userbyid(c.relowner) AS owner,"  # noqa: S608 - a constant follows
    " pg_has_role(c.relowner, 'USAGE') AS owned,"
    " n.nspname AS schema, has_schema_privilege(n.oid, 'USAGE') AS usable,"
    " ARRAY(SELECT p FROM unnest(CAST(:privileges AS text[])) AS p WHERE has_table_privilege(c.oid, p)) AS granted"
    + TABLES_NAMED
)


class PostgresCheckup(Checkup):
    def __init__(self, url: URL, *, pool_size: int) -> None:
        super().__init__(url)
        self._takes = pool_size + LISTENING
        self._pooled_by_url = url.query.get(BEHIND_PGBOUNCER) == "true"
        self._heard: bool | None = None
        """Whether a notification arrived, once that was looked at."""

    @override
    def read_only_url(self) -> URL:
        return self.url

    @override
    def options(self) -> Mapping[str, str]:
        return explained_options(self.url)

    @override
    def before_connecting(self) -> Sequence[Finding]:
        return [driver_found("asyncpg")]

    @override
    def looks(self, connect: Connect) -> Mapping[str, Look]:
        looks = {
            "server": self._server,
            "notifications": self._notifications,
            "pooler": self._pooler,
            "clock": self._clock,
            "connections": self._connections,
        }
        return {name: partial(look, connect) for name, look in looks.items()}

    async def _server(self, connect: Connect) -> Finding:
        async with connect() as connection:
            rows = await connection.execute(_SERVER)
            row = rows.one()
        values = dict(zip(rows.keys(), row, strict=True))
        kind = "a standby" if row.standby else "the primary"
        found = f"PostgreSQL {row.version}, {kind}, {row.encoding}; role {row.role}, schema {row.schema or 'none'}"
        verdict, remedy = Verdict.OK, None
        if row.standby:
            verdict = Verdict.FAIL
            remedy = "name the primary, or all hosts with target_session_attrs=read-write: a standby takes no changes"
        elif row.read_only:
            verdict = Verdict.FAIL
            found += ", in read-only transactions"
            remedy = "turn default_transaction_read_only off for this role and database: a server makes changes"
        elif row.encoding != "UTF8":
            verdict, remedy = Verdict.WARN, "use a database in UTF8: what clients send may not fit into this one"
        return Finding(check="server", verdict=verdict, found=found, remedy=remedy, values=values)

    async def _notifications(self, connect: Connect) -> Finding:
        check = "notifications"
        if self._pooled_by_url:
            return Finding(
                check=check,
                found="not used behind a pooler (pgbouncer=true): changes are found by polling",
                values={"arrive": None},
            )
        arrived = asyncio.Event()
        probe = str(uuid.uuid4())
        async with connect() as listening, connect() as sending:
            await _PROBE.listen(
                listening,
                on_payload=lambda payload: arrived.set() if payload == probe else None,
                on_loss=lambda: None,
            )
            begun = time.monotonic()
            await sending.execute(_PROBE.send, {"payload": probe})
            try:
                async with asyncio.timeout(PROBE_TIMEOUT):
                    await arrived.wait()
            except TimeoutError:
                self._heard = False
                return Finding(
                    check=check,
                    verdict=Verdict.WARN,
                    found=f"a notification did not arrive within {PROBE_TIMEOUT:g} s: changes are found by polling",
                    remedy="connect past the pooler, or say that it is there: ?pgbouncer=true",
                    values={"arrive": False},
                )
            seconds = time.monotonic() - begun
        self._heard = True
        found = f"a notification arrived after {seconds * 1000:.0f} ms"
        return Finding(check=check, found=found, values={"arrive": True, "seconds": seconds})

    async def _pooler(self, connect: Connect) -> Finding:
        async with connect() as connection:
            # A pooler answers the driver itself, under a number that is no process of the server.
            told = _driver_of(connection).get_server_pid()
            process = (await connection.execute(sa.text("SELECT pg_backend_pid()"))).scalar_one()
        pooled = told != process
        values = {"pooler": pooled, BEHIND_PGBOUNCER: self._pooled_by_url}
        verdict, remedy = Verdict.OK, None
        if not pooled:
            found = "none was noticed"
            if self._pooled_by_url and not self._looks_pooled():
                verdict = Verdict.WARN
                remedy = (
                    "if there is none, remove pgbouncer=true from the URL: it costs a round trip for each statement"
                )
        elif self._pooled_by_url:
            found = "there is one, and the URL says so (pgbouncer=true)"
        elif self._heard:
            found = "there is one, in session mode, which needs nothing"
        else:
            found = "there is one, and notifications do not pass it, as in transaction mode"
            verdict = Verdict.WARN
            remedy = (
                "add ?pgbouncer=true to the URL, unless the pooler tracks prepared statements, as PgBouncer does from "
                "1.21 on with max_prepared_statements"
            )
        return Finding(check="pooler", verdict=verdict, found=found, remedy=remedy, values=values)

    def _looks_pooled(self) -> bool:
        """Return whether the URL names a pooler by the names and ports that they have as a rule."""
        return self.url.port in _POOLERS_PORTS or "pooler" in (self.url.host or "")

    async def _clock(self, connect: Connect) -> Finding:
        async with connect() as connection:
            begun = time.time()
            there = (
                await connection.execute(sa.text("SELECT extract(epoch FROM clock_timestamp())::float8"))
            ).scalar_one()
            ended = time.time()
        ahead = there - (begun + ended) / 2
        found = f"the database is {abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} this host"
        verdict, remedy = Verdict.OK, None
        if abs(ahead) > CLOCK_TOLERANCE.total_seconds():
            verdict = Verdict.WARN
            remedy = "set the clocks by NTP: sessions go by the database's alone, and logs by this host's"
        values = {"ahead": ahead, "uncertainty": (ended - begun) / 2}
        return Finding(check="clock", verdict=verdict, found=found, remedy=remedy, values=values)

    async def _connections(self, connect: Connect) -> Finding:
        async with connect() as connection:
            rows = await connection.execute(_CONNECTIONS)
            row = rows.one()
        values = dict(zip(rows.keys(), row, strict=True))
        parts = [f"{row.in_use} of {row.max} in use, {row.reserved} reserved"]
        free = row.max - row.reserved - row.in_use
        for limit, in_use, name in (
            (row.of_role, row.in_use_by_role, "role"),
            (row.of_database, row.in_use_of_database, "database"),
        ):
            if limit is not None and limit >= 0:
                free = min(free, limit - in_use)
                parts.append(f"{in_use} of the {limit} of this {name}")
        values |= {"free": free, "of_a_process": self._takes}
        parts.append(f"a process takes up to {self._takes}")
        if free >= self._takes:
            return Finding(check="connections", found="; ".join(parts), values=values)
        return Finding(
            check="connections",
            verdict=Verdict.WARN,
            found=f"{'; '.join(parts)}, and {free} more are free",
            remedy="allow more connections, run fewer processes, or give each a smaller pool (pool_size in the URL)",
            values=values,
        )

    @override
    def look_at_grants(self, connect: Connect, tables: Sequence[sa.Table], *, version_table: str) -> Look:
        schema = tables[0].schema
        wanted = {table.name: _PRIVILEGES for table in tables} | {version_table: _PRIVILEGES[:1]}

        async def look() -> Finding:
            async with connect() as connection:
                parameters = {"names": list(wanted), "privileges": list(_PRIVILEGES), "schema": schema}
                rows = (await connection.execute(_TABLES, parameters)).mappings().all()
                role = (await connection.execute(sa.text("SELECT quote_ident(current_user)"))).scalar_one()
                barred = await connection.run_sync(barred_from_upgrade, schema, list(wanted))
            return _grants([dict(row) for row in rows], wanted, role, barred)

        return look


_POOLERS_PORTS: Final = (6432, 6543)


def _grants(
    rows: Sequence[Mapping[str, Any]], wanted: Mapping[str, Sequence[str]], role: str, barred: Barred | None
) -> Finding:
    check = "grants"
    missing = {
        row["name"]: lacking
        for row in rows
        if (lacking := [one for one in wanted[row["name"]] if one not in row["granted"]])
    }
    schemas = sorted({row["schema"] for row in rows if not row["usable"]})
    owners = sorted({row["owner"] for row in rows if not row["owned"]})
    upgrade = "the role may upgrade" if barred is None else barred.reason
    values = {"missing": missing, "schemas_without_usage": schemas, "owners": owners, "may_upgrade": barred is None}
    if not rows:
        if barred is None:
            return Finding(check=check, found=f"there are no tables yet; {upgrade}", values=values)
        # Nothing that a server needs can be seen.
        return Finding(check=check, verdict=Verdict.FAIL, found=upgrade, remedy=barred.remedy, values=values)
    if not missing and not schemas:
        return Finding(check=check, found=f"all that a server needs; {upgrade}", values=values)
    of_tables = {name: lacking for name, lacking in missing.items() if len(wanted[name]) > 1}
    reads_only = not schemas and all("SELECT" not in lacking for lacking in missing.values())
    reads_only = reads_only and all(len(missing.get(name, ())) == 3 for name in wanted if len(wanted[name]) > 1)
    named = [f"{', '.join(lacking)} on {name}" for name, lacking in missing.items()]
    found = "the role only reads" if reads_only else f"the role lacks {'; '.join([*_usages(schemas), *named])}"
    grants = [f"GRANT {one} TO {role}" for one in _usages(schemas)]
    if of_tables:
        grants.append(f"GRANT {', '.join(_PRIVILEGES)} ON {', '.join(of_tables)} TO {role}")
    grants += [f"GRANT SELECT ON {name} TO {role}" for name in missing if name not in of_tables]
    return Finding(
        check=check,
        # A role that reads and no more was meant for looking.
        verdict=Verdict.WARN if reads_only else Verdict.FAIL,
        found=f"{found}; {upgrade}",
        remedy=f"for a server: {'; '.join(grants)}",
        values=values,
    )


def _usages(schemas: Sequence[str]) -> list[str]:
    return [f"USAGE ON SCHEMA {schema}" for schema in schemas]


def _driver_of(connection: AsyncConnection) -> Any:
    pooled: Any = connection.sync_connection
    return pooled.connection.driver_connection
