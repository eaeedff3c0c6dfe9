"""Streams that are read from the log: resumed ones, and the standalone stream of clients that resume.

What the SDK does instead, replaying and then passing on what this process says, loses what is said between the two,
and all that another instance says.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

from mcp.server.streamable_http import GET_STREAM_KEY, check_accept_headers
from mcp.shared.inbound import MCP_PROTOCOL_VERSION_HEADER
from mcp_types import CONNECTION_CLOSED, DEFAULT_NEGOTIATED_VERSION
from mcp_types.version import is_version_at_least
from sse_starlette import EventSourceResponse
from starlette.requests import Request

from mcp_session_store.adapter import responses, telemetry
from mcp_session_store.adapter.background import report_failure
from mcp_session_store.adapter.streams.calls import LOST, NOT_RESUMABLE, TRIMMED, call_error
from mcp_session_store.adapter.streams.event_ids import EventIds
from mcp_session_store.adapter.streams.event_store import RESUMABLE_SINCE, SessionEvents
from mcp_session_store.adapter.streams.followers import Follower
from mcp_session_store.event_log import STANDALONE_STREAM
from mcp_session_store.records import session_key

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from mcp.server.transport_security import TransportSecurityMiddleware
    from starlette.responses import Response
    from starlette.types import Receive, Scope, Send

    from mcp_session_store.adapter.streams.event_ids import Cursor
    from mcp_session_store.records import EventPage

__all__ = ["not_resumable", "serve_stream", "stream_refusal"]

logger = logging.getLogger(__name__)

LOOK_AGAIN: Final = 1.0
"""Seconds after which a response whose client has got everything looks whether the call still runs here."""
STAY: Final = 60.0
"""Seconds for which all others wait to be woken: by an event, by the loss of an instance, by their end."""
RETRY: Final = 1.0
"""Seconds after which the log is read again that could not be."""


async def serve_stream(
    events: SessionEvents,
    session_id: str,
    security: TransportSecurityMiddleware,
    scope: Scope,
    receive: Receive,
    send: Send,
) -> bool:
    """Serve a GET of a session from the event log: what was said elsewhere and before is there.

    Args:
        events: Those of the session.
        session_id: Its id.
        security: What a request must pass: the SDK's transport, which checks it otherwise, is not asked.
        scope: The request's.
        receive: The request's.
        send: The request's.

    Returns:
        False where nothing was sent, because it is a stream of the SDK's transport: a fresh one of a client that knows
        no priming events, or of any while events cannot be stored.
    """
    request = Request(scope, receive)
    last_event_id = request.headers.get("last-event-id") or None
    version = request.headers.get(MCP_PROTOCOL_VERSION_HEADER, DEFAULT_NEGOTIATED_VERSION)
    resumable = is_version_at_least(version, RESUMABLE_SINCE)
    is_followed = bool(events.recorder.following.of(events.key, STANDALONE_STREAM))
    if last_event_id is None and not resumable and not is_followed:
        return False
    response = await stream_refusal(request, security)
    if response is None:
        try:
            if last_event_id is None:
                is_open = is_followed or (events.live is not None and events.live.is_open(GET_STREAM_KEY))
                response = (
                    responses.ONE_STREAM.response() if is_open else await open_stream(events, session_id=session_id)
                )
            elif (cursor := events.ids.read(last_event_id)) is None:
                response = responses.BAD_EVENT_ID.response()
            else:
                response = await resume_stream(events, cursor, session_id=session_id, resumable=resumable)
        except Exception as error:
            response = responses.refuse(error, events.key).response()
    if response is None:
        return False
    await response(scope, receive, send)
    return True


async def stream_refusal(request: Request, security: TransportSecurityMiddleware) -> Response | None:
    """What a GET is answered that the SDK's transport would not serve either; `None` for any other."""
    refusal = await security.validate_request(request, is_post=False)
    if refusal is None and not check_accept_headers(request)[1]:
        refusal = responses.NOT_ACCEPTABLE.response()
    return refusal


def not_resumable(session_id: str, cursor: Cursor) -> Response:
    """The response to a client that comes back for a call where there is no event log."""
    if cursor.final:
        return responses.STREAM_COMPLETE.response()
    return last_words(EventIds(session_key(session_id)), cursor, NOT_RESUMABLE, reason="lost", session_id=session_id)


async def resume_stream(events: SessionEvents, cursor: Cursor, *, session_id: str, resumable: bool) -> Response:
    """The response to a client that comes back for a stream: what it missed, and then the live rest.

    Args:
        events: Those of the session.
        cursor: What the client has seen last.
        session_id: For the response's header.
        resumable: Whether the client understands priming events.

    Raises:
        SessionStoreError: The log cannot be read.
    """
    if cursor.final:
        return responses.STREAM_COMPLETE.response()
    page = await events.recorder.log.read(events.key, cursor.stream, after=cursor.sequence)
    # What was said since the client left may still be on its way to a response that nobody reads.
    events.resumed(cursor)
    if page is None or cursor.sequence > page.last:
        # The log was lost, or set back.
        if not cursor.standalone:
            telemetry.resumed.add(1, {"outcome": "trimmed"})
            return last_words(events.ids, cursor, TRIMMED, reason="trimmed", session_id=session_id)
        response = await open_stream(events, session_id=session_id)
        if response is None:
            telemetry.refused.add(1, {"reason": responses.UNAVAILABLE.reason})
            response = responses.UNAVAILABLE.response()
        return response
    stream = _Stream(events, cursor, page)
    first = {"retry": events.retry_interval} if resumable and events.retry_interval is not None else None
    return _response(stream.messages(first), session_id)


async def open_stream(events: SessionEvents, *, session_id: str) -> Response | None:
    """The response to a client that opens the standalone stream, with an id to resume it from.

    Returns:
        `None` when there can be none for now, because events cannot be stored.
    """
    cursor = await events.prime_standalone()
    if cursor is None:
        return None
    return _response(_Stream(events, cursor, None).messages(events.primed(events.ids.write(cursor))), session_id)


def last_words(ids: EventIds, cursor: Cursor, message: str, *, reason: str, session_id: str) -> Response:
    """A response that only tells a call why it gets no answer.

    With an event id of its own: a client that comes back after it is told that the stream is complete.
    """

    async def messages() -> AsyncIterator[dict[str, Any]]:
        yield _terminal(ids, cursor, message, reason)

    return _response(messages(), session_id)


def _response(messages: AsyncIterator[dict[str, Any]], session_id: str) -> Response:
    headers = {"Cache-Control": "no-cache, no-transform", "mcp-session-id": session_id}
    return EventSourceResponse(messages, headers=headers)


def _terminal(ids: EventIds, cursor: Cursor, message: str, reason: str) -> dict[str, Any]:
    data = call_error(cursor.request_id, message, code=CONNECTION_CLOSED, reason=reason)
    return {"event": "message", "data": data, "id": ids.write(cursor.at(sequence=cursor.sequence, final=True))}


class _Stream:
    """One response that reads a stream from the log.

    Args:
        events: Those of the session.
        cursor: Where it begins.
        page: What follows, if it was read already.
    """

    def __init__(self, events: SessionEvents, cursor: Cursor, page: EventPage | None) -> None:
        self._events = events
        self._recorder = events.recorder
        self._cursor = cursor
        self._page = page
        self._seen = cursor.sequence
        """Up to which sequence of the session there is nothing more for this stream."""
        self._misses = False
        """Whether events of the call are not kept any more that its client has not seen."""

    async def messages(self, first: dict[str, Any] | None) -> AsyncIterator[dict[str, Any]]:
        """What the client is sent, in its order, for as long as the stream lasts.

        Args:
            first: What is sent before anything else.
        """
        here = self._cursor.instance == self._recorder.name
        elsewhere = None if self._cursor.standalone or here else self._cursor.instance
        follower = Follower(self._events.key, self._cursor.stream)
        following = self._recorder.following
        # MCP 2025-11-25, basic/transports, multiple connections: no message goes to two. The latest has them.
        for other in following.of(self._events.key, self._cursor.stream):
            other.close()
        following.add(follower, instance=elsewhere)
        outcome = "left"
        try:
            if first is not None:
                yield first
            page, self._page = self._page, None
            # What was stored before we followed has woken nobody; and a call that has ended may have stored its answer.
            latest = was_over = False
            while not follower.closed:
                if page is not None:
                    self._look_for_gap(page)
                    async for message in self._new(page):
                        yield message
                    if self._misses:
                        outcome = "trimmed"
                        yield self._terminal(TRIMMED, outcome)
                        return
                    if self._cursor.final:
                        outcome = "complete"
                        return
                    if not page.more:
                        self._seen = max(self._seen, page.last)
                        if was_over:
                            outcome = "lost"
                            yield self._terminal(LOST, outcome)
                            return
                is_over = self._over()
                if latest and not is_over and (page is None or not page.more) and follower.head <= self._seen:
                    await follower.wait(self._seen, seconds=LOOK_AGAIN if here else STAY)
                    # Given while the client had all that was stored: so before whatever has been stored since.
                    while follower.offered:
                        event = follower.offered.popleft()
                        yield {"event": "message", "data": event.message}
                        if event.kind.final and not self._cursor.standalone:
                            outcome = "complete"
                            return
                    page = None
                    continue
                page = await self._read(follower)
                latest = page is not None
                was_over = is_over and page is not None
            if follower.answer is not None and not self._cursor.standalone:
                outcome = "ended"
                yield self._terminal(follower.answer, outcome)
        finally:
            following.remove(follower, instance=elsewhere)
            telemetry.resumed.add(1, {"outcome": outcome})

    async def _new(self, page: EventPage) -> AsyncIterator[dict[str, Any]]:
        for event in page.events:
            repeated = not self._cursor.standalone and event.position <= self._cursor.position
            self._seen = event.sequence
            if repeated:
                continue
            if not self._cursor.standalone and event.previous > self._cursor.position:
                self._misses = True
                return
            final = event.kind.final and not self._cursor.standalone
            self._cursor = self._cursor.at(sequence=event.sequence, position=event.position, final=final)
            if event.message is not None:
                yield {"event": "message", "data": event.message, "id": self._events.ids.write(self._cursor)}
            if final:
                return

    def _look_for_gap(self, page: EventPage) -> None:
        """Find out whether events that the client has not seen may have been removed before those of a page."""
        if page.first <= self._seen + 1:
            return
        if self._cursor.standalone:
            logger.info("a client missed events of its standalone stream that are not kept any more")
        else:
            self._misses = self._events.misses(self._cursor, page, self._seen)

    def _over(self) -> bool:
        """Whether the call, which has not been answered, will not be."""
        if self._cursor.standalone:
            return False
        if self._cursor.instance == self._recorder.name:
            return self._cursor.stream not in self._recorder.unfinished
        return self._recorder.following.gone(self._cursor.instance)

    async def _read(self, follower: Follower) -> EventPage | None:
        try:
            page = await self._recorder.log.read(self._events.key, self._cursor.stream, after=self._seen)
        except Exception as error:
            report_failure("streams", error)
            # The client keeps its connection, and gets the rest when it can be read.
            await follower.wait(self._seen, seconds=RETRY, pause=True)
            return None
        if page is None:
            # It goes with its session, whose copy here is about to learn of it.
            follower.close(responses.SESSION_ENDED)
        else:
            follower.moved(page.last)
        return page

    def _terminal(self, message: str, reason: str) -> dict[str, Any]:
        return _terminal(self._events.ids, self._cursor, message, reason)
