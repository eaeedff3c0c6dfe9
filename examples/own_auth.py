"""Auth of the application's own, by API keys: each session belongs to the user who opened it.

    uvicorn --app-dir examples own_auth:app --workers 4

A session is bound to the user of its first request if that user is an `AuthenticatedUser` of the SDK. Users of other
types bind nothing: then a session is anybody's who knows its id.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from mcp.server.auth.middleware.bearer_auth import AuthenticatedUser
from mcp.server.auth.provider import AccessToken
from mcp.server.mcpserver import Context, MCPServer
from starlette.authentication import AuthCredentials, AuthenticationBackend, AuthenticationError
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.responses import PlainTextResponse, Response

from mcp_session_store import RetentionPolicy, durable_app

if TYPE_CHECKING:
    from starlette.requests import HTTPConnection

KEYS = {"key-of-alice": "alice", "key-of-bob": "bob"}


class ApiKeys(AuthenticationBackend):
    async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, AuthenticatedUser]:
        name = KEYS.get(conn.headers.get("x-api-key", ""))
        if name is None:
            raise AuthenticationError("unknown API key")
        # What is compared is client_id, issuer and subject; the token is not, so that it may be renewed.
        return AuthCredentials(), AuthenticatedUser(AccessToken(token="", client_id="api", subject=name, scopes=[]))


def unauthorized(_conn: HTTPConnection, error: Exception) -> Response:
    return PlainTextResponse(str(error), status_code=401)


server = MCPServer("notes")


@server.tool()
def whoami(ctx: Context) -> str:
    request = ctx.request_context.request
    assert request is not None
    return str(request.user.access_token.subject)


url = os.environ.get("MCP_SESSION_STORE_URL", "sqlite:///sessions.db")
app = durable_app(server, url, retention=RetentionPolicy(per_principal=20))
app.add_middleware(AuthenticationMiddleware, backend=ApiKeys(), on_error=unauthorized)
