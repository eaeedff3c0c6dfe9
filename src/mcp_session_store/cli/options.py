"""What the commands have in common: options with their environment variables, where the sessions are, exit codes."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import click
from typing_extensions import override

from mcp_session_store.environment import ENVIRONMENT_PREFIX, duration
from mcp_session_store.errors import ConfigurationError, SessionStoreError
from mcp_session_store.retention import EventPolicy, RetentionPolicy
from mcp_session_store.store import DEFAULT_NAMESPACE

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping, Sequence

    from mcp_session_store.sql import SqlEventLog, SqlSessionStore
    from mcp_session_store.sql.admin.events import EventDirectory
    from mcp_session_store.sql.admin.partitions import EventPartitions
    from mcp_session_store.sql.admin.sessions import SessionDirectory

# The database's drivers are imported when a command uses them: `--help` does not.

__all__ = [
    "DURATION",
    "Failure",
    "Group",
    "Place",
    "event_options",
    "event_policy",
    "events_max_age_option",
    "json_option",
    "namespace_option",
    "option",
    "place_options",
    "retention_options",
    "retention_policy",
    "run",
    "schema_option",
    "tables_options",
    "url_option",
]

_T = TypeVar("_T")
_Command = TypeVar("_Command", bound="Callable[..., None]")
_Policy = TypeVar("_Policy", RetentionPolicy, EventPolicy)


class Failure(click.ClickException):
    """A check that failed, a database that does not answer: exit code 1."""


class _Misuse(click.ClickException):
    """An argument or setting that cannot work: exit code 2, as click's own usage errors."""

    exit_code = 2


class Group(click.Group):
    """Commands whose errors of ours end with a message and an exit code, and not with a traceback."""

    @override
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ConfigurationError as error:
            raise _Misuse(str(error)) from error
        except SessionStoreError as error:
            raise Failure(str(error)) from error


class _Duration(click.ParamType[timedelta]):
    """A duration, such as 90s, 30m, 24h or 7d."""

    name = "duration"

    @override
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:
        try:
            converted = duration(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if not isinstance(converted, timedelta):
            self.fail(f"{value!r} is no duration; leave the option out for none", param, ctx)
        return converted


DURATION = _Duration()


def _variable(name: str) -> str:
    return ENVIRONMENT_PREFIX + name.removeprefix("--").replace("-", "_").upper()


def option(name: str, **attributes: Any) -> Callable[[_Command], _Command]:
    """An option that an environment variable can set, too: `--some-name` is MCP_SESSION_STORE_SOME_NAME."""
    return click.option(name, envvar=_variable(name.split("/")[0]), show_envvar=True, **attributes)


url_option = option(
    "--url",
    required=True,
    metavar="URL",
    help="The database: postgresql://user:password@host/database or sqlite:///path.",
)
schema_option = option(
    "--schema", metavar="NAME", help="Postgres: the schema with the tables. Default: the search path's first."
)
namespace_option = option(
    "--namespace",
    metavar="NAME",
    default=DEFAULT_NAMESPACE,
    show_default=True,
    help="Keeps servers that share a database apart.",
)
_timeout_option = option(
    "--timeout",
    metavar="SECONDS",
    default=30.0,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="How long one question to the database may take.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the sessions are that a command is about."""

    url: str = field(repr=False)
    schema: str | None
    namespace: str
    timeout: float

    def directory(self) -> SessionDirectory:
        """To read them."""
        from mcp_session_store.sql.admin.sessions import SessionDirectory

        self._refuse_absent()
        return SessionDirectory(self.url, namespace=self.namespace, schema=self.schema, timeout=self.timeout)

    def event_directory(self) -> EventDirectory:
        """To read the events."""
        from mcp_session_store.sql.admin.events import EventDirectory

        self._refuse_absent()
        return EventDirectory(self.url, namespace=self.namespace, schema=self.schema, timeout=self.timeout)

    def event_partitions(self) -> EventPartitions:
        """To change how the events of all namespaces are laid out."""
        from mcp_session_store.sql.admin.partitions import EventPartitions

        return EventPartitions(self.url, schema=self.schema, timeout=self.timeout)

    def store(self, retention: RetentionPolicy | None = None) -> SqlSessionStore:
        """To change them.

        Its calls take no longer than those of servers, however patient the command is: servers look for changes
        that are no older.
        """
        from mcp_session_store.sql import DEFAULT_TIMEOUT, SqlSessionStore

        self._refuse_absent()
        return SqlSessionStore(
            self.url,
            namespace=self.namespace,
            schema=self.schema,
            timeout=min(self.timeout, DEFAULT_TIMEOUT),
            retention=retention,
        )

    def event_log(self, store: SqlSessionStore, policy: EventPolicy) -> SqlEventLog:
        """To change the events of a store's sessions."""
        from mcp_session_store.sql import SqlEventLog

        return SqlEventLog(store, policy=policy)

    def _refuse_absent(self) -> None:
        """Make no SQLite file where the name of one was mistyped."""
        from mcp_session_store.sql.engine import checked_url

        url, dialect = checked_url(self.url)
        dialect.refuse_absent(url)


def place_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say where the sessions are; the command gets a `Place` as its first argument."""

    @url_option
    @schema_option
    @namespace_option
    @_timeout_option
    @functools.wraps(command)
    def with_place(*, url: str, schema: str | None, namespace: str, timeout: float, **others: Any) -> None:
        command(Place(url=url, schema=schema, namespace=namespace, timeout=timeout), **others)

    return with_place


def tables_options(command: Callable[..., None]) -> Callable[..., None]:
    """As `place_options`, for what concerns the tables, which all namespaces share."""

    @url_option
    @schema_option
    @_timeout_option
    @functools.wraps(command)
    def with_place(*, url: str, schema: str | None, timeout: float, **others: Any) -> None:
        command(Place(url=url, schema=schema, namespace=DEFAULT_NAMESPACE, timeout=timeout), **others)

    return with_place


_RETENTION_OPTIONS = (
    option("--idle", metavar="DURATION", help="How long a session lives unused. Default: 24h."),
    option("--absolute", metavar="DURATION", help="How long a session lives, used or not. Default: none."),
    option("--tombstone", metavar="DURATION", help="How long an ended session is kept. Default: 24h."),
    option("--per-principal", metavar="N", help="Live sessions that a principal may have. Default: none, no limit."),
    option(
        "--per-principal-excess",
        metavar="end_oldest|refuse",
        help="What one more does: end the one idle for longest (default), or be refused.",
    ),
    option("--anonymous", metavar="N", help="Sessions stored without a principal. Default: none, no limit."),
)

events_max_age_option = option("--events-max-age", metavar="DURATION", help="How long events are kept. Default: 1h.")
_EVENT_OPTIONS = (
    events_max_age_option,
    option("--events-max-events-per-session", metavar="N", help="Events of a session that are kept. Default: 10000."),
    option("--events-max-bytes-per-session", metavar="N", help="Bytes of them that are kept. Default: 16777216."),
)
_EVENTS_PREFIX = "events_"


def retention_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of the retention policy; the command gets as `retention` the texts of those that are set."""

    @functools.wraps(command)
    def with_retention(*arguments: Any, **others: Any) -> None:
        texts = {name: others.pop(name) for name in RetentionPolicy.model_fields}
        command(*arguments, retention={name: text for name, text in texts.items() if text is not None}, **others)

    return _with_options(with_retention, _RETENTION_OPTIONS)


def event_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of the policy for events; the command gets as `event_retention` the texts of those that are set."""

    @functools.wraps(command)
    def with_retention(*arguments: Any, **others: Any) -> None:
        texts = {name: others.pop(_EVENTS_PREFIX + name) for name in EventPolicy.model_fields}
        command(*arguments, event_retention={name: text for name, text in texts.items() if text is not None}, **others)

    return _with_options(with_retention, _EVENT_OPTIONS)


def _with_options(
    command: Callable[..., None], options: Sequence[Callable[[Callable[..., None]], Callable[..., None]]]
) -> Callable[..., None]:
    for add in reversed(options):
        command = add(command)
    return command


def retention_policy(texts: Mapping[str, str]) -> RetentionPolicy:
    """The policy that options ask for.

    Raises:
        ConfigurationError: A value makes no sense; the message names the option.
    """
    return _policy(RetentionPolicy, texts, prefix="")


def event_policy(texts: Mapping[str, str]) -> EventPolicy:
    """The policy for events that options ask for.

    Raises:
        ConfigurationError: A value makes no sense; the message names the option.
    """
    return _policy(EventPolicy, texts, prefix=_EVENTS_PREFIX)


def _policy(kind: type[_Policy], texts: Mapping[str, str], *, prefix: str) -> _Policy:
    def name(field_name: str) -> str:
        option_name = "--" + (prefix + field_name).replace("_", "-")
        return f"{option_name} ({_variable(option_name)})"

    return kind.from_texts(texts, name=name)


def run(coroutine: Coroutine[Any, Any, _T]) -> _T:
    """Run the asynchronous part of a command."""
    import asyncio

    return asyncio.run(coroutine)
