"""Whose session a message is for: of messages that follow each other closely one asks the store."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from mcp_session_store import RetentionPolicy
from mcp_session_store.adapter.sessions import lookup as lookup_module
from tests.support.asgi import until
from tests.support.asking import Asking, roots, text_of
from tests.support.instances import instance, principal
from tests.support.internals import outbox_is_empty, report_activity, unreported_in

if TYPE_CHECKING:
    from tests.support.asgi import Client
    from tests.support.faulty_stores import FaultyMailbox, FaultyStore
    from tests.support.instances import Clock, Instance

pytestmark = pytest.mark.anyio

ALICE = principal("app", subject="alice")
LATE = 2**30
"""Id of a question to which any answer is too late."""
LONG = 20.0
"""Seconds for which a check holds where a busy machine must not end it."""


@pytest.fixture
def _holds_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup_module, "HOLDS_FOR", LONG)


async def used_elsewhere(one: Instance, other: Instance, **of_client: Any) -> Client:
    """Return the client, on another instance, of a session that was used."""
    client = one.client(**of_client)
    session_id = await client.begin()
    await report_activity(one.manager)
    return other.client(session_id, **of_client)


async def answered(client: Client) -> int:
    """Return the status of an answer."""
    return (await client.respond(LATE, roots("late"))).status


@pytest.mark.usefixtures("_holds_long")
async def test_of_answers_that_follow_each_other_closely_one_asks_whose_session_it_is(
    store: FaultyStore, other_store: FaultyStore, mailbox: FaultyMailbox, clock: Clock
) -> None:
    async with (
        instance(store, Asking(), relay=mailbox) as one,
        instance(other_store, relay=mailbox, end_within=LONG) as other,
    ):
        client = await used_elsewhere(one, other)
        call = one.client(client.session_id).open_call("ask")
        question = await call.next()
        other_store.calls.clear()
        for _ in range(3):
            assert await answered(client) == 202
        await report_activity(other.manager)
        other_store.calls.clear()
        assert (await client.respond(question["id"], roots("x"))).status == 202
        assert text_of(await call.next()) == "file:///x"
        assert other_store.calls == []
        # Each is an activity all the same.
        assert len(unreported_in(other.manager)) == 1
        clock.advance(timedelta(seconds=LONG))
        assert await answered(client) == 202
        assert await answered(client) == 202
        assert other_store.calls == ["load"]


async def test_what_was_found_for_one_principal_holds_for_no_other(store: FaultyStore, mailbox: FaultyMailbox) -> None:
    async with instance(store, relay=mailbox) as one, instance(store, relay=mailbox) as other:
        client = await used_elsewhere(one, other, user=ALICE)
        assert await answered(client) == 202
        for user in (None, principal("app", subject="bob"), principal("other", subject="alice")):
            assert await answered(other.client(client.session_id, user=user)) == 404
        assert await answered(client) == 202


async def test_after_a_delete_here_the_next_answer_is_refused(store: FaultyStore, mailbox: FaultyMailbox) -> None:
    async with instance(store, relay=mailbox) as one, instance(store, relay=mailbox) as other:
        client = await used_elsewhere(one, other)
        assert await answered(client) == 202
        assert (await client.delete()).status == 200
        assert await answered(client) == 404


async def test_what_was_found_before_a_delete_here_is_not_remembered_after_it(
    store: FaultyStore, other_store: FaultyStore, mailbox: FaultyMailbox
) -> None:
    async with instance(store, relay=mailbox) as one, instance(other_store, relay=mailbox) as other:
        client = await used_elsewhere(one, other)
        found = other_store.hold("load", after=True)
        early = client.open("POST", {"jsonrpc": "2.0", "id": LATE, "result": {}})
        await found.wait_entered()
        other_store.up()
        assert (await client.delete()).status == 200
        found.release()
        await early.answer()
        assert await answered(client) == 404


@pytest.mark.parametrize("end_within", [0.3, 5.0])
async def test_after_a_delete_elsewhere_answers_are_refused_within_the_time_that_was_set(
    store: FaultyStore, mailbox: FaultyMailbox, clock: Clock, end_within: float
) -> None:
    async with (
        instance(store, relay=mailbox) as one,
        instance(store, relay=mailbox, end_within=end_within) as other,
    ):
        client = await used_elsewhere(one, other)
        assert await answered(client) == 202
        assert (await one.client(client.session_id).delete()).status == 200
        clock.advance(timedelta(seconds=min(end_within, 1.0) + 0.01))
        assert await answered(client) == 404


@pytest.mark.usefixtures("_holds_long")
async def test_an_answer_to_a_session_that_has_expired_is_refused_at_once(
    store: FaultyStore, mailbox: FaultyMailbox, clock: Clock
) -> None:
    store.retention = RetentionPolicy(idle=None, absolute=timedelta(seconds=LONG / 2))
    async with (
        instance(store, relay=mailbox) as one,
        instance(store, relay=mailbox, end_within=LONG) as other,
    ):
        client = await used_elsewhere(one, other)
        assert await answered(client) == 202
        clock.advance(timedelta(seconds=LONG / 2))
        assert await answered(client) == 404


@pytest.mark.usefixtures("_holds_long")
async def test_of_too_many_sessions_the_first_are_looked_up_again(
    store: FaultyStore, other_store: FaultyStore, mailbox: FaultyMailbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookup_module, "MAX_CHECKED", 2)
    async with (
        instance(store, relay=mailbox) as one,
        instance(other_store, relay=mailbox, end_within=LONG) as other,
    ):
        clients = [await used_elsewhere(one, other) for _ in range(3)]
        for client in clients:
            assert await answered(client) == 202
        other_store.calls.clear()
        for client in (clients[2], clients[1], clients[0]):
            assert await answered(client) == 202
        assert other_store.calls == ["load"]


@pytest.mark.usefixtures("_holds_long")
async def test_in_an_outage_a_session_that_was_found_a_moment_ago_has_its_answers_refused_and_not_kept(
    store: FaultyStore, other_store: FaultyStore, mailbox: FaultyMailbox, other_mailbox: FaultyMailbox
) -> None:
    async with (
        instance(store, relay=mailbox) as one,
        instance(other_store, relay=other_mailbox, end_within=LONG, outage_patience=0.5) as other,
    ):
        client = await used_elsewhere(one, other)
        assert await answered(client) == 202
        await until(lambda: outbox_is_empty(other.manager))
        posted = len(other_mailbox.posted)
        other_store.calls.clear()
        other_store.down()
        other_mailbox.down()
        assert await answered(client) == 503
        assert other_store.calls == []
        other_store.up()
        other_mailbox.up()
        await until(lambda: outbox_is_empty(other.manager))
        assert len(other_mailbox.posted) == posted
