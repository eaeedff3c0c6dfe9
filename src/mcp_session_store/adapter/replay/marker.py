"""How the application learns that a session was restored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mcp_session_store.records import SessionRestoreMarker

if TYPE_CHECKING:
    from starlette.types import Scope

__all__ = ["REPLAYED_SESSION", "RESTORE_MARKER", "get_restore_marker", "request_scope"]

RESTORE_MARKER: Final = "mcp_session_store.restore_marker"
"""Key of a request's ASGI scope under which the marker stands."""

REPLAYED_SESSION: Final = "mcp_session_store.replayed_session"
"""Key of the ASGI scope of a replayed message under which its copy stands."""

# From each context that the SDK and FastMCP hand out, the way to the Starlette request: the SDK's
# ServerRequestContext and FastMCP's wrapper of it have `request`, both `Context` classes have
# `request_context`, FastMCP's MiddlewareContext has `fastmcp_context`.
_WAYS: Final = ("request", "request_context", "fastmcp_context")


def get_restore_marker(ctx: object) -> SessionRestoreMarker | None:
    """Return the restore marker of a context, on the replayed messages of a restored session and on all later ones.

    Args:
        ctx: Any context that the SDK or FastMCP hands to a tool, a handler or a middleware, or the
            Starlette request in it.

    Returns:
        The marker, or `None`: the session lives in the process that opened it, or there is no
        session or no HTTP request at all (stdio, protocol 2026-07-28 and later).
    """
    scope = request_scope(ctx)
    marker = None if scope is None else scope.get(RESTORE_MARKER)
    return marker if isinstance(marker, SessionRestoreMarker) else None


def request_scope(ctx: object) -> Scope | None:
    """Return the ASGI scope of the HTTP request that a context belongs to, if any; see `get_restore_marker`."""
    for _ in range(len(_WAYS) + 1):
        if ctx is None:
            return None
        scope: Scope | None = getattr(ctx, "scope", None)
        if scope is not None:
            return scope
        ctx = _next(ctx)
    return None


def _next(ctx: object) -> object:
    for name in _WAYS:
        try:
            value = getattr(ctx, name, None)
        except (ValueError, RuntimeError):
            # `Context` outside of a request: MCPServer's raises ValueError.
            continue
        if value is not None:
            return value
    return None
