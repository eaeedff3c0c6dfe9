"""Statements on values that belong to no session."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import sqlalchemy as sa

from mcp_session_store.errors import KeyValueFull
from mcp_session_store.sql.dialects.functions import StoreClock
from mcp_session_store.sql.schema.tables import values_table

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from mcp_session_store.sql.database import Attempt
    from mcp_session_store.sql.dialects.compiled import Rows, Steps
    from mcp_session_store.sql.dialects.dialect import Dialect

__all__ = ["Found", "Put", "ValueStatements"]

SPARE_FOR: Final = 300.0
"""Seconds after which the bytes of a namespace are counted again, however much room there was."""

FULL_FOR: Final = 1.0
"""Seconds for which further values are refused without counting."""


class Put(NamedTuple):
    """A value to store."""

    key: UUID
    collection: str
    value: str
    size: int
    """Bytes of the value."""
    ttl: float | None
    """Seconds for which it is kept; `None`: until it is replaced or deleted."""


class Found(NamedTuple):
    """A value that is stored."""

    value: str
    ttl: float | None
    """Seconds for which it is still kept; `None`: until it is replaced or deleted."""


class ValueStatements:
    """Statements on the values of one namespace.

    The bytes of all values are not counted each time: while there was much room a moment ago, an instance may use a
    hundredth of it without counting.

    Args:
        dialect: The database's dialect.
        schema: The schema with the tables; the connection's default unless given.
        namespace: The namespace of the values.
        max_total_bytes: Highest number of bytes of all its values.
    """

    def __init__(self, dialect: Dialect, *, schema: str | None, namespace: str, max_total_bytes: int) -> None:
        self._dialect = dialect
        self._max_total_bytes = max_total_bytes
        self._spare = 0
        """Bytes that may be stored without counting."""
        self._spare_until = -math.inf
        self._full_until = -math.inf
        table = values_table(schema)
        c = table.c
        key = sa.bindparam("value_key", type_=sa.Uuid)
        is_kept = sa.or_(c.expires_at.is_(None), c.expires_at > StoreClock())
        self._keys = dialect.batch("value_keys", {"key": sa.Uuid()})
        self._read = dialect.precompiled(
            sa.select(c.key, c.value, c.expires_at, StoreClock()).where(self._keys.in_batch(c.key), is_kept)
        )
        changed: dict[str, sa.ColumnElement[Any]] = {
            "bytes": sa.bindparam("value_bytes", type_=sa.Integer),
            "created_at": StoreClock(),
            "expires_at": StoreClock(sa.bindparam("value_ttl", type_=sa.Double)),
            "value": sa.bindparam("value_text", type_=sa.Text),
        }
        values: dict[str, sa.ColumnElement[Any]] = {
            "key": key,
            "namespace": sa.literal(namespace, sa.Text),
            "collection": sa.bindparam("value_collection", type_=sa.Text),
            **changed,
        }
        replace = sa.update(table).where(c.key == key).values(changed).returning(c.key)
        self._replace = dialect.precompiled(replace)
        self._replace_larger = dialect.precompiled(replace.where(c.bytes >= changed["bytes"]))
        self._insert = dialect.precompiled(
            dialect.insert_if_absent(table, list(values), sa.select(*values.values())).returning(c.key)
        )
        self._delete = dialect.precompiled(sa.delete(table).where(c.key == key).returning(c.expires_at, StoreClock()))
        self._total = dialect.precompiled(
            sa.select(sa.func.coalesce(sa.func.sum(c.bytes), 0)).where(c.namespace == sa.literal(namespace, sa.Text))
        )

    async def read(self, attempt: Attempt, keys: Sequence[UUID]) -> list[Found | None]:
        """Return what is stored under each key; `None` where that is nothing, or has expired."""
        return await self._dialect.run(attempt.connection, self._read_all(keys), writes=False)

    def _read_all(self, keys: Sequence[UUID]) -> Steps[list[Found | None]]:
        driver_keys = {key: self._dialect.driver_key(key) for key in keys}
        rows = yield self._read, self._keys.parameters([(key,) for key in driver_keys.values()])
        found = {self._dialect.key(row[0]): Found(row[1], self._ttl(row[2], row[3])) for row in rows}
        return [found.get(key) for key in keys]

    async def put(self, attempt: Attempt, puts: Sequence[Put]) -> list[KeyValueFull | None]:
        """Store values one after the other; return the refusal of each for which there is no room."""
        return [await self._dialect.run(attempt.connection, self._put(put), writes=True) for put in puts]

    def _put(self, put: Put) -> Steps[KeyValueFull | None]:
        values = {
            "value_key": self._dialect.driver_key(put.key),
            "value_bytes": put.size,
            "value_ttl": put.ttl,
            "value_text": put.value,
        }
        if put.size > self._spare or time.monotonic() > self._spare_until:
            # What takes no more room than before is stored, however full it is: a login that is renewed.
            if (yield self._replace_larger, values):
                return None
            if (refusal := (yield from self._make_sure_of_room(put.size))) is not None:
                return refusal
        # Where another transaction inserts between the two, its value stands in place of this one, as if it had come
        # after it. Two rounds, because it may be deleted at once.
        for _ in range(2):
            replaced = yield self._replace, values
            if replaced or (yield self._insert, values | {"value_collection": put.collection}):
                break
        self._spare -= put.size
        return None

    def _make_sure_of_room(self, size: int) -> Steps[KeyValueFull | None]:
        """Count the bytes that are stored; return the refusal of a value for which there is no room."""
        now = time.monotonic()
        room = 0
        if now >= self._full_until:
            ((stored,),) = yield self._total, {}
            room = self._max_total_bytes - int(stored)
            if room <= 0:
                self._full_until = now + FULL_FOR
        if size > room:
            return KeyValueFull(
                f"the values of this namespace would have more than {self._max_total_bytes} bytes with this one, and "
                "max_total_bytes allows no more"
            )
        self._spare = max(size, room // 100)
        self._spare_until = now + SPARE_FOR
        return None

    async def delete(self, attempt: Attempt, keys: Sequence[UUID]) -> list[bool]:
        """Remove what is stored under keys one after the other; return for each whether there was anything."""
        return [await self._dialect.run(attempt.connection, self._remove(key), writes=True) for key in keys]

    def _remove(self, key: UUID) -> Steps[bool]:
        rows: Rows = yield self._delete, {"value_key": self._dialect.driver_key(key)}
        return any(ttl is None or ttl > 0 for ttl in (self._ttl(*row) for row in rows))

    def _ttl(self, expires_at: object, now: object) -> float | None:
        if expires_at is None:
            return None
        until, present = self._dialect.moments([expires_at, now])
        return float((until - present).total_seconds())
