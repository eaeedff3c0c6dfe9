"""A server that tells what it saw, and instances of it that share a store."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import anyio
import mcp_types as types
from mcp.server.auth.middleware.bearer_auth import AuthenticatedUser
from mcp.server.auth.provider import AccessToken
from mcp.server.lowlevel.server import Server

from mcp_session_store import DurableSessionManager, durable_app, get_restore_marker
from mcp_session_store.adapter.instances import Instances
from mcp_session_store.adapter.question_ids import QuestionIds
from tests.support.asgi import PATIENCE, Client, until
from tests.support.faulty_stores import FaultyLog, FaultyStore
from tests.support.internals import has_polled, registry_of, transports_in

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    from anyio.abc import TaskGroup
    from mcp.server.context import CallNext, HandlerResult, ServerRequestContext
    from starlette.applications import Starlette

    from mcp_session_store import Mailbox, SessionRestoreMarker, SessionStore
    from tests.support.faulty_stores import Sessions

    RequestContext = ServerRequestContext[Any, Any]


@dataclass
class Seen:
    """One message that came through the server's middleware."""

    method: str
    params: Mapping[str, Any] | None
    marker: SessionRestoreMarker | None
    request: Any
    """The Starlette request."""

    @property
    def replayed(self) -> bool:
        return self.marker is not None and self.marker.replaying


class Notes:
    """A low-level server with a few tools, that tests look into.

    The tools: `add`; `client` tells what the client declared; `wait` runs until `proceed` is set; and those that a
    test brings along.
    """

    def __init__(self, name: str = "notes") -> None:
        self.seen: list[Seen] = []
        """All messages, in the order of the middleware chain's entry."""
        self.initialized: list[SessionRestoreMarker | None] = []
        """One entry for each time that the handler of `notifications/initialized` ran, with the marker it saw."""
        self.on_initialize: Callable[[RequestContext], Awaitable[None]] | None = None
        """A step of the middleware that runs before `initialize` is handled."""
        self.after_initialize: Callable[[RequestContext, HandlerResult], Awaitable[HandlerResult]] | None = None
        """One that runs afterwards, and gives the result."""
        self.on_initialized: Callable[[RequestContext], Awaitable[None]] | None = None
        """What the handler of `notifications/initialized` does."""
        self.on_message: Callable[[RequestContext], None] | None = None
        self.tools: dict[str, Callable[[RequestContext], Awaitable[str]]] = {}
        """What a test brings along, by name: each gives the text of its result."""
        self.waiting = 0
        """Calls of `wait` that run."""
        self.waited = 0
        """Calls of `wait` that have returned by themselves."""
        self.proceed = anyio.Event()
        self.server: Server[Any] = Server(name, on_list_tools=self._list_tools, on_call_tool=self._call_tool)
        self.server.middleware.append(self._middleware)
        self.server.add_notification_handler(
            "notifications/initialized", types.NotificationParams, self._handle_initialized
        )

    def replayed(self, method: str) -> list[Seen]:
        """The replayed messages of this method."""
        return [seen for seen in self.seen if seen.method == method and seen.replayed]

    def genuine(self, method: str) -> list[Seen]:
        """The messages of this method that a client sent."""
        return [seen for seen in self.seen if seen.method == method and not seen.replayed]

    async def _middleware(self, ctx: RequestContext, call_next: CallNext) -> HandlerResult:
        self.seen.append(Seen(ctx.method, ctx.params, get_restore_marker(ctx), ctx.request))
        if self.on_message is not None:
            self.on_message(ctx)
        if ctx.method != "initialize":
            return await call_next(ctx)
        if self.on_initialize is not None:
            await self.on_initialize(ctx)
        result = await call_next(ctx)
        return result if self.after_initialize is None else await self.after_initialize(ctx, result)

    async def _handle_initialized(self, ctx: RequestContext, _params: types.NotificationParams) -> None:
        self.initialized.append(get_restore_marker(ctx))
        if self.on_initialized is not None:
            await self.on_initialized(ctx)

    async def _list_tools(
        self, _ctx: RequestContext, _params: types.PaginatedRequestParams | None
    ) -> types.ListToolsResult:
        return types.ListToolsResult(
            tools=[types.Tool(name=name, input_schema={"type": "object"}) for name in ("add", "client", "wait")]
        )

    async def _call_tool(self, ctx: RequestContext, params: types.CallToolRequestParams) -> types.CallToolResult:
        arguments = params.arguments or {}
        if params.name in self.tools:
            text = await self.tools[params.name](ctx)
        elif params.name == "add":
            text = str(arguments["a"] + arguments["b"])
        elif params.name == "client":
            declared = ctx.session.client_params
            text = json.dumps(
                {
                    "params": declared and declared.model_dump(by_alias=True, mode="json", exclude_unset=True),
                    "protocol_version": ctx.protocol_version,
                }
            )
        else:
            self.waiting += 1
            try:
                await self.proceed.wait()
                self.waited += 1
            finally:
                self.waiting -= 1
            text = "waited"
        return types.CallToolResult(content=[types.TextContent(type="text", text=text)])


@dataclass
class Instance:
    """One instance: an app that is running."""

    app: Starlette
    manager: DurableSessionManager
    notes: Notes
    tasks: TaskGroup = field(repr=False)

    def client(self, session_id: str | None = None, **settings: Any) -> Client:
        """A client of this instance."""
        return Client(self.app, self.tasks, session_id=session_id, **settings)

    @property
    def residents(self) -> int:
        """Sessions that are in memory, by the SDK's own table."""
        return len(transports_in(self.manager))

    def assert_seats_match(self) -> None:
        """Nobody sits on a seat but residents."""
        assert registry_of(self.manager).reserved == self.residents == len(list(registry_of(self.manager)))

    async def at_rest(self) -> None:
        """Wait until all notifications are handled, which their 202 precedes; calls of `wait` may still run."""
        await until(lambda: sum(session.in_flight for session in registry_of(self.manager)) <= self.notes.waiting)

    async def first_poll(self) -> None:
        """Wait for the first poll of changes, which verifies what is in memory, and so is a report of activity."""
        await until(lambda: has_polled(self.manager))

    async def terminate(self, session_id: str) -> None:
        """Terminate a transport as FastMCP does at shutdown, past the manager."""
        await transports_in(self.manager)[session_id].terminate()


@asynccontextmanager
async def instance(store: SessionStore | str, notes: Notes | None = None, **options: Any) -> AsyncIterator[Instance]:
    """Start an instance; at the end its requests are cancelled, and it is shut down.

    Args:
        store: Its store, or the URL of a database.
        notes: Its server, which belongs to it alone.
        options: For `durable_app`. No request waits for a store that is away, unless `outage_patience` is given. The
            mailbox is the store's unless given.
    """
    notes = notes or Notes()
    if "settings" not in options:
        options.setdefault("outage_patience", 0)
    if isinstance(store, FaultyStore):
        log = options.get("events")
        options.setdefault("relay", log.mailbox if isinstance(log, FaultyLog) else store.mailbox)
    app = durable_app(notes.server, store, **options)
    async with running(app) as tasks:
        manager = notes.server.session_manager
        assert isinstance(manager, DurableSessionManager)
        yield Instance(app, manager, notes, tasks)


@asynccontextmanager
async def running(app: Starlette) -> AsyncIterator[TaskGroup]:
    """Start an app; at the end its requests, which run in the task group given, are cancelled, and it is shut down."""
    failure: BaseException | None = None
    try:
        async with app.router.lifespan_context(app), anyio.create_task_group() as tasks:
            try:
                yield tasks
            except BaseException as error:
                failure = error
                raise
            tasks.cancel_scope.cancel()
    except BaseExceptionGroup:
        # A test that failed shows its own failure, not the groups around it.
        if isinstance(failure, Exception):
            raise failure from None
        raise


class Empty:
    """A memory without sessions."""

    resident = streams = 0


def lone_instance(
    mailbox: Mailbox,
    instance: str = "one:1:0123abcd",
    *,
    server: str = "notes",
    dead_after: timedelta = timedelta(minutes=1),
) -> Instances:
    """An instance without a manager, as it knows the others."""
    return Instances(
        mailbox, QuestionIds(), Empty(), instance=instance, server=server, dead_after=dead_after, relay=True
    )


def principal(client_id: str, *, subject: str | None = None, issuer: str | None = None) -> AuthenticatedUser:
    """An authenticated user, as a token verifier's middleware puts it into the ASGI scope."""
    claims = None if issuer is None else {"iss": issuer}
    return AuthenticatedUser(
        AccessToken(token=f"token-of-{client_id}", client_id=client_id, scopes=[], subject=subject, claims=claims)
    )


class Clock:
    """The instances' monotonic clock, and that of a store, put forward by the same time.

    What sleeps is not woken by it.
    """

    def __init__(self, sessions: Sessions) -> None:
        self.ahead = 0.0
        self._sessions = sessions

    def advance(self, passed: timedelta, *, store: bool = True) -> None:
        """Let time pass, for the store too unless told otherwise."""
        self.ahead += passed.total_seconds()
        if store:
            self._sessions.ahead += passed


async def wait_for(event: anyio.Event) -> None:
    """Wait for an event, with a bound."""
    with anyio.fail_after(PATIENCE):
        await event.wait()


async def open_session(store: FaultyStore, params: dict[str, Any] | None = None, **settings: Any) -> str:
    """A session that an instance which is gone has opened."""
    async with instance(store) as gone:
        session_id = await gone.client(**settings).handshake(params)
    store.calls.clear()
    return session_id
