"""FastMCP's own tests of HTTP, state and visibility, with `durable_app` in the place of `FastMCP.http_app`.

`python -m interop_tests.fastmcp_suite` runs them, in the folder that has FastMCP's `tests`, of the version that is
installed. This module is also the plugin of pytest that puts `durable_app` there. Clients in memory become clients of
the HTTP app where a test is about the state of a session, because in memory there is no session of this package's.

What cannot pass is named in `DIFFERENCES`, with the reason. The run fails when another test fails, and when one of
these passes, or is no more there.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import shutil
import sys
import warnings
from typing import TYPE_CHECKING, Any, Final

import pytest

from mcp_session_store import SqlSessionStore, durable_app

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import fastmcp
    from fastmcp import FastMCP
    from fastmcp.client.transports import FastMCPTransport
    from fastmcp.utilities.tests import asgi_server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence
    from pathlib import Path

FILES: Final = (
    "tests/client/test_streamable_http.py",
    "tests/server/http/test_custom_routes.py",
    "tests/server/http/test_http_middleware.py",
    "tests/server/http/test_lifespan_once_per_process.py",
    "tests/server/http/test_routable_headers.py",
    "tests/server/http/test_session_idle_timeout.py",
    "tests/server/http/test_session_owner_enforcement.py",
    "tests/server/http/test_stale_access_token.py",
    "tests/server/http/test_streamable_http_shutdown.py",
    "tests/server/middleware/test_initialization_middleware.py",
    "tests/server/mount/test_session_visibility.py",
    "tests/server/test_app_state.py",
    "tests/server/test_context.py::TestContextState",
    "tests/server/test_fastapi_testclient_compat.py",
    "tests/server/test_session_provider.py",
    "tests/server/test_session_scope.py",
    "tests/server/test_session_visibility.py",
    "tests/server/test_session_visibility_empty_filters.py",
    "tests/server/test_streamable_http_no_redirect.py",
)

LEFT_OUT: Final = (
    # Its server has a tenth of a second to listen.
    "tests/client/test_streamable_http.py::test_nested_streamable_http_server_resolves_correctly",
)

IN_SESSIONS: Final = (
    "tests/server/middleware/test_initialization_middleware.py",
    "tests/server/mount/test_session_visibility.py",
    "tests/server/test_context.py::TestContextState",
    "tests/server/test_session_provider.py",
    "tests/server/test_session_scope.py::TestInMemory",
    "tests/server/test_session_visibility",
)
"""Beginnings of the names of tests whose clients in memory become clients of the HTTP app, with sessions."""

_TIMEOUT: Final = "tests/server/http/test_session_idle_timeout.py"
_LIFETIME: Final = "the idle timeout is the store's, in its RetentionPolicy; the manager in memory has none of its own"

DIFFERENCES: Final[Mapping[str, str]] = {
    f"{_TIMEOUT}::test_default_timeout_reaches_session_manager[True]": _LIFETIME,
    f"{_TIMEOUT}::test_http_app_timeout_overrides_setting": _LIFETIME,
    f"{_TIMEOUT}::test_default_timeout_frees_session_capacity[True]": (
        "in a full memory an idle session gives way, and is restored when it is used; no client is refused for it"
    ),
    "tests/server/http/test_streamable_http_shutdown.py"
    "::test_lifespan_terminates_active_transports_before_task_group_cancel": (
        "the test puts an object of its own into the SDK's table of transports; only transports of sessions are ended"
    ),
}
"""Tests that fail with `durable_app`, as they should, and why."""


def main() -> int:
    """Run the tests, and return pytest's exit code."""
    options = ["-q", "-p", "no:cacheprovider", "-W", "ignore", "-o", "asyncio_mode=auto", "--timeout", "60"]
    options += ["--inline-snapshot", "disable", "--rootdir", "."]
    options += [f"--deselect={name}" for name in LEFT_OUT]
    return pytest.main([*options, *FILES], plugins=[sys.modules[__name__]])


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with the tables, of which each test gets a copy."""
    file = tmp_path_factory.mktemp("migrated") / "sessions.db"

    async def migrate() -> None:
        async with SqlSessionStore(f"sqlite:///{file}") as store:
            await store.ping()

    asyncio.run(migrate())
    return file


@pytest.fixture(autouse=True)
def durable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, migrated: Path, request: pytest.FixtureRequest) -> None:
    """Build each HTTP app that can have sessions with `durable_app`."""
    file = shutil.copy(migrated, tmp_path / "sessions.db")
    of_fastmcp = FastMCP.http_app
    building = False

    @functools.wraps(of_fastmcp)
    def http_app(server: FastMCP[Any], path: str | None = None, middleware: Any = None, **options: Any) -> Any:
        nonlocal building
        options |= {"path": path, "middleware": middleware}
        stateless = options.get("stateless_http")
        if stateless is None:
            stateless = fastmcp.settings.stateless_http
        # durable_app itself calls it.
        if building or stateless or options.get("transport") == "sse":
            return of_fastmcp(server, **options)
        building = True
        try:
            return durable_app(server, f"sqlite:///{file}", **options)
        finally:
            building = False

    monkeypatch.setattr(FastMCP, "http_app", http_app)
    if request.node.nodeid.startswith(IN_SESSIONS):
        monkeypatch.setattr(FastMCPTransport, "connect_session", _connect_over_http)
        # Protocol 2026-07-28 has no sessions.
        monkeypatch.setattr(FastMCPTransport, "legacy_only", True)


@contextlib.asynccontextmanager
async def _connect_over_http(transport: FastMCPTransport, **arguments: Any) -> AsyncIterator[Any]:
    server: Any = transport.server
    async with (
        asgi_server(server) as running,
        running.transport().connect_session(**arguments) as session,
    ):
        yield session


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Expect the failures that are named."""
    named = {item.nodeid: item for item in items if item.nodeid in DIFFERENCES}
    if missing := DIFFERENCES.keys() - named:
        raise pytest.UsageError(f"FastMCP has no such tests (any more): {', '.join(sorted(missing))}")
    for name, item in named.items():
        item.add_marker(pytest.mark.xfail(reason=DIFFERENCES[name], strict=True))


if __name__ == "__main__":
    sys.exit(main())
