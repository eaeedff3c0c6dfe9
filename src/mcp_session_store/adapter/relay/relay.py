"""What becomes of a client's message that may be for other instances, and the tasks of the relay."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

import anyio
from starlette.requests import Request

from mcp_session_store.adapter import responses
from mcp_session_store.adapter.background import run_again, run_every
from mcp_session_store.adapter.clock import now
from mcp_session_store.adapter.relay.delivery import NO_COPY, Delivery
from mcp_session_store.adapter.relay.inbox import Inbox
from mcp_session_store.adapter.relay.logged import LoggedStreams
from mcp_session_store.adapter.relay.messages import ADDRESSED, accepted, accepts, named_notifications, relayed
from mcp_session_store.adapter.relay.outbox import Outbox
from mcp_session_store.adapter.relay.outgoing import Outgoing
from mcp_session_store.adapter.relay.queued import QueuedStreams
from mcp_session_store.adapter.relay.stream_messages import LOOK_INTERVAL, StreamMessages
from mcp_session_store.adapter.relay.streams import STREAM_KINDS, ClientStreams
from mcp_session_store.adapter.requests import ClientGone
from mcp_session_store.errors import SessionStoreError
from mcp_session_store.mailbox import MessageKind
from mcp_session_store.records import session_key

if TYPE_CHECKING:
    from uuid import UUID

    from mcp.server.auth.middleware.bearer_auth import AuthorizationContext
    from starlette.responses import Response
    from starlette.types import Scope

    from mcp_session_store.adapter.instances import Instances
    from mcp_session_store.adapter.outage import Gate, RequestWait
    from mcp_session_store.adapter.readiness import Readiness
    from mcp_session_store.adapter.relay.messages import ClientMessage
    from mcp_session_store.adapter.relay.streams import StreamSource
    from mcp_session_store.adapter.requests import Incoming
    from mcp_session_store.adapter.sdk import ManagerTasks
    from mcp_session_store.adapter.sessions.activity import ActivityReporter
    from mcp_session_store.adapter.sessions.changes import ChangeWatch
    from mcp_session_store.adapter.sessions.lookup import Lookup
    from mcp_session_store.adapter.sessions.recording import RecordWriter
    from mcp_session_store.adapter.sessions.refreshing import Refresher
    from mcp_session_store.adapter.sessions.registry import Registry
    from mcp_session_store.adapter.streams.recorder import EventRecorder
    from mcp_session_store.mailbox import Message

__all__ = ["Relay", "named_notifications"]

MAX_BACKOFF: Final = 1.0
"""Most seconds between two tries while the store is away."""
CATCH_UP: Final = 0.5
"""Seconds that an answer to a copy here waits at most for progress that was posted to other instances before it."""


class Relay:
    """Takes the messages of clients that are for other instances, and delivers those that others have taken.

    Args:
        instances: This instance, with its mailbox and its number.
        registry: Registry of the sessions in memory.
        lookup: Looks up the record of a session for its principal.
        activity: Notes which sessions are in use.
        changes: Knows until when sessions in memory are served without a query.
        writer: Commits what messages change in the record of their session.
        refresher: Brings into copies what other copies have changed.
        gate: Where requests wait for the store.
        tasks: Task group in which messages are delivered.
        json_response: Whether calls are answered by JSON instead of streams.
        max_body: Highest number of bytes of a body.
        named: Methods of notifications that concern all copies of a session.
        recorder: Stores the events of streams; `None`: there is no event log.
        has_event_store: Whether the SDK's transports have an event store of the user's.
    """

    def __init__(
        self,
        instances: Instances,
        registry: Registry,
        lookup: Lookup,
        activity: ActivityReporter,
        changes: ChangeWatch,
        writer: RecordWriter,
        refresher: Refresher,
        gate: Gate,
        tasks: ManagerTasks,
        *,
        json_response: bool,
        max_body: int,
        named: frozenset[str],
        recorder: EventRecorder | None,
        has_event_store: bool,
    ) -> None:
        self._question_ids = instances.question_ids
        self._registry = registry
        self._lookup = lookup
        self._activity = activity
        self._changes = changes
        self._json_response = json_response
        self._max_body = max_body
        self.methods: Final = named | ADDRESSED
        """Methods of the notifications that are relayed."""
        self.outbox: Final = Outbox(instances, gate, registry.log)
        self._delivery = Delivery(registry, writer, refresher, tasks)
        self.inbox: Final = Inbox(instances, registry, self._arrived)
        self.outlets: QueuedStreams | None = None
        """Ways of copies to the clients' streams on other instances; `None` where the event log is one."""
        source: StreamSource
        if recorder is None:
            messages = StreamMessages(instances, self.outbox, tasks, registry.log)
            source = self.outlets = QueuedStreams(messages, stores=has_event_store)
        else:
            source = LoggedStreams(recorder.followers)
        self.streams: Final = ClientStreams(registry, activity, self.outbox, source, tasks, instances.question_ids)
        if recorder is not None:
            recorder.on_said = self.streams.hint
        self.attach: Final = self.streams.attach if has_event_store or recorder is not None else None
        """Connects a copy with its client's stream elsewhere, where handlers can close it: the SDK lets them do so only
        where events are stored."""
        instances.on_renumbered = instances.on_back = self.streams.claim_again
        instances.on_hint = self.inbox.wake.set
        instances.before_beat = self.inbox.read_before_beat
        instances.question_ids.on_asked = self.inbox.asked
        writer.announce = self._announce

    def _arrived(self, message: Message) -> None:
        if message.kind in STREAM_KINDS:
            self.streams.arrived(message)
        else:
            self._delivery.add(message)

    @property
    def waiting(self) -> int:
        """Number of messages that have arrived here and are not delivered."""
        return self._delivery.waiting

    async def take(
        self,
        message: ClientMessage | None,
        session_id: str,
        requestor: AuthorizationContext | None,
        scope: Scope,
        incoming: Incoming,
        waits: RequestWait,
    ) -> Response | None:
        """Take a message that is for other instances, from a client of its session.

        Args:
            message: The message; `None` if its body is not read to its end.
            session_id: Id of the session.
            requestor: Principal of the request.
            scope: ASGI scope of the request.
            incoming: Body of the request, as far as it was read.
            waits: The request, which may have to wait for the store.

        Returns:
            The answer; `None`: the copy of the session that this instance has, or restores, gets the message too.

        Raises:
            SessionNotFound: There is no such session for this principal.
            SessionStoreError: The message is not accepted.
        """
        if not accepts(Request(scope), json_response=self._json_response):
            return None
        key = session_key(session_id)
        session = self._registry.get(session_id)
        if (
            session is not None
            and session.serving
            and session.owner == requestor
            and now() <= self._changes.verified_until
        ):
            session.pin()
            try:
                self._activity.note(session)
                return await self._take(message, session_id, key, incoming, waits, resident=True)
            finally:
                session.unpin()
        self._activity.note_elsewhere(key, await self._lookup.check(key, requestor, waits))
        return await self._take(message, session_id, key, incoming, waits, resident=False)

    async def _take(
        self,
        message: ClientMessage | None,
        session_id: str,
        key: UUID,
        incoming: Incoming,
        waits: RequestWait,
        *,
        resident: bool,
    ) -> Response | None:
        if message is None:
            await incoming.read(self._max_body)
            if incoming.gone:
                raise ClientGone
            if not incoming.whole:
                return responses.too_large()
            if (message := relayed(incoming.body, self.methods)) is None:
                return None
        session = self._registry.get(session_id)
        is_here = session is not None or session_id in self._registry.restores
        number: int | None = None
        if message.kind in (MessageKind.ANSWER, MessageKind.PROGRESS):
            number = message.number
            question = None
            if session is not None and message.question is not None:
                question = session.loop.asked.get(message.question)
            # What was asked here under a former number, which another instance may have now, is known by the question.
            if number in (None, self._question_ids.number) or question is not None:
                if not is_here:
                    self._registry.log.dropped(message.kind, NO_COPY)
                    return accepted(session_id)
                if question is not None and question.token is not None and message.kind is MessageKind.ANSWER:
                    await self._catch_up(key)
                return None
        elif message.call is not None and session is not None and session.runs(message.call):
            return None
        outgoing = Outgoing(number, key, message.kind, incoming.body.decode())
        await self.outbox.accept(outgoing, waits, resident=resident)
        if message.kind is MessageKind.NOTIFICATION or (message.kind is MessageKind.CANCELLED and is_here):
            return None
        return accepted(session_id)

    async def _catch_up(self, key: UUID) -> None:
        """Deliver progress of a question that was posted to other instances before the answer to it came here."""
        if self.inbox.failing:
            return
        with anyio.move_on_after(CATCH_UP):
            try:
                await self.inbox.read()
            except SessionStoreError:
                return  # the background task, which reads next, reports it
            await self._delivery.delivered(key)

    def _announce(self, key: UUID, change: str) -> None:
        """Say to the other copies of a session what has changed; where that fails, they find out by the revision."""
        self.outbox.put(Outgoing(None, key, MessageKind.CHANGE, change))

    async def run(self, readiness: Readiness) -> None:
        """Run the background tasks, until cancelled."""
        again = partial(run_again, max_backoff=MAX_BACKOFF, readiness=readiness)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(again, "outbox", self.outbox.run)
            tasks.start_soon(again, "inbox", self.inbox.run)
            if self.outlets is not None:
                look = partial(run_every, max_backoff=MAX_BACKOFF, readiness=readiness)
                tasks.start_soon(look, "stream messages", LOOK_INTERVAL, self.outlets.messages.look)
