"""Routes each request of the handshake era: to its resident session, a restore, an opening, or an end."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

from mcp.server.auth.middleware.bearer_auth import AuthenticatedUser, authorization_context
from mcp.server.streamable_http import SESSION_ID_PATTERN
from starlette.requests import Request

from mcp_session_store.adapter import responses
from mcp_session_store.adapter.clock import now
from mcp_session_store.adapter.outage import RequestWait
from mcp_session_store.adapter.refusals import Refusals
from mcp_session_store.adapter.relay.messages import ERROR, NOTIFICATION, RESULT, relayed
from mcp_session_store.adapter.replay.marker import RESTORE_MARKER
from mcp_session_store.adapter.requests import INITIALIZE, POSTED, READ_AT_ONCE, ClientGone, Incoming, Posted
from mcp_session_store.adapter.responses import SessionNotFound
from mcp_session_store.adapter.sessions.held_response import HeldResponse
from mcp_session_store.adapter.sessions.recording import RECORD_WRITER
from mcp_session_store.adapter.sessions.resident import RESIDENT_SESSION, ResidentSession
from mcp_session_store.adapter.sessions.state import STATE
from mcp_session_store.adapter.streams.event_ids import EventIds
from mcp_session_store.adapter.streams.resumption import not_resumable, serve_stream
from mcp_session_store.adapter.streams.standalone import stream_refusal
from mcp_session_store.records import session_key

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from mcp.server.auth.middleware.bearer_auth import AuthorizationContext
    from mcp.server.transport_security import TransportSecurityMiddleware
    from starlette.responses import Response
    from starlette.types import Message, Receive, Scope, Send

    from mcp_session_store.adapter.relay.relay import Relay
    from mcp_session_store.adapter.sessions.activity import ActivityReporter
    from mcp_session_store.adapter.sessions.departures import Departures
    from mcp_session_store.adapter.sessions.ending import Ender
    from mcp_session_store.adapter.sessions.opening import Opener
    from mcp_session_store.adapter.sessions.recording import RecordWriter
    from mcp_session_store.adapter.sessions.registry import Registry
    from mcp_session_store.adapter.sessions.restoring import Restorer

__all__ = ["Router"]

_T = TypeVar("_T")

MAX_SESSION_ID: Final = 128
"""Characters of a session id; a longer one costs no query. The SDK's own have 32."""


class Router:
    """Decides for each request of the handshake era (2025-11-25 and earlier) what serves it.

    Args:
        registry: Registry of the sessions in memory.
        opener: Serves requests without a session id.
        restorer: Restores sessions that are not in memory.
        ender: Ends sessions.
        activity: Notes which sessions are in use.
        writer: Commits what requests change in the record of their session.
        security: Check that each request passes before a session is looked up; the SDK has it in its transport.
        has_event_store: Whether the SDK's transports have an event store of the user's.
        max_body: Highest number of bytes of a body.
        departures: Watches the clients that wait for JSON responses; `None` where there are none.
        relay: Takes what is for other instances; `None`: nothing is.
    """

    def __init__(
        self,
        registry: Registry,
        opener: Opener,
        restorer: Restorer,
        ender: Ender,
        activity: ActivityReporter,
        writer: RecordWriter,
        security: TransportSecurityMiddleware,
        *,
        has_event_store: bool,
        max_body: int,
        departures: Departures | None,
        relay: Relay | None,
    ) -> None:
        self._registry = registry
        self._opener = opener
        self._restorer = restorer
        self._ender = ender
        self._changes = ender.changes
        self._activity = activity
        self._writer = writer
        self._security = security
        self._has_event_store = has_event_store
        self._max_body = max_body
        self._refusals = Refusals(max_body, registry.log)
        self._departures = departures
        self._relay = relay
        self._streams = None if relay is None else relay.streams

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request: by its resident session, after a restore, or by a new session."""
        session_id: str | None = None
        for name, value in scope["headers"]:
            if name == b"mcp-session-id":
                session_id = value.decode("latin-1")
                break
        user = scope.get("user")
        requestor = authorization_context(user) if isinstance(user, AuthenticatedUser) else None
        incoming = Incoming(receive)
        # Before all else, because a replay carries a copy of the scope.
        scope[STATE] = self._writer.state
        if session_id is None:
            await incoming.read(self._max_body)
            if incoming.whole:
                await self._opener.open(requestor, scope, incoming, send)
            return  # or the client has gone
        method = scope["method"]
        if method == "POST":
            await incoming.read(READ_AT_ONCE)
            if incoming.gone:
                return
            body = incoming.body
            relay = self._relay
            if relay is not None and (RESULT in body or ERROR in body or NOTIFICATION in body):
                message = relayed(body, relay.methods) if incoming.whole else None
                if message is not None or not incoming.whole:
                    take = partial(relay.take, message, session_id, requestor, scope, incoming)
                    if (answer := await self._find(session_id, scope, incoming, take)) is not None:
                        await answer(scope, incoming.receive, send)
                        return
        session = self._registry.get(session_id)
        if (
            session is None
            or not session.serving
            or session.owner != requestor
            or method not in ("POST", "GET")
            or now() > self._changes.verified_until
        ):
            found = await self._find(session_id, scope, incoming, partial(self._restored, session_id, requestor, scope))
            if not isinstance(found, ResidentSession):
                await found(scope, incoming.receive, send)
                return
            session = found
        else:
            session.pin()
        try:
            if method == "POST" and not incoming.whole:
                await self._read_rest(incoming, scope, send)
                return
            self._activity.note(session)
            scope[RESIDENT_SESSION] = session
            scope[RECORD_WRITER] = self._writer
            if session.marker is not None:
                scope[RESTORE_MARKER] = session.marker
            if method == "GET":
                with session.stream():
                    await self._serve_stream(session, scope, incoming.receive, _noting_standalone_stream(session, send))
                return
            posted: Posted | None = None
            if session.events is not None:
                posted = Posted(incoming.body)
                POSTED.set(posted)
            receive = incoming.receive
            if self._departures is not None:
                self._departures.waiting[incoming] = session.transport
                send = responses.answering_lost_calls(scope, incoming, send)
            if INITIALIZE in incoming.body:
                # The answer to a handshake promises durability.
                held = HeldResponse(session, scope, incoming, send, opening=False)
                await held.answered_by(partial(_serve_post, session, posted, scope, receive))
                return
            # Not by `_serve_post`, which would be one more call.
            to_sdk = send if posted is None else posted.sending_to(send)
            await session.transport.handle_request(scope, receive, to_sdk)
        finally:
            if self._departures is not None and incoming in self._departures.waiting:
                del self._departures.waiting[incoming]
                if self._departures.watches:
                    self._departures.over(incoming)
            session.unpin()

    async def _read_rest(self, incoming: Incoming, scope: Scope, send: Send) -> None:
        """Read a long body to its end, and serve the request."""
        await incoming.read(self._max_body)
        if incoming.whole:
            # From the start, because the copy may have left memory meanwhile.
            await self.serve(scope, incoming.receive, send)
        elif not incoming.gone:
            await responses.too_large()(scope, incoming.receive, send)

    async def _restored(
        self, session_id: str, requestor: AuthorizationContext | None, scope: Scope, waits: RequestWait
    ) -> ResidentSession | Response:
        """Return the session of a request, pinned, or the answer to a DELETE."""
        if scope["method"] == "DELETE":
            await self._ender.delete(session_id, requestor, waits)
            return responses.session_ended(session_id)
        return await self._restorer.restored(session_id, requestor, scope, waits)

    async def _find(
        self, session_id: str, scope: Scope, incoming: Incoming, find: Callable[[RequestWait], Awaitable[_T]]
    ) -> _T | Response:
        """Return what is found for a request of a session, or the answer that the request gets instead.

        Args:
            session_id: Id of the session.
            scope: ASGI scope of the request.
            incoming: Body of the request, as far as it was read.
            find: Finds it, once it is known that the request may ask.
        """
        waits = RequestWait(scope["method"], incoming)
        request = Request(scope)
        if (refusal := await self._security.validate_request(request, is_post=request.method == "POST")) is not None:
            return refusal
        if request.method not in ("POST", "GET", "DELETE"):
            return responses.METHOD_NOT_ALLOWED.response()
        try:
            if len(session_id) > MAX_SESSION_ID or not SESSION_ID_PATTERN.fullmatch(session_id):
                raise SessionNotFound("malformed")
            return await find(waits)
        except ClientGone:
            return responses.UNAVAILABLE.response()  # which reaches no client
        except Exception as error:
            return await self._refusals.response(error, session_key(session_id), scope, incoming)

    async def _serve_stream(self, session: ResidentSession, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a GET: from the event log where there is one, which has earlier events and other instances' events."""
        standalone, session_id = session.standalone, session.session_id
        hold = None if self._streams is None else partial(self._streams.opened, session)
        if session.events is not None:
            await serve_stream(session.events, standalone, session_id, self._security, scope, receive, send, hold=hold)
            return
        if standalone.is_refused:
            await responses.ONE_STREAM.response()(scope, receive, send)
            return
        if self._has_event_store:
            # Only the transport can tell which stream is to be resumed.
            served = b"last-event-id" in (name for name, value in scope["headers"] if value)
            if served:
                await standalone.serve_resumed(partial(session.transport.handle_request, scope, receive, send), hold)
        else:
            served = await self._answer_without_events(session, scope, receive, send)
        if not served:
            await standalone.serve(session_id, self._security, scope, receive, send, hold=hold)

    async def _answer_without_events(
        self, session: ResidentSession, scope: Scope, receive: Receive, send: Send
    ) -> bool:
        """Answer a client that comes back with an event id, perhaps from a time when there was an event log.

        Returns:
            False for a request for the standalone stream.
        """
        request = Request(scope, receive)
        last_event_id = request.headers.get("last-event-id")
        if not last_event_id:
            return False
        cursor = EventIds(session_key(session.session_id)).read(last_event_id)
        if cursor is not None and cursor.standalone:
            # The SDK sends no response at all where there is nothing to replay from.
            scope["headers"] = [(name, value) for name, value in scope["headers"] if name != b"last-event-id"]
            return False
        response = await stream_refusal(request, self._security)
        if response is None:
            if cursor is None:
                response = responses.BAD_EVENT_ID.response()
            else:
                response = not_resumable(session.session_id, cursor)
        await response(scope, receive, send)
        return True


def _serve_post(
    session: ResidentSession, posted: Posted | None, scope: Scope, receive: Receive, send: Send
) -> Awaitable[None]:
    return session.transport.handle_request(scope, receive, send if posted is None else posted.sending_to(send))


def _noting_standalone_stream(session: ResidentSession, send: Send) -> Send:
    """Return the `send` of a GET that notes when the standalone stream opens."""

    async def noting(message: Message) -> None:
        await send(message)
        if message["type"] == "http.response.start" and message["status"] == 200:
            session.loop.standalone_stream_open.set()

    return noting
