"""Help texts: each default that they name is the one that the command uses."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import click
import pytest

from mcp_session_store.cli import main
from mcp_session_store.retention import EventPolicy, RetentionPolicy, StatePolicy
from mcp_session_store.settings import InstanceSettings
from mcp_session_store.sql.admin.events import EventDirectory
from mcp_session_store.sql.admin.sessions import SessionDirectory, SessionPage

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mcp_session_store.environment import Settings
    from tests.support.commands import InvokeFunction

MODELS = (RetentionPolicy, EventPolicy, StatePolicy, InstanceSettings)

OF_OTHERS = {
    "schema": "the search path's first",
    "path": "the framework's, /mcp",
    "json_response": "the framework's, SSE",
}
"""Defaults that the database and the frameworks have."""

PAGE = "50"
"""Lines of a list, by its help."""


def _options(command: click.Command, *path: str) -> Iterator[tuple[str, click.Option]]:
    if isinstance(command, click.Group):
        for name, sub in command.commands.items():
            yield from _options(sub, *path, name)
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            yield " ".join(path), parameter


OPTIONS = list(_options(main))


def _field(option: click.Option) -> tuple[type[Settings], str] | None:
    """The field of a model that an option is for."""
    for model in MODELS:
        name = (option.name or "").removeprefix(model.prefix) if (option.name or "").startswith(model.prefix) else ""
        if name in model.model_fields:
            return model, name
    return None


def _said_default(option: click.Option) -> str | None:
    found = re.search(r"Default: (.*?)\.(?:\s|$)", option.help or "")
    return found and found[1]


def test_each_default_in_a_help_text_is_the_models() -> None:
    seen = set()
    for command, option in OPTIONS:
        said = _said_default(option)
        if (found := _field(option)) is not None and (command, option.name) != ("sweep", "idle"):
            model, name = found
            assert said is not None, f"{command} {option.name}"
            # Read as the option would read it.
            assert getattr(model.from_texts({name: said}), name) == model.model_fields[name].default
            seen.add(name)
        elif option.name in OF_OTHERS:
            assert said == OF_OTHERS[option.name], command
        elif option.name == "limit":
            assert said == PAGE, command
        elif (command, option.name) != ("sweep", "idle"):
            assert said is None, f"{command} {option.name}: {said}"
    assert seen == {name for model in MODELS for name in model.model_fields}


def test_a_list_without_a_limit_has_as_many_lines_as_its_help_says(
    invoke: InvokeFunction, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[int] = []
    read = SessionDirectory.page

    async def page(directory: SessionDirectory, *arguments: Any, limit: int, **others: Any) -> SessionPage:
        limits.append(limit)
        return await read(directory, *arguments, limit=limit, **others)

    monkeypatch.setattr(SessionDirectory, "page", page)
    invoke("upgrade", "--url", sqlite_url)
    assert invoke("sessions", "list", "--url", sqlite_url).exit_code == 0
    assert limits == [int(PAGE)]


@pytest.mark.parametrize(
    ("options", "idle"), [((), "none"), (("--absolute", "7d"), "24h"), (("--idle", "3h"), "3h")], ids=" ".join
)
def test_a_sweep_without_an_idle_time_has_the_one_that_its_help_says(
    invoke: InvokeFunction,
    sqlite_url: str,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    idle: str,
) -> None:
    (said,) = (_said_default(option) for command, option in OPTIONS if (command, option.name) == ("sweep", "idle"))
    assert said == "none, or with --absolute 24h"
    policies: list[RetentionPolicy] = []
    event_policies: list[EventPolicy] = []
    preview, preview_events = SessionDirectory.preview, EventDirectory.preview

    async def noted(directory: SessionDirectory, policy: RetentionPolicy) -> Any:
        policies.append(policy)
        return await preview(directory, policy)

    async def noted_events(directory: EventDirectory, policy: EventPolicy) -> int:
        event_policies.append(policy)
        return await preview_events(directory, policy)

    monkeypatch.setattr(SessionDirectory, "preview", noted)
    monkeypatch.setattr(EventDirectory, "preview", noted_events)
    invoke("upgrade", "--url", sqlite_url)
    done = invoke("sweep", "--dry-run", "--url", sqlite_url, *options)
    assert done.exit_code == 0, done.output
    (policy,) = policies
    assert policy.idle == RetentionPolicy.from_texts({"idle": idle}).idle
    # And all others are the model's.
    rest = RetentionPolicy().model_dump(exclude={"idle", "absolute"})
    assert policy.model_dump(exclude={"idle", "absolute"}) == rest
    assert event_policies == [EventPolicy()]
