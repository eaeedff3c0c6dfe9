"""Data of stores in memory, which several stores may share as they would a database."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, TypeAlias

from mcp_session_store.activity import StreamHolder
from mcp_session_store.records import Heartbeat
from mcp_session_store.stream_mail import STREAM_WAIT

if TYPE_CHECKING:
    from uuid import UUID

    from mcp_session_store.activity import StreamClaim
    from mcp_session_store.mailbox import NewMessage, Presence
    from mcp_session_store.records import EndReason, JournalEntry, NewState, SessionRecord, StoredEvent
    from mcp_session_store.stream_mail import NewStreamMessage


OnHint: TypeAlias = Callable[[Collection["UUID"] | None], None]


@dataclass(slots=True)
class Row:
    """Session, live or not, and its journal in the order in which the entries were last set."""

    record: SessionRecord
    ended: EndReason | None = None
    ended_at: datetime | None = None
    changed_at: datetime | None = None
    journal: dict[tuple[str, str], JournalEntry] = field(default_factory=dict)
    stream: StreamHolder | None = None
    stream_opened_at: datetime | None = None

    def live_at(self, moment: datetime) -> bool:
        return self.ended is None and not self.expired_at(moment)

    def expired_at(self, moment: datetime) -> bool:
        expires_at = self.record.expires_at
        return expires_at is not None and expires_at <= moment

    def claim_stream(self, claim: StreamClaim, now: datetime) -> None:
        """Note which instance has the stream, see `SessionStore.touch`."""
        before, opened_at = self.stream, now - timedelta(seconds=claim.age)
        if before is None or self.stream_opened_at is None:
            self.stream = StreamHolder(claim.number, term=1, former=None, waiting=False)
        elif before.number == claim.number:
            opened_at = max(opened_at, self.stream_opened_at)
        elif claim.term:
            if claim.term == before.term:
                self.stream = before._replace(number=claim.number)
            return
        elif opened_at > self.stream_opened_at:
            self.stream = StreamHolder(claim.number, term=before.term + 1, former=before.number, waiting=False)
        else:
            return
        self.stream_opened_at = opened_at


@dataclass(slots=True)
class Log:
    """Events of one session. Those that are kept have consecutive sequences, of which `last` is the highest."""

    events: list[tuple[str, StoredEvent, datetime]] = field(default_factory=list)
    """Stream, event and time of storing, in the order of sequences."""
    last: int = 0

    @property
    def first(self) -> int:
        return self.last - len(self.events) + 1


@dataclass(slots=True)
class State:
    """Value of a session's state."""

    state: NewState
    ends_at: datetime | None
    """When its time is over; `None`: never."""

    def over_at(self, moment: datetime) -> bool:
        return self.ends_at is not None and self.ends_at <= moment


@dataclass(slots=True)
class Instance:
    """Instance that sends heartbeats."""

    presence: Presence
    namespace: str
    started_at: datetime
    beat_at: datetime
    held: bool = False
    """Whether it held anything at its last heartbeat."""


@dataclass(slots=True)
class Mail:
    """Message that waits for its recipient."""

    message: NewMessage
    posted_at: datetime


@dataclass(slots=True)
class StreamMail:
    """Stream message that waits, or mark of one that does not any more."""

    said: NewStreamMessage
    stored_at: datetime
    taken_by: int | None = None
    """Number of the instance that has taken it; `None`: it is untaken, or was withdrawn."""
    is_over: bool = False
    """Whether it was given to a stream, given up, or withdrawn."""


@dataclass(slots=True)
class Data:
    """What stores that share it have of all namespaces, the instances, the listeners, and their clock."""

    rows: dict[UUID, Row] = field(default_factory=dict)
    listeners: list[OnHint] = field(default_factory=list)
    logs: dict[UUID, Log] = field(default_factory=dict)
    log_listeners: list[OnHint] = field(default_factory=list)
    instances: dict[str, Instance] = field(default_factory=dict)
    """Running instances, by the unique parts of their ids."""
    mail: dict[tuple[int, int, int], Mail] = field(default_factory=dict)
    """Messages by recipient, sender and sequence."""
    stream_mail: dict[tuple[UUID, int, int], StreamMail] = field(default_factory=dict)
    """Stream messages by session, sender and sequence."""
    mail_listeners: list[tuple[int | None, Callable[[], None]]] = field(default_factory=list)
    """Numbers of instances that listen, and how they hear of new messages."""
    held: set[str] = field(default_factory=set)
    """Instances that listen, by the unique parts of their ids."""
    states: dict[UUID, dict[str, State]] = field(default_factory=dict)
    """State of sessions, by key and name."""
    ahead: timedelta = timedelta(0)
    """Difference of the stores' one clock to this machine's, so that a test can let time pass."""

    def now(self) -> datetime:
        """Return the time by the clock of the stores."""
        return datetime.now(UTC) + self.ahead

    def row(self, key: UUID, *, namespace: str) -> Row | None:
        """Return a session of a namespace, live or not."""
        row = self.rows.get(key)
        return row if row is not None and row.record.namespace == namespace else None

    def live(self, key: UUID, *, namespace: str) -> Row | None:
        """Return a live session of a namespace."""
        row = self.row(key, namespace=namespace)
        return row if row is not None and row.live_at(self.now()) else None

    def log(self, key: UUID, *, namespace: str) -> Log | None:
        """Return the events of a session of a namespace, if there are any."""
        return self.logs.get(key) if self.row(key, namespace=namespace) is not None else None

    def changed(self, row: Row) -> None:
        """Note a change that copies of a session must learn of, and notify those that listen."""
        row.changed_at = self.now()
        for on_hint in list(self.listeners):
            on_hint([row.record.key])

    def put(self, key: UUID, state: NewState) -> None:
        """Store a value of a session's state."""
        ends_at = None if state.ttl is None else self.now() + timedelta(seconds=state.ttl)
        self.states.setdefault(key, {})[state.name] = State(state, ends_at)

    def watched(self, key: UUID) -> dict[str, str] | None:
        """Return the watched values of a session with state by name, `None` without any."""
        now = self.now()
        watched = [kept for kept in self.states[key].values() if kept.state.watched and not kept.over_at(now)]
        return {kept.state.name: kept.state.value for kept in watched} or None

    def remove_session(self, key: UUID) -> None:
        """Remove what a session that ends loses with it: its events, its messages and its state."""
        self.logs.pop(key, None)
        self.states.pop(key, None)
        for place in [place for place, mail in self.mail.items() if mail.message.key == key]:
            del self.mail[place]
        for of_stream in [of_stream for of_stream in self.stream_mail if of_stream[0] == key]:
            del self.stream_mail[of_stream]

    def waits_for_stream(self, key: UUID) -> bool:
        """Return whether messages wait for the stream of a session."""
        now = self.now()
        return any(
            mail.said.key == key and not mail.is_over and now - mail.stored_at < STREAM_WAIT
            for mail in self.stream_mail.values()
        )

    def last_beats(self, names: Collection[str]) -> dict[str, Heartbeat]:
        """Return the last heartbeats of instances, by name and without those that are unknown."""
        now = self.now()
        return {
            name: Heartbeat(ago=now - row.beat_at, released=row.held and name not in self.held)
            for name in names
            if (row := self.instances.get(name)) is not None
        }
