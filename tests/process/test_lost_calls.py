"""The process that runs a call goes away: its client gets what was said, then an error, and no second run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest
from mcp import MCPError
from mcp_types import CONNECTION_CLOSED

from tests.support.clients import PATIENCE, Talking, everything, official_client, until
from tests.support.http import RawClient
from tests.support.proxy import RoundRobinProxy
from tests.support.servers import ServerProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tests.support.deployment import Application
    from tests.support.records import Records

pytestmark = pytest.mark.anyio

INSTANCE_TIMEOUT = 2.0
"""Seconds that the servers are given; what comes of it is waited for with patience."""
FOR_EVER = 3600.0
"""Seconds: nothing that a test waits for comes of it."""
COUNT = 20
HALF = 10


class _Half:
    """Calls in one session, each of which is held when it has said half."""

    def __init__(self, application: Application, records: Records, client: RawClient, names: Sequence[str]) -> None:
        self.calls = [Talking(client, name, count=COUNT) for name in names]
        self._application = application
        self._records = records
        self._client = client
        for name in names:
            application.hold(name)
            application.let_say(name, HALF)

    async def begin(self, server: ServerProcess) -> None:
        """Call, and read less than is said; wait until the half is stored."""
        for call in self.calls:
            await call.read(server, events=HALF // 2)

        async def stored() -> bool:
            return await self._records.events(self._client.session_id) == len(self.calls) * HALF

        await until(stored, "the half of each call is stored")

    def check(self) -> None:
        """Each has got the half, and then an error; none was run again."""
        for call in self.calls:
            assert call.said == [*range(HALF), "lost"]
            assert call.answer["id"] == call.request["id"]
            assert call.answer["error"]["code"] == CONNECTION_CLOSED
            # The error has an event id of its own.
            assert len(set(call.event_ids)) == len(call.event_ids) == 1 + HALF + 1
            assert self._application.runs(call.name) == 1


async def test_a_call_whose_process_is_killed_ends_with_an_error_and_is_not_run_again(
    application: Application, store_url: str, records: Records
) -> None:
    running, other = (application.serve(store_url, events=True, instance_timeout=INSTANCE_TIMEOUT) for _ in range(2))
    async with RawClient(running.mcp_url) as client:
        await client.handshake()
        half = _Half(application, records, client, ["following", "elsewhere", "restarted"])
        following, elsewhere, restarted = half.calls
        await half.begin(running)

        async with following.connected(other):
            await following.take(1)
            await anyio.to_thread.run_sync(running.kill)
            await following.take()
        await elsewhere.read(other)
        await anyio.to_thread.run_sync(running.start)
        await restarted.read(running)

        half.check()
        for call in half.calls:
            # After the error there is nothing more; who asks again for what came before is told the same.
            assert (await client.get(last_event_id=call.event_ids[-1])).status == 405
            error = call.forget_answer()
            await call.read(other)
            assert call.answer["error"] == error["error"]
        half.check()
        # The session goes on.
        assert (await client.call_tool("whoami")).status == 200


async def test_answers_that_wait_for_the_database_when_their_process_is_stopped_are_not_lost(
    application: Application, store_url: str, records: Records
) -> None:
    stopping, other = (
        application.serve(
            store_url, events=True, instance_timeout=FOR_EVER, options=["--timeout-graceful-shutdown", "1"]
        )
        for _ in range(2)
    )
    async with RawClient(stopping.mcp_url) as client:
        await client.handshake()
        calls = [Talking(client, name, count=COUNT) for name in ("first", "second", "running")]
        for call in calls:
            application.hold(call.name)
            application.let_say(call.name, COUNT)
            await call.read(stopping, events=HALF)

        async def said() -> bool:
            return await records.events(client.session_id) == len(calls) * COUNT

        await until(said, "everything but the answers is stored")
        first, second, running = calls
        async with anyio.create_task_group() as group, records.locked():
            for call in (first, second):
                application.release(call.name)
            await until(lambda: application.is_over("first") and application.is_over("second"), "two calls are over")
            group.start_soon(anyio.to_thread.run_sync, stopping.terminate)
            # It stops meanwhile; seconds.
            await anyio.sleep(1)
        for call in (first, second):
            await call.read(other)
            assert call.said == everything(COUNT)
        await running.read(other)
        assert running.said == [*range(COUNT), "lost"]


@pytest.mark.parametrize(
    ("stop", "instance_timeout"),
    [(ServerProcess.kill, INSTANCE_TIMEOUT), (ServerProcess.terminate, FOR_EVER)],
    ids=["killed", "stopped"],
)
async def test_a_call_of_the_official_client_whose_process_goes_away_ends_with_an_error(
    application: Application, store_url: str, stop: Callable[[ServerProcess], object], instance_timeout: float
) -> None:
    # Whoever is stopped tells it himself.
    servers = [
        application.serve(
            store_url,
            events=True,
            instance_timeout=instance_timeout,
            retry_interval=50,
            options=["--timeout-graceful-shutdown", "1"],
        )
        for _ in range(2)
    ]
    application.hold("lost")
    application.let_say("lost", HALF)
    async with (
        RoundRobinProxy([server.port for server in servers]) as proxy,
        official_client(proxy.mcp_url) as official,
    ):

        async def go_away() -> None:
            await until(lambda: official.said.get("lost") == [*range(HALF)], "the call has said half")
            (run,) = application.handshakes("talk lost", replayed=False)
            (running,) = (server for server in servers if server.pid == run.pid)
            await anyio.to_thread.run_sync(stop, running)

        with anyio.fail_after(PATIENCE):
            async with anyio.create_task_group() as group:
                group.start_soon(go_away)
                with pytest.raises(MCPError) as failure:
                    await official.talk("lost", count=COUNT)

        assert failure.value.error.code == CONNECTION_CLOSED
        assert failure.value.error.data == {"reason": "lost"}
        assert official.said["lost"] == [*range(HALF)]
        assert (await official.whoami())["client"] == "official"
        assert application.runs("lost") == 1


async def test_a_call_whose_process_is_stopped_ends_with_an_error_at_once(
    application: Application, store_url: str, records: Records
) -> None:
    # What a killed process would leave unsaid for so long, one that is stopped says itself.
    running, other = (
        application.serve(
            store_url, events=True, instance_timeout=FOR_EVER, options=["--timeout-graceful-shutdown", "1"]
        )
        for _ in range(2)
    )
    async with RawClient(running.mcp_url) as client:
        await client.handshake()
        half = _Half(application, records, client, ["following", "coming-back"])
        following, coming_back = half.calls
        await half.begin(running)

        async with following.connected(other):
            await following.take(1)
            await anyio.to_thread.run_sync(running.terminate)
            await following.take()
        await coming_back.read(other)

        half.check()
        assert (await client.call_tool("whoami")).status == 200
