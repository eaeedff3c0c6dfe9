"""The stream that belongs to no call: it carries what all processes say, and goes on in any of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest

from tests.support.clients import PATIENCE, official_client, until
from tests.support.http import RawClient
from tests.support.proxy import RoundRobinProxy

if TYPE_CHECKING:
    from collections.abc import Sequence

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
