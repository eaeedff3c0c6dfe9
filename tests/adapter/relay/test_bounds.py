"""What clients send too much of, too large or without an end, holds up no other session and fills no memory."""

from __future__ import annotations

import itertools
import json
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import anyio
import pytest

from mcp_session_store import StoreUnavailable
from mcp_session_store.adapter.relay import delivery as delivery_module
from mcp_session_store.adapter.relay import inbox as inbox_module
from mcp_session_store.adapter.relay import outbox as outbox_module
from mcp_session_store.mailbox import Message, MessageKind, MessagePage
from tests.support.asgi import until
from tests.support.asking import Asking, roots, text_of
from tests.support.instances import instance
from tests.support.internals import instances_of, outbox_is_empty, outbox_size, relay_of
from tests.support.measured import measuring

if TYPE_CHECKING:
    from tests.support.faulty_stores import FaultyMailbox, FaultyStore

pytestmark = pytest.mark.anyio


async def test_what_is_refused_in_an_outage_is_not_kept(
    store: FaultyStore, mailbox: FaultyMailbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox_module, "MAX_ACCEPTED", 3)
    async with (
        instance(store, Asking(), relay=mailbox) as one,
        instance(store, relay=mailbox, outage_patience=0.3) as other,
    ):
        client, stranger = one.client(), one.client()
        elsewhere, not_resident = other.client(await client.begin()), other.client(await stranger.begin())
        assert (await elsewhere.ping()).status == 200
        question = await client.open_call("ask").next()
        mailbox.down()
        statuses = [(await elsewhere.respond(question["id"] + place, roots("x"))).status for place in range(9)]
        statuses.append((await not_resident.respond(question["id"], roots("x"))).status)
        assert statuses == 3 * [202] + 7 * [503]
        assert outbox_size(other.manager) == 3
        mailbox.up()
        await until(lambda: outbox_is_empty(other.manager))
        assert [json.loads(message.body)["id"] - question["id"] for message in mailbox.posted] == [0, 1, 2]


async def test_messages_that_come_soon_after_one_another_share_a_post_and_a_read(
    store: FaultyStore, mailbox: FaultyMailbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    # At a high rate each post, with its hints, and each read would cost the database a statement for a message or two.
    monkeypatch.setattr(outbox_module, "POST_INTERVAL", 0.5)
    monkeypatch.setattr(inbox_module, "READ_INTERVAL", 0.5)
    posts, reads = 0, 0
    post, receive = mailbox.inner.post, mailbox.inner.receive

    async def counted_post(messages: Any) -> set[int]:
        nonlocal posts
        posts += 1
        return await post(messages)

    async def counted_receive(*args: Any, **options: Any) -> MessagePage:
        nonlocal reads
        reads += 1
        return await receive(*args, **options)

    async with (
        instance(store, Asking(), relay=mailbox) as one,
        instance(store, Asking(), relay=mailbox) as other,
    ):
        asked = [one.client() for _ in range(10)]
        elsewhere = [other.client(await client.begin()) for client in asked]
        calls = [client.open_call("ask") for client in asked]
        questions = [await call.next() for call in calls]
        monkeypatch.setattr(mailbox.inner, "post", counted_post)
        monkeypatch.setattr(mailbox.inner, "receive", counted_receive)
        answers = [
            client.open("POST", {"jsonrpc": "2.0", "id": question["id"], "result": roots("x")})
            for client, question in zip(elsewhere, questions, strict=True)
        ]
        for number, (call, answer) in enumerate(zip(calls, answers, strict=True)):
            assert (await answer.answer()).status == 202, number
            assert text_of(await call.next()) == "file:///x"
    assert posts <= 2
    # Each instance also reads before its heartbeats, and as it stops.
    assert reads <= 6


@pytest.mark.parametrize("resident", [True, False])
async def test_a_large_message_that_the_mailbox_does_not_take_in_time_holds_up_the_others_for_a_while_only(
    store: FaultyStore, mailbox: FaultyMailbox, monkeypatch: pytest.MonkeyPatch, resident: bool
) -> None:
    measured = measuring()
    inner = mailbox.inner.post

    async def slow(messages: Any) -> set[int]:
        if any(len(message.body) > outbox_module.LARGE for message in messages):
            raise StoreUnavailable("the database did not answer within 5 s")
        return await inner(messages)

    async with (
        instance(store, Asking(), relay=mailbox) as one,
        instance(store, Asking(), relay=mailbox, instance_timeout=1, outage_patience=20) as other,
    ):
        slow_client, client = one.client(), one.client()
        slow_elsewhere, elsewhere = other.client(await slow_client.begin()), other.client(await client.begin())
        for each in (slow_elsewhere, elsewhere) if resident else ():
            assert (await each.ping()).status == 200
        large = await slow_client.open_call("ask").next()
        call = client.open_call("ask")
        question = await call.next()
        monkeypatch.setattr(mailbox.inner, "post", slow)
        result = {"jsonrpc": "2.0", "id": large["id"], "result": roots("x" * outbox_module.LARGE)}
        too_large = slow_elsewhere.open("POST", result)
        await until(lambda: not outbox_is_empty(other.manager))
        # It goes on as in an outage meanwhile.
        assert (await elsewhere.respond(question["id"], roots("x"))).status == 202
        assert text_of(await call.next()) == "file:///x"
        assert (await too_large.answer()).status == (202 if resident else 503)
        dropped = measured.values("mcp_session_store.messages.dropped")
        assert dropped == {(("kind", "answer"), ("reason", "not stored")): 1}


async def test_an_outage_gives_up_no_large_message(store: FaultyStore, mailbox: FaultyMailbox) -> None:
    async with (
        instance(store, Asking(), relay=mailbox) as one,
        instance(store, Asking(), relay=mailbox, instance_timeout=1) as other,
    ):
        client = one.client()
        elsewhere = other.client(await client.begin())
        assert (await elsewhere.ping()).status == 200
        call = client.open_call("ask")
        question = await call.next()
        mailbox.down()
        assert (await elsewhere.respond(question["id"], roots("x" * outbox_module.LARGE))).status == 202
        await anyio.sleep(2.5)
        mailbox.up()
        assert len(text_of(await call.next())) > outbox_module.LARGE


async def test_messages_that_copies_do_not_read_take_bounded_memory_and_keep_out_no_small_one(
    store: FaultyStore, mailbox: FaultyMailbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = 2 * delivery_module.SMALL
    monkeypatch.setattr(delivery_module, "MAX_BYTES", 3 * large)
    asking = Asking()
    parked: list[Any] = []

    async def park(ctx: Any) -> None:
        parked.append(ctx)
        await anyio.sleep_forever()

    async with instance(store, asking, relay=mailbox) as one, instance(store, relay=mailbox) as other:
        blocked = [one.client() for _ in range(5)]
        ids = [await each.begin() for each in blocked]
        client = one.client()
        session_id = await client.begin()
        call = client.open_call("ask")
        question = await call.next()
        asking.on_initialize = park
        for each in blocked:
            each.open_initialize()
        await until(lambda: len(parked) == 5)
        for blocked_id in ids:
            params = {"_meta": {"text": "x" * (large - 150)}}
            notified = await other.client(blocked_id).notify("notifications/roots/list_changed", params)
            assert notified.status == 202
        await until(lambda: relay_of(one.manager).waiting == 3)
        assert (await other.client(session_id).respond(question["id"], roots("x"))).status == 202
        assert text_of(await call.next()) == "file:///x"


async def test_a_mailbox_that_is_never_empty_delays_heartbeats_for_a_bounded_time(
    store: FaultyStore, mailbox: FaultyMailbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox_module, "BEFORE_BEAT", 0.2)
    monkeypatch.setattr(inbox_module, "GATHERED", 10)
    sequences = itertools.count()

    async def endless(*_: Any, **__: Any) -> MessagePage:
        await anyio.sleep(0.01)
        message = Message(
            sender=1,
            sequence=next(sequences),
            key=uuid4(),
            kind=MessageKind.ANSWER,
            body="x" * 10,
            age=timedelta(0),
        )
        return MessagePage(messages=[message], more=True)

    async with instance(store, relay=mailbox) as one:
        monkeypatch.setattr(mailbox.inner, "receive", endless)
        # So that the background task reads all the time as well.
        relay_of(one.manager).inbox.wake.set()
        await anyio.sleep(0.05)
        for _ in range(2):
            with anyio.fail_after(5):
                await instances_of(one.manager).beat()
        with anyio.move_on_after(0.1) as scope:
            await relay_of(one.manager).inbox.read()
        assert scope.cancelled_caught
