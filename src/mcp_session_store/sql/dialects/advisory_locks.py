"""Advisory locks of Postgres: one for each running instance, which the server releases with the connection."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from mcp_session_store.sql.dialects.dialect import LocksSeen

if TYPE_CHECKING:
    from collections.abc import Collection

    from sqlalchemy.ext.asyncio import AsyncConnection

__all__ = ["LOCK_CLASS", "lock_number", "locks_seen", "release_lock", "take_lock"]

LOCK_CLASS: Final = 0x6D637073
"""First key of the locks, "mcps": applications take advisory locks of their own in the same space."""

# Shared, because an instance that has lost its connection takes the lock on another one while the server may not know
# yet that the first is lost. No one takes it otherwise, not even to try it: that would keep its owner from it.
_KEYS: Final = (sa.literal(LOCK_CLASS, sa.Integer), sa.bindparam("number", type_=sa.Integer))
_TAKE: Final = sa.select(sa.func.pg_try_advisory_lock_shared(*_KEYS, type_=sa.Boolean))
_RELEASE: Final = sa.select(sa.func.pg_advisory_unlock_shared(*_KEYS, type_=sa.Boolean))


def _look() -> sa.Executable:
    """Return the query for the start of the server and the numbers that are locked, which any role may ask."""
    locks = sa.table(
        "pg_locks",
        *(sa.column(name) for name in ("locktype", "database", "classid", "objid", "objsubid", "granted")),
        schema="pg_catalog",
    )
    databases = sa.table("pg_database", sa.column("oid"), sa.column("datname"), schema="pg_catalog")
    here = sa.select(databases.c.oid).where(databases.c.datname == sa.func.current_database()).scalar_subquery()
    locked = sa.select(sa.cast(locks.c.objid, sa.BigInteger)).where(
        locks.c.locktype == sa.literal("advisory", sa.Text),
        locks.c.database == here,
        sa.cast(locks.c.classid, sa.BigInteger) == sa.literal(LOCK_CLASS, sa.BigInteger),
        locks.c.objsubid == sa.literal_column("2", sa.Integer),  # a lock with two keys
        locks.c.granted,
    )
    microseconds = sa.extract("epoch", sa.func.pg_postmaster_start_time()) * sa.literal_column("1000000")
    return sa.select(
        sa.cast(sa.cast(microseconds, sa.BigInteger), sa.Text).label("epoch"),
        sa.func.array(locked.scalar_subquery(), type_=postgresql.ARRAY(sa.BigInteger)).label("locked"),
    )


_LOOK: Final = _look()


def lock_number(name: str) -> int:
    """Return the second key of an instance's lock, as `pg_locks` has it."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")


async def take_lock(connection: AsyncConnection, name: str) -> bool:
    """Take the lock of an instance on a connection, for as long as it is open; return whether it has it."""
    return bool((await connection.execute(_TAKE, _parameters(name))).scalar_one())


async def release_lock(connection: AsyncConnection, name: str) -> None:
    """Release the lock of an instance that this connection has."""
    await connection.execute(_RELEASE, _parameters(name))


def _parameters(name: str) -> dict[str, int]:
    number = lock_number(name)
    return {"number": number - 2**32 if number >= 2**31 else number}


async def locks_seen(connection: AsyncConnection, names: Collection[str]) -> LocksSeen:
    """Return which locks of instances are taken, as this connection sees them."""
    row = (await connection.execute(_LOOK)).one()
    locked = set(row.locked)
    return LocksSeen(row.epoch, {name: lock_number(name) in locked for name in names})
