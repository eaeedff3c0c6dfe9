"""Logins that every worker knows, and that survive a restart: an OAuthProxy with its storage beside the sessions.

    export MCP_SESSION_STORE_URL=postgresql://user:password@host/database   # migrated by `mcp-session-store upgrade`
    export PROVIDER=https://login.example.com CLIENT_ID=… CLIENT_SECRET=… BASE_URL=https://mcp.example.com
    uvicorn --app-dir examples --factory oauth_on_every_worker:make_app --workers 4

Without `client_storage` FastMCP keeps clients and their tokens in files of one machine.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from fastmcp import FastMCP
from fastmcp.server.auth import OAuthProxy
from fastmcp.server.auth.providers.introspection import IntrospectionTokenVerifier
from key_value.aio.wrappers.encryption import FernetEncryptionWrapper

from mcp_session_store import SqlKeyValue, SqlSessionStore, durable_app

if TYPE_CHECKING:
    from starlette.applications import Starlette


def make_app(**options: Any) -> Starlette:
    """Build the app of one worker; options are those of `OAuthProxy`."""
    provider, client_id, secret = os.environ["PROVIDER"], os.environ["CLIENT_ID"], os.environ["CLIENT_SECRET"]
    store = SqlSessionStore(os.environ["MCP_SESSION_STORE_URL"])
    # The database holds ciphertext: tokens are secrets. Every worker has the same key, made of the same secret.
    storage = FernetEncryptionWrapper(SqlKeyValue(store), source_material=secret, salt="mcp-session-store")
    auth = OAuthProxy(
        upstream_authorization_endpoint=f"{provider}/authorize",
        upstream_token_endpoint=f"{provider}/token",
        upstream_client_id=client_id,
        upstream_client_secret=secret,
        token_verifier=IntrospectionTokenVerifier(
            introspection_url=f"{provider}/introspect", client_id=client_id, client_secret=secret
        ),
        base_url=os.environ["BASE_URL"],
        client_storage=storage,
        **options,
    )
    server: FastMCP[Any] = FastMCP("notes", auth=auth)

    @server.tool
    def add(a: int, b: int) -> int:
        return a + b

    return durable_app(server, store)
