"""A server process is killed and started again: its clients go on in their sessions."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import anyio
import httpx2
import pytest

from tests.support.clients import official_client, pid_of, until, whoami
from tests.support.http import INITIALIZE_PARAMS, RawClient

if TYPE_CHECKING:
    from tests.support.deployment import Application
    from tests.support.records import Records

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("app", ["mcpserver_both", "lowlevel_both", "fastmcp_both"])
async def test_after_a_sigkill_clients_go_on_in_their_sessions_without_noticing(
    application: Application, store_url: str, app: str
) -> None:
    server = application.serve(store_url, app)
    killed = server.pid
    async with (
        RawClient(f"{server.url}/sse/mcp") as sse,
        RawClient(f"{server.url}/json/mcp") as plain,
        official_client(f"{server.url}/sse/mcp") as official,
    ):
        clients = {"raw": sse, "plain": plain}
        for name, raw in clients.items():
            await raw.handshake({**INITIALIZE_PARAMS, "clientInfo": {"name": name, "version": "1"}})
            assert await whoami(raw) == {"pid": killed, "client": name, "restores": 0, "previous_instance": None}
        assert (await official.whoami())["restores"] == 0
        ids = {name: raw.session_id for name, raw in clients.items()}
        (official_id,) = official.session_ids
        sent = len(official.methods)

        await anyio.to_thread.run_sync(server.restart)

        for name, raw in clients.items():
            told = await whoami(raw)
            assert (told["pid"], told["client"], told["restores"]) == (server.pid, name, 1)
            assert pid_of(told["previous_instance"]) == killed
        told = await official.whoami()
        assert (told["pid"], told["client"], told["restores"]) == (server.pid, "official", 1)
        assert pid_of(told["previous_instance"]) == killed

        # Nobody was told anything: the ids are the same, and the client sent its call and nothing before it.
        assert {name: raw.session_id for name, raw in clients.items()} == ids
        assert official.session_ids == {official_id}
        assert official.methods[sent:] == ["tools/call"]
        assert official.statuses.keys() <= {200, 202}
        assert len(application.handshakes(replayed=False)) == 3
        assert {one.pid for one in application.handshakes(replayed=False)} == {killed}
        replayed = application.handshakes(replayed=True)
        assert sorted(str(one.replayed_in) for one in replayed) == sorted([*map(str, ids.values()), official_id])
        assert {one.pid for one in replayed} == {server.pid}
    assert official.methods.count("initialize") == 1


async def test_a_server_killed_between_initialize_and_initialized_leaves_a_session_that_goes_on(
    application: Application, store_url: str, records: Records
) -> None:
    server = application.serve(store_url)
    killed = server.pid
    async with RawClient(server.mcp_url) as client:
        opened = await client.initialize()
        assert opened.status == 200
        assert application.handshakes("notifications/initialized", replayed=False) == []

        await anyio.to_thread.run_sync(server.restart)

        notified = await client.notify("notifications/initialized")
        assert notified.status == 202
        told = await whoami(client)
        assert (told["pid"], told["client"], told["restores"]) == (server.pid, "raw", 1)
        assert client.session_id == opened.session_id
        # The application sees it once, as part of the replay; the client's own, which came later, is swallowed.
        assert len(application.handshakes("notifications/initialized", replayed=True)) == 1
        assert application.handshakes("notifications/initialized", replayed=False) == []

        async def lives_on() -> bool:
            row = await records.row(client.session_id)
            return bool(row["expires_at"] - row["last_seen_at"] > timedelta(hours=23))

        # The restore may be stored before the call, which alone is a use.
        await until(lives_on, "the first use has given the session the policy's life")
        row = await records.row(client.session_id)
        assert row["restores"] == 1
        assert pid_of(row["instance_hint"]) == server.pid != killed


async def test_a_server_killed_during_a_restore_leaves_a_session_that_can_be_restored(
    application: Application, store_url: str, records: Records
) -> None:
    server = application.serve(store_url)
    opened_by = server.pid
    async with RawClient(server.mcp_url) as client:
        await client.handshake()
        await whoami(client)

        application.gate.touch()
        await anyio.to_thread.run_sync(server.restart)
        async with anyio.create_task_group() as group:

            async def call_in_vain() -> None:
                with pytest.raises(httpx2.TransportError):
                    await client.call_tool("whoami")

            group.start_soon(call_in_vain)
            await until(lambda: bool(application.handshakes(replayed=True)), "the restore is in the replay")
            await anyio.to_thread.run_sync(server.kill)
        application.gate.unlink()
        # What was not published was not counted.
        row = await records.row(client.session_id)
        assert (row["restores"], pid_of(row["instance_hint"])) == (0, opened_by)

        async with records.locked(table="mcp_session"):
            await anyio.to_thread.run_sync(server.start)
            told = await whoami(client)
            assert (told["pid"], told["restores"], pid_of(told["previous_instance"])) == (server.pid, 1, opened_by)
            await anyio.to_thread.run_sync(server.kill)
        # Neither was a restore that was served, and not reported yet.
        row = await records.row(client.session_id)
        assert (row["restores"], pid_of(row["instance_hint"])) == (0, opened_by)

        await anyio.to_thread.run_sync(server.start)

        told = await whoami(client)
        assert (told["pid"], told["restores"], pid_of(told["previous_instance"])) == (server.pid, 1, opened_by)
        row = await records.restored(client.session_id)
        assert (row["restores"], pid_of(row["instance_hint"])) == (1, server.pid)
        assert len(application.handshakes(replayed=True)) == 3
        assert len(application.handshakes(replayed=False)) == 1


async def test_of_the_sessions_that_clients_know_a_sigkill_under_load_loses_none(
    application: Application, store_url: str, records: Records
) -> None:
    # Very many restores at once take each other's time.
    server = application.serve(store_url, "mcpserver_both", replay_timeout=60)
    urls = [f"{server.url}/sse/mcp", f"{server.url}/json/mcp"]
    known: list[tuple[str, str]] = []

    async def open_sessions(url: str) -> None:
        while True:
            async with RawClient(url) as client:
                try:
                    async with client.stream("POST", client.message("initialize", INITIALIZE_PARAMS)) as stream:
                        # From here on the client knows it, whether or not it gets to read the rest.
                        if stream.session_id is not None:
                            known.append((url, stream.session_id))
                        await stream.read()
                except httpx2.TransportError:
                    return

    async def is_restored(client: RawClient) -> None:
        assert (await whoami(client))["restores"] == 1

    async def use(url: str, session_id: str) -> None:
        async with RawClient(url, session_id=session_id) as client, anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(is_restored, client)

    async with anyio.create_task_group() as group:
        for url in urls * 4:
            group.start_soon(open_sessions, url)
        await until(lambda: len(known) >= 40, "clients have opened sessions")
        await anyio.to_thread.run_sync(server.kill)

    await anyio.to_thread.run_sync(server.start)
    async with anyio.create_task_group() as group:
        for url, session_id in known:
            group.start_soon(use, url, session_id)
    # Three first requests for each, at once, and one restore.
    replayed = [one.replayed_in for one in application.handshakes(replayed=True)]
    assert sorted(map(str, replayed)) == sorted(session_id for _, session_id in known)
    assert [(await records.restored(session_id))["restores"] for _, session_id in known] == [1] * len(known)


async def test_a_server_that_asks_the_client_when_it_is_initialized_asks_again_in_the_restored_session(
    application: Application, sqlite_url: str
) -> None:
    server = application.serve(sqlite_url, "asking")
    roots = {**INITIALIZE_PARAMS, "capabilities": {"roots": {}}}

    async def answer_with(client: RawClient, name: str, *, replayed: bool) -> None:
        async with client.get_stream() as stream:
            question = await stream.next()
            assert question["method"] == "roots/list"
            await client.respond(question["id"], {"roots": [{"uri": "file:///root", "name": name}]})
        await until(
            lambda: bool(application.handshakes(f"roots: {name}", replayed=replayed)), "the server has the answer"
        )

    async with RawClient(server.mcp_url) as client:
        assert (await client.initialize(roots)).status == 200
        async with anyio.create_task_group() as group:
            group.start_soon(client.notify, "notifications/initialized")
            await answer_with(client, "first", replayed=False)

        await anyio.to_thread.run_sync(server.restart)

        # The replayed handler waits for an answer, and the session is served meanwhile.
        assert (await whoami(client))["restores"] == 1
        await answer_with(client, "second", replayed=True)
        (seen,) = application.handshakes("roots: second", replayed=True)
        assert (seen.pid, seen.replayed_in) == (server.pid, client.session_id)
