"""The command that serves an existing server object durably."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
from click.core import ParameterSource
from pydantic import BaseModel, ConfigDict, Field

from mcp_session_store.cli.options import (
    Failure,
    event_options,
    instance_options,
    namespace_option,
    option,
    read_settings,
    retention_options,
    run,
    schema_option,
    state_options,
    url_option,
)
from mcp_session_store.cli.served_object import served_object
from mcp_session_store.errors import ConfigurationError, SchemaError, StoreMisconfigured
from mcp_session_store.retention import EventPolicy, RetentionPolicy, StatePolicy
from mcp_session_store.settings import InstanceSettings

if TYPE_CHECKING:
    from starlette.applications import Starlette

# uvicorn, the SDK and the database's drivers are imported where they are used, because other commands need none.

__all__ = ["serve", "worker_app"]

_WORKER_SETTINGS: Final = "_MCP_SESSION_STORE_SERVE"
"""Environment variable with the settings of `serve`, because uvicorn gives its workers an import string alone."""

_UVICORN_STARTUP_FAILED: Final = 3


class _NoStart(click.ClickException):
    """Start that cannot succeed until something is repaired: exit code 3."""

    exit_code = 3


class _ServeSettings(BaseModel):
    """Values from which a worker builds its app."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    target: str
    app_dir: str
    url: str = Field(repr=False)
    schema_name: str | None
    namespace: str
    auto_upgrade: bool
    pool_size: int | None
    host: str
    path: str | None
    allowed_hosts: tuple[str, ...]
    allowed_origins: tuple[str, ...]
    health_path: str | None
    json_response: bool | None
    retention: dict[str, str]
    """The texts of the retention options that were given."""
    relay: bool | None
    events: bool | None
    event_retention: dict[str, str]
    """The texts of the options for events that were given."""
    state_bounds: dict[str, str]
    """The texts of the options for session state that were given."""
    instance: dict[str, str]
    """The texts of the options of the process that were given."""
    given: frozenset[str]
    """The names of `_OF_THE_DATABASE` that stand on the command line. The app reads the others in the environment, and
    its log can say so."""


_OF_THE_DATABASE: Final = ("namespace", "schema", "auto_upgrade", "pool_size")


def _is_given(parameter: str) -> bool:
    return click.get_current_context().get_parameter_source(parameter) is ParameterSource.COMMANDLINE


def _absolute_path(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    if value is not None and not value.startswith("/"):
        raise click.BadParameter(f"{value!r} does not begin with a slash, as in /mcp")
    return value


def _root_path(ctx: click.Context, parameter: click.Parameter, value: str) -> str:
    return (_absolute_path(ctx, parameter, value) or "").rstrip("/") if value else ""


@click.command(short_help="Serve a server object with durable sessions.")
@click.argument("target", metavar="MODULE:ATTRIBUTE|FILE[:ATTRIBUTE]")
@url_option
@schema_option
@namespace_option
@option("--auto-upgrade", is_flag=True, help="Migrate a server database at start; a new SQLite file always is.")
@option(
    "--pool-size",
    type=click.IntRange(1),
    metavar="N",
    help="Connections that each process takes for queries at most. Not given: as the URL says, or 5.",
)
@option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="Port to listen on.")
@option("--workers", default=1, show_default=True, type=click.IntRange(1), help="Number of processes.")
@option("--path", callback=_absolute_path, help="Path of the MCP endpoint. Default: the framework's, /mcp.")
@option(
    "--allowed-host",
    multiple=True,
    metavar="HOST",
    help="Host by which clients reach the server, as behind a proxy: mcp.example.com, for any port, or with one. May "
    "be repeated; in the variable, hosts are separated by blanks. '*' allows any. Unless given, a loopback address "
    "serves this machine's names only, and any other address any host.",
)
@option(
    "--allowed-origin",
    multiple=True,
    metavar="ORIGIN",
    help="Origin of web pages of another host that may send requests: https://app.example.com. May be repeated.",
)
@option(
    "--root-path",
    default="",
    callback=_root_path,
    metavar="PATH",
    help="Path that a proxy takes off before it passes requests on, as in /notes.",
)
@option(
    "--health-path",
    callback=_absolute_path,
    default="/health",
    show_default=True,
    help="Path below which /live and /ready say how the process is.",
)
@option("--no-health", is_flag=True, help="Serve no health.")
@option("--json-response/--sse", default=None, help="Form of the answers to calls. Default: the framework's, SSE.")
@option(
    "--shutdown-timeout",
    default=10,
    show_default=True,
    type=click.IntRange(0),
    metavar="SECONDS",
    help="How long calls may go on after a signal to stop.",
)
@option(
    "--log-level",
    default="info",
    show_default=True,
    type=click.Choice(["critical", "error", "warning", "info", "debug", "trace"], case_sensitive=False),
    help="Level of uvicorn's log and of this package's.",
)
@option(
    "--relay/--no-relay",
    default=None,
    help="Pass clients' messages, as answers and cancellations, on to the process that they are for. On by default.",
)
@retention_options
@option(
    "--events/--no-events",
    default=None,
    help="Store the events of streams, so that clients can resume them.",
)
@event_options
@state_options
@instance_options
@option("--app-dir", default=".", show_default=True, help="Folder in which MODULE or FILE is looked for first.")
def serve(
    target: str,
    url: str,
    schema: str | None,
    namespace: str,
    auto_upgrade: bool,
    pool_size: int | None,
    host: str,
    port: int,
    workers: int,
    path: str | None,
    allowed_host: tuple[str, ...],
    allowed_origin: tuple[str, ...],
    root_path: str,
    health_path: str,
    no_health: bool,
    json_response: bool | None,
    shutdown_timeout: int,
    log_level: str,
    relay: bool | None,
    retention: dict[str, str],
    events: bool | None,
    event_retention: dict[str, str],
    state_bounds: dict[str, str],
    instance: dict[str, str],
    app_dir: str,
) -> None:
    """Serve an MCPServer, a low-level Server or a FastMCP 4 server with durable sessions.

    MODULE:ATTRIBUTE or FILE:ATTRIBUTE names the server object, as in `notes.server:mcp` or `./server.py:mcp`, or a
    function without arguments that returns it, which is called in each process; its code needs no change. A file alone
    is enough where it has one server.
    The server starts although the database is down: requests that need it wait for it, and are refused in the end. It
    does not start with a database that cannot be used until something is repaired: exit code 3, with what to do.

    Behind a proxy, name the public host with --allowed-host. Client address and scheme are taken from X-Forwarded-For
    and X-Forwarded-Proto of proxies at the addresses in FORWARDED_ALLOW_IPS, 127.0.0.1 unless set.
    """
    read_settings(RetentionPolicy, retention)
    read_settings(EventPolicy, event_retention)
    read_settings(StatePolicy, state_bounds)
    read_settings(InstanceSettings, instance)
    settings = _ServeSettings(
        target=target,
        app_dir=str(Path(app_dir).resolve()),
        url=url,
        schema_name=schema,
        namespace=namespace,
        auto_upgrade=auto_upgrade,
        pool_size=pool_size,
        host=host,
        path=path,
        allowed_hosts=allowed_host,
        allowed_origins=allowed_origin,
        health_path=None if no_health else health_path,
        json_response=json_response,
        retention=retention,
        relay=relay,
        events=events,
        event_retention=event_retention,
        state_bounds=state_bounds,
        instance=instance,
        given=frozenset(name for name in _OF_THE_DATABASE if _is_given(name)),
    )
    from mcp_session_store.adapter.starting import ask_store, final_cause
    from mcp_session_store.serving import WorkerNotStarted, first_line_first, run_uvicorn

    try:
        with first_line_first(log_level) as announce:
            # Built here even if only workers will serve, so that what cannot work is said once, and before anything
            # listens.
            app = _build(settings)
            announce(app, host, port, workers)
            # A new SQLite file is migrated here, too, because several workers would find it at once.
            run(ask_store(app))
    except (StoreMisconfigured, SchemaError) as error:
        raise _NoStart(str(error)) from error

    os.environ[_WORKER_SETTINGS] = settings.model_dump_json()
    try:
        run_uvicorn(
            app,
            worker_app=f"{__package__}:{worker_app.__name__}",
            workers=workers,
            host=host,
            port=port,
            log_level=log_level,
            shutdown_timeout=shutdown_timeout,
            root_path=root_path,
        )
    except WorkerNotStarted:
        raise _NoStart("a worker did not start; the log above says why") from None
    except SystemExit as exit_:
        if exit_.code == _UVICORN_STARTUP_FAILED:
            why = "the server did not start; the log above says why"
            raise (Failure(why) if final_cause(app) is None else _NoStart(why)) from None
        raise


def worker_app() -> Starlette:
    """Return the app of one of several workers; uvicorn calls this in each. For `serve` only."""
    return _build(_ServeSettings.model_validate_json(os.environ[_WORKER_SETTINGS]))


def _build(settings: _ServeSettings) -> Starlette:
    from mcp_session_store.serving import served_app

    server = served_object(settings.target, settings.app_dir)
    options: dict[str, Any] = {}
    if settings.retention:
        options["retention"] = read_settings(RetentionPolicy, settings.retention)
    if settings.events is not None:
        options["events"] = settings.events and read_settings(EventPolicy, settings.event_retention)
    if settings.relay is not None:
        options["relay"] = settings.relay
    if settings.state_bounds:
        options["state"] = read_settings(StatePolicy, settings.state_bounds)
    if settings.instance:
        options["settings"] = read_settings(InstanceSettings, settings.instance)
    of_the_database = {
        "namespace": settings.namespace,
        "schema": settings.schema_name,
        "auto_upgrade": settings.auto_upgrade,
        "pool_size": settings.pool_size,
    }
    options |= {name: value for name, value in of_the_database.items() if name in settings.given}
    try:
        return served_app(
            server,
            settings.url,
            host=settings.host,
            path=settings.path,
            allowed_hosts=settings.allowed_hosts,
            allowed_origins=settings.allowed_origins,
            json_response=settings.json_response,
            health_path=settings.health_path,
            **options,
        )
    except ConfigurationError as error:
        raise ConfigurationError(f"cannot serve {settings.target}: {error}") from error
