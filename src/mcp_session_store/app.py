"""A server's app with durable sessions, in one call: the one module that knows both the SQL store and the adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mcp_session_store.adapter.frameworks import build_app
from mcp_session_store.errors import ConfigurationError
from mcp_session_store.event_log import EventLog
from mcp_session_store.retention import EventPolicy, RetentionPolicy
from mcp_session_store.settings import NOT_GIVEN, InstanceSettings, NotGiven
from mcp_session_store.sql import SqlEventLog, SqlSessionStore
from mcp_session_store.store import DEFAULT_NAMESPACE, SessionStore

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fastmcp import FastMCP
    from mcp.server.lowlevel.server import Server
    from mcp.server.mcpserver import MCPServer
    from starlette.applications import Starlette

    from mcp_session_store.adapter.manager import EndHook, RestoreHook
    from mcp_session_store.adapter.replay.journal import JournaledMethod

__all__ = ["durable_app"]


def durable_app(
    server: MCPServer[Any] | Server[Any] | FastMCP[Any],
    store: str | SessionStore,
    *,
    namespace: str = DEFAULT_NAMESPACE,
    schema: str | None = None,
    auto_upgrade: bool = False,
    retention: RetentionPolicy | None = None,
    events: bool | EventPolicy | EventLog = False,
    on_restore: RestoreHook | None = None,
    on_end: EndHook | None = None,
    settings: InstanceSettings | None = None,
    evict_after: float | NotGiven | None = NOT_GIVEN,
    max_sessions: int | NotGiven | None = NOT_GIVEN,
    end_within: float | NotGiven = NOT_GIVEN,
    sweep_interval: float | NotGiven | None = NOT_GIVEN,
    activity_interval: float | NotGiven | None = NOT_GIVEN,
    instance_timeout: float | NotGiven = NOT_GIVEN,
    replay_timeout: float | NotGiven = NOT_GIVEN,
    max_initialize_params: int | NotGiven = NOT_GIVEN,
    journaled_methods: Sequence[JournaledMethod] = (),
    **options: Any,
) -> Starlette:
    """The ASGI app that the server's framework builds, with sessions that are kept in a database.

    Auth, host guard and custom routes are the framework's own. The app is served by any ASGI server,
    with any number of workers, or mounted in another app, whose lifespan then enters this app's
    (`app.router.lifespan_context(app)`).

    Args:
        server: An `MCPServer`, a low-level `Server`, or a FastMCP 4 server.
        store: A database URL (`postgresql://…`, `sqlite:///…`), or a `SessionStore`. A store that is made
            here is closed when the app stops; a store that is given stays the caller's to close.
        namespace: With a URL: keeps servers that share a database apart; `default` unless given.
        schema: With a Postgres URL: the schema that holds the tables; the search path's first unless given.
        auto_upgrade: With a Postgres URL: run the migrations on first contact. Without it the
            database must have been migrated (`mcp-session-store upgrade`). A SQLite file that is empty
            is always migrated.
        retention: With a URL: how long sessions live, and how many there may be. Unless given, what the
            environment asks for: see `RetentionPolicy.from_environment`.
        events: Whether streams can be resumed: a client that lost its connection, or its server, comes back with
            `Last-Event-ID` and gets what it missed. Events are kept in the database of the sessions, by the policy that
            is given; with `True` by the one that the environment asks for: see `EventPolicy.from_environment`. With a
            store that is not one of ours, give its `EventLog`.
        on_restore: See `DurableSessionManager`.
        on_end: See `DurableSessionManager`.
        settings: The numbers of this process. Each of them can be given by keyword instead.
        evict_after: See `InstanceSettings`; seconds.
        max_sessions: See `InstanceSettings`.
        end_within: See `InstanceSettings`; seconds.
        sweep_interval: See `InstanceSettings`; seconds.
        activity_interval: See `InstanceSettings`; seconds.
        instance_timeout: See `InstanceSettings`; seconds.
        replay_timeout: See `InstanceSettings`; seconds.
        max_initialize_params: See `InstanceSettings`; bytes.
        journaled_methods: See `DurableSessionManager`.
        **options: For the framework's own factory (`streamable_http_app`, `http_app`), by its names.
            `session_idle_timeout` sets the policy's idle time here, for all instances. FastMCP takes
            `max_request_body_size` too.

    Raises:
        ConfigurationError: The server, the URL or a setting cannot work; the message names it.
        TypeError, ValueError: From the framework's factory, for its own options.
    """
    settings = InstanceSettings.given(
        settings,
        evict_after=evict_after,
        max_sessions=max_sessions,
        end_within=end_within,
        sweep_interval=sweep_interval,
        activity_interval=activity_interval,
        instance_timeout=instance_timeout,
        replay_timeout=replay_timeout,
        max_initialize_params=max_initialize_params,
    )
    arguments: dict[str, Any] = {
        "settings": settings,
        "on_restore": on_restore,
        "on_end": on_end,
        "journaled_methods": journaled_methods,
    }
    if isinstance(store, SessionStore):
        given = {
            "namespace": namespace != DEFAULT_NAMESPACE,
            "schema": schema is not None,
            "auto_upgrade": auto_upgrade,
            "retention": retention is not None,
        }
        if names := [name for name, is_given in given.items() if is_given]:
            raise ConfigurationError(f"{', '.join(names)} go with a database URL; give them to the store that you made")
        return build_app(server, store, options=options, arguments=arguments | _event_settings(store, events))
    if retention is None:
        retention = RetentionPolicy.from_environment()
    made = SqlSessionStore(store, namespace=namespace, schema=schema, auto_upgrade=auto_upgrade, retention=retention)
    arguments |= {"close_store": True, **_event_settings(made, events)}
    return build_app(server, made, options=options, arguments=arguments)


def _event_settings(store: SessionStore, events: bool | EventPolicy | EventLog) -> dict[str, Any]:
    """What the manager is told about events."""
    if events is False:
        return {}
    if isinstance(events, EventLog):
        return {"event_log": events}
    if not isinstance(events, EventPolicy) and events is not True:
        raise ConfigurationError(f"events must be True, False, an EventPolicy or an EventLog, not {events!r}")
    if not isinstance(store, SqlSessionStore):
        raise ConfigurationError(
            f"events of a {type(store).__name__} are not kept in a database of ours; give its EventLog as events"
        )
    policy = events if isinstance(events, EventPolicy) else EventPolicy.from_environment()
    return {"event_log": SqlEventLog(store, policy=policy), "close_event_log": True}
