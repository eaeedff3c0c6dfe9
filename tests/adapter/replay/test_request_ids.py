"""The ids of the requests that the server sends to a client, over several copies of one session."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import mcp_types as types
import pytest

from tests.support.asgi import until
from tests.support.instances import Notes, instance, open_session

if TYPE_CHECKING:
    from tests.support.faulty_stores import FaultyStore
    from tests.support.instances import RequestContext

pytestmark = pytest.mark.anyio


class Asking:
    """A server whose `initialized` handler asks the client for its roots."""

    def __init__(self) -> None:
        self.notes = Notes()
        self.notes.on_initialized = self._ask
        self.answers: list[list[str]] = []
        self.progress: list[float] = []
        self.give_up = anyio.Event()

    async def _ask(self, ctx: RequestContext) -> None:
        async def ask() -> None:
            answer = await ctx.session.send_request(
                types.ListRootsRequest(), types.ListRootsResult, progress_callback=self._progress
            )
            self.answers.append([str(root.uri) for root in answer.roots])
            self.give_up.set()

        async with anyio.create_task_group() as group:
            group.start_soon(ask)
            await self.give_up.wait()
            group.cancel_scope.cancel()

    async def _progress(self, progress: float, total: float | None, message: str | None) -> None:
        self.progress.append(progress)

    def has_answers(self, count: int) -> bool:
        return len(self.answers) == count


async def test_no_two_copies_of_a_session_ask_under_the_same_id(store: FaultyStore) -> None:
    session_id = await open_session(store)
    ids: list[Any] = []
    for _ in range(3):
        async with instance(store, Asking().notes) as one:
            stream = await one.client(session_id).get_stream()
            ids.append((await stream.next())["id"])
    assert len(set(ids)) == 3
    assert all(isinstance(id_, int) and 0 < id_ < 2**53 for id_ in ids)


@pytest.mark.parametrize("echoed", [int, str])
async def test_the_answer_to_another_copys_question_answers_none_of_this_one(store: FaultyStore, echoed: type) -> None:
    session_id = await open_session(store)
    async with instance(store, Asking().notes) as gone:
        earlier = await (await gone.client(session_id).get_stream()).next()
    asking = Asking()
    async with instance(store, asking.notes) as one:
        client = one.client(session_id)
        question = await (await client.get_stream()).next()
        # The first id of every copy, had it not been shifted.
        for stale in (earlier["id"], 1):
            assert (await client.respond(echoed(stale), {"roots": [{"uri": "file:///wrong"}]})).status == 202
        assert (await client.respond(echoed(question["id"]), {"roots": [{"uri": "file:///right"}]})).status == 202
        await until(partial(asking.has_answers, 1))
    assert asking.answers == [["file:///right"]]


async def test_progress_of_a_restored_copys_question_arrives(store: FaultyStore) -> None:
    session_id = await open_session(store)
    asking = Asking()
    async with instance(store, asking.notes) as one:
        client = one.client(session_id)
        question = await (await client.get_stream()).next()
        token = question["params"]["_meta"]["progressToken"]
        assert token == question["id"]
        await client.notify("notifications/progress", {"progressToken": token, "progress": 0.5})
        await until(lambda: asking.progress == [0.5])


async def test_a_question_that_is_withdrawn_is_named_by_the_id_that_the_client_knows(store: FaultyStore) -> None:
    session_id = await open_session(store)
    asking = Asking()
    async with instance(store, asking.notes) as one:
        stream = await one.client(session_id).get_stream()
        question = await stream.next()
        asking.give_up.set()
        withdrawn = await stream.next()
        assert withdrawn["method"] == "notifications/cancelled"
        assert withdrawn["params"]["requestId"] == question["id"]
