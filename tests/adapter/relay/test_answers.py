"""Answers of clients: they reach the copy that asked, whichever instance they are posted to."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import anyio
import mcp_types as types
import pytest
from mcp.shared.message import ServerMessageMetadata

from mcp_session_store import session_key
from mcp_session_store.adapter.question_ids import number_of
from mcp_session_store.adapter.relay import inbox as inbox_module
from tests.support.asgi import seen_by_a_client, until
from tests.support.asking import Asking, asked, roots, text_of
from tests.support.instances import instance, principal
from tests.support.internals import (
    instances_of,
    outbox_is_empty,
    question_ids_of,
    registry_of,
    report_activity,
    unreported_in,
)
from tests.support.measured import measuring

if TYPE_CHECKING:
    from tests.support.faulty_stores import FaultyMailbox, FaultyStore

pytestmark = pytest.mark.anyio

ALICE = principal("app", subject="alice")


async def test_an_answer_reaches_the_copy_that_asked_from_an_instance_that_has_never_seen_the_session(
    store: FaultyStore, mailbox: FaultyMailbox, other_mailbox: FaultyMailbox
) -> None:
    async with (
        instance(store, Asking(), relay=mailbox) as one,
        instance(store, relay=other_mailbox) as other,
    ):
        client = one.client()
        session_id = await client.begin()
        call = client.open_call("ask")
        question = await call.next()
        await report_activity(one.manager)
        store.calls.clear()
        accepted = await other.client(session_id).respond(question["id"], roots("x"))
        # As the copy itself answers it, and after one query for whose session it is.
        assert accepted.status == 202
        assert store.calls == ["load"]
        assert [message.kind for message in other_mailbox.posted] == ["answer"]
        assert text_of(await call.next()) == "file:///x"
        assert other.residents == 0
        local = await client.respond(question["id"], roots("late"))
        assert seen_by_a_client(local) == seen_by_a_client(accepted)
        # It is an activity of the session.
        assert session_key(session_id) in unreported_in(other.manager)


async def test_an_error_and_an_answer_whose_id_came_back_as_a_text_reach_the_copy_that_asked(
    store: FaultyStore, mailbox: FaultyMailbox
) -> None:
    async with instance(store, Asking(), relay=mailbox) as one, instance(store, relay=mailbox) as other:
        client = one.client()
        elsewhere = other.client(await client.begin())
        call = client.open_call("ask")
        question = await call.next()
        error = {"jsonrpc": "2.0", "id": question["id"], "error": {"code": -1, "message": "no roots here"}}
        assert (await elsewhere.post(error)).status == 202
        assert "no roots here" in json.dumps(await call.next())
        call = client.open_call("ask")
        question = await call.next()
        assert (await elsewhere.respond(str(question["id"]), roots("text"))).status == 202
        assert text_of(await call.next()) == "file:///text"


@pytest.mark.parametrize(
    ("question", "answered", "answer"),
    [
        (
            types.ElicitRequest(
                params=types.ElicitRequestFormParams(message="?", requested_schema={"type": "object", "properties": {}})
            ),
            types.ElicitResult,
            {"action": "accept", "content": {}},
        ),
        (
            types.CreateMessageRequest(params=types.CreateMessageRequestParams(messages=[], max_tokens=9)),
            types.CreateMessageResult,
            {"role": "assistant", "content": {"type": "text", "text": "x"}, "model": "m"},
        ),
        (types.PingRequest(), types.EmptyResult, {}),
    ],
    ids=["elicitation", "sampling", "ping"],
)
async def test_the_answer_to_each_question_arrives_and_counts_once(
    store: FaultyStore, mailbox: FaultyMailbox, question: Any, answered: Any, answer: dict[str, Any]
) -> None:
    asking = Asking()

    async def ask(ctx: Any) -> str:
        metadata = ServerMessageMetadata(related_request_id=ctx.request_id)
        return type(await ctx.session.send_request(question, answered, metadata=metadata)).__name__

    asking.tools["ask"] = ask
    measured = measuring()
    async with (
        instance(store, asking, relay=mailbox) as one,
        instance(store, relay=mailbox) as other,
        instance(store, relay=mailbox) as third,
    ):
        client = one.client()
        session_id = await client.begin()
        call = client.open_call("ask")
        asked = await call.next()
        assert asked["method"] == question.method
        for each in (other, other, third, one):
            assert (await each.client(session_id).respond(asked["id"], answer)).status == 202
        assert text_of(await call.next()) == answered.__name__
        unknown = {(("kind", "answer"), ("reason", "unknown question")): 3}
        await measured.reach("mcp_session_store.messages.dropped", unknown)


async def test_an_answer_that_comes_in_many_pieces_with_its_id_last_restores_nothing(
    store: FaultyStore, mailbox: FaultyMailbox
) -> None:
    async with instance(store, Asking(), relay=mailbox) as one, instance(store, relay=mailbox) as other:
        elsewhere, call, question = await asked(one, other)
        # More than is read before it is known whose session it is.
        body = json.dumps({"jsonrpc": "2.0", "result": roots("x" * 100_000), "id": question["id"]}).encode()
        first, rest = body[:70_000], body[70_000:]
        accepted = await elsewhere.open_parts(first, *(rest[place : place + 1] for place in range(len(rest)))).answer()
        assert accepted.status == 202
        assert text_of(await call.next()) == f"file:///{'x' * 100_000}"
        assert other.residents == 0


async def test_a_body_that_ends_early_or_is_too_long_is_no_answer(store: FaultyStore, mailbox: FaultyMailbox) -> None:
    async with (
        instance(store, Asking(), relay=mailbox) as one,
        instance(store, relay=mailbox, max_request_body_size=100_000) as other,
    ):
        elsewhere, _, question = await asked(one, other)
        body = json.dumps({"jsonrpc": "2.0", "result": roots("x" * 120_000), "id": question["id"]}).encode()
        too_long = await elsewhere.open_parts(body[:70_000], body[70_000:110_000], body[110_000:]).answer()
        assert too_long.status == 413
        unfinished = elsewhere.open_parts(body[:70_000], whole=False)
        await anyio.wait_all_tasks_blocked()
        unfinished.disconnect()
        await unfinished.over.wait()
        assert mailbox.posted == []
        assert other.residents == 0


@pytest.mark.parametrize("body", [b'[{"jsonrpc":"2.0","id":1,"result":{}}]', b'{"id":1,"result":{}}', b'{"result"'])
async def test_a_body_that_is_no_message_is_refused_as_by_the_copy_itself(
    store: FaultyStore, mailbox: FaultyMailbox, body: bytes
) -> None:
    async with instance(store, relay=mailbox) as one, instance(store, relay=mailbox) as other:
        client = one.client()
        session_id = await client.begin()
        here = await client.post(body)
        elsewhere = await other.client(session_id).post(body)
        assert here.status == elsewhere.status == 400
        assert seen_by_a_client(here) == seen_by_a_client(elsewhere)
        assert mailbox.posted == []


async def test_an_answer_is_taken_only_from_the_principal_of_the_session_resident_or_not(
    store: FaultyStore, mailbox: FaultyMailbox
) -> None:
    async with (
        instance(store, Asking(), relay=mailbox) as one,
        instance(store, Asking(), relay=mailbox) as other,
        instance(store, relay=mailbox) as third,
    ):
        client = one.client(user=ALICE)
        session_id = await client.begin()
        assert (await other.client(session_id, user=ALICE).ping()).status == 200
        call = client.open_call("ask")
        question = await call.next()
        for instance_, user in ((other, None), (third, None), (third, principal("app", subject="bob"))):
            wrong = await instance_.client(session_id, user=user).respond(question["id"], roots("stolen"))
            unknown = await instance_.client("0" * 32, user=user).respond(question["id"], roots("stolen"))
            assert wrong.status == 404
            assert seen_by_a_client(wrong) == seen_by_a_client(unknown)
        assert mailbox.posted == []
        assert (await other.client(session_id, user=ALICE).respond(question["id"], roots("own"))).status == 202
        assert text_of(await call.next()) == "file:///own"


@pytest.mark.parametrize(
    ("header", "status"),
    [({"host": "evil.example"}, 421), ({"accept": "text/plain"}, 406), ({"content_type": "text/plain"}, 400)],
    ids=["host", "accept", "content type"],
)
@pytest.mark.parametrize("resident", [True, False])
async def test_an_answer_passes_the_checks_of_the_transport_first(
    store: FaultyStore, mailbox: FaultyMailbox, header: dict[str, str], status: int, resident: bool
) -> None:
    async with instance(store, Asking(), relay=mailbox) as one, instance(store, relay=mailbox) as other:
        client = one.client()
        elsewhere = other.client(await client.begin())
        if resident:
            assert (await elsewhere.ping()).status == 200
        call = client.open_call("ask")
        answer = {"jsonrpc": "2.0", "id": (await call.next())["id"], "result": roots("x")}
        assert (await elsewhere.post(answer, **header)).status == status
        assert mailbox.posted == []


async def test_ids_that_name_no_running_instance_are_accepted_and_dropped(
    store: FaultyStore, mailbox: FaultyMailbox, other_mailbox: FaultyMailbox
) -> None:
    async with instance(store, Asking(), relay=mailbox) as gone:
        client = gone.client()
        session_id = await client.begin()
        question = (await client.open_call("ask").next())["id"]
    async with (
        instance(store, Asking(), relay=mailbox) as one,
        instance(store, Asking(), relay=other_mailbox) as other,
    ):
        elsewhere = other.client(session_id)
        for made_up in (question, 1, 2**29 + 1, 2**52 + 7, 2**60, -5, "no-number", "7"):
            assert (await elsewhere.respond(made_up, roots("x"))).status == 202
        await until(lambda: outbox_is_empty(other.manager))
        assert other.residents == 0
        assert await mailbox.inner.instances() != []
        assert [running.waiting for running in await mailbox.inner.instances()] == [0, 0]
        # Nor is it taken for the answer to another question of the session.
        client = one.client(session_id)
        call = client.open_call("ask")
        asked = (await call.next())["id"]
        assert (await elsewhere.respond(asked + 1, roots("next"))).status == 202
        assert (await elsewhere.respond(asked, roots("right"))).status == 202
        assert text_of(await call.next()) == "file:///right"


async def test_an_answer_for_this_instance_waits_for_nothing_and_restores_nothing(
    store: FaultyStore, mailbox: FaultyMailbox
) -> None:
    async with instance(store, Asking(), relay=mailbox) as one:
        client = one.client()
        await client.begin()
        call = client.open_call("ask")
        question = await call.next()
        store.down()
        mailbox.down()
        assert (await client.respond(question["id"], roots("x"))).status == 202
        assert text_of(await call.next()) == "file:///x"
        store.up()
        mailbox.up()
        session = next(iter(registry_of(one.manager)))
        await registry_of(one.manager).evict(session)
        assert (await client.respond(question["id"], roots("late"))).status == 202
        assert one.residents == 0
        assert mailbox.posted == []


async def test_an_answer_of_another_session_of_the_same_client_answers_nothing(
    store: FaultyStore, mailbox: FaultyMailbox
) -> None:
    async with instance(store, Asking(), relay=mailbox) as one, instance(store, relay=mailbox) as other:
        client, stranger = one.client(), one.client()
        session_id, of_another = await client.begin(), await stranger.begin()
        call = client.open_call("ask")
        question = await call.next()
        assert (await other.client(of_another).respond(question["id"], roots("wrong"))).status == 202
        assert (await other.client(session_id).respond(question["id"], roots("right"))).status == 202
        assert text_of(await call.next()) == "file:///right"


async def test_a_question_of_a_call_with_a_json_response_is_answered_elsewhere(
    store: FaultyStore, mailbox: FaultyMailbox
) -> None:
    asking = Asking()
    answered: list[Any] = []

    async def ask(ctx: Any) -> None:
        answered.append(await ctx.session.send_request(types.ListRootsRequest(), types.ListRootsResult))

    asking.on_initialized = ask
    async with (
        instance(store, asking, relay=mailbox, json_response=True) as one,
        instance(store, relay=mailbox, json_response=True) as other,
    ):
        client = one.client()
        assert (await client.initialize()).status == 200
        stream = await client.get_stream()
        assert (await client.notify("notifications/initialized")).status == 202
        question = await stream.next()
        elsewhere = other.client(client.session_id)
        answer = {"jsonrpc": "2.0", "id": question["id"], "result": roots("x")}
        assert (await elsewhere.post(answer, accept="application/json")).status == 202
        await until(lambda: len(answered) == 1)


async def test_an_answer_under_a_number_that_another_instance_has_now_reaches_the_copy_that_asked(
    store: FaultyStore, mailbox: FaultyMailbox, other_mailbox: FaultyMailbox
) -> None:
    async with (
        instance(store, Asking(), relay=mailbox) as one,
        instance(store, Asking(), relay=other_mailbox) as other,
    ):
        client = one.client()
        session_id = await client.begin()
        call = client.open_call("ask")
        before = await call.next()
        number = question_ids_of(one.manager).number
        question_ids_of(one.manager).draw()
        await until(lambda: instances_of(one.manager).is_entered)
        others_ids = question_ids_of(other.manager)
        others_ids.number = number
        # As if it had drawn it, so that it listens for messages to it.
        assert others_ids.on_drawn is not None
        others_ids.on_drawn()
        await until(lambda: instances_of(other.manager).is_entered)
        elsewhere = other.client(session_id)
        other_call = elsewhere.open_call("ask_for_progress")
        question = await other_call.next()
        assert number_of(question["id"]) == number
        # Both by way of the instance that has had the number before.
        assert (await client.respond(before["id"], roots("here"))).status == 202
        assert text_of(await call.next()) == "file:///here"
        # Its counter has gone on, so that the ids differ.
        assert (await client.respond(question["id"], roots("there"))).status == 202
        assert text_of(await other_call.next()) == "file:///there"


async def test_what_was_posted_under_a_former_number_is_read_before_the_next_one_is_entered(
    store: FaultyStore, mailbox: FaultyMailbox, other_mailbox: FaultyMailbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox_module, "IDLE_INTERVAL", 100.0)
    async with (
        instance(store, Asking(), relay=mailbox) as one,
        instance(store, relay=other_mailbox) as other,
    ):
        client = one.client()
        session_id = await client.begin()
        call = client.open_call("ask")
        question = await call.next()
        mailbox.down("receive")
        assert (await other.client(session_id).respond(question["id"], roots("x"))).status == 202
        await until(lambda: outbox_is_empty(other.manager))
        question_ids_of(one.manager).draw()
        await anyio.sleep(0.1)
        mailbox.up()
        assert text_of(await call.next()) == "file:///x"
        await until(lambda: instances_of(one.manager).is_entered)
