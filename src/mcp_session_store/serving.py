"""An app under uvicorn: what `mcp-session-store serve` and `run_durable` share."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from typing import TYPE_CHECKING, Any, Final

from mcp_session_store.adapter.draining import STOP_MARGIN
from mcp_session_store.adapter.sdk import is_fastmcp
from mcp_session_store.app import durable_app
from mcp_session_store.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from fastmcp import FastMCP
    from mcp.server.lowlevel.server import Server
    from mcp.server.mcpserver import MCPServer
    from starlette.applications import Starlette

    from mcp_session_store.store import SessionStore

__all__ = ["DEFAULT_HOST", "DEFAULT_PORT", "DEFAULT_SHUTDOWN_TIMEOUT", "run_durable", "run_uvicorn", "served_app"]

DEFAULT_HOST: Final = "127.0.0.1"
DEFAULT_PORT: Final = 8000
DEFAULT_SHUTDOWN_TIMEOUT: Final = 10
"""Seconds."""

_OUR_LOGGER: Final = "mcp_session_store"


def run_durable(
    server: MCPServer[Any] | Server[Any] | FastMCP[Any],
    store: str | SessionStore | None = None,
    *,
    host: str = DEFAULT_HOST,
    port: int = DEFAULT_PORT,
    path: str | None = None,
    json_response: bool | None = None,
    shutdown_timeout: int = DEFAULT_SHUTDOWN_TIMEOUT,
    log_level: str | None = "info",
    **options: Any,
) -> None:
    """Serve a server with sessions that are kept in a database, until a signal stops it.

    It stands in place of `server.run(transport="streamable-http")`, which would serve an app without durable
    sessions, and does what `mcp-session-store serve` does with one worker.

    Args:
        server: An `MCPServer`, a low-level `Server`, or a FastMCP 4 server.
        store: Database URL or `SessionStore`, as for `durable_app`; `MCP_SESSION_STORE_URL` unless given.
        host: Address to listen on.
        port: Port to listen on.
        path: Path of the MCP endpoint; the framework's, `/mcp`, unless given.
        json_response: Whether calls are answered by JSON instead of SSE; as the framework does unless given.
        shutdown_timeout: Seconds that calls may go on after a signal to stop.
        log_level: Level of the log of uvicorn and of this package. `None`: logs stay as the program has set them up.
        **options: Options of `durable_app`, those of the framework's own factory among them.

    Raises:
        ConfigurationError: The server, the URL or an option cannot work, or an event loop runs already.
        SystemExit: The server cannot start; the log says why.
    """
    if (workers := options.pop("workers", 1)) != 1:
        raise ConfigurationError(
            f"workers={workers}: run_durable serves in this process alone; for more processes run mcp-session-store "
            "serve --workers, or uvicorn --workers with the app that durable_app returns"
        )
    if _is_event_loop_running():
        raise ConfigurationError(
            "run_durable starts an event loop and blocks until the server stops, but an event loop runs here already: "
            "call it outside of async code, or serve the app that durable_app returns, as in "
            "await uvicorn.Server(uvicorn.Config(app)).serve()"
        )
    app = served_app(server, store, host=host, path=path, json_response=json_response, **options)
    run_uvicorn(app, host=host, port=port, shutdown_timeout=shutdown_timeout, log_level=log_level)


def _is_event_loop_running() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def served_app(
    server: Any,
    store: str | SessionStore | None,
    *,
    host: str,
    path: str | None,
    json_response: bool | None,
    **options: Any,
) -> Starlette:
    """Return the durable app of a server, prepared for a process that serves nothing else.

    Args:
        server: See `run_durable`.
        store: See `run_durable`.
        host: Address that will be listened on.
        path: See `run_durable`.
        json_response: See `run_durable`.
        **options: See `run_durable`.

    Raises:
        ConfigurationError: The server, the URL or an option cannot work.
    """
    if json_response is not None:
        options["json_response"] = json_response
    if path is not None:
        options["path" if is_fastmcp(server) else "streamable_http_path"] = path
    if not is_fastmcp(server):
        # The SDK guards against DNS rebinding where it listens on this machine only.
        options["host"] = host
    return _frozen(durable_app(server, store, **options))


def run_uvicorn(
    app: Starlette | str,
    *,
    host: str,
    port: int,
    shutdown_timeout: int,
    log_level: str | None,
    workers: int = 1,
) -> None:
    """Serve an app until a signal stops it.

    Args:
        app: The app; with several workers the import string of a function that makes it.
        host: Address to listen on.
        port: Port to listen on.
        shutdown_timeout: Seconds that calls may go on after a signal to stop.
        log_level: See `run_durable`.
        workers: Number of processes.

    Raises:
        SystemExit: The server cannot start; the log says why.
    """
    import uvicorn

    uvicorn.run(
        app,
        factory=workers > 1,
        workers=workers,
        host=host,
        port=port,
        log_level=log_level,
        log_config=None if log_level is None else _log_config(log_level),
        # Calls that are still open are answered as lost before the server cuts them.
        timeout_graceful_shutdown=shutdown_timeout + STOP_MARGIN,
    )


def _frozen(app: Starlette) -> Starlette:
    """Exclude all objects that exist when the app has started from garbage collection.

    They are some 200,000, nearly all of them of modules, and live as long as the process. A full collection goes
    through them in 0.1 s and more, during which no request is served.
    """
    serve = app.router.lifespan_context

    @contextlib.asynccontextmanager
    async def lifespan(of: Starlette) -> AsyncIterator[Any]:
        async with serve(of) as state:
            gc.collect()
            gc.freeze()
            yield state

    app.router.lifespan_context = lifespan
    return app


def _log_config(level: str) -> dict[str, Any]:
    """Return uvicorn's configuration of logs, with this package's beside it. The root logger is the user's."""
    from uvicorn.config import LOGGING_CONFIG

    level_name = "DEBUG" if level == "trace" else level.upper()
    ours = {"handlers": ["default"], "level": level_name, "propagate": False}
    return {**LOGGING_CONFIG, "loggers": {**LOGGING_CONFIG["loggers"], _OUR_LOGGER: ours}}
