"""Ids of the questions that servers ask clients, over several sessions, copies and instances."""

from __future__ import annotations

import random
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import mcp_types as types
import pytest

from mcp_session_store.adapter import question_ids
from mcp_session_store.adapter.question_ids import COUNTER_BITS, QuestionIds, number_of
from mcp_session_store.mailbox import MAX_NUMBER
from tests.support.asgi import until
from tests.support.instances import Notes, instance, open_session
from tests.support.internals import outbound_of, resident_of
from tests.support.measured import measuring

if TYPE_CHECKING:
    from collections.abc import Mapping

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
    ids: list[Any] = []
    async with instance(store, Asking().notes) as one:
        client = one.client()
        # The copy that opened the session, whose handler asks when the client's stream is open.
        await client.initialize()
        session_id = client.session_id
        stream = await client.get_stream()
        await client.notify("notifications/initialized")
        ids.append((await stream.next())["id"])
    for _ in range(2):
        async with instance(store, Asking().notes) as one:
            stream = await one.client(session_id).get_stream()
            ids.append((await stream.next())["id"])
    assert len({number_of(id_) for id_ in ids}) == 3
    assert all(isinstance(id_, int) and 2**COUNTER_BITS < id_ < 2**53 for id_ in ids)


async def test_all_sessions_of_an_instance_ask_under_one_number_and_by_one_counter(store: FaultyStore) -> None:
    session_ids = [await open_session(store) for _ in range(2)]
    async with instance(store, Asking().notes) as one:
        first, second = [(await (await one.client(id_).get_stream()).next())["id"] for id_ in session_ids]
    assert second == first + 1
    assert number_of(first) == number_of(second) is not None


@pytest.mark.parametrize("echoed", [int, str])
async def test_the_answer_to_another_copys_question_answers_no_question_of_this_one(
    store: FaultyStore, echoed: type
) -> None:
    session_id = await open_session(store)
    async with instance(store, Asking().notes) as gone:
        earlier = await (await gone.client(session_id).get_stream()).next()
    asking = Asking()
    measured = measuring()
    # With a relay the first would be passed on to the instance that asked.
    async with instance(store, asking.notes, relay=False) as one:
        client = one.client(session_id)
        question = await (await client.get_stream()).next()
        # The last is the id that the SDK itself gives to the first question of every copy.
        for stale in (earlier["id"], question["id"] + 1, 1):
            assert (await client.respond(echoed(stale), {"roots": [{"uri": "file:///wrong"}]})).status == 202
        assert (await client.respond(echoed(question["id"]), {"roots": [{"uri": "file:///right"}]})).status == 202
        await until(partial(asking.has_answers, 1))
        # An error without an id is the answer to nothing.
        lost = {"jsonrpc": "2.0", "id": None, "error": {"code": -32700, "message": "what was that?"}}
        assert (await client.post(lost)).status == 202
        assert (await client.respond(echoed(question["id"]), {"roots": []})).status == 202
        await measured.reach("mcp_session_store.messages.dropped", dropped("answer", 5))
    assert asking.answers == [["file:///right"]]


def dropped(kind: str, count: int) -> Mapping[tuple[tuple[str, Any], ...], float]:
    """The metric of messages that were dropped."""
    return {(("kind", kind), ("reason", "unknown question")): count}


@pytest.mark.parametrize("echoed", [int, str])
async def test_progress_of_a_question_arrives(store: FaultyStore, echoed: type) -> None:
    session_id = await open_session(store)
    asking = Asking()
    measured = measuring()
    async with instance(store, asking.notes) as one:
        client = one.client(session_id)
        question = await (await client.get_stream()).next()
        token = question["params"]["_meta"]["progressToken"]
        assert token == question["id"]
        # Progress of another copy's question, and the token that the SDK itself gives to the first of every copy.
        for stale in (token + 1, 1):
            await client.notify("notifications/progress", {"progressToken": echoed(stale), "progress": 0.1})
        await client.notify("notifications/progress", {"progressToken": echoed(token), "progress": 0.5})
        await until(lambda: asking.progress == [0.5])
        await measured.reach("mcp_session_store.messages.dropped", dropped("progress", 2))
        assert len(asking.notes.genuine("notifications/progress")) == 1
        # A token that cannot be an id was chosen by the application, and goes to it as it is.
        for odd in ("of the application", None, True, ["list"]):
            await client.notify("notifications/progress", {"progressToken": odd, "progress": 0.7})
        await until(lambda: len(asking.notes.genuine("notifications/progress")) == 5)
        assert asking.progress == [0.5]


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
        assert resident_of(one.manager, session_id).loop.asked == {}


class Supplying:
    """A server with a tool that asks under an id and a progress token of its own."""

    def __init__(self, request_id: int | str) -> None:
        self.notes = Notes()
        self.notes.tools = {"ask": self._ask, "withdraw": self._withdraw}
        self._request_id = request_id
        self.give_up = anyio.CancelScope()

    def has_progress(self, count: int) -> bool:
        return len(self.notes.genuine("notifications/progress")) == count

    async def _ask(self, ctx: RequestContext) -> str:
        params = {"_meta": {"progressToken": "mine"}}
        with self.give_up:
            answer = await outbound_of(ctx).send_raw_request(
                "roots/list", params, {"request_id": self._request_id, "cancel_on_abandon": False}
            )
            return str(answer["roots"])
        return "given up"

    async def _withdraw(self, ctx: RequestContext) -> str:
        # A withdrawal of a question that was never asked must not reach a client.
        for name in (self._request_id, "another", None):
            await outbound_of(ctx).notify("notifications/cancelled", {"requestId": name})
        await outbound_of(ctx).notify("notifications/cancelled", None)
        return "withdrawn"


@pytest.mark.parametrize("request_id", [7, "7", "of the application"])
async def test_ids_and_tokens_of_the_application_come_back_as_it_gave_them(
    store: FaultyStore, request_id: int | str
) -> None:
    supplying = Supplying(request_id)
    async with instance(store, supplying.notes) as one:
        client = one.client()
        session_id = await client.handshake()
        stream = await client.get_stream()
        for count in (1, 2):
            call = client.open_call("ask")
            question = await stream.next()
            assert number_of(question["id"]) is not None
            assert question["params"]["_meta"]["progressToken"] == question["id"]
            assert list(resident_of(one.manager, session_id).loop.asked) == [question["id"]]
            await client.notify("notifications/progress", {"progressToken": question["id"], "progress": 1})
            await until(partial(supplying.has_progress, count))
            if count == 1:
                # It is asked once more under the same id, and the answer to the first time comes after that.
                supplying.give_up.cancel()
                assert (await call.answer()).text == "given up"
                supplying.give_up = anyio.CancelScope()
                late = question["id"]
        await client.respond(late, {"roots": ["late"]})
        await client.respond(question["id"], {"roots": ["right"]})
        assert (await call.answer()).text == "['right']"
        progress = supplying.notes.genuine("notifications/progress")
        assert [seen.params["progressToken"] for seen in progress if seen.params] == ["mine", "mine"]
        assert (await client.call("withdraw")).text == "withdrawn"
        assert len(stream.messages) == 2


async def test_a_question_that_is_asked_outside_of_calls_is_remembered_when_calls_are_over(store: FaultyStore) -> None:
    notes = Notes()
    answers: list[Any] = []

    async def begin(ctx: RequestContext) -> str:
        outbound = outbound_of(ctx)

        async def ask() -> None:
            answers.append(await outbound.send_raw_request("roots/list", None))

        tasks.start_soon(ask)
        return "begun"

    notes.tools["begin"] = begin
    async with instance(store, notes) as one, anyio.create_task_group() as tasks:
        client = one.client()
        session_id = await client.handshake()
        stream = await client.get_stream()
        assert (await client.call("begin")).text == "begun"
        question = await stream.next()
        assert (await client.call("add", {"a": 1, "b": 2})).text == "3"
        await one.at_rest()
        session = resident_of(one.manager, session_id)
        running = client.open_call("wait")
        await until(lambda: notes.waiting == 1)
        # A call that computes does not wait for the answer to what was asked before it.
        assert session.loop.asked
        assert not session.waits_for_client
        notes.proceed.set()
        await running.end()
        await client.respond(question["id"], {"roots": []})
        await until(lambda: answers == [{"roots": []}])


async def test_a_copy_forgets_the_oldest_of_many_questions(store: FaultyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mcp_session_store.adapter.sessions.server_loop.MAX_QUESTIONS", 3)
    notes = Notes()

    async def ask(ctx: RequestContext) -> str:
        before = len(stream.messages)
        send = partial(outbound_of(ctx).send_raw_request, "roots/list", None, {"cancel_on_abandon": False})
        async with anyio.create_task_group() as group:
            group.start_soon(send)
            await until(lambda: len(stream.messages) > before)
            group.cancel_scope.cancel()
        return "asked"

    notes.tools["ask"] = ask
    async with instance(store, notes) as one:
        client = one.client()
        session_id = await client.handshake()
        stream = await client.get_stream()
        for _ in range(5):
            await client.call("ask")
        await until(lambda: len(stream.messages) == 5)
        assert list(resident_of(one.manager, session_id).loop.asked) == [
            message["id"] for message in stream.messages[2:]
        ]


async def test_a_call_is_known_to_run_by_its_id_or_the_text_of_it(store: FaultyStore) -> None:
    notes = Notes()
    async with instance(store, notes) as one:
        client = one.client()
        session = resident_of(one.manager, await client.handshake())
        calls = [client.open_call("wait", request_id=request_id) for request_id in (7, "8", "nine")]
        await until(lambda: notes.waiting == 3)
        assert all(session.runs(request_id) for request_id in (7, "7", 8, "8", "nine"))
        assert not any(session.runs(request_id) for request_id in (9, "9", "seven", ""))
        notes.proceed.set()
        for call in calls:
            await call.end()
        await one.at_rest()
        assert not session.runs(7)


@pytest.mark.parametrize(
    ("request_id", "number"),
    [
        (5 << 29 | 1, 5),
        (str(5 << 29), 5),
        ((MAX_NUMBER << 29) + 2**29 - 1, MAX_NUMBER),
        # Those of fresh copies of the version before, and of no instance.
        (1, None),
        (2**29 - 1, None),
        (2**53, None),
        (-(5 << 29), None),
        (True, None),
        (float(5 << 29), None),
        ("", None),
        ("nine", None),
        ("9" * 5000, None),
        (None, None),
        ({}, None),
    ],
)
def test_an_id_names_an_instance_only_where_an_instance_can_have_made_it(
    request_id: object, number: int | None
) -> None:
    assert number_of(request_id) == number


def test_a_number_that_is_used_up_is_followed_by_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(question_ids, "MAX_COUNTER", 2)
    drawn: list[int] = []
    ids = QuestionIds()
    ids.on_drawn = lambda: drawn.append(ids.number)
    first = ids.number
    numbers = [number_of(ids.new()) for _ in range(3)]
    assert numbers == [first, first, ids.number]
    assert drawn == [ids.number] != [first]


def test_processes_that_seed_their_random_numbers_alike_draw_numbers_of_their_own() -> None:
    drawn = set()
    for _ in range(3):
        random.seed(1)
        drawn.add(QuestionIds().number)
    assert len(drawn) > 1


def test_a_number_is_drawn_again_only_where_it_was_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = iter([3, 3, 4, 4, 3, 5])
    monkeypatch.setattr("secrets.randbelow", lambda _: next(draws) - 1)
    ids = QuestionIds()
    assert ids.number == 3
    ids.draw()
    assert ids.number == 4
    ids.new()
    ids.draw()
    assert ids.number == 3
    ids.draw()
    assert ids.number == 5
