"""The files of examples/deploy: they parse, their commands are accepted, and their numbers fit those of the code."""

from __future__ import annotations

import configparser
import json
import re
import shlex
from typing import TYPE_CHECKING, Any

import click
import pytest
import yaml

from mcp_session_store.adapter.draining import STOP_MARGIN
from mcp_session_store.adapter.stopping import ANSWERS_TIMEOUT, SHUTDOWN_TIMEOUT
from mcp_session_store.cli import main
from mcp_session_store.serving import DEFAULT_HEALTH_PATH, DEFAULT_PORT, DEFAULT_SHUTDOWN_TIMEOUT
from tests.support.servers import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

FOLDER = ROOT / "examples" / "deploy"
PAGE = ROOT / "docs" / "deployment.md"

WRITTEN_LAST = ANSWERS_TIMEOUT + SHUTDOWN_TIMEOUT + SHUTDOWN_TIMEOUT + 3 * SHUTDOWN_TIMEOUT
"""Seconds at most of a stop behind the last call: answers and activity are stored, the instance says that it has gone,
and event log, mailbox and store are closed."""


def compose() -> dict[str, Any]:
    services: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]
    return services


def kubernetes(kind: str) -> dict[str, Any]:
    (found,) = [each for each in yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text()) if each["kind"] == kind]
    spec: dict[str, Any] = found["spec"]
    return spec


def pod(kind: str) -> dict[str, Any]:
    spec: dict[str, Any] = kubernetes(kind)["template"]["spec"]
    return spec


def container() -> dict[str, Any]:
    (only,) = pod("Deployment")["containers"]
    found: dict[str, Any] = only
    return found


def unit() -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser(strict=False, delimiters="=", comment_prefixes="#")
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(FOLDER / "notes@.service")
    return parser


def docker(instruction: str) -> list[str]:
    (value,) = re.findall(rf"^{instruction} (\[.*\])$", (FOLDER / "Dockerfile").read_text(), re.MULTILINE)
    words: list[str] = json.loads(value)
    return words


def of_unit(option: str) -> list[str]:
    program, *words = shlex.split(unit()["Service"][option].replace("%i", "8001"))
    assert program.endswith("/mcp-session-store")
    return words


def parsed(words: Sequence[str]) -> dict[str, Any]:
    """Return the parameters of a command line, which must be one of ours, with an environment that names a database."""
    command: click.Command = main
    context = click.Context(main)
    words = list(words)
    while isinstance(command, click.Group):
        command = command.commands[words.pop(0)]
    with context:
        return command.make_context(command.name, words, parent=context).params


SERVED: dict[str, Callable[[], list[str]]] = {
    "compose": lambda: compose()["server"]["command"],
    "kubernetes": lambda: container()["args"],
    "systemd": lambda: of_unit("ExecStart"),
    "image": lambda: docker("CMD"),
}
OTHERS: dict[str, Callable[[], list[str]]] = {
    "compose, migrate": lambda: compose()["migrate"]["command"],
    "kubernetes, migrate": lambda: pod("Job")["containers"][0]["args"],
    "kubernetes, check": lambda: pod("Deployment")["initContainers"][0]["args"],
    "systemd, check": lambda: of_unit("ExecStartPre"),
}


@pytest.fixture(autouse=True)
def named_database(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MCP_SESSION_STORE_URL", "postgresql://user:password@host/database")


@pytest.mark.parametrize("where", SERVED)
def test_the_command_that_serves_is_accepted_and_serves_the_example(where: str) -> None:
    assert docker("ENTRYPOINT") == ["mcp-session-store"]
    parameters = parsed(SERVED[where]())
    assert parameters["url"].startswith("postgresql:")
    assert parameters["target"] == "server:server"
    assert (FOLDER / "server.py").exists()
    assert parameters["events"] is True
    if where in ("compose", "kubernetes"):
        # Else nothing outside of the container reaches it, or its proxy is answered 421.
        assert parameters["host"] == "0.0.0.0"
        assert parameters["port"] == DEFAULT_PORT
        assert parameters["allowed_host"]


@pytest.mark.parametrize("where", OTHERS)
def test_the_commands_around_it_are_accepted(where: str) -> None:
    assert parsed(OTHERS[where]())["url"].startswith("postgresql:")


@pytest.mark.parametrize("where", ["compose", "kubernetes", "systemd"])
def test_a_stop_has_the_time_that_it_takes(where: str) -> None:
    before = 0.0
    if where == "compose":
        given = compose()["server"]["stop_grace_period"].removesuffix("s")
    elif where == "systemd":
        given = unit()["Service"]["TimeoutStopSec"]
    else:
        given = pod("Deployment")["terminationGracePeriodSeconds"]
        _, seconds = container()["lifecycle"]["preStop"]["exec"]["command"]
        before = float(seconds)
        assert before > 0
    timeout = parsed(SERVED[where]())["shutdown_timeout"]
    assert timeout == DEFAULT_SHUTDOWN_TIMEOUT
    assert float(given) > before + timeout + STOP_MARGIN + WRITTEN_LAST
    assert str(given) in PAGE.read_text()


def test_the_page_has_the_numbers_of_a_stop() -> None:
    (row,) = re.findall(r"^\| in all.*\|$", PAGE.read_text(), re.MULTILINE)
    assert f"{DEFAULT_SHUTDOWN_TIMEOUT + STOP_MARGIN + WRITTEN_LAST:g} s" in row


def test_probes_ask_for_health_where_it_is_served() -> None:
    probes = container()
    assert probes["ports"] == [{"name": "http", "containerPort": DEFAULT_PORT}]
    asked = {name: probes[name]["httpGet"] for name in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert {probe["port"] for probe in asked.values()} == {"http"}
    assert asked["readinessProbe"]["path"] == f"{DEFAULT_HEALTH_PATH}/ready"
    # A database that is away must restart no container.
    assert asked["livenessProbe"]["path"] == asked["startupProbe"]["path"] == f"{DEFAULT_HEALTH_PATH}/live"
    assert f":{DEFAULT_PORT}{DEFAULT_HEALTH_PATH}/ready" in compose()["server"]["healthcheck"]["test"][-1]
    assert kubernetes("Service")["ports"][0]["targetPort"] == "http"
    assert "sessionAffinity" not in kubernetes("Service")


def test_a_rolling_update_takes_no_replica_away_before_another_one_is_ready() -> None:
    spec = kubernetes("Deployment")
    assert spec["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    assert spec["replicas"] == compose()["server"]["deploy"]["replicas"] == 2
    assert (
        spec["selector"]["matchLabels"] == spec["template"]["metadata"]["labels"] == kubernetes("Service")["selector"]
    )


def test_systemd_starts_nothing_again_that_an_operator_has_to_repair() -> None:
    # Wrong usage, and a database that cannot be used until it is repaired: tests/cli/test_start.py.
    assert unit()["Service"]["RestartPreventExitStatus"].split() == ["2", "3"]
    assert float(unit()["Service"]["TimeoutStartSec"]) > parsed(of_unit("ExecStartPre"))["wait"].total_seconds()


def test_nginx_in_front_of_the_replicas_does_what_the_recipe_does() -> None:
    def location(text: str) -> list[str]:
        (block,) = re.findall(r"location / \{.*?\n    \}", text, re.DOTALL)
        return [line.strip() for line in block.splitlines() if line.strip() and "#" not in line]

    recipe = (ROOT / "examples" / "nginx" / "round-robin.conf").read_text()
    assert location((FOLDER / "nginx.conf").read_text()) == location(recipe)
