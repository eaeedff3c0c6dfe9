"""Restoring a session: by one replay, for everybody who asks, and published when it is over."""

from __future__ import annotations

import asyncio
import contextvars
import json
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import mcp_types as types
import pytest
from mcp.server.auth.middleware.auth_context import AuthContextMiddleware, get_access_token
from mcp.server.streamable_http import EventStore
from mcp.shared.exceptions import MCPError
from mcp.shared.jsonrpc_dispatcher import JSONRPCDispatcher

from mcp_session_store import EndReason, MemorySessionStore, RestoreRefused, SessionRecord, SessionRestoreMarker
from tests.support.asgi import PATIENCE, Client, seen_by_a_client, until
from tests.support.http import INITIALIZE_PARAMS, assert_not_handled, assert_unavailable
from tests.support.instances import Notes, instance, open_session, principal, wait_for
from tests.support.internals import exit_stack_of, registry_of, stopping_in

if TYPE_CHECKING:
    from mcp.server.context import HandlerResult
    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send

    from tests.support.asgi import Exchange
    from tests.support.faulty_stores import FaultyStore
    from tests.support.instances import Instance, RequestContext

pytestmark = pytest.mark.anyio


def gate(notes: Notes) -> tuple[anyio.Event, anyio.Event]:
    """Hold the handling of `initialize`: an event that tells that it is reached, and one that lets it go on."""
    reached, proceed = anyio.Event(), anyio.Event()

    async def hold(_ctx: RequestContext) -> None:
        reached.set()
        await proceed.wait()

    notes.on_initialize = hold
    return reached, proceed


# What is kept


STRANGE_PARAMS = {
    "protocolVersion": "2025-06-18",
    "capabilities": {"roots": {"listChanged": True}, "experimental": {"x": {"deep": [1, 2.5, None, True, "\u0000"]}}},
    "clientInfo": {"name": "Клиент 🦜 \u0000\u001b\u2028", "version": "1", "title": "ü", "vendor": {"a": []}},
    "_meta": {"example.com/trace": "\u0000é"},
    "unknown": {"": 0, "\u0000": "\u0000", "big": 12345678901234567890123, "small": 1e-300, "🦜": -0.0},
}


async def test_a_restored_session_has_its_id_and_its_clients_params(store: FaultyStore, json_response: bool) -> None:
    session_id = await open_session(store, STRANGE_PARAMS)
    async with instance(store, json_response=json_response) as one:
        answer = await one.client(session_id).call("client")
        assert answer.status == 200
        assert answer.session_id == session_id
        told = json.loads(answer.text)
        assert told["protocol_version"] == "2025-06-18"
        assert told["params"]["clientInfo"]["name"] == STRANGE_PARAMS["clientInfo"]["name"]  # type: ignore[index]
        assert told["params"]["capabilities"]["roots"] == {"listChanged": True}
        (replayed,) = one.notes.replayed("initialize")
        assert replayed.params == STRANGE_PARAMS


async def test_the_replayed_request_reads_as_the_message_that_is_replayed(store: FaultyStore) -> None:
    session_id = await open_session(store, STRANGE_PARAMS)
    bodies: list[Any] = []
    notes = Notes()

    async def read(ctx: RequestContext) -> None:
        assert ctx.request is not None
        bodies.append(await ctx.request.json())
        assert ctx.request.headers.getlist("content-length") == [str(len(await ctx.request.body()))]
        assert ctx.request.headers.getlist("content-type") == ["application/json"]

    notes.on_initialize = read
    async with instance(store, notes) as one:
        assert (await one.client(session_id).ping()).status == 200
        assert bodies[0]["method"] == "initialize"
        assert bodies[0]["params"] == STRANGE_PARAMS
        (replayed,) = one.notes.replayed("initialize")
        assert replayed.request.method == "POST"
        assert replayed.request.headers["content-type"] == "application/json"


async def test_a_version_that_was_negotiated_down_is_kept(store: FaultyStore) -> None:
    session_id = await open_session(store, {**INITIALIZE_PARAMS, "protocolVersion": "1999-01-01"})
    record = await store.record(session_id)
    async with instance(store) as one:
        answer = await one.client(session_id).call("client")
        assert record is not None
        assert json.loads(answer.text)["protocol_version"] == record.protocol_version


async def test_a_restore_is_claimed_and_counted(store: FaultyStore) -> None:
    session_id = await open_session(store)
    for restores in (1, 2):
        async with instance(store) as one:
            await one.client(session_id).request("tools/list")
            with anyio.fail_after(PATIENCE):
                record = await store.restored(session_id, restores)
                # A claim that leaves before the first use extends nothing, and that follows.
                while record.expires_at != record.last_seen_at + timedelta(hours=24):
                    await anyio.sleep(0.01)
                    record = await store.restored(session_id, restores)
            assert record.restores == restores
            assert record.instance_hint == one.manager.instance


async def test_a_server_killed_between_initialize_and_initialized_leaves_a_session_that_goes_on(
    store: FaultyStore, other_store: FaultyStore, json_response: bool
) -> None:
    async with (
        instance(store, json_response=json_response) as killed,
        instance(other_store, json_response=json_response) as one,
    ):
        session_id = (await killed.client().initialize()).session_id
        client = one.client(session_id)
        assert (await client.notify("notifications/initialized")).status == 202
        assert (await client.call("add", {"a": 1, "b": 2})).text == "3"
        assert len(one.notes.initialized) == 1


async def test_the_clients_own_initialized_is_answered_202_and_not_handled_again(store: FaultyStore) -> None:
    session_id = await open_session(store)
    async with instance(store) as one:
        client = one.client(session_id)
        for _ in range(3):
            assert (await client.notify("notifications/initialized")).status == 202
        await client.ping()
        assert len(one.notes.initialized) == 1
        assert [seen.replayed for seen in one.notes.seen if seen.method == "notifications/initialized"] == [True]


async def test_replayed_answers_reach_nobody(store: FaultyStore) -> None:
    stored: list[types.JSONRPCMessage | None] = []

    class Events(EventStore):
        async def store_event(self, stream_id: str, message: types.JSONRPCMessage | None) -> str:
            stored.append(message)
            return f"{stream_id}-{len(stored)}"

        async def replay_events_after(self, last_event_id: str, send_callback: Any) -> str | None:
            return None

    async def log(ctx: RequestContext) -> None:
        await ctx.session.send_notification(types.ToolListChangedNotification(), related_request_id=ctx.request_id)

    session_id = await open_session(store)
    notes = Notes()
    notes.on_initialize = log
    async with instance(store, notes, event_store=Events()) as one:
        client = one.client(session_id)
        stream = await client.get_stream()
        answer = await client.call("add", {"a": 1, "b": 2})
        assert [message.get("id") for message in answer.messages] == [1]
        assert answer.text == "3"
        await anyio.wait_all_tasks_blocked()
        assert stream.messages == []
        # Not even an event store sees them: the priming event, and the answer to the call.
        assert [message is not None and getattr(message, "id", None) for message in stored] == [False, 1]


# One restore for all who ask


async def test_fifty_first_requests_at_once_cause_one_restore(store: FaultyStore, json_response: bool) -> None:
    session_id = await open_session(store)
    notes = Notes()
    reached, proceed = gate(notes)
    async with instance(store, notes, json_response=json_response) as one:
        client = one.client(session_id)
        calls = [client.open_call("add", {"a": n, "b": 1}) for n in range(24)]
        stream = client.open("GET")
        pings = [client.open_request("ping") for _ in range(24)]
        notified = client.open("POST", {"jsonrpc": "2.0", "method": "notifications/initialized"})
        await wait_for(reached)
        await anyio.wait_all_tasks_blocked()
        everybody = [*calls, *pings, stream, notified]
        assert all(exchange.sent == [] for exchange in everybody)
        assert one.residents == 0
        proceed.set()
        assert [(await call.answer()).text for call in calls] == [str(n + 1) for n in range(24)]
        assert {(await ping.answer()).status for ping in pings} == {200}
        assert (await notified.answer()).status == 202
        await stream.start()
        assert stream.status == 200
        assert len(notes.replayed("initialize")) == 1
        assert len(notes.initialized) == 1
        assert (await store.restored(session_id)).restores == 1
        assert [claim.restores for claim in store.claims(session_id)] == [1]
        one.assert_seats_match()


@pytest.mark.parametrize("how", ["cancel", "disconnect"])
async def test_the_disconnect_of_the_request_that_led_a_restore_fails_none_of_the_others(
    store: FaultyStore, json_response: bool, how: str
) -> None:
    session_id = await open_session(store)
    notes = Notes()
    reached, proceed = gate(notes)
    async with instance(store, notes, json_response=json_response) as one:
        client = one.client(session_id)
        leader = client.open_call("add", {"a": 0, "b": 0})
        await wait_for(reached)
        others = [client.open_call("add", {"a": n, "b": 0}) for n in range(10)]
        await anyio.wait_all_tasks_blocked()
        (leader.cancel if how == "cancel" else leader.disconnect)()
        if how == "cancel":
            await leader.end()
        proceed.set()
        assert [(await other.answer()).text for other in others] == [str(n) for n in range(10)]
        assert len(notes.replayed("initialize")) == 1
        await leader.end()
        await until(lambda: next(iter(registry_of(one.manager))).pins == 0)


async def test_a_restore_that_nobody_waits_for_any_more_is_carried_through(store: FaultyStore) -> None:
    session_id = await open_session(store)
    notes = Notes()
    reached, proceed = gate(notes)
    async with instance(store, notes) as one:
        client = one.client(session_id)
        first = client.open_request("ping")
        await wait_for(reached)
        first.cancel()
        await first.end()
        proceed.set()
        await until(lambda: one.residents == 1)
        await until(lambda: not next(iter(registry_of(one.manager))).busy)
        assert (await client.ping()).status == 200
        assert len(notes.replayed("initialize")) == 1


async def test_a_request_that_comes_while_the_claim_runs_waits_for_it(store: FaultyStore) -> None:
    session_id = await open_session(store)
    store.claims_first = True
    async with instance(store) as one:
        client = one.client(session_id)
        claim = store.hold("claim")
        first = client.open_request("ping")
        await claim.wait_entered()
        second = client.open_request("ping")
        await anyio.wait_all_tasks_blocked()
        assert one.residents == 0
        assert first.sent == second.sent == []
        claim.release()
        assert (await first.answer()).status == (await second.answer()).status == 200
        assert claim.calls == 1


async def test_two_instances_restore_one_session_at_the_same_time(store: FaultyStore, other_store: FaultyStore) -> None:
    session_id = await open_session(store)

    def client_of(here: Instance) -> Client:
        return here.client(session_id)

    async with instance(store) as one, instance(other_store) as two:
        # Ids of requests that run at the same time differ.
        exchanges = [
            client.open_call("add", {"a": 1, "b": 1}) for client in map(client_of, (one, two)) for _ in "12345"
        ]
        assert {(await exchange.answer()).text for exchange in exchanges} == {"2"}
        assert (await store.restored(session_id, 2)).restores == 2


async def test_sessions_are_restored_beside_each_other(store: FaultyStore) -> None:
    async with instance(store) as gone:
        slow_id = await gone.client().handshake({**INITIALIZE_PARAMS, "slow": True})
        quick_id = await gone.client().handshake()
    notes = Notes()
    reached = anyio.Event()

    async def hold(ctx: RequestContext) -> None:
        if (ctx.params or {}).get("slow"):
            reached.set()
            await anyio.sleep_forever()

    notes.on_initialize = hold
    async with instance(store, notes) as one:
        slow = one.client(slow_id).open_request("ping")
        await wait_for(reached)
        assert (await one.client(quick_id).ping()).status == 200
        assert slow.sent == []


# When it is published


async def test_a_restored_session_is_published_only_when_its_replay_is_over(
    store: FaultyStore, json_response: bool
) -> None:
    session_id = await open_session(store)
    notes = Notes()
    handling, proceed = anyio.Event(), anyio.Event()

    async def hold(_ctx: RequestContext) -> None:
        handling.set()
        await proceed.wait()

    notes.on_initialized = hold
    async with instance(store, notes, json_response=json_response) as one:
        client = one.client(session_id)
        call = client.open_call("add", {"a": 1, "b": 2})
        await wait_for(handling)
        later = client.open_request("ping")
        await anyio.wait_all_tasks_blocked()
        assert one.residents == 0
        assert notes.genuine("tools/call") == notes.genuine("ping") == []
        proceed.set()
        assert (await call.answer()).text == "3"
        assert (await later.answer()).status == 200


async def test_a_handler_of_initialized_that_fails_does_not_fail_the_restore(
    store: FaultyStore, json_response: bool
) -> None:
    session_id = await open_session(store)
    notes = Notes()

    async def fail(_ctx: RequestContext) -> None:
        raise RuntimeError("the application's bug")

    notes.on_initialized = fail
    async with instance(store, notes, json_response=json_response) as one:
        assert (await one.client(session_id).ping()).status == 200


async def test_a_handler_that_asks_the_client_gets_its_answer_on_the_published_session(
    store: FaultyStore, json_response: bool
) -> None:
    session_id = await open_session(store, {**INITIALIZE_PARAMS, "capabilities": {"roots": {}}})
    notes = Notes()
    roots: list[Any] = []

    async def ask(ctx: RequestContext) -> None:
        for _ in range(2):
            answer = await ctx.session.send_request(types.ListRootsRequest(), types.ListRootsResult)
            roots.append([str(root.uri) for root in answer.roots])

    def answered(count: int) -> bool:
        return len(roots) == count

    notes.on_initialized = ask
    # Longer than this test waits for anything: nothing but the question lets the session be published.
    async with instance(store, notes, json_response=json_response, replay_timeout=60) as one:
        client = one.client(session_id)
        assert (await client.call("add", {"a": 1, "b": 2})).text == "3"
        assert roots == []
        stream = await client.get_stream()
        for number in range(2):
            question = await stream.next()
            assert question["method"] == "roots/list"
            uri = f"file:///{number}"
            assert (await client.respond(question["id"], {"roots": [{"uri": uri}]})).status == 202
            await until(partial(answered, number + 1))
        assert roots == [["file:///0"], ["file:///1"]]


async def test_a_get_that_leads_the_restore_carries_the_handlers_question(store: FaultyStore) -> None:
    session_id = await open_session(store, {**INITIALIZE_PARAMS, "capabilities": {"roots": {}}})
    notes = Notes()
    roots: list[Any] = []

    async def ask(ctx: RequestContext) -> None:
        roots.append(await ctx.session.send_request(types.ListRootsRequest(), types.ListRootsResult))

    notes.on_initialized = ask
    async with instance(store, notes, replay_timeout=60) as one:
        client = one.client(session_id)
        stream = await client.get_stream()
        question = await stream.next()
        await client.respond(question["id"], {"roots": []})
        await until(lambda: len(roots) == 1)


async def test_a_handler_that_hangs_does_not_keep_the_session_from_being_published(
    store: FaultyStore, json_response: bool
) -> None:
    session_id = await open_session(store)
    notes = Notes()
    proceed, returned = anyio.Event(), anyio.Event()

    async def hang(_ctx: RequestContext) -> None:
        await proceed.wait()
        returned.set()

    notes.on_initialized = hang
    # As much again is there for all else of the replay.
    async with instance(store, notes, json_response=json_response, replay_timeout=1) as one:
        client = one.client(session_id)
        assert (await client.call("add", {"a": 1, "b": 2})).text == "3"
        # The handler goes on beside the client's requests.
        proceed.set()
        await wait_for(returned)
        assert (await client.ping()).status == 200


# When it fails


async def refuse(_ctx: RequestContext) -> None:
    raise MCPError(code=-32001, message="not you")


async def refuse_by_value(_ctx: RequestContext, _result: HandlerResult) -> Any:
    return types.ErrorData(code=-32001, message="not you")


async def another_version(_ctx: RequestContext, result: HandlerResult) -> HandlerResult:
    assert isinstance(result, dict)
    return {**result, "protocolVersion": "2025-03-26"}


@pytest.mark.parametrize("why", ["an error", "an error by value", "a crash", "another version"])
async def test_a_handshake_that_turns_out_otherwise_is_answered_404_and_leaves_the_record(
    store: FaultyStore, other_store: FaultyStore, json_response: bool, why: str
) -> None:
    session_id = await open_session(store)
    before = await store.record(session_id)
    notes = Notes()

    async def crash(_ctx: RequestContext) -> None:
        raise RuntimeError("the application's bug")

    if why == "an error":
        notes.on_initialize = refuse
    elif why == "a crash":
        notes.on_initialize = crash
    else:
        notes.after_initialize = refuse_by_value if why == "an error by value" else another_version
    async with (
        instance(store, notes, json_response=json_response) as deployed,
        instance(other_store, json_response=json_response) as old,
    ):
        for _ in range(2):
            answer = await deployed.client(session_id).ping()
            assert answer.status == 404
            assert answer.session_id is None
        await until(lambda: not stopping_in(deployed.manager))
        deployed.assert_seats_match()
        assert notes.initialized == []
        assert await store.record(session_id) == before
        assert (await old.client(session_id).ping()).status == 200


async def test_a_replay_that_hangs_fails_the_requests(store: FaultyStore, json_response: bool) -> None:
    session_id = await open_session(store)
    before = await store.record(session_id)
    notes = Notes()
    _, proceed = gate(notes)
    async with instance(store, notes, json_response=json_response, replay_timeout=0.05) as one:
        client = one.client(session_id)
        exchanges = [client.open_request("ping") for _ in range(5)]
        answers = [await exchange.answer() for exchange in exchanges]
        for answer in answers:
            assert_not_handled(answer)
        await until(lambda: not stopping_in(one.manager))
        one.assert_seats_match()
        assert await store.record(session_id) == before
        proceed.set()
        assert (await client.ping()).status == 200


@pytest.mark.parametrize("what", ["the handler", "its clean-up"])
async def test_a_replay_that_hangs_and_does_not_let_itself_be_cancelled_fails_the_request(
    store: FaultyStore, what: str
) -> None:
    session_id = await open_session(store)
    notes = Notes()
    proceed = anyio.Event()

    async def hang(ctx: RequestContext) -> None:
        if what == "the handler":
            # As a call that runs in a thread does.
            with anyio.CancelScope(shield=True):
                await proceed.wait()
        exit_stack_of(ctx).push_async_callback(proceed.wait)
        await proceed.wait()

    notes.on_initialize = hang
    async with instance(store, notes, replay_timeout=0.05) as one:
        exchange = one.client(session_id).open_request("ping")
        try:
            assert_not_handled(await exchange.answer())
        finally:
            proceed.set()
        await until(lambda: not stopping_in(one.manager))
        one.assert_seats_match()
        assert (await one.client(session_id).ping()).status == 200


async def test_a_server_loop_that_ends_while_the_claim_runs_fails_the_request(
    store: FaultyStore, json_response: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    session_id = await open_session(store)
    store.claims_first = True
    genuine = JSONRPCDispatcher.run
    crash = anyio.Event()

    async def crashing(*arguments: Any, **settings: Any) -> None:
        async def fail() -> None:
            await crash.wait()
            raise RuntimeError("a bug")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(fail)
            await genuine(*arguments, **settings)

    async with instance(store, json_response=json_response) as one:
        client = one.client(session_id)
        with monkeypatch.context() as patch:
            patch.setattr(JSONRPCDispatcher, "run", crashing)
            claim = store.hold("claim")
            exchange = client.open_request("ping")
            await claim.wait_entered()
            crash.set()
            await until(lambda: registry_of(one.manager).reserved == 0)
            claim.release()
            assert_not_handled(await exchange.answer())
        one.assert_seats_match()
        assert (await client.ping()).status == 200


async def test_a_server_loop_that_crashes_during_the_replay_fails_the_request(
    store: FaultyStore, json_response: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    session_id = await open_session(store)

    async def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug")

    async with instance(store, json_response=json_response) as one:
        with monkeypatch.context() as patch:
            patch.setattr(JSONRPCDispatcher, "run", broken)
            answer = await one.client(session_id).ping()
        # 404 would make the client give up a session that is there.
        assert_not_handled(answer)
        one.assert_seats_match()
        assert (await one.client(session_id).ping()).status == 200


@pytest.mark.parametrize("fault", ["down", "bug", "lost"])
@pytest.mark.parametrize("operation", ["load", "claim"])
async def test_a_store_that_fails_during_a_restore_fails_the_requests(
    store: FaultyStore, json_response: bool, operation: str, fault: str
) -> None:
    session_id = await open_session(store)
    store.claims_first = operation == "claim"
    async with instance(store, json_response=json_response) as one:
        client = one.client(session_id)
        {"down": store.down, "bug": store.broken, "lost": store.lose_the_answer_of}[fault](operation)
        exchanges: list[Exchange] = [client.open_request("ping") for _ in range(3)]
        stream = client.open("GET")
        for exchange in exchanges:
            assert_not_handled(await exchange.answer())
        assert_unavailable(await stream.answer())
        await until(lambda: not stopping_in(one.manager))
        assert one.residents == 0
        one.assert_seats_match()
        store.up()
        assert (await client.call("add", {"a": 1, "b": 2})).text == "3"


async def test_a_session_that_ends_elsewhere_while_it_is_restored_is_answered_404(
    store: FaultyStore, other_store: FaultyStore
) -> None:
    session_id = await open_session(store)
    notes = Notes()
    reached, proceed = gate(notes)
    async with instance(store, notes) as one, instance(other_store) as two:
        exchange = one.client(session_id).open_request("ping")
        await wait_for(reached)
        assert (await two.client(session_id).delete()).status == 200
        await until(lambda: registry_of(one.manager).restores[session_id].interest.ended)
        proceed.set()
        assert (await exchange.answer()).status == 404
        await until(lambda: not stopping_in(one.manager))
        assert one.residents == 0
        one.assert_seats_match()


async def test_a_session_that_is_initialized_again_elsewhere_while_it_is_restored_is_restored_as_it_then_is(
    store: FaultyStore, other_store: FaultyStore
) -> None:
    session_id = await open_session(store)
    notes = Notes()
    reached, proceed = gate(notes)
    async with instance(store, notes) as one, instance(other_store) as two:
        exchange = one.client(session_id).open_call("client")
        await wait_for(reached)
        newer = {**INITIALIZE_PARAMS, "clientInfo": {"name": "newer", "version": "2"}}
        assert (await two.client(session_id).initialize(newer)).status == 200
        await until(lambda: registry_of(one.manager).restores[session_id].interest.stale_since > 0)
        proceed.set()
        told = json.loads((await exchange.answer()).text)
        assert told["params"]["clientInfo"]["name"] == "newer"
        assert len(notes.replayed("initialize")) == 2
        await until(lambda: not stopping_in(one.manager))
        one.assert_seats_match()


async def await_something_cancelled(*_: object) -> None:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    future.cancel()
    await future


@pytest.mark.parametrize("where", ["hook", "initialize"])
async def test_what_the_application_cancels_ends_the_restore_and_nothing_else(store: FaultyStore, where: str) -> None:
    notes = Notes()
    session_id = await open_session(store)
    hook = await_something_cancelled if where == "hook" else None
    async with instance(store, notes, on_restore=hook) as one:
        other = one.client()
        await other.handshake()
        if where == "initialize":
            notes.on_initialize = await_something_cancelled
        assert_not_handled(await one.client(session_id).ping())
        assert (await other.ping()).status == 200


@pytest.mark.parametrize("stale", [False, True])
async def test_a_restore_whose_client_has_left_leaves_no_copy_that_cannot_be_evicted(
    store: FaultyStore, stale: bool
) -> None:
    session_id = await open_session(store)
    store.claims_first = True
    async with instance(store, max_sessions=1) as one:
        held = store.hold("claim")
        exchange = one.client(session_id).open_request("ping")
        await held.wait_entered()
        if stale:
            registry_of(one.manager).restores[session_id].interest.stale_since = 1
        exchange.cancel()
        await exchange.end()
        held.release()
        await until(lambda: not registry_of(one.manager).restores)
        assert (registry_of(one.manager).get(session_id) is None) == stale
        assert (await one.client().initialize()).status == 200
        assert registry_of(one.manager).get(session_id) is None


async def test_expired_sessions_are_unknown(store: FaultyStore) -> None:
    async with instance(store) as gone:
        answer = await gone.client().initialize()
        session_id = answer.session_id
        assert session_id is not None
    async with instance(store) as one:
        store.inner.ahead = timedelta(minutes=11)  # type: ignore[attr-defined]
        unknown = await one.client("0" * 32).ping()
        assert (await one.client(session_id).ping()).body == unknown.body
        assert unknown.status == 404
        assert one.notes.seen == []


async def test_sessions_of_another_namespace_are_unknown(store: FaultyStore) -> None:
    session_id = await open_session(store)
    async with instance(MemorySessionStore(namespace="other", shared_with=store.inner)) as one:
        assert (await one.client(session_id).ping()).status == 404
        assert (await one.client(session_id).delete()).status == 404
    assert await store.record(session_id) is not None


async def test_a_restore_during_shutdown_is_answered(store: FaultyStore) -> None:
    session_id = await open_session(store)
    notes = Notes()
    reached, _ = gate(notes)
    async with anyio.create_task_group() as outside:
        async with instance(store, notes) as one:
            client = Client(one.app, outside, session_id=session_id)
            exchange = client.open_request("ping")
            await wait_for(reached)
        assert_not_handled(await exchange.answer())
    record = await store.record(session_id)
    assert record is not None
    assert record.restores == 0


# on_restore


async def test_the_hook_sees_the_marker_and_the_record_before_the_replay(store: FaultyStore) -> None:
    session_id = await open_session(store)
    told: list[tuple[SessionRestoreMarker, SessionRecord, int]] = []
    notes = Notes()

    async def on_restore(marker: SessionRestoreMarker, record: SessionRecord) -> None:
        told.append((marker, record, len(notes.seen)))

    before = await store.record(session_id)
    async with instance(store, notes, on_restore=on_restore) as one:
        assert (await one.client(session_id).ping()).status == 200
        ((marker, record, seen),) = told
        assert seen == 0
        assert record == before
        assert marker.session_id == session_id
        assert marker.replaying
        assert marker.restores == 1
        assert marker.previous_instance == record.instance_hint != one.manager.instance
        assert marker.created_at == record.created_at
        assert (await one.client(session_id).ping()).status == 200
        assert len(told) == 1
        assert (await one.client().initialize()).status == 200
        assert len(told) == 1


async def test_a_session_that_the_application_refuses_is_over(store: FaultyStore, other_store: FaultyStore) -> None:
    session_id = await open_session(store)
    ended: list[Any] = []

    async def refuse(_marker: SessionRestoreMarker, _record: SessionRecord) -> None:
        raise RestoreRefused("not any more")

    async def on_end(*told: Any) -> None:
        ended.append(told)

    async with instance(store, on_restore=refuse, on_end=on_end) as one, instance(other_store) as two:
        unknown = await one.client("0" * 32).ping()
        answer = await one.client(session_id).ping()
        assert (answer.status, answer.body) == (404, unknown.body)
        assert await store.ended(session_id) is EndReason.REFUSED
        assert one.notes.seen == []
        one.assert_seats_match()
        assert (await two.client(session_id).ping()).status == 404
        assert ended == []


async def test_the_hook_and_replayed_messages_see_the_request_that_began_the_restore(store: FaultyStore) -> None:
    session_id = await open_session(store)
    told: list[Request | None] = []

    async def on_restore(marker: SessionRestoreMarker, _record: SessionRecord) -> None:
        told.append(marker.request)

    async with instance(store, on_restore=on_restore) as one:
        client = one.client(session_id, headers={"x-user": "alice"}, address="10.1.2.3")
        assert (await client.get_stream()).status == 200
        assert (await client.ping()).status == 200
        (request,) = told
        assert request is not None
        assert (request.method, request.headers["x-user"]) == ("GET", "alice")
        assert request.client is not None
        assert request.client.host == "10.1.2.3"
        with pytest.raises(RuntimeError):
            await request.body()
        # The copy keeps no request for as long as it lives.
        markers = [(seen.method, seen.marker.request) for seen in one.notes.seen if seen.marker is not None]
        assert markers == [("initialize", request), ("notifications/initialized", request), ("ping", None)]


async def test_a_hook_refuses_one_request_and_none_of_those_that_wait_with_it(store: FaultyStore) -> None:
    session_id = await open_session(store)
    asked, proceed = anyio.Event(), anyio.Event()

    async def on_restore(marker: SessionRestoreMarker, _record: SessionRecord) -> None:
        assert marker.request is not None
        if marker.request.headers["x-user"] != "alice":
            asked.set()
            await proceed.wait()
            raise RestoreRefused(ends_session=False)

    async with instance(store, on_restore=on_restore) as one:
        alice, bob = (one.client(session_id, headers={"x-user": name}) for name in ("alice", "bob"))
        refused = bob.open_request("ping")
        await wait_for(asked)
        waiting = alice.open_request("ping")
        (restore,) = registry_of(one.manager).restores.values()
        await until(lambda: restore.waiters == 2)
        proceed.set()
        unknown = await one.client("0" * 32).ping()
        assert seen_by_a_client(await refused.answer()) == seen_by_a_client(unknown)
        assert (await waiting.answer()).status == 200
        one.assert_seats_match()
    assert await store.ended(session_id) is None


async def test_a_request_waits_for_the_restores_of_three_refused_ones_at_most(store: FaultyStore) -> None:
    session_id = await open_session(store)
    waiting = [5, 4, 3]

    async def on_restore(_marker: SessionRestoreMarker, _record: SessionRecord) -> None:
        expected = waiting.pop(0)
        restores = registry_of(one.manager).restores
        await until(lambda: restores[session_id].waiters == expected)
        raise RestoreRefused(ends_session=False)

    async with instance(store, on_restore=on_restore) as one:
        exchanges = [one.client(session_id).open_request("ping") for _ in range(5)]
        answers = [await exchange.answer() for exchange in exchanges]
        assert [answer.status for answer in answers].count(404) == 3
        for answer in answers:
            if answer.status != 404:
                assert_not_handled(answer)
    assert await store.ended(session_id) is None


@pytest.mark.parametrize("way", ["bug", "hang", "refusal that cannot be stored"])
async def test_a_hook_that_does_not_decide_fails_the_request(
    store: FaultyStore, other_store: FaultyStore, way: str
) -> None:
    session_id = await open_session(store)

    async def on_restore(_marker: SessionRestoreMarker, _record: SessionRecord) -> None:
        if way == "bug":
            raise RuntimeError("the application's bug")
        if way == "hang":
            await anyio.sleep_forever()
        raise RestoreRefused

    async with (
        instance(store, on_restore=on_restore, replay_timeout=0.05) as one,
        instance(other_store) as two,
    ):
        store.down("end")
        answer = await one.client(session_id).ping()
        assert_not_handled(answer)
        one.assert_seats_match()
        assert (await two.client(session_id).ping()).status == 200


# The request that caused it


current: contextvars.ContextVar[str] = contextvars.ContextVar("current", default="nothing")


async def test_the_replay_carries_the_headers_the_user_and_the_address_of_the_request_that_caused_it(
    store: FaultyStore, json_response: bool
) -> None:
    alice = principal("alice")
    session_id = await open_session(store, user=alice)
    async with instance(store, json_response=json_response) as one:
        client = one.client(session_id, user=alice, address="10.1.2.3", headers={"x-tenant": "blue"})
        stream = await client.get_stream()
        assert stream.status == 200
        for seen in (*one.notes.replayed("initialize"), *one.notes.replayed("notifications/initialized")):
            assert seen.request.method == "POST"
            assert seen.request.headers["x-tenant"] == "blue"
            assert seen.request.headers["mcp-session-id"] == session_id
            assert seen.request.user is alice
            assert seen.request.client.host == "10.1.2.3"
            assert seen.request.headers["content-type"] == "application/json"
        assert len(one.notes.replayed("notifications/initialized")) == 1


async def test_handlers_find_the_context_variables_of_the_request_that_caused_the_replay(store: FaultyStore) -> None:
    alice = principal("alice")
    session_id = await open_session(store, user=alice)
    notes = Notes()
    told: list[tuple[str, str, str | None]] = []

    def tell(ctx: RequestContext) -> None:
        token = get_access_token()
        told.append((ctx.method, current.get(), None if token is None else token.client_id))

    notes.on_message = tell
    async with instance(store, notes) as one:

        async def outer(scope: Scope, receive: Receive, send: Send) -> None:
            current.set(scope["client"][0])
            await AuthContextMiddleware(one.app)(scope, receive, send)

        await Client(outer, one.tasks, session_id=session_id, user=alice, address="10.0.0.1").ping()
        await Client(outer, one.tasks, session_id=session_id, user=alice, address="10.0.0.2").ping()
        assert told == [
            ("initialize", "10.0.0.1", "alice"),
            ("notifications/initialized", "10.0.0.1", "alice"),
            ("ping", "10.0.0.1", "alice"),
            ("ping", "10.0.0.2", "alice"),
        ]


async def test_a_spray_of_unknown_ids_leaves_nothing_in_memory(store: FaultyStore) -> None:
    async with instance(store) as one:
        exchanges = [one.client(f"{n:032x}").open_request("ping") for n in range(200)]
        assert {(await exchange.answer()).status for exchange in exchanges} == {404}
        assert one.notes.seen == []
        assert store.counts() == {"open": 1, "load": 200}
        assert registry_of(one.manager).restores == {}
        assert_empty(one)


def assert_empty(one: Instance) -> None:
    assert one.residents == 0
    one.assert_seats_match()
