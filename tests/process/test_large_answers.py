"""Many large answers at once are no matter of other clients."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import pytest

from tests.support.clients import PATIENCE
from tests.support.databases import execute
from tests.support.http import RawClient

if TYPE_CHECKING:
    from tests.support.deployment import Application
    from tests.support.http import Event
    from tests.support.servers import ServerProcess

pytestmark = pytest.mark.anyio

LARGE = 4 * 1024**2
CALLS = 16


async def test_a_crowd_of_large_answers_holds_up_no_other_client(application: Application, store_url: str) -> None:
    server = application.serve(store_url, events=True)
    application.hold("large")
    async with RawClient(server.mcp_url) as modest:
        await modest.handshake()
        await calls_that_will_answer(server, CALLS)
        memory = memory_of(server)
        application.release("large")
        answers: list[Event] = []

        async def go_on() -> None:
            while True:
                answers.append(await answer_of(modest))

        with anyio.fail_after(PATIENCE):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(go_on)
                while await stored_answers(store_url) < CALLS:
                    await anyio.sleep(0.1)
                tasks.cancel_scope.cancel()
        # While the large ones were stored. None had to go without an id, as it would if events counted as down.
        assert len(answers) > 10
        assert [answer for answer in answers if answer.id is None] == []
        assert memory_of(server) - memory < 2 * CALLS * LARGE


async def calls_that_will_answer(server: ServerProcess, number: int) -> None:
    """Have calls of as many sessions that return much at once later, whose clients have left."""
    for _ in range(number):
        async with RawClient(server.mcp_url) as client:
            await client.handshake()
            params = {"name": "talk", "arguments": {"call": "large", "count": 0, "answer_padding": LARGE}}
            async with client.stream("POST", client.message("tools/call", params)) as stream:
                assert (await stream.next_event()).id is not None


async def answer_of(client: RawClient) -> Event:
    """Call a tool; return the event with the answer."""
    params = {"name": "whoami", "arguments": {}}
    async with client.stream("POST", client.message("tools/call", params)) as stream:
        while (event := await stream.next_event()).message is None:
            pass
    assert event.message["result"]["content"]
    return event


async def stored_answers(url: str) -> int:
    """Return how many large answers are stored."""
    large = "SELECT count(*) FROM mcp_session_event WHERE kind = 'response' AND length(message) > 100000"
    ((number,),) = await execute(url, large)
    return int(number)


def memory_of(server: ServerProcess) -> int:
    """Return the most memory that a process has had, in bytes."""
    status = Path(f"/proc/{server.pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])
