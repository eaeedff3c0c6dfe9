"""`run_durable`: one line in place of `server.run(transport="streamable-http")`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
from mcp.server.transport_security import TransportSecuritySettings

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
        ready = await Client(served["app"], tasks, path="/health/ready").open("GET").answer()
        assert (ready.status, ready.body) == (200, b'{"status":"ready"}')


PUBLIC = "mcp.example.com"


async def _statuses(app: Starlette, hosts: list[str], origin: str | None = None) -> list[int]:
    """The statuses of requests with these Host headers."""
    async with running(app) as tasks:
        client = Client(app, tasks)
        return [(await client.open_initialize(host=host, origin=origin).answer()).status for host in hosts]


@pytest.mark.parametrize("kind", ["MCPServer", "Server", "FastMCP"])
@pytest.mark.parametrize(
    ("options", "allowed", "refused"),
    [
        ({}, ["127.0.0.1:8000", "127.0.0.1", "localhost:1", "[::1]:8000"], [PUBLIC, "127.0.0.1.example.com"]),
        ({"host": "0.0.0.0"}, [PUBLIC, "127.0.0.1:8000"], []),
        (
            {"allowed_hosts": [PUBLIC]},
            [PUBLIC, f"{PUBLIC}:443", "MCP.example.com", f"{PUBLIC}.", f"{PUBLIC}.:8443", "localhost:8000"],
            ["example.com", f"evil.{PUBLIC}", f"{PUBLIC}.evil.example", f"{PUBLIC}:x", f"{PUBLIC}..", ".", ""],
        ),
        (
            {"allowed_hosts": ["2001:db8::1", "[2001:db8::2]:8443", "xn--bcher-kva.example", "mcp_1.internal"]},
            ["[2001:db8::1]", "[2001:DB8::1]:80", "[2001:db8::2]:8443", "xn--bcher-kva.example:443", "MCP_1.internal"],
            ["2001:db8::1", "[2001:db8::2]:80", "[2001:db8::3]", f"{PUBLIC}@mcp_1.internal", "mcp_1.internal/x"],
        ),
        ({"allowed_hosts": [f"{PUBLIC}."]}, [PUBLIC, f"{PUBLIC}.:443"], [f".{PUBLIC}"]),
        ({"allowed_hosts": [f"{PUBLIC}:443"]}, [PUBLIC, f"{PUBLIC}:443"], [f"{PUBLIC}:80", f"{PUBLIC}:8443"]),
        ({"allowed_hosts": ["10.1.2.3:8443"]}, ["10.1.2.3:8443"], ["10.1.2.3", "10.1.2.3:443"]),
        ({"host": "0.0.0.0", "allowed_hosts": [PUBLIC]}, [PUBLIC], ["127.0.0.1:8000"]),
        ({"allowed_hosts": ["*"]}, [PUBLIC, "x"], []),
    ],
)
@pytest.mark.anyio
async def test_hosts_are_guarded_by_one_rule_for_all_frameworks(
    served: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    options: dict[str, Any],
    allowed: list[str],
    refused: list[str],
) -> None:
    monkeypatch.setattr("mcp_session_store.serving._is_event_loop_running", lambda: False)
    run_durable(Made(kind).server, MemorySessionStore(), **options)
    assert await _statuses(served["app"], [*allowed, *refused]) == [200] * len(allowed) + [421] * len(refused)


@pytest.mark.parametrize("kind", ["MCPServer", "FastMCP"])
@pytest.mark.anyio
async def test_pages_of_allowed_hosts_and_of_allowed_origins_may_send_requests(
    served: dict[str, Any], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("mcp_session_store.serving._is_event_loop_running", lambda: False)
    origins = ["https://app.example.com/", "https://other.example.com:443", "http://other.example.com:443"]
    run_durable(Made(kind).server, MemorySessionStore(), allowed_hosts=[PUBLIC], allowed_origins=origins)
    for origin, status in {
        f"https://{PUBLIC}": 200,
        f"https://{PUBLIC}.": 200,
        "https://app.example.com.": 200,
        "https://app.example.com": 200,
        "http://localhost:3000": 200,
        "https://other.example.com": 200,
        "http://other.example.com": 403,
        "http://app.example.com": 403,
        "https://evil.example": 403,
        "null": 403,
    }.items():
        assert await _statuses(served["app"], [PUBLIC], origin) == [status], origin


@pytest.mark.anyio
async def test_a_refused_host_is_logged_once_with_the_option_that_allows_it(
    served: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("mcp_session_store.serving._is_event_loop_running", lambda: False)
    run_durable(Made("FastMCP").server, MemorySessionStore(), log_level=None)
    await _statuses(served["app"], [PUBLIC, PUBLIC, "127.0.0.1:8000"])
    await _statuses(served["app"], ["127.0.0.1:8000"], "https://evil.example")
    ours = [record.getMessage() for record in caplog.records if record.name.endswith("guard")]
    assert [PUBLIC in line and "--allowed-host" in line and "allowed_hosts=" in line for line in ours] == [True, False]
    assert "https://evil.example" in ours[1]
    assert "--allowed-origin" in ours[1]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"allowed_hosts": ["https://mcp.example.com"]}, "'https://mcp.example.com' is no host"),
        ({"allowed_hosts": ["*.example.com"]}, "is no host"),
        ({"allowed_hosts": "mcp.example.com"}, "allowed_hosts='mcp.example.com' is no list"),
        ({"allowed_hosts": None}, "allowed_hosts=None is no list"),
        ({"allowed_origins": 8}, "allowed_origins=8 is no list"),
        ({"allowed_origins": ["app.example.com"]}, "'app.example.com' is no origin"),
        ({"allowed_origins": ["https://a.example"], "host": "0.0.0.0"}, "name the hosts"),
        ({"allowed_origins": ["https://a.example"], "allowed_hosts": ["*"]}, "leave out allowed_origins"),
        ({"allowed_hosts": [PUBLIC], "transport_security": TransportSecuritySettings()}, "transport_security"),
    ],
)
def test_what_is_no_host_and_no_origin_is_refused(served: dict[str, Any], options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(named)):
        run_durable(Made("Server").server, MemorySessionStore(), **options)
    assert not served


@pytest.mark.anyio
async def test_a_guard_of_the_frameworks_own_stays(served: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mcp_session_store.serving._is_event_loop_running", lambda: False)
    security = TransportSecuritySettings(allowed_hosts=[PUBLIC])
    run_durable(Made("Server").server, MemorySessionStore(), transport_security=security)
    assert await _statuses(served["app"], [PUBLIC, "127.0.0.1:8000"]) == [200, 421]
    monkeypatch.setattr("fastmcp.settings.http_host_origin_protection", True)
    monkeypatch.setattr("fastmcp.settings.http_allowed_hosts", [PUBLIC])
    run_durable(Made("FastMCP").server, MemorySessionStore())
    assert await _statuses(served["app"], [PUBLIC, "evil.example"]) == [200, 421]
    # Hosts that are given stand in its place.
    run_durable(Made("FastMCP").server, MemorySessionStore(), allowed_hosts=["other.example.com"])
    hosts = ["other.example.com", "127.0.0.1:8000", PUBLIC, "evil.example"]
    assert await _statuses(served["app"], hosts) == [200, 200, 421, 421]


def test_the_first_line_says_what_is_served_where(
    served: dict[str, Any], sqlite_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    url = "postgresql://someone:s3cret@db.example/notes"
    run_durable(Made("FastMCP").server, url, host="::1", port=80, path="/x", namespace="n", log_level=None)
    assert caplog.messages[-1] == (
        "serving 'notes' at http://[::1]:80/x: "
        "sessions in postgresql://someone@db.example/notes, namespace 'n', 1 worker"
    )
    run_durable(Made("Server").server, MemorySessionStore(), root_path="/notes", log_level=None)
    assert served["root_path"] == "/notes"
    assert "http://127.0.0.1:8000/mcp: sessions in MemorySessionStore, namespace 'default'" in caplog.messages[-1]


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


@pytest.mark.parametrize(
    "wrong",
    [
        {"host": None},
        {"host": ""},
        {"port": "8000"},
        {"port": 65536},
        {"port": True},
        {"path": "mcp"},
        {"path": 5},
        {"root_path": "notes"},
        {"root_path": None},
        {"shutdown_timeout": -1},
        {"shutdown_timeout": None},
        {"log_level": "loud"},
        {"log_level": 20},
        {"json_response": "yes"},
        {"health_path": 5},
    ],
    ids=repr,
)
def test_an_argument_that_cannot_be_is_named_before_anything_listens(
    served: dict[str, Any], wrong: dict[str, Any]
) -> None:
    ((name, _),) = wrong.items()
    with pytest.raises(ConfigurationError, match=name):
        run_durable(Made("Server").server, MemorySessionStore(), **wrong)
    assert not served


def test_a_root_path_and_a_level_may_be_written_otherwise(served: dict[str, Any]) -> None:
    run_durable(Made("Server").server, MemorySessionStore(), root_path="/notes/", log_level="TRACE")
    assert served["root_path"] == "/notes"
    assert served["log_config"]["loggers"]["mcp_session_store"]["level"] == "DEBUG"


def test_what_durable_app_refuses_is_refused(served: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="max_sessions"):
        run_durable(Made("Server").server, MemorySessionStore(), max_sessions=0)
    assert not served
