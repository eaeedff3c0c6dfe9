"""The MCP endpoint in an app that a framework built."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from mcp.server.auth.middleware.bearer_auth import RequireAuthMiddleware
from starlette.routing import Route

from mcp_session_store.adapter.supported import SUPPORTED_SDK
from mcp_session_store.errors import ConfigurationError

if TYPE_CHECKING:
    from mcp.server.streamable_http_manager import StreamableHTTPASGIApp
    from starlette.applications import Starlette

__all__ = ["mcp_endpoint", "mcp_route"]


def mcp_endpoint(app: Starlette) -> StreamableHTTPASGIApp:
    """Return the ASGI endpoint of the MCP path in an app that a framework built; it reads its manager per request."""
    return mcp_route(app)[0]


def mcp_route(app: Starlette) -> tuple[StreamableHTTPASGIApp, str]:
    """Return the ASGI endpoint of the MCP path in an app that a framework built, and that path."""
    for route in app.routes:
        if not isinstance(route, Route):
            continue
        endpoint: Any = route.endpoint
        if isinstance(endpoint, RequireAuthMiddleware):
            endpoint = endpoint.app
        if hasattr(endpoint, "session_manager"):
            return cast("StreamableHTTPASGIApp", endpoint), route.path
    raise ConfigurationError(
        f"the app of this framework has no known MCP endpoint; mcp-session-store works with mcp{SUPPORTED_SDK} "
        "and fastmcp>=4,<5"
    )
