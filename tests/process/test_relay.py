"""Several processes behind a load balancer that picks one at random: what a client sends reaches who waits for it.

`python -m benchmarks.relay` makes the same trial at its full size.
"""

from __future__ import annotations

import os
import random
import signal
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from mcp_session_store.sql.schema import migrate
from tests.support.clients import PATIENCE, until
from tests.support.http import INITIALIZE_PARAMS, RawClient
from tests.support.proxy import RoundRobinProxy
from tests.support.questions import serve_questions
from tests.support.respondents import Wire, respondent
from tests.support.trial import KINDS, Faults, Trial, meanwhile

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from pathlib import Path

    from tests.support.faults import FaultProxy
    from tests.support.http import Message, Stream
    from tests.support.postgres import PostgresServer
    from tests.support.servers import ServeFunction, ServerProcess
    from tests.support.trial import Tally

pytestmark = pytest.mark.anyio

FRAMEWORKS = ("lowlevel", "mcpserver", "fastmcp")
ASKING_PARAMS: Message = {**INITIALIZE_PARAMS, "capabilities": {"elicitation": {}, "sampling": {}, "roots": {}}}


@asynccontextmanager
async def balanced(servers: Sequence[ServerProcess], notes: Path, *, patience: float = 15.0) -> AsyncIterator[Trial]:
    """A trial through a load balancer in front of processes."""
    async with RoundRobinProxy([server.port for server in servers], dice=random.Random(1)) as proxy:
        yield Trial(proxy.mcp_url, notes, random.Random(2), patience=patience)


def check_exactly_once(tallies: dict[str, Tally], trial: Trial) -> None:
    """Check that nothing was lost that was accepted for a process that lived, or went astray, or came twice."""
    shown = f"{tallies}\n{trial.failures}"
    for tally in tallies.values():
        assert (tally.lost, tally.wrong, tally.repeated, tally.disordered) == (0, 0, 0, 0), shown
        # Or next to nothing was tried.
        assert tally.arrived > tally.asked / 3, shown
        assert tally.elsewhere, shown


def check_all_arrived(tallies: dict[str, Tally], trial: Trial) -> None:
    for tally in tallies.values():
        assert tally.arrived == tally.asked, f"{tallies}\n{trial.failures}"
    assert not trial.failures


def check_question_ids(wire: Wire) -> None:
    """Check that ids of questions are integers that JavaScript can represent, and that no session has one twice."""
    assert wire.question_ids
    for (_, question_id), tokens in wire.question_ids.items():
        assert type(question_id) is int
        # Below are those of the version before, which begin with 1.
        assert 2**29 <= question_id < 2**53
        assert len(tokens) == 1


def check_logs(servers: Sequence[ServerProcess], wire: Wire) -> None:
    for server in servers:
        log = server.log()
        assert "Traceback" not in log
        assert [one for one in wire.session_ids if one in log] == []


async def visit_all(client: Any, servers: Sequence[ServerProcess]) -> None:
    """Call until the session is in the memory of all processes."""
    pids = {str(server.pid) for server in servers}
    seen: set[str] = set()

    async def seen_all() -> bool:
        seen.add(await client.ask("whoami"))
        return seen == pids

    await until(seen_all, "all processes have the session")


@pytest.mark.parametrize("database", ["sqlite", "postgres"])
async def test_answers_and_notifications_arrive_once_while_processes_are_killed_and_the_database_is_restarted(
    serve: ServeFunction, tmp_path: Path, request: pytest.FixtureRequest, database: str
) -> None:
    dice = random.Random(3)
    notes = tmp_path / "notes"
    postgres: PostgresServer | None = None
    async with AsyncExitStack() as stack:
        if database == "postgres":
            postgres = request.getfixturevalue("stoppable_postgres")
            url = stack.enter_context(postgres.database())
            await migrate.upgrade(url)
        else:
            url = request.getfixturevalue("sqlite_url")
        events = postgres is not None
        servers = [serve_questions(serve, notes, url, framework, events=events) for framework in FRAMEWORKS]
        trial = await stack.enter_async_context(balanced(servers, notes))

        async with respondent(trial.url, "changing", trial.wire) as client:
            await visit_all(client, servers)
            for _ in range(6):
                await client.change_roots()
            await until(lambda: len(trial.notes.of("changing")) >= 18, "each change reaches each copy")
            counts = [sum(note.pid == server.pid for note in trial.notes.of("changing")) for server in servers]
            assert counts == [6, 6, 6]

        faults = Faults(trial, dice, longest_pause=2.0)
        kill = partial(faults.kill, servers)
        happening: list[Callable[[], Any]] = [kill, kill]
        if postgres is not None:
            happening.append(partial(faults.restart_database, postgres, seconds=1.0))
        async with meanwhile([*happening, kill]):
            await trial.run(dict.fromkeys(KINDS, 15), clients=9, client_kinds=("official", "official", "fastmcp"))
        tallies = await trial.tallies(within=20.0)
        check_exactly_once(tallies, trial)
        assert postgres is not None or not tallies["progress"].overtaken, tallies
        assert faults.kills
        check_question_ids(trial.wire)
        check_logs(servers, trial.wire)


async def test_a_process_that_is_cut_from_the_database_passes_on_later_what_it_accepted(
    serve: ServeFunction, tmp_path: Path, postgres_url: str, proxied_url: str, proxy: FaultProxy
) -> None:
    notes = tmp_path / "notes"
    servers = [serve_questions(serve, notes, postgres_url) for _ in range(2)]
    # In a thread, because the proxy runs in this event loop.
    servers.append(await anyio.to_thread.run_sync(serve_questions, serve, notes, proxied_url))
    cut = servers[2]
    async with (
        balanced(servers, notes, patience=30.0) as trial,
        respondent(trial.url, "resident", trial.wire) as client,
    ):
        await visit_all(client, servers)
        async with asking(servers[0], client_on=servers) as (raw, question, stream):
            # Resident on the process that is cut, and so its check needs no database.
            raw.url = cut.mcp_url
            assert (await raw.call_tool("whoami", {"token": "whoami"})).status == 200
            proxy.refuse()
            proxy.kill_connections()
            async with anyio.create_task_group() as group:
                group.start_soon(partial(trial.run, dict.fromkeys(KINDS, 8), clients=8))
                # At once, and not when the database is back.
                with anyio.fail_after(15):
                    assert (await raw.respond(question["id"], answer_to(question))).status == 202
                await anyio.sleep(4)
                await proxy.accept()
            with anyio.fail_after(PATIENCE):
                assert said_in(await stream.next()) == question["params"]["message"]
        check_all_arrived(await trial.tallies(within=20.0), trial)
        check_logs(servers, trial.wire)


async def test_a_process_that_is_stopped_for_a_while_holds_up_no_other_and_gets_its_answer_when_it_goes_on(
    serve: ServeFunction, tmp_path: Path, postgres_url: str
) -> None:
    await migrate.upgrade(postgres_url)
    notes = tmp_path / "notes"
    servers = [serve_questions(serve, notes, postgres_url) for _ in range(3)]
    stopped = servers[2]
    async with balanced(servers[:2], notes) as trial, asking(stopped, client_on=servers) as (raw, question, stream):
        os.kill(stopped.pid, signal.SIGSTOP)
        try:
            raw.url = servers[0].mcp_url
            assert (await raw.respond(question["id"], answer_to(question))).status == 202
            # Changes go to the stopped one, too, and its mailbox may be full before all are sent.
            async with respondent(trial.url, "changing", trial.wire) as client:
                await visit_all(client, servers[:2])
                for _ in range(50):
                    await client.change_roots()
                await until(lambda: len(trial.notes.of("changing")) >= 100, "each change reaches both")
            await trial.run(dict.fromkeys(KINDS, 6), clients=6)
            check_all_arrived(await trial.tallies(within=5.0), trial)
        finally:
            os.kill(stopped.pid, signal.SIGCONT)
        with anyio.fail_after(PATIENCE):
            assert said_in(await stream.next()) == question["params"]["message"]
        check_logs(servers, trial.wire)


async def test_while_the_relay_is_introduced_process_by_process_and_taken_out_again_clients_go_on(
    serve: ServeFunction, tmp_path: Path, postgres_url: str
) -> None:
    await migrate.upgrade(postgres_url)
    notes = tmp_path / "notes"
    # To the others it is as one of the version before: it has no number.
    off = {"MCP_SESSION_STORE_RELAY": "false"}
    servers = [serve_questions(serve, notes, postgres_url, environment=off) for _ in range(3)]
    async with balanced(servers, notes, patience=1.5) as trial:
        begun = [*servers]

        async def deploy(environment: dict[str, str] | None) -> None:
            for number, before in enumerate(servers):
                await anyio.to_thread.run_sync(before.terminate)
                start = partial(serve_questions, serve, notes, postgres_url, environment=environment, port=before.port)
                servers[number] = await anyio.to_thread.run_sync(start)
                begun.append(servers[number])

        async with anyio.create_task_group() as group:
            group.start_soon(partial(trial.run, {"elicit": 16, "wait": 8, "whoami": 40}, clients=5))
            await deploy(None)
        mixed = await trial.tallies()
        # Where all have it, everything arrives.
        async with RoundRobinProxy([server.port for server in servers], dice=random.Random(4)) as proxy:
            whole = Trial(proxy.mcp_url, tmp_path / "notes", random.Random(5), patience=25.0)
            await whole.run(dict.fromkeys(KINDS, 5), clients=5)
            check_all_arrived(await whole.tallies(within=5.0), whole)
        async with anyio.create_task_group() as group:
            group.start_soon(partial(trial.run, {"elicit": 16, "wait": 8, "whoami": 40}, clients=5))
            await deploy(off)
        for tallies in (mixed, await trial.tallies()):
            assert [(tally.wrong, tally.repeated) for tally in tallies.values()] == [(0, 0)] * len(tallies), tallies
        check_logs(begun, trial.wire)


@asynccontextmanager
async def asking(
    server: ServerProcess, *, client_on: Sequence[ServerProcess]
) -> AsyncIterator[tuple[RawClient, Message, Stream]]:
    """A session in which a call on a server has asked; its client, the question, and the call's stream."""
    async with RawClient(server.mcp_url) as client:
        await client.handshake(ASKING_PARAMS)
        call = client.message("tools/call", {"name": "elicit", "arguments": {"token": "elicit-raw"}})
        async with client.stream("POST", call) as stream:
            question = await stream.next()
            assert question["method"] == "elicitation/create"
            yield client, question, stream


def answer_to(question: Message) -> Message:
    return {"action": "accept", "content": {"said": question["params"]["message"]}}


def said_in(result: Message) -> str:
    text: str = result["result"]["content"][0]["text"]
    return text
