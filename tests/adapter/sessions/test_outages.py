"""The store is away for a while: requests that need it wait, and what they have caused happens once."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import anyio
import pytest

from mcp_session_store import EndReason, RestoreRefused
from mcp_session_store.adapter import outage
from mcp_session_store.errors import SchemaBehind
from tests.support.asgi import seen_by_a_client, until
from tests.support.instances import instance, open_session, principal
from tests.support.internals import gate_of, registry_of, stopping_in, waiting_at
from tests.support.stateful import Stateful, set_level

if TYPE_CHECKING:
    from mcp_session_store import SessionRecord, SessionRestoreMarker
    from tests.support.asgi import Client, Exchange
    from tests.support.faulty_stores import FaultyStore
    from tests.support.instances import Instance

pytestmark = pytest.mark.anyio

PATIENCE = 20.0


async def waiting(one: Instance, requests: int, *, streams: int = 0) -> None:
    """Wait until so many requests wait."""
    await until(lambda: waiting_at(gate_of(one.manager))[:2] == (requests, streams))


async def at_rest(one: Instance) -> None:
    """Wait until all is as if there had been no outage."""
    gate = gate_of(one.manager)
    await until(lambda: gate.is_open and waiting_at(gate) == (0, 0, 0, 0))
    await until(lambda: not registry_of(one.manager).restores and not stopping_in(one.manager))
    one.assert_seats_match()


async def opened_with_journal(store: FaultyStore) -> str:
    """A session whose restore needs all that one can need."""
    async with instance(store, Stateful()) as gone:
        client = gone.client()
        session_id = await client.handshake()
        await set_level(client, "info")
    store.calls.clear()
    return session_id


@pytest.mark.parametrize("operation", ["load", "read_journal", "claim"])
@pytest.mark.parametrize("answer", ["none", "lost"])
async def test_a_request_waits_for_the_store_and_what_it_causes_happens_once(
    store: FaultyStore, operation: str, answer: str, json_response: bool
) -> None:
    session_id = await opened_with_journal(store)
    asked: list[SessionRestoreMarker] = []

    async def allow(marker: SessionRestoreMarker, _record: SessionRecord) -> None:
        asked.append(marker)

    notes = Stateful()
    async with instance(
        store, notes, json_response=json_response, outage_patience=PATIENCE, replay_timeout=0.25, on_restore=allow
    ) as one:
        if answer == "none":
            store.down(operation)
        else:
            store.lose_the_answer_of(operation)
        client = one.client(session_id)
        calls = [client.open_call("add", {"a": number, "b": 1}) for number in range(20)]
        await until(lambda: waiting_at(gate_of(one.manager))[3] > 0)
        # Longer than a replay may take, and its background task finds nothing overdue.
        await anyio.sleep(1.2)
        assert [exchange for exchange in calls if exchange.sent] == []
        store.up()
        for number, exchange in enumerate(calls):
            answered = await exchange.answer()
            assert (answered.status, answered.text) == (200, str(number + 1))
        await at_rest(one)
        assert len(one.notes.replayed("initialize")) == len(one.notes.replayed("logging/setLevel")) == 1
        assert len(asked) == len(one.notes.initialized) == 1
        record = await store.record(session_id)
        assert record is not None


async def test_a_handshake_waits_and_its_handler_runs_once(store: FaultyStore, json_response: bool) -> None:
    async with instance(store, json_response=json_response, outage_patience=PATIENCE) as one:
        store.down("create", "replace_initialize")
        client = one.client()
        exchange = client.open_initialize()
        await waiting(one, 1)
        assert not exchange.sent
        store.up()
        answer = await exchange.answer()
        assert answer.status == 200
        assert len(one.notes.genuine("initialize")) == 1
        client.session_id = answer.session_id
        store.down("replace_initialize")
        again = client.open_initialize()
        await waiting(one, 1)
        store.up()
        assert (await again.answer()).status == 200
        assert len(one.notes.genuine("initialize")) == 2
        await at_rest(one)


async def test_resident_sessions_do_not_wait_and_a_journaled_call_is_refused_at_once(store: FaultyStore) -> None:
    session_id = await open_session(store)
    async with instance(store, Stateful(), outage_patience=PATIENCE) as one:
        client = one.client()
        await client.handshake()
        store.down()
        other = one.client(session_id).open_call("add", {"a": 1, "b": 1})
        await waiting(one, 1)
        assert (await client.call("add", {"a": 1, "b": 2})).text == "3"
        answer = await client.request("logging/setLevel", {"level": "info"})
        assert answer.error["code"] == -32603
        assert not other.sent
        store.up()
        assert (await other.answer()).text == "2"


@pytest.mark.parametrize("patience", [0, 0.2])
async def test_when_patience_runs_out_a_request_is_refused_and_the_session_goes_on_afterwards(
    store: FaultyStore, patience: float
) -> None:
    session_id = await opened_with_journal(store)
    async with instance(store, Stateful(), outage_patience=patience) as one:
        client = one.client(session_id)
        for operation in ("load", "claim"):
            store.down(operation)
            refused = await client.call("add", {"a": 1, "b": 1})
            assert refused.error["code"] == -32603
            assert refused.session_id is None
            store.up()
        await until(lambda: not registry_of(one.manager).restores)
        # It may take a while until the store is tried again.
        while "result" not in (await client.call("add", {"a": 1, "b": 1})).messages[0]:
            assert patience
        await at_rest(one)


@pytest.mark.parametrize("patience", [0, 0.2])
async def test_a_claim_whose_answer_was_lost_counts_once(store: FaultyStore, patience: float) -> None:
    session_id = await opened_with_journal(store)
    asked: list[SessionRestoreMarker] = []

    async def allow(marker: SessionRestoreMarker, _record: SessionRecord) -> None:
        asked.append(marker)

    async with instance(store, Stateful(), outage_patience=patience, on_restore=allow) as one:
        client = one.client(session_id)
        store.lose_the_answer_of("claim")
        assert "error" in (await client.ping()).messages[0]
        store.up()
        while "result" not in (await client.call("add", {"a": 1, "b": 1})).messages[0]:
            assert patience
        assert {(marker.restores, marker.previous_instance) for marker in asked} == {(1, asked[0].previous_instance)}
        assert asked[0].previous_instance != one.manager.instance
        assert len(asked) > 1
        record = await store.record(session_id)
        assert record is not None
        assert record.restores == 1
        await at_rest(one)


async def test_a_schema_that_does_not_fit_never_waits(store: FaultyStore) -> None:
    session_id = await open_session(store)
    async with instance(store, outage_patience=PATIENCE) as one:
        store.failing(SchemaBehind("behind"), "load", "create")
        assert (await one.client(session_id).ping()).error["code"] == -32603
        assert (await one.client().initialize()).status == 503
        assert gate_of(one.manager).outages == 0


async def test_a_resident_session_of_another_principal_waits_as_an_unknown_one_does(store: FaultyStore) -> None:
    async with instance(store, outage_patience=PATIENCE) as one:
        owner = one.client(user=principal("owner"))
        session_id = await owner.handshake()
        other = principal("other")
        store.down("load")
        exchanges = [
            one.client(asked_for, user=other).open(method, {"jsonrpc": "2.0", "id": 1, "method": "ping"})
            for asked_for in (session_id, "0" * 32)
            for method in ("POST", "DELETE")
        ]
        await waiting(one, 4)
        store.up()
        answers = [await exchange.answer() for exchange in exchanges]
        assert {answer.status for answer in answers} == {404}
        assert seen_by_a_client(answers[0]) == seen_by_a_client(answers[2])
        assert seen_by_a_client(answers[1]) == seen_by_a_client(answers[3])
        assert (await owner.ping()).status == 200


async def test_a_delete_that_takes_effect_and_whose_answer_is_lost_is_done(store: FaultyStore) -> None:
    ended: list[EndReason] = []

    async def on_end(_record: SessionRecord, reason: EndReason) -> None:
        ended.append(reason)

    async with instance(store, outage_patience=PATIENCE, on_end=on_end) as one:
        client = one.client()
        await client.handshake()
        store.lose_the_answer_of("end")
        deleting = client.open("DELETE")
        await waiting(one, 1)
        store.up()
        assert (await deleting.answer()).status == 200
        assert ended == [EndReason.CLIENT]
        # Only one of a request's own: another one finds it ended.
        assert (await client.delete()).status == 404
        await at_rest(one)


async def test_a_delete_waits_and_no_longer_than_clients_that_close_do(
    store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    session_id = await open_session(store)
    async with instance(store, outage_patience=PATIENCE) as one:
        client = one.client()
        await client.handshake()
        for deleted in (client, one.client(session_id)):
            store.down("end")
            exchange = deleted.open("DELETE")
            await waiting(one, 1)
            store.up()
            assert (await exchange.answer()).status == 200
        other = one.client()
        await other.handshake()
        store.down("end")
        with monkeypatch.context() as patch:
            patch.setattr(outage, "DELETE_PATIENCE", 0.1)
            assert (await other.delete()).status == 503
        store.up()
        assert (await other.delete()).status == 200
        await at_rest(one)


async def test_a_hook_that_refuses_is_asked_once_and_the_end_that_it_wants_waits(store: FaultyStore) -> None:
    session_id = await open_session(store)
    asked = []

    async def refuse(marker: SessionRestoreMarker, _record: SessionRecord) -> None:
        asked.append(marker)
        raise RestoreRefused("no")

    async with instance(store, outage_patience=PATIENCE, on_restore=refuse) as one:
        store.down("end")
        exchange = one.client(session_id).open_request("ping")
        await until(lambda: waiting_at(gate_of(one.manager))[3] == 1)
        store.up()
        assert (await exchange.answer()).status == 404
        assert len(asked) == 1
        await at_rest(one)


async def test_a_stream_waits_for_longer_than_a_call(store: FaultyStore) -> None:
    session_id = await open_session(store)
    async with instance(store, outage_patience=0.2) as one:
        client = one.client(session_id)
        store.down("load")
        stream = client.open("GET")
        await waiting(one, 0, streams=1)
        assert (await client.ping()).error["code"] == -32603
        assert not stream.sent
        store.up()
        await stream.start()
        assert stream.status == 200
        assert (await client.ping()).status == 200
        await stream.leave()
        await at_rest(one)


# Clients that give up


async def left(exchange: Exchange) -> None:
    exchange.disconnect()
    await exchange.end()


@pytest.mark.parametrize("operation", ["load", "read_journal", "claim"])
async def test_a_restore_that_no_request_waits_for_any_more_ends(store: FaultyStore, operation: str) -> None:
    session_id = await opened_with_journal(store)
    async with instance(store, Stateful(), outage_patience=PATIENCE, evict_after=None) as one:
        client = one.client(session_id)
        store.down(operation)
        exchanges: list[Exchange] = [
            client.open_call("add", {"a": 1, "b": 1}),
            client.open("GET"),
            client.open_call("add", {"a": 1, "b": 1}),
        ]
        await waiting(one, 2, streams=1)
        if operation != "load":
            assert len(registry_of(one.manager).restores) == 1
        for exchange in exchanges[:2]:
            await left(exchange)
        await waiting(one, 1)
        if operation != "load":
            assert len(registry_of(one.manager).restores) == 1
        await left(exchanges[2])
        await waiting(one, 0)
        # While the store is away still.
        await until(lambda: not registry_of(one.manager).restores)
        await until(lambda: not stopping_in(one.manager))
        assert registry_of(one.manager).reserved == one.residents == 0
        store.up()
        assert (await client.call("add", {"a": 1, "b": 1})).text == "2"
        await at_rest(one)


async def test_a_request_that_comes_after_a_restore_was_given_up_begins_another(store: FaultyStore) -> None:
    session_id = await opened_with_journal(store)
    async with instance(store, Stateful(), outage_patience=PATIENCE) as one:
        client = one.client(session_id)
        store.down("claim")
        first = client.open_request("ping")
        await until(lambda: waiting_at(gate_of(one.manager))[3] == 1)
        await waiting(one, 1)
        first.disconnect()
        await waiting(one, 0)
        second = client.open_request("ping")
        await waiting(one, 1)
        store.up()
        assert (await second.answer()).status == 200
        await at_rest(one)


async def test_a_client_that_leaves_its_handshake_leaves_nothing_behind(store: FaultyStore) -> None:
    async with instance(store, outage_patience=PATIENCE) as one:
        store.down("create")
        exchange = one.client().open_initialize()
        await waiting(one, 1)
        await left(exchange)
        await waiting(one, 0)
        store.up()
        assert (await one.client().initialize()).status == 200
        await at_rest(one)
        assert one.residents == 1


async def test_after_an_outage_all_is_as_before(store: FaultyStore) -> None:
    ids = [await open_session(store) for _ in range(5)]
    async with instance(store, outage_patience=PATIENCE, sweep_interval=None) as one:
        await one.first_poll()
        # Tasks of the background start others.
        await anyio.wait_all_tasks_blocked()
        before = len(asyncio.all_tasks())
        store.down("load", "create")
        clients = [one.client(session_id) for session_id in ids]
        exchanges = [client.open_request("ping") for client in clients for _ in range(20)]
        leaving = [client.open("GET") for client in clients for _ in range(4)]
        opening = [one.client().open_initialize() for _ in range(10)]
        await waiting(one, 110, streams=20)
        for exchange in [*leaving, *opening, *exchanges[::2]]:
            await left(exchange)
        await waiting(one, 50)
        store.up()
        for exchange in exchanges[1::2]:
            assert (await exchange.answer()).status == 200
        await at_rest(one)
        assert one.residents == 5
        assert len(one.notes.replayed("initialize")) == 5
        for session in registry_of(one.manager):
            await registry_of(one.manager).evict(session)
        await until(lambda: len(asyncio.all_tasks()) <= before)


# Bounds and stops


async def test_beyond_the_bound_requests_are_refused_at_once(
    store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outage, "MAX_WAITING", 3)
    ids = [await open_session(store) for _ in range(4)]
    async with instance(store, outage_patience=PATIENCE) as one:
        clients: list[Client] = [one.client(session_id) for session_id in ids]
        store.down("load")
        waiters = [client.open_request("ping") for client in clients[:3]]
        await waiting(one, 3)
        assert (await clients[3].ping()).error["code"] == -32603
        assert (await one.client().initialize()).error["code"] == -32603
        store.up()
        for exchange in waiters:
            assert (await exchange.answer()).status == 200
        assert (await clients[3].ping()).status == 200
        await at_rest(one)


async def test_a_stop_answers_those_who_wait(store: FaultyStore) -> None:
    session_id = await open_session(store)
    async with instance(store, outage_patience=PATIENCE) as one:
        store.down()
        exchanges = [
            one.client(session_id).open_request("ping"),
            one.client().open_initialize(),
            one.client(session_id).open("GET"),
            one.client(session_id).open("DELETE"),
        ]
        await waiting(one, 3, streams=1)
        gate_of(one.manager).shut_down()
        for exchange in exchanges:
            answer = await exchange.answer()
            assert answer.error["code"] == -32603
            assert answer.session_id is None
        await waiting(one, 0)
        store.up()
