"""serve: an existing server object becomes durable, with and without workers, on both databases."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import sys
import uuid
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import httpx2
import psutil
import pytest
from sqlalchemy.engine import make_url

from mcp_session_store.app import durable_app
from mcp_session_store.cli import worker_app
from mcp_session_store.cli.served_object import served_object
from mcp_session_store.errors import ConfigurationError, StoreMisconfigured
from mcp_session_store.retention import EventPolicy, RetentionPolicy, StatePolicy
from mcp_session_store.settings import InstanceSettings
from tests.support.clients import have_arrived, official_client, until
from tests.support.commands import UNREACHABLE
from tests.support.databases import execute, migrated
from tests.support.faults import FaultProxy
from tests.support.http import RawClient
from tests.support.servers import ROOT

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.applications import Starlette

    from tests.support.commands import CommandFunction, InvokeFunction, ServeCommandFunction
    from tests.support.http import Answer


PUBLIC = "mcp.example.com"

TARGETS = [
    "tests.support.targets:mcpserver",
    "tests.support.targets:lowlevel",
    "tests.support.targets:Holder.server",
    "tests.support.fastmcp_target:server",
]


def _migrated(command: CommandFunction, url: str) -> dict[str, str]:
    done = command("upgrade", "--url", url)
    assert done.returncode == 0, done.stderr
    return {"MCP_SESSION_STORE_URL": url}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.anyio
async def test_a_session_of_any_framework_survives_a_kill(
    serve_command: ServeCommandFunction, sqlite_url: str, target: str
) -> None:
    server = serve_command(target, "--url", sqlite_url)
    async with official_client(server.mcp_url) as client:
        assert await client.text("whoami") == f"{server.pid} 0"
        server.restart()
        assert await client.text("whoami") == f"{server.pid} 1"
        assert client.methods.count("initialize") == 1
        assert len(client.session_ids) == 1


@pytest.mark.anyio
async def test_workers_share_the_sessions_and_a_kill_of_all_of_them_ends_none(
    command: CommandFunction, serve_command: ServeCommandFunction, database_url: str
) -> None:
    environment = _migrated(command, database_url)
    server = serve_command("tests.support.targets:mcpserver", "--workers", "2", environment=environment)
    async with official_client(server.mcp_url) as client:
        (session_id,) = client.session_ids
        first = await _answering_pids(server.mcp_url, session_id)
        assert server.pid not in first, "workers answer, not their parent"
        server.restart()
        second = await _answering_pids(server.mcp_url, session_id)
        assert not first & second
        # Garbage collections leave out what a worker started with.
        assert int(await client.text("frozen_objects")) > 50_000
        assert client.methods.count("initialize") == 1
        assert len(client.session_ids) == 1


@pytest.mark.anyio
async def test_garbage_collections_leave_out_what_a_server_started_with(
    serve_command: ServeCommandFunction, sqlite_url: str
) -> None:
    server = serve_command("tests.support.targets:mcpserver", "--url", sqlite_url)
    async with official_client(server.mcp_url) as client:
        assert int(await client.text("frozen_objects")) > 50_000


async def _answering_pids(url: str, session_id: str) -> set[int]:
    """The processes that answered calls in one session, each on a connection of its own."""
    pids = set()
    for _ in range(12):
        async with RawClient(url, session_id=session_id) as client:
            answer = await client.call_tool("whoami")
            assert answer.status == 200, answer
            pids.add(int(answer.text.split()[0]))
    return pids


@pytest.mark.anyio
async def test_a_migrated_postgres_keeps_the_sessions(
    command: CommandFunction, serve_command: ServeCommandFunction, postgres_url: str
) -> None:
    environment = _migrated(command, postgres_url)
    server = serve_command("tests.support.targets:mcpserver", environment=environment, executed=True)
    async with official_client(server.mcp_url) as client:
        server.restart()
        assert await client.text("whoami") == f"{server.pid} 1"
        assert len(client.session_ids) == 1


@pytest.mark.parametrize("target", ["tests.support.targets:mcpserver", "tests.support.fastmcp_target:server"])
@pytest.mark.anyio
async def test_options_reach_the_framework_by_its_own_names(
    serve_command: ServeCommandFunction, sqlite_url: str, target: str
) -> None:
    server = serve_command(target, "--url", sqlite_url, "--path", "/elsewhere", "--json-response")
    async with RawClient(f"{server.url}/elsewhere") as client:
        opened = await client.handshake()
        assert opened.headers["content-type"] == "application/json"
    async with RawClient(server.mcp_url) as client:
        assert (await client.initialize()).status == 404


@pytest.mark.anyio
async def test_namespaces_keep_servers_apart_that_share_a_database(
    serve_command: ServeCommandFunction, sqlite_url: str
) -> None:
    target = "tests.support.targets:mcpserver"
    one = serve_command(target, "--url", sqlite_url, "--namespace", "one")
    other = serve_command(target, "--url", sqlite_url, environment={"MCP_SESSION_STORE_NAMESPACE": "other"})
    assert "namespace 'one' (argument)" in one.log()
    assert "namespace 'other' (MCP_SESSION_STORE_NAMESPACE)" in other.log()
    async with RawClient(one.mcp_url) as client:
        await client.handshake()
        async with RawClient(other.mcp_url, session_id=client.session_id) as stranger:
            assert (await stranger.call_tool("whoami")).status == 404


@pytest.mark.anyio
async def test_a_database_that_is_down_stops_no_server_and_a_stop_answers_those_who_wait_for_it(
    serve_command: ServeCommandFunction,
) -> None:
    given = ("--url", UNREACHABLE, "--outage-patience", "29", "--shutdown-timeout", "25")
    server = serve_command("tests.support.targets:mcpserver", *given)
    async with RawClient(server.mcp_url) as client, RawClient(server.mcp_url, session_id="0" * 32) as other:
        answers: list[Answer] = []

        async def ask(request: Callable[[], Awaitable[Answer]]) -> None:
            answers.append(await request())

        async with anyio.create_task_group() as group:
            group.start_soon(ask, client.initialize)
            group.start_soon(ask, partial(other.call_tool, "whoami"))
            group.start_soon(ask, other.get)
            await until(lambda: "the session store is away" in server.log(), "requests have to wait")
            await have_arrived(server)
            assert answers == []
            # At the signal, and not when uvicorn has waited for them, or their patience is over.
            with anyio.fail_after(18):
                assert await anyio.to_thread.run_sync(server.terminate) in (0, -signal.SIGTERM)
        assert len(answers) == 3
        for answer in answers:
            assert answer.error["code"] == -32603
            assert answer.session_id is None
    assert "the session store is closed" not in server.log()
    assert "s3cret" not in server.log()


@pytest.mark.anyio
async def test_health_through_an_outage_and_a_password_that_changes(
    serve_command: ServeCommandFunction, postgres_url: str
) -> None:
    await migrated(postgres_url)
    role = f"server_{uuid.uuid4().hex}"
    await execute(postgres_url, f"CREATE ROLE {role} LOGIN PASSWORD 'password'")
    await execute(postgres_url, f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {role}")
    url = make_url(postgres_url).set(username=role, password="password")
    async with FaultProxy(f"{url.host}", url.port or 0) as proxy:
        there = url.set(host="127.0.0.1", port=proxy.port).render_as_string(hide_password=False)
        serve = partial(serve_command, "tests.support.targets:mcpserver", "--url", there, "--end-within", "0.5")
        server = await anyio.to_thread.run_sync(serve)
        async with httpx2.AsyncClient(base_url=server.url, timeout=60, verify=False) as client:

            async def is_now(status: int, state: str, *, strict: int) -> bool:
                answer = await client.get("/health/ready")
                if answer.json() != {"status": state}:
                    return False
                live = await client.get("/health/live")
                assert (answer.status_code, live.status_code) == (status, 200)
                return (await client.get("/health/ready?strict")).status_code == strict

            # No other request comes: what is away is noticed, and what is back, by the process itself.
            await until(partial(is_now, 200, "ready", strict=200), "it is ready")
            proxy.refuse()
            proxy.kill_connections()
            await until(partial(is_now, 200, "degraded", strict=503), "the outage is seen")
            await proxy.accept()
            await until(partial(is_now, 200, "ready", strict=200), "it is ready after the outage")
            await execute(postgres_url, f"ALTER ROLE {role} PASSWORD 'another'")
            proxy.kill_connections()
            await until(partial(is_now, 503, "not_ready", strict=503), "the wrong password is seen")
            await execute(postgres_url, f"ALTER ROLE {role} PASSWORD 'password'")
            await until(partial(is_now, 200, "ready", strict=200), "it is ready with its password")


def test_a_server_database_is_migrated_when_asked_only(
    command: CommandFunction, serve_command: ServeCommandFunction, postgres_url: str
) -> None:
    refused = command("serve", "tests.support.targets:mcpserver", "--url", postgres_url)
    assert refused.returncode == 3
    assert "mcp-session-store upgrade" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert command("current", "--url", postgres_url).stdout.strip() == "none"
    assert serve_command("tests.support.targets:mcpserver", "--url", postgres_url, "--auto-upgrade").running
    assert command("check", "--url", postgres_url).returncode == 0


def test_a_port_that_is_taken_is_a_failure(
    command: CommandFunction, serve_command: ServeCommandFunction, sqlite_url: str
) -> None:
    arguments = ["tests.support.targets:mcpserver", "--url", sqlite_url]
    server = serve_command(*arguments)
    assert command("serve", *arguments, "--port", str(server.port)).returncode == 1


def test_settings_of_workers_are_not_among_the_arguments_of_any_process(
    serve_command: ServeCommandFunction, sqlite_url: str
) -> None:
    environment = {"MCP_SESSION_STORE_URL": sqlite_url}
    target = "tests.support.targets:mcpserver"
    server = serve_command(target, "--workers", "2", environment=environment, executed=True)
    shown = [" ".join(psutil.Process(pid).cmdline()) for pid in server.pids()]
    assert len(shown) >= 3
    assert not [line for line in shown if "sqlite" in line]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["tests.support.targets"], "MODULE:ATTRIBUTE"),
        (["./server.py:server:x"], "give MODULE:ATTRIBUTE"),
        (["./server:mcp"], "or FILE:ATTRIBUTE"),
        (["notes:server:x"], "give MODULE:ATTRIBUTE"),
        (["tests/support/targets:mcpserver"], "or FILE:ATTRIBUTE"),
        ([".targets:mcpserver"], "give MODULE:ATTRIBUTE"),
        (["no_such_file.py:server"], "no_such_file.py"),
        (["no_such_module:server"], "'no_such_module'"),
        (["tests.support.no_such_module:server"], "'tests.support.no_such_module'"),
        (["tests.support.broken_target:server"], "no_such_module_of_this_targets"),
        (["tests.support.targets:nothing"], "'nothing'"),
        (["tests.support.targets:text"], "builtins.str"),
        (["tests.support.targets:stateless_app"], "name the server object itself"),
        (["tests.support.targets:mcpserver", "--path", "mcp"], "slash"),
        (["tests.support.targets:mcpserver", "--url", "no url at all"], "postgresql://"),
    ],
)
def test_what_cannot_be_served_is_named_with_the_remedy(
    invoke: InvokeFunction, sqlite_url: str, arguments: list[str], named: str
) -> None:
    done = invoke("serve", "--url", sqlite_url, *arguments)
    assert done.exit_code == 2, done.stderr
    assert named in done.stderr


FILE = """
from mcp.server.mcpserver import MCPServer
{more}
from neighbour import NAME

server = also = MCPServer(NAME, log_level="WARNING")
async def made_later(): return server
def made(): made_here.append(1); return MCPServer("made", log_level="WARNING")
def made_of(name): return server
def failing(): raise OSError("no such key")
def leaving(): raise SystemExit("no key is set")
made_here = []
class Made(MCPServer):
    def __init__(self): super().__init__("of a class", log_level="WARNING")
class Maker:
    def __init__(self, name): self.name = name
    def __call__(self): return MCPServer(self.name, log_level="WARNING")
    def method(self): return self()
    async def __aenter__(self): return server
class LaterMaker:
    async def __call__(self): return server
maker, later = Maker("of an object"), LaterMaker()
class App:
    async def __call__(self, scope, receive, send): pass
app = App()
"""


@pytest.fixture
def server_file(tmp_path: Path) -> Path:
    """A file with a server, which imports another one beside it."""
    folder = tmp_path / "some: folder"
    folder.mkdir()
    (folder / "neighbour.py").write_text('NAME = "neighbours"')
    # A name that a module which is loaded already has.
    file = folder / "json.py"
    file.write_text(FILE.format(more=""))
    return file


@pytest.fixture
def _modules_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("neighbour", "_served_json"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.usefixtures("_modules_as_before")
@pytest.mark.parametrize(
    ("attribute", "name"),
    [
        ("", "neighbours"),
        (":server", "neighbours"),
        (":also", "neighbours"),
        (":made", "made"),
        (":Made", "of a class"),
        (":maker", "of an object"),
        (":maker.method", "of an object"),
    ],
)
def test_a_file_names_its_server_or_a_function_that_makes_one(server_file: Path, attribute: str, name: str) -> None:
    assert served_object(f"{server_file}{attribute}", ".").name == name
    assert served_object(f"./{server_file.name}{attribute}", str(server_file.parent)).name == name
    assert json.dumps(1) == "1"


@pytest.mark.usefixtures("_modules_as_before")
def test_a_file_of_a_package_is_imported_as_its_module(tmp_path: Path) -> None:
    package = tmp_path / "served_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "names.py").write_text('NAME = "relative"')
    (package / "server.py").write_text(
        "from mcp.server.mcpserver import MCPServer\nfrom .names import NAME\nserver = MCPServer(NAME)"
    )
    assert served_object("served_package/server.py:server", str(tmp_path)).name == "relative"
    assert "served_package.server" in sys.modules


@pytest.mark.usefixtures("_modules_as_before")
def test_a_factory_is_called_once_in_a_process(
    invoke: InvokeFunction, monkeypatch: pytest.MonkeyPatch, server_file: Path, sqlite_url: str
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr("uvicorn.run", lambda app, **options: given.update(options, app=app))
    arguments = ["serve", f"{server_file}:made", "--url", sqlite_url]
    done = invoke(*arguments, "--allowed-host", PUBLIC, "--root-path", "/notes/", "--log-level", "INFO")
    assert done.exit_code == 0, done.output
    assert sys.modules["_served_json"].made_here == [1]
    assert given["root_path"] == "/notes"
    line, migrated = done.stderr.splitlines()
    assert migrated.startswith("INFO: ")
    assert "was migrated from nothing to" in migrated
    # What is logged while the app is built comes behind the first line, and looks alike.
    postgres = "postgresql://app@127.0.0.1:1/d?sslmode=disable&keepalives=1"
    done = invoke(*arguments[:2], "--url", postgres)
    first, left_out = done.stderr.splitlines()
    assert "serving 'made'" in first
    assert re.match("INFO: +the option keepalives of the database URL is left out", left_out)
    for part in ("'made'", "http://127.0.0.1:8000/mcp", "sqlite://", "sessions.db", "'default'", "1 worker"):
        assert part in line


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_start_that_fails_in_the_server_itself_has_the_exit_code_of_one_that_is_not_tried(
    invoke: InvokeFunction, monkeypatch: pytest.MonkeyPatch, sqlite_url: str, workers: str
) -> None:
    def run(app: Starlette | str, **_options: Any) -> None:
        if isinstance(app, str):
            return  # as uvicorn does when a worker does not start
        with pytest.raises(StoreMisconfigured):
            asyncio.run(_start(app))
        raise SystemExit(3)

    async def _start(app: Starlette) -> None:
        Path(make_url(sqlite_url).database or "").write_text("no database any more " * 1000)
        async with app.router.lifespan_context(app):
            pass

    monkeypatch.setattr("uvicorn.run", run)
    done = invoke("serve", "tests.support.targets:mcpserver", "--url", sqlite_url, "--workers", workers)
    assert done.exit_code == 3
    assert done.stderr.splitlines()[-1].endswith("did not start; the log above says why")


@pytest.mark.usefixtures("_modules_as_before")
@pytest.mark.parametrize(
    ("attribute", "more", "named"),
    [
        (":made_later", "", "is an async function"),
        (":made_of", "", "missing a required argument: 'name'"),
        (":failing", "", "OSError: no such key"),
        (
            ":leaving",
            "",
            "SystemExit: no key is set ({file}, line 11); what ends the program belongs under if __name__",
        ),
        (":Maker", "", "is a class that is called without arguments, but it takes some: missing a required"),
        (":later", "", "is an async function"),
        (":app", "", "is an ASGI app, and no server (an app that was built from a server"),
        (":MCPServer", "", "is the class MCPServer of the framework: name the variable"),
        ("", "raise SystemExit", "SystemExit"),
        (":server", "import sys; sys.exit(0)", "SystemExit: 0 ({file}, line 3); what ends the program belongs under"),
        (":server", "import sys; sys.exit()", "belongs under"),
        (":server", "exit(3)", "SystemExit: 3"),
        (":nothing", "", "has no 'nothing'"),
        (":NAME", "", "builtins.str"),
        ("", "other = MCPServer('other')", "has several servers"),
        ("", "raise SyntaxError('x')", "line 3"),
        ("", "made = (", "({file}, line 3); correct it"),
    ],
)
def test_what_a_file_does_not_have_is_named_with_the_remedy(
    invoke: InvokeFunction, server_file: Path, sqlite_url: str, attribute: str, more: str, named: str
) -> None:
    server_file.write_text(FILE.format(more=more))
    done = invoke("serve", f"{server_file}{attribute}", "--url", sqlite_url)
    assert done.exit_code == 2, done.stderr
    assert named.format(file=server_file) in done.stderr


def test_hosts_and_origins_can_come_from_the_environment(
    invoke: InvokeFunction, sqlite_url: str, app_arguments: dict[str, Any]
) -> None:
    environment = {"MCP_SESSION_STORE_ALLOWED_HOST": f"{PUBLIC} 10.1.2.3:80"}
    arguments = ["serve", "tests.support.fastmcp_target:server", "--url", sqlite_url]
    invoke(*arguments, "--allowed-origin", "https://a.example", environment=environment)
    security = app_arguments["transport_security"]
    assert security.enable_dns_rebinding_protection
    assert PUBLIC in security.allowed_hosts
    assert "10.1.2.3:80" in security.allowed_hosts
    assert "https://a.example" in security.allowed_origins
    done = invoke(*arguments, "--allowed-host", "http://a.example")
    assert done.exit_code == 2
    assert "is no host" in done.stderr


def test_a_server_that_its_framework_is_told_to_run_stateless_is_refused(
    command: CommandFunction, sqlite_url: str
) -> None:
    done = command(
        "serve",
        "tests.support.fastmcp_target:server",
        "--url",
        sqlite_url,
        environment={"FASTMCP_STATELESS_HTTP": "true"},
        # FastMCP reads its environment when it is imported.
        executed=True,
    )
    assert done.returncode == 2, done.stderr
    assert "stateless" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_url_the_option_and_its_variable_are_named(invoke: InvokeFunction) -> None:
    done = invoke("serve", "tests.support.targets:mcpserver")
    assert done.exit_code == 2
    assert "--url" in done.stderr
    assert "MCP_SESSION_STORE_URL" in done.stderr


def test_a_module_is_found_in_the_folder_that_app_dir_names(
    command: CommandFunction, serve_command: ServeCommandFunction, sqlite_url: str
) -> None:
    target = "survive_restart:server"
    assert command("serve", target, "--url", sqlite_url).returncode == 2
    assert serve_command(target, "--url", sqlite_url, "--app-dir", str(ROOT / "examples")).running


@pytest.fixture
def app_arguments(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `serve` makes the app with; it goes no further."""
    arguments: dict[str, Any] = {}

    def durable_app(server: object, url: str, **options: Any) -> None:
        arguments.update(options)
        raise ConfigurationError("this far and no further")

    monkeypatch.setattr("mcp_session_store.serving.durable_app", durable_app)
    return arguments


def test_retention_and_memory_are_what_the_options_say(
    invoke: InvokeFunction, sqlite_url: str, app_arguments: dict[str, Any]
) -> None:
    options = (
        "--idle 30m --absolute none --tombstone 7d --per-principal 5 --per-principal-excess refuse --anonymous 100"
    )
    options += " --evict-after none --max-sessions 50 --end-within 2.5 --sweep-interval 10"
    invoke("serve", "tests.support.targets:mcpserver", "--url", sqlite_url, *options.split())
    assert app_arguments["retention"] == RetentionPolicy(
        idle=timedelta(minutes=30),
        tombstone=timedelta(days=7),
        per_principal=5,
        per_principal_excess="refuse",
        anonymous=100,
    )
    assert app_arguments["settings"] == InstanceSettings(
        evict_after=None, max_sessions=50, end_within=2.5, sweep_interval=10
    )


def test_retention_and_memory_can_come_from_the_environment(
    invoke: InvokeFunction, sqlite_url: str, app_arguments: dict[str, Any]
) -> None:
    environment = {"MCP_SESSION_STORE_IDLE": "1h", "MCP_SESSION_STORE_SWEEP_INTERVAL": "none"}
    invoke("serve", "tests.support.targets:mcpserver", "--url", sqlite_url, environment=environment)
    assert app_arguments["retention"] == RetentionPolicy.from_environment(environment)
    assert app_arguments["settings"] == InstanceSettings(sweep_interval=None)


@pytest.mark.parametrize("how", ["option", "variable"])
@pytest.mark.parametrize("name", list(InstanceSettings.model_fields))
def test_each_number_of_a_process_has_an_option_and_a_variable(
    invoke: InvokeFunction, sqlite_url: str, app_arguments: dict[str, Any], how: str, name: str
) -> None:
    arguments = ["serve", "tests.support.targets:mcpserver", "--url", sqlite_url]
    if how == "option":
        invoke(*arguments, f"--{name.replace('_', '-')}", "7")
    else:
        invoke(*arguments, environment={f"MCP_SESSION_STORE_{name.upper()}": "7"})
    assert app_arguments["settings"] == InstanceSettings.model_validate({name: 7})


def test_what_stands_on_the_command_line_goes_before_the_environment(
    invoke: InvokeFunction, sqlite_url: str, app_arguments: dict[str, Any]
) -> None:
    arguments = ["serve", "tests.support.targets:mcpserver", "--url", sqlite_url]
    environment = {"MCP_SESSION_STORE_NAMESPACE": "notes", "MCP_SESSION_STORE_EVICT_AFTER": "7"}
    invoke(*arguments, environment=environment)
    # The app reads it itself, and says in its log where it comes from.
    assert not {"namespace", "schema", "auto_upgrade", "pool_size"} & app_arguments.keys()
    app_arguments.clear()
    given = ("--namespace", "other", "--evict-after", "8", "--auto-upgrade", "--pool-size", "2")
    invoke(*arguments, *given, environment=environment)
    assert app_arguments["pool_size"] == 2
    assert app_arguments["namespace"] == "other"
    assert app_arguments["auto_upgrade"] is True
    assert "schema" not in app_arguments
    assert app_arguments["settings"] == InstanceSettings(evict_after=8)


@pytest.mark.parametrize("how", ["options", "environment"])
def test_events_are_kept_by_a_policy_when_they_are_asked_for(
    invoke: InvokeFunction, sqlite_url: str, app_arguments: dict[str, Any], how: str
) -> None:
    options = ["--events", "--events-max-age", "2h", "--events-max-events-per-session", "50"]
    environment = {
        "MCP_SESSION_STORE_EVENTS": "true",
        "MCP_SESSION_STORE_EVENTS_MAX_AGE": "2h",
        "MCP_SESSION_STORE_EVENTS_MAX_EVENTS_PER_SESSION": "50",
    }
    arguments = ["serve", "tests.support.targets:mcpserver", "--url", sqlite_url]
    if how == "options":
        invoke(*arguments, *options)
    else:
        invoke(*arguments, environment=environment)
    assert app_arguments["events"] == EventPolicy(max_age=timedelta(hours=2), max_events_per_session=50)
    assert app_arguments["events"] == EventPolicy.from_environment(environment)


def test_events_that_the_environment_asks_for_can_be_declined(
    invoke: InvokeFunction, sqlite_url: str, app_arguments: dict[str, Any]
) -> None:
    arguments = ["serve", "tests.support.targets:mcpserver", "--url", sqlite_url, "--no-events"]
    invoke(*arguments, environment={"MCP_SESSION_STORE_EVENTS": "true"})
    assert app_arguments["events"] is False


@pytest.mark.parametrize(("option", "environment"), [("--no-relay", "true"), ("--relay", "false")])
def test_the_relay_is_declined_or_asked_for_whatever_the_environment_says(
    invoke: InvokeFunction, sqlite_url: str, app_arguments: dict[str, Any], option: str, environment: str
) -> None:
    arguments = ["serve", "tests.support.targets:mcpserver", "--url", sqlite_url, option]
    invoke(*arguments, environment={"MCP_SESSION_STORE_RELAY": environment})
    assert app_arguments["relay"] is (option == "--relay")


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.anyio
async def test_a_server_keeps_events_that_operators_see(
    command: CommandFunction, serve_command: ServeCommandFunction, sqlite_url: str, kept: bool
) -> None:
    server = serve_command("tests.support.targets:mcpserver", "--url", sqlite_url, *(["--events"] if kept else []))
    async with official_client(server.mcp_url) as client:
        await client.text("whoami")
        (session_id,) = client.session_ids
        done = command("events", "show", session_id, "--json", "--url", sqlite_url)
        assert (done.returncode == 0) == kept, done.stderr
        if kept:
            events = json.loads(done.stdout)["events"]
            assert "response" in {event["kind"] for event in events}
            assert [event for event in events if event["request_id"] is not None]


def test_what_is_not_given_is_left_to_the_app(
    invoke: InvokeFunction, sqlite_url: str, app_arguments: dict[str, Any]
) -> None:
    invoke("serve", "tests.support.targets:mcpserver", "--url", sqlite_url)
    left = {"retention", "events", "relay", "state", "settings", "namespace", "schema", "auto_upgrade", "pool_size"}
    assert app_arguments
    assert not left & app_arguments.keys()


def test_health_is_served_unless_it_is_declined(
    invoke: InvokeFunction, sqlite_url: str, app_arguments: dict[str, Any]
) -> None:
    serve = ("serve", "tests.support.targets:mcpserver", "--url", sqlite_url)
    for options, path in (
        ((), "/health"),
        (("--health-path", "/internal/health"), "/internal/health"),
        (("--no-health",), None),
    ):
        invoke(*serve, *options)
        assert app_arguments["health_path"] == path
    invoke(*serve, environment={"MCP_SESSION_STORE_HEALTH_PATH": "/well"})
    assert app_arguments["health_path"] == "/well"
    done = invoke(*serve, "--health-path", "health")
    assert done.exit_code == 2
    assert "slash" in done.stderr


def test_workers_get_the_same_retention_and_memory(
    monkeypatch: pytest.MonkeyPatch, invoke: InvokeFunction, sqlite_url: str
) -> None:
    made: list[dict[str, Any]] = []

    def noted(server: Any, url: str, **options: Any) -> Starlette:
        made.append(options)
        return durable_app(server, url, **options)

    monkeypatch.setattr("mcp_session_store.serving.durable_app", noted)

    # A worker is a process of its own, that has nothing but the environment.
    def run(_app: str, **_options: Any) -> None:
        worker_app()
        # As when workers are served until a signal comes.
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("uvicorn.run", run)
    options = "--idle 30m --tombstone none --per-principal 5 --evict-after none --max-sessions 50 --end-within 2.5"
    options += " --replay-timeout 3 --events --events-max-age none --state-max-value-bytes 1000"
    done = invoke("serve", "tests.support.targets:mcpserver", "--url", sqlite_url, "--workers", "2", *options.split())
    assert done.exit_code == 0, done.output
    parent, worker = made
    assert worker == parent
    assert worker["retention"] == RetentionPolicy(idle=timedelta(minutes=30), tombstone=None, per_principal=5)
    assert worker["events"] == EventPolicy(max_age=None)
    assert worker["state"] == StatePolicy(max_value_bytes=1000)
    settings = worker["settings"]
    assert settings == InstanceSettings(evict_after=None, max_sessions=50, end_within=2.5, replay_timeout=3)
    assert type(settings.max_sessions) is int


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--idle", "5"], "--idle (MCP_SESSION_STORE_IDLE)"),
        (["--events-max-age", "5"], "--events-max-age (MCP_SESSION_STORE_EVENTS_MAX_AGE)"),
        (["--state-max-value-bytes", "1"], "--state-max-value-bytes (MCP_SESSION_STORE_STATE_MAX_VALUE_BYTES)"),
        (["--evict-after", "soon"], "--evict-after"),
        (["--evict-after", "-1"], "--evict-after"),
        (["--sweep-interval", "nan"], "--sweep-interval"),
        (["--sweep-interval", "inf"], "--sweep-interval"),
        (["--end-within", "0"], "--end-within"),
        (["--max-sessions", "0"], "--max-sessions"),
        (["--replay-timeout", "none"], "--replay-timeout (MCP_SESSION_STORE_REPLAY_TIMEOUT)"),
        (["--max-initialize-params", "1.5"], "--max-initialize-params"),
    ],
)
def test_nonsense_about_retention_and_memory_is_refused_by_name(
    invoke: InvokeFunction, sqlite_url: str, options: list[str], named: str
) -> None:
    done = invoke("serve", "tests.support.targets:mcpserver", "--url", sqlite_url, *options)
    assert done.exit_code == 2, done.output
    assert named in done.stderr
