"""How the application learns that a session was restored."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from datetime import datetime

    from starlette.requests import Request
    from starlette.types import Scope

__all__ = ["REPLAYED_SESSION", "RESTORE_MARKER", "SessionRestoreMarker", "get_restore_marker", "request_scope"]

RESTORE_MARKER: Final = "mcp_session_store.restore_marker"
"""Key of a request's ASGI scope under which the marker stands."""

REPLAYED_SESSION: Final = "mcp_session_store.replayed_session"
"""Key of the ASGI scope of a replayed message under which its copy stands."""

# From each context that the SDK and FastMCP hand out, the way to the Starlette request: the SDK's
# ServerRequestContext and FastMCP's wrapper of it have `request`, both `Context` classes have
# `request_context`, FastMCP's MiddlewareContext has `fastmcp_context`.
_WAYS: Final = ("request", "request_context", "fastmcp_context")


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionRestoreMarker:
    """The mark of a restored session, which the application finds in its context with `get_restore_marker`."""

    session_id: str = field(repr=False)
    created_at: datetime
    """Time at which the session was opened, by the store's clock."""
    restored_at: datetime
    """Time at which this instance began the restore, by this instance's clock."""
    restores: int
    """Number of restores of the session, this one included."""
    previous_instance: str
    """Id of the instance that created or restored the session before."""
    replaying: bool
    """True on messages that are replayed or run for another copy, False on those that the client sends to this one."""
    request: Request | None = field(default=None, repr=False, compare=False)
    """HTTP request that began the restore, without its body: in `on_restore`, and on the messages that are replayed.

    None on later messages, whose contexts have requests of their own, and on messages that are run for another copy,
    because no request comes with them.
    """


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
