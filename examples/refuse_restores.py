"""A hook that decides on each restore, by the request that asks for it: here the user named by a header of a proxy.

    uvicorn --app-dir examples refuse_restores:app --workers 4

It is asked when a process loads a session, and not about requests of a session that the process holds already; nor
about DELETE. What is to bind a session to its user on each request is an `AuthenticatedUser`, as in own_auth.py.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from mcp.server.mcpserver import MCPServer
from mcp.shared.exceptions import MCPError
from mcp_types import INVALID_REQUEST

from mcp_session_store import RestoreRefused, durable_app, get_restore_marker, get_session_state

if TYPE_CHECKING:
    from mcp.server.context import CallNext, HandlerResult, ServerRequestContext

    from mcp_session_store import SessionRecord, SessionRestoreMarker

CLOSED_ACCOUNTS = {"carol"}

server = MCPServer("notes")


async def remember_owner(ctx: ServerRequestContext[Any, Any], call_next: CallNext) -> HandlerResult:
    """Note in the session's state whose it is, in the handshake that opens it."""
    if ctx.method == "initialize" and get_restore_marker(ctx) is None:
        assert ctx.request is not None
        state, user = get_session_state(ctx), ctx.request.headers["x-user"]
        if await state.get("owner", user) != user:
            raise MCPError(INVALID_REQUEST, "The session belongs to another user")
        await state.set("owner", user)
    return await call_next(ctx)


async def on_restore(marker: SessionRestoreMarker, record: SessionRecord) -> None:
    """Restore a session for its owner only, and for as long as the owner's account is open."""
    assert marker.request is not None
    owner = await get_session_state(marker).get("owner")
    if marker.request.headers["x-user"] != owner:
        # For this request there is no such session. Without ends_session=False anybody who knows an id could end it.
        raise RestoreRefused(f"{record.key} is not theirs", ends_session=False)
    if owner in CLOSED_ACCOUNTS:
        raise RestoreRefused("the account is closed")


server.middleware.append(remember_owner)
app = durable_app(server, os.environ.get("MCP_SESSION_STORE_URL", "sqlite:///sessions.db"), on_restore=on_restore)
