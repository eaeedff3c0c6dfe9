"""What the commands have in common: options with their environment variables, errors with their exit codes."""

from __future__ import annotations

import contextlib
import functools
from datetime import timedelta
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, TypeVar, get_args

import click
from typing_extensions import override

from mcp_session_store.environment import NO_LIMIT, Settings, duration, variable
from mcp_session_store.errors import ConfigurationError, SessionStoreError, without_passwords
from mcp_session_store.retention import EventPolicy, RetentionPolicy, StatePolicy
from mcp_session_store.settings import InstanceSettings, Unit
from mcp_session_store.store import DEFAULT_NAMESPACE

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator, Mapping

    from pydantic.fields import FieldInfo

# The database's drivers are imported by the commands that use them, because `--help` does not.

__all__ = [
    "DURATION",
    "DURATION_OR_SECONDS",
    "Failure",
    "Group",
    "event_options",
    "events_max_age_option",
    "instance_options",
    "json_option",
    "namespace_option",
    "option",
    "read_settings",
    "retention_options",
    "run",
    "schema_option",
    "state_options",
    "sweep_retention_options",
    "url_option",
]

_T = TypeVar("_T")
_Command = TypeVar("_Command", bound="Callable[..., None]")
_Settings = TypeVar("_Settings", bound="Settings")


class Failure(click.ClickException):
    """Check that failed, or database that does not answer: exit code 1."""


class _Misuse(click.ClickException):
    """Argument or setting that cannot work: exit code 2, as click's own usage errors."""

    exit_code = 2


class Group(click.Group):
    """Commands that end on an error of this package with a message and an exit code, and not with a traceback."""

    @override
    def make_context(self, *arguments: Any, **others: Any) -> click.Context:
        with _quoting_no_password():
            return super().make_context(*arguments, **others)

    @override
    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _quoting_no_password():
                return super().invoke(ctx)
        except ConfigurationError as error:
            raise _Misuse(str(error)) from error
        except SessionStoreError as error:
            raise Failure(str(error)) from error


@contextlib.contextmanager
def _quoting_no_password() -> Iterator[None]:
    """Take passwords out of click's own messages, which quote an argument that stands in a wrong place."""
    try:
        yield
    except click.UsageError as error:
        given = error.format_message()
        if (shown := without_passwords(given)) == given:
            raise
        raise click.UsageError(shown, ctx=error.ctx) from None


class _Duration(click.ParamType[timedelta]):
    """Duration, such as 90s, 30m, 24h or 7d."""

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


class _DurationOrSeconds(_Duration):
    """Duration, or a number of seconds without a unit, as other tools that wait take it."""

    @override
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:
        is_number = isinstance(value, str) and value.replace(".", "", 1).isdecimal()
        return super().convert(f"{value}s" if is_number else value, param, ctx)


DURATION_OR_SECONDS = _DurationOrSeconds()


def option_name(model: type[Settings], field: str) -> str:
    """Return the name of the option of a field."""
    return "--" + (model.prefix + field).replace("_", "-")


def shown_default(value: object) -> str:
    """Return a default as the text that an option or a variable takes for it."""
    match value:
        case None:
            return NO_LIMIT
        case timedelta():
            units = {"h": timedelta(hours=1), "m": timedelta(minutes=1)}
            unit = next((unit for unit, length in units.items() if value and not value % length), "s")
            return f"{value / units.get(unit, timedelta(seconds=1)):g}{unit}"
        case float():
            return f"{value:g}"
    return str(value)


def _metavar(field: FieldInfo) -> str:
    """Return what the option of a number takes: its unit, and `none` where that means something."""
    unit = next(unit for unit in field.metadata if isinstance(unit, Unit))
    is_optional = type(None) in get_args(field.annotation)
    return f"{unit.value.upper()}|{NO_LIMIT}" if is_optional else unit.value.upper()


def option(name: str, *, parameter: str | None = None, **attributes: Any) -> Callable[[_Command], _Command]:
    """Return an option that an environment variable can set, too: MCP_SESSION_STORE_SOME_NAME for `--some-name`.

    Args:
        name: The option.
        parameter: The command's parameter for it, where that of the same name cannot be.
        attributes: What `click.option` takes.
    """
    setting = name.split("/")[0].removeprefix("--").replace("-", "_")
    names = (name,) if parameter is None else (name, parameter)
    return click.option(*names, envvar=variable(setting), show_envvar=True, **attributes)


url_option = option(
    "--url",
    required=True,
    metavar="URL",
    help="Database: postgresql://user:password@host/database or sqlite:///path.",
)
schema_option = option(
    "--schema", metavar="NAME", help="Schema with the tables, on Postgres. Default: the search path's first."
)
namespace_option = option(
    "--namespace",
    metavar="NAME",
    default=DEFAULT_NAMESPACE,
    show_default=True,
    help="Keeps servers that share a database apart.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


_RETENTION_HELP: Final = {
    "idle": ("DURATION", "How long a session lives unused."),
    "absolute": ("DURATION", "How long a session lives, used or not."),
    "tombstone": ("DURATION", "How long an ended session is kept."),
    "per_principal": ("N", "Live sessions that a principal may have."),
    "per_principal_excess": ("end_oldest|refuse", "What one more does: end the one idle for longest, or be refused."),
    "anonymous": ("N", "Sessions stored without a principal, ended ones included."),
    "unbound_state": ("DURATION", "How long state of FastMCP's is kept that belongs to no session."),
}
_EVENT_HELP: Final = {
    "max_age": ("DURATION", "How long events are kept."),
    "max_events_per_session": ("N", "Events of a session that are kept."),
    "max_bytes_per_session": ("N", "Bytes of messages of a session that are kept."),
}
_STATE_HELP: Final = {
    "max_value_bytes": ("N", "Bytes of one value of a session's state."),
    "max_values_per_session": ("N", "Values of a session's state."),
    "max_bytes_per_session": ("N", "Bytes of a session's state, names included."),
}
_INSTANCE_HELP: Final = {
    name: (_metavar(field), (field.description or "").replace("None: ", f"{NO_LIMIT}: "))
    for name, field in InstanceSettings.model_fields.items()
}


def settings_option(
    model: type[Settings], field: str, metavar: str, help_text: str, *, default: str | None = None
) -> Callable[[_Command], _Command]:
    """Return the option of one field of a model, as text.

    Args:
        model: The model.
        field: The name of the field.
        metavar: The form of the text.
        help_text: A sentence about it.
        default: Text of the default; the model's default unless given.
    """
    if default is None:
        default = shown_default(model.model_fields[field].default)
    return option(option_name(model, field), metavar=metavar, help=f"{help_text} Default: {default}.")


def _settings_options(
    model: type[Settings],
    keyword: str,
    helps: Mapping[str, tuple[str, str]],
    *,
    defaults: Mapping[str, str] = MappingProxyType({}),
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that adds the options of a model's fields; the command gets the texts given as `keyword`."""

    def with_options(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def with_texts(*arguments: Any, **others: Any) -> None:
            texts = {name: others.pop(model.prefix + name) for name in helps}
            others[keyword] = {name: text for name, text in texts.items() if text is not None}
            command(*arguments, **others)

        decorated: Callable[..., None] = with_texts
        for name, (metavar, help_text) in reversed(list(helps.items())):
            decorated = settings_option(model, name, metavar, help_text, default=defaults.get(name))(decorated)
        return decorated

    return with_options


retention_options = _settings_options(RetentionPolicy, "retention", _RETENTION_HELP)
"""Add the options of the retention policy; the command gets the texts that are given as `retention`."""
sweep_retention_options = _settings_options(
    RetentionPolicy,
    "retention",
    _RETENTION_HELP,
    defaults={"idle": f"{NO_LIMIT}, or with --absolute {shown_default(RetentionPolicy.model_fields['idle'].default)}"},
)
"""As `retention_options`, for a command that gives no session an expiry unless one of the two is set."""
event_options = _settings_options(EventPolicy, "event_retention", _EVENT_HELP)
"""Add the options of the policy for events; the command gets the texts that are given as `event_retention`."""
events_max_age_option = settings_option(EventPolicy, "max_age", *_EVENT_HELP["max_age"])
state_options = _settings_options(StatePolicy, "state_bounds", _STATE_HELP)
"""Add the options of the bounds of session state; the command gets the texts that are given as `state_bounds`."""
instance_options = _settings_options(InstanceSettings, "instance", _INSTANCE_HELP)
"""Add the options of a process that serves; the command gets the texts that are given as `instance`."""


def read_settings(model: type[_Settings], texts: Mapping[str, str]) -> _Settings:
    """Return the settings that options ask for.

    Raises:
        ConfigurationError: A value makes no sense; the message names the option.
    """

    def name(field: str) -> str:
        return f"{option_name(model, field)} ({variable(model.prefix + field)})"

    return model.from_texts(texts, name=name)


def run(coroutine: Coroutine[Any, Any, _T]) -> _T:
    """Run the asynchronous part of a command."""
    import asyncio

    return asyncio.run(coroutine)
