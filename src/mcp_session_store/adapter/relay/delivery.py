"""Delivery: messages that arrived for this instance are given to the copies of their sessions."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import anyio
from mcp.shared.dispatcher import coerce_request_id
from mcp_types import JSONRPCError, JSONRPCNotification, JSONRPCResponse
from starlette.requests import Request

from mcp_session_store import telemetry
from mcp_session_store.adapter import clock, sdk
from mcp_session_store.adapter.background import report_failure
from mcp_session_store.adapter.latch import Latch
from mcp_session_store.adapter.relay.messages import read_message
from mcp_session_store.adapter.replay.journal import ElsewhereChange
from mcp_session_store.adapter.replay.mirrored import scope_of
from mcp_session_store.adapter.session_log import UNKNOWN_QUESTION
from mcp_session_store.adapter.sessions.recording import RECORD_WRITER
from mcp_session_store.adapter.sessions.resident import RESIDENT_SESSION
from mcp_session_store.adapter.sessions.state import STATE
from mcp_session_store.mailbox import MessageKind

if TYPE_CHECKING:
    from uuid import UUID

    from mcp_types import JSONRPCMessage, RequestId
    from starlette.types import Scope

    from mcp_session_store.adapter.sdk import ManagerTasks
    from mcp_session_store.adapter.sessions.recording import RecordWriter
    from mcp_session_store.adapter.sessions.refreshing import Refresher
    from mcp_session_store.adapter.sessions.registry import Registry
    from mcp_session_store.adapter.sessions.resident import ResidentSession
    from mcp_session_store.mailbox import Message

__all__ = ["Delivery"]

LANE_MESSAGES: Final = 1000
"""Most messages of one session that wait for its copy."""
LANE_BYTES: Final = 8 * 1024**2
"""Bytes of their bodies, beyond which a message waits only alone."""
MAX_BYTES: Final = 64 * 1024**2
"""Bytes of the bodies of all sessions' messages that wait, beyond which only a small one of a session waits."""
SMALL: Final = 64 * 1024
"""Bytes of such a message: those of one session must not keep out the answers of others."""

NO_COPY: Final = "no copy"
"""Reason to drop a message: its session is not in this instance's memory, or has left it meanwhile."""
UNREADABLE: Final = "unreadable"
"""Reason to drop a message: its body cannot be read as one."""
TOO_MANY: Final = "too many waiting"
"""Reason to drop a message: the copy does not read the ones before it."""


@dataclass(slots=True)
class _Arrived:
    message: Message
    arrived: float
    """Moment of `clock` at which it was read from the mailbox."""


class _Lane:
    """Messages of one session, in their order."""

    __slots__ = ("bytes", "emptied", "messages")

    def __init__(self) -> None:
        self.messages: deque[_Arrived] = deque()
        """Those that are not delivered; the first is on its way."""
        self.bytes = 0
        self.emptied = Latch()


class Delivery:
    """Gives messages to the copies of their sessions: those of each session in a lane, which waits for no other.

    Args:
        registry: Registry of the sessions in memory and of the restores under way.
        writer: Commits what messages change in the record of their session.
        refresher: Brings into copies what other copies have changed.
        tasks: Task group in which lanes are served.
    """

    def __init__(self, registry: Registry, writer: RecordWriter, refresher: Refresher, tasks: ManagerTasks) -> None:
        self._registry = registry
        self._writer = writer
        self._refresher = refresher
        self._tasks = tasks
        self._log = registry.log
        self._lanes: dict[UUID, _Lane] = {}
        self._bytes = 0
        self._of = {kind: telemetry.of(registry.log.namespace, kind=kind.value) for kind in MessageKind}

    def add(self, message: Message) -> None:
        """Deliver a message in the background, after those of its session that came before it."""
        lane = self._lanes.get(message.key)
        size = len(message.body)
        if lane is None and not self._registry.concerns(message.key):
            self._no_copy(message.kind)
            return
        if (self._bytes + size > MAX_BYTES and (lane is not None or size > SMALL)) or (
            lane is not None and (len(lane.messages) >= LANE_MESSAGES or lane.bytes + size > LANE_BYTES)
        ):
            self._log.dropped(message.kind, TOO_MANY)
            return
        if lane is None:
            lane = _Lane()
        lane.messages.append(_Arrived(message, clock.now()))
        lane.bytes += size
        self._bytes += size
        if message.key not in self._lanes:
            self._lanes[message.key] = lane
            self._tasks.start_soon(self._serve, message.key, lane)

    def _no_copy(self, kind: MessageKind) -> None:
        """Count a message that finds no copy, unless that is as good: the next restore has every change."""
        if kind is not MessageKind.CHANGE:
            self._log.dropped(kind, NO_COPY)

    @property
    def waiting(self) -> int:
        """Number of messages that have arrived and are not delivered."""
        return sum(len(lane.messages) for lane in self._lanes.values())

    async def delivered(self, key: UUID) -> None:
        """Wait until all messages of a session are delivered that have arrived."""
        if (lane := self._lanes.get(key)) is not None:
            await lane.emptied.wait()

    async def _serve(self, key: UUID, lane: _Lane) -> None:
        """Deliver the messages of a session until none is left."""
        try:
            while lane.messages:
                arrived = lane.messages[0]
                try:
                    await self._deliver(key, arrived)
                except Exception as error:
                    report_failure("delivery", error, key=key, namespace=self._log.namespace)
                lane.messages.popleft()
                lane.bytes -= len(arrived.message.body)
                self._bytes -= len(arrived.message.body)
        finally:
            del self._lanes[key]
            self._bytes -= lane.bytes
            lane.emptied.set()

    async def _deliver(self, key: UUID, arrived: _Arrived) -> None:
        kind = arrived.message.kind
        body = arrived.message.body
        try:
            message = ElsewhereChange.decode(body) if kind is MessageKind.CHANGE else read_message(body)
        except ValueError:
            self._log.dropped(kind, UNREADABLE)
            return
        # A restore under way may be the one that the message is for.
        if (interest := self._registry.interest_in(key)) is not None and self._registry.with_key(key) is None:
            await interest.over.wait()
        session = self._registry.with_key(key)
        if session is None:
            self._no_copy(kind)
            return
        if isinstance(message, ElsewhereChange):
            # Beside the lane, because a handler may wait for what comes after it.
            self._refresher.take(session, message)
            self._count(arrived)
            return
        if kind in (MessageKind.ANSWER, MessageKind.PROGRESS) and _question_of(message) not in session.loop.asked:
            self._log.dropped(kind, UNKNOWN_QUESTION)
            return
        # Before an answer has the copy come to rest.
        session.heard_elsewhere()
        try:
            # Returns when the server loop has read it.
            await sdk.deliver(session.transport, message, Request(self._scope_of(session)))
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            self._log.dropped(kind, NO_COPY)
            return
        self._count(arrived)

    def _count(self, arrived: _Arrived) -> None:
        """Count a message that has reached its copy."""
        attributes = self._of[arrived.message.kind]
        telemetry.delivered_messages.add(1, attributes)
        waited = arrived.message.age.total_seconds() + clock.now() - arrived.arrived
        telemetry.deliveries.record(waited, attributes)

    def _scope_of(self, session: ResidentSession) -> Scope:
        """Return the ASGI scope of a request that could have brought a message here.

        The middleware finds the copy in it.
        """
        scope = scope_of(session.session_id, session.marker)
        scope.update({RESIDENT_SESSION: session, RECORD_WRITER: self._writer, STATE: self._writer.state})
        return scope


def _question_of(message: JSONRPCMessage) -> RequestId | None:
    """Return the id of the question that a message answers or reports progress of, as the copy keeps it."""
    question: RequestId | None = None
    if isinstance(message, JSONRPCResponse | JSONRPCError):
        question = message.id
    elif isinstance(message, JSONRPCNotification):
        question = (message.params or {}).get("progressToken")
    return None if question is None else coerce_request_id(question)
