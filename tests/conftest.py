"""Fixtures for all tests: an event loop, databases that are new for each test, and server processes."""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import os
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from tests.support import servers
from tests.support.databases import migrated
from tests.support.postgres import PostgresServer, fresh_database, provide_postgres

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping, Sequence
    from pathlib import Path

    from tests.support.servers import ServeFunction, ServerProcess


def pytest_xdist_auto_num_workers() -> int:
    """Return two workers more than there are processors, because tests wait half of their time."""
    return (os.cpu_count() or 1) + 2


def pytest_collection_finish() -> None:
    """Exclude modules and collected tests from garbage collection: a full one takes 0.3 s to go through them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """asyncio alone: the SQL stores need it. Async tests carry `@pytest.mark.anyio`."""
    return "asyncio"


@pytest.fixture(autouse=True)
def _logs_as_before() -> Iterator[None]:
    """Undo what a test configures of logs within this process, as `serve` and Alembic's `env.py` do."""
    loggers = [logging.getLogger(name) for name in (None, "mcp_session_store", "alembic", "uvicorn", "uvicorn.access")]
    before = [(logger, logger.level, logger.propagate, logger.handlers[:]) for logger in loggers]
    yield
    for logger, level, propagate, handlers in before:
        logger.setLevel(level)
        logger.propagate = propagate
        # Those of pytest come and go by themselves.
        for handler in set(logger.handlers) - set(handlers):
            if logger is not logging.root:
                logger.removeHandler(handler)


@pytest.fixture(autouse=True)
def _own_warnings(request: pytest.FixtureRequest) -> Iterator[None]:
    """Collect what a test leaves that ignores warnings, or a later collection would have them in another test."""
    yield
    if request.node.get_closest_marker("filterwarnings") is not None:
        gc.collect()


@pytest.fixture(scope="session")
def postgres_server_url() -> Iterator[str]:
    """The URL of the one Postgres server of this test session."""
    with ExitStack() as stack:
        yield provide_postgres(stack)


@pytest.fixture
def postgres_url(postgres_server_url: str) -> Iterator[str]:
    """The URL of an empty Postgres database that is this test's own."""
    with fresh_database(postgres_server_url) as url:
        yield url


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """The URL of a SQLite file that does not exist yet."""
    return f"sqlite+aiosqlite:///{tmp_path / 'sessions.db'}"


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest) -> str:
    """The URL of an empty database, of each kind in turn."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def migrated_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a migrated database, of each kind in turn, for all tests of a module: their keys are random."""
    with ExitStack() as stack:
        if request.param == "sqlite":
            url = f"sqlite+aiosqlite:///{tmp_path_factory.mktemp('shared') / 'sessions.db'}"
        else:
            url = stack.enter_context(fresh_database(request.getfixturevalue("postgres_server_url")))
        asyncio.run(migrated(url))
        yield url


@pytest.fixture(scope="session")
def _stoppable_postgres() -> Iterator[PostgresServer]:
    with PostgresServer() as server:
        yield server


@pytest.fixture
def stoppable_postgres(_stoppable_postgres: PostgresServer) -> Iterator[PostgresServer]:
    """A running Postgres server that the test may stop and start; `server.database()` gives it a database."""
    _stoppable_postgres.start()
    yield _stoppable_postgres
    # Whatever the test left behind, the databases that it made are dropped on a server that runs.
    _stoppable_postgres.start()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[ServeFunction]:
    """Starts a uvicorn process for an app (`module:attribute`); it is killed when the test is over."""
    with ExitStack() as stack:
        logs = itertools.count()

        def start(
            app: str,
            *,
            environment: Mapping[str, str] | None = None,
            workers: int = 1,
            port: int | None = None,
            options: Sequence[str] = (),
        ) -> ServerProcess:
            log = tmp_path / f"server-{next(logs)}.log"
            server = servers.uvicorn_server(
                app, log=log, environment=environment, workers=workers, port=port, options=options
            )
            return stack.enter_context(server)

        yield start


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the logs of the test's servers with a failure."""
    report = yield
    if report.failed:
        for server in servers.started:
            report.sections.append((f"log of the server on port {server.port}", server.log()[-6000:]))
    if report.when == "teardown":
        servers.started.clear()
    return report
