"""Events of one session, as the SDK's transport stores them."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING, Final

import anyio
from mcp.server.streamable_http import GET_STREAM_KEY, REQUEST_STREAM_BUFFER_SIZE, EventStore
from mcp_types import CONNECTION_CLOSED
from mcp_types.version import KNOWN_PROTOCOL_VERSIONS, is_version_at_least

from mcp_session_store.adapter import clock
from mcp_session_store.adapter.background import report_failure
from mcp_session_store.adapter.latch import Latch
from mcp_session_store.adapter.requests import POSTED
from mcp_session_store.adapter.responses import LOST
from mcp_session_store.adapter.streams.backlog import can_do_without
from mcp_session_store.adapter.streams.calls import NOT_JSON, call_error, call_of, kind_of
from mcp_session_store.adapter.streams.event_ids import Cursor, EventIds, fits
from mcp_session_store.adapter.streams.live import LiveStreams
from mcp_session_store.adapter.streams.newest_event import NewestEvent
from mcp_session_store.adapter.streams.recorder import ROUNDS, Outcome
from mcp_session_store.event_log import LARGE_APPEND, STANDALONE_STREAM
from mcp_session_store.records import EventKind, NewEvent

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable
    from contextlib import AbstractAsyncContextManager
    from uuid import UUID

    from mcp.server.streamable_http import EventCallback, EventId, StreamId
    from mcp_types import JSONRPCMessage, RequestId

    from mcp_session_store.adapter.sdk import TransportStreams
    from mcp_session_store.adapter.streams.calls import CallStream
    from mcp_session_store.adapter.streams.recorder import EventRecorder

__all__ = ["RESUMABLE_VERSIONS", "SessionEvents"]

RESUMABLE_VERSIONS: Final = frozenset(v for v in KNOWN_PROTOCOL_VERSIONS if is_version_at_least(v, "2025-11-25"))
"""Protocol versions whose clients understand priming events, and come back for a stream."""


class SessionEvents(EventStore):
    """View of the event log that belongs to one session.

    The SDK names a stream after the id of its request, which clients use again. Here each call has its own stream.

    `store_event` never raises, because that would end the SDK's message router, and with it the session.

    Args:
        key: Key of the session.
        recorder: Recorder that stores the events.
        owner: Principal of the session; `None`: none.
        retry_interval: Milliseconds, as for the SDK's transport.
    """

    def __init__(
        self, key: UUID, recorder: EventRecorder, *, owner: Hashable = None, retry_interval: int | None = None
    ) -> None:
        self.key = key
        self.recorder = recorder
        self._owner = owner
        self.ids = EventIds(key)
        self.retry_interval = retry_interval
        self.active = False
        """Whether the session has a record, because its handshake leaves no events, and its copy here is in memory."""
        self.live: LiveStreams | None = None
        """Open responses of the SDK's transport."""
        self._calls: dict[str, CallStream] = {}
        """Calls without an answer, by the SDK's names of their streams."""
        self._identified = False
        """Whether the client may have an id of the standalone stream to come back with."""
        self._returned: set[str] = set()
        """Names of the streams of calls whose handler has returned, and whose answer is not recorded yet."""
        self.on_recorded: Callable[[], None] = lambda: None
        """Called when the last of these answers is recorded."""
        self._recorded: Latch | None = None
        self.abandoned: Final = Latch()
        """Set when the copy has left memory and its calls without an answer are stored as lost."""
        self._newest = NewestEvent()
        self._in_doubt = False
        """Whether the log did not take the last event. The priming event of the next call is then stored, which shows
        whether the log takes events of this session."""
        # All copies of a session write the one standalone stream; their positions are apart by chance.
        self._position = random.getrandbits(31) << 31

    def begin_streams(self, streams: TransportStreams, close: Callable[[str], None]) -> None:
        """Begin with the open responses of the session's transport; see `LiveStreams`."""
        self.live = LiveStreams(streams, close)

    # Called by the SDK

    async def prime(self, stream_id: str, protocol_version: str) -> None:
        """Begin the stream of a call, and have its priming event precede the answer, if the client is to get one.

        The event is not stored where its id alone can say that it precedes the first event of the call: a reader has
        to find all events of the call behind it, and to learn when this instance is dead. The log is asked for the
        place where this copy of the session does not know it, because that costs no commit.

        Args:
            stream_id: The call's request id, as a text.
            protocol_version: Which the client speaks.
        """
        posted = POSTED.get()
        if not self.active or posted is None:
            return
        request_id, method = call_of(stream_id, posted.body)
        if method == "initialize" or not fits(request_id):
            return
        resumable = protocol_version in RESUMABLE_VERSIONS
        is_newest_known = resumable and self._newest.is_known(self.recorder.silence / ROUNDS)
        if resumable and not is_newest_known:
            # Before the stream begins, so that nothing is left of a call that is cancelled meanwhile.
            is_newest_known = await self._find_newest()
        if (forgotten := self._calls.get(stream_id)) is not None and forgotten.answer is None:
            # The client uses the id of a call that runs; the SDK answers the later one with whatever comes first.
            await self._lose(forgotten)
        if not self.active:
            return  # the copy has left memory meanwhile
        stream = self._calls[stream_id] = self.recorder.begin(
            self.key, request_id, resumable=resumable, owner=self._owner
        )
        if not resumable or self.recorder.down:
            return
        if is_newest_known and self._is_id_enough:
            stream.identified = True
            stream.position = 1
            event_id = self.ids.write(stream.name, self._newest.sequence, 0, request_id)
        else:
            event_id = await self._store(stream, stream_id, None)
        if event_id:
            posted.priming = self.priming_event(event_id)

    def priming_event(self, event_id: str) -> bytes:
        """Return a priming event as SSE."""
        retry = "" if self.retry_interval is None else f"retry: {self.retry_interval}\r\n"
        return f"id: {event_id}\r\ndata: \r\n{retry}\r\n".encode()

    async def store_event(self, stream_id: StreamId, message: JSONRPCMessage | None) -> EventId:
        """Store an event of a stream.

        Args:
            stream_id: Request id of the stream's call as text, or the SDK's name for the standalone stream.
            message: Message of the event; `None` for a priming event.

        Returns:
            The id of the event, or an empty text, which the SDK does not send, if it is not stored.
        """
        if not self.active:
            return ""
        stream: CallStream | None = None
        if stream_id != GET_STREAM_KEY:
            stream = self._calls.get(stream_id)
            if stream is None:
                return ""  # the call is answered already, or cannot be resumed
        return await self._store(stream, stream_id, message)

    async def replay_events_after(self, last_event_id: EventId, send_callback: EventCallback) -> StreamId | None:
        """Refuse: `resumption` answers each GET with a `Last-Event-ID` before the transport sees it.

        The SDK would go on with what this process says alone, and lose what is said between the two.
        """
        raise NotImplementedError("a stream is resumed by serve_stream, not by the SDK's transport")

    def turn(self) -> AbstractAsyncContextManager[None]:
        """Return a context in which it is this session's turn to read the log.

        Raises:
            StoreBusy: On entry; see `Turns.take`.
        """
        # Sessions without a principal have nothing else in common.
        owners = (self.key,) if self._owner is None else (self.key, self._owner)
        return self.recorder.turns.take(*owners)

    # Called by the session manager

    def begin(self, newest: int | None, *, known_at: float) -> None:
        """Note that the session has a record.

        Args:
            newest: Sequence of its newest event, 0 if it was just opened; `None` if it is not known.
            known_at: Moment, by `clock`, at which it was the newest.
        """
        self.active = True
        if newest is not None:
            self._newest.note(newest, known_at)

    @property
    def busy(self) -> bool:
        """Whether answers are on their way to the log."""
        return bool(self._returned)

    @property
    def resumable(self) -> bool:
        """Whether a client may come back for the answer of a call that is not finished."""
        return any(stream.identified for stream in self._calls.values())

    def returned(self, request_id: RequestId) -> None:
        """Note that the handler of a call has returned, so that its answer is on its way to the log."""
        stream = self._calls.get(str(request_id))
        if stream is not None and stream.answer is None:
            self._returned.add(stream.name)

    async def recorded(self) -> None:
        """Wait until the answers of all handlers that have returned are stored, or in the backlog."""
        while self._returned:
            self._recorded = self._recorded or Latch()
            await self._recorded.wait()

    async def prime_standalone(self) -> Cursor | None:
        """Store a priming event of the standalone stream, and return its place; `None` if that cannot be done now."""
        event_id = await self._store(None, GET_STREAM_KEY, None)
        return self.ids.read(event_id) if event_id else None

    def identify(self, cursor: Cursor) -> str:
        """Return the event id of a place on the standalone stream, which the client gets."""
        self.can_reopen()
        return self.ids.write(*cursor)

    def can_reopen(self) -> None:
        """Note that the client gets what it missed when it opens the standalone stream again."""
        self._identified = True

    def resumed(self, cursor: Cursor) -> None:
        """Close all responses of this instance that carry a stream, because its client has come back for it."""
        if self.live is not None:
            for stream_id, stream in self._calls.items():
                if stream.name == cursor.stream:
                    self.live.close(stream_id)
                    break
            if cursor.standalone:
                self._identified = True
                self.live.close(GET_STREAM_KEY)
        for follower in self.recorder.followers.of(self.key, cursor.stream):
            follower.close()

    def can_come_back(self, stream_id: str) -> bool:
        """Return whether the client of a stream may hold an event id to come back with."""
        if stream_id == GET_STREAM_KEY:
            return self._identified
        stream = self._calls.get(stream_id)
        return stream is not None and stream.identified

    def close_stream(self, stream_id: str) -> None:
        """Close the responses that resumed a stream, because the server has its client come back."""
        name = STANDALONE_STREAM if stream_id == GET_STREAM_KEY else None
        if name is None and (stream := self._calls.get(stream_id)) is not None:
            name = stream.name
        if name is not None:
            for follower in self.recorder.followers.of(self.key, name):
                follower.close()

    def close(self, answer: str | None = None) -> None:
        """End all responses that follow streams of this session.

        Args:
            answer: Message of the JSON-RPC error for the calls, if the session has ended, with all its events.
        """
        if answer is not None:
            self.active = False
            for stream in self._calls.values():
                self.recorder.unfinished.pop(stream.name, None)
            self._calls.clear()
            self._returned.clear()
            self._all_recorded()
        for follower in self.recorder.followers.of(self.key):
            follower.close(answer)

    async def abandon(self) -> None:
        """End the calls without an answer, which will not get one, because the copy of the session has left memory."""
        self.active = False
        calls, self._calls = self._calls, {}
        try:
            async with anyio.create_task_group() as tasks:
                for stream in calls.values():
                    # The copy may have left while an answer was being stored.
                    tasks.start_soon(self._lose if stream.answer is None else self.recorder.record_again, stream)
        finally:
            self.abandoned.set()
        self._returned.clear()
        self._all_recorded()

    async def _lose(self, stream: CallStream) -> None:
        text = call_error(stream.request_id, LOST, code=CONNECTION_CLOSED, reason="lost")
        error = stream.next_event(EventKind.ERROR, text)
        await self.recorder.record(self.key, error, deliver=lambda _: False, owner=self._owner)
        self._note_recorded(stream)

    def _note_recorded(self, stream: CallStream) -> None:
        """Note that the answer of a call is not on its way any more."""
        if stream.name in self._returned:
            self._returned.remove(stream.name)
            if not self._returned:
                self._all_recorded()
                self.on_recorded()

    def _all_recorded(self) -> None:
        if self._recorded is not None:
            self._recorded.set()
            self._recorded = None

    # Storing

    async def _store_in_turn(self, stream: CallStream | None, stream_id: str, message: JSONRPCMessage) -> str:
        """Store a large message when it is its turn, so that of many that wait only few are held as text, too."""
        try:
            await self.recorder.large_turns.acquire()
        except BaseException:
            if stream is not None and (kind := kind_of(message)).final:
                stream.answer = stream.next_event(kind, message.model_dump_json(by_alias=True, exclude_unset=True))
            raise
        try:
            return await self._store(stream, stream_id, message, in_turn=True)
        finally:
            self.recorder.large_turns.release()

    async def _store(
        self, stream: CallStream | None, stream_id: str, message: JSONRPCMessage | None, *, in_turn: bool = False
    ) -> str:
        """Store an event; return its id, or an empty text if it is not stored. Raises nothing."""
        try:
            kind = kind_of(message)
            try:
                text = None if message is None else message.model_dump_json(by_alias=True, exclude_unset=True)
            except ValueError as error:
                # The SDK cannot send it either.
                report_failure("events", error, key=self.key, namespace=self.recorder.log.namespace)
                if stream is None or not kind.final:
                    return ""
                kind, text = EventKind.ERROR, call_error(stream.request_id, NOT_JSON, reason="lost")
            if message and text and len(text) > LARGE_APPEND and not (in_turn or self.recorder.down):
                text = None  # not held meanwhile
                return await self._store_in_turn(stream, stream_id, message)
            if stream is None:
                self._position += 1
                event = NewEvent(stream=STANDALONE_STREAM, position=self._position, kind=kind, message=text)
                final = False
            else:
                event = stream.next_event(kind, text)
                if final := kind.final:
                    stream.answer = event
            recorded = await self.recorder.record(
                self.key,
                event,
                deliver=lambda followers: self._deliver(stream_id, event, followers),
                owner=self._owner,
            )
            if stream is not None:
                if final:
                    if self._calls.get(stream_id) is stream:
                        # Later events under this id belong to another call.
                        del self._calls[stream_id]
                    self._note_recorded(stream)
                is_missed = recorded.outcome is not Outcome.LOST or not can_do_without(event)
                if is_missed and recorded.outcome is not Outcome.LIVE:
                    stream.previous = event.position
            if recorded.outcome is not Outcome.STORED:
                self._in_doubt = True
                return ""
            self._in_doubt = False
            self._newest.note(recorded.sequence, clock.now())
            if stream is None:
                self._identified = True
            else:
                stream.identified = True
            if self._is_blocked(stream, stream_id):
                # Its client does not read: it gets the rest from the log, and the session's other streams go on.
                self._close_response(stream_id)
            request_id = None if stream is None else stream.request_id
            return self.ids.write(event.stream, recorded.sequence, event.position, request_id, final)
        except Exception as error:
            report_failure("events", error, key=self.key, namespace=self.recorder.log.namespace)
            return ""

    async def _find_newest(self) -> bool:
        """Ask the log for the session's newest event, unless the priming event of the next call is stored anyway.

        Returns:
            Whether it is known now.
        """
        if self._is_id_enough and not self.recorder.down:
            sequence = await self.recorder.newest(self.key)
            if sequence is not None:
                self._newest.note(sequence, clock.now())
                return True
        return False

    @property
    def _is_id_enough(self) -> bool:
        """Whether other instances can follow a call of which nothing is stored yet, if its place is known."""
        return not self._in_doubt and self.recorder.instances.reliable_since < math.inf

    def _deliver(self, stream_id: str, event: NewEvent, followers: bool) -> bool:
        """Return whether a client gets an event that is not stored: the SDK sends it where a response is open."""
        if self.live is not None and self.live.is_open(stream_id):
            if not (self._is_blocked(self._calls.get(stream_id), stream_id) and self.can_come_back(stream_id)):
                return True
            self._close_response(stream_id)
        if event.message is None or not followers:
            return False
        return any(f.deliver(event) for f in self.recorder.followers.of(self.key, event.stream))

    def _is_blocked(self, stream: CallStream | None, stream_id: str) -> bool:
        if stream is not None and stream.position <= REQUEST_STREAM_BUFFER_SIZE:
            return False  # all events of the call have room, so that most calls need not look
        resumable = stream is None or stream.resumable
        return resumable and self.live is not None and self.live.is_blocked(stream_id)

    def _close_response(self, stream_id: str) -> None:
        if self.live is not None:
            self.live.close(stream_id)
