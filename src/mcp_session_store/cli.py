"""The command line: migrations, and serving an existing server object durably. Settings are read here only."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
from pydantic import BaseModel, ConfigDict, Field

from mcp_session_store.errors import ConfigurationError, SessionStoreError, StoreUnavailable
from mcp_session_store.store import DEFAULT_NAMESPACE

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import TypeVar

    from starlette.applications import Starlette

    _T = TypeVar("_T")

# Alembic and uvicorn are imported by the commands that need them: most need one of them, `--help` none.

__all__ = ["main", "worker_app"]

_WORKER_SETTINGS: Final = "_MCP_SESSION_STORE_SERVE"
"""Carries the settings of `serve` to its workers, which uvicorn starts with nothing but an import string."""

_UVICORN_STARTUP_FAILED: Final = 3


class _Failure(click.ClickException):
    """A check that failed, a database that does not answer: exit code 1."""


class _Misuse(click.ClickException):
    """An argument or setting that cannot work: exit code 2, as click's own usage errors."""

    exit_code = 2


class _Group(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ConfigurationError as error:
            raise _Misuse(str(error)) from error
        except SessionStoreError as error:
            raise _Failure(str(error)) from error


def _option(name: str, **attributes: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """An option that an environment variable can set, too: `--some-name` is MCP_SESSION_STORE_SOME_NAME."""
    variable = "MCP_SESSION_STORE_" + name.split("/")[0].removeprefix("--").replace("-", "_").upper()
    return click.option(name, envvar=variable, show_envvar=True, **attributes)


_url = _option(
    "--url",
    required=True,
    metavar="URL",
    help="The database: postgresql://user:password@host/database or sqlite:///path.",
)
_schema = _option(
    "--schema", metavar="NAME", help="Postgres: the schema with the tables. Default: the search path's first."
)


def _run(coroutine: Coroutine[Any, Any, _T]) -> _T:
    import asyncio

    return asyncio.run(coroutine)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mcp-session-store")
def main() -> None:
    """Durable sessions for MCP servers: migrate the database, or serve a server that exists.

    Exit codes: 0 done; 1 a check or an operation failed (schema, database, start of the server);
    2 wrong usage (arguments, settings, the thing to serve).
    """


@main.command()
@click.argument("revision", default="head")
@_url
@_schema
@click.option("--sql", is_flag=True, help="Print the SQL and touch no database.")
@click.option("--from", "from_revision", metavar="REVISION", help="With --sql: the revision to start from.")
def upgrade(revision: str, url: str, schema: str | None, sql: bool, from_revision: str | None) -> None:
    """Bring the database's schema to REVISION (default: head).

    Safe when many replicas run it at once: one migrates, the others wait and find it done.
    """
    from mcp_session_store.sql import migrate

    if sql:
        click.echo(migrate.upgrade_sql(url, schema=schema, revision=revision, from_revision=from_revision))
        return
    if from_revision is not None:
        raise click.UsageError("--from goes with --sql: a database knows its own revision")

    async def run() -> str | None:
        await migrate.upgrade(url, schema=schema, revision=revision)
        return await migrate.current(url, schema=schema)

    click.echo(f"the schema is at {_run(run())}")


@main.command()
@click.argument("revision")
@_url
@_schema
def downgrade(revision: str, url: str, schema: str | None) -> None:
    """Take the database's schema back to REVISION.

    `base` removes all tables, and with them all sessions.
    """
    from mcp_session_store.sql import migrate

    async def run() -> str | None:
        await migrate.downgrade(url, schema=schema, revision=revision)
        return await migrate.current(url, schema=schema)

    found = _run(run())
    click.echo("the schema is removed" if found is None else f"the schema is at {found}")


@main.command()
@_url
@_schema
def current(url: str, schema: str | None) -> None:
    """Print the revision of the database's schema, or `none`."""
    from mcp_session_store.sql import migrate

    click.echo(_run(migrate.current(url, schema=schema)) or "none")


@main.command()
@_url
@_schema
def check(url: str, schema: str | None) -> None:
    """Check that the database's schema fits this version of the package.

    Exit code 1, with the command to run, when it does not.
    """
    from mcp_session_store.sql import migrate

    _run(migrate.check(url, schema=schema))
    click.echo("the schema fits")


class _ServeSettings(BaseModel):
    """What a worker needs to build its app."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: str
    app_dir: str
    url: str = Field(repr=False)
    schema_name: str | None
    namespace: str
    auto_upgrade: bool
    host: str
    path: str | None
    json_response: bool | None


def _absolute_path(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    if value is not None and not value.startswith("/"):
        raise click.BadParameter(f"{value!r} does not begin with a slash, as in /mcp")
    return value


@main.command()
@click.argument("target", metavar="MODULE:ATTRIBUTE")
@_url
@_schema
@_option(
    "--namespace",
    metavar="NAME",
    default=DEFAULT_NAMESPACE,
    show_default=True,
    help="Keeps servers that share a database apart.",
)
@_option("--auto-upgrade", is_flag=True, help="Migrate a server database at start. A new SQLite file always is.")
@_option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@_option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="The port to listen on.")
@_option("--workers", default=1, show_default=True, type=click.IntRange(1), help="The number of processes.")
@_option("--path", callback=_absolute_path, help="The MCP endpoint. Default: the framework's, /mcp.")
@_option("--json-response/--sse", default=None, help="How calls are answered. Default: the framework's, SSE.")
@_option(
    "--shutdown-timeout",
    default=10,
    show_default=True,
    type=click.IntRange(0),
    metavar="SECONDS",
    help="How long calls may go on after a signal to stop.",
)
@_option(
    "--log-level",
    default="info",
    show_default=True,
    type=click.Choice(["critical", "error", "warning", "info", "debug", "trace"]),
    help="Of uvicorn's log and of this package's.",
)
@_option("--app-dir", default=".", show_default=True, help="Where MODULE is looked for first.")
def serve(
    target: str,
    url: str,
    schema: str | None,
    namespace: str,
    auto_upgrade: bool,
    host: str,
    port: int,
    workers: int,
    path: str | None,
    json_response: bool | None,
    shutdown_timeout: int,
    log_level: str,
    app_dir: str,
) -> None:
    """Serve an MCPServer, a low-level Server or a FastMCP 4 server with durable sessions.

    MODULE:ATTRIBUTE is where the server object is, as in `notes.server:mcp`; its code needs no change.
    A database that is down does not keep the server from starting: clients get 503 until it answers.
    """
    settings = _ServeSettings(
        target=target,
        app_dir=str(Path(app_dir).resolve()),
        url=url,
        schema_name=schema,
        namespace=namespace,
        auto_upgrade=auto_upgrade,
        host=host,
        path=path,
        json_response=json_response,
    )
    # Built here even if only workers will serve: what cannot work is told once, and before anything listens.
    app = _build(settings)
    _run(_check_store(settings))

    import uvicorn

    os.environ[_WORKER_SETTINGS] = settings.model_dump_json()
    try:
        uvicorn.run(
            app if workers == 1 else f"{__package__}.cli:{worker_app.__name__}",
            factory=workers > 1,
            workers=workers,
            host=host,
            port=port,
            log_level=log_level,
            log_config=_log_config(log_level),
            # Open SSE streams never end by themselves.
            timeout_graceful_shutdown=shutdown_timeout,
        )
    except SystemExit as exit_:
        if exit_.code == _UVICORN_STARTUP_FAILED:
            raise _Failure("the server did not start; the log above says why") from None
        raise


def worker_app() -> Starlette:
    """The app of one of several workers; uvicorn calls this in each. For `serve` only."""
    return _build(_ServeSettings.model_validate_json(os.environ[_WORKER_SETTINGS]))


def _build(settings: _ServeSettings) -> Starlette:
    from mcp_session_store.adapter.sdk import is_fastmcp, underlying_server
    from mcp_session_store.app import durable_app

    server = _import_target(settings.target, settings.app_dir)
    try:
        underlying_server(server)
    except ConfigurationError as error:
        hint = ""
        if callable(server):
            hint = " (an app that was built from a server already, stateless or not, cannot be made durable: name the"
            hint += " server object itself)"
        raise ConfigurationError(f"{settings.target}: {error}{hint}") from error
    options: dict[str, Any] = {}
    if settings.json_response is not None:
        options["json_response"] = settings.json_response
    if settings.path is not None:
        options["path" if is_fastmcp(server) else "streamable_http_path"] = settings.path
    if not is_fastmcp(server):
        # The SDK guards against DNS rebinding where it listens on this machine only.
        options["host"] = settings.host
    try:
        return durable_app(
            server,
            settings.url,
            namespace=settings.namespace,
            schema=settings.schema_name,
            auto_upgrade=settings.auto_upgrade,
            **options,
        )
    except ConfigurationError as error:
        raise ConfigurationError(f"cannot serve {settings.target}: {error}") from error


def _import_target(target: str, app_dir: str) -> Any:
    module_name, _, attributes = target.partition(":")
    if not module_name or not attributes:
        raise ConfigurationError(
            f"{target!r} does not say what to serve: give MODULE:ATTRIBUTE, as in notes.server:mcp"
        )
    if app_dir not in sys.path:
        sys.path.insert(0, app_dir)
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and module_name.endswith(".py"):
            module = module_name.removesuffix(".py").replace("/", ".")
            raise ConfigurationError(
                f"{target!r} names a file, and a module is asked for: write {module}:{attributes}"
            ) from error
        if isinstance(error, ModuleNotFoundError) and _is_part_of(error.name, module_name):
            raise ConfigurationError(
                f"there is no module {error.name!r} in {app_dir} or among the installed packages; "
                "run the command where the module is, or give its folder with --app-dir"
            ) from error
        # The last place in the user's own code; the machinery of imports says nothing to him.
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise ConfigurationError(
            f"the module {module_name!r} cannot be imported: {type(error).__name__}: {error} "
            f"({place.filename}, line {place.lineno}); correct it, and try again"
        ) from error
    for name in attributes.split("."):
        try:
            found = getattr(found, name)
        except AttributeError as error:
            raise ConfigurationError(
                f"the module {module_name!r} has no {attributes!r}; name the variable that holds the server object"
            ) from error
    return found


def _is_part_of(missing: str | None, module_name: str) -> bool:
    """Whether it is the module asked for, or a package around it, that is missing, and not one that it imports."""
    return missing is not None and f"{module_name}.".startswith(f"{missing}.")


async def _check_store(settings: _ServeSettings) -> None:
    from mcp_session_store.sql import SqlSessionStore

    store = SqlSessionStore(
        settings.url,
        namespace=settings.namespace,
        schema=settings.schema_name,
        auto_upgrade=settings.auto_upgrade,
    )
    try:
        # A new SQLite file is migrated here, before several workers would find it at once.
        await store.open()
    except StoreUnavailable as error:
        click.echo(f"Warning: {error} Starting all the same: clients get 503 until it answers.", err=True)
    finally:
        await store.aclose()


def _log_config(level: str) -> dict[str, Any]:
    """uvicorn's own, with this package's log beside it. The root logger is the framework's and the user's."""
    from uvicorn.config import LOGGING_CONFIG

    level_name = "DEBUG" if level == "trace" else level.upper()
    ours = {"handlers": ["default"], "level": level_name, "propagate": False}
    return {**LOGGING_CONFIG, "loggers": {**LOGGING_CONFIG["loggers"], __package__: ours}}


if __name__ == "__main__":
    main()
