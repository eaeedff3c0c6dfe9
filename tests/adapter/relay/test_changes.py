"""State that is set in one copy of a session counts in the others, also while they are in use."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import mcp_types as types
import pytest
from mcp.shared.exceptions import NoBackChannelError

from mcp_session_store import get_restore_marker, session_key
from mcp_session_store.adapter.replay.journal import MAX_CHANGE, ElsewhereChange, Journal, JournaledMethod, StateName
from mcp_session_store.adapter.sessions import refreshing
from mcp_session_store.mailbox import MessageKind
from mcp_session_store.memory import sessions as memory_module
from tests.support.asgi import until
from tests.support.http import INITIALIZE_PARAMS
from tests.support.instances import instance, principal
from tests.support.internals import changes_of, registry_of, resident_of
from tests.support.stateful import Stateful, set_level, subscribe

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.asgi import Client, Exchange
    from tests.support.faulty_stores import FaultyLog, FaultyStore
    from tests.support.instances import Instance, RequestContext

pytestmark = pytest.mark.anyio

LONG = 3600.0
"""Seconds within which changes are learned of: too long for a test to wait for."""
PINNING = JournaledMethod(method="notes/pin", subject="note", undone_by="notes/unpin")


class Pair:
    """Two instances with a copy each, of which the first has the client's stream."""

    def __init__(self, one: Instance, two: Instance, session_id: str, client: Client, stream: Exchange) -> None:
        self.one, self.two = one, two
        self.session_id = session_id
        self.client = client
        self.elsewhere = two.client(session_id)
        self.stream = stream

    @property
    def notes(self) -> tuple[Stateful, Stateful]:
        """Their servers."""
        first, second = self.one.notes, self.two.notes
        assert isinstance(first, Stateful)
        assert isinstance(second, Stateful)
        return first, second

    async def settled(self) -> None:
        """Wait until both copies have everything."""

        def have_all() -> bool:
            copies = [resident_of(each.manager, self.session_id) for each in (self.one, self.two)]
            revisions = {copy.record.revision for copy in copies if copy.record is not None}
            at_rest = sum(copy.in_flight for copy in copies) <= sum(notes.waiting for notes in self.notes)
            return len(revisions) == 1 and at_rest and not any(copy.stale for copy in copies)

        await until(have_all)
        await anyio.wait_all_tasks_blocked()

    async def learn(self) -> None:
        """Have both poll for changes."""
        for each in (self.one, self.two):
            await changes_of(each.manager).poll()


@asynccontextmanager
async def pair(
    store: FaultyStore, other_store: FaultyStore, *, params: dict[str, Any] | None = None, **options: Any
) -> AsyncIterator[Pair]:
    """Two copies of a session, which learn of changes by messages alone unless they poll."""
    store.hints = other_store.hints = False
    options = {"end_within": LONG, "journaled_methods": [PINNING], **options}
    async with instance(store, Stateful(), **options) as one, instance(other_store, Stateful(), **options) as two:
        await one.first_poll()
        await two.first_poll()
        client = one.client()
        session_id = await client.handshake(params)
        both = Pair(one, two, session_id, client, await client.get_stream())
        assert (await both.elsewhere.ping()).status == 200
        yield both


# A call runs in the other copies


async def test_what_a_call_to_one_copy_sets_is_set_in_the_other_that_has_the_stream(
    store: FaultyStore, other_store: FaultyStore, json_response: bool
) -> None:
    async with pair(store, other_store, json_response=json_response) as both:
        await set_level(both.elsewhere, "debug")
        await subscribe(both.elsewhere, "notes://1")
        await subscribe(both.elsewhere, "notes://1", un=True)
        assert (await both.elsewhere.request("notes/pin", {"note": {"id": 7}})).result == {}
        await both.settled()
        assert both.notes[0].set_again == [
            ("logging/setLevel", "debug"),
            ("resources/subscribe", "notes://1"),
            ("resources/unsubscribe", "notes://1"),
            ("notes/pin", "{'id': 7}"),
        ]
        # And back, in a copy that was restored.
        await set_level(both.client, "error")
        await both.settled()
        assert both.notes[1].set_again == [("logging/setLevel", "error")]
        assert store.counts()["read_journal"] == other_store.counts()["read_journal"] == 0
        # The client has heard nothing of all this, and neither copy has to be restored.
        await both.learn()
        assert (await both.client.ping()).messages[-1]["result"] == {}
        assert both.stream.messages == []
        assert len(both.notes[0].replayed("initialize")) == 0
        assert len(both.notes[1].replayed("initialize")) == 1
        assert await revision(store, both.session_id) == 5


async def revision(store: FaultyStore, session_id: str) -> int:
    record = await store.record(session_id)
    assert record is not None
    return record.revision


async def test_an_idle_copy_runs_it_too_and_stays(store: FaultyStore, other_store: FaultyStore) -> None:
    async with pair(store, other_store) as both:
        await subscribe(both.client, "notes://1")
        await both.settled()
        assert both.notes[1].set_again == [("resources/subscribe", "notes://1")]
        await both.learn()
        assert both.two.residents == 1
        assert not resident_of(both.two.manager, both.session_id).busy


async def test_its_handler_finds_the_marker_of_a_replay_and_nothing_of_the_request(
    store: FaultyStore, other_store: FaultyStore, log: FaultyLog, other_log: FaultyLog
) -> None:
    found: list[Any] = []

    async def tell(ctx: RequestContext) -> None:
        marker = get_restore_marker(ctx)
        if marker is None or not marker.replaying:
            return
        await ctx.session.send_notification(types.ToolListChangedNotification(), related_request_id=ctx.request_id)
        with pytest.raises(NoBackChannelError):
            await ctx.session.elicit_form("Which?", {"type": "object", "properties": {}}, ctx.request_id)
        assert ctx.request is not None
        found.append((marker, ctx.request, json.loads(await ctx.request.body())))

    options: dict[str, Any] = {"end_within": LONG}
    one_notes = Stateful()
    one_notes.on_state = tell
    alice = principal("alice")
    async with (
        instance(store, one_notes, events=log, **options) as one,
        instance(other_store, Stateful(), events=other_log, **options) as two,
    ):
        client = one.client(user=alice)
        session_id = await client.handshake()
        stream = await client.get_stream()
        answer = await two.client(session_id, user=alice).request(
            "logging/setLevel", {"level": "debug", "_meta": {"traceparent": "of the client", "progressToken": 3}}
        )
        assert answer.result == {}
        await until(lambda: found != [])
        ((marker, request, body),) = found
        assert (marker.session_id, marker.restores) == (session_id, 0)
        assert body["params"] == {"level": "debug", "_meta": {"progressToken": 3}}
        assert request.headers["mcp-session-id"] == session_id
        assert "authorization" not in request.headers
        assert "user" not in request.scope
        await until(lambda: not resident_of(one.manager, session_id).in_flight)
        assert (await client.ping()).status == 200
        assert not [message for message in stream.messages if "tools" in str(message)]
        assert not [message for message in log.messages(session_id) if "elicitation" in message or "tools" in message]


async def test_it_waits_for_no_other_message_and_none_waits_for_it(
    store: FaultyStore, other_store: FaultyStore, caplog: pytest.LogCaptureFixture
) -> None:
    async with pair(store, other_store, replay_timeout=1) as both:
        proceed = anyio.Event()

        async def hang(ctx: RequestContext) -> None:
            if ctx.method == "logging/setLevel":
                await proceed.wait()

        both.notes[0].on_state = hang
        await set_level(both.elsewhere, "debug")
        await until(lambda: both.notes[0].began == ["logging/setLevel"])
        # One of the relay's own, and a call of the client.
        assert (await both.elsewhere.notify("notifications/roots/list_changed")).status == 202
        await until(lambda: len(both.notes[0].genuine("notifications/roots/list_changed")) == 1)
        await subscribe(both.client, "notes://own")
        # Those that follow go on beside one that is slow.
        for n in range(3):
            await subscribe(both.elsewhere, f"notes://{n}")
        await until(lambda: len(both.notes[0].handled) == 4)
        assert resident_of(both.one.manager, both.session_id).stale is False
        proceed.set()
        await until(lambda: len(both.notes[0].handled) == 5)
        await both.settled()
        slow = [record for record in caplog.records if "slow" in record.getMessage()]
        assert len(slow) == 1
        both.stream.disconnect()
        await both.stream.end()
        both.one.assert_seats_match()


async def test_a_call_that_fails_in_another_copy_is_logged_and_the_next_one_runs(
    store: FaultyStore, other_store: FaultyStore, caplog: pytest.LogCaptureFixture
) -> None:
    async with pair(store, other_store) as both:

        async def fail(ctx: RequestContext) -> None:
            if ctx.method == "resources/subscribe":
                raise RuntimeError("the application's bug")

        both.notes[0].on_state = fail
        await subscribe(both.elsewhere, "notes://secret")
        await set_level(both.elsewhere, "debug")
        await both.settled()
        assert both.notes[0].set_again == [("logging/setLevel", "debug")]
        key = str(session_key(both.session_id))
        ours = [record.getMessage() for record in caplog.records if record.name.startswith("mcp_session_store")]
        assert any("resources/subscribe" in text and key in text for text in ours)
        assert not any("secret" in text for text in ours)


async def test_a_call_that_is_not_stored_runs_in_no_other_copy(
    store: FaultyStore, other_store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_module, "MAX_JOURNAL_ENTRIES", 1)
    async with pair(store, other_store) as both:
        await subscribe(both.elsewhere, "notes://1")
        answer = await both.elsewhere.request("resources/subscribe", {"uri": "notes://2"})
        assert answer.error
        await both.settled()
        assert both.notes[0].set_again == [("resources/subscribe", "notes://1")]
        posted = [message for message in other_store.mailbox.posted if message.kind is MessageKind.CHANGE]
        assert len(posted) == 1


# Calls that cross


@pytest.mark.parametrize("same", [True, False], ids=["about the same", "about two subjects"])
async def test_calls_to_two_copies_at_once_leave_both_as_the_journal_has_them(
    store: FaultyStore, other_store: FaultyStore, same: bool
) -> None:
    async with pair(store, other_store) as both:
        call = both.elsewhere.open_call("wait")
        await until(lambda: both.two.notes.waiting == 1)
        held = store.mailbox.hold("post"), other_store.mailbox.hold("post")
        levels = ("debug", "error") if same else ("debug", None)
        await set_level(both.client, "debug")
        if levels[1]:
            await set_level(both.elsewhere, levels[1])
        else:
            await subscribe(both.elsewhere, "notes://1")
        # It has something that comes after what it does not have.
        assert resident_of(both.two.manager, both.session_id).stale
        for each in held:
            each.release()
        for each_store in (store, other_store):
            each_store.mailbox.up()
        await both.settled()
        last = {about for method, about, _ in (notes.handled[-1] for notes in both.notes)}
        if same:
            assert [notes.handled[-1][1] for notes in both.notes] == ["error", "error"]
            # The other's older call would have undone it, for a moment.
            assert both.notes[1].set_again == []
        else:
            assert both.notes[0].set_again == [("resources/subscribe", "notes://1")]
            assert both.notes[1].set_again == [("logging/setLevel", "debug")]
            assert last == {"notes://1", "debug"}
        assert other_store.counts()["read_journal"] == 0
        both.two.notes.proceed.set()
        await call.answer()


@pytest.mark.parametrize("undoes", [False, True], ids=["set", "undone"])
async def test_a_call_that_another_overtakes_is_run_again_because_it_is_the_last_one(
    store: FaultyStore, other_store: FaultyStore, undoes: bool
) -> None:
    async with pair(store, other_store) as both:
        notes = both.notes[0]
        held = store.hold("write_journal")
        call = both.client.open_request(
            "resources/unsubscribe" if undoes else "resources/subscribe", {"uri": "notes://1"}
        )
        await held.wait_entered()
        # Its handler has run, and what the other sets comes between it and its commit.
        await subscribe(both.elsewhere, "notes://1", un=not undoes)
        await until(lambda: len(notes.set_again) == 1)
        store.up()
        held.release()
        assert (await call.answer()).result == {}
        await both.settled()
        last = "resources/unsubscribe" if undoes else "resources/subscribe"
        assert [each.handled[-1][:2] for each in both.notes] == [(last, "notes://1")] * 2
        assert await revision(store, both.session_id) == 2


# Messages that do not arrive


@pytest.mark.parametrize("relay", [True, False], ids=["message lost", "relay off"])
async def test_a_copy_in_use_that_misses_messages_reads_what_it_lacks(
    store: FaultyStore, other_store: FaultyStore, monkeypatch: pytest.MonkeyPatch, relay: bool
) -> None:
    options: dict[str, Any] = {} if relay else {"relay": False}
    monkeypatch.setattr(refreshing.Refresher, "take", lambda *_: None)
    async with pair(store, other_store, **options) as both:
        await set_level(both.client, "info")
        assert (await both.client.request("notes/pin", {"note": ["=a"]})).result == {}
        await subscribe(both.client, "notes://stays")
        for uri in ("notes://1", "notes://2", "notes://1"):
            await subscribe(both.elsewhere, uri)
        assert (await both.elsewhere.request("notes/unpin", {"note": ["=a"]})).result == {}
        await set_level(both.elsewhere, "debug")
        assert both.notes[0].set_again == []
        await both.learn()
        await until(lambda: not resident_of(both.one.manager, both.session_id).stale)
        assert both.notes[0].set_again == [
            ("notes/unpin", "['=a']"),
            ("resources/subscribe", "notes://2"),
            ("resources/subscribe", "notes://1"),
            ("logging/setLevel", "debug"),
        ]
        assert store.counts()["read_journal"] == 1
        # It is not read again, and the copy stays.
        await both.learn()
        await anyio.wait_all_tasks_blocked()
        assert store.counts()["read_journal"] == 1
        both.stream.disconnect()
        await both.stream.end()
        assert both.one.residents == 1


async def test_a_refresh_is_tried_again_while_the_store_is_away(
    store: FaultyStore, other_store: FaultyStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(refreshing, "RETRY_INTERVAL", 0.01)
    async with pair(store, other_store, relay=False) as both:
        await set_level(both.elsewhere, "debug")
        store.down("load", "read_journal")
        await changes_of(both.one.manager).poll()
        await until(lambda: store.counts()["load"] > 3)
        store.down("read_journal")
        store.up()
        await both.settled()
        assert both.notes[0].set_again == [("logging/setLevel", "debug")]
        assert len([record for record in caplog.records if "refresh" in record.getMessage()]) == 1


async def test_more_changes_than_may_wait_are_read_from_the_journal(
    store: FaultyStore, other_store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refreshing, "MAX_WAITING", 3)
    async with pair(store, other_store) as both:
        proceed = anyio.Event()

        async def hang(_ctx: RequestContext) -> None:
            await proceed.wait()

        both.notes[0].on_state = hang
        for n in range(8):
            await subscribe(both.elsewhere, f"notes://{n}")
        await until(lambda: resident_of(both.one.manager, both.session_id).stale_since == 8)
        proceed.set()
        await both.settled()
        assert [about for _, about in both.notes[0].set_again] == [f"notes://{n}" for n in range(8)]
        assert store.counts()["read_journal"] == 1


async def test_a_copy_that_cannot_undo_what_was_undone_elsewhere_leaves_when_it_is_not_in_use(
    store: FaultyStore, other_store: FaultyStore
) -> None:
    long = "n" * 600
    async with pair(store, other_store, relay=False) as both:
        assert (await both.client.request("notes/pin", {"note": long})).result == {}
        assert (await both.elsewhere.request("notes/unpin", {"note": long})).result == {}
        for _ in range(2):
            await both.learn()
            await anyio.wait_all_tasks_blocked()
        assert store.counts()["read_journal"] == 1
        assert both.one.residents == 1
        both.stream.disconnect()
        await until(lambda: both.one.residents == 0)
        both.one.assert_seats_match()


async def test_a_copy_whose_session_has_ended_is_not_refreshed(store: FaultyStore, other_store: FaultyStore) -> None:
    async with pair(store, other_store, relay=False) as both:
        held = store.hold("load")
        await set_level(both.elsewhere, "debug")
        await changes_of(both.one.manager).poll()
        await held.wait_entered()
        assert (await both.elsewhere.delete()).status == 200
        store.up()
        held.release()
        await until(lambda: both.one.residents == 0)
        assert both.notes[0].set_again == []


async def test_a_message_that_comes_while_its_session_is_restored_is_not_missed(
    store: FaultyStore, other_store: FaultyStore
) -> None:
    store.hints = other_store.hints = False
    async with instance(store, Stateful(), end_within=LONG) as one:
        session_id = await one.client().handshake()
        notes = Stateful()
        proceed = anyio.Event()

        async def wait(_ctx: RequestContext) -> None:
            await proceed.wait()

        notes.on_initialize = wait
        async with instance(other_store, notes, end_within=LONG) as two:
            await two.first_poll()
            call = two.client(session_id).open_call("add", {"a": 1, "b": 2})
            await until(lambda: notes.seen != [])
            await set_level(one.client(session_id), "debug")
            await anyio.wait_all_tasks_blocked()
            proceed.set()
            assert (await call.answer()).text == "3"
            await until(lambda: notes.set_again == [("logging/setLevel", "debug")])
            assert not resident_of(two.manager, session_id).stale


# A repeated handshake


async def test_an_initialize_that_is_repeated_elsewhere_is_repeated_in_a_copy_in_use(
    store: FaultyStore, other_store: FaultyStore
) -> None:
    async with pair(store, other_store) as both:
        await subscribe(both.client, "notes://1")
        newer = {**INITIALIZE_PARAMS, "clientInfo": {"name": "newer", "version": "2"}}
        assert (await both.elsewhere.initialize(newer)).status == 200
        await both.settled()
        told = json.loads((await both.client.call("client")).text)
        assert told["params"]["clientInfo"]["name"] == "newer"
        (marker,) = both.notes[0].initialized[1:]
        assert marker is not None
        # What it has already is not set again, and the client's own notification comes to nothing here.
        assert both.notes[0].set_again == []
        assert (await both.client.notify("notifications/initialized")).status == 202
        await both.one.at_rest()
        assert len(both.notes[0].initialized) == 2
        # That of a copy which has everything costs a load.
        assert not resident_of(both.two.manager, both.session_id).stale
        assert both.stream.messages == []


async def test_an_initialize_that_has_another_outcome_here_leaves_the_copy_until_it_is_not_in_use(
    store: FaultyStore, other_store: FaultyStore
) -> None:
    async with pair(store, other_store) as both:

        async def refuse(_ctx: RequestContext) -> None:
            raise RuntimeError("the application's bug")

        both.notes[0].on_initialize = refuse
        newer = {**INITIALIZE_PARAMS, "clientInfo": {"name": "newer", "version": "2"}}
        assert (await both.elsewhere.initialize(newer)).status == 200
        await until(lambda: store.counts()["read_journal"] == 1)
        await both.learn()
        assert (await both.client.ping()).status == 200
        assert both.one.residents == 1
        assert store.counts()["read_journal"] == 1
        both.stream.disconnect()
        await until(lambda: both.one.residents == 0)


# What travels


def test_a_change_says_no_more_than_what_fits() -> None:
    journal = Journal([PINNING])
    name = StateName("notes/pin", "a")

    def sent(method: str, params: dict[str, Any]) -> ElsewhereChange:
        return ElsewhereChange.decode(journal.change(7, journal.write(method, params), method, params))

    assert sent("notes/pin", {"note": "a"}) == ElsewhereChange(7, name, "notes/pin", {"note": "a"})
    assert sent("notes/unpin", {"note": "a", "b": 1}) == ElsewhereChange(7, name, "notes/unpin", {"note": "a", "b": 1})
    for params in ({"note": "a", "b": "b" * MAX_CHANGE}, {"note": "a", "b": float("nan")}):
        assert sent("notes/unpin", params) == ElsewhereChange(7)
    assert ElsewhereChange.decode('{"revision":7,"state":["a"],"values":{}}') == ElsewhereChange(7)
    for text in ("{}", "[]", "7", '{"revision":"7"}', "no JSON"):
        with pytest.raises(ValueError):  # noqa: PT011 - of json, too
            ElsewhereChange.decode(text)


@pytest.mark.parametrize("value", ["a", "=a", "sha256:a", None, {"b": [1]}, "ä\u0000\ud800"])
def test_a_subject_says_what_undoes_it(value: Any) -> None:
    journal = Journal([PINNING, JournaledMethod(method="notes/open", undone_by="notes/close")])
    name = journal.write("notes/pin", {"note": value}).name
    assert journal.undoing(name) == ("notes/unpin", {"note": value})
    assert journal.undoing(StateName("notes/open", "")) == ("notes/close", None)
    assert journal.undoing(StateName("notes/gone", "")) is None
    assert journal.undoing(StateName("logging/setLevel", "")) is None
    assert journal.undoing(journal.write("notes/pin", {"note": "n" * 600}).name) is None


async def test_a_journaled_call_costs_the_copies_of_other_sessions_nothing(
    store: FaultyStore, other_store: FaultyStore
) -> None:
    async with instance(store, Stateful()) as one, instance(other_store, Stateful()) as two:
        other = await two.client().handshake()
        client = one.client()
        await client.handshake()
        await set_level(client, "debug")
        await until(lambda: store.mailbox.posted != [])
        await anyio.wait_all_tasks_blocked()
        assert two.notes.replayed("logging/setLevel") == []
        assert [session.session_id for session in registry_of(two.manager)] == [other]
