"""Answer the GETs of a session with an event log, from which all streams are read.

The SDK would replay and then pass on what this process says. That loses what is said between the two, and all that
another instance says.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final

from mcp.shared.inbound import MCP_PROTOCOL_VERSION_HEADER
from mcp_types import CONNECTION_CLOSED, DEFAULT_NEGOTIATED_VERSION
from sse_starlette import ServerSentEvent
from starlette.requests import Request

from mcp_session_store import telemetry
from mcp_session_store.adapter import clock, responses
from mcp_session_store.adapter.refusals import refuse
from mcp_session_store.adapter.streams.beginning import find_place
from mcp_session_store.adapter.streams.calls import NOT_RESUMABLE, TRIMMED, call_error
from mcp_session_store.adapter.streams.event_ids import Cursor, EventIds
from mcp_session_store.adapter.streams.event_store import RESUMABLE_VERSIONS, SessionEvents
from mcp_session_store.adapter.streams.reader import NOTHING_YET, Begun, Ended, Event, Gap, Lost, StreamReader
from mcp_session_store.adapter.streams.standalone import event_stream, stream_refusal
from mcp_session_store.event_log import STANDALONE_STREAM
from mcp_session_store.records import session_key

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator

    from mcp.server.transport_security import TransportSecurityMiddleware
    from starlette.responses import Response
    from starlette.types import Receive, Scope, Send

    from mcp_session_store.adapter.streams.hold import Hold
    from mcp_session_store.adapter.streams.standalone import StandaloneStream
    from mcp_session_store.records import EventPage

__all__ = ["not_resumable", "serve_stream"]

PART_BYTES: Final = 64 * 1024
"""Bytes of events that are sent together, more or less: what waits for a client that reads slowly, beside a page."""


async def serve_stream(
    events: SessionEvents,
    standalone: StandaloneStream,
    session_id: str,
    security: TransportSecurityMiddleware,
    scope: Scope,
    receive: Receive,
    send: Send,
    *,
    hold: Callable[[], Hold] | None = None,
) -> None:
    """Serve a GET of a session from the event log, which has what was said before and by other instances.

    Args:
        events: Events of the session.
        standalone: The GET stream of this copy of the session.
        session_id: Id of the session.
        security: Check of the request, because the SDK's transport, which would check it, does not see it.
        scope: ASGI scope of the request.
        receive: ASGI receive of the request.
        send: ASGI send of the request.
        hold: Notes that the standalone stream is opened here; `None` where instances do not tell one another of it.
    """
    request = Request(scope, receive)
    last_event_id = request.headers.get("last-event-id") or None
    version = request.headers.get(MCP_PROTOCOL_VERSION_HEADER, DEFAULT_NEGOTIATED_VERSION)
    resumable = version in RESUMABLE_VERSIONS
    cursor = None if last_event_id is None else events.ids.read(last_event_id)
    held: list[Hold] = []

    def holds() -> Hold | None:
        if hold is None:
            return None
        held.append(hold())
        return held[0]

    response = await stream_refusal(request, security)
    if response is None:
        try:
            if last_event_id is not None and cursor is None:
                response = responses.BAD_EVENT_ID.response()
            elif (cursor is None or cursor.standalone) and (
                standalone.is_refused
                or (events.recorder.followers.of(events.key, STANDALONE_STREAM) and not standalone.may_be_taken())
            ):
                response = responses.ONE_STREAM.response()
            elif cursor is not None:
                response = await resume_stream(events, cursor, holds, session_id=session_id, resumable=resumable)
            else:
                response = open_stream(events, holds(), session_id=session_id, resumable=resumable)
        except Exception as error:
            response = refuse(error, events.key, events.recorder.session_log).response()
    try:
        await response(scope, receive, send)
    finally:
        for one in held:
            one.is_open = False


def not_resumable(session_id: str, cursor: Cursor) -> Response:
    """Return the response to a client that comes back for a call where there is no event log."""
    if cursor.final:
        return responses.STREAM_COMPLETE.response()
    return last_words(EventIds(session_key(session_id)), cursor, NOT_RESUMABLE, reason="lost", session_id=session_id)


async def resume_stream(
    events: SessionEvents, cursor: Cursor, holds: Callable[[], Hold | None], *, session_id: str, resumable: bool
) -> Response:
    """Return the response to a client that comes back for a stream: what it missed, and then the live rest.

    Args:
        events: Events of the session.
        cursor: Place of the last event that the client has.
        holds: Notes that the standalone stream is opened here, and returns the hold of it if there are any.
        session_id: Id for the response's header.
        resumable: Whether the client understands priming events.

    Raises:
        SessionStoreError: The log cannot be read.
    """
    if cursor.final:
        return responses.STREAM_COMPLETE.response()
    log = events.recorder.log
    began = clock.now()
    async with events.turn():
        page = await log.read(events.key, cursor.stream, after=cursor.sequence)
    telemetry.resumptions.record(clock.now() - began, telemetry.of(log.namespace))
    # Events since the client left may still be on their way to a response that is not read any more.
    events.resumed(cursor)
    held = holds() if cursor.standalone else None
    if page is None and cursor.sequence == 0:
        page = NOTHING_YET
    if page is None or cursor.sequence > page.last:
        # The log was lost, or set back.
        if not cursor.standalone:
            telemetry.resumed.add(1, telemetry.of(log.namespace, outcome="trimmed"))
            return last_words(events.ids, cursor, TRIMMED, reason="trimmed", session_id=session_id)
        events.recorder.followers.forget(events.key)
        return open_stream(events, held, session_id=session_id, resumable=resumable)
    retry = {"retry": events.retry_interval} if resumable and events.retry_interval is not None else None
    return event_stream(_sent(events, _reader(events, cursor, page), lambda _: retry), session_id)


def open_stream(events: SessionEvents, hold: Hold | None, *, session_id: str, resumable: bool) -> Response:
    """Return the response to a client that opens the standalone stream anew.

    It begins at once, also while events cannot be stored, and goes on with what the log has when that is known. A
    client that understands priming events then gets an id to resume from.
    """

    def primed(cursor: Cursor) -> bytes | None:
        # Without a place no client could come back with; the first event of the session follows.
        return events.priming_event(events.identify(cursor)) if resumable and cursor.sequence else None

    find = partial(find_place, events, hold, resumable=resumable)
    return event_stream(_sent(events, _reader(events, Cursor(STANDALONE_STREAM, 0, 0), find=find), primed), session_id)


def last_words(ids: EventIds, cursor: Cursor, message: str, *, reason: str, session_id: str) -> Response:
    """Return a response that only says why a call gets no answer.

    Its event has an id: to a client that comes back after it, the stream is complete.
    """

    async def messages() -> AsyncIterator[dict[str, Any] | bytes]:
        yield _terminal(ids, cursor, message, reason)

    return event_stream(messages(), session_id)


def _reader(
    events: SessionEvents,
    cursor: Cursor,
    page: EventPage | None = None,
    *,
    find: Callable[[], Awaitable[Cursor | None]] | None = None,
) -> StreamReader:
    """Return the reader of a stream from a place on, with the events that follow if they are read already."""
    return StreamReader(
        events.key,
        events.recorder,
        cursor,
        page,
        turn=events.turn,
        is_active=lambda: events.active,
        find=find,
    )


async def _sent(
    events: SessionEvents, reader: StreamReader, first: Callable[[Cursor], dict[str, Any] | bytes | None]
) -> AsyncIterator[dict[str, Any] | bytes]:
    """Send what a reader reads, as SSE.

    Args:
        events: Events of the session.
        reader: Reader of the stream. It alone holds the first page, as an open response lasts longer than its events.
        first: Returns what is sent before all events with an id, by the place after which they come.
    """
    ids = events.ids
    outcome = "left"
    with reader.tailing():
        try:
            async for item in reader.items():
                match item:
                    case Begun():
                        if (head := first(reader.cursor)) is not None:
                            yield head
                    case list():
                        for part in _parts(ids, item, reader.sends):
                            yield part
                        if item and item[-1].final:
                            outcome = "complete"
                    case Gap():
                        outcome = "trimmed"
                        yield _terminal(ids, reader.cursor, TRIMMED, outcome)
                    case Lost():
                        outcome = "lost"
                        yield _terminal(ids, reader.cursor, responses.LOST, outcome)
                    case Ended(answer):
                        outcome = "ended"
                        yield _terminal(ids, reader.cursor, answer, outcome)
                del item  # rather than hold events that are sent while waiting for more
        finally:
            telemetry.resumed.add(1, telemetry.of(events.recorder.log.namespace, outcome=outcome))


def _parts(ids: EventIds, events: Iterable[Event], sends: Callable[[Event], None]) -> Iterator[bytes]:
    """Return events as SSE, in parts of the response's body, because each part costs more than an event in it.

    Args:
        ids: Writes the ids of the events.
        events: The events.
        sends: Called with the last event of each part before it is returned.
    """
    part, size = [], 0
    for event in events:
        encoded = _as_sse(ids, event)
        part.append(encoded)
        size += len(encoded)
        if size >= PART_BYTES:
            sends(event)
            yield b"".join(part)
            part, size = [], 0
    if part:
        sends(event)
        yield b"".join(part)


def _as_sse(ids: EventIds, event: Event) -> bytes:
    data, event_id = event.message, None if event.cursor is None else ids.write(*event.cursor)
    if event_id is None or "\n" in data or "\r" in data:
        return ServerSentEvent(data, event="message", id=event_id).encode()
    # What sse-starlette writes, at a tenth of the cost, because JSON is nearly always a single line.
    return f"id: {event_id}\r\nevent: message\r\ndata: {data}\r\n\r\n".encode()


def _terminal(ids: EventIds, cursor: Cursor, message: str, reason: str) -> dict[str, Any]:
    data = call_error(cursor.request_id, message, code=CONNECTION_CLOSED, reason=reason)
    return {"event": "message", "data": data, "id": ids.write(*cursor.at(sequence=cursor.sequence, final=True))}
