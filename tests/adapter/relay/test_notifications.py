"""Notifications of clients: cancellation, progress, and those that concern every copy of a session."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest

from mcp_session_store.adapter.relay import relay as relay_module
from tests.support.asgi import PATIENCE, until
from tests.support.asking import Asking, roots, text_of
from tests.support.faulty_stores import FaultyMailbox
from tests.support.instances import instance, principal
from tests.support.internals import registry_of

if TYPE_CHECKING:
    from tests.support.faulty_stores import FaultyStore

pytestmark = pytest.mark.anyio

ROOTS_CHANGED = "notifications/roots/list_changed"


@pytest.fixture
def _progress_has_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have an answer wait for as long as a test does for the progress before it."""
    monkeypatch.setattr(relay_module, "CATCH_UP", PATIENCE)


async def test_a_call_is_cancelled_wherever_it_runs(store: FaultyStore, mailbox: FaultyMailbox) -> None:
    running = Asking()
    async with (
        instance(store, running, relay=mailbox) as one,
        instance(store, Asking(), relay=mailbox) as other,
        instance(store, relay=mailbox) as third,
    ):
        client = one.client()
        session_id = await client.begin()
        assert (await other.client(session_id).ping()).status == 200
        for elsewhere in (other, third):
            call = client.open_call("wait", request_id=f"call at {id(elsewhere)}")
            await until(lambda: running.waiting == 1)
            cancelled = await elsewhere.client(session_id).notify(
                "notifications/cancelled", {"requestId": f"call at {id(elsewhere)}"}
            )
            assert cancelled.status == 202
            await until(lambda: running.waiting == 0)
            # The stream of the call ends, as it does where the call runs.
            assert (await call.next())["error"]["message"] == "Request cancelled"
        assert third.residents == 0
        mailbox.posted.clear()
        call = client.open_call("wait", request_id=7)
        await until(lambda: running.waiting == 1)
        # As a text, as the SDK takes it too.
        assert (await client.notify("notifications/cancelled", {"requestId": "7"})).status == 202
        await until(lambda: running.waiting == 0)
        assert mailbox.posted == []


@pytest.mark.usefixtures("_progress_has_time")
async def test_progress_arrives_before_the_answer_that_came_after_it_whichever_way_each_takes(
    store: FaultyStore, mailbox: FaultyMailbox
) -> None:
    asking = Asking()
    async with (
        instance(store, asking, relay=mailbox) as one,
        instance(store, relay=mailbox) as other,
        instance(store, relay=mailbox) as third,
    ):
        client = one.client()
        session_id = await client.begin()
        clients = (client, other.client(session_id), third.client(session_id))
        # No hint arrives, and no read follows by itself for a while.
        for first in clients:
            for second in clients:
                asking.heard.clear()
                call = client.open_call("ask_for_progress")
                question = await call.next()
                token = question["params"]["_meta"]["progressToken"]
                assert token == question["id"]
                for progress in (1, 2):
                    params = {"progressToken": token, "progress": progress}
                    assert (await first.notify("notifications/progress", params)).status == 202
                assert (await second.respond(question["id"], roots("x"))).status == 202
                assert text_of(await call.next()) == "file:///x"
                assert asking.heard == ["1", "2", "file:///x"]
        assert other.residents == third.residents == 0


@pytest.mark.usefixtures("_progress_has_time")
async def test_an_answer_posted_here_follows_progress_posted_elsewhere_of_which_no_hint_came(
    store: FaultyStore,
) -> None:
    mailbox, asking = FaultyMailbox(store.inner), Asking()
    async with instance(store, asking, relay=mailbox) as one, instance(store, relay=mailbox) as other:
        client = one.client()
        session_id = await client.begin()
        call = client.open_call("ask_for_progress")
        question = await call.next()
        # The hint of it starts a read that does not return until the answer is there.
        held = mailbox.hold("receive")
        params = {"progressToken": question["id"], "progress": 1}
        assert (await other.client(session_id).notify("notifications/progress", params)).status == 202
        await held.entered.wait()
        answer = client.open("POST", {"jsonrpc": "2.0", "id": question["id"], "result": roots("x")})
        await anyio.wait_all_tasks_blocked()
        held.release()
        assert (await answer.answer()).status == 202
        await call.next()
        assert asking.heard == ["1", "file:///x"]


async def test_progress_with_a_token_of_the_applications_own_stays_local(
    store: FaultyStore, mailbox: FaultyMailbox
) -> None:
    notes = Asking()
    async with instance(store, relay=mailbox) as one, instance(store, notes, relay=mailbox) as other:
        session_id = await one.client().begin()
        elsewhere = other.client(session_id)
        assert (await elsewhere.ping()).status == 200
        params = {"progressToken": "of the application", "progress": 1}
        assert (await elsewhere.notify("notifications/progress", params)).status == 202
        await until(lambda: len(notes.genuine("notifications/progress")) == 1)
        assert mailbox.posted == []


async def test_changed_roots_reach_every_copy_once_each(store: FaultyStore, mailbox: FaultyMailbox) -> None:
    servers = [Asking() for _ in range(4)]
    async with (
        instance(store, servers[0], relay=mailbox) as one,
        instance(store, servers[1], relay=mailbox) as other,
        instance(store, servers[2], relay=mailbox) as third,
        instance(store, servers[3], relay=mailbox) as without_copy,
    ):
        client = one.client()
        session_id = await client.begin()
        assert (await other.client(session_id).ping()).status == 200
        assert (await client.notify(ROOTS_CHANGED)).status == 202
        await until(lambda: [server.roots_changed for server in servers] == [1, 1, 0, 0])
        # Here it restores a copy, as it does without other instances.
        assert (await third.client(session_id).notify(ROOTS_CHANGED)).status == 202
        await until(lambda: [server.roots_changed for server in servers] == [2, 2, 1, 0])
        await anyio.wait_all_tasks_blocked()
        assert [server.roots_changed for server in servers] == [2, 2, 1, 0]
        assert without_copy.residents == 0
        for each in (one, other, third):
            await each.at_rest()
            # The middleware has settled what it did not read from an HTTP request, too.
            assert [session.in_flight for session in registry_of(each.manager)] == [0]


async def test_a_notification_is_relayed_only_for_the_principal_of_its_session(
    store: FaultyStore, mailbox: FaultyMailbox
) -> None:
    server = Asking()
    async with instance(store, server, relay=mailbox) as one, instance(store, relay=mailbox) as other:
        client = one.client(user=principal("alice"))
        session_id = await client.begin()
        call = client.open_call("wait", request_id=7)
        await until(lambda: server.waiting == 1)
        stranger = other.client(session_id, user=principal("bob"))
        for method, params in (
            (ROOTS_CHANGED, {}),
            ("notifications/cancelled", {"requestId": 7}),
            ("notifications/progress", {"progressToken": 2**30, "progress": 1}),
        ):
            assert (await stranger.notify(method, params)).status == 404
        assert mailbox.posted == []
        assert server.waiting == 1
        server.proceed.set()
        await call.next()


async def test_a_client_that_escapes_slashes_is_understood(store: FaultyStore, mailbox: FaultyMailbox) -> None:
    running = Asking()
    async with instance(store, running, relay=mailbox) as one, instance(store, relay=mailbox) as other:
        client = one.client()
        session_id = await client.begin()
        client.open_call("wait", request_id=7)
        await until(lambda: running.waiting == 1)
        body = rb'{"jsonrpc":"2.0","method":"notifications\/cancelled","params":{"requestId":7}}'
        assert (await other.client(session_id).post(body)).status == 202
        await until(lambda: running.waiting == 0)


async def test_without_a_relay_nothing_is_posted(store: FaultyStore) -> None:
    async with instance(store, Asking()) as one, instance(store, Asking()) as other:
        client = one.client()
        session_id = await client.begin()
        question = await client.open_call("ask").next()
        elsewhere = other.client(session_id)
        assert (await elsewhere.respond(question["id"], roots("x"))).status == 202
        assert (await elsewhere.notify(ROOTS_CHANGED)).status == 202
