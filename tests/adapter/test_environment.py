"""`durable_app` and the environment: what counts, in which order, and what the log says of it."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner
from sqlalchemy.ext.asyncio import create_async_engine

from mcp_session_store import (
    ConfigurationError,
    DurableSessionManager,
    EventPolicy,
    MemorySessionStore,
    SqlEventLog,
    SqlSessionStore,
    durable_app,
    session_key,
)
from mcp_session_store.cli import main
from mcp_session_store.settings import InstanceSettings
from tests.support.asgi import Client
from tests.support.frameworks import Made
from tests.support.instances import Notes, running
from tests.support.internals import pool_size_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.applications import Starlette

pytestmark = pytest.mark.anyio

POSTGRES = "postgresql://user:password@host.invalid/database"


@pytest.fixture
def kind() -> str:
    """One framework: what is looked at here comes before the framework is asked."""
    return "Server"


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes an app in an environment, and returns its manager."""

    def make(*arguments: Any, environment: Mapping[str, str] | None = None, **options: Any) -> DurableSessionManager:
        for name, value in (environment or {}).items():
            monkeypatch.setenv(f"MCP_SESSION_STORE_{name}", value)
        notes = Notes()
        durable_app(notes.server, *arguments, **options)
        manager = notes.server.session_manager
        assert isinstance(manager, DurableSessionManager)
        return manager

    return make


def sql_store(manager: DurableSessionManager) -> SqlSessionStore:
    assert isinstance(manager.store, SqlSessionStore)
    return manager.store


# Which database


async def test_without_a_url_the_environments_is_taken(manager: Any, sqlite_url: str) -> None:
    assert "sessions.db" in repr(manager(environment={"URL": sqlite_url}).store)
    assert "other.db" in repr(manager("sqlite:///other.db").store)


@pytest.mark.parametrize("environment", [{}, {"URL": ""}])
async def test_without_any_url_the_variable_is_named(manager: Any, environment: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError, match=r"no database.*MCP_SESSION_STORE_URL"):
        manager(environment=environment)


async def test_a_url_of_the_environment_that_cannot_work_is_refused(manager: Any) -> None:
    with pytest.raises(ConfigurationError, match="database URL cannot be read"):
        manager(environment={"URL": "nowhere"})


async def test_a_namespace_comes_from_the_keyword_or_the_environment_or_is_the_default(
    manager: Any, sqlite_url: str
) -> None:
    assert manager(sqlite_url).store.namespace == "default"
    assert manager(sqlite_url, environment={"NAMESPACE": ""}).store.namespace == "default"
    assert manager(sqlite_url, environment={"NAMESPACE": "notes"}).store.namespace == "notes"
    assert manager(sqlite_url, namespace="other").store.namespace == "other"
    assert manager(sqlite_url, namespace="default").store.namespace == "default"


async def test_a_schema_comes_from_the_keyword_or_the_environment(manager: Any) -> None:
    assert sql_store(manager(POSTGRES)).database.schema is None
    assert sql_store(manager(POSTGRES, environment={"SCHEMA": "sessions"})).database.schema == "sessions"
    assert sql_store(manager(POSTGRES, schema="other")).database.schema == "other"
    # None is a value: the search path's first.
    assert sql_store(manager(POSTGRES, schema=None)).database.schema is None


async def test_migrations_on_first_contact_come_from_the_keyword_or_the_environment(
    monkeypatch: pytest.MonkeyPatch, manager: Any
) -> None:
    asked: list[bool] = []

    class Store(SqlSessionStore):
        def __init__(self, url: str, *, auto_upgrade: bool, **others: Any) -> None:
            asked.append(auto_upgrade)
            super().__init__(url, auto_upgrade=auto_upgrade, **others)

    monkeypatch.setattr("mcp_session_store.app.SqlSessionStore", Store)
    manager(POSTGRES)
    for text in ("1", "true", "YES", " on "):
        manager(POSTGRES, environment={"AUTO_UPGRADE": text})
    manager(POSTGRES, auto_upgrade=False)
    manager(POSTGRES, environment={"AUTO_UPGRADE": "off"})
    manager(POSTGRES, auto_upgrade=True)
    assert asked == [False, True, True, True, True, False, False, True]


async def test_the_size_of_the_pool_comes_from_the_keyword_the_environment_or_the_url(manager: Any) -> None:
    url = f"{POSTGRES}?connection_limit=2"
    assert pool_size_of(sql_store(manager(POSTGRES))) == 5
    assert pool_size_of(sql_store(manager(url))) == 2
    assert pool_size_of(sql_store(manager(url, environment={"POOL_SIZE": "3"}))) == 3
    assert pool_size_of(sql_store(manager(url, pool_size=4))) == 4
    with pytest.raises(ConfigurationError, match="MCP_SESSION_STORE_POOL_SIZE: 'many' is not a positive whole number"):
        manager(url, environment={"POOL_SIZE": "many"})


@pytest.mark.parametrize("size", ["3", "many"])
async def test_an_engine_keeps_its_pool_whatever_the_environment_says(manager: Any, sqlite_url: str, size: str) -> None:
    engine = create_async_engine(sqlite_url)
    assert sql_store(manager(engine, environment={"POOL_SIZE": size})).database.engine is engine
    with pytest.raises(ConfigurationError, match="pool_size goes with a database URL"):
        manager(engine, pool_size=2)


@pytest.mark.parametrize("name", ["AUTO_UPGRADE", "EVENTS"])
async def test_what_is_neither_true_nor_false_is_refused_by_the_variables_name(
    manager: Any, sqlite_url: str, name: str
) -> None:
    with pytest.raises(ConfigurationError, match=f"MCP_SESSION_STORE_{name}: 'maybe' is neither true nor false"):
        manager(sqlite_url, environment={name: "maybe"})


# Events


async def test_a_place_that_cannot_be_is_refused_with_the_variables_that_name_it(manager: Any, sqlite_url: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        manager("mysql://host/database", namespace="n", schema=None)
    assert "environment" not in str(refused.value)
    with pytest.raises(ConfigurationError, match=r"has no schemas.*from the environment: MCP_SESSION_STORE_SCHEMA\)"):
        manager(sqlite_url, environment={"SCHEMA": "s"})


async def test_a_variable_of_blanks_says_no_as_in_the_commands(manager: Any, sqlite_url: str) -> None:
    made = manager(sqlite_url, environment={"EVENTS": "  ", "AUTO_UPGRADE": "  "})
    assert made.event_log is None


async def test_events_come_from_the_keyword_or_the_environment(manager: Any, sqlite_url: str) -> None:
    assert manager(sqlite_url).event_log is None
    environment = {"EVENTS": "true", "EVENTS_MAX_EVENTS_PER_SESSION": "50"}
    log = manager(sqlite_url, environment=environment).event_log
    assert isinstance(log, SqlEventLog)
    assert log.policy == EventPolicy(max_events_per_session=50)
    assert manager(sqlite_url, events=False).event_log is None
    assert manager(sqlite_url, events=EventPolicy()).event_log.policy == EventPolicy()
    assert manager(sqlite_url, environment={"EVENTS": "false"}).event_log is None


async def test_events_of_the_environment_need_a_log_that_this_package_can_make(manager: Any, sqlite_url: str) -> None:
    store = SqlSessionStore(sqlite_url)
    assert isinstance(manager(store, environment={"EVENTS": "1"}).event_log, SqlEventLog)
    with pytest.raises(ConfigurationError, match=r"MCP_SESSION_STORE_EVENTS asks.*MemorySessionStore.*EventLog"):
        manager(MemorySessionStore())
    assert manager(MemorySessionStore(), events=False).event_log is None


# The numbers of the process


async def test_a_number_comes_from_the_keyword_or_settings_or_the_environment_or_is_the_default(
    manager: Any, sqlite_url: str
) -> None:
    assert manager(sqlite_url).max_sessions == 10_000
    assert manager(sqlite_url, environment={"MAX_SESSIONS": "7"}).max_sessions == 7
    assert manager(sqlite_url, settings=InstanceSettings(max_sessions=8)).max_sessions == 8
    assert manager(sqlite_url, max_sessions=9).max_sessions == 9
    assert manager(sqlite_url, max_sessions=None).max_sessions is None
    # What settings do not say, the environment does.
    assert manager(sqlite_url, settings=InstanceSettings(evict_after=None)).max_sessions == 7
    with pytest.raises(ConfigurationError, match="max_sessions and settings= are given at once"):
        manager(sqlite_url, max_sessions=9, settings=InstanceSettings())


async def test_a_number_of_the_environment_that_cannot_work_is_refused_unless_it_is_given(
    manager: Any, sqlite_url: str
) -> None:
    with pytest.raises(ConfigurationError, match="MCP_SESSION_STORE_MAX_SESSIONS"):
        manager(sqlite_url, environment={"MAX_SESSIONS": "many"})
    assert manager(sqlite_url, max_sessions=9).max_sessions == 9


@pytest.mark.parametrize("kind", ["MCPServer", "Server", "FastMCP"])
async def test_the_numbers_of_the_environment_reach_each_framework(
    kind: str, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MCP_SESSION_STORE_MAX_SESSIONS", "7")
    made = Made(kind)
    made.app(sqlite_url)
    assert made.lowlevel.session_manager.max_sessions == 7


# A store that the caller made


async def test_a_given_store_has_its_own_place_whatever_the_environment_says(manager: Any, sqlite_url: str) -> None:
    store = SqlSessionStore(sqlite_url, namespace="own")
    environment = {"URL": "nowhere", "NAMESPACE": "notes", "SCHEMA": "sessions", "AUTO_UPGRADE": "maybe", "IDLE": "?"}
    made = manager(store, environment=environment | {"MAX_SESSIONS": "7"})
    assert made.store is store
    assert made.store.namespace == "own"
    # Numbers of the process are not the store's.
    assert made.max_sessions == 7


# What the log says


def started(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "mcp_session_store.app"]


async def run(app: Starlette) -> None:
    async with app.router.lifespan_context(app):
        pass


async def test_each_start_is_logged_with_the_place_and_where_it_comes_from(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mcp_session_store.app")
    app = durable_app(Notes().server, sqlite_url)
    assert started(caplog) == []
    for _ in range(2):
        await run(app)
    assert started(caplog) == ["sessions are kept in namespace 'default' (default), schema not set (default)"] * 2
    caplog.clear()
    monkeypatch.setenv("MCP_SESSION_STORE_NAMESPACE", "notes")
    await run(durable_app(Notes().server, sqlite_url, schema=None))
    await run(durable_app(Notes().server, sqlite_url, namespace="other"))
    async with SqlSessionStore(sqlite_url, namespace="own") as store:
        await run(durable_app(Notes().server, store))
    await run(durable_app(Notes().server, MemorySessionStore(namespace="memory")))
    assert started(caplog) == [
        "sessions are kept in namespace 'notes' (MCP_SESSION_STORE_NAMESPACE), schema not set (argument)",
        "sessions are kept in namespace 'other' (argument), schema not set (default)",
        "sessions are kept in namespace 'own' (the given store's), schema not set (the given store's)",
        "sessions are kept in namespace 'memory' (the given store's)",
    ]
    assert {record.levelname for record in caplog.records if record.name == "mcp_session_store.app"} == {"INFO"}


async def test_the_schema_is_logged_even_where_no_database_answers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mcp_session_store.app")
    monkeypatch.setenv("MCP_SESSION_STORE_URL", "postgresql://user:s3cret@127.0.0.1:1/database")
    monkeypatch.setenv("MCP_SESSION_STORE_SCHEMA", "sessions")
    await run(durable_app(Notes().server))
    (message,) = started(caplog)
    assert "schema 'sessions' (MCP_SESSION_STORE_SCHEMA)" in message
    assert "s3cret" not in caplog.text


# A server and the commands


@pytest.mark.parametrize("namespace", [None, "", "notes", " notes "])
async def test_a_server_and_a_command_look_into_the_same_place(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch, namespace: str | None
) -> None:
    monkeypatch.setenv("MCP_SESSION_STORE_URL", sqlite_url)
    if namespace is not None:
        monkeypatch.setenv("MCP_SESSION_STORE_NAMESPACE", namespace)
    app = durable_app(Notes().server)
    async with running(app) as tasks:
        session_id = await Client(app, tasks).handshake()
    listed = await _in_a_thread("sessions", "list", "--json")
    (session,) = json.loads(listed)["sessions"]
    assert session["key"] == str(session_key(session_id))


async def _in_a_thread(*arguments: str) -> str:
    """Run a command, which has an event loop of its own, beside the test's."""
    from anyio.to_thread import run_sync

    result = await run_sync(lambda: CliRunner().invoke(main, arguments))
    assert result.exit_code == 0, result.output
    return result.stdout
