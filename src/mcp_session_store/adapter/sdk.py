"""All private names of the SDK and of FastMCP that this package uses, each with its reason. No other module uses any.

The SDK has no way to plug in a session store, so its session manager is extended here. A check at import names the SDK
versions that work, instead of failing later while a client waits.
"""

from __future__ import annotations

import contextlib
import json
import sys
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast

import anyio
from mcp.server import streamable_http_manager
from mcp.server.connection import Connection
from mcp.server.lowlevel.server import Server
from mcp.server.mcpserver import MCPServer
from mcp.server.runner import ServerRunner
from mcp.server.streamable_http import GET_STREAM_KEY, StreamableHTTPServerTransport
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from mcp.shared.dispatcher import DispatchContext
from mcp.shared.jsonrpc_dispatcher import JSONRPCDispatcher
from mcp.shared.message import SessionMessage
from typing_extensions import get_protocol_members

from mcp_session_store.adapter import responses
from mcp_session_store.errors import ConfigurationError, NotRunning

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence

    from anyio.abc import TaskGroup
    from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
    from fastmcp import FastMCP
    from mcp.server.auth.middleware.bearer_auth import AuthorizationContext
    from mcp.server.context import ServerRequestContext
    from mcp.server.streamable_http import EventCallback, EventMessage, EventStore
    from mcp.shared._stream_protocols import ReadStream, WriteStream
    from mcp_types import JSONRPCMessage, RequestId
    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send
    from typing_extensions import TypeIs

    MessageReadStream: TypeAlias = ReadStream[SessionMessage | Exception]
    MessageWriteStream: TypeAlias = WriteStream[SessionMessage]
    TransportStream: TypeAlias = tuple[MemoryObjectSendStream[EventMessage], MemoryObjectReceiveStream[EventMessage]]
    TransportStreams: TypeAlias = dict[RequestId, TransportStream]
    """Open responses of a transport, by the names of their streams."""

__all__ = [
    "ManagerSeams",
    "ManagerTasks",
    "TransportEvents",
    "TransportStream",
    "TransportStreams",
    "check_dispatch_context",
    "deliver",
    "end_json_response",
    "fastmcp_providers",
    "guards_itself",
    "is_fastmcp",
    "make_kernel",
    "make_transport",
    "on_close_standalone",
    "owners_of",
    "reaches_client",
    "replace_state_storage",
    "scope_event_store",
    "serve_loop",
    "session_id_of",
    "set_session_manager",
    "streams_of",
    "transports_of",
    "underlying_server",
    "was_started",
]

# The transport's class and the server loop are looked up in this module at each call, because tests of the SDK and of
# its users replace them there.
_manager_module: Any = streamable_http_manager


def make_kernel(
    manager: ManagerSeams, read: MessageReadStream, write: MessageWriteStream, session_id: str
) -> tuple[JSONRPCDispatcher[Any], ServerRunner[Any]]:
    """Return the parts of a server loop over a pair of streams, made as the SDK's `serve_loop` makes them."""
    dispatcher: JSONRPCDispatcher[Any] = JSONRPCDispatcher(read, write, inline_methods=frozenset({"initialize"}))
    connection = Connection.for_loop(dispatcher, session_id=session_id)
    return dispatcher, ServerRunner(manager.app, connection, manager._lifespan_state)


def _check_sdk() -> None:
    manager = StreamableHTTPSessionManager(cast("Server[Any]", None))
    needed = (
        "_discard_session",
        "_handle_stateful_request",
        "_has_started",
        "_lifespan_state",
        "_server_instances",
        "_session_owners",
        "_task_group",
    )
    missing = [name for name in needed if not hasattr(manager, name)]
    missing += [
        name for name in ("serve_loop", "StreamableHTTPServerTransport") if not hasattr(streamable_http_manager, name)
    ]
    transport = StreamableHTTPServerTransport(mcp_session_id=None)
    seams = ["_event_store", "_message_metadata", "_mint_priming_event", "_read_stream_writer", "_request_streams"]
    missing += [name for name in (*seams, "close_sse_stream") if not hasattr(transport, name)]
    if missing:
        raise ImportError(f"its session manager or transport has no {', '.join(missing)}")
    # Public names, but the SDK calls them provisional.
    try:
        _, runner = make_kernel(cast("ManagerSeams", manager), cast("Any", None), cast("Any", None), "")
        _ = runner.on_request, runner.on_notify
    except (AttributeError, TypeError) as error:
        raise ImportError(f"its server loop is made in another way: {error}") from error


_check_sdk()


def check_dispatch_context(context: type) -> None:
    """Check that a class has all that the SDK's handlers find in a dispatch context; else raise `ImportError`."""
    # Not left to a type checker: where the SDK comes to read more, each restore would be answered by an error.
    missing = [name for name in sorted(get_protocol_members(DispatchContext)) if not hasattr(context, name)]
    if missing:
        raise ImportError(f"its DispatchContext has {', '.join(missing)}, which {context.__name__} does not have")


class ManagerSeams(StreamableHTTPSessionManager):
    """The SDK's session manager, with the seams that the session layer plugs into."""

    _evict_transport: Callable[[str, StreamableHTTPServerTransport], Awaitable[None]]
    """Evicts the copy of a session that has this transport."""
    _has_refused = False

    def _serve_sessions_by(self, serve: Callable[[Scope, Receive, Send], Coroutine[Any, Any, None]]) -> None:
        """Have a function serve the requests of the handshake era (2025-11-25 and earlier)."""
        # The SDK decides here between a resident session, a new one, and 404: everything that a store changes begins
        # with this decision. Requests of the modern era (2026-07-28) never come here. Replaced instead of overridden,
        # because each step of a request would pass through an override.
        self._handle_stateful_request = serve  # type: ignore[method-assign, assignment]

    @contextlib.asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        """See the SDK's manager."""
        async with super().run():
            # Exchanged instead of checked for each request.
            self.asgi_app.app = self._handle_request
            try:
                yield
            finally:
                self.asgi_app.app = self._refuse_while_not_running

    async def _refuse_while_not_running(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request that comes before `run()` or after it; the first that comes before also fails.

        Raises:
            NotRunning: The first time, so that the log of the ASGI server says what to do.
        """
        if self._has_started:
            await responses.SHUTTING_DOWN.response()(scope, receive, send)
            return
        await responses.NOT_RUNNING.response()(scope, receive, send)
        if not self._has_refused:
            self._has_refused = True
            raise NotRunning(responses.LIFESPAN_NOT_ENTERED)

    # The SDK forgets a session by its id, but copies share their id with their successors: a late call
    # of this must not remove a successor.
    async def _discard_session(self, session_id: str, transport: StreamableHTTPServerTransport) -> None:
        await self._evict_transport(session_id, transport)

    def _event_store_for(self, session_id: str) -> EventStore | None:  # noqa: ARG002 - for overrides
        """Return the event store that the transport of this session gets."""
        return self.event_store


class ManagerTasks:
    """The task group that a manager holds open while it runs; its tasks outlive the request that starts them.

    Args:
        manager: The manager.
    """

    __slots__ = ("_manager",)

    def __init__(self, manager: ManagerSeams) -> None:
        self._manager = manager

    def start_soon(self, function: Callable[..., Coroutine[Any, Any, Any]], *args: Any) -> None:
        """Start a task and do not wait for it."""
        # The SDK refuses each request that comes while the manager does not run.
        cast("TaskGroup", self._manager._task_group).start_soon(function, *args)

    def start(self, function: Callable[..., Coroutine[Any, Any, Any]], *args: Any) -> Awaitable[Any]:
        """Start a task and wait until it says that it has started."""
        return cast("TaskGroup", self._manager._task_group).start(function, *args)


def transports_of(manager: ManagerSeams) -> dict[str, StreamableHTTPServerTransport]:
    """Return the SDK's own table of resident transports; FastMCP and users' tests read it, so it is kept true."""
    return manager._server_instances


def owners_of(manager: ManagerSeams) -> dict[str, AuthorizationContext]:
    """Return the SDK's own table of the principals of resident sessions; kept true for the same readers."""
    return manager._session_owners


def was_started(manager: ManagerSeams) -> bool:
    """Return whether `run()` of a manager was entered, which it can be once."""
    return manager._has_started


class TransportEvents(Protocol):
    """Events of one session, as a transport uses them: an SDK `EventStore`, and what the SDK does not pass to one."""

    def begin_streams(self, streams: TransportStreams, close: Callable[[str], None]) -> None:
        """Begin with the open responses of a transport, and the function that closes one of them."""

    async def prime(self, stream_id: str, protocol_version: str) -> None:
        """Begin the stream of a call, and send its priming event if the client is to get one."""

    def can_come_back(self, stream_id: str) -> bool:
        """Return whether the client of a stream may hold an event id to resume it with."""

    def close_stream(self, stream_id: str) -> None:
        """Close the responses that carry a stream beside the transport, because the server closes it."""

    async def store_event(self, stream_id: str, message: JSONRPCMessage | None) -> str:
        """See `EventStore.store_event`."""

    async def replay_events_after(self, last_event_id: str, send_callback: EventCallback) -> str | None:
        """See `EventStore.replay_events_after`."""


def make_transport(
    manager: ManagerSeams, session_id: str, events: TransportEvents | None
) -> StreamableHTTPServerTransport:
    """Return a transport of the SDK for a session, configured as the SDK's manager does it.

    It has no idle timeout, because a transport whose timeout has fired answers 404, and because the manager evicts.

    Args:
        manager: Manager whose configuration it gets.
        session_id: Id of the session.
        events: Events of the session; `None` for the manager's event store, if it has one.
    """
    event_store = manager._event_store_for(session_id) if events is None else events
    transport: StreamableHTTPServerTransport = _manager_module.StreamableHTTPServerTransport(
        mcp_session_id=session_id,
        is_json_response_enabled=manager.json_response,
        event_store=event_store,
        security_settings=manager.security_settings,
        retry_interval=manager.retry_interval,
        idle_timeout=None,
    )
    if events is not None:
        _begin_streams(transport, events)
    return transport


def streams_of(transport: StreamableHTTPServerTransport) -> TransportStreams:
    """Return the open responses of a transport, whose router passes messages on to these, and drops all others."""
    return transport._request_streams


def _begin_streams(transport: StreamableHTTPServerTransport, events: TransportEvents) -> None:
    """Connect a session's events with what the SDK does not pass to an event store."""
    transport_seams: Any = transport
    close = transport.close_sse_stream
    events.begin_streams(streams_of(transport), close)

    def close_sse_stream(request_id: RequestId) -> None:
        stream_id = str(request_id)
        # A client without an id, because nothing could be stored, would not come back.
        if events.can_come_back(stream_id):
            close(request_id)
            events.close_stream(stream_id)

    # Called once for each request that is answered by a stream, before it is dispatched. The SDK sends none where it
    # returns none: through the SDK's streams, a priming event would cost a twentieth of a call.
    transport_seams._mint_priming_event = events.prime
    # A stream that was resumed is not the transport's any more.
    transport_seams.close_sse_stream = close_sse_stream


def on_close_standalone(transport: StreamableHTTPServerTransport, called: Callable[[], None]) -> None:
    """Have a function be called, too, when the application closes the GET stream of a transport."""
    close = transport.close_standalone_sse_stream

    def close_standalone_sse_stream() -> None:
        close()
        called()

    cast("Any", transport).close_standalone_sse_stream = close_standalone_sse_stream


def end_json_response(transport: StreamableHTTPServerTransport, body: bytes) -> None:
    """End the JSON response to a request, because its client has gone; the call runs on.

    Args:
        transport: Transport that answers the request.
        body: Body of the request.
    """
    # Public, and for JSON responses as well, although the SDK does not say so: the request ends by an answer that
    # reaches no client. Not the one of the instance, which `_begin_streams` replaces.
    StreamableHTTPServerTransport.close_sse_stream(transport, str(json.loads(body).get("id")))


def reaches_client(transport: StreamableHTTPServerTransport, call: RequestId | None) -> bool:
    """Return whether what the server asks, for a call if it is, goes to the client, or is kept for it as an event."""
    # As the transport's router decides, which drops all else and says nothing of it.
    stream_id = GET_STREAM_KEY if call is None else str(call)
    return transport._event_store is not None or stream_id in transport._request_streams


async def deliver(
    transport: StreamableHTTPServerTransport,
    message: JSONRPCMessage,
    request: Request | None,
    *,
    can_ask: bool = True,
) -> None:
    """Give a server loop a message that no request has brought to this instance; return when the loop has read it.

    Args:
        transport: Transport of the session.
        message: The message.
        request: Request in which its handler finds what it finds in that of any message; `None` for an answer.
        can_ask: Whether the handler may ask the client something in relation to the message.

    Raises:
        anyio.BrokenResourceError, anyio.ClosedResourceError: The loop has ended.
    """
    # As the transport itself does it, after it has answered the request that brought the message.
    if (writer := transport._read_stream_writer) is None:
        raise anyio.ClosedResourceError
    metadata = transport._message_metadata(cast("Request", request))
    if not can_ask:
        metadata.can_send_request = False
    await writer.send(SessionMessage(message, metadata=metadata))


def serve_loop(
    manager: ManagerSeams, read: MessageReadStream, write: MessageWriteStream, session_id: str
) -> Awaitable[None]:
    """Return the SDK's server loop over a pair of streams."""
    loop: Awaitable[None] = _manager_module.serve_loop(
        manager.app, read, write, lifespan_state=manager._lifespan_state, session_id=session_id
    )
    return loop


def session_id_of(ctx: ServerRequestContext[Any, Any]) -> str | None:
    """Return the id of the session that a message came in; `None` on a transport without sessions."""
    # Public on the connection, which the context of a request has no public name for.
    return ctx.session._connection.session_id


def underlying_server(server: object) -> Server[Any]:
    """Return the low-level server under a server of any framework.

    Raises:
        ConfigurationError: The framework is not supported.
    """
    if isinstance(server, Server):
        return server
    if isinstance(server, MCPServer):
        # MCPServer has no public name for it.
        return server._lowlevel_server
    if is_fastmcp(server):
        # FastMCP has no public name either; its own app factory reads this attribute.
        return server._mcp_server
    raise ConfigurationError(
        f"cannot serve a {type(server).__module__}.{type(server).__qualname__} as the server: give an MCPServer, a "
        "low-level mcp.server.lowlevel.Server, or a FastMCP 4 server"
    )


def is_fastmcp(server: object) -> TypeIs[FastMCP[Any]]:
    """Return whether it is a FastMCP server, without importing FastMCP: a program with such a server has done so."""
    module = sys.modules.get("fastmcp")
    return module is not None and isinstance(server, module.FastMCP)


def set_session_manager(server: Server[Any], manager: StreamableHTTPSessionManager) -> None:
    """Make `server.session_manager` the manager that serves, for programs that mount the app and run the manager."""
    server._session_manager = manager


def guards_itself(server: object, options: Mapping[str, Any]) -> bool:
    """Return whether a server's framework guards against foreign hosts by its own settings: FastMCP, when told to."""
    default = is_fastmcp(server) and sys.modules["fastmcp"].settings.http_host_origin_protection
    return is_fastmcp(server) and bool(options.get("host_origin_protection", default))


def scope_event_store(event_store: EventStore, session_id: str) -> EventStore:
    """Return FastMCP's event store for one session."""
    # FastMCP scopes it by a random id for each transport, under which no event could be found after a restore.
    from fastmcp.server.session_scoped_event_store import SessionScopedEventStore

    return SessionScopedEventStore(event_store, session_id=session_id)


def fastmcp_providers(node: Any) -> tuple[str, Sequence[object]]:
    """Return the namespace that a provider of a FastMCP server gives, and the servers and providers below it."""
    namespace = next((found for one in node._transforms if (found := getattr(one, "_prefix", ""))), "")
    below = [getattr(node, "server", None), getattr(node, "_inner", None), *getattr(node, "providers", ())]
    return namespace, [one for one in below if one is not None]


def replace_state_storage(server: FastMCP[Any], replace: Callable[[Any], Any]) -> None:
    """Replace the `session_state_store` of a FastMCP server, if it has one, and what the server has made of it."""
    vars(server).update(_state_storage=replace(server._state_storage), _FastMCP__state_store=None)
