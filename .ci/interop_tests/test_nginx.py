"""Both recipes for nginx, with real clients: what a client sends arrives, and a killed process is not seen."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import anyio
import pytest

from interop_tests.nginx import Nginx
from mcp_session_store.sql.schema import migrate
from tests.support.clients import sessions, whoami
from tests.support.questions import serve_questions
from tests.support.trial import KINDS, Trial

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.deployment import Application
    from tests.support.servers import ServeFunction

pytestmark = pytest.mark.anyio

CLIENTS = 24
EACH = 5


async def test_what_clients_answer_arrives_by_round_robin(
    serve: ServeFunction, tmp_path: Path, postgres_url: str
) -> None:
    await migrate.upgrade(postgres_url)
    servers = [serve_questions(serve, tmp_path / "notes", postgres_url, events=True) for _ in range(2)]
    with Nginx("round-robin.conf", [server.port for server in servers], tmp_path) as nginx:
        trial = Trial(nginx.mcp_url, tmp_path / "notes", random.Random(1), patience=25.0)
        await trial.run(dict.fromkeys(KINDS, EACH), clients=10, client_kinds=("official", "fastmcp"))
        tallies = await trial.tallies(within=5.0)
    assert {kind: tally.arrived for kind, tally in tallies.items()} == dict.fromkeys(KINDS, EACH), tallies
    assert any(tally.elsewhere for tally in tallies.values())


@pytest.mark.parametrize("recipe", ["round-robin.conf", "affinity.conf"])
async def test_sessions_are_used_where_the_recipe_says_and_outlive_a_process(
    application: Application, postgres_url: str, tmp_path: Path, recipe: str
) -> None:
    await migrate.upgrade(postgres_url)
    servers = [application.serve(postgres_url) for _ in range(2)]
    with Nginx(recipe, [server.port for server in servers], tmp_path) as nginx:
        async with sessions(nginx.mcp_url, CLIENTS) as users:

            async def used() -> list[set[int]]:
                pids: list[set[int]] = [set() for _ in users]

                async def use(number: int) -> None:
                    for _ in range(4):
                        pids[number].add((await whoami(users[number]))["pid"])

                async with anyio.create_task_group() as group:
                    for number in range(CLIENTS):
                        group.start_soon(use, number)
                return pids

            before = await used()
            visited = {len(pids) for pids in before}
            assert max(visited) == (2 if recipe == "round-robin.conf" else 1)
            # Both processes have their part.
            assert set().union(*before) == {server.pid for server in servers}
            servers[0].kill()
            assert await used() == [{servers[1].pid}] * CLIENTS
