"""An app under uvicorn: what `mcp-session-store serve` and `run_durable` share."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import logging.config
import logging.handlers
import signal
import socket
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

import anyio

from mcp_session_store.adapter.draining import STOP_MARGIN, stopping_server
from mcp_session_store.adapter.endpoint import mcp_route
from mcp_session_store.adapter.guard import host_guard
from mcp_session_store.adapter.sdk import guards_itself, is_fastmcp
from mcp_session_store.app import durable_app
from mcp_session_store.errors import ConfigurationError
from mcp_session_store.sql import SqlSessionStore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence

    from fastmcp import FastMCP
    from mcp.server.lowlevel.server import Server
    from mcp.server.mcpserver import MCPServer
    from starlette.applications import Starlette
    from typing_extensions import TypeIs

    from mcp_session_store.adapter.manager import DurableSessionManager
    from mcp_session_store.sql.engine import UrlOrEngine
    from mcp_session_store.store import SessionStore

__all__ = [
    "DEFAULT_HEALTH_PATH",
    "DEFAULT_HOST",
    "DEFAULT_PORT",
    "DEFAULT_SHUTDOWN_TIMEOUT",
    "WorkerNotStarted",
    "first_line_first",
    "run_durable",
    "run_uvicorn",
    "served_app",
]

logger = logging.getLogger(__name__)

DEFAULT_HOST: Final = "127.0.0.1"
DEFAULT_PORT: Final = 8000
DEFAULT_SHUTDOWN_TIMEOUT: Final = 10
"""Seconds."""
DEFAULT_HEALTH_PATH: Final = "/health"
FORCED_STOP_TIMEOUT: Final = 2.0
"""Seconds for which a server that is forced to exit goes on, so that clients are answered."""
LOG_LEVELS: Final = ("critical", "error", "warning", "info", "debug", "trace")
MAX_PORT: Final = 65535
STOP_SIGNALS: Final = frozenset({signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGBREAK", signal.SIGTERM)})
"""Signals that stop a server."""

_OUR_LOGGER: Final = "mcp_session_store"
_NEVER: Final = logging.CRITICAL + 1


def run_durable(
    server: MCPServer[Any] | Server[Any] | FastMCP[Any],
    store: UrlOrEngine | SessionStore | None = None,
    *,
    host: str = DEFAULT_HOST,
    port: int = DEFAULT_PORT,
    path: str | None = None,
    allowed_hosts: Sequence[str] = (),
    allowed_origins: Sequence[str] = (),
    root_path: str = "",
    json_response: bool | None = None,
    shutdown_timeout: int = DEFAULT_SHUTDOWN_TIMEOUT,
    log_level: str | None = "info",
    health_path: str | None = DEFAULT_HEALTH_PATH,
    **options: Any,
) -> None:
    """Serve a server with sessions that are kept in a database, until a signal stops it.

    It stands in place of `server.run(transport="streamable-http")`, which would serve an app without durable
    sessions, and does what `mcp-session-store serve` does with one worker.

    Args:
        server: An `MCPServer`, a low-level `Server`, or a FastMCP 4 server.
        store: Database URL, `AsyncEngine` or `SessionStore`, as for `durable_app`; `MCP_SESSION_STORE_URL` unless
            given.
        host: Address to listen on.
        port: Port to listen on.
        path: Path of the MCP endpoint; the framework's, `/mcp`, unless given.
        allowed_hosts: Hosts by which clients reach the server, as `mcp.example.com`, for any port and none, or with a
            port. On a loopback address this machine's names are allowed as well, and no others unless they are given;
            on other addresses any host is, unless some are given. `*`: any.
        allowed_origins: Origins of web pages of other hosts that may send requests, as `https://app.example.com`.
        root_path: Path that a proxy takes off before it passes requests on, as `/notes`.
        json_response: Whether calls are answered by JSON instead of SSE; as the framework does unless given.
        shutdown_timeout: Seconds that calls may go on after a signal to stop.
        log_level: Level of the log of uvicorn and of this package. `None`: logs stay as the program has set them up.
        health_path: Path below which `/live` and `/ready` are served, as for `durable_app`; `None`: neither is.
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
    _check_arguments(host, port, path, root_path, shutdown_timeout, log_level)
    with first_line_first(log_level) as announce:
        app = served_app(
            server,
            store,
            host=host,
            path=path,
            allowed_hosts=allowed_hosts,
            allowed_origins=allowed_origins,
            json_response=json_response,
            health_path=health_path,
            **options,
        )
        announce(app, host, port)
    run_uvicorn(
        app,
        host=host,
        port=port,
        shutdown_timeout=shutdown_timeout,
        log_level=log_level,
        root_path=root_path.rstrip("/"),
    )


def _check_arguments(
    host: object, port: object, path: object, root_path: object, shutdown_timeout: object, log_level: object
) -> None:
    """Check what nothing else checks before the server listens: the command line does, for `serve`."""
    if not isinstance(host, str) or not host:
        raise ConfigurationError(f"host={host!r} is no address; give one, as in 127.0.0.1, or 0.0.0.0 for all")
    if not _is_count(port) or port > MAX_PORT:
        raise ConfigurationError(f"port={port!r} is no port; give a number from 0 to {MAX_PORT}, as in 8000")
    for name, value, none, example in (("path", path, None, "/mcp"), ("root_path", root_path, "", "/notes")):
        if value != none and not (isinstance(value, str) and value.startswith("/")):
            raise ConfigurationError(f"{name}={value!r} is no path; give one that begins with a slash, as in {example}")
    if not _is_count(shutdown_timeout):
        raise ConfigurationError(
            f"shutdown_timeout={shutdown_timeout!r} is no whole number of seconds from 0 on; give one, as in 10"
        )
    if log_level is not None and not (isinstance(log_level, str) and log_level.lower() in LOG_LEVELS):
        raise ConfigurationError(f"log_level={log_level!r} is no level; give one of {', '.join(LOG_LEVELS)}, or None")


def _is_count(value: object) -> TypeIs[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_event_loop_running() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def served_app(
    server: Any,
    store: UrlOrEngine | SessionStore | None,
    *,
    host: str,
    path: str | None,
    allowed_hosts: Sequence[str],
    allowed_origins: Sequence[str],
    json_response: bool | None,
    **options: Any,
) -> Starlette:
    """Return the durable app of a server, prepared for a process that serves nothing else.

    Args:
        server: See `run_durable`.
        store: See `run_durable`.
        host: Address that will be listened on.
        path: See `run_durable`.
        allowed_hosts: See `run_durable`.
        allowed_origins: See `run_durable`.
        json_response: See `run_durable`.
        **options: See `run_durable`.

    Raises:
        ConfigurationError: The server, the URL or an option cannot work.
    """
    if json_response is not None:
        options["json_response"] = json_response
    if path is not None:
        options["path" if is_fastmcp(server) else "streamable_http_path"] = path
    if options.get("transport_security") is not None:
        if allowed_hosts or allowed_origins:
            raise ConfigurationError("transport_security has lists of hosts and origins: give all there, or by keyword")
    elif allowed_hosts or allowed_origins or not guards_itself(server, options):
        if guards_itself(server, options):
            # It does not know the hosts that are given here, and would refuse them.
            options.setdefault("host_origin_protection", False)
        options["transport_security"] = host_guard(host, allowed_hosts, allowed_origins)
    return _of_a_process(durable_app(server, store, **options))


def run_uvicorn(
    app: Starlette,
    *,
    host: str,
    port: int,
    shutdown_timeout: int,
    log_level: str | None,
    root_path: str = "",
    workers: int = 1,
    worker_app: str = "",
) -> None:
    """Serve an app until a signal stops it.

    Args:
        app: The app.
        host: Address to listen on.
        port: Port to listen on.
        shutdown_timeout: Seconds that calls may go on after a signal to stop.
        log_level: See `run_durable`.
        root_path: See `run_durable`.
        workers: Number of processes.
        worker_app: Import string of a function that makes the app in each of several processes.

    Raises:
        SystemExit: The server cannot start; the log says why.
        WorkerNotStarted: One of several workers cannot; its log says why.
    """
    import uvicorn

    with _stop_signals() if workers > 1 else contextlib.nullcontext() as is_stopped:
        uvicorn.run(
            app if workers == 1 else worker_app,
            factory=workers > 1,
            workers=workers,
            host=host,
            port=port,
            log_level=log_level,
            log_config=None if log_level is None else _log_config(log_level),
            root_path=root_path,
            # Calls that are still open are answered as lost before the server cuts them.
            timeout_graceful_shutdown=shutdown_timeout + STOP_MARGIN,
        )
        if is_stopped is not None and not is_stopped():
            raise WorkerNotStarted


class WorkerNotStarted(Exception):
    """A worker could not start, and its parent has stopped. uvicorn does not say so: it ends as after a signal."""


@contextlib.contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether a signal to stop has come within the block."""
    # Beside the handlers, which uvicorn sets itself.
    reader, writer = socket.socketpair()
    with reader, writer:
        reader.setblocking(False)
        writer.setblocking(False)
        before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)

        def is_stopped() -> bool:
            with contextlib.suppress(BlockingIOError):
                return not STOP_SIGNALS.isdisjoint(reader.recv(1000))
            return False

        try:
            yield is_stopped
        finally:
            signal.set_wakeup_fd(before)


class Announce(Protocol):
    """Function that logs what is served: the first line that an operator wants to see."""

    def __call__(self, app: Starlette, host: str, port: int, workers: int = 1) -> None: ...


@contextlib.contextmanager
def first_line_first(log_level: str | None) -> Iterator[Announce]:
    """Set up the logs, and hold back what this package logs while an app is built and its store is asked.

    It yields the function that logs the first line. From then on a warning shows what is held, as the end of the block
    does. Where the block fails, only warnings are shown, because the error says all else.

    Args:
        log_level: See `run_durable`.
    """
    if log_level is None:
        yield _announce
        return
    # As uvicorn will do once more, so that nothing before looks otherwise.
    logging.config.dictConfig(_log_config(log_level))
    ours = logging.getLogger(_OUR_LOGGER)
    handlers = ours.handlers[:]
    held = logging.handlers.MemoryHandler(1000, _NEVER, target=handlers[0], flushOnClose=False)
    ours.handlers[:] = [held]

    def announce(app: Starlette, host: str, port: int, workers: int = 1) -> None:
        earlier, held.buffer = held.buffer, []
        _announce(app, host, port, workers)
        held.buffer += earlier
        held.flushLevel = logging.WARNING

    try:
        yield announce
    except BaseException:
        held.buffer = [record for record in held.buffer if record.levelno >= logging.WARNING]
        raise
    finally:
        ours.handlers[:] = handlers
        held.flush()
        held.close()


def _announce(app: Starlette, host: str, port: int, workers: int = 1) -> None:
    logger.info("%s, %d worker%s", _first_line(app, host, port), workers, "" if workers == 1 else "s")


def _first_line(app: Starlette, host: str, port: int) -> str:
    endpoint, path = mcp_route(app)
    manager = cast("DurableSessionManager", endpoint.session_manager)
    shown = f"[{host}]" if ":" in host else host
    store = manager.store
    database = store.database.shown_url if isinstance(store, SqlSessionStore) else type(store).__name__
    return (
        f"serving {manager.app.name!r} at http://{shown}:{port}{path}: sessions in {database}, "
        f"namespace {store.namespace!r}"
    )


def _of_a_process(app: Starlette) -> Starlette:
    """Fit an app to a process that serves nothing else.

    All objects that exist when it has started are excluded from garbage collection. They are some 200,000, nearly all
    of them of modules, and live as long as the process. A full collection goes through them in 0.1 s and more, during
    which no request is served.
    """
    serve = app.router.lifespan_context

    @contextlib.asynccontextmanager
    async def lifespan(of: Starlette) -> AsyncIterator[Any]:
        async with serve(of) as state:
            _stop_in_order()
            gc.collect()
            gc.freeze()
            yield state

    app.router.lifespan_context = lifespan
    return app


def _stop_in_order() -> None:
    """Have uvicorn stop the application as well when a second SIGINT forces it to exit.

    Else it cancels all requests, with a traceback for each, and their clients get no answer.
    """
    server: Any = stopping_server()
    if server is None:
        return
    shutdown = server.shutdown

    async def in_order(sockets: Any = None) -> None:
        await shutdown(sockets)
        if server.force_exit:
            with anyio.move_on_after(FORCED_STOP_TIMEOUT):
                await server.lifespan.shutdown()

    server.shutdown = in_order


def _log_config(level: str) -> dict[str, Any]:
    """Return uvicorn's configuration of logs, with this package's beside it. The root logger is the user's."""
    from uvicorn.config import LOGGING_CONFIG

    level_name = "DEBUG" if level.lower() == "trace" else level.upper()
    ours = {"handlers": ["default"], "level": level_name, "propagate": False}
    return {**LOGGING_CONFIG, "loggers": {**LOGGING_CONFIG["loggers"], _OUR_LOGGER: ours}}
