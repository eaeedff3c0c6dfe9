"""py-key-value's `AsyncKeyValue` on Postgres and SQLite."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Final, SupportsFloat
from uuid import UUID

from mcp_session_store import telemetry
from mcp_session_store.errors import ConfigurationError
from mcp_session_store.settings import DEFAULT_TIMEOUT
from mcp_session_store.sql.batching import Batcher, Lane
from mcp_session_store.sql.key_value.statements import Put, ValueStatements
from mcp_session_store.sql.schema.tables import privileges_for_values
from mcp_session_store.sql.sessions.beside import BesideStore
from mcp_session_store.sql.sessions.values import ValueSweep
from mcp_session_store.store import DEFAULT_NAMESPACE, SWEEP_LIMIT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy.engine import URL
    from sqlalchemy.ext.asyncio import AsyncEngine

    from mcp_session_store.sql.key_value.statements import Found
    from mcp_session_store.sql.sessions.store import SqlSessionStore

__all__ = ["SqlKeyValue"]

DEFAULT_COLLECTION: Final = "default_collection"
"""Collection of values for which none is named, as in py-key-value's own stores."""

READ_AT_ONCE: Final = 20
"""Number of values that a statement returns at most, because each may have `max_value_bytes`."""

LONGEST_TTL: Final = timedelta(days=36_500).total_seconds()
"""A longer life is cut to this, because the databases have a last moment."""


class SqlKeyValue(BesideStore):
    """Values under keys in Postgres or SQLite, shared by any number of processes: an `AsyncKeyValue` of py-key-value.

    For whatever takes one, such as `OAuthProxy(client_storage=…)` of FastMCP: a client that has logged in on one
    process is then logged in on all, and stays so after a restart. Values are stored as they are given: wrap it in
    py-key-value's `FernetEncryptionWrapper` where they are secrets.

    Of keys a digest is stored, so that none can be read in the database, and none can be listed. A value with a `ttl`
    expires by the database's clock, and is removed by the sweep of a session store in this namespace, which every
    server runs, by `mcp-session-store sweep`, or by `cull`. py-key-value 0.4.6 and later work; the package itself is
    needed for its errors alone.

    Args:
        where: The store of a server's sessions, whose database, namespace, schema and connections are used, or a URL or
            engine of a database, as `SqlSessionStore` takes them. A store must stay open as long as this.
        namespace: Keeps servers apart that share a database.
        schema: Postgres: the schema with the tables. The first of the search path unless given.
        auto_upgrade: Run the migrations on first contact where the schema is missing or behind.
        pool_size: As for `SqlSessionStore`, where its URL is given.
        timeout: Seconds that a call takes at most.
        default_collection: Collection of values for which none is named.
        max_value_bytes: Highest number of bytes of a value, as JSON.
        max_total_bytes: Highest number of bytes of all values of the namespace. Each process may exceed it by a
            hundredth of the room that was left.

    Raises:
        ConfigurationError: An argument cannot work; the message names it.
    """

    def __init__(
        self,
        where: SqlSessionStore | str | URL | AsyncEngine,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        schema: str | None = None,
        auto_upgrade: bool = False,
        timeout: float = DEFAULT_TIMEOUT,
        pool_size: int | None = None,
        default_collection: str = DEFAULT_COLLECTION,
        max_value_bytes: int = 1024**2,
        max_total_bytes: int = 1024**3,
    ) -> None:
        super().__init__(
            where,
            namespace=namespace,
            schema=schema,
            auto_upgrade=auto_upgrade,
            timeout=timeout,
            pool_size=pool_size,
        )
        for name, size in (("max_value_bytes", max_value_bytes), ("max_total_bytes", max_total_bytes)):
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ConfigurationError(f"{name}={size!r} must be a number of bytes, 1 or more")
        if not isinstance(default_collection, str) or not default_collection:
            raise ConfigurationError(f"default_collection={default_collection!r} must be a text that is not empty")
        self._default_collection = default_collection
        self._max_value_bytes = max_value_bytes
        database, dialect, schema = self._database, self._database.dialect, self._database.schema
        database.need(privileges_for_values(schema))
        statements = ValueStatements(dialect, schema=schema, namespace=self._namespace, max_total_bytes=max_total_bytes)
        of = partial(telemetry.of_operation, self._namespace)
        self._gets = Batcher(database, statements.read, of("value_get"), writes=False, max_batch=READ_AT_ONCE)
        # One in each statement, so that no two instances wait for one another in a circle.
        self._puts = Batcher(database, statements.put, of("value_put"), writes=True, max_batch=1)
        self._deletes = Batcher(database, statements.delete, of("value_delete"), writes=True, max_batch=1)
        self._reads = Lane(database, of("value_get"), writes=False)
        sweep = ValueSweep(dialect, schema=schema, namespace=self._namespace)
        self._sweeps = Batcher(database, sweep.remove, of("value_sweep"), writes=True, max_batch=1)
        self._batchers = (self._gets, self._puts, self._deletes, self._reads, self._sweeps)

    async def get(self, key: str, *, collection: str | None = None) -> dict[str, Any] | None:
        """Return the value under a key of a collection; `None` where there is none, or it has expired."""
        return (await self.ttl(key, collection=collection))[0]

    async def ttl(self, key: str, *, collection: str | None = None) -> tuple[dict[str, Any] | None, float | None]:
        """Return the value under a key, and the seconds until it expires; `None` for each that there is not."""
        return _decoded(await self._gets.submit(self._digest(collection, key)))

    async def put(
        self, key: str, value: Mapping[str, Any], *, collection: str | None = None, ttl: SupportsFloat | None = None
    ) -> None:
        """Store a value under a key of a collection, durably before this returns.

        Args:
            key: The key.
            value: An object of JSON.
            collection: The collection; `default_collection` unless given.
            ttl: Seconds after which the value expires; never unless given.

        Raises:
            SerializationError: The value is no object of JSON; an error of py-key-value, as are the next two.
            ValueTooLargeError: It has more than `max_value_bytes`.
            InvalidTTLError: `ttl` is no number of seconds above 0.
            KeyValueFull: The values of the namespace have `max_total_bytes` already.
            StoreUnavailable: The database is away; and other errors as for `SessionStore`.
        """
        await self._store_one(self._made(key, value, collection, _checked_ttl(ttl)))

    async def delete(self, key: str, *, collection: str | None = None) -> bool:
        """Remove the value under a key of a collection, and return whether there was one."""
        return await self._deletes.submit(self._digest(collection, key))

    async def get_many(self, keys: Sequence[str], *, collection: str | None = None) -> list[dict[str, Any] | None]:
        """Return the value under each key; see `get`."""
        return [value for value, _ in await self.ttl_many(keys, collection=collection)]

    async def ttl_many(
        self, keys: Sequence[str], *, collection: str | None = None
    ) -> list[tuple[dict[str, Any] | None, float | None]]:
        """Return the value under each key, and the seconds until it expires; see `ttl`."""
        found = await asyncio.gather(*(self._gets.submit(self._digest(collection, key)) for key in keys))
        return [_decoded(one) for one in found]

    async def put_many(
        self,
        keys: Sequence[str],
        values: Sequence[Mapping[str, Any]],
        *,
        collection: str | None = None,
        ttl: SupportsFloat | None = None,
    ) -> None:
        """Store values under keys one after the other; see `put`. A value that is refused stores none of them."""
        if len(keys) != len(values):
            raise ValueError(f"put_many was called with {len(keys)} keys and {len(values)} values")
        seconds = _checked_ttl(ttl)
        puts = [self._made(key, value, collection, seconds) for key, value in zip(keys, values, strict=True)]
        for put in puts:
            await self._store_one(put)

    async def delete_many(self, keys: Sequence[str], *, collection: str | None = None) -> int:
        """Remove the values under keys, and return how many there were."""
        return sum([await self.delete(key, collection=collection) for key in keys])

    async def cull(self) -> None:
        """Remove the values of the namespace that have expired."""
        while (await self._sweeps.submit(SWEEP_LIMIT)).more:
            pass

    async def _store_one(self, put: Put) -> None:
        if (refusal := await self._puts.submit(put)) is not None:
            raise refusal

    def _digest(self, collection: str | None, key: str) -> UUID:
        """Return the primary key of a value: UUID version 8 made of namespace, collection and key."""
        # As JSON, because each of the three may hold any character.
        text = json.dumps([self._namespace, collection or self._default_collection, key])
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16])
        return UUID(int=number & ~(0xF << 76) & ~(0x3 << 62) | 8 << 76 | 2 << 62)

    def _made(self, key: str, value: Mapping[str, Any], collection: str | None, ttl: float | None) -> Put:
        text = _encoded(value)
        if len(text) > self._max_value_bytes:
            from key_value.aio.errors import ValueTooLargeError

            raise ValueTooLargeError(size=len(text), max_size=self._max_value_bytes, collection=collection)
        named = collection or self._default_collection
        return Put(self._digest(named, key), json.dumps(named)[1:-1], text, len(text), ttl)


def _encoded(value: Mapping[str, Any]) -> str:
    """Return the JSON of a value, in ASCII, so that any text can be stored."""
    problem = "a value must be a mapping whose keys are texts"
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        try:
            return json.dumps(dict(value))
        except (TypeError, ValueError, RecursionError) as error:
            problem = f"a value cannot be written as JSON: {type(error).__name__}"
    from key_value.aio.errors import SerializationError

    # Not from the encoder's error, which may quote the value.
    raise SerializationError(problem)


def _decoded(found: Found | None) -> tuple[dict[str, Any] | None, float | None]:
    if found is None:
        return None, None
    try:
        value = json.loads(found.value)
    except (TypeError, ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        return value, found.ttl
    from key_value.aio.errors import DeserializationError

    raise DeserializationError("a value that is stored is no object of JSON")


def _checked_ttl(ttl: SupportsFloat | None) -> float | None:
    """Return a life in seconds."""
    if ttl is None:
        return None
    try:
        seconds = math.nan if isinstance(ttl, bool | str) else float(ttl)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if seconds > 0:
        return min(seconds, LONGEST_TTL)
    from key_value.aio.errors import InvalidTTLError

    raise InvalidTTLError(ttl=ttl)
