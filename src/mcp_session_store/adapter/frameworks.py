"""Our session manager in the app that each framework builds itself."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Final

from mcp.server.transport_security import TransportSecuritySettings

from mcp_session_store.adapter import sdk
from mcp_session_store.adapter.endpoint import mcp_endpoint
from mcp_session_store.adapter.fastmcp_state import keep_state
from mcp_session_store.adapter.health import add_health, checked_health_path
from mcp_session_store.adapter.manager import DurableSessionManager
from mcp_session_store.adapter.sessions import middleware
from mcp_session_store.adapter.sessions.state import StateAccess
from mcp_session_store.adapter.starting import run_in_lifespan, say_in_one_line
from mcp_session_store.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from fastmcp import FastMCP
    from key_value.aio.protocols import AsyncKeyValue
    from mcp.server.lowlevel.server import Server
    from mcp.server.mcpserver import MCPServer
    from mcp.server.streamable_http import EventStore
    from starlette.applications import Starlette

    from mcp_session_store.store import SessionStore

__all__ = ["build_app"]

_NOT_IN_FASTMCP: Final = ("max_request_body_size", "transport_security")
"""Options of the session manager that FastMCP's app factory does not pass on."""
_ONLY_IF_GIVEN: Final = ("session_idle_timeout",)


class _FastMCPSessionManager(DurableSessionManager):
    state: StateAccess | None = None
    """The state of the sessions, for tasks outside of all messages."""

    def _wire(self) -> None:
        super()._wire()
        self.state = StateAccess(self.state_store, self._gate)
        middleware.install(self.app).notes_scope = True

    def _event_store_for(self, session_id: str) -> EventStore | None:
        return None if self.event_store is None else sdk.scope_event_store(self.event_store, session_id)


def build_app(
    server: MCPServer[Any] | Server[Any] | FastMCP[Any],
    store: SessionStore,
    *,
    options: Mapping[str, Any],
    arguments: Mapping[str, Any],
    unbound: AsyncKeyValue | None = None,
    health_path: object = None,
) -> Starlette:
    """Build the app that the server's framework builds, with a `DurableSessionManager` in it.

    Args:
        server: A server of any framework that is known here.
        store: Store that keeps the server's sessions.
        options: Options of the framework's app factory, by its names.
        arguments: For `DurableSessionManager`, by its names.
        unbound: Where FastMCP's state is kept that belongs to no session; in memory unless given.
        health_path: See `durable_app`.

    Raises:
        ConfigurationError: The server, an option or a setting cannot work.
        TypeError: An option that the framework's app factory does not know.
    """
    lowlevel = sdk.underlying_server(server)
    health_path = checked_health_path(health_path)
    if options.get("stateless_http"):
        raise ConfigurationError(_STATELESS)
    manager_class = DurableSessionManager
    if sdk.is_fastmcp(server):
        app, from_framework = _fastmcp_app(server, options)
        manager_class = _FastMCPSessionManager
    else:
        app, from_framework = _sdk_app(server, options)
    endpoint = mcp_endpoint(app)

    def new_manager() -> DurableSessionManager:
        manager = manager_class(lowlevel, store, **from_framework, **arguments)
        endpoint.session_manager = manager
        sdk.set_session_manager(lowlevel, manager)
        return manager

    manager = new_manager()

    @contextlib.asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        nonlocal manager
        if sdk.was_started(manager):
            # A manager runs once, an app may be started again: FastMCP makes a new manager each time, too.
            manager = new_manager()
        if sdk.is_fastmcp(server) and manager.state_store is not None:
            # Each time, because servers may have been mounted since.
            keep_state(server, lambda: getattr(manager, "state", None), unbound, lambda: _unbound_seconds(store))
        async with run_in_lifespan(manager):
            yield

    app.router.lifespan_context = lifespan
    if health_path is not None:
        add_health(app, health_path, lambda: manager.readiness.state)
    say_in_one_line(app)
    return app


def _unbound_seconds(store: SessionStore) -> float | None:
    """Return the seconds for which state is kept that belongs to no session."""
    kept = store.retention.unbound_state
    return None if kept is None else kept.total_seconds()


_STATELESS: Final = (
    "a stateless server has no sessions to store; leave out stateless_http, or serve it with the framework's own app"
)


def _sdk_app(server: Any, options: Mapping[str, Any]) -> tuple[Starlette, dict[str, Any]]:
    app: Starlette = server.streamable_http_app(**options)
    stock = mcp_endpoint(app).session_manager
    # The values that the framework made of its options, defaults and all. Its default of the idle timeout is not ours.
    return app, {
        **{name: options[name] for name in _ONLY_IF_GIVEN if name in options},
        "event_store": stock.event_store,
        "json_response": stock.json_response,
        "security_settings": stock.security_settings,
        "retry_interval": stock.retry_interval,
        "max_request_body_size": stock.max_request_body_size,
    }


def _fastmcp_app(server: FastMCP[Any], options: Mapping[str, Any]) -> tuple[Starlette, dict[str, Any]]:
    import fastmcp

    transport = options.get("transport", "http")
    if transport not in ("http", "streamable-http"):
        raise ConfigurationError(f"transport must be 'http', not {transport!r}: only Streamable HTTP has sessions")
    # FastMCP makes its manager within its lifespan, from its options and, where they are None, its settings.
    defaults = fastmcp.settings
    if options.get("stateless_http") is None and defaults.stateless_http:
        raise ConfigurationError(f"{_STATELESS} (FASTMCP_STATELESS_HTTP is set)")
    json_response = options.get("json_response")
    idle_timeout = options.get("session_idle_timeout")
    if idle_timeout is None:
        # The default of FastMCP 4.0 is None, for no limit, and that of later versions "auto": neither was asked for.
        is_set = "http_session_idle_timeout" in defaults.model_fields_set
        idle_timeout = defaults.http_session_idle_timeout if is_set else "auto"
    arguments: dict[str, Any] = {}
    if "max_request_body_size" in options:
        arguments["max_request_body_size"] = options["max_request_body_size"]
    arguments |= {
        "event_store": options.get("event_store"),
        "json_response": defaults.json_response if json_response is None else json_response,
        "retry_interval": options.get("retry_interval"),
        # FastMCP has a guard of its own, in a middleware around the endpoint, which is off unless asked for.
        "security_settings": options.get("transport_security")
        or TransportSecuritySettings(enable_dns_rebinding_protection=False),
    }
    if idle_timeout != "auto":
        arguments["session_idle_timeout"] = idle_timeout
    app = server.http_app(**{name: value for name, value in options.items() if name not in _NOT_IN_FASTMCP})
    return app, arguments
