"""No part of a secret reaches a text, whichever way a database URL comes in, and whatever is wrong with it.

Each secret is made of one rare word, so that any part of it is found.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import traceback
from typing import TYPE_CHECKING

import alembic.config
import pytest
import sqlalchemy as sa
from mcp.server.mcpserver import MCPServer
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import create_async_engine

from mcp_session_store import SqlSessionStore, durable_app, migrations
from mcp_session_store.sql.engine import shown_options, shown_url
from mcp_session_store.sql.schema import migrate
from tests.support.databases import engine_of
from tests.support.internals import database_of
from tests.support.servers import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy.engine import URL

    from tests.support.commands import InvokeFunction

WORD = "zqx"
CLOSED = "127.0.0.1:1"
"""Address at which no database listens."""

URLS = {
    "plain": f"postgresql://app:zqxzqx@{CLOSED}/d",
    "encoded": f"postgresql://app:zqx%40zqx%2Fzqx@{CLOSED}/d",
    "colon": f"postgres://app:zqx:zqx@{CLOSED}/d",
    "at sign": f"postgresql://app:zqx@zqx@{CLOSED}/d",
    "two at signs": f"postgresql://app:zqx@zqx@zqx@{CLOSED}/d?sslmode=disable",
    "slash": f"postgresql://app:zqx/zqx@{CLOSED}/d",
    "question mark": f"postgresql://app:zqx?zqx@{CLOSED}/d",
    "option in the password": f"postgresql://app:zqx@zqx?zqx=zqx@{CLOSED}/d",
    "hash": f"postgresql://app:zqx#zqx@{CLOSED}/d",
    "all of them": f"postgresql://app:zqx@zqx/zqx#zqx?zqx:%zqx@{CLOSED}/d?connect_timeout=3",
    "percent sign": f"postgresql://app:zqx%zqx@{CLOSED}/d",
    "blank": f"postgresql://app:zqx zqx@{CLOSED}/d",
    "secret in the name of the user": f"postgresql://app%3Azqx:zqx@{CLOSED}/d",
    "secret as the name of the user": f"postgresql://zqx%24zqx@{CLOSED}/d",
    "port": f"postgresql://app:zqx@{CLOSED}zqx/d",
    "no host": "postgresql://app:zqx/d",
    "several hosts": f"postgresql://app:zqx@{CLOSED},{CLOSED}/d",
    "several hosts, at sign": f"postgresql://app:zqx@zqx@{CLOSED},{CLOSED}/d",
    "socket": "postgresql://app:zqx@/d?host=/nowhere&port=5433",
    "option": f"postgresql://app@{CLOSED}/d?password=zqxzqx",
    "options": f"postgresql://{CLOSED}/d?user=app%3Azqx&password=zqx",
    "ampersand in an option": f"postgresql://app@{CLOSED}/d?password=zqx&zqx=1",
    "hash in an option": f"postgresql://app@{CLOSED}/d?password=zqx#zqx",
    "at sign in an option": f"postgresql://app@{CLOSED}/d?password=zqx@zqx",
    "password of a key": f"postgresql://app@{CLOSED}/d?sslmode=require&sslkey=/nowhere&sslcert=/nowhere&sslpassword=zqx",
    "password of a key of the system's": (
        f"postgresql://app@{CLOSED}/d?sslrootcert=system&sslkey=/nowhere&sslcert=/nowhere&sslpassword=zqx"
    ),
    "content of a key": f"postgresql://app@{CLOSED}/d?sslkey=-----BEGIN%20PRIVATE%20KEY-----%0Azqx%0A",
    "three slashes": f"postgresql:///app:zqx@{CLOSED}/d",
    "in the option host": f"postgresql://app@/d?host=app:zqx@{CLOSED}",
    "unknown option": f"postgresql://app:zqx@{CLOSED}/d?api_token=zqx",
    "option twice": f"postgresql://app@{CLOSED}/d?password=zqx&password=zqxzqx",
    "another database": f"mysql://app:zqx@zqx@{CLOSED}/d",
    "another driver": f"postgresql+psycopg://app:zqx@{CLOSED}/d",
    "quotes": f"'postgresql://app:zqx@{CLOSED}/d'",
    "line's end": f"postgresql://app:zqx@{CLOSED}/d\n",
    "no scheme": f"app:zqx@{CLOSED}/d",
    "one slash": f"postgresql:/app:zqx@{CLOSED}/d",
    "words of libpq": "host=127.0.0.1 port=1 user=app password=zqx",
    "sqlite with a password": f"sqlite://app:zqx@{CLOSED}/d",
    "key of sqlite": "sqlite:///nowhere.db?key=zqx",
    "options behind an ampersand": f"postgresql://app:zqx@{CLOSED}/d&password=zqx",
    "options behind a semicolon": f"postgresql://{CLOSED}/d;user=app;password=zqx",
    "of Java": f"jdbc:postgresql://{CLOSED}/d?user=app&password=zqx",
    "a command": f"psql 'postgresql://app:zqx@{CLOSED}/d'",
    "a line of a file": f"DATABASE_URL=postgresql://app:zqx@{CLOSED}/d",
    "password alone": f"postgresql://:zqx@{CLOSED}/d",
    "backslash": f"postgresql://app:zqx\\@zqx@{CLOSED}/d",
}

every_url = pytest.mark.parametrize("url", URLS.values(), ids=URLS.keys())


def _report(error: BaseException) -> str:
    """An error as a log shows it, with the errors that caused it."""
    return f"{error!r} {''.join(traceback.format_exception(error))}"


class Texts:
    """All texts of a test, in which the secret is looked for."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog
        self._texts: list[str] = []

    def add(self, *texts: object) -> None:
        self._texts += map(str, texts)

    @contextlib.contextmanager
    def of_error(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.add(_report(error))

    def check(self) -> None:
        logged = self._caplog.handler.format
        records = [logged(record) for record in self._caplog.records]
        arguments = [repr(vars(record)) for record in self._caplog.records]
        # The lines of source code in a traceback are those of this test as well.
        found = [line for text in (*self._texts, *records, *arguments) for line in text.splitlines() if WORD in line]
        assert found == []


@pytest.fixture
def texts(caplog: pytest.LogCaptureFixture) -> Texts:
    """Collects texts, and the log at its most detailed, that of SQLAlchemy and of asyncio included."""
    caplog.set_level(logging.DEBUG)
    return Texts(caplog)


async def _open(store: SqlSessionStore) -> None:
    try:
        await store.open()
    finally:
        await store.aclose()


def _use(store: SqlSessionStore, texts: Texts) -> None:
    engine = engine_of(store)
    texts.add(repr(store), store, repr(engine), repr(engine.sync_engine), repr(engine.url), str(engine.url))
    texts.add(database_of(store).shown_url, shown_options(engine.url, None))
    with texts.of_error():
        asyncio.run(_open(store))


@every_url
def test_a_store_that_is_made_from_a_url(url: str, texts: Texts) -> None:
    with texts.of_error():
        _use(SqlSessionStore(url, timeout=3), texts)
    texts.check()


@every_url
def test_a_store_that_is_made_from_a_url_that_was_parsed_elsewhere(url: str, texts: Texts) -> None:
    with contextlib.suppress(sa.exc.ArgumentError, ValueError):
        parsed = make_url(url)
        with texts.of_error():
            _use(SqlSessionStore(parsed, timeout=3), texts)
        texts.check()


@every_url
def test_a_store_with_an_engine_that_was_given(url: str, texts: Texts) -> None:
    """The engine's own texts are its owner's; those of the store and its errors are not."""
    try:
        parsed = make_url(url)
        engine = create_async_engine(
            parsed.set(drivername=parsed.drivername.replace("postgresql", "postgresql+asyncpg"))
        )
    except Exception:
        return
    with texts.of_error():
        store = SqlSessionStore(engine, timeout=3)
        texts.add(repr(store), database_of(store).shown_url, shown_options(engine.url, "s"), shown_url(engine.url))
        asyncio.run(_open(store))
    with texts.of_error():
        asyncio.run(migrations.check(engine))
    texts.check()


@every_url
def test_an_app_and_its_start(url: str, texts: Texts, monkeypatch: pytest.MonkeyPatch) -> None:
    async def start() -> None:
        app = durable_app(MCPServer("secret"), outage_patience=0.1)
        texts.add(repr(app), repr(vars(app.state)))
        async with app.router.lifespan_context(app):
            pass

    with texts.of_error():
        durable_app(MCPServer("secret"), url, schema=url, namespace=url)
    monkeypatch.setenv("MCP_SESSION_STORE_URL", url)
    with texts.of_error():
        asyncio.run(start())
    texts.check()


@every_url
def test_migrations_of_a_program(url: str, texts: Texts) -> None:
    for run in (migrations.upgrade, migrations.check, migrations.current):
        with texts.of_error():
            asyncio.run(run(url))
    with texts.of_error():
        texts.add(migrate.upgrade_sql(url))
    texts.check()


COMMANDS = [
    ("upgrade",),
    ("upgrade", "--sql"),
    ("downgrade", "base"),
    ("current",),
    ("check",),
    ("check", "--rows"),
    ("sessions", "list"),
    ("sessions", "show", "a"),
    ("sessions", "end", "--all"),
    ("sessions", "stats"),
    ("events", "list"),
    ("events", "show", "a"),
    ("events", "stats"),
    ("events", "partition", "--every", "1h"),
    ("events", "maintain"),
    ("events", "unpartition"),
    ("sweep",),
    ("doctor",),
    ("namespaces",),
    ("serve", "tests.support.apps:server"),
]


@every_url
def test_commands(url: str, texts: Texts, invoke: InvokeFunction, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("uvicorn.run", lambda *_, **__: None)
    # All commands with two of the URLs, and a few commands with all of them.
    for arguments in COMMANDS if url in (URLS["plain"], URLS["at sign"]) else (("upgrade",), ("sessions", "list")):
        done = invoke(*arguments, "--url", url)
        texts.add(done.output, done.stderr)
    done = invoke(*COMMANDS[-1], environment={"MCP_SESSION_STORE_URL": url})
    texts.add(done.output, done.stderr)
    texts.check()


@pytest.mark.parametrize(
    "arguments",
    [
        ("{url}",),
        ("--url", "{url}"),
        ("upgrade", "{url}"),
        ("upgrade", "head", "{url}"),
        ("upgrade", "--schema", "{url}", "--url", "postgresql://h/d"),
        ("upgrade", "--urll={url}"),
        ("current", "{url}"),
        ("downgrade", "{url}", "--url", "{file}"),
        ("sessions", "list", "--limit", "{url}", "--url", "postgresql://h/d"),
        ("sessions", "list", "--after", "{url}", "--url", f"postgresql://{CLOSED}/d"),
        ("sessions", "list", "--older-than", "{url}", "--url", "postgresql://h/d"),
        ("sessions", "{url}"),
        ("sweep", "--idle", "{url}", "--url", "postgresql://h/d"),
        ("serve", "{url}"),
        ("serve", "{url}", "--url", "postgresql://h/d"),
        ("serve", "tests.support.apps:server", "--path", "{url}", "--url", "postgresql://h/d"),
    ],
    ids=" ".join,
)
def test_a_url_in_a_wrong_place_of_a_command(
    arguments: tuple[str, ...], texts: Texts, invoke: InvokeFunction, sqlite_url: str
) -> None:
    if "{file}" in arguments:
        invoke("upgrade", "--url", sqlite_url)
    for name in ("plain", "at sign", "all of them", "blank", "option"):
        done = invoke(*(argument.replace("{url}", URLS[name]).replace("{file}", sqlite_url) for argument in arguments))
        assert done.exit_code != 0
        texts.add(done.output, done.stderr)
    texts.check()


@every_url
def test_the_command_of_alembic(
    url: str, texts: Texts, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # It would set up the logging of this process.
    monkeypatch.setattr("logging.config.fileConfig", lambda *_, **__: None)
    for arguments in (["upgrade", "head"], *([["current", "--verbose"]] if url == URLS["at sign"] else [])):
        with texts.of_error(), contextlib.suppress(SystemExit):
            alembic.config.main(["-c", str(ROOT / "alembic.ini"), "-x", f"url={url}", *arguments])
    texts.add(*capsys.readouterr())
    texts.check()


@pytest.mark.parametrize(
    "change",
    [
        lambda url: url.set(password="zqxzqx"),
        lambda url: url.set(username="app:zqx", password="zqx"),
        lambda url: url.set(username="zqx zqx", password=None),
        lambda url: url.set(password="zqx", database="elsewhere"),
    ],
)
def test_a_server_that_refuses_the_user(
    postgres_url: str, change: Callable[[URL], URL], texts: Texts, invoke: InvokeFunction
) -> None:
    url = change(make_url(postgres_url))
    text = url.render_as_string(hide_password=False)
    engine = create_async_engine(url)
    for store in (SqlSessionStore(text), SqlSessionStore(url), SqlSessionStore(engine)):
        with texts.of_error():
            asyncio.run(_open(store))
    for target in (text, engine):
        with texts.of_error():
            asyncio.run(migrations.upgrade(target))
    for arguments in (("check",), ("sessions", "list"), ("sweep",)):
        done = invoke(*arguments, "--url", text)
        texts.add(done.output, done.stderr)
    texts.check()
