"""Data of stores in memory, which several stores may share as they would a database."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, TypeAlias

from mcp_session_store.records import Heartbeat

if TYPE_CHECKING:
    from uuid import UUID

    from mcp_session_store.mailbox import NewMessage, Presence
    from mcp_session_store.records import EndReason, JournalEntry, SessionRecord, StoredEvent


OnHint: TypeAlias = Callable[[Collection["UUID"] | None], None]


@dataclass(slots=True)
class Row:
    """Session, live or not, and its journal in the order in which the entries were last set."""

    record: SessionRecord
    ended: EndReason | None = None
    ended_at: datetime | None = None
    changed_at: datetime | None = None
    journal: dict[tuple[str, str], JournalEntry] = field(default_factory=dict)

    def live_at(self, moment: datetime) -> bool:
        return self.ended is None and not self.expired_at(moment)

    def expired_at(self, moment: datetime) -> bool:
        expires_at = self.record.expires_at
        return expires_at is not None and expires_at <= moment


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
class Data:
    """Sessions, events and messages of all namespaces, instances, listeners and the clock of stores that share them."""

    rows: dict[UUID, Row] = field(default_factory=dict)
    listeners: list[OnHint] = field(default_factory=list)
    logs: dict[UUID, Log] = field(default_factory=dict)
    log_listeners: list[OnHint] = field(default_factory=list)
    instances: dict[str, Instance] = field(default_factory=dict)
    """Running instances, by the unique parts of their ids."""
    mail: dict[tuple[int, int, int], Mail] = field(default_factory=dict)
    """Messages by recipient, sender and sequence."""
    mail_listeners: list[tuple[int | None, Callable[[], None]]] = field(default_factory=list)
    """Numbers of instances that listen, and how they hear of new messages."""
    held: set[str] = field(default_factory=set)
    """Instances that listen, by the unique parts of their ids."""
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

    def remove_session(self, key: UUID) -> None:
        """Remove what a session that ends loses with it: its events, and the messages that belong to it."""
        self.logs.pop(key, None)
        for place in [place for place, mail in self.mail.items() if mail.message.key == key]:
            del self.mail[place]

    def last_beats(self, names: Collection[str]) -> dict[str, Heartbeat]:
        """Return the last heartbeats of instances, by name and without those that are unknown."""
        now = self.now()
        return {
            name: Heartbeat(ago=now - row.beat_at, released=row.held and name not in self.held)
            for name in names
            if (row := self.instances.get(name)) is not None
        }
