"""Ending a session: for good, from any instance, and by nothing but DELETE."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import anyio
import pytest

from mcp_session_store import EndReason, SessionRecord, session_key
from mcp_session_store.adapter.sessions import ending
from tests.support.asgi import seen_by_a_client, until
from tests.support.http import INITIALIZE_PARAMS
from tests.support.instances import Notes, instance, principal, wait_for
from tests.support.internals import discard_session, evict_unused, stopping_in, transports_in

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.support.faulty_stores import FaultyStore
    from tests.support.instances import Clock

    EndHook = Callable[[SessionRecord, EndReason], Awaitable[None]]

pytestmark = pytest.mark.anyio

UNKNOWN = "0" * 32


def recorder() -> tuple[list[tuple[SessionRecord, EndReason]], EndHook]:
    told: list[tuple[SessionRecord, EndReason]] = []

    async def on_end(record: SessionRecord, reason: EndReason) -> None:
        told.append((record, reason))

    return told, on_end


async def test_delete_ends_a_resident_session_for_good(store: FaultyStore, other_store: FaultyStore) -> None:
    told, on_end = recorder()
    async with instance(store, on_end=on_end) as one, instance(other_store) as two:
        client = one.client()
        session_id = await client.handshake()
        answer = await client.delete()
        assert answer.status == 200
        assert answer.session_id == session_id
        assert await store.ended(session_id) is EndReason.CLIENT
        unknown = await one.client(UNKNOWN).ping()
        for here in (one, two):
            assert seen_by_a_client(await here.client(session_id).ping()) == seen_by_a_client(unknown)
            assert (await here.client(session_id).delete()).status == 404
        ((record, reason),) = told
        assert record.client_name == INITIALIZE_PARAMS["clientInfo"]["name"]
        assert reason is EndReason.CLIENT
        one.assert_seats_match()


async def test_delete_ends_a_session_that_is_not_resident_without_restoring_it(store: FaultyStore) -> None:
    async with instance(store) as gone:
        session_id = await gone.client().handshake()
    told, on_end = recorder()
    async with instance(store, on_end=on_end) as one:
        store.calls.clear()
        assert (await one.client(session_id).delete()).status == 200
        assert store.calls == ["load", "end"]
        assert one.notes.seen == []
        assert await store.ended(session_id) is EndReason.CLIENT
        # The hook is for instances in which the session lives.
        assert told == []
        assert (await one.client(session_id).ping()).status == 404


@pytest.mark.parametrize("resident", [True, False], ids=["resident", "not resident"])
async def test_what_delete_answers_is_the_same_wherever_the_session_is(store: FaultyStore, resident: bool) -> None:
    async with instance(store) as one:
        client = one.client()
        await client.handshake()
        if not resident:
            await one.terminate(str(client.session_id))
            await until(lambda: one.residents == 0)
        answer = await client.delete()
        assert answer.status == 200
        assert answer.body == b""
        assert answer.session_id == client.session_id


async def test_the_delete_of_an_unknown_session_is_answered_404(store: FaultyStore) -> None:
    async with instance(store) as one:
        assert (await one.client(UNKNOWN).delete()).status == 404
        assert store.counts()["end"] == 0


@pytest.mark.parametrize("fault", ["down", "bug"])
@pytest.mark.parametrize("resident", [True, False], ids=["resident", "not resident"])
async def test_a_delete_that_cannot_be_stored_is_answered_503_and_changes_nothing(
    store: FaultyStore, resident: bool, fault: str
) -> None:
    told, on_end = recorder()
    async with instance(store, on_end=on_end) as one:
        client = one.client()
        session_id = await client.handshake()
        stream = await client.get_stream() if resident else None
        if not resident:
            await one.terminate(session_id)
            await until(lambda: one.residents == 0)
        if fault == "down":
            store.down("end")
        else:
            store.broken("end")
        answer = await client.delete()
        assert answer.status == 503
        assert "retry-after" in answer.headers
        assert told == []
        assert one.residents == resident
        store.up()
        assert (await client.call("add", {"a": 1, "b": 2})).text == "3"
        assert stream is None or not stream.over.is_set()
        assert (await client.delete()).status == 200
        assert len(told) == 1


async def test_a_delete_whose_outcome_is_unknown_can_be_sent_again(store: FaultyStore) -> None:
    async with instance(store) as one:
        client = one.client()
        session_id = await client.handshake()
        store.lose_the_answer_of("end")
        assert (await client.delete()).status == 503
        store.up()
        assert (await client.delete()).status in (200, 404)
        assert one.residents == 0
        assert await store.ended(session_id) is EndReason.CLIENT
        assert (await client.ping()).status == 404


async def test_the_copy_leaves_only_when_the_end_is_committed(store: FaultyStore) -> None:
    async with instance(store) as one:
        client = one.client()
        await client.handshake()
        end = store.hold("end")
        deletion = client.open("DELETE")
        await end.wait_entered()
        assert (await client.ping()).status == 200
        assert deletion.sent == []
        end.release()
        assert (await deletion.answer()).status == 200
        assert one.residents == 0


@pytest.mark.parametrize("after", [True, False], ids=["after", "before"])
@pytest.mark.parametrize("resident", [True, False], ids=["resident", "not resident"])
async def test_a_delete_is_carried_through_when_its_client_leaves_during_the_commit(
    store: FaultyStore, resident: bool, after: bool
) -> None:
    told, on_end = recorder()
    async with instance(store, on_end=on_end) as one:
        client = one.client()
        session_id = await client.handshake()
        if not resident:
            await one.terminate(session_id)
            await until(lambda: one.residents == 0)
        end = store.hold("end", after=after)
        deletion = client.open("DELETE")
        await end.wait_entered()
        deletion.cancel()
        await deletion.end()
        end.release()
        await until(lambda: one.residents == 0)
        if resident:
            await until(lambda: len(told) == 1)
        else:
            await anyio.wait_all_tasks_blocked()
        assert await store.ended(session_id) is EndReason.CLIENT
        assert (await client.ping()).status == 404


async def test_two_deletes_at_once_end_a_session_once(store: FaultyStore) -> None:
    told, on_end = recorder()
    async with instance(store, on_end=on_end) as one:
        client = one.client()
        await client.handshake()
        end = store.hold("end")
        deletions = [client.open("DELETE") for _ in range(5)]
        await until(lambda: end.calls == 5)
        end.release()
        assert sorted([(await deletion.answer()).status for deletion in deletions]) == [200, 404, 404, 404, 404]
        assert len(told) == 1
        one.assert_seats_match()


@pytest.mark.parametrize("resident", [True, False], ids=["resident", "not resident"])
async def test_delete_closes_open_streams_and_cancels_calls_of_the_copy(
    store: FaultyStore, json_response: bool, resident: bool
) -> None:
    async with instance(store) as gone:
        session_id = await gone.client().handshake()
    async with instance(store, json_response=json_response) as one:
        client = one.client(session_id)
        stream = await client.get_stream()
        call = client.open_call("wait")
        await until(lambda: one.notes.waiting == 1)
        assert (await client.delete()).status == 200
        await stream.end()
        await call.end()
        await until(lambda: one.notes.waiting == 0)
        assert one.notes.waited == 0
        assert (await client.ping()).status == 404


@pytest.mark.parametrize("step", ["the hook", "initialize", "the notification", "the claim", "after the claim"])
async def test_a_delete_that_comes_during_a_restore_wins(store: FaultyStore, step: str) -> None:
    async with instance(store) as gone:
        session_id = await gone.client().handshake()
    reached, proceed = anyio.Event(), anyio.Event()

    async def hold(*_: object) -> None:
        reached.set()
        await proceed.wait()

    notes = Notes()
    hook = None
    if step == "the hook":
        hook = hold
    elif step == "initialize":
        notes.on_initialize = hold
    elif step == "the notification":
        notes.on_initialized = hold
    store.claims_first = "claim" in step
    async with instance(store, notes, on_restore=hook) as one:
        claim = store.hold("claim", after=step == "after the claim") if "claim" in step else None
        client = one.client(session_id)
        first = client.open_request("ping")
        if claim is None:
            await wait_for(reached)
        else:
            await claim.wait_entered()
        assert (await client.delete()).status == 200
        proceed.set()
        if claim is not None:
            claim.release()
        assert (await first.answer()).status == 404
        await until(lambda: not stopping_in(one.manager))
        assert one.residents == 0
        one.assert_seats_match()
        assert (await client.ping()).status == 404
        assert notes.genuine("ping") == []


async def test_a_restore_that_is_over_before_the_end_is_committed_ends_with_it(store: FaultyStore) -> None:
    async with instance(store) as gone:
        session_id = await gone.client().handshake()
    told, on_end = recorder()
    async with instance(store, on_end=on_end) as one:
        client = one.client(session_id)
        end = store.hold("end")
        deletion = client.open("DELETE")
        await end.wait_entered()
        assert (await client.ping()).status == 200
        end.release()
        assert (await deletion.answer()).status == 200
        assert one.residents == 0
        assert len(told) == 1
        assert (await client.ping()).status == 404


async def test_a_delete_is_only_for_the_sessions_principal(store: FaultyStore) -> None:
    alice = principal("alice")
    told, on_end = recorder()
    async with instance(store, on_end=on_end) as one:
        client = one.client(user=alice)
        session_id = await client.handshake()
        assert (await one.client(session_id).delete()).status == 404
        assert (await one.client(session_id, user=principal("bob")).delete()).status == 404
        assert store.counts()["end"] == 0
        assert told == []
        assert (await client.delete()).status == 200


# on_end


@pytest.mark.parametrize("way", ["bug", "hang"])
async def test_an_end_hook_that_fails_or_hangs_does_not_break_the_answer(
    store: FaultyStore, way: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ending, "END_HOOK_TIMEOUT", 0.05)

    async def on_end(_record: SessionRecord, _reason: EndReason) -> None:
        if way == "bug":
            raise RuntimeError("the application's bug")
        await anyio.sleep_forever()

    async with instance(store, on_end=on_end) as one:
        client = one.client()
        session_id = await client.handshake()
        assert (await client.delete()).status == 200
        assert await store.ended(session_id) is EndReason.CLIENT
        assert f"the on_end hook failed for the session {session_key(session_id)}" in caplog.text


async def test_the_end_hook_runs_when_the_session_has_ended_and_cannot_be_reached(store: FaultyStore) -> None:
    async with instance(store, on_end=lambda record, reason: check(record)) as one:
        client = one.client()
        session_id = await client.handshake()
        statuses: list[int] = []

        async def check(_record: SessionRecord) -> None:
            assert await store.ended(session_id) is EndReason.CLIENT
            statuses.append((await client.ping()).status)

        assert (await client.delete()).status == 200
        assert statuses == [404]


async def test_a_session_ends_by_nothing_but_its_end(
    store: FaultyStore, other_store: FaultyStore, clock: Clock
) -> None:
    told, on_end = recorder()
    async with (
        instance(store, end_within=3600.0, on_end=on_end) as one,
        instance(other_store, end_within=3600.0) as two,
    ):
        client = one.client()
        session_id = await client.handshake()
        await one.at_rest()
        clock.advance(timedelta(minutes=6))
        await evict_unused(one.manager)
        assert one.residents == 0
        assert (await client.ping()).status == 200
        await one.terminate(session_id)  # the SDK's and FastMCP's way to drop a transport
        await until(lambda: one.residents == 0)
        assert (await client.ping()).status == 200
        await discard_session(one.manager, session_id, transports_in(one.manager)[session_id])
        assert one.residents == 0
        assert (await client.ping()).status == 200
        assert (await two.client(session_id).ping()).status == 200
    assert told == []
    assert store.counts()["end"] == other_store.counts()["end"] == 0
    assert await store.ended(session_id) is None
    async with instance(store) as after_shutdown:
        assert (await after_shutdown.client(session_id).ping()).status == 200


async def test_a_second_initialize_is_what_the_end_hook_is_told(store: FaultyStore) -> None:
    told, on_end = recorder()
    async with instance(store, on_end=on_end) as one:
        client = one.client()
        await client.handshake()
        await client.initialize({**INITIALIZE_PARAMS, "clientInfo": {"name": "newer", "version": "2"}})
        assert (await client.delete()).status == 200
        ((record, _),) = told
        assert (record.client_name, record.client_version) == ("newer", "2")
