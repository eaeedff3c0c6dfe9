"""The store is away, or loses an answer, while messages are on their way to other instances."""

from __future__ import annotations

import json
from datetime import timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from mcp_session_store import InvalidValue, StoreUnavailable
from mcp_session_store.adapter import instances as instances_module
from mcp_session_store.adapter import stopping
from mcp_session_store.adapter.relay import delivery as delivery_module
from mcp_session_store.adapter.relay import inbox as inbox_module
from mcp_session_store.adapter.relay import outbox as outbox_module
from mcp_session_store.adapter.relay.outgoing import LEAST_BYTES
from tests.support.asgi import until
from tests.support.asking import Asking, asked, roots, text_of
from tests.support.instances import instance
from tests.support.internals import instances_of, outbox_is_empty, registry_of, relay_of, shut_down

if TYPE_CHECKING:
    from tests.support.faulty_stores import FaultyMailbox, FaultyStore

pytestmark = pytest.mark.anyio


def progress_of(question: dict[str, Any], amount: int) -> dict[str, Any]:
    params = {"progressToken": question["id"], "progress": amount}
    return {"jsonrpc": "2.0", "method": "notifications/progress", "params": params}


async def test_an_answer_is_accepted_when_it_is_committed_and_not_before(
    store: FaultyStore, mailbox: FaultyMailbox, other_mailbox: FaultyMailbox
) -> None:
    async with (
        instance(store, Asking(), relay=mailbox) as one,
        instance(store, Asking(), relay=other_mailbox) as other,
    ):
        client = one.client()
        elsewhere = other.client(await client.begin())
        for is_resident in (False, True):
            call = client.open_call("ask")
            question = await call.next()
            held = other_mailbox.hold("post")
            answer = elsewhere.open("POST", {"jsonrpc": "2.0", "id": question["id"], "result": roots("x")})
            await held.entered.wait()
            await anyio.wait_all_tasks_blocked()
            assert not answer.started.is_set()
            held.release()
            other_mailbox.up()
            assert (await answer.answer()).status == 202
            await call.next()
            assert other.residents == is_resident
            assert (await elsewhere.ping()).status == 200


async def test_what_comes_for_a_resident_session_in_an_outage_is_accepted_and_posted_in_order_when_it_is_over(
    store: FaultyStore, mailbox: FaultyMailbox, other_store: FaultyStore, other_mailbox: FaultyMailbox
) -> None:
    asking = Asking()
    async with (
        instance(store, asking, relay=mailbox) as one,
        instance(other_store, Asking(), relay=other_mailbox) as other,
    ):
        elsewhere, call, question = await asked(one, other, "ask_for_progress", resident=True)
        other_store.down()
        other_mailbox.down()
        for amount in range(1, 6):
            assert (await elsewhere.post(progress_of(question, amount))).status == 202
        assert (await elsewhere.respond(question["id"], roots("x"))).status == 202
        assert mailbox.posted == other_mailbox.posted == []
        other_mailbox.up()
        other_store.up()
        assert text_of(await call.next()) == "file:///x"
        assert asking.heard == ["1", "2", "3", "4", "5", "file:///x"]
        sequences = [message.sequence for message in other_mailbox.posted]
        assert sequences == sorted(sequences)


async def test_what_comes_for_a_session_that_is_not_resident_waits_in_an_outage_and_is_then_refused(
    store: FaultyStore, mailbox: FaultyMailbox, other_store: FaultyStore, other_mailbox: FaultyMailbox
) -> None:
    async with (
        instance(store, Asking(), relay=mailbox) as one,
        instance(other_store, relay=other_mailbox, outage_patience=2) as other,
    ):
        elsewhere, call, question = await asked(one, other)
        # The mailbox alone, and then the store as well, which is asked first.
        for down in (other_mailbox, other_store):
            down.down()
            refused = await elsewhere.respond(question["id"], roots("refused"))
            assert refused.status == 503
            assert refused.headers["retry-after"]
        other_mailbox.up()
        other_store.up()
        await until(lambda: outbox_is_empty(other.manager))
        assert other_mailbox.posted == []
        other_mailbox.down()
        waiting = elsewhere.open("POST", {"jsonrpc": "2.0", "id": question["id"], "result": roots("in time")})
        await anyio.sleep(0.05)
        other_mailbox.up()
        assert (await waiting.answer()).status == 202
        assert text_of(await call.next()) == "file:///in%20time"


@pytest.mark.parametrize("bound", ["messages", "bytes"])
async def test_beyond_a_bound_answers_are_refused_in_an_outage(
    store: FaultyStore, mailbox: FaultyMailbox, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    async with instance(store, Asking(), relay=mailbox) as one, instance(store, relay=mailbox) as other:
        elsewhere, _, question = await asked(one, other, resident=True)
        if bound == "messages":
            monkeypatch.setattr(outbox_module, "MAX_ACCEPTED", 3)
        else:
            monkeypatch.setattr(outbox_module, "MAX_ACCEPTED_BYTES", 3 * len(json.dumps(progress_of(question, 1))))
        mailbox.down()
        statuses = [(await elsewhere.post(progress_of(question, amount))).status for amount in range(1, 6)]
        assert statuses == [202, 202, 202, 503, 503]
        mailbox.up()
        await until(lambda: outbox_is_empty(other.manager))
        assert [json.loads(message.body)["params"]["progress"] for message in mailbox.posted] == [1, 2, 3]
        assert (await elsewhere.post(progress_of(question, 6))).status == 202


async def test_what_is_accepted_in_an_outage_that_silences_all_reaches_an_instance_that_comes_back_later(
    store: FaultyStore,
    mailbox: FaultyMailbox,
    other_store: FaultyStore,
    other_mailbox: FaultyMailbox,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(instances_module, "LONG_SILENCE", 1.0)
    monkeypatch.setattr(instances_module, "BACK_WITHIN", 3.0)
    # The one that comes back later is there long before that is over.
    monkeypatch.setattr(instances_module, "MAX_PAUSE", 0.2)
    async with (
        instance(store, Asking(), relay=mailbox, instance_timeout=1) as one,
        instance(other_store, Asking(), relay=other_mailbox, instance_timeout=1) as other,
    ):
        elsewhere, call, question = await asked(one, other, resident=True)
        mailbox.down()
        other_mailbox.down()
        assert (await elsewhere.respond(question["id"], roots("x"))).status == 202
        await anyio.sleep(1)
        store.inner.data.ahead += timedelta(minutes=6)
        # The one that has the message finds the store again before the one that it is for.
        other_mailbox.up()
        await anyio.sleep(1.5)
        mailbox.up()
        assert text_of(await call.next()) == "file:///x"


async def test_one_session_takes_no_more_than_its_share_of_the_room_in_an_outage(
    store: FaultyStore, mailbox: FaultyMailbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox_module, "MAX_ACCEPTED", 10)
    monkeypatch.setattr(outbox_module, "MAX_ACCEPTED_OF_SESSION", 3 * LEAST_BYTES)
    async with instance(store, Asking(), relay=mailbox) as one, instance(store, relay=mailbox) as other:
        first, second = one.client(), one.client()
        elsewhere = [other.client(await client.begin()) for client in (first, second)]
        for client in elsewhere:
            assert (await client.ping()).status == 200
        question = await first.open_call("ask").next()
        call = second.open_call("ask")
        asked = await call.next()
        mailbox.down()
        for statuses in ([202, 202, 202, 503], [202]):
            progress = [(await elsewhere[0].post(progress_of(question, 1))).status for _ in statuses]
            assert progress == statuses
            mailbox.up()
            await until(lambda: outbox_is_empty(other.manager))
            mailbox.down()
        for _ in range(12):
            await elsewhere[0].post(progress_of(question, 1))
        assert (await elsewhere[1].respond(asked["id"], roots("x"))).status == 202
        mailbox.up()
        assert text_of(await call.next()) == "file:///x"


async def test_one_session_posts_no_more_than_its_share(
    store: FaultyStore, mailbox: FaultyMailbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox_module, "MAX_POSTED_BYTES", 3 * LEAST_BYTES)
    async with instance(store, Asking(), relay=mailbox) as one, instance(store, relay=mailbox) as other:
        first, second = one.client(), one.client()
        elsewhere = [other.client(await client.begin()) for client in (first, second)]
        question = await first.open_call("ask").next()
        statuses = [(await elsewhere[0].post(progress_of(question, amount))).status for amount in range(1, 6)]
        assert statuses == [202, 202, 202, 503, 503]
        assert (await elsewhere[1].post(progress_of(question, 1))).status == 202


async def test_a_post_whose_answer_was_lost_neither_loses_nor_doubles_a_message(
    store: FaultyStore, mailbox: FaultyMailbox, other_mailbox: FaultyMailbox
) -> None:
    asking = Asking()
    async with (
        instance(store, asking, relay=mailbox) as one,
        instance(store, Asking(), relay=other_mailbox) as other,
    ):
        elsewhere, call, question = await asked(one, other, "ask_for_progress", resident=True)
        other_mailbox.lose_the_answer_of("post")
        assert (await elsewhere.post(progress_of(question, 1))).status == 202
        await until(lambda: asking.heard == ["1"])
        # Read and removed by now, and posted again.
        await until(lambda: len(other_mailbox.posted) >= 2)
        other_mailbox.up()
        assert (await elsewhere.respond(question["id"], roots("x"))).status == 202
        await call.next()
        assert asking.heard == ["1", "file:///x"]


async def test_a_read_whose_answer_was_lost_neither_loses_nor_doubles_a_message(
    store: FaultyStore, mailbox: FaultyMailbox, other_mailbox: FaultyMailbox
) -> None:
    asking = Asking()
    async with instance(store, asking, relay=mailbox) as one, instance(store, relay=other_mailbox) as other:
        elsewhere, call, question = await asked(one, other, "ask_for_progress")
        mailbox.lose_the_answer_of("receive")
        for amount in (1, 2):
            assert (await elsewhere.post(progress_of(question, amount))).status == 202
        await until(lambda: relay_of(one.manager).inbox.failing)
        mailbox.up()
        assert (await elsewhere.respond(question["id"], roots("x"))).status == 202
        await call.next()
        assert asking.heard == ["1", "2", "file:///x"]


async def test_what_is_read_again_is_not_delivered_again(
    store: FaultyStore, mailbox: FaultyMailbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The read names no sender, as it names none that was not heard of for long, and the mailbox returns all again.
    monkeypatch.setattr(inbox_module, "RECENT_SENDERS", 0)
    asking = Asking()
    async with instance(store, asking, relay=mailbox) as one, instance(store, relay=mailbox) as other:
        elsewhere, call, question = await asked(one, other, "ask_for_progress")
        for amount in (1, 2, 3):
            assert (await elsewhere.post(progress_of(question, amount))).status == 202
        assert (await elsewhere.respond(question["id"], roots("x"))).status == 202
        await call.next()
        assert asking.heard == ["1", "2", "3", "file:///x"]


async def test_a_mailbox_that_cannot_be_read_stops_no_heartbeat(store: FaultyStore, mailbox: FaultyMailbox) -> None:
    async with instance(store, relay=mailbox) as one:
        mailbox.broken("receive")
        before = len(mailbox.beats)
        await instances_of(one.manager).beat()
        assert len(mailbox.beats) == before + 1
        # But where the store is away, what waits is read first.
        mailbox.down("receive")
        with pytest.raises(StoreUnavailable):
            await instances_of(one.manager).beat()
        assert len(mailbox.beats) == before + 1


async def test_a_message_that_the_store_does_not_take_holds_up_no_other(
    store: FaultyStore, mailbox: FaultyMailbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with instance(store, Asking(), relay=mailbox) as one, instance(store, relay=mailbox) as other:
        elsewhere, call, question = await asked(one, other)
        inner = mailbox.inner.post

        async def picky(messages: Any) -> set[int]:
            if any('"bad"' in message.body for message in messages):
                raise InvalidValue("the test takes no such message")
            return await inner(messages)

        monkeypatch.setattr(mailbox.inner, "post", picky)
        held = mailbox.hold("post")
        first = elsewhere.open("POST", {"jsonrpc": "2.0", "id": question["id"] + 1, "result": {}})
        await held.entered.wait()
        bad = elsewhere.open("POST", {"jsonrpc": "2.0", "id": question["id"] + 2, "result": {"bad": 1}})
        good = elsewhere.open("POST", {"jsonrpc": "2.0", "id": question["id"], "result": roots("good")})
        await anyio.wait_all_tasks_blocked()
        mailbox.up()
        held.release()
        assert (await first.answer()).status == (await good.answer()).status == 202
        assert (await bad.answer()).status == 503
        assert text_of(await call.next()) == "file:///good"


async def test_what_was_accepted_is_posted_before_the_manager_stops(
    store: FaultyStore, mailbox: FaultyMailbox, other_mailbox: FaultyMailbox
) -> None:
    async with instance(store, Asking(), relay=mailbox) as one:
        client = one.client()
        session_id = await client.begin()
        call = client.open_call("ask")
        question = await call.next()
        async with instance(store, Asking(), relay=other_mailbox) as other:
            elsewhere = other.client(session_id)
            assert (await elsewhere.ping()).status == 200
            other_mailbox.down("post")
            assert (await elsewhere.respond(question["id"], roots("x"))).status == 202
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(shut_down, other.manager)
                await anyio.sleep(0.05)
                other_mailbox.up()
            assert len(other_mailbox.posted) == 1
            # From then on nothing is accepted.
            assert (await elsewhere.respond(question["id"], roots("late"))).status in (404, 503)
        assert text_of(await call.next()) == "file:///x"


async def test_a_mailbox_that_does_not_answer_holds_up_a_stop_once(
    store: FaultyStore, mailbox: FaultyMailbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopping, "SHUTDOWN_TIMEOUT", 0.5)
    monkeypatch.setattr(stopping, "LAST_TRY", 0.1)

    async def hang() -> None:
        # What would hold up the stop a second time would do so for a minute.
        monkeypatch.setattr(stopping, "SHUTDOWN_TIMEOUT", 60.0)
        await anyio.sleep_forever()

    async with instance(store, relay=mailbox) as one:
        await one.client().begin()
        for name in ("beat", "receive"):
            mailbox.before(name, hang)
        retiring = mailbox.hold("retire")
        began = anyio.current_time()
    assert anyio.current_time() - began < 30
    assert retiring.calls == 1


async def test_a_copy_that_does_not_read_holds_up_no_other_session(
    store: FaultyStore, mailbox: FaultyMailbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery_module, "LANE_MESSAGES", 3)
    asking = Asking()
    parked = anyio.Event()
    async with instance(store, asking, relay=mailbox) as one, instance(store, relay=mailbox) as other:
        blocked, client = one.client(), one.client()
        blocked_id, session_id = await blocked.begin(), await client.begin()
        blocked_call, call = blocked.open_call("ask"), client.open_call("ask")
        blocked_question, question = await blocked_call.next(), await call.next()

        async def park(_: Any) -> None:
            parked.set()
            await anyio.sleep_forever()

        asking.on_initialize = park
        # The loop handles it before it reads on.
        blocked.open_initialize()
        await parked.wait()
        for amount in range(1, 9):
            message = progress_of(blocked_question, amount)
            assert (await other.client(blocked_id).post(message)).status == 202
        assert (await other.client(session_id).respond(question["id"], roots("x"))).status == 202
        assert text_of(await call.next()) == "file:///x"
        assert relay_of(one.manager).waiting == 3
        # And it goes with its copy.
        session = registry_of(one.manager).get(blocked_id)
        assert session is not None
        await registry_of(one.manager).evict(session)
        await until(lambda: relay_of(one.manager).waiting == 0)


async def test_a_message_for_a_copy_that_is_being_restored_waits_for_it(
    store: FaultyStore, mailbox: FaultyMailbox, other_store: FaultyStore
) -> None:
    restored = Asking()
    release = anyio.Event()
    began = anyio.Event()

    async def on_restore(*_: Any) -> None:
        began.set()
        await release.wait()

    async with (
        instance(store, Asking(), relay=mailbox) as one,
        instance(other_store, restored, relay=mailbox, on_restore=on_restore) as other,
    ):
        client = one.client()
        session_id = await client.begin()
        pinging = other.client(session_id).open_request("ping")
        await began.wait()
        assert (await client.notify("notifications/roots/list_changed")).status == 202
        await until(lambda: relay_of(other.manager).waiting == 1)
        release.set()
        assert (await pinging.answer()).status == 200
        await until(lambda: restored.roots_changed == 1)


@pytest.mark.parametrize("how", ["evicted", "ended", "crashed"])
async def test_a_message_for_a_copy_that_left_meanwhile_is_dropped(
    store: FaultyStore, mailbox: FaultyMailbox, how: str
) -> None:
    async with instance(store, Asking(), relay=mailbox) as one, instance(store, relay=mailbox) as other:
        client = one.client()
        elsewhere = other.client(await client.begin())
        question = await client.open_call("ask").next()
        held = mailbox.hold("receive", after=True)
        assert (await elsewhere.respond(question["id"], roots("x"))).status == 202
        await held.entered.wait()
        session = next(iter(registry_of(one.manager)))
        if how == "ended":
            assert (await client.delete()).status == 200
        elif how == "evicted":
            await registry_of(one.manager).evict(session)
        else:
            session.loop.cancel()
            await session.loop.stopped.wait()
        mailbox.up()
        held.release()
        await until(lambda: relay_of(one.manager).waiting == 0)
        # The inbox goes on.
        second = one.client()
        elsewhere = other.client(await second.begin())
        call = second.open_call("ask")
        question = await call.next()
        assert (await elsewhere.respond(question["id"], roots("y"))).status == 202
        assert text_of(await call.next()) == "file:///y"


async def test_where_no_hints_arrive_answers_come_soon_and_an_idle_instance_asks_seldom(
    store: FaultyStore, mailbox: FaultyMailbox
) -> None:
    mailbox.hints = False
    async with instance(store, Asking(), relay=mailbox) as one, instance(store, relay=mailbox) as other:
        client = one.client()
        elsewhere = other.client(await client.begin())
        before = mailbox.background["receive"]
        began = anyio.current_time()
        await anyio.sleep(1)
        passed = anyio.current_time() - began
        # Every fifteen seconds each, and up to 30 per cent more often.
        assert mailbox.background["receive"] - before <= 2 * (passed / 10.5 + 1)
        for _ in range(3):
            call = client.open_call("ask")
            question = await call.next()
            assert (await elsewhere.respond(question["id"], roots("x"))).status == 202
            with anyio.fail_after(5):
                assert text_of(await call.next()) == "file:///x"
        # No call runs and no stream is open, and a question that was asked outside of them may wait.
        before = mailbox.background["receive"]
        await until(lambda: mailbox.background["receive"] >= before + 4)


async def test_an_idle_instance_reads_before_heartbeats_and_seldom_besides(
    store: FaultyStore, mailbox: FaultyMailbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox_module, "IDLE_INTERVAL", 0.4)
    reads_at: list[float] = []

    async def read() -> None:
        reads_at.append(anyio.current_time())

    mailbox.before("receive", read)
    async with instance(store, Asking(), relay=mailbox, instance_timeout=0.6):
        await until(lambda: len(mailbox.beats) > 1)
        reads_at.clear()
        beats = len(mailbox.beats)
        await until(lambda: len(mailbox.beats) >= beats + 8)
        # Heartbeats are 0.2 s apart. Any other read comes when one is late, and 30 per cent early at most.
        soon = [later for earlier, later in pairwise(reads_at) if later - earlier < 0.7 * 0.4]
        assert len(soon) <= len(mailbox.beats) - beats
    async with instance(store, Asking(), relay=mailbox):
        reads, beats = mailbox.background["receive"], len(mailbox.beats)
        await until(lambda: mailbox.background["receive"] >= reads + 3)
        assert len(mailbox.beats) <= beats + 1


async def test_where_no_hints_arrive_a_call_that_asks_nothing_is_soon_cancelled_after_a_long_idleness(
    store: FaultyStore, mailbox: FaultyMailbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox_module, "IDLE_INTERVAL", 100.0)
    mailbox.hints = False
    asking = Asking()
    async with instance(store, asking, relay=mailbox) as one, instance(store, relay=mailbox) as other:
        client = one.client()
        elsewhere = other.client(await client.begin())
        await one.at_rest()
        await anyio.sleep(0.3)
        call = client.open_call("wait", request_id=7)
        await until(lambda: asking.waiting == 1)
        assert (await elsewhere.notify("notifications/cancelled", {"requestId": 7})).status == 202
        assert "error" in await call.next()


async def test_an_instance_posts_and_reads_under_its_number_only_when_that_is_entered(
    store: FaultyStore, mailbox: FaultyMailbox, other_mailbox: FaultyMailbox
) -> None:
    other_mailbox.down("beat")
    async with (
        instance(store, Asking(), relay=mailbox) as one,
        instance(store, Asking(), relay=other_mailbox) as other,
    ):
        elsewhere, call, question = await asked(one, other, resident=True)
        # As in an outage, because another instance may have the number.
        assert (await elsewhere.respond(question["id"], roots("x"))).status == 202
        await anyio.wait_all_tasks_blocked()
        assert other_mailbox.posted == []
        assert other_mailbox.background["receive"] == 0
        other_mailbox.up()
        assert text_of(await call.next()) == "file:///x"
        await instances_of(other.manager).beat()
        assert other_mailbox.background["receive"] > 0
