"""Journaled calls: what they set is committed before they are answered, and set again by a restore."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import anyio
import mcp_types as types
import pytest
from mcp.shared.exceptions import MCPError

from mcp_session_store import ConfigurationError, DurableSessionManager, EndReason, get_restore_marker, session_key
from mcp_session_store.adapter.replay.journal import MAX_PARAMS, MAX_SUBJECT, Journal, JournaledMethod
from mcp_session_store.memory import sessions as memory_module
from tests.support.asgi import until
from tests.support.http import INITIALIZE_PARAMS, assert_not_handled
from tests.support.instances import Notes, instance, wait_for
from tests.support.internals import changes_of, registry_of, resident_of, stopping_in
from tests.support.stateful import Stateful, set_level, subscribe

if TYPE_CHECKING:
    from tests.support.faulty_stores import FaultyStore
    from tests.support.instances import Instance, RequestContext

pytestmark = pytest.mark.anyio

LONG = 3600.0
"""Seconds within which changes are learned of: too long for a test to wait for."""

PINNING = JournaledMethod(method="notes/pin", subject="note", undone_by="notes/unpin")
THEME = JournaledMethod(method="notes/theme")


async def rows(store: FaultyStore, session_id: str) -> list[tuple[str, str, Any]]:
    return [
        (entry.method, entry.subject, json.loads(entry.params))
        for entry in await store.inner.read_journal(session_key(session_id))
    ]


async def revision(store: FaultyStore, session_id: str) -> int:
    record = await store.record(session_id)
    assert record is not None
    return record.revision


def resident_revision(one: Instance) -> int:
    (session,) = registry_of(one.manager)
    assert session.record is not None
    return session.record.revision


# Restored


async def test_the_last_level_and_the_standing_subscriptions_are_restored(
    store: FaultyStore, other_store: FaultyStore, json_response: bool
) -> None:
    async with instance(store, Stateful(), json_response=json_response) as one:
        client = one.client()
        session_id = await client.handshake()
        await set_level(client, "debug")
        for uri in ("notes://1", "notes://2", "notes://3"):
            await subscribe(client, uri)
        await subscribe(client, "notes://2", un=True)
        await set_level(client, "error")
        await client.call("add", {"a": 1, "b": 2})
    notes = Stateful()
    async with instance(other_store, notes, json_response=json_response) as two:
        client = two.client(session_id)
        answer = await client.call("add", {"a": 1, "b": 2})
        assert answer.text == "3"
        assert [message.get("id") for message in answer.messages] == [client._last_id]
        assert notes.set_again == [
            ("resources/subscribe", "notes://1"),
            ("resources/subscribe", "notes://3"),
            ("logging/setLevel", "error"),
        ]
        assert [seen.method for seen in notes.seen] == [
            "initialize",
            "notifications/initialized",
            "resources/subscribe",
            "resources/subscribe",
            "logging/setLevel",
            "tools/call",
        ]
        # What is restored stands: it is neither journaled again, nor lost by another restore.
        assert other_store.counts()["write_journal"] == 0
        assert resident_revision(two) == await revision(store, session_id) == 6
        await two.terminate(session_id)
        await client.ping()
        assert len(notes.set_again) == 6


async def test_a_subscription_that_is_renewed_moves_to_the_end_and_stands_once(store: FaultyStore) -> None:
    async with instance(store, Stateful()) as one:
        client = one.client()
        session_id = await client.handshake()
        for uri in ("notes://1", "notes://2", "notes://1"):
            await subscribe(client, uri)
        assert [subject for _, subject, _ in await rows(store, session_id)] == ["notes://2", "notes://1"]


async def test_replayed_calls_carry_the_marker_and_nothing_of_them_reaches_the_client(
    store: FaultyStore, other_store: FaultyStore, json_response: bool
) -> None:
    async with instance(store, Stateful()) as one:
        client = one.client()
        session_id = await client.handshake()
        await subscribe(client, "notes://1")
    notes = Stateful()

    async def tell(ctx: RequestContext) -> None:
        marker = get_restore_marker(ctx)
        assert marker is not None
        assert marker.replaying
        assert marker.session_id == session_id
        await ctx.session.send_notification(types.ToolListChangedNotification(), related_request_id=ctx.request_id)

    notes.on_state = tell
    async with instance(other_store, notes, json_response=json_response) as two:
        client = two.client(session_id)
        stream = await client.get_stream()
        assert (await client.ping()).messages == [{"jsonrpc": "2.0", "id": 1, "result": {}}]
        assert notes.set_again == [("resources/subscribe", "notes://1")]
        await anyio.wait_all_tasks_blocked()
        assert stream.messages == []


async def test_each_replayed_call_waits_for_the_one_before_and_the_client_for_all(
    store: FaultyStore, other_store: FaultyStore
) -> None:
    async with instance(store, Stateful()) as one:
        client = one.client()
        session_id = await client.handshake()
        await subscribe(client, "notes://1")
        await set_level(client, "info")
    notes = Stateful()
    gates = [anyio.Event(), anyio.Event()]
    initialized = anyio.Event()

    async def wait(_ctx: RequestContext) -> None:
        await gates[len(notes.handled)].wait()

    async def wait_too(_ctx: RequestContext) -> None:
        await initialized.wait()

    notes.on_state, notes.on_initialized = wait, wait_too
    async with instance(other_store, notes) as two:
        call = two.client(session_id).open_call("add", {"a": 1, "b": 2})
        await until(lambda: notes.initialized != [])
        await anyio.wait_all_tasks_blocked()
        assert notes.began == []
        initialized.set()
        await until(lambda: notes.began == ["resources/subscribe"])
        await anyio.wait_all_tasks_blocked()
        assert notes.began == ["resources/subscribe"]
        gates[0].set()
        await until(lambda: len(notes.began) == 2)
        await anyio.wait_all_tasks_blocked()
        assert two.residents == 0
        assert call.sent == []
        gates[1].set()
        assert (await call.answer()).text == "3"


async def test_the_journal_is_replayed_when_the_notifications_handler_asks_the_client(
    store: FaultyStore, other_store: FaultyStore
) -> None:
    async with instance(store, Stateful()) as one:
        client = one.client()
        session_id = await client.handshake({**INITIALIZE_PARAMS, "capabilities": {"roots": {}}})
        await set_level(client, "debug")
    notes = Stateful()
    roots: list[Any] = []

    async def ask(ctx: RequestContext) -> None:
        roots.append(await ctx.session.send_request(types.ListRootsRequest(), types.ListRootsResult))

    notes.on_initialized = ask
    async with instance(other_store, notes) as two:
        client = two.client(session_id)
        stream = await client.get_stream()
        assert notes.set_again == [("logging/setLevel", "debug")]
        question = await stream.next()
        assert (await client.respond(question["id"], {"roots": []})).status == 202
        await until(lambda: roots != [])


async def test_without_journaled_calls_a_restore_reads_no_journal(store: FaultyStore, other_store: FaultyStore) -> None:
    async with instance(store) as one:
        session_id = await one.client().handshake()
    async with instance(other_store) as two:
        assert (await two.client(session_id).ping()).status == 200
        assert other_store.counts()["read_journal"] == 0


# Committed before it is answered


async def test_a_journaled_call_is_answered_when_it_is_committed(store: FaultyStore, json_response: bool) -> None:
    notes = Stateful()
    async with instance(store, notes, json_response=json_response) as one:
        client = one.client()
        session_id = await client.handshake()
        held = store.hold("write_journal")
        call = client.open_request("resources/subscribe", {"uri": "notes://1"})
        await held.wait_entered()
        await anyio.wait_all_tasks_blocked()
        assert notes.handled == [("resources/subscribe", "notes://1", False)]
        assert call.body == b"" or call.messages == []
        # It holds up nobody else.
        assert (await client.ping()).status == 200
        held.release()
        assert (await call.answer()).result == {}
        assert await rows(store, session_id) == [("resources/subscribe", "notes://1", {"uri": "notes://1"})]
        assert await revision(store, session_id) == resident_revision(one) == 1


@pytest.mark.parametrize("fault", ["down", "broken", "lose_the_answer_of"])
async def test_a_call_that_cannot_be_journaled_is_answered_by_an_error(
    store: FaultyStore, json_response: bool, fault: str
) -> None:
    async with instance(store, Stateful(), json_response=json_response) as one:
        client = one.client()
        session_id = await client.handshake()
        getattr(store, fault)("write_journal")
        answer = await client.request("logging/setLevel", {"level": "debug"})
        assert answer.status == 200
        assert answer.error["code"] == types.INTERNAL_ERROR
        assert "try again later" in answer.error["message"]
        store.up()
        # The session goes on, and so does its journal.
        await set_level(client, "info")
        assert await rows(store, session_id) == [("logging/setLevel", "", {"level": "info"})]
        assert (await client.ping()).status == 200


async def test_a_journaled_call_in_a_session_that_has_ended_is_answered_by_an_error_and_404_follows(
    store: FaultyStore, other_store: FaultyStore, json_response: bool
) -> None:
    store.hints = False
    ends: list[EndReason] = []

    async def on_end(_record: Any, reason: EndReason) -> None:
        ends.append(reason)

    async with instance(store, Stateful(), json_response=json_response, end_within=LONG, on_end=on_end) as one:
        await one.first_poll()
        client = one.client()
        session_id = await client.handshake()
        await other_store.end(session_key(session_id), reason=EndReason.OPERATOR)
        answer = await client.request("logging/setLevel", {"level": "debug"})
        assert answer.error["message"] in ("Session not found", "Session ended")
        assert (await client.ping()).status == 404
        await changes_of(one.manager).poll()
        await until(lambda: stopping_in(one.manager) == {})
        one.assert_seats_match()
        await until(lambda: ends != [])
    assert ends == [EndReason.OPERATOR]


@pytest.mark.parametrize("failure", ["MCPError", "bug", "ErrorData", "no handler", "params"])
async def test_a_call_that_is_answered_by_an_error_is_not_journaled(store: FaultyStore, failure: str) -> None:
    notes = Stateful()

    async def fail(_ctx: RequestContext) -> None:
        if failure == "MCPError":
            raise MCPError(code=-32001, message="no")
        raise RuntimeError("the application's bug")

    async def refuse(ctx: RequestContext, call_next: Any) -> Any:
        if ctx.method == "logging/setLevel":
            return types.ErrorData(code=-32001, message="no")
        return await call_next(ctx)

    if failure in ("MCPError", "bug"):
        notes.on_state = fail
    elif failure == "ErrorData":
        notes.server.middleware.append(refuse)
    elif failure == "no handler":
        del notes.server._request_handlers["logging/setLevel"]
    async with instance(store, notes) as one:
        client = one.client()
        session_id = await client.handshake()
        params = {"level": 1} if failure == "params" else {"level": "debug"}
        answer = await client.request("logging/setLevel", params)
        assert answer.error
        assert store.counts()["write_journal"] == 0
        assert await revision(store, session_id) == 0


async def test_params_that_cannot_be_stored_are_refused_before_the_handler_runs(
    store: FaultyStore, json_response: bool
) -> None:
    notes = Stateful()
    async with instance(store, notes, json_response=json_response, journaled_methods=[PINNING]) as one:
        client = one.client()
        await client.handshake()
        at_most = await client.request("notes/pin", {"note": "n" * (MAX_PARAMS - len('{"note":""}'))})
        assert at_most.result == {}
        too_long = await client.request("notes/pin", {"note": "n" * (MAX_PARAMS - len('{"note":""}') + 1)})
        assert too_long.error["code"] == types.INVALID_PARAMS
        assert str(MAX_PARAMS) in too_long.error["message"]
        body = b'{"jsonrpc": "2.0", "id": 99, "method": "notes/pin", "params": {"note": 1e999}}'
        not_finite = await client.post(body)
        assert not_finite.error["code"] == types.INVALID_PARAMS
        assert "notes/pin" in not_finite.error["message"]
        assert len(notes.handled) == 1
        assert store.counts()["write_journal"] == 1


async def test_a_journal_that_is_full_is_an_error_and_undoing_makes_room(
    store: FaultyStore, json_response: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(memory_module, "MAX_JOURNAL_ENTRIES", 3)
    async with instance(store, Stateful(), json_response=json_response) as one:
        client = one.client()
        session_id = await client.handshake()
        for n in range(3):
            await subscribe(client, f"notes://{n}")
        answer = await client.request("resources/subscribe", {"uri": "notes://3"})
        assert answer.error["code"] == types.INVALID_REQUEST
        assert "3 journaled calls" in answer.error["message"]
        # It is the client's doing, and nothing for the operator.
        assert not [record for record in caplog.records if record.name.startswith("mcp_session_store")]
        await subscribe(client, "notes://1")
        await subscribe(client, "notes://0", un=True)
        await subscribe(client, "notes://3")
        assert [subject for _, subject, _ in await rows(store, session_id)] == ["notes://2", "notes://1", "notes://3"]


async def test_notifications_of_a_journaled_method_are_not_journaled(store: FaultyStore) -> None:
    async with instance(store, Stateful()) as one:
        client = one.client()
        await client.handshake()
        await client.notify("logging/setLevel", {"level": "debug"})
        await client.ping()
        await until(lambda: not resident_of(one.manager, str(client.session_id)).busy)
        assert store.counts()["write_journal"] == 0


# Custom methods


async def test_methods_of_the_applications_own_are_journaled(
    store: FaultyStore, other_store: FaultyStore, json_response: bool
) -> None:
    methods = [PINNING, THEME]
    async with instance(store, Stateful(), json_response=json_response, journaled_methods=methods) as one:
        client = one.client()
        session_id = await client.handshake()
        for method, params in (
            ("notes/theme", {"theme": "dark"}),
            ("notes/pin", {"note": "a"}),
            ("notes/pin", {"note": {"id": 1, "of": "b"}}),
            ("notes/pin", {"note": "c", "color": "red"}),
            ("notes/unpin", {"note": "a", "why": "done"}),
            ("notes/unpin", {"note": "never pinned"}),
            ("notes/pin", {"note": "c", "color": "blue"}),
            ("notes/theme", {"theme": "light"}),
        ):
            assert (await client.request(method, params)).result == {}
    notes = Stateful()
    async with instance(other_store, notes, json_response=json_response, journaled_methods=methods) as two:
        client = two.client(session_id)
        await client.ping()
        assert [about for _, about in notes.set_again] == ["{'id': 1, 'of': 'b'}", "c", "light"]
        (pinned,) = [seen for seen in notes.replayed("notes/pin") if (seen.params or {}).get("note") == "c"]
        assert (pinned.params or {})["color"] == "blue"
        assert (await client.request("notes/unpin", {"note": {"of": "b", "id": 1}})).result == {}
        assert [(method, subject) for method, subject, _ in await rows(store, session_id)] == [
            ("notes/pin", "c"),
            ("notes/theme", ""),
        ]


async def test_methods_that_nobody_named_are_not_journaled(store: FaultyStore) -> None:
    async with instance(store, Stateful()) as one:
        client = one.client()
        await client.handshake()
        assert (await client.request("notes/pin", {"note": "a"})).result == {}
        assert store.counts()["write_journal"] == 0


def test_subjects_are_told_apart_and_kept_short() -> None:
    journal = Journal([PINNING])

    def subject(value: Any) -> str:
        return journal.write("notes/pin", {"note": value}).subject

    values: list[Any] = ["a", "null", "=null", None, 1, "1", True, [1], "[1]", {"a": 1}, "", "\u0000", "\ud800", "ä"]
    values += ["n" * MAX_SUBJECT, "n" * (MAX_SUBJECT + 1), "m" * (MAX_SUBJECT + 1)]
    subjects = [subject(value) for value in values]
    assert len(set(subjects)) == len(values)
    assert subjects[0] == "a"
    assert subject("n" * MAX_SUBJECT) == "n" * MAX_SUBJECT
    for text in subjects:
        assert len(text) <= MAX_SUBJECT
        assert text.isascii()
        assert "\x00" not in text
    assert journal.write("notes/pin", None).subject == journal.write("notes/pin", {}).subject == subject(None)
    assert journal.write("notes/unpin", {"note": "a"}) == journal.write("notes/unpin", {"note": "a", "b": 1})
    assert journal.write("notes/unpin", {"note": "a"}).method == "notes/pin"
    assert journal.write("notes/unpin", {"note": "a"}).params is None


@pytest.mark.parametrize(
    "methods",
    [
        [JournaledMethod(method="initialize")],
        [JournaledMethod(method="a", undone_by="initialize")],
        [JournaledMethod(method="logging/setLevel")],
        [JournaledMethod(method="resources/unsubscribe")],
        [JournaledMethod(method="a", undone_by="logging/setLevel")],
        [JournaledMethod(method="a"), JournaledMethod(method="a", subject="b")],
        [JournaledMethod(method="a", undone_by="a")],
        ["notes/pin"],
    ],
    ids=repr,
)
def test_methods_that_cannot_be_journaled_are_refused(store: FaultyStore, methods: Any) -> None:
    with pytest.raises(ConfigurationError, match="journaled_methods"):
        DurableSessionManager(Notes().server, store, journaled_methods=methods)


# When a replay fails


@pytest.mark.parametrize("failure", ["error", "no handler"])
async def test_a_replayed_call_that_is_answered_by_an_error_is_logged_and_skipped(
    store: FaultyStore, other_store: FaultyStore, failure: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with instance(store, Stateful()) as one:
        client = one.client()
        session_id = await client.handshake()
        await subscribe(client, "notes://secret")
        await set_level(client, "debug")
    notes = Stateful()

    async def fail(ctx: RequestContext) -> None:
        if ctx.method == "resources/subscribe":
            raise RuntimeError("the application's bug")

    if failure == "error":
        notes.on_state = fail
    else:
        del notes.server._request_handlers["resources/subscribe"]
    async with instance(other_store, notes) as two:
        client = two.client(session_id)
        assert (await client.ping()).status == 200
        assert notes.set_again == [("logging/setLevel", "debug")]
        ours = [record.getMessage() for record in caplog.records if "mcp_session_store" in record.name]
        key = str(session_key(session_id))
        assert any("resources/subscribe" in text and key in text for text in ours)
        assert not any("secret" in text for text in ours)
        # The record stays: another instance may be able to.
        assert len(await rows(store, session_id)) == 2


async def test_a_replayed_call_that_hangs_keeps_no_session_from_coming_back(
    store: FaultyStore, other_store: FaultyStore, json_response: bool
) -> None:
    async with instance(store, Stateful()) as one:
        client = one.client()
        session_id = await client.handshake()
        await set_level(client, "debug")
        for uri in ("notes://1", "notes://2"):
            await subscribe(client, uri)
    notes = Stateful()
    proceed = anyio.Event()

    async def hang(ctx: RequestContext) -> None:
        if ctx.method == "logging/setLevel":
            await proceed.wait()
            await ctx.session.send_notification(types.ToolListChangedNotification(), related_request_id=ctx.request_id)

    notes.on_state = hang
    async with instance(other_store, notes, json_response=json_response, replay_timeout=0.5) as two:
        client = two.client(session_id)
        stream = await client.get_stream()
        assert (await client.call("add", {"a": 1, "b": 2})).text == "3"
        # The others are replayed all the same.
        assert notes.set_again == [("resources/subscribe", "notes://1"), ("resources/subscribe", "notes://2")]
        proceed.set()
        await until(lambda: len(notes.set_again) == 3)
        # The late answer, and what came with it, is nothing for the client.
        assert (await client.ping()).result == {}
        await until(lambda: not any(session.in_flight for session in registry_of(two.manager)))
        assert stream.messages == []
        # All that was replayed was known to be.
        assert other_store.counts()["write_journal"] == 0
        stream.disconnect()
        await stream.end()
        two.assert_seats_match()


async def test_a_slow_journal_is_replayed_within_the_bound(store: FaultyStore, other_store: FaultyStore) -> None:
    async with instance(store, Stateful()) as one:
        client = one.client()
        session_id = await client.handshake()
        for n in range(20):
            await subscribe(client, f"notes://{n}")
    notes = Stateful()
    proceed = anyio.Event()

    async def hang(_ctx: RequestContext) -> None:
        await proceed.wait()

    notes.on_state = hang
    async with instance(other_store, notes, replay_timeout=0.5) as two:
        client = two.client(session_id)
        assert (await client.ping()).status == 200
        await until(lambda: len(notes.began) == 20)
        proceed.set()
        await until(lambda: len(notes.set_again) == 20)
        await subscribe(client, "notes://20")
        assert resident_revision(two) == 21
        assert other_store.counts()["write_journal"] == 1


async def test_a_journaled_call_ends_with_its_session_though_nobody_can_tell_why_it_ended(
    store: FaultyStore, other_store: FaultyStore, json_response: bool
) -> None:
    store.hints = False
    ends: list[EndReason] = []

    async def on_end(_record: Any, reason: EndReason) -> None:
        ends.append(reason)

    async with instance(store, Stateful(), json_response=json_response, end_within=LONG, on_end=on_end) as one:
        await one.first_poll()
        client = one.client()
        session_id = await client.handshake()
        await other_store.end(session_key(session_id), reason=EndReason.OPERATOR)
        store.down("changes")
        answer = await client.request("logging/setLevel", {"level": "debug"})
        assert answer.error["message"] in ("Session not found", "Session ended")
        assert (await client.ping()).status == 404
        await until(lambda: ends != [])
        one.assert_seats_match()


@pytest.mark.parametrize("fault", ["down", "broken"])
async def test_a_restore_whose_journal_cannot_be_read_fails_the_request(
    store: FaultyStore, other_store: FaultyStore, fault: str
) -> None:
    async with instance(store, Stateful()) as one:
        client = one.client()
        session_id = await client.handshake()
        await set_level(client, "debug")
    async with instance(other_store, Stateful()) as two:
        getattr(other_store, fault)("read_journal")
        assert_not_handled(await two.client(session_id).ping())
        two.assert_seats_match()
        other_store.up()
        assert (await two.client(session_id).ping()).status == 200


# Copies on several instances


async def test_an_idle_copy_with_an_older_revision_is_evicted_and_restored_with_all(
    store: FaultyStore, other_store: FaultyStore
) -> None:
    notes = Stateful()
    ends: list[Any] = []

    async def on_end(*told: Any) -> None:
        ends.append(told)

    async with (
        instance(store, notes, end_within=LONG, relay=False, on_end=on_end) as one,
        instance(other_store, Stateful(), end_within=LONG, relay=False) as two,
    ):
        await one.first_poll()
        client = one.client()
        session_id = await client.handshake()
        await subscribe(two.client(session_id), "notes://1")
        await until(lambda: one.residents == 0)
        one.assert_seats_match()
        assert (await client.ping()).status == 200
        assert notes.set_again == [("resources/subscribe", "notes://1")]
        # The copy that journaled it is up to date, and stays.
        await changes_of(two.manager).poll()
        assert two.residents == 1
        assert len(two.notes.replayed("initialize")) == 1
    assert ends == []


async def test_a_second_initialize_elsewhere_makes_a_copy_stale_too(
    store: FaultyStore, other_store: FaultyStore
) -> None:
    async with instance(store, end_within=LONG) as one, instance(other_store, end_within=LONG) as two:
        await one.first_poll()
        client = one.client()
        session_id = await client.handshake()
        newer = {**INITIALIZE_PARAMS, "clientInfo": {"name": "newer", "version": "2"}}
        assert (await two.client(session_id).initialize(newer)).status == 200
        await until(lambda: one.residents == 0)
        told = json.loads((await client.call("client")).text)
        assert told["params"]["clientInfo"]["name"] == "newer"
        await changes_of(two.manager).poll()
        assert two.residents == 1


async def test_of_two_copies_that_journal_at_once_the_stale_one_is_evicted(
    store: FaultyStore, other_store: FaultyStore
) -> None:
    store.hints = other_store.hints = False
    async with (
        instance(store, Stateful(), end_within=LONG, relay=False) as one,
        instance(other_store, Stateful(), end_within=LONG, relay=False) as two,
    ):
        await one.first_poll()
        client = one.client()
        session_id = await client.handshake()
        elsewhere = two.client(session_id)
        await elsewhere.ping()
        await subscribe(client, "notes://1")
        # This one learns by its own write that it has missed something.
        await subscribe(elsewhere, "notes://2")
        await until(lambda: two.residents == 0)
        await changes_of(one.manager).poll()
        await until(lambda: one.residents == 0)
        for each in (one, two):
            assert (await each.client(session_id).ping()).status == 200
            assert [about for _, about in each.notes.set_again] == ["notes://1", "notes://2"]  # type: ignore[attr-defined]


async def test_journaled_calls_that_run_at_once_in_one_copy_keep_it(store: FaultyStore, json_response: bool) -> None:
    notes = Stateful()
    async with instance(store, notes, json_response=json_response, end_within=LONG) as one:
        await one.first_poll()
        client = one.client()
        session_id = await client.handshake()
        calls = [client.open_request("resources/subscribe", {"uri": f"notes://{n}"}) for n in range(20)]
        for call in calls:
            assert (await call.answer()).result == {}
        await changes_of(one.manager).poll()
        assert resident_revision(one) == await revision(store, session_id) == 20
        assert one.residents == 1
        assert (await client.ping()).status == 200
        assert notes.replayed("initialize") == []


async def test_a_journaled_call_waits_for_the_one_before_to_be_committed(store: FaultyStore) -> None:
    notes = Stateful()
    async with instance(store, notes, end_within=LONG) as one:
        await one.first_poll()
        client = one.client()
        await client.handshake()
        # The answer of the first is slow, that of the second is not.
        held = store.hold("write_journal", after=True)
        first = client.open_request("resources/subscribe", {"uri": "notes://1"})
        await held.wait_entered()
        store.up()
        second = client.open_request("resources/subscribe", {"uri": "notes://2"})
        await until(lambda: len(notes.handled) == 2)
        await anyio.wait_all_tasks_blocked()
        assert store.counts()["write_journal"] == 1
        held.release()
        for call in (first, second):
            assert (await call.answer()).result == {}
        await changes_of(one.manager).poll()
        assert resident_revision(one) == 2
        assert (await client.ping()).status == 200
        assert notes.replayed("initialize") == []


async def test_a_second_initialize_waits_for_a_journaled_call_to_be_committed(store: FaultyStore) -> None:
    notes = Stateful()
    async with instance(store, notes, end_within=LONG) as one:
        await one.first_poll()
        client = one.client()
        await client.handshake()
        held = store.hold("write_journal", after=True)
        call = client.open_request("logging/setLevel", {"level": "debug"})
        await held.wait_entered()
        again = client.open_initialize({**INITIALIZE_PARAMS, "n": 1})
        await until(lambda: len(notes.genuine("initialize")) == 2)
        await anyio.wait_all_tasks_blocked()
        assert store.counts()["replace_initialize"] == 0
        held.release()
        assert (await call.answer()).result == {}
        assert (await again.answer()).status == 200
        await changes_of(one.manager).poll()
        assert resident_revision(one) == 2
        assert (await client.ping()).status == 200
        assert notes.replayed("initialize") == []


async def test_a_change_that_is_told_before_the_write_that_made_it_has_returned_evicts_nothing(
    store: FaultyStore,
) -> None:
    notes = Stateful()
    async with instance(store, notes, end_within=LONG) as one:
        await one.first_poll()
        client = one.client()
        await client.handshake()
        held = store.hold("write_journal", after=True)
        call = client.open_request("logging/setLevel", {"level": "debug"})
        await held.wait_entered()
        await changes_of(one.manager).poll()
        held.release()
        assert (await call.answer()).result == {}
        await anyio.wait_all_tasks_blocked()
        assert one.residents == 1
        assert (await client.ping()).status == 200
        assert notes.replayed("initialize") == []


@pytest.mark.parametrize("when", ["before the load", "after the load", "before the claim", "after the claim"])
async def test_what_another_instance_journals_during_a_restore_is_not_missed(
    store: FaultyStore, other_store: FaultyStore, when: str
) -> None:
    store.claims_first = "claim" in when
    after, _, operation = when.partition(" the ")
    async with instance(other_store, Stateful(), end_within=LONG) as two:
        elsewhere = two.client()
        session_id = await elsewhere.handshake()
        notes = Stateful()
        async with instance(store, notes, end_within=LONG) as one:
            await one.first_poll()
            client = one.client(session_id)
            held = store.hold(operation, after=after == "after")
            call = client.open_request("ping")
            await held.wait_entered()
            polls = store.background["changes"]
            await set_level(elsewhere, "debug")
            await until(lambda: store.background["changes"] > polls)
            held.release()
            assert (await call.answer()).status == 200
            await anyio.wait_all_tasks_blocked()
            assert (await client.ping()).status == 200
            assert notes.set_again[-1:] == [("logging/setLevel", "debug")]


async def test_a_request_that_joins_a_restore_finds_what_was_journaled_before_it_was_sent(
    store: FaultyStore, other_store: FaultyStore
) -> None:
    store.hints = False
    async with instance(other_store, Stateful(), end_within=LONG) as two:
        elsewhere = two.client()
        session_id = await elsewhere.handshake()
        notes = Stateful()
        reached, proceed = anyio.Event(), anyio.Event()

        async def hold(*_: object) -> None:
            reached.set()
            await proceed.wait()

        notes.on_initialize = hold
        async with instance(store, notes, end_within=LONG) as one:
            await one.first_poll()
            client = one.client(session_id)
            first = client.open_request("ping")
            await wait_for(reached)
            await set_level(elsewhere, "debug")
            second = client.open_request("ping")
            await anyio.wait_all_tasks_blocked()
            proceed.set()
            assert (await first.answer()).status == (await second.answer()).status == 200
            assert len(notes.replayed("initialize")) == 2
            assert notes.set_again == [("logging/setLevel", "debug")]


async def test_a_session_with_a_journal_is_claimed_before_it_is_served(store: FaultyStore) -> None:
    async with instance(store, Stateful()) as gone:
        client = gone.client()
        session_id = await client.handshake()
        await set_level(client, "debug")
    async with instance(store, Stateful()) as one:
        claim = store.hold("claim")
        call = one.client(session_id).open_request("ping")
        await claim.wait_entered()
        assert one.residents == 0
        claim.release()
        assert (await call.answer()).status == 200
        assert store.counts()["claim"] == 1
    assert store.claims(session_id) == []


async def test_a_restore_that_begins_anew_tells_who_had_the_session_before(
    store: FaultyStore, other_store: FaultyStore
) -> None:
    store.claims_first = True
    async with instance(other_store, Stateful(), end_within=LONG) as two:
        elsewhere = two.client()
        session_id = await elsewhere.handshake()
        notes = Stateful()
        async with instance(store, notes, end_within=LONG) as one:
            claim = store.hold("claim")
            call = one.client(session_id).open_request("ping")
            await claim.wait_entered()
            await set_level(elsewhere, "debug")
            claim.release()
            assert (await call.answer()).status == 200
            assert len(notes.replayed("initialize")) == 2
            (ping,) = notes.genuine("ping")
            assert ping.marker is not None
            assert ping.marker.previous_instance == two.manager.instance
            assert notes.set_again == [("logging/setLevel", "debug")]


async def test_a_restore_of_a_session_that_keeps_changing_gives_up(
    store: FaultyStore, other_store: FaultyStore
) -> None:
    store.claims_first = True
    async with instance(other_store, Stateful(), end_within=LONG) as two:
        elsewhere = two.client()
        session_id = await elsewhere.handshake()
        async with instance(store, Stateful(), end_within=LONG) as one:

            async def change() -> None:
                await set_level(elsewhere, "debug")

            store.before("claim", change)
            assert_not_handled(await one.client(session_id).ping())
            await until(lambda: stopping_in(one.manager) == {})
            one.assert_seats_match()
            store.up()
            assert (await one.client(session_id).ping()).status == 200


# Not journaled


async def test_requests_of_the_modern_era_are_not_journaled(store: FaultyStore) -> None:
    notes = Stateful()
    async with instance(store, notes, sweep_interval=None, journaled_methods=[PINNING]) as one:
        client = one.client()
        params = {
            "note": "a",
            "_meta": {
                "io.modelcontextprotocol/protocolVersion": "2026-07-28",
                "io.modelcontextprotocol/clientInfo": {"name": "tests", "version": "1"},
                "io.modelcontextprotocol/clientCapabilities": {},
            },
        }
        answer = await client.request("notes/pin", params, mcp_protocol_version="2026-07-28", mcp_method="notes/pin")
        assert answer.result is not None
        assert notes.handled == [("notes/pin", "a", False)]
        assert store.counts()["write_journal"] == 0
        assert store.records == 0


async def test_a_handler_whose_call_is_journaled_is_busy_until_the_commit(store: FaultyStore) -> None:
    async with instance(store, Stateful(), evict_after=0.05) as one:
        client = one.client()
        await client.handshake()
        held = store.hold("write_journal")
        call = client.open_request("logging/setLevel", {"level": "debug"})
        await held.wait_entered()
        call.cancel()
        await call.end()
        await anyio.sleep(0.2)
        assert one.residents == 1
        held.release()
        await until(lambda: one.residents == 0)
        await wait_for(held.entered)
        assert len(await rows(store, str(client.session_id))) == 1


def test_params_that_are_nested_too_deeply_are_refused_whatever_nests_them() -> None:
    nested: Any = "note://a"
    for _ in range(100_000):
        nested = [nested]
    for params in ({"uri": nested}, {"uri": "note://a", "_meta": nested}):
        with pytest.raises(MCPError) as refused:
            Journal().write("resources/subscribe", params)
        assert refused.value.error.code == types.INVALID_PARAMS
    with pytest.raises(MCPError):
        Journal().write("resources/unsubscribe", {"uri": nested})
