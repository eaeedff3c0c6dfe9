"""Partitions of a table of Postgres by a range of times: what its catalogs say, and the DDL that changes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from mcp_session_store.sql.dialects.functions import EPOCH, MOMENT, StoreClock

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime, timedelta

    from sqlalchemy.exc import DBAPIError
    from sqlalchemy.ext.asyncio import AsyncConnection

__all__ = [
    "TIMED_OUT",
    "TRY_AGAIN",
    "Partition",
    "PartitionedTable",
    "TablePartitions",
    "regclass",
    "set_timeouts",
    "sqlstate_of",
    "start_of_range",
]

TIMED_OUT: Final = "57014"
"""SQLSTATE of a statement that has reached its timeout."""
TRY_AGAIN: Final = frozenset({"55P03", "40P01", "23514"})
"""SQLSTATEs of a lock that was not available in time, of a deadlock, and of a row that was inserted into the default
partition meanwhile."""


_FIRST: Final = "first"
_DEFAULT: Final = "default"
PARTITION: Final = rf"(?:{_FIRST}|{_DEFAULT}|\d{{8}}_\d{{6}})"
"""Pattern of what the name of a partition has behind that of its table."""
_ISO_MOMENT: Final = r"\d+-\d\d-\d\d [\d:.]+[+-][\d:]+"


class TablePartitions:
    """Partitions of a table of Postgres by a range of times, as its catalogs list them.

    Their times are read where `DateStyle` is ISO, the default, because other ways to write them can be ambiguous.

    Args:
        table: The table with the partitions.
    """

    def __init__(self, table: sa.Table) -> None:
        inherits = sa.table("pg_inherits", sa.column("inhrelid"), sa.column("inhparent"), schema="pg_catalog")
        classes = sa.table(
            "pg_class", sa.column("oid"), sa.column("relname", sa.Text), sa.column("relpartbound"), schema="pg_catalog"
        )
        bound = sa.func.pg_get_expr(classes.c.relpartbound, classes.c.oid, type_=sa.Text)

        def moment(pattern: str) -> sa.ColumnElement[Any]:
            return sa.cast(sa.func.substring(bound, pattern), postgresql.TIMESTAMP(timezone=True))

        self.rows: Final = inherits.join(classes, classes.c.oid == inherits.c.inhrelid)
        """Rows to select from, of all tables; see `of_table`."""
        self.of_table: Final = inherits.c.inhparent == regclass(table)
        """Condition that a row belongs to the table."""
        self.oid: Final = classes.c.oid
        self.name: Final = sa.cast(classes.c.relname, sa.Text)
        self.is_default: Final = bound == "DEFAULT"
        """Whether the partition is the one for rows that belong to no other."""
        self.since: Final = moment(rf"FROM \('({_ISO_MOMENT})'\)")
        """Start of its times; NULL without one, and for the default partition."""
        self.until: Final = moment(rf"TO \('({_ISO_MOMENT})'\)")
        """End of its times; NULL for the default partition."""


def _quoted(table: sa.Table) -> str:
    names = (table.name,) if table.schema is None else (table.schema, table.name)
    return ".".join('"' + name.replace('"', '""') + '"' for name in names)


def regclass(table: sa.Table) -> sa.ColumnElement[Any]:
    """Return the object id of a table."""
    # The text is cast: the driver would send a number for a regclass.
    return sa.cast(sa.literal(_quoted(table), sa.Text), postgresql.REGCLASS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Partition:
    """A partition of a table by a range of times."""

    name: str
    since: datetime | None
    """Time of the earliest row that it may hold; `None`: any time."""
    until: datetime | None
    """Time from which rows belong to another partition; `None` for the default one, which holds all that belong to
    no other."""
    size: int
    """Bytes of the partition and its index."""


class PartitionedTable:
    """A table that is, or can be, partitioned by a range of times. All methods run within a transaction.

    The partitions are tables whose names begin with that of the table: the default partition, the first one, which
    has all rows from before, and one for each range of times.

    Args:
        table: The table, with its primary key without partitions.
        by: The column with the times.
    """

    def __init__(self, table: sa.Table, *, by: sa.Column[datetime]) -> None:
        self._table = table
        self._by = by.name
        self._key = ", ".join(column.name for column in table.primary_key)

    async def is_partitioned(self, connection: AsyncConnection) -> bool:
        """Return whether the table has partitions."""
        found = await connection.execute(
            sa.text("SELECT count(*) FROM pg_partitioned_table WHERE partrelid = to_regclass(CAST(:name AS text))"),
            {"name": self._name(connection)},
        )
        return bool(found.scalar_one())

    async def partitions(self, connection: AsyncConnection) -> list[Partition]:
        """Return the partitions, the default one last; none of a table that is not partitioned."""
        await connection.exec_driver_sql("SET LOCAL datestyle = 'ISO'")
        found = TablePartitions(self._table)
        statement = (
            sa.select(found.name, found.since, found.until, sa.func.pg_total_relation_size(found.oid))
            .select_from(found.rows)
            .where(found.of_table)
            .order_by(found.is_default, sa.nulls_first(found.since))
        )
        rows = await connection.execute(statement)
        return [Partition(name=name, since=since, until=until, size=size) for name, since, until, size in rows]

    async def divide(self, connection: AsyncConnection, every: timedelta, *, ahead: int) -> None:
        """Make the table one of partitions. The present table becomes the first of them, as it is.

        Args:
            connection: A connection in a transaction.
            every: How long a time each partition is for.
            ahead: Partitions to make for times to come.
        """
        run = connection.exec_driver_sql
        whole, first = self._name(connection), self._name(connection, _FIRST)
        await run(f"LOCK TABLE {whole} IN ACCESS EXCLUSIVE MODE")
        # Read under the lock, so that each event stored later is either before or after the boundary.
        now = (await connection.execute(sa.select(StoreClock()))).scalar_one()
        boundary = start_of_range(now, every) + every
        quote = connection.dialect.identifier_preparer.quote
        await run(f"ALTER TABLE {whole} RENAME TO {quote(self._name_with(_FIRST))}")
        await self._drop_primary_key(connection, first)
        await run(f"CREATE TABLE {whole} (LIKE {first} INCLUDING ALL) PARTITION BY RANGE ({self._by})")
        await self._give_rights(connection, of=first, to=whole)
        # The column of the partitions must be part of the key. A sequence is unique because its log gives it once.
        await run(f"ALTER TABLE {whole} ADD PRIMARY KEY ({self._key}, {self._by})")
        await run(f"ALTER TABLE {first} ADD PRIMARY KEY ({self._key}, {self._by})")
        await run(f"ALTER TABLE {whole} ATTACH PARTITION {first} FOR VALUES FROM (MINVALUE) TO ({_literal(boundary)})")
        await self._create(connection, _DEFAULT, "DEFAULT")
        for number in range(max(1, ahead)):
            since = boundary + number * every
            await self.create(connection, since, since + every)

    async def unite(self, connection: AsyncConnection) -> None:
        """Make the partitions one table again, with all their rows."""
        run = connection.exec_driver_sql
        parted, whole = self._name(connection), self._name(connection, "whole")
        await run(f"LOCK TABLE {parted} IN ACCESS EXCLUSIVE MODE")
        await run(f"CREATE TABLE {whole} (LIKE {parted} INCLUDING ALL EXCLUDING INDEXES)")
        await self._give_rights(connection, of=parted, to=whole)
        await run(f"INSERT INTO {whole} SELECT * FROM {parted}")  # noqa: S608 - our own names
        await run(f"DROP TABLE {parted}")
        await run(f"ALTER TABLE {whole} RENAME TO {connection.dialect.identifier_preparer.quote(self._table.name)}")
        await run(f"ALTER TABLE {parted} ADD PRIMARY KEY ({self._key})")

    async def create(self, connection: AsyncConnection, since: datetime, until: datetime) -> None:
        """Make a partition for a range of times."""
        await self._create(connection, _suffix(since), f"FOR VALUES FROM ({_literal(since)}) TO ({_literal(until)})")

    async def _create(self, connection: AsyncConnection, suffix: str, bound: str) -> None:
        """Make a partition beside the table and then attach it, which does not block inserts."""
        run = connection.exec_driver_sql
        whole, partition = self._name(connection), self._name(connection, suffix)
        await run(f"CREATE TABLE {partition} (LIKE {whole} INCLUDING ALL)")
        await self._give_rights(connection, of=whole, to=partition)
        await run(f"ALTER TABLE {whole} ATTACH PARTITION {partition} {bound}")

    async def drop(self, connection: AsyncConnection, names: Sequence[str]) -> None:
        """Drop partitions, with their rows."""
        tables = ", ".join(self._name(connection, name.removeprefix(self._name_with(""))) for name in names)
        await connection.exec_driver_sql(f"DROP TABLE {tables}")

    def partition_name(self, since: datetime) -> str:
        """Return the name of the partition that begins at a time."""
        return self._name_with(_suffix(since))

    async def default_in_use(self, connection: AsyncConnection, since: datetime) -> bool:
        """Return whether the default partition holds rows of a time or later."""
        by = sa.column(self._by, MOMENT)
        default = sa.table(self._name_with(_DEFAULT), by, schema=self._table.schema)
        statement = sa.select(sa.exists().select_from(default).where(by >= sa.literal(since, MOMENT)))
        return bool((await connection.execute(statement)).scalar_one())

    async def _drop_primary_key(self, connection: AsyncConnection, table: str) -> None:
        found = await connection.execute(
            sa.text(
                "SELECT quote_ident(conname) FROM pg_constraint "
                "WHERE conrelid = to_regclass(CAST(:name AS text)) AND contype = 'p'"
            ),
            {"name": table},
        )
        await connection.exec_driver_sql(f"ALTER TABLE {table} DROP CONSTRAINT {found.scalar_one()}")

    async def _give_rights(self, connection: AsyncConnection, *, of: str, to: str) -> None:
        """Give a table the owner and the grants of another."""
        owner = await connection.execute(
            sa.text(
                "SELECT quote_ident(pg_get_userbyid(relowner)) FROM pg_class "
                "WHERE oid = to_regclass(CAST(:name AS text)) AND pg_get_userbyid(relowner) <> current_user"
            ),
            {"name": of},
        )
        grants = await connection.execute(
            sa.text(
                "SELECT privilege_type || ' ON ' || :to || ' TO ' || "
                "CASE WHEN grantee = 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(grantee)) END || "
                "CASE WHEN is_grantable THEN ' WITH GRANT OPTION' ELSE '' END "
                "FROM pg_class, aclexplode(relacl) "
                "WHERE pg_class.oid = to_regclass(CAST(:name AS text)) AND grantee <> relowner"
            ),
            {"name": of, "to": to},
        )
        for grant in grants.scalars().all():
            await connection.exec_driver_sql(f"GRANT {grant}")
        if (other := owner.scalar()) is not None:
            await connection.exec_driver_sql(f"ALTER TABLE {to} OWNER TO {other}")

    def _name(self, connection: AsyncConnection, suffix: str = "") -> str:
        """Return the name of the table, or of one of its partitions, quoted for SQL."""
        preparer = connection.dialect.identifier_preparer
        name = preparer.quote(self._name_with(suffix) if suffix else self._table.name)
        return name if self._table.schema is None else f"{preparer.quote(self._table.schema)}.{name}"

    def _name_with(self, suffix: str) -> str:
        return f"{self._table.name}_{suffix}"


def _suffix(since: datetime) -> str:
    return f"{since:%Y%m%d_%H%M%S}"


def _literal(moment: datetime) -> str:
    return f"'{moment.isoformat()}'"


async def set_timeouts(connection: AsyncConnection, *, lock: float, statement: float) -> None:
    """Set the seconds that the server waits for a lock and works on a statement, until the end of the transaction."""
    for name, seconds in (("lock_timeout", lock), ("statement_timeout", statement)):
        await connection.exec_driver_sql(f"SET LOCAL {name} = {max(1, int(seconds * 1000))}")


def sqlstate_of(error: DBAPIError) -> str | None:
    """Return the SQLSTATE of an error, if it has one."""
    return getattr(error.orig, "sqlstate", None)


def start_of_range(moment: datetime, every: timedelta) -> datetime:
    """Return the start of the range of times with a moment: ranges begin at multiples of their length, in UTC."""
    return moment - (moment - EPOCH) % every
