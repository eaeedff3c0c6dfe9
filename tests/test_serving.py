"""`run_durable`: one line in place of `server.run(transport="streamable-http")`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from mcp_session_store import ConfigurationError, DurableSessionManager, MemorySessionStore, run_durable
from tests.support.asgi import Client
from tests.support.frameworks import Made
from tests.support.instances import running

if TYPE_CHECKING:
    from starlette.applications import Starlette


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What uvicorn is given; it does not run."""
    given: dict[str, Any] = {}

    def run(app: Starlette, **options: Any) -> None:
        given.update(options, app=app)

    monkeypatch.setattr("uvicorn.run", run)
    monkeypatch.setattr("gc.freeze", lambda: None)
    return given


@pytest.mark.parametrize("kind", ["MCPServer", "Server", "FastMCP"])
@pytest.mark.anyio
async def test_a_server_of_any_framework_is_served_durably(
    served: dict[str, Any], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, store = Made(kind), MemorySessionStore()
    monkeypatch.setattr("mcp_session_store.serving._is_event_loop_running", lambda: False)
    run_durable(made.server, store, port=0, path="/elsewhere", json_response=True, shutdown_timeout=3, max_sessions=7)
    assert (served["host"], served["port"]) == ("127.0.0.1", 0)
    async with running(served["app"]) as tasks:
        client = Client(served["app"], tasks, path="/elsewhere")
        await client.handshake()
        answer = await client.call("add", {"a": 1, "b": 2})
        assert answer.text == "3"
        assert answer.headers["content-type"] == "application/json"
        manager = made.lowlevel.session_manager
        assert isinstance(manager, DurableSessionManager)
        assert manager.max_sessions == 7


@pytest.mark.parametrize("level", ["warning", None])
def test_logs_are_set_up_as_asked_and_left_alone_when_asked(served: dict[str, Any], level: str | None) -> None:
    run_durable(Made("Server").server, MemorySessionStore(), log_level=level)
    if level is None:
        assert served["log_config"] is None
    else:
        assert served["log_config"]["loggers"]["mcp_session_store"]["level"] == "WARNING"
        assert "root" not in served["log_config"]


@pytest.mark.anyio
async def test_where_an_event_loop_runs_the_way_to_serve_the_app_is_named(served: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"event loop runs here already.*durable_app"):
        run_durable(Made("Server").server, MemorySessionStore())
    assert not served


def test_several_workers_are_refused_with_the_way_to_have_them(served: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="serve --workers"):
        run_durable(Made("Server").server, MemorySessionStore(), workers=2)
    run_durable(Made("Server").server, MemorySessionStore(), workers=1)
    assert served["workers"] == 1


def test_what_durable_app_refuses_is_refused(served: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="max_sessions"):
        run_durable(Made("Server").server, MemorySessionStore(), max_sessions=0)
    assert not served
