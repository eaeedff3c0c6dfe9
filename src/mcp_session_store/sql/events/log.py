"""Events in a SQL database: the contract of `EventLog` on Postgres and SQLite."""

from __future__ import annotations

import logging
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Final
from uuid import UUID

from mcp_session_store import telemetry
from mcp_session_store.errors import EventTooLarge
from mcp_session_store.event_log import EVENT_PAGE, EVENT_SWEEP_LIMIT, LARGE_APPEND, EventLog
from mcp_session_store.records import check_texts, checked_size
from mcp_session_store.retention import EventSweepReport
from mcp_session_store.settings import DEFAULT_TIMEOUT
from mcp_session_store.sql.batching import Batcher, Lane
from mcp_session_store.sql.engine import url_of
from mcp_session_store.sql.events.append import Append, EventWriter
from mcp_session_store.sql.events.read import EventReader, Read
from mcp_session_store.sql.events.tail import LogTail
from mcp_session_store.sql.events.trim import EventTrimming, logs_per_step
from mcp_session_store.sql.failures import hide_secrets, summary_of
from mcp_session_store.sql.notifications import EVENT_CHANNEL
from mcp_session_store.sql.schema.tables import privileges_for_events
from mcp_session_store.sql.sessions.beside import BesideStore
from mcp_session_store.store import DEFAULT_NAMESPACE, check_keys

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from sqlalchemy.engine import URL
    from sqlalchemy.ext.asyncio import AsyncEngine

    from mcp_session_store.records import EventPage, NewEvent
    from mcp_session_store.retention import EventPolicy
    from mcp_session_store.sql.database import Attempt
    from mcp_session_store.sql.sessions.store import SqlSessionStore
    from mcp_session_store.store import SessionStore

__all__ = ["SqlEventLog"]

logger = logging.getLogger(__name__)

KEYS_SHOWN: Final = 5
"""Keys of sessions that one log record names at most."""


class SqlEventLog(BesideStore, EventLog):
    """Events in Postgres or SQLite, shared by any number of processes.

    Events of all sessions that are stored at once share a commit; a lone event is stored at once. All calls share the
    connections of the store, the one that listens included.

    Args:
        where: The store of the sessions that the events belong to, or a URL or engine of its database, as
            `SqlSessionStore` takes them. Of a store, the database, namespace and schema are taken, and its
            connections are used: it must stay open as long as this log.
        namespace: As for the store that the sessions are in.
        schema: Postgres: the schema with the tables. The first of the search path unless given.
        auto_upgrade: Run the migrations on first contact where the schema is missing or behind.
        pool_size: As for `SqlSessionStore`, where its URL is given.
        timeout: Seconds that a call takes at most. A large append waits longer while others before it are stored.
        policy: See `EventLog`.

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
        policy: EventPolicy | None = None,
    ) -> None:
        EventLog.__init__(self, policy=policy)
        self._max_bytes = self.policy.max_bytes_per_session
        BesideStore.__init__(
            self,
            where,
            namespace=namespace,
            schema=schema,
            auto_upgrade=auto_upgrade,
            timeout=timeout,
            pool_size=pool_size,
        )
        database, namespace = self._database, self._namespace
        dialect, schema = database.dialect, database.schema
        database.need(privileges_for_events(schema))
        self._writer = EventWriter(dialect, schema=schema, namespace=namespace)
        self._reader = EventReader(dialect, schema=schema, namespace=namespace)
        self._tail = LogTail(dialect, schema=schema, namespace=namespace)
        self._trimming = EventTrimming(dialect, schema=schema, namespace=namespace, policy=self.policy)
        of = partial(telemetry.of_operation, namespace)
        self._appends, self._large_appends = (
            Batcher(database, self._append_all, of("append"), writes=True, weigh=attrgetter("size"), patient=is_large)
            for is_large in (False, True)
        )
        # One call at a time, so that a page has its own timeout, and its memory is released as soon as it is sent.
        self._pages = Lane(database, of("read"), writes=False)
        # Not behind the pages, because all followers wait for these, and calls before they begin.
        self._heads = Batcher(database, self._tail.heads, of("heads"), writes=False)
        self._places = Batcher(database, self._tail.standalone_places, of("standalone_places"), writes=False)
        self._reads = Lane(database, of("event_reads"), writes=False)
        self._chores = Lane(database, of("event_chores"), writes=True)
        self._batchers = (
            self._appends,
            self._large_appends,
            self._pages,
            self._heads,
            self._places,
            self._reads,
            self._chores,
        )

    def is_of(self, store: SessionStore) -> bool:
        return store is self._store

    async def append(self, key: UUID, events: Sequence[NewEvent], *, again: bool = False) -> int | None:
        if key.__class__ is not UUID:  # without a call, because each event comes by here
            check_keys(key)
        sizes = [checked_size(event) for event in events]
        size = sum(sizes)
        if size > self._max_bytes:
            raise EventTooLarge(f"events are larger than the policy's max_bytes_per_session of {self._max_bytes}")
        append = Append(key, events, sizes, size, again)
        return await self._lane_of(append).submit(append)

    def _lane_of(self, append: Append) -> Batcher[Append, int | None]:
        """Return the lane of an append: large ones have one of their own, so that small ones do not wait for them.

        All appends of a session that are pending are in one lane, so that they are stored in their order.
        """
        is_large = append.size > LARGE_APPEND
        if not is_large and not self._large_appends.busy:
            return self._appends
        lane, other = self._appends, self._large_appends
        if is_large:
            lane, other = other, lane
        return other if any(pending.key == append.key for pending in other.pending()) else lane

    async def read(self, key: UUID, stream: str, *, after: int, limit: int = EVENT_PAGE) -> EventPage | None:
        check_keys(key)
        check_texts(stream=stream)
        wanted = Read(key, stream, after, limit)
        return await self._pages.run(lambda attempt: self._reader.page(attempt, wanted))

    async def heads(self, keys: Collection[UUID]) -> dict[UUID, int]:
        check_keys(*keys)
        return await self._heads.submit(keys) if keys else {}

    async def standalone_places(self, keys: Collection[UUID]) -> dict[UUID, int]:
        check_keys(*keys)
        return await self._places.submit(keys) if keys else {}

    async def follow(self, keys: Collection[UUID]) -> None:
        check_keys(*keys)
        if keys and self._database.dialect.has_notifications:
            await self._chores.run(lambda attempt: self._tail.follow(attempt, keys))

    async def listen(self, on_hint: Callable[[Collection[UUID] | None], None]) -> None:
        """See `EventLog.listen`. On Postgres it takes a connection; on SQLite there are no hints."""
        await self._listener.listen(EVENT_CHANNEL, on_hint)

    async def sweep(self, *, limit: int = EVENT_SWEEP_LIMIT) -> EventSweepReport:
        logs = logs_per_step(limit)
        due = await self._reads.run(lambda attempt: self._trimming.due(attempt, limit=logs))
        if not due:
            return EventSweepReport()
        each = max(1, limit // len(due))
        trimmed = await self._chores.run(lambda attempt: self._trimming.trim(attempt, due, limit=each, wait=False))
        # Logs whose events were dropped with a partition are only updated. Events that become too old meanwhile are
        # left to the next sweep.
        more = trimmed.more or (trimmed.logs > 0 and (len(due) == logs or not trimmed.removed))
        return EventSweepReport(removed=trimmed.removed, more=more, longest=trimmed.held_up)

    async def _append_all(self, attempt: Attempt, appends: Sequence[Append]) -> list[int | None]:
        first, logs = await self._writer.append(attempt, appends)
        if exceeded := [key for key, log in logs if self._trimming.exceeded(log.kept, log.kept_bytes)]:
            try:
                await self._trim(attempt, exceeded)
            except Exception as error:
                # Not raised, because the events are stored, and the next append will find too many again.
                hide_secrets(error, url_of(self._database.engine))
                logger.warning(
                    "events beyond the policy's limits could not be removed from the logs of the sessions %s: %s",
                    _shown(exceeded),
                    summary_of(error, self._database.dialect),
                )
        return first

    async def _trim(self, attempt: Attempt, keys: Sequence[UUID]) -> None:
        more = True
        while more:
            more = (await self._trimming.trim(attempt, keys, limit=EVENT_SWEEP_LIMIT, wait=True)).more


def _shown(keys: Sequence[UUID]) -> str:
    """Return the keys as text; of many only the first."""
    others = len(keys) - KEYS_SHOWN
    return ", ".join(map(str, keys[:KEYS_SHOWN])) + (f" and {others} more" if others > 0 else "")
