"""The stream that belongs to no call: it carries what all processes say, and goes on in any of them."""

from __future__ import annotations

import contextlib
from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING

import anyio
import httpx2
import pytest

from tests.support.clients import PATIENCE, official_client, until
from tests.support.http import INITIALIZE_PARAMS, RawClient
from tests.support.proxy import RoundRobinProxy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anyio.abc import TaskStatus

    from tests.support.deployment import Application
    from tests.support.http import Stream
    from tests.support.servers import ServerProcess

pytestmark = pytest.mark.anyio

EACH = 5
"""How many things each announcement says."""


@pytest.fixture
def pair(application: Application, store_url: str) -> tuple[ServerProcess, ServerProcess]:
    """Two processes of one application, on one database."""
    return (
        application.serve(store_url, events=True, retry_interval=50),
        application.serve(store_url, events=True, retry_interval=50),
    )


def _check(announced: Sequence[str], texts: Sequence[str]) -> None:
    """Each text was announced whole, once, and in its order."""
    assert sorted(announced) == sorted(f"said://{text}/{number}" for text in texts for number in range(EACH))
    for text in texts:
        assert [uri for uri in announced if f"/{text}/" in uri] == [f"said://{text}/{n}" for n in range(EACH)]


async def test_what_any_process_says_reaches_the_client_that_listens_on_one_across_restarts(
    pair: tuple[ServerProcess, ServerProcess],
) -> None:
    first, second = pair
    announced: list[str] = []
    event_ids: list[str] = []
    texts: list[str] = []
    async with RawClient(first.mcp_url) as listening, RawClient(first.mcp_url) as asking:
        await listening.handshake()
        asking.session_id = listening.session_id

        async def announce(server: ServerProcess, text: str) -> None:
            asking.url = server.mcp_url
            assert (await asking.call_tool("announce", {"text": text, "count": EACH})).text == str(server.pid)
            texts.append(text)

        async def listen(stream: Stream) -> None:
            """Take all that was announced."""
            with anyio.fail_after(PATIENCE):
                while len(announced) < EACH * len(texts):
                    event = await stream.next_event()
                    if event.message is not None:
                        assert event.id is not None
                        event_ids.append(event.id)
                        announced.append(event.message["params"]["uri"])

        async with listening.get_stream() as stream:
            event = await stream.next_event()
            assert event.id is not None
            event_ids.append(event.id)
            await announce(first, "here")
            await announce(second, "there")
            await listen(stream)
        await announce(first, "here-unheard")
        await announce(second, "there-unheard")
        listening.url = second.mcp_url
        async with listening.get_stream(last_event_id=event_ids[-1]) as stream:
            await listen(stream)
            await announce(first, "here-again")
            await announce(second, "there-again")
            await listen(stream)
            await anyio.to_thread.run_sync(first.restart)
            await announce(first, "here-restarted")
            await listen(stream)
            await anyio.to_thread.run_sync(second.kill)
        await announce(first, "here-alone")
        await anyio.to_thread.run_sync(second.start)
        async with listening.get_stream(last_event_id=event_ids[-1]) as stream:
            await announce(second, "there-restarted")
            await listen(stream)
            await announce(first, "here-at-last")
            await listen(stream)

    _check(announced, texts)
    assert len(set(event_ids)) == len(event_ids)


async def test_the_official_client_hears_all_that_any_process_says_whatever_happens_to_its_connection(
    pair: tuple[ServerProcess, ServerProcess],
) -> None:
    texts = [f"text-{number}" for number in range(16)]
    async with (
        RoundRobinProxy([server.port for server in pair], version="1.0") as proxy,
        official_client(proxy.mcp_url) as official,
    ):
        await until(lambda: proxy.cut_streams() > 0, "the client listens")
        for number, text in enumerate(texts):
            await official.announce(text, EACH)
            if number % 4 == 1:
                proxy.cut_streams()
            if number == len(texts) // 2:
                await anyio.to_thread.run_sync(pair[0].restart)
        await until(lambda: len(official.announced) >= EACH * len(texts), "the client has heard all")
        assert official.resumed_after
    _check(official.announced, texts)


class _Listener:
    """A client of one session that opens its stream on one process after the other, and reads all that it opened.

    Args:
        servers: The processes.
        version: Protocol version that it speaks.
    """

    def __init__(self, servers: Sequence[ServerProcess], version: str) -> None:
        self._headers = {"mcp-protocol-version": version}
        self._params = {**INITIALIZE_PARAMS, "protocolVersion": version}
        self._servers = servers
        self.at: list[RawClient] = []
        """The client at each process."""
        self.announced: list[str] = []
        self.last_event_id: str | None = None
        self.open = 0
        """Number of streams that have not ended."""

    async def begin(self, stack: AsyncExitStack) -> None:
        session_id: str | None = None
        for server in self._servers:
            client = RawClient(server.mcp_url, headers=self._headers, session_id=session_id)
            self.at.append(await stack.enter_async_context(client))
            if session_id is None:
                await client.handshake(self._params)
                session_id = client.session_id

    async def listen(self, place: int, *, resumes: bool = False, task_status: TaskStatus[None]) -> None:
        """Open the stream at a process, and read it to its end."""
        last_event_id = self.last_event_id if resumes else None
        with contextlib.suppress(httpx2.TransportError, StopAsyncIteration):
            async with self.at[place].get_stream(last_event_id=last_event_id) as stream:
                assert stream.status == 200
                self.open += 1
                task_status.started()
                try:
                    while True:
                        event = await stream.next_event()
                        self.last_event_id = event.id or self.last_event_id
                        if event.message is not None:
                            self.announced.append(event.message["params"]["uri"])
                finally:
                    self.open -= 1


async def test_a_stream_that_moves_between_processes_has_each_message_once_though_its_process_is_killed(
    application: Application, store_url: str
) -> None:
    servers = [application.serve(store_url, events=True) for _ in range(3)]
    listeners = [_Listener(servers, version) for version in ("2025-11-25", "2025-06-18")]
    texts: list[str] = []

    async def announce(listener: _Listener, places: Sequence[int], rounds: int) -> None:
        for number in range(rounds):
            for place in places:
                text = f"{len(texts)}-{number}"
                texts.append(text)
                await listener.at[place].call_tool("announce", {"text": text, "count": EACH})

    async with AsyncExitStack() as stack, anyio.create_task_group() as tasks:
        for listener in listeners:
            await listener.begin(stack)
        for listener in listeners:
            texts.clear()
            await tasks.start(listener.listen, 0)
            async with anyio.create_task_group() as speakers:
                speakers.start_soon(announce, listener, range(3), 8)
                for place in (1, 2, 0, 2):
                    await anyio.sleep(0.2)
                    await tasks.start(listener.listen, place)
            await until(lambda listener=listener: listener.open == 1, "the older streams have ended")
            if listener is listeners[-1]:
                await anyio.to_thread.run_sync(servers[2].kill)
                await until(lambda listener=listener: listener.open == 0, "its last stream is broken")
                async with anyio.create_task_group() as speakers:
                    speakers.start_soon(announce, listener, range(2), 4)
                    await tasks.start(partial(listener.listen, resumes=True), 1)
            expected = EACH * len(texts)
            await until(lambda: len(listener.announced) >= expected, "the client has heard all")  # noqa: B023
            await anyio.sleep(0.2)
            assert len(listener.announced) == expected
            _check(listener.announced, texts)
        tasks.cancel_scope.cancel()
