"""A server's app with durable sessions, in one call: the one module that knows both the SQL store and the adapter."""

from __future__ import annotations

import contextlib
import logging
import os
from typing import TYPE_CHECKING, Any, Final, TypeVar

from mcp_session_store.adapter.frameworks import build_app
from mcp_session_store.adapter.sdk import is_fastmcp
from mcp_session_store.environment import truth, variable
from mcp_session_store.errors import ConfigurationError
from mcp_session_store.event_log import EventLog
from mcp_session_store.mailbox import Mailbox
from mcp_session_store.memory import MemoryMailbox, MemorySessionStore, MemoryStateStore
from mcp_session_store.retention import EventPolicy, RetentionPolicy, StatePolicy
from mcp_session_store.settings import NOT_GIVEN, InstanceSettings, NotGiven, read_pool_size
from mcp_session_store.sql import SqlEventLog, SqlKeyValue, SqlMailbox, SqlSessionStore, SqlStateStore
from mcp_session_store.sql.engine import check_place, is_engine
from mcp_session_store.state_store import StateStore
from mcp_session_store.store import DEFAULT_NAMESPACE, SessionStore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from fastmcp import FastMCP
    from mcp.server.lowlevel.server import Server
    from mcp.server.mcpserver import MCPServer
    from starlette.applications import Starlette

    from mcp_session_store.adapter.manager import EndHook, RestoreHook
    from mcp_session_store.adapter.replay.journal import JournaledMethod
    from mcp_session_store.sql.engine import UrlOrEngine

__all__ = ["durable_app"]

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

MAX_UNBOUND_BYTES: Final = 256 * 1024**2
"""Bytes of a namespace's values beyond which no state of FastMCP's is stored that belongs to no session: strangers can
make such state, and it must leave room for the logins that a `SqlKeyValue` keeps there."""

_ARGUMENT: Final = "argument"
_DEFAULT: Final = "default"


def durable_app(
    server: MCPServer[Any] | Server[Any] | FastMCP[Any],
    store: UrlOrEngine | SessionStore | None = None,
    *,
    namespace: str | NotGiven = NOT_GIVEN,
    schema: str | NotGiven | None = NOT_GIVEN,
    auto_upgrade: bool | NotGiven = NOT_GIVEN,
    pool_size: int | NotGiven | None = NOT_GIVEN,
    retention: RetentionPolicy | None = None,
    events: bool | EventPolicy | EventLog | NotGiven = NOT_GIVEN,
    relay: bool | Mailbox | NotGiven = NOT_GIVEN,
    state: StatePolicy | StateStore | None = None,
    on_restore: RestoreHook | None = None,
    on_end: EndHook | None = None,
    settings: InstanceSettings | None = None,
    evict_after: float | NotGiven | None = NOT_GIVEN,
    max_sessions: int | NotGiven | None = NOT_GIVEN,
    end_within: float | NotGiven = NOT_GIVEN,
    serve_unverified_for: float | NotGiven | None = NOT_GIVEN,
    sweep_interval: float | NotGiven | None = NOT_GIVEN,
    activity_interval: float | NotGiven | None = NOT_GIVEN,
    instance_timeout: float | NotGiven = NOT_GIVEN,
    replay_timeout: float | NotGiven = NOT_GIVEN,
    outage_patience: float | NotGiven = NOT_GIVEN,
    max_initialize_params: int | NotGiven = NOT_GIVEN,
    journaled_methods: Sequence[JournaledMethod] = (),
    relayed_notifications: Sequence[str] = (),
    health_path: str | None = None,
    **options: Any,
) -> Starlette:
    """Build the ASGI app that the server's framework builds, with sessions that are kept in a database.

    Auth, host guard and custom routes are the framework's own. The app is served by any ASGI server,
    with any number of workers, or mounted in another app, whose lifespan then enters this app's
    (`app.router.lifespan_context(app)`).

    An argument that is not given is read from the environment, as the commands read it, so that a server and
    `mcp-session-store sessions list` look into the same place: `MCP_SESSION_STORE_URL`, `…_NAMESPACE`, `…_SCHEMA`,
    `…_AUTO_UPGRADE`, `…_POOL_SIZE`, `…_EVENTS`, `…_RELAY`, and the variables of `RetentionPolicy`, `EventPolicy`,
    `StatePolicy` and `InstanceSettings`. When the app starts, it logs the namespace and the
    schema, and where each comes from.

    Args:
        server: An `MCPServer`, a low-level `Server`, or a FastMCP 4 server.
        store: Database URL (`postgresql://…`, `sqlite:///…`), an `AsyncEngine`, which stays the caller's to dispose
            and is used as `SqlSessionStore` uses it, or a `SessionStore`; `MCP_SESSION_STORE_URL` unless given. The app
            closes a store that is made here when it stops. A store that is given stays the caller's to close, and keeps
            its own namespace, schema and policy, whatever the environment says.
        namespace: With a URL or an engine: name that keeps servers apart which share a database; `default` unless given
            here or in the environment.
        schema: On Postgres: schema with the tables; `None`, and unless given here or in the environment: the
            first of the search path.
        auto_upgrade: On Postgres: whether to run the migrations on first contact. Without it the
            database must have been migrated (`mcp-session-store upgrade`). A SQLite file that is empty
            is always migrated.
        pool_size: With a URL: connections for queries at most, see `SqlSessionStore`; one that is given here or in the
            environment takes precedence over the URL's. With an engine the variable is left aside.
        retention: With a URL or an engine: how long sessions live, and how many there may be;
            `RetentionPolicy.from_environment()` unless given.
        events: Whether streams can be resumed: a client that lost its connection, or its server, comes back with
            `Last-Event-ID` and gets the messages that it missed. Events are kept in the database of the sessions, by
            the policy that is given, or with `True` by `EventPolicy.from_environment()`. With a store that is not one
            of this package's, give its `EventLog`, and its `Mailbox` as `relay`.
        relay: Whether messages of clients, such as answers and cancellations, reach the instance that they are for,
            whichever they are posted to; true unless given here or in the environment. With a store that is not one of
            this package's, give its `Mailbox`; without one nothing is relayed.
        state: Bounds of the state of a session, which `get_session_state` finds; `StatePolicy.from_environment()`
            unless given. It is kept in the database of the sessions. With a store that is not one of this package's,
            give its `StateStore`; without one there is no session state.
        on_restore: See `DurableSessionManager`.
        on_end: See `DurableSessionManager`.
        settings: Numbers of this process. A field that is not set in them is read from the environment.
        evict_after: See `InstanceSettings`; seconds. Numbers are given by keyword or in `settings`, not both.
        max_sessions: See `InstanceSettings`.
        end_within: See `InstanceSettings`; seconds.
        serve_unverified_for: See `InstanceSettings`; seconds.
        sweep_interval: See `InstanceSettings`; seconds.
        activity_interval: See `InstanceSettings`; seconds.
        instance_timeout: See `InstanceSettings`; seconds.
        replay_timeout: See `InstanceSettings`; seconds.
        outage_patience: See `InstanceSettings`; seconds.
        max_initialize_params: See `InstanceSettings`; bytes.
        journaled_methods: See `DurableSessionManager`.
        relayed_notifications: See `DurableSessionManager`.
        health_path: Path below which health is served, such as `/health`: `/health/live` answers 200 while the app
            serves, and `/health/ready` while it is ready, which it is from when the schema was found to fit until it
            stops. Both stand outside of auth and host guard, and give way to a route of the application's own. `None`:
            neither is served.
        **options: Options of the framework's own factory (`streamable_http_app`, `http_app`), by its names.
            `session_idle_timeout` sets the policy's idle time here, for all instances. `max_request_body_size` can be
            given for FastMCP, too.

    Raises:
        ConfigurationError: The server, the URL or a setting cannot work; the message names it.
        TypeError, ValueError: From the framework's factory, for its own options.
    """
    settings = InstanceSettings.given(
        settings,
        evict_after=evict_after,
        max_sessions=max_sessions,
        end_within=end_within,
        serve_unverified_for=serve_unverified_for,
        sweep_interval=sweep_interval,
        activity_interval=activity_interval,
        instance_timeout=instance_timeout,
        replay_timeout=replay_timeout,
        outage_patience=outage_patience,
        max_initialize_params=max_initialize_params,
    )
    arguments: dict[str, Any] = {
        "settings": settings.completed(),
        "on_restore": on_restore,
        "on_end": on_end,
        "journaled_methods": journaled_methods,
        "relayed_notifications": relayed_notifications,
    }
    if isinstance(store, SessionStore):
        given = {
            "namespace": namespace not in (NOT_GIVEN, DEFAULT_NAMESPACE),
            "schema": schema not in (NOT_GIVEN, None),
            "auto_upgrade": auto_upgrade not in (NOT_GIVEN, False),
            "pool_size": pool_size not in (NOT_GIVEN, None),
            "retention": retention is not None,
        }
        if names := [name for name, is_given in given.items() if is_given]:
            raise ConfigurationError(
                f"{', '.join(names)} go with a database URL or an engine; give them to the store that you made"
            )
        place = f"namespace {store.namespace!r} (the given store's)"
        if isinstance(store, SqlSessionStore):
            place += f", schema {_shown(store.database.schema)} (the given store's)"
    else:
        store, place = _sql_store(store, namespace, schema, auto_upgrade, pool_size, retention)
        arguments["close_store"] = True
    wanted, wanted_by = _setting("events", events, False, truth)
    arguments |= _event_arguments(store, wanted, wanted_by)
    arguments |= _mailbox_arguments(store, *_setting("relay", relay, True, truth))
    arguments |= _state_arguments(store, state)
    # It closes with the store, whose connections it uses.
    unbound = None
    if is_fastmcp(server) and isinstance(store, SqlSessionStore):
        unbound = SqlKeyValue(store, max_total_bytes=MAX_UNBOUND_BYTES)
    app = build_app(server, store, options=options, arguments=arguments, unbound=unbound, health_path=health_path)
    return _announced(app, place)


def _sql_store(
    url: UrlOrEngine | None,
    namespace: str | NotGiven,
    schema: str | NotGiven | None,
    auto_upgrade: bool | NotGiven,
    pool_size: int | NotGiven | None,
    retention: RetentionPolicy | None,
) -> tuple[SqlSessionStore, str]:
    """Make the store of an app; return it with the text about its namespace and schema for the log."""
    url_from = _ARGUMENT
    if url is None:
        url, url_from = os.environ.get(variable("url")), variable("url")
    if url is None or url == "":
        raise ConfigurationError(
            "no database is named: give its URL, an AsyncEngine or a SessionStore as the second argument of "
            f"durable_app, or set {variable('url')}"
        )
    check_place("store", url)
    in_namespace, namespace_from = _setting("namespace", namespace, DEFAULT_NAMESPACE, str)
    in_schema, schema_from = _setting("schema", schema, None, str)
    upgrades, _ = _setting("auto_upgrade", auto_upgrade, False, truth)
    # The pool of an engine has the size that it was made with, and the variable is about pools that are made here.
    connections = (
        None
        if is_engine(url) and isinstance(pool_size, NotGiven)
        else _setting("pool_size", pool_size, None, read_pool_size)[0]
    )
    if retention is None:
        retention = RetentionPolicy.from_environment()
    try:
        store = SqlSessionStore(
            url,
            namespace=in_namespace,
            schema=in_schema,
            auto_upgrade=upgrades,
            pool_size=connections,
            retention=retention,
        )
    except ConfigurationError as error:
        read = [source for source in (url_from, namespace_from, schema_from) if source not in (_ARGUMENT, _DEFAULT)]
        if not read:
            raise
        raise ConfigurationError(f"{error} (read from the environment: {', '.join(read)})") from error
    return store, f"namespace {in_namespace!r} ({namespace_from}), schema {_shown(in_schema)} ({schema_from})"


def _shown(schema: str | None) -> str:
    return "not set" if schema is None else repr(schema)


def _setting(name: str, given: _T | NotGiven, default: _T, read: Callable[[str], _T]) -> tuple[_T, str]:
    """Return a setting and where it comes from. As in the commands, an empty variable does not count."""
    if not isinstance(given, NotGiven):
        return given, _ARGUMENT
    if text := os.environ.get(variable(name)):
        try:
            return read(text), variable(name)
        except ValueError as error:
            raise ConfigurationError(f"{variable(name)}: {error}") from None
    return default, _DEFAULT


def _event_arguments(store: SessionStore, events: object, source: str) -> dict[str, Any]:
    """Return the arguments of the manager that concern events."""
    if events is False:
        return {}
    if isinstance(events, EventLog):
        return {"event_log": events}
    if not isinstance(events, EventPolicy) and events is not True:
        raise ConfigurationError(f"events must be True, False, an EventPolicy or an EventLog, not {events!r}")
    if not isinstance(store, SqlSessionStore):
        asked = "" if source == _ARGUMENT else f"{source} asks for events, and "
        raise ConfigurationError(
            f"{asked}events of a {type(store).__name__} are not kept in a database of ours; give its EventLog as events"
        )
    policy = events if isinstance(events, EventPolicy) else EventPolicy.from_environment()
    return {"event_log": SqlEventLog(store, policy=policy), "close_event_log": True}


def _mailbox_arguments(store: SessionStore, relay: object, source: str) -> dict[str, Any]:
    """Return the arguments of the manager that concern the other instances."""
    if isinstance(relay, Mailbox):
        return {"mailbox": relay}
    if not isinstance(relay, bool):
        raise ConfigurationError(f"relay must be True, False or a Mailbox, not {relay!r}")
    if isinstance(store, SqlSessionStore):
        return {"mailbox": SqlMailbox(store), "relay": relay, "close_mailbox": True}
    if isinstance(store, MemorySessionStore):
        return {"mailbox": MemoryMailbox(store), "relay": relay}
    if relay and source == _ARGUMENT:
        raise ConfigurationError(
            f"messages of a {type(store).__name__} are not kept in a database of ours; give its Mailbox as relay"
        )
    return {}


def _state_arguments(store: SessionStore, state: object) -> dict[str, Any]:
    """Return the arguments of the manager that concern the state of sessions."""
    if isinstance(state, StateStore):
        return {"state_store": state}
    if state is not None and not isinstance(state, StatePolicy):
        raise ConfigurationError(f"state must be a StatePolicy, a StateStore or None, not {state!r}")
    if isinstance(store, SqlSessionStore | MemorySessionStore):
        policy = StatePolicy.from_environment() if state is None else state
        if isinstance(store, MemorySessionStore):
            return {"state_store": MemoryStateStore(store, policy=policy)}
        return {"state_store": SqlStateStore(store, policy=policy), "close_state_store": True}
    if state is not None:
        raise ConfigurationError(
            f"the state of a {type(store).__name__}'s sessions is not kept in a database of ours; give its StateStore "
            "as state"
        )
    return {}


def _announced(app: Starlette, place: str) -> Starlette:
    """Log the place of an app's sessions each time it starts."""
    serve = app.router.lifespan_context

    @contextlib.asynccontextmanager
    async def lifespan(of: Starlette) -> AsyncIterator[Any]:
        logger.info("sessions are kept in %s", place)
        async with serve(of) as state:
            yield state

    app.router.lifespan_context = lifespan
    return app
