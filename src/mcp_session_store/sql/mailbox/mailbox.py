"""Messages between instances in a SQL database: the contract of `Mailbox` on Postgres and SQLite."""

from __future__ import annotations

from collections import Counter
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Final

from mcp_session_store import telemetry
from mcp_session_store.mailbox import (
    MESSAGE_PAGE,
    MESSAGE_SWEEP_LIMIT,
    Mailbox,
    MailboxSweepReport,
    check_messages,
    check_presence,
)
from mcp_session_store.records import check_texts, instance_name
from mcp_session_store.settings import DEFAULT_TIMEOUT
from mcp_session_store.sql.batching import Batcher, Lane
from mcp_session_store.sql.dialects.channel import NotificationChannel
from mcp_session_store.sql.mailbox.instances import Instances
from mcp_session_store.sql.mailbox.post import Post, PostStatements
from mcp_session_store.sql.mailbox.receive import Receive, ReceiveStatements
from mcp_session_store.sql.mailbox.say import Say, SayStatements
from mcp_session_store.sql.mailbox.sweep import MessageSweep
from mcp_session_store.sql.mailbox.take import Take, TakeStatements
from mcp_session_store.sql.notifications import MAIL_CHANNELS
from mcp_session_store.sql.schema.tables import privileges_for_mailbox
from mcp_session_store.sql.sessions.beside import BesideStore
from mcp_session_store.store import DEFAULT_NAMESPACE, check_keys
from mcp_session_store.stream_mail import check_stream_messages

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from uuid import UUID

    from sqlalchemy.engine import URL
    from sqlalchemy.ext.asyncio import AsyncEngine

    from mcp_session_store.mailbox import MessagePage, NewMessage, Presence, RunningInstance
    from mcp_session_store.records import Heartbeat
    from mcp_session_store.sql.database import Attempt
    from mcp_session_store.sql.mailbox.sweep import SweepLook
    from mcp_session_store.sql.sessions.store import SqlSessionStore
    from mcp_session_store.stream_mail import NewStreamMessage, Said, StreamPage, Withdrawal

__all__ = ["SqlMailbox"]

MAX_GIVEN: Final = 10_000
"""Number of sessions for which is remembered what was given to their streams."""
TAKES_PER_STATEMENT: Final = 20
"""Number of sessions whose messages are taken together at most, because each may have a mebibyte."""


class SqlMailbox(BesideStore, Mailbox):
    """Messages between instances in Postgres or SQLite, shared by any number of processes.

    Messages that are posted at once share a commit. All calls share the connections of the store, the one
    that listens included.

    Args:
        where: The store of the sessions that the messages belong to, or a URL or engine of its database, as
            `SqlSessionStore` takes them. Of a store, the database, namespace and schema are taken, and its
            connections are used: it must stay open as long as this mailbox.
        namespace: As for the store that the sessions are in.
        schema: Postgres: the schema with the tables. The first of the search path unless given.
        auto_upgrade: Run the migrations on first contact where the schema is missing or behind.
        pool_size: As for `SqlSessionStore`, where its URL is given.
        timeout: Seconds that a call takes at most.

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
    ) -> None:
        super().__init__(
            where,
            namespace=namespace,
            schema=schema,
            auto_upgrade=auto_upgrade,
            timeout=timeout,
            pool_size=pool_size,
        )
        database, dialect, schema = self._database, self._database.dialect, self._database.schema
        database.need(privileges_for_mailbox(schema))
        self._instances = Instances(dialect, schema=schema, namespace=self._namespace)
        self._posting = PostStatements(dialect, schema=schema, namespace=self._namespace)
        self._reading = ReceiveStatements(dialect, schema=schema)
        self._saying = SayStatements(dialect, schema=schema, namespace=self._namespace, posting=self._posting)
        self._taking = TakeStatements(dialect, schema=schema, namespace=self._namespace)
        self._sweeping = MessageSweep(dialect, schema=schema)
        self._removed: dict[int, dict[int, int]] = {}
        """Highest sequences that are known to be removed, by recipient and sender."""
        self._unknown: dict[int, dict[int, int]] = {}
        """Highest sequences of messages that were dropped, by recipient and sender; see `Received.unknown`."""
        self._given: dict[UUID, dict[int, int]] = {}
        """Highest sequences of what was given to streams and is removed, by session and sender."""
        of = partial(telemetry.of_operation, self._namespace)
        # One lane for all that is posted, so that commits come in the order of the calls.
        self._posts = Batcher(database, self._posting.post, of("post"), writes=True, weigh=attrgetter("size"))
        self._says = Batcher(database, self._saying.say, of("say"), writes=True, weigh=attrgetter("size"))
        self._takes = Batcher(database, self._taking.take, of("take"), writes=True, max_batch=TAKES_PER_STATEMENT)
        self._streams = Lane(database, of("withdraw"), writes=True)
        # A lane for each, because on SQLite a receive that removes nothing waits for no writer.
        self._receives = Lane(database, of("receive"), writes=False)
        self._removals = Lane(database, of("receive"), writes=True)
        self._reads = Lane(database, of("instances"), writes=False)
        self._sweeps = Lane(database, of("mailbox_sweep"), writes=True)
        # Not behind others, because an instance that waits there is taken for dead.
        self._beats = Lane(database, of("beat"), writes=True)
        self._batchers = (
            self._posts,
            self._says,
            self._takes,
            self._streams,
            self._receives,
            self._removals,
            self._reads,
            self._sweeps,
            self._beats,
        )

    @property
    def hears(self) -> bool:
        return self._listener.hears

    async def beat(self, presence: Presence) -> bool:
        check_presence(presence)
        held = presence.held and self._listener.holds(instance_name(presence.instance))
        return await self._beats.run(lambda attempt: self._instances.beat(attempt, presence, held=held))

    async def retire(self, instance: str) -> None:
        check_texts(instance=instance)
        await self._beats.run(lambda attempt: self._instances.remove(attempt, instance_name(instance)))

    async def last_beats(self, names: Collection[str]) -> dict[str, Heartbeat]:
        for name in names:
            check_texts(instance=name)
        if not names:
            return {}
        return await self._reads.run(lambda attempt: self._instances.last_beats(attempt, names))

    async def instances(self) -> Sequence[RunningInstance]:
        return await self._reads.run(self._instances.running)

    async def post(self, messages: Sequence[NewMessage]) -> set[int]:
        check_messages(messages)
        sizes = [_bytes_of(message.body) for message in messages]
        return await self._posts.submit(Post(messages, sizes, sum(sizes)))

    async def receive(self, recipient: int, *, delivered: Mapping[int, int], limit: int = MESSAGE_PAGE) -> MessagePage:
        removed = self._removed.setdefault(recipient, {})
        unknown = self._unknown.setdefault(recipient, {})
        read = {**delivered, **{sender: max(unknown[sender], delivered.get(sender, -1)) for sender in unknown}}
        wanted = Receive(recipient, read, dict(removed), limit)
        removes = bool(wanted.to_remove())
        lane = self._removals if removes else self._receives
        received = await lane.run(lambda attempt: self._reading.receive(attempt, wanted, removes=removes))
        for sender, sequence in read.items():
            removed[sender] = max(sequence, removed.get(sender, -1))
        unknown |= received.unknown
        return received.page

    async def say(self, messages: Sequence[NewStreamMessage]) -> Said:
        check_stream_messages(messages)
        sizes = [_bytes_of(message.body) for message in messages]
        return await self._says.submit(Say(messages, sizes, sum(sizes)))

    async def take(
        self, key: UUID, holder: int, *, given: Mapping[int, int], without_others: bool = False
    ) -> StreamPage:
        check_keys(key)
        take = Take(key, holder, dict(given), self._given.get(key, {}), without_others)
        page = await self._takes.submit(take)
        self._note_given(take)
        return page

    async def release(self, key: UUID, holder: int, *, given: Mapping[int, int]) -> None:
        check_keys(key)
        take = Take(key, holder, dict(given), self._given.get(key, {}))
        await self._streams.run(lambda attempt: self._taking.release(attempt, take))
        self._note_given(take)

    def _note_given(self, take: Take) -> None:
        """Note what is removed, so that the rows that were in its place are not passed again."""
        self._given.pop(take.key, None)
        self._given[take.key] = {**take.removed, **take.given}
        if len(self._given) > MAX_GIVEN:
            del self._given[next(iter(self._given))]

    async def withdraw(self, key: UUID, sender: int, sequence: int) -> Withdrawal:
        check_keys(key)
        return await self._streams.run(lambda attempt: self._taking.withdraw(attempt, key, sender, sequence))

    async def listen(
        self,
        on_hint: Callable[[], None],
        *,
        instance: str,
        number: int | None = None,
        on_held: Callable[[], None] | None = None,
    ) -> None:
        """See `Mailbox.listen`.

        On Postgres it takes a connection, which those of the store and of the event log share, and which also holds the
        lock of the instance; on SQLite there are no hints, and a file beside the database is locked.
        """
        check_texts(instance=instance)
        channel = NotificationChannel(f"{MAIL_CHANNELS}{number or 0}")
        name = instance_name(instance)
        await self._listener.listen(channel, lambda _: on_hint(), name=name, on_held=on_held)

    async def sweep(self, *, limit: int = MESSAGE_SWEEP_LIMIT) -> MailboxSweepReport:
        # Read first, so that a sweep without work waits for no writer.
        due = await self._reads.run(self._sweeping.look)
        if not any(due):
            return MailboxSweepReport()
        return await self._sweeps.run(lambda attempt: self._sweep(attempt, due, limit))

    async def _sweep(self, attempt: Attempt, due: SweepLook, limit: int) -> MailboxSweepReport:
        sweeping, none = self._sweeping, Counter[str]()
        instances = await sweeping.remove_silent(attempt) if due.instances else 0
        gone, unread = await sweeping.remove(attempt, limit=limit) if due.messages else (none, none)
        untaken, found_all = await sweeping.remove_of_streams(attempt, limit=limit) if due.of_streams else (none, True)
        return MailboxSweepReport(
            instances=instances,
            gone=gone,
            unread=unread,
            untaken=untaken,
            more=limit in (gone.total(), unread.total()) or not found_all,
        )


def _bytes_of(body: str) -> int:
    return len(body) if body.isascii() else len(body.encode())
