"""A server's app with durable sessions, in one call: the one module that knows both the SQL store and the adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mcp_session_store.adapter.frameworks import build_app
from mcp_session_store.adapter.handshake import DEFAULT_MAX_INITIALIZE_PARAMS
from mcp_session_store.adapter.manager import DEFAULT_REPLAY_TIMEOUT
from mcp_session_store.errors import ConfigurationError
from mcp_session_store.sql import SqlSessionStore
from mcp_session_store.store import DEFAULT_NAMESPACE, SessionStore

if TYPE_CHECKING:
    from fastmcp import FastMCP
    from mcp.server.lowlevel.server import Server
    from mcp.server.mcpserver import MCPServer
    from starlette.applications import Starlette

    from mcp_session_store.adapter.manager import EndHook, RestoreHook

__all__ = ["durable_app"]


def durable_app(
    server: MCPServer[Any] | Server[Any] | FastMCP[Any],
    store: str | SessionStore,
    *,
    namespace: str = DEFAULT_NAMESPACE,
    schema: str | None = None,
    auto_upgrade: bool = False,
    on_restore: RestoreHook | None = None,
    on_end: EndHook | None = None,
    replay_timeout: float = DEFAULT_REPLAY_TIMEOUT,
    max_initialize_params: int = DEFAULT_MAX_INITIALIZE_PARAMS,
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
        on_restore: See `DurableSessionManager`.
        on_end: See `DurableSessionManager`.
        replay_timeout: See `DurableSessionManager`; seconds.
        max_initialize_params: See `DurableSessionManager`; bytes.
        **options: For the framework's own factory (`streamable_http_app`, `http_app`), by its names.
            `session_idle_timeout` only evicts from memory here. FastMCP takes `max_sessions` and
            `max_request_body_size` too.

    Raises:
        ConfigurationError: The server, the URL or a setting cannot work; the message names it.
        TypeError, ValueError: From the framework's factory, for its own options.
    """
    settings = {
        "on_restore": on_restore,
        "on_end": on_end,
        "replay_timeout": replay_timeout,
        "max_initialize_params": max_initialize_params,
    }
    if isinstance(store, SessionStore):
        given = {
            "namespace": namespace != DEFAULT_NAMESPACE,
            "schema": schema is not None,
            "auto_upgrade": auto_upgrade,
        }
        if names := [name for name, is_given in given.items() if is_given]:
            raise ConfigurationError(f"{', '.join(names)} go with a database URL; give them to the store that you made")
        return build_app(server, store, options=options, settings=settings)
    made = SqlSessionStore(store, namespace=namespace, schema=schema, auto_upgrade=auto_upgrade)
    return build_app(server, made, options=options, settings={**settings, "close_store": True})
