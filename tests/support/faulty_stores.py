"""A store and an event log that fail on command, and record their calls."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import anyio

from mcp_session_store import (
    EventLog,
    Mailbox,
    MemoryEventLog,
    MemoryMailbox,
    MemorySessionStore,
    MemoryStateStore,
    SessionStore,
    StateStore,
    StoreUnavailable,
    session_key,
)
from mcp_session_store.event_log import EVENT_PAGE, EVENT_SWEEP_LIMIT
from mcp_session_store.mailbox import MESSAGE_PAGE, MESSAGE_SWEEP_LIMIT
from mcp_session_store.state_store import STATE_SWEEP_LIMIT
from mcp_session_store.store import SWEEP_LIMIT, Absence
from mcp_session_store.stream_mail import Said
from tests.support.asgi import PATIENCE
from tests.support.internals import logs_of, rows_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
    from datetime import datetime, timedelta
    from uuid import UUID

    from mcp_session_store import EndReason, EventPolicy, RetentionPolicy, SessionRecord, StatePolicy
    from mcp_session_store.activity import Activity, Touched
    from mcp_session_store.mailbox import MailboxSweepReport, MessagePage, NewMessage, Presence, RunningInstance
    from mcp_session_store.records import (
        Changes,
        EventPage,
        Heartbeat,
        JournalEntry,
        NewEvent,
        NewSession,
        NewState,
        StoredEvent,
    )
    from mcp_session_store.retention import EventSweepReport, StateSweepReport, SweepReport
    from mcp_session_store.state_store import StoredState
    from mcp_session_store.stream_mail import NewStreamMessage, StreamPage, Withdrawal

OPERATIONS = (
    "open",
    "create",
    "load",
    "claim",
    "replace_initialize",
    "write_journal",
    "read_journal",
    "touch",
    "end",
    "changes",
    "sweep",
    "listen",
)
BACKGROUND = ("changes", "sweep", "listen")
"""Operations that no request causes: counted apart, because their time is not the test's."""
LOG_OPERATIONS = (
    "open",
    "append",
    "read",
    "heads",
    "standalone_places",
    "follow",
    "listen",
    "sweep",
)
LOG_BACKGROUND = ("open", "heads", "follow", "listen", "sweep")
MAILBOX_OPERATIONS = (
    "open",
    "beat",
    "retire",
    "last_beats",
    "instances",
    "post",
    "receive",
    "say",
    "take",
    "release",
    "withdraw",
    "listen",
    "sweep",
)
MAILBOX_BACKGROUND = tuple(name for name in MAILBOX_OPERATIONS if name not in ("post", "say"))


class Sessions(MemorySessionStore):
    """Sessions in memory, with a clock that can be put forward."""

    @property
    def ahead(self) -> timedelta:
        """How far the clock has been put forward."""
        return self.data.ahead

    @ahead.setter
    def ahead(self, ahead: timedelta) -> None:
        self.data.ahead = ahead


class Held:
    """Calls of a store that wait for the test."""

    def __init__(self) -> None:
        self.entered = anyio.Event()
        self._released = anyio.Event()
        self._failure: Exception | None = None
        self.calls = 0

    async def wait_entered(self) -> None:
        """Wait for the first call."""
        with anyio.fail_after(PATIENCE):
            await self.entered.wait()

    def release(self) -> None:
        """Release the calls, and all later ones."""
        self._released.set()

    def fail(self, failure: Exception) -> None:
        """Make the calls, and all later ones, raise this."""
        self._failure = failure
        self._released.set()

    async def stop_here(self) -> None:
        self.calls += 1
        self.entered.set()
        await self._released.wait()
        if self._failure is not None:
            raise self._failure


class _Faulty:
    """Passes each call on, after or before something goes wrong.

    Args:
        operations: Names of the operations.
        background: Names of those that no request causes.
    """

    def __init__(self, operations: Sequence[str], background: Sequence[str]) -> None:
        self.calls: list[str] = []
        """Names of the calls, in order, without those of the background."""
        self.background: Counter[str] = Counter()
        """Number of calls of the background, by name."""
        self._operations = operations
        self._in_background = background
        self._before: dict[str, Callable[[], Awaitable[None]]] = {}
        self._after: dict[str, Callable[[], Awaitable[None]]] = {}

    def counts(self) -> Counter[str]:
        """Return the number of calls by name, without those of the background."""
        return Counter(self.calls)

    # Faults

    def down(self, *operations: str) -> None:
        """Make these operations, or all, raise StoreUnavailable before they take effect."""
        self.failing(StoreUnavailable("the test says it is down"), *operations)

    def broken(self, *operations: str) -> None:
        """Make these operations, or all, fail as by a bug."""
        self.failing(RuntimeError("a bug"), *operations)

    def failing(self, error: Exception, *operations: str) -> None:
        """Make these operations, or all, raise this before they take effect."""
        self._raise(error, operations or self._operations, self._before)

    def lose_the_answer_of(self, *operations: str) -> None:
        """Make these operations take effect and then raise StoreUnavailable."""
        self._raise(StoreUnavailable("the test says the answer is lost"), operations, self._after)

    def hold(self, operation: str, *, after: bool = False) -> Held:
        """Hold calls of an operation until they are released, before or after they take effect."""
        held = Held()
        (self._after if after else self._before)[operation] = held.stop_here
        return held

    def before(self, operation: str, call: Callable[[], Awaitable[None]]) -> None:
        """Await `call` before each call of an operation takes effect."""
        self._before[operation] = call

    def up(self) -> None:
        """Remove all faults. Calls that are held stay held."""
        self._before.clear()
        self._after.clear()

    def _raise(
        self, error: Exception, operations: Sequence[str], faults: dict[str, Callable[[], Awaitable[None]]]
    ) -> None:
        async def fail() -> None:
            # A copy each time: an exception that is raised again gathers all tracebacks.
            raise copy.copy(error)

        faults.update(dict.fromkeys(operations, fail))

    async def _call(self, name: str, call: Callable[[], Awaitable[Any]]) -> Any:
        if name in self._in_background:
            self.background[name] += 1
        else:
            self.calls.append(name)
        if (before := self._before.get(name)) is not None:
            await before()
        result = await call()
        if (after := self._after.get(name)) is not None:
            await after()
        return result


class FaultyStore(_Faulty, SessionStore):
    """A store that fails on command.

    Args:
        inner: Where the sessions are; share it between two of these for two instances on one database.
    """

    def __init__(self, inner: MemorySessionStore | None = None) -> None:
        _Faulty.__init__(self, OPERATIONS, BACKGROUND)
        SessionStore.__init__(self)
        self.inner = inner or Sessions()
        self.mailbox = FaultyMailbox(self.inner)
        """Mailbox of the instance, unless it has an event log."""
        self.touches: list[list[Activity]] = []
        """The activities of each `touch`."""
        self.polled: list[tuple[datetime | None, Changes]] = []
        """Argument and result of each `changes`."""
        self.closed = 0
        self.hints = True
        """Whether hints of changes arrive."""
        self.claims_first = False
        """Whether loads leave out the store's time, so that a restore is claimed before its copy is published."""

    # Contents, past all faults

    async def record(self, session_id: str) -> SessionRecord | None:
        """Return the record of a live session."""
        return await self.inner.load(session_key(session_id))

    async def ended(self, session_id: str) -> EndReason | None:
        """Return why a session ended."""
        return rows_of(self.inner)[session_key(session_id)].ended

    async def expiry(self, session_id: str | None) -> timedelta | None:
        """Return the time from a live session's last stored activity to its expiry; `None`: it does not expire."""
        assert session_id is not None
        record = await self.record(session_id)
        assert record is not None, "the session is not live"
        return None if record.expires_at is None else record.expires_at - record.last_seen_at

    async def restored(self, session_id: str, times: int = 1) -> SessionRecord:
        """Wait until a number of restores of a session is stored, and return its record."""
        with anyio.fail_after(PATIENCE):
            while True:
                record = await self.record(session_id)
                if record is not None and record.restores >= times:
                    return record
                await anyio.sleep(0.01)

    def claims(self, session_id: str) -> list[Activity]:
        """Return the activities of a session that were reported with a claim."""
        key = session_key(session_id)
        return [one for touch in self.touches for one in touch if one.key == key and one.claimed_by is not None]

    @property
    def records(self) -> int:
        """Number of sessions that were ever stored."""
        return len(rows_of(self.inner))

    # The contract

    @property
    def retention(self) -> RetentionPolicy:
        return self.inner.retention

    @retention.setter
    def retention(self, policy: RetentionPolicy) -> None:
        self.inner.retention = policy

    @property
    def namespace(self) -> str:
        return self.inner.namespace

    async def open(self) -> None:
        await self._call("open", self.inner.open)

    async def aclose(self) -> None:
        self.closed += 1

    async def create(self, session: NewSession) -> SessionRecord:
        record: SessionRecord = await self._call("create", lambda: self.inner.create(session))
        return record

    async def find(self, key: UUID) -> SessionRecord | Absence:
        record: SessionRecord | Absence = await self._call("load", lambda: self.inner.find(key))
        return replace(record, loaded_at=None) if self.claims_first and not isinstance(record, Absence) else record

    async def load(self, key: UUID) -> SessionRecord | None:
        record: SessionRecord | None = await self._call("load", lambda: self.inner.load(key))
        return replace(record, loaded_at=None) if record is not None and self.claims_first else record

    async def claim(self, key: UUID, *, instance: str, restores: int) -> SessionRecord | None:
        record: SessionRecord | None = await self._call(
            "claim", lambda: self.inner.claim(key, instance=instance, restores=restores)
        )
        return record

    async def replace_initialize(
        self,
        key: UUID,
        *,
        initialize_params: str,
        protocol_version: str,
        client_name: str,
        client_version: str,
    ) -> bool:
        live: bool = await self._call(
            "replace_initialize",
            lambda: self.inner.replace_initialize(
                key,
                initialize_params=initialize_params,
                protocol_version=protocol_version,
                client_name=client_name,
                client_version=client_version,
            ),
        )
        return live

    async def touch(self, activities: Sequence[Activity]) -> Touched:
        self.touches.append(list(activities))
        touched: Touched = await self._call("touch", lambda: self.inner.touch(activities))
        return touched

    async def end(self, key: UUID, *, reason: EndReason) -> bool:
        ended: bool = await self._call("end", lambda: self.inner.end(key, reason=reason))
        return ended

    async def write_journal(self, key: UUID, *, method: str, subject: str, params: str | None) -> int | None:
        revision: int | None = await self._call(
            "write_journal", lambda: self.inner.write_journal(key, method=method, subject=subject, params=params)
        )
        return revision

    async def read_journal(self, key: UUID) -> Sequence[JournalEntry]:
        entries: Sequence[JournalEntry] = await self._call("read_journal", lambda: self.inner.read_journal(key))
        return entries

    async def changes(self, since: datetime | None) -> Changes:
        changes: Changes = await self._call("changes", lambda: self.inner.changes(since))
        self.polled.append((since, changes))
        return changes

    async def listen(self, on_hint: Callable[[Collection[UUID] | None], None]) -> None:
        await self._call("listen", lambda: self.inner.listen(on_hint) if self.hints else anyio.sleep_forever())

    async def sweep(self, *, limit: int = SWEEP_LIMIT) -> SweepReport:
        report: SweepReport = await self._call("sweep", lambda: self.inner.sweep(limit=limit))
        return report


class FaultyLog(_Faulty, EventLog):
    """An event log that fails on command.

    Args:
        store: Store of the sessions that the events belong to; two logs on one store's sessions are one log.
        policy: See `EventLog`.
    """

    def __init__(self, store: FaultyStore, *, policy: EventPolicy | None = None) -> None:
        _Faulty.__init__(self, (*LOG_OPERATIONS, *MAILBOX_OPERATIONS), LOG_BACKGROUND)
        self.inner = MemoryEventLog(store.inner, policy=policy)
        EventLog.__init__(self, policy=self.inner.policy)
        self.appended: list[tuple[str, bool]] = []
        """The first message of each `append`, empty for a priming event, and whether it was one `again`."""
        self.closed = 0
        self.hints = True
        """Whether hints of events arrive."""
        self.mailbox = FaultyMailbox(store.inner, faults=self)
        """Mailbox of the instance, which has the heartbeats. What fails for the log by name, or as a whole, fails for
        it, too."""

    # Contents, past all faults

    def stored(self, session_id: str | None) -> list[StoredEvent]:
        """Return the events of a session, of all streams, in their order."""
        return [event for _, event in self.streams(session_id)]

    def streams(self, session_id: str | None) -> list[tuple[str, StoredEvent]]:
        """Return the events of a session with the names of their streams, in their order."""
        assert session_id is not None
        log = logs_of(self.inner).get(session_key(session_id))
        return [] if log is None else [(stream, event) for stream, event, _ in log.events]

    def messages(self, session_id: str | None) -> list[str]:
        """Return the stored messages of a session, as JSON text."""
        return [event.message for event in self.stored(session_id) if event.message is not None]

    def lose(self, session_id: str | None) -> None:
        """Lose the events of a session, as after a restored backup."""
        assert session_id is not None
        del logs_of(self.inner)[session_key(session_id)]

    # The contract

    @property
    def namespace(self) -> str:
        return self.inner.namespace

    async def open(self) -> None:
        await self._call("open", self.inner.open)

    async def aclose(self) -> None:
        self.closed += 1

    async def append(self, key: UUID, events: Sequence[NewEvent], *, again: bool = False) -> int | None:
        # An event of no stream only tries whether storing works.
        if events[0].stream:
            self.appended.append((events[0].message or "", again))
        sequence: int | None = await self._call("append", lambda: self.inner.append(key, events, again=again))
        return sequence

    async def read(self, key: UUID, stream: str, *, after: int, limit: int = EVENT_PAGE) -> EventPage | None:
        page: EventPage | None = await self._call(
            "read", lambda: self.inner.read(key, stream, after=after, limit=limit)
        )
        return page

    async def heads(self, keys: Collection[UUID]) -> dict[UUID, int]:
        heads: dict[UUID, int] = await self._call("heads", lambda: self.inner.heads(keys))
        return heads

    async def standalone_places(self, keys: Collection[UUID]) -> dict[UUID, int]:
        places: dict[UUID, int] = await self._call("standalone_places", lambda: self.inner.standalone_places(keys))
        return places

    async def follow(self, keys: Collection[UUID]) -> None:
        await self._call("follow", lambda: self.inner.follow(keys))

    async def listen(self, on_hint: Callable[[Collection[UUID] | None], None]) -> None:
        await self._call("listen", lambda: self.inner.listen(on_hint if self.hints else lambda _: None))

    async def sweep(self, *, limit: int = EVENT_SWEEP_LIMIT) -> EventSweepReport:
        report: EventSweepReport = await self._call("sweep", lambda: self.inner.sweep(limit=limit))
        return report


class FaultyMailbox(_Faulty, Mailbox):
    """A mailbox that fails on command.

    Args:
        store: Store of the sessions in memory; two mailboxes on one store's sessions are one mailbox.
        faults: Has the same faults.
    """

    def __init__(self, store: MemorySessionStore, *, faults: _Faulty | None = None) -> None:
        _Faulty.__init__(self, MAILBOX_OPERATIONS, MAILBOX_BACKGROUND)
        if faults is not None:
            self._before, self._after = faults._before, faults._after
        self.inner = MemoryMailbox(store)
        self.closed = 0
        self.hints = True
        """Whether hints of messages arrive."""
        self.refuses_to_say = False
        """Whether stream messages are dropped."""
        self.holds = False
        """Whether an instance that listens holds something that its death releases."""
        self.posted: list[NewMessage] = []
        """Messages of each `post` that took effect."""
        self.beats: list[Presence] = []
        """Argument of each `beat`."""

    @property
    def namespace(self) -> str:
        return self.inner.namespace

    @property
    def hears(self) -> bool:
        return self.hints

    async def open(self) -> None:
        await self._call("open", self.inner.open)

    async def aclose(self) -> None:
        self.closed += 1

    async def beat(self, presence: Presence) -> bool:
        self.beats.append(presence)
        entered: bool = await self._call("beat", lambda: self.inner.beat(presence))
        return entered

    async def retire(self, instance: str) -> None:
        await self._call("retire", lambda: self.inner.retire(instance))

    async def last_beats(self, names: Collection[str]) -> dict[str, Heartbeat]:
        beats: dict[str, Heartbeat] = await self._call("last_beats", lambda: self.inner.last_beats(names))
        return beats

    async def instances(self) -> Sequence[RunningInstance]:
        instances: Sequence[RunningInstance] = await self._call("instances", self.inner.instances)
        return instances

    async def post(self, messages: Sequence[NewMessage]) -> set[int]:
        gone: set[int] = await self._call("post", lambda: self._post(messages))
        return gone

    async def _post(self, messages: Sequence[NewMessage]) -> set[int]:
        gone = await self.inner.post(messages)
        self.posted += messages
        return gone

    async def receive(self, recipient: int, *, delivered: Mapping[int, int], limit: int = MESSAGE_PAGE) -> MessagePage:
        page: MessagePage = await self._call(
            "receive", lambda: self.inner.receive(recipient, delivered=delivered, limit=limit)
        )
        return page

    async def say(self, messages: Sequence[NewStreamMessage]) -> Said:
        if self.refuses_to_say:
            return Said(dropped={message.sequence for message in messages})
        said: Said = await self._call("say", lambda: self.inner.say(messages))
        return said

    async def take(
        self, key: UUID, holder: int, *, given: Mapping[int, int], without_others: bool = False
    ) -> StreamPage:
        page: StreamPage = await self._call(
            "take", lambda: self.inner.take(key, holder, given=given, without_others=without_others)
        )
        return page

    async def release(self, key: UUID, holder: int, *, given: Mapping[int, int]) -> None:
        await self._call("release", lambda: self.inner.release(key, holder, given=given))

    async def withdraw(self, key: UUID, sender: int, sequence: int) -> Withdrawal:
        withdrawal: Withdrawal = await self._call("withdraw", lambda: self.inner.withdraw(key, sender, sequence))
        return withdrawal

    async def listen(
        self,
        on_hint: Callable[[], None],
        *,
        instance: str,
        number: int | None = None,
        on_held: Callable[[], None] | None = None,
    ) -> None:
        await self._call("listen", lambda: self._listen(on_hint, instance=instance, number=number, on_held=on_held))

    async def _listen(
        self, on_hint: Callable[[], None], *, instance: str, number: int | None, on_held: Callable[[], None] | None
    ) -> None:
        if not self.holds:
            # Under the name of no instance.
            instance, on_held = "nothing is held", None
        await self.inner.listen(
            on_hint if self.hints else lambda: None, instance=instance, number=number, on_held=on_held
        )

    async def sweep(self, *, limit: int = MESSAGE_SWEEP_LIMIT) -> MailboxSweepReport:
        report: MailboxSweepReport = await self._call("sweep", lambda: self.inner.sweep(limit=limit))
        return report


class FaultyState(_Faulty, StateStore):
    """A store of state that fails on command.

    Args:
        store: Store of the sessions; both have the same faults.
        policy: See `StateStore`.
    """

    def __init__(self, store: FaultyStore, *, policy: StatePolicy | None = None) -> None:
        _Faulty.__init__(self, ("get", "put", "delete", "sweep"), ("sweep",))
        StateStore.__init__(self, policy=policy)
        self._before, self._after = store._before, store._after
        self.inner = MemoryStateStore(store.inner, policy=policy)

    @property
    def namespace(self) -> str:
        return self.inner.namespace

    async def get(self, key: UUID, names: Collection[str] | None = None) -> Mapping[str, StoredState] | None:
        found: Mapping[str, StoredState] | None = await self._call("get", lambda: self.inner.get(key, names))
        return found

    async def put(self, key: UUID, state: NewState, *, expected: int | None = None) -> int | None:
        revision: int | None = await self._call("put", lambda: self.inner.put(key, state, expected=expected))
        return revision

    async def delete(self, key: UUID, name: str, *, expected: int | None = None) -> int | None:
        revision: int | None = await self._call("delete", lambda: self.inner.delete(key, name, expected=expected))
        return revision

    async def sweep(self, *, limit: int = STATE_SWEEP_LIMIT) -> StateSweepReport:
        report: StateSweepReport = await self._call("sweep", lambda: self.inner.sweep(limit=limit))
        return report
